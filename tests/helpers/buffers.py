"""Buffers, and arguments for them and their models."""

from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from pyreserve import GrowableBuffer, MiB

Call = Callable[[GrowableBuffer], object]

few = st.lists(st.sampled_from(b"ab\n"), max_size=40).map(bytes)  # repeats itself often
ends = st.none() | st.integers(-45, 45)


def filled(data: Any = b"hello, world", capacity: int = 16 * MiB) -> GrowableBuffer:
    buffer = GrowableBuffer(capacity)
    buffer.extend(data)
    return buffer


def result_of(call: Callable[[Any], object], on: Any) -> object:
    """Return the result of a call, or whether it was a TypeError, ValueError or IndexError."""
    try:
        return call(on)
    except (TypeError, ValueError, IndexError) as error:
        return next(k for k in (TypeError, ValueError, IndexError) if isinstance(error, k))
