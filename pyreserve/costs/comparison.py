"""Compare two tables cell by cell, and tell changes from noise."""

import math
from dataclasses import dataclass
from typing import Any

from pyreserve._system.report import Report, Table
from pyreserve.costs.cells import Cell
from pyreserve.costs.results import MEASURED_FACTS
from pyreserve.costs.stats import Times
from pyreserve.costs.table import CostTable
from pyreserve.costs.text import fact_label, fact_text
from pyreserve.units import format_time

_MIN_CHANGE = 0.05  # relative change of a median; a smaller one is no change
_OTHER_SPEED = 0.1  # relative change of a system call's time that makes the comparison noisy
_CHANGES = ("same", "slower", "faster", "noisy", "unsure")
_WIDE = 0.5  # relative width of an interval above which "same" is "unsure"


@dataclass(frozen=True, slots=True)
class Compared:
    """A cell in two tables.

    Attributes:
        cell, host: as in `Measured`.
        old, new: its times in the two tables.
        change: ``"slower"`` or ``"faster"`` if the intervals do not overlap and the medians differ
            by at least 5 %, but ``"noisy"`` after a disturbed run. Otherwise ``"same"``, or
            ``"unsure"`` if an interval is wider than half its median.
    """

    cell: Cell
    host: str
    old: Times
    new: Times
    change: str

    @property
    def ratio(self) -> float:
        """New median over old median; infinite if only the old one is zero."""
        if self.new.median == self.old.median:
            return 1.0
        return self.new.median / self.old.median if self.old.median else math.inf


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`.

    ``str()`` gives a summary with a table of the changes; a notebook shows it as HTML.

    Attributes:
        cells: the cells that have times in both tables.
        noisy: why changes are reported as noise; None if the runs were quiet.
        differences: facts of the machine that differ: name, old value, new value.
        only_old, only_new: number of measured cells that only one table has.
    """

    cells: tuple[Compared, ...]
    noisy: str | None
    differences: tuple[tuple[str, object, object], ...]
    only_old: int
    only_new: int

    def count(self, change: str) -> int:
        """Return the number of cells with this `Compared.change`."""
        return sum(compared.change == change for compared in self.cells)

    def changed(self) -> list[Compared]:
        """Return the cells that are neither the same nor unsure, the largest changes first."""
        changed = [compared for compared in self.cells if compared.change not in {"same", "unsure"}]
        return sorted(changed, key=lambda compared: -abs(compared.ratio - 1))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``pyreserve costs --compare --json`` writes it."""
        return {
            "noisy": self.noisy,
            "machine_differences": [
                {"name": name, "old": old, "new": new} for name, old, new in self.differences
            ],
            "cells": [
                {
                    **compared.cell.to_dict(),
                    "host": compared.host,
                    "old_median_ns": compared.old.median,
                    "new_median_ns": compared.new.median,
                    "change": compared.change,
                }
                for compared in self.cells
            ],
            "only_old": self.only_old,
            "only_new": self.only_new,
        }

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def summary(self) -> tuple[str, ...]:
        """Return the number of cells with each change, and what differs between the runs."""
        counts = {change: self.count(change) for change in _CHANGES}
        shown = ", ".join(f"{n} {change}" for change, n in counts.items() if n or change == "same")
        lines = [f"{len(self.cells)} cells in both runs: {shown}."]
        if self.only_old or self.only_new:
            lines.append(
                f"In the old run only: {self.only_old} cells; in the new run only: {self.only_new}."
            )
        lines += [
            f"The machine differs: {fact_label(name)} was {fact_text(name, before)}, "
            f"is {fact_text(name, after)}."
            for name, before, after in self.differences
        ]
        lines += [f"Noisy, so no change is reported: {self.noisy}."] if self.noisy else []
        return tuple(lines)

    def table(self) -> Table:
        """Return a row for each changed cell, the largest changes first."""
        rows: list[tuple[str, ...]] = [
            (
                f"{compared.cell}{'' if compared.host == 'warm' else f', {compared.host} host'}",
                format_time(compared.old.median),
                format_time(compared.new.median),
                f"{compared.ratio:.2f}",
                compared.change,
            )
            for compared in self.changed()
        ]
        return Table(("cell", "before", "now", "ratio", "change"), rows)

    def _report(self) -> Report:
        changes = self.table()
        return Report("Costs compared", self.summary(), (changes,) if changes.rows else ())


def compare(old: CostTable, new: CostTable) -> Comparison:
    """Compare two tables, cell by cell."""
    noisy = _noise(old, new)
    before, after = _times(old), _times(new)
    cells = tuple(
        Compared(*key, before[key], times, _change(before[key], times, noisy is not None))
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


def _times(table: CostTable) -> dict[tuple[Cell, str], Times]:
    return {(entry.cell, entry.host): entry.times for entry in table.cells if entry.times}


def _change(old: Times, new: Times, noisy: bool) -> str:
    disjoint = new.ci95[0] > old.ci95[1] or new.ci95[1] < old.ci95[0]
    if not disjoint or abs(new.median - old.median) < _MIN_CHANGE * old.median:
        return "same" if max(old.width, new.width) <= _WIDE else "unsure"
    if noisy:
        return "noisy"
    return "slower" if new.median > old.median else "faster"


def _noise(old: CostTable, new: CostTable) -> str | None:
    """Return why the two runs cannot be compared: a disturbed run, or another clock speed."""
    for run, table in (("the old run", old), ("this run", new)):
        reason = table.disturbed
        if reason is not None:
            return f"{run} was disturbed: {reason}"
    before, after = (table.machine.get("system_call_ns") for table in (old, new))
    if before and after and not _differences(old, new) and abs(after / before - 1) > _OTHER_SPEED:
        return (
            f"the same system call took {before:.0f} ns in the old run and {after:.0f} ns in this "
            "run"
        )
    return None


def _differences(old: CostTable, new: CostTable) -> tuple[tuple[str, object, object], ...]:
    names = [name for name in {**old.machine, **new.machine} if name not in MEASURED_FACTS]
    pairs = ((name, old.machine.get(name), new.machine.get(name)) for name in names)
    return tuple((name, before, after) for name, before, after in pairs if before != after)
