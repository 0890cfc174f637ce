"""Bitmaps against models in plain Python: bytearrays, bitarrays and sets."""

import contextlib
import gc
import json
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
from bitarray import bitarray
from hypothesis import given
from hypothesis import strategies as st

import pyreserve
from pyreserve import (
    PAGE_SIZE,
    Bitmap,
    KiB,
    MiB,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    ViewError,
)

STEP = max(64 * KiB, PAGE_SIZE) * 8
"""Bits in what is committed at a time."""
ODD = 3 * STEP + 77
"""Bits of a bitmap that is neither whole words nor whole steps."""
SIXTY_FOUR_BITS = sys.maxsize > 2**32

needs_64_bits = pytest.mark.skipif(
    not SIXTY_FOUR_BITS, reason="128 GiB of words need 64-bit addresses"
)

EDGES = [0, 1, 7, 8, 63, 64, 65, 127, 128, 1000, STEP - 1, STEP, STEP + 1, 2 * STEP - 64]
EDGES += [2 * STEP, 2 * STEP + 63, 3 * STEP - 1, 3 * STEP, 3 * STEP + 64, ODD - 1, ODD]

PRELUDE = """
import gc, json, resource
from pathlib import Path
import pyreserve
from pyreserve import Bitmap, KiB, MiB, OutOfMemoryError, PAGE_SIZE

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * KiB

def rss():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Rss:"):
            return int(line.split()[1]) * KiB

def allow(nbytes):
    "Let this process make so much more memory of its addresses, None: any amount."
    most = -1 if nbytes is None else status("VmData") + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, -1))

def state(bits):
    return [bits.count(), bits.committed, bits.committed_runs(), list(bits.runs())[:1000]]

STEP = max(64 * KiB, PAGE_SIZE) * 8
"""


def in_child(script: str) -> Any:
    """Run a script in a fresh interpreter and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def packed(bits: bytes | bytearray) -> bytes:
    """Pack bits, given as one byte each, into bytes; the first bit is the lowest."""
    small = bitarray(endian="little")
    small.pack(bits)
    return small.tobytes()


def unpacked(bits: Bitmap) -> bytearray:
    """Return one byte for each bit of packed bytes."""
    small = bitarray(endian="little")
    small.frombytes(bits.to_bytes())
    return bytearray(small.unpack())[: len(bits)]


class Model:
    """A bytearray with one byte per bit, searched and counted by Python itself."""

    def __init__(self, nbits: int) -> None:
        self.bits = bytearray(nbits)

    def change(self, start: int, stop: int, value: int) -> int:
        """Set or clear a range; return the number of bits that changed."""
        changed = self.bits.count(1 - value, start, stop)
        self.bits[start:stop] = bytes([value]) * (stop - start)
        return changed

    def find(self, value: int, run: int, start: int) -> int | None:
        """Find the first run from `start` up."""
        result = self.bits.find(bytes([value]) * run, start)
        return None if result < 0 else result

    def runs(self, start: int, stop: int, value: int) -> list[tuple[int, int]]:
        """List the runs in a range."""
        result = []
        at = self.bits.find(value, start, stop)
        while at >= 0:
            end = self.bits.find(1 - value, at, stop)
            end = stop if end < 0 else end
            result.append((at, end))
            at = self.bits.find(value, end, stop)
        return result

    def packed(self) -> bytes:
        """Pack the bits into bytes; the first bit is the lowest."""
        return packed(self.bits)


@contextlib.contextmanager
def impatient_threads() -> Iterator[None]:
    """Make the interpreter switch threads as often as it can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def together(*jobs: Callable[[], object]) -> None:
    """Run each job in its own thread, all started at once."""
    barrier = threading.Barrier(len(jobs))

    def run(job: Callable[[], object]) -> None:
        barrier.wait()
        job()

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    with impatient_threads():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def filled(pattern: str) -> tuple[Bitmap, bitarray]:
    """Return a bitmap and a bitarray with the same bits, given as a string of 0 and 1."""
    oracle = bitarray(pattern, endian="little")
    return Bitmap.from_bytes(oracle.tobytes(), len(oracle)), oracle


def text(bits: Bitmap) -> str:
    """Return the bits as a string of 0 and 1."""
    return "".join("1" if bits[i] else "0" for i in range(len(bits)))


patterns = st.text("01", min_size=1, max_size=200)
indices = st.one_of(st.none(), st.integers(-250, 250))
steps = st.one_of(st.none(), st.integers(-70, 70).filter(bool))
slices = st.builds(slice, indices, indices, steps)


class TestMaking:
    def test_all_bits_are_clear_at_first(self) -> None:
        """A new bitmap has its length, no set bit and no committed memory."""
        with Bitmap(ODD) as bits:
            assert len(bits) == bits.nbits == ODD
            assert not bits.any()
            assert bits.count() == 0
            assert bits.committed == 0
            assert bits.committed_runs() == []

    @pytest.mark.parametrize("nbits", [0, -1, -(2**70)])
    def test_a_positive_number_of_bits(self, nbits: int) -> None:
        """A bitmap has at least one bit."""
        with pytest.raises(RangeError, match="positive"):
            Bitmap(nbits)

    @pytest.mark.parametrize("nbits", [1.0, "8", None])
    def test_a_number_of_bits(self, nbits: Any) -> None:
        """nbits must be an integer."""
        with pytest.raises(TypeError):
            Bitmap(nbits)

    @pytest.mark.parametrize("nbits", [2**63, 2**64, 2**70])
    def test_more_bits_than_addresses(self, nbits: int) -> None:
        """A reservation that exceeds the address space is an OutOfMemoryError."""
        with pytest.raises(OutOfMemoryError) as caught:
            Bitmap(nbits)

        assert caught.value.verb == "reserve"

    def test_a_context_ends_with_the_release(self) -> None:
        """Leaving the with block closes the bitmap, also if it was released inside."""
        with Bitmap(8) as bits:
            pass
        with Bitmap(8) as other:
            other.release()

        assert "released" in repr(bits)
        assert "released" in repr(other)

    def test_repr(self) -> None:
        """The repr gives the number of bits and the committed bytes."""
        with Bitmap(1_000_000) as bits:
            assert "1,000,000 bits" in repr(bits)
            assert "0 bytes" in repr(bits)


class TestRanges:
    @pytest.mark.parametrize("start", EDGES)
    def test_set_and_clear_say_how_many_changed(self, start: int) -> None:
        """set and clear change only the bits of the range, and return how many differed."""
        for stop in (edge for edge in EDGES if edge >= start):
            model = Model(ODD)
            with Bitmap(ODD) as bits:
                for low, high in ((100, 70_000), (STEP - 5, STEP + 5), (ODD - 100, ODD)):
                    assert bits.set(low, high) == model.change(low, high, 1)

                assert bits.set(start, stop) == model.change(start, stop, 1)
                assert bits.to_bytes() == model.packed()
                middle = (start + stop) // 2
                assert bits.clear(middle, stop) == model.change(middle, stop, 0)
                assert bits.to_bytes() == model.packed()

    def test_without_a_stop_it_is_one_bit(self) -> None:
        """Without `stop`, set(i) and clear(i) change bit i alone."""
        with Bitmap(130) as bits:
            assert (bits.set(64), bits.set(64)) == (1, 0)
            assert list(bits.runs()) == [(64, 65)]
            assert (bits.clear(64), bits.clear(64)) == (1, 0)
            assert not bits.any()

    def test_test_reads_one_bit(self) -> None:
        """test returns the value of a bit, in committed and in uncommitted words."""
        with Bitmap(ODD) as bits:
            bits.set(STEP + 1, STEP + 64)

            result = [
                at for at in (0, STEP, STEP + 1, STEP + 63, STEP + 64, ODD - 1) if bits.test(at)
            ]

            assert result == [STEP + 1, STEP + 63]

    def test_count_any_and_all_agree_on_every_range(self) -> None:
        """count, any and all of a range agree with a model, also for the empty range."""
        model = Model(ODD)
        with Bitmap(ODD) as bits:
            for low, high in ((60, 70), (STEP - 64, STEP + 64), (3 * STEP, ODD)):
                bits.set(low, high)
                model.change(low, high, 1)

            for start in EDGES:
                for stop in (edge for edge in EDGES if edge >= start):
                    part = model.bits[start:stop]
                    assert bits.count(start, stop) == part.count(1)
                    assert bits.any(start, stop) == any(part)
                    assert bits.all(start, stop) == all(part)

    def test_clearing_commits_nothing(self) -> None:
        """Clearing bits that were never set commits nothing."""
        with Bitmap(ODD) as bits:
            assert bits.clear(0, ODD) == 0
            bits[::3] = False

            assert bits.committed == 0

    @given(
        st.lists(st.tuples(st.integers(0, 700), st.integers(0, 700), st.booleans()), max_size=20)
    )
    def test_any_sequence_of_changes(self, changes: list[tuple[int, int, bool]]) -> None:
        """Any sequence of changes leaves the bits that a model has, with the same counts."""
        model = Model(700)
        with Bitmap(700) as bits:
            for a, b, value in changes:
                start, stop = sorted((a, b))
                change = bits.set if value else bits.clear
                assert change(start, stop) == model.change(start, stop, value)

            assert bits.to_bytes() == model.packed()
            assert bits.count() == model.bits.count(1)


class TestIndexing:
    @given(patterns)
    def test_every_index(self, pattern: str) -> None:
        """Indices from -n to n - 1 give bools, as for a list."""
        bits, oracle = filled(pattern)
        n = len(pattern)

        result = [bits[i] for i in range(-n, n)]

        assert result == [bool(oracle[i]) for i in range(-n, n)]
        assert all(isinstance(bit, bool) for bit in result)
        bits.release()

    @given(patterns)
    def test_iteration_gives_every_bit_once(self, pattern: str) -> None:
        """Iterating and reversing yield the bits in order."""
        bits, _ = filled(pattern)

        sequence: Any = bits
        assert [int(bit) for bit in sequence] == [int(bit) for bit in pattern]
        assert [int(bit) for bit in reversed(sequence)] == [int(bit) for bit in pattern[::-1]]
        bits.release()

    @given(patterns, slices)
    def test_slices(self, pattern: str, key: slice) -> None:
        """A slice is a bitmap with the bits of the same slice of a bitarray; its step is 1."""
        bits, oracle = filled(pattern)

        if key.step not in {None, 1}:
            with pytest.raises(RangeError, match=rf"must have step 1, got {key.step}"):
                bits[key]
        elif len(oracle[key]) == 0:
            with pytest.raises(RangeError, match="at least one bit"):
                bits[key]
        else:
            part = bits[key]
            assert isinstance(part, Bitmap)
            assert text(part) == oracle[key].to01()
            part.release()
        bits.release()

    @given(patterns, slices, st.booleans())
    def test_a_bool_goes_to_all_of_a_slice(self, pattern: str, key: slice, value: bool) -> None:
        """Assigning a bool changes exactly the bits of the slice, for any step."""
        bits, oracle = filled(pattern)

        bits[key] = value

        oracle[key] = value
        assert text(bits) == oracle.to01()
        bits.release()

    @given(patterns, indices, indices, st.data())
    def test_a_bitmap_replaces_a_slice(
        self, pattern: str, start: int | None, stop: int | None, data: st.DataObject
    ) -> None:
        """Assigning a bitmap of the slice's length replaces these bits and no others."""
        bits, oracle = filled(pattern)
        n = len(oracle[start:stop])
        if n == 0:
            return
        other, other_oracle = filled(data.draw(st.text("01", min_size=n, max_size=n)))

        bits[start:stop] = other

        oracle[slice(*slice(start, stop).indices(len(oracle)))] = other_oracle
        assert text(bits) == oracle.to01()
        bits.release()
        other.release()

    def test_single_bits_are_assigned(self) -> None:
        """bitmap[i] = value sets and clears one bit, also for negative indices."""
        with Bitmap(200) as bits:
            bits[3] = True
            bits[-1] = 1  # type: ignore[assignment]
            bits[70] = True
            bits[70] = False

            assert list(bits.runs()) == [(3, 4), (199, 200)]

    @pytest.mark.parametrize("step", [1, 2, 63, 64, 65, STEP - 1, STEP, STEP + 1, ODD])
    def test_steps_across_uncommitted_words(self, step: int) -> None:
        """Strides over words and over commit steps reach the right bits."""
        with Bitmap(ODD) as bits:
            bits[5::step] = True

            model = bytearray(ODD)
            model[5::step] = b"\1" * len(range(5, ODD, step))
            assert bits.to_bytes() == packed(model)
            bits[5 + step :: 2 * step] = False
            model[5 + step :: 2 * step] = bytes(len(range(5 + step, ODD, 2 * step)))
            assert bits.to_bytes() == packed(model)

    @pytest.mark.parametrize("start", [0, 1, 63, STEP - 1, STEP + 1])
    def test_long_slices(self, start: int) -> None:
        """A slice over committed and uncommitted words has the right bits."""
        with Bitmap(ODD) as bits:
            bits.set(50, 5000)
            bits.set(2 * STEP - 300, 2 * STEP + 300)
            bits[2 * STEP : ODD : 3] = True
            model = unpacked(bits)

            with bits[start:] as part:
                assert unpacked(part) == model[start:]

    @pytest.mark.parametrize(
        "step", [10**6, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**64 + 3, 2**70]
    )
    @pytest.mark.parametrize("sign", [1, -1])
    def test_steps_beyond_every_bit(self, step: int, sign: int) -> None:
        """With a step larger than the bitmap, an assignment sets or clears the first bit alone."""
        with Bitmap(100) as bits:
            bits[5 :: sign * step] = True

            assert list(bits.runs()) == [(5, 6)]
            with pytest.raises(RangeError, match="must have step 1"):
                bits[5 :: sign * step]
            bits[5 :: sign * step] = False
            assert not bits.any()

    def test_a_slice_is_a_copy(self) -> None:
        """A slice and a copy are independent of the original."""
        with Bitmap(100) as bits:
            bits.set(10, 20)
            part, whole = bits[5:15], bits.copy()

            part.set(0, 10)
            whole.clear(0, 100)
            bits.set(90)

            assert list(bits.runs()) == [(10, 20), (90, 91)]
            assert not whole.any()
            assert part.all()

    def test_a_copy_commits_only_where_the_original_did(self) -> None:
        """A copy of a sparse bitmap commits as little."""
        with Bitmap(64 * STEP) as bits:
            bits.set(40 * STEP)

            with bits.copy() as copied:
                assert copied == bits
                assert copied.committed == bits.committed == STEP // 8

    def test_an_empty_slice_takes_a_bool(self) -> None:
        """Assigning a bool to an empty slice changes nothing."""
        with Bitmap(100) as bits:
            bits[50:50] = True
            bits[60:50] = True

            assert not bits.any()
            assert bits.committed == 0


class TestSearching:
    @pytest.mark.parametrize("run", [1, 2, 63, 64, 65, 128, 129, 1000])
    def test_runs_that_cross_words(self, run: int) -> None:
        """A run is found at any position in its words; a run one bit shorter is not."""
        with Bitmap(4096) as bits:
            for at in (0, 1, 62, 63, 64, 65, 191, 1000):
                bits.clear(0, 4096)
                bits.set(at, at + run)
                assert bits.find_set(run) == at
                assert bits.find_set(run + 1) is None
                bits.set(0, 4096)
                bits.clear(at, at + run)
                assert bits.find_clear(run) == at
                assert bits.find_clear(run + 1) is None

    @pytest.mark.parametrize("border", [STEP, 2 * STEP, 3 * STEP])
    def test_runs_that_cross_committed_borders(self, border: int) -> None:
        """A run of clear bits is one run, even if only some of its words are committed."""
        with Bitmap(4 * STEP) as bits:
            bits.set(border - 200, border - 100)

            assert bits.find_clear(200, border - 150) == border - 100
            assert bits.find_clear(border - 200) == 0
            assert bits.find_clear(border - 199) == (
                border - 100 if 4 * STEP - border + 100 >= border - 199 else None
            )
            assert bits.find_clear(4 * STEP - border + 100, 1000) == (
                1000 if border - 1200 >= 4 * STEP - border + 100 else border - 100
            )

    def test_set_runs_that_cross_steps(self) -> None:
        """A run of set bits over two commit steps is one run."""
        with Bitmap(4 * STEP) as bits:
            bits.set(2 * STEP, 2 * STEP + 10)
            bits.set(2 * STEP - 10, 2 * STEP)

            assert bits.find_set(20) == 2 * STEP - 10
            assert bits.find_set(21) is None
            assert list(bits.runs()) == [(2 * STEP - 10, 2 * STEP + 10)]

    def test_the_end_ends_a_run(self) -> None:
        """No run extends beyond the last bit, even inside its word."""
        with Bitmap(100) as bits:
            assert bits.find_clear(100) == 0
            assert bits.find_clear(101) is None
            assert bits.find_clear(1, 100) is None
            bits.set(0, 100)
            assert bits.find_set(100) == 0
            assert bits.find_set(10, 91) is None
            assert bits.find_set(10, 90) == 90
            assert bits.find_clear() is None

    @given(
        st.lists(st.tuples(st.integers(0, 999), st.integers(1, 200)), max_size=8),
        st.integers(1, 300),
        st.integers(0, 1000),
    )
    def test_finding_is_the_models(
        self, areas: list[tuple[int, int]], run: int, start: int
    ) -> None:
        """find_set and find_clear return what a search through bytes returns."""
        model = Model(1000)
        with Bitmap(1000) as bits:
            for low, length in areas:
                bits.set(low, min(1000, low + length))
                model.change(low, min(1000, low + length), 1)

            assert bits.find_set(run, start) == model.find(1, run, start)
            assert bits.find_clear(run, start) == model.find(0, run, start)

    @given(
        st.lists(st.tuples(st.integers(0, 999), st.integers(1, 90)), max_size=12),
        st.integers(0, 1000),
        st.integers(0, 1000),
        st.booleans(),
    )
    def test_runs_are_the_models(
        self, areas: list[tuple[int, int]], a: int, b: int, value: bool
    ) -> None:
        """The runs of a range, of set and of clear bits, agree with a model."""
        start, stop = sorted((a, b))
        model = Model(1000)
        with Bitmap(1000) as bits:
            for low, length in areas:
                bits.set(low, min(1000, low + length))
                model.change(low, min(1000, low + length), 1)

            result = list(bits.runs(start, stop, value=value))

        assert result == model.runs(start, stop, value)

    @pytest.mark.parametrize("value", [True, False])
    def test_thousands_of_runs(self, value: bool) -> None:
        """Thousands of runs are complete and in order."""
        with Bitmap(10_000) as bits:
            bits[::2] = True

            result = list(bits.runs(value=value))

            first = 0 if value else 1
            assert result == [(i, i + 1) for i in range(first, 10_000, 2)]

    @pytest.mark.parametrize("n", [255, 256, 257, 512])
    def test_as_many_runs_as_are_fetched_at_once(self, n: int) -> None:
        """No run is lost or repeated at the boundary of two batches."""
        with Bitmap(4 * n) as bits:
            bits[0 : 4 * n : 4] = True

            assert list(bits.runs()) == [(4 * i, 4 * i + 1) for i in range(n)]
            assert list(bits.runs(0, 4 * n - 3)) == [(4 * i, 4 * i + 1) for i in range(n)]
            assert list(bits.runs(value=False)) == [(4 * i + 1, 4 * i + 4) for i in range(n)]

    def test_runs_across_uncommitted_words(self) -> None:
        """Clear runs extend over uncommitted words, and searching commits none of them."""
        with Bitmap(ODD) as bits:
            bits.set(STEP + 100, STEP + 200)
            before = bits.committed

            assert list(bits.runs(value=False)) == [(0, STEP + 100), (STEP + 200, ODD)]
            assert list(bits.runs(50, 60, value=False)) == [(50, 60)]
            assert list(bits.runs(5, 5)) == []
            assert bits.committed == before


OPERATIONS: dict[str, tuple[Callable[[Bitmap, Bitmap], Any], Callable[[int, int], int]]] = {
    "&=": (Bitmap.__iand__, lambda a, b: a & b),
    "|=": (Bitmap.__ior__, lambda a, b: a | b),
    "^=": (Bitmap.__ixor__, lambda a, b: a ^ b),
    "-=": (Bitmap.__isub__, lambda a, b: a & ~b),
    "andnot": (Bitmap.andnot, lambda a, b: a & ~b),
}


@pytest.mark.parametrize("name", OPERATIONS)
class TestCombining:
    @given(data=st.data(), pattern=patterns)
    def test_bits_of_both(self, name: str, pattern: str, data: st.DataObject) -> None:
        """Each operation combines bit by bit and changes the left operand alone."""
        combine, expected = OPERATIONS[name]
        n = len(pattern)
        other_pattern = data.draw(st.text("01", min_size=n, max_size=n))
        (bits, _), (other, _) = filled(pattern), filled(other_pattern)

        combine(bits, other)

        want = expected(int(pattern, 2), int(other_pattern, 2))
        assert text(bits) == f"{want:0{n}b}"
        assert text(other) == other_pattern
        bits.release()
        other.release()

    def test_words_committed_in_one_operand(self, name: str) -> None:
        """Words that are uncommitted in one operand count as clear there."""
        combine, expected = OPERATIONS[name]
        with Bitmap(ODD) as bits, Bitmap(ODD) as other:
            bits.set(10, 20)
            bits.set(STEP - 7, STEP + 7)
            other.set(15, 25)
            other.set(2 * STEP + 3, 2 * STEP + 99)
            other.set(ODD - 3, ODD)
            a, b = (int.from_bytes(each.to_bytes(), "little") for each in (bits, other))

            combine(bits, other)

            assert int.from_bytes(bits.to_bytes(), "little") == expected(a, b)
            assert int.from_bytes(other.to_bytes(), "little") == b

    def test_with_itself(self, name: str) -> None:
        """A bitmap combines with itself as with an equal bitmap."""
        combine, expected = OPERATIONS[name]
        with Bitmap(ODD) as bits:
            bits.set(STEP - 7, STEP + 7)
            a = int.from_bytes(bits.to_bytes(), "little")

            combine(bits, bits)

            assert int.from_bytes(bits.to_bytes(), "little") == expected(a, a)

    def test_as_many_bits_are_needed(self, name: str) -> None:
        """Bitmaps of different lengths are a RangeError, and neither changes."""
        combine, _ = OPERATIONS[name]
        with Bitmap(100) as bits, Bitmap(101) as other:
            bits.set(5)
            other.set(6)

            with pytest.raises(RangeError, match="100 and 101"):
                combine(bits, other)

            assert list(bits.runs()) == [(5, 6)]

    def test_memory_is_taken_only_for_the_others_bits(self, name: str) -> None:
        """An operation commits only words that the other has committed, and only to set bits."""
        combine, _ = OPERATIONS[name]
        with Bitmap(64 * STEP) as bits, Bitmap(64 * STEP) as other:
            bits.set(0)
            other.set(63 * STEP)

            combine(bits, other)

            adds = name in {"|=", "^="}
            assert bits.committed == (2 if adds else 1) * STEP // 8


class TestOperators:
    def test_the_operators_are_the_methods(self) -> None:
        """&=, |=, ^= and -= change the bitmap in place."""
        with Bitmap(8) as same, Bitmap(8) as other:
            bits = same
            other.set(2, 6)
            bits.set(0, 4)

            bits |= other
            assert text(bits) == "11111100"
            bits ^= other
            assert text(bits) == "11000000"
            bits.set(0, 4)
            bits &= other
            assert text(bits) == "00110000"
            bits -= other
            assert text(bits) == "00000000"

            assert bits is same

    @pytest.mark.parametrize("other", [3, "101", b"1", None, {1}])
    def test_only_bitmaps_combine(self, other: Any) -> None:
        """An operand that is not a Bitmap is a TypeError."""
        bits = Bitmap(8)

        with pytest.raises(TypeError):
            bits |= other
        with pytest.raises(TypeError):
            bits &= other
        with pytest.raises(TypeError):
            bits.andnot(other)

        bits.release()


class TestEquality:
    def test_equal_bits_are_equal(self) -> None:
        """Equality compares the bits, whichever words are committed."""
        with Bitmap(ODD) as bits, Bitmap(ODD) as other:
            assert bits == other
            assert bits == bits  # noqa: PLR0124
            bits.set(STEP, 2 * STEP)
            assert bits != other
            bits.clear(STEP, 2 * STEP)
            assert bits == other
            other.set(ODD - 1)
            assert bits != other
            bits.set(ODD - 1)
            assert bits == other

    @pytest.mark.parametrize("at", [0, 63, 64, STEP - 1, STEP, 3 * STEP, ODD - 1])
    def test_one_bit_makes_a_difference(self, at: int) -> None:
        """A single different bit makes bitmaps unequal, at any position."""
        with Bitmap(ODD) as bits, Bitmap(ODD) as other:
            bits.set(0, ODD)
            other.set(0, ODD)

            other.clear(at)

            assert bits != other
            assert other != bits

    def test_bits_beyond_the_end_do_not_count(self) -> None:
        """Bits above `nbits`, written through a view, do not affect equality."""
        with Bitmap(70) as bits, Bitmap(70) as other:
            bits.set(0, 70)
            other.set(0, 70)
            words = bits.words()
            words[1] = 2**64 - 1
            words.release()
            del words

            assert bits == other
            assert bits.count() == 70
            assert bits.find_set(71) is None
            assert bits.to_bytes() == other.to_bytes()
            gc.collect()

    def test_lengths_and_kinds_differ(self) -> None:
        """A bitmap of another length, or another type, is not equal."""
        with Bitmap(8) as bits, Bitmap(9) as other:
            assert bits != other
            assert bits != bytes(8)
            assert (bits == 0) is False

    def test_there_is_no_hash(self) -> None:
        """A bitmap is unhashable, since it is mutable."""
        with Bitmap(8) as bits, pytest.raises(TypeError, match="unhashable"):
            hash(bits)

    def test_it_is_not_pickled(self) -> None:
        """Pickling is a TypeError that names to_bytes."""
        with Bitmap(8) as bits, pytest.raises(TypeError, match="to_bytes"):
            pickle.dumps(bits)


class TestBytes:
    @given(st.binary(min_size=1, max_size=300), st.integers(0, 7))
    def test_there_and_back(self, data: bytes, less: int) -> None:
        """from_bytes takes the first bits, and to_bytes returns them with the rest clear."""
        nbits = 8 * len(data) - less
        oracle = bitarray(endian="little")
        oracle.frombytes(data)

        with Bitmap.from_bytes(data, nbits) as bits:
            assert len(bits) == nbits
            assert text(bits) == oracle[:nbits].to01()
            assert bits.to_bytes() == oracle[:nbits].tobytes()

    @given(st.binary(min_size=1, max_size=100), st.data())
    def test_any_range(self, data: bytes, draw: st.DataObject) -> None:
        """to_bytes of a range puts the first bit of the range lowest."""
        n = 8 * len(data)
        start, stop = sorted((draw.draw(st.integers(0, n)), draw.draw(st.integers(0, n))))
        oracle = bitarray(endian="little")
        oracle.frombytes(data)

        with Bitmap.from_bytes(data) as bits:
            assert bits.to_bytes(start, stop) == oracle[start:stop].tobytes()

    def test_ranges_across_uncommitted_words(self) -> None:
        """Uncommitted words read as clear, and reading does not commit them."""
        with Bitmap(ODD) as bits:
            bits.set(STEP - 3, STEP)
            before = bits.committed

            data = bits.to_bytes(STEP - 5, STEP + 20)

            assert data == bytes([0b00011100, 0, 0, 0])
            assert bits.to_bytes(5, 5) == b""
            assert bits.committed == before

    @pytest.mark.parametrize(
        "data",
        [
            bytearray(b"\x01\x80"),
            memoryview(b"\x01\x80"),
            memoryview(bytearray(b"\x01\x80")).cast("H"),
            memoryview(b"\xff\x01\x80\xff")[1:3],
        ],
    )
    def test_anything_like_bytes(self, data: Any) -> None:
        """from_bytes accepts any buffer, whatever its item type."""
        with Bitmap.from_bytes(data) as bits:
            assert list(bits.runs()) == [(0, 1), (15, 16)]

    def test_clear_bytes_commit_nothing(self) -> None:
        """from_bytes of zero bytes commits nothing."""
        with Bitmap.from_bytes(bytes(STEP)) as bits:
            assert (len(bits), bits.committed) == (8 * STEP, 0)

    def test_clear_bytes_between_others_commit_nothing(self) -> None:
        """from_bytes commits nothing for long zeros between set bits."""
        data = bytearray(16 * STEP // 8)
        data[0] = data[-1] = 1

        with Bitmap.from_bytes(data) as bits:
            assert bits.count() == 2
            assert bits.committed == 2 * STEP // 8

    @pytest.mark.parametrize(("data", "nbits"), [(b"", None), (b"", 0), (b"a", 9), (b"a", 0)])
    def test_bits_that_are_not_there(self, data: bytes, nbits: int | None) -> None:
        """nbits above the length of the data, or not positive, is a RangeError."""
        with pytest.raises(RangeError):
            Bitmap.from_bytes(data, nbits)

    def test_only_bytes(self) -> None:
        """An object without a buffer is a TypeError."""
        with pytest.raises(TypeError):
            Bitmap.from_bytes("0101")  # type: ignore[arg-type]


class TestWords:
    def test_a_bitarray_reads_and_writes_them(self) -> None:
        """A bitarray over the words shares its bits with the bitmap, in both directions."""
        with Bitmap(2 * STEP) as bits:
            bits.set(0, 2 * STEP)
            bits.clear(0, 2 * STEP)
            bits.set(100, 200)

            shared = bitarray(buffer=bits.words(), endian="little")

            assert len(shared) == 2 * STEP
            assert shared.count() == 100
            assert shared[100:200].all()
            shared[STEP : STEP + 5] = True
            assert list(bits.runs()) == [(100, 200), (STEP, STEP + 5)]
            bits.set(7)
            assert shared[7] == 1
            del shared
            gc.collect()

    def test_sixty_four_bits_an_item(self) -> None:
        """An item of the view is a 64-bit word; a range selects words."""
        with Bitmap(4 * 64) as bits:
            bits.set(64, 68)
            bits.set(255)

            whole, part = bits.words(), bits.words(64, 128)

            assert (whole.format, whole.itemsize, len(whole)) == ("Q", 8, 4)
            assert list(whole) == [0, 15, 0, 1 << 63]
            assert list(part) == [15]
            del whole, part
            gc.collect()

    def test_the_last_word_may_be_unfinished(self) -> None:
        """The range may end at the end of the bitmap inside a word."""
        with Bitmap(70) as bits:
            bits.set(69)

            words = bits.words(64)

            assert list(words) == [1 << 5]
            del words
            gc.collect()

    def test_a_readonly_view_can_not_be_written(self) -> None:
        """A read-only view can't be written to."""
        with Bitmap(64) as bits:
            bits.set(0)
            words = bits.words(readonly=True)

            with pytest.raises(TypeError):
                words[0] = 0

            assert bits[0]
            del words
            gc.collect()

    @pytest.mark.parametrize(("start", "stop"), [(1, 128), (0, 100), (64, 64), (0, 65)])
    def test_only_whole_words(self, start: int, stop: int) -> None:
        """An empty range, or one that is not whole words, is a RangeError."""
        with Bitmap(1000) as bits:
            bits.set(0, 1000)

            with pytest.raises(RangeError, match="whole 64-bit words"):
                bits.words(start, stop)

    def test_only_committed_words(self) -> None:
        """Uncommitted words can't be viewed; their committed neighbours can."""
        with Bitmap(3 * STEP) as bits:
            bits.set(STEP)

            with pytest.raises(RangeError):
                bits.words()
            ((start, stop),) = bits.committed_runs()
            words = bits.words(start, stop)

            assert (start, stop) == (STEP, 2 * STEP)
            assert sum(words) == 1
            del words
            gc.collect()

    @pytest.mark.parametrize("hold", ["view", "slice", "bitarray"])
    def test_no_release_under_a_live_view(self, hold: str) -> None:
        """An object made from the words keeps the bitmap from being released."""
        bits = Bitmap(ODD)
        bits.set(0, ODD)
        views: list[object] = [bits.words()]
        if hold == "slice":
            views = [bits.words()[5:7]]
        elif hold == "bitarray":
            views = [bitarray(buffer=bits.words(), endian="little")]

        with pytest.raises(ViewError, match="1 live view"):
            bits.release()

        assert bits.count() == ODD
        views.clear()
        gc.collect()
        bits.release()


class TestBadInput:
    @pytest.mark.parametrize(
        ("start", "stop"),
        [(-1, 5), (0, 101), (6, 5), (101, 101), (2**64, 2**64 + 1), (-(2**70), 1)],
    )
    def test_ranges_outside(self, start: int, stop: int) -> None:
        """A range outside the bitmap raises RangeError from every method that takes one."""
        with Bitmap(100) as bits:
            for method in (
                bits.set,
                bits.clear,
                bits.count,
                bits.any,
                bits.all,
                bits.to_bytes,
                bits.words,
            ):
                with pytest.raises(RangeError, match="range must satisfy"):
                    method(start, stop)
            for value in (True, False):
                with pytest.raises(RangeError, match="range must satisfy"):
                    list(bits.runs(start, stop, value=value))
            assert bits.committed == 0

    @pytest.mark.parametrize("at", [-1, 100, 2**64, 2**70])
    def test_single_bits_outside(self, at: int) -> None:
        """A bit outside the bitmap raises RangeError from the methods."""
        with Bitmap(100) as bits:
            for method in (bits.set, bits.clear, bits.test):
                with pytest.raises(RangeError):
                    method(at)

    @pytest.mark.parametrize("at", [-101, 100, 2**64, -(2**70)])
    def test_indices_outside(self, at: int) -> None:
        """An index outside the bitmap raises IndexError from the brackets."""
        with Bitmap(100) as bits:
            with pytest.raises(IndexError, match="index must be in"):
                bits[at]
            with pytest.raises(IndexError, match="index must be in"):
                bits[at] = True

    @pytest.mark.parametrize("run", [0, -1])
    def test_runs_without_length(self, run: int) -> None:
        """A run to find must have a positive length."""
        with Bitmap(100) as bits:
            for find in (bits.find_set, bits.find_clear):
                with pytest.raises(RangeError, match="positive"):
                    find(run)

    @pytest.mark.parametrize("start", [-1, 101])
    def test_searches_outside(self, start: int) -> None:
        """A search must start inside the bitmap or at its end."""
        with Bitmap(100) as bits:
            for find in (bits.find_set, bits.find_clear):
                with pytest.raises(RangeError):
                    find(1, start)

    @pytest.mark.parametrize("run", [101, 2**64, 2**70])
    def test_runs_longer_than_the_bitmap(self, run: int) -> None:
        """A run longer than the bitmap, by any amount, is not found."""
        with Bitmap(100) as bits:
            assert bits.find_clear(run) is None
            assert bits.find_set(run) is None

    @pytest.mark.parametrize("wrong", [1.0, "1", None, b"1", [1]])
    def test_arguments_that_are_not_integers(self, wrong: Any) -> None:
        """An argument that is not an integer is a TypeError everywhere."""
        with Bitmap(100) as bits:
            for call in (bits.set, bits.clear, bits.test, bits.count, bits.find_set):
                with pytest.raises(TypeError):
                    call(wrong)
            with pytest.raises(TypeError):
                bits.find_clear(1, wrong)
            with pytest.raises(TypeError):
                bits[wrong]
            with pytest.raises(TypeError):
                bits[wrong] = True

    @pytest.mark.parametrize("value", [2, -1, "1", None, [True]])
    def test_values_that_are_not_booleans(self, value: Any) -> None:
        """A value other than True or False is a TypeError, and nothing changes."""
        with Bitmap(100) as bits:
            with pytest.raises(TypeError, match="True, False"):
                bits[5] = value
            with pytest.raises(TypeError, match="True, False"):
                bits[5:9] = value

            assert not bits.any()

    @pytest.mark.parametrize("key", [slice(0, 4), slice(0, 6), slice(0, 10, 2), slice(5, 0, -1)])
    def test_slices_are_replaced_by_as_many_neighbours(self, key: slice) -> None:
        """A bitmap can be assigned only to a slice of its length with step 1."""
        with Bitmap(100) as bits, Bitmap(5) as other:
            other.set(0, 5)

            with pytest.raises(RangeError, match=r"Bitmap assigned|step 1"):
                bits[key] = other

            assert not bits.any()

    def test_a_step_of_zero(self) -> None:
        """A slice with step 0 is a ValueError."""
        with Bitmap(100) as bits:
            with pytest.raises(ValueError, match="zero"):
                bits[::0]
            with pytest.raises(ValueError, match="zero"):
                bits[::0] = True


def _assign(bits: Bitmap, key: int | slice, value: bool | Bitmap) -> None:
    bits[key] = value


AFTERWARDS: dict[str, Callable[[Bitmap], object]] = {
    "set": lambda bits: bits.set(3),
    "set nothing": lambda bits: bits.set(3, 3),
    "clear": lambda bits: bits.clear(3),
    "test": lambda bits: bits.test(3),
    "count": lambda bits: bits.count(),
    "count nothing": lambda bits: bits.count(3, 3),
    "any": lambda bits: bits.any(),
    "all": lambda bits: bits.all(3, 3),
    "find_set": lambda bits: bits.find_set(),
    "find_clear": lambda bits: bits.find_clear(),
    "find what is too long": lambda bits: bits.find_clear(1000),
    "runs": lambda bits: list(bits.runs()),
    "runs of nothing": lambda bits: list(bits.runs(3, 3)),
    "index": lambda bits: bits[3],
    "slice": lambda bits: bits[3:5],
    "iterate": lambda bits: next(iter(cast("Any", bits))),
    "assign": lambda bits: _assign(bits, 3, True),
    "assign a slice": lambda bits: _assign(bits, slice(3, 9), True),
    "assign to nothing": lambda bits: _assign(bits, slice(3, 3), True),
    "assign a bitmap": lambda bits: _assign(bits, slice(3, 11), Bitmap(8)),
    "assign itself": lambda bits: _assign(bits, slice(None), bits),
    "copy": lambda bits: bits.copy(),
    "to_bytes": lambda bits: bits.to_bytes(),
    "to_bytes of nothing": lambda bits: bits.to_bytes(3, 3),
    "words": lambda bits: bits.words(),
    "committed": lambda bits: bits.committed,
    "committed_runs": lambda bits: bits.committed_runs(),
    "|=": lambda bits: bits.__ior__(Bitmap(100)),
    "&= itself": lambda bits: bits.__iand__(bits),
    "andnot": lambda bits: bits.andnot(Bitmap(100)),
    "be combined": lambda bits: Bitmap(100).__ior__(bits),
    "==": lambda bits: bits == Bitmap(100),
    "== another length": lambda bits: bits == Bitmap(101),
    "be compared": lambda bits: Bitmap(100) == bits,
    "be assigned": lambda bits: _assign(Bitmap(100), slice(None), bits),
    "with": lambda bits: bits.__enter__(),
    "release": lambda bits: bits.release(),
}


class TestAfterRelease:
    @pytest.mark.parametrize("name", AFTERWARDS)
    def test_everything_is_refused(self, name: str) -> None:
        """Every use of a released bitmap raises ReleasedError."""
        bits = Bitmap(100)
        bits.set(0, 100)
        bits.release()

        with Bitmap(100) as other:
            with pytest.raises(ReleasedError):
                AFTERWARDS[name](bits)

            assert not other.any()

    def test_running_iterators_end(self) -> None:
        """An iterator that outlives the bitmap raises ReleasedError."""
        bits = Bitmap(10_000)
        bits[::2] = True
        runs = bits.runs()
        next(runs)
        bits.release()

        with pytest.raises(ReleasedError):
            list(runs)


@needs_64_bits
class TestHugeBitmaps:
    def test_a_trillion_bits_cost_nothing(self) -> None:
        """2**40 bits with one set at each end take less than 100 KiB in total."""
        result = in_child(
            """
            def use(n):
                with Bitmap(n) as bits:
                    bits.set(0)
                    bits.set(n - 1)
                    answers = [bits.count(), bits.find_set(1, 1), bits.find_clear(n - 2),
                               bits.find_clear(n - 1), bits.committed, bits.committed_runs()]
                    return answers, rss()

            use(2**30)
            rss()
            before = rss()
            answers, held = use(2**40)
            print(json.dumps({"answers": answers, "grown": held - before, "step": STEP}))
            """
        )

        n, step = 2**40, result["step"]
        assert result["answers"] == [2, n - 1, 1, None, step // 4, [[0, step], [n - step, n]]]
        assert result["grown"] < 100 * KiB

    def test_reading_searching_and_clearing_commit_nothing(self) -> None:
        """Only setting bits commits memory, also among 2**40 bits."""
        n = 2**40
        with Bitmap(n) as bits, Bitmap(n) as other:
            assert not bits.test(n // 2)
            assert bits.count() == bits.clear(0, n) == 0
            assert bits.find_set() is None
            assert (bits.find_clear(n), bits.find_clear(1, n - 1)) == (0, n - 1)
            assert not bits.any()
            assert not bits.all()
            assert list(bits.runs()) == []
            assert list(bits.runs(value=False)) == [(0, n)]
            assert bits.to_bytes(n - 80, n) == bytes(10)
            bits[::3] = False
            for combine, _ in OPERATIONS.values():
                combine(bits, other)
            assert bits == other
            assert bits.copy() == bits

            assert bits.committed == other.committed == 0

    def test_far_ends(self) -> None:
        """Bits far apart are counted, found, compared and copied across the gap."""
        n = 2**40
        with Bitmap(n) as bits:
            bits.set(0, 10)
            bits.set(n - 10, n)

            assert bits.count() == 20
            assert list(bits.runs()) == [(0, 10), (n - 10, n)]
            assert list(bits.runs(value=False)) == [(10, n - 10)]
            assert bits.find_set(1, 10) == n - 10
            assert bits.find_clear(n - 20) == 10
            assert bits.find_clear(n - 19) is None
            assert bits[-1]
            with bits[5 : n - 5] as inner:
                assert list(inner.runs()) == [(0, 5), (n - 15, n - 10)]
            assert bits.clear(5, n - 5) == 10
            assert bits.committed == 2 * STEP // 8


class TestRefusedCommits:
    """Each test runs in its own interpreter, which lowers RLIMIT_DATA."""

    def test_a_range(self) -> None:
        """A refused set changes no bit, commits nothing and names the limit."""
        result = in_child(
            """
            with Bitmap(8 * 256 * MiB) as bits:
                bits.set(1000, 2000)
                before = state(bits)
                allow(8 * MiB)
                try:
                    bits.set(0, 8 * 256 * MiB)
                except OutOfMemoryError as error:
                    refused = [error.verb, error.limit, isinstance(error, MemoryError)]
                after = state(bits)
                allow(None)
                changed = bits.set(0, 8 * 64 * MiB)
            print(json.dumps([refused, before, after, changed]))
            """
        )

        refused, before, after, changed = result
        assert refused == ["commit", "RLIMIT_DATA", True]
        assert after == before
        assert changed == 8 * 64 * MiB - 1000

    @pytest.mark.parametrize(
        "change",
        [
            "bits |= other",
            "bits ^= other",
            "bits[:] = other",
            "bits[:: STEP] = True",
            "bits[STEP // 2 :: 3 * STEP] = True",
        ],
    )
    def test_several_pieces(self, change: str) -> None:
        """A change of many pieces that is refused half way decommits what it committed."""
        result = in_child(
            f"""
            n = 400 * STEP * 2
            with Bitmap(n) as bits, Bitmap(n) as other:
                other[::2 * STEP] = True
                bits.set(10, 20)
                bits.set(n // 2 + 3 * STEP, n // 2 + 3 * STEP + 10)
                before = state(bits), state(other)
                allow(8 * MiB)
                try:
                    {change}
                except OutOfMemoryError as error:
                    refused = error.limit
                after = state(bits), state(other)
                allow(None)
                {change}
                count = bits.count()
            print(json.dumps([refused, before, after, count]))
            """
        )

        refused, before, after, count = result
        assert refused == "RLIMIT_DATA"
        assert after == before
        assert count >= 267

    @pytest.mark.parametrize(
        "make", ["Bitmap.from_bytes(data)", "big.copy()", "big[:-1]", "big[5:]"]
    )
    def test_new_bitmaps(self, make: str) -> None:
        """A bitmap that can't be filled is not created and leaves no mapping."""
        result = in_child(
            f"""
            if {"data" in make}:
                data = b"\\xff" * (64 * MiB)
            else:
                big = Bitmap(200 * STEP)
                big[::STEP] = True
            allow(4 * MiB)

            def attempt():
                try:
                    {make}
                except OutOfMemoryError as error:
                    limit = error.limit
                gc.collect()
                return limit, status("VmSize")

            attempts = [attempt() for _ in range(4)]
            print(json.dumps(attempts))
            """
        )

        assert {limit for limit, _ in result} == {"RLIMIT_DATA"}
        assert result[-1][1] == result[-2][1]


class TestThreads:
    def test_disjoint_bits(self) -> None:
        """Two threads that set neighbouring bits of the same words lose none of them."""
        n = 4096
        with Bitmap(n) as bits:

            def set_every_other(first: int) -> Callable[[], object]:
                return lambda: [bits.set(i) for i in range(first, n, 2)]

            together(set_every_other(0), set_every_other(1))

            assert bits.all()

    def test_overlapping_ranges(self) -> None:
        """A bit that several threads set is counted as changed by exactly one of them."""
        n = 4 * STEP
        with Bitmap(n) as bits:
            changed: list[int] = []

            def set_all(chunk: int) -> Callable[[], object]:
                return lambda: changed.append(
                    sum(bits.set(at, min(n, at + chunk)) for at in range(0, n, chunk))
                )

            together(set_all(1000), set_all(1777), set_all(n))

            assert bits.all()
            assert sum(changed) == n

    def test_setting_and_clearing(self) -> None:
        """Setting in one thread and clearing in another add up to the bits that are left."""
        n = 2048
        with Bitmap(n) as bits:
            tally: list[int] = []

            def flip(rounds: int) -> Callable[[], object]:
                def run() -> None:
                    for i in range(rounds):
                        tally.append(bits.set(i % n, min(n, i % n + 100)))
                        tally.append(-bits.clear((i * 7) % n, min(n, (i * 7) % n + 50)))

                return run

            together(flip(600), flip(900))

            assert sum(tally) == bits.count()

    def test_combining_both_ways(self) -> None:
        """Two threads that combine the same two bitmaps in opposite order do not deadlock."""
        with Bitmap(ODD) as left, Bitmap(ODD) as right:
            left.set(0, 100)
            right.set(STEP, STEP + 100)

            together(
                lambda: [left.__ior__(right) for _ in range(200)],
                lambda: [right.__ior__(left) for _ in range(200)],
            )

            assert left == right
            assert left.count() == 200


class TestNames:
    def test_a_name_reaches_the_kernel(self) -> None:
        """The name of a bitmap shows in /proc/self/maps where the kernel keeps names."""
        if not pyreserve.capabilities().anon_vma_names:
            pytest.skip("this kernel keeps no names")
        with Bitmap(8 * MiB, name="pyreserve test bits") as bits:
            bits.set(0)

            with open("/proc/self/maps", encoding="utf-8") as maps:  # noqa: PTH123, RUF100
                assert "pyreserve test bits" in maps.read()
