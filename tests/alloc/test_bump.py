"""Bump arenas: blocks, marks, scopes, and the memory under them as /proc shows it."""

import copy
import dis
import errno
import gc
import pickle
import signal
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest

from helpers import witness
from helpers.interruptions import Struck, alarms_raise
from pyreserve import (
    PAGE_SIZE,
    GiB,
    KiB,
    MiB,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    StateError,
    ViewError,
    VMError,
)
from pyreserve._alloc.bump import _FAST_ALIGN, BumpArena, Mark
from pyreserve._region.viewtable import Entry

FIRST = max(64 * KiB, PAGE_SIZE)
STEP = 2 * MiB


def address(view: Any) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def state(arena: BumpArena) -> tuple[object, ...]:
    """Return the observable state of an arena, from its attributes and from /proc."""
    runs = arena.region.committed_runs()
    assert runs == witness.runs(arena.base, arena.region.size)
    assert arena.committed == sum(length for _, length in runs)
    contents = [witness.peek(arena.base + lo, n) for lo, n in runs]
    return arena.in_use, arena.region.size, runs, contents


def resident(arena: BumpArena) -> int:
    return witness.total_kib(arena.base, arena.region.size, "Rss") * KiB


class TestBlocks:
    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    def test_they_are_writable_bytes(self, mode: Literal["charge", "noreserve"]) -> None:
        """A block is a writable memoryview of the requested unsigned bytes, initially zero."""
        arena = BumpArena(4 * MiB, mode=mode)

        block = arena.alloc(100)

        assert isinstance(block, memoryview)
        assert (block.format, block.itemsize, block.ndim, len(block)) == ("B", 1, 1, 100)
        assert not block.readonly
        assert bytes(block) == bytes(100)
        assert arena.region.mode == mode

    def test_they_do_not_overlap(self) -> None:
        """Blocks of many sizes and alignments keep what was written to each."""
        arena = BumpArena(64 * MiB)
        sizes = [1, 7, 8, 64, 4095, PAGE_SIZE, 100_000, 3 * MiB] * 4
        blocks = [arena.alloc(n, align=1 << i % 14) for i, n in enumerate(sizes)]

        for i, block in enumerate(blocks):
            block[:] = bytes([i + 1]) * len(block)

        assert all(bytes(b) == bytes([i + 1]) * len(b) for i, b in enumerate(blocks))
        spans = sorted((address(b), address(b) + len(b)) for b in blocks)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))

    @pytest.mark.parametrize("align", [1 << i for i in range(25)])
    def test_alignment(self, align: int) -> None:
        """A block's address is a multiple of the alignment, at any offset."""
        arena = BumpArena(256 * MiB)

        for nbytes in (1, 3, 64, 5, 70_000):
            arena.alloc(nbytes, align=1)
            assert address(arena.alloc(nbytes, align=align)) % align == 0
            arena.mark()
            assert address(arena.alloc(nbytes, align=align)) % align == 0

    def test_the_default_alignment_is_8(self) -> None:
        """The default alignment is 8 bytes, also after odd sizes and marks."""
        arena = BumpArena(4 * MiB)

        for nbytes in (1, 3, 9, 64) * 20:
            arena.alloc(3, align=1)
            assert address(arena.alloc(nbytes)) % 8 == 0
            arena.alloc(3, align=1)
            arena.mark()
            assert address(arena.alloc(nbytes)) % 8 == 0

    def test_tightly(self) -> None:
        """Blocks aligned to 1 leave no gap; in_use counts up to the end of the last."""
        arena = BumpArena(4 * MiB)
        first = arena.alloc(3, align=1)

        second = arena.alloc(4, align=1)

        assert address(second) == address(first) + 3
        assert arena.in_use == 7
        arena.alloc(1)
        assert arena.in_use == 9

    def test_to_the_last_byte(self) -> None:
        """The last byte of an arena can be allocated, also by odd sizes and after marks."""
        for left in (1, 3, 5, 8, 13, PAGE_SIZE - 1):
            arena = BumpArena(PAGE_SIZE)
            arena.alloc(PAGE_SIZE - left, align=1)
            arena.mark()

            last = arena.alloc(left, align=1)

            assert address(last) + left == arena.base + arena.region.size
            assert arena.in_use == arena.region.size == PAGE_SIZE
            for align in (1, 8):
                with pytest.raises(OutOfMemoryError):
                    arena.alloc(1, align=align)

    def test_odd_ends_are_aligned(self) -> None:
        """A block that fits only without a gap does not misalign later blocks."""
        arena = BumpArena(PAGE_SIZE)
        arena.alloc(3, align=1)
        arena.mark()

        big = arena.alloc(PAGE_SIZE - 20 - 3, align=1)
        small = arena.alloc(4)

        assert len(big) == PAGE_SIZE - 23
        assert address(small) % 8 == 0

        arena = BumpArena(PAGE_SIZE)
        arena.alloc(3, align=1)
        arena.mark()
        big = arena.alloc(PAGE_SIZE - 3 - 4, align=1)
        with pytest.raises(OutOfMemoryError):
            arena.alloc(2, align=8)
        assert address(arena.alloc(1, align=4)) % 4 == 0
        assert len(big) == PAGE_SIZE - 7

    @pytest.mark.parametrize("nbytes", [0, -1, -64, -(1 << 70)])
    @pytest.mark.parametrize("used", [False, True])
    def test_sizes_that_make_no_sense(self, nbytes: int, used: bool) -> None:
        """A size that is not positive is a RangeError and allocates nothing."""
        arena = BumpArena(4 * MiB)
        if used:
            arena.alloc(100)
        before = state(arena)

        with pytest.raises(RangeError, match="must be positive"):
            arena.alloc(nbytes)

        assert state(arena) == before

    @pytest.mark.parametrize("align", [0, -1, -8, 3, 6, 12, 24, (1 << 70) + 1])
    def test_alignments_that_make_no_sense(self, align: int) -> None:
        """An alignment that is not a power of two is a RangeError."""
        arena = BumpArena(4 * MiB)
        arena.alloc(100)

        with pytest.raises(RangeError, match="power of two"):
            arena.alloc(8, align=align)

        assert arena.in_use == 100

    @pytest.mark.parametrize("wrong", [1.0, 8.0, "8", None, b"8", 1j])
    @pytest.mark.parametrize("used", [False, True])
    def test_arguments_that_are_not_integers(self, wrong: Any, used: bool) -> None:
        """Arguments that are not integers are TypeErrors and allocate nothing."""
        arena = BumpArena(4 * MiB)
        if used:
            arena.alloc(100)
        before = state(arena)
        if isinstance(wrong, str):
            wrong = "eight"

        with pytest.raises(ValueError if wrong == "eight" else TypeError):
            arena.alloc(wrong)
        with pytest.raises(ValueError if wrong == "eight" else TypeError):
            arena.alloc(8, align=wrong)

        assert state(arena) == before

    def test_integers_of_other_types(self) -> None:
        """Objects with __index__ are integers; small numpy integers don't overflow in sums."""
        arena = BumpArena(4 * MiB)

        for _ in range(10):
            assert len(arena.alloc(np.uint8(200), align=np.uint8(128))) == 200  # type: ignore[arg-type]
            assert len(arena.alloc(True)) == 1

        assert type(arena.in_use) is int

    def test_one_that_is_larger_than_a_step(self) -> None:
        """A block may be larger than any number of steps."""
        arena = BumpArena(64 * MiB)

        block = arena.alloc(21 * MiB + 5)
        block[-1] = 1

        assert len(block) == 21 * MiB + 5
        assert (arena.base + arena.committed) % STEP == 0


class TestCommits:
    def test_nothing_at_first(self) -> None:
        """A new arena has addresses and no memory."""
        arena = BumpArena(GiB)

        assert arena.reserved == GiB
        assert arena.in_use == arena.committed == witness.nbytes(arena.base, arena.region.size) == 0

    def test_the_steps(self) -> None:
        """The first step is 64 KiB; later ones end at multiples of 2 MiB, as /proc shows."""
        arena = BumpArena(64 * MiB)
        ends: list[int] = []

        for _ in range(10 * MiB // 4096):
            arena.alloc(4096)
            if not ends or ends[-1] != arena.committed:
                ends.append(arena.committed)
                assert witness.runs(arena.base, arena.region.size) == [(0, arena.committed)]

        assert ends[0] == FIRST
        assert all((arena.base + end) % STEP == 0 for end in ends[1:])
        assert all(b - a == STEP for a, b in pairwise(ends[1:]))

    def test_a_large_first_block(self) -> None:
        """If the first block exceeds 64 KiB, the first commit ends at a multiple of the step."""
        arena = BumpArena(64 * MiB)

        arena.alloc(FIRST + 1)

        assert (arena.base + arena.committed) % STEP == 0
        assert arena.committed <= FIRST + 1 + STEP

    @pytest.mark.parametrize("pages", [1, 3, 1000])
    def test_steps_of_another_size(self, pages: int) -> None:
        """Steps of any number of OS pages end at multiples of themselves."""
        step = pages * PAGE_SIZE
        arena = BumpArena(64 * MiB, step=step)

        for _ in range(40):
            arena.alloc(50_000)
            assert (arena.base + arena.committed) % step == 0 or arena.committed == FIRST < step

    @pytest.mark.parametrize("step", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, PAGE_SIZE // 2])
    def test_steps_that_make_no_sense(self, step: int) -> None:
        """A step that is not whole OS pages is a RangeError."""
        with pytest.raises(RangeError, match="step"):
            BumpArena(64 * MiB, step=step)

    def test_never_beyond_the_end(self) -> None:
        """The last step ends at the end of the arena."""
        arena = BumpArena(3 * PAGE_SIZE)

        arena.alloc(1)

        assert arena.committed == 3 * PAGE_SIZE == arena.reserved

    def test_a_size_is_rounded_up(self) -> None:
        """A size is rounded up to whole OS pages, all of which can be allocated."""
        arena = BumpArena(PAGE_SIZE + 1)

        assert arena.reserved == 2 * PAGE_SIZE
        assert len(arena.alloc(2 * PAGE_SIZE)) == 2 * PAGE_SIZE

    @pytest.mark.parametrize("size", [0, -1])
    def test_sizes_that_make_no_sense(self, size: int) -> None:
        """A size that is not positive is a RangeError."""
        with pytest.raises(RangeError):
            BumpArena(size)

    def test_preferring_huge_pages(self) -> None:
        """With huge pages preferred, the first step is a whole step."""
        arena = BumpArena(64 * MiB, huge_pages="prefer")

        arena.alloc(1)

        assert arena.committed == STEP
        assert "hg" in witness.pieces(arena.base, 1)[0].flags


class TestZero:
    def test_reused_bytes(self) -> None:
        """After a reset a block may show old contents; with zero=True it is zero."""
        arena = BumpArena(4 * MiB)
        arena.alloc(300_000)[:] = b"\xaa" * 300_000
        arena.reset()

        assert bytes(arena.alloc(10)) == b"\xaa" * 10
        assert bytes(arena.alloc(100_000, zero=True)) == bytes(100_000)
        assert bytes(arena.alloc(10)) == b"\xaa" * 10
        assert bytes(arena.alloc(300_000, zero=True)) == bytes(300_000)

    def test_unused_bytes_are_not_touched(self) -> None:
        """Bytes that were never allocated are zero already: zero=True touches none of them."""
        arena = BumpArena(64 * MiB)
        arena.alloc(100)[:] = b"\xaa" * 100
        arena.reset()
        before = resident(arena)

        block = arena.alloc(32 * MiB, zero=True)

        assert resident(arena) == before
        assert bytes(block[:200]) == bytes(200)

    def test_after_memory_was_given_back(self) -> None:
        """Decommitted pages are zero again; the page that holds the mark is cleared on request."""
        arena = BumpArena(4 * MiB)
        arena.alloc(100)
        mark = arena.mark()
        arena.alloc(MiB)[:] = b"\xaa" * MiB

        arena.reset(mark, keep=False)

        assert bytes(arena.alloc(8)) == b"\xaa" * 8
        assert bytes(arena.alloc(MiB, zero=True)) == bytes(MiB)

    def test_odd_lengths(self) -> None:
        """Exactly the bytes of the block are cleared, for any length."""
        arena = BumpArena(4 * MiB)
        for n in (1, 63, 64 * KiB - 1, 64 * KiB, 64 * KiB + 1, 200_001):
            whole = arena.alloc(n + 20, align=1)
            whole[:] = b"\xaa" * (n + 20)
            del whole
            arena.reset()
            arena.alloc(7, align=1)

            block = arena.alloc(n, align=1, zero=True)
            offset = address(block) - arena.base

            assert bytes(block) == bytes(n)
            assert witness.peek(arena.base, offset) == b"\xaa" * offset
            assert witness.peek(arena.base + offset + n, 5) == b"\xaa" * 5
            del block
            arena.reset()


class TestMarks:
    def test_going_back(self) -> None:
        """After a reset the same bytes are allocated again; memory stays committed."""
        arena = BumpArena(4 * MiB)
        arena.alloc(100)
        mark, first = arena.mark(), address(arena.alloc(64))
        committed = arena.committed

        arena.reset(mark)

        assert arena.in_use == 100
        assert arena.committed == committed
        assert address(arena.alloc(64)) == first

    def test_as_often_as_wanted(self) -> None:
        """A mark stays valid after a reset to it, or to a higher one."""
        arena = BumpArena(4 * MiB)
        low = arena.mark()
        arena.alloc(10)
        high = arena.mark()
        for mark, in_use in [(high, 10), (high, 10), (low, 0), (low, 0)]:
            arena.alloc(1000)
            arena.reset(mark)
            assert arena.in_use == in_use

    def test_the_start(self) -> None:
        """A reset without a mark frees all blocks."""
        arena = BumpArena(64 * MiB)
        for _ in range(100):
            arena.alloc(123_456)
            arena.mark()

        arena.reset()

        assert arena.in_use == 0
        assert arena.committed > 11 * MiB

    def test_stale_marks(self) -> None:
        """A mark that a reset to below it ended is a RangeError, even after growth."""
        arena = BumpArena(4 * MiB)
        low = arena.mark()
        arena.alloc(64)
        high = arena.mark()
        arena.reset(low)
        arena.alloc(64)

        with pytest.raises(RangeError, match="below it"):
            arena.reset(high)
        again = arena.mark()
        with pytest.raises(RangeError, match="below it"):
            arena.reset(high)

        assert arena.in_use == 64
        arena.reset(again)

    def test_marks_at_one_place(self) -> None:
        """Marks at the offset of a reset stay valid, and take no more memory."""
        arena = BumpArena(4 * MiB)
        arena.alloc(5)
        marks = [arena.mark() for _ in range(1000)]
        arena.alloc(10)

        for mark in marks:
            arena.reset(mark)

        assert len(arena._marks) == 1
        assert arena.in_use == 5

    def test_the_marks_of_others(self) -> None:
        """A mark of another arena, or an object that is no mark, is a RangeError."""
        arena, other = BumpArena(4 * MiB), BumpArena(4 * MiB)
        arena.mark()

        for wrong in (other.mark(), Mark(0, 0), Mark(0, -1), copy.copy(arena.mark()), 0, "x"):
            with pytest.raises(RangeError, match="must be of this arena"):
                arena.reset(wrong)  # type: ignore[arg-type]

    def test_a_mark_can_not_be_changed(self) -> None:
        """A mark is frozen."""
        mark = BumpArena(4 * MiB).mark()

        with pytest.raises(AttributeError):
            mark.offset = 3  # type: ignore[misc]

    def test_marks_without_blocks_make_no_windows(self) -> None:
        """Thousands of marks and resets leave no entry in the region's table of views."""
        arena = BumpArena(4 * MiB)
        for _ in range(3000):
            mark = arena.mark()
            arena.mark()
            arena.alloc(8)
            arena.reset(mark)

        table = arena.region.exports._table
        assert table is not None
        assert len(table.anchors()) == 0
        assert sum(len(b.entries) for level in table._levels for b in level.values()) < 600


class TestTrim:
    def test_above_the_last_block(self) -> None:
        """trim decommits the pages above the last block, and returns their bytes."""
        arena = BumpArena(64 * MiB)
        arena.alloc(PAGE_SIZE + 1)[:] = b"x" * (PAGE_SIZE + 1)
        mark = arena.mark()
        arena.alloc(8 * MiB)[:] = bytes(8 * MiB)
        arena.reset(mark)
        committed = arena.committed

        given = arena.trim()

        assert given == committed - arena.committed == committed - 2 * PAGE_SIZE
        assert arena.trim() == 0
        assert resident(arena) <= 2 * PAGE_SIZE
        assert not any(arena.alloc(8 * MiB))

    def test_under_a_window(self) -> None:
        """Pages in the window of a live block are discarded, and counted once."""
        arena = BumpArena(64 * MiB, step=MiB)
        arena.alloc(2 * MiB)[:] = b"x" * (2 * MiB)
        arena.reset()
        block = arena.alloc(10)
        block[:] = b"0123456789"
        before, committed = resident(arena), arena.committed

        given = arena.trim()

        assert given == 2 * MiB - PAGE_SIZE
        assert arena.committed == committed
        assert resident(arena) <= before - 2 * MiB + PAGE_SIZE
        assert bytes(block) == b"0123456789"
        assert arena.trim() == 0
        assert not any(arena.alloc(2 * MiB, align=PAGE_SIZE))

    def test_it_keeps_blocks_and_marks(self) -> None:
        """trim of an arena without idle memory changes nothing, and marks stay valid."""
        arena = BumpArena(PAGE_SIZE)
        mark = arena.mark()
        block = arena.alloc(PAGE_SIZE)

        assert arena.trim() == 0
        assert len(block) == arena.in_use == PAGE_SIZE
        del block
        arena.reset(mark)
        assert arena.trim() == PAGE_SIZE
        arena.release()
        with pytest.raises(ReleasedError):
            arena.trim()


class TestNdarray:
    @pytest.mark.parametrize("dtype", ["u1", "<i4", "f8", "complex128", "M8[s]"])
    @pytest.mark.parametrize("shape", [7, (3, 5), [2, 3]])
    def test_shape_and_dtype(self, dtype: str, shape: Any) -> None:
        """ndarray allocates a zeroed array of the shape and dtype, aligned for its items."""
        arena = BumpArena(MiB)
        arena.alloc(3, align=1)

        array = arena.ndarray(shape, dtype)

        assert array.shape == np.empty(shape).shape
        assert array.dtype == np.dtype(dtype)
        assert array.flags.aligned
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not array.view("u1").any()
        assert arena.in_use == 8 + array.nbytes

    def test_alignment_and_zeros(self) -> None:
        """align and zero are those of alloc."""
        arena = BumpArena(MiB)
        arena.ndarray(100)[:] = 7
        arena.reset()

        assert arena.ndarray(10)[0] == 7
        array = arena.ndarray(10, zero=True, align="64B")

        assert array.__array_interface__["data"][0] % 64 == 0
        assert not array.any()

    def test_without_items(self) -> None:
        """An array without items allocates nothing."""
        arena = BumpArena(MiB)

        assert arena.ndarray((0, 5), "f8").shape == (0, 5)
        assert arena.in_use == arena.committed == 0
        arena.release()
        with pytest.raises(ReleasedError):
            arena.ndarray(0)

    def test_it_pins_its_block(self) -> None:
        """The array's block can't be freed while the array is alive."""
        arena = BumpArena(MiB)
        array = arena.ndarray(5, "f8")

        with pytest.raises(ViewError):
            arena.reset()
        del array
        arena.reset()

    @pytest.mark.parametrize(("shape", "dtype"), [(-1, "u1"), ((2, -3), "u1"), (4, "O")])
    def test_refusals(self, shape: Any, dtype: str) -> None:
        """A negative side and items with references are refused; nothing is allocated."""
        arena = BumpArena(MiB)

        with pytest.raises(ValueError, match=r"must have no negative side|OBJECT"):
            arena.ndarray(shape, dtype)
        assert arena.in_use == 0


class TestGivingBack:
    def test_all_of_it(self) -> None:
        """After a reset with keep=False nothing is committed, and RSS falls back."""
        arena = BumpArena(64 * MiB)
        arena.alloc(32 * MiB)[:] = b"\xaa" * (32 * MiB)
        assert resident(arena) >= 32 * MiB

        arena.reset(keep=False)

        assert arena.committed == resident(arena) == 0
        assert arena.alloc(1)[0] == 0
        assert arena.committed == FIRST

    @pytest.mark.parametrize("below", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * MiB])
    def test_whole_pages_above_the_mark(self, below: int) -> None:
        """Bytes below the mark, and the page that holds it, are unchanged."""
        arena = BumpArena(64 * MiB)
        arena.alloc(below, align=1)[:] = b"\xaa" * below
        mark = arena.mark()
        arena.alloc(8 * MiB)

        arena.reset(mark, keep=False)

        assert arena.committed == -(-below // PAGE_SIZE) * PAGE_SIZE
        assert witness.runs(arena.base, arena.region.size) == [(0, arena.committed)]
        assert witness.peek(arena.base, below) == b"\xaa" * below

    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    def test_under_a_view_below_the_mark(self, mode: Literal["charge", "noreserve"]) -> None:
        """Pages in a window with a live block stay committed, but their memory is given back."""
        arena = BumpArena(64 * MiB, mode=mode)
        block = arena.alloc(MiB)
        block[:] = b"\xaa" * MiB
        window_end = arena.committed
        mark = arena.mark()
        arena.alloc(16 * MiB)[:] = b"\xbb" * (16 * MiB)

        arena.reset(mark, keep=False)

        assert arena.committed == window_end < MiB + STEP
        assert resident(arena) == MiB
        assert bytes(block) == b"\xaa" * MiB
        shared = memoryview(block.obj)
        assert bytes(shared[MiB:]) == bytes(len(shared) - MiB)
        assert bytes(arena.alloc(16 * MiB, zero=True)) == bytes(16 * MiB)

    def test_again_after_a_refusal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory that the kernel refused to decommit is decommitted by the next reset."""
        arena = BumpArena(64 * MiB)
        arena.alloc(8 * MiB)

        def refuse(*_: object) -> None:
            raise VMError(errno.ENOMEM, "no", verb="decommit", nbytes=1)

        with monkeypatch.context() as refusing:
            refusing.setattr(type(arena.region.exports), "decommit", refuse)
            with pytest.raises(VMError):
                arena.reset(keep=False)
        assert arena.committed >= 8 * MiB

        arena.reset(keep=False)

        assert arena.committed == resident(arena) == 0

    def test_nothing_above_the_mark(self) -> None:
        """A reset to a mark at the end decommits what was committed ahead."""
        arena = BumpArena(64 * MiB)
        arena.alloc(PAGE_SIZE)

        arena.reset(arena.mark(), keep=False)

        assert arena.committed == PAGE_SIZE
        arena.alloc(100)[:] = b"x" * 100


class TestViewsPin:
    def hold(self, block: memoryview, consumer: str) -> Any:
        makers: dict[str, Callable[[], Any]] = {
            "view": lambda: block,
            "slice": lambda: block[5:7],
            "cast": lambda: block.cast("d"),
            "readonly": block.toreadonly,
            "frombuffer": lambda: np.frombuffer(block, np.uint8)[3:4],
            "ndarray": lambda: np.ndarray((4,), np.uint8, buffer=block),
            "obj": lambda: block.obj,
        }
        return makers[consumer]()

    @pytest.mark.parametrize("keep", [True, False])
    @pytest.mark.parametrize(
        "consumer", ["view", "slice", "cast", "readonly", "frombuffer", "ndarray", "obj"]
    )
    def test_a_reset_is_refused(self, consumer: str, keep: bool) -> None:
        """A reset is refused, and changes nothing, while an object made from a block above lives.

        Afterwards it succeeds.
        """
        arena = BumpArena(4 * MiB)
        arena.alloc(100)
        mark = arena.mark()
        held = [self.hold(arena.alloc(64), consumer)]
        before = state(arena)

        for at in (mark, None):
            with pytest.raises(ViewError, match=r"cannot reset to 0x.*live view"):
                arena.reset(at, keep=keep)

        assert state(arena) == before
        higher = address(arena.alloc(8))
        assert higher >= arena.base + 104 + 64
        held.clear()
        arena.reset(mark, keep=keep)
        assert arena.in_use == 100

    def test_the_message(self) -> None:
        """The message names the mark and the range of bytes that contains the views."""
        arena = BumpArena(4 * MiB)
        arena.alloc(0x100)
        mark = arena.mark()
        held = [arena.alloc(0x40)]
        arena.alloc(0x40)

        with pytest.raises(BufferError) as refused:
            arena.reset(mark)

        assert str(refused.value).startswith(
            "cannot reset to 0x100: 1 live view holds bytes of it: [0x100, 0x180); "
            "delete the holder first"
        )
        del held

    def test_views_below_are_left_alone(self) -> None:
        """A block below the mark keeps its contents and does not prevent a reset."""
        arena = BumpArena(16 * MiB)
        below = arena.alloc(1000)
        below[:] = b"\xaa" * 1000
        mark = arena.mark()

        for keep in (True, False) * 3:
            for _ in range(5):
                arena.alloc(MiB)[:] = b"\xbb" * MiB
            arena.reset(mark, keep=keep)

        assert bytes(below) == b"\xaa" * 1000
        assert arena.in_use == 1000

    def test_between_two_marks(self) -> None:
        """A block between two marks allows a reset to the upper one and not to the lower one."""
        arena = BumpArena(16 * MiB)
        low = arena.mark()
        held = [arena.alloc(64)]
        high = arena.mark()
        arena.alloc(64)

        arena.reset(high)
        with pytest.raises(ViewError):
            arena.reset(low)
        arena.alloc(3 * MiB)
        arena.reset(high)
        with pytest.raises(ViewError):
            arena.reset(low)
        held.clear()

        arena.reset(low)
        assert arena.in_use == 0

    def test_each_of_many_is_found(self) -> None:
        """Any live block among many steps refuses a reset to below it."""
        arena = BumpArena(64 * MiB)
        for which in range(20):
            mark = arena.mark()
            blocks = [arena.alloc(MiB + 1) for _ in range(20)]
            held = blocks[which]
            blocks.clear()

            with pytest.raises(ViewError):
                arena.reset(mark)
            del held
            arena.reset(mark)

    def test_garbage_cycles(self) -> None:
        """A block in a reference cycle is in use until the cycle is collected."""
        arena = BumpArena(4 * MiB)
        gc.collect()
        gc.disable()
        try:
            cycle: list[object] = [arena.alloc(8)]
            cycle.append(cycle)
            del cycle
            with pytest.raises(ViewError):
                arena.reset()
            gc.collect()
            arena.reset()
        finally:
            gc.enable()

    def test_a_finaliser_of_garbage_may_use_its_block(self) -> None:
        """In a finaliser of a garbage cycle, the cycle's block is still in use."""
        arena = BumpArena(4 * MiB)
        result: list[object] = []

        class Holder:
            def __init__(self) -> None:
                self.block, self.me = arena.alloc(8), self

            def __del__(self) -> None:
                try:
                    arena.reset()
                except ViewError:
                    result.append(self.block)

        Holder()
        gc.collect()

        assert len(result) == 1
        with pytest.raises(ViewError):
            arena.reset()
        result.clear()
        arena.reset()

    def test_kept_errors_hold_nothing(self) -> None:
        """The arena's exceptions hold no view, even if kept with their tracebacks."""
        arena = BumpArena(4 * MiB)
        kept: list[Exception] = []
        for wrong in (
            lambda: arena.alloc(5 * MiB),
            lambda: arena.alloc(-1),
            lambda: arena.alloc(8, align=3),
            lambda: arena.reset(0),  # type: ignore[arg-type]
        ):
            arena.alloc(8)
            try:
                wrong()
            except (MemoryError, ValueError) as error:
                kept.append(error)
        held = [arena.alloc(8)]
        try:
            arena.reset()
        except ViewError as error:
            kept.append(error)
        held.clear()

        arena.reset()

        assert len(kept) == 5

    def test_release(self) -> None:
        """A release is refused while a block is in use, and succeeds afterwards."""
        arena = BumpArena(4 * MiB)
        held = [arena.alloc(8)]
        before = state(arena)

        with pytest.raises(ViewError, match="cannot release"):
            arena.release()

        assert state(arena) == before
        assert len(arena.alloc(8)) == 8
        held.clear()
        arena.release()
        assert arena.region.released

    def test_a_dropped_arena(self) -> None:
        """A block outlives its arena; the addresses are released with the last block."""
        arena: BumpArena | None = BumpArena(4 * MiB)
        assert arena is not None
        base, block = arena.base, arena.alloc(8)
        block[:] = b"abcdefgh"

        arena = None

        assert bytes(block) == b"abcdefgh"
        assert witness.is_mapped(base)
        del block
        assert not witness.is_mapped(base)


class TestScopes:
    def test_bytes_are_taken_back(self) -> None:
        """Each round of a scope allocates at the same address."""
        arena = BumpArena(4 * MiB)
        arena.alloc(100)
        seen = set()

        for _ in range(5):
            with arena.scope():
                seen.add(address(arena.alloc(1000)))
            assert arena.in_use == 100

        assert len(seen) == 1

    def test_nested(self) -> None:
        """A nested scope frees its own blocks; marks made inside end with it, others do not."""
        arena = BumpArena(4 * MiB)
        arena.alloc(8)
        outside = arena.mark()
        with arena.scope():
            arena.alloc(16)
            with arena.scope():
                arena.alloc(100)
                inside = arena.mark()
            assert arena.in_use == 24
            with pytest.raises(RangeError):
                arena.reset(inside)
            with arena.scope():
                pass
            assert arena.in_use == 24

        assert arena.in_use == 8
        arena.reset(outside)
        arena.reset()

    def test_many_scopes_keep_nothing(self) -> None:
        """An arena that grows between scopes keeps no mark of them."""
        arena = BumpArena(4 * MiB)

        for _ in range(100):
            arena.alloc(8)
            with arena.scope():
                arena.alloc(8)

        assert arena.in_use == 800
        assert arena._marks == []

    def test_giving_back(self) -> None:
        """A scope with keep=False decommits the memory."""
        arena = BumpArena(64 * MiB)
        with arena.scope(keep=False):
            arena.alloc(16 * MiB)[:] = b"\xaa" * (16 * MiB)

        assert arena.committed == resident(arena) == 0

    def test_live_views(self) -> None:
        """A block in use at the end stays so until its view is gone and another block is made."""
        arena = BumpArena(4 * MiB)
        with arena.scope():
            held = [arena.alloc(8)]
            first = address(held[0])
        assert arena.in_use == 8
        assert arena._marks == []

        held.clear()
        again = arena.alloc(16)

        assert address(again) == first
        assert arena.in_use == 16

    def test_live_views_under_later_blocks(self) -> None:
        """Blocks allocated after the scope, and those below them, are not freed."""
        arena = BumpArena(4 * MiB)
        with arena.scope(keep=False):
            held = [arena.alloc(8)]
        later = arena.alloc(8)
        later[:] = b"\xaa" * 8
        held.clear()

        newest = arena.alloc(8)

        assert bytes(later) == b"\xaa" * 8
        assert address(newest) == address(later) + 8
        assert arena.in_use == 24
        del later, newest
        arena.reset()
        assert arena.in_use == 0

    def test_nested_under_live_views(self) -> None:
        """A scope also frees the blocks that a nested scope left in use."""
        arena = BumpArena(4 * MiB)
        with arena.scope():
            arena.alloc(8)
            with arena.scope():
                held = [arena.alloc(8)]
            assert arena.in_use == 16
            held.clear()
        assert arena.in_use == 0

    def test_an_exception(self) -> None:
        """An exception propagates, and blocks without views are freed."""
        arena = BumpArena(4 * MiB)

        def work() -> None:
            with arena.scope():
                arena.alloc(8)
                raise KeyError

        with pytest.raises(KeyError):
            work()

        assert arena.in_use == 0

    def test_an_exception_whose_traceback_holds_a_block(self) -> None:
        """The exception propagates; its block stays in use to the end of an outer scope."""
        arena = BumpArena(4 * MiB)

        def work() -> None:
            block = arena.alloc(8)
            raise KeyError(len(block))

        with arena.scope():
            with pytest.raises(KeyError) as raised, arena.scope():
                work()
            assert raised.value.__context__ is None
            assert arena.in_use == 8
            del raised
        assert arena.in_use == 0
        assert arena._marks == []

    def test_running_out_inside(self) -> None:
        """A scope that ends by an OutOfMemoryError of the arena frees its blocks."""
        arena = BumpArena(MiB)

        def work() -> None:
            with arena.scope():
                while True:
                    arena.alloc(100_000)

        with pytest.raises(OutOfMemoryError):
            work()

        assert arena.in_use == 0

    def test_a_reset_below_inside(self) -> None:
        """After a reset to below a scope inside it, its end frees nothing."""
        arena = BumpArena(4 * MiB)
        arena.alloc(8)

        with arena.scope():
            arena.reset()
            arena.alloc(16)

        assert arena.in_use == 16

    def test_a_reset_to_its_start_inside(self) -> None:
        """After a reset to the start of a scope inside it, the scope still ends normally."""
        arena = BumpArena(4 * MiB)
        mark = arena.mark()

        with arena.scope():
            arena.alloc(8)
            arena.reset(mark)
            arena.alloc(16)

        assert arena.in_use == 0

    def test_a_release_inside(self) -> None:
        """A scope may end after its arena was released."""
        arena = BumpArena(4 * MiB)

        with arena.scope():
            arena.alloc(8)
            arena.release()

        assert arena.region.released


LIMITED = """
import json, resource
from helpers import witness
from pyreserve import *
from pyreserve._alloc.bump import BumpArena
def allow(nbytes):
    most = -1 if nbytes is None else witness.status("VmData") + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, -1))
def state():
    return arena.in_use, arena.committed, witness.runs(arena.base, arena.region.size)
"""


class TestRefusals:
    def test_used_up(self) -> None:
        """The error gives the bytes requested, in use and reserved."""
        arena = BumpArena(MiB)
        arena.alloc(1000)
        before = state(arena)

        with pytest.raises(OutOfMemoryError) as refused:
            arena.alloc(MiB)

        assert state(arena) == before
        error = refused.value
        assert (error.errno_name, error.limit, error.verb) == ("ENOMEM", "capacity", "alloc")
        assert error.nbytes == MiB
        assert str(error).endswith("cannot allocate 1048576 bytes: 1000 of 1048576 are in use")
        assert isinstance(error, MemoryError)

    @pytest.mark.parametrize("nbytes", [1 << 40, (1 << 63) - 1, 1 << 64, 1 << 1000])
    def test_far_too_much(self, nbytes: int) -> None:
        """Sizes and alignments beyond the address space are refused like others."""
        arena = BumpArena(MiB)
        arena.alloc(1)

        with pytest.raises(OutOfMemoryError):
            arena.alloc(nbytes)
        with pytest.raises(OutOfMemoryError):
            arena.alloc(1, align=1 << nbytes.bit_length())

        assert arena.in_use == 1

    def test_a_refused_commit(self) -> None:
        """A commit refused by RLIMIT_DATA raises the region's error and changes nothing."""
        result = witness.fresh_python(
            LIMITED
            + """
arena = BumpArena(64 * MiB)
arena.alloc(100)
before = state()
allow(4 * MiB)
try: arena.alloc(32 * MiB)
except OutOfMemoryError as error: refused = [error.limit, error.verb, error.errno_name]
same = state() == before
allow(None)
print(json.dumps([refused, same, len(arena.alloc(32 * MiB))]))
"""
        )

        assert result == [["RLIMIT_DATA", "commit", "ENOMEM"], True, 32 * MiB]

    def test_a_refused_step(self) -> None:
        """If a whole step is refused, less is committed ahead."""
        result = witness.fresh_python(
            LIMITED
            + """
arenas = [BumpArena(1 * GiB, step=256 * MiB)]
while -arenas[-1].base % (256 * MiB) < 64 * MiB:  # the rest of a step is more than is allowed
    arenas.append(BumpArena(1 * GiB + len(arenas) * 64 * MiB, step=256 * MiB))
arena = arenas[-1]
arena.alloc(100)
allow(8 * MiB)
block = arena.alloc(2 * MiB)
block[-1] = 1
committed = arena.committed
try: arena.alloc(32 * MiB)
except MemoryError: pass
allow(None)
arena.alloc(9 * MiB)
print(json.dumps([committed, (arena.base + arena.committed) % (256 * MiB)]))
"""
        )

        committed, past_line = result
        assert 104 + 2 * MiB <= committed <= 8 * MiB + FIRST
        assert past_line == 0

    def test_a_refused_reservation(self) -> None:
        """If the reservation is refused, the error names the limit."""
        with pytest.raises(OutOfMemoryError) as refused:
            BumpArena(1 << 62 if sys.maxsize > 1 << 32 else 1 << 32)

        assert refused.value.verb == "reserve"


class TestTheEnd:
    def test_after_release(self) -> None:
        """Every use after release raises ReleasedError."""
        arena = BumpArena(4 * MiB)
        arena.alloc(8)
        mark = arena.mark()
        arena.alloc(8)
        arena.release()

        uses: list[Callable[[], object]] = [
            lambda: arena.alloc(8),
            lambda: arena.alloc(8, align=64),
            lambda: arena.in_use,
            lambda: arena.committed,
            lambda: arena.base,
            arena.mark,
            arena.reset,
            lambda: arena.reset(mark),
            arena.scope().__enter__,
            arena.__enter__,
            arena.release,
        ]
        for use in uses:
            with pytest.raises(ReleasedError):
                use()
        assert arena.region.size == 4 * MiB

    def test_the_regions_own_verbs(self) -> None:
        """The arena's region refuses to give memory or addresses back: its owner alone may."""
        arena = BumpArena(4 * MiB)
        arena.alloc(8)
        arena.mark()
        region = arena.region

        for verb in (
            region.release,
            region.close,
            region.__enter__,
            lambda: region.decommit(0, FIRST),
            lambda: region.discard(0, FIRST),
        ):
            with pytest.raises(StateError, match="part of an arena: use the owner's methods"):
                verb()

        assert (arena.committed, arena.alloc(8)[0]) == (FIRST, 0)

    def test_as_a_context(self) -> None:
        """Leaving the with block releases the arena, also if it was released inside."""
        with BumpArena(4 * MiB) as arena:
            arena.alloc(8)
        assert arena.region.released
        with BumpArena(4 * MiB) as arena:
            arena.release()

    def test_repr(self) -> None:
        """The repr gives the address, bytes in use and committed, or says that it was released."""
        arena = BumpArena(4 * MiB, name="scratch")
        arena.alloc(100)
        end = arena.base + arena.region.size

        assert repr(arena) == (
            f"<BumpArena 'scratch' {arena.base:#x}-{end:#x} of 4 MiB: "
            f"100 B in use, {FIRST // KiB} KiB committed>"
        )
        arena.release()
        assert repr(arena) == "<BumpArena 'scratch' of 4 MiB, released>"

    def test_no_copies(self) -> None:
        """An arena can't be pickled or copied."""
        arena = BumpArena(4 * MiB)

        for copier in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="addresses of this process"):
                copier(arena)


HARMLESS = (
    "BINARY_",
    "CACHE",
    "COMPARE_OP",
    "COPY",
    "DUP_TOP",
    "EXTENDED_ARG",
    "JUMP_FORWARD",
    "JUMP_IF_FALSE_OR_POP",
    "LOAD_ATTR",
    "LOAD_CONST",
    "LOAD_FAST",
    "LOAD_SMALL_INT",
    "NOP",
    "NOT_TAKEN",
    "POP_JUMP_",
    "POP_TOP",
    "ROT_",
    "STORE_ATTR",
    "STORE_FAST",
    "SWAP",
    "TO_BOOL",
)


class TestThreads:
    @pytest.mark.skipif(_FAST_ALIGN is None, reason="all blocks are taken under the lock")
    def test_nothing_can_come_between(self) -> None:
        """Between reading the offset and loading the window, the fast path calls nothing.

        So no thread or signal handler can run there; nor a tracer, as it is one line.
        """
        code = list(dis.get_instructions(BumpArena.alloc))
        first = next(i for i, ins in enumerate(code) if ins.argval == "_at")
        last = next(i for i, ins in enumerate(code) if ins.argval == "_window")
        stored = next(i for i, ins in enumerate(code) if ins.opname == "STORE_ATTR")
        critical = code[first - 1 : last + 1]

        assert first < stored < last
        assert all(ins.opname.startswith(HARMLESS) for ins in critical), critical
        lines = (
            {ins.positions.lineno for ins in critical if ins.positions}
            if (sys.version_info >= (3, 11))
            else {ins.starts_line for ins in code[first : last + 1]} - {None}
        )
        assert len(lines) <= 1

    @pytest.mark.parametrize("quick", [True, False])
    def test_eight_threads_share_no_byte(
        self, quick: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Blocks of eight threads keep what each wrote, with and without the fast path."""
        if not quick:
            monkeypatch.setattr("pyreserve._alloc.bump._FAST_ALIGN", None)
        arena, threads, rounds = BumpArena(64 * MiB, step=64 * KiB), 8, 3000
        taken: list[list[memoryview]] = [[] for _ in range(threads)]
        start = threading.Barrier(threads)

        def work(number: int) -> None:
            mine, pattern = taken[number], bytes([number + 1])
            start.wait()
            for i in range(rounds):
                block = arena.alloc(1 + i % 100, align=8 if i % 10 else 32)
                block[:] = pattern * len(block)
                mine.append(block)
                if i % 500 == 0:
                    arena.mark()

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(before)

        assert [len(mine) for mine in taken] == [rounds] * threads
        for number, mine in enumerate(taken):
            assert all(bytes(b) == bytes([number + 1]) * len(b) for b in mine)
        spans = sorted((address(b), address(b) + len(b)) for mine in taken for b in mine)
        assert all(a[1] <= b[0] for a, b in pairwise(spans))

    def test_resets_beside_allocations(self) -> None:
        """A reset beside allocating threads never reuses the bytes of a live block."""
        arena, stop, errors = BumpArena(256 * MiB, step=64 * KiB), threading.Event(), []
        bottom = arena.mark()

        def work(number: int) -> None:
            pattern = bytes([number + 1])
            try:
                while not stop.is_set():
                    block = arena.alloc(40)
                    block[:] = pattern * 40
                    for _ in range(20):
                        assert bytes(block) == pattern * 40
                    del block
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        done = 0
        try:
            workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
            for worker in workers:
                worker.start()
            for i in range(2000):
                try:
                    arena.reset(bottom, keep=bool(i % 3))
                    done += 1
                except ViewError:
                    pass
            stop.set()
            for worker in workers:
                worker.join()
        finally:
            stop.set()
            sys.setswitchinterval(before)

        assert errors == []
        arena.reset(bottom)

    def test_a_tracer_between_lines(self) -> None:
        """A tracer that allocates at every line of alloc never gets the same bytes."""
        arena = BumpArena(4 * MiB)
        arena.alloc(8)
        blocks: list[memoryview] = []

        def tracer(frame: Any, event: str, arg: object) -> Any:
            if frame.f_code is BumpArena.alloc.__code__ and event == "line":
                blocks.append(arena.alloc(24))
            return tracer

        before = sys.gettrace()
        sys.settrace(tracer)
        try:
            for _ in range(50):
                blocks.append(arena.alloc(40))
        finally:
            sys.settrace(before)

        spans = sorted((address(b), address(b) + len(b)) for b in blocks)
        assert len(spans) > 100
        assert all(a[1] <= b[0] for a, b in pairwise(spans))

    def test_signal_handlers(self) -> None:
        """A signal handler that allocates never gets the bytes of an interrupted alloc."""
        arena, blocks, refused = BumpArena(256 * MiB, step=64 * KiB), [], 0

        def handler(*_: object) -> None:
            nonlocal refused
            try:
                blocks.append(arena.alloc(48))
                blocks.append(arena.alloc(48, align=64))
            except RuntimeError:
                refused += 1

        before = signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        try:
            for i in range(40_000):
                blocks.append(arena.alloc(40 + i % 64, align=16 if i % 5 == 0 else 8))
                if i % 100 == 0:
                    arena.mark()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

        spans = sorted((address(b), address(b) + len(b)) for b in blocks)
        assert len(spans) > 40_000
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert arena._busy is False

    def test_an_exception_out_of_a_signal_handler(self) -> None:
        """After an exception from a signal handler at any point, the arena still works."""
        arena, struck = BumpArena(64 * MiB, step=64 * KiB), 0

        with alarms_raise():
            for _ in range(150):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0003)
                    while True:
                        arena.alloc(40, align=64)
                        arena.alloc(70_000)
                        arena.mark()
                        arena.reset(keep=False)
                except Struck:
                    struck += 1
                arena.reset()

        assert struck == 150
        assert len(arena.alloc(8)) == 8
        state(arena)

    def test_a_finaliser_inside_a_reset(self) -> None:
        """A finaliser that interrupts a reset gets RuntimeError, and the reset completes."""
        arena, result = BumpArena(4 * MiB), []

        class Finalised:
            def __del__(self) -> None:
                for use in (lambda: arena.alloc(8), arena.mark, arena.reset, arena.release):
                    try:
                        use()
                    except RuntimeError as error:
                        result.append(str(error))

        arena.alloc(8)
        original = arena._live_views

        def live(offset: int) -> list[Entry]:
            Finalised()
            return original(offset)

        arena._live_views = live  # type: ignore[method-assign]
        arena.reset()

        assert result == ["called from inside another call on the same arena"] * 4
        assert arena.in_use == 0


class TestFork:
    def test_the_child_goes_on(self) -> None:
        """A child has its own copy of the blocks and can allocate more."""
        arena = BumpArena(64 * MiB)
        block = arena.alloc(8)
        block[:] = b"parents!"
        mark = arena.mark()

        def child() -> int:
            assert bytes(block) == b"parents!"
            block[:] = b"childs!!"
            for _ in range(100):
                arena.alloc(100_000)[:] = b"x" * 100_000
            with pytest.raises(ViewError):
                arena.reset()
            arena.reset(mark, keep=False)
            state(arena)
            return arena.in_use

        assert witness.in_child(child) == 8
        assert bytes(block) == b"parents!"
        assert arena.in_use == 8

    def test_under_threads(self) -> None:
        """A child never inherits a lock that an allocating thread of the parent held."""
        arena, stop = BumpArena(GiB, mode="noreserve", step=64 * KiB), threading.Event()

        def work() -> None:
            while not stop.is_set():
                arena.alloc(100, align=16)
                arena.alloc(100)
                try:
                    if arena.in_use > 512 * MiB:
                        arena.reset()
                except ViewError:
                    pass

        def child() -> int:
            blocks = [arena.alloc(1000) for _ in range(300)]
            for i, block in enumerate(blocks):
                block[:] = bytes([i % 256]) * 1000
            assert all(bytes(b) == bytes([i % 256]) * 1000 for i, b in enumerate(blocks))
            return len(blocks)

        workers = [threading.Thread(target=work) for _ in range(3)]
        for worker in workers:
            worker.start()
        try:
            answers = [witness.in_child(child) for _ in range(15)]
        finally:
            stop.set()
            for worker in workers:
                worker.join()

        assert answers == [300] * 15
