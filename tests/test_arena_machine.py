"""A machine that allocates, frees and scavenges at random, against a dict of what must be there."""

import contextlib
import gc

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from test_arena import layout_names
from test_arena_alloc import PAGE, fill, holds
from test_scavenge import check

from pyreserve import Arena, Block, MiB, OutOfMemoryError, ViewError

SIZES = st.one_of(st.integers(1, 3 * PAGE), st.sampled_from([64 * PAGE, MiB, 3 * MiB]))


class ArenaMachine(RuleBasedStateMachine):
    """Blocks by their addresses, with the byte that fills each."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[Block, int]] = {}
        self.views: dict[int, memoryview] = {}
        self.calls = 0

    @initialize(name=st.sampled_from(layout_names()), small=st.booleans())
    def open(self, name: str, small: bool) -> None:
        size = 8 * MiB if name == "native" and small else None
        self.arena = Arena(name, size=size)

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
            block = self.arena.alloc(nbytes, align, zero=zero)
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
    @rule(data=st.data())
    def look(self, data: st.DataObject) -> None:
        address = self.pick(data)
        self.views[address] = self.live[address][0].view[:1]

    @precondition(lambda self: self.views)
    @rule(data=st.data())
    def look_away(self, data: st.DataObject) -> None:
        del self.views[data.draw(st.sampled_from(sorted(self.views)))]

    @rule(nbytes=st.one_of(st.none(), st.integers(0, 4 * MiB)), lazy=st.booleans())
    def scavenge(self, nbytes: int | None, lazy: bool) -> None:
        before = self.arena.memstats()
        given = self.arena.scavenge(nbytes, lazy=lazy)
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
        found = list(self.arena.blocks())
        assert [block.address for block in found] == sorted(self.live)
        stats = self.arena.memstats()
        check(stats)
        assert stats.heap_objects == len(self.live)
        assert stats.heap_alloc == sum(block.nbytes for block, _ in self.live.values())
        for block, byte in self.live.values():
            assert holds(block, byte)
            if self.arena.layout.bitmap_bits:
                assert self.arena.heap_bitmap.at(block.address) & 1


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=40, stateful_step_count=30)
