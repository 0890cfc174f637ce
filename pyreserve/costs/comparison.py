"""Two tables side by side: what changed, and what only looks as if it had."""

import math
from dataclasses import dataclass

from pyreserve.costs.cells import Cell
from pyreserve.costs.stats import Times
from pyreserve.costs.table import CostTable

# Smaller changes can be told from none only by many more runs.
_LEAST_CHANGE = 0.05
_OTHER_SPEED = 0.1
_WIDE = 0.5


@dataclass(frozen=True, slots=True)
class Compared:
    """A cell in two tables.

    Attributes:
        cell, host: which.
        old, new: its times.
        verdict: ``"slower"`` or ``"faster"`` if the intervals do not overlap and the medians differ
            by 5 % at least; ``"noisy"`` if that holds, but either run was disturbed; else
            ``"same"``, or ``"unsure"`` if an interval is wider than half its median.
    """

    cell: Cell
    host: str
    old: Times
    new: Times
    verdict: str

    @property
    def ratio(self) -> float:
        """The new median over the old; infinite if only the old one took no time."""
        if self.new.median == self.old.median:
            return 1.0
        return self.new.median / self.old.median if self.old.median else math.inf


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` found.

    Attributes:
        cells: those that both tables have times of.
        noisy: why nothing is called a change; None if it can be.
        differences: facts of the machine that are not the same: name, old, new.
        only_old, only_new: how many measured cells only one of them has.
    """

    cells: tuple[Compared, ...]
    noisy: str | None
    differences: tuple[tuple[str, object, object], ...]
    only_old: int
    only_new: int

    def count(self, verdict: str) -> int:
        """Count the cells of a verdict."""
        return sum(one.verdict == verdict for one in self.cells)


def compare(old: CostTable, new: CostTable) -> Comparison:
    """Compare two tables, cell by cell."""
    noisy = _noise(old, new)
    before = {(one.cell, one.host): one.times for one in old.cells if one.times}
    after = {(one.cell, one.host): one.times for one in new.cells if one.times}
    cells = tuple(
        Compared(*key, before[key], times, _verdict(before[key], times, noisy is not None))
        for key, times in after.items()
        if key in before
    )
    return Comparison(
        cells=cells,
        noisy=noisy,
        differences=_differences(old, new),
        only_old=len(before.keys() - after.keys()),
        only_new=len(after.keys() - before.keys()),
    )


def _verdict(old: Times, new: Times, noisy: bool) -> str:
    apart = new.ci95[0] > old.ci95[1] or new.ci95[1] < old.ci95[0]
    if not apart or abs(new.median - old.median) < _LEAST_CHANGE * old.median:
        return "same" if max(old.width, new.width) <= _WIDE else "unsure"
    if noisy:
        return "noisy"
    return "slower" if new.median > old.median else "faster"


def _noise(old: CostTable, new: CostTable) -> str | None:
    """Say what disturbed either run, or that the same machine runs at another speed now."""
    for which, table in (("the old run", old), ("this run", new)):
        why = table.disturbed
        if why is not None:
            return f"{which} was disturbed: {why}"
    before, after = (table.machine.get("system_call_ns") for table in (old, new))
    if before and after and not _differences(old, new) and abs(after / before - 1) > _OTHER_SPEED:
        return (
            f"the same system call took {before:.0f} ns in the old run and {after:.0f} ns in this"
        )
    return None


def _differences(old: CostTable, new: CostTable) -> tuple[tuple[str, object, object], ...]:
    measured = {"system_call_ns", "map_entries"}
    names = [name for name in {**old.machine, **new.machine} if name not in measured]
    pairs = ((name, old.machine.get(name), new.machine.get(name)) for name in names)
    return tuple((name, a, b) for name, a, b in pairs if a != b)
