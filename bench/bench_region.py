"""Regions beside the same system calls in C, and with many live views beside none."""

import ctypes
from collections.abc import Callable
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
    closed, load = ffi.new("struct region *"), lib.region_load

    def calls() -> None:
        for _ in range(CALLS):
            load(closed, 0)

    _run(benchmark, "an empty cffi call, for comparison", calls)


def _against_c(benchmark: Any, group: str, c_loop: Callable[[], float], calls: Any) -> None:
    """Run a C loop before each round, so drift of the machine affects both."""
    in_c: list[float] = []

    def prepare() -> tuple[tuple[Region, ...], dict[str, Any]]:
        in_c.append(c_loop())
        return ((reserve(CALLS * PIECE),) if group == COMMIT else ()), {}

    benchmark.group = group
    benchmark.extra_info.update(calls=CALLS, c_loop_ns=in_c)
    benchmark.pedantic(calls, setup=prepare, rounds=60)


def bench_reserve_release(benchmark: Any, c_loops: ctypes.CDLL) -> None:
    def calls() -> None:
        for _ in range(CALLS):
            reserve(136 * GiB).release()

    _against_c(benchmark, RESERVE, lambda: c_loops.reserve_release(136 * GiB, 0, CALLS), calls)


def bench_reserve_release_dump(benchmark: Any, c_loops: ctypes.CDLL) -> None:
    def calls() -> None:
        for _ in range(CALLS):
            reserve(136 * GiB, dump=True).release()

    _against_c(benchmark, RESERVE, lambda: c_loops.reserve_release(136 * GiB, 1, CALLS), calls)


def bench_commit(benchmark: Any, c_loops: ctypes.CDLL) -> None:
    def calls(region: Region) -> None:
        for i in range(CALLS):
            region.commit(i * PIECE, PIECE)

    _against_c(benchmark, COMMIT, lambda: c_loops.commit(PIECE, CALLS), calls)


@pytest.fixture(params=[0, 10_000])
def crowded(request: pytest.FixtureRequest) -> Any:
    """A region with live views in its first half, and their number."""
    region = reserve(4 * GiB)
    region.commit(0, 3 * GiB)
    views = [region.view(i * 128 * KiB, 4 * KiB) for i in range(request.param)]
    yield region, len(views)
    del views
    region.release()


def bench_view(benchmark: Any, crowded: tuple[Region, int]) -> None:
    region, nviews = crowded

    def calls() -> None:
        for _ in range(CALLS):
            region.view(2 * GiB, 4 * KiB)

    _run(benchmark, VIEW, calls, reference=nviews == 0)


def bench_decommit(benchmark: Any, crowded: tuple[Region, int]) -> None:
    region, nviews = crowded

    def calls() -> None:
        for _ in range(CALLS):
            region.commit(2 * GiB, PIECE)
            region.decommit(2 * GiB, PIECE)

    _run(benchmark, DECOMMIT, calls, reference=nviews == 0)
