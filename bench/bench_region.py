"""Regions against the same system calls in C, and with many live views against none."""

import ctypes
from typing import Any

import pytest

from pyreserve import GiB, KiB, Region, reserve
from pyreserve._native import ffi, lib

RESERVE = "reserve and release 136 GiB"
COMMIT = "commit 64 KiB"
VIEW = "view 4 KiB"
DECOMMIT = "commit and decommit 64 KiB"
PIECE = 64 * KiB
CALLS = 1000


def _run(benchmark: Any, group: str, function: Any, *, reference: bool = False) -> None:
    benchmark.group = group
    benchmark.extra_info.update(reference=reference, calls=CALLS)
    benchmark.pedantic(function, rounds=40, warmup_rounds=2)


def bench_empty_cffi_call(benchmark: Any) -> None:
    null, free = ffi.NULL, lib.region_free

    def calls() -> None:
        for _ in range(CALLS):
            free(null)

    _run(benchmark, "an empty cffi call, for comparison", calls)


def bench_reserve_release_c_same_calls(benchmark: Any, c_loops: ctypes.CDLL) -> None:
    _run(benchmark, RESERVE, lambda: c_loops.reserve_release(136 * GiB, 0, CALLS), reference=True)


def bench_reserve_release_c_mmap_munmap_only(benchmark: Any, c_loops: ctypes.CDLL) -> None:
    _run(benchmark, RESERVE, lambda: c_loops.reserve_release(136 * GiB, 1, CALLS))


def bench_reserve_release(benchmark: Any) -> None:
    def calls() -> None:
        for _ in range(CALLS):
            reserve(136 * GiB).release()

    _run(benchmark, RESERVE, calls)


def bench_reserve_release_dump(benchmark: Any) -> None:
    def calls() -> None:
        for _ in range(CALLS):
            reserve(136 * GiB, dump=True).release()

    _run(benchmark, RESERVE, calls)


def bench_commit_c(benchmark: Any, c_loops: ctypes.CDLL) -> None:
    _run(benchmark, COMMIT, lambda: c_loops.commit(PIECE, CALLS), reference=True)


def bench_commit(benchmark: Any) -> None:
    def fresh() -> tuple[tuple[Region], dict[str, Any]]:
        return (reserve(CALLS * PIECE),), {}

    def calls(region: Region) -> None:
        for i in range(CALLS):
            region.commit(i * PIECE, PIECE)

    benchmark.group = COMMIT
    benchmark.extra_info.update(calls=CALLS)
    benchmark.pedantic(calls, setup=fresh, rounds=40, warmup_rounds=2)


@pytest.fixture(params=[0, 10_000])
def crowded(request: pytest.FixtureRequest) -> Any:
    """A region with this many live views in its first half, and how many."""
    region = reserve(4 * GiB)
    region.commit(0, 3 * GiB)
    views = [region.view(i * 128 * KiB, 4 * KiB) for i in range(request.param)]
    yield region, len(views)
    del views
    region.release()


def bench_view(benchmark: Any, crowded: tuple[Region, int]) -> None:
    region, elsewhere = crowded

    def calls() -> None:
        for _ in range(CALLS):
            region.view(2 * GiB, 4 * KiB)

    _run(benchmark, VIEW, calls, reference=elsewhere == 0)


def bench_decommit(benchmark: Any, crowded: tuple[Region, int]) -> None:
    region, elsewhere = crowded

    def calls() -> None:
        for _ in range(CALLS):
            region.commit(2 * GiB, PIECE)
            region.decommit(2 * GiB, PIECE)

    _run(benchmark, DECOMMIT, calls, reference=elsewhere == 0)
