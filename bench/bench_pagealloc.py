"""Pairs of free and alloc on pages, in C and from Python, beside getppid.

Random holes are the hard case. After millions of pairs first fit has filled the holes, and an
allocation mostly gets the run freed just before: the settled case.
"""

import ctypes
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from bitarray import bitarray

from pyreserve import KiB, PageAllocator

if TYPE_CHECKING:
    from conftest import Run

    Beside = tuple[str, Callable[[], float]]

NPAGES = 1 << 18
NPAGES_MANY = 1 << 20
BATCH = 4096
PAIRS = 60_000
PAIRS_TO_SETTLE = 2_000_000
GIB_OF_PAGES = 1 << 17  # of 8 KiB
SPACES = {"1 GiB": 1, "128 GiB": 1 << 7, "4 TiB": 1 << 12, "64 TiB": 1 << 16}
LENGTHS = {f"{n} pages": n for n in (1, 3, 8, 64, 100, 512)} | {"1 to 128": 0}


def _lengths(*names: str) -> pytest.MarkDecorator:
    chosen = names or tuple(LENGTHS)
    return pytest.mark.parametrize("length", [LENGTHS[name] for name in chosen], ids=chosen)


_fullness = pytest.mark.parametrize("full", [0.45, 0.9], ids=["45 %", "90 %"])


class Clock:
    """Timer that counts only the pairs in C, without the work between them."""

    library: ctypes.CDLL | None = None

    def __call__(self) -> float:
        assert self.library is not None
        return float(self.library.pages_clock())


clock = Clock()


@pytest.fixture
def pages_of(c_pairs: ctypes.CDLL) -> Iterator[Callable[[int], int]]:
    """A function that creates allocators in C, which are closed after the benchmark."""
    allocators: list[int] = []

    def pages_of(npages: int) -> int:
        allocators.append(c_pairs.pages_open(npages))
        assert allocators[-1]
        return allocators[-1]

    yield pages_of
    for pages in allocators:
        c_pairs.pages_close(pages)


@pytest.mark.parametrize("anew", [True, False], ids=["random", "settled"])
@_fullness
@_lengths()
@pytest.mark.benchmark(timer=clock)
def bench_pair(
    run: "Run",
    c_pairs: ctypes.CDLL,
    pages_of: Any,
    getppid: "Beside",
    benchmark: Any,
    length: int,
    full: float,
    anew: bool,
) -> None:
    pages, used, refused = pages_of(NPAGES), int(full * NPAGES), 0
    clock.library = c_pairs

    def pairs(count: int = PAIRS) -> None:
        nonlocal refused
        refusals = c_pairs.pages_pairs(pages, length, used, anew, count)
        assert refusals >= 0
        refused += refusals

    if not anew:
        pairs(PAIRS_TO_SETTLE)
        refused = 0
    holes = "at random places" if anew else "settled"
    run(
        f"free a run and allocate one, in C: {NPAGES:,} pages, {full:.0%} full, holes {holes}",
        PAIRS,
        pairs,
        beside=getppid,
        rounds=25,
        aim="x0.5" if length else "x1",
    )
    if refused:
        benchmark.extra_info["note"] = f"{refused / (25 * PAIRS):.2%} refused"


@_fullness
@_lengths("1 pages", "8 pages", "64 pages", "1 to 128")
def bench_many(run: "Run", getppid: "Beside", length: int, full: float) -> None:
    """The same pairs in free_many and alloc_many, from Python."""
    rng = np.random.default_rng(1)

    def state() -> tuple[Any, ...]:
        """Return an allocator with holes, the first pages and lengths of the runs to free, and the
        lengths to allocate."""
        lengths: Any = np.full(NPAGES_MANY // max(length, 1), length)
        if not length:
            lengths = np.exp(rng.random(len(lengths)) * np.log(129)).astype(np.int64)
            lengths = lengths[: np.searchsorted(lengths.cumsum(), NPAGES_MANY)]
        pages = PageAllocator(NPAGES_MANY)
        first = pages.alloc_many(lengths, np.empty_like(lengths))
        order = rng.permutation(len(lengths))
        kept = int(np.searchsorted(lengths[order].cumsum(), full * NPAGES_MANY))
        pages.free_many(first[order[kept:]], lengths[order[kept:]])
        victims = rng.permutation(order[:kept])[:BATCH]
        return pages, first[victims], lengths[victims], rng.permutation(lengths[victims])

    def pairs(pages: PageAllocator, first: Any, lengths: Any, wanted: Any) -> None:
        pages.free_many(first, lengths)
        pages.alloc_many(wanted, first)

    group = f"the same from Python, {BATCH} in a call: {NPAGES_MANY:,} pages, {full:.0%} full"
    run(group, BATCH, pairs, before=state, beside=getppid, rounds=20)


@pytest.mark.parametrize("space", SPACES)
@_lengths("1 pages", "100 pages")
@pytest.mark.parametrize("tail", [128, 4096])
def bench_far_end(
    run: "Run",
    c_pairs: ctypes.CDLL,
    pages_of: Any,
    getppid: "Beside",
    length: int,
    space: str,
    tail: int,
) -> None:
    npages = SPACES[space] * GIB_OF_PAGES
    pages = pages_of(npages)
    assert c_pairs.pages_fill_front(pages, tail, False) == 0

    def pairs() -> None:
        assert c_pairs.pages_last(pages, length, PAIRS) == npages - tail

    pairs()
    run(
        f"the same with only the last {tail:,} pages of 8 KiB free, and resident KiB of the tables",
        PAIRS,
        pairs,
        beside=getppid,
        aim="x0.6, below 64 KiB",
        note=f"{c_pairs.pages_resident(pages) // KiB} KiB",
    )


@pytest.fixture
def find(ns_a_call: Any) -> "Beside":
    """bitarray.find of the run that `bench_find` allocates."""
    bits, wanted = bitarray(1 << 24), bitarray(8)
    bits.setall(1)
    bits[-8:] = 0
    wanted.setall(0)
    return "bitarray.find", lambda: ns_a_call(1, lambda: bits.find(wanted))


FIND = "allocate and free the only 8 free pages, at the end of 16 Mi (128 GiB)"


def bench_find(run: "Run", c_pairs: ctypes.CDLL, pages_of: Any, find: "Beside") -> None:
    pages = pages_of(1 << 24)
    assert c_pairs.pages_fill_front(pages, 8, True) == 0

    def pairs() -> None:
        assert c_pairs.pages_last(pages, 8, PAIRS) == (1 << 24) - 8

    run(FIND, PAIRS, pairs, beside=find, rounds=15, aim="100,000 times")


def bench_find_from_python(run: "Run", find: "Beside") -> None:
    pages = PageAllocator(1 << 24)
    front: Any = np.empty((1 << 24) - 8, np.int64)
    pages.alloc_many(1, front)

    def pairs() -> None:
        for _ in range(1000):
            pages.free(pages.alloc(8), 8)

    run(FIND, 1000, pairs, beside=find, rounds=15)
