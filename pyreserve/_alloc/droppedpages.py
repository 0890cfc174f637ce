"""The OS pages of items that were dropped from the front of a container."""

from pyreserve._region.exports import Exports
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import VMError
from pyreserve.layouts import joined, without
from pyreserve.units import round_up


class DroppedPages:
    """Decommits the OS pages below a front that moves up, except those under a view.

    All offsets are in bytes from the base. The caller holds the lock of the region.
    """

    __slots__ = ("_end", "_held")

    def __init__(self) -> None:
        # Pages below _end are decommitted, or in _held: sorted ranges to try again.
        self._held: tuple[tuple[int, int], ...] = ()
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
            self._held = joined([*self._held, (self._end, end)])
            self._end = end
        if not self._held:
            return None
        refusal = None
        span = self._held[0][0], self._end
        gone = list(without(span, self._held))
        with exports.removal():
            live = exports.live(*span)
            shown = [(lo // PAGE_SIZE * PAGE_SIZE, round_up(hi, PAGE_SIZE)) for _, lo, hi in live]
            for lo, hi in without(span, joined([*gone, *shown])):
                try:
                    exports.decommit(lo, hi - lo)
                except VMError as error:
                    # Without its traceback, which refers to this frame.
                    refusal = refusal or error.with_traceback(None)
                else:
                    gone.append((lo, hi))
        self._held = tuple(without(span, joined(gone)))
        return refusal
