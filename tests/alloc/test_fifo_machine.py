"""A FIFO driven at random against a deque of items; /proc is checked too."""

from collections import deque
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import witness
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, GrowableArray, GrowableBuffer, OutOfMemoryError, RangeError

PAGE = PAGE_SIZE
PAGES = 12
Kind = Literal["bytes", "numbers", "rows"]

parts = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 0.1), st.floats(0, 1))


def pages_of(lo: int, hi: int) -> set[int]:
    """Return the numbers of the pages with bytes of [lo, hi)."""
    return set(range(lo // PAGE, -(-hi // PAGE))) if lo < hi else set()


class FifoMachine(RuleBasedStateMachine):
    """The model: the items, the offset of the first one, and the pages held behind it.

    Each item is a different pattern of bytes. Views and exports are kept as the offsets that they
    show; while there are any, nothing moves.
    """

    def __init__(self) -> None:
        super().__init__()
        self.thing: Any = None
        self.append_fast: Any = None
        self.items: deque[bytes] = deque()
        self.number = self.dropped = self.front = 0
        self.views: list[tuple[Any, bytes, int, int]] = []
        self.pins: list[tuple[int, int]] = []
        self.held: set[int] = set()  # pages behind the front that are committed
        self.handled = 0  # pages behind the front that were looked at

    @initialize(
        kind=st.sampled_from(["bytes", "numbers", "rows"]),
        mode=st.sampled_from(["charge", "noreserve"]),
        step=st.sampled_from([1, 3, 16]),
    )
    def reserve(self, kind: Kind, mode: Literal["charge", "noreserve"], step: int) -> None:
        self.kind: Kind = kind
        self.size = {"bytes": 1, "numbers": 4, "rows": 12}[kind]  # of an item, in bytes
        self.capacity = PAGES * PAGE // self.size
        if kind == "bytes":
            self.thing = GrowableBuffer(PAGES * PAGE, step=step * PAGE, mode=mode)
        else:
            shape = () if kind == "numbers" else (3,)
            self.thing = GrowableArray(
                "u4", self.capacity, item_shape=shape, step=step * PAGE, mode=mode
            )
            self.append_fast = self.thing.appender()

    def new(self, n: int) -> list[bytes]:
        """Return `n` items, each different from its neighbours."""
        numbers = np.arange(self.number, self.number + n, dtype="u4") * 2654435761 >> 3
        self.number += n
        if self.kind == "bytes":
            return [bytes([value]) for value in (numbers % 255 + 1).tolist()]
        data = np.repeat(numbers, self.size // 4).astype("u4").tobytes()
        return [data[at : at + self.size] for at in range(0, len(data), self.size)]

    def values(self, items: list[bytes]) -> Any:
        if self.kind == "bytes":
            return b"".join(items)
        return np.frombuffer(b"".join(items), "u4").reshape(len(items), *self.thing.item_shape)

    def at(self, index: int) -> int:
        """Return the offset of an item."""
        return self.front + index * self.size

    def grows(self, n: int) -> bool:
        """Tell whether the container takes `n` items more; move the model if it moves then."""
        length = len(self.items) + n
        if length > self.capacity:
            return False
        if self.at(length) > self.capacity * self.size:
            if self.views or self.pins:
                return False
            self.front = self.handled = 0
            self.held = set()
        return True

    # -- growing --------------------------------------------------------------------------------

    @rule(part=parts)
    def extend(self, part: float) -> None:
        items = self.new(int(part * (self.capacity + 3)))
        if items and not self.grows(len(items)):
            with pytest.raises(OutOfMemoryError):
                self.thing.extend(self.values(items))
            return
        self.thing.extend(self.values(items))
        self.items += items

    @rule(n=st.integers(1, 2 * PAGE // 4), fast=st.booleans())
    def append(self, n: int, fast: bool) -> None:
        for item in self.new(min(n, 100)):
            if not self.grows(1):
                return
            if self.kind == "bytes":
                self.thing.extend(item)
            else:
                value = self.values([item])[0]
                append = self.append_fast if fast else self.thing.append
                append(value if self.kind == "rows" else int(value))
            self.items.append(item)

    @rule(part=parts)
    def spare_and_advance(self, part: float) -> None:
        items = self.new(int(part * self.capacity / 4))
        if self.kind != "bytes" and self.grows(len(items)):
            self.thing.spare(len(items))[:] = self.values(items)
            self.thing.advance(len(items))
            self.items += items

    @rule(part=parts)
    def resize(self, part: float) -> None:
        n = int(part * self.capacity)
        if n < len(self.items):
            end = self.at(n)
            self.views = [view for view in self.views if view[3] <= end]
        elif not self.grows(n - len(self.items)):
            with pytest.raises(OutOfMemoryError):
                self.thing.resize(n)
            return
        self.thing.resize(n)
        while len(self.items) > n:
            self.items.pop()
        self.items += [bytes(self.size)] * (n - len(self.items))

    # -- dropping -------------------------------------------------------------------------------

    def give_back(self) -> None:
        shown = [(lo, hi) for _, _, lo, hi in self.views] + self.pins
        pages: set[int] = set().union(*(pages_of(lo, hi) for lo, hi in shown))
        behind = set(range(self.handled, self.front // PAGE)) | self.held
        self.held = behind & pages
        self.handled = max(self.handled, self.front // PAGE)

    @rule(part=parts)
    def drop_front(self, part: float) -> None:
        n = int(part * len(self.items))
        self.thing.drop_front(n)
        for _ in range(n):
            self.items.popleft()
        self.dropped += n
        self.front += n * self.size
        self.give_back()

    @rule()
    def drop_some(self) -> None:
        """Few items, often less than a page."""
        for _ in range(min(7, len(self.items))):
            self.thing.drop_front(1)
            self.items.popleft()
            self.dropped += 1
            self.front += self.size
            self.give_back()

    @rule(more=st.integers(1, 5))
    def drop_too_many(self, more: int) -> None:
        for n in (-more, len(self.items) + more):
            with pytest.raises(RangeError):
                self.thing.drop_front(n)

    @rule()
    def trim(self) -> None:
        before = self.thing.committed
        given = self.thing.trim()
        self.give_back()
        end = max([self.at(len(self.items)), *(hi for _, hi in self.pins)])
        expected = self.held | set(range(self.front // PAGE, -(-end // PAGE)))
        assert before - given == self.thing.committed == len(expected) * PAGE

    # -- views ----------------------------------------------------------------------------------

    @precondition(lambda self: self.items)
    @rule(ends=st.tuples(parts, parts))
    def view(self, ends: tuple[float, float]) -> None:
        lo, hi = sorted(int(end * len(self.items)) for end in ends)
        if lo == hi:
            return
        held = self.thing.view(lo, hi) if self.kind == "bytes" else self.thing[lo:hi]
        data = b"".join(list(self.items)[lo:hi])
        self.views.append((held, data, self.at(lo), self.at(hi)))

    @precondition(lambda self: self.items and len(self.pins) < 2)
    @rule()
    def export(self) -> None:
        """The container itself exports its items by the buffer protocol."""
        if self.kind != "bytes":
            self.thing.__buffer__(0)
            lo, hi = self.front, self.at(len(self.items))
            if self.pins and self.pins[-1][1] >= lo:
                first, last = self.pins.pop()
                lo, hi = first, max(last, hi)
            self.pins.append((lo, hi))

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 1000))
    def drop_a_view(self, which: int) -> None:
        del self.views[which % len(self.views)]

    @rule()
    def drop_all_views(self) -> None:
        self.views.clear()

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_items_are_the_models(self) -> None:
        if self.thing is not None:
            thing = self.thing
            assert (len(thing), thing.dropped) == (len(self.items), self.dropped)
            items = thing.view() if self.kind == "bytes" else thing.array
            assert items.tobytes() == b"".join(self.items)
            for held, data, _, _ in self.views:
                assert held.tobytes() == data

    @invariant()
    def the_books_are_true(self) -> None:
        if self.thing is not None:
            size = self.thing.region.size
            runs = witness.runs(self.thing.base, size)
            assert runs == self.thing.region.committed_runs()
            pages: set[int] = set().union(*(pages_of(at, at + n) for at, n in runs))
            assert {page for page in pages if page < self.front // PAGE} == self.held
            assert pages_of(self.front, self.at(len(self.items))) <= pages

    def teardown(self) -> None:
        self.views.clear()
        if self.thing is not None:
            base = self.thing.base
            self.thing.release()
            self.thing = self.append_fast = None  # exported bytes stay as long as it lives
            assert not witness.runs(base, PAGES * PAGE)


TestFifoMachine = FifoMachine.TestCase
TestFifoMachine.__doc__ = """Any order of calls leaves the items, views and pages of the model."""
TestFifoMachine.settings = settings(max_examples=examples(40), stateful_step_count=30)
