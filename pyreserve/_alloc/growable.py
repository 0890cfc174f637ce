"""Items that grow in place: the base of GrowableBuffer and GrowableArray.

All addresses are reserved at once; memory is committed in steps as the length grows. Growth
moves nothing, so it invalidates no view, with one exception: items dropped from the front leave
their addresses unused, and when no addresses are left above the last item, the items move to the
start of the region, if no view shows them.

The container keeps a *window*, a sequence over the committed items from the front up, and writes
new items into it. The window is a view of the region like any other: while a call uses it, the
region refuses to decommit its bytes.
"""

import errno
from contextlib import suppress
from functools import partial
from operator import index as _index
from typing import TYPE_CHECKING, Any, ClassVar

from pyreserve._alloc.capacity import reserve_default
from pyreserve._alloc.droppedpages import DroppedPages
from pyreserve._region.growth import as_step, growth_plan, reserve_to_grow
from pyreserve._region.handles import memmove, offset_cell
from pyreserve._region.holders import view_error
from pyreserve._region.owner import Exclusive, InSteps
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import OutOfMemoryError, RangeError, VMError
from pyreserve.units import KiB, MiB, as_count, format_size, round_up

if TYPE_CHECKING:
    import numpy as np

# From this size up, discard pages instead of zeroing them. Touching a discarded page costs more
# than zeroing it, but many may never be touched again.
_DISCARD_FROM = 32 * MiB
_ZEROS = bytes(64 * KiB)


class Growable(Exclusive, InSteps):
    """A growing sequence of items of one size in a region.

    Subclasses set `_unit`, the plural noun of the items for messages, and define `_over`.
    """

    _unit: ClassVar[str]
    _itemsize = 1  # bytes

    def __init__(
        self,
        size: int | None,
        step: int | str | None,
        mode: Mode,
        fork: Fork,
        huge_pages: HugePages | None,
        name: str | None,
    ) -> None:
        if size is not None and size <= 0:
            msg = f"capacity must be positive, got {size // self._itemsize}"
            raise RangeError(msg)
        step = None if step is None else as_step(step)
        make = partial(
            reserve_to_grow, step=step, mode=mode, fork=fork, huge_pages=huge_pages, name=name
        )
        region = reserve_default(make, self._itemsize) if size is None else make(size)
        super().__init__(region, growth_plan(region, step))
        self._size = region.size // self._itemsize * self._itemsize if size is None else size
        self._count = 0  # items
        self._front = 0  # offset of the first item, in bytes
        self._dropped = 0  # items dropped from the front
        self._dropped_pages = DroppedPages()
        # Bytes above the length are zero from _dirty_end on, except in the first item above it.
        self._dirty_end = 0
        self._spared = (0, 0)  # [low, high) of the last `spare`, less what `advance` took
        # Views of the bytes [low, high) that the buffer protocol exported. Consumers may keep no
        # reference but one to this object, so these bytes stay committed as long as it lives.
        self._pins: tuple[tuple[memoryview, int, int], ...] = ()
        self._window_length = 0  # items in the window
        self._shown: memoryview | None = None  # the view behind the window
        self._shown_from = 0  # offset at which the region exported it
        self._window: Any = self._over(None)

    @property
    def capacity(self) -> int:
        """The maximum length."""
        return self._size // self._itemsize

    @property
    def dropped(self) -> int:
        """How many items `drop_front` has removed in all."""
        self._check_open()
        return self._dropped

    def resize(self, length: int, *, zero: bool = True) -> None:
        """Set the length. New items are zero; memory above the length stays committed.

        With ``zero=False``, which is faster, new items have undefined contents.

        Raises:
            RangeError: `length` is negative.
            ViewError: live views show bytes above the new length; nothing has changed.
            OutOfMemoryError: `length` exceeds the capacity (``limit="capacity"``), or the kernel
                refused memory; nothing has changed.
            VMError: bytes used before can't be discarded (before Linux 5.18: memory locked by
                mlock); the length has not changed.
            ReleasedError: it was released or closed.
            StateError: called by a finaliser or signal handler inside another call.
        """
        self._exclusively(self._resize, as_count(length, "length"), bool(zero))

    def clear(self) -> None:
        """Set the length to 0, as ``resize(0)`` does."""
        self._exclusively(self._resize, 0, True)

    def drop_front(self, n: int) -> None:
        """Remove the first `n` items; indices count from the new front. Nothing moves.

        Whole OS pages below the front are decommitted at once, except those under a view, which
        stays valid: the first `drop_front` or `trim` after the view is gone decommits them. Bytes
        that this object exported by the buffer protocol count as viewed as long as it lives. The
        time of a call grows with the number of views that show removed items.

        If the kernel refuses to decommit (max_map_count), the items are removed all the same, and
        later calls try again: an exception would mean that nothing has changed. `committed` counts
        the pages that are left, and `trim` raises the refusal.

        Removed items use up addresses. When growth needs more addresses than are left, it moves the
        items to the start of the region, or raises OutOfMemoryError (``limit="capacity"``) while a
        view is alive.

        Raises:
            RangeError: not ``0 <= n <= length``; nothing has changed.
            ReleasedError, StateError: as for `resize`.
        """
        self._exclusively(self._drop_front, _index(n))

    def trim(self) -> int:
        """Decommit the whole OS pages above the length and below the front; return their bytes.

        Pages below the front stay while views show them.

        Raises:
            ViewError: live views of `spare` hold bytes above the length; nothing has changed.
            VMError: refused; the pages are still committed, unless the kernel refused only the
                policies of the fresh addresses: see `Region.decommit`.
            ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._trim)

    def advance(self, n: int) -> None:
        """Make the first `n` items of the last `spare` part of this container.

        Raises:
            RangeError: `n` is negative or more than `spare` gave, or another call has changed the
                length since.
            ReleasedError, StateError: as for `resize`.
        """
        self._exclusively(self._advance, _index(n))

    def __len__(self) -> int:
        self._check_open()
        return self._count

    def __repr__(self) -> str:
        name = f" {self._region.name!r}" if self._region.name else ""
        if self.released:
            return f"<{type(self).__name__}{name} for {self.capacity:,} {self._unit}, released>"
        return (
            f"<{type(self).__name__}{name} of {len(self):,} {self._unit}: capacity "
            f"{self.capacity:,}, {format_size(self.committed)} committed>"
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return an array of the current items, a view: numpy's array protocol."""
        raise NotImplementedError

    # -- the window ---------------------------------------------------------------------------

    def _over(self, view: memoryview | None) -> Any:
        """Return the items over a view, for the window; for None a window without items."""
        raise NotImplementedError

    def _offset(self, count: int) -> int:
        """Return the offset of an item, in bytes from the base."""
        return self._front + count * self._itemsize

    def _make_space(self, count: int) -> None:
        """Commit the memory of the first `count` items, and open a window that shows them."""
        if self._offset(count) > self._size:
            self._move_to_start(count)
        self._commit(self._offset(count))
        if count > self._window_length:
            self._window_length = 0
            items = (min(self._end, self._size) - self._front) // self._itemsize
            low, nbytes = self._front, items * self._itemsize
            self._open_window(self._region.view(low, nbytes), low, items)

    def _open_window(self, view: memoryview, low: int, items: int) -> None:
        """Show `view`, which begins at the front and is part of a view exported from `low` up."""
        self._shown, self._shown_from = view, low
        self._window = self._over(view)
        self._window_length = items

    def _close_window(self) -> None:
        """Drop the window, so that its bytes can be decommitted."""
        self._window_length = 0
        self._shown = None
        self._window = self._over(None)

    def _drop_cached(self) -> None:
        """Drop the views that this object caches, other than the window and the pins."""

    def _export(self) -> memoryview:
        """Return a view of all items for the buffer protocol; pin them."""
        low, end = self._front, self._offset(self._count)
        if low == end:
            return memoryview(bytearray())
        _, first, last = self._pins[-1] if self._pins else (None, low, low)
        if end > last:
            # Extend the last pin unless bytes between it and the front may be decommitted.
            older, first = (self._pins[:-1], first) if low <= last else (self._pins, low)
            self._pins = (*older, (self._region.view(first, end - first), first, end))
        return self._region.view(low, end - low)

    # -- lengths ------------------------------------------------------------------------------

    def _resize(self, count: int, zero: bool) -> None:
        if count < self._count:
            self._truncate(count)
            return
        self._make_space(count)
        if zero:
            self._zero_up_to(count)
        self._dirty_end = max(self._dirty_end, self._offset(count))
        self._count = count

    def _zero_up_to(self, count: int) -> None:
        """Zero the items from the length up to `count`, which have memory."""
        start, end = self._offset(self._count), self._offset(count)
        if start < end:
            self._clear(start, min(end, max(self._dirty_end, start + self._itemsize)))

    def _truncate(self, count: int) -> None:
        if count < 0:
            msg = f"length must not be negative, got {count}"
            raise RangeError(msg)
        with self._exports.removal():
            if count < self._count:
                self._drop_cached()
                if not self._window_length:  # an interrupted call may have left one
                    self._close_window()
                self._refuse_views("cut off", self._offset(count), self._offset(self._count))
                self._dirty_end = max(self._dirty_end, self._offset(self._count + 1))
            self._count = count

    def _refuse_views(self, verb: str, low: int, high: int) -> None:
        """Raise ViewError if views other than the window and the pins show bytes of [low, high)."""
        held = self._exports.live(low, high)
        owned = [(first, last) for _, first, last in self._pins]
        if self._window_length:
            owned.append((self._shown_from, self._offset(self._window_length)))
        for own in owned:
            same = [at for at, (_, *span) in enumerate(held) if tuple(span) == own]
            if same:
                del held[same[0]]
        if held:
            raise view_error(f"cannot {verb} [{low:#x}, {high:#x})", held, verb)

    def _trim(self) -> int:
        before = self._region.committed
        self._decommit_tail()
        refusal = self._dropped_pages.decommit(self._exports, self._front)
        if refusal:
            raise refusal
        return before - self._region.committed

    def _decommit_tail(self) -> None:
        region, cut = self._region, round_up(self._offset(self._count), PAGE_SIZE)
        if self._pins:
            cut = max(cut, round_up(self._pins[-1][2], PAGE_SIZE))
        if cut < region.size:
            self._close_window()
            # Lower _end first: if this call is interrupted, committing again is harmless.
            self._end = min(self._end, cut)
            self._exports.decommit(cut, region.size - cut)
            self._dirty_end = min(self._dirty_end, cut)

    # -- the front ----------------------------------------------------------------------------

    def _drop_front(self, n: int) -> None:
        if not 0 <= n <= self._count:
            msg = f"n must be in [0, {self._count}], the number of {self._unit}, got {n}"
            raise RangeError(msg)
        front, space = self._offset(n), self._window_length - n
        # Keep the window, which is cheaper than a new one, while it pins no whole page.
        rest = None
        if self._shown is not None and space > 0 and not self._dropped_pages.has_new(front):
            rest = self._shown[n * self._itemsize :]
        self._drop_cached()
        self._close_window()
        # One statement: no signal handler runs between its assignments.
        self._front, self._count, self._dropped = front, self._count - n, self._dropped + n
        if rest is not None:
            self._open_window(rest, self._shown_from, space)
        with suppress(MemoryError):  # the items are gone; the next call tries the pages again
            self._dropped_pages.decommit(self._exports, front)

    def _move_to_start(self, count: int) -> None:
        """Move the items to the start of the region, so that there is space for `count` items."""
        nbytes, length = count * self._itemsize, self._count * self._itemsize
        msg = f"cannot grow to {count} {self._unit}: "
        if nbytes > self._size:
            msg += f"the capacity is {self.capacity}, and {self._count} are in use"
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="grow", nbytes=nbytes, limit="capacity")
        exports, region, cut = self._exports, self._region, round_up(length, PAGE_SIZE)
        self._drop_cached()
        self._close_window()
        with exports.removal():
            held = exports.live(0, region.size)
            if held:
                msg += "its addresses are used up, and live views keep the items from moving"
                holders = view_error("cannot move the items to the start", held)
                raise OutOfMemoryError(
                    errno.ENOMEM, msg, verb="grow", nbytes=nbytes, limit="capacity"
                ) from holders
            self._dirty_end = max(self._dirty_end, self._offset(self._count + 1))
            front, at_start = offset_cell(self._front), (0, cut, (0, 0), DroppedPages())
            try:
                if length:
                    exports.slide(front, length)
                else:
                    front[0] = 0
            finally:
                # No call here: no signal handler runs before the state is consistent.
                if front[0] == 0:
                    self._front, self._end, self._spared, self._dropped_pages = at_start
            try:
                if cut < region.size:
                    exports.decommit(cut, region.size - cut)
                self._dirty_end = cut
            except VMError:  # memory above _end stays committed; `trim` tries again
                pass

    def _spare(self, n: int) -> int:
        """Commit memory for `n` more items; return the offset of the first."""
        if n < 0:
            msg = f"n must not be negative, got {n}"
            raise RangeError(msg)
        self._make_space(self._count + n)
        start, end = self._offset(self._count), self._offset(self._count + n)
        self._dirty_end = max(self._dirty_end, end)
        self._spared = start, end
        return start

    def _advance(self, n: int) -> None:
        start, (low, high) = self._offset(self._count), self._spared
        # After other calls that changed the length, the next items are not those of `spare`.
        given = (min(high, self._end) - start) // self._itemsize if start == low else 0
        if not 0 <= n <= given:
            msg = f"n must be in [0, {given}], the {self._unit} of the last spare, got {n}"
            raise RangeError(msg)
        if n:
            self._spared = self._offset(self._count + n), high
            self._count += n

    def _clear(self, start: int, end: int) -> None:
        """Zero the committed bytes [start, end), which lie above the length."""
        first, last = round_up(start, PAGE_SIZE), end // PAGE_SIZE * PAGE_SIZE
        if last - first < _DISCARD_FROM:
            first = last = end
        else:
            self._exports.discard(first, last - first)
        for low, high in ((start, first), (last, end)):
            for at in range(low, high, len(_ZEROS)):
                nbytes = min(high - at, len(_ZEROS))
                memmove(self._exports.address(at), _ZEROS, nbytes)

    # -- the end ------------------------------------------------------------------------------

    def _release(self) -> None:
        self._drop_cached()
        self._close_window()
        if not self._pins:
            super()._release()
            return
        with self._exports.removal():
            self._refuse_views("release", 0, self._region.size)
            self._exports.close()

    def _finish_close(self) -> None:
        self._drop_cached()
        self._close_window()
        super()._finish_close()


def unwrapped(value: Any) -> Any:
    """Return the array of a growing container, and any other value as it is.

    From Python 3.12 on, numpy would take the container's buffer instead, which pins the items.
    """
    return value.__array__() if isinstance(value, Growable) else value
