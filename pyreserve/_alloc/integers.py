"""Integers in other people's buffers, made ready for functions in C that take many at once."""

import sys
from array import array
from collections.abc import Iterable
from operator import index as _index
from typing import TYPE_CHECKING, Any, NamedTuple

from pyreserve._native import ffi
from pyreserve.errors import RangeError

if TYPE_CHECKING:
    from typing_extensions import Buffer

    Integers = Buffer | Iterable[int]

_NATIVE = {"", "@", "=", "<" if sys.byteorder == "little" else ">"}
_SIGNED, _UNSIGNED = set("bhilqn"), set("BHILQN")
_LETTERS = {1: "B", 2: "H", 4: "I", 8: "Q", -1: "b", -2: "h", -4: "i", -8: "q"}


class IntegersForC(NamedTuple):
    """Integers for C, in memory that nobody else changes while it works: what it did can be undone.

    `values` has them for Python, only one if the struct says that all are the same. Keep the whole
    while C uses the struct.
    """

    struct: Any
    pin: Any
    values: "memoryview[int] | tuple[int]"

    def item(self, i: int) -> int:
        """Return number `i`."""
        return self.values[i if self.struct.width else 0]


def integers(numbers: "Integers | int", what: str, *, or_one: bool = False) -> IntegersForC:
    """Copy integers from wherever they are; `or_one`: a single one stands for as many as wanted.

    Raises:
        TypeError: neither a buffer of native integers nor an iterable of integers.
        ValueError: a buffer that is not contiguous; RangeError for numbers beyond 64 bits.
    """
    one = _one(numbers) if or_one else None
    if one is not None:
        if not 0 < one < 1 << 64:
            msg = f"{what} are positive and below 2**64, not {one}"
            raise RangeError(msg)
        return IntegersForC(ffi.new("struct pagealloc_integers *", {"constant": one}), None, (one,))
    try:
        view = memoryview(numbers)  # type: ignore[arg-type]
    except TypeError:
        view = memoryview(_array(list(numbers), what))  # type: ignore[arg-type]
    return own(view.tobytes(), item_width(view, what))


def _one(numbers: Any) -> int | None:
    try:
        return _index(numbers)
    except TypeError:  # arrays have the method too
        return None


def own(data: bytes | bytearray, width: int) -> IntegersForC:
    """Make integers of our own bytes, `width` each."""
    pin = ffi.from_buffer(data)
    struct = ffi.new("struct pagealloc_integers *", {"items": pin, "width": width})
    return IntegersForC(struct, pin, memoryview(data).cast(_LETTERS[width]))  # type: ignore[call-overload]


def item_width(view: memoryview, what: str) -> int:
    """Return the bytes of an item, negative if it is signed, once the buffer is known to fit."""
    order, letter = view.format[:-1], view.format[-1:]
    if order not in _NATIVE or letter not in _SIGNED | _UNSIGNED:
        msg = f"{what} has items of format {view.format!r}, not native integers"
        raise TypeError(msg)
    if not view.c_contiguous:
        msg = f"{what} is not contiguous"
        raise ValueError(msg)
    return -view.itemsize if letter in _SIGNED else view.itemsize


def _array(numbers: list[int], what: str) -> "array[int]":
    try:
        return array("q", numbers)
    except OverflowError:
        at = next(i for i, n in enumerate(numbers) if not -1 << 63 <= n < 1 << 63)
        msg = f"{what}[{at}] does not fit in 64 bits: {numbers[at]}"
        raise RangeError(msg) from None


def same_count(first: IntegersForC, lengths: IntegersForC, what: str) -> int:
    """Return how many there are of both, or refuse."""
    count = len(first.values)
    if lengths.struct.width and len(lengths.values) != count:
        msg = f"{what} has {count} items for {len(lengths.values)} lengths"
        raise RangeError(msg)
    return count
