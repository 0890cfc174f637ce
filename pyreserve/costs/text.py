"""Fits and facts of machines as text, for the screen, ``str()`` and notebooks. Imports no table."""

from collections.abc import Mapping
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.proc import is_natural
from pyreserve._system.report import Table
from pyreserve.costs.cells import GROUPS, METHODS, SMALL, Curve
from pyreserve.costs.model import CostModel, Fit
from pyreserve.costs.stats import Interval, is_known
from pyreserve.units import format_size, format_time

TITLES = ("verb and method", "pages", "fixed", "per page", "GiB/s", "at")
"""The titles of the columns that `fit_row` fills."""

_LABELS = {
    "cpu": "CPU",
    "cpus": "CPUs",
    "page_size": "OS page",
    "overcommit_memory": "vm.overcommit_memory",
    "max_map_count": "vm.max_map_count",
    "transparent_huge_pages": "THP",
    "transparent_huge_pages_defrag": "THP defrag",
    "hugetlb_free": "free hugetlb pages",
    "virtualised": "hypervisor",
}
UNKNOWN = "unknown"
_ZERO = 0.1  # ns; a smaller cost is shown as zero
LEGEND = (
    "Medians, ± half of the 95 % interval; unknown: the interval includes zero, or spans more than "
    "a factor of three. fixed: cost per call. per page: additional cost per OS page. GiB/s: of one "
    "thread, at the length in the next column, where the cost per page dominates; a touch writes "
    "one byte per page."
)
"""The explanation of the columns of `fits_table`."""


def machine_text(machine: Mapping[str, Any]) -> str:
    """Return the facts of a machine that identify it; unknown ones are omitted."""
    cpus, memory, kernel = (machine.get(name) for name in ("cpus", "memory", "kernel"))
    words = [str(machine.get("cpu") or "unknown CPU")]
    words += [f"{cpus} CPU{'' if cpus == 1 else 's'}"] if cpus else []
    words += [format_size(memory)] if memory else []
    words += [f"Linux {kernel}"] if kernel else []
    return ", ".join(words)


def fact_label(name: str) -> str:
    """Return the name of a machine's fact for people."""
    return _LABELS.get(name, name.replace("_", " "))


def fact_text(name: str, value: Any) -> str:
    """Return a machine's fact for people; equal sizes in three digits have equal texts."""
    if value is None:
        return UNKNOWN
    if name in {"memory", "page_size"}:
        return format_size(value)
    if isinstance(value, dict):  # huge pages by size: settings, or numbers of pages
        used = [f"{_size_text(size)} {state}" for size, state in value.items() if state]
        return ", ".join(text for text in used if not text.endswith(" never")) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def _size_text(size: str) -> str:
    return format_size(int(size)) if is_natural(size) else size


def fits_table(model: CostModel) -> Table:
    """Return a row for each fit, in the order of `GROUPS` and `METHODS`."""
    return Table(TITLES, [fit_row(fit) for fit in sorted_fits(model)])


def sorted_fits(model: CostModel) -> list[Fit]:
    """Return the fits of several lengths, in the order of `METHODS`, small pages first."""
    return sorted((fit for fit in model.fits.values() if len(fit.points) > 1), key=_order)


def _order(fit: Fit) -> tuple[object, ...]:
    curve = fit.curve
    verbs = [verb for group in GROUPS.values() for verb in group]
    rank = [*verbs, curve.verb].index(curve.verb)
    method = [*METHODS.get(curve.verb, ()), curve.method].index(curve.method)
    small = curve.page_kind == SMALL
    return rank, method, not small, curve.page_kind, curve.mode, curve.threads


def fit_row(fit: Fit) -> tuple[str, ...]:
    """Return the texts of a fit's row, one for each of `TITLES`."""
    longest = fit.points[-1][0]
    # A rate is meaningful only where the cost per page dominates.
    known = is_known(fit.ns_per_page_ci95)
    paged = known and fit.ns_per_page > 1 and fit.ns_per_page * longest > fit.fixed_ns
    rate = fit.gib_per_second
    return (
        f"{fit.curve.verb} {fit.curve.method}",
        setting_text(fit.curve),
        figure_text(fit.fixed_ns, fit.fixed_ci95),
        figure_text(fit.ns_per_page, fit.ns_per_page_ci95),
        (f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}") if paged else "",
        format_size(round(longest * PAGE_SIZE)) if paged else "",
    )


def setting_text(curve: Curve) -> str:
    """Return page kind, mode and threads, the usual ones omitted."""
    threads = f" {curve.threads} threads" if curve.threads > 1 else ""
    return f"{curve.page_kind}{'' if curve.mode == 'charge' else f' {curve.mode}'}{threads}"


def time_text(ns: Interval | None) -> str:
    """Return a time; ``unknown`` if its interval is too wide or there is none."""
    return format_time(ns.median) if ns is not None and ns.known else UNKNOWN


def figure_text(ns: float, interval: tuple[float, float]) -> str:
    """Return a time with half of its interval; ``unknown`` if that is too wide."""
    low, high = interval
    if high < _ZERO:
        return "0 ns"
    return f"{format_time(ns)} ±{(high - low) / 2 / ns:3.0%}" if is_known(interval) else UNKNOWN
