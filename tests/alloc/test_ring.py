"""RingArray: the latest items, always one contiguous array."""

import copy
import gc
import os
import pickle
import signal
import threading
import tracemalloc
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    TRACEMALLOC_DOMAIN,
    GrowableArray,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    RingArray,
    StateError,
    ViewError,
)
from pyreserve._region import owner

ITEMS = PAGE_SIZE // 8  # the capacity of the smallest ring of 8-byte items


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def filled(extra: int = 0) -> RingArray[np.int64]:
    """A full ring, `extra` items past the first wrap."""
    ring = RingArray(np.int64, ITEMS)
    ring.extend(np.arange(ITEMS + extra))
    return ring


# -- items ------------------------------------------------------------------------------------


@pytest.mark.parametrize("extra", [0, 1, 100, ITEMS - 1, ITEMS, ITEMS + 1])
def test_last_is_contiguous_wherever_the_ring_wraps(extra: int) -> None:
    """Any number of the latest items is one contiguous array over the ring's own memory."""
    ring = filled(extra)
    end = ITEMS + extra
    for n in (1, 2, ITEMS // 2, ITEMS - 1, ITEMS):
        array = ring.last(n)
        assert array.tolist() == list(range(end - n, end))
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert ring.base <= array.__array_interface__["data"][0] < ring.base + ring.reserved
    assert ring.array.tolist() == list(range(extra, end))
    assert (len(ring), ring.capacity, ring.total) == (ITEMS, ITEMS, end)


def test_the_capacity_fills_whole_pages() -> None:
    """The capacity is rounded up until the items end at an OS page."""
    for dtype, asked, capacity in (
        ("u1", 1, PAGE_SIZE),
        ("f8", ITEMS, ITEMS),
        ("f8", ITEMS + 1, 2 * ITEMS),
        ("V3", 5, PAGE_SIZE),
        ("V24", 5, PAGE_SIZE // 8),
        (f"V{3 * PAGE_SIZE}", 5, 5),
    ):
        with RingArray(dtype, asked) as ring:
            assert ring.capacity == capacity
            size = ring.capacity * ring.dtype.itemsize
            assert size % PAGE_SIZE == 0
            assert ring.reserved == ring.committed == 2 * size
            assert os.fstat(ring.region.fd).st_blocks * 512 == size


def test_a_capacity_that_would_grow_much_is_refused() -> None:
    """Items of an odd size fill whole pages only in large numbers, which the message names."""
    unit = PAGE_SIZE
    with pytest.raises(RangeError, match=f"multiple of {unit} .* ask for {unit}, or pad the dtype"):
        RingArray("S100001", 10)
    for capacity in (0, -1):
        with pytest.raises(RangeError, match=f"capacity must be positive, got {capacity}"):
            RingArray("f8", capacity)
    before = open_files()
    with pytest.raises(OutOfMemoryError):
        RingArray("f8", 1 << 60)
    assert open_files() == before
    with pytest.raises(TypeError):
        RingArray("f8", 1.5)  # type: ignore[call-overload]


@pytest.mark.parametrize("dtype", ["O", "V0", "(2,)f8", [("a", "O")]])
def test_dtypes_without_plain_items_are_refused(dtype: Any) -> None:
    """Items must have a size and neither references nor a shape of their own."""
    with pytest.raises(TypeError, match="dtype must have a fixed size"):
        RingArray(dtype, 10)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("?", [True, False, True]),
        ("i1", [1, -2, 3]),
        (">i4", [1, -2, 3]),
        ("f4", [0.5, 1.5, float("inf")]),
        ("c16", [1j, 2, 3.5]),
        ("M8[s]", [np.datetime64(n, "s") for n in (1, 2, 3)]),
        ("S5", [b"a", b"bcd", b"efghi"]),
        ("U3", ["a", "bcd", "äöü"]),
        ([("a", "i4"), ("b", "f8")], [(1, 2.5), (3, 4.5), (5, 6.5)]),
    ],
)
def test_any_plain_dtype(dtype: Any, values: list[Any]) -> None:
    """Items of every kind of dtype come back as numpy converts them."""
    with RingArray(dtype, 1) as ring:
        array = np.array(values, dtype)
        for value in values:
            ring.append(value)
        ring.extend(values)
        ring.extend(array)
        ring.extend(iter(array))
        for item in array:
            ring.append(item)
        assert ring.array.tolist() == array.tolist() * 5
        assert ring.dtype == array.dtype == ring[0:1].dtype


def test_values_of_every_kind() -> None:
    """extend takes arrays, other dtypes, lists, generators, ranges, strided arrays and rings."""
    ring = RingArray("i8", 1000)
    model: list[int] = []
    sources: list[Any] = [
        [1, 2],
        (3, 4),
        range(5, 8),
        np.array([8, 9]),
        np.array([1.5, 2.5]),
        np.array([7], "u1"),
        np.arange(20)[::3],
        np.arange(5)[::-1],
        [],
        np.empty(0),
        memoryview(np.arange(3).data),
    ]
    for values in sources:
        ring.extend(values)
        model += [int(value) for value in values]
        assert ring.array.tolist() == model
    ring.extend(n for n in range(3))
    ring.extend(ring)
    assert ring.array.tolist() == [*model, 0, 1, 2] * 2


@pytest.mark.parametrize("n", [1, 5, 100, ITEMS - 1, ITEMS, ITEMS + 1, 3 * ITEMS + 2])
@pytest.mark.parametrize("form", [list, tuple, np.array, "unaligned", "long long", "strided"])
def test_values_of_every_length_and_form(form: Any, n: int) -> None:
    """Lists and arrays of any length are appended as a deque does, wherever the ring wraps."""
    numbers = list(range(n))
    values: Any = np.array(numbers)
    if form == "unaligned":
        values = np.frombuffer(b"." + values.tobytes(), "i8", offset=1)
    elif form == "long long":
        values = values.astype("q")
    elif form == "strided":
        values = np.repeat(values, 2)[::2]
    else:
        values = form(numbers)
    for extra in (0, ITEMS // 2, ITEMS - 1):
        ring = filled(extra)
        model = deque(ring.array.tolist(), ITEMS)
        for _ in range(3):
            ring.extend(values)
            model.extend(numbers)
        assert ring.array.tolist() == list(model)
        assert ring.total == ITEMS + extra + 3 * n


@pytest.mark.parametrize("dtype", ["?", "u1", "i8", "e", "f", "d", "g", "F", "D", ">f8"])
def test_numbers_are_stored_as_numpy_stores_them(dtype: str) -> None:
    """Plain numbers become the items, warnings and exceptions that numpy makes of them."""
    numbers: list[Any] = [0, True, -1, 255, 256, 10**19, 10**400, 1.5, -0.0, 1j, np.float16(2)]
    numbers += [65504.0, 65519.9, 65520.0, 3.5e38, 1e-46, float("inf"), float("nan")]
    numbers += [np.int64(2**60 + 2**36 + 1)]
    ring = RingArray(dtype, 1000)
    array = np.zeros(1, ring.dtype)
    for number in numbers:
        outcomes: list[Any] = []
        stores: list[Callable[[Any], None]] = [
            lambda n: array.__setitem__(0, n),
            ring.append,
            lambda n: ring.extend([n]),
        ]
        for store in stores:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    store(number)
                    item = array[0] if not outcomes else ring[-1]
                    outcomes.append((repr(item), [str(w.message) for w in caught]))
                except (TypeError, ValueError, OverflowError) as error:
                    outcomes.append(type(error))
        assert outcomes[1:] == outcomes[:1] * 2, number


def test_wrong_values_change_nothing() -> None:
    """A value that numpy refuses raises numpy's exception, and the full ring stays as it is."""
    ring = filled(7)
    before = ring.array.tolist()
    wrong: list[tuple[Callable[[Any], None], Any, type[Exception]]] = [
        (ring.append, "x", ValueError),
        (ring.append, None, TypeError),
        (ring.append, [1], ValueError),
        (ring.append, 1 << 70, OverflowError),
        (ring.append, float("nan"), ValueError),
        (ring.append, 1j, TypeError),
        (ring.extend, [1, "x"], ValueError),
        (ring.extend, [1, 2, None], TypeError),
        (ring.extend, 5, ValueError),
        (ring.extend, np.zeros((2, 2)), ValueError),
        (ring.extend, (1 // (3 - n) for n in range(5)), ZeroDivisionError),
    ]
    for method, value, error in wrong:
        with pytest.raises(error):
            method(value)
        assert ring.array.tolist() == before
        assert ring.total == ITEMS + 7


def test_more_values_than_the_capacity() -> None:
    """An extend beyond the capacity keeps the last items, and `total` counts all."""
    ring = RingArray("i8", ITEMS)
    ring.append(-1)
    ring.extend(np.arange(5 * ITEMS + 3))
    assert ring.array.tolist() == list(range(4 * ITEMS + 3, 5 * ITEMS + 3))
    assert ring.total == 5 * ITEMS + 4


@pytest.mark.parametrize("extra", [0, 1, ITEMS // 2, ITEMS - 1])
@pytest.mark.parametrize("n", [1, ITEMS // 2, ITEMS // 2 + 1, ITEMS - 1, ITEMS])
def test_extend_by_its_own_items(extra: int, n: int) -> None:
    """Items of the ring itself are appended as they were, also over their own memory."""
    for key in (slice(ITEMS - n, None), slice(n), slice(None, -n - 1, -1)):
        ring = filled(extra)
        model = deque(ring.array.tolist(), ITEMS)
        values = ring[key]
        model.extend(values.tolist())
        ring.extend(values)
        assert ring.array.tolist() == list(model)


def test_indices_count_from_the_oldest() -> None:
    """Items, slices, masks and iteration are those of the array of all items, oldest first."""
    ring = filled(5)
    assert (ring[0], ring[-1], ring[ITEMS - 1]) == (5, ITEMS + 4, ITEMS + 4)
    assert ring[1:3].tolist() == [6, 7]
    assert ring[ring.array % 2 == 0][:2].tolist() == [6, 8]
    assert list(ring) == list(range(5, ITEMS + 5))
    assert 5 in ring
    assert 4 not in ring
    assert next(reversed(ring)) == ITEMS + 4
    for index in (ITEMS, -ITEMS - 1):
        with pytest.raises(IndexError):
            ring[index]
    assert np.asarray(ring).tolist() == ring.array.tolist()
    assert np.shares_memory(np.asarray(ring), ring.array)
    assert np.asarray(ring, "f4").dtype == np.float32


def test_iteration_is_over_a_copy() -> None:
    """Appending during an iteration changes none of its items."""
    ring = filled()
    seen = []
    for item in ring:
        ring.append(-1)
        seen.append(int(item))
    assert seen == list(range(ITEMS))


def test_last_of_too_many() -> None:
    """`n` is from 0 to the length."""
    ring = RingArray("f8", 100)
    assert len(ring.last(0)) == len(ring.array) == 0
    ring.extend([1, 2, 3])
    for n in (4, -1, 1 << 70):
        with pytest.raises(RangeError, match=r"n must be in \[0, 3\], the number of items, got"):
            ring.last(n)
    with pytest.raises(TypeError):
        ring.last(1.5)  # type: ignore[arg-type]
    assert ring.last(np.int8(2)).tolist() == [2, 3]  # type: ignore[arg-type]


def test_clear_forgets_the_items() -> None:
    """After clear the ring is empty and usable; older arrays and `total` stay."""
    ring = filled(3)
    array = ring.last(2)
    ring.clear()
    assert (len(ring), ring.total, ring.array.tolist()) == (0, ITEMS + 3, [])
    assert array.tolist() == [ITEMS + 1, ITEMS + 2]
    ring.append(7)
    assert ring.array.tolist() == [7]


# -- memory -----------------------------------------------------------------------------------


def test_later_items_overwrite_what_an_array_shows() -> None:
    """An array shows its items until later ones overwrite them; a copy keeps them."""
    ring = filled()
    array, kept = ring.last(2), ring.last(2, copy=True)
    ring.extend(range(ITEMS - 2))
    assert array.tolist() == kept.tolist() == [ITEMS - 2, ITEMS - 1]
    ring.append(-1)
    assert array.tolist() == [-1, ITEMS - 1]
    assert kept.tolist() == [ITEMS - 2, ITEMS - 1]
    array[1] = -2  # the oldest item now
    assert ring[0] == -2


def test_appending_takes_no_memory() -> None:
    """All memory is allocated by the constructor, so that filling the ring allocates none."""
    with RingArray("f8", 100 * ITEMS) as ring:
        blocks = os.fstat(ring.region.fd).st_blocks
        ring.extend(np.ones(300 * ITEMS))
        assert os.fstat(ring.region.fd).st_blocks == blocks
        assert blocks * 512 == 100 * PAGE_SIZE
        assert ring.array.sum() == 100 * ITEMS


def test_tracemalloc_counts_the_memory_once() -> None:
    """tracemalloc counts the memory of a ring once, not the addresses of both halves."""
    domain = tracemalloc.DomainFilter(inclusive=True, domain=TRACEMALLOC_DOMAIN)
    tracemalloc.start()
    try:
        ring = RingArray("f8", 1 << 16)
        traces = tracemalloc.take_snapshot().filter_traces([domain]).traces
        assert [trace.size for trace in traces] == [8 << 16]
        ring.release()
        assert not tracemalloc.take_snapshot().filter_traces([domain]).traces
    finally:
        tracemalloc.stop()


def test_release_is_refused_under_an_array() -> None:
    """Under a live array release raises and the ring stays usable; later it frees all memory."""
    before = open_files()
    ring = filled(9)
    array = ring.last(3)[1:].view("u1")
    for _ in range(3):
        with pytest.raises(ViewError):
            ring.release()
    ring.append(5)
    assert ring.last(2).tolist() == [ITEMS + 8, 5]
    base = ring.base
    del array
    ring.release()
    assert not witness.is_mapped(base)
    assert open_files() == before
    with pytest.raises(ReleasedError):
        ring.release()


@pytest.mark.parametrize("how", ["close", "with", "garbage"])
def test_arrays_outlive_the_ring(how: str) -> None:
    """Arrays of a closed or garbage ring stay right; the memory goes with the last one."""
    before = open_files()
    ring = filled(9)
    base = ring.base
    array, item = ring.last(ITEMS), ring.last(1)
    if how == "close":
        ring.close()
    elif how == "with":
        with ring:
            pass
    del ring
    gc.collect()
    assert array.tolist() == list(range(9, ITEMS + 9))
    array[:] = 1
    del array
    assert item.tolist() == [1]
    assert open_files() == before + 1
    del item
    assert open_files() == before
    assert not witness.is_mapped(base)


@pytest.mark.parametrize("end", [RingArray.release, RingArray.close])
def test_a_closed_ring_refuses_everything(end: Callable[[RingArray[Any]], None]) -> None:
    """After release or close every call raises ReleasedError."""
    ring = filled()
    end(ring)
    calls: list[Callable[[], object]] = [
        lambda: ring.append(1),
        lambda: ring.extend([1]),
        lambda: ring.extend([]),
        lambda: ring.last(1),
        lambda: ring.last(0),
        lambda: ring.last(1, copy=True),
        lambda: ring.array,
        lambda: ring[0],
        lambda: list(ring),
        lambda: len(ring),
        lambda: ring.total,
        ring.clear,
        ring.release,
        ring.__enter__,
        lambda: np.asarray(ring),
    ]
    for call in calls:
        with pytest.raises(ReleasedError):
            call()
    assert "released" in repr(ring)
    assert ring.capacity == ITEMS
    ring.close()


def test_no_copies_and_a_repr() -> None:
    """A ring can be neither pickled nor copied; its repr has name, dtype and counts."""
    ring = RingArray("f8", 1, name="mine")
    ring.extend(range(ITEMS + 2))
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="it owns addresses of this process"):
            copier(ring)
    assert repr(ring) == (
        f"<RingArray 'mine' of float64: {ITEMS:,} of {ITEMS:,} items, "
        f"{ITEMS + 2:,} appended in all>"
    )
    assert isinstance(ring, owner.OnRegion)
    assert {s.name for s in witness.spans(ring.base, ring.reserved)} == {"/memfd:mine (deleted)"}


def test_its_region_is_its_own() -> None:
    """Its region refuses to decommit, discard or release the memory of the ring."""
    ring = filled()
    region = ring.region
    for verb in (region.decommit, region.discard, region.release, region.close):
        with pytest.raises(StateError, match="part of a ring array: use the owner's methods"):
            verb()
    assert region.shared
    assert ring.array.tolist() == list(range(ITEMS))


def test_a_child_shares_the_memory_and_counts_for_itself() -> None:
    """A child sees the items and appends to the same memory; the parent's counts stay."""
    ring = filled()

    def work() -> tuple[list[int], int]:
        seen = ring.last(2).tolist()
        ring.append(-1)
        ring.release()
        return seen, open_files()

    seen, _ = witness.in_child(work)
    assert seen == [ITEMS - 2, ITEMS - 1]
    assert (len(ring), ring.total) == (ITEMS, ITEMS)
    assert ring[0] == -1  # the memory is shared
    assert ring[1] == 1


# -- interruptions and threads ------------------------------------------------------------------


class Calls:
    """A number that calls a function when numpy converts it."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __float__(self) -> float:
        self.call()
        return 1.0

    def __index__(self) -> int:
        self.call()
        return 1


def test_conversions_may_call_back() -> None:
    """A value whose conversion uses, closes or releases the ring does no harm."""
    ring = RingArray("f8", 1)
    ring.append(Calls(lambda: ring.append(5)))
    ring.extend([Calls(lambda: ring.extend([6, 7])), 2])
    assert ring.array.tolist() == [5, 1, 6, 7, 1, 2]
    with pytest.raises(RangeError):
        ring.last(Calls(ring.clear))  # type: ignore[arg-type]
    with pytest.raises(ReleasedError):
        ring.append(Calls(ring.release))
    other = RingArray("f8", 1)
    other.append(1)
    with pytest.raises(ReleasedError):
        other.last(Calls(other.close))  # type: ignore[arg-type]


def test_an_array_made_during_a_release_is_refused() -> None:
    """A finaliser that asks for items while release looks for views gets StateError."""
    ring = filled()
    seen: list[type[BaseException]] = []

    def interrupt(*_: object) -> int:
        for call in (lambda: ring.last(1), lambda: ring.append(1), lambda: ring.array):
            try:
                call()
            except StateError as error:
                seen.append(type(error))
        return 0

    exports = ring.region.exports
    release, exports_class = type(exports).release, type(exports)

    def interrupted(self: Any) -> None:
        interrupt()
        release(self)

    try:
        exports_class.release = interrupted  # type: ignore[method-assign]
        ring.release()
    finally:
        exports_class.release = release  # type: ignore[method-assign]
    assert seen == [StateError] * 3
    assert ring.released


def test_a_signal_handler_appends() -> None:
    """Items that a signal handler appends inside other calls are neither lost nor torn."""

    def run() -> tuple[int, int, list[int]]:
        ring = RingArray("i8", 1 << 17)
        own = 0

        def handler(*_: object) -> None:
            nonlocal own
            ring.append(-1)
            own += 1

        signal.signal(signal.SIGVTALRM, handler)
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.0002, 0.0002)
        for n in range(30_000):
            ring.append(n)
            ring.extend([n])
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        return ring.total, own, [int(n) for n in ring.array if n >= 0]

    total, own, items = witness.in_child(run)
    assert own > 3
    assert total == 60_000 + own
    assert items == [n for n in range(30_000) for _ in range(2)]


@pytest.mark.parametrize("dtype", ["e", "f", "F"])
def test_a_warning_that_appends(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that the handler of numpy's overflow warning appends is kept."""
    ring = RingArray(dtype, 8)
    monkeypatch.setattr(warnings, "showwarning", lambda *_, **__: ring.append(7))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        ring.append(1e300)
    assert ring.total == 2
    assert ring.array.tolist() == [7, np.inf]


def test_threads_lose_no_items() -> None:
    """Items of several threads are all appended, each thread's in its order."""
    ring = RingArray("i8", 1 << 16)
    count = 3_000

    def work(first: int) -> None:
        for n in range(first, first + count, 3):
            ring.append(n)
            ring.extend(np.array([n + 1, n + 2]))
            ring.last(1, copy=True)

    threads = [threading.Thread(target=work, args=(k * 10**6,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    items = ring.array
    assert ring.total == len(items) == 4 * count
    for k in range(4):
        own = items[(items >= k * 10**6) & (items < (k + 1) * 10**6)]
        assert own.tolist() == list(range(k * 10**6, k * 10**6 + count))


def test_a_copy_is_consistent() -> None:
    """A copy shows the ring of one moment, whatever other threads append."""
    ring = RingArray("i8", 1 << 17)
    ring.extend(np.arange(ring.capacity))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            end = ring.total
            ring.extend(np.arange(end, end + 100_000))
            ring.extend(list(range(end + 100_000, end + 101_000)))
            ring.append(end + 101_000)

    thread = threading.Thread(target=work)
    thread.start()
    copies = [ring.last(ring.capacity, copy=True) for _ in range(100)]
    stop.set()
    thread.join()
    assert all((np.diff(items) == 1).all() for items in copies)


def test_a_copy_is_consistent_beside_a_handler() -> None:
    """So does a copy inside which a signal handler appends."""

    class Interrupted(RingArray[np.int64]):
        times = 2

        def last(self, n: int, *, copy: bool = False) -> Any:
            items = super().last(n, copy=copy)
            if not copy and self.times:
                self.times -= 1
                self.append(self.total)
            return items

    ring = Interrupted("i8", ITEMS)
    ring.extend(np.arange(ITEMS))
    assert ring.last(ITEMS, copy=True).tolist() == list(range(2, ITEMS + 2))


def test_a_number_with_fields() -> None:
    """Items may be numbers whose dtype also names their parts."""
    dtype = np.dtype((np.int32, {"low": (np.int16, 0), "high": (np.int16, 2)}))
    for items in (RingArray(dtype, 100), GrowableArray(dtype, 100)):
        for n in range(3):
            items.append(n)
        items.extend([3, np.int32(4)])
        items.extend(np.arange(5, 7, dtype=dtype))
        assert items.array.tolist() == list(range(7))


def test_threads_and_releases() -> None:
    """A ring released while other threads use it ends only when no array of it is alive."""
    ring = filled()
    failures: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                array = ring.last(5)
                ring.append(1)
                ring.extend(array)
                array.fill(1)
                del array
        except ReleasedError:
            pass
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        try:
            ring.release()
            break
        except ViewError:
            ring.append(1)
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures
    if not ring.released:
        ring.release()
