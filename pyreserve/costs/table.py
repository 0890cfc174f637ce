"""The table of measured costs, its JSON and its CSV. All reports are rendered from it."""

import csv
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyreserve._system.cached import lazily
from pyreserve.costs.cells import Curve
from pyreserve.costs.model import CostModel
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.schema import FIGURES, SCHEMA, attributes, rounded, to_dict


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
            "cells": [to_dict(entry) for entry in self.cells],
            "model": self.model().to_dict(),
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "CostTable":
        """Read the JSON of `to_json`, which does not contain single samples.

        Raises:
            ValueError: the text is not such JSON, or has another schema.
        """
        return cls(**attributes(text))

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
            + [f"{name}_ns" for name in FIGURES]
            + ["ci95_low_ns", "ci95_high_ns", "samples", "passes", "outliers", "why"]
        )
        for entry in self.cells:
            cell, times = entry.cell, entry.times
            row: list[object] = [cell.verb, cell.method, cell.page_kind, cell.mode]
            row += [cell.nbytes, cell.pages, cell.threads, entry.host]
            if times is None:
                row += [""] * (len(FIGURES) + 2) + [0, 0, 0]
            else:
                row += [rounded(getattr(times, name)) for name in FIGURES]
                row += [rounded(ns) for ns in times.ci95]
                row += [times.samples, times.passes, times.outliers]
            writer.writerow([*row, entry.why or ""])
        return out.getvalue()
