"""A buffer and an array driven at random against a bytearray; /proc is checked too."""

from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import witness
from helpers.profiles import examples
from pyreserve import (
    PAGE_SIZE,
    GrowableArray,
    GrowableBuffer,
    OutOfMemoryError,
    RangeError,
    ViewError,
)

ITEM = 3  # bytes; not a power of two, so items rarely end at a page boundary
ITEMS = 16 * PAGE_SIZE
SIZE = ITEM * ITEMS

lengths = st.one_of(st.integers(0, 50), st.integers(0, 2 * PAGE_SIZE), st.integers(0, ITEMS + 9))


def refusal(thing: GrowableBuffer | GrowableArray[Any], length: int) -> type[Exception] | None:
    """Resize; return the exception that refused it, or None."""
    try:
        thing.resize(length)
    except (OutOfMemoryError, ViewError) as refused:
        return type(refused)
    return None


class GrowableMachine(RuleBasedStateMachine):
    """The model: a bytearray, and the ranges of the live views of each object.

    Buffer and array get the same bytes. Only bytes that resize added are zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffer: GrowableBuffer | None = None
        self.array: GrowableArray[Any] | None = None
        self.model = bytearray()
        self.views: list[tuple[memoryview, int, int]] = []
        self.arrays: list[np.ndarray[tuple[int], np.dtype[np.void]]] = []
        self.count = 0

    @initialize(
        mode=st.sampled_from(["charge", "noreserve"]),
        step=st.sampled_from([1, 2, 16, 512]),
        fork=st.sampled_from(["copy", "wipe"]),
    )
    def reserve(
        self,
        mode: Literal["charge", "noreserve"],
        step: int,
        fork: Literal["copy", "wipe"],
    ) -> None:
        nbytes = step * PAGE_SIZE
        self.buffer = GrowableBuffer(SIZE, step=nbytes, mode=mode, fork=fork)
        self.array = GrowableArray(f"V{ITEM}", ITEMS, step=nbytes, mode=mode, fork=fork)

    @property
    def both(self) -> tuple[GrowableBuffer, GrowableArray[Any]]:
        assert self.buffer is not None
        assert self.array is not None
        return self.buffer, self.array

    # -- growing --------------------------------------------------------------------------------

    @rule(items=lengths)
    def extend(self, items: int) -> None:
        buffer, array = self.both
        self.count += 1
        data = bytes([self.count % 255 + 1]) * (items * ITEM)
        if len(self.model) + len(data) > SIZE:
            with pytest.raises(OutOfMemoryError):
                buffer.extend(data)
            with pytest.raises(OutOfMemoryError):
                array.extend(np.frombuffer(data, array.dtype))
            return
        buffer.extend(data)
        array.extend(np.frombuffer(data, array.dtype))
        self.model += data

    @rule()
    def append(self) -> None:
        buffer, array = self.both
        if len(self.model) < SIZE:
            buffer.extend(b"abc")
            array.append(np.void(b"abc"))
            self.model += b"abc"

    @precondition(lambda self: self.model)
    @rule(part=st.floats(0, 1))
    def extend_by_itself(self, part: float) -> None:
        buffer, array = self.both
        items = min(int(len(array) * part), ITEMS - len(array))
        buffer.extend(buffer.view(0, items * ITEM))
        array.extend(array[:items])
        self.model += self.model[: items * ITEM]

    # -- any length -----------------------------------------------------------------------------

    @rule(items=lengths)
    def resize(self, items: int) -> None:
        buffer, array = self.both
        length = items * ITEM
        result = refusal(buffer, length), refusal(array, items)
        if length > SIZE:
            assert result == (OutOfMemoryError, OutOfMemoryError)
            return
        over = [held for held in self.views if held[2] > length]
        arrays_over = [held for held in self.arrays if len(held) > items]
        assert result == (ViewError if over else None, ViewError if arrays_over else None)
        if over and arrays_over:
            return
        # If one of the two refused, it does not refuse without these views.
        over.clear()
        arrays_over.clear()
        self.views = [held for held in self.views if held[2] <= length]
        self.arrays = [held for held in self.arrays if len(held) <= items]
        assert (refusal(buffer, length), refusal(array, items)) == (None, None)
        del self.model[length:]
        self.model += bytes(length - len(self.model))

    @rule()
    def drop_all_and_clear(self) -> None:
        self.drop_all()
        for thing in self.both:
            thing.clear()
        self.model.clear()

    @rule(items=st.integers(-5, -1))
    def resize_to_nonsense(self, items: int) -> None:
        for thing in self.both:
            with pytest.raises(RangeError):
                thing.resize(items)

    @rule()
    def trim(self) -> None:
        for thing in self.both:
            before = thing.committed
            given = thing.trim()
            assert before - given == thing.committed
            assert thing.committed == -(-len(self.model) // PAGE_SIZE) * PAGE_SIZE

    # -- views ----------------------------------------------------------------------------------

    @precondition(lambda self: self.model)
    @rule(ends=st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)))
    def view(self, ends: tuple[int, int]) -> None:
        buffer, _ = self.both
        lo, hi = sorted(end % (len(self.model) + 1) for end in ends)
        view = buffer.view(lo, hi)
        assert len(view) == hi - lo
        if lo < hi:
            self.views.append((view, lo, hi))

    @rule()
    def hold_the_array(self) -> None:
        if self.model:
            self.arrays.append(self.both[1].array)

    @precondition(lambda self: self.views and self.arrays)
    @rule(which=st.integers(0, 1000))
    def write(self, which: int) -> None:
        """A write through an older view is visible in all others."""
        view, lo, _ = self.views[which % len(self.views)]
        held = self.arrays[which % len(self.arrays)]
        if lo < held.nbytes:
            view[0] = held.view(np.uint8)[lo] = self.model[lo] = which % 255 + 1

    @rule()
    def drop_all(self) -> None:
        self.views.clear()
        self.arrays.clear()

    @precondition(lambda self: self.views and self.arrays)
    @rule()
    def release_too_early(self) -> None:
        for thing in self.both:
            with pytest.raises(ViewError):
                thing.release()

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_bytes_are_the_models(self) -> None:
        if self.buffer is not None:
            buffer, array = self.both
            assert len(buffer) == len(array) * ITEM == len(self.model)
            assert buffer.view() == self.model
            assert array.array.tobytes() == self.model
            for view, lo, hi in self.views:
                assert view == self.model[lo:hi]
            for held in self.arrays:
                assert held.tobytes() == self.model[: held.nbytes]

    @invariant()
    def the_books_are_true(self) -> None:
        if self.buffer is not None:
            for thing in self.both:
                committed = thing.committed
                result = witness.runs(thing.base, SIZE)
                assert result == ([(0, committed)] if committed else [])
                assert len(self.model) <= committed

    def teardown(self) -> None:
        self.drop_all()
        if self.buffer is not None:
            for thing in self.both:
                base = thing.base
                thing.release()
                assert not witness.runs(base, SIZE)


TestGrowableMachine = GrowableMachine.TestCase
TestGrowableMachine.__doc__ = """Any order of calls leaves the bytes and views of the model."""
TestGrowableMachine.settings = settings(max_examples=examples(25), stateful_step_count=25)
