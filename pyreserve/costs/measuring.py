"""Run a plan: pass after pass in child processes, until the medians are known or time is up."""

import math
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

from pyreserve._system import machine, proc
from pyreserve.costs.cells import Cell, Curve, name_of
from pyreserve.costs.child import Job
from pyreserve.costs.children import GRACE, answers, start_of
from pyreserve.costs.planning import Group, Plan
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.stats import (
    ENOUGH,
    Sample,
    quantile,
    split_cold,
    summarise,
    undisturbed,
)
from pyreserve.costs.table import CostTable
from pyreserve.units import MiB, as_float

BUDGET = 30.0
"""Default limit of a run, in seconds."""

WIDTH = 0.04
"""Default width of a median's 95 % interval at which a cell is settled, as a share of it."""

ONE_AT_A_TIME = threading.Lock()
"""Held while a process measures on its own account: concurrent runs would disturb each other."""

_MIN_PASSES = ENOUGH
# The first pass may take as much of the budget as allows as many more: the rest is not measured.
_PASS_SHARE, _PASS_SECONDS = 1 / (_MIN_PASSES + 1), 1.0  # and at least so long
_WARM_SHARE = 15  # one warm-up may take 1/15 of the budget
_GRACE = GRACE
_START = start_of("pyreserve.costs.child")
_NO_TIME = "the budget is too small for this cell too"
_ALL_COLD = "the hypervisor had to supply the memory each time"
# Cells that allocate pages, so that samples may be cold. (A first read maps the zero page.)
_ALLOCATING = frozenset(
    {
        ("touch", "write"),
        ("populate", "madvise"),
        ("collapse", "madvise"),
        ("retouch", "after-dontneed"),
        ("retouch", "after-dontneed+mprotect"),
        ("retouch", "after-mmap-fixed"),
        ("retouch", "after-release"),
        ("retouch", "after-fork"),
    }
)
_FEW = 64 * MiB  # from this length on samples are few: shorter lengths predict the warm time
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a run.

    Attributes:
        seconds, budget: elapsed seconds, and their limit.
        passes: completed passes.
        settled, cells: number of cells whose interval is narrow enough, and of all cells.
        doing: the page kind, mode and threads being measured.
        table: makes the table of all cells measured until then; None in the middle of a pass, when
            it would disturb the measurement.
    """

    seconds: float
    budget: float
    passes: int
    settled: int
    cells: int
    doing: str
    table: Callable[[], CostTable] | None = None


class Interrupted(KeyboardInterrupt):
    """Ctrl-C stopped `measure`; `table` holds the cells measured until then."""

    def __init__(self, table: CostTable) -> None:
        super().__init__("interrupted")
        self._table = table

    @property
    def table(self) -> CostTable:
        """The cells measured until then."""
        return self._table


def measure(
    plan: Plan,
    *,
    budget: float = BUDGET,
    width: float = WIDTH,
    progress: Callable[[Progress], None] | None = None,
) -> CostTable:
    """Measure a plan's cells.

    Every pass runs each group in a fresh, warmed-up child process. The programs of a group take
    turns, so drift of the machine affects all of them equally. Passes are repeated until each
    median's 95 % interval is narrow enough, but at least six times, or until the budget is spent.
    A small budget measures fewer cells, not worse ones: those that the first pass does not reach
    in a seventh of the budget are dropped. Cells that were not measured are in the table with the
    reason. Samples in which the thread was preempted count only where too few others remain.

    Args:
        plan: the cells to measure; see `pyreserve.costs.plan`.
        budget: limit in seconds, from now.
        width: width of the interval at which a cell is settled, as a share of its median.
        progress: called after each answer of a child process.

    Raises:
        OutOfMemoryError: the machine, or this process's cgroup, has less memory than the plan
            needs.
        ValueError: the budget is not positive and finite, or the width is not positive.
        Interrupted: Ctrl-C was pressed; its `table` holds the cells measured until then.
    """
    budget, width = as_float(budget), as_float(width)
    if not 0 < budget < math.inf:
        msg = f"budget must be positive and finite, got {budget}"
        raise ValueError(msg)
    if not width > 0:
        msg = f"width must be positive, got {width}"
        raise ValueError(msg)
    plan.check_memory()
    run = _Run(plan, budget, width, progress)
    try:
        run.work()
        return run.table(complete=True)
    except KeyboardInterrupt:
        raise Interrupted(run.table(complete=False)) from None


class _Run:
    """One run of a plan."""

    def __init__(
        self,
        plan: Plan,
        budget: float,
        width: float,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self._plan, self._budget, self._width, self._progress = plan, budget, width, progress
        self._cells = plan.cells  # computed once: every progress report needs their number
        self._started = time.monotonic()
        self._passes = 0
        self._samples: dict[Cell, dict[int, list[Sample]]] = {cell: {} for cell in self._cells}
        self._refused: dict[Cell, str] = dict(plan.unmeasurable)
        self._seconds: dict[Group, dict[int, float]] = {group: {} for group in plan.groups}
        self._settled: set[Cell] = set()
        self._system_calls: list[list[float]] = []
        self._map_entries: dict[str, float] = {}
        self._kinds: dict[str, list[int]] = {}
        self._machine_time = _MachineTime()

    def work(self) -> None:
        """Run passes until every cell is settled or the budget is spent."""
        while self._seconds_left() > 0:
            groups = [(group, self._unsettled(group)) for group in self._plan.groups]
            groups = [(group, numbers) for group, numbers in groups if numbers]
            if not groups:
                return
            self._system_calls.append([])
            started, left = time.monotonic(), self._seconds_left()
            first = min(left, max(left * _PASS_SHARE, _PASS_SECONDS))
            end = started + (left if self._any_samples() else first)
            for i, (group, numbers) in enumerate(groups):
                if time.monotonic() >= end:
                    break
                # Leave time for the remaining groups of this pass, by number of programs.
                remaining = sum(len(others) for _, others in groups[i:])
                share = (end - time.monotonic()) * len(numbers) / remaining
                self._run_group(group, numbers, end, share)
            self._passes += 1
            self._update_settled()
            self._report("", self.table_now)
            if self._passes >= _MIN_PASSES and time.monotonic() - started > self._seconds_left():
                return  # the next pass would not be complete

    def _seconds_left(self) -> float:
        return self._started + self._budget - time.monotonic()

    def _unsettled(self, group: Group) -> list[int]:
        """Return the numbers of the programs that have unsettled cells and run in this pass."""
        return [
            number
            for number, program in enumerate(group.programs)
            if any(self._is_unsettled(cell) for cell in program.cells)
        ]

    def _is_unsettled(self, cell: Cell) -> bool:
        if not self._samples[cell] and self._any_samples():
            return False  # the budget is too small
        settled = self._passes >= _MIN_PASSES and cell in self._settled
        return not settled and cell not in self._refused

    def _any_samples(self) -> bool:
        """Whether a first pass has measured something: cells that it did not reach are dropped."""
        return self._passes > 0 and any(self._samples.values())

    def _update_settled(self) -> None:
        for cell, passes in self._samples.items():
            times = [undisturbed(samples) for samples in passes.values()]
            if times and summarise(times).width <= self._width:
                self._settled.add(cell)

    def _report(self, doing: str, table: Callable[[], CostTable] | None = None) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    seconds=time.monotonic() - self._started,
                    budget=self._budget,
                    passes=self._passes,
                    settled=len(self._settled),
                    cells=len(self._cells),
                    doing=doing,
                    table=table,
                )
            )

    def _run_group(self, group: Group, numbers: list[int], end: float, share: float) -> None:
        job = Job(
            parent=os.getpid(),
            deadline=end,
            sweep_until=time.monotonic() + share,
            warm_seconds=self._budget / _WARM_SHARE,
            warm=max(group.programs[number].memory for number in numbers),
            entries=not self._map_entries,
            programs={number: group.programs[number] for number in numbers},
            seconds=self._seconds[group],
        )
        self._report(str(group))
        for answer in _answers(job):
            self._record(group, answer)
            self._report(str(group))

    def _record(self, group: Group, answer: dict[str, Any]) -> None:
        """Record an answer of a child."""
        if "samples" in answer:
            cells = group.programs[answer["program"]].cells
            self._seconds[group][answer["program"]] = answer["seconds"]
            for position, values in zip(answer["cells"], answer["samples"], strict=True):
                self._samples[cells[position]].setdefault(self._passes, []).extend(values)
        elif "refused" in answer:
            cells = group.programs[answer["program"]].cells
            for position in answer["refused"]:
                self._refused.setdefault(cells[position], answer["why"])
        elif "system_call" in answer:
            self._system_calls[-1].append(answer["system_call"])
        elif "map_entries" in answer:
            self._map_entries = answer["map_entries"]
        elif "kind" in answer:
            counts = self._kinds.setdefault(answer["kind"], [0, 0])
            counts[:] = counts[0] + answer["tried"], counts[1] + answer["got"]
        elif "died" in answer:
            for program in group.programs:
                for cell in program.cells:
                    self._refused.setdefault(cell, answer["died"])

    def table_now(self) -> CostTable:
        """Return the table of all samples recorded so far, as of an unfinished run."""
        return self.table(complete=False)

    def table(self, *, complete: bool) -> CostTable:
        """Return the table of all samples recorded so far."""
        facts = machine.facts()
        cells: list[Measured] = []
        page_ns: dict[Curve, float] = {}  # of the longest length so far that has samples
        for cell in sorted(self._cells, key=lambda cell: cell.nbytes):
            warm, cold = self._split(cell, facts["virtualised"] != "no", page_ns)
            if any(warm):
                times = summarise(warm)
                page_ns[Curve.of(cell)] = times.median / cell.pages
                medians = tuple(median(values) if values else None for values in warm)
                cells.append(Measured(cell, "warm", times, None, medians))
            else:
                why = self._refused.get(cell, _NO_TIME)
                cells.append(Measured(cell, "warm", None, _ALL_COLD if any(cold) else why))
            if any(cold):
                cells.append(Measured(cell, "cold", summarise(cold)))
        order = {cell: i for i, cell in enumerate(self._cells)}
        cells.sort(key=lambda entry: order[entry.cell])
        cells += [Measured(cell, "warm", None, why) for cell, why in self._plan.unmeasurable]
        calls = [median(times) for times in self._system_calls if times]
        facts["system_call_ns"] = round(median(calls), 1) if calls else None
        facts["map_entries"] = self._map_entries
        facts["huge_pages"] = self._huge_pages()
        return CostTable(
            machine=facts,
            cells=tuple(cells),
            noise=self._machine_time.noise(calls),
            seconds=time.monotonic() - self._started,
            complete=complete,
        )

    def _huge_pages(self) -> dict[str, int]:
        """Return the state of huge pages: see `pyreserve.costs.CostTable.machine`."""
        size = machine.thp_size()
        tried, got = self._kinds.get(name_of(size), (0, 0)) if size else (0, 0)
        counts = {"tried": tried, "got": got}
        free = machine.free_memory()
        if free is not None:
            counts |= {"free_bytes": free[0], "free_bytes_in_huge_blocks": free[1]}
        return counts

    def _split(
        self, cell: Cell, virtualised: bool, page_ns: dict[Curve, float]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Return a cell's warm and its cold samples, pass by pass."""
        samples = self._samples[cell]
        passes = [samples.get(number, []) for number in range(len(self._system_calls))]
        if not virtualised or (cell.verb, cell.method) not in _ALLOCATING:
            return [undisturbed(values) for values in passes], []
        predicted = page_ns.get(Curve.of(cell)) if cell.nbytes >= _FEW else None
        expected = None if predicted is None else predicted * cell.pages
        return split_cold(passes, expected)


class _MachineTime:
    """CPU time of the whole machine since this object was created."""

    def __init__(self) -> None:
        self._started, self._busy, self._stolen = time.monotonic(), *self._read()
        self._own = self._own_seconds()

    @staticmethod
    def _read() -> tuple[float, float]:
        """Return the busy and the stolen seconds of all CPUs since boot (proc(5), /proc/stat).

        (0, 0) if /proc/stat cannot be read.
        """
        try:
            user, nice, system, _, _, irq, softirq, stolen = proc.cpu_ticks()[:8]
        except OSError:
            return 0.0, 0.0
        return (user + nice + system + irq + softirq) / _TICKS, stolen / _TICKS

    @staticmethod
    def _own_seconds() -> float:
        """Return the CPU seconds of this process and of its children that have ended."""
        scopes = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        usages = (resource.getrusage(scope) for scope in scopes)
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def noise(self, calls: list[float]) -> Noise:
        """Return the noise since the start; `calls` are the times of a system call, by pass."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        busy, stolen = self._read()
        own = self._own_seconds() - self._own
        return Noise(
            other_cpus=max(0.0, (busy - self._busy - own) / seconds),
            stolen_cpus=max(0.0, (stolen - self._stolen) / seconds),
            speed_spread=_spread(calls) if calls else 0.0,
        )


def _spread(values: list[float]) -> float:
    """Return the interquartile range as a share of the median."""
    ordered = sorted(values)
    return (quantile(ordered, 0.75) - quantile(ordered, 0.25)) / median(ordered)


def _answers(job: Job) -> Iterator[dict[str, Any]]:
    return answers(_START, job, job.deadline, _GRACE)
