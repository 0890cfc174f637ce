"""The table of measured costs, as text, JSON and picture."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve._system.cached import lazily
from pyreserve._system.report import Report
from pyreserve.costs.cells import Curve
from pyreserve.costs.model import CostModel
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.schema import SCHEMA, attributes, machine_to_dict, to_dict
from pyreserve.costs.text import LEGEND, fits_table, machine_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CostTable:
    """The costs of the verbs on one machine.

    ``str()`` gives the model as a table, in a notebook as HTML.

    Attributes:
        machine: facts of the machine; see `pyreserve._system.machine.facts`. Measured are
            ``system_call_ns`` (a getppid), ``map_entries`` (those that each way to give a piece
            back adds, by ``"VERB METHOD"``) and ``huge_pages``: how many pieces of a huge page were
            ``tried`` during the run and how many ``got`` one, and how many of the ``free_bytes``
            of memory lay in free blocks of at least a huge page (``free_bytes_in_huge_blocks``).
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

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draw time against length, as ``--plot``; also write it to a file if a path is given.

        Raises:
            ImportError: matplotlib is missing (extra ``plot``).
            ValueError: the suffix of `path` is neither ``.png`` nor ``.svg``.
            OSError: the file cannot be written.
        """
        from pyreserve.costs.plot import draw  # noqa: PLC0415 - slow to import

        return draw(self, None if path is None else Path(path))

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        unmeasured = sum(entry.times is None for entry in self.cells)
        paragraphs = [
            f"{len(self.cells) - unmeasured} cells measured in {self.seconds:.3g} s, {unmeasured} "
            "not measured.",
            "" if self.complete else "The measurement was interrupted.",
            f"Small changes are doubtful: {self.disturbed}." if self.disturbed else "",
            LEGEND if self.model().fits else "",
        ]
        return Report(
            f"Costs of virtual memory on {machine_text(self.machine)}",
            tuple(filter(None, paragraphs)),
            (fits_table(self.model()),) if self.model().fits else (),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``pyreserve costs --json`` writes it; keys carry their unit."""
        return {
            "schema": SCHEMA,
            "machine": machine_to_dict(self.machine),
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

    def to_json(self) -> str:
        """Return the JSON of ``pyreserve costs --json``."""
        return json.dumps(self.to_dict(), indent=1)

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
