"""Buffers and arrays that grow in place: nothing moves, so growth invalidates no view.

All addresses are reserved at once; memory is committed in steps as the length grows. No view shows
bytes above the length, so these may be written or decommitted at any time.
"""

import errno
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, overload

from pyreserve._region.arrays import import_numpy
from pyreserve._region.handles import from_buffer, memmove
from pyreserve._region.owner import Exclusive, as_step
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.reserve import reserve
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, RangeError
from pyreserve.units import KiB, MiB, as_bytes, format_size, round_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_Item = TypeVar("_Item", bound="np.generic")

# From this many bytes up, discard pages instead of zeroing them. Touching a discarded page costs
# more than zeroing it, but many may never be touched again.
_DISCARD_FROM = 32 * MiB
_ZEROS = bytes(64 * KiB)

# Kinds of numpy dtypes whose items hold no references.
_PLAIN_KINDS = frozenset("biufcmMSUV")


class _Growable(Exclusive):
    """Items from the start of a region up: the base of GrowableBuffer and GrowableArray."""

    _unit: ClassVar[str]  # plural of the item, for messages
    _itemsize = 1  # bytes

    def __init__(
        self,
        size: int,
        step: int | str,
        mode: Mode,
        fork: Fork,
        huge_pages: HugePages,
        name: str | None,
    ) -> None:
        if size <= 0:
            msg = f"capacity must be positive, got {size // self._itemsize}"
            raise RangeError(msg)
        prefer = huge_pages == "prefer"
        step = as_step(step)
        # Align the base to the step, or for a small capacity to a power of two that holds it. With
        # huge_pages="prefer", `reserve` aligns.
        align = None if prefer else min(step & -step, 1 << max(size - 1, 0).bit_length())
        region = reserve(size, align=align, mode=mode, fork=fork, huge_pages=huge_pages, name=name)
        super().__init__(region, step, small_first=not prefer)
        self._size = size
        # In bytes. Bytes from _dirty_end up, which is never below _length, are zero.
        self._length = self._dirty_end = 0

    @property
    def capacity(self) -> int:
        """The maximum length."""
        return self._size // self._itemsize

    def resize(self, length: int) -> None:
        """Set the length. New items are zero; memory above the length stays committed.

        Raises:
            RangeError: `length` is negative.
            ViewError: live views show bytes above the new length; nothing has changed.
            OutOfMemoryError: `length` exceeds the capacity (``limit="capacity"``), or the kernel
                refused memory; nothing has changed.
            VMError: bytes used before can't be discarded (before Linux 5.18: memory locked by
                mlock); the length has not changed.
            ReleasedError: it was released or closed.
            StateError: called by a finaliser or signal handler inside another call.
        """
        self._exclusively(self._resize, _index(length) * self._itemsize)

    def clear(self) -> None:
        """Set the length to 0, as ``resize(0)`` does."""
        self._exclusively(self._resize, 0)

    def trim(self) -> int:
        """Decommit the whole OS pages above the length; return their bytes.

        Raises:
            VMError: refused; the pages are still committed, unless the kernel refused only the
                policies of the fresh addresses: see `Region.decommit`.
            ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._decommit_tail)

    def __len__(self) -> int:
        self._check_open()
        return self._length // self._itemsize

    def __repr__(self) -> str:
        name = f" {self._region.name!r}" if self._region.name else ""
        if self.released:
            return f"<{type(self).__name__}{name} for {self.capacity:,} {self._unit}, released>"
        return (
            f"<{type(self).__name__}{name} of {len(self):,} {self._unit}: capacity "
            f"{self.capacity:,}, {format_size(self.committed)} committed>"
        )

    def _decommit_tail(self) -> int:
        region, cut = self._region, round_up(self._length, PAGE_SIZE)
        before = region.committed
        if cut < before:
            # Lower _end first: if this call is interrupted, committing again is harmless.
            self._end = min(self._end, cut)
            self._exports.decommit(cut, region.size - cut)
            self._dirty_end = min(self._dirty_end, cut)
        return before - region.committed

    def _resize(self, length: int) -> None:
        if length < self._length:
            self._truncate(length)
            return
        self._grow_to(length)
        self._clear(self._length, min(length, self._dirty_end))
        self._dirty_end = max(self._dirty_end, length)
        self._length = length

    def _truncate(self, length: int) -> None:
        if length < 0:
            msg = f"length must not be negative, got {length // self._itemsize}"
            raise RangeError(msg)
        with self._exports.removal():
            if length < self._length:
                self._exports.refuse("cut off", length, self._length)
            self._length = length

    def _append_bytes(self, source: Any, nbytes: int) -> None:
        """Append `nbytes` bytes at `source`, which may lie in this object."""
        if not nbytes:
            return
        start, end = self._length, self._length + nbytes
        self._grow_to(end)
        self._dirty_end = max(self._dirty_end, end)
        memmove(self._exports.address(start), source, nbytes)
        self._length = end

    def _grow_to(self, end: int) -> None:
        """Commit the bytes below `end`, which must be within the capacity."""
        if end > self._size:
            items, length = end // self._itemsize, self._length // self._itemsize
            msg = f"cannot grow to {items} {self._unit}: {length} of {self.capacity} are in use"
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="grow", nbytes=end, limit="capacity")
        self._commit(end)

    def _clear(self, start: int, end: int) -> None:
        """Zero the committed bytes [start, end), which are in no view."""
        first, last = round_up(start, PAGE_SIZE), end // PAGE_SIZE * PAGE_SIZE
        if last - first < _DISCARD_FROM:
            first = last = end
        else:
            self._exports.discard(first, last - first)
        for low, high in ((start, first), (last, end)):
            for at in range(low, high, len(_ZEROS)):
                nbytes = min(high - at, len(_ZEROS))
                memmove(self._exports.address(at), _ZEROS, nbytes)


class GrowableBuffer(_Growable):
    """A buffer of up to `capacity` bytes that grows in place; initially empty.

    Growing never moves a byte or invalidates a view, and new bytes are zero. Bytes below the length
    are never decommitted, and bytes in a live view never cut off. Each commit ends at an address
    that is a multiple of `step`, so that the kernel can use huge pages. The first one is 64 KiB, in
    small pages, unless huge pages are preferred.

    Any thread may call it. A finaliser or signal handler that interrupts a call may get
    StateError, but never sees a half-done change.

    Args:
        capacity: bytes to reserve, or a size such as ``"1GiB"``: the maximum length.
        step: bytes to commit at a time, a multiple of the OS page; see
            `pyreserve.costs.measured_step` for the best one on this machine.
        mode, fork, huge_pages, name: as for `pyreserve.reserve`, whose exceptions apply too.

    Raises:
        RangeError: `capacity` is not positive, or `step` not a positive multiple of the OS page.
        ValueError: an unknown policy, or a string that is not a size.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _noun, _unit = "buffer", "bytes"

    def __init__(
        self,
        capacity: int | str,
        *,
        step: int | str = 2 * MiB,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages = "default",
        name: str | None = None,
    ) -> None:
        super().__init__(as_bytes(capacity), step, mode, fork, huge_pages, name)

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
        hi = self._length if hi is None else hi
        if not 0 <= lo <= hi <= self._length:
            msg = f"view must satisfy 0 <= lo <= hi <= {self._length}, got [{lo}, {hi})"
            raise RangeError(msg)
        if lo < hi:
            return self._region.view(lo, hi - lo, readonly=readonly)
        return memoryview(b"" if readonly else bytearray())


class GrowableArray(_Growable, Generic[_Item]):
    """A numpy array of up to `capacity` items that grows in place; one dtype, initially empty.

    Growing never moves an item: earlier ndarrays stay valid and share memory with later ones.
    Sizes, memory and threads are as for `GrowableBuffer`. The class is generic in the type of its
    items, such as ``GrowableArray[np.float64]``; numpy's type of the dtype determines it.

    Args:
        dtype: numpy dtype of the items: no references, a fixed size, no shape of its own.
        capacity: items to reserve addresses for: the maximum length.
        step, mode, fork, huge_pages, name: as for `GrowableBuffer`.

    Raises:
        ImportError: numpy is missing (extra ``numpy``).
        TypeError: a dtype with references, without a size, or with a shape of its own.
        RangeError, ValueError: as for `GrowableBuffer`.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _noun, _unit = "array", "items"

    @overload
    def __init__(
        self,
        dtype: "np.dtype[_Item] | type[_Item]",
        capacity: int,
        *,
        step: int | str = ...,
        mode: Mode = ...,
        fork: Fork = ...,
        huge_pages: HugePages = ...,
        name: str | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: "GrowableArray[Any]",
        dtype: "npt.DTypeLike",
        capacity: int,
        *,
        step: int | str = ...,
        mode: Mode = ...,
        fork: Fork = ...,
        huge_pages: HugePages = ...,
        name: str | None = ...,
    ) -> None: ...
    def __init__(
        self,
        dtype: Any,
        capacity: int,
        *,
        step: int | str = 2 * MiB,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages = "default",
        name: str | None = None,
    ) -> None:
        self._numpy = import_numpy("GrowableArray")
        self._dtype = kind = self._numpy.dtype(dtype)
        if kind.kind not in _PLAIN_KINDS or kind.hasobject or not kind.itemsize or kind.subdtype:
            msg = f"dtype must have a fixed size, without references or shape, got {kind!r}"
            raise TypeError(msg)
        self._itemsize = int(kind.itemsize)
        # The view behind the last `array`, for the next one. It pins bytes, so it is dropped
        # before any are cut off.
        self._cached_view: Any = None
        super().__init__(_index(capacity) * self._itemsize, step, mode, fork, huge_pages, name)

    @property
    def dtype(self) -> "np.dtype[_Item]":
        """The dtype of the items."""
        return self._dtype  # type: ignore[no-any-return]

    @property
    def array(self) -> "npt.NDArray[_Item]":
        """An ndarray over the current items, without a copy.

        It keeps its length when this array grows. While it, or anything made from it, is alive, its
        items can't be cut off.

        Raises:
            ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._as_array)

    def append(self, value: Any) -> None:
        """Append one item: any value that numpy converts to the dtype.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `value` is not a single item.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        item = self._numpy.array(value, dtype=self._dtype)
        if item.ndim:
            msg = f"value must be a single item, got an array of shape {item.shape}"
            raise ValueError(msg)
        self._exclusively(self._append_bytes, item.tobytes(), self._itemsize)

    def extend(self, values: "npt.ArrayLike") -> None:
        """Append the items of a one-dimensional array, or of values that numpy converts to one.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `values` is not
                one-dimensional.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        items = self._numpy.asarray(values, dtype=self._dtype, order="C")
        if items.ndim != 1:
            msg = f"values must have one dimension, got shape {items.shape}"
            raise ValueError(msg)
        with from_buffer(items.view("uint8")) as source:
            self._exclusively(self._append_bytes, source, len(source))

    def _as_array(self) -> Any:
        if not self._length:
            return self._numpy.empty(0, self._dtype)
        if self._cached_view is None or self._cached_view.nbytes != self._length:
            self._cached_view = self._region.view(0, self._length)
        # A new array for each caller, who may change its shape or dtype.
        return self._numpy.frombuffer(self._cached_view, dtype=self._dtype)

    def _truncate(self, length: int) -> None:
        self._cached_view = None
        super()._truncate(length)

    def _release(self) -> None:
        self._cached_view = None
        super()._release()

    def _finish_close(self) -> None:
        self._cached_view = None
        super()._finish_close()

    def __getitem__(self, key: Any) -> Any:
        """Index the current items as numpy does; a slice is an array without a copy."""
        return self._exclusively(self._as_array)[key]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the current items."""
        return iter(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return `array`, or a copy for another dtype or ``copy=True``: numpy's array protocol."""
        kind = self._dtype if dtype is None else self._numpy.dtype(dtype)
        if copy is False and kind != self._dtype:
            msg = f"items of {self._dtype} can't become {kind} without a copy (copy=False)"
            raise ValueError(msg)
        return self.array.astype(kind, copy=bool(copy))
