"""A bump arena: blocks allocated by advancing an offset, freed all at once by a reset to a mark.

The arena views its memory through one memoryview, the window. A block is a slice of the window,
which costs a fraction of a new view and pins the bytes as well. Every mark and every commit end the
window. So a window that holds blocks above a mark begins above that mark, and the region's table of
live views knows whether any block above the mark is alive.
"""

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pyreserve._region.arrays import ArrayPlan
from pyreserve._region.growth import Steps, as_step
from pyreserve._region.holders import view_error
from pyreserve._region.owner import Exclusive, InSteps
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.reserve import reserve
from pyreserve._region.viewtable import Entry
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, PyreserveError, RangeError, ViewError, VMError
from pyreserve.units import KiB, MiB, as_bytes, format_size, round_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pyreserve._region.arrays import Shape

_T = TypeVar("_T")

_ZEROS = bytes(64 * KiB)
_EMPTY = memoryview(b"")

# With a GIL, no other thread, signal handler or finaliser runs between bytecodes that neither call
# nor jump back nor make containers. The fast path of `alloc` has no others, so it needs no lock,
# which would double its cost. It serves this alignment alone; without a GIL, none.
_HAS_GIL = sys.implementation.name == "cpython" and getattr(sys, "_is_gil_enabled", lambda: True)()
_FAST_ALIGN = 8 if _HAS_GIL else None


class Mark:
    """A point that a `BumpArena` can be reset to, returned by its `mark`.

    A mark equals only itself: arenas may have marks with the same numbers.
    """

    __slots__ = ("_depth", "_offset")

    def __init__(self, offset: int, depth: int) -> None:
        """Called by `BumpArena.mark` and `BumpArena.scope` alone."""
        self._offset = offset
        self._depth = depth

    @property
    def offset(self) -> int:
        """Bytes from the arena's base."""
        return self._offset

    @property
    def depth(self) -> int:
        """Number of marks below it."""
        return self._depth

    def __repr__(self) -> str:
        return f"Mark(offset={self._offset}, depth={self._depth})"


class BumpArena(Exclusive, InSteps):
    """An arena of `size` bytes that commits memory in place as its blocks need it.

    The first commit is 64 KiB, in small pages. Each later one ends at an address that is a multiple
    of `step`, so that the kernel can use huge pages, or at the end of the arena.

    Any thread may allocate blocks. Marks and resets form one stack, to be used by one thread at a
    time. A finaliser or signal handler that interrupts a call may get StateError, never bytes of
    another block. A block's ``obj`` is the buffer of its window, which neighbouring blocks share; a
    ViewError names the window.

    Args:
        size: bytes to reserve, or a size such as ``"1GiB"``; rounded up to whole OS pages. The
            capacity of the arena.
        step: bytes to commit at a time, a multiple of the OS page; see
            `pyreserve.costs.measured_step` for the best one on this machine.
        mode, huge_pages, fork, name: as for `pyreserve.reserve`, whose exceptions apply too.

    Raises:
        RangeError: `size` is not positive, or `step` not a positive multiple of the OS page.
        ValueError: an unknown policy, or a string that is not a size.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    _noun = "arena"

    def __init__(
        self,
        size: int | str,
        *,
        step: int | str = 2 * MiB,
        mode: Mode = "charge",
        huge_pages: HugePages = "default",
        fork: Fork = "copy",
        name: str | None = None,
    ) -> None:
        step = as_step(step)
        region = reserve(size, mode=mode, huge_pages=huge_pages, fork=fork, name=name)
        self._base = region.base
        super().__init__(region, Steps(self._base, step, small_first=huge_pages != "prefer"))
        self._marks: list[Mark] = []
        self._window = _EMPTY
        # Offset of the window.
        self._start = 0
        # Bytes below this offset may hold data from before a reset.
        self._dirty_end = 0
        # A scope that could not be reset at its end: (start, end, keep).
        self._pending: tuple[int, int, bool] | None = None
        # Bytes of the window, and of its blocks so far.
        self._length = self._at = 0
        # Equals _length; but 0, which disables the fast path, during a call under the lock.
        self._limit = 0

    # -- state --------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        """Bytes up to the end of the last block, including gaps between blocks."""
        with self._lock:
            self._check_open()
            return self._start + self._at

    # -- blocks -------------------------------------------------------------------------------

    def alloc(self, nbytes: int | str, *, align: int | str = 8, zero: bool = False) -> memoryview:
        """Allocate the next `nbytes` bytes, writable, at an address that is a multiple of `align`.

        Bytes that were never allocated before are zero, and with `zero` all are; else they are
        as their last user left them.

        Raises:
            RangeError: `nbytes` is not positive, or `align` not a power of two.
            OutOfMemoryError: the capacity is used up (``limit="capacity"``), or the kernel refused
                memory; nothing has changed.
            ReleasedError: the arena was released or closed.
            StateError: called by a finaliser or signal handler inside another call.
        """
        # Read, check and store on one line: a tracer may run code between two lines.
        # fmt: off
        if (align is _FAST_ALIGN and not zero and type(nbytes) is int
            and (lo := self._at + 7 & -8) < (hi := lo + nbytes) <= self._limit): self._at = hi; return self._window[lo:hi]  # noqa: E501, E701, E702
        # fmt: on
        nbytes, align = as_bytes(nbytes), as_bytes(align)
        if nbytes <= 0:
            msg = f"nbytes must be positive, got {nbytes}"
            raise RangeError(msg)
        if align <= 0 or align & (align - 1):
            msg = f"align must be a power of two, got {align}"
            raise RangeError(msg)
        return self._exclusively(self._take, nbytes, align, zero)

    def ndarray(
        self,
        shape: "Shape",
        dtype: "npt.DTypeLike" = "uint8",
        *,
        align: int | str | None = None,
        zero: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """Allocate a C-ordered ndarray of `shape` and `dtype`, as `alloc` allocates a block.

        `shape` is an int, or a tuple or list of ints. `align` is at least 8 and what the dtype
        needs by default. An array without items allocates nothing.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            ValueError: the items hold references to objects.
            RangeError, OutOfMemoryError, ReleasedError, StateError: as for `alloc`; RangeError
                also if a side is negative.
        """
        plan = ArrayPlan(shape, dtype)
        if plan.nbytes:
            alignment = max(8, plan.dtype.alignment) if align is None else align
            return plan.over(self.alloc(plan.nbytes, align=alignment, zero=zero))
        self._check_open()
        return plan.empty()

    def _take(self, nbytes: int, align: int, zero: bool) -> memoryview:
        # No local variable holds the window: the traceback of an exception would keep it alive.
        self._retry_scope()
        used = self._start + self._at
        start = self._aligned(used, align)
        if start + nbytes > self._start + self._length:
            # A window begins at a multiple of 8, which the fast path relies on. If the block does
            # not fit there, no multiple of 8 is left after the block either.
            multiple = self._aligned(start, 8)
            if multiple + nbytes <= self._region.size:
                start = multiple
            if start + nbytes > self._region.size:
                raise self._capacity_error(nbytes, used)
            self._commit(start + nbytes)
            self._window = self._region.view(start, self._end - start)
            self._start, self._length, self._at = start, self._end - start, 0
        at = start - self._start
        block = self._window[at : at + nbytes]
        if zero and start < self._dirty_end:
            stale = block[: self._dirty_end - start]
            for i in range(0, len(stale), len(_ZEROS)):
                stale[i : i + len(_ZEROS)] = _ZEROS[: len(stale) - i]
        self._at = at + nbytes
        return block

    def _aligned(self, offset: int, align: int) -> int:
        return (self._base + offset + align - 1 & -align) - self._base

    def _capacity_error(self, nbytes: int, used: int) -> OutOfMemoryError:
        msg = f"cannot allocate {nbytes} bytes: {used} of {self._region.size} are in use"
        return OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit="capacity")

    # -- marks --------------------------------------------------------------------------------

    def mark(self) -> Mark:
        """Return a mark at the end of the last block, for any number of calls of `reset`.

        The arena keeps a mark until a reset to below it.
        """
        return self._exclusively(self._push, True)

    def reset(self, mark: Mark | None = None, *, keep: bool = True) -> None:
        """Free all blocks above a mark, by default all blocks.

        With `keep` the memory stays committed and keeps its contents. Otherwise whole OS pages
        above the mark are decommitted, except those in a window with a live block below the mark:
        these are discarded, which gives back their memory but not their commit charge.

        Raises:
            RangeError: `mark` is of another arena, or the arena was reset below it.
            ViewError: live views show blocks above the mark; nothing has changed. Views in
                reference cycles, or in the frames of a traceback, are alive.
            VMError: refused; the blocks stay in use, their contents are undefined.
            ReleasedError, StateError: as for `alloc`.
        """
        self._exclusively(self._reset, mark, keep)

    @contextmanager
    def scope(self, *, keep: bool = True) -> Iterator[None]:
        """Return a context manager that frees the blocks and marks made inside its ``with``.

        If views of these blocks are alive at the end, the blocks stay in use. The next `alloc` or
        `mark` frees them if the views are gone by then; otherwise a `reset` to an earlier mark
        does.
        """
        mark = self._exclusively(self._push, False)
        try:
            yield
        finally:
            # A live view or a refused decommit must not hide an exception of the block.
            with suppress(PyreserveError):
                self._exclusively(self._end_scope, mark, keep)
            with self._lock:
                if self._is_valid(mark):
                    del self._marks[mark.depth :]

    def trim(self) -> int:
        """Decommit the whole OS pages above the last block; return the bytes given back.

        Pages in a window with a live block below them are discarded instead, if they may hold data:
        this gives back their memory but not their commit charge.

        Raises:
            VMError: refused; no block has changed.
            ReleasedError, StateError: as for `alloc`.
        """
        return self._exclusively(self._trim)

    def _trim(self) -> int:
        self._retry_scope()
        self._end_window()
        start, before = round_up(self._start, PAGE_SIZE), self._region.committed
        pinned_end = max((hi for *_, hi in self._live_views(self._start)), default=0)
        stale_end = min(round_up(max(self._dirty_end, start), PAGE_SIZE), pinned_end)
        self._return_memory(start, pinned_end)
        return before - self._region.committed + max(stale_end - start, 0)

    def _end_scope(self, mark: Mark, keep: bool) -> None:
        if self._is_valid(mark):  # else a reset to below it has ended the scope
            self._end_window()
            self._pending = (mark.offset, self._start, keep)
            self._reset_to(mark.offset, keep)

    def _retry_scope(self) -> None:
        """Reset the scope that is pending, unless a block was allocated since its end."""
        if self._pending is None:
            return
        (offset, used, keep), self._pending = self._pending, None
        if used == self._start + self._at:
            with suppress(ViewError, VMError):
                self._reset_to(offset, keep)

    def _push(self, shared: bool) -> Mark:
        self._retry_scope()
        self._end_window()
        if not (shared and self._marks and self._marks[-1].offset == self._start):
            self._marks.append(Mark(self._start, len(self._marks)))
        return self._marks[-1]

    def _reset(self, mark: Mark | None, keep: bool) -> None:
        if mark is not None and not self._is_valid(mark):
            msg = f"mark must be of this arena and not ended by a reset to below it, got {mark}"
            raise RangeError(msg)
        self._reset_to(0 if mark is None else mark.offset, keep)

    def _reset_to(self, offset: int, keep: bool) -> None:
        self._end_window()
        used = self._start
        views = self._live_views(offset)
        held = [(ref, lo, min(hi, used)) for ref, lo, hi in views if lo >= offset]
        if held:
            raise view_error(f"cannot reset to {offset:#x}", held)
        self._dirty_end = max(self._dirty_end, used)
        if not keep:
            pinned_end = max((hi for *_, hi in views), default=0)
            self._return_memory(round_up(offset, PAGE_SIZE), pinned_end)
        self._start, self._pending = offset, None
        while self._marks and self._marks[-1].offset > offset:
            self._marks.pop()

    def _return_memory(self, start: int, pinned_end: int) -> None:
        """Decommit the pages from `start` up, but discard those below `pinned_end`."""
        # After a refused decommit, more is committed than _end says.
        end = max(self._end, self._region.committed)
        pinned_end = min(max(start, round_up(pinned_end, PAGE_SIZE)), end)
        if pinned_end < end:
            # Lower _end first: if this call is interrupted, committing again is harmless.
            self._end = min(self._end, pinned_end)
            self._exports.decommit(pinned_end, end - pinned_end)
        if start < pinned_end:
            self._exports.discard(start, pinned_end - start)
        self._dirty_end = min(self._dirty_end, start)

    def _is_valid(self, mark: Mark) -> bool:
        return isinstance(mark, Mark) and self._marks[mark.depth : mark.depth + 1] == [mark]

    def _end_window(self) -> None:
        """End the window at its last block; the next block opens a window above this point."""
        # On one line: a tracer that raises between lines would leave the window half ended.
        self._start, self._at, self._length, self._window = self._start + self._at, 0, 0, _EMPTY

    def _live_views(self, offset: int) -> list[Entry]:
        """Return the live views of the region, windows included, that reach above `offset`."""
        size = self._region.size
        return [] if offset == size else self._exports.live(offset, size)

    # -- the end ------------------------------------------------------------------------------

    def _release(self) -> None:
        self._end_window()
        super()._release()

    def _finish_close(self) -> None:
        self._limit = 0  # first: no block may be taken from the window any more
        self._end_window()
        super()._finish_close()

    def _exclusively(self, do: Callable[..., _T], *arguments: object) -> _T:
        return super()._exclusively(self._without_fast_path, do, *arguments)  # type: ignore[no-any-return]

    def _without_fast_path(self, do: Callable[..., _T], *arguments: object) -> _T:
        self._limit = 0
        try:
            return do(*arguments)
        finally:
            self._limit = self._length

    def __repr__(self) -> str:
        region = self._region
        name, size = f" {region.name!r}" if region.name else "", format_size(region.size)
        if region.released:
            return f"<BumpArena{name} of {size}, released>"
        return (
            f"<BumpArena{name} {self._base:#x}-{self._base + region.size:#x} of {size}: "
            f"{format_size(self.in_use)} in use, {format_size(self.committed)} committed>"
        )
