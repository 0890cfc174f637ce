"""The kind of an array's items: facts that follow from a dtype and the shape of an item."""

from functools import lru_cache
from math import prod
from operator import index as _index
from typing import TYPE_CHECKING, Any

from pyreserve._alloc.arrayvalues import is_raw, packers_of, plain_types
from pyreserve._region.arrays import import_numpy, item_dtype
from pyreserve.errors import RangeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class ItemKind:
    """A dtype and the shape of an item, with the facts that follow from them. Immutable.

    Attributes:
        dtype, shape: of an item; the shape is ``()`` for single numbers.
        nbytes: the size of an item.
        scalar: whether numpy reads an item as a copy, which keeps no memory alive.
        raw: whether a memoryview stores an item.
        plain, packers: see `plain_types` and `packers_of`.
        none: an array without items.
        ndarray: numpy's type.
    """

    __slots__ = (
        "_frombuffer",
        "dtype",
        "nbytes",
        "ndarray",
        "none",
        "packers",
        "plain",
        "raw",
        "scalar",
        "shape",
    )

    def __init__(self, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
        """Take a dtype of `item_dtype`, and the sides of an item.

        Raises:
            RangeError: a side is not positive.
        """
        numpy: Any = import_numpy("GrowableArray")
        self.dtype, self.shape = dtype, shape
        if min(shape, default=1) <= 0:
            msg = f"item_shape must have positive sides, got {shape}"
            raise RangeError(msg)
        self.nbytes = prod(shape, start=int(dtype.itemsize))
        self.scalar = not shape and dtype.kind != "V"
        self.raw = self.scalar and is_raw(dtype)
        self.plain, self.packers = plain_types(dtype), packers_of(dtype)
        self.none: Any = numpy.empty((0, *shape), dtype)
        self.ndarray: type[Any] = numpy.ndarray
        self._frombuffer = numpy.frombuffer

    def over(self, view: memoryview) -> Any:
        """Return the array of the items in a view."""
        array = self._frombuffer(view, self.dtype)
        return array.reshape(-1, *self.shape) if self.shape else array


_cached = lru_cache(maxsize=64)(ItemKind)


def item_kind(dtype: "npt.DTypeLike", item_shape: int | tuple[int, ...]) -> ItemKind:
    """Return the kind of items of this dtype and shape.

    Raises:
        ImportError, TypeError: as for `item_dtype`; also if a side is not an integer.
        RangeError: a side is not positive.
    """
    exact = item_dtype(dtype, "GrowableArray")
    sides = item_shape if isinstance(item_shape, tuple) else (item_shape,)
    if sides:
        sides = tuple(map(_index, sides))
    kind = _cached(exact, sides)
    # Equal dtypes may differ in their metadata.
    return kind if kind.dtype is exact else ItemKind(exact, sides)
