"""Numpy arrays over views: what all the methods named ndarray share."""

import math
from operator import index as _index
from typing import TYPE_CHECKING, Any, NamedTuple

from pyreserve._system.extras import import_extra
from pyreserve.errors import RangeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Shape = int | tuple[int, ...] | list[int]


class ArrayPlan(NamedTuple):
    """The dtype, sides and bytes of an array to be made.

    Attributes:
        numpy: the module.
        dtype: the numpy dtype of the items.
        sides: length of each dimension.
        nbytes: bytes of all items; 0 for an array that needs no memory.
    """

    numpy: Any
    dtype: "np.dtype[Any]"
    sides: tuple[int, ...]
    nbytes: int

    def over(self, view: memoryview) -> "np.ndarray[Any, Any]":
        """Return a C-ordered array over a view of `nbytes` bytes, which it keeps alive."""
        array: np.ndarray[Any, Any] = self.numpy.frombuffer(view, dtype=self.dtype)
        return array.reshape(self.sides)

    def empty(self, *, readonly: bool = False) -> "np.ndarray[Any, Any]":
        """Return an array without items, in memory of its own."""
        array: np.ndarray[Any, Any] = self.numpy.empty(self.sides, self.dtype)
        array.flags.writeable = not readonly
        return array


def plan_array(shape: "Shape", dtype: "npt.DTypeLike") -> ArrayPlan:
    """Check the shape and dtype of an array over raw memory.

    Raises:
        ImportError: numpy is missing (extra ``numpy``).
        TypeError: a side is not an integer, or numpy has no such dtype.
        RangeError: a side is negative.
        ValueError: the items hold references to objects.
    """
    numpy = import_numpy("ndarray")
    item_type = numpy.dtype(dtype)
    sides = tuple(_index(side) for side in (shape if isinstance(shape, tuple | list) else (shape,)))
    if any(side < 0 for side in sides):
        msg = f"shape must have no negative side, got {sides}"
        raise RangeError(msg)
    if item_type.hasobject:
        msg = f"dtype must hold no references, got {item_type!r}: an OBJECT array over raw memory"
        raise ValueError(msg)
    return ArrayPlan(numpy, item_type, sides, math.prod(sides, start=item_type.itemsize))


def import_numpy(user: str) -> Any:
    """Import numpy at first use; importing pyreserve does not import it.

    Raises:
        ImportError: numpy is missing (extra ``numpy``), the message names `user`; or raised by
            numpy itself.
    """
    return import_extra("numpy", "numpy", user)
