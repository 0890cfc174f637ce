"""Appenders: the fastest way to append, a closure that stores items into *cells*.

Cells are a sequence over the container's memory, which the container lends to the closure. While
they are lent, the container has no window; each of its calls first takes the cells back, and with
them the number of items appended. Where storing and counting an item are not one step, the closure
counts it first, so that a call that takes the cells back between the two cannot lose the item.
"""

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from pyreserve._alloc.cells import NO_CELLS, REFUSED
from pyreserve.errors import ReleasedError


class Lease(NamedTuple):
    """The functions by which a container lends cells to its appender.

    Attributes:
        lend: takes the cells, the index of the next item, and how many items were dropped before
            the first cell.
        take_back: ends the loan and returns the index of the next item; the same index until the
            next `lend`.
    """

    lend: Callable[[Any, int, int], None]
    take_back: Callable[[], int]


def make_appender(
    usual: type,
    scalars: frozenset[type],
    limit: float | None,
    append_slowly: Callable[[Lease, Any, int | None], None],
    *,
    one_step: bool,
) -> Callable[[Any], None]:
    """Create an appender, which has no cells yet. It does not keep the container alive.

    Args:
        usual: the type of most values, one of `scalars`.
        scalars: the types whose values run no Python code when they are stored.
        limit: the largest of their values that the cells can hold, or None.
        append_slowly: a method of the container that appends a value that the cells refused, then
            lends cells again. Its last argument is None, or if the value is already counted, the
            number of items ever before it, dropped ones included.
        one_step: whether storing and counting an item are one step, see `cells`.
    """
    cells, lent = NO_CELLS, False
    # The index of the next item, also when cells were last lent or taken back; the number of items
    # dropped before the first cell.
    n = taken = before = 0

    def append(value: Any) -> None:
        nonlocal n
        if type(value) is not usual and type(value) not in scalars:
            slowly(value, None)
            return
        at = n
        try:
            n = at + 1
            cells[at] = value
        except BaseException as error:
            if n == at + 1:
                n = at
            if not isinstance(error, REFUSED):
                raise
            slowly(value, before + at if taken == at + 1 else None)

    def append_in_one_step(value: Any) -> None:
        nonlocal n
        if type(value) is not usual and type(value) not in scalars:
            slowly(value, None)
            return
        try:  # in one line, so that not even a tracer runs in between
            cells[n], n = value, n + 1
        except REFUSED:
            slowly(value, None)

    store = append_in_one_step if one_step else append

    def append_within(value: Any) -> None:
        if type(value) in scalars and not -limit <= value <= limit:  # type: ignore[operator]
            slowly(value, None)
        else:
            store(value)

    def slowly(value: Any, at: int | None) -> None:
        bound = method()
        if bound is None:
            msg = "the array of this appender is gone"
            raise ReleasedError(msg)
        bound(lease, value, at)

    # A signal handler may raise between any two lines of these: a second call completes them.
    def lend(sequence: Any, count: int, dropped: int) -> None:
        nonlocal cells, n, taken, before, lent
        n = taken = count
        before = dropped
        lent = True
        cells = sequence

    def take_back() -> int:
        nonlocal cells, taken, lent
        cells = NO_CELLS
        if lent:
            taken, lent = n, False
        return taken

    lease = Lease(lend, take_back)
    # When the container dies, its memory must not live as long as the appender.
    method = weakref.WeakMethod(append_slowly, lambda _: take_back())
    return store if limit is None else append_within
