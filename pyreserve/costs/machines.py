"""Several machines side by side: how their facts, verdicts and costs differ."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyreserve._system.report import Report, Table
from pyreserve.costs.cells import Cell, Curve
from pyreserve.costs.recommendation import Verdict, recommend
from pyreserve.costs.results import MEASURED_FACTS
from pyreserve.costs.schema import machine_to_dict, rounded
from pyreserve.costs.stats import Times
from pyreserve.costs.table import CostTable
from pyreserve.costs.text import fact_label, fact_text, setting_text
from pyreserve.units import format_size, format_time

_SCHEMA = 1
_COLUMNS = 4  # machines that the plain text shows in a column each
_CELLS = 10  # curves listed by the screen and the text
_MIN_RATIO = 1.05  # between the intervals of two machines; a smaller one is no difference
_UNKNOWN = "can't tell"


class Row(NamedTuple):
    """A fact or a question, and what each machine has or answers.

    Attributes:
        name: the fact, with its unit as in the JSON, or the name of the verdict.
        label: the name for people.
        texts: the text of each machine, in the order of `Machines.names`.
        values: the same as data.
        groups: the text of each machine's group; machines that agree share it.
        differs: whether two machines disagree; methods that are at most 10 % slower than the
            other machine's, and growth steps up to twice as long, do not.
    """

    name: str
    label: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]
    groups: tuple[str, ...]
    differs: bool


class Spread(NamedTuple):
    """A cell that costs more on one machine than on another.

    Attributes:
        cell: the cell.
        times: its warm times on each machine, None where it was not measured.
        at_least: least ratio of the slowest to the fastest machine that their intervals allow.
    """

    cell: Cell
    times: tuple[Times | None, ...]
    at_least: float


@dataclass(frozen=True)
class Machines:
    """Several machines side by side: the result of `side_by_side`.

    ``str()`` gives the differences as tables; a notebook shows them as HTML.

    Attributes:
        names: the machines.
        disturbed: why the costs of a machine are doubtful, by machine; only those that were busy.
        facts: the facts of the machines; `Row.differs` tells those that differ.
        verdicts: their verdicts, in the same form.
        cells: the cells whose intervals do not overlap on two machines, the largest ratio first;
            of cells that differ only in length, the one with the largest.
        common: number of cells that all machines measured.
    """

    names: tuple[str, ...]
    disturbed: Mapping[str, str]
    facts: tuple[Row, ...]
    verdicts: tuple[Row, ...]
    cells: tuple[Spread, ...]
    common: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``pyreserve costs --compare A B --json`` writes it."""

        def by_machine(values: Iterable[Any]) -> dict[str, Any]:
            return dict(zip(self.names, values, strict=True))

        def row(row: Row) -> dict[str, Any]:
            machines = [
                {"text": text, "value": value}
                for text, value in zip(row.texts, row.values, strict=True)
            ]
            return {"name": row.name, "differs": row.differs, "machines": by_machine(machines)}

        return {
            "schema": _SCHEMA,
            "machines": list(self.names),
            "disturbed": dict(self.disturbed),
            "facts": [row(fact) for fact in self.facts],
            "verdicts": [row(verdict) for verdict in self.verdicts],
            "cells": [
                {
                    **spread.cell.to_dict(),
                    "at_least": float(f"{spread.at_least:.4g}"),
                    "median_ns": by_machine(
                        None if times is None else rounded(times.median) for times in spread.times
                    ),
                }
                for spread in self.cells
            ],
            "common_cells": self.common,
        }

    def tables(self, columns: int = _COLUMNS) -> dict[str, Table]:
        """Return the differences by title, as tables.

        Args:
            columns: up to this number of machines each has a column. More machines are grouped: a
                line for each text, with the machines that share it.
        """
        wide = len(self.names) <= columns
        arrange = self._by_machine if wide else self._by_text
        facts, verdicts = (
            arrange([row for row in rows if row.differs]) for rows in (self.facts, self.verdicts)
        )
        cells = self._costs() if wide else self._extremes()
        titled = {"Facts": facts, "Verdicts": verdicts, "Costs": cells}
        return {title: table for title, table in titled.items() if table.rows}

    def summary(self) -> tuple[str, ...]:
        """Return what was compared, what does not differ and which machines were busy."""
        fact_rows, verdict_rows = (
            [row for row in rows if not row.differs] for rows in (self.facts, self.verdicts)
        )
        agreed = ", ".join(row.label for row in verdict_rows)
        machines = f"{len(self.names)} machines"
        lines = [f"{machines}, {self.common} cells measured on all of them."]
        lines += [f"The same on all: {len(fact_rows)} facts."] if fact_rows else []
        lines += [f"The verdicts agree on: {agreed}."] if agreed else []
        for why in dict.fromkeys(self.disturbed.values()):
            names = ", ".join(name for name, own in self.disturbed.items() if own == why)
            lines.append(f"Measured while busy, so the costs are doubtful: {names}: {why}.")
        if self.cells:
            lines.append(
                f"Costs lists {min(_CELLS, len(self.cells))} of {len(self.cells)} differences. "
                "At least: the ratio of the slowest to the fastest machine that their 95 % "
                "intervals allow."
            )
        return tuple(lines)

    def _by_machine(self, rows: Iterable[Row]) -> Table:
        lines = [(row.label, *row.texts) for row in rows]
        return Table(("", *self.names), lines, left=1 + len(self.names))

    def _by_text(self, rows: Iterable[Row]) -> Table:
        lines: list[tuple[str, ...]] = []
        for row in rows:
            for i, (text, _) in enumerate(Counter(row.groups).most_common()):
                names = [
                    name for name, own in zip(self.names, row.groups, strict=True) if own == text
                ]
                lines.append(("" if i else row.label, text, f"{len(names)}: {', '.join(names)}"))
        return Table(("", "text", "machines"), lines, left=3)

    def _costs(self) -> Table:
        lines = [
            (
                _cell_text(spread.cell),
                *(format_time(times.median) if times else "" for times in spread.times),
                f"{spread.at_least:.2g}x",
            )
            for spread in self.cells[:_CELLS]
        ]
        return Table(("cell", *self.names, "at least"), lines)

    def _extremes(self) -> Table:
        lines: list[tuple[str, ...]] = []
        for spread in self.cells[:_CELLS]:
            known = [
                (times.median, f"{format_time(times.median)} on {name}")
                for name, times in zip(self.names, spread.times, strict=True)
                if times is not None
            ]
            fastest, slowest = min(known)[1], max(known)[1]
            lines.append((_cell_text(spread.cell), fastest, slowest, f"{spread.at_least:.2g}x"))
        return Table(("cell", "fastest", "slowest", "at least"), lines)

    def __str__(self) -> str:
        return self._report(_COLUMNS).text()

    def _repr_html_(self) -> str:
        return self._report(_COLUMNS).html()

    def _report(self, columns: int) -> Report:
        tables = tuple(self.tables(columns).values())
        return Report("Costs of several machines", self.summary(), tables)


def _cell_text(cell: Cell) -> str:
    curve = Curve.of(cell)
    return f"{cell.verb} {cell.method} {setting_text(curve)}, {format_size(cell.nbytes)}"


def side_by_side(tables: Mapping[str, CostTable]) -> Machines:
    """Put the costs of several machines side by side.

    Args:
        tables: a table for each machine, by its name.

    Raises:
        ValueError: there are fewer than two tables.
    """
    if len(tables) < 2:
        msg = f"tables must hold two or more machines, got {len(tables)}"
        raise ValueError(msg)
    times = [_warm_times(table) for table in tables.values()]
    disturbed = {name: table.disturbed for name, table in tables.items()}
    return Machines(
        names=tuple(tables),
        disturbed={name: why for name, why in disturbed.items() if why is not None},
        facts=_facts(tables.values()),
        verdicts=_verdicts(tables.values()),
        cells=_spreads(times),
        common=len(set[Cell].intersection(*map(set, times))),
    )


# -- facts ------------------------------------------------------------------------------------


def _facts(tables: Iterable[CostTable]) -> tuple[Row, ...]:
    machines = [table.machine for table in tables]
    names = {name: None for machine in machines for name in machine if name not in MEASURED_FACTS}
    rows = []
    for name in names:
        [key] = machine_to_dict({name: None})
        values = tuple(machine.get(name) for machine in machines)
        texts = tuple(fact_text(name, value) for value in values)
        rows.append(Row(key, fact_label(name), texts, values, texts, len(set(texts)) > 1))
    return tuple(rows)


# -- verdicts ---------------------------------------------------------------------------------


def _verdicts(tables: Iterable[CostTable]) -> tuple[Row, ...]:
    """Return a row for each question that any machine answers."""
    machines, rows = [recommend(table).verdicts() for table in tables], []
    for name in dict.fromkeys(name for machine in machines for name in machine):
        verdicts = [machine.get(name) for machine in machines]
        values = tuple(map(_value, verdicts))
        if any(value is not None for value in values):
            texts, groups = tuple(map(_value_text, values)), _groups(verdicts)
            differs = len({*groups} - {_UNKNOWN}) > 1
            rows.append(Row(name, name.replace("-", " "), texts, values, groups, differs))
    return tuple(rows)


def _value(verdict: Verdict | None) -> str | int | None:
    return verdict.value if verdict else None


def _value_text(value: str | int | None) -> str:
    if value is None:
        return _UNKNOWN
    return format_size(value) if isinstance(value, int) else value


def _groups(verdicts: Sequence[Verdict | None]) -> tuple[str, ...]:
    """Return the text of each verdict's group: those of a group have an answer in common."""
    groups: list[tuple[set[str | int | None], list[int]]] = []
    for i, verdict in enumerate(verdicts):
        accepted = _accepted(verdict)
        for common, members in groups:
            if common & accepted:
                common &= accepted  # noqa: PLW2901  # in place
                members.append(i)
                break
        else:
            groups.append((accepted, [i]))
    texts = [""] * len(verdicts)
    for _, members in groups:
        own = dict.fromkeys(_value_text(_value(verdicts[i])) for i in members)
        for i in members:
            texts[i] = " or ".join(own)
    return tuple(texts)


def _accepted(verdict: Verdict | None) -> set[str | int | None]:
    """Return the answers that cost about the same; of a growth step, the double too."""
    value = _value(verdict)
    if isinstance(value, int):
        return {value, 2 * value}
    return {value, *(verdict.as_good if verdict else ())}


# -- costs ------------------------------------------------------------------------------------


def _warm_times(table: CostTable) -> dict[Cell, Times]:
    return {
        entry.cell: entry.times for entry in table.cells if entry.times and entry.host == "warm"
    }


def _spreads(tables: list[dict[Cell, Times]]) -> tuple[Spread, ...]:
    """Return the cells that differ by more than their intervals, one of each curve."""
    widest: dict[Curve, Spread] = {}
    for cell in dict.fromkeys(cell for table in tables for cell in table):
        times = tuple(table.get(cell) for table in tables)
        known = [entry for entry in times if entry is not None]
        low, high = min(entry.ci95[1] for entry in known), max(entry.ci95[0] for entry in known)
        at_least = high / low if low > 0 else 0.0
        curve = Curve.of(cell)
        if at_least >= _MIN_RATIO and (curve not in widest or widest[curve].at_least < at_least):
            widest[curve] = Spread(cell, times, at_least)
    return tuple(sorted(widest.values(), key=lambda spread: -spread.at_least))
