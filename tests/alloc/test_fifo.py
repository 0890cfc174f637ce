"""drop_front of buffers and arrays: items, views, and memory as /proc shows it."""

import gc
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

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
    RangeError,
    ReleasedError,
    StateError,
    ViewError,
    VMError,
    reserve,
)
from pyreserve._region.exports import Exports
from pyreserve._region.policies import HugePages

PAGE = PAGE_SIZE
ITEMS = PAGE // 8  # items of 8 bytes in a page

Growable = GrowableBuffer | GrowableArray[Any]


def numbers(*pages: int, capacity: int = 64) -> GrowableArray[np.uint64]:
    """Return an array of pages of numbers that count from 0."""
    array: GrowableArray[np.uint64] = GrowableArray(np.uint64, capacity * ITEMS, step=PAGE)
    for n in pages:
        array.extend(np.arange(len(array), len(array) + n * ITEMS, dtype=np.uint64))
    return array


def pages(n: int) -> GrowableBuffer:
    """Return a buffer of pages, each filled with its number."""
    buffer = GrowableBuffer(2 * n * PAGE, step=PAGE)
    for i in range(n):
        buffer.extend(bytes([i % 251]) * PAGE)
    return buffer


def counts_from(array: GrowableArray[Any], first: int) -> bool:
    return bool((array.array == np.arange(first, first + len(array))).all())


def runs(thing: Growable) -> list[tuple[int, int]]:
    """Return the committed pages as (first, number), after a check against the kernel's maps."""
    found = witness.runs(thing.base, thing.region.size)
    assert found == thing.region.committed_runs()
    return [(offset // PAGE, length // PAGE) for offset, length in found]


class TestDropped:
    def test_items_go_from_the_front(self) -> None:
        """The first items are gone, and indices count from the new front."""
        array = numbers(1)

        array.drop_front(3)
        array.append(ITEMS)

        assert len(array) == ITEMS - 2
        assert (array[0], array[-1], array.dropped) == (3, ITEMS, 3)
        assert counts_from(array, 3)

    def test_bytes_go_from_the_front(self) -> None:
        """A buffer drops bytes."""
        buffer = GrowableBuffer(MiB)
        buffer.extend(b"abcdef")

        buffer.drop_front(2)
        buffer.extend(b"gh")
        buffer.drop_front(1)

        assert bytes(buffer.view()) == b"defgh"
        assert bytes(buffer.view(1, 3)) == b"ef"
        assert (len(buffer), buffer.dropped) == (5, 3)

    def test_rows_go_from_the_front(self) -> None:
        """With an item shape, rows are dropped."""
        array = GrowableArray("f4", 1000, item_shape=(2, 3))
        rows = np.arange(600, dtype="f4").reshape(100, 2, 3)
        array.extend(rows)

        array.drop_front(40)
        array.append(rows[0])

        assert array.array.tolist() == [*rows[40:].tolist(), rows[0].tolist()]

    @pytest.mark.parametrize("n", [-1, 11, 1 << 70])
    def test_more_than_there_are(self, n: int) -> None:
        """A number below 0 or above the length is refused and changes nothing."""
        array, buffer = numbers(), GrowableBuffer(MiB)
        array.extend(range(10))
        buffer.extend(bytes(10))

        for thing, unit in ((array, "items"), (buffer, "bytes")):
            with pytest.raises(RangeError, match=rf"in \[0, 10\], the number of {unit}, got {n}$"):
                thing.drop_front(n)
            assert (len(thing), thing.dropped) == (10, 0)

    def test_no_integer(self) -> None:
        """A number that is not an integer is a TypeError."""
        with pytest.raises(TypeError):
            numbers(1).drop_front(1.0)  # type: ignore[arg-type]

    def test_all(self) -> None:
        """Nothing can be dropped from an empty container; the next item appended is the first."""
        array = numbers(2)

        array.drop_front(2 * ITEMS)
        array.drop_front(0)
        with pytest.raises(IndexError):
            array.pop()
        array.append(7)

        assert array.array.tolist() == [7]
        assert array.dropped == 2 * ITEMS

    def test_lengths_afterwards(self) -> None:
        """resize, pop and clear count from the new front, and new items are zero."""
        array = numbers(3)
        array.drop_front(ITEMS + 5)

        array.resize(4)
        array.resize(6)
        assert array.array.tolist() == [ITEMS + 5, ITEMS + 6, ITEMS + 7, ITEMS + 8, 0, 0]
        assert array.pop() == 0
        array.clear()
        array.resize(2 * ITEMS)

        assert not array.array.any()
        assert array.dropped == ITEMS + 5

    def test_between_spare_and_advance(self) -> None:
        """Items written into spare memory become part also after others were dropped."""
        array = numbers(2)
        spare = array.spare(10)
        spare[:] = range(2 * ITEMS, 2 * ITEMS + 10)

        array.drop_front(ITEMS + 1)
        array.advance(10)

        assert counts_from(array, ITEMS + 1)

    def test_after_release(self) -> None:
        """After release, drop_front and dropped raise ReleasedError."""
        array = numbers(1)
        array.release()

        with pytest.raises(ReleasedError):
            array.drop_front(0)
        with pytest.raises(ReleasedError):
            _ = array.dropped

    def test_into_the_middle_of_a_call(self) -> None:
        """Dropping items by a call that interrupts another is refused."""
        array, refused = numbers(1), []
        commit = array._commit

        def interrupted(end: int) -> None:
            with pytest.raises(StateError, match="inside another call") as error:
                array.drop_front(1)
            refused.append(error.value)
            commit(end)

        array._commit = interrupted  # type: ignore[method-assign]
        array.resize(2 * ITEMS)

        assert len(refused) == 1
        assert (len(array), array.dropped) == (2 * ITEMS, 0)


class TestAppender:
    def test_continues(self) -> None:
        """Items appended before and after a drop keep their order."""
        array, n = numbers(capacity=400), 0
        append = array.appender()

        for round_ in range(200):
            for _ in range(ITEMS // 2 + round_):
                append(n)
                n += 1
            array.drop_front(len(array) // 2)
            assert counts_from(array, array.dropped)
            assert array.dropped + len(array) == n

    @pytest.mark.parametrize("n", [0, 1, 10, 11])
    def test_dropped_inside(self, n: int) -> None:
        """Another thread may count or drop an item before it is stored: it is there exactly once.

        Such a thread is simulated by memory that drops items while one is stored. With a GIL it can
        run there only if numpy stores the items: complex numbers, for example.
        """
        array: GrowableArray[np.complex128] = GrowableArray(np.complex128, ITEMS)
        array.extend(range(9))

        class Dropping:
            def __setitem__(self, key: int, value: complex) -> None:
                array.drop_front(n)
                raise IndexError

        append = array.appender()
        append(9.0)
        assert array._lease is not None
        array._lease.lend(Dropping(), 10, 0)
        append(10.0)

        assert array.array.tolist() == list(range(n, 11))


class TestMemory:
    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    def test_whole_pages_are_given_back(self, mode: Any) -> None:
        """Pages that hold only dropped items are decommitted at once."""
        buffer = GrowableBuffer(64 * PAGE, step=PAGE, mode=mode)
        buffer.extend(b"x" * (10 * PAGE))

        for n, first in ((PAGE - 1, 0), (1, 1), (3 * PAGE + 7, 4), (0, 4), (6 * PAGE - 7, 10)):
            buffer.drop_front(n)
            assert runs(buffer) == ([(first, 10 - first)] if first < 10 else [])
            assert bytes(buffer.view()) == b"x" * (10 * PAGE - buffer.dropped)

    def test_pages_under_views_stay(self) -> None:
        """Views of dropped items stay valid; the next call after their end decommits the pages."""
        buffer = pages(10)
        held = [buffer.view(PAGE, PAGE + 1), buffer.view(3 * PAGE - 1, 3 * PAGE + 1)]

        buffer.drop_front(9 * PAGE)
        assert runs(buffer) == [(1, 3), (9, 1)]
        buffer.extend(bytes(2 * PAGE))
        assert [bytes(view) for view in held] == [b"\1", b"\2\3"]
        held[0][0] = 7  # still writable
        assert buffer.view()[0] == 9
        del held[0]
        buffer.extend(b"x")
        assert runs(buffer)[0] == (1, 3)
        buffer.drop_front(1)

        assert runs(buffer) == [(2, 2), (9, 4)]
        held.clear()
        assert buffer.trim() == 2 * PAGE
        assert runs(buffer) == [(9, 4)]

    def test_an_array_holds_its_items(self) -> None:
        """An ndarray of the items, or a slice of it, keeps the pages of all of them."""
        array = numbers(4)
        held = array.array[ITEMS : ITEMS + 2]

        array.extend(range(4 * ITEMS, 8 * ITEMS))
        array.drop_front(7 * ITEMS)

        assert runs(array) == [(0, 4), (7, 1)]
        assert held.tolist() == [ITEMS, ITEMS + 1]
        del held
        array.drop_front(0)
        assert runs(array) == [(7, 1)]

    def test_a_slice_holds_its_own_pages(self) -> None:
        """A slice of an array keeps only the pages of its own items."""
        array = numbers(4)
        held = array[ITEMS : ITEMS + 2]

        array.drop_front(3 * ITEMS)

        assert runs(array) == [(1, 1), (3, 1)]
        assert held.tolist() == [ITEMS, ITEMS + 1]

    def test_many_views(self) -> None:
        """Of a thousand pages, exactly those under views stay."""
        buffer = pages(1000)
        held = {n: buffer.view(n * PAGE + 5, n * PAGE + 6) for n in range(0, 1000, 3)}

        buffer.drop_front(len(buffer))
        assert runs(buffer) == [(n, 1) for n in held]
        for n in list(held)[::2]:
            del held[n]
        buffer.drop_front(0)
        assert runs(buffer) == [(n, 1) for n in held]
        assert all(view[0] == n % 251 for n, view in held.items())
        held.clear()

        assert buffer.trim() > 0
        assert runs(buffer) == []

    def test_exported_bytes_stay(self) -> None:
        """Pages that the array exported itself stay as long as it lives, others do not.

        A consumer of the buffer protocol may keep nothing but the array.
        """
        array = numbers(4)
        array.__buffer__(0)
        array.extend(range(4 * ITEMS, 8 * ITEMS))

        array.drop_front(6 * ITEMS)
        assert runs(array) == [(0, 4), (6, 2)]
        assert bytes(array.__buffer__(0)) == array.array.tobytes()
        array.extend(range(8 * ITEMS, 10 * ITEMS))
        array.drop_front(ITEMS)
        assert bytes(array.__buffer__(0)) == array.array.tobytes()
        array.drop_front(3 * ITEMS)

        assert runs(array) == [(0, 4), (6, 4)]
        assert array.trim() == 0
        array.release()

    def test_trim_above_and_below(self) -> None:
        """trim decommits pages above the length and below the front, and returns their bytes."""
        buffer = pages(10)
        held = buffer.view(PAGE, PAGE + 1)
        buffer.drop_front(5 * PAGE)
        buffer.resize(2 * PAGE)
        del held

        assert buffer.trim() == 4 * PAGE
        assert runs(buffer) == [(5, 2)]
        assert bytes(buffer.view()) == bytes([5]) * PAGE + bytes([6]) * PAGE

    def test_a_full_map_table(self) -> None:
        """If the kernel refuses, items are dropped and pages stay; trim raises the refusal."""
        if witness.vm_setting("max_map_count") > 200_000:
            pytest.skip("vm.max_map_count is too high to reach")
        buffer = pages(12)
        held = [buffer.view(4 * PAGE, 4 * PAGE + 1), buffer.view(8 * PAGE, 8 * PAGE + 1)]

        def child() -> list[object]:
            filler = reserve((2 * witness.vm_setting("max_map_count") + 2) * PAGE, mode="noreserve")
            try:
                for offset in range(0, filler.size, 2 * PAGE):
                    filler.commit(offset, PAGE)
            except OutOfMemoryError:
                pass
            buffer.drop_front(11 * PAGE)
            result = [len(buffer), buffer.dropped, buffer.view()[0], buffer.committed]
            with pytest.raises(VMError):
                buffer.trim()
            result.append(buffer.committed)
            assert witness.nbytes(buffer.base, buffer.region.size) == buffer.committed
            filler.release()
            buffer.drop_front(0)
            return [*result, runs(buffer), [view[0] for view in held]]

        *facts, before, trimmed, left, shown = witness.in_child(child)

        assert facts == [PAGE, 11 * PAGE, 11]
        assert before == trimmed
        assert 3 * PAGE < trimmed <= 12 * PAGE  # type: ignore[operator]
        assert left == [(4, 1), (8, 1), (11, 1)]
        assert shown == [4, 8]

    def test_without_memory_for_python(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If Python runs out of memory once items are gone, the next call decommits their pages."""
        g = numbers(4)

        def starve(*_: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(Exports, "live", starve)
            g.drop_front(2 * ITEMS)
        assert (len(g), g.dropped, g.committed) == (2 * ITEMS, 2 * ITEMS, 4 * PAGE)
        g.drop_front(0)
        assert g.committed == 2 * PAGE


class TestTheEndOfTheAddresses:
    @pytest.mark.parametrize("dropped", [1, ITEMS, ITEMS + 1, 3 * ITEMS, 7 * ITEMS + 3, 8 * ITEMS])
    def test_items_move_to_the_start(self, dropped: int) -> None:
        """Growth beyond the addresses moves the items to the start, whatever the overlap."""
        array = numbers(8, capacity=8)
        assert array.array[0] == 0

        array.drop_front(dropped)
        array.extend(range(8 * ITEMS, 8 * ITEMS + dropped))

        assert len(array) == 8 * ITEMS
        assert counts_from(array, dropped)
        assert array.dropped == dropped
        assert runs(array) == [(0, 8)]

    def test_every_way_to_grow(self) -> None:
        """append, an appender, extend, resize, spare and rows all move the items."""
        array = numbers(8, capacity=8)
        append = array.appender()
        n = 8 * ITEMS

        def by_spare(n: int) -> None:
            array.spare(1)[:] = n
            array.advance(1)

        def by_resize(n: int) -> None:
            array.resize(len(array) + 1)
            assert array[-1] == 0
            array[-1] = n

        ways: list[Callable[[int], None]] = [
            array.append,
            append,
            lambda n: array.extend([n]),
            by_spare,
            by_resize,
        ]
        for grow in ways:
            array.drop_front(2 * ITEMS)
            while array._front:
                grow(n)
                n += 1
            assert counts_from(array, n - len(array))
            array.extend(range(n, n + 8 * ITEMS - len(array)))
            n = array.dropped + len(array)

        rows = GrowableArray("u1", 100, item_shape=3)
        rows.extend(np.ones((100, 3), "u1"))
        rows.drop_front(99)
        rows.extend(np.full((99, 3), 2, "u1"))
        assert rows.array[:, 0].tolist() == [1] + [2] * 99

    def test_new_items_are_zero(self) -> None:
        """After a move, items that resize adds are zero also where other items were before."""
        buffer = GrowableBuffer(8 * PAGE, step=PAGE)
        buffer.extend(b"x" * (8 * PAGE))
        buffer.drop_front(3 * PAGE + 5)

        buffer.resize(6 * PAGE)
        buffer.resize(8 * PAGE)

        rest = 5 * PAGE - 5
        assert bytes(buffer.view()) == b"x" * rest + bytes(8 * PAGE - rest)

    def test_refused_under_views(self) -> None:
        """While a view is alive nothing moves; the error says so and changes nothing."""
        array = numbers(8, capacity=8)
        held = array[2 * ITEMS :][:3]
        array.drop_front(2 * ITEMS + 1)
        before = runs(array)

        grow: Callable[[], object]
        for grow in (
            lambda: array.append(1),
            lambda: array.resize(len(array) + 1),
            lambda: array.extend(array[:5]),
        ):
            with pytest.raises(OutOfMemoryError, match="live views keep the items") as refused:
                grow()
            assert refused.value.limit == "capacity"
            assert isinstance(refused.value.__cause__, ViewError)
            del refused
        assert runs(array) == before
        assert counts_from(array, 2 * ITEMS + 1)
        assert held.tolist() == [2 * ITEMS, 2 * ITEMS + 1, 2 * ITEMS + 2]

        del held
        array.append(8 * ITEMS)
        assert counts_from(array, 2 * ITEMS + 1)

    def test_refused_after_an_export(self) -> None:
        """Bytes that the array exported itself do not move."""
        array = numbers(8, capacity=8)
        array.__buffer__(0)
        array.drop_front(ITEMS)

        with pytest.raises(OutOfMemoryError, match="live views keep the items"):
            array.append(1)

    def test_more_than_the_capacity(self) -> None:
        """A length above the capacity is refused without a move."""
        array = numbers(8, capacity=8)
        array.drop_front(ITEMS)

        with pytest.raises(
            OutOfMemoryError, match=f"capacity is {8 * ITEMS}, and {7 * ITEMS} are in use"
        ):
            array.resize(8 * ITEMS + 1)

        assert runs(array) == [(1, 7)]


class TestStreams:
    @pytest.mark.parametrize(
        ("total", "window", "capacity", "huge_pages"),
        [
            pytest.param(200 * MiB, MiB, 5 * MiB, "never", id="quick"),
            pytest.param(8 * GiB, 64 * MiB, 3 * GiB, None, id="long", marks=pytest.mark.heavy),
        ],
    )
    def test_constant_memory(
        self, total: int, window: int, capacity: int, huge_pages: HugePages | None
    ) -> None:
        """A stream of any length needs only the resident memory of its window."""
        buffer = GrowableBuffer(capacity, huge_pages=huge_pages)
        piece = bytearray(window // 16)
        most = 0

        for n in range(total // len(piece)):
            piece[:8] = n.to_bytes(8, "little")
            buffer.extend(piece)
            if len(buffer) > window:
                first = int.from_bytes(buffer.view(0, 8), "little")
                assert first * len(piece) == buffer.dropped
                buffer.drop_front(len(piece))
            if n % 16 == 0:
                resident = witness.total_kib(buffer.base, buffer.region.size, "Rss") * KiB
                most = max(most, resident)

        assert buffer.dropped + len(buffer) == total
        assert window <= most <= window * 5 // 4

    def test_many_items_one_by_one(self) -> None:
        """A queue of single items keeps its memory and its order."""
        array, rounds = numbers(1), 20 * ITEMS

        for n in range(ITEMS, rounds):
            array.append(n)
            assert array[0] == n - ITEMS
            array.drop_front(1)

        assert counts_from(array, rounds - ITEMS)
        assert array.committed <= 3 * PAGE


class TestConcurrently:
    def test_a_producer_and_a_consumer(self) -> None:
        """Two threads pass numbers through one array, in order."""
        array, total = numbers(capacity=64), 40_000
        received: list[int] = []
        errors: list[BaseException] = []

        def produce() -> None:
            n = 0
            try:
                while n < total:
                    try:
                        array.extend(range(n, n + 100))
                        n += 100
                    except OutOfMemoryError:  # full, or the consumer holds a view
                        pass
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        producer = threading.Thread(target=produce)
        producer.start()
        try:
            while len(received) < total and not errors:
                items = array.array.tolist()
                received += items
                array.drop_front(len(items))
        finally:
            sys.setswitchinterval(before)
            producer.join()

        assert errors == []
        assert received == list(range(total))
        assert array.dropped == total
        runs(array)

    def test_an_exception_out_of_a_signal_handler(self) -> None:
        """After an exception from a handler the items are consecutive, whatever it interrupted."""
        array, buffer = numbers(capacity=8), GrowableBuffer(8 * PAGE, step=PAGE)
        append, struck, held = array.appender(), 0, None

        with alarms_raise():
            for round_ in range(200):
                buffer.drop_front(len(buffer))
                n = array.dropped + len(array)
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0.0002 + round_ % 7 * 0.0001)
                    while True:
                        while len(array) > (round_ % 5 + 2) * ITEMS:
                            array.drop_front(ITEMS - 3)
                        n = array.dropped + len(array)
                        append(n)
                        array.extend(range(n + 1, n + ITEMS))
                        buffer.extend(bytes([buffer.dropped // PAGE % 251]) * PAGE)
                        buffer.drop_front(PAGE)
                        array.trim()
                except Struck:
                    struck += 1
                gc.collect(0)
                assert counts_from(array, array.dropped)
                assert array.dropped + len(array) >= n
                assert len(buffer) in {0, PAGE}
                assert len(set(buffer.view())) <= 1
                held = array[:1] if round_ % 3 else None
                runs(array)
                runs(buffer)
                held = None

        assert held is None
        assert struck == 200
        array.trim()
        front = array._front // PAGE
        assert runs(array) == [(front, -(-array._offset(len(array)) // PAGE) - front)]

    @pytest.mark.parametrize("after", [False, True])
    @pytest.mark.parametrize("verb", ["slide", "decommit"])
    def test_an_exception_beside_a_call_of_c(
        self, monkeypatch: pytest.MonkeyPatch, verb: str, after: bool
    ) -> None:
        """An exception right before or after the system calls of a move or a drop loses no item.

        Source and destination of the move overlap.
        """
        array, buffer = numbers(8, capacity=8), pages(4)
        array.drop_front(ITEMS + 3)
        call = getattr(Exports, verb)

        def interrupted(*arguments: object) -> None:
            if after:
                call(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(Exports, verb, interrupted)
        with pytest.raises(KeyboardInterrupt):
            array.append(8 * ITEMS)
        if verb == "decommit":
            with pytest.raises(KeyboardInterrupt):
                buffer.drop_front(2 * PAGE)
        monkeypatch.undo()

        assert len(array) == 7 * ITEMS - 3
        assert counts_from(array, ITEMS + 3)
        array.extend(range(8 * ITEMS, 9 * ITEMS + 3))
        assert counts_from(array, ITEMS + 3)
        array.drop_front(2 * ITEMS)
        array.trim()
        assert runs(array) == [(2, 6)]
        if verb == "decommit":
            assert bytes(buffer.view()) == bytes([2]) * PAGE + bytes([3]) * PAGE
            buffer.trim()
            assert runs(buffer) == [(2, 2)]

    def test_in_a_forked_child(self) -> None:
        """A child drops items of its own copy."""
        array = numbers(4)

        def child() -> bool:
            array.drop_front(2 * ITEMS + 1)
            array.append(4 * ITEMS)
            return counts_from(array, 2 * ITEMS + 1) and runs(array)[0][0] == 2

        assert witness.in_child(child)
        assert counts_from(array, 0)
        assert array.dropped == 0
