"""Arena: a heap of blocks in an address-space layout, which gives idle memory back."""

import errno
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import index as _index
from typing import Any

from pyreserve._alloc.integers import IntegersForC, integers
from pyreserve._alloc.pages import close_with, reserve_tables
from pyreserve._arena.blocks import Block, Blocks, already_freed
from pyreserve._arena.engine import WORD, Engine, FellBack
from pyreserve._arena.heapbitmap import HeapBitmap
from pyreserve._arena.memstats import MemStats
from pyreserve._arena.scavenger import FIVE_MINUTES, Scavenger, Worker
from pyreserve._native import ffi, lib
from pyreserve._region.owner import as_step
from pyreserve._region.policies import Mode
from pyreserve._region.region import Region, resident
from pyreserve._system import forks
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve.errors import OutOfMemoryError, RangeError, ReleasedError, ViewError
from pyreserve.units import MiB, TiB, as_float, format_size, round_up

__all__ = ["WORD", "Arena", "FellBack"]

_alloc = lib.heap_alloc
_free = lib.heap_free
_find = lib.heap_find
_nbytes = lib.heap_nbytes
_address = lib.heap_address
_ZEROED = 1 << lib.HEAP_PAGE_BITS
_BLOCKS_PER_CALL = 256
_RUNS_PER_CALL = 256
_MAX_RUN_BYTES = 64 * MiB  # given back in one system call: bounds how long the lock is held
# Seconds that a scavenger waits for the lock before it checks whether it was stopped.
_LOCK_POLL_SECONDS = 0.05
_SPREAD_BYTES = TiB  # the tables' capacity where each arena is mapped separately (Go 1.11)


class Arena(Engine):
    """A heap of blocks: reserves the addresses of a layout and commits memory as blocks need it.

    A block occupies whole pages of the layout (8 KiB in Go's). Placement is address-ordered first
    fit: the lowest run of free pages that is long enough. Allocating and freeing take nearly the
    same time for all sizes of arenas and blocks: the tables have a few bytes for each page.

    Args:
        layout: a name from `pyreserve.layouts.names`; None: Go's layout of December 2014 for this
            interpreter's word size (`pyreserve.layouts.default_name`).
        size: bytes of arena, for the layout ``"native"`` only.
        mode: how commits are accounted, as for `pyreserve.reserve`.
        scavenge_after: if given, a thread gives memory back that was idle for this many seconds
            (`start_scavenger`).
        step: minimum growth of the arena in bytes, a multiple of the layout's page and of the OS
            page. None: the layout's rule, 1 MiB in Go's and 2 MiB in ``"native"``.

    A 64-bit Go layout whose reservation is refused falls back to the 32-bit mechanism, as Go's
    runtime did. `layout` then differs from `requested_layout`, and `fell_back` has the reason.

    All methods may be called from any thread. A forked child has its own copy of the arena and of
    all blocks, and no scavenger.

    Raises:
        KeyError: no layout has this name.
        RangeError: `size` or `step` is out of range.
        ValueError: `step` is a string that is not a size.
        OutOfMemoryError: the addresses were refused; its ``limit`` names the limit.
    """

    def __init__(
        self,
        layout: str | None = None,
        *,
        size: int | None = None,
        mode: Mode = "charge",
        scavenge_after: float | None = None,
        step: int | str | None = None,
    ) -> None:
        nbytes = None if step is None else as_step(step)
        # The C heap and its tables; None until the first allocation.
        self._heap: Any = None
        self._tables: Region | None = None
        self._worker: Worker | None = None
        # Closed blocks by their new handle, and those whose last view is gone, to be freed. The
        # callback of a view cannot take the lock, so it only appends to the list.
        self._closed_blocks: dict[int, _ClosedBlock] = {}
        self._unviewed_blocks: list[_ClosedBlock] = []
        super().__init__(layout, size, mode)
        self._step = self.layout.growth if nbytes is None else round_up(nbytes, self._page)
        if nbytes not in {None, self._step}:
            super().release()
            msg = f"step must be a multiple of the layout's page ({self._page}), got {nbytes}"
            raise RangeError(msg)
        self._region.exports.owner = "an arena"
        self._base, self._exports = self._region.base, self._region.exports
        if scavenge_after is not None:
            self.start_scavenger(scavenge_after)

    # -- properties ---------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        """Bytes in use: the whole pages of all blocks, and the ranges from `grow`."""
        self._free_closed(sweep=True)
        return self._counts()[1]

    @property
    def committed(self) -> int:
        """Committed bytes of `region`: arena, spans and bitmap."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether the arena was released or closed."""
        return self._region.released

    # -- allocate and free --------------------------------------------------------------------

    def alloc(self, nbytes: int, align: int = 1, *, zero: bool = False) -> Block:
        """Allocate a block of `nbytes` bytes.

        If no free run is long enough, the arena grows by its step, or by what the block needs if
        that is more. If the kernel refuses the step, the arena grows by just what the block needs.

        Args:
            nbytes: size of the block in bytes.
            align: the address is a multiple of it, and of the arena's page in any case. A power of
                two; in layouts with separate arenas (Go 1.11) at most the size of one, 64 MiB.
            zero: clear the bytes that are not known to be zero. Bytes never used before read zero
                in any case; `Block.zeroed` is True if the whole block was known to be zero.

        Raises:
            RangeError: `nbytes` is not positive, or `align` is not allowed.
            OutOfMemoryError: the layout is used up, or the kernel refused. The message has the
                bytes requested, in use and reserved. Nothing has changed.
            ReleasedError: the arena was released or closed.
            RuntimeError: a finaliser or signal handler called this during a growth, and the arena
                has to grow again.
        """
        nbytes = _index(nbytes)
        if self._unviewed_blocks:
            self._free_closed()
        try:
            handle = _alloc(self._heap, nbytes, align, zero, False)
        except (OverflowError, TypeError):  # no heap yet, or an argument that C does not take
            handle = lib.HEAP_CLOSED
        if handle < 0:
            handle = self._alloc_slow_path(nbytes, _index(align), bool(zero))
        return Block(self, handle, nbytes)

    def free(self, block: Block) -> None:
        """Free a block. Its memory stays committed for later blocks until `scavenge`.

        Raises:
            FreeError: the block was already freed or closed.
            RangeError: the block belongs to another arena.
            TypeError: `block` is not a Block.
            ViewError: live views show some of the bytes; nothing has changed.
            ReleasedError: the arena was released or closed.
        """
        try:
            if block._arena is not self:
                raise _not_of_this_arena(block)
        except AttributeError:
            raise _not_a_block("free", block) from None
        exports = self._exports
        with self._lock:
            if exports.viewed and _nbytes(self._heap, block._handle) > 0:
                low = int(_address(self._heap, block._handle)) - self._base
                high = low + block._nbytes
                freed = exports.remove("free", low, high, _free, self._heap, block._handle)
            else:
                freed = _free(self._heap, block._handle)
        if freed < 0:
            self._alive()
            raise already_freed()

    def alloc_many(self, sizes: Any) -> Blocks:
        """Allocate a block for each size, all or none.

        Args:
            sizes: sizes in bytes: an iterable of positive integers, or a buffer of integers.

        Raises:
            As `alloc`, for the first size that is refused. No block was allocated then, but the
            arena may have grown.
        """
        wanted = integers(sizes, "sizes")
        count = len(wanted.values)
        handles = ffi.new("int64_t[]", count)
        refused = ffi.new("int64_t *")
        with self._lock:
            self._alive()
            self._free_closed()
            self._open_heap()
            done = 0
            try:
                while True:
                    done += lib.heap_alloc_many(
                        self._heap, wanted.struct, handles, done, count, True, refused
                    )
                    if done == count:
                        break
                    self._grow_for_sizes(int(refused[0]), wanted, done)
            except BaseException:
                lib.heap_free_many(self._heap, handles, done, True, ffi.new("size_t *"))
                raise
        return Blocks(self, handles)

    def free_many(self, blocks: Iterable[Block]) -> None:
        """Free blocks, all or none.

        Args:
            blocks: `Blocks`, or an iterable of Block.

        Raises:
            As `free`, for the first block that is refused. No block was freed then.
        """
        if isinstance(blocks, Blocks):
            foreign: Block | Blocks | None = blocks if blocks.arena is not self else None
            handles = blocks._handles
        else:
            listed = list(blocks)
            for block in listed:
                if not isinstance(block, Block):
                    raise _not_a_block("free_many", block)
            foreign = next((block for block in listed if block._arena is not self), None)
            handles = ffi.new("int64_t[]", [block._handle for block in listed])
        if foreign is not None:
            raise _not_of_this_arena(foreign)
        failed = ffi.new("size_t *")
        with self._lock, self._exports.removal():
            self._alive()
            self._free_closed()
            if self._heap is None:
                return
            self._refuse_viewed_blocks(handles)
            freed = lib.heap_free_many(self._heap, handles, len(handles), False, failed)
        if freed < 0:
            raise already_freed(f"blocks[{failed[0]}]")

    def block_at(self, address: int) -> Block | None:
        """Return the block that contains `address`, from the spans; None if no block does.

        Raises:
            ReleasedError: the arena was released or closed.
        """
        address = _index(address)
        self._alive()
        if self._heap is None or not 0 <= address < 1 << (8 * WORD):
            return None
        handle = int(_find(self._heap, address))
        nbytes = int(_nbytes(self._heap, handle)) if handle >= 0 else handle
        return Block(self, handle, nbytes) if nbytes > 0 and not self._is_closed(handle) else None

    def blocks(self) -> Iterator[Block]:
        """Iterate over all blocks, lowest address first.

        Blocks may be allocated and freed during the iteration. It reads 256 blocks ahead and does
        not see later changes to them.

        Raises:
            ReleasedError: the arena was released or closed; also by ``next``.
        """
        self._alive()
        return self._iter_blocks()

    @property
    def heap_bitmap(self) -> HeapBitmap:
        """The heap bitmap of the arena.

        Raises:
            ValueError: the layout has no heap bitmap.
        """
        if not self.layout.bitmap_bits:
            msg = f"the layout {self.layout.name} has no heap bitmap"
            raise ValueError(msg)
        return HeapBitmap(self)

    # -- give back ----------------------------------------------------------------------------

    def scavenge(
        self, nbytes: int | None = None, older_than: float | None = None, lazy: bool = False
    ) -> int:
        """Give the memory of free pages back to the system, highest addresses first.

        The addresses stay reserved. Free pages that were not used since they were committed or
        given back have no memory and are skipped. In mode ``"charge"`` runs of 1 MiB and more are
        decommitted, which also gives back their commit charge, unless the arena would then have
        more than 512 committed ranges. All other runs are discarded. Using a page again costs a
        page fault, and a commit if the page was decommitted.

        Args:
            nbytes: maximum to give back, rounded up to whole pages; None: no maximum.
            older_than: give back only pages that were free for this many seconds; None: all.
            lazy: let the kernel take the memory under memory pressure (MADV_FREE). This is cheaper,
                but until then RSS includes the pages, and their contents are not known to be zero.

        Returns:
            Bytes given back.

        Raises:
            RangeError: `nbytes` or `older_than` is negative.
            ViewError: nothing was given back, because live views from `region` show bytes of all
                free runs. (If only some runs have such views, those are skipped.)
            VMError: nothing was given back, because the kernel refused.
            ReleasedError: the arena was released or closed.
        """
        max_bytes = 1 << 62 if nbytes is None else _index(nbytes)
        seconds = 0.0 if older_than is None else as_float(older_than)
        if max_bytes < 0:
            msg = f"nbytes must not be negative, got {max_bytes}"
            raise RangeError(msg)
        if not seconds >= 0:
            msg = f"older_than must be at least 0 seconds, got {seconds}"
            raise RangeError(msg)
        total, refusals = self._scavenge(max_bytes, seconds, bool(lazy), None)
        if refusals and total == 0:
            raise refusals.pop()
        return total

    def scavenge_for(self, scavenger: Scavenger, wanted: Callable[[], bool]) -> None:
        """Scavenge once for the thread of `start_scavenger`, until `wanted` returns False."""
        total, _ = self._scavenge(1 << 62, scavenger.older_than, scavenger.lazy, wanted)
        scavenger.add(total)

    def _scavenge(
        self, max_bytes: int, older_than: float, lazy: bool, wanted: Callable[[], bool] | None
    ) -> tuple[int, list[Exception]]:
        """Give back up to `max_bytes`; return the bytes given back and at most one refusal.

        The scavenger's thread passes `wanted`, and stops when that returns False.
        """
        age = int(min(older_than * 1000, (1 << 32) - 1))
        left, below, total, n = -(-max_bytes // self._page), 1 << 62, 0, _RUNS_PER_CALL
        refusals: list[Exception] = []
        runs = ffi.new("struct pagealloc_run[]", _RUNS_PER_CALL)
        while n == _RUNS_PER_CALL and left > 0:
            if wanted is None:
                with self._lock:
                    n, given = self._scavenge_batch(runs, left, below, age, lazy, refusals)
            elif self._acquire_while(wanted):
                try:
                    n, given = self._scavenge_batch(runs, left, below, age, lazy, refusals)
                finally:
                    self._lock.release()
            else:
                break
            total += given
            if n > 0:
                below = runs[n - 1].start
                left -= sum(runs[i].stop - runs[i].start for i in range(n))
        return total, refusals

    def _scavenge_batch(
        self, runs: Any, left: int, below: int, age: int, lazy: bool, refusals: list[Exception]
    ) -> tuple[int, int]:
        """Give back up to `left` pages below page `below`; return the number of runs and bytes."""
        self._alive()
        self._free_closed()
        if self._heap is None:
            return 0, 0
        longest = _MAX_RUN_BYTES // self._page
        n = int(
            lib.heap_idle(
                self._heap, below, min(left, 1 << 62), longest, age, lazy, runs, _RUNS_PER_CALL
            )
        )
        return n, self._give_back_runs(runs, n, lazy, refusals)

    def _acquire_while(self, wanted: Callable[[], bool]) -> bool:
        """Take the lock, or return False when `wanted` does: its owner may wait for this thread.

        For the scavenger's thread alone. In the main thread a signal handler could raise between
        the return and the ``try`` whose ``finally`` releases the lock.
        """
        while wanted():
            if self._lock.acquire(timeout=_LOCK_POLL_SECONDS):
                return True
        return False

    def start_scavenger(self, older_than: float = FIVE_MINUTES, *, lazy: bool = False) -> Scavenger:
        """Start a thread that gives back pages that were free for `older_than` seconds.

        The thread scavenges every `older_than` / 2 seconds, at least once a minute; for 0 once a
        second. It replaces a scavenger started before. It ends with `stop_scavenger`, `release` and
        `close`, and when the arena is dropped.

        Args:
            older_than: seconds; five minutes by default, as in Go.
            lazy: as for `scavenge`.

        Raises:
            RangeError: `older_than` is negative.
            ReleasedError: the arena was released or closed.
            RuntimeError: no thread can be started, or the interpreter is exiting.
        """
        older_than = as_float(older_than)
        if not older_than >= 0:
            msg = f"older_than must be at least 0 seconds, got {older_than}"
            raise RangeError(msg)
        with self._lock:
            self._alive()
            if self._worker is None:
                self._worker = Worker(self)
        scavenger = self._worker.start(older_than, bool(lazy))
        if self._region.released:  # by another thread
            scavenger.stop()
            self._alive()
        return scavenger

    def stop_scavenger(self) -> None:
        """Stop the scavenger's thread, if there is one, and wait for its end.

        Does not wait when called by a signal handler that interrupts `start_scavenger`.
        """
        if self._worker is not None:
            self._worker.stop()

    # -- statistics ---------------------------------------------------------------------------

    def memstats(self) -> MemStats:
        """Return the bytes in use, idle, given back and reserved at one moment.

        Calls mincore(2) over all committed pages.

        Raises:
            ReleasedError: the arena was released or closed.
        """
        with self._lock:
            self._alive()
            self._free_closed(sweep=True)
            heap_sys = sum(high - low for low, high in self.placement.arenas)
            stats, inuse = self._counts()
            gc_sys, other_sys = self._metadata_mapped()
            return MemStats(
                sys=heap_sys + gc_sys + other_sys,
                heap_sys=heap_sys,
                heap_idle=heap_sys - inuse,
                heap_inuse=inuse,
                heap_released=stats.released,
                heap_alloc=stats.requested + self._taken_by_grow,
                heap_objects=stats.mallocs - stats.frees,
                mallocs=stats.mallocs,
                frees=stats.frees,
                gc_sys=gc_sys,
                other_sys=other_sys,
                reserved=self._region.reserved + sum(r.size for r in self._metadata_regions),
                committed=self._region.committed + sum(r.size for r in self._metadata_regions),
                resident=sum(resident(r) for r in (self._region, *self._metadata_regions)),
                tables=self._tables.size if self._tables is not None else 0,
            )

    def _heap_bytes(self) -> int:
        return int(self._counts()[0].arena)

    def _counts(self) -> tuple[Any, int]:
        """Return the statistics of the C heap, and the bytes in use including those of `grow`."""
        stats = ffi.new("struct heap_stats *")
        with self._lock:
            if self._heap is not None:
                lib.heap_measure(self._heap, stats)
            return stats, int(stats.in_use) + self._taken_by_grow

    def _metadata_mapped(self) -> tuple[int, int]:
        """Return the mapped bytes of the heap bitmap, and those of spans and index."""
        layout, placement = self.layout, self.placement
        if layout.arena_metadata:
            arenas = len(self._metadata_regions) - 1
            return self._unit_bitmap * arenas, layout.index + self._unit_spans * arenas
        bitmap = placement.mapped_bitmap(PAGE_SIZE) if layout.bitmap else (0, 0)
        spans = placement.mapped_spans(PAGE_SIZE)
        return bitmap[1] - bitmap[0], spans[1] - spans[0]

    def __repr__(self) -> str:
        if self.released:
            return f"<Arena {self.layout.name}, released>"
        low, high = self.placement.arena
        return (
            f"<Arena {self.layout.name} {low:#x}-{high:#x} of {format_size(high - low)}: "
            f"{format_size(self.in_use)} in use of {format_size(self._taken_total)} taken so far>"
        )

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Release all addresses, including those of all blocks.

        The allocator's own tables are released with this object.

        Raises:
            ViewError: live views show some of the bytes; nothing was released.
            ReleasedError: the arena was already released or closed.
            RuntimeError: a finaliser or signal handler called this during a growth.
        """
        region = self._region
        with self._lock, self._exports.removal():
            self._alive()
            if self._undo_log is not None:
                msg = "release called from inside a growth of the same arena"
                raise RuntimeError(msg)
            self._exports.refuse("release", 0, region.size)
            try:
                # First refuse the calls that do not take the lock.
                if self._heap is not None:
                    lib.heap_close(self._heap, True)
                super().release()
            finally:
                if self._heap is not None and not region.released:
                    lib.heap_close(self._heap, False)
        self.stop_scavenger()

    def close(self) -> None:
        """Refuse new calls; release the addresses when the last view is gone.

        The allocator's own tables are released with this object. See `Region.close`.
        """
        with self._lock:
            if self._heap is not None:
                lib.heap_close(self._heap, True)
            super().close()
        self.stop_scavenger()

    # -- closed blocks with live views --------------------------------------------------------

    def _close_block(self, block: Block) -> None:
        with self._lock:
            if not self._exports.released:
                # Recorded first, so that an interruption cannot lose the block.
                closed = _ClosedBlock(self, block._nbytes)
                self._unviewed_blocks.append(closed)
                lib.heap_rename(self._heap, block._handle, closed.handle)
                self._free_closed()

    def _free_closed(self, *, sweep: bool = False) -> None:
        """Free the closed blocks in `_unviewed_blocks`; with `sweep`, check all closed blocks.

        A signal handler that raises can keep a block out of `_unviewed_blocks`.
        """
        if not self._unviewed_blocks and not (sweep and self._closed_blocks):
            return
        with self._lock:
            for closed in list(self._closed_blocks.values()) if sweep else ():
                self._free_unless_viewed(closed)
            while self._unviewed_blocks:
                closed = self._unviewed_blocks[-1]
                self._free_unless_viewed(closed)
                self._unviewed_blocks.remove(closed)

    def _free_unless_viewed(self, closed: "_ClosedBlock") -> None:
        """Free a closed block, or watch its views: the last one to go queues it again."""
        handle, exports = closed.handle[0], self._exports
        if handle < 0:  # freed or closed before
            return
        self._closed_blocks[handle] = closed
        if exports.viewed:
            low = int(_address(self._heap, handle)) - self._base
            held = exports.live(low, low + closed.nbytes)
            if closed.watch([anchor for entry in held if (anchor := entry[0]()) is not None]):
                return
        _free(self._heap, handle)
        self._closed_blocks.pop(handle, None)

    def _is_closed(self, handle: int) -> bool:
        return handle & ~_ZEROED in self._closed_blocks

    # -- the C heap ---------------------------------------------------------------------------

    def _alloc_slow_path(self, nbytes: int, align: int, zero: bool) -> int:
        """Check the arguments, and allocate with a new heap, a commit or a growth if needed."""
        if nbytes <= 0:
            msg = f"nbytes must be positive, got {nbytes}"
            raise RangeError(msg)
        if align <= 0 or align & (align - 1):
            msg = f"align must be a power of two, got {align}"
            raise RangeError(msg)
        if self.layout.arena_metadata and align > self.layout.unit:
            msg = f"align must be at most the size of an arena ({self.layout.unit}), got {align}"
            raise RangeError(msg)
        with self._lock:
            self._alive()
            self._open_heap()
            need = nbytes + (align if align > self._page else 0)
            if need >= 1 << 62:
                raise self._out_of_memory(nbytes, "larger than any address space")
            handle = int(_alloc(self._heap, nbytes, align, zero, True))
            if handle == lib.PAGEALLOC_FULL:
                self._grow_heap(need, need, nbytes)
                handle = int(_alloc(self._heap, nbytes, align, zero, True))
            if handle < 0:
                raise self._alloc_error(handle, nbytes)
        return handle

    def _grow_for_sizes(self, refused: int, wanted: IntegersForC, done: int) -> None:
        """Grow for the sizes from index `done` on; raise if growing cannot help."""
        nbytes = wanted.item(done)
        if nbytes <= 0:
            msg = f"sizes[{done}] must be positive, got {nbytes}"
            raise RangeError(msg)
        need = int(lib.heap_need(self._heap, wanted.struct, done, len(wanted.values)))
        if refused != lib.PAGEALLOC_FULL or nbytes >= 1 << 62:
            raise self._alloc_error(refused, nbytes, need)
        self._grow_heap(need, nbytes, nbytes)

    def _grow_heap(self, wanted_bytes: int, need: int, nbytes: int) -> None:
        """Grow by `wanted_bytes`, at least a step; if the kernel refuses, by smaller sizes.

        The smallest is what `need` lacks beyond the free pages at the end of the heap.
        """
        self._free_closed(sweep=True)
        page, step = self._page, self._step
        refusals: list[OutOfMemoryError] = []
        lacking = need - int(lib.heap_tail(self._heap))
        for nbytes_asked in (max(wanted_bytes, step), max(need, step), need, lacking):
            size = -(-nbytes_asked // page) * page
            if size <= 0:
                continue
            try:
                self._take_pages(size, partial(self._add_to_heap, size))
            except OutOfMemoryError as refused:
                refusals.append(refused.with_traceback(None))
            else:
                return
        first = refusals[0]
        raise self._out_of_memory(nbytes, first.strerror or "", first.limit) from first

    def _add_to_heap(self, nbytes: int, address: int) -> None:
        err = lib.heap_add(self._heap, address, nbytes)
        if err:
            raise self._alloc_error(err, nbytes)

    def _alloc_error(self, refused: int, nbytes: int, wanted: int = 0) -> Exception:
        """Create the exception for a negative result of the C heap.

        The refused block has `nbytes`; a call for many blocks needs `wanted` bytes in total.
        """
        if refused <= lib.HEAP_ERRNO:
            error = refusal("commit", lib.HEAP_ERRNO - refused, wanted or nbytes)
            if not isinstance(error, OutOfMemoryError):
                return error
            return self._out_of_memory(nbytes, error.strerror or "", error.limit)
        if refused == lib.HEAP_CLOSED:
            return ReleasedError("the arena was released or closed")
        if refused == lib.HEAP_SCATTERED:
            return self._out_of_memory(nbytes, "the arenas are in too many separate ranges")
        if refused == lib.PAGEALLOC_OUTSIDE:
            return self._out_of_memory(nbytes, "the allocator's tables are full")
        return self._out_of_memory(nbytes, "no free run is long enough")

    def _out_of_memory(
        self, nbytes: int, because: str, limit: str | None = "layout"
    ) -> OutOfMemoryError:
        _, in_use = self._counts()
        msg = (
            f"cannot allocate {nbytes}-byte block: {in_use} in use, "
            f"{self._taken_total - in_use} idle, {self._region.reserved} reserved: {because}"
        )
        return OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit=limit)

    def _open_heap(self) -> None:
        """Create the C heap; its tables are a reservation that gets memory where it is touched."""
        if self._heap is not None:
            return
        layout, placement = self.layout, self.placement
        own_spans = not layout.spans and not layout.arena_metadata
        if layout.arena_metadata:
            arena_bytes = _SPREAD_BYTES
        else:
            arena_bytes = placement.window_end - placement.arena_start
        capacity = min(arena_bytes // self._page, 1 << lib.HEAP_PAGE_BITS)
        tables = reserve_tables(lib.heap_bytes(capacity, own_spans))
        metadata = ffi.new("struct heap_metadata *")
        metadata.page = self._page
        metadata.word = layout.word
        metadata.bitmap_bits = layout.bitmap_bits
        metadata.start = placement.arena_start
        metadata.spans = ffi.cast("void *", placement.spans[0] if layout.spans else 0)
        if layout.arena_metadata:
            metadata.index = ffi.cast("uintptr_t *", self._metadata_regions[0].base)
            metadata.unit = layout.unit
            metadata.unit_bitmap = self._unit_bitmap
        heap = ffi.new("struct heap *")
        lib.heap_open(
            heap,
            ffi.cast("void *", tables.base),
            capacity,
            own_spans,
            self._region.exports.handle,
            metadata,
        )
        # This cdata keeps all memory of the heap alive. The collector does not track it and calls
        # hold a reference, so it outlives every finaliser that may still use the arena.
        close_with(heap, tables, self._region, self._metadata_regions)
        forks.register_tables(heap, heap.pages)
        # A signal handler or finaliser may have created a heap with blocks: keep that one.
        if self._heap is None:
            self._tables, self._heap = tables, heap
        if self._exports.released:  # by a handler that interrupted this call
            lib.heap_close(self._heap, True)

    @property
    def _unit_spans(self) -> int:
        """Bytes of spans of one arena, in layouts with separate arenas."""
        return self.layout.unit // self.layout.page * self.layout.word

    @property
    def _unit_bitmap(self) -> int:
        """Bytes of heap bitmap of one arena, in layouts with separate arenas."""
        return self.layout.arena_metadata - self._unit_spans

    def _address(self, handle: int) -> int:
        self._alive()
        return int(_address(self._heap, handle))

    def _block(self, handle: int) -> Block:
        nbytes = int(_nbytes(self._heap, handle))
        if nbytes < 0:
            self._alive()
            raise already_freed()
        return Block(self, handle, nbytes)

    def _view(self, block: Block, *, pin: bool = False) -> memoryview:
        with self._lock:
            self._alive()
            if _nbytes(self._heap, block._handle) < 0:
                self._alive()
                raise already_freed()
            offset, nbytes = int(_address(self._heap, block._handle)) - self._base, block._nbytes
            view = self._region.view(offset, nbytes)
            if _nbytes(self._heap, block._handle) < 0:  # freed by a signal handler
                self._alive()
                raise already_freed()
            if pin:
                block._pin = view.obj
        return view

    def _refuse_viewed_blocks(self, handles: Any) -> None:
        """Raise ViewError if a live view shows bytes of one of the blocks."""
        held = self._exports.live(0, self._region.size)
        wanted = {handle & ~_ZEROED for handle in handles} if held else set()
        for _, low, high in held:
            at = low
            while at < high:
                handle = int(_find(self._heap, self._base + at))
                if handle in wanted:
                    self._exports.refuse("free", low, high)
                at += self._page - at % self._page
                if handle >= 0:
                    end = int(_address(self._heap, handle)) + int(_nbytes(self._heap, handle))
                    at = max(at, end - self._base)

    def _give_back_runs(self, runs: Any, n: int, lazy: bool, refusals: list[Exception]) -> int:
        """Give `n` runs of free pages back; return the bytes and add a refusal to `refusals`."""
        if n < 0:
            self._alive()
        exports, total = self._exports, 0
        for i in range(n):
            address = int(lib.heap_page_address(self._heap, runs[i].start))
            nbytes = (runs[i].stop - runs[i].start) * self._page
            try:
                low = address - self._base
                given = int(
                    exports.remove(
                        "scavenge",
                        low,
                        low + nbytes,
                        lib.heap_give_back,
                        self._heap,
                        runs + i,
                        lazy,
                    )
                )
            except ViewError as held:
                if not refusals:
                    refusals.append(held.with_traceback(None))
                continue
            if given < 0:
                refusals[:] = [refusal("discard", lib.HEAP_ERRNO - given, nbytes, address)]
            total += max(given, 0)
        return total

    def _iter_blocks(self) -> Iterator[Block]:
        at = ffi.new("uint64_t *")
        handles = ffi.new("int64_t[]", _BLOCKS_PER_CALL)
        n = _BLOCKS_PER_CALL
        while n == _BLOCKS_PER_CALL and self._heap is not None:
            n = int(lib.heap_blocks(self._heap, at, handles, _BLOCKS_PER_CALL))
            self._alive()
            for handle in ffi.unpack(handles, max(n, 0)):
                nbytes = int(_nbytes(self._heap, handle))
                if nbytes > 0 and not self._is_closed(handle):
                    yield Block(self, handle, nbytes)


class _ClosedBlock:
    """A closed block, freed when its last view is gone. Its new handle makes the Block's stale."""

    def __init__(self, arena: Arena, nbytes: int) -> None:
        self.handle, self.nbytes = ffi.new("int64_t *", -1), nbytes
        self._arena = weakref.ref(arena)
        self._anchors: dict[int, weakref.ref[Any]] = {}

    def watch(self, anchors: list[Any]) -> bool:
        """Queue the block when all anchors are gone; return False if there is none."""
        refs = [weakref.ref(anchor, self._on_view_gone) for anchor in anchors]
        self._anchors = {id(ref): ref for ref in refs}
        return bool(refs)

    def _on_view_gone(self, ref: "weakref.ref[Any]") -> None:
        # A view may die anywhere, so this callback takes no lock.
        self._anchors.pop(id(ref), None)
        arena = self._arena()
        if not self._anchors and arena is not None:
            arena._unviewed_blocks.append(self)


def _not_a_block(verb: str, block: object) -> TypeError:
    return TypeError(f"{verb} takes Block objects, got {type(block).__name__}")


def _not_of_this_arena(block: Block | Blocks) -> RangeError:
    return RangeError(f"block must belong to this arena, got {block!r}")
