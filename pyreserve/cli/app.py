"""Options and exit statuses. What a command finds out and how it looks are in its own modules."""

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from pyreserve import layouts, parse_size
from pyreserve._arena.arena import WORD
from pyreserve.errors import PyreserveError
from pyreserve.units import GiB

if TYPE_CHECKING:
    from pyreserve.costs import CostTable

_FULL_BUDGET = 600.0  # seconds
_PICTURE = ("matplotlib", "plot")  # what --plot needs, and the extra that brings it

app = typer.Typer(
    help="Reserve virtual memory, and see what that does to a process.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


_BARE = {"--hold": "inf", "--watch": "1"}
"""Options that may stand without their number, and what they mean then."""


class _BareOptions(TyperCommand):
    """A command with options of `_BARE`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        complete: list[str] = []
        for i, arg in enumerate(args):
            complete.append(arg)
            if arg in _BARE and not (i + 1 < len(args) and _is_number(args[i + 1])):
                complete.append(_BARE[arg])
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


@app.command(cls=_BareOptions)
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
        name = layouts.get(name, size=size, word=WORD).name
    except (KeyError, ValueError) as error:
        raise typer.BadParameter(str(error.args[0])) from None
    with _refusals():
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


@app.command()
def costs(
    *,
    budget: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", help="How long to measure at most; 50 seconds by default."),
    ] = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Measure all page kinds, modes, thread counts and powers of two; takes 600 "
            "seconds unless --budget says otherwise.",
        ),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="VERB,...",
            help="Measure these verbs alone, of reserve, commit, grow, guard, unguard, touch, "
            "populate, collapse, discard, decommit, release, retouch, recommit, fork.",
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            parser=_size, metavar="SIZE", help="Longest piece of memory, up to 1GiB, the default."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures as JSON.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the figures as CSV, a line a cell.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png|.svg", help="Draw cost against length.")
    ] = None,
    pyperf: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write all samples for pyperf show and compare_to."),
    ] = None,
    compare: Annotated[
        Path | None,
        typer.Option(metavar="OLD.json", help="Say what changed since a file of --json."),
    ] = None,
) -> None:
    """Measure what commit, touch, decommit and the rest cost on this machine, and what follows."""
    from pyreserve import costs as laboratory  # noqa: PLC0415
    from pyreserve.cli import costs as command  # noqa: PLC0415

    if budget is not None and not 0 < budget < math.inf:
        msg = f"--budget takes a positive number of seconds, not {budget}"
        raise typer.BadParameter(msg)
    verbs = None if only is None else [verb.strip() for verb in only.split(",") if verb.strip()]
    try:
        plan = laboratory.plan(full=full, only=verbs, longest=GiB if longest is None else longest)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    asked = (
        (command.write_json, json, None),
        (command.write_csv, csv, None),
        (command.write_plot, plot, _PICTURE),
        (command.write_pyperf, pyperf, ("pyperf", "pyperf")),
    )
    outputs = []
    for write, path, extra in asked:
        if path is not None:
            _check_output(path, extra)
            outputs.append((write, path))
    if plot is not None:
        _check_picture(plot)
    with _refusals():
        run = command.CostsRun(
            plan=plan,
            budget=budget or (_FULL_BUDGET if full else laboratory.BUDGET),
            outputs=tuple(outputs),
            old=None if compare is None else (_load(compare), str(compare)),
        )
        complete = run.run()
        if sys.stdout is not None:
            sys.stdout.flush()
    if not complete:
        raise typer.Exit(130)  # as a shell says of what Ctrl-C ended


@app.command(cls=_BareOptions)
def explain(
    pid: Annotated[
        int | None, typer.Argument(metavar="PID", help="The process; by default this command.")
    ] = None,
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a screen.")] = False,
    top: Annotated[
        int, typer.Option(metavar="N", min=0, help="How many of the largest mappings to list.")
    ] = 10,
    maps: Annotated[bool, typer.Option("--maps", help="List all mappings.")] = False,
    watch: Annotated[
        float | None,
        typer.Option(
            metavar="[SECONDS]",
            help="Show VSZ, reserved, committed, RSS and PSS over time, every second unless said "
            "otherwise; q or Ctrl-C ends it.",
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="With --watch: record the samples.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.png|.svg", help="Draw the address space, block by block."),
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="DIR", help="Explain saved files of /proc/PID: maps, smaps, ..."
        ),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option("--save", metavar="DIR", help="Save the process's files, for --from."),
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A.json B.json", help="Tell what grew between two files of --json."),
    ] = None,
) -> None:
    """Say what a process's address space holds, whose it is, and whether to worry."""
    from pyreserve.cli import explain as command  # noqa: PLC0415
    from pyreserve.cli import explain_screen  # noqa: PLC0415

    shows = {"--json": json, "--maps": maps, "--plot": plot is not None, "--save": keep is not None}
    _check_explain(
        pid, watch, csv, folder, diff, [name for name, wanted in shows.items() if wanted]
    )
    if plot is not None:
        _check_picture(plot)
        _check_output(plot, _PICTURE)
    with _refusals():
        if diff is not None:
            try:
                command.diff(*diff, as_json=json)
            except ValueError as error:
                raise typer.BadParameter(str(error)) from None
        elif watch is not None and pid is not None:
            _watch(pid, watch, csv)
        else:
            space = command.explained(pid, folder, keep)
            if plot is not None:
                command.draw(space, plot)
            if json:
                typer.echo(space.to_json())
            else:
                explain_screen.show(space, top, all_maps=maps)
        if sys.stdout is not None:
            sys.stdout.flush()


def _check_explain(
    pid: int | None,
    watch: float | None,
    csv: Path | None,
    folder: Path | None,
    diff: tuple[Path, Path] | None,
    shows: list[str],
) -> None:
    """Refuse what contradicts itself; `shows` are the options that say what else to make."""
    subjects = {"PID": pid, "--from": folder, "--diff": diff}
    given = [name for name, value in subjects.items() if value is not None]
    if len(given) > 1:
        msg = f"{' and '.join(given)} can't be had together"
    elif "--save" in shows and (folder is not None or diff is not None):
        msg = "--save takes a running process"
    elif watch is not None and shows:
        msg = f"--watch shows a screen or lines, and no {' and no '.join(shows)}"
    elif diff is not None and {*shows} - {"--json"}:
        msg = f"--diff compares two files, and has no {' and no '.join({*shows} - {'--json'})}"
    elif pid is not None and pid <= 0:
        msg = f"a PID is a positive number, not {pid}"
    elif watch is not None and pid is None:
        msg = "--watch needs a process: pyreserve explain PID --watch [SECONDS]"
    elif watch is not None and not 0 < watch < math.inf:
        msg = f"--watch takes a positive number of seconds, not {watch}"
    elif csv is not None and watch is None:
        msg = "--csv records what --watch shows"
    else:
        return
    raise typer.BadParameter(msg)


def _watch(pid: int, seconds: float, csv: Path | None) -> None:
    from pyreserve.cli.watch import watch  # noqa: PLC0415

    try:
        watch(pid, seconds, csv=csv)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None  # as a shell says of what Ctrl-C ended


@app.command()
def doctor(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a screen.")] = False,
) -> None:
    """Say what this machine and process allow, and what to change for which effect."""
    from pyreserve.cli import doctor_screen  # noqa: PLC0415
    from pyreserve.doctor import diagnose  # noqa: PLC0415

    with _refusals():
        diagnosis = diagnose()
        if json:
            typer.echo(diagnosis.to_json())
        else:
            doctor_screen.show(diagnosis)
        if sys.stdout is not None:
            sys.stdout.flush()


def _load(path: Path) -> "CostTable":
    from pyreserve.costs import CostTable  # noqa: PLC0415

    try:
        return CostTable.load(path)
    except ValueError as error:
        msg = f"--compare {path}: {error}"
        raise typer.BadParameter(msg) from None


def _check_picture(path: Path) -> None:
    from pyreserve._system.pictures import check_suffix  # noqa: PLC0415

    try:
        check_suffix(path)
    except ValueError:
        msg = f"--plot takes a file that ends in .png or .svg, not {path}"
        raise typer.BadParameter(msg) from None


def _check_output(path: Path, extra: tuple[str, str] | None) -> None:
    """Refuse what could not be written before there is anything to write."""
    if extra is not None and find_spec(extra[0]) is None:
        typer.echo(
            f"pyreserve: --{extra[1]} needs {extra[0]}: pip install 'pyreserve[{extra[1]}]'",
            err=True,
        )
        raise typer.Exit(1)
    from pyreserve._system.output import check_writable  # noqa: PLC0415

    try:
        check_writable(path)
    except PermissionError as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def _refusals() -> Iterator[None]:
    """Say in one line what was refused."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (PyreserveError, MemoryError, OSError) as error:
        message = getattr(error, "strerror", None) or str(error) or "out of memory"
        where = getattr(error, "filename", None)
        told = f"{f'{where}: ' if where else ''}{message}"
        # A path may hold what a terminal would obey.
        told = "".join(one if one.isprintable() else "?" for one in told)
        typer.echo(f"pyreserve: {told}", err=True)
        raise typer.Exit(1) from None


def _hold(seconds: float) -> None:
    pid = os.getpid()
    how_long = "until Ctrl-C" if math.isinf(seconds) else f"for {seconds:g} s"
    deadline = time.monotonic() + seconds
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
        typer.echo(
            f"pid {pid} stays {how_long}: ps -o vsz,rss,cmd -p {pid}; pyreserve explain {pid}",
            err=True,
        )
        while (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, 3600))
    except KeyboardInterrupt:
        typer.echo(err=True)
