"""A table of costs as a file of pyperf, with its samples.

``python -m pyperf show``, ``stats``, ``hist`` and ``compare_to`` read it. The test of significance
in ``compare_to`` wants as many values in both files, and two at least; where it has not, it says
"ERROR when testing if values are significant" and calls the change significant. So a benchmark has
as many values as the largest of `COUNTS` that its samples allow: two runs of the same plan and
budget agree in nearly all. What remains are the few whose samples are just about one of `COUNTS`,
those too slow for three samples, and those whose values in both files are all the same.

The test takes samples to be independent, which those of a pass are not, so it finds more
differences than there are; `pyreserve.costs.compare` knows about passes.
"""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve._system.extras import import_extra
from pyreserve._system.output import write_bytes
from pyreserve.costs.cells import GROUPS, METHODS, MODES, Cell
from pyreserve.costs.table import CostTable, Measured
from pyreserve.units import GiB, KiB, MiB, TiB, parse_size

if TYPE_CHECKING:
    import pyperf

COUNTS = (60, 12, 3, 1)
"""How many values a benchmark may have."""

# What pyperf calls the facts that it knows too; runs that differ in them it keeps apart.
_NAMES = {
    "cpu": "cpu_model_name",
    "cpus": "cpu_count",
    "memory": "memory_bytes",
    "python": "python_version",
    "pyreserve": "pyreserve_version",
}
_VERBS = [verb for verbs in GROUPS.values() for verb in verbs]


def to_pyperf(table: CostTable) -> "pyperf.BenchmarkSuite":
    """Return a benchmark for each measured cell, with runs that are its passes.

    They are in order of verb, method, page kind, mode, threads and length, and have names such as
    ``commit/mprotect 64KiB [4KiB pages, charge]``, with the threads if they are several, and
    ``cold host`` where `Measured.host` says so. Values are in seconds, and as many as `COUNTS`
    says, evenly from all samples in the order measured: medians and means may differ a little from
    the table's. A sample that took no measurable time (taking off what reading the clock takes
    leaves nothing, or less) is left out, for pyperf has only times above zero; so is a benchmark of
    which nothing is left.

    Raises:
        ImportError: pyperf is missing (extra ``pyperf``).
        ValueError: there are no samples: nothing was measured that took any time, or the table was
            read from JSON.
    """
    pyperf = import_extra("pyperf", "pyperf", "to_pyperf")
    machine = _machine(table.machine)
    benchmarks = []
    for one in sorted(table.measured(), key=_place):
        if not any(one.passes):
            msg = (
                f"{name(one)}: there are no samples; pyperf needs every single one, and a table "
                "read from JSON has only what sums them up: measure anew"
            )
            raise ValueError(msg)
        metadata = machine | _facts(one)
        runs = [
            pyperf.Run([ns / 1e9 for ns in samples], metadata=metadata, collect_metadata=False)
            for samples in thin(one.passes)
        ]
        if runs:
            benchmarks.append(pyperf.Benchmark(runs))
    if not benchmarks:
        msg = "nothing was measured that took any time, and pyperf has no empty files"
        raise ValueError(msg)
    return pyperf.BenchmarkSuite(benchmarks)


def thin(passes: Sequence[Sequence[float]]) -> list[list[float]]:
    """Keep as many samples above zero as `COUNTS` says, evenly from all, pass by pass."""
    samples = [(i, ns) for i, one in enumerate(passes) for ns in one if ns > 0]
    n = len(samples)
    kept = next((count for count in COUNTS if count <= n), 0)
    found: dict[int, list[float]] = {}
    # The middles of as many equal parts: neither end weighs more.
    for k in range(kept):
        i, ns = samples[(2 * k + 1) * n // (2 * kept)]
        found.setdefault(i, []).append(ns)
    return list(found.values())


def write_pyperf(table: CostTable, path: Path) -> None:
    """Write a file for pyperf, whole or not at all; compressed if its name ends in ``.gz``.

    Raises:
        ImportError, ValueError: as `to_pyperf`.
        OSError: it can't be written.
    """
    text = io.StringIO()
    to_pyperf(table).dump(text)
    data = text.getvalue().encode()
    # pyperf takes every file of that name to be compressed.
    write_bytes(path, gzip.compress(data, mtime=0) if path.name.endswith(".gz") else data)


def name(one: Measured) -> str:
    """Return the name of a cell's benchmark."""
    cell = one.cell
    what = [f"{cell.page_kind} pages", cell.mode]
    if cell.threads != 1:
        what.append(f"{cell.threads} threads")
    if one.host != "warm":
        what.append(f"{one.host} host")
    return f"{cell.verb}/{cell.method} {_size(cell.nbytes)} [{', '.join(what)}]"


def _size(nbytes: int) -> str:
    """Write a length exactly: no two are written alike."""
    for unit, word in ((TiB, "TiB"), (GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if nbytes % unit == 0:
            return f"{nbytes // unit}{word}"
    return f"{nbytes}B"


def _place(one: Measured) -> tuple[Any, ...]:
    """Return what cells are put in order by."""
    cell: Cell = one.cell
    kind = parse_size(cell.page_kind.removeprefix("hugetlb-"))
    return (
        *_rank(_VERBS, cell.verb),
        *_rank(METHODS.get(cell.verb, ()), cell.method),
        (cell.page_kind.startswith("hugetlb-"), kind),
        *_rank(MODES, cell.mode),
        cell.threads,
        cell.nbytes,
        one.host != "warm",
    )


def _rank(known: Sequence[str], word: str) -> tuple[int, str]:
    return known.index(word) if word in known else len(known), word


def _facts(one: Measured) -> dict[str, Any]:
    cell = one.cell
    return {
        "name": name(one),
        "unit": "second",
        "verb": cell.verb,
        "method": cell.method,
        "page_kind": cell.page_kind,
        "mode": cell.mode,
        "nbytes": cell.nbytes,
        "threads": cell.threads,
        "host": one.host,
    }


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts of the machine that pyperf can hold: numbers, and text of one line."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        plain = " ".join(value.split()) if isinstance(value, str) else value
        if isinstance(plain, str | int | float) and plain != "":
            found[_NAMES.get(key, key)] = plain
    return found
