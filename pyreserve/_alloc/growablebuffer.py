"""GrowableBuffer: bytes that grow in place."""

from operator import index as _index
from typing import Any

from pyreserve._alloc.growable import Growable
from pyreserve._region.handles import from_buffer, memmove
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve.errors import RangeError
from pyreserve.units import as_bytes


class GrowableBuffer(Growable):
    """A buffer of up to `capacity` bytes that grows in place; initially empty.

    Growing never moves a byte or invalidates a view, and new bytes are zero. Bytes below the length
    are never decommitted, and bytes in a live view never cut off.

    Memory is committed ahead of the length: at first twice as much, in small pages, and above one
    huge page (2 MiB) an eighth more, at least 2 MiB and at most 64 MiB, in whole huge pages. What
    is committed ahead takes no memory until it is used, but in mode ``"charge"`` it is charged
    against the commit limit. If the kernel refuses, less is committed ahead, at last nothing.

    Any thread may call it. A finaliser or signal handler that interrupts a call may get
    StateError, but never sees a half-done change.

    Args:
        capacity: bytes to reserve, or a size such as ``"1GiB"``: the maximum length. None: twice
            the machine's memory, at least 64 GiB; less on 32-bit and under RLIMIT_AS, and the more
            addresses other default capacities take: together at most a quarter of all.
        step: bytes to commit at a time, a multiple of the OS page; see
            `pyreserve.costs.measured_step`. Each commit then ends at an address that is a multiple
            of it; the first one is 64 KiB, unless huge pages are preferred. None: the growing steps
            described above.
        huge_pages: as for `pyreserve.reserve`. None: ``"prefer"`` if a huge page is at most 32 MiB
            and the capacity above that of a huge page, else small pages; with a `step`,
            ``"default"``. Without a `step`, the first 64 KiB are small pages in any case.
        mode, fork, name: as for `pyreserve.reserve`, whose exceptions apply too.

    Raises:
        RangeError: `capacity` is not positive, or `step` not a positive multiple of the OS page.
        ValueError: an unknown policy, or a string that is not a size.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _noun, _unit = "buffer", "bytes"

    def __init__(
        self,
        capacity: int | str | None = None,
        *,
        step: int | str | None = None,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages | None = None,
        name: str | None = None,
    ) -> None:
        size = None if capacity is None else as_bytes(capacity)
        super().__init__(size, step, mode, fork, huge_pages, name)

    def extend(self, data: Any) -> None:
        """Append the bytes of a C-contiguous buffer, which may be a view of this one. One copy.

        Raises:
            TypeError: `data` is not a buffer.
            BufferError, ValueError: `data` is not contiguous.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        with from_buffer(data) as source:
            self._exclusively(self._append_bytes, source, len(source))

    def view(self, lo: int = 0, hi: int | None = None, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of [lo, hi), by default of the whole current length.

        It keeps its length when the buffer grows. While it, or anything made from it, is alive, its
        bytes can't be cut off; see `pyreserve.Region.view`.

        Raises:
            RangeError: not ``0 <= lo <= hi <= len(buffer)``.
            ReleasedError, StateError: as for `resize`.
        """
        lo, hi = _index(lo), None if hi is None else _index(hi)
        return self._exclusively(self._view, lo, hi, bool(readonly))

    def _view(self, lo: int, hi: int | None, readonly: bool) -> memoryview:
        hi = self._count if hi is None else hi
        if not 0 <= lo <= hi <= self._count:
            msg = f"view must satisfy 0 <= lo <= hi <= {self._count}, got [{lo}, {hi})"
            raise RangeError(msg)
        if lo < hi:
            return self._region.view(self._front + lo, hi - lo, readonly=readonly)
        return memoryview(b"" if readonly else bytearray())

    def _over(self, view: memoryview | None) -> Any:
        return memoryview(bytearray()) if view is None else view

    def _append_bytes(self, source: Any, nbytes: int) -> None:
        """Append `nbytes` bytes at `source`, which may lie in this object."""
        if not nbytes:
            return
        end = self._count + nbytes
        self._make_room(end)
        self._dirty_end = max(self._dirty_end, self._offset(end))
        memmove(self._exports.address(self._offset(self._count)), source, nbytes)
        self._count = end
