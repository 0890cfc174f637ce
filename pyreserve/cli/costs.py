"""What ``pyreserve costs`` does, from its options to its files."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyreserve._system.output import write_text
from pyreserve.cli import costs_screen
from pyreserve.costs import CostTable, Interrupted, Plan, compare, measure, recommend

Writer = Callable[[CostTable, Path], None]


@dataclass(frozen=True, slots=True)
class CostsRun:
    """What the options of the command ask for.

    Attributes:
        plan: what to measure.
        budget: seconds.
        outputs: what to write where.
        old: what to compare with, and the name of its file.
    """

    plan: Plan
    budget: float
    outputs: tuple[tuple[Writer, Path], ...] = ()
    old: tuple[CostTable, str] | None = None

    def run(self) -> bool:
        """Measure, write and show; False if Ctrl-C came before the end."""
        self.plan.check_memory()
        complete = True
        with costs_screen.progress(self.plan, self.budget) as show:
            try:
                table = measure(self.plan, budget=self.budget, progress=show)
            except Interrupted as interrupted:
                table, complete = interrupted.table, False
        for write, path in self.outputs:
            if write is write_pyperf and not any(table.measured()):
                costs_screen.say(f"nothing was measured, so there is no {path}")
            else:
                write(table, path)
        costs_screen.show(table, recommend(table))
        if self.old is not None:
            costs_screen.show_comparison(compare(self.old[0], table), self.old[1])
        return complete


def write_plot(table: CostTable, path: Path) -> None:
    """Draw the picture."""
    from pyreserve.costs.plot import draw  # noqa: PLC0415

    draw(table, path)


def write_pyperf(table: CostTable, path: Path) -> None:
    """Write a file for pyperf."""
    from pyreserve.costs import pyperf_export  # noqa: PLC0415

    pyperf_export.write_pyperf(table, path)


def write_json(table: CostTable, path: Path) -> None:
    """Write the documented JSON."""
    write_text(path, table.to_json() + "\n")


def write_csv(table: CostTable, path: Path) -> None:
    """Write a line a cell."""
    write_text(path, table.to_csv())
