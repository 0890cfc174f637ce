"""GrowableArray: a numpy array that grows in place."""

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import islice
from operator import index as _index
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from pyreserve._alloc.appender import REFUSED, Appender, make_appender
from pyreserve._alloc.arrayoperators import ArrayOperators
from pyreserve._alloc.growable import Growable
from pyreserve._region.arrays import import_numpy, item_dtype
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve.errors import RangeError, ReleasedError, StateError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_Item = TypeVar("_Item", bound="np.generic")
_T = TypeVar("_T")

# Formats of items that a memoryview stores faster than numpy, and as numpy does or not at all.
_FAST_FORMATS = frozenset("bBhHiIlLqQfd?")
# Items of an iterable that are converted at a time.
_CHUNK = 4096


@cache
def _scalar_types() -> frozenset[type]:
    """Return the types of numbers that convert without running Python code."""
    numpy = import_numpy("GrowableArray")
    kinds = {
        kind for kind in numpy.sctypeDict.values() if issubclass(kind, (numpy.number, numpy.bool_))
    }
    return frozenset({bool, int, float, complex, *kinds})


class GrowableArray(ArrayOperators, Growable, Generic[_Item]):
    """A numpy array of up to `capacity` items that grows in place; one dtype, initially empty.

    Growing never moves an item, except as `drop_front` says: earlier ndarrays stay valid and share
    memory with later ones.
    Sizes, memory and threads are as for `GrowableBuffer`. The class is generic in the type of its
    items, such as ``GrowableArray[np.float64]``; numpy's type of the dtype determines it.

    Indexing, operators and ufuncs work as on `array`; operators such as ``+=`` write in place. With
    an `item_shape` each item is a row: an array of that shape, such as a vector.

    Args:
        dtype: numpy dtype of the items: no references, a fixed size, no shape of its own.
        capacity: items to reserve addresses for: the maximum length. None: as many as fit in the
            default capacity of a `GrowableBuffer`.
        item_shape: the shape of an item, an int or a tuple; ``()``: single numbers.
        step, mode, fork, huge_pages, name: as for `GrowableBuffer`.

    Raises:
        ImportError: numpy is missing (extra ``numpy``).
        TypeError: a dtype with references, without a size, or with a shape of its own.
        RangeError, ValueError: as for `GrowableBuffer`; RangeError also if a side of `item_shape`
            is not positive.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _noun, _unit = "array", "items"

    @overload
    def __init__(
        self,
        dtype: "np.dtype[_Item] | type[_Item]",
        capacity: int | None = ...,
        *,
        item_shape: int | tuple[int, ...] = ...,
        step: int | str | None = ...,
        mode: Mode = ...,
        fork: Fork = ...,
        huge_pages: HugePages | None = ...,
        name: str | None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self: "GrowableArray[Any]",
        dtype: "npt.DTypeLike",
        capacity: int | None = ...,
        *,
        item_shape: int | tuple[int, ...] = ...,
        step: int | str | None = ...,
        mode: Mode = ...,
        fork: Fork = ...,
        huge_pages: HugePages | None = ...,
        name: str | None = ...,
    ) -> None: ...
    def __init__(
        self,
        dtype: Any,
        capacity: int | None = None,
        *,
        item_shape: int | tuple[int, ...] = (),
        step: int | str | None = None,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages | None = None,
        name: str | None = None,
    ) -> None:
        numpy = self._numpy = sys.modules.get("numpy") or import_numpy("GrowableArray")
        self._dtype = kind = item_dtype(dtype, "GrowableArray")
        sides = item_shape if isinstance(item_shape, tuple) else (item_shape,)
        self._item_shape = tuple(map(_index, sides))
        if min(self._item_shape, default=1) <= 0:
            msg = f"item_shape must have positive sides, got {self._item_shape}"
            raise RangeError(msg)
        self._none = numpy.empty((0, *self._item_shape), kind)
        self._itemsize = int(kind.itemsize)
        for side in self._item_shape:
            self._itemsize *= side
        # Single items whose value numpy copies out: reading one keeps no memory alive.
        self._scalar = not self._item_shape and kind.kind != "V"
        self._scalars = _scalar_types()
        self._ndarray = numpy.ndarray
        # The view behind the last `array`, for the next one. It pins bytes, so it is dropped
        # before any are cut off.
        self._cached_view: Any = None
        self._appender: Appender | None = None  # the one that has the window
        size = None if capacity is None else _index(capacity) * self._itemsize
        super().__init__(size, step, mode, fork, huge_pages, name)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def dtype(self) -> "np.dtype[_Item]":
        """The dtype of the items."""
        return self._dtype

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of an item: ``()`` for single numbers."""
        return self._item_shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `array`: the length, then the sides of `item_shape`."""
        return (len(self), *self._item_shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions of `array`."""
        return 1 + len(self._item_shape)

    @property
    def size(self) -> int:
        """The number of elements of `array`."""
        return self.nbytes // self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element of `array`."""
        return int(self._dtype.itemsize)

    @property
    def nbytes(self) -> int:
        """Bytes of all items."""
        return len(self) * self._itemsize

    @property
    def array(self) -> "npt.NDArray[_Item]":
        """An ndarray over the current items, without a copy.

        It keeps its length when this array grows. While it, or anything made from it, is alive, its
        items can't be cut off.

        Raises:
            ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._as_array)

    # -- growing ------------------------------------------------------------------------------

    def append(self, value: Any) -> None:
        """Append one item: any value that numpy converts to the dtype, or a row.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `value` is not a single item
                of `item_shape`.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        if type(value) in self._scalars:
            with self._lock:
                if not self._busy:
                    n = self._count
                    self._busy = True
                    try:
                        self._cells[n] = value
                    except REFUSED:  # no room, or not a value of this type: see below
                        pass
                    else:
                        self._count = n + 1
                        return
                    finally:
                        self._busy = False
                        if self._exports.released:  # closed by an interrupting call
                            self._finish_close()
        self._exclusively(self._append, self._as_item(value))

    def appender(self) -> "Callable[[Any], None]":
        """Return a function that appends one item, as `append` does, in less time.

        For the tightest loops. Any other call on the array takes effect after the items appended so
        far; the more such calls are in between, the less is gained. One thread at a time may use
        it. It does not keep the array alive.
        """
        if not self._scalar:
            return self.append
        method = weakref.WeakMethod(self._append_slowly)

        def append_slowly(value: Any, at: int | None) -> None:
            bound = method()
            if bound is None:
                msg = "the array of this appender is gone"
                raise ReleasedError(msg)
            bound(appender, value, at)

        appender = make_appender(self._scalars, self._none, append_slowly)
        return appender.append

    def extend(self, values: "npt.ArrayLike | Iterable[Any]") -> None:
        """Append the items of an array, a sequence or any other iterable.

        What numpy converts to an array at once is appended wholly or not at all. Other iterables
        are consumed in pieces: if one raises, the pieces before stay, as with ``list.extend``.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or the values are not items of
                `item_shape`.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        kind = type(values)
        if (
            values.shape[1:] == self._item_shape and values.ndim  # type: ignore[union-attr]
            if kind is self._ndarray
            # numpy would repeat the items of a single row.
            else (kind is list or kind is tuple) and self._scalar and len(values) > 1  # type: ignore[arg-type]
        ):
            with self._lock:
                if not self._busy:
                    start = self._count
                    end = start + len(values)  # type: ignore[arg-type]
                    self._busy = True
                    try:
                        if end <= self._room:
                            dirty_end = self._front + end * self._itemsize
                            if dirty_end > self._dirty_end:  # noqa: PLR1730  # faster than max()
                                self._dirty_end = dirty_end
                            self._window[start:end] = values
                            self._count = end
                            return
                    # Convert again below: numpy's message is then about the values alone, and
                    # values that use this array can.
                    except (*REFUSED, StateError):
                        pass
                    finally:
                        self._busy = False
                        if self._exports.released:  # closed by an interrupting call
                            self._finish_close()
        if self._is_array_like(values):
            self._extend_by(values)
            return
        iterator = iter(values)  # type: ignore[arg-type]
        while chunk := list(islice(iterator, _CHUNK)):
            self._extend_by(chunk)

    def spare(self, n: int) -> "npt.NDArray[_Item]":
        """Return a writable array over the next `n` items, which are not part of this array yet.

        `advance` makes the first of them part, without a copy. Their contents are undefined. Until
        `advance`, other calls that add items write to the same memory.

        Raises:
            RangeError: `n` is negative.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._spare_array, _index(n))

    def pop(self) -> Any:
        """Remove the last item and return it.

        Raises:
            IndexError: the array is empty.
            ViewError: a live view shows the item; nothing has changed.
            ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._pop)

    # -- Python's and numpy's protocols -------------------------------------------------------

    def __len__(self) -> int:
        if self._appender is not None:
            return self._exclusively(lambda: self._count)
        return super().__len__()

    def __getitem__(self, key: Any) -> Any:
        """Index the current items as numpy does; a slice is an array without a copy."""
        if type(key) is int and 0 <= key < self._count:
            try:
                return self._values[key]
            except IndexError:  # the window is closed, or items are rows
                pass
        return self._exclusively(self._as_array)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        """Assign to items as numpy does."""
        # The length last: no other thread runs between this check and the assignment.
        if type(key) is int and type(value) in self._scalars and 0 <= key < self._count:
            try:
                self._cells[key] = value
            except REFUSED:
                pass
            else:
                return
        self._exclusively(self._as_array)[key] = value

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the current items."""
        return iter(self.array)

    def __contains__(self, value: Any) -> bool:
        """Tell whether an element equals `value`, as numpy does."""
        return value in self.array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return `array`, or a copy for another dtype or ``copy=True``: numpy's array protocol."""
        kind = self._dtype if dtype is None else self._numpy.dtype(dtype)
        if copy is False and kind != self._dtype:
            msg = f"items of {self._dtype} can't become {kind} without a copy (copy=False)"
            raise ValueError(msg)
        return self.array.astype(kind, copy=bool(copy))

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Apply a ufunc to `array`: numpy's protocol for operands and for ``out=``."""
        out = options.get("out", ())
        if out:
            options["out"] = tuple(map(_as_operand, out))
        result = getattr(ufunc, method)(*map(_as_operand, inputs), **options)
        return out[0] if len(out) == 1 and isinstance(out[0], GrowableArray) else result

    def __buffer__(self, flags: int, /) -> memoryview:
        """Export the items as a buffer (PEP 688, Python 3.12).

        The bytes stay committed as long as this object lives, since a consumer may keep no more
        than a reference to it.
        """
        return self._exclusively(self._export_items)

    def __dlpack__(self, **options: Any) -> Any:
        """Export `array` by DLPack. The capsule keeps the items alive."""
        array: Any = self.array
        return array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's name of the device: (1, 0), the CPU."""
        return (1, 0)

    def __reduce__(self) -> Any:
        """Pickle and copy as plain data: dtype, capacity, item shape and items."""
        return _rebuild, (type(self), self._dtype, self.capacity, self._item_shape, self.array)

    # -- inside -------------------------------------------------------------------------------

    def _over(self, view: memoryview | None) -> Any:
        window = self._none
        if view is not None:
            window = self._numpy.frombuffer(view, self._dtype).reshape(-1, *self._item_shape)
        # Sequences over the same memory: to store single numbers, and to read them.
        self._cells = self._values = window if self._scalar else self._none
        if self._scalar and self._dtype.isnative and self._dtype.kind in "biuf":
            cells = memoryview(window)
            if cells.format in _FAST_FORMATS:
                self._cells = cells
        return window

    def _as_array(self) -> Any:
        nbytes = self._count * self._itemsize
        if not nbytes:
            return self._none.copy()
        if self._cached_view is None or self._cached_view.nbytes != nbytes:
            self._cached_view = self._region.view(self._front, nbytes)
        # A new array for each caller, who may change its shape or dtype.
        array = self._numpy.frombuffer(self._cached_view, self._dtype)
        return array.reshape(-1, *self._item_shape) if self._item_shape else array

    def _export_items(self) -> memoryview:
        self._export()  # pins them
        return memoryview(self._as_array())

    def _as_item(self, value: Any) -> Any:
        item = self._numpy.array(value, dtype=self._dtype)
        if item.shape != self._item_shape:
            shape = f"of shape {self._item_shape}" if self._item_shape else "a single item"
            msg = f"value must be {shape}, got an array of shape {item.shape}"
            raise ValueError(msg)
        return item

    def _is_array_like(self, values: Any) -> bool:
        """Whether numpy converts `values` to an array of their items."""
        if hasattr(values, "__getitem__") or hasattr(values, "__array__"):
            return True
        try:
            memoryview(values).release()
        except TypeError:
            return not hasattr(values, "__iter__")
        return True

    def _extend_by(self, values: Any) -> None:
        items = self._numpy.asarray(values, dtype=self._dtype)
        if items.shape[1:] != self._item_shape or not items.ndim:
            if items.shape == (0,):  # an empty list of rows
                return
            rows = f", then the item shape {self._item_shape}" if self._item_shape else ""
            msg = f"values must have one dimension{rows}, got shape {items.shape}"
            raise ValueError(msg)
        self._exclusively(self._append_items, items)

    def _append(self, item: Any) -> None:
        n = self._count
        self._make_room(n + 1)
        self._window[n] = item
        self._count = n + 1

    def _append_items(self, items: Any) -> None:
        start, end = self._count, self._count + len(items)
        self._make_room(end)
        self._dirty_end = max(self._dirty_end, self._offset(end))
        self._window[start:end] = items
        self._count = end

    def _append_slowly(self, appender: Appender, value: Any, at: int | None) -> None:
        self._exclusively(self._append_and_lend, appender, self._as_item(value), at)

    def _append_and_lend(self, appender: Appender, item: Any, at: int | None) -> None:
        index = self._count if at is None else at - self._dropped
        if 0 <= index == self._count - 1:  # counted already
            self._make_room(self._count)
            self._window[index] = item
        elif index >= 0:  # else counted and dropped again
            self._append(item)
        if self._count < self._room:
            appender.prepare(self._count)
            self._appender = appender
            appender.lend(self._cells, self._count, self._dropped)
            self._close_window()

    def _exclusively(self, do: Callable[..., _T], *arguments: object) -> _T:
        return super()._exclusively(self._after_appender, do, *arguments)  # type: ignore[no-any-return]

    def _after_appender(self, do: Callable[..., _T], *arguments: object) -> _T:
        self._take_back()
        return do(*arguments)

    def _take_back(self) -> None:
        """Take the window back from the appender, and count the appended items."""
        if self._appender is not None:
            self._count = self._appender.take_back()
            self._appender = None

    def _spare_array(self, n: int) -> Any:
        offset = self._spare(n)
        if not n:
            return self._none.copy()
        items = self._numpy.frombuffer(self._region.view(offset, n * self._itemsize), self._dtype)
        return items.reshape(-1, *self._item_shape)

    def _pop(self) -> Any:
        if not self._count:
            msg = "pop from an empty array"
            raise IndexError(msg)
        item = self._as_array()[-1]
        item = item if self._scalar else item.copy()
        self._truncate(self._count - 1)
        return item

    def _drop_cached(self) -> None:
        self._cached_view = None

    def _finish_close(self) -> None:
        self._take_back()
        super()._finish_close()


def _as_operand(value: Any) -> Any:
    return value.array if isinstance(value, GrowableArray) else value


def _rebuild(
    kind: type[GrowableArray[Any]], dtype: Any, capacity: int, item_shape: Any, items: Any
) -> GrowableArray[Any]:
    """Create an array from its pickled parts."""
    array = kind(dtype, capacity, item_shape=item_shape)
    array.extend(items)
    return array
