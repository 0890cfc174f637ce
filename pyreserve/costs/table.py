"""The table of measured costs, its JSON and its CSV. All reports are rendered from it."""

import csv
import io
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pyreserve._system.cached import lazily
from pyreserve.costs.cells import Cell, Curve
from pyreserve.costs.model import CostModel
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.stats import Times

_T = TypeVar("_T")

SCHEMA = 1

_FIGURES = ("min", "median", "p90", "p99", "max")  # attributes of Times, in ns

# Limits of numbers in the JSON (1e19 ns are three centuries), and of a system call's ns.
_MAX, _MIN_CALL = 1e19, 0.01


# Exceptions raised while parsing JSON of another shape.
_BAD_SHAPE = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError)


class _OtherSchemaError(ValueError):
    """A cost table of another schema."""


@dataclass(frozen=True)
class CostTable:
    """The costs of the verbs on one machine.

    Attributes:
        machine: facts of the machine; see `pyreserve._system.machine.facts`.
        cells: measured and unmeasurable cells, in the order of the plan.
        noise: other load on the machine.
        seconds: duration of the measurement.
        complete: False if the measurement was interrupted.
    """

    machine: dict[str, Any]
    cells: tuple[Measured, ...]
    noise: Noise
    seconds: float
    complete: bool = True

    def curves(self) -> dict[Curve, list[Measured]]:
        """Return the warm measured cells by curve, shortest first."""
        curves: dict[Curve, list[Measured]] = {}
        for entry in sorted(self.measured(), key=lambda entry: entry.cell.nbytes):
            if entry.host == "warm":
                curves.setdefault(Curve.of(entry.cell), []).append(entry)
        return curves

    def measured(self) -> Iterable[Measured]:
        """Return the cells that have times."""
        return (entry for entry in self.cells if entry.times is not None)

    def model(self) -> CostModel:
        """Return the model: a fixed cost and a cost per page for each curve."""
        return self._model

    @lazily
    def _model(self) -> CostModel:
        return CostModel.fit(self.curves())

    @property
    def disturbed(self) -> str | None:
        """Why small changes are doubtful; None if the machine was quiet."""
        return self.noise.why(self.machine.get("cpus") or 1)

    def to_json(self) -> str:
        """Return the JSON that the README documents, schema 1."""
        document = {
            "schema": SCHEMA,
            "machine": self.machine,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "noise": {
                "other_cpus": round(self.noise.other_cpus, 3),
                "stolen_cpus": round(self.noise.stolen_cpus, 3),
                "speed_spread": round(self.noise.speed_spread, 3),
            },
            "cells": [_to_dict(entry) for entry in self.cells],
            "model": self.model().to_dict(),
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """Read the JSON of `to_json`, which does not contain single samples.

        Raises:
            ValueError: the text is not such JSON, or has another schema.
        """
        try:
            document = json.loads(text, parse_constant=_reject_constant)
            schema = document["schema"]
            if schema != SCHEMA:
                msg = f"schema must be {SCHEMA}, got {schema}"
                raise _OtherSchemaError(msg)
            cells = tuple(_from_dict(item) for item in _expect(list, document["cells"]))
            if len({(entry.cell, entry.host) for entry in cells}) < len(cells):
                msg = "a cell occurs twice"
                raise TypeError(msg)
            return cls(
                machine=_machine(document["machine"]),
                cells=cells,
                noise=Noise(**{name: _number(n) for name, n in document["noise"].items()}),
                seconds=_number(document["seconds"]),
                complete=_expect(bool, document["complete"]),
            )
        except _BAD_SHAPE as error:
            if isinstance(error, _OtherSchemaError):
                raise
            msg = f"not the output of pyreserve costs --json: {error!r}"
            raise ValueError(msg) from None

    @classmethod
    def load(cls, path: str | Path) -> "CostTable":
        """Read a file written by ``pyreserve costs --json``.

        Raises:
            OSError: the file cannot be read.
            ValueError: as in `from_json`; the message begins with the path.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from None

    def to_csv(self) -> str:
        """Return CSV with a header and a line per cell; times in nanoseconds."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["verb", "method", "page_kind", "mode", "bytes", "pages", "threads", "host"]
            + [f"{name}_ns" for name in _FIGURES]
            + ["ci95_low_ns", "ci95_high_ns", "samples", "passes", "outliers", "why"]
        )
        for entry in self.cells:
            cell, times = entry.cell, entry.times
            row: list[object] = [cell.verb, cell.method, cell.page_kind, cell.mode]
            row += [cell.nbytes, cell.pages, cell.threads, entry.host]
            if times is None:
                row += [""] * (len(_FIGURES) + 2) + [0, 0, 0]
            else:
                row += [_round(getattr(times, name)) for name in _FIGURES]
                row += [_round(ns) for ns in times.ci95]
                row += [times.samples, times.passes, times.outliers]
            writer.writerow([*row, entry.why or ""])
        return out.getvalue()


def _round(ns: float) -> float:
    """Round to a tenth of a nanosecond; below 100 ns to four digits."""
    return round(ns, 1) if abs(ns) >= 100 else float(f"{ns:.4g}")


def _to_dict(entry: Measured) -> dict[str, Any]:
    cell, times = entry.cell, entry.times
    item: dict[str, Any] = {
        "verb": cell.verb,
        "method": cell.method,
        "page_kind": cell.page_kind,
        "mode": cell.mode,
        "bytes": cell.nbytes,
        "pages": cell.pages,
        "threads": cell.threads,
        "host": entry.host,
        "ns": None,
        "samples": 0,
        "passes": 0,
        "outliers": 0,
        "why": entry.why,
    }
    if times is not None:
        item["ns"] = {name: _round(getattr(times, name)) for name in _FIGURES}
        # JSON has no infinity: the interval of a single sample ends with null.
        item["ns"]["ci95"] = [_round(ns) if math.isfinite(ns) else None for ns in times.ci95]
        item |= {"samples": times.samples, "passes": times.passes, "outliers": times.outliers}
    return item


# Everything read is validated here (TypeError), so comparing and recommending need no checks.


def _reject_constant(constant: str) -> None:
    msg = f"{constant} is not JSON"
    raise TypeError(msg)


def _expect(kind: type[_T], value: Any) -> _T:
    if type(value) is not kind:
        msg = f"expected a {kind.__name__}, got {str(value)[:40]!r}"
        raise TypeError(msg)
    return value


def _number(value: Any, least: float = 0) -> float:
    if type(value) not in {int, float} or not least <= value <= _MAX:
        msg = f"expected a number from {least:g} to {_MAX:g}, got {str(value)[:40]!r}"
        raise TypeError(msg)
    return value  # type: ignore[no-any-return]


def _count(value: Any, least: int = 0) -> int:
    return int(_number(_expect(int, value), least))


def _machine(value: Any) -> dict[str, Any]:
    """Return the facts of the machine; validates those that figures are computed from."""
    machine = _expect(dict, value)
    for name in ("cpus", "memory", "page_size", "max_map_count"):
        if name in machine:
            _count(machine[name], 1)
    for entries in _expect(dict, machine.get("map_entries", {})).values():
        _number(entries)
    if machine.get("system_call_ns") is not None:
        _number(machine["system_call_ns"], _MIN_CALL)
    return machine


def _from_dict(item: Any) -> Measured:
    names = [_expect(str, item[key]) for key in ("verb", "method", "page_kind", "mode")]
    counts = [_count(item[key], 1) for key in ("bytes", "threads")]
    cell = Cell(*names, *counts)  # type: ignore[arg-type]
    times = None
    ns = item["ns"]
    if ns is not None:
        low, high = (_expect(list, ns["ci95"])[i] for i in (0, 1))
        # The clock's own time is subtracted from samples, so they can be negative.
        times = Times(
            **{name: float(_number(ns[name], -_MAX)) for name in _FIGURES},
            ci95=(
                float(_number(low, -_MAX)),
                math.inf if high is None else float(_number(high, -_MAX)),
            ),
            samples=_count(item["samples"], 1),
            passes=_count(item["passes"], 1),
            outliers=_count(item["outliers"]),
        )
    why = None if item["why"] is None else _expect(str, item["why"])
    return Measured(cell, _expect(str, item["host"]), times, why)
