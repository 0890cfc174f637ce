"""Views, and the table of live views."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pyreserve
from helpers import witness
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, GiB, KiB, MiB, RangeError, Region, ViewError
from pyreserve._region import viewtable as views
from pyreserve._region.viewtable import ViewTable


class Exported:
    """A weakly referenceable stand-in for an ffi.buffer."""


def add(table: ViewTable, exported: Any, lo: int, hi: int) -> None:
    table.new.append((weakref.ref(exported), lo, hi))
    table.flush()


def buckets(table: ViewTable) -> int:
    return sum(len(level) for level in table._levels)


def live(table: ViewTable, lo: int, hi: int, *, prune: bool) -> list[tuple[int, int]]:
    table._active = not prune  # as if the call interrupted another one
    live = [(low, high) for _, low, high in table.live(lo, hi)]
    assert table._active is not prune
    table._active = False
    return live


def entries(table: ViewTable) -> int:
    return sum(len(b.entries) for level in table._levels for b in level.values())


def table_of(region: Region) -> ViewTable:
    table = region.exports._table
    assert table is not None
    return table


class TestView:
    def test_it_is_writable_bytes(self, region: Region) -> None:
        """A view is a writable memoryview of unsigned bytes with the requested length."""
        region.commit(0, PAGE_SIZE)

        view = region.view(3, 7)

        assert isinstance(view, memoryview)
        assert (view.format, view.itemsize, view.ndim) == ("B", 1, 1)
        assert (len(view), view.nbytes, view.contiguous) == (7, 7, True)
        assert not view.readonly

    def test_views_share_the_bytes(self, region: Region) -> None:
        """Views of the same bytes share their contents and have the addresses of the region."""
        region.commit(0, 2 * PAGE_SIZE)
        whole, piece = region.view(0, 2 * PAGE_SIZE), region.view(PAGE_SIZE - 2, 4)

        piece[:] = b"abcd"

        assert bytes(whole[PAGE_SIZE - 2 : PAGE_SIZE + 2]) == b"abcd"
        address = np.frombuffer(piece, np.uint8).__array_interface__["data"][0]
        assert address == region.base + PAGE_SIZE - 2

    def test_readonly(self, region: Region) -> None:
        """A readonly view cannot be written, and shows writes through other views."""
        region.commit(0, PAGE_SIZE)
        view, reader = region.view(0, 4), region.view(0, 4, readonly=True)

        view[:] = b"abcd"

        assert reader.readonly
        assert bytes(reader) == b"abcd"
        with pytest.raises(TypeError, match="read-only"):
            reader[0] = 1

    def test_the_whole_region(self, region: Region) -> None:
        """Without a length views and verbs reach to the end; without an offset they start at 0."""
        region.commit(PAGE_SIZE)
        assert region.committed_runs() == [(PAGE_SIZE, region.size - PAGE_SIZE)]
        region.commit()
        assert len(region.view()) == region.committed == len(region) == region.size
        assert len(region.view(3)) == region.size - 3
        region.populate()
        region.view()[-1] = 7
        region.discard(region.size - PAGE_SIZE)
        assert region.view()[-1] == 0
        region.decommit(PAGE_SIZE)
        assert region.committed == PAGE_SIZE
        with pytest.raises(RangeError, match="not all of it is committed"):
            region.discard()
        region.decommit()
        assert region.committed == 0
        for verb in (region.commit, region.view, region.discard, region.decommit, region.populate):
            with pytest.raises(RangeError):
                verb(region.size)

    def test_to_the_very_end(self, region: Region) -> None:
        """The last byte of a region can be viewed, and no byte after it."""
        region.commit(0, region.size)

        assert len(region.view(region.size - 1, 1)) == 1
        with pytest.raises(RangeError):
            region.view(region.size, 1)
        with pytest.raises(RangeError):
            region.view(region.size - 1, 2)

    def test_only_committed_bytes(self, region: Region) -> None:
        """A view with an uncommitted byte is refused, and pins nothing."""
        region.commit(PAGE_SIZE, 2 * PAGE_SIZE)

        for offset, length in [
            (0, 1),
            (PAGE_SIZE - 1, 2),
            (PAGE_SIZE, 2 * PAGE_SIZE + 1),
            (3 * PAGE_SIZE - 1, 2),
            (0, region.size),
        ]:
            with pytest.raises(RangeError, match="not all of it is committed"):
                region.view(offset, length)

        region.decommit(0, region.size)
        region.release()

    def test_across_commits(self, region: Region) -> None:
        """A view may span bytes of several commits."""
        for i in range(4):
            region.commit(i * PAGE_SIZE, PAGE_SIZE)

        assert bytes(region.view(0, 4 * PAGE_SIZE)) == bytes(4 * PAGE_SIZE)


class TestNdarray:
    @pytest.mark.parametrize("dtype", ["uint8", "<i4", "float64", "complex128", "M8[s]"])
    def test_shape_and_dtype(self, region: Region, dtype: str) -> None:
        """An ndarray has the requested shape and dtype, C-ordered, writable and zero at first."""
        region.commit(0, region.size)

        array = region.ndarray(PAGE_SIZE, (3, 5, 2), dtype)

        assert array.shape == (3, 5, 2)
        assert array.dtype == np.dtype(dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert not array.view(np.uint8).any()

    def test_a_number_is_one_side(self, region: Region) -> None:
        """An integer shape makes a vector; the default dtype is uint8."""
        region.commit(0, region.size)

        array = region.ndarray(0, 100)
        array[:] = 7

        assert array.dtype == np.uint8
        assert bytes(region.view(0, 101)) == b"\x07" * 100 + b"\0"

    def test_readonly(self, region: Region) -> None:
        """A readonly ndarray cannot be written."""
        region.commit(0, region.size)

        array = region.ndarray(0, 4, readonly=True)

        assert not array.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1

    def test_it_pins_its_bytes(self, region: Region) -> None:
        """Bytes under an ndarray cannot be decommitted; the bytes beside it can."""
        region.commit(0, region.size)
        array = region.ndarray(PAGE_SIZE, (2, PAGE_SIZE))

        with pytest.raises(ViewError):
            region.decommit(2 * PAGE_SIZE, PAGE_SIZE)
        region.decommit(0, PAGE_SIZE)
        region.decommit(3 * PAGE_SIZE, PAGE_SIZE)

        assert not array.any()

    @pytest.mark.parametrize("shape", [0, (0,), (2, 0), [2, 0], (0, 1 << 40)])
    @pytest.mark.parametrize("readonly", [False, True])
    def test_shapes_without_items(self, region: Region, shape: Any, readonly: bool) -> None:
        """An array without items has its shape and dtype, needs no commit and pins nothing."""
        array = region.ndarray(region.size, shape, "f8", readonly=readonly)

        assert array.shape == (tuple(shape) if isinstance(shape, tuple | list) else (shape,))
        assert (array.dtype, array.size, array.flags.writeable) == (np.float64, 0, not readonly)
        with pytest.raises(RangeError):
            region.ndarray(region.size + 1, shape)
        with pytest.raises(RangeError):
            region.ndarray(-1, shape)
        region.release()
        with pytest.raises(pyreserve.ReleasedError):
            region.ndarray(0, shape)

    def test_a_list_of_sides(self, region: Region) -> None:
        """A shape may be a list of sides."""
        region.commit()

        assert region.ndarray(0, [3, 5], "u2").shape == (3, 5)

    @pytest.mark.parametrize("shape", [-1, (-1,), (-2, -2), [0, -1], (1 << 62, 8)])
    def test_shapes_that_hold_nothing_or_too_much(self, region: Region, shape: Any) -> None:
        """A negative or overflowing shape is a ValueError."""
        region.commit(0, region.size)

        with pytest.raises(ValueError):  # noqa: PT011
            region.ndarray(0, shape)

        region.decommit(0, region.size)

    @pytest.mark.parametrize("dtype", ["O", [("a", "O"), ("b", "i4")]])
    def test_objects_are_refused(self, region: Region, dtype: Any) -> None:
        """dtypes that hold references to objects are refused."""
        region.commit(0, region.size)

        with pytest.raises(ValueError, match="OBJECT"):
            region.ndarray(0, 4, dtype)

        region.decommit(0, region.size)


SIZES = [1, PAGE_SIZE, 64 * KiB, 64 * KiB + 1, 3 * MiB, GiB, 1 << 40, 1 << 46]


@st.composite
def ranges(draw: st.DrawFn, size: int) -> tuple[int, int]:
    """Generate ranges inside [0, size) of any magnitude, often near the bounds of buckets."""
    length = min(size, draw(st.integers(0, size.bit_length()).flatmap(_around_power)))
    lo = draw(st.integers(0, size - length))
    if draw(st.booleans()):
        shift = draw(st.sampled_from([12, 16, 19, 22, 25, 28, 40]))
        lo = min(max(0, (lo >> shift << shift) + draw(st.integers(-2, 2))), size - length)
    return lo, lo + length


def _around_power(bits: int) -> st.SearchStrategy[int]:
    return st.integers(max(1, (1 << bits) - 2), (1 << bits) + 2)


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, list[tuple[str, Any]]]:
    """Generate a size of a table, and operations on it."""
    size = draw(st.sampled_from(SIZES))
    step = st.one_of(
        st.tuples(st.just("add"), ranges(size)),
        st.tuples(st.just("drop"), st.integers(0, 1000)),
        st.tuples(st.just("ask"), st.tuples(ranges(size), st.booleans())),
        st.tuples(st.just("sweep"), st.none()),
    )
    return size, draw(st.lists(step, max_size=60))


class TestTable:
    @settings(max_examples=examples(300))
    @given(histories())
    def test_it_answers_as_a_plain_list_would(
        self, history: tuple[int, list[tuple[str, Any]]]
    ) -> None:
        """After any adds, deaths and sweeps, `live` returns every live range that overlaps."""
        size, steps = history
        table = ViewTable(size)
        alive: list[tuple[Exported, int, int]] = []

        for step, argument in [*steps, ("ask", ((0, size), True))]:
            if step == "add":
                exported = Exported()
                add(table, exported, *argument)
                alive.append((exported, *argument))
                del exported
            elif step == "drop" and alive:
                del alive[argument % len(alive)]
            elif step == "sweep":
                table._sweep()
            elif step == "ask":
                (lo, hi), prune = argument

                overlapping = live(table, lo, hi, prune=prune)

                assert sorted(overlapping) == sorted(
                    (a, b) for _, a, b in alive if a < hi and b > lo
                )

    @settings(max_examples=examples(30))
    @given(st.sampled_from(SIZES), st.integers(0, 1 << 32))
    def test_sweeps_on_the_way_lose_nothing(self, size: int, seed: int) -> None:
        """After thousands of adds, random deaths and many sweeps, `live` finds the live ones."""
        random = Random(seed)
        table = ViewTable(size)
        alive: list[tuple[Exported, int, int]] = []

        for _ in range(2000):
            length = min(size, 1 << random.randrange(size.bit_length()))
            lo = random.randrange(size - length + 1)
            exported = Exported()
            add(table, exported, lo, lo + length)
            alive.append((exported, lo, lo + length))
            del exported
            if len(alive) > 100:
                del alive[random.randrange(len(alive))]

        for _ in range(20):
            lo = random.randrange(size)
            hi = min(size, lo + (1 << random.randrange(size.bit_length())))
            overlapping = live(table, lo, hi, prune=True)
            assert sorted(overlapping) == sorted((a, b) for _, a, b in alive if a < hi and b > lo)

    def test_asking_without_pruning_changes_nothing(self) -> None:
        """Without pruning, a lookup leaves dead entries in place; with it they are removed."""
        table = ViewTable(GiB)
        gone = [Exported() for _ in range(10)]
        for exported in gone:
            add(table, exported, 0, 10)
        del gone[:], exported

        unpruned = live(table, 0, 10, prune=False)
        kept = entries(table)
        live(table, 0, 10, prune=True)

        assert unpruned == []
        assert (kept, entries(table)) == (10, 0)

    def test_it_keeps_nothing_alive(self) -> None:
        """The table does not keep a buffer alive."""
        table, exported = ViewTable(GiB), Exported()
        add(table, exported, 0, 10)
        watch = weakref.ref(exported)

        del exported

        assert watch() is None


class Struck(Exception):  # noqa: N818
    """Raised by a signal handler."""


@contextmanager
def struck_after(opcodes: int) -> Iterator[None]:
    """Raise Struck in the table's code after a number of its opcodes."""
    left = opcodes

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != views.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left < 0:
                raise Struck
        return tracer

    before = sys.gettrace()
    sys._getframe().f_trace_opcodes = True  # Python 3.12 has no opcode events in other frames
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


class TestTableStruck:
    @pytest.mark.parametrize("sweeping", [False, True])
    def test_an_exception_anywhere_in_an_addition(self, sweeping: bool) -> None:
        """Wherever an exception strikes, every buffer added before and after is found,
        and the next sweep leaves no bucket behind."""
        lo, hi, opcodes, survived = 0, 40, 0, False
        while not survived:
            table, dead, kept = ViewTable(1 << 40), Exported(), Exported()
            new, late = Exported(), Exported()
            add(table, dead, 3 << 30, (3 << 30) + 5)
            add(table, kept, 5 << 30, (5 << 30) + 9)
            del dead
            if sweeping:
                table._until_sweep = 0
            try:
                with struck_after(opcodes):
                    add(table, new, lo, hi)
                survived = True
            except Struck:
                pass
            opcodes += 1

            add(table, late, lo + 8, hi + 8)

            live_ranges = live(table, 0, 1 << 40, prune=True)
            assert (lo + 8, hi + 8) in live_ranges
            assert (5 << 30, (5 << 30) + 9) in live_ranges
            assert (lo, hi) in live_ranges or not survived
            assert live(table, lo, hi + 8, prune=True) == [r for r in live_ranges if r[0] < 1 << 30]
            del new, late, kept
            table._sweep()
            assert buckets(table) == 0
        assert opcodes > 100

    def test_an_exception_anywhere_doubles_no_buffer(self) -> None:
        """Wherever an exception strikes while new buffers are sorted in, each is found once."""
        opcodes, survived = 0, False
        while not survived:
            table, exported = ViewTable(GiB), Exported()
            table.new.append((weakref.ref(exported), 0, 40))
            try:
                with struck_after(opcodes):
                    table.flush()
                survived = True
            except Struck:
                pass
            opcodes += 1
            assert len(table.live(0, 8)) == 1
            assert len(table.live(0, 8)) == 1


class TestTableSize:
    @pytest.mark.heavy
    def test_a_million_transient_views_leave_no_trace(self) -> None:
        """The table keeps a few hundred entries while views come and go at ever new places."""
        table = ViewTable(1 << 46)
        largest = 0

        for i in range(1_000_000):
            lo = i << 25
            add(table, Exported(), lo, lo + (PAGE_SIZE << i % 12))
            if i % 9973 == 0:
                largest = max(largest, entries(table) + buckets(table))

        assert largest < 5000

    def test_transient_views_of_a_region(self) -> None:
        """The same holds for views of a region, one in each of 100,000 pages."""
        count, largest = 100_000, 0
        region = pyreserve.reserve(count * PAGE_SIZE, mode="noreserve")
        region.commit(0, region.size)

        for i in range(count):
            region.view(i * PAGE_SIZE, PAGE_SIZE)
            largest = max(largest, entries(table_of(region)))

        assert largest <= 512
        region.release()

    def test_the_table_stays_in_proportion_to_the_living(self) -> None:
        """With 1,000 live views, transient ones add no more than a small multiple of that."""
        table, largest = ViewTable(1 << 46), 0
        alive = [Exported() for _ in range(1000)]
        for i, exported in enumerate(alive):
            add(table, exported, i << 30, (i << 30) + 10)

        for i in range(30_000):
            add(table, Exported(), i << 25, (i << 25) + 10)
            if i % 997 == 0:
                largest = max(largest, entries(table))

        assert largest <= 4000
        assert len(live(table, 0, 1 << 46, prune=True)) == 1000


class TestManyViews:
    COUNT = 10_000

    @pytest.fixture
    def crowded(self) -> tuple[Region, list[memoryview]]:
        """A committed region with live views on 10,000 pages, and 64 pages without views."""
        region = pyreserve.reserve((self.COUNT + 64) * PAGE_SIZE, mode="noreserve")
        region.commit(0, region.size)
        views = [region.view(i * PAGE_SIZE, PAGE_SIZE) for i in range(self.COUNT)]
        return region, views

    def test_views_elsewhere_are_not_looked_at(
        self, crowded: tuple[Region, list[memoryview]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A decommit away from 10,000 live views examines only a handful of them."""
        region, views = crowded
        scan, looked_at = ViewTable._scan, 0

        def counting(bucket: Any, *rest: Any) -> None:
            nonlocal looked_at
            looked_at += len(bucket.entries)
            scan(bucket, *rest)

        monkeypatch.setattr(ViewTable, "_scan", staticmethod(counting))

        region.decommit((self.COUNT + 63) * PAGE_SIZE, PAGE_SIZE)

        assert looked_at <= 64
        assert len(views) == self.COUNT

    def test_each_of_many_is_found(self, crowded: tuple[Region, list[memoryview]]) -> None:
        """Each of 10,000 live views protects its page until it is gone."""
        region, views = crowded
        for i in range(0, self.COUNT, 501):
            with pytest.raises(ViewError, match="1 live view"):
                region.decommit(i * PAGE_SIZE, PAGE_SIZE)

            views[i] = memoryview(b"")
            region.decommit(i * PAGE_SIZE, PAGE_SIZE)

            assert not region.is_committed(i * PAGE_SIZE, PAGE_SIZE)

    def test_a_release_counts_them_all(self, crowded: tuple[Region, list[memoryview]]) -> None:
        """A release is refused while any view lives, and the message has their number."""
        region, views = crowded

        with pytest.raises(ViewError, match="10000 live views"):
            region.release()
        del views[1:]
        with pytest.raises(ViewError, match="1 live view"):
            region.release()
        views.clear()
        region.release()

        assert region.released

    @witness.only_64_bit
    def test_a_wide_view_is_found_from_anywhere(self, region: Region) -> None:
        """A decommit of a single page finds a view of the whole region."""
        with pyreserve.reserve(1 << 33, mode="noreserve") as wide:
            wide.commit(0, wide.size)
            view = wide.view(1, wide.size - 2)

            for offset in (0, PAGE_SIZE, 1 << 31, wide.size - PAGE_SIZE):
                with pytest.raises(ViewError):
                    wide.decommit(offset, PAGE_SIZE)

            del view
