"""A GrowableArray driven at random against a list: no item is lost or doubled."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.profiles import examples
from pyreserve import (
    PAGE_SIZE,
    GrowableArray,
    OutOfMemoryError,
    RangeError,
    ViewError,
)

ITEMS = 3 * PAGE_SIZE
counts = st.one_of(st.integers(0, 3), st.integers(0, 40), st.integers(0, PAGE_SIZE))


class ArrayMachine(RuleBasedStateMachine):
    """The model: a list, and the ranges of the live views with their contents.

    Each appended number is a new one. `zeroed` of them are what resize added.
    """

    array: GrowableArray[Any]

    def __init__(self) -> None:
        super().__init__()
        self.model: list[float] = []
        self.next = 0.0
        self.adders: list[Callable[[Any], None]] = []
        self.views: list[tuple[Any, int, int]] = []
        self.spare: tuple[Any, int] | None = None  # and the length at which it starts

    @initialize(
        dtype=st.sampled_from(["f8", "f4", "i4", ">f8", "c16"]),
        step=st.sampled_from([None, PAGE_SIZE, 64 * PAGE_SIZE]),
    )
    def reserve(self, dtype: str, step: int | None) -> None:
        self.array = GrowableArray(dtype, ITEMS, step=step)

    def new(self, count: int = 1) -> list[float]:
        start, self.next = self.next + 1, self.next + count
        return [start + i for i in range(count)]

    def add(self, values: list[float], how: Callable[[], object]) -> None:
        """Call `how`, which adds these values, and add them to the model if they fit."""
        if len(self.model) + len(values) > ITEMS:
            with pytest.raises(OutOfMemoryError):
                how()
            return
        how()
        self.model += values

    # -- growing --------------------------------------------------------------------------------

    @rule()
    def append(self) -> None:
        values = self.new()
        self.add(values, lambda: self.array.append(values[0]))

    @rule()
    def make_an_appender(self) -> None:
        self.adders = [*self.adders[-1:], self.array.appender()]

    @precondition(lambda self: self.adders)
    @rule(which=st.integers(0, 1), count=st.integers(1, 30))
    def append_by_an_appender(self, which: int, count: int) -> None:
        for value in self.new(count):
            self.add([value], lambda value=value: self.adders[which % len(self.adders)](value))  # type: ignore[misc]

    @precondition(lambda self: self.adders)
    @rule(wrong=st.sampled_from(["x", [1], {}, 10**400]))
    def append_what_does_not_fit(self, wrong: Any) -> None:
        for add in (
            self.adders[-1],
            self.array.append,
            lambda value: self.array.extend([1, value]),
        ):
            with pytest.raises((TypeError, ValueError, OverflowError)):
                add(wrong)

    @rule(
        count=counts,
        kind=st.sampled_from([list, tuple, np.array, lambda values: np.array(values, "f8")[::1]]),
    )
    def extend(self, count: int, kind: Callable[[Any], Any]) -> None:
        values = self.new(count)
        self.add(values, lambda: self.array.extend(kind(values)))

    @rule(count=counts, fail=st.booleans())
    def extend_by_a_generator(self, count: int, fail: bool) -> None:
        values = self.new(min(count, ITEMS - len(self.model)))

        def give() -> Iterator[float]:
            yield from values
            if fail:
                raise LookupError

        if fail:
            with pytest.raises(LookupError):
                self.array.extend(give())
        else:
            self.array.extend(give())
        self.model += values

    @precondition(lambda self: self.adders)
    @rule(count=st.integers(0, 20))
    def extend_by_a_generator_that_appends(self, count: int) -> None:
        own, given = self.new(count), self.new(count)

        def give() -> Iterator[float]:
            for mine, yours in zip(own, given, strict=True):
                self.adders[-1](mine)
                yield yours

        if len(self.model) + 2 * count <= ITEMS:
            self.array.extend(give())
            self.model += own + given

    @rule(part=st.floats(0, 1))
    def extend_by_itself(self, part: float) -> None:
        count = min(int(len(self.model) * part), ITEMS - len(self.model))
        self.array.extend(self.array[:count])
        self.model += self.model[:count]

    @rule(count=counts)
    def take_spare(self, count: int) -> None:
        if len(self.model) + count <= ITEMS:
            self.spare = self.array.spare(count), len(self.model)

    @precondition(lambda self: self.spare)
    @rule(count=counts)
    def advance(self, count: int) -> None:
        spare: Any
        spare, start = self.spare or ([], 0)
        if count and (start != len(self.model) or count > len(spare)):
            with pytest.raises(RangeError):
                self.array.advance(count)
            return
        values = self.new(count)
        spare[:count] = values
        self.array.advance(count)
        self.model += values
        self.spare = spare[count:], start + count

    # -- any length -----------------------------------------------------------------------------

    def shorten(self, count: int, how: Callable[[], object]) -> bool:
        """Call `how`, which shortens to `count` items; return False if a view refused it."""
        if any(high > count for _, _, high in self.views):
            with pytest.raises(ViewError):
                how()
            self.views = [held for held in self.views if held[2] <= count]
        if self.spare is not None and self.spare[1] < len(self.model):
            self.spare = None  # its items are part of the array, or its length changed
        if count < len(self.model):
            self.spare = None
        how()
        del self.model[count:]
        return True

    @rule(count=counts, zero=st.booleans())
    def resize(self, count: int, zero: bool) -> None:
        if count < len(self.model):
            self.shorten(count, lambda: self.array.resize(count, zero=zero))
            return
        self.array.resize(count, zero=zero)
        if not zero:
            self.array[len(self.model) :] = 0
        self.model += [0] * (count - len(self.model))

    @rule()
    def pop(self) -> None:
        if not self.model:
            with pytest.raises(IndexError):
                self.array.pop()
            return
        last, popped = self.model[-1], []
        self.shorten(len(self.model) - 1, lambda: popped.append(self.array.pop()))
        assert popped == [last]

    @rule()
    def trim(self) -> None:
        if self.spare is not None and len(self.spare[0]):
            self.spare = None
        self.array.trim()
        end = -(-self.array.nbytes // PAGE_SIZE) * PAGE_SIZE
        assert self.array.committed == end

    # -- items ----------------------------------------------------------------------------------

    @precondition(lambda self: self.model)
    @rule(at=st.integers(-ITEMS, ITEMS))
    def assign(self, at: int) -> None:
        at = at % (2 * len(self.model)) - len(self.model)
        (value,) = self.new()
        self.array[at] = value
        self.model[at] = value
        assert self.array[at] == value

    @rule(ends=st.tuples(st.integers(0, ITEMS), st.integers(0, ITEMS)))
    def assign_a_slice(self, ends: tuple[int, int]) -> None:
        low, high = sorted(end % (len(self.model) + 1) for end in ends)
        values = self.new(high - low)
        self.array[low:high] = values
        self.model[low:high] = values

    @rule(ends=st.tuples(st.integers(0, ITEMS), st.integers(0, ITEMS)))
    def view(self, ends: tuple[int, int]) -> None:
        low, high = sorted(end % (len(self.model) + 1) for end in ends)
        if low < high:
            self.views.append((self.array[low:high], low, high))

    @rule()
    def drop_views(self) -> None:
        self.views.clear()

    # -- what always holds ----------------------------------------------------------------------

    @rule()
    def the_items_are_the_models(self) -> None:
        """A rule, not an invariant: it takes the window back from an appender."""
        assert len(self.array) == len(self.model)
        assert self.array.array.tolist() == self.model

    @invariant()
    def views_show_the_items(self) -> None:
        for held, low, high in self.views:
            assert held[0] == self.model[low]
            assert held[-1] == self.model[high - 1]

    def teardown(self) -> None:
        if hasattr(self, "array"):
            self.the_items_are_the_models()
            self.views.clear()
            self.spare = None
            self.array.release()


TestArrayMachine = ArrayMachine.TestCase
TestArrayMachine.__doc__ = """Any order of calls leaves the items and views of a list."""
TestArrayMachine.settings = settings(max_examples=examples(25), stateful_step_count=40)
