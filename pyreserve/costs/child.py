"""The measuring process: runs the programs of a group.

It reads a pickled job from standard input and writes each answer as a line of JSON to standard
output, so no finished measurement is lost if the process is killed.
"""

import errno
import json
import pickle
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from pyreserve._native import ffi, lib
from pyreserve._system.limits import PAGE_SIZE, refusal, refusing_limit
from pyreserve.costs.cells import SMALL, Cell, PageKind
from pyreserve.costs.map_entries import map_entries
from pyreserve.costs.programs import Program, Setting, Step
from pyreserve.costs.stats import Sample
from pyreserve.units import MiB, format_size, round_up

PIECE = 2 * MiB
"""Memory is warmed up in pieces of this many bytes, each timed."""

_SWEEPS = 3  # turns that each short program gets in a pass
_SLICE = 0.005  # seconds of a turn; a longer round runs once
_MAX_ROUNDS = 60
_LONG = 0.1  # seconds; a program with longer rounds gets one turn a pass and no warm-up round
_TRIAL_PIECES = 32  # pieces touched to measure how fast warming up is
_CALLS = 1000  # getppid calls in one sample

_VERBS = {
    "COMMIT_MAP": "commit",
    "UNCOMMIT": "decommit",
    "DISCARD_OFF": "decommit",
    "HUGE_PREFER": "advise",
    "DISCARD_LAZY": "lazy discard",
    "REAP": "fork",
}


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one child process.

    Attributes:
        parent: PID of the parent; the child ends with it.
        deadline: time.monotonic() at which to stop, in seconds.
        share: limit of one round of a program, in seconds.
        setting: the setting of all its programs.
        warm: bytes of memory to warm up.
        warm_seconds: limit of one warm-up, in seconds; what does not fit stays cold.
        entries: whether to count map entries too.
        programs: the programs to run, by number.
        seconds: duration of a round in earlier passes, by number.
    """

    parent: int
    deadline: float
    share: float
    setting: Setting
    warm: int
    warm_seconds: float
    entries: bool
    programs: dict[int, Program]
    seconds: dict[int, float]


def _no_thread(err: int) -> str:
    """Return why a thread could not be started."""
    _, clause = refusing_limit("fork", err, 0)
    return (
        f"a thread was refused ({errno.errorcode.get(err, err)}){f': {clause}' if clause else ''}"
    )


class Refused(Exception):  # noqa: N818
    """The kernel refused step number `step` of a program with errno `err`."""

    def __init__(self, err: int, step: int) -> None:
        super().__init__(err, step)
        self.err, self.step = err, step


def run(program: Program, rounds: int) -> list[list[Sample]]:
    """Run a program in C; return the samples of each of its `cells`, in their order.

    Raises:
        Refused: the kernel refused a step.
    """
    timed = [step.cell for step in program.steps if step.cell is not None]
    steps = ffi.new("struct timing_step[]", len(program.steps))
    slot = 0
    for row, step in zip(steps, program.steps, strict=True):
        row.verb = getattr(lib, f"TIMING_{step.verb}")
        row.slot = -1 if step.cell is None else slot
        row.offset, row.length, row.repeat = step.offset, step.nbytes, step.repeat
        slot += step.cell is not None
    native = ffi.new("struct timing_program *")
    native.steps, native.nsteps, native.nslots = steps, len(program.steps), len(timed)
    native.length, native.align, native.phase = (
        program.nbytes,
        program.align,
        program.phase,
    )
    native.huge, native.advice = program.huge, _advice(program.advice)
    native.access = lib.VM_NORESERVE if program.noreserve else 0
    per_slot = rounds * program.threads
    n = len(timed) * per_slot
    samples, preempted = ffi.new("double[]", n or 1), ffi.new("unsigned char[]", n or 1)
    done, failed = ffi.new("size_t *"), ffi.new("size_t *")
    err = lib.timing_run(native, program.threads, rounds, samples, preempted, done, failed)
    if err:
        raise Refused(err, int(failed[0]))
    by_cell: dict[Cell, list[Sample]] = {cell: [] for cell in program.cells}
    for i in range(n):
        by_cell[timed[i // per_slot]].append((round(samples[i], 2), bool(preempted[i])))
    return list(by_cell.values())


def _advice(names: Iterable[str]) -> int:
    """Return the sum of constants of ``enum vm_advice``, named without ``VM_``."""
    return sum({int(getattr(lib, f"VM_{name}")) for name in names})


_UNNAMED = Cell("", "", SMALL, "charge", PAGE_SIZE)  # for timed steps that belong to no plan


def _bare_program(
    steps: list[Step], nbytes: int, *, align: int = 0, advice: tuple[str, ...] = ()
) -> Program:
    whole = (Step("RESERVE", 0, nbytes), *steps, Step("RELEASE", 0, nbytes))
    return Program(
        script="bare",
        steps=whole,
        nbytes=nbytes,
        piece=nbytes,
        memory=nbytes,
        align=align,
        phase=0,
        huge=0,
        noreserve=False,
        advice=advice,
        threads=1,
    )


def system_call_ns() -> float:
    """Return the ns of a getppid: the current cost of entering the kernel."""
    step = Step("SYSTEM_CALL", 0, PAGE_SIZE, _UNNAMED, _CALLS)
    return min(run(_bare_program([step], PAGE_SIZE), 5)[0])[0]


def warm_up(nbytes: int, seconds: float, advice: tuple[str, ...]) -> list[Sample]:
    """Touch memory once and release it; return the sample of each `PIECE`.

    The hypervisor may have taken idle memory from a virtual machine, and supplying it again is many
    times as slow. Memory that cannot be touched within `seconds` is left cold.
    """
    trial = _TRIAL_PIECES * PIECE
    samples = _touch_once(min(nbytes, trial), advice)
    affordable = int(seconds * 1e9 / max(sum(ns for ns, _ in samples), 1.0) * len(samples)) * PIECE
    if nbytes <= trial or affordable <= trial:
        return samples
    return _touch_once(min(nbytes, affordable), advice)


def _touch_once(nbytes: int, advice: tuple[str, ...]) -> list[Sample]:
    nbytes = round_up(nbytes, PIECE)
    steps = [Step("ADVISE", 0, nbytes), Step("COMMIT", 0, nbytes)]
    steps += [Step("WRITE", offset, PIECE, _UNNAMED) for offset in range(0, nbytes, PIECE)]
    return run(_bare_program(steps, nbytes, align=PIECE, advice=advice), 1)[0]


def why_unavailable(program: Program, kind: PageKind) -> str | None:
    """Return why a touch in a program's mapping gets no page of this kind; None if it gets one."""
    length = program.nbytes + program.align
    address, resident = ffi.new("uintptr_t *"), ffi.new("size_t *")
    err = lib.vm_map(0, length, lib.VM_RESERVED, address)
    if err:
        return str(refusal("reserve", err, length).strerror)
    try:
        placed = address[0] + (program.phase - address[0]) % program.align
        err = lib.vm_advise(placed, program.nbytes, _advice(program.advice))
        err = err or lib.vm_protect(placed, kind.size, lib.VM_COMMITTED)
        if err:
            return str(refusal("commit", err, kind.size).strerror)
        ffi.cast("char *", placed)[0] = b"\1"
        lib.vm_resident(placed, kind.size, resident)
    finally:
        lib.vm_release(address[0], length)
    if resident[0] == kind.size:
        return None
    return f"a touch got {format_size(resident[0])}: no page of this size is free"


def answer(**fields: Any) -> None:
    """Send an answer to the parent."""
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class Pass:
    """One pass over a group's programs."""

    def __init__(self, job: Job) -> None:
        """Prepare a pass over the programs of a job."""
        self._job = job
        self._remaining = dict(job.programs)
        self._seconds = dict(job.seconds)
        self._warm: set[int] = set()

    def run(self) -> None:
        """Run the short programs in turns, then each long one once, the largest first.

        The memory of the long ones is warmed up directly before they run: the hypervisor would
        take it away again if it were idle.
        """
        self._warm_up(min(self._job.warm, _TRIAL_PIECES * PIECE))
        for _ in range(_SWEEPS):
            answer(system_call=system_call_ns())
            for number in list(self._remaining):
                if self._predict(number) < _LONG:
                    self._run_turn(number)
        long = [number for number in self._remaining if self._is_long(number)]
        long.sort(key=lambda number: -self._remaining[number].memory)
        if long:
            self._warm_up(self._remaining[long[0]].memory)
        for number in long:
            self._run_turn(number)

    def _is_long(self, number: int) -> bool:
        """Whether a program is long and the budget allows it; if not allowed, tell the parent."""
        seconds = self._predict(number)
        if seconds > self._job.share:
            why = (
                f"one round takes about {seconds:.2g} s, more than a 20th of the budget "
                f"({self._job.share:.2g} s)"
            )
            answer(skipped=number, why=why)
            return False
        return seconds >= _LONG

    def _warm_up(self, nbytes: int) -> None:
        try:
            answer(warm_up=warm_up(nbytes, self._job.warm_seconds, self._job.setting.advice))
        except Refused:
            return  # programs that need as much are refused too, and each reports it

    def _predict(self, number: int) -> float:
        """Predict the seconds of a round, from its last duration or from a shorter piece.

        The smaller of both: if the memory was cold, the last round took longer than the next will.
        """
        program, known = self._remaining[number], self._seconds.get(number)
        shorter = [
            (other.piece, self._seconds[n])
            for n, other in self._job.programs.items()
            if n in self._seconds and other.script == program.script and other.piece < program.piece
        ]
        if not shorter or not program.memory:
            return known or 0.0
        piece, seconds = max(shorter)
        scaled = seconds * program.piece / piece
        return scaled if known is None else min(known, scaled)

    def _run_turn(self, number: int) -> None:
        """Run a program for one turn, after a warm-up round, and send its samples."""
        program, seconds = self._remaining[number], self._predict(number)
        if time.monotonic() + seconds > self._job.deadline:
            return
        try:
            if number not in self._warm and seconds < _LONG:
                started = time.monotonic()
                run(program, 1)
                seconds = time.monotonic() - started
            self._warm.add(number)
            rounds = max(1, min(_MAX_ROUNDS, int(_SLICE / max(seconds, 1e-6))))
            started = time.monotonic()
            samples = run(program, rounds)
            self._seconds[number] = (time.monotonic() - started) / rounds
        except Refused as refused:
            self._drop_refused(number, refused)
            return
        order = self._job.programs[number].cells
        answer(
            program=number,
            seconds=self._seconds[number],
            cells=[order.index(cell) for cell in program.cells],
            samples=samples,
        )

    def _drop_refused(self, number: int, refused: Refused) -> None:
        """Drop the refused step and those bound to it, and run the rest of the program."""
        program = self._remaining[number]
        if refused.step == len(program.steps):
            self._give_up(number, _no_thread(refused.err))
            return
        step = program.steps[refused.step]
        verb = _VERBS.get(step.verb, step.verb.lower())
        pool = "the pool has too few huge pages" if program.huge and verb == "reserve" else None
        why = str(refusal(verb, refused.err, step.nbytes, why=pool).strerror)
        if step.bound is None:
            self._give_up(number, why)
            return
        end = refused.step + 1 + step.bound
        kept = replace(program, steps=program.steps[: refused.step] + program.steps[end:])
        dropped = [cell for cell in program.cells if cell not in kept.cells]
        self._give_up(number, why, dropped)
        self._remaining[number] = kept
        self._run_turn(number)

    def _give_up(self, number: int, why: str, cells: list[Cell] | None = None) -> None:
        """Remove a program, and report these of its cells as refused; None: all."""
        program = self._remaining.pop(number)
        order = self._job.programs[number].cells
        dropped = program.cells if cells is None else cells
        answer(program=number, refused=[order.index(cell) for cell in dropped], why=why)


def work(job: Job) -> None:
    """Do a job, and send its answers."""
    # Only the program of an untouched reservation has no alignment.
    aligned = next((program for program in job.programs.values() if program.align), None)
    if aligned is not None:
        why = why_unavailable(aligned, job.setting.kind)
        if why is not None:
            answer(unavailable=why)
            return
    if job.entries:
        answer(map_entries=map_entries())
    Pass(job).run()


def main() -> None:
    """Do the job on standard input; end if the parent ends."""
    job: Job = pickle.load(sys.stdin.buffer)
    if lib.sys_end_with_parent(job.parent):
        sys.exit(f"process {job.parent} is not the parent: a wrapper started Python, or it ended")
    work(job)
    answer(done=True)
