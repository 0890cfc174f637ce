"""Check the verdicts of `pyreserve costs` on giving memory back, by a C program that plays them.

    python bench/giveback.py [--budget SECONDS] [--runs N] [--wrong QUESTION=WAY]

A verdict passes if the recommended way is the fastest of the situation's candidates in the C
program, or within 10 % of the fastest. ``--wrong used-again-at-once=MAP_FIXED`` puts a wrong
recommendation in place of a verdict: the check must then fail. Ends with status 1 if any failed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

NEAR = 1.10
ALL_NOW = ("MADV_DONTNEED", "MADV_DONTNEED + mprotect", "munmap", "MAP_FIXED")
# The probability of use and the candidates, from docs/reference/give-back.md; not from the package.
SITUATIONS = {
    "used-again-at-once": ("1", ("MADV_FREE", *ALL_NOW)),
    "may-be-used-again": ("0.5", ALL_NOW),
    "not-used-again": ("0", ("munmap", "MAP_FIXED")),
}
KINDS = {"": ("16", "small", "4000"), "-huge": ("512", "huge", "1000")}


def play(
    program: str, again: str, kind: tuple[str, str, str], ways: tuple[str, ...]
) -> dict[str, float]:
    """Return the median ns of each way in the C program."""
    pages, sort, rounds = kind
    command = [program, pages, sort, again, rounds, *ways]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    rows = (line.rpartition(" ") for line in lines)
    return {name: float(ns) for name, _, ns in rows}


def check(program: str, budget: str, wrong: dict[str, str]) -> bool:
    """Measure and check all verdicts once; print a line for each."""
    command = [sys.executable, "-m", "pyreserve", "costs", "--json", "--budget", budget]
    output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    verdicts = json.loads(output.stdout)["verdicts"]
    passed = True
    for suffix, kind in KINDS.items():
        for name, (again, candidates) in SITUATIONS.items():
            verdict = verdicts.get(name + suffix)
            if verdict is None:  # no huge pages on this machine
                continue
            way = wrong.get(name + suffix, verdict["value"])
            times = play(program, again, kind, candidates)
            fastest = min(times, key=lambda other: times[other])
            over = times.get(way, float("inf")) / times[fastest]
            good = over <= NEAR
            passed = passed and good
            print(
                f"{'passed' if good else 'FAILED'}  {name + suffix:24} {way}: "
                f"{over:.2f} times {fastest} ({times[fastest]:,.0f} ns)",
                flush=True,
            )
    return passed


def main() -> None:
    """Run the checks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="30")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--wrong", action="append", default=[], metavar="QUESTION=WAY")
    options = parser.parse_args()
    wrong = dict(pair.split("=", 1) for pair in options.wrong)
    source = Path(__file__).with_name("c_giveback.c")
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/c_giveback"
        subprocess.run(["cc", "-std=c11", "-O2", "-o", program, source], check=True)
        results = [check(program, options.budget, wrong) for _ in range(options.runs)]
    print(f"{sum(results)} of {len(results)} runs passed")
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
