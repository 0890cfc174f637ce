"""Arenas, bump arenas and pools, beside the Python objects that they replace."""

import mmap
import threading
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

from pyreserve import Arena, Blocks, GiB, KiB, PageAllocator
from pyreserve._native import ffi, lib

if TYPE_CHECKING:
    from conftest import Run

CALLS = 1000
PAGE = 8 * KiB
MANY = 1_000_000
PYTHON = "cost of Python itself"
PAIR = "allocate and free"
SIZES = array("q", [PAGE]) * MANY


@pytest.fixture(params=["native", "go-tip-2014-12/amd64"], ids=["native", "Go layout"])
def layout(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture
def arena(layout: Any) -> Iterator[Arena]:
    # Some machines refuse to charge 8 GiB of blocks.
    with Arena(layout=layout, mode="noreserve") as arena:
        yield arena


class Empty:
    def method(self) -> None:
        pass


def bench_empty_loop(run: "Run") -> None:
    def calls() -> None:
        for _ in range(CALLS):
            pass

    run(PYTHON, CALLS, calls)


def bench_empty_method(run: "Run") -> None:
    empty = Empty()

    def calls() -> None:
        for _ in range(CALLS):
            empty.method()

    run(PYTHON, CALLS, calls)


def bench_empty_cffi_call(run: "Run") -> None:
    closed, load = ffi.new("struct region *"), lib.region_load

    def calls() -> None:
        for _ in range(CALLS):
            load(closed, 0)

    run(PYTHON, CALLS, calls)


def bench_with_lock(run: "Run") -> None:
    lock = threading.Lock()

    def calls() -> None:
        for _ in range(CALLS):
            with lock:
                pass

    run(PYTHON, CALLS, calls)


def bench_arena(run: "Run", arena: Arena, ns_a_call: Any) -> None:
    def calls() -> None:
        for _ in range(CALLS):
            arena.free(arena.alloc(PAGE))

    def mappings() -> None:
        for _ in range(CALLS):
            mmap.mmap(-1, PAGE).close()

    beside = "mmap.mmap and close", lambda: float(ns_a_call(CALLS, mappings))
    run(f"{PAIR} 8 KiB of Arena", CALLS, calls, beside=beside, aim="1,500, x0.2")


def bench_pages(run: "Run") -> None:
    pages = PageAllocator(1 << 18)

    def calls() -> None:
        for _ in range(CALLS):
            pages.free(pages.alloc())

    run(f"{PAIR} a page of PageAllocator", CALLS, calls)


def bench_pool(run: "Run") -> None:
    pool_type = pytest.importorskip("pyreserve._alloc.pool").Pool
    with pool_type(64) as pool:

        def calls() -> None:
            for _ in range(CALLS):
                pool.free(pool.alloc())

        run(f"{PAIR} a slot of Pool", CALLS, calls, aim="1,000")


def bench_bump(run: "Run", ns_a_call: Any) -> None:
    bump_type = pytest.importorskip("pyreserve._alloc.bump").BumpArena
    with bump_type(GiB) as bump:

        def calls() -> None:
            for _ in range(CALLS):
                bump.alloc(64)

        def before() -> tuple[()]:
            bump.reset()
            return ()

        def bytearrays() -> None:
            for _ in range(CALLS):
                bytearray(64)

        beside = "bytearray(64)", lambda: float(ns_a_call(CALLS, bytearrays))
        run("allocate 64 bytes of BumpArena", CALLS, calls, before=before, beside=beside, aim="x4")


def bench_alloc_many_fresh(run: "Run", layout: Any) -> None:
    arenas: list[Arena] = []

    def before() -> tuple[Arena]:
        while arenas:
            arenas.pop().release()
        arenas.append(Arena(layout=layout, mode="noreserve"))
        return (arenas[0],)

    def alloc_many(arena: Arena) -> None:
        arena.alloc_many(SIZES)

    run(f"{MANY:,} blocks of 8 KiB at once", MANY, alloc_many, before=before, rounds=8, aim="60")
    arenas.pop().release()


def bench_alloc_many_warm(run: "Run", arena: Arena) -> None:
    blocks: list[Blocks] = []

    def before() -> tuple[()]:
        while blocks:
            blocks.pop().free()
        return ()

    def alloc_many() -> None:
        blocks.append(arena.alloc_many(SIZES))

    alloc_many()
    run(f"{MANY:,} blocks of 8 KiB at once", MANY, alloc_many, before=before, rounds=8, aim="60")


def bench_free_many(run: "Run", arena: Arena) -> None:
    def before() -> tuple[Blocks]:
        return (arena.alloc_many(SIZES),)

    run(f"{MANY:,} blocks of 8 KiB at once", MANY, arena.free_many, before=before, rounds=8)
