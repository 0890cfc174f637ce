"""Values that become items of an array: types stored without conversion, and conversions."""

from collections.abc import Callable
from functools import cache, lru_cache
from struct import Struct, error
from typing import TYPE_CHECKING, Any

from pyreserve._alloc.growable import unwrapped
from pyreserve._region.arrays import import_numpy

if TYPE_CHECKING:
    import numpy as np

# Formats that a memoryview stores faster than numpy: with the same result, or an exception.
_FAST_FORMATS = frozenset("bBhHiIlLqQfd?")
# Lists of up to this length are packed by `struct`, in less than half of numpy's time.
_MOST_PACKED = 1 << 16
_MOST_PACKERS = 256
_PACKED_FORMATS = frozenset("bBhHiIlLqQfd")
_LISTS = frozenset({list, tuple})
# Larger numbers overflow, of which numpy warns.
_LIMITS = {"e": 65504.0, "f": 3.4028234663852886e38}
# Python types that numpy stores without running their code, by the character of the dtype.
_COPIED: dict[str, set[type]] = {
    "U": {str},
    "S": {bytes},
    "e": {bool, int, float},
    "D": {float, complex},
    "d": {float},
    "g": {float},
}


def is_raw(dtype: "np.dtype[Any]") -> bool:
    """Whether a memoryview stores items of this dtype."""
    return dtype.isnative and dtype.char in _FAST_FORMATS and dtype.names is None


@cache
def _numpy() -> Any:
    return import_numpy("GrowableArray")


@cache
def _integers() -> set[type]:
    numpy = _numpy()
    kinds = {kind for kind in numpy.sctypeDict.values() if issubclass(kind, numpy.integer)}
    return {bool, int, *kinds} - {numpy.timedelta64}


@lru_cache(maxsize=64)
def plain_types(dtype: "np.dtype[Any]") -> tuple[type, frozenset[type], float | None]:
    """Return the types whose values are stored without running Python code, and their limit.

    Other values may run code: a method of their own, or a handler of numpy's warnings. The result
    is the usual type, all types, and the limit: larger values overflow, of which numpy warns.
    """
    limit = _LIMITS.get(dtype.char)
    if not is_raw(dtype):
        types = frozenset({dtype.type, *_COPIED.get(dtype.char, ())})
        return dtype.type, types, limit if float in types else None
    numpy = _numpy()
    if dtype.kind == "b":
        return bool, frozenset({*_integers(), numpy.bool_}), None
    if dtype.kind != "f":
        return int, frozenset(_integers()), None
    kinds = frozenset({*_integers(), float, numpy.bool_, numpy.float32, numpy.float64})
    if limit is None:
        return float, kinds | {numpy.float16}, None
    # Numpy rounds its own integers once, a memoryview to float64 first.
    long = {kind for kind in kinds if issubclass(kind, numpy.integer) and kind(0).nbytes > 4}
    return float, kinds - long, limit


def as_item(value: Any, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> Any:
    """Return a value as an array of the dtype and shape of an item.

    Raises:
        TypeError, ValueError, OverflowError: raised by numpy, or the shape differs.
    """
    item = _numpy().array(unwrapped(value), dtype=dtype)
    if item.shape != shape:
        wanted = f"of shape {shape}" if shape else "a single item"
        msg = f"value must be {wanted}, got an array of shape {item.shape}"
        raise ValueError(msg)
    return item


class Packers(dict[int, Callable[..., bytes]]):
    """Functions that pack numbers of one dtype, by how many; they refuse what numpy must convert.

    They are kept because `struct.pack` copies its arguments once more and looks up its format.
    """

    def __init__(self, dtype: "np.dtype[Any]") -> None:
        self._usable = dtype.isnative and dtype.char in _PACKED_FORMATS
        # Only the standard format refuses floats that overflow.
        self._format = f"{'=' if dtype.char == 'f' else '@'}%d{dtype.char}"

    def __missing__(self, n: int) -> Callable[..., bytes]:
        if not self._usable or n > _MOST_PACKED:
            raise error
        if len(self) >= _MOST_PACKERS:
            self.clear()
        pack = self[n] = Struct(self._format % n).pack
        return pack


@lru_cache(maxsize=64)
def packers_of(dtype: "np.dtype[Any]") -> Packers:
    """Return the functions that pack numbers of this dtype."""
    return Packers(dtype)


def packed(values: Any, packers: Packers, types: frozenset[type]) -> bytes | None:
    """Return the bytes of a list or tuple of numbers; None if numpy must convert `values`.

    Args:
        values: any value.
        packers: of the dtype of the items.
        types: the `plain_types` of that dtype; the first number is of one of them.
    """
    try:
        if type(values) in _LISTS and type(values[0]) in types:
            return packers[len(values)](*values)
    except (error, IndexError, TypeError, ValueError, OverflowError):
        pass
    return None


def as_items(values: Any, dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> Any:
    """Return values as an array of items of this dtype and shape.

    Raises:
        TypeError, ValueError, OverflowError: raised by numpy, or the shape differs.
    """
    numpy = _numpy()
    if not shape and type(values) in _LISTS:
        data = packed(values, packers_of(dtype), plain_types(dtype)[1])
        if data is not None:
            return numpy.frombuffer(data, dtype)
    items = numpy.asarray(unwrapped(values), dtype=dtype)
    if items.shape == (0,):  # an empty list, also of rows
        return items.reshape(0, *shape)
    if not items.ndim or items.shape[1:] != shape:
        rows = f", then the item shape {shape}" if shape else ""
        msg = f"values must have one dimension{rows}, got shape {items.shape}"
        raise ValueError(msg)
    return items


def is_array_like(values: Any) -> bool:
    """Whether numpy converts `values` to an array at once, unlike a mere iterable."""
    if hasattr(values, "__getitem__") or hasattr(values, "__array__"):
        return True
    try:
        memoryview(values).release()
    except TypeError:
        return not hasattr(values, "__iter__")
    return True
