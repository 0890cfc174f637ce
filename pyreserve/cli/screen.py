"""The screen of ``pyreserve vsz``, and the helpers that all screens share."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from pyreserve import layouts
from pyreserve._arena.arena import WORD
from pyreserve.cli.report import VszReport
from pyreserve.layouts import Piece
from pyreserve.units import GiB, KiB, format_size

_BAR_DELAY = 0.5  # seconds of work before a progress bar is drawn
_BAR_REFRESH = 0.1  # seconds between two drawings


class PlainTable(Table):
    """A table without lines, with `gap` spaces between columns and no padding at the edges.

    rich before 14.1 counts edge padding that it does not draw, and truncates cells.
    """

    def __init__(self, gap: int, *, indent: int = 0, **options: Any) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, gap, 0, indent), **options)

    def _get_padding_width(self, column_index: int) -> int:
        _, right, _, left = self.padding
        last = column_index == len(self.columns) - 1
        return (left if column_index > 0 else 0) + (0 if last else right)


def console_for(width: int = 100) -> Console:
    """Return a console on standard output, as wide as the terminal; elsewhere `width` columns."""
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if terminal else width, highlight=False)


def printable(text: str, console: Console) -> str:
    """Replace control characters, and characters that the console can't show, by ``?``."""
    harmless = "".join(char if char.isprintable() else "?" for char in text)
    return harmless.encode(console.encoding, "replace").decode(console.encoding)


def show(report: VszReport) -> None:
    """Print the report; without a standard output print nothing."""
    if sys.stdout is None:
        return
    console = console_for()
    console.print(Text.assemble(("pyreserve vsz", "bold"), f"  {report.layout}, pid {report.pid}"))
    if report.fell_back is not None:
        console.print(
            Text(
                f"{report.requested_layout} fell back to the 32-bit layout, as Go's runtime does: "
                f"{report.fell_back.because}",
                "yellow",
            )
        )
    console.print()
    console.print(_sizes(report))
    console.print()
    console.print(_heading(report))
    console.print(_maps(report))
    console.print()
    console.print(Text(verdict(report)), soft_wrap=False)


def _heading(report: VszReport) -> str:
    span = f"{report.start:x}-{report.end:x}, {format_size(report.end - report.start)}"
    if report.strategy == "arenas":
        return f"Mapped as whole arenas, with metadata elsewhere ({span}):"
    if report.strategy == "probe":
        return f"Mapped at a probed address, without a reservation ({span}):"
    return f"Inside the reservation ({span}):"


def _sizes(report: VszReport) -> Table:
    table = PlainTable(3)
    table.add_column("KiB")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    before, after = report.before, report.after
    rows: list[tuple[str, int | None, int | None]] = [
        ("VSZ", before.vm_size_kib, after.vm_size_kib),
        ("RSS", before.vm_rss_kib, after.vm_rss_kib),
        ("PSS", before.pss_kib, after.pss_kib),
        ("Committed_AS (system)", before.committed_as_kib, after.committed_as_kib),
    ]
    if report.ps_before is not None and report.ps_after is not None:
        rows += [
            (f"ps says {name}", old, new)
            for name, old, new in zip(
                ("VSZ", "RSS"), report.ps_before, report.ps_after, strict=True
            )
        ]
    for name, old, new in rows:
        if old is None or new is None:
            table.add_row(name, "?", "?", "smaps can't be read")
            continue
        change = f"{new - old:+,}" if old != new else "0"
        style = "bold" if (new - old) * KiB > GiB else ""
        table.add_row(name, f"{old:,}", f"{new:,}", change, style=style)
    return table


def _maps(report: VszReport) -> Table:
    marked = [id(piece) for piece in _inaccessible(report)[:2]]
    table = PlainTable(3, show_header=False)
    for _ in range(6):
        table.add_column(no_wrap=True)
    table.columns[2].justify = "right"
    for piece in report.maps:
        reserved = piece.perms.startswith("---")
        table.add_row(
            f"{piece.start:08x}-{piece.end:08x}",
            piece.perms,
            format_size(piece.end - piece.start),
            piece.what,
            "reserved" if reserved else "committed",
            "<- inaccessible" if id(piece) in marked else "",
            style="bold yellow" if id(piece) in marked else "dim" if reserved else "green",
        )
    return table


def _inaccessible(report: VszReport) -> list[Piece]:
    """Return the reserved pieces, largest first."""
    pieces = [piece for piece in report.maps if piece.perms.startswith("---")]
    return sorted(pieces, key=lambda piece: piece.start - piece.end)


def verdict(report: VszReport) -> str:
    """Explain in a few sentences why the VSZ is not a leak."""
    inaccessible = _inaccessible(report)
    reserved = sum(piece.end - piece.start for piece in inaccessible)
    touched = f", of which --touch took {format_size(report.touched)}" if report.touched else ""
    memory = (
        "RSS, the memory in use, grew by "
        f"{report.after.vm_rss_kib - report.before.vm_rss_kib:,} KiB{touched}."
    )
    if report.strategy == "arenas":
        return (
            f"This is not a leak: {report.layout} maps whole arenas and their metadata, which take "
            f"memory only where they are touched. {memory}"
        )
    if not inaccessible:
        return (
            f"This is not a leak, and VSZ stays small: {report.layout} maps each piece when it is "
            f"used and reserves no other addresses. {memory}"
        )
    mappings = "the mapping" if len(inaccessible) == 1 else "the two mappings"
    return (
        f"This is not a leak: {format_size(reserved)} of VSZ is reserved address space (PROT_NONE, "
        f"{mappings} marked above). It takes no memory, no swap and no commit charge. {memory} The "
        "heap commits its addresses piece by piece as it uses them."
    )


def list_layouts(*, as_json: bool) -> None:
    """Print all layouts with their descriptions."""
    rows = [layouts.get(name, word=WORD) for name in layouts.names()]
    if as_json:
        entries = [
            {
                "name": layout.name,
                "strategy": layout.strategy,
                "total": layout.total(),
                "describes": layouts.describe(layout),
                "source": layout.source,
            }
            for layout in rows
        ]
        print(json.dumps(entries, indent=2))
        return
    table = PlainTable(3)
    table.add_column("layout", no_wrap=True)
    table.add_column("description")
    for layout in rows:
        table.add_row(layout.name, layouts.describe(layout))
    console_for(width=140).print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar on standard error, if it is a terminal, after `_BAR_DELAY` seconds.

    Yields a function that takes the bytes done since its last call. The caller's thread draws:
    a separate thread would add its stack and heap to VSZ.
    """
    bar = Progress(
        TextColumn("touching"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        auto_refresh=False,
        transient=True,
    )
    task = bar.add_task("touching", total=total)
    begun = drawn = time.monotonic()
    started = False

    def advance(nbytes: int) -> None:
        nonlocal started, drawn
        now = time.monotonic()
        bar.advance(task, nbytes)
        if not started and now - begun > _BAR_DELAY and bar.console.is_terminal:
            bar.start()
            started = True
        if started and now - drawn > _BAR_REFRESH:
            bar.refresh()
            drawn = now

    try:
        yield advance
    finally:
        if started:
            bar.stop()
