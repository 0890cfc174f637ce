"""Numpy arrays over views, for the ``ndarray`` methods."""

import math
from collections.abc import Callable, Sequence
from operator import index as _index
from typing import TYPE_CHECKING, Any

from pyreserve._system.extras import import_extra
from pyreserve.errors import RangeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def import_numpy(user: str) -> Any:
    """Import numpy at first use; importing pyreserve does not import it.

    Raises:
        ImportError: numpy is missing (extra ``numpy``), the message names `user`; or raised by
            numpy itself.
    """
    return import_extra("numpy", "numpy", user)


def array_over(
    view: Callable[[int], memoryview],
    shape: int | Sequence[int],
    dtype: "npt.DTypeLike",
    *,
    readonly: bool,
) -> "np.ndarray[Any, Any]":
    """Return a C-ordered ndarray over the memoryview that `view` returns for a number of bytes.

    An array of no bytes is over no memory: then `view` is not called.

    Raises:
        ImportError: numpy is missing (extra ``numpy``).
        RangeError: a side is negative.
        ValueError: `dtype` holds references to objects.
    """
    numpy = import_numpy("ndarray")
    item_type = numpy.dtype(dtype)
    sides = tuple(map(_index, shape)) if isinstance(shape, tuple | list) else (_index(shape),)  # type: ignore[arg-type]
    if min(sides, default=0) < 0:
        msg = f"shape must not have negative sides, got {shape}"
        raise RangeError(msg)
    nbytes = math.prod(sides, start=item_type.itemsize)
    if nbytes:
        held = view(nbytes)
        memory = held.toreadonly() if readonly else held
        array: np.ndarray[Any, Any] = numpy.frombuffer(memory, dtype=item_type).reshape(sides)
    else:
        array = numpy.empty(sides, dtype=item_type)
        array.flags.writeable = not readonly
    return array
