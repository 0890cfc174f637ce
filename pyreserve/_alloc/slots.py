"""The places of a pool's slots in its region, and the allocator of their numbers."""

from operator import index as _index
from typing import Any

from pyreserve._alloc.pages import PageAllocator
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import RangeError
from pyreserve.units import GiB, as_bytes, round_up


class Slots(PageAllocator):
    """The slots of a pool, as pages."""

    __slots__ = ()

    @property
    def handle(self) -> Any:
        """The ``struct pagealloc *``, for calls of C."""
        return self._handle


class Geometry:
    """Where slots lie. Without guards one follows the other, rounded up to the alignment.

    With guards each slot ends, rounded up to the alignment, where the pages of its guard begin.

    Attributes:
        size: bytes of a slot.
        align: slots begin at multiples of it; a power of two.
        stride: bytes from one slot to the next.
        start: bytes of a stride below its slot.
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
        self.count = max(GiB // self.stride, 1) if capacity is None else _index(capacity)
        if self.count <= 0:
            msg = f"capacity must be positive, got {self.count}"
            raise RangeError(msg)
