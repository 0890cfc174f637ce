"""Base class of objects on one region that is committed from its start, in steps."""

from collections.abc import Callable
from operator import index as _index
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, TypeVar

from pyreserve._region.policies import HugePages
from pyreserve._region.region import Region
from pyreserve._system.features import transparent_huge_pages
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, RangeError, ReleasedError
from pyreserve.units import KiB, round_up

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


def as_step(step: int | Literal["measured"], huge_pages: HugePages = "default") -> int:
    """Check a commit step and return it in bytes.

    Args:
        step: bytes, a positive multiple of the OS page; or ``"measured"``: the best step on this
            machine. `pyreserve.costs.measured_step` measures it once in a process, in at most two
            seconds.
        huge_pages: policy of the memory, as for `pyreserve.reserve`.

    Raises:
        TypeError: `step` is neither an integer nor a string.
        RangeError: `step` is not a positive multiple of the OS page.
        ValueError: another string, or raised by `pyreserve.costs.measured_step`.
        OSError: raised by `pyreserve.costs.measured_step`.
    """
    if isinstance(step, str):
        if step != "measured":
            msg = f"step must be a number of bytes or 'measured', got {step!r}"
            raise ValueError(msg)
        from pyreserve.costs import measured_step  # noqa: PLC0415  # slow to import

        always = huge_pages == "default" and transparent_huge_pages() == "always"
        step = measured_step(huge_pages=always or huge_pages == "prefer")
    nbytes = _index(step)
    if nbytes <= 0 or nbytes % PAGE_SIZE:
        msg = f"step must be a positive multiple of the OS page ({PAGE_SIZE}), got {nbytes}"
        raise RangeError(msg)
    return nbytes


class InSteps:
    """A region that is committed from its start on, by one call at a time.

    The first commit is 64 KiB of small pages, unless huge pages are preferred: many small objects
    never need more. Later commits end at addresses that are multiples of the step.
    """

    _what: ClassVar[str]  # the kind of object, for messages

    def __init__(self, region: Region, step: int, *, small_first: bool) -> None:
        self._region, self._step = region, step
        self._exports, self._base = region.exports, region.base
        self._lock = self._exports.lock
        small = max(64 * KiB, PAGE_SIZE)
        self._first = small if small < step and small_first else 0
        # Bytes below _end are committed; bytes above may be, and committing them again is harmless.
        self._end = 0
        # A call is in progress: a finaliser or signal handler that interrupts it is refused.
        self._busy = False

    @property
    def base(self) -> int:
        """Address of the first byte. Access through raw addresses is at your own risk."""
        return self._region.base

    @property
    def committed(self) -> int:
        """Number of committed bytes. Exact."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether the object is released or closed."""
        return self._region.released

    def _commit(self, end: int) -> None:
        """Commit to the end of a step; if that is refused, only up to `end`."""
        if end <= self._end:
            return
        size, ahead = self._region.size, self._first
        if self._end or end > ahead:
            ahead = round_up(self._base + end, self._step) - self._base
        need, ahead = round_up(end, PAGE_SIZE), min(ahead, size)
        try:
            self._region.commit(self._end, ahead - self._end)
        except OutOfMemoryError:
            if ahead == need:
                raise
            self._region.commit(self._end, need - self._end)
            ahead = need
        self._end = ahead

    def _alone(self, do: Callable[..., _T], *arguments: object) -> _T:
        """Call `do` exclusively: other threads wait, calls that interrupt it are refused.

        Raises:
            RuntimeError: called by a finaliser or signal handler inside another call.
            ReleasedError: the object is released or closed.
        """
        with self._lock:
            if self._busy:
                msg = f"called from inside another call on the same {self._what}"
                raise RuntimeError(msg)
            self._alive()
            self._busy = True
            try:
                return do(*arguments)
            finally:
                self._busy = False
                if self._exports.released:  # closed by an interrupting call
                    self._let_go()

    def _alive(self) -> None:
        if self._exports.released:
            msg = f"the {self._what} was released or closed"
            raise ReleasedError(msg)

    def release(self) -> None:
        """Release all addresses.

        Raises:
            ViewError: live views show some of the bytes; nothing has changed.
            VMError: as for `Region.release`.
            ReleasedError: already released or closed.
            RuntimeError: called by a finaliser or signal handler inside another call.
        """
        self._alone(self._release)

    def _release(self) -> None:
        self._exports.release()

    def close(self) -> None:
        """Refuse new use; release the addresses when the last view is gone. See `Region.close`."""
        with self._lock:
            self._exports.retire()
            if not self._busy:  # otherwise the call in progress still needs the memory
                self._let_go()

    def _let_go(self) -> None:
        self._exports.close()

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        msg = (
            f"{type(self).__name__} cannot be pickled or copied: it owns addresses of this process"
        )
        raise TypeError(msg)
