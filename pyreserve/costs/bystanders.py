"""Measure what one thread's mapping calls cost the other threads of its process.

A call that makes address translations invalid interrupts every CPU that runs a thread of the
process (a TLB shootdown), so the caller waits and the others lose time. `measure_bystanders` runs
a caller and bystanders in a child process, in short windows with and without calls; see
csrc/bystanders.h.
"""

import errno
import math
import os
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

from pyreserve._system import machine, proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.bystander_child import RESIDENT, Case, Job
from pyreserve.costs.bystander_table import (
    IPI,
    WORKS,
    BystanderCost,
    BystanderTable,
    FaultCost,
    ReaderCost,
)
from pyreserve.costs.cells import SMALL, name_of
from pyreserve.costs.children import answers, start_of
from pyreserve.costs.stats import Interval, over_passes
from pyreserve.units import MiB, as_float, format_size

CALLS = ("munmap", "mprotect", "MADV_DONTNEED", "MADV_FREE", "MAP_FIXED")
"""The calls that are measured."""

BYSTANDERS_BUDGET = 30.0
"""Default limit of a run, in seconds."""

_PAGES = (1, 16, 512)
_MEMORY = 64 * MiB  # of each bystander at most, for the largest cases
_START = start_of("pyreserve.costs.bystander_child")


class BystandersInterrupted(KeyboardInterrupt):
    """Ctrl-C stopped `measure_bystanders`; `table` holds what was measured until then."""

    def __init__(self, table: BystanderTable) -> None:
        super().__init__("interrupted")
        self._table = table

    @property
    def table(self) -> BystanderTable:
        """What was measured until then."""
        return self._table


def measure_bystanders(
    budget: float = BYSTANDERS_BUDGET, *, progress: Callable[[float], None] | None = None
) -> BystanderTable:
    """Measure what calls on mappings cost the caller and the other threads of its process.

    Threads are bound to the CPUs that this process may use, in a child process. On one CPU nothing
    is measured, and the table says why.

    Args:
        budget: limit in seconds.
        progress: called with the seconds spent, after each case.

    Raises:
        ValueError: the budget is not positive and finite.
        BystandersInterrupted: Ctrl-C was pressed; its `table` holds what was measured until then.
    """
    budget = as_float(budget)
    if not 0 < budget < math.inf:
        msg = f"budget must be positive and finite, got {budget}"
        raise ValueError(msg)
    cpus = tuple(sorted(os.sched_getaffinity(0)))
    if len(cpus) == 1:
        why = "this process may use one CPU alone, so no other thread runs while one makes a call"
        return BystanderTable(cpus=1, why=why)
    run = _Run(cpus, budget, progress)
    try:
        run.work()
    except KeyboardInterrupt:
        raise BystandersInterrupted(run.table(complete=False)) from None
    return run.table(complete=True)


def counts_of(cpus: int) -> list[int]:
    """Return the numbers of bystanders to measure: 1, 3, 7, ... and one on each other CPU."""
    most = cpus - 1
    return sorted({most, *((1 << i) - 1 for i in range(1, most.bit_length() + 1))} & {*range(cpus)})


def cases_of(cpus: int, huge: int | None) -> list[Case]:
    """Return the cases for a number of CPUs; `huge` is the size of a huge page, if any."""
    counts = [n for n in counts_of(cpus) if n > 0]
    pieces = [(pages * PAGE_SIZE, False) for pages in _PAGES]
    pieces += [(huge, True)] if huge else []
    cases = [Case(IPI, bystanders=n) for n in counts]
    for call in CALLS:
        for nbytes, is_huge in pieces:
            cases += [Case(call, nbytes, is_huge, "spin", n) for n in counts]
            works = ("read",) if is_huge else tuple(WORKS)[1:]
            cases += [Case(call, nbytes, is_huge, work, 1) for work in works]
    threads = [1, *(n + 1 for n in counts)]
    cases += [Case("", work=f"fault-{kind}", bystanders=n) for n in threads for kind in _MAPPINGS]
    return [*cases, *(Case("munmap", bystanders=0, reader=file) for file in _READERS)]


_MAPPINGS = {"shared": "one", "own": "own"}
_READERS = ("maps", "smaps_rollup")


class _Run:
    """One measurement: the answers of the child, by case."""

    def __init__(
        self, cpus: tuple[int, ...], budget: float, progress: Callable[[float], None] | None
    ) -> None:
        self._cpus, self._budget, self._progress = cpus, budget, progress
        self._started = time.monotonic()
        self._huge = machine.thp_size() if "never" not in str(machine.thp_setting()) else None
        self._cases = cases_of(len(cpus), self._huge)
        self._answers: dict[int, list[dict[str, Any]]] = {}
        self._refused: dict[int, str] = {}
        self._died: str | None = None
        self._check_memory()

    def _check_memory(self) -> None:
        """Refuse the cases for which too little memory is available."""
        available = proc.available_bytes() // 2
        for number, case in enumerate(self._cases):
            needed = _MEMORY * case.bystanders if case.work != "spin" else 0
            needed += RESIDENT if case.reader == "smaps_rollup" else 0
            if needed > available:
                self._refused[number] = f"it needs {format_size(needed)} of memory"

    def work(self) -> None:
        """Run the child until the budget is spent."""
        numbers = [number for number in range(len(self._cases)) if number not in self._refused]
        job = Job(
            parent=os.getpid(),
            deadline=self._started + self._budget,
            cases=tuple(self._cases[number] for number in numbers),
            cpus=self._cpus,
        )
        for answer in answers(_START, job, job.deadline):
            if "refused" in answer:
                self._refused[numbers[answer["case"]]] = _refusal(answer["refused"])
            elif "case" in answer:
                self._answers.setdefault(numbers[answer["case"]], []).append(answer)
            elif "died" in answer:
                self._died = answer["died"]
            if self._progress is not None:
                self._progress(time.monotonic() - self._started)

    def table(self, *, complete: bool) -> BystanderTable:
        """Return the table of the answers so far."""
        every = [answer for found in self._answers.values() for answer in found]
        why = self._died
        if not every and why is None and complete:
            reasons = list(dict.fromkeys(self._refused.values()))
            why = reasons[0] if len(self._refused) == len(self._cases) else "the budget was spent"
        return BystanderTable(
            cpus=len(self._cpus),
            calls=tuple(self._calls()),
            faults=tuple(self._faults()),
            readers=tuple(self._readers()),
            seconds=time.monotonic() - self._started,
            windows=sum(answer["windows"] for answer in every),
            kept=sum(answer["kept"] for answer in every),
            counted=_counts_interrupts(),
            complete=complete,
            why=why,
        )

    def _figure(self, number: int, name: str) -> Interval | None:
        answers = self._answers.get(number, ())
        blocks = [answer[name] for answer in answers if name in answer]
        return over_passes(blocks) if blocks else None

    def _calls(self) -> Iterator[BystanderCost]:
        for number, case in enumerate(self._cases):
            if not case.call or case.reader:
                continue
            found = self._answers.get(number, ())
            counts = [a["interrupts"] for a in found if a["interrupts"] is not None]
            yield BystanderCost(
                call=case.call,
                nbytes=case.nbytes,
                page_kind=name_of(case.nbytes) if case.huge else SMALL,
                work=case.work,
                bystanders=case.bystanders,
                alone=self._figure(number, "alone"),
                added=self._figure(number, "added"),
                lost=self._figure(number, "lost"),
                interrupts=median(counts) if counts else None,
                why=self._refused.get(number),
            )

    def _faults(self) -> Iterator[FaultCost]:
        for number, case in enumerate(self._cases):
            if not case.call:
                mapping = _MAPPINGS[case.work.removeprefix("fault-")]
                fault = self._figure(number, "alone")
                yield FaultCost(case.bystanders, mapping, fault, self._refused.get(number))

    def _readers(self) -> Iterator[ReaderCost]:
        for number, case in enumerate(self._cases):
            if case.reader:
                resident = RESIDENT if case.reader == "smaps_rollup" else 0
                alone, added = (self._figure(number, name) for name in ("alone", "added"))
                yield ReaderCost(case.reader, resident, alone, added, self._refused.get(number))


def _counts_interrupts() -> bool:
    try:
        return bool({"TLB", "CAL"} & proc.interrupts().keys())
    except proc.UNREADABLE:
        return False


def _refusal(err: int) -> str:
    if err == errno.ENODATA:
        return "no huge page could be had"
    return f"it was refused ({errno.errorcode.get(err, err)}: {os.strerror(err)})"
