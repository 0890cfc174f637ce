"""What `pyreserve.costs.faults` says of programs, beside what huge pages really saved.

    python bench/faults.py [ROUNDS]

Each program runs in processes of its own, as it is and with huge pages switched on, in turns. Times
are CPU time, of the fastest run: other load only adds to it. "said" is the median of what the runs
as they are estimated, "saved" the difference of the times. An estimate is right within 20 % or 2 %
of the run time.
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from pyreserve import PAGE_SIZE, MiB, costs, reserve
from pyreserve.costs import faultmodel

LENGTH, TURNS, BUDGET = 64 * MiB, 24, 10.0


def touch_again(huge: bool) -> None:
    """Reserve, touch and release 64 MiB again and again."""
    _touch_again("prefer" if huge else "never")


def touch_huge(huge: bool) -> None:
    """The same in huge pages from the beginning: nothing is left to save."""
    _touch_again("prefer")


def _touch_again(huge_pages: Any) -> None:
    ones = b"\1" * (LENGTH // PAGE_SIZE)
    for _ in range(TURNS):
        with reserve(LENGTH, huge_pages=huge_pages) as region:
            region.commit(0, LENGTH)
            with region.view(0, LENGTH) as view:
                view[::PAGE_SIZE] = ones


def compute(huge: bool) -> None:
    """Compute in a loop: hardly any faults."""
    total = 0
    for i in range(8_000_000):
        total += i * i % 7


def discard_again(huge: bool) -> None:
    """Touch 32 MiB of one region, discard it, and again."""
    ones = b"\1" * (LENGTH // 2 // PAGE_SIZE)
    with reserve(LENGTH, huge_pages="prefer" if huge else "never") as region:
        region.commit(0, LENGTH)
        for _ in range(2 * TURNS):
            with region.view(0, LENGTH // 2) as view:
                view[::PAGE_SIZE] = ones
            region.discard(0, LENGTH // 2)


def numpy_churn(huge: bool) -> None:
    """Arithmetic on arrays of 64 MB, whose temporary results come and go."""
    a = np.ones(8_000_000)
    for _ in range(8):
        a = (a * 2 + 1) / 3


def sparse(huge: bool) -> None:
    """Touch one page of each 256 KiB: huge pages would cost more than they save."""
    for _ in range(TURNS):
        with reserve(LENGTH, huge_pages="prefer" if huge else "never") as region:
            region.commit(0, LENGTH)
            with region.view(0, LENGTH) as view:
                view[:: 64 * PAGE_SIZE] = b"\1" * (LENGTH // 64 // PAGE_SIZE)


def big_dict(huge: bool) -> None:
    """Fill a dict of two million integers."""
    _ = {i: i + 1000 for i in range(2_000_000)}


def read_file(huge: bool) -> None:
    """Read a file of 64 MiB through mmap."""
    with tempfile.TemporaryFile() as file:
        file.write(bytes(LENGTH))
        file.flush()
        with costs_of() as f:
            for _ in range(TURNS):
                with mmap.mmap(file.fileno(), LENGTH, access=mmap.ACCESS_READ) as mapped:
                    mapped[::PAGE_SIZE]
        report(f)


PROGRAMS: dict[str, Callable[[bool], None]] = {
    "fault-bound": touch_again,
    "huge-page-bound": touch_huge,
    "compute-bound": compute,
    "one region, discarded": discard_again,
    "numpy churn": numpy_churn,
    "sparse": sparse,
    "big dict": big_dict,
    "file through mmap": read_file,
}


def costs_of() -> costs.faults:
    """Return a new measurement, which uses the prices that the parent measured."""
    return costs.faults(os.environ["PRICES"])


def report(f: costs.faults) -> None:
    """Print the facts and the estimates of a block, as JSON."""
    facts = {"seconds": f.user + f.system, "text": str(f).split("\n")[0], **f.to_dict()}
    print(json.dumps(facts))


def child(name: str, huge: bool) -> None:
    """Run a program once without being watched, then once more."""
    program = PROGRAMS[name]
    if program is read_file:
        read_file(huge)
        return
    program(huge)  # the host supplies the memory, and the kernel compacts it for huge pages
    with costs_of() as f:
        program(huge)
    report(f)


def run(name: str, huge: bool) -> dict[str, Any]:
    """Run a program in a process of its own."""
    tunables = "glibc.malloc.hugetlb=1" if huge else ""
    environment = {"NUMPY_MADVISE_HUGEPAGE": "1" if huge else "0", "GLIBC_TUNABLES": tunables}
    result = subprocess.run(
        [sys.executable, __file__, name, "huge" if huge else "as it is"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    facts: dict[str, Any] = json.loads(result.stdout)
    return facts


def main() -> None:
    """Measure the prices of this machine in ten seconds or more, then print a Markdown table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    with tempfile.TemporaryDirectory() as folder:
        os.environ["PRICES"] = f"{folder}/prices.json"
        Path(os.environ["PRICES"]).write_text(prices().to_json())
        table(rounds)


def prices() -> costs.CostTable:
    """Measure the prices, again if the machine was too busy for narrow intervals."""
    for extra in range(6):
        measured = faultmodel.measured(budget=BUDGET + extra / 10)
        times = [e.times for e in measured.measured() if e.cell.verb == "touch"]
        if all(t is None or t.width < 0.4 for t in times):
            break
    return measured


def table(rounds: int) -> None:
    """Print a row for each program."""
    print("| program | CPU time | of it faults, said | huge pages save, said | saved | right |")
    print("|---|---|---|---|---|---|")
    for name in PROGRAMS:
        runs = [(run(name, False), run(name, True)) for _ in range(rounds)]
        plain = min(a["seconds"] for a, _ in runs)
        saved = plain - min(b["seconds"] for _, b in runs)
        said = [a["saving"]["seconds"] for a, _ in runs]
        estimate = None if None in said else median(said)
        spent = [a["cost"]["seconds"] for a, _ in runs]
        shown = "unknown" if None in spent else f"{median(spent):.3f} s"
        off = abs((estimate or 0) - max(saved, 0))
        right = "yes" if off <= max(0.2 * abs(saved), 0.02 * plain) else "no"
        said_text = "unknown" if estimate is None else f"{estimate:.3f} s"
        print(
            f"| {name} | {plain:.2f} s | {shown} | {said_text} | {saved:.3f} s | "
            f"{'said nothing' if estimate is None else right} |",
            flush=True,
        )
        print(f"<!-- {runs[-1][0]['text']} {runs[-1][0]['saving']['why'] or ''} -->", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        child(sys.argv[1], sys.argv[2] == "huge")
    else:
        main()
