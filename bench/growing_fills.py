"""Ways to build an array from pieces, for growing.py."""

from array import array
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np

from pyreserve import GrowableArray, GrowableBuffer

Array = np.ndarray[Any, np.dtype[Any]]


def as_bytes(items: Any) -> memoryview:
    """Return the bytes of an array, without a copy."""
    return memoryview(items).cast("B")


class Doubling:
    """The usual growing array over numpy: a copy into twice the memory whenever it is full."""

    def __init__(self, dtype: Any, capacity: int) -> None:
        self._items: Array = np.empty(capacity, dtype)
        self._length = 0

    def extend(self, values: Any) -> None:
        start, end = self._length, self._length + len(values)
        if end > len(self._items):
            items: Array = np.empty(max(2 * len(self._items), end), self._items.dtype)
            items[:start] = self._items[:start]
            self._items = items
        self._items[start:end] = values
        self._length = end

    def append(self, value: Any) -> None:
        if self._length == len(self._items):
            self._items = np.concatenate([self._items, np.empty_like(self._items)])
        self._items[self._length] = value
        self._length += 1

    @property
    def array(self) -> Array:
        return self._items[: self._length]


# Each function takes a piece and how often to add it, and returns the array.


def _numpy_empty(piece: Array, count: int) -> Array:
    items: Array = np.empty(count * len(piece), piece.dtype)
    for start in range(0, len(items), len(piece)):
        items[start : start + len(piece)] = piece
    return items


def _doubling(piece: Array, count: int) -> Array:
    items = Doubling(piece.dtype, len(piece))
    for _ in range(count):
        items.extend(piece)
    return items.array


def _pyarrow(piece: Array, count: int) -> Array:
    import pyarrow as pa  # type: ignore[import-not-found, import-untyped, unused-ignore]

    stream, data = pa.BufferOutputStream(), as_bytes(piece)
    for _ in range(count):
        stream.write(data)
    return np.frombuffer(stream.getvalue(), piece.dtype)


def _bytearray(piece: Array, count: int) -> Array:
    items, data = bytearray(), as_bytes(piece)
    for _ in range(count):
        items += data
    return np.frombuffer(items, piece.dtype)


def _stdlib_array(piece: Array, count: int) -> Array:
    items, data = array("d"), as_bytes(piece)
    for _ in range(count):
        items.frombytes(data)
    return np.frombuffer(items, piece.dtype)


def _bytes_io(piece: Array, count: int) -> Array:
    file, data = BytesIO(), as_bytes(piece)
    for _ in range(count):
        file.write(data)
    return np.frombuffer(file.getbuffer(), piece.dtype)


def _concatenate(piece: Array, count: int) -> Array:
    # A producer reuses its buffer, as for the others: a list must keep copies.
    return np.concatenate([piece.copy() for _ in range(count)])


def _growable_array(piece: Array, count: int) -> Array:
    items: GrowableArray[Any] = GrowableArray(piece.dtype)
    for _ in range(count):
        items.extend(piece)
    return items.array


def _growable_buffer(piece: Array, count: int) -> Array:
    items, data = GrowableBuffer(), as_bytes(piece)
    for _ in range(count):
        items.write(data)
    return np.frombuffer(items.view(), piece.dtype)


FILLS: dict[str, Callable[[Array, int], Array]] = {
    "np.empty, preallocated": _numpy_empty,
    "numpy doubling": _doubling,
    "pyarrow BufferOutputStream": _pyarrow,
    "bytearray": _bytearray,
    "array.array": _stdlib_array,
    "BytesIO": _bytes_io,
    "list + np.concatenate": _concatenate,
    "GrowableArray": _growable_array,
    "GrowableBuffer": _growable_buffer,
}
