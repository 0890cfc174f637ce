"""``pyreserve costs``: measure what memory operations cost, with progress on standard error."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import pyreserve
from pyreserve.cli import bystanders as others
from pyreserve.cli.console import (
    Command,
    Output,
    Picture,
    Seconds,
    Size,
    completions,
    output_options,
)
from pyreserve.units import format_size, format_time

if TYPE_CHECKING:
    from rich.table import Table

    import pyreserve.costs.text
    from pyreserve.cli.screen import Screen
    from pyreserve.costs import (
        BystanderTable,
        Cell,
        Comparison,
        CostTable,
        Plan,
        Progress,
        Recommendations,
        WayCosts,
    )

VERBS = (
    "reserve",
    "commit",
    "grow",
    "guard",
    "unguard",
    "touch",
    "populate",
    "collapse",
    "discard",
    "decommit",
    "release",
    "retouch",
    "recommit",
    "advise",
    "fork",
)
"""The verbs of `pyreserve.costs.GROUPS`, which help and completion name without importing it."""

_FULL_BUDGET, _DETAILS_BUDGET = 600.0, 90.0  # seconds
_COLUMNS = (6, 4)  # how many columns of the fits are shown, most first; GiB/s and at go together
_REDRAW = 1.0  # seconds between two drawings of the verdicts, on a terminal
_LINE_INTERVAL = 10.0  # seconds between two progress lines, elsewhere than on a terminal


def _complete_verbs(_: click.Context, __: click.Parameter, incomplete: str) -> list[Any]:
    """Complete the last verb of a list with commas."""
    given, comma, _last = incomplete.rpartition(",")
    return completions(((given + comma + verb, "") for verb in VERBS), incomplete)


@click.command(
    cls=Command,
    examples=(
        ("pyreserve costs", "measure for 30 seconds, and answer"),
        ("pyreserve costs --details", "also show the cost of every call"),
        ("pyreserve costs --only commit,touch --budget 10", "two verbs, more quickly"),
        ("pyreserve costs --plot costs.png", "also draw cost against length"),
        ("pyreserve costs --json --output old.json", "keep the results"),
        ("pyreserve costs --compare old.json", "and tell what changed since"),
        ("pyreserve costs --compare a.json b.json", "two machines, without measuring"),
    ),
)
@click.option(
    "--budget", type=Seconds(), metavar="SECONDS", help="Time limit; 30 seconds by default."
)
@click.option(
    "--details",
    is_flag=True,
    help="Also measure the lengths in between, and show the cost of every call; the time limit is "
    "90 seconds by default.",
)
@click.option(
    "--full",
    is_flag=True,
    help="Measure all page kinds, modes, thread counts and powers of two, with details; the time "
    "limit is 600 seconds by default.",
)
@click.option(
    "--only",
    metavar="VERB,...",
    shell_complete=_complete_verbs,
    help=f"Measure only these verbs, with details: {', '.join(VERBS)}.",
)
@click.option(
    "--longest",
    type=Size(),
    metavar="SIZE",
    default="1GiB",
    help="Longest piece of memory; at most and by default 1GiB.",
)
@click.option(
    "--plot",
    type=Picture(),
    metavar="FILE.png|.svg",
    help="Draw cost against length, with details.",
)
@click.option(
    "--bystanders",
    is_flag=True,
    help="Also measure what one thread's calls cost the other threads, for half of the time "
    "limit; 30 seconds more by default.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="FILE...",
    help="Compare with a file written by --json --output. With several files, measure nothing and "
    "show their machines side by side.",
)
@click.argument("files", nargs=-1, type=click.Path(path_type=Path), metavar="")
@output_options
@click.pass_context
def command(
    context: click.Context,
    budget: float | None,
    details: bool,
    full: bool,
    only: str | None,
    longest: int,
    bystanders: bool,
    plot: Path | None,
    compare: Path | None,
    files: tuple[Path, ...],
    as_json: bool,
    output_file: Path | None,
) -> None:
    """Measure the costs of memory operations, and answer what to use.

    Prints how to commit, to grow and to give memory back on this machine, whether huge pages pay,
    whether to populate, and what fork costs.
    """
    if files:
        _check_compares_only(context, compare)
        paths = (compare, *files) if compare is not None else files
        _compare_machines(paths, Output(as_json, output_file))
        return
    costs = pyreserve.costs
    verbs = None if only is None else [verb.strip() for verb in only.split(",") if verb.strip()]
    details = details or full or verbs is not None or plot is not None
    try:
        plan = costs.plan(details=details, full=full, only=verbs, longest=longest)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    old = None if compare is None else _load(compare)
    plan.check_memory()
    if bystanders and budget is not None:
        budget /= 2
    default = _FULL_BUDGET if full else _DETAILS_BUDGET if details else costs.BUDGET
    live = not as_json and output_file is None and sys.stdout is not None and sys.stdout.isatty()
    table = _measure(plan, budget or default, live)
    if plot is not None:
        table.plot(plot)
    comparison = None if old is None else costs.compare(old, table)
    losses: BystanderTable | None = None

    def measure_bystanders() -> "BystanderTable | None":
        nonlocal losses
        losses = others.measure(budget) if bystanders and table.complete else None
        return losses

    def draw(screen: "Screen") -> None:
        show(screen, table, costs.recommend(table), details=details)
        if comparison is not None:
            show_comparison(screen, comparison, str(compare))
        others_losses = measure_bystanders()  # the rest is on the screen already
        if others_losses is not None:
            others.show(screen, others_losses)

    def to_json() -> str:
        document = table.to_dict() | costs.recommend(table).to_dict()
        if comparison is not None:
            document["comparison"] = comparison.to_dict()
        others_losses = measure_bystanders()
        if others_losses is not None:
            document["bystanders"] = others_losses.to_dict()
        return json.dumps(document, indent=1)

    Output(as_json, output_file).write(to_json, draw, width=120)
    if not table.complete or (losses is not None and not losses.complete):
        raise click.Abort  # Ctrl-C


def _check_compares_only(context: click.Context, compare: Path | None) -> None:
    """Refuse files without --compare, and the options of a measurement."""
    if compare is None:
        msg = "files are for --compare"
        raise click.UsageError(msg)
    measuring = ("budget", "details", "full", "only", "longest", "plot")
    for name in measuring:
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            msg = f"--{name} is for a measurement: comparing several files makes none"
            raise click.UsageError(msg)


def _compare_machines(paths: Sequence[Path], output: Output) -> None:
    tables = {name: _load(path) for name, path in zip(_names(paths), paths, strict=True)}
    machines = pyreserve.costs.side_by_side(tables)

    def draw(screen: "Screen") -> None:
        from pyreserve.cli.machines import show_machines  # noqa: PLC0415

        show_machines(screen, machines)

    output.write(lambda: json.dumps(machines.to_dict(), indent=1), draw, width=120)


def _names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each file, without folder and suffix if these tell all files apart."""
    for names in ([path.stem for path in paths], [str(path) for path in paths]):
        if len(set(names)) == len(names):
            return names
    msg = "a file is given twice"
    raise click.BadParameter(msg, param_hint="'--compare'")


def _load(path: Path) -> "CostTable":
    try:
        return pyreserve.costs.CostTable.load(path)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--compare'") from None


def _measure(plan: "Plan", budget: float, live: bool) -> "CostTable":
    """Measure the plan; after Ctrl-C return the incomplete table."""
    with _live(budget) if live else nullcontext(_progress_lines(plan, budget)) as show_progress:
        try:
            return pyreserve.costs.measure(plan, budget=budget, progress=show_progress)
        except pyreserve.costs.Interrupted as interrupted:
            return interrupted.table


@contextmanager
def _live(budget: float) -> "Iterator[Callable[[Progress], None]]":
    """Draw the verdicts so far on a terminal, and refine them in place between passes."""
    from pyreserve.cli.screen import Screen, redrawn  # noqa: PLC0415  # rich is slow to import

    with redrawn() as redraw:
        drawn = -_REDRAW

        def show_progress(now: "Progress") -> None:
            nonlocal drawn
            early = now.seconds < drawn + _REDRAW and now.passes != pyreserve.costs.ENOUGH
            if now.table is None or early:
                return
            drawn = now.seconds
            table = now.table() if now.passes >= pyreserve.costs.ENOUGH else None

            def draw(screen: Screen) -> None:
                if table is not None:
                    show(screen, table, pyreserve.costs.recommend(table))
                screen.text(
                    f"{now.seconds:.0f} of {budget:g} s, {_count(now.passes, 'pass', 'passes')}, "
                    f"{now.settled} of {now.cells} cells settled; Ctrl-C ends the run and keeps "
                    "its results",
                    style="cyan",
                )

            redraw(draw)

        yield show_progress


def _progress_lines(plan: "Plan", budget: float) -> "Callable[[Progress], None]":
    """Report progress on standard error, in a line every 10 s."""
    click.echo(
        f"pyreserve costs: measuring {len(plan.cells)} cells for at most {budget:g} s, in up to "
        f"{format_size(plan.memory)} of memory; Ctrl-C ends the run and keeps its results",
        err=True,
    )
    printed = time.monotonic()

    def show_progress(now: "Progress") -> None:
        nonlocal printed
        if now.table is not None or time.monotonic() - printed < _LINE_INTERVAL:
            return
        printed = time.monotonic()
        click.echo(
            f"{now.seconds:.0f} of {budget:g} s, pass {now.passes + 1}, {now.settled} of "
            f"{now.cells} cells settled, now {now.doing}",
            err=True,
        )

    return show_progress


def show(
    screen: "Screen",
    table: "CostTable",
    recommendations: "Recommendations",
    *,
    details: bool = False,
) -> None:
    """Draw the machine, the verdicts, the table of ways and, with details, all costs."""
    _show_machine(screen, table)
    screen.blank()
    last = None
    for name, verdict in recommendations.by_name.items():
        if verdict.question != last:
            screen.text(verdict.question, style="bold")
        last = verdict.question
        # The table of ways has the figures for these.
        figures = "" if "used-again" in name and verdict.sure else verdict.figures
        parts = (
            (verdict.text, "" if verdict.sure else "yellow"),
            (figures and f". {figures}", "dim"),
        )
        screen.text(*parts, indent=2)
    _show_ways(screen, recommendations)
    if details:
        _show_settings(screen, table)
        _show_costs(screen, table)
        _show_cold(screen, table)
    _show_unmeasured(screen, table)


def _show_machine(screen: "Screen", table: "CostTable") -> None:
    facts = table.machine
    machine = pyreserve.costs.text.machine_text(facts)
    virtual = "" if facts["virtualised"] == "no" else ", virtualised"
    screen.text(("pyreserve costs", "bold"), f"  {machine}{virtual}")
    passes = max((row.times.passes for row in table.cells if row.times), default=0)
    interrupted = "" if table.complete else "Interrupted after "
    sure = (
        "Each verdict is 95 % sure, or says that this run can't tell."
        if passes >= pyreserve.costs.ENOUGH
        else f"A verdict needs {pyreserve.costs.ENOUGH} passes."
    )
    screen.text(f"{interrupted}{table.seconds:.1f} s, {_count(passes, 'pass', 'passes')}. {sure}")
    if table.disturbed is not None:
        screen.text(f"Busy machine: {table.disturbed}.", style="yellow")


def _show_ways(screen: "Screen", recommendations: "Recommendations") -> None:
    rows: dict[str, list[WayCosts]] = {}
    for row in recommendations.ways:
        rows.setdefault(row.way.name, []).append(row)
    if not rows:
        return
    text = pyreserve.costs.text.time_text
    kinds = list(dict.fromkeys(row.kind for row in recommendations.ways))
    lines = [
        (name, *(f"{text(row.give)} + {text(row.again)}" for row in of_way))
        for name, of_way in rows.items()
    ]
    titles = ("Give back + use again", *(f"{kind} pages" for kind in kinds))
    widths = [max(map(len, column)) for column in zip_longest(titles, *lines, fillvalue="")]
    screen.blank()

    def row_text(cells: Sequence[str]) -> str:
        name, *costs = (cell.ljust(width) for cell, width in zip(cells, widths, strict=False))
        return "  ".join((name, *costs)).rstrip()

    screen.text(row_text(titles), style="bold")
    for line in lines:
        way, entries = rows[line[0]][0].way, rows[line[0]][0].entries
        counted = (
            "" if entries is None else f", {_count(round(entries), 'map entry', 'map entries')}"
        )
        screen.text(row_text(line))
        when = f"{way.when[0].upper()}{way.when[1:]}"
        screen.text(f"back: {way.back}{counted}. {when}", style="dim", indent=4)


def _show_settings(screen: "Screen", table: "CostTable") -> None:
    facts = table.machine
    text = pyreserve.costs.text.fact_text
    call = facts["system_call_ns"]
    screen.blank()
    screen.text(
        f"OS page {format_size(facts['page_size'])}; transparent huge pages: "
        f"{text('transparent_huge_pages', facts['transparent_huge_pages'])} "
        f"(defrag {facts['transparent_huge_pages_defrag']}); "
        f"vm.overcommit_memory {facts['overcommit_memory']}"
        + (f"; a system call {format_time(call)}" if call else "")
        + ("; a balloon may take idle memory" if facts["balloon"] else "")
    )


def _count(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def _show_costs(screen: "Screen", table: "CostTable") -> None:
    """Draw the fits with as many columns as fit."""
    text = pyreserve.costs.text
    fits = text.sorted_fits(table.model())

    def drawn(columns: int) -> "Table":
        shown = screen.new_table(1)
        for title in text.TITLES[:columns]:
            left = title in {*text.TITLES[:2], "at"}
            shown.add_column(title, no_wrap=True, justify="left" if left else "right")
        for group, verbs in pyreserve.costs.GROUPS.items():
            rows = [text.fit_row(fit) for fit in fits if fit.curve.verb in verbs]
            if rows:
                shown.add_row(screen.styled(group, "bold"))
            last = ""
            for label, *figures in rows:
                shown.add_row(*[f"  {label}" if label != last else "", *figures][:columns])
                last = label
        return shown

    screen.blank()
    tables = [drawn(columns) for columns in _COLUMNS]
    if screen.fits(tables[-1]):
        screen.widest(tables)
    else:
        for fit in fits:
            label, setting, fixed, per_page, *_ = text.fit_row(fit)
            screen.text(f"{label}  {setting}  fixed {fixed}  per page {per_page}")
    screen.text(text.LEGEND, style="dim")


def _show_cold(screen: "Screen", table: "CostTable") -> None:
    cold = [row for row in table.measured() if row.host == "cold"]
    if not cold:
        return
    warm = {row.cell: row.times for row in table.cells if row.host == "warm"}
    shown = screen.new_table(2)
    shown.add_column("cell")
    for column in ("cold", "warm", "samples"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in cold:
        usual = warm.get(row.cell)
        if row.times is not None:
            shown.add_row(
                str(row.cell),
                format_time(row.times.median),
                format_time(usual.median) if usual else "",
                f"{row.times.samples}",
            )
    screen.blank()
    screen.text("Cold host", style="bold")
    screen.text(
        "Samples of idle memory that took far longer than others: the hypervisor had probably "
        "reclaimed it. No figure above includes them.",
        indent=2,
    )
    screen.table(shown, indent=2)


def _show_unmeasured(screen: "Screen", table: "CostTable") -> None:
    reasons: dict[tuple[str, str], list[Cell]] = {}
    for row in table.cells:
        if row.times is None:
            setting = pyreserve.costs.text.setting_text(pyreserve.costs.Curve.of(row.cell))
            reasons.setdefault((row.why or "", setting), []).append(row.cell)
    if reasons:
        screen.blank()
    for (reason, setting), cells in reasons.items():
        verbs = dict.fromkeys(cell.verb for cell in cells)
        lengths = sorted({cell.nbytes for cell in cells})
        span = format_size(lengths[0])
        span += f" to {format_size(lengths[-1])}" if len(lengths) > 1 else ""
        group = f"{_count(len(cells), 'cell')} of {setting} pages, {span} ({', '.join(verbs)})"
        screen.text(f"Not measured: {group}: {reason}", style="dim")


def show_comparison(screen: "Screen", comparison: "Comparison", old: str) -> None:
    """Draw the comparison with the run that the file `old` holds."""
    screen.blank()
    screen.text(f"Compared with {old}", style="bold")
    for line in comparison.summary():
        screen.text(line, style="yellow" if line.startswith("Noisy") else "")
    changes = comparison.table()
    if changes.rows:
        screen.table(screen.drawn(changes), indent=2)
