"""OnRegion: the base class of objects that own a region; commits ahead by a plan."""

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar, NoReturn, TypeVar

from pyreserve._region.growth import Plan
from pyreserve._region.handles import region_commit
from pyreserve._region.region import Region
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import ReleasedError, StateError
from pyreserve.units import round_up

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


class OnRegion:
    """An object that owns a region and alone may give its memory back.

    Subclasses set `_noun`, the kind of object, for messages.
    """

    __slots__ = ("_exports", "_lock", "_region")

    _noun: ClassVar[str]

    def __init__(self, region: Region) -> None:
        self._region, self._exports = region, region.exports
        self._lock = self._exports.lock
        self._exports.owner = self._noun

    @property
    def region(self) -> Region:
        """The region that holds the bytes. Only this object may decommit, discard or release it."""
        return self._region

    @property
    def name(self) -> str | None:
        """The name given to the constructor; None if none."""
        return self._region.name

    @property
    def base(self) -> int:
        """Address of the first byte. Access through raw addresses is at your own risk."""
        return self._region.base

    @property
    def reserved(self) -> int:
        """Number of reserved bytes. Exact."""
        return self._region.reserved

    @property
    def committed(self) -> int:
        """Number of committed bytes. Exact."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether the object is released or closed."""
        return self._exports.released

    def release(self) -> None:
        """Release all addresses.

        Raises:
            ViewError: live views show some of the bytes; nothing has changed.
            VMError: as for `Region.release`.
            ReleasedError: already released or closed.
            StateError: called by a finaliser or signal handler inside another call.
        """
        self._exports.release()

    def close(self) -> None:
        """Refuse new use; release the addresses when the last view is gone. See `Region.close`."""
        self._exports.close()

    def _check_open(self) -> None:
        if self._exports.released:
            msg = f"the {self._noun} was released or closed"
            raise ReleasedError(msg)

    def __enter__(self) -> "Self":
        self._check_open()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        msg = (
            f"{type(self).__name__} cannot be pickled or copied: it owns addresses of this process"
        )
        raise TypeError(msg)


class InSteps(OnRegion):
    """An object that commits its region in steps, from the base upward, as a plan says."""

    def __init__(self, region: Region, plan: Plan) -> None:
        super().__init__(region)
        self._plan = plan
        # Bytes below _end are committed; bytes above may be, and committing them again is harmless.
        self._end = 0

    def _commit(self, end: int) -> None:
        """Commit up to `end` and ahead as planned; if refused, less ahead, finally nothing ahead.

        The caller holds the lock.
        """
        begin = self._end
        if end <= begin:
            return
        need = round_up(end, PAGE_SIZE)
        ahead = min(self._plan.end(begin, need), self._region.size) - need
        handle = self._exports.handle
        while (err := region_commit(handle, begin, need + ahead - begin)) and ahead:
            ahead = ahead // 2 // PAGE_SIZE * PAGE_SIZE
        if err:
            self._region.commit(begin, need - begin)  # raises, unless memory was freed
        self._end = max(self._end, need + ahead)  # an interrupting call may have committed more


class Exclusive(OnRegion):
    """An object that runs one call at a time and refuses calls that interrupt it."""

    # Whether a call is in progress; calls that interrupt it are refused.
    _busy = False

    def _exclusively(self, do: Callable[..., _T], *arguments: object) -> _T:
        """Call `do` exclusively: other threads wait, calls that interrupt it are refused.

        Raises:
            StateError: called by a finaliser or signal handler inside another call.
            ReleasedError: the object is released or closed.
        """
        with self._lock:
            if self._busy:
                msg = f"called from inside another call on the same {self._noun}"
                raise StateError(msg)
            self._check_open()
            self._busy = True
            try:
                return do(*arguments)
            finally:
                self._busy = False
                if self._exports.released:  # closed by an interrupting call
                    self._finish_close()

    def release(self) -> None:  # as OnRegion.release
        self._exclusively(self._release)

    def _release(self) -> None:
        self._exports.release()

    def close(self) -> None:  # as OnRegion.close
        with self._lock:
            self._exports.retire()
            if not self._busy:  # otherwise the call in progress still needs the memory
                self._finish_close()

    def _finish_close(self) -> None:
        """Close the region. Subclasses first drop their own references to its bytes."""
        self._exports.close()
