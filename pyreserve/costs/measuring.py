"""Runs a plan: pass after pass, each group in a fresh child process, until sure or out of time."""

import json
import math
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any

from pyreserve._system import machine
from pyreserve.costs.cells import Cell, Curve
from pyreserve.costs.child import PIECE, Job
from pyreserve.costs.planning import Group, Plan
from pyreserve.costs.stats import Sample, quantile, split_cold, summarise
from pyreserve.costs.table import CostTable, Measured, Noise
from pyreserve.units import MiB, as_float

BUDGET = 50.0
"""Seconds that a run takes at most unless told otherwise."""

WIDTH = 0.04
"""Width of a median's 95 % interval at which a cell is known well enough, as a share of it."""

_LEAST_PASSES = 6  # an interval of fewer says little
_SHARE = 20  # so many rounds of the slowest program fit into the budget
_WARM_SHARE = 15  # and so many of the longest warming up
_BIG = 256 * MiB  # what holds more memory takes part in every second pass
_GRACE = 3.0  # seconds after the deadline at which a child that does not end is killed
# Nothing is imported before the path is the caller's: the directory that it is in would come first.
_START = "import sys; sys.path[:] = sys.argv[1:]; from pyreserve.costs.child import main; main()"
_LOOK = 3600.0  # seconds that are waited for an answer at a time
_NO_TIME = "the budget was spent before its turn"
_ALL_COLD = "the host had to bring the memory each time"
# What brings memory: how fast depends on whether the host has it. (A first read brings none.)
_BRINGING = frozenset(
    {
        ("touch", "write"),
        ("populate", "madvise"),
        ("collapse", "madvise"),
        ("retouch", "after-dontneed"),
        ("retouch", "after-fork"),
    }
)
_FEW = 64 * MiB  # pieces of so many bytes have so few samples that shorter ones have to tell
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        seconds, budget: how long it has taken and may take at most.
        passes: whole passes so far.
        settled, cells: how many cells are known well enough, of how many.
        doing: what is being measured.
    """

    seconds: float
    budget: float
    passes: int
    settled: int
    cells: int
    doing: str


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came during `measure`; `table` holds what was measured until then."""

    def __init__(self, table: CostTable) -> None:
        super().__init__("interrupted")
        self._table = table

    @property
    def table(self) -> CostTable:
        """What was measured until then."""
        return self._table


def measure(
    plan: Plan,
    *,
    budget: float = BUDGET,
    width: float = WIDTH,
    progress: Callable[[Progress], None] | None = None,
) -> CostTable:
    """Measure a plan's cells.

    Every pass runs each group in a fresh child process, warmed up, its programs taking turns, so
    that whatever drifts hits all of them alike. Passes go on until each median's 95 % interval is
    narrow enough, but at least six, or until the budget is spent. What can't be measured is in the
    table with the reason.

    Args:
        plan: see `pyreserve.costs.plan`.
        budget: seconds, from now.
        width: width of the interval at which a cell is known well enough, as a share of its median.
        progress: called now and then.

    Raises:
        OutOfMemoryError: the machine, or this process's cgroup, has less memory than it takes.
        ValueError: the budget or the width is not positive, or the budget infinite.
        Interrupted: Ctrl-C came; the table of what was measured is in it.
    """
    budget, width = as_float(budget), as_float(width)
    if not 0 < budget < math.inf or not width > 0:
        msg = f"budget and width are positive, the budget finite, not {budget} and {width}"
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
        self._cells = plan.cells  # once: they are counted at every answer of a child
        self._begun = time.monotonic()
        self._passes = 0
        self._samples: dict[Cell, list[list[Sample]]] = {}
        self._warm_ups: dict[Cell, list[list[Sample]]] = {}
        self._refused: dict[Cell, str] = dict(plan.unmeasurable)
        self._seconds: dict[Group, dict[int, float]] = {group: {} for group in plan.groups}
        self._skipped: dict[Cell, str] = {}
        self._settled: set[Cell] = set()
        self._system_calls: list[list[float]] = []
        self._entries: dict[str, float] = {}
        self._machine_time = _MachineTime()

    def work(self) -> None:
        """Make passes."""
        while self._left() > 0:
            groups = [(group, self._open(group)) for group in self._plan.groups]
            groups = [(group, numbers) for group, numbers in groups if numbers]
            if not groups:
                return
            self._system_calls.append([])
            for i, (group, numbers) in enumerate(groups):
                if self._left() <= 0:
                    return
                # No group may use up what the others of this pass need.
                ahead = sum(len(others) for _, others in groups[i:])
                self._new_pass(group)
                self._run_group(group, numbers, self._left() * len(numbers) / ahead)
            self._passes += 1
            self._settle()

    def _left(self) -> float:
        return self._begun + self._budget - time.monotonic()

    def _open(self, group: Group) -> list[int]:
        """Return the numbers of the programs that still have something to find out."""
        big_too = self._passes % 2 == 0
        return [
            number
            for number, program in enumerate(group.programs)
            if (big_too or program.memory <= _BIG)
            and any(self._is_open(cell) for cell in program.cells)
        ]

    def _is_open(self, cell: Cell) -> bool:
        settled = self._passes >= _LEAST_PASSES and cell in self._settled
        return not settled and cell not in self._refused

    def _settle(self) -> None:
        for cell, passes in self._samples.items():
            if any(passes) and summarise(_all_of(passes)).width <= self._width:
                self._settled.add(cell)

    def _new_pass(self, group: Group) -> None:
        for program in group.programs:
            for cell in program.cells:
                passes = self._samples.setdefault(cell, [])
                if not passes or passes[-1]:
                    passes.append([])

    def _report(self, doing: str) -> None:
        if self._progress is not None:
            self._progress(
                Progress(
                    seconds=time.monotonic() - self._begun,
                    budget=self._budget,
                    passes=self._passes,
                    settled=len(self._settled),
                    cells=len(self._cells),
                    doing=doing,
                )
            )

    def _run_group(self, group: Group, numbers: list[int], seconds: float) -> None:
        job = Job(
            parent=os.getpid(),
            deadline=time.monotonic() + seconds,
            share=self._budget / _SHARE,
            setting=group.setting,
            warm_seconds=self._budget / _WARM_SHARE,
            warm=max(group.programs[number].memory for number in numbers),
            entries=not self._entries,
            programs={number: group.programs[number] for number in numbers},
            seconds=self._seconds[group],
        )
        self._report(str(group.setting))
        for found in _answers(job):
            self._take(group, found)
            self._report(str(group.setting))

    def _take(self, group: Group, found: dict[str, Any]) -> None:
        """Take in one answer of a child."""
        if "samples" in found:
            cells = group.programs[found["program"]].cells
            self._seconds[group][found["program"]] = found["seconds"]
            for position, values in zip(found["cells"], found["samples"], strict=True):
                self._samples[cells[position]][-1].extend(values)
        elif "refused" in found:
            cells = group.programs[found["program"]].cells
            for position in found["refused"]:
                self._refused.setdefault(cells[position], found["why"])
        elif "skipped" in found:
            self._skipped |= dict.fromkeys(group.programs[found["skipped"]].cells, found["why"])
        elif "system_call" in found:
            self._system_calls[-1].append(found["system_call"])
        elif "warm_up" in found:
            setting = group.setting
            if PIECE % setting.kind.size == 0:
                touch = Curve("touch", "write", setting.kind.name, setting.mode).at(PIECE)
                self._warm_ups.setdefault(touch, []).append(found["warm_up"])
        elif "map_entries" in found:
            self._entries = found["map_entries"]
        elif "unavailable" in found or "died" in found:
            why = found.get("unavailable") or found["died"]
            for program in group.programs:
                for cell in program.cells:
                    self._refused.setdefault(cell, why)

    def table(self, *, complete: bool) -> CostTable:
        """Put together what is known by now."""
        facts = machine.facts()
        cells: list[Measured] = []
        usual: dict[Curve, float] = {}  # ns a page, of the last length that had samples
        for cell in sorted(self._cells, key=lambda cell: cell.nbytes):
            warm, cold = self._parted(cell, facts["virtualised"] != "no", usual)
            if warm:
                times = summarise(warm)
                usual[Curve.of(cell)] = times.median / cell.pages
                cells.append(Measured(cell, "warm", times, None, warm))
            else:
                why = self._refused.get(cell) or self._skipped.get(cell, _NO_TIME)
                cells.append(Measured(cell, "warm", None, _ALL_COLD if cold else why))
            if cold:
                cells.append(Measured(cell, "cold", summarise(cold), None, cold))
        order = {cell: i for i, cell in enumerate(self._cells)}
        cells.sort(key=lambda one: order[one.cell])
        cells += [Measured(cell, "warm", None, why) for cell, why in self._plan.unmeasurable]
        calls = [median(one) for one in self._system_calls if one]
        facts["system_call_ns"] = round(median(calls), 1) if calls else None
        facts["map_entries"] = self._entries
        return CostTable(
            machine=facts,
            cells=tuple(cells),
            noise=self._machine_time.noise(calls),
            seconds=time.monotonic() - self._begun,
            complete=complete,
        )

    def _parted(
        self, cell: Cell, has_host: bool, usual: dict[Curve, float]
    ) -> tuple[list[list[float]], list[list[float]]]:
        """Return a cell's warm and its cold samples, pass by pass."""
        passes = [one for one in self._samples.get(cell, []) if one]
        if not has_host or (cell.verb, cell.method) not in _BRINGING:
            return _all_of(passes), []
        page_ns = usual.get(Curve.of(cell)) if cell.nbytes >= _FEW else None
        expected = None if page_ns is None else page_ns * cell.pages
        return split_cold(passes, self._warm_ups.get(cell, []), expected)


def _all_of(passes: list[list[Sample]]) -> list[list[float]]:
    return [[ns for ns, _ in one] for one in passes if one]


class _MachineTime:
    """What the CPUs have done since this was made."""

    def __init__(self) -> None:
        self._begun, self._busy, self._stolen = time.monotonic(), *self._read()
        self._own = self._spent()

    @staticmethod
    def _read() -> tuple[float, float]:
        """Read the seconds that all CPUs were busy, and had stolen from them (proc(5)).

        (0, 0) if /proc/stat can't be read.
        """
        try:
            with Path("/proc/stat").open(encoding="ascii") as stat:
                fields = [int(field) for field in stat.readline().split()[1:]]
        except OSError:
            return 0.0, 0.0
        user, nice, system, _, _, irq, softirq, stolen = fields[:8]
        return (user + nice + system + irq + softirq) / _TICKS, stolen / _TICKS

    @staticmethod
    def _spent() -> float:
        """Return the CPU seconds of this process and of the children that have ended."""
        usages = (resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in usages)

    def noise(self, calls: list[float]) -> Noise:
        """Say what others did meanwhile; `calls` are a system call's times, pass by pass."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        busy, stolen = self._read()
        own = self._spent() - self._own
        return Noise(
            other_cpus=max(0.0, (busy - self._busy - own) / seconds),
            stolen_cpus=max(0.0, (stolen - self._stolen) / seconds),
            speed_spread=_spread(calls) if calls else 0.0,
        )


def _spread(values: list[float]) -> float:
    ordered = sorted(values)
    return (quantile(ordered, 0.75) - quantile(ordered, 0.25)) / median(ordered)


def _answers(job: Job) -> Iterator[dict[str, Any]]:
    """Run a child; yield its answers, and at last ``died`` if it did not do its job to the end.

    Whatever ends the iteration ends the child.
    """
    child, done = None, False
    with ExitStack() as stack:
        try:
            try:
                complaints = stack.enter_context(tempfile.TemporaryFile())
                with _no_interrupt():  # between its start and the name by which it is ended
                    child = _start(job, complaints)
            except OSError as error:
                yield {"died": f"the measuring process can't be started: {error}"}
                return
            for found in _talk(child, job.deadline + _GRACE):
                done = done or "done" in found
                yield found
            if done:
                return
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, job.deadline + _GRACE - time.monotonic()))
        finally:
            if child is not None:
                child.kill()
                child.wait()
                assert child.stdout is not None
                child.stdout.close()
        if time.monotonic() < job.deadline:
            yield {"died": _obituary(child.returncode, complaints)}


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Let Ctrl-C wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(job: Job, complaints: IO[bytes]) -> "subprocess.Popen[bytes]":
    if not sys.executable:
        msg = "it is a fresh Python, and sys.executable does not say where one is"
        raise FileNotFoundError(msg)
    # Only strings count there.
    command = [sys.executable, "-c", _START, *(at for at in sys.path if isinstance(at, str))]
    # The job lies in a file: to write it waits for nobody, and nobody who dies breaks it.
    with tempfile.TemporaryFile() as written:
        pickle.dump(job, written)
        written.seek(0)
        # A session of its own: Ctrl-C in the terminal is for the parent, who ends the child.
        return subprocess.Popen(
            command,
            stdin=written,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )


def _talk(child: "subprocess.Popen[bytes]", until: float) -> Iterator[dict[str, Any]]:
    """Yield the answers that a child gives before time.monotonic() is `until`."""
    assert child.stdout is not None
    pipe, rest = child.stdout.fileno(), b""
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        if not readable.poll(1000 * min(left, _LOOK)):
            continue
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # A sitecustomize may have something to say too.
            with suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict):
                    yield found


def _obituary(status: int, complaints: IO[bytes]) -> str:
    if status < 0:
        names = {one.value: one.name for one in signal.Signals}
        name = names.get(-status, f"signal {-status}")  # those of real time have no names
        hint = ": the system may be out of memory" if status == -signal.SIGKILL else ""
        return f"the measuring process was ended by {name}{hint}"
    complaints.seek(0)
    last = complaints.read().decode(errors="replace").strip().rpartition("\n")[2]
    return f"the measuring process ended with status {status}: {last}"
