"""Synthetic cost tables with known figures."""

import math
from collections.abc import Callable, Sequence
from random import Random

from pyreserve import PAGE_SIZE, MiB
from pyreserve.costs import Cell, CostTable, Curve, Measured, Noise
from pyreserve.costs.stats import summarise

QUIET = Noise(other_cpus=0.0, stolen_cpus=0.0, speed_spread=0.0)
LOUD = Noise(other_cpus=1.9, stolen_cpus=0.0, speed_spread=0.0)
LENGTHS = tuple(PAGE_SIZE * 4**k for k in range(9))
MACHINE = {
    "cpu": "Imaginary 9000",
    "cpus": 4,
    "kernel": "6.1.0",
    "memory": 16 << 30,
    "max_map_count": 65530,
    "map_entries": {
        "commit mprotect": 2.0,
        "guard madvise": 0.0,
        "guard mprotect": 2.0,
        "grow mprotect": 0.0,
    },
    "system_call_ns": 150.0,
}


def measured(cell: Cell, ns: float, *, jitter: float = 0.01, seed: int = 0) -> Measured:
    """A cell as if measured around `ns`, in six passes of twenty samples."""
    random = Random(f"{cell} {seed}")
    passes = [[ns * math.exp(random.gauss(0, jitter)) for _ in range(20)] for _ in range(6)]
    return Measured(cell, "warm", summarise(passes), None, passes)


def table(
    costs: dict[Curve, Callable[[int], float]],
    *,
    lengths: Sequence[int] = LENGTHS,
    noise: Noise = QUIET,
    seed: int = 0,
    jitter: float = 0.01,
    more: Sequence[Measured] = (),
) -> CostTable:
    """A table of curves, each given as a function from OS pages to nanoseconds."""
    cells = [
        measured(curve.at(nbytes), ns(nbytes // PAGE_SIZE), seed=seed, jitter=jitter)
        for curve, ns in costs.items()
        for nbytes in lengths
        if curve.page_kind != "2MiB" or nbytes % (2 * MiB) == 0
    ]
    return CostTable(dict(MACHINE), (*cells, *more), noise, seconds=12.5)


def line(fixed: float, per_page: float) -> Callable[[int], float]:
    """Costs that are a straight line."""
    return lambda pages: fixed + per_page * pages


USUAL: dict[Curve, Callable[[int], float]] = {
    Curve("grow", "mprotect"): line(1000, 0),
    Curve("touch", "write"): line(0, 500),
    Curve("touch", "write", "2MiB"): line(0, 50),
    Curve("grow", "mprotect", "2MiB"): line(2000, 0),
    Curve("discard", "dontneed"): line(0, 100),
    Curve("discard", "free"): line(0, 150),
    Curve("retouch", "after-dontneed"): line(0, 500),
    Curve("retouch", "after-free"): line(0, 20),
    Curve("retouch", "resident"): line(0, 2),
}
"""The curves that `recommend` needs, in round figures."""
