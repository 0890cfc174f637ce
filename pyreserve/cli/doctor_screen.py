"""How ``pyreserve doctor`` looks in a terminal."""

import sys

from rich.console import Console
from rich.text import Text

from pyreserve.cli.screen import console_for
from pyreserve.doctor import Diagnosis, Finding

_STYLES = {"limited": "bold yellow", "missing": "bold red", "good": "green"}
_LABEL = 9  # columns, the gap included


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
    before = None
    for finding in diagnosis.findings:
        # What is good takes few lines, and stands together.
        if finding.state != "good" or before != "good":
            console.print()
        before = finding.state
        _show(console, finding)
    console.print()
    console.print(Text("sysctl -w and echo take root and last until the next boot;", "dim"))
    console.print(Text("ulimit is for the shell that starts the process.", "dim"))
    counts = diagnosis.counts()
    console.print(Text(", ".join(f"{counts[state]} {state}" for state in counts), "bold"))


def _show(console: Console, finding: Finding) -> None:
    words = Text.assemble((finding.topic, "bold"), f": {finding.fact} {finding.allows}")
    _row(console, finding.state, _STYLES[finding.state], words)
    if finding.change is not None:
        change = finding.change
        if finding.command:
            change = _broken(change, console.width - _LABEL)
        _row(console, "change", "dim", Text(change, "cyan"))
    for label, text in (("effect", finding.effect), ("risk", finding.risk)):
        if text is not None:
            _row(console, label, "dim", Text(text))


def _row(console: Console, label: str, style: str, words: Text) -> None:
    # Not a table of rich's: that fills lines up with spaces, and a shell reads no line on after
    # a backslash and a space.
    for line in words.wrap(console, max(_LABEL, console.width - _LABEL), overflow="fold"):
        line.rstrip()
        console.print(Text.assemble((label.ljust(_LABEL), style), line))
        label = ""


def _broken(command: str, width: int) -> str:
    """Break a long command between its words as a shell reads it."""
    lines = [""]
    for word in command.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)
