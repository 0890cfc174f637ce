"""``pyreserve doctor``: list what limits pyreserve on this machine, and how to change it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

import pyreserve
from pyreserve.cli.console import Command, Output, output_options

if TYPE_CHECKING:
    from pyreserve.cli.screen import Screen
    from pyreserve.doctor import Diagnosis, Finding

_STYLES = {"limited": "bold yellow", "missing": "bold red", "good": "green"}
_LABEL = 9  # columns, with the gap


@click.command(
    cls=Command,
    examples=(
        ("pyreserve doctor", "all findings; those that limit come first"),
        ("pyreserve doctor --json", "the same for programs"),
        ("ulimit -v 4000000 && pyreserve doctor", "under a limit"),
    ),
)
@output_options
def command(as_json: bool, output_file: Path | None) -> None:
    """List what limits pyreserve on this machine, and how to change it.

    Checks limits, kernel features and settings. Each finding has its consequence and, if it can be
    changed, the command that does so with its effect and risk.
    """
    output = Output(as_json, output_file)
    diagnosis = pyreserve.doctor.diagnose()
    output.write(diagnosis.to_json, lambda screen: show(screen, diagnosis), width=80)


def show(screen: "Screen", diagnosis: "Diagnosis") -> None:
    """Draw all findings."""
    screen.text(("pyreserve doctor", "bold"), f"  {diagnosis.title()}")
    previous = None
    for finding in diagnosis.findings:
        # Good findings are short and form one paragraph.
        if finding.state != "good" or previous != "good":
            screen.blank()
        previous = finding.state
        _show(screen, finding)
    screen.blank()
    screen.text("sysctl -w and echo need root and last until the next boot.", style="dim")
    screen.text("ulimit applies to the shell that then starts the process.", style="dim")
    screen.text(diagnosis.summary(), style="bold")


def _show(screen: "Screen", finding: "Finding") -> None:
    screen.labelled(
        (finding.state, _STYLES[finding.state]),
        _LABEL,
        (finding.topic, "bold"),
        f": {finding.fact} {finding.allows}",
    )
    for label, text in finding.consequences():
        is_change = label == "change"
        if is_change and finding.command:
            text = _continued(text, screen.width - _LABEL)  # noqa: PLW2901
        screen.labelled((label, "dim"), _LABEL, (text, "cyan" if is_change else ""))


def _continued(command: str, width: int) -> str:
    """Break a long command between words with a backslash, as a shell continues lines."""
    lines = [""]
    for word in command.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
