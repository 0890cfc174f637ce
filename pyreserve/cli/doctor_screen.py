"""How ``pyreserve doctor`` looks in a terminal."""

import sys

from rich.table import Table
from rich.text import Text

from pyreserve.cli.screen import console_for
from pyreserve.doctor import Diagnosis, Finding

_STYLES = {"limited": "bold yellow", "missing": "bold red", "good": "green"}


def show(diagnosis: Diagnosis) -> None:
    """Print the whole screen, if there is a standard output at all."""
    if sys.stdout is None:
        return
    console = console_for(width=80)
    console.print(
        Text.assemble(
            ("pyreserve doctor", "bold"),
            f"  Linux {diagnosis.kernel} {diagnosis.machine}, Python {diagnosis.python}, "
            f"pid {diagnosis.pid}",
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    before = None
    for finding in diagnosis.findings:
        # What is good takes few lines, and stands together.
        if finding.state != "good" or before != "good":
            table.add_row()
        before = finding.state
        table.add_row(Text(finding.state, _STYLES[finding.state]), _words(finding))
    console.print(table)
    console.print()
    console.print(Text("sysctl -w and echo take root and last until the next boot.", "dim"))
    counts = diagnosis.counts()
    console.print(Text(", ".join(f"{counts[state]} {state}" for state in counts), "bold"))


def _words(finding: Finding) -> Text:
    words = Text.assemble((finding.topic, "bold"), f": {finding.fact} {finding.allows}")
    if finding.change is not None:
        words.append("\n").append(finding.change, "cyan")
        words.append(f"\n  {finding.effect or ''}")
        if finding.risk is not None:
            words.append(f" {finding.risk}")
    return words
