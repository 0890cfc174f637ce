"""A table of costs as a file of pyperf, with its samples.

``python -m pyperf show``, ``stats``, ``hist`` and ``compare_to`` read it. The test of significance
in ``compare_to`` takes only samples of equal number, which those of two runs here seldom are (it
says so with ``--verbose``, and calls every change significant): whether a change is more than noise
is what `pyreserve.costs.compare` says.
"""

import gzip
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve.costs.cells import GROUPS, METHODS, MODES, Cell
from pyreserve.costs.files import write_bytes
from pyreserve.costs.table import CostTable, Measured
from pyreserve.units import GiB, KiB, MiB, TiB, parse_size

if TYPE_CHECKING:
    import pyperf

MOST_VALUES = 100
"""How many samples of a pass are written at most."""

_LEAST_NS = 1e-3
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
    """Return a benchmark for each measured cell, with a run for each of its passes.

    They are in order of verb, method, page kind, mode, threads and length, and have names such as
    ``commit/mprotect 64KiB [4KiB pages, charge]``, with the threads if they are several, and
    ``cold host`` where `Measured.host` says so. Values are in seconds. A pass of more than
    `MOST_VALUES` samples is thinned evenly, in the order measured, so medians and means may differ
    a little from the table's. A sample that took no measurable time (taking off what reading the
    clock takes leaves nothing, or less) becomes 1 ps, for pyperf has only times above zero.

    Raises:
        ImportError: pyperf is missing (extra ``pyperf``).
        ValueError: there are no samples: nothing was measured, or the table was read from JSON.
    """
    try:
        import pyperf  # noqa: PLC0415  # only where needed: it is an extra
    except ImportError as missing:
        msg = "to_pyperf needs pyperf: pip install 'pyreserve[pyperf]'"
        raise ImportError(msg) from missing
    measured = sorted(table.measured(), key=_place)
    if not measured:
        msg = "nothing was measured, and pyperf has no empty files"
        raise ValueError(msg)
    machine = _machine(table.machine)
    benchmarks = []
    for one in measured:
        passes = [samples for samples in one.passes if samples]
        if not passes:
            msg = (
                f"{name(one)}: there are no samples; pyperf needs every single one, and a table "
                "read from JSON has only what sums them up: measure anew"
            )
            raise ValueError(msg)
        metadata = machine | _facts(one)
        benchmarks.append(
            pyperf.Benchmark(
                [
                    pyperf.Run(_seconds(samples), metadata=metadata, collect_metadata=False)
                    for samples in passes
                ]
            )
        )
    return pyperf.BenchmarkSuite(benchmarks)


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


def _seconds(samples: Sequence[float]) -> list[float]:
    """Thin the samples of a pass and turn nanoseconds into seconds."""
    n, kept = len(samples), min(len(samples), MOST_VALUES)
    # The middles of as many equal parts: neither end of the pass weighs more.
    thinned = (samples[(2 * i + 1) * n // (2 * kept)] for i in range(kept))
    return [max(ns, _LEAST_NS) / 1e9 for ns in thinned]


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
