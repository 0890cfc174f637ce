"""A growing container that is given to another container stays free to give memory back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pyreserve import PAGE_SIZE, GrowableArray, GrowableBuffer, RingArray

Take = Callable[[Any], object]

_PAGES = 8
_BYTES = _PAGES * PAGE_SIZE

_TAKERS: dict[str, Take] = {
    "RingArray.extend": lambda values: RingArray("u1", _BYTES).extend(values),
    "RingArray.extend, another dtype": lambda values: RingArray("i4", _BYTES).extend(values),
    "GrowableArray.extend": lambda values: GrowableArray("u1", _BYTES).extend(values),
    "GrowableArray.append": lambda row: GrowableArray("u1", 9, item_shape=_BYTES).append(row),
    "GrowableArray[:] =": lambda values: _array(GrowableArray("u1")).__setitem__(..., values),
    "add": lambda values: np.add(_array(GrowableArray("u1")), values),
    "GrowableBuffer.extend": lambda values: GrowableBuffer(_BYTES).extend(values),
    "GrowableBuffer +=": lambda values: GrowableBuffer(_BYTES).__iadd__(values),
    "GrowableBuffer.write": lambda values: GrowableBuffer(_BYTES).write(values),
    "GrowableBuffer.find": lambda values: GrowableBuffer(_BYTES).find(values),
    "GrowableBuffer ==": lambda values: GrowableBuffer(_BYTES) == values,
    "GrowableBuffer.readinto": lambda target: GrowableBuffer(_BYTES).readinto(target),
}


def _array(array: Any) -> Any:
    array.extend(bytes(_BYTES) if isinstance(array, GrowableBuffer) else np.zeros(_BYTES, "u1"))
    return array


@pytest.mark.parametrize("kind", [GrowableBuffer, lambda: GrowableArray("u1")])
@pytest.mark.parametrize("take", list(_TAKERS.values()), ids=list(_TAKERS))
def test_nothing_is_pinned_after_the_call(kind: Callable[[], Any], take: Take) -> None:
    """Once the call is over, the pages of dropped items are given back."""
    values = _array(kind())
    take(values)

    values.drop_front(_BYTES)
    values.trim()

    assert values.committed == 0
