"""The fresh process in which a group's programs run: takes a job, gives a line for every result.

The job comes pickled on standard input. The answers are lines of JSON on standard output, so what
was measured is with the parent even if this process is killed the next moment.
"""

import contextlib
import errno
import json
import pickle
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from pyreserve._native import ffi, lib
from pyreserve._system import tasks
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve.costs.cells import SMALL, Cell, PageKind
from pyreserve.costs.entries import map_entries
from pyreserve.costs.programs import Program, Setting, Step
from pyreserve.costs.stats import Sample
from pyreserve.units import MiB, format_size, round_up

PIECE = 2 * MiB
"""Memory is warmed up in pieces of so many bytes, each timed."""

_SWEEPS = 3  # times that the programs take turns
_SLICE = 0.005  # seconds that a program runs in one turn, if one round takes less
_MOST_ROUNDS = 60
_LONG = 0.1  # seconds; what takes longer runs once a pass, and no round goes to warming up
_TRIED = 32  # pieces touched to see how fast that goes
_CALLS = 1000

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
    """What one child is to do.

    Attributes:
        parent: pid of the parent, without which nothing is done.
        deadline: time.monotonic() at which to stop, in seconds.
        share: seconds that one round of a program may take at most.
        setting: what its programs have in common.
        warm: bytes to touch at first,
        warm_seconds: in so many seconds, or less memory.
        entries: whether to count map entries too.
        programs: what to run, by number.
        seconds: what a round of each has taken, as far as known.
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
    why = f"a thread was refused ({errno.errorcode.get(err, err)})"
    with contextlib.suppress(OSError):
        limit = tasks.refusing_limit()
        why += f": {limit[1]}" if limit else ""
    return why


class Refused(Exception):  # noqa: N818
    """The kernel refused step number `step` of a program with `err`."""

    def __init__(self, err: int, step: int) -> None:
        super().__init__(err, step)
        self.err, self.step = err, step


def run(program: Program, rounds: int) -> list[list[Sample]]:
    """Run a program in C; return the samples of each of its `cells`.

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
    made = ffi.new("struct timing_program *")
    made.steps, made.nsteps, made.nslots = steps, len(program.steps), len(timed)
    made.length, made.align, made.phase = program.nbytes, program.align, program.phase
    made.huge, made.access, made.advice = program.huge, program.access, program.advice
    each = rounds * program.threads
    n = len(timed) * each
    samples, preempted = ffi.new("double[]", n or 1), ffi.new("unsigned char[]", n or 1)
    done, failed = ffi.new("size_t *"), ffi.new("size_t *")
    err = lib.timing_run(made, program.threads, rounds, samples, preempted, done, failed)
    if err:
        raise Refused(err, int(failed[0]))
    found: dict[Cell, list[Sample]] = {cell: [] for cell in program.cells}
    for i in range(n):
        found[timed[i // each]].append((round(samples[i], 2), bool(preempted[i])))
    return list(found.values())


_NAMELESS = Cell("", "", SMALL, "charge", PAGE_SIZE)


def _bare(steps: list[Step], nbytes: int, *, align: int = 0, advice: int = 0) -> Program:
    whole = [Step("RESERVE", 0, nbytes), *steps, Step("RELEASE", 0, nbytes)]
    return Program("bare", tuple(whole), nbytes, nbytes, nbytes, align, 0, 0, 0, advice, 1)


def system_call_ns() -> float:
    """Time a getppid: what entering the kernel costs just now, in ns."""
    step = Step("SYSTEM_CALL", 0, PAGE_SIZE, _NAMELESS, _CALLS)
    return min(run(_bare([step], PAGE_SIZE), 5)[0])[0]


def warm_up(nbytes: int, seconds: float, advice: int) -> list[Sample]:
    """Touch so much memory once and give it back; return what each `PIECE` of it took.

    The host of a virtual machine may have taken it away while it was idle, and bringing it again
    is many times as slow: what can't be brought in the time given is left.
    """
    few = _TRIED * PIECE
    tried = _touch_once(min(nbytes, few), advice)
    most = int(seconds * 1e9 / max(sum(ns for ns, _ in tried), 1.0) * len(tried)) * PIECE
    if nbytes <= few or most <= few:
        return tried
    return _touch_once(min(nbytes, most), advice)


def _touch_once(nbytes: int, advice: int) -> list[Sample]:
    nbytes = round_up(nbytes, PIECE)
    steps = [Step("ADVISE", 0, nbytes), Step("COMMIT", 0, nbytes)]
    steps += [Step("WRITE", at, PIECE, _NAMELESS) for at in range(0, nbytes, PIECE)]
    return run(_bare(steps, nbytes, align=PIECE, advice=advice), 1)[0]


def why_not_given(program: Program, kind: PageKind) -> str | None:
    """Say why a touch does not give a page of this kind in a program's mapping, if it doesn't."""
    room = program.nbytes + program.align
    address, resident = ffi.new("uintptr_t *"), ffi.new("size_t *")
    err = lib.vm_map(0, room, lib.VM_RESERVED, address)
    if err:
        return str(refusal("reserve", err, room).strerror)
    try:
        at = address[0] + (program.phase - address[0]) % program.align
        err = lib.vm_advise(at, program.nbytes, program.advice)
        err = err or lib.vm_protect(at, kind.size, lib.VM_COMMITTED)
        if err:
            return str(refusal("commit", err, kind.size).strerror)
        ffi.cast("char *", at)[0] = b"\1"
        lib.vm_resident(at, kind.size, resident)
    finally:
        lib.vm_release(address[0], room)
    if resident[0] == kind.size:
        return None
    return f"the kernel gave {format_size(resident[0])} at a touch: no page of this size is free"


def answer(**found: Any) -> None:
    """Send a line to the parent."""
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


class Pass:
    """One pass over a group's programs."""

    def __init__(self, job: Job) -> None:
        """Take what is to be done."""
        self._job = job
        self._left = dict(job.programs)
        self._seconds = dict(job.seconds)
        self._warm: set[int] = set()

    def run(self) -> None:
        """Let the short programs take turns; then the long ones, each once, the largest first.

        What a long one touches would be taken away again if it were idle for long, so its memory is
        warmed up right before.
        """
        self._warm_up(min(self._job.warm, _TRIED * PIECE))
        for _ in range(_SWEEPS):
            answer(system_call=system_call_ns())
            for number in list(self._left):
                if self._predict(number) < _LONG:
                    self._turn(number)
        long = [number for number in self._left if self._is_long(number)]
        long.sort(key=lambda number: -self._left[number].memory)
        if long:
            self._warm_up(self._left[long[0]].memory)
        for number in long:
            self._turn(number)

    def _is_long(self, number: int) -> bool:
        """Whether it is long, and short enough for the budget; tell the parent if it is not."""
        seconds = self._predict(number)
        if seconds > self._job.share:
            why = (
                f"one round would take {seconds:.2g} s, and the budget leaves "
                f"{self._job.share:.2g} s, a 20th, for one"
            )
            answer(skipped=number, why=why)
            return False
        return seconds >= _LONG

    def _warm_up(self, nbytes: int) -> None:
        try:
            answer(warm_up=warm_up(nbytes, self._job.warm_seconds, self._job.setting.advice))
        except Refused:
            return  # the programs that need as much will be refused too, and say so one by one

    def _predict(self, number: int) -> float:
        """Say how many seconds a round will take: as it did, or as a shorter piece lets expect.

        The less of both: where the host had to bring the memory, it took longer than it will.
        """
        program, known = self._left[number], self._seconds.get(number)
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

    def _turn(self, number: int) -> None:
        program, seconds = self._left[number], self._predict(number)
        if time.monotonic() + seconds > self._job.deadline:
            return
        try:
            if number not in self._warm and seconds < _LONG:
                begun = time.monotonic()
                run(program, 1)
                seconds = time.monotonic() - begun
            self._warm.add(number)
            rounds = max(1, min(_MOST_ROUNDS, int(_SLICE / max(seconds, 1e-6))))
            begun = time.monotonic()
            samples = run(program, rounds)
            self._seconds[number] = (time.monotonic() - begun) / rounds
        except Refused as refused:
            self._refused(number, refused)
            return
        order = self._job.programs[number].cells
        answer(
            program=number,
            seconds=self._seconds[number],
            cells=[order.index(cell) for cell in program.cells],
            samples=samples,
        )

    def _refused(self, number: int, refused: Refused) -> None:
        """Drop what can't be done; the other steps have their turn the next time."""
        program = self._left[number]
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
        gone = [cell for cell in program.cells if cell not in kept.cells]
        self._give_up(number, why, gone)
        self._left[number] = kept
        self._turn(number)

    def _give_up(self, number: int, why: str, cells: list[Cell] | None = None) -> None:
        program = self._left.pop(number)
        order = self._job.programs[number].cells
        gone = program.cells if cells is None else cells
        answer(program=number, refused=[order.index(cell) for cell in gone], why=why)


def work(job: Job) -> None:
    """Do a job."""
    # All but a bare reservation are placed where pages of the kind fit.
    placed = next((program for program in job.programs.values() if program.align), None)
    if placed is not None:
        why = why_not_given(placed, job.setting.kind)
        if why is not None:
            answer(unavailable=why)
            return
    if job.entries:
        answer(map_entries=map_entries())
    Pass(job).run()


def main() -> None:
    """Do the job on standard input, for as long as the parent lives."""
    job: Job = pickle.load(sys.stdin.buffer)
    if lib.sys_end_with_parent(job.parent):
        sys.exit(f"process {job.parent}, whose job it is, has not started it itself, or has ended")
    work(job)
    answer(done=True)
