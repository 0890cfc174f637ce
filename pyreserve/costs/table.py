"""What was measured: one object for the screen, JSON, CSV, pictures and pyperf alike."""

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyreserve._system.cached import lazily
from pyreserve.costs.cells import Cell, Curve
from pyreserve.costs.stats import Times

if TYPE_CHECKING:
    from pyreserve.costs.model import CostModel

_T = TypeVar("_T")

SCHEMA = 1

_FIGURES = ("min", "median", "p90", "p99", "max")  # of Times, each a number of ns

# What of CPUs, and which share, is too much of noise.
_OTHERS, _STOLEN, _SPREAD = 0.25, 0.1, 0.25
# No number in the JSON is larger (a century of ns is less), and no system call takes less time.
_MOST, _LEAST_CALL = 1e19, 0.01


# What comes of taking apart what is something else.
_NOT_OURS = (LookupError, TypeError, AttributeError, ArithmeticError, ValueError, RecursionError)


class _OtherSchemaError(ValueError):
    """JSON of this kind, but of another schema."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell and what came of it.

    Attributes:
        cell: what was to be measured.
        host: ``"cold"`` if these are the samples whose memory the host had to bring first (it
            takes back what a virtual machine leaves idle), ``"warm"`` for all others. The two are
            never mixed.
        times: None if it could not be measured.
        why: the reason then.
        passes: every sample, ns, pass by pass in the order measured; empty if read from JSON.
    """

    cell: Cell
    host: str
    times: Times | None
    why: str | None = None
    passes: Sequence[Sequence[float]] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Noise:
    """What else the machine did meanwhile.

    Attributes:
        other_cpus: how many CPUs other processes kept busy, on average.
        stolen_cpus: how many CPUs' time the hypervisor gave to others.
        speed_spread: how far apart the quartiles of a fixed system call's times were, pass by pass,
            as a share of their median.
    """

    other_cpus: float
    stolen_cpus: float
    speed_spread: float

    def why(self, cpus: int) -> str | None:
        """What makes small changes measured under it doubtful, on a machine of so many CPUs.

        None if nothing does.
        """
        if self.other_cpus > max(_OTHERS, cpus / 8):
            return f"other processes kept {self.other_cpus:.2g} CPUs busy"
        if self.stolen_cpus > _STOLEN:
            return f"the hypervisor gave the time of {self.stolen_cpus:.2g} CPUs to others"
        if self.speed_spread > _SPREAD:
            return f"a fixed system call's times differed by {self.speed_spread:.0%} between passes"
        return None


@dataclass(frozen=True)
class CostTable:
    """What the verbs cost on one machine.

    Attributes:
        machine: the machine's facts; see `pyreserve._system.machine.facts`.
        cells: what was measured and what could not be, in the plan's order.
        noise: what else the machine did.
        seconds: how long it took.
        complete: False if it was interrupted.
    """

    machine: dict[str, Any]
    cells: tuple[Measured, ...]
    noise: Noise
    seconds: float
    complete: bool = True

    def curves(self) -> dict[Curve, list[Measured]]:
        """Return the warm measured cells by curve, shortest first."""
        found: dict[Curve, list[Measured]] = {}
        for one in sorted(self.measured(), key=lambda one: one.cell.nbytes):
            if one.host == "warm":
                found.setdefault(Curve.of(one.cell), []).append(one)
        return found

    def measured(self) -> Iterable[Measured]:
        """Return the cells that have times."""
        return (one for one in self.cells if one.times is not None)

    def model(self) -> "CostModel":
        """Fit a fixed cost and a cost per page to each curve."""
        return self._model

    @lazily
    def _model(self) -> "CostModel":
        from pyreserve.costs.model import CostModel  # noqa: PLC0415

        return CostModel.fit(self)

    @property
    def disturbed(self) -> str | None:
        """What makes small changes doubtful; None if nothing does."""
        return self.noise.why(self.machine.get("cpus") or 1)

    def to_json(self) -> str:
        """Return the JSON that the README documents, schema 1."""
        found = {
            "schema": SCHEMA,
            "machine": self.machine,
            "complete": self.complete,
            "seconds": round(self.seconds, 3),
            "noise": {
                "other_cpus": round(self.noise.other_cpus, 3),
                "stolen_cpus": round(self.noise.stolen_cpus, 3),
                "speed_spread": round(self.noise.speed_spread, 3),
            },
            "cells": [_to_dict(one) for one in self.cells],
            "model": self.model().to_dict(),
        }
        return json.dumps(found, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """Read what `to_json` wrote; single samples are not in it.

        Raises:
            ValueError: it is not JSON of this kind, or of another schema.
        """
        try:
            found = json.loads(text, parse_constant=_is_no_number)
            schema = found["schema"]
            if schema != SCHEMA:
                msg = f"this is schema {schema}, and only schema {SCHEMA} is known"
                raise _OtherSchemaError(msg)
            cells = tuple(_from_dict(one) for one in _is(list, found["cells"]))
            if len({(one.cell, one.host) for one in cells}) < len(cells):
                msg = "a cell is there twice"
                raise TypeError(msg)
            return cls(
                machine=_machine(found["machine"]),
                cells=cells,
                noise=Noise(**{name: _number(n) for name, n in found["noise"].items()}),
                seconds=_number(found["seconds"]),
                complete=_is(bool, found["complete"]),
            )
        except _NOT_OURS as error:
            if isinstance(error, _OtherSchemaError):
                raise
            msg = f"this is not what pyreserve costs --json writes: {error!r}"
            raise ValueError(msg) from None

    @classmethod
    def load(cls, path: str | Path) -> "CostTable":
        """Read a file that ``pyreserve costs --json`` wrote.

        Raises:
            OSError: it can't be read.
            ValueError: as `from_json`, with the file's name.
        """
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            msg = f"{path}: {error}"
            raise ValueError(msg) from None

    def to_csv(self) -> str:
        """Return a line a cell; times in nanoseconds."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(
            ["verb", "method", "page_kind", "mode", "bytes", "pages", "threads", "host"]
            + [f"{name}_ns" for name in _FIGURES]
            + ["ci95_low_ns", "ci95_high_ns", "samples", "passes", "outliers", "why"]
        )
        for one in self.cells:
            cell, times = one.cell, one.times
            row: list[object] = [cell.verb, cell.method, cell.page_kind, cell.mode]
            row += [cell.nbytes, cell.pages, cell.threads, one.host]
            if times is None:
                row += [""] * (len(_FIGURES) + 2) + [0, 0, 0]
            else:
                row += [_round(getattr(times, name)) for name in _FIGURES]
                row += [_round(ns) for ns in times.ci95]
                row += [times.samples, times.passes, times.outliers]
            writer.writerow([*row, one.why or ""])
        return out.getvalue()


def _round(ns: float) -> float:
    """Keep a tenth of a nanosecond, and four digits of what is less."""
    return round(ns, 1) if abs(ns) >= 100 else float(f"{ns:.4g}")


def _to_dict(one: Measured) -> dict[str, Any]:
    cell, times = one.cell, one.times
    found: dict[str, Any] = {
        "verb": cell.verb,
        "method": cell.method,
        "page_kind": cell.page_kind,
        "mode": cell.mode,
        "bytes": cell.nbytes,
        "pages": cell.pages,
        "threads": cell.threads,
        "host": one.host,
        "ns": None,
        "samples": 0,
        "passes": 0,
        "outliers": 0,
        "why": one.why,
    }
    if times is not None:
        found["ns"] = {name: _round(getattr(times, name)) for name in _FIGURES}
        # JSON has no infinity: null is where a single sample's interval ends.
        found["ns"]["ci95"] = [_round(ns) if math.isfinite(ns) else None for ns in times.ci95]
        found |= {"samples": times.samples, "passes": times.passes, "outliers": times.outliers}
    return found


# Reading takes nothing on trust: what is not of the kind that was written is a TypeError here, and
# neither comparing nor recommending has to look again.


def _is_no_number(word: str) -> None:
    msg = f"{word} is no JSON"
    raise TypeError(msg)


def _is(kind: type[_T], found: Any) -> _T:
    if type(found) is not kind:
        msg = f"{str(found)[:40]!r} instead of a {kind.__name__}"
        raise TypeError(msg)
    return found


def _number(found: Any, least: float = 0) -> float:
    if type(found) not in {int, float} or not least <= found <= _MOST:
        msg = f"{str(found)[:40]!r} instead of a number from {least:g} to {_MOST:g}"
        raise TypeError(msg)
    return found  # type: ignore[no-any-return]


def _count(found: Any, least: int = 0) -> int:
    return int(_number(_is(int, found), least))


def _machine(found: Any) -> dict[str, Any]:
    """Return the facts, if those that are reckoned with can be."""
    machine = _is(dict, found)
    for name in ("cpus", "memory", "page_size", "max_map_count"):
        if name in machine:
            _count(machine[name], 1)
    for entries in _is(dict, machine.get("map_entries", {})).values():
        _number(entries)
    if machine.get("system_call_ns") is not None:
        _number(machine["system_call_ns"], _LEAST_CALL)
    return machine


def _from_dict(found: Any) -> Measured:
    words = [_is(str, found[key]) for key in ("verb", "method", "page_kind", "mode")]
    counts = [_count(found[key], 1) for key in ("bytes", "threads")]
    cell = Cell(*words, *counts)  # type: ignore[arg-type]
    times = None
    ns = found["ns"]
    if ns is not None:
        low, high = (_is(list, ns["ci95"])[i] for i in (0, 1))
        # Taking off what reading the clock takes may leave less than nothing.
        times = Times(
            **{name: float(_number(ns[name], -_MOST)) for name in _FIGURES},
            ci95=(
                float(_number(low, -_MOST)),
                math.inf if high is None else float(_number(high, -_MOST)),
            ),
            samples=_count(found["samples"], 1),
            passes=_count(found["passes"], 1),
            outliers=_count(found["outliers"]),
        )
    why = None if found["why"] is None else _is(str, found["why"])
    return Measured(cell, _is(str, found["host"]), times, why)
