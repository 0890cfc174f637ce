"""Steps: how much is committed at a time, and a region that is committed so from its start on."""

from collections.abc import Callable
from operator import index as _index
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn, TypeVar

from pyreserve._region.region import HugePages, Region
from pyreserve._system.features import transparent_huge_pages
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, RangeError, ReleasedError
from pyreserve.units import KiB, round_up

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


def as_step(step: int | Literal["measured"], huge_pages: HugePages = "default") -> int:
    """Return a step in bytes.

    Args:
        step: in bytes, whole OS pages; or ``"measured"``: what suits this machine, as
            `pyreserve.costs.measured_step` finds it in up to two seconds, once in a process.
        huge_pages: the memory's policy, as for `pyreserve.reserve`.

    Raises:
        TypeError: neither an integer nor a string.
        RangeError: not whole OS pages, or none.
        ValueError: another string; or, as OSError, what `pyreserve.costs.measured_step` raises.
    """
    if isinstance(step, str):
        if step != "measured":
            msg = f"a step is in bytes or 'measured', not {step!r}"
            raise ValueError(msg)
        from pyreserve.costs import measured_step  # noqa: PLC0415  # only where it is wanted

        always = huge_pages == "default" and transparent_huge_pages() == "always"
        step = measured_step(huge_pages=always or huge_pages == "prefer")
    nbytes = _index(step)
    if nbytes <= 0 or nbytes % PAGE_SIZE:
        msg = f"a step is whole OS pages of {PAGE_SIZE} bytes, not {nbytes}"
        raise RangeError(msg)
    return nbytes


class InSteps:
    """A region that is committed from its start on, and changed by one call at a time.

    The first 64 KiB are committed alone, in small pages, unless huge ones are preferred: many a
    small thing never needs more. Further commits end on addresses that are multiples of the step.
    """

    _what: ClassVar[str]  # in messages

    def __init__(self, region: Region, step: int, *, small_first: bool) -> None:
        self._region, self._step = region, step
        self._lock, self._base = region._make_lock(), region.base
        small = max(64 * KiB, PAGE_SIZE)
        self._first = small if small < step and small_first else 0
        # Bytes up to here are committed; more may be, and to commit those again does no harm.
        self._end = 0
        # A call is under way: other threads wait for it, and what interrupts it is refused.
        self._busy = False

    @property
    def base(self) -> int:
        """Address of the first byte. Touching memory through it is at your own risk."""
        return self._region.base

    @property
    def committed(self) -> int:
        """How many bytes are committed. Exact."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether it was released or closed."""
        return self._region.released

    def _commit(self, end: int) -> None:
        """Commit to the end of a step, or if that is refused just up to `end`."""
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
        """Do what must be interrupted by no other call; whatever that might be waits or fails."""
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
                if self._region._released:  # what interrupted this call closed it
                    self._let_go()

    def _alive(self) -> None:
        if self._region._released:
            msg = f"the {self._what} was released or closed"
            raise ReleasedError(msg)

    def release(self) -> None:
        """Give all addresses back.

        Raises:
            ViewError: live views show some of the bytes; nothing has changed.
            VMError: as for `Region.release`.
            ReleasedError: it was released or closed.
            RuntimeError: called by a finaliser or signal handler inside another call.
        """
        self._alone(self._release)

    def _release(self) -> None:
        self._region.release()

    def close(self) -> None:
        """Refuse new use; release the addresses with the last view. See `Region.close`."""
        with self._lock:
            self._region._retire()
            if not self._busy:  # else the call under way still needs the memory
                self._let_go()

    def _let_go(self) -> None:
        self._region._close()

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        msg = f"a {type(self).__name__} is addresses of this process: it can't be pickled or copied"
        raise TypeError(msg)
