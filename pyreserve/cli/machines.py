"""The screen of several machines side by side, for ``pyreserve costs --compare A B``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyreserve._system.report import Table
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
        _show_table(screen, table)


def _show_table(screen: "Screen", table: "Table") -> None:
    shown = screen.new_table(2)
    for i, title in enumerate(table.titles):
        shown.add_column(
            screen.printable(title), justify="left" if i < table.left else "right", overflow="fold"
        )
    for row in table.rows:
        shown.add_row(*(screen.styled(screen.printable(text), "") for text in row))
    screen.table(shown, indent=2)
