"""The work of ``pyreserve costs`` behind its options."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pyreserve._system.output import write_text
from pyreserve.cli import costs_screen
from pyreserve.costs import CostTable, Interrupted, Plan, compare, measure, recommend

Writer = Callable[[CostTable, Path], None]


@dataclass(frozen=True, slots=True)
class CostsRun:
    """A run of the command, as its options describe it.

    Attributes:
        plan: the cells to measure.
        budget: the time limit in seconds.
        outputs: the files to write, each with its writer.
        old: a table to compare with, and the name of its file.
    """

    plan: Plan
    budget: float
    outputs: tuple[tuple[Writer, Path], ...] = ()
    old: tuple[CostTable, str] | None = None

    def run(self) -> bool:
        """Measure, write the files and show the screen; return False after Ctrl-C."""
        self.plan.check_memory()
        complete = True
        with costs_screen.progress(self.plan, self.budget) as show:
            try:
                table = measure(self.plan, budget=self.budget, progress=show)
            except Interrupted as interrupted:
                table, complete = interrupted.table, False
        for write, path in self.outputs:
            write(table, path)
        costs_screen.show(table, recommend(table))
        if self.old is not None:
            costs_screen.show_comparison(compare(self.old[0], table), self.old[1])
        return complete


def write_plot(table: CostTable, path: Path) -> None:
    """Draw cost against length."""
    from pyreserve.costs.plot import draw  # noqa: PLC0415

    draw(table, path)


def write_json(table: CostTable, path: Path) -> None:
    """Write the documented JSON."""
    write_text(path, table.to_json() + "\n")


def write_csv(table: CostTable, path: Path) -> None:
    """Write CSV with a line per cell."""
    write_text(path, table.to_csv())
