"""The screen of several machines side by side, for ``pyreserve costs --compare A B``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyreserve.cli.screen import Screen
    from pyreserve.costs import Machines

_LABEL, _MACHINE = 22, 18  # columns of a row's label, and least columns of a machine


def show_machines(screen: "Screen", machines: "Machines") -> None:
    """Draw where machines differ; where not all fit beside each other, those that agree as one."""
    screen.text("pyreserve costs, side by side", style="bold")
    for line in machines.summary():
        screen.text(screen.printable(line))
    columns = max(2, (screen.width - _LABEL) // _MACHINE)
    for title, table in machines.tables(columns).items():
        screen.blank()
        screen.text(title, style="bold")
        screen.table(screen.drawn(table), indent=2)
