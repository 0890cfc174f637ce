"""Heap: the C heap of an arena: its growth and its refusals."""

import errno
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from pyreserve._alloc.integers import IntegersForC
from pyreserve._arena.engine import Engine
from pyreserve._arena.nativeheap import (
    ZEROED,
    already_freed,
    heap_address,
    heap_alloc,
    heap_find,
    heap_free,
    heap_nbytes,
    open_heap,
)
from pyreserve._native import ffi, lib
from pyreserve._region.region import Region
from pyreserve._system.limits import refusal
from pyreserve.errors import OutOfMemoryError, RangeError, ReleasedError, ViewError
from pyreserve.units import MiB

_NO_MAXIMUM = 1 << 62  # bytes: more than any address space
_BLOCKS_PER_CALL = 256
_RUNS_PER_CALL = 256
_MAX_RUN_BYTES = 64 * MiB  # given back in one system call: bounds how long the lock is held
# Seconds that a scavenger waits for the lock before it checks whether it was stopped.
_LOCK_POLL_SECONDS = 0.05


class Heap:
    """The C heap of an arena (``csrc/heap.h``), its growth and its refusals.

    A block is named by its handle, an int. The heap grows through its `Engine`, by at least `step`
    bytes, and is guarded by the engine's lock.

    Attributes:
        handle: ``struct heap *``; None until the first allocation. `Arena` passes it to C itself
            in its two hot calls.
        unviewed: closed blocks whose last view is gone, to be freed by `free_closed`.
        tables: the region of the heap's tables; None until the first allocation.
    """

    __slots__ = (
        "__weakref__",
        "_base",
        "_closed_blocks",
        "_engine",
        "_exports",
        "_lock",
        "_page",
        "_region",
        "_step",
        "handle",
        "tables",
        "unviewed",
    )

    def __init__(self, engine: Engine, step: int) -> None:
        """Called by `Arena` alone."""
        self._engine, self._region, self._lock = engine, engine.region, engine.lock
        self._base, self._exports = engine.region.base, engine.region.exports
        self._page, self._step = engine.page, step
        self.handle: Any = None
        self.tables: Region | None = None
        # Closed blocks by their new handle. The callback of a view cannot take the lock, so it
        # only appends to `unviewed`.
        self._closed_blocks: dict[int, _ClosedBlock] = {}
        self.unviewed: list[_ClosedBlock] = []

    # -- allocate and free --------------------------------------------------------------------

    def alloc_slow(self, nbytes: int, align: int, zero: bool) -> int:
        """Check the arguments of `Arena.alloc`, and allocate with a commit or growth if needed.

        Creates the C heap at the first call.
        """
        if nbytes <= 0:
            msg = f"nbytes must be positive, got {nbytes}"
            raise RangeError(msg)
        if align <= 0 or align & (align - 1):
            msg = f"align must be a power of two, got {align}"
            raise RangeError(msg)
        layout = self._engine.layout
        if layout.arena_metadata and align > layout.unit:
            msg = f"align must be at most the size of an arena ({layout.unit}), got {align}"
            raise RangeError(msg)
        with self._lock:
            self._engine.check_open()
            self._open()
            need = nbytes + (align if align > self._page else 0)
            if need >= _NO_MAXIMUM:
                raise self._out_of_memory(
                    nbytes, "larger than any address space", self._engine.limit
                )
            handle = int(heap_alloc(self.handle, nbytes, align, zero, True))
            if handle == lib.PAGEALLOC_FULL:
                self._grow(need, need, nbytes)
                handle = int(heap_alloc(self.handle, nbytes, align, zero, True))
            if handle < 0:
                raise self._alloc_error(handle, nbytes)
        return handle

    def alloc_many(self, sizes: IntegersForC) -> Any:
        """Allocate a block for each size, all or none; return their `handle_array`."""
        count = len(sizes.values)
        handles = ffi.new("int64_t[]", count)
        refused = ffi.new("int64_t *")
        with self._lock:
            self._engine.check_open()
            self.free_closed()
            self._open()
            done = 0
            try:
                while True:
                    done += lib.heap_alloc_many(
                        self.handle, sizes.struct, handles, done, count, True, refused
                    )
                    if done == count:
                        break
                    self._grow_for_sizes(int(refused[0]), sizes, done)
            except BaseException:
                lib.heap_free_many(self.handle, handles, done, True, ffi.new("size_t *"))
                raise
        return handles

    def free_many(self, handles: Any) -> None:
        """Free the blocks of a `handle_array`, all or none."""
        failed = ffi.new("size_t *")
        with self._lock:
            self._engine.check_open()
            self.free_closed()
            if self.handle is None:
                return
            if self._exports.viewed:
                with self._exports.removal():
                    self._refuse_viewed(handles)
                    freed = lib.heap_free_many(self.handle, handles, len(handles), False, failed)
            else:
                freed = lib.heap_free_many(self.handle, handles, len(handles), False, failed)
        if freed < 0:
            raise already_freed(f"blocks[{failed[0]}]")

    def _refuse_viewed(self, handles: Any) -> None:
        """Raise ViewError if a live view shows bytes of one of the blocks."""
        held = self._exports.live(0, self._region.size)
        to_free = {handle & ~ZEROED for handle in handles} if held else set()
        for _, low, high in held:
            at = low
            while at < high:
                handle = int(heap_find(self.handle, self._base + at))
                if handle in to_free:
                    self._exports.refuse("free", low, high)
                at += self._page - at % self._page
                if handle >= 0:
                    start = int(heap_address(self.handle, handle)) - self._base
                    at = max(at, start + int(heap_nbytes(self.handle, handle)))

    # -- blocks -------------------------------------------------------------------------------

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Iterate over handles and sizes of all blocks, lowest address first."""
        self._engine.check_open()
        return self._iterate()

    def _iterate(self) -> Iterator[tuple[int, int]]:
        at = ffi.new("uint64_t *")
        handles = ffi.new("int64_t[]", _BLOCKS_PER_CALL)
        n = _BLOCKS_PER_CALL
        while n == _BLOCKS_PER_CALL and self.handle is not None:
            n = int(lib.heap_blocks(self.handle, at, handles, _BLOCKS_PER_CALL))
            self._engine.check_open()
            for handle in ffi.unpack(handles, max(n, 0)):
                nbytes = int(heap_nbytes(self.handle, handle))
                if nbytes > 0 and not self.is_closed(handle):
                    yield handle, nbytes

    def address(self, handle: int) -> int:
        """Return the address of a block, live or freed."""
        self._engine.check_open()
        return int(heap_address(self.handle, handle))

    def offset(self, handle: int) -> int:
        """Return the offset of a block from the base of the region."""
        return self.address(handle) - self._base

    def nbytes(self, handle: int) -> int:
        """Return the size of a live block."""
        nbytes = int(heap_nbytes(self.handle, handle))
        if nbytes < 0:
            self._refuse_stale()
        return nbytes

    def nbytes_or(self, handle: int, nbytes: int) -> int:
        """Return the size of a block that may have been resized; `nbytes` if it is not live."""
        size = int(heap_nbytes(self.handle, handle))
        return size if size > 0 else nbytes

    def _refuse_stale(self) -> NoReturn:
        """Raise for a handle that names no live block, or because the arena is closed."""
        self._engine.check_open()
        raise already_freed()

    def is_live(self, handle: int) -> bool:
        """Return whether a block is live: neither freed nor closed, in an open arena."""
        return bool(heap_nbytes(self.handle, handle) >= 0)

    def view(self, handle: int, nbytes: int) -> memoryview:
        """Return a new view of a block that has, or had before it was resized, this size."""
        heap = self.handle
        while True:
            try:
                view = self._exports.view(int(heap_address(heap, handle)) - self._base, nbytes)
            except RangeError:  # not committed: freed or cut, and trimmed
                if self.nbytes(handle) == nbytes:
                    raise
            else:
                # The view is known by now: a live block can no longer be freed, or cut to less.
                if heap_nbytes(heap, handle) == nbytes:
                    return view
            nbytes = self.nbytes(handle)

    def free(self, handle: int) -> None:
        """Free a block that may be viewed."""
        exports, heap = self._exports, self.handle
        with self._lock:
            nbytes = int(heap_nbytes(heap, handle))
            if exports.viewed and nbytes > 0:
                low = int(heap_address(heap, handle)) - self._base
                nbytes = exports.remove("free", low, low + nbytes, heap_free, heap, handle)
            else:
                nbytes = heap_free(heap, handle)
        if nbytes < 0:
            self._refuse_stale()

    def resize(self, handle: int, nbytes: int) -> None:
        """Change the size of a block in place; see `Block.resize`."""
        with self._lock, self._exports.removal():
            self._engine.check_open()
            self.free_closed()
            old = self.nbytes(handle)
            if nbytes < old:
                low = self.offset(handle)
                self._exports.refuse("shrink", low + nbytes, low + old)
            size = min(nbytes, _NO_MAXIMUM)
            result = int(lib.heap_resize(self.handle, handle, size, True))
            if result == lib.PAGEALLOC_FOREIGN and self._grow_behind(handle, old, nbytes):
                result = int(lib.heap_resize(self.handle, handle, nbytes, True))
        if result in (lib.HEAP_NO_BLOCK, lib.HEAP_CLOSED):  # by an interrupting call
            self._refuse_stale()
        if result <= lib.HEAP_ERRNO:
            raise self._alloc_error(result, nbytes)
        if result < 0:
            why, limit = "pages behind it are not free", None
            if result == lib.PAGEALLOC_OUTSIDE:
                why, limit = "the addresses of the arena end before", self._engine.limit
            msg = f"cannot resize a block from {old} to {nbytes} bytes: {why}"
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="resize", nbytes=nbytes, limit=limit)

    def _grow_behind(self, handle: int, old: int, nbytes: int) -> bool:
        """Grow the heap behind its last block; return False for another block."""
        page, tail = self._page, int(lib.heap_tail(self.handle))
        behind = (handle & ZEROED - 1) + -(-old // page)
        if behind + tail // page != self.handle.end or nbytes >= _NO_MAXIMUM:
            return False
        lacking = (-(-nbytes // page) - -(-old // page)) * page
        self._grow(lacking, lacking, nbytes)
        return True

    # -- closed blocks with live views --------------------------------------------------------

    def close_block(self, handle: int, nbytes: int) -> None:
        """Make a handle stale; free its block when the last view is gone."""
        with self._lock:
            if not self._exports.released:
                # Recorded first, so that an interruption cannot lose the block.
                closed = _ClosedBlock(self, self.nbytes_or(handle, nbytes))
                self.unviewed.append(closed)
                lib.heap_rename(self.handle, handle, closed.handle)
                self.free_closed()

    def free_closed(self, *, sweep: bool = False) -> None:
        """Free the closed blocks in `unviewed`; with `sweep`, check all closed blocks.

        A signal handler that raises can keep a block out of `unviewed`.
        """
        if not self.unviewed and not (sweep and self._closed_blocks):
            return
        with self._lock:
            for closed in list(self._closed_blocks.values()) if sweep else ():
                self._free_unless_viewed(closed)
            while self.unviewed:
                closed = self.unviewed[-1]
                self._free_unless_viewed(closed)
                self.unviewed.remove(closed)

    def _free_unless_viewed(self, closed: "_ClosedBlock") -> None:
        """Free a closed block, or watch its views: the last one to go queues it again."""
        handle, exports = closed.handle[0], self._exports
        if handle < 0:  # freed or closed before
            return
        self._closed_blocks[handle] = closed
        if exports.viewed:
            low = int(heap_address(self.handle, handle)) - self._base
            held = exports.live(low, low + closed.nbytes)
            if closed.watch([anchor for entry in held if (anchor := entry[0]()) is not None]):
                return
        heap_free(self.handle, handle)
        self._closed_blocks.pop(handle, None)

    def is_closed(self, handle: int) -> bool:
        """Return whether the block is closed: not freed yet, because live views show its bytes."""
        return handle & ~ZEROED in self._closed_blocks

    # -- give back ----------------------------------------------------------------------------

    def give_back(
        self,
        max_bytes: int | None,
        older_than: float,
        lazy: bool,
        proceed: Callable[[], bool] | None = None,
    ) -> tuple[int, list[Exception]]:
        """Give back free pages, highest first; return the bytes and at most one refusal.

        The scavenger's thread passes `proceed`, and stops when that returns False.

        Args:
            max_bytes: maximum, rounded up to whole pages; None: no maximum.
            older_than: seconds for which a page must have been free.
            lazy: as for `Region.discard`.
            proceed: whether to continue; called before each batch of runs.
        """
        age = int(min(older_than * 1000, (1 << 32) - 1))
        left = -(-(_NO_MAXIMUM if max_bytes is None else max_bytes) // self._page)
        below, total, n = 1 << 62, 0, _RUNS_PER_CALL
        refusals: list[Exception] = []
        runs = ffi.new("struct pagealloc_run[]", _RUNS_PER_CALL)
        while n == _RUNS_PER_CALL and left > 0:
            if proceed is None:
                with self._lock:
                    n, given = self._give_back_batch(runs, left, below, age, lazy, refusals)
            elif self._acquire_while(proceed):
                try:
                    n, given = self._give_back_batch(runs, left, below, age, lazy, refusals)
                finally:
                    self._lock.release()
            else:
                break
            total += given
            if n > 0:
                below = runs[n - 1].start
                left -= sum(runs[i].stop - runs[i].start for i in range(n))
        return total, refusals

    def _give_back_batch(
        self, runs: Any, left: int, below: int, age: int, lazy: bool, refusals: list[Exception]
    ) -> tuple[int, int]:
        """Give back up to `left` pages below page `below`; return the number of runs and bytes."""
        self._engine.check_open()
        self.free_closed()
        if self.handle is None:
            return 0, 0
        longest = _MAX_RUN_BYTES // self._page
        n = int(
            lib.heap_idle(
                self.handle, below, min(left, 1 << 62), longest, age, lazy, runs, _RUNS_PER_CALL
            )
        )
        if n < 0:
            self._engine.check_open()
        return n, self._give_back_runs(runs, n, lazy, refusals)

    def _give_back_runs(self, runs: Any, n: int, lazy: bool, refusals: list[Exception]) -> int:
        """Give `n` runs of free pages back; return the bytes and add a refusal to `refusals`."""
        total = 0
        for i in range(n):
            address = int(lib.heap_page_address(self.handle, runs[i].start))
            nbytes = (runs[i].stop - runs[i].start) * self._page
            try:
                low = address - self._base
                given = self._exports.remove(
                    "trim", low, low + nbytes, lib.heap_give_back, self.handle, runs + i, lazy
                )
            except ViewError as held:
                if not refusals:
                    refusals.append(held.with_traceback(None))
                continue
            if given < 0:
                refusals[:] = [refusal("discard", lib.HEAP_ERRNO - given, nbytes, address)]
            total += max(given, 0)
        return total

    def _acquire_while(self, proceed: Callable[[], bool]) -> bool:
        """Take the lock and return True, or return False as soon as `proceed` does.

        The owner of the lock may be waiting for this thread to end. For the scavenger's thread
        alone: in the main thread a signal handler could raise between the return and the ``try``
        whose ``finally`` releases the lock.
        """
        while proceed():
            if self._lock.acquire(timeout=_LOCK_POLL_SECONDS):
                return True
        return False

    # -- statistics and the end ---------------------------------------------------------------

    def counts(self) -> tuple[Any, int]:
        """Return ``struct heap_stats``, and the bytes in use including those of `Engine.grow`."""
        stats = ffi.new("struct heap_stats *")
        with self._lock:
            if self.handle is not None:
                lib.heap_measure(self.handle, stats)
            return stats, int(stats.in_use) + self._engine.taken_by_grow

    def set_closed(self, closed: bool) -> None:
        """Refuse (`closed`) or accept calls of C functions that do not take the lock."""
        if self.handle is not None:
            lib.heap_close(self.handle, closed)

    # -- the C heap ---------------------------------------------------------------------------

    def _open(self) -> None:
        """Create the C heap."""
        if self.handle is not None:
            return
        tables, heap = open_heap(self._engine)
        # A signal handler or finaliser may have created a heap with blocks: keep that one.
        if self.handle is None:
            self.tables, self.handle = tables, heap
        if self._exports.released:  # by a handler that interrupted this call
            lib.heap_close(self.handle, True)

    def _grow_for_sizes(self, refused: int, sizes: IntegersForC, done: int) -> None:
        """Grow for the sizes from index `done` on; raise if growing cannot help."""
        nbytes = sizes.item(done)
        if nbytes <= 0:
            msg = f"sizes[{done}] must be positive, got {nbytes}"
            raise RangeError(msg)
        need = int(lib.heap_need(self.handle, sizes.struct, done, len(sizes.values)))
        if refused != lib.PAGEALLOC_FULL or nbytes >= _NO_MAXIMUM:
            raise self._alloc_error(refused, nbytes, need)
        self._grow(need, nbytes, nbytes)

    def _grow(self, wanted_bytes: int, need: int, nbytes: int) -> None:
        """Grow by `wanted_bytes`, at least a step; if the kernel refuses, by smaller sizes.

        The smallest is `need` less the free pages at the end of the heap.
        """
        self.free_closed(sweep=True)
        page, step = self._page, self._step
        refusals: list[OutOfMemoryError] = []
        lacking = need - int(lib.heap_tail(self.handle))
        for nbytes_asked in (max(wanted_bytes, step), max(need, step), need, lacking):
            size = -(-nbytes_asked // page) * page
            if size <= 0:
                continue
            try:
                self._engine.take_pages(size, partial(self._add_pages, size), self._arena_bytes)
            except OutOfMemoryError as refused:
                refusals.append(refused.with_traceback(None))
            else:
                return
        first = refusals[0]
        raise self._out_of_memory(nbytes, first.strerror or "", first.limit) from first

    def _add_pages(self, nbytes: int, address: int) -> None:
        err = lib.heap_add(self.handle, address, nbytes)
        if err:
            raise self._alloc_error(err, nbytes)

    def _arena_bytes(self) -> int:
        return int(self.counts()[0].arena)

    # -- refusals -----------------------------------------------------------------------------

    def _alloc_error(self, refused: int, nbytes: int, total: int = 0) -> Exception:
        """Create the exception for a negative result of the C heap.

        The refused block has `nbytes`; a call for many blocks needs `total` bytes.
        """
        if refused <= lib.HEAP_ERRNO:
            error = refusal("commit", lib.HEAP_ERRNO - refused, total or nbytes)
            if not isinstance(error, OutOfMemoryError):
                return error
            return self._out_of_memory(nbytes, error.strerror or "", error.limit)
        if refused == lib.HEAP_CLOSED:
            return ReleasedError("the arena was released or closed")
        if refused == lib.HEAP_SCATTERED:
            return self._out_of_memory(
                nbytes, "the arenas are in too many separate ranges", "layout"
            )
        if refused == lib.PAGEALLOC_OUTSIDE:
            return self._out_of_memory(
                nbytes, "the allocator's tables are full", self._engine.limit
            )
        return self._out_of_memory(nbytes, "no free run is long enough", self._engine.limit)

    def _out_of_memory(
        self, nbytes: int, reason: str, limit: str | None = None
    ) -> OutOfMemoryError:
        _, in_use = self.counts()
        msg = (
            f"cannot allocate {nbytes}-byte block: {in_use} in use, "
            f"{self._engine.taken - in_use} idle, {self._region.reserved} reserved: {reason}"
        )
        return OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit=limit)


class _ClosedBlock:
    """A closed block, freed when its last view is gone. Its new handle makes the Block's stale."""

    def __init__(self, heap: Heap, nbytes: int) -> None:
        self.handle, self.nbytes = ffi.new("int64_t *", -1), nbytes
        self._heap = weakref.ref(heap)
        self._anchors: dict[int, weakref.ref[Any]] = {}

    def watch(self, anchors: list[Any]) -> bool:
        """Queue the block when all anchors are gone; return False if there is none."""
        refs = [weakref.ref(anchor, self._on_view_gone) for anchor in anchors]
        self._anchors = {id(ref): ref for ref in refs}
        return bool(refs)

    def _on_view_gone(self, ref: "weakref.ref[Any]") -> None:
        # A view may die anywhere, so this callback takes no lock.
        self._anchors.pop(id(ref), None)
        heap = self._heap()
        if not self._anchors and heap is not None:
            heap.unviewed.append(self)
