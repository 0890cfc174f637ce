"""GrowableArray: a numpy array that grows in place."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from operator import index as _index
from typing import TYPE_CHECKING, Any, Generic, NoReturn, TypeVar, overload

from pyreserve._alloc.appender import Lease, make_appender
from pyreserve._alloc.arrayoperators import ArrayProtocols
from pyreserve._alloc.arrayvalues import as_item, as_items, is_array_like, packed
from pyreserve._alloc.cells import HAS_GIL, NO_CELLS, NOWHERE, REFUSED
from pyreserve._alloc.growable import Growable, unwrapped
from pyreserve._alloc.itemkind import item_kind
from pyreserve._region.arrays import converted
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve.units import as_count

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_Item = TypeVar("_Item", bound="np.generic")
_T = TypeVar("_T")

_PIECE = 4096  # items of an iterable that are converted at a time


class GrowableArray(ArrayProtocols, Growable, Generic[_Item]):
    """A numpy array of up to `capacity` items that grows in place; one dtype, initially empty.

    Growing never moves an item, except as `drop_front` says: earlier ndarrays stay valid and share
    memory with later ones. Sizes, memory and threads are as for `GrowableBuffer`. The class is
    generic in the type of its items, such as ``GrowableArray[np.float64]``; numpy's type of the
    dtype determines it.

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
    _bytes: Any  # the memory of the cells

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
        # CPython keeps the attributes of an object without a dict if they are fewer than 30.
        self._kind = kind = item_kind(dtype, item_shape)
        self._dtype, self._itemsize = kind.dtype, kind.nbytes
        self._one_step = kind.raw and HAS_GIL
        _, self._scalars, self._limit = kind.plain
        self._packers, self._ndarray = kind.packers, kind.ndarray
        # The view under the last `array`, for the next one. It pins items, so it is dropped
        # before any are cut off.
        self._cached_view: Any = None
        self._lease: Lease | None = None  # set while an appender has the cells
        self._wanted = None if capacity is None else as_count(capacity, "capacity")
        size = None if self._wanted is None else self._wanted * self._itemsize
        super().__init__(size, step, mode, fork, huge_pages, name)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def dtype(self) -> "np.dtype[_Item]":
        """The dtype of the items."""
        return self._dtype

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of an item: ``()`` for single numbers."""
        return self._kind.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `array`: the length, then the sides of `item_shape`."""
        return (len(self), *self._kind.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions of `array`."""
        return 1 + len(self._kind.shape)

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
        limit = self._limit
        if type(value) in self._scalars and (limit is None or -limit <= value <= limit):
            try:
                # Both in one line, so that not even a tracer runs in between.
                if not self._one_step:
                    with self._lock:
                        if not self._busy: n = self._count; self._cells[n] = value; self._count = n + 1; return  # fmt: skip  # noqa: E501, E701, E702
                else:
                    self._cells[n], self._count = value, (n := self._count if not self._busy else NOWHERE) + 1  # fmt: skip  # noqa: E501
                    return
            except REFUSED:  # no space, or not a value of this type
                pass
        self._exclusively(self._append, as_item(value, self._dtype, self._kind.shape))

    def appender(self) -> "Callable[[Any], None]":
        """Return a function that appends one item, as `append` does, in less time.

        For tight loops. Any other call on the array sees the items appended so far, and makes the
        next append slower. One thread at a time may use the function. It does not keep the array
        alive.
        """
        if not self._kind.scalar:
            return self.append
        return make_appender(*self._kind.plain, self._append_slowly, one_step=self._one_step)

    def extend(self, values: "npt.ArrayLike | Iterable[Any]") -> None:
        """Append the items of an array, a sequence or any other iterable.

        An array or sequence is appended wholly or not at all. Other iterables are appended in
        pieces of some thousand items: if the iterable raises, the items before stay, as with
        ``list.extend``; if a value is refused, the pieces before its own stay.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or the values are not items of
                `item_shape`.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        items: Any = values
        if type(values) is not self._ndarray:
            data = packed(values, self._packers, self._scalars) if self._one_step else None
            if data is not None:
                try:
                    start, size = self._count, self._itemsize
                    part = slice(start * size, end := start * size + len(data))  # as below
                    self._bytes[part if self._count == start and not self._busy else NOWHERE], self._count = data, end // size  # fmt: skip  # noqa: E501
                    return  # noqa: TRY300
                except REFUSED:  # no space
                    pass
            items = unwrapped(values)
            if not is_array_like(items):
                self._extend_in_pieces(items)
                return
            items = as_items(items, self._dtype, self._kind.shape)
        if self._one_step:
            try:
                start = self._count
                end = start + len(items)
                part = slice(start, end)  # may run a finaliser, which may append
                # In one line, as in `append`.
                self._cells[part if self._count == start and not self._busy else NOWHERE], self._count = items, end  # fmt: skip  # noqa: E501
                return  # noqa: TRY300
            except REFUSED:  # no space, or not an array of this dtype and shape
                pass
        items = as_items(items, self._dtype, self._kind.shape)
        self._exclusively(self._append_items, items)

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
        if self._lease is not None:
            return self._exclusively(lambda: self._count)
        return super().__len__()

    @overload
    def __getitem__(self, key: slice) -> "npt.NDArray[_Item]": ...
    @overload
    def __getitem__(self, key: Any) -> Any: ...
    def __getitem__(self, key: Any) -> Any:
        """Index the current items as numpy does.

        A slice is an array without a copy; it pins its own items, from its first to its last.
        """
        if type(key) is int and 0 <= key < self._count:
            try:
                return self._values[key]
            except IndexError:  # the window is closed, or items are rows
                pass
        return self._pick(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        limit = self._limit
        if type(key) is int and type(value) in self._scalars:
            try:
                if limit is None or -limit <= value <= limit:
                    # In one line, as in `append`.
                    self._cells[key if 0 <= key < self._count else NOWHERE] = value
                    return
            except REFUSED:
                pass
        self._exclusively(self._as_array)[key] = unwrapped(value)

    def __delitem__(self, key: Any) -> NoReturn:
        msg = "items can't be deleted: views show them where they are; pop() removes the last, "
        msg += "drop_front() the first"
        raise TypeError(msg)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.array)

    def __contains__(self, value: Any) -> bool:
        return value in self.array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return `array`, or a copy for another dtype or ``copy=True``: numpy's array protocol."""
        return converted(self.array, dtype, copy)

    def __buffer__(self, flags: int, /) -> memoryview:
        """Export the items as a buffer (PEP 688, Python 3.12).

        The bytes stay committed as long as this object lives, since a consumer may keep no more
        than a reference to it.
        """
        return self._exclusively(self._export_items)

    def __reduce__(self) -> Any:
        """Pickle and copy as plain data: dtype, capacity, item shape and items.

        Attributes that a subclass added are kept; its constructor is not called.
        """
        kind = type(self)
        parts = kind, self._dtype, self._wanted, self._kind.shape, self.array
        if kind is GrowableArray:
            return _rebuild, parts
        own = vars(GrowableArray(self._dtype, 1))
        return _rebuild, parts, {name: v for name, v in vars(self).items() if name not in own}

    # -- inside -------------------------------------------------------------------------------

    def _over(self, view: memoryview | None) -> Any:
        # _cells stores single numbers, _values reads them: two sequences over the same memory.
        if view is None:
            self._cells, self._bytes, self._values = NO_CELLS, NO_CELLS, self._kind.none
            return self._values
        window = self._kind.over(view)
        if self._kind.scalar:
            self._cells, self._values = memoryview(window) if self._kind.raw else window, window
            self._bytes = view
        return window

    def _as_array(self) -> Any:
        nbytes = self._count * self._itemsize
        if not nbytes:
            return self._kind.none.copy()
        if self._cached_view is None or self._cached_view.nbytes != nbytes:
            self._cached_view = self._region.view(self._front, nbytes)
        # A new array for each caller, who may change its shape or dtype.
        return self._kind.over(self._cached_view)

    def _pick(self, key: Any) -> Any:
        if type(key) is int:
            at, values = key + self._count, self._values
            if key < 0 <= at < len(values):
                return values[at]
            n = len(self)
            if -n <= key < n:
                return self._exclusively(self._part, key % n, key % n + 1)[0]
        elif type(key) is slice:
            start, stop, step = key.indices(len(self))
            if step > 0:
                part = self._exclusively(self._part, start, stop)
                return part if step == 1 else part[::step]
        return self._exclusively(self._as_array)[key]

    def _part(self, start: int, stop: int) -> Any:
        """Return the items [start, stop), as many as there are."""
        stop = min(stop, self._count)
        if start >= stop:
            return self._kind.none.copy()
        if stop - start == self._count:
            return self._as_array()
        nbytes = (stop - start) * self._itemsize
        return self._kind.over(self._exports.view(self._offset(start), nbytes))

    def _export_items(self) -> memoryview:
        self._export()  # pins them
        return memoryview(self._as_array())

    def _extend_in_pieces(self, values: Any) -> None:
        iterator, piece = iter(values), [None] * _PIECE
        while len(piece) == _PIECE:
            piece = []
            try:
                piece.extend(islice(iterator, _PIECE))
            finally:  # if `values` raises, append the items it gave before
                GrowableArray.extend(self, piece)

    def _append(self, item: Any) -> None:
        n = self._count
        self._make_space(n + 1)
        self._window[n] = item
        self._count = n + 1

    def _append_items(self, items: Any) -> None:
        start, end = self._count, self._count + len(items)
        self._make_space(end)
        self._dirty_end = max(self._dirty_end, self._offset(end))
        self._window[start:end] = items
        self._count = end

    def _append_slowly(self, lease: Lease, value: Any, at: int | None) -> None:
        item = as_item(value, self._dtype, self._kind.shape)
        self._exclusively(self._append_and_lend, lease, item, at)

    def _append_and_lend(self, lease: Lease, item: Any, at: int | None) -> None:
        index = self._count if at is None else at - self._dropped
        if 0 <= index < self._count:  # counted already
            self._make_space(self._count)
            self._window[index] = item
        elif index >= 0:  # otherwise it was counted, then dropped
            self._append(item)
        count, cells = self._count, self._cells
        if count < self._window_length:
            # A signal handler may raise at any line: never two windows, always the right count.
            self._close_window()
            lease.lend(NO_CELLS, count, self._dropped)
            self._lease = lease
            lease.lend(cells, count, self._dropped)

    def _exclusively(self, do: Callable[..., _T], *arguments: object) -> _T:
        return super()._exclusively(self._after_appender, do, *arguments)  # type: ignore[no-any-return]

    def _after_appender(self, do: Callable[..., _T], *arguments: object) -> _T:
        self._take_back()
        return do(*arguments)

    def _take_back(self) -> None:
        if self._lease is not None:  # count the items that its appender appended
            self._count = self._lease.take_back()
            self._lease = None

    def _spare_array(self, n: int) -> Any:
        offset = self._spare(n)
        view = self._region.view(offset, n * self._itemsize) if n else None
        return self._kind.none.copy() if view is None else self._kind.over(view)

    def _pop(self) -> Any:
        n = self._count - 1
        if n < 0:
            msg = "pop from an empty array"
            raise IndexError(msg)
        self._make_space(n + 1)
        item = self._window[n] if self._kind.scalar else self._window[n].copy()
        self._truncate(n)
        return item

    def _drop_cached(self) -> None:
        self._cached_view = None

    def _finish_close(self) -> None:
        self._take_back()
        super()._finish_close()


def _rebuild(
    kind: type[GrowableArray[Any]], dtype: Any, capacity: int | None, item_shape: Any, items: Any
) -> GrowableArray[Any]:
    array = kind.__new__(kind)
    GrowableArray.__init__(array, dtype, capacity, item_shape=item_shape)
    GrowableArray.extend(array, items)
    return array
