"""``pyreserve vsz``: reserve a Go program's layout and show what it does to this process."""

import errno
import gc
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

import pyreserve
from pyreserve import layouts
from pyreserve._system import proc
from pyreserve.cli.console import Command, Output, Size, completions, output_options
from pyreserve.errors import OutOfMemoryError
from pyreserve.layouts import GO_PAGE, LayoutName, Piece
from pyreserve.units import WORD, GiB, KiB, MiB, format_size, round_up

if TYPE_CHECKING:
    from rich.table import Table

    from pyreserve import Arena
    from pyreserve._arena.engine import FellBack
    from pyreserve.cli.screen import Screen

SCHEMA = 1
_BAR_DELAY = 0.5  # seconds of work before a progress bar is drawn
_ATTEMPTS = 3  # reservations, until VSZ grows by nothing else


def _complete_layout(_: click.Context, __: click.Parameter, incomplete: str) -> list[Any]:
    return completions(((name, "") for name in layouts.names()), incomplete)


@click.command(
    cls=Command,
    examples=(
        ("pyreserve vsz", "the layout of Go's tip in December 2014"),
        ("pyreserve vsz --list", "all layouts"),
        ("pyreserve vsz --layout go1.11/amd64 --touch 100", "another, with 100 MiB in use"),
        ("pyreserve vsz --hold", "stay, to look at the process with ps, top or smem"),
        ("pyreserve vsz --json --output vsz.json", "the report as JSON"),
    ),
)
@click.option(
    "--layout", shell_complete=_complete_layout, metavar="NAME", help="The layout to reserve."
)
@click.option("--list", "list_layouts", is_flag=True, help="List all layouts.")
@click.option(
    "--size", type=Size(), metavar="SIZE", help="Size of the arena, with --layout native."
)
@click.option(
    "--touch",
    type=Size("MiB"),
    metavar="SIZE",
    default="0",
    help="Commit and touch SIZE more of the arena than the runtime's first MiB. A plain number "
    "counts MiB.",
)
@click.option(
    "--hold",
    type=float,
    is_flag=False,
    flag_value="inf",
    metavar="[SECONDS]",
    help="Keep the process alive for SECONDS, or until Ctrl-C, so that ps, top, smem and /proc can "
    "show it.",
)
@output_options
def command(
    layout: str | None,
    list_layouts: bool,
    size: int | None,
    touch: int,
    hold: float | None,
    as_json: bool,
    output_file: Path | None,
) -> None:
    """Reserve a Go program's 136 GiB and explain its VSZ.

    Prints this command's sizes before and after, and the mappings that make the difference.
    """
    if hold is not None and not hold >= 0:
        msg = f"--hold must be at least 0 seconds, got {hold}"
        raise click.BadParameter(msg)
    output = Output(as_json, output_file)
    if list_layouts:
        output.write(layouts_json, show_layouts, width=140)
        return
    name = layouts.default_name(WORD) if layout is None else layout
    try:
        chosen = layouts.get(name, size=size, word=WORD).name
    except (KeyError, ValueError) as error:
        option = "'--layout'" if isinstance(error, KeyError) else "'--size'"
        raise click.BadParameter(str(error.args[0]), param_hint=option) from None
    with reserved(chosen, size, touch) as report:
        output.write(report.to_json, lambda screen: show(screen, report))
        if hold is not None:
            _hold(hold)


def _hold(seconds: float) -> None:
    pid = os.getpid()
    duration = "until Ctrl-C" if math.isinf(seconds) else f"for {seconds:g} s"
    deadline = time.monotonic() + seconds
    try:
        click.echo(
            f"pid {pid} stays {duration}: ps -o vsz,rss,cmd -p {pid}; pyreserve explain {pid}",
            err=True,
        )
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 3600))
    except KeyboardInterrupt:
        click.echo(err=True)


class Sizes(NamedTuple):
    """The sizes of this process at one moment, in KiB; Committed_AS is that of the whole system.

    PSS is None if neither smaps_rollup nor smaps can be read.
    """

    vsz: int
    rss: int
    pss: int | None
    committed_as: int

    @classmethod
    def read(cls) -> "Sizes":
        """Read /proc."""
        sample = pyreserve.procmem.sample()
        pss = None if sample.pss is None else sample.pss // KiB
        committed_as = proc.meminfo_kib()["Committed_AS"]
        return cls(sample.vsz // KiB, sample.rss // KiB, pss, committed_as)

    def to_dict(self) -> dict[str, int | None]:
        """Return the sizes under their names in /proc, with the unit added."""
        return {
            "VmSize_kib": self.vsz,
            "VmRSS_kib": self.rss,
            "Pss_kib": self.pss,
            "Committed_AS_kib": self.committed_as,
        }


class VszReport(NamedTuple):
    """A reserved layout and its effect on the process.

    Attributes:
        pid: this process.
        layout: the name of the layout that was reserved.
        requested_layout: the name that was asked for; differs after a fallback.
        strategy: how the layout takes its addresses: reserve, arenas, probe.
        fell_back: the limit that caused a fallback, if one happened.
        start: the first address of the layout.
        end: the address behind its last byte.
        arena_start: where its arena begins.
        arena_used: the address up to which the arena is used.
        touched: bytes touched on request.
        before: sizes before the reservation.
        after: sizes after it.
        ps_before: VSZ and RSS in KiB as ps prints them; None without ps.
        ps_after: the same after it.
        maps: the mappings of the layout.
    """

    pid: int
    layout: str
    requested_layout: str
    strategy: str
    fell_back: "FellBack | None"
    start: int
    end: int
    arena_start: int
    arena_used: int
    touched: int
    before: Sizes
    after: Sizes
    ps_before: tuple[int, int] | None
    ps_after: tuple[int, int] | None
    maps: list[Piece]

    def to_json(self) -> str:
        """Return the JSON text that ``pyreserve vsz --json`` prints."""
        fell_back = self.fell_back
        data: dict[str, Any] = {
            "schema": SCHEMA,
            "layout": self.layout,
            "requested_layout": self.requested_layout,
            "strategy": self.strategy,
            "fell_back": fell_back and {"reason": fell_back.reason, "limit": fell_back.limit},
            "reservation": {"start": self.start, "end": self.end},
            "arena_start": self.arena_start,
            "arena_used": self.arena_used,
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "maps": [
                [f"{piece.start:08x}-{piece.end:08x}", piece.perms, piece.parts]
                for piece in self.maps
            ],
        }
        return json.dumps(data, indent=2)


@contextmanager
def reserved(layout: LayoutName, size: int | None, touch: int) -> Iterator[VszReport]:
    """Reserve a layout until the block ends: grow by 1 MiB and touch `touch` more bytes.

    Raises:
        OutOfMemoryError: `touch` exceeds the available memory, or a limit refuses the layout.
    """
    _refuse_too_much(touch)
    _rehearse(layout, size)
    with progress(touch):  # loads what a bar needs, and draws none
        pass
    ps_before = ps(os.getpid())
    before, arena, after = _measure(layout, size, touch)
    with arena:
        placement = arena.placement
        yield VszReport(
            pid=os.getpid(),
            layout=arena.layout.name,
            requested_layout=arena.requested_layout.name,
            strategy=arena.layout.strategy,
            fell_back=arena.fell_back,
            start=placement.start,
            end=placement.end,
            arena_start=placement.arena_start,
            arena_used=placement.arena_used,
            touched=touch,
            before=before,
            after=after,
            ps_before=ps_before,
            ps_after=ps(os.getpid()),
            maps=arena.maps(),
        )


def _rehearse(layout: LayoutName, size: int | None) -> None:
    """Run all steps once before, so that only the layout grows between the two readings."""
    for _ in range(2):
        _reserve_between_readings(layout, size, 0)[1].release()
        ps(os.getpid())
    gc.collect()


def _measure(layout: LayoutName, size: int | None, touch: int) -> "tuple[Sizes, Arena, Sizes]":
    """Reserve the layout, again if VSZ grew by anything else: malloc grows its heap at times."""
    for _ in range(_ATTEMPTS - 1):
        before, arena, after = _reserve_between_readings(layout, size, touch)
        mapped = sum(piece.end - piece.start for piece in arena.maps())
        # The metadata of whole arenas lies elsewhere, and maps() has only the arenas.
        if arena.layout.strategy == "arenas" or (after.vsz - before.vsz) * KiB == mapped:
            return before, arena, after
        arena.release()
    return _reserve_between_readings(layout, size, touch)


def _reserve_between_readings(
    layout: LayoutName, size: int | None, touch: int
) -> "tuple[Sizes, Arena, Sizes]":
    before = Sizes.read()
    arena = pyreserve.Arena(size, layout=layout)
    try:
        arena.grow(MiB)
        _touch(arena, touch)
        return before, arena, Sizes.read()
    except BaseException:
        arena.close()
        raise


def _refuse_too_much(touch: int) -> None:
    available = proc.available_bytes()
    if touch > available:
        msg = (
            f"touching {format_size(touch)} takes that much memory, but only "
            f"{format_size(available)} is available"
        )
        raise OutOfMemoryError(errno.ENOMEM, msg, verb="populate", nbytes=touch)


def _touch(arena: "Arena", nbytes: int) -> None:
    touched = 0
    with progress(nbytes) as show_progress:
        for step in _steps(nbytes):
            block = arena.grow(step)
            arena.region.populate(block - arena.region.base, step)
            touched += step
            show_progress(touched)


def _steps(nbytes: int) -> Iterator[int]:
    """Yield steps of 1 MiB, by which Go's heap grew, and the rest rounded up to whole pages."""
    yield from (MiB for _ in range(nbytes // MiB))
    rest = nbytes % MiB
    if rest:
        yield round_up(rest, max(GO_PAGE, pyreserve.PAGE_SIZE))


def ps(pid: int) -> tuple[int, int] | None:
    """Return VSZ and RSS of a process in KiB as ``ps`` prints them; None if ps can't be run."""
    import shutil  # noqa: PLC0415  # slow to import
    import subprocess  # noqa: PLC0415

    program = shutil.which("ps")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "-o", "vsz=,rss=", "-p", str(pid)],
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # no process can be started; the report works without ps
        return None
    fields = done.stdout.split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 else None


def show(screen: "Screen", report: VszReport) -> None:
    """Draw the report."""
    screen.text(("pyreserve vsz", "bold"), f"  {report.layout}, pid {report.pid}")
    if report.fell_back is not None:
        screen.text(
            f"{report.requested_layout} fell back to the 32-bit layout, as Go's runtime does: "
            f"{report.fell_back.reason}",
            style="yellow",
        )
    screen.blank()
    screen.widest(_sizes(screen, report, gap) for gap in (3, 2, 1))
    screen.blank()
    screen.text(_heading(report))
    screen.widest(_maps(screen, report, columns, gap, mark) for columns, gap, mark in _MAPS)
    screen.blank()
    screen.text(verdict(report))


def _heading(report: VszReport) -> str:
    span = f"{report.start:x}-{report.end:x}, {format_size(report.end - report.start)}"
    if report.strategy == "arenas":
        return f"Mapped as whole arenas, with metadata elsewhere ({span}):"
    if report.strategy == "probe":
        return f"Mapped at a probed address, without a reservation ({span}):"
    return f"Inside the reservation ({span}):"


def _sizes(screen: "Screen", report: VszReport, gap: int) -> "Table":
    table = screen.new_table(gap)
    table.add_column("KiB")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    before, after = report.before, report.after
    rows: list[tuple[str, int | None, int | None]] = [
        ("VSZ", before.vsz, after.vsz),
        ("RSS", before.rss, after.rss),
        ("PSS", before.pss, after.pss),
        ("Committed_AS (system)", before.committed_as, after.committed_as),
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


# Columns, gap and mark of the table of mappings, widest first: the permissions say the state too.
_MAPS = (
    (6, 3, "<- inaccessible"),
    (6, 2, "<- inaccessible"),
    (6, 1, "<- inaccessible"),
    (5, 2, "<- inaccessible"),
    (5, 2, "<-"),
    (5, 1, "<-"),
)


def _maps(screen: "Screen", report: VszReport, columns: int, gap: int, mark: str) -> "Table":
    marked = [id(piece) for piece in _inaccessible(report)[:2]]
    table = screen.new_table(gap, show_header=False)
    for _ in range(columns):
        table.add_column(no_wrap=True)
    table.columns[2].justify = "right"
    for piece in report.maps:
        reserved = piece.perms.startswith("---")
        cells = [
            f"{piece.start:08x}-{piece.end:08x}",
            piece.perms,
            format_size(piece.end - piece.start),
            piece.parts,
            "reserved" if reserved else "committed",
            mark if id(piece) in marked else "",
        ]
        if columns < len(cells):
            del cells[4]
        table.add_row(
            *cells,
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
        f"RSS, the memory in use, grew by {report.after.rss - report.before.rss:,} KiB{touched}."
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


def _all_layouts() -> Iterable[layouts.Layout]:
    return (layouts.get(name, word=WORD) for name in layouts.names())


def layouts_json() -> str:
    """Return the JSON that ``pyreserve vsz --list --json`` prints."""
    entries = [
        {
            "name": layout.name,
            "strategy": layout.strategy,
            "total_bytes": layout.total(),
            "describes": layouts.describe(layout),
            "source": layout.source,
        }
        for layout in _all_layouts()
    ]
    return json.dumps({"schema": SCHEMA, "layouts": entries}, indent=2)


def show_layouts(screen: "Screen") -> None:
    """Draw all layouts with their descriptions."""
    table = screen.new_table(3)
    table.add_column("layout", no_wrap=True)
    table.add_column("description")
    for layout in _all_layouts():
        table.add_row(layout.name, layouts.describe(layout))
    screen.table(table)


@contextmanager
def progress(total: int) -> Iterator[Callable[[int], None]]:
    """Draw a bar if standard error is a terminal; yield a function that takes the touched bytes."""
    if not total or sys.stderr is None or not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn  # noqa: PLC0415

    from pyreserve.cli.screen import progress_bar  # noqa: PLC0415  # rich is slow to import

    columns = ("touching", BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with progress_bar(total, *columns, delay=_BAR_DELAY) as update:
        yield update
