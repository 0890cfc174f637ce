"""RingArray: the latest items, in memory that is mapped twice in a row.

Both halves of the mapping show the same memory, so the first item of the ring also has an address
right after the last one: any range of items that wraps around is contiguous in addresses.
"""

import math
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from pyreserve._alloc.arrayvalues import (
    as_item,
    as_items,
    is_raw,
    packed,
    packers_of,
    plain_types,
)
from pyreserve._alloc.cells import HAS_GIL, NO_CELLS, NOWHERE, REFUSED
from pyreserve._region.arrays import converted, import_numpy, item_dtype
from pyreserve._region.owner import Exclusive
from pyreserve._region.reserve import reserve_mirrored
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import RangeError
from pyreserve.units import MiB, as_count, format_size, round_up

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt

_Item = TypeVar("_Item", bound="np.generic")

# Rounding up may make a ring this large (bytes), or else at most twice the requested capacity.
_MAX_ROUNDED = 64 * MiB


class RingArray(Exclusive, Generic[_Item]):
    """The last `capacity` items that were appended, as a numpy array of one dtype.

    `last` returns any number of the latest items as one contiguous ndarray without a copy: the same
    memory is mapped twice in a row. Such an array of n items is right until ``capacity - n`` more
    are appended; later ones overwrite its contents. ``last(n, copy=True)`` keeps the items.

    All memory is allocated by the constructor, so that appending never fails for lack of memory.
    `region` is shared, and twice as long as the memory; ``reserved`` and ``committed`` count the
    addresses of both halves. A forked child shares the memory but not the counts of items: let only
    one of the processes append.

    Any thread may call it. A finaliser or signal handler that interrupts a call may get StateError.
    The class is generic in the type of its items, such as ``RingArray[np.float64]``.

    Args:
        dtype: numpy dtype of the items: no references, a fixed size, no shape of its own.
        capacity: items to keep, rounded up so that they fill whole OS pages.
        name: shown in /proc/PID/maps as ``/memfd:NAME``; as for `pyreserve.reserve`.

    Raises:
        ImportError: numpy is missing (extra ``numpy``).
        TypeError: a dtype with references, without a size, or with a shape of its own.
        RangeError: `capacity` is not positive, or rounding it up, for items of an odd size, would
            more than double it to over 64 MiB.
        OutOfMemoryError, VMError, ValueError: as for ``pyreserve.reserve(shared=True)`` and
            `Region.commit`.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _noun = "ring array"

    @overload
    def __init__(
        self, dtype: "np.dtype[_Item] | type[_Item]", capacity: int, *, name: str | None = ...
    ) -> None: ...
    @overload
    def __init__(
        self: "RingArray[Any]", dtype: "npt.DTypeLike", capacity: int, *, name: str | None = ...
    ) -> None: ...
    def __init__(self, dtype: Any, capacity: int, *, name: str | None = None) -> None:
        self._numpy = import_numpy("RingArray")
        self._dtype = kind = item_dtype(dtype, "RingArray")
        self._capacity = _rounded(as_count(capacity, "capacity"), kind.itemsize)
        self._one_step = is_raw(kind) and HAS_GIL
        # Values of these types, within the limit, are stored without running Python code.
        _, self._scalars, self._limit = plain_types(kind)
        self._packers = packers_of(kind)
        self._ndarray = self._numpy.ndarray
        self._total = 0  # items ever appended
        self._cleared = 0  # items appended before the last `clear`
        region = reserve_mirrored(self._capacity * kind.itemsize, name=name)
        super().__init__(region)
        self._open_window()

    def _open_window(self) -> None:
        """Make the array over both halves, and its cells and bytes."""
        self._bytes: Any = self._exports.view(0, self._region.size)
        # All other arrays are slices of this one and keep its view alive. None during a release,
        # and once released or closed.
        self._window: Any = self._numpy.frombuffer(self._bytes, self._dtype)
        self._cells: Any = memoryview(self._window) if self._one_step else self._window

    def _close_window(self) -> None:
        self._window = None
        self._cells = self._bytes = NO_CELLS

    # -- appending ----------------------------------------------------------------------------
    #
    # See `cells` for stores in one step. Else the lock excludes other threads, but not a finaliser
    # or signal handler, which may append at any call or allocation: hence the loop in `_put`. Its
    # check, store and assignment are on one line, between which no tracer runs code.

    def append(self, value: Any) -> None:
        """Append one item: any value that numpy converts to the dtype.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `value` is not a single item.
            ReleasedError: it was released or closed.
            StateError: called by a finaliser or signal handler inside `release`.
        """
        limit = self._limit
        plain = type(value) in self._scalars and (limit is None or -limit <= value <= limit)
        if plain and self._one_step:
            try:
                self._cells[self._total % self._capacity if not self._busy else NOWHERE], self._total = value, self._total + 1  # fmt: skip  # noqa: E501
                return  # noqa: TRY300
            except REFUSED:  # released, in a copy, or not a value of this type
                plain = False
        self._put(value if plain else as_item(value, self._dtype, ()), 1)

    def extend(self, values: "npt.ArrayLike | Iterable[Any]") -> None:
        """Append the items of a one-dimensional array, or of values that numpy converts to one.

        If there are more values than the capacity, the last ones stay. An iterator is consumed
        first.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `values` is not
                one-dimensional. Nothing has changed.
            ReleasedError, StateError: as for `append`.
        """
        items: Any = values
        capacity = self._capacity
        if self._one_step:
            if type(items) is not self._ndarray:
                if self._extend_packed(items):
                    return
            elif items.base is None or not self._may_be_own(items):
                try:
                    total = self._total
                    n, start = len(items), total % capacity
                    part = slice(start, start + n)  # may run a finaliser, which may append
                    self._cells[part if self._total == total and n <= capacity and not self._busy else NOWHERE], self._total = items, total + n  # fmt: skip  # noqa: E501
                    return  # noqa: TRY300
                except REFUSED:  # released, in a copy, or not an array of this dtype and length
                    pass
        dtype = self._dtype
        if type(items) is not self._ndarray or items.ndim != 1 or items.dtype != dtype:
            if hasattr(items, "__next__"):
                items = self._numpy.fromiter(items, dtype)
            items = as_items(items, dtype, ())
        count = len(items)
        if count > capacity:
            items = items[count - capacity :]
        # Copy what cells may refuse: they accept only aligned items of the very dtype. Numpy does
        # not know that both halves are the same memory.
        if (
            (items is values or items.base is not None)
            if self._one_step
            else self._may_be_own(items)
        ):
            fresh = self._numpy.empty(len(items), dtype)
            fresh[:] = items
            items = fresh
        self._put(items, count, len(items))

    def _extend_packed(self, values: Any) -> bool:
        """Append a list of plain numbers; return False for other values."""
        data = packed(values, self._packers, self._scalars)
        if data is None or len(data) > self._region.size // 2:
            return False
        try:
            total, size = self._total, self._dtype.itemsize
            start, nbytes = total % self._capacity * size, len(data)
            part = slice(start, start + nbytes)  # as in `extend`
            self._bytes[part if self._total == total and not self._busy else NOWHERE], self._total = data, total + nbytes // size  # fmt: skip  # noqa: E501
        except REFUSED:
            return False
        return True

    def _may_be_own(self, items: Any) -> bool:
        """Whether an array may show items of this ring."""
        base, window = items.base, self._window
        if base is None or (type(base) is self._ndarray and base.base is None):
            return False  # the memory is its own, or its base's
        return window is None or bool(self._numpy.may_share_memory(items, window))

    def _put(self, items: Any, count: int, n: int | None = None) -> None:
        """Store a single item, or an array of the last `n` of `count` items; count all of them."""
        cells, capacity = self._cells, self._capacity
        if cells is NO_CELLS:
            cells = self._opened("_cells")
        with self._lock:
            while True:
                total = self._total
                where: Any = total % capacity
                if n is not None:
                    start = (total + count - n) % capacity
                    where = slice(start, start + n)
                if self._total == total: cells[where] = items; self._total = total + count; return  # fmt: skip  # noqa: E501, E701, E702

    def clear(self) -> None:
        """Remove all items. `total` and earlier arrays stay as they are.

        Raises:
            ReleasedError: it was released or closed.
            StateError: called by a finaliser or signal handler inside `clear`, `release` or a copy.
        """
        self._exclusively(self._clear)

    def _clear(self) -> None:
        self._cleared = self._total

    def _opened(self, name: str) -> Any:
        """Return the window, or its cells, once no other thread is releasing; raise if released."""
        return self._exclusively(getattr, self, name)

    # -- items --------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """The maximum number of items."""
        return self._capacity

    @property
    def dtype(self) -> "np.dtype[_Item]":
        """The dtype of the items."""
        return self._dtype

    @property
    def total(self) -> int:
        """The number of items ever appended.

        Raises:
            ReleasedError: it was released or closed.
        """
        self._check_open()
        return self._total

    @property
    def array(self) -> "npt.NDArray[_Item]":
        """An ndarray over all items, oldest first, without a copy; see `last`."""
        window = self._window
        if window is None:
            window = self._opened("_window")
        total = self._total
        length = self._length(total)
        start = (total - length) % self._capacity
        return window[start : start + length] if length else self._empty(0)

    def last(self, n: int, *, copy: bool = False) -> "npt.NDArray[_Item]":
        """Return an ndarray over the last `n` items, oldest first.

        Without `copy` it is a slice of the ring's memory: writable, and overwritten by later items.
        While it, or anything made from it, is alive, the memory can't be released. A copy is
        consistent, whatever other threads append.

        Raises:
            RangeError: not ``0 <= n <= len(ring)``.
            ReleasedError: it was released or closed.
            StateError: as for `append`; with `copy`, as for `clear`.
        """
        n = _index(n)
        if copy:
            return self._exclusively(self._copy, n)
        window = self._window
        if window is None:
            window = self._opened("_window")
        total, capacity = self._total, self._capacity
        if not 0 < n <= total - self._cleared or n > capacity:
            return self._empty(n)
        start = (total - n) % capacity
        return window[start : start + n]  # type: ignore[no-any-return]

    def _length(self, total: int) -> int:
        """Return the number of items when `total` were appended."""
        # `total` was read first: another thread may clear the ring, also after further items.
        return max(0, min(total - self._cleared, self._capacity))

    def _empty(self, n: int) -> "npt.NDArray[_Item]":
        if n:
            msg = f"n must be in [0, {len(self)}], the number of items, got {n}"
            raise RangeError(msg)
        array: npt.NDArray[_Item] = self._numpy.empty(0, self._dtype)
        return array

    def _copy(self, n: int | None) -> "npt.NDArray[_Item]":
        while True:
            total = self._total
            items = (self.array if n is None else self.last(n)).copy()
            if self._total == total:  # else a finaliser or signal handler has appended
                return items

    def __len__(self) -> int:
        self._check_open()
        return self._length(self._total)

    def __getitem__(self, key: Any) -> Any:
        """Index the items as numpy does, from the oldest on; a slice is an array without a copy."""
        return self.array[key]

    def __iter__(self) -> Iterator[Any]:
        """Iterate over a copy of the items."""
        return iter(self._exclusively(self._copy, None))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return `array`, or a copy for another dtype or ``copy=True``: numpy's array protocol."""
        return converted(self.array, dtype, copy)

    def __repr__(self) -> str:
        name = f" {self._region.name!r}" if self._region.name else ""
        kind = f"<{type(self).__name__}{name} of {self._dtype}"
        if self.released:
            return f"{kind}, capacity {self._capacity:,}, released>"
        total = self._total
        length = self._length(total)
        return f"{kind}: {length:,} of {self._capacity:,} items, {total:,} appended in all>"

    # -- the end ------------------------------------------------------------------------------

    def _release(self) -> None:
        try:
            self._close_window()
            super()._release()
        except BaseException:
            if not self._exports.released:
                self._open_window()
            raise

    def _finish_close(self) -> None:
        self._close_window()
        super()._finish_close()


def _rounded(capacity: int, itemsize: int) -> int:
    """Return the capacity rounded up so that the items fill whole OS pages.

    Raises:
        RangeError: `capacity` is not positive, or would become much larger.
    """
    if capacity <= 0:
        msg = f"capacity must be positive, got {capacity}"
        raise RangeError(msg)
    unit = PAGE_SIZE // math.gcd(PAGE_SIZE, itemsize)
    rounded = round_up(capacity, unit)
    if rounded * itemsize > _MAX_ROUNDED and rounded > 2 * capacity:
        msg = (
            f"capacity must be a multiple of {unit} ({format_size(unit * itemsize)}) for items of "
            f"{itemsize} bytes to fill whole OS pages, got {capacity}: ask for {rounded}, or pad "
            "the dtype"
        )
        raise RangeError(msg)
    return rounded
