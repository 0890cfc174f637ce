"""A bump arena driven at random against a model; the kernel's maps are checked too."""

from typing import Literal, NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import witness
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, OutOfMemoryError, RangeError, ViewError
from pyreserve._alloc.bump import BumpArena, Mark

PAGES = 64
SIZE = PAGES * PAGE_SIZE

sizes = st.one_of(st.integers(1, 100), st.integers(1, 4 * PAGE_SIZE), st.integers(1, SIZE))
aligns = st.one_of(st.just(8), st.integers(0, 16).map(lambda bits: 1 << bits))


class Block(NamedTuple):
    """A live block: its view, its offset, and the byte that fills it."""

    view: memoryview
    lo: int
    hi: int
    byte: int


class BumpMachine(RuleBasedStateMachine):
    """The model: the live blocks, the stack of marks, and the range of possible offsets.

    A gap before a block is less than 8 bytes longer than its alignment requires.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arena: BumpArena | None = None
        self.base = self.offset = self.count = 0
        self.blocks: list[Block] = []
        self.marks: list[Mark] = []
        self.stale: list[Mark] = []
        # (start, end) of blocks that a scope left in use, until the next block or mark.
        self.due: tuple[int, int] | None = None

    @initialize(
        mode=st.sampled_from(["charge", "noreserve"]), step=st.sampled_from([1, 2, 16, 512])
    )
    def reserve(self, mode: Literal["charge", "noreserve"], step: int) -> None:
        self.arena = BumpArena(SIZE, mode=mode, step=step * PAGE_SIZE)
        self.base = self.arena.base

    @property
    def alive(self) -> BumpArena:
        assert self.arena is not None
        return self.arena

    # -- blocks ---------------------------------------------------------------------------------

    @rule(nbytes=sizes, align=aligns, zero=st.booleans(), hold=st.booleans())
    def alloc(self, nbytes: int, align: int, zero: bool, hold: bool) -> None:
        self.take_back_due()
        start = -(-(self.base + self.offset) // align) * align - self.base
        if start + nbytes > SIZE:
            with pytest.raises(OutOfMemoryError):
                self.alive.alloc(nbytes, align=align)
            return
        view = self.alive.alloc(nbytes, align=align, zero=zero)
        lo = int(np.frombuffer(view, np.uint8).__array_interface__["data"][0]) - self.base
        assert len(view) == nbytes
        assert start <= lo < start + 8
        assert (self.base + lo) % align == 0
        if zero:
            assert bytes(view) == bytes(nbytes)
        self.count += 1
        byte = self.count % 255 + 1
        view[:] = bytes([byte]) * nbytes
        self.offset = lo + nbytes
        if hold:
            self.blocks.append(Block(view, lo, lo + nbytes, byte))

    @precondition(lambda self: self.blocks)
    @rule(which=st.integers(0, 1000))
    def drop(self, which: int) -> None:
        del self.blocks[which % len(self.blocks)]

    @rule()
    def drop_all(self) -> None:
        self.blocks.clear()

    @rule(nbytes=st.integers(-5, 0), align=aligns)
    def alloc_nothing(self, nbytes: int, align: int) -> None:
        with pytest.raises(RangeError):
            self.alive.alloc(nbytes, align=align)

    # -- marks ----------------------------------------------------------------------------------

    @rule()
    def mark(self) -> None:
        self.take_back_due()
        mark = self.alive.mark()
        assert mark.offset == self.offset
        self.marks.append(mark)

    @rule(which=st.none() | st.integers(0, 1000), keep=st.booleans())
    def reset(self, which: int | None, keep: bool) -> None:
        mark = self.marks[which % len(self.marks)] if which is not None and self.marks else None
        self.reset_to(mark, keep)

    def reset_to(self, mark: Mark | None, keep: bool) -> None:
        offset = 0 if mark is None else mark.offset
        if any(block.lo >= offset for block in self.blocks):
            with pytest.raises(ViewError):
                self.alive.reset(mark, keep=keep)
            return
        self.alive.reset(mark, keep=keep)
        if not keep and not self.blocks:
            assert self.alive.committed <= -(-offset // PAGE_SIZE) * PAGE_SIZE
        self.taken_back_to(offset)

    def taken_back_to(self, offset: int) -> None:
        self.offset, self.due = offset, None
        self.stale += [other for other in self.marks if other.offset > offset]
        self.marks = [other for other in self.marks if other.offset <= offset]

    def take_back_due(self) -> None:
        due, self.due = self.due, None
        if due and due[1] == self.offset and not any(block.lo >= due[0] for block in self.blocks):
            self.taken_back_to(due[0])

    @rule(which=st.integers(0, 1000), keep=st.booleans())
    def drop_above_and_reset(self, which: int, keep: bool) -> None:
        mark = self.marks[which % len(self.marks)] if self.marks else None
        offset = 0 if mark is None else mark.offset
        self.blocks = [block for block in self.blocks if block.hi <= offset]
        self.reset_to(mark, keep)

    @precondition(lambda self: self.stale)
    @rule(which=st.integers(0, 1000), keep=st.booleans())
    def reset_to_a_stale_mark(self, which: int, keep: bool) -> None:
        with pytest.raises(RangeError):
            self.alive.reset(self.stale[which % len(self.stale)], keep=keep)

    @rule(nbytes=st.lists(sizes, max_size=4), keep=st.booleans(), hold=st.booleans())
    def scope(self, nbytes: list[int], keep: bool, hold: bool) -> None:
        self.take_back_due()
        before = self.offset
        with self.alive.scope(keep=keep):
            for n in nbytes:
                self.alloc(n, 8, False, hold)
        if any(block.lo >= before for block in self.blocks):
            self.due = before, self.offset
        else:
            self.taken_back_to(before)

    @precondition(lambda self: self.blocks)
    @rule()
    def release_too_early(self) -> None:
        with pytest.raises(ViewError):
            self.alive.release()

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_books_are_true(self) -> None:
        if self.arena is not None:
            assert self.arena.in_use == self.offset
            assert self.arena.region.committed_runs() == witness.runs(self.base, SIZE)
            assert self.arena.committed == witness.nbytes(self.base, SIZE) >= self.offset

    @invariant()
    def no_block_was_touched(self) -> None:
        for view, lo, hi, byte in self.blocks:
            assert bytes(view) == bytes([byte]) * (hi - lo) == witness.peek(self.base + lo, hi - lo)

    def teardown(self) -> None:
        self.blocks.clear()
        if self.arena is not None:
            self.arena.release()
            assert not witness.runs(self.base, SIZE)


TestBumpMachine = BumpMachine.TestCase
TestBumpMachine.__doc__ = """Any order of calls leaves the blocks and the state of the model."""
TestBumpMachine.settings = settings(max_examples=examples(80), stateful_step_count=40)
