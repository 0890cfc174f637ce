"""Exports: the lock of a region, its live views, and the calls that remove bytes.

A region creates its Exports at first use. Containers on the region use them as `Region.exports`.
"""

import sys
import weakref
from _thread import RLock
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from pyreserve._native import ffi, lib
from pyreserve._region import handles
from pyreserve._region.handles import refused, released
from pyreserve._region.holders import view_error
from pyreserve._region.viewtable import MANY, Entry, ViewTable
from pyreserve._system import forks
from pyreserve.errors import StateError

_T = TypeVar("_T")

# Bound once: an attribute lookup on the library costs a third of an empty call.
_buffer, _memoryview, _ref = ffi.buffer, memoryview, weakref.ref
_decommit = lib.region_decommit
_discard = lib.region_discard
_export = lib.region_export
_MAX_INDEX = sys.maxsize
_GONE = _ref(RLock())


class Exports:
    """The lock of one region, its live views, and the calls that take bytes away.

    Low-level, for containers built on a region. A container holds `lock` around each call on its
    own state, and takes bytes away by `remove` or inside `removal`: both look for live views first,
    and refuse new views until the bytes are gone. A finaliser or signal handler that interrupts
    them may call everything here except `view`, which raises StateError.

    Offsets and lengths are in bytes. The verbs do not check `owner`.

    Attributes:
        handle: the ``struct region *`` of the region, for calls of C.
        lock: re-entrant, held across forks.
        owner: the kind of object that alone may discard, decommit, release and close, a noun for
            messages; None if the region has no such owner.
        released: whether the region is released or closed.
        viewed: whether a view may be alive. While this is False, a caller that holds `lock` may
            take bytes away by one call of C without `remove`.
        heaps: number of C heaps that use `handle`. While there is one, the region does not end with
            the Region object.
    """

    __slots__ = (
        "_base",
        "_closed",
        "_depth",
        "_new",
        "_removing",
        "_size",
        "_table",
        "handle",
        "heaps",
        "lock",
        "owner",
        "released",
        "viewed",
    )

    def __init__(self, handle: Any, size: int) -> None:
        """Called by `Region` alone."""
        self.handle = handle
        self.lock = RLock()
        self.owner: str | None = None
        self.released = self.viewed = False
        self.heaps = 0
        self._size = size
        self._table: ViewTable | None = None
        self._new: list[Entry] | None = None  # of the table
        self._base: Any = None
        # Number of nested calls during which no view may be made.
        self._depth = 0
        # Alive inside `removal`: a reference to the token that only its ``with`` blocks hold.
        self._removing = _GONE
        # The addresses are released, or kept only for live views.
        self._closed = False
        forks.register(self.lock)

    # -- views --------------------------------------------------------------------------------

    def view(self, offset: int, length: int) -> memoryview:
        """Return a writable memoryview of committed bytes; see `Region.view`, which checks more.

        The range must lie within the region.

        Raises:
            RangeError: not all of the range is committed, or it meets a guard of `set_cells`.
            ReleasedError: the region is released or closed.
            StateError: called by a finaliser or signal handler inside another call on the region.
        """
        with self.lock:
            if self._depth or self._removing() is not None:
                msg = "view cannot be called from inside another call on the same region"
                raise StateError(msg)
            new = self._new
            if new is None:
                if self.released:
                    raise released()
                new = self._make_table()
            # A new cdata for each view: it lives exactly as long as the buffer made from it.
            anchor = self._base + offset if offset <= _MAX_INDEX else self.address(offset)
            exported = _buffer(anchor, length)
            # Register first, then check: a later decommit is refused, an earlier one is seen.
            new.append((_ref(anchor), offset, offset + length))
            self.viewed = True
            allowed = _export(self.handle, offset, length)
            if allowed != 1:
                raise refused(self.handle, self._size, "view", allowed, offset, length)
            if len(new) > MANY and self._table is not None:
                self._table.flush()
        return _memoryview(exported)

    def live(self, lo: int, hi: int) -> list[Entry]:
        """Return the live views that show bytes of [lo, hi), each as (weak reference, start, end).

        The reference is to an object that lives as long as the view. The caller holds `lock`.
        """
        if self._table is None:
            return []
        before, self._depth = self._depth, self._depth + 1
        try:
            return self._table.live(lo, hi)
        finally:
            self._depth = before

    def address(self, offset: int) -> Any:
        """Return the address of a byte as a ``char *``. Access through it is at your own risk."""
        if offset <= _MAX_INDEX:
            return self.handle.base + offset
        return ffi.cast("char *", handles.address_of(self.handle.base) + offset)

    def _make_table(self) -> list[Entry]:
        self._base = self.handle.base
        if self._table is None:
            _tables[id(self)] = self._table = ViewTable(self._size)
        self._new = self._table.new
        return self._new

    def runs(self, *, committed: bool) -> list[tuple[int, int]]:
        """Return the committed, else the reserved ranges as (offset, length), lowest first.

        They are copied out by one C call, so they are consistent.
        """
        with self.lock:
            if self.released:
                raise released()
            runs = handles.copy_runs(self.handle, committed=committed)
            if self.released:  # by a finaliser
                raise released()
        return [(start, end - start) for start, end in runs]

    @property
    def viewed_flag(self) -> Any:
        """The ``bool *`` that C calls without `lock` go by. Valid while `handle` is referenced."""
        return ffi.addressof(self.handle, "viewed")

    # -- taking bytes away --------------------------------------------------------------------

    def remove(self, verb: str, lo: int, hi: int, act: Callable[..., _T], *arguments: object) -> _T:
        """Return ``act(*arguments)``, which takes the bytes [lo, hi) away.

        The caller holds `lock`.

        Raises:
            ViewError: live views show some of the bytes; `act` was not called. The message names
                `verb`.
        """
        before, self._depth = self._depth, self._depth + 1
        try:
            table = self._table
            if self.viewed and table is not None:
                if table.live(lo, hi):
                    self.refuse(verb, lo, hi)
                if not table.filled and not table.new and not self.released:
                    self.viewed = self.handle.viewed = False
            return act(*arguments)
        finally:
            self._depth = before

    def removal(self) -> AbstractContextManager[object]:
        """Refuse new views inside the ``with`` block. The caller holds `lock`.

        Inside, `refuse` looks for live views, and the bytes may be taken away in several steps.
        """
        # Any object that Python itself enters and leaves will do. A signal handler that raises
        # around a block may keep its __exit__ from running, but not the token alive.
        token = self._removing()
        if token is None:
            token = RLock()
            self._removing = _ref(token)
        return token

    def refuse(self, verb: str, lo: int, hi: int) -> None:
        """Raise `ViewError` if live views show bytes of [lo, hi). Called inside `removal`."""
        held = None if self._table is None else self._table.live(lo, hi)
        if held:
            raise view_error(f"cannot {verb} [{lo:#x}, {hi:#x})", held, verb)

    def decommit(self, offset: int, length: int) -> None:
        """Return [offset, offset + length) to reserved; see `Region.decommit`."""
        with self.lock:
            try:
                if self.viewed and offset >= 0 < length <= self._size - offset:
                    end = offset + length
                    err = self.remove(
                        "decommit", offset, end, _decommit, self.handle, offset, length
                    )
                else:
                    err = _decommit(self.handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            raise refused(self.handle, self._size, "decommit", err, offset, length)

    def discard(self, offset: int, length: int, *, lazy: bool = False) -> None:
        """Drop the contents of committed bytes; see `Region.discard`."""
        with self.lock:
            try:
                err = _discard(self.handle, offset, length, lazy)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            raise refused(self.handle, self._size, "discard", err, offset, length)

    # -- guards -------------------------------------------------------------------------------

    def set_cells(self, cell: int, guard: int) -> None:
        """Divide the region into cells that end with `guard` bytes of guard pages.

        From now on `view` refuses ranges that meet a guard. Sizes are multiples of the OS page.
        """
        err = lib.region_set_cells(self.handle, cell, guard)
        if err:
            raise refused(self.handle, self._size, "guard", err, 0, cell)

    def guard_cells(self, first: int, stop: int) -> None:
        """Install the guards of the committed cells [first, stop). A decommit removes them.

        The caller holds `lock`.

        Raises:
            VMError: refused; some of the guards may be installed.
            ReleasedError: the region is released or closed.
        """
        err = lib.region_guard_cells(self.handle, first, stop)
        if err:
            cell = int(self.handle.cell)
            nbytes = (stop - first) * cell
            raise refused(self.handle, self._size, "guard", err, first * cell, nbytes)

    def slide(self, front: Any, length: int) -> None:
        """Move the bytes at the offset in the cell `front` to offset 0, and set the cell to 0.

        The copy and the change of the cell are one step for signal handlers; see `offset_cell`. The
        bytes must be committed, and in no view.

        Raises:
            OutOfMemoryError: refused to commit memory at the start; nothing has changed.
        """
        with self.lock:
            err = lib.region_slide(self.handle, front, length)
        if err:
            raise refused(self.handle, self._size, "commit", err, 0, length)

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Give the addresses back; see `Region.release`."""
        with self.lock:
            if self.released:
                raise released()
            err = self.remove("release", 0, self._size, self._release)
        if err:
            raise refused(self.handle, self._size, "release", err, 0, self._size)

    def _release(self) -> int:
        err: int = lib.region_release(self.handle)
        self.released = not err
        return err

    def close(self) -> None:
        """Refuse new use; release the addresses when the last view is gone.

        See `Region.close`. A second call does nothing.
        """
        with self.lock:
            if self._closed or not self.handle.base:
                return
            self.retire()
            if not _leave_to_views(self.handle, self._table):
                lib.region_end(self.handle)
            self._closed = True

    def retire(self) -> None:
        """Refuse new use but keep the addresses.

        The caller holds `lock` and must call `close` later.
        """
        self.released = True
        lib.region_retire(self.handle)

    def drop(self) -> bool:
        """End the region whose Region object is garbage; return False if C heaps still use it."""
        with self.lock:
            handle = self.handle
            if self.heaps:
                return False
            if handle is not handles.CLOSED:
                self.handle, self.released = handles.CLOSED, True
                _tables.pop(id(self), None)
                kept = self._closed or handles.reuse(handle)
                if not kept and not _leave_to_views(handle, self._table):
                    lib.region_end(handle)
            return True


ENDED = Exports(handles.CLOSED, 0)
"""The Exports of every region that was released, closed or dropped before its first use."""
ENDED.released = True

# -- views that outlive their region ----------------------------------------------------------

# The view tables by id of their Exports. An object that only a garbage region refers to loses its
# weak references before finalisers run; a view table must not, so it is referenced from here.
_tables: dict[int, ViewTable] = {}

# Addresses to unmap when the last anchor is gone.
_outliving: dict[int, "_Outlived"] = {}
_FIRST_SWEEP = 16
_sweep_at = _FIRST_SWEEP


class _Outlived:
    """The addresses of a closed or garbage region that live views still show."""

    def __init__(self, handle: Any, anchors: list[Any]) -> None:
        self.handle = handle
        self.anchors = {id(ref): ref for ref in (weakref.ref(a, self._gone) for a in anchors)}

    def _gone(self, ref: "weakref.ref[Any]") -> None:
        self.anchors.pop(id(ref), None)
        if not self.anchors:
            self.unmap_if_unseen()

    def unmap_if_unseen(self) -> None:
        """Unmap unless a view is alive. A second call is harmless: the handle is not shared."""
        if all(ref() is None for ref in list(self.anchors.values())):
            lib.region_end(self.handle)
            _outliving.pop(id(self), None)


def _leave_to_views(handle: Any, views: ViewTable | None) -> bool:
    """Arrange to unmap a region when its last view is gone; return False if it has no views."""
    anchors = [] if views is None else views.anchors()
    if not anchors:
        return False
    outlived = _Outlived(handle, anchors)
    _outliving[id(outlived)] = outlived
    if len(_outliving) >= _sweep_at:
        sweep_outliving()
    return True


def sweep_outliving() -> None:
    """Unmap regions that stayed because a signal handler raised inside `_Outlived._gone`."""
    global _sweep_at  # noqa: PLW0603
    for outlived in list(_outliving.values()):
        outlived.unmap_if_unseen()
    _sweep_at = 2 * len(_outliving) + _FIRST_SWEEP
