"""Numpy arrays over views: plans, item dtypes and conversions."""

import math
import sys
from operator import index as _index
from typing import TYPE_CHECKING, Any

from pyreserve._system.extras import import_extra
from pyreserve.errors import RangeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Shape = int | tuple[int, ...] | list[int]


_SEQUENCES = (tuple, list)
# Kinds of numpy dtypes whose items hold no references.
_PLAIN_KINDS = frozenset("biufcmMSUV")


class ArrayPlan:
    """The dtype, sides and bytes of a C-ordered array over raw memory.

    Attributes:
        dtype: the numpy dtype of the items.
        nbytes: bytes of all items; 0 for an array that needs no memory.
    """

    __slots__ = ("_numpy", "_sides", "dtype", "nbytes")

    def __init__(self, shape: "Shape", dtype: "npt.DTypeLike") -> None:
        """Check the shape and the dtype.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            TypeError: a side is not an integer, or numpy has no such dtype.
            RangeError: a side is negative.
            ValueError: the items hold references to objects.
        """
        numpy = self._numpy = sys.modules.get("numpy") or import_numpy("ndarray")
        item_type = self.dtype = numpy.dtype(dtype)
        sides = shape if isinstance(shape, _SEQUENCES) else (shape,)
        self._sides = sides = tuple(map(_index, sides))
        if sides and min(sides) < 0:
            msg = f"shape must have no negative side, got {sides}"
            raise RangeError(msg)
        if item_type.hasobject:
            msg = f"dtype must hold no references, got {item_type!r}: an OBJECT array"
            raise ValueError(msg)
        self.nbytes: int = math.prod(sides, start=item_type.itemsize)

    def over(self, view: memoryview) -> "np.ndarray[Any, Any]":
        """Return the array over a view of `nbytes` bytes, which it keeps alive."""
        array: np.ndarray[Any, Any] = self._numpy.frombuffer(view, self.dtype)
        return array if len(self._sides) == 1 else array.reshape(self._sides)

    def empty(self, *, readonly: bool = False) -> "np.ndarray[Any, Any]":
        """Return an array without items, in memory of its own."""
        array: np.ndarray[Any, Any] = self._numpy.empty(self._sides, self.dtype)
        array.flags.writeable = not readonly
        return array


def item_dtype(dtype: "npt.DTypeLike", user: str) -> "np.dtype[Any]":
    """Return the numpy dtype of the items of a container, checked.

    Raises:
        ImportError: numpy is missing, as for `import_numpy`.
        TypeError: numpy has no such dtype, or it has references, no size, or a shape of its own.
    """
    numpy = sys.modules.get("numpy") or import_numpy(user)
    try:
        kind: np.dtype[Any] = numpy.dtype(dtype)
    except TypeError as error:
        got = type(dtype).__name__
        msg = f"dtype, the first argument, must be a dtype such as 'float64', got {got}: {error}"
        raise TypeError(msg) from None
    if kind.kind not in _PLAIN_KINDS or kind.hasobject or not kind.itemsize or kind.subdtype:
        msg = f"dtype must have a fixed size, without references or shape, got {kind!r}"
        raise TypeError(msg)
    return kind


def converted(array: Any, dtype: Any, copy: bool | None) -> "np.ndarray[Any, Any]":
    """Return an array, or a copy for another dtype or ``copy=True``, as ``__array__`` must.

    Raises:
        ValueError: ``copy=False``, but another dtype needs a copy.
    """
    if dtype is not None and copy is False and array.dtype != dtype:
        msg = f"items of {array.dtype} can't become {dtype} without a copy (copy=False)"
        raise ValueError(msg)
    return array.astype(array.dtype if dtype is None else dtype, copy=bool(copy))  # type: ignore[no-any-return]


def import_numpy(user: str) -> Any:
    """Import numpy at first use; importing pyreserve does not import it.

    Raises:
        ImportError: numpy is missing (extra ``numpy``), the message names `user`; or raised by
            numpy itself.
    """
    return import_extra("numpy", "numpy", user)
