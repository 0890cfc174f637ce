"""The screens of all commands, drawn with rich."""

import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

    from pyreserve._system.report import Table as ReportTable

_WORD = re.compile(r"(?:\S*\d (?=(?:[KMGTPE]?i?B|[nµm]?s|%)(?!\w)))?\S+")
_BAR_REFRESH = 0.2  # seconds between two drawings of a bar

Part = str | tuple[str, str]
"""A text, or a text and its style."""


class PlainTable(Table):
    """A table without lines, with `gap` spaces between columns and no padding at the edges.

    rich before 14.1 counts edge padding that it does not draw, and truncates cells.
    """

    def __init__(self, gap: int, **options: Any) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, gap, 0, 0), **options)

    def _get_padding_width(self, column_index: int) -> int:
        return 0 if column_index == len(self.columns) - 1 else self.padding[1]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise, where rich from 13.8 on exits with status 1."""
        raise BrokenPipeError


def console_for(width: int = 100, file: IO[str] | None = None) -> Console:
    """Return a console on standard output or a file.

    It is as wide as COLUMNS says, else as the terminal, else `width`.
    """
    terminal = file is None and sys.stdout is not None and sys.stdout.isatty()
    return _Console(
        file=file,
        force_terminal=None if file is None else False,  # whatever FORCE_COLOR says
        width=_columns() or (None if terminal else width),
        highlight=False,
    )


def _columns() -> int:
    """Return the width that COLUMNS sets, or 0."""
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and columns.isascii() else 0


def printable(text: str, console: Console) -> str:
    """Replace control characters, and characters that the console can't show, by ``?``."""
    harmless = "".join(char if char.isprintable() else "?" for char in text)
    return harmless.encode(console.encoding, "replace").decode(console.encoding)


def _wrap(text: Text, width: int) -> Iterator[Text]:
    """Break lines between words, but not between a number and its unit.

    rich breaks words that are longer than a line.
    """
    for paragraph in text.split("\n"):
        start, offsets = 0, []
        for word in _WORD.finditer(paragraph.plain):
            if word.end() - start > width and paragraph.plain[start : word.start()].strip():
                start = word.start()
                offsets.append(start)
        for line in paragraph.divide(offsets):
            line.rstrip()
            yield line


class Screen:
    """A console with the parts that screens are made of. Lines break between words only."""

    def __init__(self, width: int = 100, file: IO[str] | None = None) -> None:
        """See `console_for`."""
        self.console = console_for(width, file)
        # Elsewhere than on a terminal a row of a list stays one line, so that it can be searched.
        self._breaks_rows = self.console.is_terminal or _columns() > 0

    @property
    def width(self) -> int:
        """The number of columns."""
        return self.console.width

    @property
    def ascii_only(self) -> bool:
        """Whether the output's encoding has no block characters."""
        return self.console.options.ascii_only

    def printable(self, text: str) -> str:
        """Return the text as this output can show it."""
        return printable(text, self.console)

    def blank(self) -> None:
        """Print an empty line."""
        self.console.print()

    def text(self, *parts: Part, style: str = "", indent: int = 0) -> None:
        """Print a paragraph."""
        for line in _wrap(Text.assemble(*parts, style=style), self.width - indent):
            self.line(Text(" " * indent).append_text(line))

    def labelled(self, label: tuple[str, str], width: int, *parts: Part) -> None:
        """Print a paragraph beside a label, which takes `width` columns."""
        # Not a table: rich pads its lines with spaces, and a shell does not continue a line after
        # a backslash and a space.
        words, style = label
        for line in _wrap(Text.assemble(*parts), max(width, self.width - width)):
            self.line(Text.assemble((words.ljust(width), style), line))
            words = ""

    def line(self, text: Text) -> None:
        """Print a line that is never broken."""
        self.console.print(text, soft_wrap=True)

    def fields(self, *fields: Part, gap: str = "  ") -> None:
        """Print fields on one line; those that don't fit on further lines, indented."""
        line = Text()
        for i, field in enumerate(fields):
            part = Text.assemble(field)
            if i and self._breaks_rows and line.cell_len + len(gap + part.plain) > self.width:
                self.line(line)
                line = Text("  ")
            elif i:
                line.append(gap)
            line.append_text(part)
        self.line(line)

    @staticmethod
    def new_table(gap: int, **options: Any) -> Table:
        """Return an empty table; see `PlainTable`."""
        return PlainTable(gap, **options)

    def drawn(self, table: "ReportTable", gap: int = 2, *, wrap: bool = True) -> Table:
        """Return the table of a report; with `wrap` the left columns may be broken."""
        shown = self.new_table(gap)
        for i, title in enumerate(table.titles):
            left = i < table.left
            shown.add_column(
                self.printable(title),
                justify="left" if left else "right",
                no_wrap=not (left and wrap),
                overflow="fold",
            )
        for row in table.rows:
            shown.add_row(*(Text(self.printable(text)) for text in row))
        return shown

    @staticmethod
    def styled(text: str, style: str) -> Text:
        """Return a cell of a table."""
        return Text(text, style)

    def table(self, table: Table, *, indent: int = 0) -> None:
        """Print a table."""
        self.console.print(Padding(table, (0, 0, 0, indent), expand=False) if indent else table)

    def widest(self, tables: Iterable[Table]) -> None:
        """Print the first table that fits; if none does, the last."""
        for table in tables:
            if self.fits(table):
                break
        self.table(table)

    def fits(self, table: Table) -> bool:
        """Whether the table fits without shortening a cell."""
        unbounded = self.console.options.update(max_width=1000)
        return self.console.measure(table, options=unbounded).maximum <= self.width

    def shorten(self, text: str, width: int) -> str:
        """Cut a text that is wider than `width`, and mark the cut.

        It is cut after a word, unless that would leave less than half of the width.
        """
        if len(text) <= width:
            return text
        mark = "..." if self.ascii_only else "…"
        cut = text[: width - len(mark)]
        words = text[: len(cut) + 1].rpartition(" ")[0]
        return (words if 2 * len(words) > width else cut).rstrip(" ,") + mark


@contextmanager
def redrawn() -> Iterator[Callable[[Callable[[Screen], None]], None]]:
    """Draw a screen in place on standard output, a terminal; at the end it is gone.

    Yields a function that draws it anew. The caller's thread draws, as in `progress_bar`.
    """
    from rich.live import Live  # noqa: PLC0415  # slow to import

    screen = Screen()
    with Live(console=screen.console, auto_refresh=False, transient=True) as live:

        def redraw(draw: Callable[[Screen], None]) -> None:
            hidden = Screen(screen.width, io.StringIO())
            with hidden.console.capture() as captured:
                draw(hidden)
            live.update(Text.from_ansi(captured.get()), refresh=True)

        yield redraw


@contextmanager
def progress_bar(
    total: float, *columns: "ProgressColumn | str", delay: float = 0.0
) -> Iterator[Callable[..., None]]:
    """Draw a bar on standard error, a terminal, from `delay` seconds on.

    Yields a function that takes the amount done and the fields of the columns. The caller's thread
    draws: a separate thread would disturb measurements, and add its stack and heap to VSZ.
    """
    from rich.progress import Progress  # noqa: PLC0415  # slow to import

    console = Console(stderr=True, highlight=False)
    bar = Progress(*columns, console=console, auto_refresh=False, transient=True)
    task = bar.add_task("", total=total)
    next_drawing = time.monotonic() + delay

    def update(completed: float, **fields: Any) -> None:
        nonlocal next_drawing
        if time.monotonic() < next_drawing or not console.is_terminal:
            return
        next_drawing = time.monotonic() + _BAR_REFRESH
        bar.update(task, completed=completed, **fields)
        bar.start()
        bar.refresh()

    try:
        yield update
    finally:
        if bar.live.is_started:
            bar.stop()
