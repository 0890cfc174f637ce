"""Blocks of an arena in every layout: placement, zeroing, freeing and refusals."""

import array
import contextlib
import gc
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from helpers import golden, witness
from helpers.arenas import (
    PAGE,
    fill,
    heap_bitmap,
    holds,
    in_child,
    layout_names,
    needs_64_bits,
    needs_golden_page,
    relative,
)
from pyreserve import (
    PAGE_SIZE,
    Arena,
    Block,
    FreeError,
    GiB,
    KiB,
    MiB,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    StateError,
    ViewError,
)
from pyreserve.layouts import LayoutName

SIZES = [1, PAGE - 1, PAGE, PAGE + 1, 13 * PAGE, 100_000, MiB, 5 * MiB + 3]


@pytest.fixture(params=layout_names())
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """An arena in every layout, released at the end unless the test has done so."""
    opened = Arena(layout=request.param)
    yield opened
    gc.collect()
    if not opened.region.released:
        opened.release()


@pytest.fixture
def small() -> Iterator[Arena]:
    """A native arena of 4 MiB."""
    opened = Arena(4 * MiB)
    yield opened
    gc.collect()
    if not opened.region.released:
        opened.release()


def books(arena: Arena) -> tuple[object, ...]:
    """Return all observable state of an arena, except what only the kernel knows."""
    stats = arena.memstats()
    return (
        [(block.address, block.nbytes) for block in arena.blocks()],
        stats.heap_sys,
        stats.heap_inuse,
        stats.heap_released,
        stats.heap_alloc,
        stats.mallocs,
        stats.frees,
        arena.region.committed_runs(),
        arena.placement,
    )


class TestAlloc:
    def test_blocks_do_not_overlap(self, arena: Arena) -> None:
        """Each block keeps its contents while other blocks are allocated and freed."""
        random = Random(1)
        live: list[tuple[Block, int]] = []
        for step in range(300):
            if live and random.random() < 0.4:
                block, byte = live.pop(random.randrange(len(live)))
                assert holds(block, byte)
                block.free()
            else:
                block = arena.alloc(random.choice(SIZES[:-2]), zero=random.random() < 0.3)
                if block.zeroed:
                    assert holds(block, 0)
                fill(block, step % 255 + 1)
                live.append((block, step % 255 + 1))

        assert all(holds(block, byte) for block, byte in live)

    def test_the_attributes_of_a_block_agree(self, arena: Arena) -> None:
        """Address, offset, size and view of a block describe the same bytes."""
        for nbytes in SIZES:
            block = arena.alloc(nbytes)
            block.view()[nbytes - 1] = 0xA5

            assert block.arena is arena
            assert block.nbytes == len(block) == len(block.view()) == nbytes
            assert block.address == arena.region.base + block.offset
            assert block.address % PAGE == 0
            assert arena.region.view(block.offset, nbytes)[nbytes - 1] == 0xA5
            assert witness.peek(block.address + nbytes - 1) == b"\xa5"
            assert not block.freed

    def test_the_lowest_run_that_is_long_enough(self, arena: Arena) -> None:
        """First fit by address: holes that are too short are skipped, the first other is used."""
        blocks = [arena.alloc(n * PAGE) for n in (1, 2, 1, 4, 1, 8, 1)]
        for i in (1, 3, 5):
            blocks[i].free()

        assert arena.alloc(3 * PAGE).address == blocks[3].address
        assert arena.alloc(2 * PAGE).address == blocks[1].address
        assert arena.alloc(PAGE).address == blocks[3].address + 3 * PAGE

    @pytest.mark.parametrize("align", [1, 2, 4096, PAGE, 2 * PAGE, MiB, 4 * MiB])
    def test_aligned(self, arena: Arena, align: int) -> None:
        """The address is a multiple of the alignment, and other blocks are unaffected."""
        before = arena.alloc(PAGE)
        fill(before, 7)

        block = arena.alloc(3 * PAGE, align=align)
        fill(block, 9)

        assert block.address % align == 0
        assert holds(before, 7)

    @needs_64_bits
    def test_aligned_to_more_than_go_1_11_maps_at_once(self) -> None:
        """An alignment above the size of an arena of Go 1.11 is a RangeError."""
        with Arena(layout="go1.11/amd64") as arena:
            arena.grow(MiB)  # the heap then begins in the middle of an arena

            assert arena.alloc(1, align=64 * MiB).address % (64 * MiB) == 0
            with pytest.raises(RangeError, match="align must be at most"):
                arena.alloc(1, align=128 * MiB)

    @pytest.mark.parametrize("nbytes", [0, -1, -(1 << 70)])
    def test_no_bytes(self, small: Arena, nbytes: int) -> None:
        """A block has at least one byte."""
        with pytest.raises(RangeError, match="nbytes must be positive"):
            small.alloc(nbytes)

    @pytest.mark.parametrize("align", [0, 3, -8, 1 << 80])
    def test_no_alignment(self, small: Arena, align: int) -> None:
        """An alignment must be a power of two that fits an address."""
        with pytest.raises((RangeError, OutOfMemoryError)):
            small.alloc(8, align=align)
        small.alloc(8)

    @pytest.mark.parametrize("wrong", [1.5, [8], None, b"8"])
    def test_no_number(self, small: Arena, wrong: object) -> None:
        """Sizes must be integers."""
        with pytest.raises(TypeError):
            small.alloc(wrong)  # type: ignore[arg-type]

    @pytest.mark.parametrize("nbytes", [5 * MiB, 1 << 46, (1 << 63) - 1, 1 << 63, 1 << 64, 1 << 90])
    def test_more_than_there_is(self, small: Arena, nbytes: int) -> None:
        """OutOfMemoryError has the bytes requested, in use and reserved; the arena is unchanged."""
        block = small.alloc(MiB)
        before = books(small)

        with pytest.raises(OutOfMemoryError, match=f"cannot allocate {nbytes}-byte") as refused:
            small.alloc(nbytes)

        assert "1048576 in use" in str(refused.value)
        assert f"{4 * MiB} reserved" in str(refused.value)
        assert refused.value.limit in {"capacity", "address space"}
        assert books(small)[0] == before[0]
        assert small.alloc(MiB).address == block.address + MiB

    def test_all_of_an_arena_can_be_used(self, small: Arena) -> None:
        """The last block uses the free pages at the end together with pages not yet taken."""
        small.alloc(3 * MiB + 512 * KiB)

        block = small.alloc(512 * KiB)

        assert block.offset + block.nbytes == 4 * MiB
        with pytest.raises(MemoryError):
            small.alloc(1)

    def test_zero_clears_only_reused_blocks(self, small: Arena) -> None:
        """A block of unused pages is zero and says so; a reused one is cleared on request."""
        first = small.alloc(10 * PAGE)
        assert first.zeroed
        fill(first, 1)
        first.free()

        assert not small.alloc(PAGE).zeroed
        cleared = small.alloc(20 * PAGE, zero=True)

        assert cleared.zeroed
        assert holds(cleared, 0)


class TestFree:
    def test_twice(self, arena: Arena) -> None:
        """A freed block cannot be freed again, even after its pages were reused."""
        block = arena.alloc(3 * PAGE)
        block.free()
        assert block.freed
        with pytest.raises(FreeError):
            block.free()

        other = arena.alloc(3 * PAGE)
        assert other.address == block.address
        for refused in (block.free, block.view, lambda: arena.free_many([block])):
            with pytest.raises(FreeError):
                refused()
        assert not other.freed
        assert other != block

    def test_of_another_arena(self, small: Arena) -> None:
        """A block can only be freed by its own arena."""
        with Arena(MiB) as other:
            block = other.alloc(1)
            for refused in (small.free, lambda block: small.free_many([block])):
                with pytest.raises(RangeError, match="must belong to this arena"):
                    refused(block)
            assert not block.freed

    def test_by_a_context(self, small: Arena) -> None:
        """Leaving a with block frees the block, unless it was freed inside."""
        with small.alloc(8) as block:
            assert not block.freed
        assert block.freed
        with small.alloc(8) as block:
            block.free()

    @pytest.mark.parametrize("kind", ["memoryview", "slice", "ndarray", "raw ndarray"])
    def test_not_under_a_view(self, arena: Arena, kind: str) -> None:
        """A block cannot be freed while any object shows its bytes; nothing changes."""
        block, other = arena.alloc(2 * PAGE), arena.alloc(PAGE)
        exporters: dict[str, Callable[[memoryview], object]] = {
            "memoryview": lambda view: view,
            "slice": lambda view: view[PAGE : PAGE + 10],
            "ndarray": lambda view: np.frombuffer(view, dtype=np.uint8)[5:],
            "raw ndarray": lambda view: np.ndarray((4,), dtype=np.uint8, buffer=view),
        }
        held = exporters[kind](block.view())
        before = books(arena)

        for refused in (block.free, lambda: arena.free_many([other, block])):
            with pytest.raises(ViewError, match="cannot free"):
                refused()
        with pytest.raises(ViewError):
            arena.release()

        assert books(arena) == before
        del held
        arena.free_many([other, block])

    def test_freed_and_decommitted(self, small: Arena) -> None:
        """A freed block is a FreeError also when its memory is gone."""
        block = small.alloc(2 * MiB)
        block.free()
        small.trim()
        assert small.committed < 2 * MiB

        for use in (block.view, block.free, lambda: block.ndarray(8)):
            with pytest.raises(FreeError):
                use()


class TestResize:
    def test_in_place(self, arena: Arena) -> None:
        """A block grows over free pages and shrinks; address, handle and contents stay."""
        block, spare = arena.alloc(100), arena.alloc(5 * PAGE)
        last = arena.alloc(PAGE)
        fill(block, 7)
        fill(last, 9)
        spare.free()
        address = block.address

        block.resize(6 * PAGE - 5)

        assert (block.address, block.nbytes, len(block)) == (address, 6 * PAGE - 5, 6 * PAGE - 5)
        assert bytes(block.view()[:100]) == bytes([7]) * 100
        assert block.ndarray(6 * PAGE - 5).size == 6 * PAGE - 5
        assert arena.block_at(address + 5 * PAGE) == block
        assert arena.in_use == 7 * PAGE
        assert arena.memstats().heap_alloc == 7 * PAGE - 5
        block.resize("10")
        assert (bytes(block.view()), arena.in_use) == (bytes([7]) * 10, 2 * PAGE)
        assert arena.block_at(address + PAGE) is None
        assert holds(last, 9)
        assert (arena.memstats().mallocs, arena.memstats().frees) == (3, 1)

    def test_the_last_block_grows_the_arena(self, arena: Arena) -> None:
        """The last block can grow beyond what the arena has committed."""
        block = arena.alloc(PAGE)
        fill(block, 7)

        block.resize(10 * MiB)

        view = block.view()
        assert bytes(view[:PAGE]) == bytes([7]) * PAGE
        assert not any(view[PAGE::4096])
        view[-1] = 1
        assert [(b.address, b.nbytes) for b in arena.blocks()] == [(block.address, 10 * MiB)]

    def test_neighbours_are_in_the_way(self, arena: Arena) -> None:
        """A block that has no free pages behind it is a MemoryError; nothing has changed."""
        block, other = arena.alloc(PAGE), arena.alloc(PAGE)
        before = books(arena)

        with pytest.raises(OutOfMemoryError, match="pages behind it are not free") as caught:
            block.resize(PAGE + 1)

        assert isinstance(caught.value, MemoryError)
        assert (caught.value.verb, caught.value.nbytes) == ("resize", PAGE + 1)
        assert books(arena) == before
        other.free()
        block.resize(PAGE + 1)

    def test_impossible_sizes(self, small: Arena) -> None:
        """Sizes that are not positive or larger than the arena are refused."""
        block = small.alloc(PAGE)
        for nbytes in (0, -1, -(1 << 70)):
            with pytest.raises(RangeError, match="nbytes must be positive"):
                block.resize(nbytes)
        for nbytes in (5 * MiB, 1 << 61, 1 << 63, 1 << 64, 1 << 80):
            with pytest.raises(OutOfMemoryError, match="addresses of the arena end") as refused:
                block.resize(nbytes)
            assert refused.value.limit == "capacity"
        with pytest.raises(TypeError):
            block.resize(1.5)  # type: ignore[arg-type]
        assert block.nbytes == PAGE

    def test_under_views(self, arena: Arena) -> None:
        """A block may grow under a view, and shrink to what its views show."""
        block = arena.alloc(PAGE)
        view = block.view()
        view[:] = bytes([7]) * PAGE

        block.resize(3 * PAGE)
        assert bytes(view) == bytes([7]) * PAGE
        block.resize(PAGE)
        with pytest.raises(ViewError, match="cannot shrink"):
            block.resize(PAGE - 1)

        assert block.nbytes == PAGE
        del view
        block.resize(PAGE - 1)

    def test_other_objects_of_the_block(self, arena: Arena) -> None:
        """Other Block objects of the block have its new size; they can't reach what was cut."""
        block = arena.alloc(4 * PAGE)
        same = arena.block_at(block.address)
        assert same is not None
        block.resize(10)
        arena.trim()

        assert (same.nbytes, len(same), len(same.view())) == (10, 10, 10)
        with pytest.raises(RangeError, match="must fit into 10 bytes"):
            same.ndarray(11)
        block.resize(2 * PAGE)
        assert len(same.view()) == 2 * PAGE
        assert same == block
        same.free()
        for use in (block.free, lambda: block.resize(5), block.view):
            with pytest.raises(FreeError):
                use()

    def test_a_closed_block(self, small: Arena) -> None:
        """A block that was resized and closed under a view is freed with the view."""
        block = small.alloc(PAGE)
        same = small.block_at(block.address)
        assert same is not None
        block.resize(3 * PAGE)
        view = block.view()[2 * PAGE :]

        same.close()

        with pytest.raises(FreeError):
            block.resize(PAGE)
        assert small.in_use == 3 * PAGE
        del view
        assert small.in_use == 0

    def test_memory_that_was_given_back(self, small: Arena) -> None:
        """A block that grows over decommitted pages gets memory that reads zero."""
        block, big = small.alloc(PAGE), small.alloc(3 * MiB)
        fill(big, 5)
        big.free()
        small.trim()
        released = small.memstats().heap_released

        block.resize(2 * MiB)

        assert not any(block.view()[PAGE::4096])
        assert small.memstats().heap_released == released - (2 * MiB - PAGE)


class TestMany:
    @pytest.mark.parametrize("width", "bBhHiIqQ")
    def test_sizes_from_any_buffer(self, arena: Arena, width: str) -> None:
        """Sizes may be a buffer of any integer type; the blocks are in the order of the sizes."""
        sizes = array.array(width, [100, 7, 1, 127, 3])

        blocks = arena.alloc_many(sizes)

        assert [block.nbytes for block in blocks] == list(sizes)
        assert len({block.address for block in blocks}) == 5

    def test_as_one_by_one(self, arena: Arena) -> None:
        """alloc_many places blocks as the same calls of alloc would."""
        random = Random(2)
        sizes = [random.choice(SIZES[:-2]) for _ in range(200)]
        holes = [arena.alloc(random.choice(SIZES[:-2])) for _ in range(60)]
        for hole in holes[::3]:
            hole.free()

        one_by_one = [arena.alloc(nbytes) for nbytes in sizes]
        places = [block.address for block in one_by_one]
        arena.free_many(one_by_one)
        blocks = arena.alloc_many(sizes)

        assert [block.address for block in blocks] == places
        assert arena.memstats().heap_objects == len(list(arena.blocks())) == 240

    def test_all_or_none(self, small: Arena) -> None:
        """If one block does not fit, none is allocated, and the counters are unchanged."""
        small.alloc(PAGE)
        before = books(small)

        for sizes in ([MiB] * 5, [1, 2, 0, 4], [1, -1], [PAGE, 1 << 62]):
            with pytest.raises((OutOfMemoryError, RangeError)):
                small.alloc_many(sizes)
            after = books(small)
            assert (after[0], after[5], after[6]) == (before[0], before[5], before[6])

    def test_a_sequence(self, small: Arena) -> None:
        """Blocks can be indexed, sliced and iterated like any sequence."""
        blocks = small.alloc_many([1, 2, 3, 4])

        assert len(blocks) == 4
        assert blocks[1].nbytes == 2
        assert blocks[-1] == blocks[3]
        assert [block.nbytes for block in blocks[::2]] == [1, 3]
        assert "4 Blocks" in repr(blocks)
        with pytest.raises(IndexError):
            blocks[4]
        blocks[1:3].free()
        with pytest.raises(FreeError):
            blocks[2]

    def test_free_all_or_none(self, small: Arena) -> None:
        """If a block is listed twice or already freed, none is freed."""
        blocks = list(small.alloc_many([PAGE] * 6))
        blocks[5].free()
        before = books(small)

        for wrong in ([*blocks[:3], blocks[1]], [blocks[0], blocks[5]]):
            with pytest.raises(FreeError):
                small.free_many(wrong)
            assert books(small) == before
        small.free_many(blocks[:5])
        small.free_many([])

    def test_none_at_all(self, small: Arena) -> None:
        """An empty list of sizes gives no blocks."""
        assert len(small.alloc_many([])) == 0


class TestFind:
    def test_by_any_of_its_bytes(self, arena: Arena) -> None:
        """Any address within a block leads to it by the spans; free pages lead to no block."""
        blocks = [arena.alloc(nbytes) for nbytes in SIZES]
        arena.alloc(PAGE)
        for block in blocks:
            places = {0, block.nbytes // 2, block.nbytes - 1}
            places |= {1 << k for k in range(23) if 1 << k < block.nbytes}
            for place in places:
                same = arena.block_at(block.address + place)
                assert same == block
                assert same is not None
                assert same.nbytes == block.nbytes
        for block in blocks[::2]:
            block.free()
            assert arena.block_at(block.address) is None
            assert arena.block_at(block.address + block.nbytes - 1) is None

    def test_nothing_elsewhere(self, arena: Arena) -> None:
        """Addresses outside have no block, nor has an arena without allocations."""
        assert arena.block_at(arena.placement.arena_start) is None
        arena.alloc(1)
        for address in (0, arena.placement.arena_start - 1, arena.placement.arena_end, -5, 1 << 90):
            assert arena.block_at(address) is None

    def test_all_in_order(self, arena: Arena) -> None:
        """blocks() returns each block once, lowest address first."""
        blocks = list(arena.alloc_many([PAGE * (i % 4 + 1) for i in range(1000)]))
        for block in blocks[::7]:
            block.free()

        assert list(arena.blocks()) == [b for i, b in enumerate(blocks) if i % 7]

    def test_the_heap_bitmap_marks_starts(self, arena: Arena) -> None:
        """The entry of a live block's first word has its lowest bit set."""
        if not arena.layout.bitmap_bits:
            pytest.skip("the layout has no heap bitmap")
        blocks = [arena.alloc(nbytes) for nbytes in SIZES]
        bitmap = heap_bitmap(arena)
        for block in blocks:
            assert bitmap.at(block.address) == 1
            assert bitmap.at(block.address + arena.layout.word) == 0
            bitmap.set_at(block.address, 3)
        blocks[3].free()

        assert bitmap.at(blocks[3].address) == 0
        assert bitmap.at(blocks[4].address) == 3

    def test_garbage_in_the_spans_leads_nowhere_wrong(self, arena: Arena) -> None:
        """Overwritten spans lead to wrong answers, but to no crash."""
        if not arena.layout.spans:
            pytest.skip("the layout has no spans")
        low, high = arena.placement.spans
        random, blocks = Random(3), list(arena.alloc_many([PAGE * 3] * 50))
        spans = arena.region.view(low - arena.region.base, PAGE_SIZE)
        for _ in range(300):
            at = random.randrange(0, 50 * 3 * arena.layout.word)
            spans[at] = random.randrange(256)
            block = random.choice(blocks)
            arena.block_at(block.address + random.randrange(3 * PAGE))
            len(list(arena.blocks()))
            if random.random() < 0.1:
                with contextlib.suppress(FreeError, ViewError):
                    block.free()
                arena.alloc(PAGE)
        assert high > low


class TestArrays:
    @pytest.mark.parametrize("shape", [12, (3, 4), [3, 4], (2, 3, 2)])
    def test_of_the_first_bytes(self, small: Arena, shape: int | tuple[int, ...]) -> None:
        """An ndarray has the requested shape and type, over the first bytes of the block."""
        block = small.alloc(PAGE)
        array = block.ndarray(shape, "float64")
        array[:] = 1.5

        assert array.shape == (tuple(shape) if isinstance(shape, tuple | list) else (shape,))
        assert array.ctypes.data == block.address
        assert bytes(block.view()) == np.full(12, 1.5).tobytes() + bytes(PAGE - 96)
        assert block.ndarray(PAGE).dtype == np.uint8

    def test_it_holds_the_block(self, small: Arena) -> None:
        """The block cannot be freed while the array or a slice of it is alive."""
        block = small.alloc(PAGE)
        part = block.ndarray((4, 4), "int32")[1:, ::2]

        with pytest.raises(ViewError):
            block.free()
        del part
        block.free()

    def test_readonly(self, small: Arena) -> None:
        """A read-only array shows the bytes and cannot be written, also if it is empty."""
        block = small.alloc(8)
        block.view()[0] = 7
        array = block.ndarray(8, readonly=True)

        assert array[0] == 7
        for shown in (array, block.ndarray(0, readonly=True)):
            assert not shown.flags.writeable

    @pytest.mark.parametrize("shape", [0, (0,), [3, 0], (0, 5)])
    def test_of_nothing(self, small: Arena, shape: int | tuple[int, ...]) -> None:
        """An array without items has its shape and does not protect the block."""
        block = small.alloc(8)
        array = block.ndarray(shape, "int16")
        block.free()

        assert array.shape == (tuple(shape) if isinstance(shape, tuple | list) else (shape,))
        assert array.dtype == np.int16
        with pytest.raises(FreeError):
            block.ndarray(shape)

    @pytest.mark.parametrize("shape", [9, (3, 3), -1, (-2, -4), (2, 1 << 62)])
    def test_that_does_not_fit(self, small: Arena, shape: int | tuple[int, ...]) -> None:
        """Items that take more bytes than the block, and negative sides, are refused."""
        block = small.alloc(8)
        with pytest.raises(RangeError, match="shape"):
            block.ndarray(shape)
        block.free()

    @pytest.mark.parametrize("shape", [1.0, "8", None, (1, 2.0)])
    def test_of_no_shape(self, small: Arena, shape: Any) -> None:
        """A shape must be an integer, or a tuple or list of integers."""
        with pytest.raises(TypeError):
            small.alloc(8).ndarray(shape)


class TestProtocols:
    def test_equal_and_hashed_by_the_block(self, small: Arena) -> None:
        """Two Block objects for one block are equal and have the same hash."""
        block = small.alloc(8)
        again = small.block_at(block.address)

        assert block == again
        assert hash(block) == hash(again)
        assert block != small.alloc(8)
        assert block != 8
        assert {block: 1}[again] == 1

    def test_no_pickles(self, small: Arena) -> None:
        """Arena, Block and Blocks cannot be pickled."""
        for obj in (small, small.alloc(1), small.alloc_many([1])):
            with pytest.raises(TypeError, match="pickled"):
                pickle.dumps(obj)

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="classes export no buffers before 3.12")
    def test_directly_as_a_buffer(self, small: Arena) -> None:
        """A Block is itself a buffer; exporting it pins the bytes as long as the object lives."""
        block = small.alloc(PAGE)
        memoryview(block)[0] = 9
        assert block.view()[0] == 9

        with pytest.raises(ViewError):
            block.free()
        address = block.address
        del block
        gc.collect()
        same = small.block_at(address)
        assert same is not None
        same.free()

    def test_as_an_array(self, small: Arena) -> None:
        """np.asarray of a block shares its bytes and protects them."""
        block = small.alloc(100)
        array = np.asarray(block)

        assert (array.shape, array.dtype.name) == ((100,), "uint8")
        array[:] = 7
        assert bytes(block.view()) == bytes([7]) * 100
        assert np.array(block).tolist() == [7] * 100
        assert not np.shares_memory(np.array(block), array)
        assert np.asarray(block, "f8").tolist() == [7.0] * 100
        assert np.add(block, 1).tolist() == [8] * 100
        with pytest.raises(ViewError):
            block.free()

    def test_the_array_protocol(self, small: Arena) -> None:
        """__array__ copies only if it must or is asked to; its array protects the block."""
        block = small.alloc(16)
        block.view()[:] = bytes(range(16))

        array = block.__array__()
        array[0] = 99
        assert block.view()[0] == 99
        assert block.__array__("uint8", copy=False)[0] == 99
        assert block.__array__(copy=True).base is None
        assert block.__array__("f4").dtype == np.float32
        with pytest.raises(ValueError, match="dtype must be uint8"):
            block.__array__("f4", copy=False)
        with pytest.raises(ViewError):
            block.free()
        del array
        block.free()
        for use in (block.__array__, lambda: np.asarray(block)):
            with pytest.raises(FreeError):
                use()

    def test_repr(self, small: Arena) -> None:
        """The repr has size and address, or says that the block was freed."""
        block = small.alloc(PAGE)
        assert f"{block.address:#x}" in repr(block)
        block.free()
        assert "freed" in repr(block)


class TestTheEnd:
    def test_after_release(self, arena: Arena) -> None:
        """After a release every call is refused, and blocks count as freed."""
        block, blocks = arena.alloc(8), arena.alloc_many([8, 8])
        arena.release()

        assert block.freed
        for refused in (
            lambda: arena.alloc(8),
            lambda: arena.alloc_many([8]),
            block.free,
            blocks.free,
            block.view,
            lambda: block.address,
            lambda: blocks[0],
            lambda: list(arena.blocks()),
            lambda: arena.block_at(8),
            arena.trim,
            arena.memstats,
            arena.start_scavenger,
        ):
            with pytest.raises(ReleasedError):
                refused()

    def test_a_view_outlives_a_dropped_arena(self) -> None:
        """Views of a block keep its bytes mapped after the arena is dropped."""
        arena = Arena(MiB)
        block = arena.alloc(PAGE)
        view, address = block.view(), block.address
        view[:3] = b"abc"
        del arena, block
        gc.collect()

        assert bytes(view[:3]) == b"abc"
        assert witness.is_mapped(address)
        del view
        gc.collect()
        assert not witness.is_mapped(address)

    def test_its_region_is_its_own(self, arena: Arena) -> None:
        """Only the arena may discard, decommit or release its region."""
        arena.alloc(8)
        verbs: list[Callable[[], None]] = [
            lambda: arena.region.decommit(0, PAGE_SIZE),
            lambda: arena.region.discard(0, PAGE_SIZE),
            arena.region.release,
        ]
        for verb in verbs:
            with pytest.raises(StateError, match="part of an arena"):
                verb()


ALLOC_AND_LOOK = """
    name, growths = sys.argv[1], int(sys.argv[2])
    with Arena(layout=name) as arena:
        blocks = [arena.alloc(MiB) for _ in range(growths)]
        stats = arena.memstats()
        print(json.dumps({
            "layout": arena.layout.name,
            "base": arena.placement.start,
            "live": live(arena.placement.start, arena.placement.end),
            "heap_sys": stats.heap_sys,
            "gc_sys": stats.gc_sys,
            "in_use": stats.heap_inuse,
        }))
"""


@needs_golden_page
@needs_64_bits
class TestGoldenTraces:
    @pytest.mark.parametrize("trace", golden.MAPPED, ids=lambda trace: trace.name)
    def test_maps_and_memstats(self, trace: golden.Trace) -> None:
        """With blocks of 1 MiB mappings and memstats are those of the real Go binary."""
        limit = f"limit('AS', {trace.rlimit_as_kib} * KiB - status('VmSize'))\n"
        script = ("    " + limit if trace.rlimit_as_kib else "") + ALLOC_AND_LOOK.lstrip("\n")
        result = in_child(script, trace.layout, str(trace.growths))

        first = trace.ranges()[0][0]
        low = first if trace.goarch == "amd64" and not trace.rlimit_as_kib else result["base"]
        assert relative(result["live"], low) == trace.ranges(first)
        assert result["layout"] == trace.used_layout
        assert abs(result["heap_sys"] - trace.memstats["HeapSys"]) <= MiB
        assert result["in_use"] == trace.growths * MiB
        # GCSys also includes memory that the collector allocated elsewhere.
        assert abs(result["gc_sys"] - trace.memstats["GCSys"]) <= MiB

    def test_the_386_binary_dies_at_the_same_byte(self) -> None:
        """The window is used up at the same byte as Go's, with the same message."""
        result = in_child(
            """
            blocks, arena = [], Arena(layout="go-tip-2014-12/386")
            base = arena.placement.arena_start
            fence = pyreserve.reserve(64 * MiB, at=base + 2 * GiB)
            try:
                while True:
                    blocks.append(arena.alloc(MiB))
            except OutOfMemoryError as error:
                print(json.dumps([error.strerror, error.limit, arena.in_use, len(blocks)]))
            """
        )

        assert result[2] == 1_879_048_192
        assert result[3] == 1792
        assert "not in usable range" in result[0]
        assert result[1] == "layout"


@pytest.mark.heavy
class TestThreads:
    @pytest.mark.parametrize("layout", ["native", "go1.4/amd64"])
    @needs_64_bits
    def test_a_million_operations(self, layout: LayoutName) -> None:
        """Eight threads get bytes of their own, and the counters are exact at the end."""
        arena, failures = Arena(layout=layout), []
        each, batch = 62_500, 250

        def work(number: int) -> None:
            random = Random(number)
            try:
                for _ in range(each // batch):
                    blocks = arena.alloc_many([random.choice(SIZES[:5]) for _ in range(batch)])
                    chosen = random.sample(range(batch), 20)
                    for i in chosen:
                        view = blocks[i].view()
                        view[0] = view[-1] = number
                        del view
                    single = arena.alloc(random.choice(SIZES[:5]))
                    single.view()[0] = number
                    for i in chosen:
                        view = blocks[i].view()
                        assert view[0] == view[-1] == number
                        del view
                    assert single.view()[0] == number
                    single.free()
                    blocks.free()
            except BaseException as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert witness.in_child(lambda: arena.alloc(MiB).nbytes) == MiB
        stats = arena.memstats()

        assert not failures
        assert stats.mallocs == stats.frees == 8 * (each + each // batch)
        assert stats.heap_objects == stats.heap_alloc == stats.heap_inuse == 0
        arena.release()

    def test_an_arena_of_64_tib(self) -> None:
        """In an arena of 64 TiB, far more than memory, a block costs as much as elsewhere."""
        if sys.maxsize < 1 << 46:
            pytest.skip("needs 64-bit addresses")
        with Arena(1 << 46) as arena:
            before = witness.status("VmRSS")
            far = arena.alloc_many([GiB] * 8)
            block = arena.alloc(PAGE)
            far[0].free()

            assert block.offset == 8 * GiB
            assert witness.status("VmRSS") - before < 2 * MiB
