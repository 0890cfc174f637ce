"""How ``pyreserve vsz`` looks in a terminal."""

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

_LONG = 0.5  # seconds after which a progress bar is worth its lines


class PlainTable(Table):
    """Columns some spaces apart, without lines, and without padding at the edges.

    rich before 14.1 counts padding at the edges that is not drawn, and truncates cells.
    """

    def __init__(self, gap: int, *, indent: int = 0, **how: Any) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, gap, 0, indent), **how)

    def _get_padding_width(self, column_index: int) -> int:
        _, right, _, left = self.padding
        last = column_index == len(self.columns) - 1
        return (left if column_index > 0 else 0) + (0 if last else right)


def console_for(width: int = 100) -> Console:
    """Return a console on standard output, as wide as the terminal."""
    # A pipe or a file has no width of its own.
    terminal = sys.stdout is not None and sys.stdout.isatty()
    return Console(width=None if terminal else width, highlight=False)


def printable(text: str, console: Console) -> str:
    """Return what anybody may have chosen without what a terminal would obey or can't show."""
    harmless = "".join(one if one.isprintable() else "?" for one in text)
    return harmless.encode(console.encoding, "replace").decode(console.encoding)


def show(report: VszReport) -> None:
    """Print the whole screen, if there is a standard output at all."""
    if sys.stdout is None:
        return
    console = console_for()
    console.print(Text.assemble(("pyreserve vsz", "bold"), f"  {report.layout}, pid {report.pid}"))
    if report.fell_back is not None:
        console.print(
            Text(
                f"{report.requested_layout} fell back to the 32-bit mechanism, as the runtime did: "
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
        return f"Mapped as whole arenas, their metadata elsewhere ({span}):"
    if report.strategy == "probe":
        return f"Mapped in the place that was probed, not reserved ({span}):"
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
            (f"ps says {what}", a, b)
            for what, a, b in zip(("VSZ", "RSS"), report.ps_before, report.ps_after, strict=True)
        ]
    for what, a, b in rows:
        if a is None or b is None:
            table.add_row(what, "?", "?", "smaps can't be read")
            continue
        change = f"{b - a:+,}" if a != b else "0"
        style = "bold" if (b - a) * KiB > GiB else ""
        table.add_row(what, f"{a:,}", f"{b:,}", change, style=style)
    return table


def _maps(report: VszReport) -> Table:
    big = [id(piece) for piece in _inaccessible(report)[:2]]
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
            "<- inaccessible" if id(piece) in big else "",
            style="bold yellow" if id(piece) in big else "dim" if reserved else "green",
        )
    return table


def _inaccessible(report: VszReport) -> list[Piece]:
    pieces = [piece for piece in report.maps if piece.perms.startswith("---")]
    return sorted(pieces, key=lambda piece: piece.start - piece.end)


def verdict(report: VszReport) -> str:
    """Say in two sentences why this is no leak."""
    hidden = _inaccessible(report)
    reserved = sum(piece.end - piece.start for piece in hidden)
    memory = f"{report.after.vm_rss_kib - report.before.vm_rss_kib:,} KiB"
    touched = (
        f", {format_size(report.touched)} of them touched on request" if report.touched else ""
    )
    if report.strategy == "arenas":
        return (
            f"This is no leak: {report.layout} maps whole arenas and their metadata, which take "
            "memory only where they are touched. "
            f"RSS, the memory in use, grew by {memory}{touched}."
        )
    if not hidden:
        return (
            f"This is no leak, and VSZ does not even look like one: {report.layout} maps each "
            "piece when it is used and keeps no addresses besides. "
            f"RSS, the memory in use, grew by {memory}{touched}."
        )
    what = "the mapping marked above" if len(hidden) == 1 else "the two mappings marked above"
    return (
        f"This is no leak: {format_size(reserved)} of VSZ are addresses that were only set aside "
        f"(PROT_NONE), in {what}, and they take no memory, no swap and no commit charge. "
        f"Memory is what RSS counts, and that grew by {memory}{touched}; the heap makes memory of "
        "its addresses piece by piece, when it uses them."
    )


def list_layouts(*, as_json: bool) -> None:
    """Print the layouts that there are."""
    rows = [layouts.get(name, word=WORD) for name in layouts.names()]
    if as_json:
        found = [
            {
                "name": layout.name,
                "strategy": layout.strategy,
                "total": layout.total(),
                "describes": layouts.describe(layout),
                "source": layout.source,
            }
            for layout in rows
        ]
        print(json.dumps(found, indent=2))
        return
    table = PlainTable(3)
    table.add_column("layout", no_wrap=True)
    table.add_column("what it is")
    for layout in rows:
        table.add_row(layout.name, layouts.describe(layout))
    console_for(width=140).print(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Draw a bar on standard error once the work has taken a while, if that is a terminal.

    Drawn by the caller's thread: a thread of its own would add its stack and heap to VSZ.
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
        if not started and now - begun > _LONG and bar.console.is_terminal:
            bar.start()
            started = True
        if started and now - drawn > 0.1:
            bar.refresh()
            drawn = now

    try:
        yield advance
    finally:
        if started:
            bar.stop()
