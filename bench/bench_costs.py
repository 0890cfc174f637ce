"""The measurements of `pyreserve costs`, beside an independent C program and the cost model."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from pyreserve import GiB, KiB, MiB
from pyreserve.costs import Curve, measure, plan
from pyreserve.costs.planning import Group, Plan
from pyreserve.costs.programs import SCRIPTS, write

HERE = Path(__file__).parent
WHOLE, PIECE, SHORT, LONG = 136 * GiB, 64 * KiB, 2 * MiB, 32 * MiB
ROUNDS = {WHOLE: 2000, PIECE: 100, SHORT: 8, LONG: 2}
TURNS = 25
FIELDS = (
    ("reserve", "mmap"),
    ("touch", "write"),
    ("discard", "dontneed"),
    ("decommit", "mmap-fixed"),
    ("release", "untouched"),
)  # in the order of c_costs; for a piece the first is commit
BETWEEN = [n * KiB for n in (8, 48, 112, 192, 512)] + [n * MiB for n in (6, 10, 20, 28, 64)]

# Prints the same as c_costs, from pyreserve's own programs and timing.
OURS = f"""
import sys
from pyreserve.costs import plan
from pyreserve.costs.child import run

FIELDS = {FIELDS!r}
programs = {{}}
for group in plan(details=True).groups:
    for program in group.programs:
        small = str(program.setting) == "4KiB pages, charge"
        whole = program.script == "untouched" and program.piece > 2**30
        if whole or small and program.script == "life":
            programs[program.piece] = program
for line in sys.stdin:
    length, rounds = map(int, line.split())
    program = programs[length]
    taken = [[ns for ns, _ in values] for values in run(program, rounds)]
    samples = dict(zip(((c.verb, c.method) for c in program.cells), taken))
    samples.setdefault(FIELDS[0], samples.get(("commit", "mprotect")))
    none = [0.0] * max(map(len, taken))
    columns = [samples.get(field, none) for field in FIELDS]
    print(*(f"{{ns:.0f}}" for row in zip(*columns) for ns in row), flush=True)
"""


class Side:
    """A measuring process: it reads a turn and answers with samples."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def turn(self, length: int) -> list[float]:
        """Run a turn; return the median of each field, in ns."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{length} {ROUNDS[length]}\n")
        self._process.stdin.flush()
        values = [float(word) for word in self._process.stdout.readline().split()]
        return [median(values[field :: len(FIELDS)]) for field in range(len(FIELDS))]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def _quantities(turns_by_length: dict[int, list[list[float]]]) -> dict[str, float]:
    """Return the medians of the turns' medians by quantity, in ns."""
    medians = {
        length: [median(turn[field] for turn in turns) for field in range(len(FIELDS))]
        for length, turns in turns_by_length.items()
    }
    quantities = {
        "reserve and release 136 GiB": medians[WHOLE][0] + medians[WHOLE][4],
        "commit 64 KiB": medians[PIECE][0],
    }
    for field, verb in ((1, "touch"), (2, "discard"), (3, "decommit")):
        for length in (SHORT, LONG):
            pages = length // (4 * KiB)
            quantities[f"{verb} a page of {length // MiB} MiB"] = medians[length][field] / pages
    return quantities


def bench_against_c(tmp_path: Path, tables: dict[str, list[str]]) -> None:
    program = str(tmp_path / "c_costs")
    subprocess.run(["cc", "-std=c11", "-O2", "-o", program, HERE / "c_costs.c"], check=True)
    commands = [sys.executable, "-c", OURS], [program]
    turns: list[dict[int, list[list[float]]]] = [{}, {}]
    for turn in range(TURNS):
        # New processes each time: times depend on the addresses that a process happens to have.
        sides = [Side(command) for command in commands]
        for length in ROUNDS:
            for i in (0, 1) if turn % 2 else (1, 0):
                sides[i].turn(length)  # warm up
                turns[i].setdefault(length, []).append(sides[i].turn(length))
        for side in sides:
            side.close()
    ours, in_c = (_quantities(of_side) for of_side in turns)
    tables["measured by pyreserve costs and by a C program, ns [aim: within 5 %]"] = [
        f"{name:30} {ns:12,.1f}   C {in_c[name]:12,.1f}   {ns / in_c[name] - 1:+.1%}"
        for name, ns in ours.items()
    ]


def bench_estimates(tables: dict[str, list[str]]) -> None:
    groups, between = [], set[int]()
    for group in plan(details=True).groups[1:]:
        setting = group.programs[0].setting
        if setting.mode == "charge" and setting.threads == 1:
            more = tuple(write(setting, tuple(SCRIPTS), BETWEEN))
            # Keep the order of a plan: by length.
            programs = sorted(group.programs + more, key=lambda program: program.piece)
            groups.append(Group(tuple(programs)))
            between |= {program.piece for program in more}
    table = measure(Plan(tuple(groups)), budget=20)
    fitted = tuple(entry for entry in table.cells if entry.cell.nbytes not in between)
    model = replace(table, cells=fitted).model()
    worst: dict[Curve, tuple[float, str]] = {}
    for entry in table.measured():
        curve, nbytes, times = Curve.of(entry.cell), entry.cell.nbytes, entry.times
        if entry.host == "cold" or nbytes not in between or curve not in model.fits:
            continue
        assert times is not None
        error = float(model.of(curve).at(nbytes)) / times.median - 1
        text = f"{error:+7.1%} at {nbytes // KiB:,} KiB of {times.median:,.0f} ns"
        if curve not in worst or abs(error) > abs(worst[curve][0]):
            text += f" (interval {times.width:.0%} wide, {times.samples} samples)"
            worst[curve] = error, text
    rows = sorted(worst.items(), key=lambda item: -abs(item[1][0]))
    title = "estimates for lengths that were not fitted, the worst of each curve [aim: 25 %]"
    tables[title] = [
        f"{curve.verb + ' ' + curve.method:30} {curve.page_kind:6} {text}"
        for curve, (_, text) in rows
    ]
    if table.disturbed:
        tables[title].append(f"noise: {table.disturbed}")
