"""What bystanders cost, by `pyreserve.costs.measure_bystanders` and by an independent C program."""

import os
import subprocess
from pathlib import Path
from statistics import median

import pytest

from pyreserve.costs import measure_bystanders

HERE = Path(__file__).parent
RUNS = 5
SECONDS = float(os.environ.get("BYSTANDERS_SECONDS", "20"))  # of each program in each run

Found = dict[tuple[str, int, str], list[float]]
"""The figures of all runs by call, length in bytes and side: ``alone``, ``added`` or ``lost``."""


def _ours(found: Found) -> str:
    table = measure_bystanders(SECONDS)
    for row in table.calls:
        if row.work != "spin" or row.bystanders != 1 or row.page_kind != "4KiB":
            continue
        for side, figure in (("alone", row.alone), ("added", row.added), ("lost", row.lost)):
            if figure is not None and figure.known:
                found.setdefault((row.call, row.nbytes, side), []).append(figure.median)
    return f"{table.kept} of {table.windows} windows kept"


def _theirs(program: Path, cpus: list[int], found: Found) -> None:
    for pair in (cpus, cpus[::-1]):  # pyreserve exchanges the CPUs from run to run too
        half = str(SECONDS / 2)
        command: list[str | Path] = [program, *map(str, pair), half]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for line in text.splitlines():
            call, nbytes, *figures, pairs = line.split()
            for side, ns in zip(("alone", "added", "lost"), map(float, figures), strict=True):
                if int(pairs) >= 3:
                    found.setdefault((call, int(nbytes), side), []).append(ns)


def bench_against_c(tmp_path: Path, tables: dict[str, list[str]]) -> None:
    """Print both programs' figures, and how far they differ."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    if len(cpus) < 2:
        pytest.skip("bystanders need two CPUs")
    program = tmp_path / "c_bystanders"
    source = HERE / "c_bystanders.c"
    subprocess.run(["cc", "-std=c11", "-O2", "-pthread", "-o", program, source], check=True)
    ours: Found = {}
    theirs: Found = {}
    notes = []
    for number in range(RUNS):
        if number % 2:
            _theirs(program, cpus, theirs)
        notes.append(_ours(ours))
        if not number % 2:
            _theirs(program, cpus, theirs)
    lines = [f"{'':28}{'pyreserve':>12}{'C':>12}{'differs':>10}   figures of {RUNS} runs"]
    for key in theirs:
        call, nbytes, side = key
        label = f"{call} {nbytes // 4096:>3} {side}"
        in_c = median(theirs[key])
        if key not in ours:
            lines.append(f"{label:28}{'unknown':>12}{in_c:12,.0f}")
            continue
        ns = median(ours[key])
        count = f"{len(ours[key])} and {len(theirs[key])}"
        lines.append(f"{label:28}{ns:12,.0f}{in_c:12,.0f}{ns / in_c - 1:+10.1%}   {count}")
    tables["bystanders, ns: pyreserve and a C program [aim: within 10 %]"] = [*lines, *notes]
