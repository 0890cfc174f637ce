"""How ``pyreserve costs`` looks in a terminal."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from pyreserve.cli.screen import PlainTable, console_for
from pyreserve.costs import (
    GROUPS,
    METHODS,
    Cell,
    Comparison,
    CostModel,
    CostTable,
    Curve,
    Fit,
    Measured,
    Plan,
    Progress,
    Recommendations,
)
from pyreserve.costs.cells import SMALL
from pyreserve.units import format_size, format_time

_REFRESH = 0.2  # seconds between two drawings of the bar
_LINE = 10.0  # and between two lines where there is no terminal


@contextmanager
def progress(plan: Plan, budget: float) -> Iterator[Callable[[Progress], None]]:
    """Say on standard error how far the run is: a bar on a terminal, a line now and then elsewhere.

    Drawn by the caller's thread, between two answers of the measuring process.
    """
    console = Console(stderr=True, highlight=False)
    say(
        f"measuring {len(plan.cells)} cells for at most {budget:g} s, in up to "
        f"{format_size(plan.memory)} of memory; Ctrl-C keeps what there is"
    )
    bar = Bar(
        TextColumn("{task.fields[doing]}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("pass {task.fields[passes]}, {task.fields[settled]} cells settled"),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    task = bar.add_task("", total=budget, doing="", passes=1, settled=0)
    drawn = time.monotonic()

    def show(now: Progress) -> None:
        nonlocal drawn
        if time.monotonic() - drawn < (_REFRESH if console.is_terminal else _LINE):
            return
        drawn = time.monotonic()
        fields: dict[str, Any] = {"passes": now.passes + 1, "settled": now.settled}
        if console.is_terminal:
            bar.update(task, completed=now.seconds, doing=now.doing, **fields)
            bar.refresh()
        else:
            console.print(
                f"{now.seconds:.0f} of {budget:g} s, pass {fields['passes']}, {now.settled} of "
                f"{now.cells} cells settled, now {now.doing}",
                soft_wrap=True,
            )

    if console.is_terminal:
        bar.start()
    try:
        yield show
    finally:
        if console.is_terminal:
            bar.stop()


def say(message: str) -> None:
    """Say something on standard error."""
    Console(stderr=True, highlight=False).print(f"pyreserve costs: {message}", soft_wrap=True)


def show(table: CostTable, recommendations: Recommendations) -> None:
    """Print the machine, the costs, what could not be measured and what follows."""
    if sys.stdout is None:
        return
    console = console_for(120)
    _show_machine(console, table)
    console.print()
    console.print(_costs(table, console))
    console.print(Text(_LEGEND, "dim"))
    _show_cold(console, table)
    _show_unmeasured(console, table)
    console.print()
    console.print(Text("What follows", "bold"))
    for answer in recommendations.answers().values():
        if answer.value is not None:
            console.print(Padding(Text(answer.text), (0, 0, 0, 2)))
            console.print(Padding(Text(answer.because, "dim"), (0, 0, 0, 4)))


def _show_machine(console: Console, table: CostTable) -> None:
    facts = table.machine
    huge = {int(size): how for size, how in facts["transparent_huge_pages"].items()}
    on = [f"{format_size(size)} {how}" for size, how in huge.items() if how != "never"]
    virtual = {"no": "not virtualised", "yes": "virtualised"}.get(
        facts["virtualised"], f"virtualised ({facts['virtualised']})"
    )
    balloon = ", with a balloon" if facts["balloon"] else ""
    console.print(
        Text.assemble(
            ("pyreserve costs", "bold"),
            f"  {facts['cpu'] or 'unknown CPU'}, {_count(facts['cpus'], 'CPU')}, "
            f"{format_size(facts['memory'])}, Linux {facts['kernel']}, {virtual}{balloon}",
        )
    )
    call = facts["system_call_ns"]
    console.print(
        f"OS page {format_size(facts['page_size'])}; transparent huge pages: "
        f"{', '.join(on) or 'never'} (defrag {facts['transparent_huge_pages_defrag']}); "
        f"vm.overcommit_memory {facts['overcommit_memory']}"
        + (f"; a system call {format_time(call)}" if call else "")
    )
    passes = max((one.times.passes for one in table.cells if one.times), default=0)
    interrupted = "" if table.complete else "Interrupted after "
    console.print(f"{interrupted}{table.seconds:.1f} s, up to {_count(passes, 'pass', 'passes')}")
    if table.disturbed is not None:
        why = f"Noisy: {table.disturbed}; small differences mean nothing here."
        console.print(Text(why, "yellow"))


def _count(n: int, one: str, more: str = "") -> str:
    return f"{n} {one if n == 1 else more or one + 's'}"


# What a narrow terminal does without comes last.
_COLUMNS = ("", "pages", "fixed", "per page", "GiB/s", "at", "off", "outliers")
_LEFT = {"", "pages", "at", "outliers"}
_LEGEND = (
    "Medians, ± half of the 95 % interval. fixed: for each call; per page: and for each OS page; "
    "up to: not told from nothing. GiB/s: of one thread, at the length beside it, where pages are "
    "what costs; a touch is a byte of each page. off: how far a median is from fixed and per page "
    "at most; much where the cost bends, as at a cache's size. outliers: how many samples, and "
    "the worst in medians. pyreserve.costs.cells says what each verb and method does."
)


def _costs(table: CostTable, console: Console) -> Table:
    """Return the table with as many columns as the console has room for."""
    unbounded = console.options.update(max_width=1000)
    for last in range(len(_COLUMNS), 4, -1):
        shown = _costs_in(table, last)
        if console.measure(shown, options=unbounded).maximum <= console.width:
            return shown
    return _costs_in(table, 4)


def _costs_in(table: CostTable, columns: int) -> Table:
    shown = PlainTable(1)
    for name in _COLUMNS[:columns]:
        shown.add_column(name, no_wrap=True, justify="left" if name in _LEFT else "right")
    model, cells = table.model(), table.curves()
    for group, verbs in GROUPS.items():
        fits = [fit for verb in verbs for fit in _sorted(model, verb)]
        if fits:
            shown.add_row(Text(group, "bold"))
        last = None
        for fit in fits:
            label = f"  {fit.curve.verb} {fit.curve.method}"
            row = [label if label != last else "", *_row(fit, cells[fit.curve])]
            shown.add_row(*row[:columns])
            last = label
    return shown


def _sorted(model: CostModel, verb: str) -> list[Fit]:
    def order(fit: Fit) -> tuple[object, ...]:
        curve = fit.curve
        small = curve.page_kind == SMALL
        method = METHODS[verb].index(curve.method)
        return (method, not small, curve.page_kind, curve.mode, curve.threads)

    return sorted((fit for fit in model.fits.values() if fit.curve.verb == verb), key=order)


def _row(fit: Fit, cells: list[Measured]) -> list[str]:
    longest = cells[-1].cell
    # A rate makes sense where it is the pages that cost.
    paged = fit.ns_per_page > 1 and fit.ns_per_page * longest.pages > fit.fixed_ns
    rate = fit.gib_per_second
    return [
        _setting(fit.curve),
        _figure(fit.fixed_ns, fit.fixed_ci95),
        _figure(fit.ns_per_page, fit.ns_per_page_ci95),
        (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}") if paged else "",
        format_size(longest.nbytes) if paged else "",
        f"{fit.residual:.0%}",
        _outliers(cells),
    ]


def _setting(curve: Curve) -> str:
    threads = f" {curve.threads} threads" if curve.threads > 1 else ""
    return f"{curve.page_kind}{'' if curve.mode == 'charge' else f' {curve.mode}'}{threads}"


def _figure(ns: float, interval: tuple[float, float]) -> str:
    low, high = interval
    half = (high - low) / 2
    if ns < 0.001 and half < 0.001:
        return "0 ns"
    if ns < half:
        return f"up to {format_time(high)}"
    return f"{format_time(ns)} ±{half / ns:3.0%}"


def _outliers(cells: list[Measured]) -> str:
    times = [one.times for one in cells if one.times is not None]
    outliers, samples = sum(t.outliers for t in times), sum(t.samples for t in times)
    if not outliers:
        return ""
    worst = max(t.max / t.median for t in times if t.median > 0)
    return f"{outliers / samples:.1%}, to {worst:.0f}x"


def _show_cold(console: Console, table: CostTable) -> None:
    cold = [one for one in table.measured() if one.host == "cold"]
    if not cold:
        return
    warm = {one.cell: one.times for one in table.cells if one.host == "warm"}
    shown = PlainTable(2, indent=2)
    for column in ("cell", "cold", "warm", "samples"):
        shown.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
    for one in cold:
        usual = warm.get(one.cell)
        if one.times is not None:
            shown.add_row(
                str(one.cell),
                format_time(one.times.median),
                format_time(usual.median) if usual else "",
                f"{one.times.samples}",
            )
    console.print()
    console.print(Text("Cold host", "bold"))
    console.print(
        "  Samples far beyond the others of memory that was idle: the host of this virtual machine "
        "had probably taken it away. They are in no figure above.",
    )
    console.print(shown)


def _show_unmeasured(console: Console, table: CostTable) -> None:
    reasons: dict[tuple[str, str], list[Cell]] = {}
    for one in table.cells:
        if one.times is None:
            setting = _setting(Curve.of(one.cell))
            reasons.setdefault((one.why or "", setting), []).append(one.cell)
    if reasons:
        console.print()
    for (why, setting), cells in reasons.items():
        verbs = dict.fromkeys(cell.verb for cell in cells)
        lengths = sorted({cell.nbytes for cell in cells})
        of = format_size(lengths[0])
        of += f" to {format_size(lengths[-1])}" if len(lengths) > 1 else ""
        what = f"{_count(len(cells), 'cell')} of {setting} pages, {of} ({', '.join(verbs)})"
        console.print(Text(f"Not measured: {what}: {why}", "dim"))


def show_comparison(comparison: Comparison, old: str) -> None:
    """Print what changed."""
    if sys.stdout is None:
        return
    console = console_for(120)
    console.print()
    console.print(Text(f"Compared with {old}", "bold"))
    for name, before, after in comparison.differences:
        console.print(Text(f"  not the same: {name} was {_plain(before)}, is {_plain(after)}"))
    changed = [one for one in comparison.cells if one.verdict not in {"same", "unsure"}]
    if changed:
        shown = PlainTable(2, indent=2)
        for column in ("cell", "before", "now", "ratio", "verdict"):
            right = column in {"before", "now", "ratio"}
            shown.add_column(column, justify="right" if right else "left", no_wrap=True)
        for one in sorted(changed, key=lambda one: -abs(one.ratio - 1)):
            cold = ", cold host" if one.host == "cold" else ""
            shown.add_row(
                f"{one.cell}{cold}",
                format_time(one.old.median),
                format_time(one.new.median),
                f"{one.ratio:.2f}",
                one.verdict,
            )
        console.print(shown)
    counts = {v: comparison.count(v) for v in ("same", "slower", "faster", "noisy", "unsure")}
    said = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n or verdict == "same")
    console.print(f"{len(comparison.cells)} cells in both: {said}")
    if comparison.only_old or comparison.only_new:
        console.print(
            f"{comparison.only_old} more in the old run only, {comparison.only_new} in this only"
        )
    if comparison.noisy is not None:
        console.print(Text(f"Noisy, so nothing is called a change: {comparison.noisy}", "yellow"))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
