"""A bump arena: blocks handed out by moving an offset, taken back all at once at a mark.

The arena looks at its memory through one view, the window; a block is a slice of it, which costs a
fraction of a view of its own and pins the bytes as well. Every mark and every commit end a window.
So windows with blocks above a mark begin above it, all others below, and the region's table of live
views knows whether a block above the mark is still in use.
"""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import index as _index
from typing import TYPE_CHECKING, NoReturn, TypeVar

from pyreserve.errors import OutOfMemoryError, PyreserveError, RangeError, ReleasedError, ViewError
from pyreserve.limits import PAGE_SIZE
from pyreserve.region import HugePages, Mode, Region, reserve
from pyreserve.units import KiB, MiB, format_size, round_up

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")

_ZEROS = bytes(64 * KiB)
_NOTHING = memoryview(b"")

# Under a global interpreter lock no other thread, signal handler or finaliser comes between
# bytecodes that neither call, nor jump back, nor make containers. Such is the line in `alloc` that
# takes a block; a lock would double its price. It runs for this very alignment, so without a GIL
# never, and all blocks are taken under the lock.
_HAS_GIL = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
_QUICK = 8 if _HAS_GIL else None


@dataclass(frozen=True, eq=False)
class Mark:
    """A point that a `BumpArena` can be reset to, as made by its `mark`."""

    offset: int
    _depth: int


class BumpArena:
    """An arena of `size` bytes that commits memory as its blocks need it, in place.

    The first 64 KiB are committed alone, in small pages; further commits end on addresses that are
    multiples of `step`, so that the kernel can use huge pages, or with the arena.

    Any thread may take blocks; marks and resets are one stack, for one thread at a time to use. A
    finaliser or signal handler that interrupts a call may find RuntimeError, never others' bytes.
    A block's ``obj`` is the buffer that it shares with its neighbours.

    Args:
        size: bytes to reserve, rounded up to whole OS pages; all that it can ever hold.
        step: in bytes, whole OS pages.
        mode, huge_pages, name: as for `pyreserve.reserve`, which may raise what it says there.

    Raises:
        RangeError: a size or step that makes no sense.

    After `release`, everything raises `ReleasedError`, a ValueError.
    """

    def __init__(
        self,
        size: int,
        *,
        mode: Mode = "charge",
        step: int = 2 * MiB,
        huge_pages: HugePages = "default",
        name: str | None = None,
    ) -> None:
        self._step = _index(step)
        if self._step <= 0 or self._step % PAGE_SIZE:
            msg = f"a step is whole OS pages of {PAGE_SIZE} bytes, not {step}"
            raise RangeError(msg)
        # Many a small arena never needs more, and has no use for a huge page.
        small = max(64 * KiB, PAGE_SIZE)
        self._first = small if small < self._step and huge_pages != "prefer" else 0
        self._region = reserve(size, mode=mode, huge_pages=huge_pages, name=name)
        self._lock, self._base = self._region._make_lock(), self._region.base
        self._marks: list[Mark] = []
        self._window = _NOTHING
        # Offsets: where the window begins, where the committed bytes end, and up to where bytes may
        # hold what was written before a reset.
        self._floor = self._end = self._dirty = 0
        # The window's length, and how much of it is handed out.
        self._length = self._at = 0
        # The length again; but 0 while a call does more than hand out, which holds the lock and is
        # busy: other threads wait for it, and what interrupts it is refused.
        self._room, self._busy = 0, False

    # -- what it is ---------------------------------------------------------------------------

    @property
    def region(self) -> Region:
        """The region behind it. What others decommit there can't be handed out any more."""
        return self._region

    @property
    def size(self) -> int:
        """Bytes reserved."""
        return self._region.size

    @property
    def base(self) -> int:
        """Address of the first byte. Touching memory through it is at your own risk."""
        return self._region.base

    @property
    def committed(self) -> int:
        """How many bytes are committed. Exact."""
        return self._region.committed

    @property
    def in_use(self) -> int:
        """Bytes up to the end of the last block, gaps between blocks included."""
        with self._lock:
            self._alive()
            return self._floor + self._at

    @property
    def released(self) -> bool:
        """Whether the arena was released."""
        return self._region.released

    # -- blocks -------------------------------------------------------------------------------

    def alloc(self, nbytes: int, align: int = 8, *, zero: bool = False) -> memoryview:
        """Hand out the next `nbytes` bytes, writable, at an address that is a multiple of `align`.

        They read zero where they were never handed out before, with `zero` everywhere.

        Raises:
            RangeError: `nbytes` is not positive, or `align` not a power of two.
            OutOfMemoryError: no room (``limit="layout"``), or refused; nothing has changed.
            ReleasedError: the arena was released.
            RuntimeError: called by a finaliser or signal handler inside another call.
        """
        # The last line reads, checks and stores. It is one, as tracers come in between lines.
        # fmt: off
        if (align is _QUICK and not zero and type(nbytes) is int
            and (lo := self._at + 7 & -8) < (hi := lo + nbytes) <= self._room): self._at = hi; return self._window[lo:hi]  # noqa: E501, E701, E702
        # fmt: on
        nbytes, align = _index(nbytes), _index(align)
        if nbytes <= 0 or align <= 0 or align & (align - 1):
            msg = f"can't take {nbytes} bytes aligned to {align}: not positive, not a power of two"
            raise RangeError(msg)
        return self._alone(self._take, nbytes, align, zero)

    def _take(self, nbytes: int, align: int, zero: bool) -> memoryview:
        # The window stands in no variable here: the traceback of a refusal would keep it alive.
        used = self._floor + self._at
        start = self._aligned(used, align)
        if start + nbytes > self._floor + self._length:
            # A window begins on an 8-byte line, for the quick way to count from. If that does not
            # fit, what is left after the block holds no such line.
            line = self._aligned(start, 8)
            if line + nbytes <= self._region.size:
                start = line
            self._commit(start + nbytes, nbytes, used)
            self._window = self._region.view(start, self._end - start)
            self._floor, self._length, self._at = start, self._end - start, 0
        at = start - self._floor
        block = self._window[at : at + nbytes]
        if zero and start < self._dirty:
            stale = block[: self._dirty - start]
            for i in range(0, len(stale), len(_ZEROS)):
                stale[i : i + len(_ZEROS)] = _ZEROS[: len(stale) - i]
        self._at = at + nbytes
        return block

    def _aligned(self, offset: int, align: int) -> int:
        return (self._base + offset + align - 1 & -align) - self._base

    def _commit(self, end: int, nbytes: int, used: int) -> None:
        """Commit to the end of a step, or if that is refused just up to `end`."""
        size, ahead = self._region.size, self._first
        if end > size:
            msg = f"no room for {nbytes} bytes: {used} in use of {size} reserved"
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit="layout")
        if end <= self._end:
            return
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

    # -- marks --------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """Return this point, for `reset` to go back to, as often as wanted.

        The arena keeps marks until it is reset below them.
        """
        return self._alone(self._push, True)

    def reset(self, mark: Mark | None = None, *, keep: bool = True) -> None:
        """Take back all blocks above a mark, by default all there are.

        With `keep` the memory stays, contents and all, for blocks to come. Without, whole OS pages
        above the mark are decommitted; those that share a window with a live block below it are
        discarded, so that they stay committed and give back only their memory.

        Raises:
            RangeError: not a mark of this arena, or the arena was reset below it.
            ViewError: live views show blocks above the mark; nothing has changed. Views in garbage
                cycles, or in the frames of a traceback that somebody keeps, are alive.
            VMError: refused; the blocks are still in use, their contents may be gone.
            ReleasedError, RuntimeError: as for `alloc`.
        """
        self._alone(self._reset, mark, keep)

    @contextmanager
    def scope(self, *, keep: bool = True) -> Iterator[None]:
        """Take back, at the end of a ``with``, the blocks and the marks that were made inside.

        Blocks still in use at the end are a ViewError, as for `reset`. When an exception ends the
        ``with`` they are not, since its traceback may hold them: it passes, and the blocks stay in
        use until the next `reset` below.
        """
        mark = self._alone(self._push, False)
        try:
            yield
        except BaseException:
            with suppress(PyreserveError, RuntimeError):
                self.reset(mark, keep=keep)
            raise
        else:
            if not self._region.released:
                self.reset(mark, keep=keep)
        finally:
            with self._lock:
                if self._knows(mark):
                    del self._marks[mark._depth :]

    def _push(self, shared: bool) -> Mark:
        self._close()
        if not (shared and self._marks and self._marks[-1].offset == self._floor):
            self._marks.append(Mark(self._floor, len(self._marks)))
        return self._marks[-1]

    def _reset(self, mark: Mark | None, keep: bool) -> None:
        if mark is not None and not self._knows(mark):
            msg = f"can't reset to {mark}: not this arena's, or the arena was reset below it"
            raise RangeError(msg)
        self._close()
        used, offset = self._floor, 0 if mark is None else mark.offset
        found = self._live(offset)
        held = sorted((lo, min(hi, used)) for lo, hi in found if lo >= offset)
        if held:
            some = ", ".join(f"[{lo:#x}, {hi:#x})" for lo, hi in held[:3])
            more = ", ..." if len(held) > 3 else ""
            msg = f"can't reset to {offset:#x}: live views hold bytes in use, of {some}{more}"
            raise ViewError(msg)
        self._dirty = max(self._dirty, used)
        if not keep:
            self._give_back(round_up(offset, PAGE_SIZE), max((hi for _, hi in found), default=0))
        self._floor = offset
        while self._marks and self._marks[-1].offset > offset:
            self._marks.pop()

    def _give_back(self, first: int, pinned: int) -> None:
        """Decommit all but what windows below the mark reach up to, and discard that."""
        end, pinned = self._end, min(max(first, round_up(pinned, PAGE_SIZE)), self._end)
        if pinned < end:
            # Before it is so: whatever comes in between, to commit again does no harm.
            self._end = pinned
            self._region.decommit(pinned, end - pinned)
        if first < pinned:
            self._region.discard(first, pinned - first)
        self._dirty = min(self._dirty, first)

    def _knows(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and self._marks[mark._depth : mark._depth + 1] == [mark]

    def _close(self) -> None:
        """End the window: the next block opens another one, which begins above this point."""
        self._floor, self._at, self._length, self._window = self._floor + self._at, 0, 0, _NOTHING

    def _live(self, offset: int) -> list[tuple[int, int]]:
        """Return the windows and other views of the region that reach above `offset`."""
        region = self._region
        with region._taking_away() as interrupting:
            if region._views is None or offset == region.size:
                return []
            return region._views.live(offset, region.size, prune=not interrupting)

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Give all addresses back.

        Raises:
            ViewError: live views show blocks; nothing has changed.
            VMError, ReleasedError, RuntimeError: as for `Region.release` and `alloc`.
        """
        self._alone(self._release)

    def _release(self) -> None:
        self._close()
        self._region.release()

    def _alone(self, do: Callable[..., _T], *arguments: object) -> _T:
        """Do what must be interrupted by no other call; whatever that might be waits or fails."""
        with self._lock:
            if self._busy:
                msg = "called from inside another call on the same arena"
                raise RuntimeError(msg)
            self._alive()
            self._busy, self._room = True, 0
            try:
                return do(*arguments)
            finally:
                self._room, self._busy = self._length, False

    def _alive(self) -> None:
        if self._region._released:
            msg = "the arena was released"
            raise ReleasedError(msg)

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._region.released:
            self.release()

    def __repr__(self) -> str:
        region = self._region
        name, size = f" {region.name!r}" if region.name else "", format_size(region.size)
        if region.released:
            return f"<BumpArena{name} of {size}, released>"
        return (
            f"<BumpArena{name} {self._base:#x}-{self._base + region.size:#x} of {size}: "
            f"{format_size(self.in_use)} in use, {format_size(self.committed)} committed>"
        )

    def __reduce__(self) -> NoReturn:
        msg = "a BumpArena is addresses of this process: it can't be pickled or copied"
        raise TypeError(msg)
