"""Options and exit statuses. What a command finds out and how it looks are in its own modules."""

import math
import sys
import time
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from pyreserve import layouts, parse_size
from pyreserve.arena import WORD
from pyreserve.errors import PyreserveError

app = typer.Typer(
    help="Reserve virtual memory, and see what that does to a process.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _HoldCommand(TyperCommand):
    """A command whose ``--hold`` may stand without its number."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        complete: list[str] = []
        for i, arg in enumerate(args):
            complete.append(arg)
            if arg == "--hold" and not (i + 1 < len(args) and _is_number(args[i + 1])):
                complete.append("inf")
        return super().parse_args(ctx, complete)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _touch_size(text: str) -> int:
    return _size(f"{text}MiB" if _is_number(text) else text)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415

        try:
            typer.echo(f"pyreserve {version('pyreserve')}")
        except PackageNotFoundError:
            typer.echo("pyreserve, not installed")
        raise typer.Exit


@app.callback()
def _pyreserve(
    _version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command(cls=_HoldCommand)
def vsz(
    *,
    layout: Annotated[
        str | None, typer.Option(help="Which layout to reserve.", metavar="NAME")
    ] = None,
    list_layouts: Annotated[bool, typer.Option("--list", help="List the layouts.")] = False,
    size: Annotated[
        int | None,
        typer.Option(parser=_size, metavar="SIZE", help="Bytes of arena, for --layout native."),
    ] = None,
    touch: Annotated[
        int | None,
        typer.Option(
            parser=_touch_size,
            metavar="SIZE",
            help="Commit and touch so much arena beyond the runtime's first MiB; a plain number "
            "counts MiB.",
        ),
    ] = None,
    hold: Annotated[
        float | None,
        typer.Option(
            metavar="[SECONDS]",
            help="Stay alive, to be looked at with ps, top, smem and /proc; Ctrl-C ends it.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a screen.")] = False,
) -> None:
    """Make the article's 136 GiB, show what it is made of, and say why it is no leak."""
    from pyreserve.cli import screen  # noqa: PLC0415
    from pyreserve.cli.report import VszRun  # noqa: PLC0415

    if hold is not None and not hold >= 0:
        msg = f"--hold takes a number of seconds, not {hold}"
        raise typer.BadParameter(msg)
    if list_layouts:
        screen.list_layouts(as_json=json)
        return
    name = layouts.default_name(WORD) if layout is None else layout
    try:
        layouts.get(name, size=size, word=WORD)
    except (KeyError, ValueError) as error:
        raise typer.BadParameter(str(error.args[0])) from None
    try:
        with VszRun(name, size) as run:
            report = run.measure(touch or 0, screen.progress)
            if json:
                typer.echo(report.to_json())
            else:
                screen.show(report)
            if hold is not None:
                _hold(hold)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        raise
    except (PyreserveError, MemoryError, OSError) as error:
        message = getattr(error, "strerror", None) or str(error) or "out of memory"
        typer.echo(f"pyreserve: {message}", err=True)
        raise typer.Exit(1) from None


def _hold(seconds: float) -> None:
    import os  # noqa: PLC0415

    pid = os.getpid()
    how_long = "until Ctrl-C" if math.isinf(seconds) else f"for {seconds:g} s"
    deadline = time.monotonic() + seconds
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        typer.echo(
            f"pid {pid} stays {how_long}: ps -o vsz,rss,cmd -p {pid}; cat /proc/{pid}/smaps",
            err=True,
        )
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 3600))
    except KeyboardInterrupt:
        typer.echo(err=True)
