"""``pyreserve costs``: measure what memory operations cost, with progress on standard error."""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import pyreserve
from pyreserve.cli import bystanders as others
from pyreserve.cli.console import (
    Command,
    Output,
    OutputFile,
    Picture,
    Seconds,
    Size,
    completions,
    output_options,
)
from pyreserve.units import format_size, format_time

if TYPE_CHECKING:
    from rich.table import Table

    import pyreserve.costs.comparison
    import pyreserve.costs.text
    from pyreserve.cli.screen import Screen
    from pyreserve.costs import (
        Cell,
        Comparison,
        CostTable,
        Measured,
        Plan,
        Progress,
        Recommendations,
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
    "fork",
)
"""The verbs of `pyreserve.costs.GROUPS`, which help and completion name without importing it."""

_FULL_BUDGET = 600.0  # seconds
_LINE_INTERVAL = 10.0  # seconds between two progress lines, elsewhere than on a terminal


def _complete_verbs(_: click.Context, __: click.Parameter, incomplete: str) -> list[Any]:
    """Complete the last verb of a list with commas."""
    given, comma, _last = incomplete.rpartition(",")
    return completions(((given + comma + verb, "") for verb in VERBS), incomplete)


@click.command(
    cls=Command,
    examples=(
        ("pyreserve costs", "measure for 50 seconds, and give advice"),
        ("pyreserve costs --only commit,touch --budget 10", "two verbs, more quickly"),
        ("pyreserve costs --plot costs.png", "also draw cost against length"),
        ("pyreserve costs --json --output old.json", "keep the results"),
        ("pyreserve costs --compare old.json", "and tell what changed since"),
    ),
)
@click.option(
    "--budget", type=Seconds(), metavar="SECONDS", help="Time limit; 50 seconds by default."
)
@click.option(
    "--full",
    is_flag=True,
    help="Measure all page kinds, modes, thread counts and powers of two; the time limit is 600 "
    "seconds by default.",
)
@click.option(
    "--only",
    metavar="VERB,...",
    shell_complete=_complete_verbs,
    help=f"Measure only these verbs: {', '.join(VERBS)}.",
)
@click.option(
    "--longest",
    type=Size(),
    metavar="SIZE",
    default="1GiB",
    help="Longest piece of memory; at most and by default 1GiB.",
)
@click.option(
    "--csv",
    type=OutputFile(),
    metavar="FILE",
    help="Write the results as CSV, one line per cell.",
)
@click.option(
    "--bystanders",
    is_flag=True,
    help="Also measure what one thread's calls cost the other threads, for half of the time "
    "limit; 30 seconds more by default.",
)
@click.option("--plot", type=Picture(), metavar="FILE.png|.svg", help="Draw cost against length.")
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="OLD.json",
    help="Compare with a file written by --json --output.",
)
@output_options
def command(
    budget: float | None,
    full: bool,
    only: str | None,
    longest: int,
    csv: Path | None,
    bystanders: bool,
    plot: Path | None,
    compare: Path | None,
    as_json: bool,
    output_file: Path | None,
) -> None:
    """Measure the costs of memory operations and give advice.

    Prints what commit, touch, discard, decommit and other verbs cost on this machine.
    """
    costs = pyreserve.costs
    verbs = None if only is None else [verb.strip() for verb in only.split(",") if verb.strip()]
    try:
        plan = costs.plan(full=full, only=verbs, longest=longest)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    old = None if compare is None else _load(compare)
    plan.check_memory()
    if bystanders and budget is not None:
        budget /= 2
    table = _measure(plan, budget or (_FULL_BUDGET if full else costs.BUDGET))
    losses = others.measure(budget) if bystanders and table.complete else None
    if csv is not None:
        from pyreserve._system.output import write_text  # noqa: PLC0415

        write_text(csv, table.to_csv())
    if plot is not None:
        table.plot(plot)
    comparison = None if old is None else costs.compare(old, table)

    def draw(screen: "Screen") -> None:
        show(screen, table, costs.recommend(table))
        if comparison is not None:
            show_comparison(screen, comparison, str(compare))
        if losses is not None:
            others.show(screen, losses)

    def to_json() -> str:
        document = table.to_dict()
        if comparison is not None:
            document["comparison"] = comparison.to_dict()
        if losses is not None:
            document["bystanders"] = losses.to_dict()
        return json.dumps(document, indent=1)

    Output(as_json, output_file).write(to_json, draw, width=120)
    if not table.complete or (losses is not None and not losses.complete):
        raise click.Abort  # Ctrl-C


def _load(path: Path) -> "CostTable":
    try:
        return pyreserve.costs.CostTable.load(path)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--compare'") from None


def _measure(plan: "Plan", budget: float) -> "CostTable":
    """Measure the plan; after Ctrl-C return the incomplete table."""
    with progress(plan, budget) as show_progress:
        try:
            return pyreserve.costs.measure(plan, budget=budget, progress=show_progress)
        except pyreserve.costs.Interrupted as interrupted:
            return interrupted.table


@contextmanager
def progress(plan: "Plan", budget: float) -> "Iterator[Callable[[Progress], None]]":
    """Report progress on standard error: a bar on a terminal, elsewhere a line every 10 s."""
    click.echo(
        f"pyreserve costs: measuring {len(plan.cells)} cells for at most {budget:g} s, in up to "
        f"{format_size(plan.memory)} of memory; Ctrl-C ends the run and keeps its results",
        err=True,
    )
    if sys.stderr is not None and sys.stderr.isatty():
        with _bar(budget) as show:
            yield show
    else:
        yield _progress_lines(budget)


def _progress_lines(budget: float) -> "Callable[[Progress], None]":
    printed = time.monotonic()

    def show(now: "Progress") -> None:
        nonlocal printed
        if time.monotonic() - printed < _LINE_INTERVAL:
            return
        printed = time.monotonic()
        click.echo(
            f"{now.seconds:.0f} of {budget:g} s, pass {now.passes + 1}, {now.settled} of "
            f"{now.cells} cells settled, now {now.doing}",
            err=True,
        )

    return show


@contextmanager
def _bar(budget: float) -> "Iterator[Callable[[Progress], None]]":
    from rich.progress import BarColumn, TimeElapsedColumn  # noqa: PLC0415

    from pyreserve.cli.screen import progress_bar  # noqa: PLC0415  # rich is slow to import

    with progress_bar(
        budget,
        "{task.fields[doing]}",
        BarColumn(),
        TimeElapsedColumn(),
        "pass {task.fields[passes]}, {task.fields[settled]} cells settled",
    ) as update:
        yield lambda now: update(
            now.seconds, doing=now.doing, passes=now.passes + 1, settled=now.settled
        )


def show(screen: "Screen", table: "CostTable", recommendations: "Recommendations") -> None:
    """Draw the machine, the costs, the cells that could not be measured and recommendations."""
    _show_machine(screen, table)
    screen.blank()
    _show_costs(screen, table)
    _show_cold(screen, table)
    _show_unmeasured(screen, table)
    screen.blank()
    screen.text("Recommendations", style="bold")
    for answer in recommendations.answers().values():
        if answer.value is not None:
            screen.text(answer.text, indent=2)
            screen.text(answer.reason, style="dim", indent=4)


def _show_machine(screen: "Screen", table: "CostTable") -> None:
    facts = table.machine
    enabled = [
        f"{format_size(int(size))} {mode}"
        for size, mode in facts["transparent_huge_pages"].items()
        if mode != "never"
    ]
    virtual = {"no": "not virtualised", "yes": "virtualised"}.get(
        facts["virtualised"], f"virtualised ({facts['virtualised']})"
    )
    balloon = ", with a balloon" if facts["balloon"] else ""
    screen.text(
        ("pyreserve costs", "bold"),
        f"  {pyreserve.costs.text.machine_text(facts)}, {virtual}{balloon}",
    )
    call = facts["system_call_ns"]
    screen.text(
        f"OS page {format_size(facts['page_size'])}; transparent huge pages: "
        f"{', '.join(enabled) or 'never'} (defrag {facts['transparent_huge_pages_defrag']}); "
        f"vm.overcommit_memory {facts['overcommit_memory']}"
        + (f"; a system call {format_time(call)}" if call else "")
    )
    passes = max((row.times.passes for row in table.cells if row.times), default=0)
    interrupted = "" if table.complete else "Interrupted after "
    screen.text(f"{interrupted}{table.seconds:.1f} s, up to {_count(passes, 'pass', 'passes')}")
    if table.disturbed is not None:
        screen.text(
            f"Noisy: {table.disturbed}; small differences are not significant.", style="yellow"
        )


def _count(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


_Group = tuple[str, list[tuple[str, list[str]]]]
"""A group and its curves: of each the label, and the row of `_COLUMNS` without the label."""

_COLUMNS = ("", "pages", "fixed", "per page", "GiB/s", "at", "off", "outliers")
_LEFT_ALIGNED = {"", "pages", "at", "outliers", "cell", "verdict"}
# How many of `_COLUMNS` are shown, most first; GiB/s and its length go together.
_CHOICES = (8, 7, 6, 4)


def _show_costs(screen: "Screen", table: "CostTable") -> None:
    """Draw the costs with as many columns as fit; on a narrow screen below their labels."""
    groups = list(_curves(table))
    for columns in _CHOICES:
        shown = _costs_in(screen, groups, columns)
        if screen.fits(shown):
            screen.table(shown)
            break
    else:
        _show_costs_below_labels(screen, groups, columns)
    screen.text(
        f"{pyreserve.costs.text.legend(_COLUMNS[:columns])} pyreserve.costs.cells describes each "
        "verb and method.",
        style="dim",
    )


def _show_costs_below_labels(screen: "Screen", groups: "list[_Group]", columns: int) -> None:
    headings = _COLUMNS[1:columns]
    rows = [row[: len(headings)] for _, curves in groups for _, row in curves]
    setting, *figures = (max(map(len, column)) for column in zip(headings, *rows, strict=True))

    def show(cells: Sequence[str]) -> None:
        first, *rest = cells
        aligned = (f"{cell:>{width}}" for cell, width in zip(rest, figures, strict=True))
        screen.text(" ".join((first.ljust(setting), *aligned)), indent=4)

    show(headings)
    for group, curves in groups:
        screen.text(group, style="bold")
        last_label = None
        for label, row in curves:
            if label != last_label:
                screen.text(label, indent=2)
            show(row[: len(headings)])
            last_label = label


def _costs_in(screen: "Screen", groups: "list[_Group]", columns: int) -> "Table":
    shown = screen.new_table(1)
    for name in _COLUMNS[:columns]:
        shown.add_column(name, no_wrap=True, justify="left" if name in _LEFT_ALIGNED else "right")
    for group, curves in groups:
        shown.add_row(screen.styled(group, "bold"))
        last = None
        for label, row in curves:
            shown.add_row(*[f"  {label}" if label != last else "", *row][:columns])
            last = label
    return shown


def _curves(table: "CostTable") -> "Iterator[_Group]":
    """Yield each group of verbs that has curves."""
    text = pyreserve.costs.text
    cells, fits = table.curves(), text.sorted_fits(table.model())
    for group, verbs in pyreserve.costs.GROUPS.items():
        curves = []
        for fit in fits:
            if fit.curve.verb in verbs:
                label, *figures = text.fit_row(fit)
                curves.append((label, [*figures, _outliers(cells[fit.curve])]))
        if curves:
            yield group, curves


def _outliers(cells: "list[Measured]") -> str:
    times = [row.times for row in cells if row.times is not None]
    outliers, samples = sum(t.outliers for t in times), sum(t.samples for t in times)
    if not outliers:
        return ""
    worst = max(t.max / t.median for t in times if t.median > 0)
    return f"{outliers / samples:.1%}, to {f'{worst:.0f}' if worst >= 10 else f'{worst:.2g}'}x"


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
    for name, before, after in comparison.differences:
        screen.text(f"machine differs: {name} was {_plain(before)}, is {_plain(after)}", indent=2)
    changes = pyreserve.costs.comparison.changes_table(comparison)
    if changes.rows:
        shown = screen.new_table(2)
        for title in changes.titles:
            left = title in _LEFT_ALIGNED
            shown.add_column(title, justify="left" if left else "right", no_wrap=title != "cell")
        for row in changes.rows:
            shown.add_row(*row)
        screen.table(shown, indent=2)
    screen.text(pyreserve.costs.comparison.counts_text(comparison))
    if comparison.only_old or comparison.only_new:
        screen.text(
            f"{comparison.only_old} cells in the old run only, {comparison.only_new} in this only"
        )
    if comparison.noisy is not None:
        screen.text(f"Noisy, so no change is reported: {comparison.noisy}", style="yellow")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
