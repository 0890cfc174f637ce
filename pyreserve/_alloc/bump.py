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
from typing import Literal, TypeVar

from pyreserve._region.exports import Entry, view_error
from pyreserve._region.owner import InSteps, as_step
from pyreserve._region.region import HugePages, Mode, Region, reserve
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, PyreserveError, RangeError, ViewError, VMError
from pyreserve.units import KiB, MiB, format_size, round_up

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


class BumpArena(InSteps):
    """An arena of `size` bytes that commits memory as its blocks need it, in place.

    The first 64 KiB are committed alone, in small pages; further commits end on addresses that are
    multiples of `step`, so that the kernel can use huge pages, or with the arena.

    Any thread may take blocks; marks and resets are one stack, for one thread at a time to use. A
    finaliser or signal handler that interrupts a call may find RuntimeError, never others' bytes.
    A block's ``obj`` is the buffer that it shares with its neighbours: blocks are cut from a window
    of memory, and a ViewError names the window.

    Args:
        size: bytes to reserve, rounded up to whole OS pages; all that it can ever hold.
        step: in bytes, whole OS pages; or ``"measured"``: what suits this machine, as
            `pyreserve.costs.measured_step` finds it in up to two seconds, once in a process.
        mode, huge_pages, name: as for `pyreserve.reserve`, which may raise what it says there.

    Raises:
        RangeError: a size or step that makes no sense.
        ValueError, OSError: another word, or ``"measured"`` can't be told: see
            `pyreserve.costs.measured_step`.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _what = "arena"

    def __init__(
        self,
        size: int,
        *,
        mode: Mode = "charge",
        step: int | Literal["measured"] = 2 * MiB,
        huge_pages: HugePages = "default",
        name: str | None = None,
    ) -> None:
        small_first, step = huge_pages != "prefer", as_step(step, huge_pages)
        region = reserve(size, mode=mode, huge_pages=huge_pages, name=name)
        super().__init__(region, step, small_first=small_first)
        self._marks: list[Mark] = []
        self._window = _NOTHING
        # Offsets: where the window begins, and up to where bytes may hold what was written before a
        # reset.
        self._floor = self._dirty = 0
        # A scope's blocks still to be taken back: (start, end, keep).
        self._due: tuple[int, int, bool] | None = None
        # The window's length, and how much of it is handed out.
        self._length = self._at = 0
        # The length again; but 0 while a call does more than hand out.
        self._room = 0

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
    def in_use(self) -> int:
        """Bytes up to the end of the last block, gaps between blocks included."""
        with self._lock:
            self._alive()
            return self._floor + self._at

    # -- blocks -------------------------------------------------------------------------------

    def alloc(self, nbytes: int, align: int = 8, *, zero: bool = False) -> memoryview:
        """Hand out the next `nbytes` bytes, writable, at an address that is a multiple of `align`.

        They read zero where they were never handed out before, with `zero` everywhere.

        Raises:
            RangeError: `nbytes` is not positive, or `align` not a power of two.
            OutOfMemoryError: no room (``limit="layout"``), or refused; nothing has changed.
            ReleasedError: the arena was released or closed.
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
        self._take_back_due()
        used = self._floor + self._at
        start = self._aligned(used, align)
        if start + nbytes > self._floor + self._length:
            # A window begins on an 8-byte line, for the quick way to count from. If that does not
            # fit, what is left after the block holds no such line.
            line = self._aligned(start, 8)
            if line + nbytes <= self._region.size:
                start = line
            if start + nbytes > self._region.size:
                raise self._no_room(nbytes, used)
            self._commit(start + nbytes)
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

    def _no_room(self, nbytes: int, used: int) -> OutOfMemoryError:
        msg = f"no room for {nbytes} bytes: {used} in use of {self._region.size} reserved"
        return OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit="layout")

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

        If views of these blocks are alive at the end, the blocks stay in use. The next `alloc` or
        `mark` takes them back if the views are gone by then, or else a `reset` to an earlier mark.
        """
        mark = self._alone(self._push, False)
        try:
            yield
        finally:
            # A live view or a refused decommit must not replace the exception in flight.
            with suppress(PyreserveError, RuntimeError):
                self._alone(self._end_scope, mark, keep)
            with self._lock:
                if self._knows(mark):
                    del self._marks[mark._depth :]

    def _end_scope(self, mark: Mark, keep: bool) -> None:
        if self._knows(mark):  # else a reset below it has ended the scope
            self._end_window()
            self._due = (mark.offset, self._floor, keep)
            self._reset_to(mark.offset, keep)

    def _take_back_due(self) -> None:
        """Take back what a scope left in use, unless more was handed out since."""
        if self._due is None:
            return
        (offset, used, keep), self._due = self._due, None
        if used == self._floor + self._at:
            with suppress(ViewError, VMError):
                self._reset_to(offset, keep)

    def _push(self, shared: bool) -> Mark:
        self._take_back_due()
        self._end_window()
        if not (shared and self._marks and self._marks[-1].offset == self._floor):
            self._marks.append(Mark(self._floor, len(self._marks)))
        return self._marks[-1]

    def _reset(self, mark: Mark | None, keep: bool) -> None:
        if mark is not None and not self._knows(mark):
            msg = f"can't reset to {mark}: not this arena's, or the arena was reset below it"
            raise RangeError(msg)
        self._reset_to(0 if mark is None else mark.offset, keep)

    def _reset_to(self, offset: int, keep: bool) -> None:
        self._end_window()
        used = self._floor
        found = self._live(offset)
        held = [(ref, lo, min(hi, used)) for ref, lo, hi in found if lo >= offset]
        if held:
            raise view_error(f"can't reset to {offset:#x}", held)
        self._dirty = max(self._dirty, used)
        if not keep:
            self._give_back(round_up(offset, PAGE_SIZE), max((hi for *_, hi in found), default=0))
        self._floor, self._due = offset, None
        while self._marks and self._marks[-1].offset > offset:
            self._marks.pop()

    def _give_back(self, first: int, pinned: int) -> None:
        """Decommit all but what windows below the mark reach up to, and discard that."""
        # More than the arena counts on may be committed, after a refusal below.
        end = max(self._end, self._region.committed)
        pinned = min(max(first, round_up(pinned, PAGE_SIZE)), end)
        if pinned < end:
            # Before it is so: whatever comes in between, to commit again does no harm.
            self._end = min(self._end, pinned)
            self._region.decommit(pinned, end - pinned)
        if first < pinned:
            self._region.discard(first, pinned - first)
        self._dirty = min(self._dirty, first)

    def _knows(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and self._marks[mark._depth : mark._depth + 1] == [mark]

    def _end_window(self) -> None:
        """End the window: the next block opens another one, which begins above this point."""
        self._floor, self._at, self._length, self._window = self._floor + self._at, 0, 0, _NOTHING

    def _live(self, offset: int) -> list[Entry]:
        """Return the windows and other views of the region that reach above `offset`."""
        region = self._region
        with region._taking_away() as interrupting:
            if region._views is None or offset == region.size:
                return []
            return region._views.live(offset, region.size, prune=not interrupting)

    # -- the end ------------------------------------------------------------------------------

    def _release(self) -> None:
        self._end_window()
        super()._release()

    def _let_go(self) -> None:
        self._room = 0  # first: from here on nothing is handed out of the window
        self._end_window()
        super()._let_go()

    def _alone(self, do: Callable[..., _T], *arguments: object) -> _T:
        return super()._alone(self._without_room, do, *arguments)  # type: ignore[no-any-return]

    def _without_room(self, do: Callable[..., _T], *arguments: object) -> _T:
        self._room = 0
        try:
            return do(*arguments)
        finally:
            self._room = self._length

    def __repr__(self) -> str:
        region = self._region
        name, size = f" {region.name!r}" if region.name else "", format_size(region.size)
        if region.released:
            return f"<BumpArena{name} of {size}, released>"
        return (
            f"<BumpArena{name} {self._base:#x}-{self._base + region.size:#x} of {size}: "
            f"{format_size(self.in_use)} in use, {format_size(self.committed)} committed>"
        )
