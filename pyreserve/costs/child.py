"""The measuring process: runs the programs of a group.

It reads a pickled job from standard input and writes each answer as a line of JSON to standard
output, so no finished measurement is lost if the process is killed.
"""

import errno
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pyreserve._native import ffi, lib
from pyreserve._system.limits import PAGE_SIZE, refusal, refusing_limit
from pyreserve.costs.cells import SMALL, Cell, PageKind
from pyreserve.costs.map_entries import map_entries
from pyreserve.costs.programs import Program, Setting, Step
from pyreserve.costs.stats import Sample
from pyreserve.units import MiB, round_up

_SWEEPS = 3  # turns that each short program gets in a pass
_SLICE = 0.005  # seconds of a turn
_MIN_ROUNDS, _MAX_ROUNDS = 2, 60  # in a turn
_LONG = 0.1  # seconds; a longer round runs once a pass, without a warm-up round
_TRIAL = 64 * MiB  # bytes touched to measure how fast warming up is
_TRIES = 16  # pages of a transparent kind that are tried in each pass
_CALLS = 1000  # getppid calls in one sample

_VERBS = {
    "COMMIT_MAP": "commit",
    "UNCOMMIT": "decommit",
    "DISCARD_OFF": "decommit",
    "HUGE_PREFER": "advise",
    "DISCARD_LAZY": "lazy discard",
    "UNMAP": "release",
    "MAP": "reserve",
    "REAP": "fork",
}


@dataclass(frozen=True, slots=True)
class Job:
    """The work of one child process.

    Attributes:
        parent: PID of the parent; the child ends with it.
        deadline: time.monotonic() at which to stop, in seconds.
        sweep_until: time.monotonic() from which on programs get no further turn.
        warm: bytes of memory to warm up.
        warm_seconds: limit of one warm-up, in seconds; what does not fit stays cold.
        entries: whether to count map entries too.
        programs: the programs to run, by number, the most important first.
        seconds: duration of a round in earlier passes, by number.
    """

    parent: int
    deadline: float
    sweep_until: float
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
    native.advice = _advice(program.advice)
    native.access = lib.VM_NORESERVE if program.setting.mode == "noreserve" else 0
    threads = program.setting.threads
    per_slot = rounds * threads
    n = len(timed) * per_slot
    samples, preempted = ffi.new("double[]", n or 1), ffi.new("unsigned char[]", n or 1)
    done, failed = ffi.new("size_t *"), ffi.new("size_t *")
    err = lib.timing_run(native, threads, rounds, samples, preempted, done, failed)
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
_BARE = Setting(PageKind(SMALL, PAGE_SIZE, "small"), "charge", 1)


def _bare_program(
    steps: list[Step], nbytes: int, *, align: int = 0, advice: tuple[str, ...] = ()
) -> Program:
    whole = (Step("RESERVE", 0, nbytes), *steps, Step("RELEASE", 0, nbytes))
    return Program(
        script="bare",
        setting=_BARE,
        steps=whole,
        nbytes=nbytes,
        piece=nbytes,
        memory=nbytes,
        align=align,
        phase=0,
        advice=advice,
    )


def system_call_ns() -> float:
    """Return the ns of a getppid: the current cost of entering the kernel."""
    step = Step("SYSTEM_CALL", 0, PAGE_SIZE, _UNNAMED, _CALLS)
    return min(run(_bare_program([step], PAGE_SIZE), 5)[0])[0]


def warm_up(nbytes: int, seconds: float, advice: tuple[str, ...]) -> None:
    """Touch memory once and release it.

    The hypervisor may have taken idle memory from a virtual machine, and supplying it again is many
    times as slow. Memory that cannot be touched within `seconds` is left cold.

    Raises:
        Refused: the kernel refused the memory.
    """
    trial = min(nbytes, _TRIAL)
    ns = _touch_once(trial, advice)
    affordable = int(seconds * 1e9 / max(ns, 1.0) * trial)
    if trial < min(nbytes, affordable):
        _touch_once(min(nbytes, affordable), advice)


def _touch_once(nbytes: int, advice: tuple[str, ...]) -> float:
    """Touch memory for the first time; return the ns."""
    nbytes = round_up(max(nbytes, 1), 2 * MiB)
    steps = [Step("ADVISE", 0, nbytes)] if advice else []
    steps += [Step("COMMIT", 0, nbytes), Step("WRITE", 0, nbytes, _UNNAMED)]
    return run(_bare_program(steps, nbytes, align=2 * MiB, advice=advice), 1)[0][0][0]


def pages_of_kind(setting: Setting) -> tuple[int, int]:
    """Return how many pages of a transparent kind were tried, and how many a touch really got.

    Raises:
        OSError: the kernel refused the memory.
    """
    size, tries = setting.kind.size, 1 if setting.kind.next_size else _TRIES
    program = setting.program("trial", [Step("COMMIT", 0, tries * size)], size, memory=0)
    length = program.nbytes + program.align
    address, resident, got = ffi.new("uintptr_t *"), ffi.new("size_t *"), 0
    err = lib.vm_map(0, length, lib.VM_RESERVED, address)
    if err:
        raise refusal("reserve", err, length)
    try:
        placed = address[0] + (program.phase - address[0]) % program.align
        err = lib.vm_advise(placed, program.nbytes, _advice(program.advice))
        err = err or lib.vm_protect(placed, tries * size, lib.VM_COMMITTED)
        if err:
            raise refusal("commit", err, tries * size)
        for at in range(placed, placed + tries * size, size):
            ffi.cast("char *", at)[0] = b"\1"
            got += lib.vm_resident(at, size, resident) == 0 and resident[0] == size
    finally:
        lib.vm_release(address[0], length)
    return tries, got


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
        self._setting = next(iter(job.programs.values())).setting

    def run(self) -> None:
        """Run the short programs in turns, then each long one once.

        The memory of the long ones is warmed up directly before they run: the hypervisor would
        take it away again if it were idle.
        """
        self._try_kinds()
        self._warm_up(min(self._job.warm, _TRIAL))
        for sweep in range(_SWEEPS):
            if sweep and time.monotonic() > self._job.sweep_until:
                break
            answer(system_call=system_call_ns())
            for number in list(self._remaining):
                if self._predict(number) < _LONG:
                    self._run_turn(number)
        long = [number for number in self._remaining if self._predict(number) >= _LONG]
        if long:
            self._warm_up(max(self._remaining[number].memory for number in long))
        for number in long:
            self._run_turn(number)

    def _try_kinds(self) -> None:
        """Drop the programs of page kinds that the kernel cannot supply now."""
        for setting in dict.fromkeys(program.setting for program in self._remaining.values()):
            if setting.kind.sort != "transparent":
                continue
            try:
                tried, got = pages_of_kind(setting)
                why = f"none of {tried} pieces got a page of this size: none is free"
                answer(kind=setting.kind.name, tried=tried, got=got)
            except OSError as error:
                got, why = 0, str(error.strerror)
            if not got:
                for number, program in list(self._remaining.items()):
                    if program.setting.kind == setting.kind:
                        self._give_up(number, why)

    def _warm_up(self, nbytes: int) -> None:
        # Programs that need as much are refused too, and each reports it.
        with suppress(Refused):
            warm_up(nbytes, self._job.warm_seconds, self._setting.advice)

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
            least = 1 if seconds >= _LONG else _MIN_ROUNDS
            rounds = max(least, min(_MAX_ROUNDS, int(_SLICE / max(seconds, 1e-6))))
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
        why = str(refusal(verb, refused.err, step.nbytes).strerror)
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
    if job.entries:
        answer(map_entries=map_entries())
    Pass(job).run()


def serve(work: Callable[[Any], object]) -> None:
    """Do the job on standard input, whose attribute `parent` is a PID; end if the parent ends."""
    job = pickle.load(sys.stdin.buffer)
    if lib.sys_end_with_parent(job.parent):
        sys.exit(f"process {job.parent} is not the parent: a wrapper started Python, or it ended")
    work(job)
    answer(done=True)


def main() -> None:
    """Do a `Job`."""
    serve(work)
