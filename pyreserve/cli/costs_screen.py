"""The screen of ``pyreserve costs``, and its progress on standard error."""

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

_BAR_REFRESH = 0.2  # seconds between two drawings of the bar, on a terminal
_LINE_INTERVAL = 10.0  # seconds between two progress lines, elsewhere


@contextmanager
def progress(plan: Plan, budget: float) -> Iterator[Callable[[Progress], None]]:
    """Report progress on standard error: a bar on a terminal, elsewhere a line every 10 s.

    The caller's thread draws, between two answers of the measuring process.
    """
    console = Console(stderr=True, highlight=False)
    say(
        f"measuring {len(plan.cells)} cells for at most {budget:g} s, in up to "
        f"{format_size(plan.memory)} of memory; Ctrl-C ends the run and keeps its results"
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
        if time.monotonic() - drawn < (_BAR_REFRESH if console.is_terminal else _LINE_INTERVAL):
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
    """Print a message of this command on standard error."""
    Console(stderr=True, highlight=False).print(f"pyreserve costs: {message}", soft_wrap=True)


def show(table: CostTable, recommendations: Recommendations) -> None:
    """Print the machine, the costs, the cells that could not be measured and recommendations."""
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
    console.print(Text("Recommendations", "bold"))
    for answer in recommendations.answers().values():
        if answer.value is not None:
            console.print(Padding(Text(answer.text), (0, 0, 0, 2)))
            console.print(Padding(Text(answer.because, "dim"), (0, 0, 0, 4)))


def _show_machine(console: Console, table: CostTable) -> None:
    facts = table.machine
    settings = {int(size): mode for size, mode in facts["transparent_huge_pages"].items()}
    enabled = [f"{format_size(size)} {mode}" for size, mode in settings.items() if mode != "never"]
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
        f"{', '.join(enabled) or 'never'} (defrag {facts['transparent_huge_pages_defrag']}); "
        f"vm.overcommit_memory {facts['overcommit_memory']}"
        + (f"; a system call {format_time(call)}" if call else "")
    )
    passes = max((row.times.passes for row in table.cells if row.times), default=0)
    interrupted = "" if table.complete else "Interrupted after "
    console.print(f"{interrupted}{table.seconds:.1f} s, up to {_count(passes, 'pass', 'passes')}")
    if table.disturbed is not None:
        warning = f"Noisy: {table.disturbed}; small differences are not significant."
        console.print(Text(warning, "yellow"))


def _count(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


# A narrow terminal drops the last columns first.
_COLUMNS = ("", "pages", "fixed", "per page", "GiB/s", "at", "off", "outliers")
_LEFT_ALIGNED = {"", "pages", "at", "outliers"}
_LEGEND = (
    "Medians, ± half of the 95 % interval. fixed: cost per call. per page: additional cost per OS "
    "page. up to: not distinguishable from zero. GiB/s: of one thread, at the length in the next "
    "column, where the cost per page dominates; a touch writes one byte per page. off: largest "
    "deviation of a median from fixed + per page; large where the cost bends, for instance at a "
    "cache's size. outliers: their share of the samples, and the worst as a multiple of the "
    "median. pyreserve.costs.cells describes each verb and method."
)


def _costs(table: CostTable, console: Console) -> Table:
    """Return the table with as many columns as fit the console."""
    unbounded = console.options.update(max_width=1000)
    for last in range(len(_COLUMNS), 4, -1):
        shown = _costs_in(table, last)
        if console.measure(shown, options=unbounded).maximum <= console.width:
            return shown
    return _costs_in(table, 4)


def _costs_in(table: CostTable, columns: int) -> Table:
    shown = PlainTable(1)
    for name in _COLUMNS[:columns]:
        shown.add_column(name, no_wrap=True, justify="left" if name in _LEFT_ALIGNED else "right")
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
    # A rate is meaningful only where the cost per page dominates.
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
    times = [row.times for row in cells if row.times is not None]
    outliers, samples = sum(t.outliers for t in times), sum(t.samples for t in times)
    if not outliers:
        return ""
    worst = max(t.max / t.median for t in times if t.median > 0)
    return f"{outliers / samples:.1%}, to {worst:.0f}x"


def _show_cold(console: Console, table: CostTable) -> None:
    cold = [row for row in table.measured() if row.host == "cold"]
    if not cold:
        return
    warm = {row.cell: row.times for row in table.cells if row.host == "warm"}
    shown = PlainTable(2, indent=2)
    for column in ("cell", "cold", "warm", "samples"):
        shown.add_column(column, justify="left" if column == "cell" else "right", no_wrap=True)
    for row in cold:
        usual = warm.get(row.cell)
        if row.times is not None:
            shown.add_row(
                str(row.cell),
                format_time(row.times.median),
                format_time(usual.median) if usual else "",
                f"{row.times.samples}",
            )
    console.print()
    console.print(Text("Cold host", "bold"))
    console.print(
        "  Samples of idle memory that took far longer than others: the hypervisor had probably "
        "reclaimed it. No figure above includes them.",
    )
    console.print(shown)


def _show_unmeasured(console: Console, table: CostTable) -> None:
    reasons: dict[tuple[str, str], list[Cell]] = {}
    for row in table.cells:
        if row.times is None:
            setting = _setting(Curve.of(row.cell))
            reasons.setdefault((row.why or "", setting), []).append(row.cell)
    if reasons:
        console.print()
    for (reason, setting), cells in reasons.items():
        verbs = dict.fromkeys(cell.verb for cell in cells)
        lengths = sorted({cell.nbytes for cell in cells})
        span = format_size(lengths[0])
        span += f" to {format_size(lengths[-1])}" if len(lengths) > 1 else ""
        group = f"{_count(len(cells), 'cell')} of {setting} pages, {span} ({', '.join(verbs)})"
        console.print(Text(f"Not measured: {group}: {reason}", "dim"))


def show_comparison(comparison: Comparison, old: str) -> None:
    """Print the comparison with the run that the file `old` holds."""
    if sys.stdout is None:
        return
    console = console_for(120)
    console.print()
    console.print(Text(f"Compared with {old}", "bold"))
    for name, before, after in comparison.differences:
        console.print(Text(f"  machine differs: {name} was {_plain(before)}, is {_plain(after)}"))
    changed = [row for row in comparison.cells if row.verdict not in {"same", "unsure"}]
    if changed:
        shown = PlainTable(2, indent=2)
        for column in ("cell", "before", "now", "ratio", "verdict"):
            right = column in {"before", "now", "ratio"}
            shown.add_column(column, justify="right" if right else "left", no_wrap=True)
        for row in sorted(changed, key=lambda row: -abs(row.ratio - 1)):
            cold = ", cold host" if row.host == "cold" else ""
            shown.add_row(
                f"{row.cell}{cold}",
                format_time(row.old.median),
                format_time(row.new.median),
                f"{row.ratio:.2f}",
                row.verdict,
            )
        console.print(shown)
    counts = {v: comparison.count(v) for v in ("same", "slower", "faster", "noisy", "unsure")}
    summary = ", ".join(f"{n} {verdict}" for verdict, n in counts.items() if n or verdict == "same")
    console.print(f"{len(comparison.cells)} cells in both runs: {summary}")
    if comparison.only_old or comparison.only_new:
        console.print(
            f"{comparison.only_old} cells in the old run only, {comparison.only_new} in this only"
        )
    if comparison.noisy is not None:
        console.print(Text(f"Noisy, so no change is reported: {comparison.noisy}", "yellow"))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
