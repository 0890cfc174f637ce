"""Fragmentation: memory of an arena over that of its live blocks, for a long random trace."""

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pyreserve import Arena, KiB, MiB

if TYPE_CHECKING:
    from conftest import Run

PAGE = 8 * KiB
OPERATIONS = 2_000_000
GROUP = "2,000,000 operations, peak of the arena over peak of its live blocks"


@dataclass
class Trace:
    """Operation i >= 0 allocates block i, and ~i frees it."""

    operations: Any
    sizes: Any  # bytes
    pages: Any

    def peak(self, sizes: Any) -> int:
        """Return the largest sum of live sizes."""
        blocks = np.where(self.operations >= 0, self.operations, ~self.operations)
        return int(np.where(self.operations >= 0, sizes[blocks], -sizes[blocks]).cumsum().max())


@pytest.fixture(scope="session")
def trace() -> Trace:
    """Blocks of log-uniform sizes from a page to 1 MiB.

    Of 1000 blocks 799 live for about 100 further allocations, 200 for 1000 to 100,000
    (log-uniform), and one is never freed.
    """
    rng = np.random.default_rng(20_131_201)
    count = OPERATIONS  # more blocks than needed: the operations are cut below
    sizes = (PAGE * np.exp(rng.random(count) * np.log(MiB / PAGE))).astype(np.int64)
    kind = rng.random(count)
    lives = np.where(
        kind < 0.799, rng.exponential(100, count), 1000 * np.exp(rng.random(count) * np.log(100))
    )
    born = np.arange(count)
    died = np.where(kind < 0.999, born + lives, np.inf)
    order = np.argsort(np.concatenate([born - 0.5, died]), kind="stable")[:OPERATIONS]
    operations = np.where(order < count, order, ~(order - count))
    return Trace(operations, sizes, -(-sizes // PAGE))


def bench_trace_of_pages(
    run: "Run", c_pairs: ctypes.CDLL, trace: Trace, benchmark: Any, getppid: Any
) -> None:
    """The same trace as runs of pages, in C: the highest page ever used."""
    pages, first = c_pairs.pages_open(1 << 24), np.empty_like(trace.pages)
    tops = []

    def replay() -> None:
        arguments = (trace.operations.ctypes.data, OPERATIONS, trace.pages.ctypes.data)
        tops.append(c_pairs.pages_replay(pages, *arguments, first.ctypes.data))

    run(GROUP, OPERATIONS, replay, beside=getppid, rounds=1)
    c_pairs.pages_close(pages)
    top, live = tops[0], trace.peak(trace.pages)
    note = f"highest page x{top / live:.4f} of the {live:,} live pages"
    benchmark.extra_info["note"] = note


def bench_trace(run: "Run", trace: Trace, benchmark: Any) -> None:
    operations, sizes = trace.operations.tolist(), trace.sizes.tolist()
    blocks: dict[int, Any] = {}
    with Arena(layout="go-tip-2014-12/amd64") as arena:

        def replay() -> None:
            alloc, free, take = arena.alloc, arena.free, blocks.pop
            for i in operations:
                if i >= 0:
                    blocks[i] = alloc(sizes[i])
                else:
                    free(take(~i))

        run(GROUP, OPERATIONS, replay, rounds=1, aim="x1.08 of whole pages")
        stats, live = arena.memstats(), PAGE * trace.peak(trace.pages)
        benchmark.extra_info["note"] = (
            f"heap_sys x{stats.heap_sys / live:.4f} of the {live // MiB:,} MiB of live whole "
            f"pages, x{stats.heap_sys / trace.peak(trace.sizes):.4f} of the requested bytes"
        )
