"""Synthetic cost tables with known figures."""

import math
from collections.abc import Callable, Sequence
from random import Random
from statistics import median
from typing import Any

from pyreserve import PAGE_SIZE, MiB
from pyreserve.costs import Cell, CostTable, Curve, Measured, Noise
from pyreserve.costs.stats import summarise

QUIET = Noise(other_cpus=0.0, stolen_cpus=0.0, speed_spread=0.0)
LOUD = Noise(other_cpus=1.9, stolen_cpus=0.0, speed_spread=0.0)
LENGTHS = tuple(PAGE_SIZE * 4**k for k in range(9))
COMPARED = tuple(PAGE_SIZE * n for n in (1, 16, 512))
"""The lengths that verdicts compare."""
MACHINE: dict[str, Any] = {
    "cpu": "Imaginary 9000",
    "cpus": 4,
    "kernel": "6.1.0",
    "memory": 16 << 30,
    "page_size": PAGE_SIZE,
    "max_map_count": 65530,
    "map_entries": {
        "decommit mmap-fixed": 2.0,
        "discard dontneed": 0.0,
        "discard free": 0.0,
        "release piece": 1.0,
    },
    "huge_pages": {
        "tried": 96,
        "got": 96,
        "free_bytes": 8 << 30,
        "free_bytes_in_huge_blocks": 6 << 30,
    },
    "system_call_ns": 150.0,
}


def measured(
    cell: Cell,
    ns: float,
    *,
    jitter: float = 0.01,
    seed: int = 0,
    passes: int = 6,
    drift: float = 0.0,
) -> Measured:
    """A cell as if measured around `ns`, in passes of twenty samples.

    `drift` is the spread of the machine's speed over the passes, which all cells share; `jitter`
    is each sample's own.
    """
    own, shared = Random(f"{cell} {seed}"), Random(seed)
    speeds = [math.exp(shared.gauss(0, drift)) for _ in range(passes)]
    samples = [[ns * speed * math.exp(own.gauss(0, jitter)) for _ in range(20)] for speed in speeds]
    return Measured(cell, "warm", summarise(samples), None, tuple(map(median, samples)))


def table(
    costs: dict[Curve, Callable[[int], float]],
    *,
    lengths: Sequence[int] = LENGTHS,
    noise: Noise = QUIET,
    more: Sequence[Measured] = (),
    **how: Any,
) -> CostTable:
    """A table of curves, each given as a function from OS pages to nanoseconds.

    `how` are the keyword arguments of `measured`.
    """
    cells = [
        measured(curve.at(nbytes), ns(nbytes // PAGE_SIZE), **how)
        for curve, ns in costs.items()
        for nbytes in lengths
        if curve.page_kind != "2MiB" or nbytes % (2 * MiB) == 0
    ]
    machine = {**MACHINE, "huge_pages": dict(MACHINE["huge_pages"])}
    machine["map_entries"] = dict(MACHINE["map_entries"])
    return CostTable(machine, (*cells, *more), noise, seconds=12.5)


def line(fixed: float, per_page: float) -> Callable[[int], float]:
    """Costs that are a straight line."""
    return lambda pages: fixed + per_page * pages


# By verb and method: the fixed cost, and the cost per page of small and of huge pages.
_FIGURES: dict[tuple[str, str], tuple[float, float, float]] = {
    ("commit", "mprotect"): (700, 0, 0),
    ("commit", "mmap-fixed"): (1200, 0, 0),
    ("grow", "mprotect"): (1000, 0, 0),
    ("grow", "mmap-fixed"): (2000, 0, 0),
    ("touch", "write"): (0, 500, 50),
    ("populate", "madvise"): (0, 200, 45),
    ("discard", "dontneed"): (0, 100, 5),
    ("discard", "free"): (0, 150, 4),
    ("decommit", "dontneed+mprotect"): (1000, 100, 5),
    ("decommit", "mmap-fixed"): (3000, 110, 8),
    ("decommit", "mprotect"): (1000, 20, 1),
    ("release", "piece"): (1000, 110, 5),
    ("retouch", "after-dontneed"): (0, 500, 50),
    ("retouch", "after-free"): (0, 20, 4),
    ("retouch", "after-dontneed+mprotect"): (0, 500, 50),
    ("retouch", "after-mmap-fixed"): (0, 500, 50),
    ("retouch", "after-mprotect"): (0, 5, 1),
    ("retouch", "after-release"): (0, 500, 50),
    ("retouch", "resident"): (0, 2, 1),
    ("retouch", "after-fork"): (0, 2000, 2000),
    ("recommit", "after-dontneed+mprotect"): (400, 0, 0),
    ("recommit", "after-mmap-fixed"): (1000, 0, 0),
    ("recommit", "after-mprotect"): (800, 0, 0),
    ("recommit", "after-release"): (1000, 0, 0),
    ("advise", "hugepage"): (600, 0, 0),
    ("fork", "inherit"): (200_000, 100, 10),
    ("fork", "dontfork"): (200_000, 0, 0),
}

USUAL: dict[Curve, Callable[[int], float]] = {
    Curve(verb, method, *kind): line(fixed, per_page[len(kind)])
    for (verb, method), (fixed, *per_page) in _FIGURES.items()
    for kind in ((), ("2MiB",))
}
"""The curves that `recommend` needs, in round figures."""


def usual(**how: Any) -> CostTable:
    """A table of the usual curves at the lengths that verdicts compare; see `table`."""
    return table(USUAL, lengths=COMPARED, **how)
