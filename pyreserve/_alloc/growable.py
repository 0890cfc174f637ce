"""Buffers and arrays that grow where they stand: nothing moves, so growing ends no view of them.

All addresses are reserved at first, and memory is committed in steps as the length needs it. What
is committed ahead is in no view: whatever stands above the length may be written or given back.
"""

import errno
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pyreserve._native import ffi
from pyreserve._region.owner import InSteps, as_step
from pyreserve._region.region import Fork, HugePages, Mode, import_numpy, reserve
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, RangeError
from pyreserve.units import KiB, MiB, format_size, round_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_Step = int | Literal["measured"]

_from_buffer = ffi.from_buffer
_memmove = ffi.memmove

# From so many bytes on, whole pages are dropped instead of overwritten, though to touch them again
# costs more: they may never be used.
_MUCH = 32 * MiB
_ZEROS = bytes(64 * KiB)

# Kinds of numpy's dtypes whose items are nothing but their bytes.
_PLAIN = frozenset("biufcmMSUV")


class _Growable(InSteps):
    """Bytes from the start of a region on: what the classes below have in common."""

    _unit: ClassVar[str]  # in messages: what is counted, and how many bytes it has
    _itemsize = 1

    def __init__(
        self,
        size: int,
        step: _Step,
        mode: Mode,
        fork: Fork,
        huge_pages: HugePages,
        name: str | None,
    ) -> None:
        prefer = huge_pages == "prefer"
        step = as_step(step, huge_pages)
        # On a line of steps, which `reserve` sees to where huge pages are preferred; but no further
        # apart than what is small can ever need.
        align = None if prefer else min(step & -step, 1 << max(size - 1, 0).bit_length())
        region = reserve(size, align=align, mode=mode, fork=fork, huge_pages=huge_pages, name=name)
        super().__init__(region, step, small_first=not prefer)
        self._size = size
        # In bytes; and up to where bytes may be other than zero, which is never below.
        self._length = self._dirty = 0

    @property
    def capacity(self) -> int:
        """How long it can get."""
        return self._size // self._itemsize

    def resize(self, length: int) -> None:
        """Make it `length` long; what it gains reads zero. Memory stays committed.

        Raises:
            RangeError: a negative length.
            ViewError: live views show bytes that would be cut off; nothing has changed.
            OutOfMemoryError: beyond the capacity (``limit="layout"``), or refused; nothing has
                changed.
            VMError: the kernel can't clear what was used before (before Linux 5.18: memory locked
                by mlock); the length is as it was.
            ReleasedError: it was released or closed.
            RuntimeError: called by a finaliser or signal handler inside another call.
        """
        self._alone(self._resize, _index(length) * self._itemsize)

    def clear(self) -> None:
        """Make it empty: ``resize(0)``."""
        self._alone(self._resize, 0)

    def shrink_to_fit(self) -> int:
        """Decommit the whole OS pages above the length; return how many bytes that gave back.

        Raises:
            VMError: refused; what was to be given back is still committed, unless it was the
                policies of the fresh addresses that the kernel refused: see `Region.decommit`.
            ReleasedError, RuntimeError: as for `resize`.
        """
        return self._alone(self._shrink)

    def __len__(self) -> int:
        self._alive()
        return self._length // self._itemsize

    def __repr__(self) -> str:
        name = f" {self._region.name!r}" if self._region.name else ""
        if self.released:
            return f"<{type(self).__name__}{name} for {self.capacity:,} {self._unit}, released>"
        return (
            f"<{type(self).__name__}{name} of {len(self):,} {self._unit}: room for "
            f"{self.capacity:,}, {format_size(self.committed)} committed>"
        )

    def _shrink(self) -> int:
        region, cut = self._region, round_up(self._length, PAGE_SIZE)
        before = region.committed
        if cut < before:
            self._end = min(self._end, cut)  # before it is so: to commit again does no harm
            region.decommit(cut, region.size - cut)
            self._dirty = min(self._dirty, cut)
        return before - region.committed

    def _resize(self, length: int) -> None:
        if length < self._length:
            self._cut(length)
            return
        self._make_room(length)
        self._clear(self._length, min(length, self._dirty))
        self._dirty = max(self._dirty, length)
        self._length = length

    def _cut(self, length: int) -> None:
        if length < 0:
            msg = f"a length is not negative: {length // self._itemsize}"
            raise RangeError(msg)
        region = self._region
        with region._taking_away() as interrupting:
            if region._views is not None:
                region._refuse_views("cut off", length, self._length, interrupting)
            self._length = length

    def _put(self, source: Any, nbytes: int) -> None:
        """Append bytes; where they come from may be part of what is there already."""
        if not nbytes:
            return
        start, end = self._length, self._length + nbytes
        self._make_room(end)
        self._dirty = max(self._dirty, end)
        _memmove(self._region._anchor(start), source, nbytes)
        self._length = end

    def _make_room(self, end: int) -> None:
        if end > self._size:
            items, length = end // self._itemsize, self._length // self._itemsize
            msg = f"no room for {items} {self._unit}: {length} in use of {self.capacity} reserved"
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="grow", nbytes=end, limit="layout")
        self._commit(end)

    def _clear(self, start: int, end: int) -> None:
        """Make committed bytes that are in no view read zero."""
        first, last = round_up(start, PAGE_SIZE), end // PAGE_SIZE * PAGE_SIZE
        if last - first < _MUCH:
            first = last = end
        else:
            self._region.discard(first, last - first)
        for low, high in ((start, first), (last, end)):
            for at in range(low, high, len(_ZEROS)):
                nbytes = min(high - at, len(_ZEROS))
                _memmove(self._region._anchor(at), _ZEROS, nbytes)


class GrowableBuffer(_Growable):
    """Up to `capacity` bytes that grow where they stand, from none.

    Growing never moves a byte and never ends a view, and what it gains reads zero. Only what lies
    above the length is given back, and bytes in a live view are never cut off. Committed are steps
    that end on addresses that are multiples of `step`, so that the kernel can use huge pages; the
    first 64 KiB come alone, in small pages, unless huge ones are preferred.

    Any thread may call it. A finaliser or signal handler that interrupts a call may find
    RuntimeError, never a half-done change.

    Args:
        capacity: bytes to reserve, all that it can ever hold.
        step: in bytes, whole OS pages; or ``"measured"``: what suits this machine, as
            `pyreserve.costs.measured_step` finds it in up to two seconds, once in a process.
        mode, fork, huge_pages, name: as for `pyreserve.reserve`, which may raise what it says
            there.

    Raises:
        RangeError: a capacity or step that makes no sense.
        ValueError, OSError: another word, or ``"measured"`` can't be told: see
            `pyreserve.costs.measured_step`.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _what, _unit = "buffer", "bytes"

    def __init__(
        self,
        capacity: int,
        *,
        step: int | Literal["measured"] = 2 * MiB,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages = "default",
        name: str | None = None,
    ) -> None:
        super().__init__(_index(capacity), step, mode, fork, huge_pages, name)

    def extend(self, data: Any) -> None:
        """Append the bytes of any C-contiguous buffer, such as a view of this one. One copy.

        Raises:
            TypeError: `data` is no buffer; BufferError or ValueError: not a contiguous one.
            OutOfMemoryError, ReleasedError, RuntimeError: as for `resize`.
        """
        with _from_buffer(data) as source:
            self._alone(self._put, source, len(source))

    def view(self, lo: int = 0, hi: int | None = None, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of [lo, hi), by default of all there is now; safe as a region's.

        It stays as it is when the buffer grows. While it, or anything made from it, is alive, its
        bytes can't be cut off.

        Raises:
            RangeError: not inside the buffer's length, which negative numbers are not.
            ReleasedError, RuntimeError: as for `resize`.
        """
        lo, hi = _index(lo), None if hi is None else _index(hi)
        return self._alone(self._view, lo, hi, bool(readonly))

    def _view(self, lo: int, hi: int | None, readonly: bool) -> memoryview:
        hi = self._length if hi is None else hi
        if not 0 <= lo <= hi <= self._length:
            msg = f"no bytes [{lo}, {hi}) in a buffer of {self._length}"
            raise RangeError(msg)
        if lo < hi:
            return self._region.view(lo, hi - lo, readonly=readonly)
        return memoryview(b"" if readonly else bytearray())


class GrowableArray(_Growable):
    """Up to `capacity` items of one dtype, a numpy array that grows where it stands, from none.

    Growing never moves an item: ndarrays got before stay valid and share memory with later ones.
    Sizes, memory and threads are as for `GrowableBuffer`.

    Args:
        dtype: of the items, which are nothing but their bytes: no objects.
        capacity: items to reserve addresses for, all that it can ever hold.
        step, mode, fork, huge_pages, name: as for `GrowableBuffer`.

    Raises:
        ImportError: numpy is missing (extra ``numpy``).
        TypeError: a dtype with references, without a size, or with a shape of its own.
        RangeError, ValueError, OSError: as for `GrowableBuffer`.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _what, _unit = "array", "items"

    def __init__(
        self,
        dtype: "npt.DTypeLike",
        capacity: int,
        *,
        step: int | Literal["measured"] = 2 * MiB,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages = "default",
        name: str | None = None,
    ) -> None:
        self._numpy = import_numpy("GrowableArray")
        self._dtype = kind = self._numpy.dtype(dtype)
        if kind.kind not in _PLAIN or kind.hasobject or not kind.itemsize or kind.subdtype:
            msg = f"items are of a fixed size, one each, without references: not {kind!r}"
            raise TypeError(msg)
        self._itemsize = int(kind.itemsize)
        # The array as it was last asked for, kept for the next time: the bytes that it pins are
        # let go before any are cut off.
        self._kept: Any = None
        super().__init__(_index(capacity) * self._itemsize, step, mode, fork, huge_pages, name)

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of the items."""
        return self._dtype  # type: ignore[no-any-return]

    @property
    def array(self) -> "np.ndarray[Any, Any]":
        """The items there are now, as an ndarray on the same memory.

        It keeps its length when there are more. While it, or anything made from it, is alive, its
        items can't be cut off.

        Raises:
            ReleasedError, RuntimeError: as for `resize`.
        """
        return self._alone(self._whole)

    def append(self, value: Any) -> None:
        """Append one item, whatever numpy can make an item of.

        Raises:
            TypeError, ValueError, OverflowError: numpy's, or it is more than one item.
            OutOfMemoryError, ReleasedError, RuntimeError: as for `resize`.
        """
        item = self._numpy.array(value, dtype=self._dtype)
        if item.ndim:
            msg = f"an item to append, not an array of shape {item.shape}"
            raise ValueError(msg)
        self._alone(self._put, item.tobytes(), self._itemsize)

    def extend(self, values: "npt.ArrayLike") -> None:
        """Append the items of a one-dimensional array, or of what numpy can make one of.

        Raises:
            TypeError, ValueError, OverflowError: numpy's, or it has not one dimension.
            OutOfMemoryError, ReleasedError, RuntimeError: as for `resize`.
        """
        items = self._numpy.asarray(values, dtype=self._dtype, order="C")
        if items.ndim != 1:
            msg = f"items to append have one dimension, not the shape {items.shape}"
            raise ValueError(msg)
        with _from_buffer(items.view("uint8")) as source:
            self._alone(self._put, source, len(source))

    def _whole(self) -> Any:
        if not self._length:
            return self._numpy.empty(0, self._dtype)
        if self._kept is None or self._kept.nbytes != self._length:
            self._kept = self._region.view(0, self._length)
        # An array of its own for each caller, who may give it another shape or dtype.
        return self._numpy.frombuffer(self._kept, dtype=self._dtype)

    def _cut(self, length: int) -> None:
        self._kept = None
        super()._cut(length)

    def _release(self) -> None:
        self._kept = None
        super()._release()

    def _let_go(self) -> None:
        self._kept = None
        super()._let_go()

    def __getitem__(self, key: Any) -> Any:
        """Return what numpy finds there: an item, or an array that shares memory for a slice."""
        return self._alone(self._whole)[key]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the items that there are now."""
        return iter(self.array)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return `array`, or a copy if it must be one: numpy's protocol."""
        kind = self._dtype if dtype is None else self._numpy.dtype(dtype)
        if copy is False and kind != self._dtype:
            msg = f"items of {self._dtype} can't be had as {kind} without a copy"
            raise ValueError(msg)
        return self.array.astype(kind, copy=bool(copy))
