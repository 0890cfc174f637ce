"""Integers from buffers and iterables, copied for the C functions that take many at once."""

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

_NATIVE_ORDERS = {"", "@", "=", "<" if sys.byteorder == "little" else ">"}
_SIGNED, _UNSIGNED = set("bhilqn"), set("BHILQN")
_FORMATS = {1: "B", 2: "H", 4: "I", 8: "Q", -1: "b", -2: "h", -4: "i", -8: "q"}


class IntegersForC(NamedTuple):
    """A private copy of integers for C: nobody changes it during the call, so C can undo its work.

    Keep the whole tuple alive while C uses the struct.

    Attributes:
        struct: a ``struct pagealloc_integers *``.
        pin: the cdata that keeps the bytes alive; None for a constant.
        values: the integers, for Python; for a constant, a tuple of that one integer.
    """

    struct: Any
    pin: Any
    values: "memoryview[int] | tuple[int]"

    def item(self, i: int) -> int:
        """Return integer `i`."""
        return self.values[i if self.struct.width else 0]


def integers(numbers: "Integers | int", name: str, *, allow_scalar: bool = False) -> IntegersForC:
    """Copy the integers of a buffer or an iterable.

    Args:
        numbers: the integers.
        name: the argument that they come from, for messages.
        allow_scalar: accept a single integer, which stands for any number of equal ones.

    Raises:
        TypeError: neither a buffer of native integers nor an iterable of integers.
        ValueError: the buffer is not contiguous.
        RangeError: an integer does not fit in 64 bits; a scalar is not positive.
    """
    scalar = _scalar(numbers) if allow_scalar else None
    if scalar is not None:
        if not 0 < scalar < 1 << 64:
            msg = f"{name} must be positive and below 2**64, got {scalar}"
            raise RangeError(msg)
        struct = ffi.new("struct pagealloc_integers *", {"constant": scalar})
        return IntegersForC(struct, None, (scalar,))
    try:
        view = memoryview(numbers)  # type: ignore[arg-type]
    except TypeError:
        view = memoryview(_array(numbers, name))
    return wrap_bytes(view.tobytes(), item_width(view, name))


def _scalar(numbers: Any) -> int | None:
    try:
        return _index(numbers)
    except TypeError:  # raised by arrays too, although they have __index__
        return None


def wrap_bytes(data: bytes | bytearray, width: int) -> IntegersForC:
    """Return `data`, which nobody else may change, as integers of `width` bytes, < 0 if signed."""
    pin = ffi.from_buffer(data)
    struct = ffi.new("struct pagealloc_integers *", {"items": pin, "width": width})
    values = memoryview(data).cast(_FORMATS[width])  # type: ignore[call-overload]
    return IntegersForC(struct, pin, values)


def item_width(view: memoryview, name: str) -> int:
    """Return the bytes of an item of a contiguous buffer of integers, negative if signed.

    Raises:
        TypeError: the items are not native integers.
        ValueError: the buffer is not contiguous.
    """
    order, letter = view.format[:-1], view.format[-1:]
    if order not in _NATIVE_ORDERS or letter not in _SIGNED | _UNSIGNED:
        msg = f"{name} must have native integers as items, got format {view.format!r}"
        raise TypeError(msg)
    if not view.c_contiguous:
        msg = f"{name} must be C-contiguous, got strides {view.strides}"
        raise ValueError(msg)
    return -view.itemsize if letter in _SIGNED else view.itemsize


def _array(numbers: Any, name: str) -> "array[int]":
    try:
        iterator = iter(numbers)
    except TypeError:
        kind = type(numbers).__name__
        msg = f"{name} must be a buffer or an iterable of integers, got {kind}"
        raise TypeError(msg) from None
    items = list(iterator)
    try:
        return array("q", items)
    except OverflowError:
        at = next(i for i, n in enumerate(items) if not -1 << 63 <= n < 1 << 63)
        msg = f"{name}[{at}] must fit in a signed 64-bit integer, got {items[at]}"
        raise RangeError(msg) from None


def same_count(first: IntegersForC, lengths: IntegersForC, name: str) -> int:
    """Return the number of items of `first`, the argument `name`.

    Raises:
        RangeError: `lengths` is not a scalar and has another number of items.
    """
    count = len(first.values)
    if lengths.struct.width and len(lengths.values) != count:
        msg = f"{name} must have one item per length ({len(lengths.values)}), got {count}"
        raise RangeError(msg)
    return count
