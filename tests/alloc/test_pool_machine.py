"""A pool driven at random: each step is applied to a model as well, and both must agree."""

import gc

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import witness
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, capabilities
from pyreserve._alloc.pool import Pool
from pyreserve.errors import FreeError, OutOfMemoryError, ViewError

CAPACITY = 40
# A size with which slots begin and end inside OS pages, and some span two pages.
SIZE, STRIDE = PAGE_SIZE * 3 // 4 - 5, PAGE_SIZE * 3 // 4
GUARDED = capabilities().madv_guard_install

slots = st.integers(0, CAPACITY - 1)


class PoolMachine(RuleBasedStateMachine):
    """A pool, the set of slots in use, and the bytes of the pool, free slots included."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(SIZE, capacity=CAPACITY, align=16, step=PAGE_SIZE)
        self.used: set[int] = set()
        self.stride, self.start = STRIDE, 0
        self.bytes = bytearray(2 * CAPACITY * PAGE_SIZE)
        self.views: dict[int, memoryview] = {}

    @initialize(pages=st.integers(1, 8), guard=st.booleans() if GUARDED else st.just(False))
    def begin(self, pages: int, guard: bool) -> None:
        """Start with a step of some OS pages, and with or without guards."""
        self.pool.release()
        self.pool = Pool(SIZE, capacity=CAPACITY, align=16, step=pages * PAGE_SIZE, guard=guard)
        if guard:
            self.stride, self.start = 2 * PAGE_SIZE, PAGE_SIZE - STRIDE

    def offset(self, slot: int) -> int:
        """Return the offset of a slot's first byte."""
        return slot * self.stride + self.start

    def teardown(self) -> None:
        """Release the addresses."""
        self.views.clear()
        gc.collect()
        self.pool.release()

    def lowest_free(self, n: int) -> list[int]:
        """Return the lowest n free slots."""
        return [slot for slot in range(CAPACITY) if slot not in self.used][:n]

    def write(self, slot: int, byte: int) -> None:
        """Fill a slot."""
        self.pool.view(slot)[:] = bytes([byte]) * SIZE
        self.set_bytes(slot, byte)

    def set_bytes(self, slot: int, byte: int) -> None:
        """Fill a slot of the model."""
        self.bytes[self.offset(slot) : self.offset(slot) + SIZE] = bytes([byte]) * SIZE

    @rule(zero=st.booleans(), byte=st.none() | st.integers(0, 255))
    def allocate(self, zero: bool, byte: int | None) -> None:
        """Allocate a slot, and fill it or leave its bytes."""
        if len(self.used) == CAPACITY:
            with pytest.raises(OutOfMemoryError):
                self.pool.alloc(zero=zero)
            return

        slot = self.pool.alloc(zero=zero)

        assert [slot] == self.lowest_free(1)
        self.used.add(slot)
        if zero:
            self.set_bytes(slot, 0)
        if byte is not None:
            self.write(slot, byte)

    @rule(n=st.integers(0, CAPACITY), zero=st.booleans(), byte=st.integers(0, 255))
    def allocate_many(self, n: int, zero: bool, byte: int) -> None:
        """Allocate several slots, or none."""
        if n > CAPACITY - len(self.used):
            with pytest.raises(OutOfMemoryError):
                self.pool.alloc_many(n, zero=zero)
            return

        slots_taken = self.pool.alloc_many(n, zero=zero)

        assert list(slots_taken) == self.lowest_free(n)
        self.used.update(slots_taken)
        for slot in slots_taken:
            if zero:
                self.set_bytes(slot, 0)
        for slot in slots_taken[::2]:
            self.write(slot, byte)

    @rule(slot=slots)
    def free(self, slot: int) -> None:
        """Free a slot that may be in use, in view, or free."""
        if slot not in self.used:
            with pytest.raises(FreeError):
                self.pool.free(slot)
        elif slot in self.views:
            with pytest.raises(ViewError):
                self.pool.free(slot)
        else:
            self.pool.free(slot)
            self.used.remove(slot)

    @rule(some=st.lists(slots))
    def free_many(self, some: list[int]) -> None:
        """Free several, or none if one is in view, free, or occurs twice."""
        if self.views.keys() & set(some):
            with pytest.raises(ViewError):
                self.pool.free_many(some)
        elif len(set(some)) < len(some) or not self.used.issuperset(some):
            with pytest.raises(FreeError):
                self.pool.free_many(some)
        else:
            self.pool.free_many(some)
            self.used.difference_update(some)

    @precondition(lambda self: self.used)
    @rule(at=st.integers(0), part=st.booleans())
    def keep_a_view(self, at: int, part: bool) -> None:
        """Keep a view of a slot or of a part of it."""
        slot = sorted(self.used)[at % len(self.used)]
        view = self.pool.view(slot)
        self.views[slot] = view[3:9] if part else view

    @precondition(lambda self: self.views)
    @rule(at=st.integers(0))
    def drop_a_view(self, at: int) -> None:
        """Drop a view."""
        del self.views[sorted(self.views)[at % len(self.views)]]

    @rule()
    def trim(self) -> None:
        """Give back every whole page without a used slot, and no other; the tail reads zero."""
        before = self.pool.committed

        given = self.pool.trim()

        touched = {
            page
            for slot in self.used
            for page in range(
                slot * self.stride // PAGE_SIZE, -(-(slot + 1) * self.stride // PAGE_SIZE)
            )
        }
        assert self.pool.committed == before - given == len(touched) * PAGE_SIZE
        region = self.pool.region
        accessible = witness.perms_by_page(region.base, region.size, PAGE_SIZE)
        assert {i for i, perms in enumerate(accessible) if perms == witness.COMMITTED} == touched
        assert witness.total_kib(region.base, region.size, "Rss") * 1024 <= len(touched) * PAGE_SIZE
        for page in set(range(region.size // PAGE_SIZE)) - touched:
            self.bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
        tail = (max(self.used, default=-1) + 1) * self.stride
        self.bytes[tail:] = bytes(len(self.bytes) - tail)

    @invariant()
    def the_same_slots_are_in_use(self) -> None:
        """Both have the same slots in use."""
        assert list(self.pool) == sorted(self.used)
        assert len(self.pool) == len(self.used)
        assert self.pool.in_use == len(self.used) * self.stride
        assert all((slot in self.pool) == (slot in self.used) for slot in range(CAPACITY))

    @invariant()
    def slots_in_use_are_committed(self) -> None:
        """The kernel gives access to every slot in use."""
        base = self.pool.base
        spans = witness.spans(base, self.pool.reserved)
        for slot in self.used:
            lo, hi = base + self.offset(slot), base + self.offset(slot) + SIZE
            over = [span for span in spans if span.start < hi and span.end > lo]
            assert over
            assert {span.perms for span in over} == {witness.COMMITTED}

    @invariant()
    def contents_are_as_they_were_left(self) -> None:
        """Each slot in use has the bytes that were left there."""
        for slot in self.used:
            lo = self.offset(slot)
            assert self.pool.view(slot) == self.bytes[lo : lo + SIZE]


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=examples(50), stateful_step_count=40)
