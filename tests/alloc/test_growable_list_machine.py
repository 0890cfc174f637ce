"""A GrowableArray driven at random against a list, with views that must stay right."""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.profiles import examples
from pyreserve import PAGE_SIZE, GrowableArray, OutOfMemoryError, ViewError

ITEM = 4  # bytes
PAGE = PAGE_SIZE // ITEM
CAPACITY = 8 * PAGE

values = st.integers(-(2**31), 2**31 - 1)
short = st.lists(values, max_size=5)
lengths = st.one_of(st.integers(0, 20), st.integers(0, 3 * PAGE), st.integers(0, CAPACITY + 5))


class ListMachine(RuleBasedStateMachine):
    """The model: all items ever added, without those cut off, and how many were dropped in front.

    A view shows items of the model from an index on, also when these were dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.array: GrowableArray[Any] = GrowableArray("i4", 1)
        self.capacity = 1
        self.items: list[int] = []
        self.front = 0
        self.views: list[tuple[np.ndarray[Any, np.dtype[np.int32]], int]] = []

    @initialize(capacity=st.sampled_from([None, CAPACITY]))
    def create(self, capacity: int | None) -> None:
        self.array = GrowableArray("i4", capacity)
        self.capacity = self.array.capacity

    @property
    def model(self) -> list[int]:
        return self.items[self.front :]

    def _add(self, added: list[int], add: Any, more: int = 0) -> None:
        """Grow by `add`, which may be refused only near the end of the addresses.

        It needs space for `more` items besides those that it adds.
        """
        try:
            add()
        except (OutOfMemoryError, ViewError):
            needed = len(added) + more
            assert len(self.items) + needed > self.capacity
            assert self.views or len(self.model) + needed > self.capacity
            return
        assert len(self.model) + len(added) <= self.capacity
        self.items += added

    # -- growing --------------------------------------------------------------------------------

    @rule(value=values)
    def append(self, value: int) -> None:
        self._add([value], lambda: self.array.append(value))

    @rule(added=short)
    def appender(self, added: list[int]) -> None:
        append = self.array.appender()
        for value in added:
            self._add([value], lambda value=value: append(value))

    @rule(added=short, kind=st.sampled_from([list, tuple, iter, np.array]))
    def extend(self, added: list[int], kind: Any) -> None:
        self._add(added, lambda: self.array.extend(kind(added)))

    @rule(length=lengths, first=st.integers(-1000, 1000))
    def extend_by_many(self, length: int, first: int) -> None:
        added = range(first, first + length)
        self._add(list(added), lambda: self.array.extend(np.array(added, "i8")))

    @precondition(lambda self: self.capacity == CAPACITY)
    @rule(less=st.integers(0, 9))
    def extend_to_the_end(self, less: int) -> None:
        """Add items up to the end of the addresses, or nearly."""
        added = [less] * max(0, CAPACITY - len(self.items) % CAPACITY - less)
        self._add(added, lambda: self.array.extend(added))

    @rule(left=st.integers(0, 50), space=st.integers(0, 50))
    def pass_the_end(self, left: int, space: int) -> None:
        """Without views it slides to the first addresses, to grow up to the capacity."""
        if self.capacity == CAPACITY:
            self.views.clear()
            self.extend_to_the_end(space)
            count = max(0, len(self.model) - left)
            self.array.drop_front(count)
            self.front += count
            self.extend_by_many(space + 1, left)

    @precondition(lambda self: len(self.model) <= CAPACITY)  # else doubling takes all memory
    @rule()
    def extend_by_itself(self) -> None:
        # Its own items are then a view, so near the end of the addresses they can't move.
        if len(self.items) + len(self.model) <= self.capacity:
            self._add(self.model, lambda: self.array.extend(self.array))

    @rule(added=short, more=st.integers(0, 5))
    def spare(self, added: list[int], more: int) -> None:
        def add() -> None:
            space = self.array.spare(len(added) + more)
            space[: len(added)] = added
            del space
            self.array.advance(len(added))

        self._add(added, add, more)

    @rule(length=lengths)
    def resize(self, length: int) -> None:
        end = self.front + length
        if length > len(self.model):
            self._add([0] * (length - len(self.model)), lambda: self.array.resize(length))
            return
        if length < len(self.model) and any(start + len(view) > end for view, start in self.views):
            with pytest.raises(ViewError):
                self.array.resize(length)
            self.views = [held for held in self.views if held[1] + len(held[0]) <= end]
        self.array.resize(length)
        del self.items[end:]

    @rule(more=st.integers(0, PAGE))
    def resize_without_zeros(self, more: int) -> None:
        """The new items are anything, so the model takes them over."""
        before = len(self.model)
        self._add([0] * more, lambda: self.array.resize(before + more, zero=False))
        self.items[self.front + before :] = self.array[before:].tolist()

    # -- shorter --------------------------------------------------------------------------------

    @rule()
    def pop(self) -> None:
        if not self.model:
            with pytest.raises(IndexError):
                self.array.pop()
        elif any(start + len(view) == len(self.items) for view, start in self.views):
            with pytest.raises(ViewError):
                self.array.pop()
        else:
            assert self.array.pop() == self.items.pop()

    @rule(part=st.floats(0, 1))
    def drop_front(self, part: float) -> None:
        count = int(len(self.model) * part)
        self.array.drop_front(count)
        self.front += count

    @rule()
    def trim(self) -> None:
        self.array.trim()

    @rule()
    def drop_all_and_clear(self) -> None:
        self.views.clear()
        self.array.clear()
        del self.items[self.front :]

    # -- items ----------------------------------------------------------------------------------

    @precondition(lambda self: self.model)
    @rule(index=st.integers(0, 10**6), value=values, negative=st.booleans())
    def set_item(self, index: int, value: int, negative: bool) -> None:
        index %= len(self.model)
        self.array[index - len(self.model) if negative else index] = value
        self.items[self.front + index] = value

    @rule(lo=st.integers(-50, 50), hi=st.integers(-50, 50), value=values)
    def set_slice(self, lo: int, hi: int, value: int) -> None:
        self.array[lo:hi] = value
        for index in range(*slice(lo, hi).indices(len(self.model))):
            self.items[self.front + index] = value

    @rule(value=values)
    def add_to_all(self, value: int) -> None:
        self.array %= 1000
        self.array += value % 1000
        added = value % 1000
        self.items[self.front :] = [item % 1000 + added for item in self.model]

    @rule(index=st.integers(-9, 9))
    def index(self, index: int) -> None:
        if -len(self.model) <= index < len(self.model):
            assert self.array[index] == self.model[index]
        else:
            with pytest.raises(IndexError):
                self.array[index]

    # -- views ----------------------------------------------------------------------------------

    @rule()
    def hold_the_array(self) -> None:
        if self.model:
            self.views.append((self.array.array, self.front))

    @precondition(lambda self: self.model)
    @rule(lo=st.integers(0, 10**6))
    def hold_a_slice(self, lo: int) -> None:
        lo %= len(self.model)
        self.views.append((self.array[lo:], self.front + lo))

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 1000), value=values)
    def write_through_a_view(self, which: int, value: int) -> None:
        view, start = self.views[which % len(self.views)]
        view[-1] = value
        self.items[start + len(view) - 1] = value

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 1000))
    def drop_a_view(self, which: int) -> None:
        self.views.pop(which % len(self.views))

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_items_are_the_models(self) -> None:
        assert len(self.array) == self.array.size == len(self.model)
        assert self.array.dropped == self.front
        assert self.array.array.tolist() == self.model
        for view, start in self.views:
            assert view.tolist() == self.items[start : start + len(view)]

    def teardown(self) -> None:
        self.views.clear()
        self.array.release()


TestListMachine = ListMachine.TestCase
TestListMachine.__doc__ = """Any order of calls leaves the items and views of the model."""
TestListMachine.settings = settings(max_examples=examples(25), stateful_step_count=40)
