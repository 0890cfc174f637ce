"""A page allocator driven at random: each step is applied to a model, and both must agree."""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helpers.profiles import examples
from pyreserve._alloc.pages import PageAllocator
from pyreserve.errors import FreeError, OutOfMemoryError, RangeError, StateError

CHUNK = 512
CLASSES = 1 << 15
"""From here on lengths are kept in classes."""
CAPACITY = 3 * CLASSES + 77
FREE, USED = 1, 0

_LANDMARKS = (0, 64, CHUNK, 2 * CHUNK, 32 * CHUNK, CLASSES, CLASSES + 32, 2 * CLASSES, CAPACITY)

positions = st.one_of(
    st.builds(
        lambda landmark, offset: min(max(landmark + offset, 0), CAPACITY),
        st.sampled_from(_LANDMARKS),
        st.integers(-70, 70),
    ),
    st.integers(0, CAPACITY),
)
lengths = st.one_of(
    st.integers(1, 8),
    st.integers(1, 3 * CHUNK),
    positions.filter(bool),
)
aligns = st.one_of(st.just(1), st.integers(0, 17).map(lambda bits: 1 << bits))


def runs_of(model: bytearray, value: int) -> list[tuple[int, int]]:
    """Return the runs of free or of used pages of a model."""
    edges = np.flatnonzero(np.diff(np.frombuffer(model, np.uint8) == value, prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


class PageAllocatorMachine(RuleBasedStateMachine):
    """An allocator, and a bytearray with one byte per page."""

    def __init__(self) -> None:
        super().__init__()
        self.pages = PageAllocator(0, capacity=CAPACITY)
        self.model = bytearray()

    @initialize(npages=positions, used=st.booleans(), holes=st.lists(st.tuples(positions, lengths)))
    def begin(self, npages: int, used: bool, holes: list[tuple[int, int]]) -> None:
        """Start with all pages free, or all in use except some."""
        self.pages = PageAllocator(npages, capacity=CAPACITY)
        self.model = bytearray([FREE]) * npages
        if used and npages:
            self.allocate(npages, 1)
            for page, n in holes:
                self.free(page, n)

    def fits(self, n: int, align: int) -> list[int]:
        """Return the lowest aligned page in each free run that is long enough."""
        return [
            page
            for start, stop in runs_of(self.model, FREE)
            if (page := -(-start // align) * align) + n <= stop
        ]

    def take(self, page: int, n: int) -> None:
        """Mark pages as used; they must be free."""
        assert page + n <= len(self.model)
        assert self.model.count(USED, page, page + n) == 0
        self.model[page : page + n] = bytes([USED]) * n

    @rule(n=lengths, align=aligns)
    def allocate(self, n: int, align: int) -> None:
        """Allocate a run anywhere."""
        fits = self.fits(n, align)

        if not fits:
            with pytest.raises(OutOfMemoryError):
                self.pages.alloc(n, align=align)
            return
        page = self.pages.alloc(n, align=align)

        long_enough = sum(stop - start >= n for start, stop in runs_of(self.model, FREE))
        assert page % align == 0
        assert page == fits[0] or (align > 1 and long_enough > 64)
        self.take(page, n)

    @rule(page=positions, n=lengths)
    def allocate_there(self, page: int, n: int) -> None:
        """Allocate given pages."""
        if page + n > len(self.model):
            with pytest.raises(RangeError):
                self.pages.alloc_at(page, n)
        elif self.model.count(USED, page, page + n):
            with pytest.raises(StateError):
                self.pages.alloc_at(page, n)
        else:
            self.pages.alloc_at(page, n)
            self.take(page, n)

    @rule(page=positions, n=lengths)
    def free(self, page: int, n: int) -> None:
        """Free given pages, which may not be in use."""
        if page + n > len(self.model):
            with pytest.raises(RangeError):
                self.pages.free(page, n)
        elif self.model.count(FREE, page, page + n):
            with pytest.raises(FreeError):
                self.pages.free(page, n)
        else:
            self.pages.free(page, n)
            self.model[page : page + n] = bytes([FREE]) * n

    @rule(where=st.floats(0, 1, exclude_max=True), cut=st.tuples(positions, positions))
    def free_a_used_piece(self, where: float, cut: tuple[int, int]) -> None:
        """Free a part of a used run."""
        used = runs_of(self.model, USED)
        if used:
            start, stop = used[int(where * len(used))]
            page = start + min(cut) % (stop - start)
            self.free(page, 1 + max(cut) % (stop - page))

    @rule(wanted=st.lists(lengths, max_size=80), dtype=st.sampled_from(["i4", "u4", "i8", "u8"]))
    def allocate_many(self, wanted: list[int], dtype: str) -> None:
        """Allocate many runs, or none."""
        before = self.model[:]
        for n in wanted:
            fits = self.fits(n, 1)
            if not fits:
                self.model = before
                with pytest.raises(OutOfMemoryError):
                    self.pages.alloc_many(np.array(wanted, dtype))
                return
            self.take(fits[0], n)

        out: Any = self.pages.alloc_many(np.array(wanted, dtype), np.zeros(len(wanted), dtype))

        self.model = before
        for page, n in zip(out.tolist(), wanted, strict=True):
            self.take(page, n)

    @rule(step=st.integers(1, 9), first=positions, count=st.integers(1, 500), again=st.booleans())
    def free_many(self, step: int, first: int, count: int, again: bool) -> None:
        """Free every n-th used page, or none because one occurs twice."""
        used = np.flatnonzero(np.frombuffer(self.model, np.uint8) == USED)
        some = used[first % len(used) :: step][:count].tolist() if len(used) else []
        if some and again:
            with pytest.raises(FreeError):
                self.pages.free_many([*some, some[len(some) // 2]])
            return

        self.pages.free_many(some)

        for page in some:
            self.model[page] = FREE

    @rule(n=lengths)
    def grow(self, n: int) -> None:
        """Add pages at the end."""
        if len(self.model) + n > CAPACITY:
            with pytest.raises(RangeError):
                self.pages.grow(n)
        else:
            assert self.pages.grow(n) == len(self.model)
            self.model += bytes([FREE]) * n

    @rule(page=positions)
    def ask(self, page: int) -> None:
        """Compare is_used for a page."""
        assert self.pages.is_used(page) == (page < len(self.model) and self.model[page] == USED)

    @invariant()
    def the_same_pages_are_free(self) -> None:
        """Both have the same runs, and the counters add up to the runs."""
        free = runs_of(self.model, FREE)
        assert list(self.pages.free_runs()) == free
        assert list(self.pages.used_runs()) == runs_of(self.model, USED)
        assert self.pages.free_pages == self.model.count(FREE)
        assert self.pages.longest_free == max((b - a for a, b in free), default=0)
        assert len(self.pages) == len(self.model)


TestPageAllocatorMachine = PageAllocatorMachine.TestCase
TestPageAllocatorMachine.settings = settings(max_examples=examples(60), stateful_step_count=40)
