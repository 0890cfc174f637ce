"""Arena: a heap of blocks in an address-space layout, which gives idle memory back."""

from collections.abc import Iterable, Iterator
from operator import index as _index
from typing import Any

from pyreserve import layouts
from pyreserve._alloc.integers import integers
from pyreserve._arena.blocks import Block, Blocks
from pyreserve._arena.engine import Engine, FellBack, Policies
from pyreserve._arena.heap import Heap
from pyreserve._arena.heapbitmap import HeapBitmap
from pyreserve._arena.memstats import MemStats
from pyreserve._arena.nativeheap import (
    handle_array,
    heap_alloc,
    heap_find,
    heap_free_unviewed,
    heap_nbytes,
)
from pyreserve._arena.scavenger import FIVE_MINUTES, Scavenger, Worker
from pyreserve._region.growth import as_step
from pyreserve._region.owner import OnRegion
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.residency import resident
from pyreserve.errors import RangeError, StateError
from pyreserve.layouts import Layout, LayoutName, Piece, Placement
from pyreserve.units import WORD, as_bytes, as_float, format_size, round_up

_new_block = Block.__new__
_ADDRESS_END = 1 << (8 * WORD)


class Arena(OnRegion):
    """A heap of blocks: reserves the addresses of a layout and commits memory as blocks need it.

    A block occupies whole pages of the layout (8 KiB in Go's). Placement is address-ordered first
    fit: the lowest run of free pages that is long enough. Allocating and freeing take nearly the
    same time for all sizes of arenas and blocks. The tables take a few bytes for each page.

    Args:
        size: bytes of arena, or a size such as ``"4GiB"``; for the layout ``"native"`` only. None:
            128 GiB, or 512 MiB on 32 bits.
        layout: a name from `pyreserve.layouts.names`. ``"native"`` is one arena of `size` bytes at
            any address; the others are Go's.
        mode: how commits are accounted, as for `pyreserve.reserve`.
        huge_pages: policy of all memory of the arena, as for `pyreserve.reserve`.
        fork: contents in a forked child, as for `pyreserve.reserve`. With ``"wipe"`` blocks read
            zero there. In Go's layouts up to 1.10 the spans are wiped too: the child finds no block
            that its parent allocated, and cannot free it.
        name: name of all memory of the arena, as for `pyreserve.reserve`.
        step: minimum growth, bytes or a size: a multiple of the OS page, rounded up to whole pages
            of the layout. None: the layout's rule, 1 MiB in Go's and 2 MiB in ``"native"``.
            `pyreserve.costs.measured_step` returns a step that suits this machine.
        scavenge_after: if given, a thread gives memory back that was idle for this many seconds
            (`start_scavenger`).

    A 64-bit Go layout whose reservation is refused falls back to the 32-bit mechanism, as Go's
    runtime did. `layout` then differs from `requested_layout`, and `fell_back` has the reason.

    All methods may be called from any thread. A forked child has its own copy of the arena and of
    all blocks, and no scavenger.

    Raises:
        KeyError: no layout has this name.
        RangeError: `size` or `step` is out of range, `size` is the name of a layout, or was given
            for another layout than ``"native"``.
        ValueError: an unknown policy, or a string that is not a size.
        OutOfMemoryError: the addresses were refused; its ``limit`` names the limit.
        VMError: this kernel lacks a policy.
    """

    _noun = "arena"

    def __init__(
        self,
        size: int | str | None = None,
        *,
        layout: LayoutName = "native",
        mode: Mode = "charge",
        huge_pages: HugePages = "default",
        fork: Fork = "copy",
        name: str | None = None,
        step: int | str | None = None,
        scavenge_after: float | None = None,
    ) -> None:
        if isinstance(size, str) and size in layouts.names():
            msg = f"size must be a number of bytes, got the name of a layout: use layout={size!r}"
            raise RangeError(msg)
        step_bytes = None if step is None else as_step(step)
        self._engine = engine = Engine(layout, size, Policies(mode, huge_pages, fork, name))
        growth = round_up(step_bytes or engine.layout.growth, engine.page)
        super().__init__(engine.region)
        self._base = engine.region.base
        self._heap = Heap(engine, growth)
        self._worker: Worker | None = None
        if scavenge_after is not None:
            self.start_scavenger(scavenge_after)

    # -- properties ---------------------------------------------------------------------------

    @property
    def requested_layout(self) -> Layout:
        """The layout named in the constructor."""
        return self._engine.requested_layout

    @property
    def layout(self) -> Layout:
        """The layout in use; the fallback if `requested_layout` was refused."""
        return self._engine.layout

    @property
    def fell_back(self) -> FellBack | None:
        """Why the requested layout was refused; None if it was not."""
        return self._engine.fell_back

    @property
    def placement(self) -> Placement:
        """Current address ranges of spans, bitmap and arena."""
        return self._engine.placement

    @property
    def heap(self) -> Heap:
        """Internal: the C heap, for the blocks."""
        return self._heap

    @property
    def in_use(self) -> int:
        """Bytes in use: the whole pages of all blocks, and the ranges from `grow`."""
        self._heap.free_closed(sweep=True)
        return self._heap.counts()[1]

    @property
    def heap_bitmap(self) -> HeapBitmap | None:
        """The heap bitmap of the arena; None if the layout has none."""
        return HeapBitmap(self._engine) if self.layout.bitmap_bits else None

    # -- allocate and free --------------------------------------------------------------------

    def alloc(self, nbytes: int | str, *, align: int | str = 1, zero: bool = False) -> Block:
        """Allocate a block of `nbytes` bytes.

        If no free run is long enough, the arena grows by its step, or by the size that the block
        needs if that is larger. If the kernel refuses the step, the arena grows by that size alone.

        Args:
            nbytes: size of the block, bytes or a size such as ``"64KiB"``.
            align: bytes or a size, a power of two: the address is a multiple of it, and of the
                arena's page in any case. In layouts with separate arenas (Go 1.11) at most the size
                of one, 64 MiB.
            zero: clear the bytes that are not known to be zero. Bytes never used before read zero
                in any case; `Block.zeroed` is True if the whole block was known to be zero.

        Raises:
            RangeError: `nbytes` is not positive, or `align` is not allowed.
            OutOfMemoryError: the arena is used up (``limit`` is ``"capacity"``, or ``"layout"`` in
                Go's layouts), or the kernel refused. The message has the bytes requested, in use
                and reserved. Nothing has changed.
            ReleasedError: the arena was released or closed.
            StateError: a finaliser or signal handler called this during a growth, and the arena
                has to grow again.
        """
        try:
            nbytes = _index(nbytes)  # type: ignore[arg-type]
        except TypeError:
            nbytes = as_bytes(nbytes)
        heap = self._heap
        if heap.unviewed:
            heap.free_closed()
        try:
            handle = heap_alloc(heap.handle, nbytes, align, zero, False)
        except (OverflowError, TypeError):  # no heap yet, or an argument that C does not take
            handle = -1
        if handle < 0:
            handle = heap.alloc_slow(nbytes, as_bytes(align), bool(zero))
        block = _new_block(Block)  # Block(...) would take half as long again
        block._arena, block._handle, block._nbytes = self, handle, nbytes
        return block

    def free(self, block: Block) -> None:
        """Free a block. Its memory stays committed for later blocks until `trim`.

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
        heap = self._heap
        if self._exports.viewed or heap_free_unviewed(heap.handle, block._handle) < 0:
            heap.free(block._handle)

    def alloc_many(self, sizes: Any) -> Blocks:
        """Allocate a block for each size, all or none.

        Args:
            sizes: sizes in bytes: an iterable of positive integers, or a buffer of integers.

        Raises:
            RangeError, OutOfMemoryError, ReleasedError, StateError: as for `alloc`, for the first
                size that is refused. No block was allocated then, but the arena may have grown.
        """
        handles = self._heap.alloc_many(integers(sizes, "sizes"))
        return Blocks(self, handles)

    def free_many(self, blocks: Iterable[Block]) -> None:
        """Free blocks, all or none.

        Args:
            blocks: `Blocks`, or an iterable of Block.

        Raises:
            FreeError, RangeError, TypeError, ViewError, ReleasedError: as for `free`, for the first
                block that is refused. No block was freed then.
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
            handles = handle_array([block._handle for block in listed])
        if foreign is not None:
            raise _not_of_this_arena(foreign)
        self._heap.free_many(handles)

    def block_at(self, address: int) -> Block | None:
        """Return the block that contains `address`, from the spans; None if no block does.

        Raises:
            ReleasedError: the arena was released or closed.
        """
        address = _index(address)
        self._check_open()
        heap = self._heap
        if heap.handle is None or not 0 <= address < _ADDRESS_END:
            return None
        handle = heap_find(heap.handle, address)
        nbytes = heap_nbytes(heap.handle, handle) if handle >= 0 else handle
        return Block(self, handle, nbytes) if nbytes > 0 and not heap.is_closed(handle) else None

    def blocks(self) -> Iterator[Block]:
        """Iterate over all blocks, lowest address first.

        Blocks may be allocated and freed during the iteration. It reads 256 blocks ahead and does
        not see later changes to them.

        Raises:
            ReleasedError: the arena was released or closed; also by ``next``.
        """
        return (Block(self, handle, nbytes) for handle, nbytes in self._heap.blocks())

    def grow(self, nbytes: int | str) -> int:
        """Take the next `nbytes` bytes of the arena; commit them and their metadata.

        The size is rounded up to whole pages of the layout. When the arena is used up, more
        addresses are requested by the rules of the layout. A failed call changes nothing.

        Returns:
            The address of the first new byte. The new bytes read zero.

        Raises:
            RangeError: `nbytes` is not positive.
            OutOfMemoryError: the layout is used up, or the kernel refused.
            VMError: another mapping occupies addresses that were only probed (EEXIST).
            ReleasedError: the arena was released or closed.
            StateError: a finaliser or signal handler called this during another growth.
        """
        nbytes = as_bytes(nbytes)
        if nbytes <= 0:
            msg = f"nbytes must be positive, got {nbytes}"
            raise RangeError(msg)
        return self._engine.grow(nbytes)

    # -- give back ----------------------------------------------------------------------------

    def trim(
        self,
        nbytes: int | str | None = None,
        *,
        older_than: float | None = None,
        lazy: bool = False,
    ) -> int:
        """Give the memory of free pages back to the system, highest addresses first.

        The addresses stay reserved. Free pages that were not used since they were committed or
        given back have no memory and are skipped. In mode ``"charge"`` runs of 1 MiB and more are
        decommitted, which also gives back their commit charge, unless the arena would then have
        more than 512 committed ranges. All other runs are discarded. Using a page again costs a
        page fault, and a commit if the page was decommitted.

        Args:
            nbytes: maximum to give back, bytes or a size, rounded up to whole pages; None: no
                maximum.
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
        max_bytes = None if nbytes is None else as_bytes(nbytes)
        seconds = 0.0 if older_than is None else as_float(older_than)
        if max_bytes is not None and max_bytes < 0:
            msg = f"nbytes must not be negative, got {max_bytes}"
            raise RangeError(msg)
        if not seconds >= 0:
            msg = f"older_than must be at least 0 seconds, got {seconds}"
            raise RangeError(msg)
        total, refusals = self._heap.give_back(max_bytes, seconds, bool(lazy))
        if refusals and total == 0:
            raise refusals.pop()
        return total

    def start_scavenger(self, older_than: float = FIVE_MINUTES, *, lazy: bool = False) -> Scavenger:
        """Start a thread that gives back pages that were free for `older_than` seconds.

        The thread scavenges every `older_than` / 2 seconds, at least once a minute; for 0 once a
        second. It replaces a scavenger started before. It ends with `stop_scavenger`, `release` and
        `close`, and when the arena is dropped.

        Args:
            older_than: seconds; five minutes by default, as in Go.
            lazy: as for `trim`.

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
            self._check_open()
            if self._worker is None:
                self._worker = Worker(self._heap)
        scavenger = self._worker.start(older_than, bool(lazy))
        if self._region.released:  # by another thread
            scavenger.stop()
            self._check_open()
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
        engine, heap = self._engine, self._heap
        with self._lock:
            engine.check_open()
            heap.free_closed(sweep=True)
            heap_sys = sum(high - low for low, high in engine.placement.arenas)
            stats, inuse = heap.counts()
            gc_sys, other_sys = engine.metadata_mapped()
            return MemStats(
                sys=heap_sys + gc_sys + other_sys,
                heap_sys=heap_sys,
                heap_idle=heap_sys - inuse,
                heap_inuse=inuse,
                heap_released=stats.released,
                heap_alloc=stats.requested + engine.taken_by_grow,
                heap_objects=stats.mallocs - stats.frees,
                mallocs=stats.mallocs,
                frees=stats.frees,
                gc_sys=gc_sys,
                other_sys=other_sys,
                reserved=self._region.reserved + sum(r.size for r in engine.metadata),
                committed=self._region.committed + sum(r.size for r in engine.metadata),
                resident=sum(resident(r) for r in (self._region, *engine.metadata)),
                tables=heap.tables.size if heap.tables is not None else 0,
            )

    def maps(self) -> list[Piece]:
        """Return the mappings in /proc/self/maps within the arena's addresses, lowest first.

        Raises:
            OSError: /proc/self/maps cannot be read.
        """
        return self._engine.maps()

    def __repr__(self) -> str:
        if self.released:
            return f"<Arena {self.layout.name}, released>"
        low, high = self.placement.arena
        return (
            f"<Arena {self.layout.name} {low:#x}-{high:#x} of {format_size(high - low)}: "
            f"{format_size(self.in_use)} in use of {format_size(self._engine.taken)} taken so far>"
        )

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Release all addresses, including those of all blocks.

        The allocator's own tables are released with this object.

        Raises:
            ViewError: live views show some of the bytes; nothing was released.
            ReleasedError: the arena was already released or closed.
            StateError: a finaliser or signal handler called this during a growth.
        """
        region, heap = self._region, self._heap
        with self._lock, self._exports.removal():
            self._check_open()
            if self._engine.growing:
                msg = "release called from inside a growth of the same arena"
                raise StateError(msg)
            self._exports.refuse("release", 0, region.size)
            try:
                # First refuse the calls that do not take the lock.
                heap.set_closed(True)
                self._engine.release()
            finally:
                if not region.released:
                    heap.set_closed(False)
        self.stop_scavenger()

    def close(self) -> None:
        """Refuse new calls; release the addresses when the last view is gone.

        The allocator's own tables are released with this object. See `Region.close`.
        """
        with self._lock:
            self._heap.set_closed(True)
            self._engine.close()
        self.stop_scavenger()


def _not_a_block(verb: str, block: object) -> TypeError:
    return TypeError(f"{verb} takes Block objects, got {type(block).__name__}")


def _not_of_this_arena(block: Block | Blocks) -> RangeError:
    return RangeError(f"block must belong to this arena, got {block!r}")
