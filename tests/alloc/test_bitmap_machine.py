"""A bitmap driven at random: each step is applied to a model as well, and both must agree."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from helpers.profiles import examples
from pyreserve import PAGE_SIZE, Bitmap, KiB

STEP = max(64 * KiB, PAGE_SIZE) * 8
"""Bits in what is committed at a time."""
NBITS = 3 * STEP + 77

_LANDMARKS = (0, 64, 1000, STEP, STEP + 64, 2 * STEP, 3 * STEP, NBITS)

positions = st.one_of(
    st.builds(
        lambda landmark, offset: min(max(landmark + offset, 0), NBITS),
        st.sampled_from(_LANDMARKS),
        st.integers(-130, 130),
    ),
    st.integers(0, NBITS),
)
ranges = st.tuples(positions, positions).map(lambda pair: (min(pair), max(pair)))
strides = st.one_of(
    st.integers(1, 200), st.sampled_from([STEP - 1, STEP, STEP + 1]), st.just(NBITS)
)
run_lengths = st.one_of(st.integers(1, 300), st.sampled_from([STEP, STEP + 1, 2 * STEP, NBITS]))


class BitmapMachine(RuleBasedStateMachine):
    """Two bitmaps, and two bytearrays with one byte per bit."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmaps = [Bitmap(NBITS), Bitmap(NBITS)]
        self.models = [bytearray(NBITS), bytearray(NBITS)]

    def teardown(self) -> None:
        """Release the addresses."""
        for bitmap in self.bitmaps:
            bitmap.release()

    @initialize(areas=st.lists(ranges, max_size=3))
    def begin_with_some_bits(self, areas: list[tuple[int, int]]) -> None:
        """Start from a bitmap with some words committed."""
        for area in areas:
            self.change_a_range(1, area, value=True)

    @rule(which=st.integers(0, 1), area=ranges, value=st.booleans())
    def change_a_range(self, which: int, area: tuple[int, int], value: bool) -> None:
        """Set or clear adjacent bits."""
        start, stop = area
        bitmap, model = self.bitmaps[which], self.models[which]

        changed = bitmap.set(start, stop) if value else bitmap.clear(start, stop)

        assert changed == model.count(not value, start, stop)
        model[start:stop] = bytes([value]) * (stop - start)

    @rule(
        which=st.integers(0, 1), area=ranges, stride=strides, up=st.booleans(), value=st.booleans()
    )
    def assign_a_slice(
        self, which: int, area: tuple[int, int], stride: int, up: bool, value: bool
    ) -> None:
        """Set or clear bits with a step between them."""
        start, stop = area
        key = slice(start, stop, stride) if up else slice(stop, start, -stride)

        self.bitmaps[which][key] = value

        n = len(range(*key.indices(NBITS)))
        self.models[which][key] = bytes([value]) * n

    @rule(which=st.integers(0, 1), at=st.integers(-NBITS, NBITS - 1), value=st.booleans())
    def assign_a_bit(self, which: int, at: int, value: bool) -> None:
        """Set or clear a single bit, by a positive or negative index."""
        self.bitmaps[which][at] = value

        self.models[which][at] = value
        assert self.bitmaps[which][at] is value

    @rule(which=st.integers(0, 1), operation=st.sampled_from(["and", "or", "xor", "andnot"]))
    def combine(self, which: int, operation: str) -> None:
        """Combine one bitmap with the other."""
        bitmap, other = self.bitmaps[which], self.bitmaps[1 - which]
        a, b = (int.from_bytes(self.models[i], "little") for i in (which, 1 - which))

        if operation == "and":
            bitmap &= other
        elif operation == "or":
            bitmap |= other
        elif operation == "xor":
            bitmap ^= other
        else:
            bitmap -= other

        combined = {"and": a & b, "or": a | b, "xor": a ^ b, "andnot": a & ~b}[operation]
        self.models[which] = bytearray(combined.to_bytes(NBITS, "little"))

    @rule(which=st.integers(0, 1), area=ranges, to=positions)
    def move_a_slice(self, which: int, area: tuple[int, int], to: int) -> None:
        """Assign a slice of one bitmap to the other, at any offset."""
        start, stop = area
        n = min(stop - start, NBITS - to)
        if n == 0:
            return

        with self.bitmaps[which][start : start + n] as part:
            self.bitmaps[1 - which][to : to + n] = part

        self.models[1 - which][to : to + n] = self.models[which][start : start + n]

    @rule(which=st.integers(0, 1))
    def exchange_for_a_copy(self, which: int) -> None:
        """Continue with a copy."""
        copied = self.bitmaps[which].copy()
        self.bitmaps[which].release()
        self.bitmaps[which] = copied

    @rule(which=st.integers(0, 1))
    def exchange_for_its_bytes(self, which: int) -> None:
        """Continue with a bitmap made from its bytes."""
        data = self.bitmaps[which].to_bytes()
        self.bitmaps[which].release()
        self.bitmaps[which] = Bitmap.from_bytes(data, NBITS)

    @rule(which=st.integers(0, 1), run=run_lengths, start=positions, value=st.booleans())
    def find(self, which: int, run: int, start: int, value: bool) -> None:
        """Search for a run."""
        bitmap = self.bitmaps[which]

        result = bitmap.find_set(run, start) if value else bitmap.find_clear(run, start)

        expected = self.models[which].find(bytes([value]) * run, start)
        assert result == (None if expected < 0 else expected)

    @rule(which=st.integers(0, 1), area=ranges)
    def ask_about_a_range(self, which: int, area: tuple[int, int]) -> None:
        """Compare count, any and all."""
        start, stop = area
        bitmap, model = self.bitmaps[which], self.models[which]

        count = model.count(1, start, stop)

        assert bitmap.count(start, stop) == count
        assert bitmap.any(start, stop) == (count > 0)
        assert bitmap.all(start, stop) == (count == stop - start)

    @rule(which=st.integers(0, 1), area=ranges, value=st.booleans())
    def list_runs(self, which: int, area: tuple[int, int], value: bool) -> None:
        """The first runs of a range agree, and they alternate."""
        start, stop = area
        model = self.models[which]

        for number, (low, high) in enumerate(self.bitmaps[which].runs(start, stop, value=value)):
            first = model.find(value, start, stop)
            after = model.find(not value, first, stop)
            assert (low, high) == (first, stop if after < 0 else after)
            start = high
            if number == 20:
                return
        assert model.find(value, start, stop) < 0

    @invariant()
    def the_same_bits_are_set(self) -> None:
        """Both have the same set bits and the same count."""
        for bitmap, model in zip(self.bitmaps, self.models, strict=True):
            assert bitmap.count() == model.count(1)
            first = model.find(1)
            assert bitmap.find_set() == (None if first < 0 else first)

    @invariant()
    def equality_is_that_of_the_models(self) -> None:
        """The two bitmaps are equal exactly if their models are."""
        assert (self.bitmaps[0] == self.bitmaps[1]) == (self.models[0] == self.models[1])

    @invariant()
    def set_bits_are_committed(self) -> None:
        """Set bits lie in committed words, and committed_runs adds up to committed."""
        for bitmap, model in zip(self.bitmaps, self.models, strict=True):
            runs = bitmap.committed_runs()
            assert sum(model.count(1, low, high) for low, high in runs) == model.count(1)
            nbytes = sum(-(-(high - low) // 8) for low, high in runs)
            assert nbytes <= bitmap.committed <= nbytes + PAGE_SIZE


TestBitmapMachine = BitmapMachine.TestCase
TestBitmapMachine.settings = settings(max_examples=examples(30), stateful_step_count=25)
