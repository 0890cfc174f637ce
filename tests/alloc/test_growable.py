"""Buffers and arrays that grow in place: their bytes, views, and memory as /proc shows it."""

import array as stdlib_array
import ctypes
import gc
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest

from helpers import witness
from helpers.interruptions import Struck, alarms_raise
from pyreserve import (
    PAGE_SIZE,
    GiB,
    GrowableArray,
    GrowableBuffer,
    KiB,
    MiB,
    OutOfMemoryError,
    Pool,
    RangeError,
    ReleasedError,
    RingArray,
    ViewError,
)

FIRST = max(64 * KiB, PAGE_SIZE)
STEP = 2 * MiB

Growable = GrowableBuffer | GrowableArray[Any]
Calls = tuple[Callable[[], object], ...]


def address(view: Any) -> int:
    return int(np.frombuffer(view, np.uint8).__array_interface__["data"][0])


def extent(thing: Growable) -> int:
    """Return the reserved bytes."""
    item = thing.dtype.itemsize if isinstance(thing, GrowableArray) else 1
    return -(-thing.capacity * item // PAGE_SIZE) * PAGE_SIZE


def state(thing: Growable) -> tuple[object, ...]:
    """Return the observable state, from the attributes and from /proc."""
    runs = witness.runs(thing.base, extent(thing))
    assert runs == ([(0, thing.committed)] if thing.committed else [])
    item = thing.dtype.itemsize if isinstance(thing, GrowableArray) else 1
    return len(thing), thing.capacity, runs, witness.peek(thing.base, len(thing) * item)


def resident(thing: Growable) -> int:
    return witness.total_kib(thing.base, extent(thing), "Rss") * KiB


class TestBytes:
    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    def test_appended(self, mode: Literal["charge", "noreserve"]) -> None:
        """Appended bytes follow each other."""
        buffer = GrowableBuffer(GiB, mode=mode)

        buffer.extend(b"hello")
        buffer.extend(b"")
        buffer.extend(b", world")

        assert bytes(buffer.view()) == b"hello, world"
        assert len(buffer) == 12
        assert witness.peek(buffer.base, 12) == b"hello, world"

    def test_nothing_at_first(self) -> None:
        """A new buffer has addresses, no memory and no bytes."""
        buffer = GrowableBuffer(GiB)

        assert len(buffer) == buffer.committed == witness.nbytes(buffer.base, GiB) == 0
        assert buffer.capacity == GiB

    @pytest.mark.parametrize(
        "data",
        [
            b"\x01\x00\x02\x00",
            bytearray(b"\x01\x00\x02\x00"),
            memoryview(b"\x01\x00\x02\x00"),
            memoryview(bytearray(b"\x01\x00\x02\x00")).cast("H"),
            stdlib_array.array("H", [1, 2]),
            np.array([1, 2], "<u2"),
            np.array([[1, 2]], "<u2"),
            np.array([(1, 2)], [("a", "<u2"), ("b", "<u2")]),
            (ctypes.c_uint16 * 2)(1, 2),
        ],
        ids=lambda data: type(data).__name__,
    )
    def test_from_any_buffer(self, data: Any) -> None:
        """extend takes any contiguous buffer, whatever its item type."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"<")

        buffer.extend(data)

        assert bytes(buffer.view()) == b"<" + bytes(data)

    @pytest.mark.parametrize(
        "wrong",
        ["text", 5, None, [1, 256], ["a"], memoryview(b"abcd")[::2], np.zeros((4, 4))[:, 1]],
        ids=lambda wrong: type(wrong).__name__,
    )
    def test_from_no_buffer(self, wrong: Any) -> None:
        """An object without a contiguous buffer is an error that changes nothing."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abc")
        before = state(buffer)

        with pytest.raises((TypeError, BufferError, ValueError)):
            buffer.extend(wrong)

        assert state(buffer) == before

    def test_from_itself(self) -> None:
        """A view of the buffer can be appended to it, up to the capacity."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"ab")

        for _ in range(18):
            buffer.extend(buffer.view())

        assert bytes(buffer.view()) == b"ab" * (1 << 18)

    def test_sources_are_let_go(self) -> None:
        """After extend a bytearray can be resized again, also if extend was refused."""
        buffer, data = GrowableBuffer(MiB), bytearray(700 * KiB)

        buffer.extend(data)
        with pytest.raises(OutOfMemoryError):
            buffer.extend(data)

        data.append(1)

    def test_resized(self) -> None:
        """resize keeps the bytes below the new length; new bytes are zero."""
        buffer = GrowableBuffer(64 * MiB)
        buffer.extend(b"abcdef")

        buffer.resize(3)
        buffer.resize(3 * MiB)

        assert len(buffer) == 3 * MiB
        assert bytes(buffer.view()) == b"abc" + bytes(3 * MiB - 3)

    def test_cleared(self) -> None:
        """After clear the length is 0, and the memory is still committed."""
        buffer = GrowableBuffer(64 * MiB, step=STEP)
        buffer.extend(b"x" * (3 * MiB))

        buffer.clear()

        assert len(buffer) == 0
        assert buffer.committed == 4 * MiB

    @pytest.mark.parametrize("capacity", [0, -3])
    def test_no_capacity(self, capacity: int) -> None:
        """The message names the argument, in the caller's unit."""
        for make in (GrowableBuffer, lambda n: GrowableArray("f8", n)):
            with pytest.raises(RangeError, match=f"capacity must be positive, got {capacity}$"):
                make(capacity)

    def test_capacity_in_bytes(self) -> None:
        """A capacity in items is refused as a size, by a message that says its unit."""
        for make in (GrowableArray, RingArray):
            with pytest.raises(TypeError, match=r"capacity is a number of items, .* got '1GiB'"):
                make("f8", "1GiB")  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="capacity is a number of items"):
            Pool(48, capacity="1GiB")  # type: ignore[arg-type]

    @pytest.mark.parametrize("capacity", [1, 7, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1])
    def test_to_the_last_byte(self, capacity: int) -> None:
        """The capacity is exactly the number asked for."""
        buffer = GrowableBuffer(capacity)

        buffer.extend(b"x" * capacity)

        assert len(buffer) == buffer.capacity == capacity
        too_much: Calls = (lambda: buffer.extend(b"y"), lambda: buffer.resize(capacity + 1))
        for grow in too_much:
            with pytest.raises(OutOfMemoryError):
                grow()
        assert bytes(buffer.view()) == b"x" * capacity

    @pytest.mark.parametrize("wrong", [1.0, b"1", None, 1j])
    def test_arguments_that_are_not_integers(self, wrong: Any) -> None:
        """Arguments that are not integers are TypeErrors."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abc")
        before = state(buffer)
        calls: Calls = (
            lambda: buffer.resize(wrong),
            lambda: buffer.view(wrong),
        )

        for call in calls:
            with pytest.raises(TypeError):
                call()
        if wrong is not None:  # None is the default capacity
            with pytest.raises(TypeError):
                GrowableArray("f8", wrong)
            with pytest.raises(ValueError if wrong == "1" else TypeError):
                GrowableBuffer("one byte" if wrong == "1" else wrong)

        assert state(buffer) == before

    @pytest.mark.parametrize("capacity", [0, -1, -(1 << 70)])
    def test_capacities_that_make_no_sense(self, capacity: int) -> None:
        """A capacity that is not positive is a RangeError."""
        for make in (GrowableBuffer, lambda n: GrowableArray("f8", n)):
            with pytest.raises(RangeError):
                make(capacity)

    @pytest.mark.parametrize("length", [-1, -(1 << 70)])
    def test_lengths_that_make_no_sense(self, length: int) -> None:
        """A negative length is a RangeError."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abc")

        with pytest.raises(RangeError, match=f"not be negative, got {length}"):
            buffer.resize(length)

        assert bytes(buffer.view()) == b"abc"


class TestViews:
    def test_ranges(self) -> None:
        """A view covers the range asked for, by default up to the end."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abcdef")

        assert bytes(buffer.view(2)) == b"cdef"
        assert bytes(buffer.view(2, 4)) == b"cd"
        assert bytes(buffer.view(hi=1)) == b"a"
        assert (buffer.view().format, buffer.view().itemsize) == ("B", 1)

    def test_writable_or_not(self) -> None:
        """Writes through a view change the buffer; a read-only view refuses them."""
        buffer = GrowableBuffer(MiB)
        buffer.resize(4)

        buffer.view()[1:3] = b"xy"
        readonly = buffer.view(readonly=True)

        assert bytes(readonly) == b"\0xy\0"
        with pytest.raises(TypeError):
            readonly[0] = 1

    def test_empty_ones(self) -> None:
        """An empty range is an empty view, which pins nothing."""
        buffer = GrowableBuffer(MiB)
        held = [buffer.view(), buffer.view(0, 0)]
        buffer.extend(b"abc")
        held += [buffer.view(3), buffer.view(1, 1, readonly=True)]

        buffer.clear()

        assert [len(view) for view in held] == [0, 0, 0, 0]
        assert [view.readonly for view in held] == [False, False, False, True]

    @pytest.mark.parametrize(("lo", "hi"), [(-1, None), (4, None), (0, 4), (2, 1), (0, -1)])
    def test_ranges_that_make_no_sense(self, lo: int, hi: int | None) -> None:
        """No view extends above the length, although memory is committed there."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abc")

        with pytest.raises(RangeError, match="must satisfy"):
            buffer.view(lo, hi)

    def test_growing_ends_none(self) -> None:
        """A buffer grows under live views, which show the same bytes as before.

        A bytearray refuses that; resizing an mmap invalidates them (cpython#115635).
        """
        buffer = GrowableBuffer(256 * MiB)
        buffer.extend(b"head")
        view = buffer.view()
        held = [view[1:], view.cast("I"), np.frombuffer(view, np.uint8), view.toreadonly(), view]

        while len(buffer) < 128 * MiB:
            buffer.extend(bytes(5 * MiB))
            buffer.resize(len(buffer) + 12345)
        view[:] = b"HEAD"

        assert bytes(buffer.view(0, 5)) == b"HEAD\0"
        assert [bytes(view)[-3:] for view in held] == [b"EAD"] * 5
        assert {address(view) for view in held[1:]} == {address(buffer.view())} == {buffer.base}

    @pytest.mark.parametrize("consumer", ["view", "slice", "cast", "ndarray", "obj", "pages"])
    def test_a_shorter_length_is_refused(self, consumer: str) -> None:
        """Bytes that an object made from a view shows can't be cut off; afterwards they can.

        The refusal changes nothing and names the bytes.
        """
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"0123456789" * 1000)
        makers: dict[str, Callable[[memoryview], Any]] = {
            "view": lambda view: view,
            "slice": lambda view: view[:0],
            "cast": lambda view: view.cast("d"),
            "ndarray": lambda view: np.ndarray((4,), np.uint8, buffer=view),
            "obj": lambda view: view.obj,
            "pages": lambda view: view.toreadonly()[4:5],
        }
        held = [makers[consumer](buffer.view(8, 32))]
        before = state(buffer)

        refused: Calls = (
            lambda: buffer.resize(31),
            buffer.clear,
            buffer.release,
        )
        for shorten in refused:
            with pytest.raises(ViewError, match=r"1 live view holds bytes of it: \[0x8, 0x20\)"):
                shorten()

        assert state(buffer) == before
        buffer.resize(32)
        held.clear()
        buffer.resize(31)
        buffer.clear()

    def test_the_message(self) -> None:
        """The refusal is a BufferError that names the bytes to be cut off."""
        buffer = GrowableBuffer(MiB)
        buffer.resize(0x100)
        held = buffer.view()

        with pytest.raises(BufferError) as refused:
            buffer.resize(0x10)

        assert str(refused.value).startswith(
            "cannot cut off [0x10, 0x100): 1 live view holds bytes of it: [0x0, 0x100); delete the"
        )
        del held

    def test_of_a_dropped_buffer(self) -> None:
        """A view outlives its buffer; the addresses are released with the last view."""
        buffer: GrowableBuffer | None = GrowableBuffer(4 * MiB)
        assert buffer is not None
        buffer.extend(b"abc")
        base, view = buffer.base, buffer.view()

        buffer = None

        assert bytes(view) == b"abc"
        del view
        assert not witness.is_mapped(base)

    def test_kept_errors_hold_nothing(self) -> None:
        """Exceptions hold no view, even if kept with their tracebacks."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abc")
        kept = []
        for wrong in (
            lambda: buffer.extend(bytes(2 * MiB)),
            lambda: buffer.view(1, 9),
            lambda: buffer.resize(-1),
        ):
            with pytest.raises((OutOfMemoryError, RangeError)) as refused:
                wrong()
            kept.append(refused)

        buffer.clear()

        assert len(kept) == 3


class TestZero:
    @pytest.mark.parametrize("low", [0, 1, 63, PAGE_SIZE, 70_000])
    @pytest.mark.parametrize("high", [70_001, 100_000, 300_000, MiB])
    def test_after_getting_shorter(self, low: int, high: int) -> None:
        """Exactly the bytes that were used before are cleared when the buffer grows again."""
        buffer = GrowableBuffer(4 * MiB)
        buffer.extend(b"\xaa" * 200_000)

        buffer.resize(low)
        buffer.resize(high)

        assert bytes(buffer.view()) == b"\xaa" * low + bytes(high - low)
        assert witness.peek(buffer.base + high, max(200_000 - high, 0)) == b"\xaa" * max(
            200_000 - high, 0
        )

    def test_in_part(self) -> None:
        """Bytes that one growth did not reach are cleared by the next."""
        buffer = GrowableBuffer(4 * MiB)
        buffer.extend(b"\xaa" * 100)

        buffer.clear()
        buffer.extend(b"b" * 10)
        buffer.resize(50)
        buffer.resize(20)
        buffer.extend(b"c")
        buffer.resize(200)

        assert bytes(buffer.view()) == b"b" * 10 + bytes(10) + b"c" + bytes(179)

    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    def test_a_large_range_takes_no_memory(self, mode: Literal["charge", "noreserve"]) -> None:
        """A large range is discarded instead of zeroed, so it takes no memory."""
        buffer = GrowableBuffer(64 * MiB, mode=mode, huge_pages="never")
        buffer.resize(40 * MiB)
        view = np.frombuffer(buffer.view(), np.uint8)
        view[:: PAGE_SIZE // 2] = 0xAA
        view[-1] = 0xAA
        del view
        buffer.resize(1000)

        buffer.resize(40 * MiB - 1000)

        assert resident(buffer) <= 64 * KiB
        result = np.frombuffer(buffer.view(), np.uint8)
        assert np.flatnonzero(result).tolist() == [0]

    def test_after_memory_was_given_back(self) -> None:
        """After trim fresh pages are zero, and the rest of the last page is cleared."""
        buffer = GrowableBuffer(4 * MiB)
        buffer.extend(b"\xaa" * MiB)
        buffer.resize(100)

        buffer.trim()
        buffer.resize(MiB)

        assert bytes(buffer.view()) == b"\xaa" * 100 + bytes(MiB - 100)


class TestCommits:
    def test_the_steps(self) -> None:
        """The first commit is 64 KiB; later ones end at multiples of the step, as the base does."""
        buffer = GrowableBuffer(64 * MiB, step=STEP)
        ends: list[int] = []

        for _ in range(10 * MiB // 4096):
            buffer.extend(bytes(4096))
            if not ends or ends[-1] != buffer.committed:
                ends.append(buffer.committed)
                assert witness.runs(buffer.base, 64 * MiB) == [(0, buffer.committed)]

        assert buffer.base % STEP == 0
        assert ends == [FIRST, *range(STEP, 12 * MiB, STEP)]

    @pytest.mark.parametrize("pages", [1, 3, 1000])
    def test_steps_of_another_size(self, pages: int) -> None:
        """Steps of any number of OS pages end at multiples of themselves."""
        step = pages * PAGE_SIZE
        buffer = GrowableBuffer(64 * MiB, step=step)

        for _ in range(40):
            buffer.extend(bytes(50_000))
            assert (buffer.base + buffer.committed) % step == 0 or buffer.committed == FIRST < step

    def test_two_mappings(self) -> None:
        """A buffer stays two mappings, committed and reserved, however often it grows."""
        buffer = GrowableBuffer(64 * MiB, step=4 * PAGE_SIZE)

        for _ in range(100):
            buffer.extend(bytes(PAGE_SIZE))

        spans = witness.spans(buffer.base, 64 * MiB)
        assert [span.perms for span in spans] == [witness.COMMITTED, witness.RESERVED]

    def test_steps_larger_than_all(self) -> None:
        """A step larger than the capacity commits up to the end, and reserves no more addresses."""
        before = witness.status("VmSize")
        buffer = GrowableBuffer(3 * PAGE_SIZE, step=1 << 30)

        buffer.resize(1)

        assert buffer.committed == 3 * PAGE_SIZE
        assert witness.status("VmSize") - before < 4 * MiB

    @pytest.mark.parametrize("step", [0, -PAGE_SIZE, PAGE_SIZE + 1])
    def test_steps_that_make_no_sense(self, step: int) -> None:
        """A step that is not whole OS pages is a RangeError."""
        for make in (GrowableBuffer, lambda n, step: GrowableArray("u1", n, step=step)):
            with pytest.raises(RangeError, match="step"):
                make(MiB, step=step)

    def test_preferring_huge_pages(self) -> None:
        """With huge pages preferred, the first step is a whole huge page, aligned."""
        buffer = GrowableBuffer(64 * MiB, huge_pages="prefer", step=STEP)

        buffer.resize(1)

        assert buffer.committed == STEP
        assert "hg" in witness.pieces(buffer.base, 1)[0].flags


class TestShrinkToFit:
    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    @pytest.mark.parametrize("length", [0, 1, PAGE_SIZE, PAGE_SIZE + 1, 5 * MiB])
    def test_whole_pages_above_the_length(
        self, length: int, mode: Literal["charge", "noreserve"]
    ) -> None:
        """trim decommits the pages above the length and returns their bytes."""
        buffer = GrowableBuffer(64 * MiB, mode=mode, step=STEP)
        buffer.extend(b"\xaa" * (9 * MiB))
        buffer.resize(length)

        given = buffer.trim()

        assert buffer.committed == -(-length // PAGE_SIZE) * PAGE_SIZE == 10 * MiB - given
        assert resident(buffer) <= max(buffer.committed, 0)
        assert state(buffer)[3] == b"\xaa" * length
        assert buffer.trim() == 0

    def test_under_views(self) -> None:
        """Views up to the very end do not prevent trim."""
        buffer = GrowableBuffer(64 * MiB, step=STEP)
        buffer.extend(b"\xaa" * (3 * MiB + 5))
        view = buffer.view()

        assert buffer.trim() == MiB - PAGE_SIZE
        assert bytes(view) == b"\xaa" * (3 * MiB + 5)

    def test_growing_again(self) -> None:
        """After trim the buffer grows by steps again."""
        buffer = GrowableBuffer(64 * MiB, step=STEP)
        buffer.extend(bytes(3 * MiB))
        buffer.clear()
        buffer.trim()

        buffer.extend(b"x")
        assert buffer.committed == FIRST
        buffer.resize(FIRST + 1)
        assert buffer.committed == STEP

    def test_when_full(self) -> None:
        """At full capacity trim decommits nothing."""
        buffer = GrowableBuffer(2 * PAGE_SIZE - 1)
        buffer.resize(2 * PAGE_SIZE - 1)

        assert buffer.trim() == 0
        assert buffer.committed == 2 * PAGE_SIZE


LIMITED = """
import json, resource
from helpers import witness
import numpy as np
from pyreserve import *
def allow(nbytes):
    most = -1 if nbytes is None else witness.status("VmData") + nbytes
    resource.setrlimit(resource.RLIMIT_DATA, (most, -1))
def state(thing):
    return len(thing), thing.committed, witness.runs(thing.base, 64 * MiB)
def refused(grow):
    try: grow()
    except OutOfMemoryError as error: return [error.limit, error.verb, error.errno_name]
"""


class TestRefusals:
    def test_used_up(self) -> None:
        """The error gives the length requested, the length and the capacity."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abc")
        before = state(buffer)

        with pytest.raises(MemoryError) as refused:
            buffer.resize(MiB + 1)

        assert state(buffer) == before
        assert isinstance(refused.value, OutOfMemoryError)
        assert (refused.value.limit, refused.value.nbytes) == ("capacity", MiB + 1)
        assert str(refused.value).endswith(
            "cannot grow to 1048577 bytes: the capacity is 1048576, and 3 are in use"
        )

    def test_a_length_as_a_size(self) -> None:
        """The length of a buffer may be a size such as "1MiB"; an unknown unit changes nothing."""
        buffer = GrowableBuffer(2 * MiB)
        buffer.resize("1MiB", zero=False)
        with pytest.raises(ValueError, match="not a size"):
            buffer.resize("1 furlong")
        assert len(buffer) == MiB

    @pytest.mark.parametrize("length", [1 << 40, (1 << 63) - 1, 1 << 64, 1 << 1000])
    def test_far_too_much(self, length: int) -> None:
        """Lengths and capacities beyond the address space are refused like others."""
        buffer = GrowableBuffer(MiB)

        with pytest.raises(OutOfMemoryError):
            buffer.resize(length)
        if length > 1 << 62:
            with pytest.raises(OutOfMemoryError):
                GrowableBuffer(length)

        assert len(buffer) == 0

    def test_a_refused_commit(self) -> None:
        """A commit refused by RLIMIT_DATA changes nothing, for any method that grows."""
        result = witness.fresh_python(
            LIMITED
            + """
buffer, array, data = GrowableBuffer(64 * MiB), GrowableArray("u8", 8 * MiB), bytes(32 * MiB)
buffer.extend(b"abc")
array.extend([1, 2, 3])
items, before = np.zeros(4 * MiB, "u8"), [state(buffer), state(array)]
allow(4 * MiB)
limits = [refused(lambda: buffer.resize(32 * MiB)), refused(lambda: buffer.extend(data)),
          refused(lambda: array.resize(4 * MiB)), refused(lambda: array.extend(items))]
same = [state(buffer), state(array)] == before
kept = [bytes(buffer.view()).decode(), array.array.tolist()]
allow(None)
buffer.resize(32 * MiB), array.extend(items)
print(json.dumps([limits, same, kept, len(buffer), len(array)]))
"""
        )

        assert result[0] == [["RLIMIT_DATA", "commit", "ENOMEM"]] * 4
        assert result[1:3] == [True, ["abc", [1, 2, 3]]]
        assert result[3:] == [32 * MiB, 4 * MiB + 3]

    def test_a_refused_step(self) -> None:
        """If a whole step is refused, less is committed ahead."""
        result = witness.fresh_python(
            LIMITED
            + """
buffer = GrowableBuffer(1 * GiB, step=256 * MiB)
buffer.extend(b"abc")
allow(8 * MiB)
buffer.resize(2 * MiB + 1)
buffer.view()[-1] = 1
first = buffer.committed
limits = refused(lambda: buffer.resize(32 * MiB))
allow(None)
buffer.resize(9 * MiB)
print(json.dumps([first, limits[0], buffer.committed]))
"""
        )

        committed, *rest = result
        assert 2 * MiB + PAGE_SIZE <= committed <= 8 * MiB + FIRST
        assert rest == ["RLIMIT_DATA", 256 * MiB]


class TestArrays:
    def test_each_array_is_its_own(self) -> None:
        """No two ndarrays share a base array whose shape or dtype could be changed."""
        growable = GrowableArray("i4", 100)
        growable.extend([1, 2, 3, 4])

        first, other = growable.array, growable.array

        assert first is not other
        assert not isinstance(first.base, np.ndarray)
        assert np.shares_memory(first, other)

    def test_items(self) -> None:
        """Items are appended singly and in bulk, in order."""
        array = GrowableArray("f8", 1000)

        array.append(1.5)
        array.append(2)
        array.extend([3, 4.5])
        array.extend(np.arange(2))
        array.extend([])

        assert array.array.tolist() == [1.5, 2, 3, 4.5, 0, 1]
        assert array.array.dtype == array.dtype == np.float64
        assert (len(array), array.capacity) == (6, 1000)

    def test_ndarrays_share_memory_after_growth(self) -> None:
        """An ndarray from before a growth is valid and shares memory with later ones."""
        array = GrowableArray("i4", 64 * MiB)
        array.extend([1, 2, 3])
        early, part = array.array, array[1:]

        for _ in range(20):
            array.extend(np.ones(500_000, "i4"))
            late = array.array
        late[0], early[1], part[1] = 10, 20, 30

        assert early.tolist() == late[:3].tolist() == [10, 20, 30]
        assert part.tolist() == [20, 30]
        assert np.shares_memory(early, late)
        assert len(late) == 10_000_003
        assert early.__array_interface__["data"] == late.__array_interface__["data"]

    def test_views_pin_their_items(self) -> None:
        """An ndarray, or a slice of one, pins its items; the array's own cached view does not."""
        array = GrowableArray("i4", 1000)
        array.extend(range(100))
        held = [array[:50]]

        refused: Calls = (lambda: array.resize(49), array.clear, array.release)
        for shorten in refused:
            with pytest.raises(BufferError, match="live view"):
                shorten()

        assert array.array.tolist() == list(range(100))
        held.clear()
        assert array[99] == 99
        array.resize(49)
        array.release()

    def test_added_items_are_zero(self) -> None:
        """Items that resize adds are zero, also where there were items before."""
        array = GrowableArray("i8", 1000)
        array.extend(range(1, 100))

        array.resize(3)
        array.resize(6)

        assert array.array.tolist() == [1, 2, 3, 0, 0, 0]

    def test_reading(self) -> None:
        """Indexing is numpy's: items, slices that share memory, lists, masks; and `in`."""
        array = GrowableArray("i4", 1000)
        array.extend(range(10))

        assert isinstance(array[-1], np.int32)
        assert array[2:4].tolist() == [2, 3]
        assert array[[1, 5]].tolist() == [1, 5]
        assert array[array.array > 7].tolist() == [8, 9]
        assert list(array) == list(range(10))
        assert 9 in array
        with pytest.raises(IndexError):
            array[10]

    def test_an_empty_one(self) -> None:
        """An empty array gives an empty ndarray of its dtype."""
        array = GrowableArray("c16", 10)

        assert array.array.shape == (0,)
        assert array.array.dtype == np.complex128
        with pytest.raises(IndexError):
            array[0]

    def test_each_ndarray_is_its_own(self) -> None:
        """Making one ndarray read-only does not affect the next."""
        array = GrowableArray("i4", 10)
        array.extend(range(6))

        array.array.flags.writeable = False

        assert array.array.flags.writeable

    def test_as_an_array_like(self) -> None:
        """numpy accepts it as an array, without a copy where possible."""
        array = GrowableArray("i4", 10)
        array.extend(range(3))

        assert np.shares_memory(np.asarray(array), array.array)
        assert np.asarray(array, "f8").tolist() == [0.0, 1.0, 2.0]
        assert not np.shares_memory(np.array(array), array.array)
        assert np.sum(array) == 3
        assert not np.shares_memory(array.__array__(copy=True), array.array)
        assert np.shares_memory(array.__array__(copy=False), array.array)
        with pytest.raises(ValueError, match="without a copy"):
            array.__array__("f8", copy=False)

    def test_from_itself(self) -> None:
        """An array can be appended to itself, also reversed."""
        array = GrowableArray("i4", 100)
        array.extend([1, 2])

        array.extend(array)
        array.extend(array.array[::-1])

        assert array.array.tolist() == [1, 2, 1, 2, 2, 1, 2, 1]

    @pytest.mark.parametrize(
        ("dtype", "value"),
        [
            ("?", True),
            (">i2", -5),
            ("u8", 1 << 63),
            ("f2", 0.5),
            ("c8", 1 + 2j),
            ("S3", b"abc"),
            ("U2", "äö"),
            ("M8[s]", np.datetime64(7, "s")),
            ("m8[D]", np.timedelta64(3, "D")),
            ("V3", np.void(b"abc")),
            ([("a", "i1"), ("b", "f8")], (3, 0.25)),
            ([("a", "i4", (2,))], ([1, 2],)),
        ],
        ids=str,
    )
    def test_dtypes(self, dtype: Any, value: Any) -> None:
        """Every dtype without references can be used."""
        array = GrowableArray(dtype, 100)
        expected = np.array([value] * 3, dtype)

        array.append(value)
        array.extend(expected[:2])

        assert array.array.tobytes() == expected.tobytes()
        assert array[1] == expected[1]
        assert array.capacity == 100

    @pytest.mark.parametrize(
        "dtype",
        ["O", [("a", "O")], "V0", "S", "U", ("f4", (3,)), np.dtype([("a", "O")], align=True)],
        ids=str,
    )
    def test_dtypes_that_do_not_go(self, dtype: Any) -> None:
        """Objects, items without bytes and items that are arrays are refused."""
        with pytest.raises(TypeError, match="without references"):
            GrowableArray(dtype, 100)

    @pytest.mark.skipif(not hasattr(getattr(np, "dtypes", None), "StringDType"), reason="numpy 2")
    def test_strings_that_are_elsewhere(self) -> None:
        """numpy's variable-width strings are refused: their items are pointers."""
        with pytest.raises(TypeError, match="without references"):
            GrowableArray(np.dtypes.StringDType(), 100)

    @pytest.mark.parametrize("wrong", ["x", [1], None, 1 << 70, {}, np.zeros((1, 1))], ids=str)
    def test_items_that_do_not_fit(self, wrong: Any) -> None:
        """A value that numpy can't convert raises numpy's error and changes nothing."""
        array = GrowableArray("i8", 100)
        array.append(7)
        before = state(array)

        with pytest.raises((TypeError, ValueError, OverflowError)):
            array.append(wrong)
        with pytest.raises((TypeError, ValueError, OverflowError)):
            array.extend([1, wrong])

        assert state(array) == before

    @pytest.mark.parametrize("wrong", [5, [[1, 2]], np.zeros((2, 2))], ids=str)
    def test_shapes_that_do_not_fit(self, wrong: Any) -> None:
        """extend takes one dimension."""
        array = GrowableArray("i8", 100)

        with pytest.raises(ValueError, match="one dimension"):
            array.extend(wrong)

        assert len(array) == 0

    def test_used_up(self) -> None:
        """The capacity is exactly the number asked for; the error counts items."""
        array = GrowableArray("i8", 10)
        array.extend(range(10))

        too_much: Calls = (lambda: array.append(1), lambda: array.resize(11))
        for grow in too_much:
            with pytest.raises(OutOfMemoryError) as refused:
                grow()
            assert "cannot grow to 11 items: the capacity is 10, and 10 are in use" in str(
                refused.value
            )

        with pytest.raises(RangeError, match="not be negative, got -3"):
            array.resize(-3)
        assert array.array.tolist() == list(range(10))

    def test_trim(self) -> None:
        """trim decommits memory above the items, also under live ndarrays."""
        array = GrowableArray("i8", MiB)
        array.resize(MiB)
        array.resize(PAGE_SIZE)
        held = array.array

        assert array.trim() == 8 * MiB - 8 * PAGE_SIZE
        assert array.committed == 8 * PAGE_SIZE
        held[-1] = 5
        assert array[-1] == 5

    def test_without_numpy(self) -> None:
        """Without numpy the error names the extra to install; buffers do not need it."""
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.modules['numpy'] = None\n"
                "import pyreserve\n"
                "pyreserve.GrowableBuffer(9).resize(9)\n"
                "pyreserve.GrowableArray('f8', 9)",
            ],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.stderr.splitlines()[-1] == (
            "ImportError: GrowableArray needs numpy: pip install 'pyreserve[numpy]'"
        )


class TestThreads:
    def test_each_append_is_whole(self) -> None:
        """Pieces that eight threads append are all there and not interleaved."""
        buffer, array, threads, rounds = GrowableBuffer(GiB), GrowableArray("i8", MiB), 8, 400
        start = threading.Barrier(threads)

        def work(number: int) -> None:
            start.wait()
            for i in range(rounds):
                buffer.extend(bytes([number]) * 1000)
                array.append(number * rounds + i)

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

        pieces = np.frombuffer(buffer.view(), np.uint8).reshape(-1, 1000)
        assert (pieces == pieces[:, :1]).all()
        assert np.bincount(pieces[:, 0]).tolist() == [rounds] * threads
        assert sorted(array.array.tolist()) == list(range(threads * rounds))

    def test_readers_beside_growth_and_shrinking(self) -> None:
        """Views keep their bytes while other threads grow, shrink and trim the buffer."""
        buffer, stop = GrowableBuffer(64 * MiB, step=64 * KiB), threading.Event()
        buffer.extend(b"abcdefgh" * 100)
        errors: list[BaseException] = []

        def read() -> None:
            try:
                while not stop.is_set():
                    view = buffer.view()
                    assert bytes(view[:800]) == b"abcdefgh" * 100
                    assert not any(view[800:1000])
                    view[-1] = view[-1]
                    del view
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        refused = 0
        workers = [threading.Thread(target=read) for _ in range(3)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for worker in workers:
                worker.start()
            for i in range(1500):
                try:
                    buffer.resize(800 + i * 997 % 300_000)
                    buffer.trim()
                except ViewError:
                    refused += 1
            stop.set()
            for worker in workers:
                worker.join()
        finally:
            stop.set()
            sys.setswitchinterval(before)

        assert errors == []
        buffer.resize(800)
        state(buffer)

    def test_an_exception_out_of_a_signal_handler(self) -> None:
        """After an exception from a signal handler, each piece is there whole or not at all."""
        buffer = GrowableBuffer(64 * MiB, step=64 * KiB)
        array = GrowableArray("u4", 16 * MiB, step=64 * KiB)
        append = array.appender()
        pieces, struck = [bytes([n + 1]) * 5000 for n in range(64)], 0

        with alarms_raise():
            for _ in range(100):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0003)
                    while True:
                        for piece in pieces:
                            buffer.extend(piece)
                            array.append(len(array))
                            append(len(array))
                        buffer.resize(len(buffer) + 5000)
                        buffer.resize(5000)
                        buffer.trim()
                        array.resize(len(array) // 2)
                except Struck:
                    struck += 1
                gc.collect(0)
                assert len(buffer) % 5000 == 0
                result = np.frombuffer(bytes(buffer.view()), np.uint8).reshape(-1, 5000)
                assert (result == result[:, :1]).all()
                assert array.array.tolist() == list(range(len(array)))
                state(buffer)

        assert struck == 100
        buffer.clear()
        buffer.extend(b"abc")
        assert bytes(buffer.view()) == b"abc"

    def test_interrupted_from_inside(self) -> None:
        """A call that interrupts another is refused, and the interrupted call completes."""
        buffer, array, refused = GrowableBuffer(MiB), GrowableArray("i4", 100), 0
        uses: Calls = (
            lambda: buffer.extend(b"x"),
            lambda: buffer.resize(0),
            buffer.view,
            buffer.trim,
            buffer.release,
        )
        commit = buffer._commit

        def interrupted(end: int) -> None:
            nonlocal refused
            for use in uses:
                with pytest.raises(RuntimeError, match="inside another call on the same buffer"):
                    use()
                refused += 1
            commit(end)

        buffer._commit = interrupted  # type: ignore[method-assign]
        buffer.extend(b"abc")
        array.append(1)

        assert refused == len(uses)
        assert bytes(buffer.view()) == b"abc"

    def test_values_that_use_the_array(self) -> None:
        """An item whose conversion appends to the same array follows the items appended then."""
        array = GrowableArray("f8", 100)

        class Value:
            def __float__(self) -> float:
                array.append(1)
                array.trim()
                return 2.0

        array.append(Value())
        array.extend([Value(), 3])

        assert array.array.tolist() == [1, 2, 1, 2, 3]


class TestFork:
    def test_the_child_goes_on(self) -> None:
        """A child has its own copy, which it can change."""
        buffer = GrowableBuffer(64 * MiB)
        buffer.extend(b"parent")
        view = buffer.view()

        def child() -> bytes:
            view[:] = b"childs"
            buffer.extend(b"x" * MiB)
            with pytest.raises(ViewError):
                buffer.clear()
            buffer.resize(8)
            buffer.trim()
            return bytes(buffer.view())

        assert witness.in_child(child) == b"childsxx"
        assert bytes(view) == b"parent"
        assert len(buffer) == 6

    def test_wiped(self) -> None:
        """With fork="wipe" a child has the same length, and zeros."""
        buffer = GrowableBuffer(MiB, fork="wipe")
        buffer.extend(b"abc")

        assert witness.in_child(lambda: bytes(buffer.view())) == bytes(3)

    def test_under_threads(self) -> None:
        """A child never inherits a lock that an appending thread of the parent held."""
        buffer, stop = GrowableBuffer(64 * MiB, mode="noreserve"), threading.Event()

        def work() -> None:
            while not stop.is_set():
                buffer.extend(bytes(100))
                if len(buffer) > 32 * MiB:
                    buffer.clear()

        def child() -> int:
            buffer.clear()
            buffer.extend(b"x" * 1000)
            return len(buffer)

        workers = [threading.Thread(target=work) for _ in range(2)]
        for worker in workers:
            worker.start()
        try:
            answers = [witness.in_child(child) for _ in range(5)]
        finally:
            stop.set()
            for worker in workers:
                worker.join()

        assert answers == [1000] * 5


class TestTheEnd:
    def test_after_release(self) -> None:
        """Every use after release raises ReleasedError."""
        buffer, array = GrowableBuffer(4 * MiB), GrowableArray("i4", 100)
        buffer.extend(b"abc")
        array.extend([1, 2, 3])
        bases = buffer.base, array.base
        assert array[0] == 1

        buffer.release()
        array.release()

        uses: list[Callable[[], object]] = [
            lambda: buffer.extend(b"x"),
            buffer.view,
            lambda: buffer.view(0, 0),
            lambda: array.append(1),
            lambda: array.extend([1]),
            lambda: array.extend([]),
            lambda: array.array,
            lambda: array[0],
            lambda: np.asarray(array),
        ]
        for thing in (buffer, array):
            uses += [
                thing.release,
                thing.clear,
                thing.trim,
                thing.__enter__,
                thing.__len__,
                lambda thing=thing: thing.resize(1),  # type: ignore[misc]
                lambda thing=thing: thing.committed,  # type: ignore[misc]
                lambda thing=thing: thing.base,  # type: ignore[misc]
            ]
        for use in uses:
            with pytest.raises(ReleasedError):
                use()
        assert buffer.released
        assert (buffer.capacity, array.capacity) == (4 * MiB, 100)
        assert not any(witness.is_mapped(base) for base in bases)

    def test_as_a_context(self) -> None:
        """Leaving the with block releases it, also if it was released inside."""
        with GrowableBuffer(MiB) as buffer, GrowableArray("i4", 5) as array:
            buffer.extend(b"abc")
            array.append(1)
        assert buffer.released
        assert array.released
        with GrowableBuffer(MiB) as buffer:
            buffer.release()

    def test_repr(self) -> None:
        """The repr gives the length, the capacity and the committed memory."""
        buffer, array = GrowableBuffer(4 * MiB, name="log"), GrowableArray("f4", 5000)
        buffer.extend(b"x" * 1000)
        array.append(1)

        size = f"{FIRST // KiB} KiB committed>"
        assert repr(buffer) == (f"<GrowableBuffer 'log' of 1,000 bytes: capacity 4,194,304, {size}")
        assert repr(array).startswith("<GrowableArray of 1 items: capacity 5,000, ")
        buffer.release()
        assert repr(buffer) == "<GrowableBuffer 'log' for 4,194,304 bytes, released>"

    def test_in_a_garbage_cycle(self) -> None:
        """A finaliser of a cycle that contains the buffer gets an error, not a crash."""
        result: list[object] = []

        class Holder:
            def __init__(self) -> None:
                self.buffer, self.array, self.me = GrowableBuffer(MiB), GrowableArray("i4", 5), self
                self.buffer.extend(b"abc")
                self.array.append(7)
                self.view = self.buffer.view()

            def __del__(self) -> None:
                for use in (
                    lambda: bytes(self.view),
                    lambda: self.buffer.extend(b"x"),
                    lambda: self.array.append(8),
                    lambda: list(self.array),
                ):
                    try:
                        result.append(use())
                    except ReleasedError as error:
                        result.append(type(error))

        Holder()
        gc.collect()

        assert result[0] == b"abc"
        assert len(result) == 4
