"""The process that measures bystanders: it runs cases in C, in blocks, until the time is up."""

import errno
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

from pyreserve._native import ffi, lib
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.child import answer, serve
from pyreserve.units import MiB, round_up

RESIDENT = 256 * MiB
"""Bytes that the process has in use while another one reads its smaps_rollup."""

_WINDOW = 300_000  # ns: so short that many windows escape the scheduler on a busy machine
_LONG = 64 * PAGE_SIZE  # from here on a window has one or two calls
_LEAST_CALLS = 8  # to count interrupts: other processes cause some too
_PAIRS, _LONG_PAIRS = 8, 16  # windows with and without calls in a run
_READ = round_up(8 * MiB, PAGE_SIZE)  # bytes that a reading bystander reads: more than a TLB covers
_FAULT = round_up(32 * MiB, PAGE_SIZE)  # bytes that a faulting bystander can fault in a window
_CPU_SHARE = 0.97  # of the wall time; a thread with less was preempted
_LATE = 15_000  # ns; a thread that starts later missed part of the window
_CALLS = {
    "": "NO_CALL",
    "membarrier": "BARRIER",
    "munmap": "RELEASE",
    "mprotect": "PROTECT",
    "MADV_DONTNEED": "DISCARD",
    "MADV_FREE": "DISCARD_LAZY",
    "MAP_FIXED": "RENEW",
}
_WORK = {"spin": "SPIN", "read": "READ", "fault-shared": "FAULT_SHARED", "fault-own": "FAULT_OWN"}
_READERS = {"": "CALLS", "maps": "MAPS", "smaps_rollup": "ROLLUP"}


@dataclass(frozen=True, slots=True)
class Case:
    """What to measure: a call, what the bystanders do, and their number.

    Attributes:
        call: ``munmap``, ...; empty: nobody calls, and the bystanders' own work is timed.
        nbytes: length of the piece that is passed to the call.
        huge: whether the piece is a transparent huge page.
        work: what bystanders do: ``spin``, ``read``, ``fault-shared`` or ``fault-own``.
        bystanders: their number; with a reader 0.
        reader: the file of this process that another one reads: ``maps`` or ``smaps_rollup``.
    """

    call: str
    nbytes: int = PAGE_SIZE
    huge: bool = False
    work: str = "spin"
    bystanders: int = 1
    reader: str = ""

    @property
    def has_sentence(self) -> bool:
        """Whether the case is about bystanders that compute, and a call of one page."""
        return bool(self.call and self.bystanders and self.work == "spin") and (
            self.nbytes == PAGE_SIZE
        )


@dataclass(frozen=True, slots=True)
class Job:
    """The work of the process.

    Attributes:
        parent: PID of the parent; the process ends with it.
        deadline: time.monotonic() at which to stop, in seconds.
        cases: the cases to measure.
        cpus: the CPUs to use.
    """

    parent: int
    deadline: float
    cases: tuple[Case, ...]
    cpus: tuple[int, ...]


class Refused(Exception):  # noqa: N818
    """The kernel refused a case with an errno."""

    def __init__(self, err: int) -> None:
        super().__init__(err)
        self.err = err


class Counts(NamedTuple):
    """A thread's counts of a window: the fields of ``struct bystanders_sample``."""

    wall: int
    cpu: int
    late: int
    preemptions: int
    work: int
    lost: int
    longest: int


Window = Sequence[Counts]
"""The counts of each thread in a window, the caller's first."""


def run(case: Case, cpus: Sequence[int], on: Sequence[bool]) -> list[Window]:
    """Run a case in C, one window for each item of `on`.

    Args:
        case: what to run.
        cpus: of the caller, then of each bystander or of the reader.
        on: whether the calls of a window are made in this process; or whether the reader reads
            this process's file.

    Raises:
        Refused: the kernel refused a call.
    """
    used = [*cpus] if case.call else [cpus[0], *cpus]  # a caller that does not call needs none
    setup, numbers = ffi.new("struct bystanders_setup *"), ffi.new("int[]", used)
    setup.call = getattr(lib, f"BYSTANDERS_{_CALLS[case.call]}")
    setup.work = getattr(lib, f"BYSTANDERS_{_WORK[case.work]}")
    setup.second = getattr(lib, f"BYSTANDERS_{_READERS[case.reader]}")
    setup.length, setup.huge = case.nbytes, case.nbytes if case.huge else 0
    setup.n, setup.cpus, setup.window = case.bystanders, numbers, _WINDOW
    setup.second_cpu = cpus[1] if case.reader else cpus[0]
    setup.bytes = _READ if case.work == "read" else _FAULT
    setup.resident = RESIDENT if case.reader == "smaps_rollup" else 0
    threads = case.bystanders + 1
    samples = ffi.new("struct bystanders_sample[]", len(on) * threads)
    lib.vm_allow_huge(case.huge)  # a refusal leaves it as it is: the run then finds out
    err = lib.bystanders_run(setup, bytes(on), len(on), samples)
    lib.vm_allow_huge(True)
    if err:
        raise Refused(err)
    counts = [Counts(*(getattr(sample, name) for name in Counts._fields)) for sample in samples]
    return [counts[w : w + threads] for w in range(0, len(counts), threads)]


def is_disturbed(case: Case, window: Window, *, irq_apart: bool) -> bool:
    """Whether a thread of a window was preempted or late.

    Args:
        case: what ran in the window.
        window: its samples.
        irq_apart: whether the kernel leaves interrupts out of a thread's CPU time, which then says
            nothing.
    """
    # These wait for the kernel's locks, and that wait is part of what they cost.
    waits = case.work == "fault-shared" or bool(case.reader)
    return any(
        sample.preemptions
        or sample.late > _LATE
        or not (waits or irq_apart or sample.cpu >= _CPU_SHARE * sample.wall)
        for sample in window
        if sample.wall
    )


def evaluate(
    case: Case, windows: Sequence[Window], on: Sequence[bool], *, irq_apart: bool
) -> dict[str, float] | None:
    """Return the figures of a run, in ns; None if too few windows were undisturbed.

    ``alone``: a call without bystanders, or a fault; ``added``: what bystanders or a reader add to
    a call; ``lost``: the time that each bystander loses to a call. Each undisturbed window with
    calls is compared with the nearest one without; the figures are medians. With a reader they are
    means of a whole loop: the call, mapping again, a store.
    """
    kept = [
        w for w, window in enumerate(windows) if not is_disturbed(case, window, irq_apart=irq_apart)
    ]
    if not case.call:
        faults = [sum(s.wall / s.work for s in windows[w][1:]) / case.bystanders for w in kept]
        return {"alone": median(faults)} if faults else None
    with_calls, without = [w for w in kept if on[w]], [w for w in kept if not on[w]]
    if not with_calls or not without:
        return None
    if case.reader:  # few loops wait for the reader, but long: take means
        alone = _per_loop([windows[w] for w in without])
        return {"alone": alone, "added": _per_loop([windows[w] for w in with_calls]) - alone}
    pairs = [
        (windows[w], windows[min(without, key=lambda other: abs(other - w))]) for w in with_calls
    ]
    figures = {
        "alone": median(_per_call(windows[w]) for w in without),
        "added": median(_per_call(on) - _per_call(off) for on, off in pairs),
    }
    if case.bystanders:
        lost = [_lost(case, on, off) for on, off in pairs]
        figures["lost"] = median(lost)
    return figures


def _per_call(window: Window) -> float:
    return window[0].lost / window[0].work


def _per_loop(windows: Sequence[Window]) -> float:
    """Return the mean ns of a call with what prepares it."""
    return sum(window[0].wall for window in windows) / sum(window[0].work for window in windows)


def _lost(case: Case, on: Window, off: Window) -> float:
    """Return the ns that each bystander lost to each call, on average."""
    lost = 0.0
    for here, there in zip(on[1:], off[1:], strict=True):
        if case.work == "spin":  # the gaps show interrupts directly, whatever the CPU's clock does
            share = here.lost / here.wall - there.lost / there.wall
        else:
            share = 1 - (here.work / here.wall) / (there.work / there.wall)
        lost += share * here.wall
    return lost / case.bystanders / on[0].work


def count_interrupts(case: Case, cpus: Sequence[int], *, irq_apart: bool) -> float | None:
    """Return the interrupts of each bystander's CPU for each call, from runs of 1 and 2 windows.

    Their difference leaves out interrupts of starting and ending threads. None: a window was
    disturbed (a bystander that does not run gets no interrupts), it had too few calls, or
    interrupts are not counted.

    Raises:
        Refused: the kernel refused a call.
    """
    name = "CAL" if case.call == "membarrier" else "TLB"
    their_cpus = cpus[1 : case.bystanders + 1]
    counts = []
    try:
        for length in (1, 2):
            before = proc.interrupts()[name]
            windows = run(case, cpus, [True] * length)
            after = proc.interrupts()[name]
            if any(is_disturbed(case, window, irq_apart=irq_apart) for window in windows):
                return None
            interrupts = sum(after[cpu] - before[cpu] for cpu in their_cpus)
            counts.append((interrupts, sum(window[0].work for window in windows)))
    except proc.UNREADABLE:
        return None
    (few, few_calls), (many, calls) = counts
    if calls - few_calls < _LEAST_CALLS:
        return None
    return (many - few) / len(their_cpus) / (calls - few_calls)


def counts_interrupts_apart() -> bool:
    """Whether the kernel leaves interrupts out of the CPU time of threads."""
    with suppress(*proc.UNREADABLE, IndexError):
        return proc.cpu_ticks()[5] > 0  # the column irq stays 0 otherwise
    return False


def measure(case: Case, cpus: Sequence[int], *, irq_apart: bool) -> dict[str, Any]:
    """Run a case once; return its figures (see `evaluate`), ``kept``, ``windows``, ``interrupts``.

    Raises:
        Refused: the kernel refused a call.
    """
    on = [True, False] * (_LONG_PAIRS if case.nbytes >= _LONG or case.reader else _PAIRS)
    random.shuffle(on)
    windows = run(case, cpus, on)
    counts = case.call and case.bystanders and case.work == "spin"
    disturbed = [is_disturbed(case, window, irq_apart=irq_apart) for window in windows]
    return {
        "windows": len(on),
        "kept": disturbed.count(False),
        "interrupts": count_interrupts(case, cpus, irq_apart=irq_apart) if counts else None,
        **(evaluate(case, windows, on, irq_apart=irq_apart) or {}),
    }


def work(job: Job, send: Callable[..., None] = answer) -> None:
    """Measure all cases of a job block by block, in random order, until its deadline.

    Those that have a sentence come twice in a block.
    """
    remaining, irq_apart = dict(enumerate(job.cases)), counts_interrupts_apart()
    while remaining:
        sentences = [n for n in remaining if job.cases[n].has_sentence]
        for number in random.sample([*remaining, *sentences], len(remaining) + len(sentences)):
            if number not in remaining:  # refused just now
                continue
            if time.monotonic() >= job.deadline:
                return
            # Which CPU is whose differs from run to run: neighbours may cost less.
            cpus = random.sample(job.cpus, len(job.cpus))
            try:
                figures = measure(job.cases[number], cpus, irq_apart=irq_apart)
            except Refused as refused:
                if refused.err == errno.ETIMEDOUT:  # a busy machine: try again in the next block
                    continue
                del remaining[number]
                send(case=number, refused=refused.err)
                continue
            send(case=number, **figures)


def main() -> None:
    """Do a `Job`."""
    serve(work)
