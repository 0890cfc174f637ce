"""Run `pyreserve costs` beside busy loops; search all texts, and compare the verdicts.

    python bench/costs_under_load.py [--runs N] [--loops 0,1,2,4] [--budget S] [--keep FOLDER]

The first runs, without loops, give the quiet verdicts. A later verdict is right if it is the quiet
one, a method that the quiet one calls as good, or says that the run can't tell. A run fails if a
verdict is wrong or its text has a negative or infinite figure, or a share above 100 %.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NONSENSE = re.compile(
    r"nan|\binf|(?<![\w)])-\d|e[+-]\d|(?:[1-9]\d{3,}|1[1-9]\d|10[1-9]|[2-9]\d\d)(?:\.\d+)? ?%"
)


@contextmanager
def busy(loops: int) -> Iterator[None]:
    """Keep CPUs busy."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in range(loops)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def run(path: Path, budget: str) -> dict[str, Any]:
    """Measure once; write the text beside the JSON, and return the verdicts."""
    command = [sys.executable, "-m", "pyreserve", "costs", "--budget", budget, "--json"]
    subprocess.run([*command, "--output", path], stderr=subprocess.DEVNULL, check=True)
    # The screen of the same run: the command with its results in place of a measurement.
    shown = (
        "import sys, pyreserve.costs as costs; from pyreserve.cli import main; "
        "table = costs.CostTable.load(sys.argv.pop()); costs.measure = lambda *_, **__: table; "
        "main()"
    )
    for columns in ("80", "120"):
        text = subprocess.run(
            [sys.executable, "-c", shown, "costs", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "COLUMNS": columns},
            check=True,
        ).stdout
        path.with_suffix(f".{columns}.txt").write_text(text, encoding="utf-8")
    verdicts: dict[str, Any] = json.loads(path.read_text())["verdicts"]
    return verdicts


def problems(path: Path) -> list[str]:
    """Return what is wrong with the texts of a run."""
    found = []
    for columns in (80, 120):
        lines = path.with_suffix(f".{columns}.txt").read_text(encoding="utf-8").splitlines()
        found += [f"{columns}: {line}" for line in lines if NONSENSE.search(line)]
        found += [f"{columns}: {len(lines)} lines"] * (len(lines) > 50)
        found += [f"{columns}: too wide: {line}" for line in lines if len(line) > columns]
    return found


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=10, help="with each number of loops")
    parser.add_argument("--loops", default="0,1,2,4")
    parser.add_argument("--budget", default="30")
    parser.add_argument("--keep", type=Path, default=Path("costs-under-load"))
    options = parser.parse_args()
    options.keep.mkdir(exist_ok=True)
    quiet: dict[str, Counter[Any]] = {}
    good: dict[str, set[Any]] = {}
    failed = 0
    for loops in map(int, options.loops.split(",")):
        for number in range(options.runs):
            path = options.keep / f"{loops}-loops-{number}.json"
            with busy(loops):
                verdicts = run(path, options.budget)
            wrong = problems(path)
            unsure = [name for name, verdict in verdicts.items() if not verdict["sure"]]
            for name, verdict in verdicts.items():
                value = verdict["value"]
                if not quiet.get(name) or loops == 0:
                    quiet.setdefault(name, Counter())[value] += 1
                    others = re.search(r"\(as good: ([^)]*(?:\([^)]*\))?)\)", verdict["text"])
                    good.setdefault(name, set()).update(others[1].split(", ") if others else ())
                elif value is not None and value not in good[name] | set(quiet[name]):
                    wrong.append(f"{name}: {value}, quiet {quiet[name].most_common(1)[0][0]}")
            failed += bool(wrong)
            print(f"{loops} loops, run {number}: {len(verdicts) - len(unsure)} sure", end="; ")
            print(f"can't tell: {', '.join(unsure)}", *wrong, sep="\n  ", flush=True)
    differing = {name: dict(seen) for name, seen in quiet.items() if len(seen) > 1}
    print(f"{failed} runs failed; quiet verdicts that differ: {differing}")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
