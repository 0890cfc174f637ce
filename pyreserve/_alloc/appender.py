"""The fastest way to append: a closure that writes into a window lent to it.

While it has the window, the container has none: every call of the container first takes the window
back, and with it the number of items appended. The closure counts an item before it writes it, so
that a call that takes the window back between the two cannot lose the item.
"""

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

# The index of the next item while the window is not lent: no sequence has it.
_NOT_LENT = sys.maxsize
# Raised by a window that has no such item, or cannot store the value.
REFUSED = (IndexError, TypeError, ValueError, OverflowError)


class Appender(NamedTuple):
    """The functions that share one closure.

    Attributes:
        append: appends one item.
        prepare: takes the index of the next item, for a `take_back` without a window.
        lend: takes a window, the index of the next item, and the number of items that were dropped
            before the first one of the window.
        take_back: gives the window up; returns the index of the next item. Until the next `prepare`
            or `lend` another call, after one that was interrupted, returns the same.
    """

    append: Callable[[Any], None]
    prepare: Callable[[int], None]
    lend: Callable[[Any, int, int], None]
    take_back: Callable[[], int]


def make_appender(
    scalars: frozenset[type], nothing: Any, append_slowly: Callable[[Any, int | None], None]
) -> Appender:
    """Create an appender without a window.

    Args:
        scalars: the types whose values run no Python code when they are stored.
        nothing: a window without items.
        append_slowly: appends a value that the window refused, then lends the window again. Its
            second argument is None, or if the value is counted already, the number of items before
            it, with those dropped.
    """
    window, n = nothing, _NOT_LENT
    taken = -1  # the index of the next item when the window was taken back
    before = 0  # items dropped before the first one of the window

    def append(value: Any) -> None:
        nonlocal n
        if type(value) not in scalars:
            append_slowly(value, None)
            return
        at = n
        try:
            n = at + 1
            window[at] = value
        except REFUSED:
            if n == at + 1 and window is not nothing:
                n = at
            append_slowly(value, before + at if taken == at + 1 else None)
        except BaseException:
            if n == at + 1:
                n = at
            raise

    def prepare(count: int) -> None:
        nonlocal taken
        taken = count

    def lend(sequence: Any, count: int, dropped: int) -> None:
        nonlocal window, n, taken, before
        n, taken, before = count, -1, dropped
        window = sequence

    def take_back() -> int:
        nonlocal window, n, taken
        if n < _NOT_LENT:  # a refused append leaves _NOT_LENT + 1
            window = nothing
            taken, n = n, _NOT_LENT
        return taken

    return Appender(append, prepare, lend, take_back)
