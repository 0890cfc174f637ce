"""The screen of ``pyreserve doctor``."""

import sys

from rich.console import Console
from rich.text import Text

from pyreserve.cli.screen import console_for
from pyreserve.doctor import Diagnosis, Finding

_STYLES = {"limited": "bold yellow", "missing": "bold red", "good": "green"}
_LABEL = 9  # columns, with the gap


def show(diagnosis: Diagnosis) -> None:
    """Print all findings; without a standard output print nothing."""
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
    previous = None
    for finding in diagnosis.findings:
        # Good findings are short and form one paragraph.
        if finding.state != "good" or previous != "good":
            console.print()
        previous = finding.state
        _show(console, finding)
    console.print()
    console.print(Text("sysctl -w and echo need root and last until the next boot.", "dim"))
    console.print(Text("ulimit applies to the shell that then starts the process.", "dim"))
    counts = diagnosis.counts()
    console.print(Text(", ".join(f"{counts[state]} {state}" for state in counts), "bold"))


def _show(console: Console, finding: Finding) -> None:
    words = Text.assemble((finding.topic, "bold"), f": {finding.fact} {finding.allows}")
    _row(console, finding.state, _STYLES[finding.state], words)
    if finding.change is not None:
        change = finding.change
        if finding.command:
            change = _continued(change, console.width - _LABEL)
        _row(console, "change", "dim", Text(change, "cyan"))
    for label, text in (("effect", finding.effect), ("risk", finding.risk)):
        if text is not None:
            _row(console, label, "dim", Text(text))


def _row(console: Console, label: str, style: str, words: Text) -> None:
    # Not a rich table: it pads lines with spaces, and a shell does not continue a line after a
    # backslash and a space.
    for line in words.wrap(console, max(_LABEL, console.width - _LABEL), overflow="fold"):
        line.rstrip()
        console.print(Text.assemble((label.ljust(_LABEL), style), line))
        label = ""


def _continued(command: str, width: int) -> str:
    """Break a long command between words with a backslash, as a shell continues lines."""
    lines = [""]
    for word in command.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
