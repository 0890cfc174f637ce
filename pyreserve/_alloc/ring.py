"""RingArray: the latest items, in memory that is mapped twice in a row.

Both halves of the mapping show the same memory, so the first item of the ring also has an address
right after the last one: any range of items that wraps around is contiguous in addresses.
"""

import math
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from pyreserve._alloc.arrayvalues import as_item, as_items, plain_types
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
        # Values of these types are stored without running Python code.
        _, types, limit = plain_types(kind)
        self._direct = types if limit is None else frozenset({kind.type})
        # Index of the next item, below the capacity; number of items; number ever appended.
        self._state = (0, 0, 0)
        region = reserve_mirrored(self._capacity * kind.itemsize, name=name)
        super().__init__(region)
        # The array over both halves; all others are its slices and keep its view alive. None during
        # a release, and once released or closed.
        self._window: Any = self._make_window()

    def _make_window(self) -> Any:
        region = self._region
        return self._numpy.frombuffer(self._exports.view(0, region.size), self._dtype)

    # -- appending ----------------------------------------------------------------------------
    #
    # The lock excludes other threads, but not a finaliser or signal handler, which may append at
    # any call or allocation. So compute the new state, and again if the state has changed. That
    # check, the write and the assignment are on one line: a tracer may run code between lines.

    def append(self, value: Any) -> None:
        """Append one item: any value that numpy converts to the dtype.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `value` is not a single item.
            ReleasedError: it was released or closed.
            StateError: called by a finaliser or signal handler inside `release`.
        """
        if type(value) not in self._direct:
            value = as_item(value, self._dtype, ())
        window = self._window
        if window is None:
            window = self._open_window()
        capacity = self._capacity
        with self._lock:
            while True:
                at, length, total = state = self._state
                end = at + 1
                after = end if end < capacity else 0, length + (length < capacity), total + 1
                if self._state is state: window[at] = value; self._state = after; return  # fmt: skip  # noqa: E501, E701, E702

    def extend(self, values: "npt.ArrayLike | Iterable[Any]") -> None:
        """Append the items of a one-dimensional array, or of values that numpy converts to one.

        If there are more values than the capacity, the last ones stay. An iterator is consumed
        first.

        Raises:
            TypeError, ValueError, OverflowError: raised by numpy, or `values` is not
                one-dimensional. Nothing has changed.
            ReleasedError, StateError: as for `append`.
        """
        dtype = self._dtype
        items: Any = values
        if (
            type(items) is not self._numpy.ndarray
            or items.ndim != 1
            or (items.dtype is not dtype and items.dtype != dtype)
        ):
            if hasattr(items, "__next__"):
                items = self._numpy.fromiter(items, dtype)
            items = as_items(items, dtype, ())
        window = self._window
        if window is None:
            window = self._open_window()
        n = count = len(items)
        capacity = self._capacity
        if n > capacity:
            items, n = items[n - capacity :], capacity
        # Copy items of this ring: numpy does not know that both halves are the same memory.
        if items.base is not None and self._numpy.may_share_memory(items, window):
            items = items.copy()
        with self._lock:
            while True:
                at, length, total = state = self._state
                end, where, length = at + n, slice(at, at + n), length + n
                length = length if length < capacity else capacity
                after = end if end < capacity else end - capacity, length, total + count
                if self._state is state: window[where] = items; self._state = after; return  # fmt: skip  # noqa: E501, E701, E702

    def clear(self) -> None:
        """Remove all items. `total` and earlier arrays stay as they are.

        Raises:
            ReleasedError: it was released or closed.
            StateError: called by a finaliser or signal handler inside `clear`, `release` or a copy.
        """
        self._exclusively(self._clear)

    def _clear(self) -> None:
        while True:
            at, _, total = state = self._state
            after = at, 0, total
            if self._state is state: self._state = after; return  # fmt: skip  # noqa: E701, E702

    def _open_window(self) -> Any:
        """Return the window once no other thread is releasing; raise if there is none."""
        return self._exclusively(getattr, self, "_window")

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
        return self._state[2]

    @property
    def array(self) -> "npt.NDArray[_Item]":
        """An ndarray over all items, oldest first, without a copy; see `last`."""
        window = self._window
        if window is None:
            window = self._open_window()
        end, length, _ = self._state  # read once: another thread may clear the ring
        if end < length:
            end += self._capacity
        return window[end - length : end] if length else self._empty(0, 0)

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
            window = self._open_window()
        end, length, _ = self._state
        if n > length or n < 1:
            return self._empty(n, length)
        if end < n:
            end += self._capacity
        return window[end - n : end]  # type: ignore[no-any-return]

    def _empty(self, n: int, length: int) -> "npt.NDArray[_Item]":
        if n:
            msg = f"n must be in [0, {length}], the number of items, got {n}"
            raise RangeError(msg)
        array: npt.NDArray[_Item] = self._numpy.empty(0, self._dtype)
        return array

    def _copy(self, n: int | None) -> "npt.NDArray[_Item]":
        return (self.array if n is None else self.last(n)).copy()

    def __len__(self) -> int:
        self._check_open()
        return self._state[1]

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
        _, length, total = self._state
        return f"{kind}: {length:,} of {self._capacity:,} items, {total:,} appended in all>"

    # -- the end ------------------------------------------------------------------------------

    def _release(self) -> None:
        self._window = None
        try:
            super()._release()
        except BaseException:
            if not self._exports.released:
                self._window = self._make_window()
            raise

    def _finish_close(self) -> None:
        self._window = None
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
