"""Where the slots of a pool lie in its region, and the allocator of their numbers."""

from collections.abc import Iterable
from typing import Any, NoReturn

from pyreserve._alloc.pages import NOT_IN_USE, PageAllocator
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import FreeError, RangeError
from pyreserve.units import GiB, as_bytes, as_count, round_up


class Slots(PageAllocator):
    """The allocator of slot numbers: each slot is a page."""

    __slots__ = ()

    @property
    def handle(self) -> Any:
        """The ``struct pagealloc *``, to call C."""
        return self._handle


class Geometry:
    """Where slots lie: one in each stride, its size rounded up to the alignment.

    With guards, a stride is unused bytes, the slot, and whole guard pages; without, the slot alone.

    Attributes:
        size: bytes of a slot.
        align: slots begin at multiples of it; a power of two.
        stride: bytes from one slot to the next.
        start: offset of the slot in its stride.
        guard: bytes of guard at the end of a stride; 0: none.
        count: number of slots.
    """

    __slots__ = ("align", "count", "guard", "size", "start", "stride")

    def __init__(
        self, item_size: int | str, capacity: int | None, align: int | str | None, guard: bool
    ) -> None:
        """Check the arguments of `Pool`.

        Raises:
            RangeError: a number is not positive, or `align` not a power of two.
        """
        size = as_bytes(item_size)
        align = min(1 << max(size - 1, 0).bit_length(), 16) if align is None else as_bytes(align)
        if size <= 0:
            msg = f"item_size must be positive, got {size}"
            raise RangeError(msg)
        if align <= 0 or align & (align - 1):
            msg = f"align must be a power of two, got {align}"
            raise RangeError(msg)
        self.size, self.align = size, align
        self.stride, self.start, self.guard = round_up(size, align), 0, 0
        if guard:
            self.guard = max(align, PAGE_SIZE)
            body = round_up(size, self.guard)
            self.start, self.stride = body - self.stride, body + self.guard
        self.count = (
            max(GiB // self.stride, 1) if capacity is None else as_count(capacity, "capacity")
        )
        if self.count <= 0:
            msg = f"capacity must be positive, got {self.count}"
            raise RangeError(msg)

    def pages_of(self, first: int, stop: int) -> tuple[int, int]:
        """Return offset and bytes of the whole pages inside the slots [first, stop).

        Those of the last slot include the page that it ends in.
        """
        lo, end = round_up(first * self.stride, PAGE_SIZE), stop * self.stride
        hi = round_up(end, PAGE_SIZE) if stop == self.count else end // PAGE_SIZE * PAGE_SIZE
        return lo, max(hi - lo, 0)

    def worth_trimming(self, runs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the runs that contain whole pages, longest last, then the tail if there is one.

        A decommitted hole takes a map entry; the tail, the run up to the last slot, takes none.
        """
        keys = [
            (stop == self.count, stop - first, first)
            for first, stop in runs
            if stop == self.count or self.pages_of(first, stop)[1]
        ]
        return [(first, first + n) for _, n, first in sorted(keys)]

    def refuse(self, slot: int, err: int) -> NoReturn:
        """Raise the exception for a refusal of C, an enum pagealloc_refusal."""
        if err == NOT_IN_USE and 0 <= slot < self.count:
            msg = f"slot {slot} is free: freed already or never allocated"
            raise FreeError(msg)
        msg = f"slot must be in [0, {self.count}), got {slot}"
        raise RangeError(msg)
