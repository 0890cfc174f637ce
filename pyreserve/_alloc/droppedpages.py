"""The OS pages of items that were dropped from the front of a container."""

from collections.abc import Iterable, Iterator

from pyreserve._region.exports import Exports
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import VMError
from pyreserve.units import round_up

_Ranges = list[tuple[int, int]]


class DroppedPages:
    """Decommits the OS pages below a front that moves up, except those under a view.

    All offsets are in bytes from the base. The caller holds the lock of the region.
    """

    __slots__ = ("_end", "_held")

    def __init__(self) -> None:
        # Pages below _end are decommitted, or in _held: sorted ranges to try again.
        self._held: _Ranges = []
        self._end = 0

    def has_new(self, front: int) -> bool:
        """Whether whole OS pages lie below `front` that `decommit` has not handled."""
        return front // PAGE_SIZE * PAGE_SIZE > self._end

    def decommit(self, exports: Exports, front: int) -> VMError | None:
        """Decommit all pages below `front` that no view shows; return the first refusal, or None.

        The next call tries again the pages that are left: those under a view, those that the
        kernel refused to decommit, and those of an interrupted call.
        """
        if self.has_new(front):
            end = front // PAGE_SIZE * PAGE_SIZE
            # _held first: an interrupted call must not lose pages; trying them twice is harmless.
            self._held = _merged([*self._held, (self._end, end)])
            self._end = end
        if not self._held:
            return None
        refusal = None
        kept: _Ranges = []
        with exports.removal():
            live = exports.live(self._held[0][0], self._end)
            pages = ((lo // PAGE_SIZE * PAGE_SIZE, round_up(hi, PAGE_SIZE)) for _, lo, hi in live)
            for lo, hi, shown in _split(self._held, _merged(pages)):
                if not shown:
                    try:
                        exports.decommit(lo, hi - lo)
                        continue
                    except VMError as error:
                        # Without its traceback, which refers to this frame.
                        refusal = refusal or error.with_traceback(None)
                kept.append((lo, hi))
        self._held = _merged(kept)
        return refusal


def _merged(ranges: Iterable[tuple[int, int]]) -> _Ranges:
    """Return the ranges sorted; ranges that overlap or touch are joined."""
    joined: _Ranges = []
    for lo, hi in sorted(ranges):
        if joined and lo <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(hi, joined[-1][1])
        else:
            joined.append((lo, hi))
    return joined


def _split(ranges: _Ranges, by: _Ranges) -> Iterator[tuple[int, int, bool]]:
    """Cut merged `ranges` at the ends of merged ranges `by`; yield (lo, hi, inside `by`)."""
    i = 0
    for lo, hi in ranges:
        at = lo
        while at < hi:
            while i < len(by) and by[i][1] <= at:
                i += 1
            start, stop = by[i] if i < len(by) else (hi, hi)
            if at < start:
                yield at, min(start, hi), False
            at = min(max(at, start), hi)
            if at < hi:
                yield at, min(stop, hi), True
                at = min(stop, hi)
