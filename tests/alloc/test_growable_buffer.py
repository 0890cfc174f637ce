"""A GrowableBuffer as bytes, beside a bytearray, and as a buffer."""

import copy
import operator
import pickle
import re
import signal
import socket
import struct
import sys
import threading
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.buffers import Call, ends, few, filled, result_of
from helpers.interruptions import Struck, alarms_raise
from pyreserve import (
    GrowableArray,
    GrowableBuffer,
    MiB,
    OutOfMemoryError,
    RangeError,
    StateError,
    ViewError,
)
from pyreserve._alloc import bytesearch

needs_pep_688 = pytest.mark.skipif(
    sys.version_info < (3, 12), reason="Python 3.12 knows __buffer__"
)


class Log(GrowableBuffer):
    """A subclass with a constructor of its own."""

    def __init__(self) -> None:
        super().__init__(MiB)
        self.extend(b"hello, world")


class TestBytes:
    @pytest.mark.parametrize("method", ["find", "rfind", "index", "rindex", "count"])
    @given(data=few, sub=few.map(lambda sub: sub[:5]) | st.sampled_from(b"ab"), lo=ends, hi=ends)
    def test_searched(self, method: str, data: bytes, sub: Any, lo: Any, hi: Any) -> None:
        """Searches return what those of bytes return, also across the ends of pieces."""

        def search(on: Any) -> Any:
            return getattr(on, method)(sub, lo, hi)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bytesearch, "_FIRST_PIECE", 2)
            patch.setattr(bytesearch, "_PIECE", 4)
            assert result_of(search, filled(data)) == result_of(search, data)
        assert (sub in filled(data)) == (sub in data)

    @given(data=few, part=few.map(lambda part: part[:3]), lo=ends, hi=ends)
    def test_ends(self, data: bytes, part: bytes, lo: Any, hi: Any) -> None:
        """startswith and endswith answer as those of bytes, with a tuple too."""
        for method in ("startswith", "endswith"):
            for parts in (part, (b"x", part)):
                ours = getattr(filled(data), method)(parts, lo, hi)
                assert ours == getattr(data, method)(parts, lo, hi)

    @given(one=few, other=few)
    @example(b"ab", b"aba")
    @example(b"ab", b"ab")
    def test_compared(self, one: bytes, other: bytes) -> None:
        """Comparisons with any bytes-like object are those of bytes."""
        orders: list[Any] = [
            operator.eq,
            operator.ne,
            operator.lt,
            operator.le,
            operator.gt,
            operator.ge,
        ]
        buffer = filled(one)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(bytesearch, "_PIECE", 2)
            for against in (other, bytearray(other), memoryview(other), filled(other)):
                for order in orders:
                    assert order(buffer, against) == order(one, other)
                    assert order(against, buffer) == order(other, one)

    def test_not_compared(self) -> None:
        """Other objects are unequal, and have no order."""
        buffer = filled(b"a")

        assert buffer != "a"
        assert buffer != [97]
        with pytest.raises(TypeError):
            buffer < "a"  # noqa: B015
        with pytest.raises(TypeError, match="unhashable"):
            hash(buffer)

    def test_searching_copies_little(self) -> None:
        """Searching and comparing 64 MiB takes at most 2 MiB."""
        buffer = GrowableBuffer(128 * MiB, mode="noreserve")
        buffer.resize(64 * MiB)
        other = buffer.view()
        calls: list[Call] = [
            lambda b: b.find(b"xy"),
            lambda b: b.rfind(b"x"),
            lambda b: b.count(b"xy"),
            lambda b: b == other,
            lambda b: b.startswith(other),
            lambda b: b.readline(5),
        ]
        tracemalloc.start()
        try:
            before = tracemalloc.get_traced_memory()[0]
            for call in calls:
                call(buffer)
            peak = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()

        assert peak < 2 * MiB

    @given(data=few, key=st.integers(-45, 45) | st.slices(40), new=few)
    def test_items(self, data: bytes, key: Any, new: bytes) -> None:
        """Items and slices are read and set as those of a bytearray of fixed length."""
        ours, theirs = filled(data), bytearray(data)
        expected = result_of(operator.itemgetter(key), data)

        assert result_of(operator.itemgetter(key), ours) == expected
        if isinstance(key, slice):
            assert expected.__class__ is ours[key].__class__
            new = (new + bytes(40))[: len(ours[key])]

        def assign(on: Any) -> None:
            on[key] = new if isinstance(key, slice) else 7

        assert result_of(assign, ours) == result_of(assign, theirs)
        assert ours == theirs

    def test_refused_items(self) -> None:
        """Other lengths of a slice, values that are no byte, and deletions are refused."""
        buffer, held = filled(), []

        def delete(b: GrowableBuffer) -> None:
            del b[1]

        for kind, reason, call in (
            (ValueError, "never move", lambda b: b.__setitem__(slice(0, 2), b"abc")),
            (ValueError, "never move", lambda b: b.__setitem__(slice(0, 2), [1])),
            (ValueError, "range", lambda b: b.__setitem__(0, 256)),
            (ValueError, "range", lambda b: b.__setitem__(0, -1)),
            (TypeError, None, lambda b: b.__setitem__(0, b"a")),
            (TypeError, None, lambda b: b.__setitem__(slice(0, 1), 5)),
            (IndexError, None, lambda b: b.__setitem__(12, 1)),
            (TypeError, "middle", delete),
            (ValueError, "range", lambda b: b.append(256)),
            (TypeError, None, lambda b: b.append("a")),
            (TypeError, None, lambda b: b.extend("a")),
            (TypeError, None, lambda b: b.__iadd__([1])),
            (ValueError, "range", lambda b: b.extend([1, 256])),
            (TypeError, None, lambda b: b.write("a")),
            (BufferError, None, lambda b: b.write(memoryview(b"abcd")[::2])),
            (OutOfMemoryError, "16777216", lambda b: b.__imul__(1 << 40)),
        ):
            with pytest.raises(kind, match=reason) as refused:
                call(buffer)
            held.append(refused)

        assert buffer == b"hello, world"
        buffer.release()  # the exceptions hold no view

    @given(
        steps=st.lists(
            st.tuples(st.just("extend"), few)
            | st.tuples(st.just("extend"), few.map(list))
            | st.tuples(st.just("append"), st.integers(0, 255))
            | st.tuples(st.just("__iadd__"), few)
            | st.tuples(st.just("__imul__"), st.integers(-1, 3))
            | st.tuples(st.just("pop"))
            | st.tuples(st.just("hex"), st.just("-"))
            | st.tuples(st.just("clear"))
        )
    )
    def test_growing(self, steps: list[tuple[Any, ...]]) -> None:
        """Methods that add or remove bytes at the end do what those of a bytearray do."""
        ours, theirs = filled(b""), bytearray()
        for name, *arguments in steps:
            if len(theirs) > MiB:
                break
            results = [
                result_of(lambda b: getattr(b, name)(*arguments), b)  # noqa: B023
                for b in (ours, theirs)
            ]
            assert results[0] == results[1]
            assert list(ours) == list(theirs)

    def test_operators(self) -> None:
        """+ and * are copies as bytes; += and *= work in place."""
        buffer = same = filled(b"ab")
        buffer += b"c"
        buffer += buffer
        buffer *= 2

        assert buffer is same
        assert buffer == b"abcabc" * 2
        for value, expected in (
            (filled(b"ab") + b"c", b"abc"),
            (b"c" + filled(b"ab"), b"cab"),
            (bytearray(b"c") + filled(b"ab"), b"cab"),
            (filled(b"ab") + filled(b"c"), b"abc"),
            (2 * filled(b"ab") * 2, b"ab" * 4),
        ):
            assert value == expected
            assert isinstance(value, (bytes, bytearray))
        with pytest.raises(TypeError):
            buffer + "text"

    def test_from_an_array(self) -> None:
        """An array's bytes are appended, not its items, on all versions."""
        array = GrowableArray("<u2", 10)
        array.extend([1, 2])
        buffer = filled(b"")

        buffer.extend(array)
        buffer.extend(np.array([(3, 4)], "<u2,<u2"))
        buffer.write(np.array(5, "<u4"))

        assert buffer == struct.pack("<I", 5) + struct.pack("<2H", 3, 4)

    def test_spare(self) -> None:
        """Bytes written to spare memory become part by advance, without a copy."""
        buffer = filled()
        left, right = socket.socketpair()
        with left, right:
            left.send(b"!!!")
            spare = buffer.spare(100)
            buffer.advance(right.recv_into(spare))

        assert buffer == b"hello, world!!!"
        with pytest.raises(RangeError):
            buffer.advance(98)
        spare[3] = 33
        del spare
        buffer.advance(1)
        assert buffer[-4:] == b"!!!!"
        assert len(buffer.spare(0)) == 0


class TestBuffer:
    @needs_pep_688
    def test_exported(self) -> None:
        """From Python 3.12 on it is a writable buffer for every consumer."""
        buffer: Any = filled()

        assert bytes(memoryview(buffer)) == b"hello, world"
        assert bytearray(buffer) == b"".join([buffer]) == buffer
        assert str(buffer, "utf-8") == "hello, world"
        match = re.search(rb"w\w+", buffer)
        assert match is not None
        assert match.group() == b"world"
        assert zlib.crc32(buffer) == zlib.crc32(b"hello, world")
        struct.pack_into("<I", buffer, 0, 7)
        assert buffer[:4] == struct.pack("<I", 7)
        left, right = socket.socketpair()
        with left, right:
            left.send(b"HELLO")
            assert right.recv_into(buffer) == 5
        assert buffer[:7] == b"HELLO, "
        buffer.clear()

    @needs_pep_688
    def test_exports_pin(self) -> None:
        """Bytes of an export can't be cut off; a kept reference alone keeps the memory."""
        buffer: Any = filled(b"x" * 3 * MiB)
        view = memoryview(buffer)
        with pytest.raises(ViewError):
            buffer.clear()
        buffer.extend(bytes(MiB))  # grows, unlike a bytearray
        del view
        raw = np.ndarray(3 * MiB, "u1", buffer=buffer)
        buffer.clear()
        buffer.trim()
        assert raw[-1] == ord("x")
        buffer.release()
        assert raw[-1] == ord("x")

    def test_copies(self) -> None:
        """Pickles and copies have the class, the capacity, the bytes and the position."""
        buffer = Log()
        buffer.seek(3)
        copies: list[Any] = [
            pickle.loads(pickle.dumps(buffer, protocol)) for protocol in range(2, 6)
        ]
        copies += [copy.copy(buffer), copy.deepcopy(buffer)]
        out_of_band: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(buffer, 5, buffer_callback=out_of_band.append)
        copies.append(pickle.loads(pickled, buffers=out_of_band))

        assert len(out_of_band) == 1
        for other in copies:
            assert (other, other.tell(), other.capacity) == (buffer, 3, buffer.capacity)
            assert type(other) is Log
            other.extend(b"!")
            assert other.base != buffer.base


class TestRobust:
    def test_arguments_that_call_back(self) -> None:
        """Arguments whose conversion uses the buffer see it before the call."""
        buffer = filled(b"abc")

        class Number:
            def __index__(self) -> int:
                buffer.append(120)
                return 1

        class Source:
            def __buffer__(self, flags: int) -> memoryview:
                buffer.append(121)
                return memoryview(b"data")

        assert buffer[Number()] == 98
        assert buffer[: Number()] == b"a"
        buffer[Number()] = 66
        buffer.append(Number())
        assert buffer.find(b"x", Number()) == 3
        buffer.extend(Source())
        buffer.write(Source())
        assert buffer == b"dataxxx\1xydatay"
        with pytest.raises(StateError):
            buffer.hex("-", Number())

    def test_threads(self) -> None:
        """Threads append and write whole pieces."""
        buffer, pieces = filled(b"", 64 * MiB), [bytes([65 + n]) * 37 for n in range(4)]

        def work(piece: bytes) -> None:
            for _ in range(500):
                buffer.extend(piece)
                buffer.seek(0)
                buffer.read(37)
                buffer.write(b"")
                assert piece in buffer

        threads = [threading.Thread(target=work, args=(piece,)) for piece in pieces]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(buffer) == 4 * 500 * 37
        assert all(buffer.count(piece) == 500 for piece in pieces)

    def test_exceptions_out_of_signal_handlers(self) -> None:
        """Each write is there whole or not at all, and memory can be given back."""
        buffer = filled(b"", 64 * MiB)

        with alarms_raise():
            for _ in range(50):
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0003)
                    while True:
                        buffer.seek(len(buffer))
                        buffer.write(b"x" * 1000)
                        buffer.write(np.full(500, 0x7878, "u2"))
                        buffer.find(b"y")
                        buffer.seek(0)
                        buffer.readline()
                except Struck:
                    pass

        assert len(buffer) % 1000 == 0
        assert buffer.count(b"x") == len(buffer)
        buffer.clear()
        buffer.trim()
