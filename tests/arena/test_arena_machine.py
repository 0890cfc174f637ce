"""Random calls on an arena, against a model."""

import contextlib
import gc
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.arenas import PAGE, check, fill, heap_bitmap, holds, layout_names
from helpers.profiles import examples
from pyreserve import Arena, Block, MiB, OutOfMemoryError, ViewError
from pyreserve.layouts import LayoutName

SIZES = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([64 * PAGE, MiB, 3 * MiB]))


class ArenaMachine(RuleBasedStateMachine):
    """The model has the live blocks by address, each with the byte that fills it."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Block, int]] = {}
        self.views: dict[int, memoryview] = {}
        self.shown: dict[int, int] = {}  # sizes of the buffers behind the views
        self.calls = 0

    @initialize(name=st.sampled_from(layout_names()), small=st.booleans())
    def open(self, name: LayoutName, small: bool) -> None:
        size = 8 * MiB if name == "native" and small else None
        self.arena = Arena(size, layout=name)

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.views.clear()
            self.live.clear()
            gc.collect()
            self.arena.release()

    def enter(self, block: Block, zero: bool) -> None:
        if block.zeroed:
            assert holds(block, 0)
        assert block.zeroed or not zero
        start, stop = block.address, block.address + block.nbytes
        for address, (other, _) in self.live.items():
            assert stop <= address or address + other.nbytes <= start
        self.calls += 1
        byte = self.calls % 255 + 1
        fill(block, byte)
        self.live[start] = (block, byte)

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.live)))

    @rule(nbytes=SIZES, align=st.sampled_from([1, PAGE, 8 * PAGE, MiB]), zero=st.booleans())
    def alloc(self, nbytes: int, align: int, zero: bool) -> None:
        try:
            block = self.arena.alloc(nbytes, align=align, zero=zero)
        except OutOfMemoryError:
            assert self.arena.requested_layout.name == "native"
            return
        assert block.address % align == 0
        self.enter(block, zero)

    @rule(sizes=st.lists(SIZES, max_size=6))
    def alloc_many(self, sizes: list[int]) -> None:
        with contextlib.suppress(OutOfMemoryError):
            for block in self.arena.alloc_many(sizes):
                self.enter(block, False)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        address = self.pick(data)
        block, byte = self.live[address]
        assert holds(block, byte)
        try:
            block.free()
        except ViewError:
            assert address in self.views
            assert not block.freed
        else:
            assert address not in self.views
            assert block.freed
            del self.live[address]

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_many(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sets(st.sampled_from(sorted(self.live)), max_size=5))
        try:
            self.arena.free_many([self.live[address][0] for address in chosen])
        except ViewError:
            assert chosen & set(self.views)
        else:
            assert not chosen & set(self.views)
            for address in chosen:
                del self.live[address]

    @precondition(lambda self: self.live)
    @rule(data=st.data(), nbytes=SIZES)
    def resize(self, data: st.DataObject, nbytes: int) -> None:
        address = self.pick(data)
        block, byte = self.live[address]
        kept, before = min(block.nbytes, nbytes), self.arena.memstats()
        same = self.arena.block_at(address)
        assert same is not None
        try:
            block.resize(nbytes)
        except ViewError:
            assert nbytes < self.shown[address]
            assert address in self.views
        except OutOfMemoryError:
            assert nbytes > block.nbytes
            assert self.arena.memstats().heap_alloc == before.heap_alloc
        else:
            assert address not in self.views or nbytes >= self.shown[address]
            assert (block.address, block.nbytes, same.nbytes) == (address, nbytes, nbytes)
            assert bytes(block.view()[:kept]) == bytes([byte]) * kept
            assert len(same.view()) == len(same) == nbytes
            fill(block, byte)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        address = self.pick(data)
        self.views[address] = self.live[address][0].view()[:1]
        self.shown[address] = self.live[address][0].nbytes

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def look_away(self, data: st.DataObject) -> None:
        del self.views[data.draw(st.sampled_from(sorted(self.views)))]

    @rule(nbytes=st.one_of(st.none(), st.integers(0, 4 * MiB)), lazy=st.booleans())
    def trim(self, nbytes: int | None, lazy: bool) -> None:
        before = self.arena.memstats()
        given = self.arena.trim(nbytes, lazy=lazy)
        after = self.arena.memstats()
        assert before.heap_released <= after.heap_released <= before.heap_released + given
        assert nbytes is None or given < nbytes + PAGE

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def find(self, data: st.DataObject) -> None:
        block, _ = self.live[self.pick(data)]
        inside = data.draw(st.integers(0, block.nbytes - 1))
        assert self.arena.block_at(block.address + inside) == block

    @invariant()
    def all_is_as_it_should_be(self) -> None:
        if not hasattr(self, "arena"):
            return
        blocks = list(self.arena.blocks())
        assert [block.address for block in blocks] == sorted(self.live)
        stats = self.arena.memstats()
        check(stats)
        assert stats.heap_objects == len(self.live)
        assert stats.heap_alloc == sum(block.nbytes for block, _ in self.live.values())
        for block, byte in self.live.values():
            assert holds(block, byte)
            if self.arena.layout.bitmap_bits:
                assert heap_bitmap(self.arena).at(block.address) & 1


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=examples(40), stateful_step_count=30)


class PagesMachine(RuleBasedStateMachine):
    """The model has three bytes for each page of the arena: in use, dirty, given back.

    A dirty page was used before and may not read zero. After a refused list of sizes it is unknown
    which pages were used; these are `MAYBE`.
    """

    CLEAN, DIRTY, MAYBE = range(3)

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Block, int]] = {}

    @initialize(
        place=st.sampled_from([("native", 4 * MiB), *((name, None) for name in layout_names())]),
        mode=st.sampled_from(["charge", "noreserve"]),
    )
    def open(
        self, place: tuple[LayoutName, int | None], mode: Literal["charge", "noreserve"]
    ) -> None:
        self.arena = Arena(place[1], layout=place[0], mode=mode)
        n = (place[1] or 128 * MiB) // PAGE
        self.used, self.dirty, self.released = bytearray(n), bytearray(n), bytearray(n)

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            self.arena.release()

    def lowest(self, n: int) -> int | None:
        """Return the start of the lowest run of n free pages, including pages not yet taken."""
        first = self.used.find(bytes(n))
        return None if first < 0 else first

    def enter(self, block: Block, nbytes: int, first: int, *, zero: bool = False) -> None:
        n = -(-nbytes // PAGE)
        assert block.address == self.arena.placement.arena_start + first * PAGE
        assert block.nbytes == nbytes
        dirty = self.dirty[first : first + n]
        if zero or not any(dirty):
            assert block.zeroed
        if block.zeroed:
            assert self.DIRTY not in dirty or zero
            assert holds(block, 0)
        fill(block, 0xA5)
        self.used[first : first + n] = bytes([1]) * n
        self.released[first : first + n] = bytes(n)
        self.live[first] = block, n

    def leave(self, first: int) -> Block:
        block, n = self.live.pop(first)
        assert holds(block, 0xA5)
        self.used[first : first + n] = bytes(n)
        self.dirty[first : first + n] = bytes([self.DIRTY]) * n
        return block

    @rule(nbytes=SIZES, zero=st.booleans())
    def alloc(self, nbytes: int, zero: bool) -> None:
        first = self.lowest(-(-nbytes // PAGE))
        if first is None:
            with pytest.raises(OutOfMemoryError):
                self.arena.alloc(nbytes, zero=zero)
        else:
            self.enter(self.arena.alloc(nbytes, zero=zero), nbytes, first, zero=zero)

    @rule(sizes=st.lists(SIZES, min_size=1, max_size=5))
    def alloc_many(self, sizes: list[int]) -> None:
        before, places = bytes(self.used), []
        for nbytes in sizes:
            n = -(-nbytes // PAGE)
            first = self.lowest(n)
            if first is None:
                break
            self.used[first : first + n] = bytes([1]) * n
            places.append(first)
        tried = [i for i, (a, b) in enumerate(zip(before, self.used, strict=True)) if a != b]
        self.used[:] = before
        if len(places) == len(sizes):
            blocks = self.arena.alloc_many(sizes)
            for block, nbytes, first in zip(blocks, sizes, places, strict=True):
                self.enter(block, nbytes, first)
            return
        released = self.arena.memstats().heap_released
        with pytest.raises(OutOfMemoryError):
            self.arena.alloc_many(sizes)
        for page in tried:
            self.released[page] = 0
            self.dirty[page] = self.dirty[page] or self.MAYBE
        assert self.arena.memstats().heap_released <= released

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.leave(data.draw(st.sampled_from(sorted(self.live)))).free()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), nbytes=SIZES)
    def resize(self, data: st.DataObject, nbytes: int) -> None:
        first = data.draw(st.sampled_from(sorted(self.live)))
        block, before = self.live[first]
        after = -(-nbytes // PAGE)
        behind = self.used[first + before : first + after]
        if any(behind) or first + after > len(self.used):
            with pytest.raises(OutOfMemoryError):
                block.resize(nbytes)
            return
        block.resize(nbytes)
        fill(block, 0xA5)
        self.used[first : first + before] = bytes(before)
        self.used[first : first + after] = bytes([1]) * after
        if after < before:
            cut = before - after
            self.dirty[first + after : first + before] = bytes([self.DIRTY]) * cut
        self.released[first : first + after] = bytes(after)
        self.live[first] = block, after

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def free_many(self, data: st.DataObject) -> None:
        chosen = data.draw(st.lists(st.sampled_from(sorted(self.live)), unique=True))
        self.arena.free_many([self.leave(first) for first in chosen])

    @precondition(lambda self: self.MAYBE not in self.dirty)
    @rule(
        pages=st.one_of(st.none(), st.integers(0, 200)), odd=st.integers(0, 1), lazy=st.booleans()
    )
    def trim(self, pages: int | None, odd: int, lazy: bool) -> None:
        idle = [
            page
            for page in range(len(self.used) - 1, -1, -1)
            if self.dirty[page] and not self.used[page] and not (lazy and self.released[page])
        ]
        nbytes = None if pages is None else max(pages * PAGE - odd, 0)
        chosen = idle if pages is None else idle[:pages]

        assert self.arena.trim(nbytes, lazy=lazy) == len(chosen) * PAGE

        for page in chosen:
            self.released[page] = 1
            self.dirty[page] = self.dirty[page] if lazy else 0

    @precondition(lambda self: self.MAYBE in self.dirty)
    @rule()
    def scavenge_all(self) -> None:
        self.arena.trim()
        for page, used in enumerate(self.used):
            if not used and self.dirty[page]:
                self.released[page] = self.dirty[page] == self.DIRTY or self.MAYBE
                self.dirty[page] = 0

    @invariant()
    def the_books_are_exact(self) -> None:
        if not hasattr(self, "arena"):
            return
        stats = self.arena.memstats()
        check(stats)
        assert stats.heap_inuse == self.used.count(1) * PAGE
        certain, unknown = (self.released.count(n) * PAGE for n in (1, self.MAYBE))
        assert certain <= stats.heap_released <= certain + unknown
        start = self.arena.placement.arena_start
        assert [(b.address - start) // PAGE for b in self.arena.blocks()] == sorted(self.live)


TestPages = PagesMachine.TestCase
TestPages.settings = settings(max_examples=examples(60), stateful_step_count=30)
