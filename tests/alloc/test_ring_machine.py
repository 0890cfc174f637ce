"""A ring driven at random against a deque; contents of older arrays are checked too."""

from collections import deque
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import witness
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, RingArray, ViewError

DTYPES = {"i8": 1, f"V{PAGE_SIZE // 4}": 3, f"V{3 * PAGE_SIZE // 2}": 3, "V3": 100}


class RingMachine(RuleBasedStateMachine):
    """The model: collections.deque(maxlen=capacity), and the arrays that no item overwrote."""

    def __init__(self) -> None:
        super().__init__()
        self.ring: RingArray[Any] | None = None
        self.model: deque[bytes] = deque()
        self.count = 0
        self.arrays: list[tuple[Any, list[bytes], int]] = []

    @initialize(dtype=st.sampled_from(sorted(DTYPES)))
    def make(self, dtype: str) -> None:
        self.ring = RingArray(dtype, DTYPES[dtype])
        self.model = deque(maxlen=self.ring.capacity)

    @property
    def opened(self) -> RingArray[Any]:
        assert self.ring is not None
        return self.ring

    def items(self, n: int) -> Any:
        """Return `n` items that differ from those before."""
        size = self.opened.dtype.itemsize
        pattern = range(self.count, self.count + n)
        data = b"".join((b"%08d" % i).ljust(size, b".")[-size:] for i in pattern)
        return np.frombuffer(data, self.opened.dtype)

    def appended(self, items: Any) -> None:
        self.count += len(items)
        self.model.extend(item.tobytes() for item in items)

    @rule()
    def append(self) -> None:
        items = self.items(1)
        self.opened.append(items[0])
        self.appended(items)

    @rule(n=st.integers(0, 20), times=st.integers(0, 3), few=st.integers(-2, 2))
    def extend(self, n: int, times: int, few: int) -> None:
        items = self.items(max(0, n if times == 0 else times * self.opened.capacity + few))
        self.opened.extend(items)
        self.appended(items)

    @precondition(lambda self: self.model)
    @rule(ends=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
    def extend_by_own_items(self, ends: tuple[int, int]) -> None:
        lo, hi = sorted(end % (len(self.model) + 1) for end in ends)
        items = self.opened[lo:hi]
        self.appended(items.copy())
        self.opened.extend(items)

    @rule()
    def clear(self) -> None:
        self.opened.clear()
        self.model.clear()

    @rule(n=st.integers(0, 10**6))
    def hold(self, n: int) -> None:
        n %= len(self.model) + 1
        array, copied = self.opened.last(n), self.opened.last(n, copy=True)
        assert array.tobytes() == copied.tobytes()
        self.arrays.append((array, list(self.model)[len(self.model) - n :], self.count))
        self.arrays.append((copied, list(self.model)[len(self.model) - n :], 1 << 60))

    @rule()
    def drop(self) -> None:
        self.arrays.clear()

    @rule()
    def release_too_early(self) -> None:
        if any(len(array) and then < 1 << 60 for array, _, then in self.arrays):
            with pytest.raises(ViewError):
                self.opened.release()

    @invariant()
    def the_items_are_the_models(self) -> None:
        if self.ring is None:
            return
        ring, items = self.ring, list(self.model)
        assert (len(ring), ring.total) == (len(items), self.count)
        assert ring.array.tobytes() == b"".join(items)
        for n in {0, 1, len(items) // 2, len(items) - 1, len(items)}:
            if 0 <= n <= len(items):
                assert ring.last(n).tobytes() == b"".join(items[len(items) - n :])
        if items:
            assert ring[0].tobytes() == items[0]
            assert ring[-1].tobytes() == items[-1]
        for array, shown, then in self.arrays:
            if self.count - then <= ring.capacity - len(shown):
                assert array.tobytes() == b"".join(shown)

    def teardown(self) -> None:
        self.arrays.clear()
        if self.ring is not None:
            base = self.ring.base
            self.ring.release()
            assert not witness.is_mapped(base)


TestRingMachine = RingMachine.TestCase
TestRingMachine.__doc__ = """Any order of calls leaves the items of a deque with a maxlen."""
TestRingMachine.settings = settings(max_examples=examples(25), stateful_step_count=25)
