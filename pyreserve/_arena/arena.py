"""The arena: blocks out of a layout that is alive, and idle memory back to the system."""

import errno
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import index as _index
from typing import Any, Literal

from pyreserve._alloc.integers import IntegersForC, integers
from pyreserve._alloc.pages import close_with, reserve_tables
from pyreserve._arena.blocks import Block, Blocks, already_freed
from pyreserve._arena.engine import WORD, Engine, FellBack
from pyreserve._arena.heapbitmap import HeapBitmap
from pyreserve._arena.memstats import MemStats
from pyreserve._arena.scavenger import FIVE_MINUTES, Scavenger, Worker
from pyreserve._native import ffi, lib
from pyreserve._region.owner import as_step
from pyreserve._region.region import Mode, Region, resident
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
_BLOCKS_AT_ONCE = 256
_PIECES_AT_ONCE = 256
_LONGEST_PIECE = 64 * MiB  # given back in one system call, so that nobody waits for long
# Seconds a scavenger waits for the lock before checking that it is still wanted.
_LOCK_POLL_SECONDS = 0.05
_ARENAS_MOST = TiB  # of arenas that lie apart: what the tables are made for


class Arena(Engine):
    """A heap in a layout: addresses reserved as it says, memory committed as blocks need it.

    Blocks are whole pages of the layout (8 KiB in Go's), placed by address-ordered first fit: the
    lowest run of free pages that is long enough. To allocate or free takes much the same time
    whatever the size of the arena and of the block: a few bytes of notes are written for each page.

    Args:
        layout: a name from `pyreserve.layouts.names`; None takes the article's layout for this
            interpreter's word size.
        size: bytes of arena, for ``"native"`` only.
        mode: how commits are accounted, as for `pyreserve.reserve`.
        scavenge_after: seconds; if given, a thread gives back what was idle for so long
            (`start_scavenger`).
        step: how much the arena grows by at least, in bytes, whole pages of the layout and of the
            OS; None: by the layout's rule, 1 MiB in Go's; ``"measured"``: what suits this machine,
            as `pyreserve.costs.measured_step` finds it in up to two seconds, once in a process.

    A 64-bit Go layout whose reservation is refused falls back to the 32-bit mechanism, as the
    runtime did; `layout` then differs from `requested_layout`, and `fell_back` says why.

    The methods may be called from any thread. A forked child has the arena with all its blocks, as
    its own copy, and no scavenger.

    Raises:
        KeyError: no such layout.
        RangeError: a size or step that makes no sense.
        ValueError, OSError: another word, or ``"measured"`` can't be told: see
            `pyreserve.costs.measured_step`.
        OutOfMemoryError: the addresses were refused; ``limit`` says by what.
    """

    def __init__(
        self,
        layout: str | None = None,
        *,
        size: int | None = None,
        mode: Mode = "charge",
        scavenge_after: float | None = None,
        step: int | Literal["measured"] | None = None,
    ) -> None:
        nbytes = None if step is None else as_step(step)
        # What it has for C, once there are blocks.
        self._heap: Any = None
        self._tables: Region | None = None
        self._worker: Worker | None = None
        # Closed blocks with live views, by new handle; and blocks whose last view died while the
        # lock was taken.
        self._closed_blocks: dict[int, _ClosedBlock] = {}
        self._late: list[_ClosedBlock] = []
        super().__init__(layout, size, mode)
        self._step = self.layout.growth if nbytes is None else round_up(nbytes, self._page)
        if nbytes not in {None, self._step} and step != "measured":
            super().release()
            msg = f"a step is whole pages of {self._page} bytes in this layout, not {nbytes}"
            raise RangeError(msg)
        self._region._owner = "an arena"
        self._base = self._region.base
        if scavenge_after is not None:
            self.start_scavenger(scavenge_after)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        """Bytes handed out: whole pages of blocks, and what `grow` has given."""
        self._free_closed(sweep=True)
        return self._counts()[1]

    @property
    def committed(self) -> int:
        """How many bytes of `region` are committed: arena, and its metadata there."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether the arena was released or closed."""
        return self._region.released

    # -- allocate and free --------------------------------------------------------------------

    def alloc(self, nbytes: int, align: int = 1, *, zero: bool = False) -> Block:
        """Allocate a block of `nbytes` bytes.

        Its address is a multiple of `align`, a power of two (and of the page in any case). The
        contents are zero where nobody used the bytes before, which `Block.zeroed` tells; `zero`
        clears the rest, and only that. Where no free run is long enough the arena grows, by its
        step or what the block needs if that is more, and if that is refused by just what it needs.

        Raises:
            RangeError: `nbytes` is not positive, or `align` not a power of two.
            OutOfMemoryError: the layout has no more room, or the kernel refused; it says what was
                asked for, what is in use and what is reserved. Nothing has changed.
            ReleasedError: the arena was released or closed.
            RuntimeError: called by a finaliser or signal handler inside a growth, and the arena had
                to grow.
        """
        nbytes = _index(nbytes)
        if self._late:
            self._free_closed()
        try:
            handle = _alloc(self._heap, nbytes, align, zero, False)
        except (OverflowError, TypeError):  # no heap yet, or no numbers for C
            handle = lib.HEAP_CLOSED
        if handle < 0:
            handle = self._alloc_slowly(nbytes, _index(align), bool(zero))
        return Block(self, handle, nbytes)

    def free(self, block: Block) -> None:
        """Free a block. Its memory stays for the next one, until `scavenge`.

        Raises:
            FreeError: it was freed before.
            RangeError: it is a block of another arena.
            TypeError: it is no Block.
            ViewError: live views hold some of the bytes; nothing has changed.
            ReleasedError: the arena was released or closed.
        """
        try:
            if block._arena is not self:
                raise _foreign(block)
        except AttributeError:
            raise _no_block_at_all("free", block) from None
        region = self._region
        with self._lock:
            interrupting, region._busy = region._busy, True
            try:
                if region._views is not None and _nbytes(self._heap, block._handle) > 0:
                    low = int(_address(self._heap, block._handle)) - self._base
                    region._refuse_views("free", low, low + block._nbytes, interrupting)
                freed = _free(self._heap, block._handle)
            finally:
                region._busy = interrupting
        if freed < 0:
            self._alive()
            raise already_freed()

    def alloc_many(self, sizes: Any) -> Blocks:
        """Allocate a block for each of `sizes`: an iterable or a buffer of positive integers.

        Raises:
            As `alloc`, for the first size that is refused; then no block was allocated, though the
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
                    self._make_room(int(refused[0]), wanted, done)
            except BaseException:
                lib.heap_free_many(self._heap, handles, done, True, ffi.new("size_t *"))
                raise
        return Blocks(self, handles)

    def free_many(self, blocks: Iterable[Block]) -> None:
        """Free blocks, all or none: `Blocks`, or any iterable of Block.

        Raises:
            As `free`, for the first block that is refused; then none was freed.
        """
        if isinstance(blocks, Blocks):
            foreign: Block | Blocks | None = blocks if blocks.arena is not self else None
            handles = blocks._handles
        else:
            some = list(blocks)
            for block in some:
                if not isinstance(block, Block):
                    raise _no_block_at_all("free_many", block)
            foreign = next((block for block in some if block._arena is not self), None)
            handles = ffi.new("int64_t[]", [block._handle for block in some])
        if foreign is not None:
            raise _foreign(foreign)
        failed = ffi.new("size_t *")
        with self._lock, self._region._taking_away():
            self._alive()
            self._free_closed()
            if self._heap is None:
                return
            self._refuse_views(handles)
            freed = lib.heap_free_many(self._heap, handles, len(handles), False, failed)
        if freed < 0:
            raise already_freed(f"blocks[{failed[0]}]")

    def block_at(self, address: int) -> Block | None:
        """Return the block that has the byte at `address`; None if none has. Asks the spans."""
        address = _index(address)
        self._alive()
        if self._heap is None or not 0 <= address < 1 << (8 * WORD):
            return None
        handle = int(_find(self._heap, address))
        nbytes = int(_nbytes(self._heap, handle)) if handle >= 0 else handle
        return Block(self, handle, nbytes) if nbytes > 0 and not self._is_closed(handle) else None

    def blocks(self) -> Iterator[Block]:
        """Iterate over all blocks, lowest address first.

        Sees changes made meanwhile, except in the few hundred blocks that it is ahead.
        """
        self._alive()
        return self._walk()

    @property
    def heap_bitmap(self) -> HeapBitmap:
        """The heap bitmap.

        Raises:
            ValueError: the layout has none.
        """
        if not self.layout.bitmap_bits:
            msg = f"the layout {self.layout.name} has no heap bitmap"
            raise ValueError(msg)
        return HeapBitmap(self)

    # -- give back ----------------------------------------------------------------------------

    def scavenge(
        self, nbytes: int | None = None, older_than: float | None = None, lazy: bool = False
    ) -> int:
        """Give memory of free pages back to the system, highest addresses first.

        Pages that nobody used since they were committed or given back have no memory and are left
        alone. The address space stays reserved. In mode ``"charge"`` pieces of 1 MiB and more are
        decommitted, so that the commit charge goes back too, unless that would leave the arena in
        more than 512 pieces; everything else is discarded. To use such pages again costs a page
        fault each, as at first, and a commit where they were decommitted.

        Args:
            nbytes: at the most so many bytes, rounded up to whole pages; None: all.
            older_than: only what was free for so many seconds; None: all.
            lazy: let the kernel take the memory when it needs some (MADV_FREE): cheaper, but it
                counts in RSS until then, and the bytes do not count as zero.

        Returns:
            Bytes given back.

        Raises:
            RangeError: negative numbers.
            ViewError: nothing was given back, since live views from `region` hold bytes of all that
                could be. (Otherwise pieces with such views are passed over.)
            VMError: nothing was given back, since the kernel refused.
            ReleasedError: the arena was released or closed.
        """
        most = 1 << 62 if nbytes is None else _index(nbytes)
        seconds = 0.0 if older_than is None else as_float(older_than)
        if most < 0 or not seconds >= 0:
            msg = f"scavenge takes no negative numbers: {most} bytes, {seconds} seconds"
            raise RangeError(msg)
        total, refusals = self._scavenge(most, seconds, bool(lazy), None)
        if refusals and total == 0:
            raise refusals.pop()
        return total

    def scavenge_for(self, scavenger: Scavenger, wanted: Callable[[], bool]) -> None:
        """For the thread of `start_scavenger`: scavenge once, as long as it is `wanted`."""
        total, _ = self._scavenge(1 << 62, scavenger.older_than, scavenger.lazy, wanted)
        scavenger.add(total)

    def _scavenge(
        self, most: int, older_than: float, lazy: bool, wanted: Callable[[], bool] | None
    ) -> tuple[int, list[Exception]]:
        """Give back; the bytes, and the first reason why some could not be.

        With `wanted`, which is for the scavenger's thread, only while that is so.
        """
        age = int(min(older_than * 1000, (1 << 32) - 1))
        left, below, total, n = -(-most // self._page), 1 << 62, 0, _PIECES_AT_ONCE
        refusals: list[Exception] = []
        pieces = ffi.new("struct pagealloc_run[]", _PIECES_AT_ONCE)
        while n == _PIECES_AT_ONCE and left > 0:
            if wanted is None:
                with self._lock:
                    n, given = self._scavenge_some(pieces, left, below, age, lazy, refusals)
            elif self._lock_while(wanted):
                try:
                    n, given = self._scavenge_some(pieces, left, below, age, lazy, refusals)
                finally:
                    self._lock.release()
            else:
                break
            total += given
            if n > 0:
                below = pieces[n - 1].start
                left -= sum(pieces[i].stop - pieces[i].start for i in range(n))
        return total, refusals

    def _scavenge_some(
        self, pieces: Any, left: int, below: int, age: int, lazy: bool, refusals: list[Exception]
    ) -> tuple[int, int]:
        """Give back up to `left` pages below a page; how many pieces there were, and the bytes."""
        self._alive()
        self._free_closed()
        if self._heap is None:
            return 0, 0
        longest = _LONGEST_PIECE // self._page
        n = int(
            lib.heap_idle(
                self._heap, below, min(left, 1 << 62), longest, age, lazy, pieces, _PIECES_AT_ONCE
            )
        )
        return n, self._give_back(pieces, n, lazy, refusals)

    def _lock_while(self, wanted: Callable[[], bool]) -> bool:
        """Take the lock while that is wanted, as its owner may wait for this thread.

        For the scavenger's thread alone: where signal handlers run, one that raises could strike
        between this and the ``try`` that gives the lock back.
        """
        while wanted():
            if self._lock.acquire(timeout=_LOCK_POLL_SECONDS):
                return True
        return False

    def start_scavenger(self, older_than: float = FIVE_MINUTES, *, lazy: bool = False) -> Scavenger:
        """Start a thread that scavenges what was free for `older_than` seconds.

        It looks every `older_than` / 2 seconds, at least once a minute (for 0: once a second). It
        takes the place of one that was started before, and ends with `stop_scavenger`, `release`,
        or when the arena is dropped.

        Raises:
            RangeError: a negative age.
            ReleasedError: the arena was released or closed.
            RuntimeError: no thread can be started, as at the end of the interpreter.
        """
        older_than = as_float(older_than)
        if not older_than >= 0:
            msg = f"an age is not negative, as {older_than} is"
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
        """Stop that thread, if there is one, and wait for its end.

        A signal handler that interrupts `start_scavenger` does not wait.
        """
        if self._worker is not None:
            self._worker.stop()

    # -- accounts -----------------------------------------------------------------------------

    def memstats(self) -> MemStats:
        """Return what is in use, idle, given back and reserved, at one moment.

        Asks the kernel about every committed page.

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
        """What the heap counts, and the bytes that are in use, those of `grow` among them."""
        stats = ffi.new("struct heap_stats *")
        with self._lock:
            if self._heap is not None:
                lib.heap_measure(self._heap, stats)
            return stats, int(stats.in_use) + self._taken_by_grow

    def _metadata_mapped(self) -> tuple[int, int]:
        """Bytes of heap bitmap and of spans that are mapped."""
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
        """Give all addresses back, and with them all blocks.

        The allocator's own tables go with this object.

        Raises:
            ViewError: live views hold some of the bytes.
            ReleasedError: it was released or closed.
            RuntimeError: called by a finaliser or signal handler inside a growth.
        """
        region = self._region
        with self._lock, region._taking_away() as interrupting:
            self._alive()
            if self._undo_log is not None:
                msg = "release called from inside a growth of the same arena"
                raise RuntimeError(msg)
            if region._views is not None:
                region._refuse_views("release", 0, region.size, interrupting)
            try:
                # Calls that take no lock of ours are refused from here on.
                if self._heap is not None:
                    lib.heap_close(self._heap, True)
                super().release()
            finally:
                if self._heap is not None and not region.released:
                    lib.heap_close(self._heap, False)
        self.stop_scavenger()

    def close(self) -> None:
        """Refuse new use; release the addresses with the last view. See `Region.close`.

        The allocator's own tables go with this object.
        """
        with self._lock:
            if self._heap is not None:
                lib.heap_close(self._heap, True)
            super().close()
        self.stop_scavenger()

    # -- blocks that were closed under live views ---------------------------------------------

    def _close_block(self, block: Block) -> None:
        with self._lock:
            if not self._region._released:
                # Noted first, whatever may interrupt this.
                closed = _ClosedBlock(self, block._nbytes)
                self._late.append(closed)
                lib.heap_rename(self._heap, block._handle, closed.handle)
                self._free_closed()

    def _free_closed(self, *, sweep: bool = False) -> None:
        """Free the closed blocks whose views are gone, which `_late` knows.

        A signal handler that raises can keep one from `_late`: a `sweep` looks at all.
        """
        if not self._late and not (sweep and self._closed_blocks):
            return
        with self._lock:
            for closed in list(self._closed_blocks.values()) if sweep else ():
                self._free_unless_viewed(closed)
            while self._late:
                closed = self._late[-1]
                self._free_unless_viewed(closed)
                self._late.remove(closed)

    def _free_unless_viewed(self, closed: "_ClosedBlock") -> None:
        """Free a closed block, or have it come to `_late` when its views are gone."""
        handle, views = closed.handle[0], self._region._views
        if handle < 0:  # it was freed or closed before
            return
        self._closed_blocks[handle] = closed
        if views is not None:
            low = int(_address(self._heap, handle)) - self._base
            held = views.live(low, low + closed.nbytes, prune=False)
            if closed.wait_for([anchor for entry in held if (anchor := entry[0]()) is not None]):
                return
        _free(self._heap, handle)
        self._closed_blocks.pop(handle, None)

    def _is_closed(self, handle: int) -> bool:
        return handle & ~_ZEROED in self._closed_blocks

    # -- inside -------------------------------------------------------------------------------

    def _alloc_slowly(self, nbytes: int, align: int, zero: bool) -> int:
        """Allocate with all that may be needed: a heap, a commit, a growth."""
        if nbytes <= 0:
            msg = f"a block has a positive number of bytes, not {nbytes}"
            raise RangeError(msg)
        if align <= 0 or align & (align - 1):
            msg = f"an alignment is a power of two, not {align}"
            raise RangeError(msg)
        if self.layout.arena_metadata and align > self.layout.unit:
            msg = f"no alignment above {format_size(self.layout.unit)} in arenas of that size"
            raise RangeError(msg)
        with self._lock:
            self._alive()
            self._open_heap()
            need = nbytes + (align if align > self._page else 0)
            if need >= 1 << 62:
                raise self._out_of_memory(nbytes, "there are no such addresses")
            handle = int(_alloc(self._heap, nbytes, align, zero, True))
            if handle == lib.PAGEALLOC_FULL:
                self._grow_heap(need, need, nbytes)
                handle = int(_alloc(self._heap, nbytes, align, zero, True))
            if handle < 0:
                raise self._refused(handle, nbytes)
        return handle

    def _make_room(self, refused: int, wanted: IntegersForC, done: int) -> None:
        """Grow for the sizes from `done` on, or raise why that is no help."""
        nbytes = wanted.item(done)
        if nbytes <= 0:
            msg = f"a block has a positive number of bytes, not {nbytes} (sizes[{done}])"
            raise RangeError(msg)
        need = int(lib.heap_need(self._heap, wanted.struct, done, len(wanted.values)))
        if refused != lib.PAGEALLOC_FULL or nbytes >= 1 << 62:
            raise self._refused(refused, nbytes, need)
        self._grow_heap(need, nbytes, nbytes)

    def _grow_heap(self, wish: int, need: int, nbytes: int) -> None:
        """Grow by `wish` bytes and at least a step; if refused, by just `need`.

        At the very last, by what `need` lacks beyond the free pages at the end.
        """
        self._free_closed(sweep=True)
        page, step = self._page, self._step
        refusals: list[OutOfMemoryError] = []
        for ask in (max(wish, step), max(need, step), need, need - int(lib.heap_tail(self._heap))):
            size = -(-ask // page) * page
            if size <= 0:
                continue
            try:
                self._take_pages(size, partial(self._add, size))
            except OutOfMemoryError as refused:
                refusals.append(refused.with_traceback(None))
            else:
                return
        first = refusals[0]
        raise self._out_of_memory(nbytes, first.strerror or "", first.limit) from first

    def _add(self, nbytes: int, address: int) -> None:
        err = lib.heap_add(self._heap, address, nbytes)
        if err:
            raise self._refused(err, nbytes)

    def _refused(self, refused: int, nbytes: int, wanted: int = 0) -> Exception:
        """Make the exception for a block of `nbytes`, one of many that are `wanted` together."""
        if refused <= lib.HEAP_ERRNO:
            why = refusal("commit", lib.HEAP_ERRNO - refused, wanted or nbytes)
            if not isinstance(why, OutOfMemoryError):
                return why
            return self._out_of_memory(nbytes, why.strerror or "", why.limit)
        if refused == lib.HEAP_CLOSED:
            return ReleasedError("the arena was released or closed")
        if refused == lib.HEAP_SCATTERED:
            return self._out_of_memory(nbytes, "its arenas lie in too many pieces")
        if refused == lib.PAGEALLOC_OUTSIDE:
            return self._out_of_memory(nbytes, "the tables end here")
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
        """Make the tables: a reservation, of which memory is only what is touched."""
        if self._heap is not None:
            return
        layout, placement = self.layout, self.placement
        own_spans = not layout.spans and not layout.arena_metadata
        if layout.arena_metadata:
            room = _ARENAS_MOST
        else:
            room = placement.window_end - placement.arena_start
        capacity = min(room // self._page, 1 << lib.HEAP_PAGE_BITS)
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
            self._region._handle,
            metadata,
        )
        # What the heap's calls touch lives as long as this cdata, which they hold and the garbage
        # collector does not track: longer than any finaliser that may still use the arena.
        close_with(heap, tables, self._region, self._metadata_regions)
        forks.register_tables(heap, heap.pages)
        # A signal handler or finaliser may have made one meanwhile, and blocks: it stays.
        if self._heap is None:
            self._tables, self._heap = tables, heap
        if self._region._released:  # by what interrupted this
            lib.heap_close(self._heap, True)

    @property
    def _unit_spans(self) -> int:
        """Bytes of spans of one arena, where each has its own."""
        return self.layout.unit // self.layout.page * self.layout.word

    @property
    def _unit_bitmap(self) -> int:
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
            if _nbytes(self._heap, block._handle) < 0:  # a signal handler freed it meanwhile
                self._alive()
                raise already_freed()
            if pin:
                block._pin = self._region._pinned(offset, nbytes)
        return view

    def _refuse_views(self, handles: Any) -> None:
        """Raise ViewError if a live view shows bytes of one of several blocks."""
        region = self._region
        if region._views is None:
            return
        held = region._views.live(0, region.size, prune=False)
        wanted = {handle & ~_ZEROED for handle in handles} if held else set()
        for _, low, high in held:
            at = low
            while at < high:
                handle = int(_find(self._heap, self._base + at))
                if handle in wanted:
                    region._refuse_views("free", low, high, True)
                at += self._page - at % self._page
                if handle >= 0:
                    end = int(_address(self._heap, handle)) + int(_nbytes(self._heap, handle))
                    at = max(at, end - self._base)

    def _give_back(self, pieces: Any, n: int, lazy: bool, refusals: list[Exception]) -> int:
        """Give pieces of free pages back; the bytes, and in `refusals` why one could not be."""
        if n < 0:
            self._alive()
        region, total = self._region, 0
        for i in range(n):
            address = int(lib.heap_page_address(self._heap, pieces[i].start))
            nbytes = (pieces[i].stop - pieces[i].start) * self._page
            try:
                with region._taking_away() as interrupting:
                    if region._views is not None:
                        low = address - self._base
                        region._refuse_views("scavenge", low, low + nbytes, interrupting)
                    given = int(lib.heap_give_back(self._heap, pieces + i, lazy))
            except ViewError as held:
                if not refusals:
                    refusals.append(held.with_traceback(None))
                continue
            if given < 0:
                refusals[:] = [refusal("discard", lib.HEAP_ERRNO - given, nbytes, address)]
            total += max(given, 0)
        return total

    def _walk(self) -> Iterator[Block]:
        at = ffi.new("uint64_t *")
        handles = ffi.new("int64_t[]", _BLOCKS_AT_ONCE)
        n = _BLOCKS_AT_ONCE
        while n == _BLOCKS_AT_ONCE and self._heap is not None:
            n = int(lib.heap_blocks(self._heap, at, handles, _BLOCKS_AT_ONCE))
            self._alive()
            for handle in ffi.unpack(handles, max(n, 0)):
                nbytes = int(_nbytes(self._heap, handle))
                if nbytes > 0 and not self._is_closed(handle):
                    yield Block(self, handle, nbytes)


class _ClosedBlock:
    """A block to free with its last view. It has a handle of its own: the Block's is stale."""

    def __init__(self, arena: Arena, nbytes: int) -> None:
        self.handle, self.nbytes = ffi.new("int64_t *", -1), nbytes
        self._arena = weakref.ref(arena)
        self._anchors: dict[int, weakref.ref[Any]] = {}

    def wait_for(self, anchors: list[Any]) -> bool:
        """Wait until all of these are gone; False if there is none."""
        refs = [weakref.ref(anchor, self._gone) for anchor in anchors]
        self._anchors = {id(ref): ref for ref in refs}
        return bool(refs)

    def _gone(self, ref: "weakref.ref[Any]") -> None:
        # Runs wherever a view may die, so it waits for nobody.
        self._anchors.pop(id(ref), None)
        arena = self._arena()
        if not self._anchors and arena is not None:
            arena._late.append(self)


def _no_block_at_all(verb: str, thing: object) -> TypeError:
    return TypeError(f"{verb} takes a Block, not {type(thing).__name__}")


def _foreign(block: Block | Blocks) -> RangeError:
    return RangeError(f"not of this arena: {block!r}")
