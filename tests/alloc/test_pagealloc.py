"""Runs of pages: allocation, refusals, calls on many runs, threads and forks."""

import contextlib
import copy
import gc
import pickle
import sys
import threading
import weakref
from array import array
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import numpy as np
import pytest

from helpers import witness
from helpers.interruptions import run_together
from pyreserve._alloc.pages import PageAllocator
from pyreserve._native import ffi
from pyreserve.errors import FreeError, OutOfMemoryError, RangeError, StateError

MANY = 1 << 33
WIDTHS = "bBhHiIlLqQ"


@pytest.fixture
def pages() -> PageAllocator:
    """An allocator of a thousand free pages."""
    return PageAllocator(1000)


@contextlib.contextmanager
def unchanged(pages: PageAllocator) -> Iterator[None]:
    """Assert that the block changes no page."""
    before = list(pages.free_runs()), list(pages.used_runs()), pages.free_pages
    yield
    assert (list(pages.free_runs()), list(pages.used_runs()), pages.free_pages) == before


def tables_address(pages: PageAllocator) -> int:
    return int(ffi.cast("uintptr_t", pages._handle))


class TestMaking:
    def test_all_pages_are_free_at_first(self, pages: PageAllocator) -> None:
        """A new allocator has one free run of all pages."""
        assert len(pages) == pages.npages == pages.free_pages == pages.longest_free == 1000
        assert list(pages.free_runs()) == [(0, 1000)]
        assert list(pages.used_runs()) == []

    def test_no_pages(self) -> None:
        """An allocator can start without pages and grow."""
        pages = PageAllocator(0, capacity=10)

        assert (len(pages), pages.longest_free, list(pages.free_runs())) == (0, 0, [])
        with pytest.raises(OutOfMemoryError):
            pages.alloc()
        assert pages.grow(10) == 0
        assert pages.alloc(10) == 0

    @pytest.mark.parametrize("npages", [0, 1, 511, 512, 8192, 8193, 1 << 20])
    def test_it_can_double_by_default(self, npages: int) -> None:
        """The default capacity is twice the number of pages, at least one."""
        pages = PageAllocator(npages)

        assert pages.capacity >= max(2 * npages, 1)

    @pytest.mark.parametrize(
        ("npages", "capacity"),
        [(-1, None), (10, 9), (0, 0), (0, -1), (1 << 45, None), (1, 1 << 45), (1 << 70, None)],
    )
    def test_numbers_that_make_no_sense(self, npages: int, capacity: int | None) -> None:
        """npages and capacity must be in range, and npages within the capacity."""
        with pytest.raises(RangeError):
            PageAllocator(npages, capacity=capacity)

    @pytest.mark.parametrize("wrong", [1.0, "1", None, np.float32(1)])
    def test_arguments_that_are_not_integers(self, pages: PageAllocator, wrong: Any) -> None:
        """Every method takes integers, and converts nothing to one."""
        calls: tuple[Callable[[Any], object], ...] = (
            PageAllocator,
            pages.alloc,
            lambda n: pages.alloc(align=n),
            pages.alloc_at,
            lambda n: pages.alloc_at(0, n),
            pages.free,
            lambda n: pages.free(0, n),
            pages.grow,
            pages.is_used,
        )
        for call in calls:
            with pytest.raises(TypeError):
                call(wrong)

    def test_numpy_integers(self, pages: PageAllocator) -> None:
        """Any object with __index__ is an integer."""
        assert pages.alloc(np.uint8(5), align=np.int64(4)) == 0  # type: ignore[arg-type]

        pages.free(np.int32(0), np.uint64(5))  # type: ignore[arg-type]

        assert pages.free_pages == 1000

    def test_it_is_not_copied(self, pages: PageAllocator) -> None:
        """An allocator refuses to be pickled or copied."""
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(pages)
        with pytest.raises(TypeError, match="copied"):
            copy.copy(pages)

    def test_repr(self, pages: PageAllocator) -> None:
        """The repr gives the number of pages, free pages and the longest free run."""
        pages.alloc_at(500)

        assert repr(pages) == "<PageAllocator of 1,000 pages: 999 free, 500 of them together>"


class TestOneRun:
    def test_the_lowest_run_that_fits(self, pages: PageAllocator) -> None:
        """alloc takes the lowest run that is long enough."""
        assert [pages.alloc(n) for n in (10, 20, 30)] == [0, 10, 30]

        pages.free(10, 20)

        assert [pages.alloc(n) for n in (21, 15, 5, 1)] == [60, 10, 25, 81]

    def test_alignment(self, pages: PageAllocator) -> None:
        """The first page is a multiple of the alignment; the pages before it stay free."""
        pages.alloc(3)

        assert pages.alloc(5, align=64) == 64
        assert list(pages.free_runs()) == [(3, 64), (69, 1000)]
        pages.free(0)
        assert pages.alloc(1, align=1 << 63) == 0

    def test_exactly_there(self, pages: PageAllocator) -> None:
        """alloc_at takes exactly the pages asked for."""
        pages.alloc_at(700, 100)

        assert list(pages.used_runs()) == [(700, 800)]

    def test_freeing_parts_and_neighbours(self, pages: PageAllocator) -> None:
        """A free may cover parts of several allocations."""
        first, second = pages.alloc(10), pages.alloc(10)

        pages.free(first + 5, second)

        assert list(pages.used_runs()) == [(0, 5), (15, 20)]

    def test_is_used(self, pages: PageAllocator) -> None:
        """is_used tells used pages from free ones; a page outside is not used."""
        pages.alloc_at(5)

        assert pages.is_used(5)
        assert not any(pages.is_used(page) for page in (4, 6, -1, 1000, 1 << 40, 1 << 70))

    def test_growth(self) -> None:
        """grow adds pages at the end, which join a free run there."""
        pages = PageAllocator(600, capacity=2000)
        pages.alloc(500)

        assert pages.grow(900) == 600
        assert list(pages.free_runs()) == [(500, 1500)]
        assert pages.alloc(1000) == 500
        assert list(pages.used_runs()) == [(0, 1500)]

    def test_runs_by_the_thousand(self) -> None:
        """Iteration continues beyond one batch of runs."""
        pages = PageAllocator(10_000)
        pages.alloc(10_000)
        pages.free_many(range(0, 10_000, 2))

        assert list(pages.free_runs()) == [(i, i + 1) for i in range(0, 10_000, 2)]
        assert list(pages.used_runs()) == [(i, i + 1) for i in range(1, 10_000, 2)]


class TestRefusals:
    def test_no_run_is_long_enough(self, pages: PageAllocator) -> None:
        """The error gives the pages requested, the free pages and the longest free run."""
        pages.alloc_at(400)

        with (
            unchanged(pages),
            pytest.raises(OutOfMemoryError, match=r"600 .* 999 .* 599") as caught,
        ):
            pages.alloc(600)

        error = caught.value
        assert (error.errno_name, error.limit, error.verb) == ("ENOMEM", "capacity", "alloc")

    @pytest.mark.parametrize("n", [1001, 1 << 40, (1 << 63) - 1])
    def test_more_than_there_is(self, pages: PageAllocator, n: int) -> None:
        """More pages than the allocator has are an OutOfMemoryError."""
        with unchanged(pages), pytest.raises(OutOfMemoryError):
            pages.alloc(n)

    def test_no_aligned_place(self, pages: PageAllocator) -> None:
        """A run that is long enough but misaligned is not used."""
        pages.alloc_at(512)
        pages.alloc_at(0)

        with unchanged(pages), pytest.raises(OutOfMemoryError, match="multiple of 512"):
            pages.alloc(1, align=512)

    @pytest.mark.parametrize("n", [0, -1, -(1 << 70), 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70])
    def test_lengths_that_make_no_sense(self, pages: PageAllocator, n: int) -> None:
        """A length that is zero, negative or huge is a RangeError, not an OverflowError."""
        pages.alloc_at(0, 10)
        for call in (
            lambda: pages.alloc(n),
            lambda: pages.alloc_at(20, n),
            lambda: pages.free(0, n),
            lambda: pages.grow(n),
            lambda: pages.alloc_many([1, n]),
            lambda: pages.free_many([0, 1], [1, n]),
            lambda: pages.alloc_many(n, array("q", [0])),
        ):
            with unchanged(pages), pytest.raises(RangeError):
                call()

    @pytest.mark.parametrize("page", [-1, 1000, 995, 1 << 40, 1 << 64, -(1 << 70)])
    def test_pages_that_are_not_there(self, pages: PageAllocator, page: int) -> None:
        """Pages outside are a RangeError, including those that grow could add."""
        pages.alloc_at(990, 10)
        calls: tuple[Callable[[], None], ...] = (
            lambda: pages.alloc_at(page, 10),
            lambda: pages.free(page, 10),
            lambda: pages.free_many([990, page], [1, 10]),
        )
        for call in calls:
            with unchanged(pages), pytest.raises(RangeError):
                call()

    @pytest.mark.parametrize("align", [0, 3, -2, 1 << 64, 1 << 70])
    def test_alignments_that_are_none(self, pages: PageAllocator, align: int) -> None:
        """An alignment must be a power of two that fits in 64 bits."""
        with unchanged(pages), pytest.raises(RangeError, match="power of two"):
            pages.alloc(1, align=align)

    def test_a_place_in_use(self, pages: PageAllocator) -> None:
        """alloc_at on used pages raises StateError: no kernel was asked."""
        pages.alloc_at(10, 10)

        with unchanged(pages), pytest.raises(StateError, match="in use"):
            pages.alloc_at(5, 10)

    def test_freed_twice(self, pages: PageAllocator) -> None:
        """Freeing pages of which some are free is a FreeError."""
        page = pages.alloc(10)
        pages.free(page + 3)

        for first, n in ((page + 3, 1), (page, 10), (page + 5, 6), (900, 1)):
            with unchanged(pages), pytest.raises(FreeError, match="free"):
                pages.free(first, n)

    def test_growth_beyond_the_capacity(self) -> None:
        """grow beyond the capacity is a RangeError."""
        pages = PageAllocator(10, capacity=20)

        with unchanged(pages), pytest.raises(RangeError, match="capacity 20"):
            pages.grow(11)

        assert pages.grow(10) == 10


class TestManyRuns:
    def test_a_run_for_each_length(self, pages: PageAllocator) -> None:
        """alloc_many places runs where single calls would."""
        one_by_one = PageAllocator(1000)
        lengths = [Random(5).randint(1, 30) for _ in range(40)]

        first = pages.alloc_many(lengths)

        assert isinstance(first, array)
        assert first.typecode == "q"
        assert list(first) == [one_by_one.alloc(n) for n in lengths]
        pages.free_many(first, lengths)
        assert pages.free_pages == 1000

    def test_all_or_none(self, pages: PageAllocator) -> None:
        """If a run does not fit, nothing changes, also in `out`; the error names the length."""
        out = array("q", [7, 7, 7])

        with unchanged(pages), pytest.raises(OutOfMemoryError, match=r"lengths\[2\]"):
            pages.alloc_many([500, 300, 201], out)

        assert list(out) == [7, 7, 7]

    def test_duplicates_are_freed_none(self, pages: PageAllocator) -> None:
        """A page that occurs twice is a FreeError that names the second; none is freed."""
        first = pages.alloc_many([3] * 100)
        first[77] = first[10]

        with unchanged(pages), pytest.raises(FreeError, match=r"pages\[77\]"):
            pages.free_many(first, 3)

    def test_overlaps_are_freed_none(self, pages: PageAllocator) -> None:
        """Overlapping runs are a FreeError; none is freed."""
        pages.alloc(100)

        with unchanged(pages), pytest.raises(FreeError, match=r"pages\[2\]"):
            pages.free_many([0, 50, 45], [10, 10, 6])

    def test_one_length_for_all(self, pages: PageAllocator) -> None:
        """A single integer is the length of every page to free, or of every item of `out`."""
        out = pages.alloc_many(7, array("H", [0] * 50))

        assert list(out) == list(range(0, 350, 7))
        pages.free_many(out, 7)
        assert pages.free_pages == 1000

    def test_one_length_for_nobody_knows_how_many(self, pages: PageAllocator) -> None:
        """A single length without `out` is a TypeError."""
        with unchanged(pages), pytest.raises(TypeError, match="out is required"):
            pages.alloc_many(7)  # type: ignore[call-overload]

    def test_none(self, pages: PageAllocator) -> None:
        """Empty arguments change nothing."""
        with unchanged(pages):
            assert list(pages.alloc_many([])) == []
            pages.free_many([])
            pages.free_many(array("q"), np.zeros(0, "i4"))

    @pytest.mark.parametrize(
        "lengths",
        [(4, 5, 6), range(4, 7), iter([4, 5, 6]), b"\4\5\6", np.array([4, 5, 6], "u2")],
        ids=["tuple", "range", "iterator", "bytes", "ndarray"],
    )
    def test_wherever_integers_are(self, pages: PageAllocator, lengths: Any) -> None:
        """Lengths come from any iterable or any buffer of integers."""
        assert list(pages.alloc_many(lengths)) == [0, 4, 9]

    def test_other_counts(self, pages: PageAllocator) -> None:
        """A number of lengths that differs from the number of pages is a RangeError."""
        pages.alloc(10)

        with unchanged(pages), pytest.raises(RangeError, match=r"out must .* \(3\), got 2"):
            pages.alloc_many([1, 2, 3], array("q", [0, 0]))
        with unchanged(pages), pytest.raises(RangeError, match=r"pages must .* \(2\), got 1"):
            pages.free_many([0], [1, 1])

    def test_negative_numbers(self, pages: PageAllocator) -> None:
        """A negative number in a list is a RangeError that names its index."""
        with unchanged(pages), pytest.raises(RangeError, match=r"lengths\[1\] must .* got -3"):
            pages.alloc_many([1, -3])
        with unchanged(pages), pytest.raises(RangeError, match=r"page -3 \(pages\[0\]\)"):
            pages.free_many([-3])
        with unchanged(pages), pytest.raises(RangeError, match=r"lengths\[1\]"):
            pages.alloc_many([1, 1 << 64])


class TestBuffers:
    @pytest.mark.parametrize("kind", WIDTHS)
    def test_arrays(self, pages: PageAllocator, kind: str) -> None:
        """Arrays of every width hold lengths and pages."""
        lengths = array(kind, [4, 5, 6])

        out = pages.alloc_many(lengths, array(kind, [0, 0, 0]))

        assert (out.typecode, list(out)) == (kind, [0, 4, 9])
        pages.free_many(out, lengths)
        assert pages.free_pages == 1000

    @pytest.mark.parametrize("kind", [*WIDTHS, "=i4", "int64", "uint8", "intp"])
    def test_ndarrays(self, pages: PageAllocator, kind: str) -> None:
        """ndarrays of every width and any number of dimensions hold lengths and pages."""
        lengths = np.array([[4, 5], [6, 7]], kind)
        out = np.zeros((2, 2), kind)

        assert pages.alloc_many(lengths, out) is out

        assert out.tolist() == [[0, 4], [9, 15]]
        pages.free_many(out, lengths)
        assert pages.free_pages == 1000

    def test_a_memoryview_of_a_part(self, pages: PageAllocator) -> None:
        """Only the items in the view are written."""
        whole = array("i", [-1] * 5)

        pages.alloc_many([1, 1], memoryview(whole)[1:3])

        assert list(whole) == [-1, 0, 1, -1, -1]

    @pytest.mark.parametrize(("kind", "most"), [("b", 127), ("B", 255), ("h", 32767), ("H", 65535)])
    def test_items_that_are_too_narrow(self, kind: str, most: int) -> None:
        """A page that does not fit an item of `out` is refused; the largest that fits is not."""
        pages = PageAllocator(70_000)
        pages.alloc(most)

        assert list(pages.alloc_many([1], array(kind, [0]))) == [most]
        pages.free(most)
        with unchanged(pages), pytest.raises(RangeError, match=r"lengths\[1\].*fit"):
            pages.alloc_many([1, 1], array(kind, [0, 0]))

    def test_pages_beyond_31_bits(self) -> None:
        """Page numbers beyond 31 bits are exact."""
        pages = PageAllocator(MANY)
        pages.alloc((1 << 32) - 1)

        out = pages.alloc_many([1, 1 << 31], np.zeros(2, "u8"))

        assert out.tolist() == [(1 << 32) - 1, 1 << 32]
        pages.free_many(out, np.array([1, 1 << 31], "u4"))
        assert pages.free_pages == MANY - (1 << 32) + 1

    @pytest.mark.parametrize(
        "out",
        [
            np.zeros(2),
            np.zeros(2, "?"),
            np.zeros(2, ">i4" if sys.byteorder == "little" else "<i4"),
            np.zeros(2, "c16"),
            np.zeros(2, "i4,i4"),
            array("d", [0, 0]),
            b"\0\0",
            pytest.param(memoryview(array("q", [0, 0])).toreadonly(), id="read-only memoryview"),
            [0, 0],
            "ab",
            5,
        ],
        ids=str,
    )
    def test_output_buffers_that_are_refused(self, pages: PageAllocator, out: Any) -> None:
        """Other formats, read-only buffers and objects without a buffer are TypeErrors."""
        with unchanged(pages), pytest.raises(TypeError):
            pages.alloc_many([1, 1], out)

    @pytest.mark.parametrize("wrong", [np.zeros(2), ["1"], [1.0], "12", None, [None]], ids=str)
    def test_input_buffers_that_are_refused(self, pages: PageAllocator, wrong: Any) -> None:
        """Lengths and pages that are not integers are TypeErrors."""
        pages.alloc(10)
        for call in (pages.alloc_many, pages.free_many, lambda n: pages.free_many([0, 1], n)):
            with unchanged(pages), pytest.raises(TypeError):
                call(wrong)

    def test_items_apart_from_each_other(self, pages: PageAllocator) -> None:
        """A buffer that is not contiguous is a ValueError."""
        strided = np.ones(4, int)[::2]
        pages.alloc(10)

        for call in (
            lambda: pages.alloc_many(strided),
            lambda: pages.alloc_many([1, 1], strided),
            lambda: pages.free_many(strided),
            lambda: pages.alloc_many([1] * 4, np.asfortranarray(np.zeros((2, 2), int))),
        ):
            with unchanged(pages), pytest.raises(ValueError, match="contiguous"):
                call()

    def test_lengths_and_out_in_one(self, pages: PageAllocator) -> None:
        """`out` may be the buffer of the lengths; a failure leaves the lengths."""
        both = array("q", [400, 300, 400])
        with unchanged(pages), pytest.raises(OutOfMemoryError):
            pages.alloc_many(both, both)
        assert list(both) == [400, 300, 400]

        both[2] = 300

        assert list(pages.alloc_many(both, both)) == [0, 400, 700]


class TestMemory:
    @witness.only_64_bit
    def test_tables_take_memory_where_they_are_used(self) -> None:
        """2**33 pages of which some thousands were used take under 1 MiB, in small pages."""
        gc.collect()
        pages = PageAllocator(MANY)
        random = Random(1)
        first = pages.alloc_many([random.randint(1, 9) for _ in range(999)])
        pages.free_many(first[::2])
        pages.alloc(1 << 32)

        base = tables_address(pages)
        rss = witness.total_kib(base, 1 << 30, "Rss") * 1024

        assert 0 < rss < 1 << 20
        assert all("nh" in piece.flags for piece in witness.pieces(base, 1 << 30))

    def test_the_tables_go_with_the_allocator(self) -> None:
        """The tables are unmapped with the last reference to the allocator."""
        pages = PageAllocator(1 << 28)
        pages.alloc()
        address = tables_address(pages)
        assert witness.is_mapped(address)

        del pages

        assert not witness.is_mapped(address)

    def test_a_finaliser_in_the_same_garbage(self) -> None:
        """A finaliser can use an allocator that is in the same garbage cycle."""

        def child() -> list[int]:
            results: list[int] = []

            class Finalised:
                def __init__(self) -> None:
                    self.me = self
                    self.pages = PageAllocator(100)
                    self.pages_too = weakref.finalize(self, results.append, 0)

                def __del__(self) -> None:
                    results.append(self.pages.alloc(10))
                    results.extend(self.pages.alloc_many([1, 2]))

            for _ in range(20):
                Finalised()
            gc.collect()
            return results

        results = witness.in_child(child)

        assert sorted(results) == sorted([0, 0, 10, 11] * 20)

    def test_a_second_init(self) -> None:
        """A second __init__ makes a new allocator, and fork handlers know it."""
        pages = PageAllocator(100)
        pages.alloc(100)

        pages.__init__(50)  # type: ignore[misc]

        assert witness.in_child(lambda: pages.alloc(50)) == 0
        assert pages.free_pages == 50


class TestThreads:
    THREADS = 8

    def run(self, work: Any) -> None:
        errors: list[BaseException] = []

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(i,)) for i in range(self.THREADS)]
        run_together(threads)
        assert errors == []

    def test_no_page_has_two_owners(self) -> None:
        """Eight threads that allocate and free never get the same page at once."""
        pages = PageAllocator(5000)
        owner = bytearray(5000)

        def work(number: int) -> None:
            random, mine = Random(number), list[tuple[int, int]]()
            me = bytes([number + 1])
            for _ in range(2000):
                if len(mine) > 10 or (mine and random.random() < 0.5):
                    first, n = mine.pop(random.randrange(len(mine)))
                    assert owner[first : first + n] == me * n
                    owner[first : first + n] = bytes(n)
                    pages.free(first, n)
                else:
                    n = random.randint(1, 50)
                    first = pages.alloc(n)
                    assert not any(owner[first : first + n])
                    owner[first : first + n] = me * n
                    mine.append((first, n))
            for first, n in mine:
                owner[first : first + n] = bytes(n)
            pages.free_many([first for first, _ in mine], [n for _, n in mine])

        self.run(work)

        assert pages.free_pages == 5000
        assert list(pages.free_runs()) == [(0, 5000)]

    def test_many_runs_are_all_or_none_for_others(self) -> None:
        """Threads that compete for too few pages each get all of their runs or none."""
        pages = PageAllocator(1000)

        def work(number: int) -> None:
            lengths = array("i", [number % 3 + 1] * 150)
            for _ in range(300):
                try:
                    first = pages.alloc_many(lengths)
                except OutOfMemoryError:
                    continue
                assert pages.free_pages <= 1000 - sum(lengths)
                pages.free_many(first, lengths)

        self.run(work)

        assert list(pages.free_runs()) == [(0, 1000)]

    def test_growth_by_many(self) -> None:
        """Threads that grow an allocator at once get different pages."""
        pages = PageAllocator(0, capacity=8 * 500 * 3)
        results: list[int] = []

        self.run(lambda _: results.extend([pages.grow(3) for _ in range(500)]))

        assert sorted(results) == list(range(0, 8 * 500 * 3, 3))
        assert pages.longest_free == len(pages) == 8 * 500 * 3

    def test_the_last_reference_goes_in_a_thread(self) -> None:
        """A call in progress keeps the tables alive."""

        def child() -> bool:
            for _ in range(200):
                held = [PageAllocator(20_000)]
                out = array("q", bytes(8 * 20_000))

                def work(held: Any = held, out: Any = out) -> None:
                    held[0].alloc_many(1, out)

                thread = threading.Thread(target=work)
                thread.start()
                with contextlib.suppress(IndexError):
                    held.clear()
                thread.join()
            return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(threading, "excepthook", lambda _: None)
            assert witness.in_child(child)


class TestFork:
    def test_the_child_has_a_copy(self, pages: PageAllocator) -> None:
        """A child continues from the same state, independently of the parent."""
        pages.alloc(10)

        def child() -> tuple[int, int]:
            page = pages.alloc(5)
            pages.free(0, 15)
            return page, pages.free_pages

        assert witness.in_child(child) == (10, 1000)
        assert pages.free_pages == 990
        assert pages.alloc() == 10

    def test_a_fork_while_threads_allocate(self) -> None:
        """A child never inherits a lock that a thread of the parent held."""
        pages = PageAllocator(100_000)
        stop = threading.Event()
        lengths = array("i", [3]) * 300
        rounds = [0] * 8

        def work(number: int) -> None:
            while not stop.is_set():
                pages.free(pages.alloc(7), 7)
                pages.free_many(pages.alloc_many(lengths), lengths)
                rounds[number] += 1

        def child() -> bool:
            pages.free(pages.alloc(1000), 1000)
            free = sum(b - a for a, b in pages.free_runs())
            used = sum(b - a for a, b in pages.used_runs())
            return free == pages.free_pages and free + used == 100_000

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(8)]
        for thread in threads:
            thread.start()
        try:
            answers = [witness.in_child(child) for _ in range(25)]
            before = list(rounds)
            while any(a == b for a, b in zip(before, rounds, strict=True)):
                threading.Event().wait(0.001)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

        assert all(answers)
        assert pages.free_pages == 100_000

    def test_two_threads_fork_at_once(self) -> None:
        """Concurrent forks of several threads all finish."""
        pages = [PageAllocator(100) for _ in range(50)]
        statuses: list[int] = []

        def work() -> None:
            for _ in range(10):
                statuses.append(witness.in_child(pages[7].alloc))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert statuses == [0] * 40

    def test_a_collection_inside_the_fork(self) -> None:
        """A finaliser that uses an allocator inside fork does not deadlock on its lock."""

        def child() -> bool:
            pages = PageAllocator(1000)
            alive = True

            class Garbage:
                def __init__(self) -> None:
                    self.me = self

                def __del__(self) -> None:
                    pages.free(pages.alloc())
                    if alive:
                        Garbage()

            gc.set_threshold(1, 1, 1)
            Garbage()
            for _ in range(30):
                assert witness.in_child(lambda: pages.alloc() == 0)
            assert gc.isenabled()
            alive = False
            return True

        assert witness.in_child(child)
