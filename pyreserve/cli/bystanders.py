"""The section "Bystanders" of ``pyreserve costs``."""

from typing import TYPE_CHECKING

import click

import pyreserve

if TYPE_CHECKING:
    from pyreserve.cli.screen import Screen
    from pyreserve.costs import BystanderTable

_CHOICES = (9, 7, 6, 5)
"""How many columns of the table of calls are shown, most first."""


def measure(budget: float | None) -> "BystanderTable":
    """Measure bystanders, by default for 30 s; after Ctrl-C return the incomplete table."""
    costs = pyreserve.costs
    budget = budget or costs.BYSTANDERS_BUDGET
    click.echo(f"pyreserve costs: measuring bystanders for at most {budget:g} s", err=True)
    try:
        return costs.measure_bystanders(budget)
    except costs.BystandersInterrupted as interrupted:
        return interrupted.table


def show(screen: "Screen", table: "BystanderTable") -> None:
    """Draw the section."""
    screen.blank()
    screen.text(
        ("Bystanders", "bold"),
        ": what one thread's calls cost the other threads of its process",
    )
    for sentence in table.sentences():
        screen.text(sentence, indent=2)
    for note in table.notes():
        screen.text(note, style="dim", indent=2)
    headings = [heading for heading, _ in table.tables()]
    for number, heading in enumerate(headings):
        screen.blank()
        screen.text(heading, style="dim", indent=2)
        tables = (table.tables(columns)[number][1] for columns in _CHOICES)
        screen.widest(
            screen.drawn(shown, 1 if len(shown.titles) > 5 else 2, wrap=False) for shown in tables
        )
