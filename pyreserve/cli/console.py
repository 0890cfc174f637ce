"""What the commands share: help, types of options, and where results go. Does not import rich."""

import io
import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from pyreserve.units import parse_size

if TYPE_CHECKING:
    from pyreserve.cli.screen import Screen

_Function = TypeVar("_Function", bound=Callable[..., Any])
_MAX_TERM = 30  # columns of an option or a command beside its description


class _HelpFormatter(click.HelpFormatter):
    """Breaks lines between words only, not at the hyphens inside them."""

    def _lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)

    def write_text(self, text: str) -> None:
        indent = " " * self.current_indent
        paragraphs = [
            "\n".join(indent + line for line in self._lines(part, self.width - len(indent)))
            for part in text.split("\n\n")
        ]
        self.write("\n\n".join(paragraphs) + "\n")

    def write_dl(
        self,
        rows: Iterable[tuple[str, str]],
        col_max: int = _MAX_TERM,
        col_spacing: int = 2,
    ) -> None:
        rows = list(rows)
        indent = " " * self.current_indent
        column = min(max(len(term) for term, _ in rows), col_max) + col_spacing
        for term, description in rows:
            lines = self._lines(description, max(10, self.width - column - len(indent)))
            first = term.ljust(column)
            if len(term) + col_spacing > column and lines:
                self.write(f"{indent}{term}\n")
                first = " " * column
            for line in lines or [""]:
                self.write(f"{indent}{first}{line}".rstrip() + "\n")
                first = " " * column


class _Context(click.Context):
    formatter_class = _HelpFormatter


class Command(click.Command):
    """A command with examples in its help. Its summary, its help's first line, is never cut."""

    context_class = _Context

    def __init__(
        self, *args: Any, examples: Sequence[tuple[str, str]] = (), **options: Any
    ) -> None:
        """Take pairs of a command line and its purpose, and what `click.Command` takes."""
        super().__init__(*args, **options)
        self.short_help = (self.help or "").partition("\n")[0]
        self._examples = examples

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the help, then the examples."""
        super().format_help(ctx, formatter)
        with formatter.section("Examples"):
            formatter.write_dl(self._examples)


class Group(Command, click.Group):
    """A group of commands with examples in its help."""


class Size(click.ParamType):  # type: ignore[type-arg]
    """A size such as ``64MiB``, in bytes; a plain number counts in `unit`."""

    name = "size"

    def __init__(self, unit: str = "") -> None:
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse the size."""
        try:
            return parse_size(f"{value}{self._unit}" if _is_number(value) else value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A positive, finite number of seconds."""

    name = "seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Parse the number."""
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            self.fail(f"must be a positive number of seconds, got {value}", param, ctx)
        return seconds


def _is_completing(ctx: click.Context | None) -> bool:
    """Return whether a shell completes the line, which must print nothing."""
    return ctx is not None and ctx.resilient_parsing


class OutputFile(click.Path):
    """A file to write. One that can't be written is refused before the work starts."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the path."""
        from pyreserve._system.output import check_writable  # noqa: PLC0415

        path = Path(value)
        if _is_completing(ctx):
            return path
        try:
            check_writable(path)
        except PermissionError as error:
            self.fail(str(error), param, ctx)
        return path


class Picture(OutputFile):
    """A picture to write, for the option ``--plot``. Refused too without matplotlib."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Check the suffix, matplotlib and the path."""
        if _is_completing(ctx):
            return Path(value)
        from pyreserve._system.pictures import check_suffix  # noqa: PLC0415

        try:
            check_suffix(Path(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if find_spec("matplotlib") is None:
            click.echo(
                "pyreserve: --plot needs matplotlib: pip install 'pyreserve[plot]'", err=True
            )
            raise click.exceptions.Exit(1)
        return super().convert(value, param, ctx)


class Output(NamedTuple):
    """Where a command's result goes, from the options ``--json`` and ``--output``.

    Attributes:
        as_json: JSON instead of a screen.
        path: the file; None is standard output.
    """

    as_json: bool
    path: Path | None

    def write(
        self, to_json: Callable[[], str], draw: "Callable[[Screen], None]", *, width: int = 100
    ) -> None:
        """Write the result: JSON, or the screen in `width` columns unless COLUMNS is set.

        Raises:
            OSError: the result can't be written. A file is then as it was.
        """
        if self.as_json:
            self._write(f"{to_json()}\n")
            return
        from pyreserve.cli.screen import Screen  # noqa: PLC0415  # rich is slow to import

        if self.path is not None:
            text = io.StringIO()
            draw(Screen(width, text))
            self._write(text.getvalue())
        elif sys.stdout is not None:
            draw(Screen(width))
            sys.stdout.flush()

    def _write(self, text: str) -> None:
        if self.path is not None:
            from pyreserve._system.output import write_text  # noqa: PLC0415

            write_text(self.path, text)
        elif sys.stdout is not None:
            sys.stdout.write(text)
            sys.stdout.flush()


def output_options(function: _Function) -> _Function:
    """Add ``--json`` and ``--output``."""
    for option in (
        click.option(
            "--output",
            "output_file",
            type=OutputFile(),
            metavar="FILE",
            help="Write the result to FILE instead of standard output.",
        ),
        click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a screen."),
    ):
        function = option(function)
    return function


def discard_output() -> None:
    """Redirect standard output to /dev/null if it fails, so that flushing it at exit does not."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def completions(values: Iterable[tuple[str, str]], incomplete: str) -> list[Any]:
    """Return the values that begin with `incomplete`, each with its description, for the shell."""
    from click.shell_completion import CompletionItem  # noqa: PLC0415

    return [
        CompletionItem(value, help=description or None)
        for value, description in values
        if value.startswith(incomplete)
    ]
