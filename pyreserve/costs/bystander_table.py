"""What a thread's calls cost the other threads of its process: the table and its sentences."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.report import Report, Table
from pyreserve.costs.cells import SMALL
from pyreserve.costs.schema import interval_to_dict
from pyreserve.costs.stats import Interval
from pyreserve.costs.text import UNKNOWN, time_text
from pyreserve.units import format_size

IPI = "membarrier"
"""The call that interrupts other CPUs and does nothing else."""

_STEADY = 0.1  # of the bare interrupt
_BUSY = 0.5  # of the windows count: fewer mean that other processes kept the CPUs busy
WORKS = {
    "spin": "computes",
    "read": "reads 8 MiB",
    "fault-shared": "faults in the same mapping",
    "fault-own": "faults in its own",
}
"""What a bystander does, by name."""

_TITLES = ("call", "alone", "adds", "computes", "reads", "faults", "own", "n", "IPIs")

CALLS_LEGEND = (
    "alone: the call in a process with one thread. adds: what n bystanders that compute, each on a "
    "CPU of its own, add to it. Then what each bystander loses to each call: if it computes, reads "
    "8 MiB, faults in the same mapping, faults in its own. IPIs: interrupts of each bystander's "
    "CPU for each call, counted."
)


def _ratio(figure: Interval | None, unit: Interval | None) -> float | None:
    if figure is None or unit is None or not figure.known or not unit.known:
        return None
    return figure.median / unit.median


_KEYS = {"nbytes": "bytes", "resident": "resident_bytes"}


def _plain(row: Any) -> dict[str, Any]:
    """Return the fields of a dataclass as plain data; keys of sizes carry their unit."""
    item = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Interval):
            value = interval_to_dict(value)
        elif isinstance(value, float):
            value = round(value, 3)
        item[_KEYS.get(field.name, field.name)] = value
    return item


@dataclass(frozen=True, slots=True)
class BystanderCost:
    """What a call costs the caller and the bystanders.

    Attributes:
        call: ``munmap``, ``mprotect``, ``MADV_DONTNEED``, ``MADV_FREE``, ``MAP_FIXED`` or
            ``membarrier``, the bare interrupt.
        nbytes: length of the piece of memory, in bytes.
        page_kind: its pages: ``4KiB``, ``2MiB``.
        work: what the bystanders do, see `WORKS`.
        bystanders: their number, one on each CPU.
        alone: the call in a process without other threads.
        added: what all bystanders together add to it.
        lost: what each bystander loses to each call.
        interrupts: what each bystander's CPU got for each call; None if they're not counted.
        why: why there are no figures.
    """

    call: str
    nbytes: int
    page_kind: str
    work: str
    bystanders: int
    alone: Interval | None = None
    added: Interval | None = None
    lost: Interval | None = None
    interrupts: float | None = None
    why: str | None = None

    @property
    def known(self) -> bool:
        """Whether what the bystanders add or lose is known."""
        return any(figure is not None and figure.known for figure in (self.added, self.lost))

    @property
    def piece(self) -> str:
        """The call and the length, for people."""
        if self.call == IPI:
            return f"{IPI}, a bare IPI"
        if self.page_kind != SMALL:
            return f"{self.call}, a {format_size(self.nbytes)} page"
        pages = self.nbytes // PAGE_SIZE
        return f"{self.call}, {pages} page{'' if pages == 1 else 's'}"


@dataclass(frozen=True, slots=True)
class FaultCost:
    """What a page fault costs while several threads fault, one on each CPU.

    Attributes:
        threads: their number.
        mapping: ``one``, which they share, or ``own``.
        fault: a fault of each thread.
        why: why there is no figure.
    """

    threads: int
    mapping: str
    fault: Interval | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class ReaderCost:
    """What another process that reads a file of /proc/PID adds to the process's mmap and munmap.

    Attributes:
        file: ``maps`` or ``smaps_rollup``.
        resident: memory that the process has in use, in bytes.
        alone: munmap, mmap and a store into one page, while the other process reads its own file.
        added: what the reader adds to them, on average.
        why: why there are no figures.
    """

    file: str
    resident: int
    alone: Interval | None = None
    added: Interval | None = None
    why: str | None = None


@dataclass(frozen=True)
class BystanderTable:
    """What one thread's mapping calls cost the others, on this machine.

    ``str()`` gives it as text, in a notebook as HTML.

    Attributes:
        cpus: the CPUs that this process may use.
        calls: a row for each call, length, work and number of bystanders.
        faults: page faults of several threads.
        readers: readers of /proc/PID.
        seconds: duration of the measurement.
        windows: the measured windows.
        kept: those in which no thread was preempted; only they count.
        counted: whether /proc/interrupts counts the interrupts.
        complete: False if the measurement was interrupted.
        why: why nothing was measured, or why the measurement ended early.
    """

    cpus: int
    calls: tuple[BystanderCost, ...] = ()
    faults: tuple[FaultCost, ...] = ()
    readers: tuple[ReaderCost, ...] = ()
    seconds: float = 0.0
    windows: int = 0
    kept: int = 0
    counted: bool = True
    complete: bool = True
    why: str | None = None

    def interrupt(self, bystanders: int = 1) -> BystanderCost | None:
        """Return the row of the bare interrupt (membarrier) of `bystanders` CPUs, or None."""
        return next(
            (row for row in self.calls if row.call == IPI and row.bystanders == bystanders), None
        )

    def multiples(self, row: BystanderCost) -> tuple[float | None, float | None]:
        """Return ``added`` and ``lost`` of a row as multiples of those of the bare interrupt.

        None: one of the two is unknown.
        """
        bare = self.interrupt(row.bystanders)
        if bare is None:
            return None, None
        return _ratio(row.added, bare.added), _ratio(row.lost, bare.lost)

    def sentence(self, row: BystanderCost) -> str:
        """Return what a bystander of a row costs and loses, in words."""
        each = None
        if row.added is not None:
            n = row.bystanders
            added = row.added
            each = Interval(*(ns / n for ns in added))
        parts = []
        names = (("costs the caller", each), ("loses", row.lost))
        for (verb, figure), ratio in zip(names, self.multiples(row), strict=True):
            if figure is None or not figure.known:
                parts.append(f"{verb} an unknown time")
            elif ratio is None or row.call == IPI:
                parts.append(f"{verb} {time_text(figure)}")
            else:
                parts.append(f"{verb} {time_text(figure)} ({ratio:.1f} IPIs)")
        who = "Each bystander" if row.work == "spin" else f"One that {WORKS[row.work]}"
        return f"{row.piece}: {who[0].lower()}{who[1:]} {' and '.join(parts)}."

    def sentences(self) -> list[str]:
        """Return the known sentences of calls of one page and of the bare interrupt."""
        return [self.sentence(row) for row in self._headlines() if row.known]

    def _headlines(self) -> list[BystanderCost]:
        return [
            row
            for row in self.calls
            if row.bystanders == 1
            and row.work == "spin"
            and row.why is None
            and (row.call == IPI or row.nbytes == PAGE_SIZE)
        ]

    def notes(self) -> list[str]:
        """Return what a reader must know about this run."""
        if self.why is not None and not self.windows:
            return [f"Bystanders can't be measured: {self.why}."]
        return list(self._notes())

    def _notes(self) -> Iterator[str]:
        if self.why is not None:
            yield f"The measurement ended early: {self.why}."
        if not self.complete:
            yield "The measurement was interrupted."
        share = self.kept / self.windows if self.windows else 0.0
        yield (
            f"{self.kept:,} of {self.windows:,} windows count ({share:.0%}); in the others a "
            "thread was preempted."
        )
        unknown = [row.piece for row in self._headlines() if not row.known]
        if unknown:
            reason = "too few blocks" if share > _BUSY else "the CPUs were busy"
            yield (
                f"Can't tell from this run what bystanders cost ({'; '.join(unknown)}): {reason}. "
                f"Try a larger --budget{'' if share > _BUSY else ', or a quieter machine'}."
            )
        yield from self._interrupt_notes()
        reasons: dict[str, list[str]] = {}
        for row in self.calls:
            if row.why is not None:
                reasons.setdefault(row.why, []).append(row.piece)
        for why, pieces in reasons.items():
            yield f"Not measured ({'; '.join(dict.fromkeys(pieces))}): {why}."

    def _interrupt_notes(self) -> Iterator[str]:
        bare = self.interrupt()
        sides = (bare.added, bare.lost) if bare else ()
        known = [side for side in sides if side is not None and side.known]
        spread = max(((side.high - side.low) / 2 / side.median for side in known), default=0.0)
        if spread > _STEADY:
            yield (
                f"The machine is not steady: a bare IPI varies by ±{spread:.0%}. Multiples of it "
                "are safer than times."
            )
        if not self.counted:
            yield "/proc/interrupts has no TLB and CAL lines here: interrupts are not counted."

    def tables(self, columns: int = 9) -> list[tuple[str, Table]]:
        """Return the tables for people, each with its heading; without empty ones.

        `columns`: how many columns the first one has at most.
        """
        tables = [
            (CALLS_LEGEND, self._calls_table(columns)),
            ("Page faults of several threads at once", self._faults_table()),
            (
                "A loop of munmap, mmap and a store while another process reads /proc/PID",
                self._readers_table(),
            ),
        ]
        return [(heading, table) for heading, table in tables if table.rows]

    def _calls_table(self, columns: int) -> Table:
        groups: dict[tuple[str, int], dict[str, BystanderCost]] = {}
        for row in self.calls:
            if row.why is None:
                groups.setdefault((row.piece, row.bystanders), {})[row.work] = row
        rows: list[tuple[str, ...]] = []
        for (piece, bystanders), works in groups.items():
            if not any(row.known for row in works.values()):
                continue
            first = works.get("spin") or next(iter(works.values()))
            count = "" if first.interrupts is None else f"{first.interrupts:.1f}"
            lost = [time_text(works[work].lost) if work in works else "" for work in WORKS]
            ends = [str(bystanders), count]
            rows.append(
                (piece, time_text(first.alone), time_text(first.added), *lost, *ends)[:columns]
            )
        return Table(_TITLES[:columns], rows)

    def _faults_table(self) -> Table:
        rows: list[tuple[str, ...]] = [
            (str(row.threads), row.mapping, time_text(row.fault))
            for row in self.faults
            if row.fault is not None and row.fault.known
        ]
        return Table(("threads that fault", "mapping", "each fault"), rows, left=2)

    def _readers_table(self) -> Table:
        rows: list[tuple[str, ...]] = []
        for row in self.readers:
            if row.alone is None or not row.alone.known:
                continue
            resident = f" ({format_size(row.resident)} in use)" if row.resident else ""
            factor = _ratio(row.added, row.alone)
            rows.append(
                (
                    f"{row.file}{resident}",
                    time_text(row.alone),
                    time_text(row.added),
                    UNKNOWN if factor is None else f"x{1 + factor:.3g}",
                )
            )
        return Table(("file of /proc/PID", "a loop", "a reader adds", "in all"), rows)

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        tables = self.tables()
        paragraphs = (*self.sentences(), *self.notes(), *(heading for heading, _ in tables[:1]))
        return Report(
            f"Bystanders, on {self.cpus} CPU{'' if self.cpus == 1 else 's'}",
            paragraphs,
            tuple(table for _, table in tables),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``pyreserve costs --bystanders --json`` writes it."""
        calls = []
        for row in self.calls:
            ratios = zip(("added_ipis", "lost_ipis"), self.multiples(row), strict=True)
            calls.append(_plain(row) | {name: ratio and round(ratio, 2) for name, ratio in ratios})
        return _plain(self) | {
            "calls": calls,
            "faults": [_plain(row) for row in self.faults],
            "readers": [_plain(row) for row in self.readers],
        }

    def to_json(self) -> str:
        """Return `to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=1)
