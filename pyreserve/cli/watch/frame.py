"""The screen of ``pyreserve explain --watch``."""

import time
from datetime import timedelta

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from pyreserve.cli.screen import PlainTable, printable
from pyreserve.cli.watch.sparkline import ASCII, BLOCKS, sparkline
from pyreserve.cli.watch.watched import Series, Watched
from pyreserve.units import KiB, format_size

_WIDE = 100  # columns; wider consoles also show the change per second


def frame(watched: Watched, console: Console, quits: str = "") -> Group:
    """Draw the state; with `quits`, the keys that end a live screen, also the legend."""
    elapsed = timedelta(seconds=int(time.monotonic() - watched.began))
    process = f"pid {watched.pid} ({printable(watched.name, console)})"
    heading = Text.assemble(
        ("pyreserve explain", "bold"),
        f"  {process}  {elapsed}, {watched.count:,} sample{'s' if watched.count > 1 else ''}, one "
        f"every {watched.interval:g} s",
    )
    lines: list[Text | Table] = [heading, Text(), _table(watched, wide=console.width >= _WIDE)]
    if quits:
        levels = _levels(console.options)
        lines += [
            Text(),
            Text(
                f"one character per sample, newest last; {levels[0]} is the row's min, "
                f"{levels[-1]} its max",
                "dim",
            ),
        ]
    if watched.csv is not None:
        lines.append(Text(f"written to {printable(str(watched.csv), console)}"))
    if quits:
        lines.append(Text(f"{quits} quits"))
    if watched.ended:
        lines.append(Text(f"{process} ended after {elapsed}"))
    return Group(*lines)


def _table(watched: Watched, *, wide: bool) -> Table:
    table = PlainTable(2, expand=True)
    table.add_column("", no_wrap=True, overflow="crop")
    titles = ("now", "change", *(("per second",) if wide else ()), "min", "max")
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True, overflow="crop")
    table.add_column("", ratio=1, no_wrap=True, overflow="crop")
    for name, series in watched.series.items():
        *_, last = series.newest
        previous = series.newest[-2] if len(series.newest) > 1 else last
        rate = round((last - previous) / watched.since_last) if last != previous else 0
        table.add_row(
            name,
            _amount(name, last),
            _change(name, last - series.first),
            *((_change(name, rate),) if wide else ()),
            _amount(name, series.low),
            _amount(name, series.high),
            _Spark(series),
        )
    return table


def _amount(name: str, value: int) -> str:
    return f"{value:,}" if name == "mappings" else format_size(value * KiB)


def _change(name: str, value: int) -> str:
    return f"{'+' if value > 0 else ''}{_amount(name, value)}" if value else "0"


def _levels(options: ConsoleOptions) -> str:
    return ASCII if options.ascii_only else BLOCKS


class _Spark:
    """A sparkline of a figure that fills the width of its column."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        series = self._series
        yield Text(
            sparkline(series.newest, options.max_width, series.low, series.high, _levels(options)),
            "cyan",
        )
