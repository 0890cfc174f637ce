"""Random operations on a region, against a model and with the kernel as the witness."""

import os
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    precondition,
    rule,
)

import pyreserve
from helpers import witness
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, RangeError, Region, ReleasedError, ViewError
from pyreserve._region import reserve as placement

PAGES = 20
SIZE = PAGES * PAGE_SIZE

pages = st.integers(0, PAGES - 1)
lengths = st.integers(1, PAGES)
Held = tuple[memoryview, int, int]


class RegionMachine(RuleBasedStateMachine):
    """The model has for each page None if reserved, else the set of bytes that may fill it."""

    held = Bundle("held")
    reserved, committed = witness.RESERVED, witness.COMMITTED

    def __init__(self) -> None:
        super().__init__()
        self.pages: list[set[int] | None] = [None] * PAGES
        self.views: list[Held] = []
        self.region: Region | None = None
        self.base = 0

    @initialize(
        mode=st.sampled_from(["charge", "noreserve"]),
        guard=st.booleans(),
        fork=st.sampled_from(["copy", "wipe"]),
    )
    def reserve(
        self,
        mode: Literal["charge", "noreserve"],
        guard: bool,
        fork: Literal["copy", "wipe"],
    ) -> None:
        self.region = pyreserve.reserve(SIZE, mode=mode, guard=guard, fork=fork)
        self.base = self.region.base

    # -- the model ------------------------------------------------------------------------------

    @property
    def alive(self) -> Region:
        assert self.region is not None
        return self.region

    def all_committed(self, first: int, end: int) -> bool:
        return end <= PAGES and all(page is not None for page in self.pages[first:end])

    def is_viewed(self, first: int, end: int) -> bool:
        return any(a < end * PAGE_SIZE and b > first * PAGE_SIZE for _, a, b in self.views)

    # -- the verbs ------------------------------------------------------------------------------

    @precondition(lambda self: not self.alive.released)
    @rule(first=pages, count=lengths)
    def commit(self, first: int, count: int) -> None:
        end = first + count
        if end > PAGES:
            with pytest.raises(RangeError):
                self.alive.commit(first * PAGE_SIZE, count * PAGE_SIZE)
            return
        self.alive.commit(first * PAGE_SIZE, count * PAGE_SIZE)
        for i in range(first, end):
            if self.pages[i] is None:
                self.pages[i] = {0}

    @precondition(lambda self: not self.alive.released)
    @rule(first=pages, count=lengths)
    def decommit(self, first: int, count: int) -> None:
        end = first + count
        if end <= PAGES and not self.is_viewed(first, end):
            self.alive.decommit(first * PAGE_SIZE, count * PAGE_SIZE)
            self.pages[first:end] = [None] * count
            return
        with pytest.raises((RangeError, ViewError) if end > PAGES else ViewError):
            self.alive.decommit(first * PAGE_SIZE, count * PAGE_SIZE)

    @precondition(lambda self: not self.alive.released)
    @rule(first=pages, count=lengths, lazy=st.booleans())
    def discard(self, first: int, count: int, lazy: bool) -> None:
        if not self.all_committed(first, first + count):
            with pytest.raises(RangeError):
                self.alive.discard(first * PAGE_SIZE, count * PAGE_SIZE, lazy=lazy)
            return
        self.alive.discard(first * PAGE_SIZE, count * PAGE_SIZE, lazy=lazy)
        for i in range(first, first + count):
            before = self.pages[i]
            assert before is not None
            self.pages[i] = before | {0} if lazy else {0}

    @precondition(lambda self: not self.alive.released)
    @rule(first=pages, count=lengths)
    def populate(self, first: int, count: int) -> None:
        if not self.all_committed(first, first + count):
            with pytest.raises(RangeError):
                self.alive.populate(first * PAGE_SIZE, count * PAGE_SIZE)
            return
        self.alive.populate(first * PAGE_SIZE, count * PAGE_SIZE)
        place, size = self.base + first * PAGE_SIZE, count * PAGE_SIZE
        resident = sum(piece.kib["Rss"] for piece in witness.pieces(place, size)) * 1024
        assert resident >= size

    @precondition(lambda self: not self.alive.released)
    @rule(first=pages, count=lengths, byte=st.integers(0, 255))
    def write(self, first: int, count: int, byte: int) -> None:
        if not self.all_committed(first, first + count):
            with pytest.raises(RangeError):
                self.alive.view(first * PAGE_SIZE, count * PAGE_SIZE)
            return
        view = self.alive.view(first * PAGE_SIZE, count * PAGE_SIZE)
        view[:] = bytes([byte]) * len(view)
        self.pages[first : first + count] = [{byte} for _ in range(count)]

    # -- views ----------------------------------------------------------------------------------

    @precondition(lambda self: not self.alive.released)
    @rule(
        target=held,
        lo=st.integers(0, SIZE - 1),
        length=st.one_of(st.integers(1, 2 * PAGE_SIZE), st.integers(1, SIZE)),
        readonly=st.booleans(),
    )
    def view(self, lo: int, length: int, readonly: bool) -> Held | None:
        hi = lo + length
        if not self.all_committed(lo // PAGE_SIZE, -(-hi // PAGE_SIZE)):
            with pytest.raises(RangeError):
                self.alive.view(lo, length, readonly=readonly)
            return None
        held_view = self.alive.view(lo, length, readonly=readonly), lo, hi
        self.views.append(held_view)
        return held_view

    @rule(held_view=consumes(held), again=st.booleans())
    def drop_view(self, held_view: Held | None, again: bool) -> None:
        if held_view is None:
            return
        view, lo, hi = held_view
        self.views = [other for other in self.views if other is not held_view]
        # Only release the view: the bundle keeps its own references to it.
        if again and hi - lo > 1:
            view[1:].release()
        view.release()

    @rule(held_view=held)
    def read_view(self, held_view: Held | None) -> None:
        if held_view is None:
            return
        view, lo, hi = held_view
        for i in range(lo // PAGE_SIZE, -(-hi // PAGE_SIZE)):
            a, b = max(lo, i * PAGE_SIZE) - lo, min(hi, (i + 1) * PAGE_SIZE) - lo
            may_be = self.pages[i]
            assert may_be is not None
            assert bytes(view[a:b]) in {bytes([byte]) * (b - a) for byte in may_be}

    # -- the end --------------------------------------------------------------------------------

    @rule(sure=st.integers(0, 9))
    def release(self, sure: int) -> None:
        if self.alive.released:
            with pytest.raises(ReleasedError):
                self.alive.release()
        elif self.views:
            with pytest.raises(ViewError):
                self.alive.release()
        elif sure == 0:
            self.alive.release()

    @precondition(lambda self: self.alive.released)
    @rule(verb=st.sampled_from(["commit", "decommit", "discard", "populate", "view"]))
    def use_after_release(self, verb: str) -> None:
        with pytest.raises(ReleasedError):
            getattr(self.alive, verb)(0, PAGE_SIZE)

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_kernel_agrees(self) -> None:
        if self.region is None or self.region.released:
            return
        region = self.region
        expected = [self.reserved if p is None else self.committed for p in self.pages]
        assert witness.perms_by_page(self.base, SIZE, PAGE_SIZE) == expected
        committed = expected.count(self.committed) * PAGE_SIZE
        assert region.committed == committed == witness.nbytes(self.base, SIZE, self.committed)
        assert region.reserved == region.size == SIZE
        assert region.committed_runs() == witness.runs(self.base, SIZE, self.committed)

    @invariant()
    def the_contents_agree(self) -> None:
        if self.region is None or self.region.released:
            return
        for i, may_be in enumerate(self.pages):
            if may_be is not None:
                contents = witness.peek(self.base + i * PAGE_SIZE, PAGE_SIZE)
                assert contents in {bytes([byte]) * PAGE_SIZE for byte in may_be}

    def teardown(self) -> None:
        if self.region is None or self.region.released:
            return
        seen = witness.pieces(self.base, SIZE)
        sizes = sum(piece.end - piece.start for piece in seen if piece.perms == self.committed)
        assert self.region.committed == sizes
        for view, _, _ in self.views:
            view.release()
        self.views.clear()
        self.region.release()
        assert self.region.released


class SharedMachine(RegionMachine):
    """The same with a shared region, whose file has memory for what is committed alone."""

    reserved, committed = "---s", "rw-s"

    @initialize(
        mode=st.just("charge"), guard=st.booleans(), fork=st.just("copy"), strict=st.booleans()
    )
    def reserve(
        self,
        mode: Literal["charge", "noreserve"],
        guard: bool,
        fork: Literal["copy", "wipe"],
        strict: bool,
    ) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(placement, "is_strict", lambda: strict)
            self.region = pyreserve.reserve(SIZE, mode=mode, guard=guard, fork=fork, shared=True)
        self.base = self.region.base
        self.strict = strict

    @invariant()
    def the_file_agrees(self) -> None:
        if self.region is None or self.region.released:
            return
        allocated = os.fstat(self.region.fd).st_blocks * 512
        assert allocated <= self.region.committed
        if self.strict:
            assert allocated == self.region.committed


TestRegionMachine = RegionMachine.TestCase
TestRegionMachine.__doc__ = """Any order of verbs leaves the region in the state of the model."""
TestRegionMachine.settings = settings(max_examples=examples(80), stateful_step_count=40)

TestSharedMachine = SharedMachine.TestCase
TestSharedMachine.__doc__ = """Any order of verbs leaves a shared region in that state, too."""
TestSharedMachine.settings = settings(max_examples=examples(40), stateful_step_count=40)
