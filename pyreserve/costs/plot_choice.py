"""Which curves of a table a picture shows, where, and what they are called.

The candidates of a panel come in a fixed order: on small pages each verb's first method, then the
other methods; the same on transparent huge pages; then another mode, and the most threads. One that
lies on an earlier one of the same pages, mode and threads becomes part of its label. Of those that
come after the small pages' what is near to a line is left out; so is what finds the panel full.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyreserve.costs.cells import METHODS, MODES, Curve
from pyreserve.costs.table import Measured
from pyreserve.units import format_size, parse_size

MOST_LINES = 9
"""How many lines a panel has at most: more can't be told apart."""

JOINED, NEAR = 1.3, 1.5
"""Less than so many times apart at every length, two lines are one, or one of them tells enough."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel.

    Attributes:
        curves: what is drawn, first, and what lies on it: all on the same pages, in the same mode.
        cells: the measured cells of the first, shortest first.
        variant: 0 for small pages, 1 for huge ones, 2 for another mode, 3 for more threads.
    """

    curves: list[Curve]
    cells: Sequence[Measured]
    variant: int

    @property
    def method(self) -> tuple[str, str]:
        """The verb and the method of what is drawn."""
        return self.curves[0].verb, self.curves[0].method


@dataclass(frozen=True, slots=True)
class Chosen:
    """The lines of a panel, how many curves lie near to them, and how many more are left out."""

    lines: list[Line]
    near: int
    others: int


def choose(curves: Mapping[Curve, Sequence[Measured]], verbs: Sequence[str]) -> Chosen:
    """Choose which curves, of medians above zero, a panel of these verbs shows; see above."""
    small, huge = kinds(curves)
    (plain, other), threads = MODES, max((curve.threads for curve in curves), default=1)
    variants = [(small, plain, 1), (huge, plain, 1), (small, other, 1), (small, plain, threads)]
    here = [curve for curve in curves if curve.verb in verbs]
    candidates = []
    for curve in here:
        if _pages(curve) in variants:
            methods = [*METHODS.get(curve.verb, ()), curve.method]
            rank, variant = methods.index(curve.method), variants.index(_pages(curve))
            candidates.append((variant, rank > 0, verbs.index(curve.verb), rank, curve))
    lines: list[Line] = []
    left_out = joined = 0
    for variant, _, _, _, curve in sorted(candidates):
        near = [(ratio, line) for line in lines if (ratio := _apart(curves[curve], line)) <= NEAR]
        on = [pair for pair in near if pair[0] <= JOINED and pair[1].variant == variant]
        if on:
            min(on, key=lambda pair: pair[0])[1].curves.append(curve)
            joined += 1
        elif variant and any(
            line.variant == variant or line.method == (curve.verb, curve.method) for _, line in near
        ):
            left_out += 1
        elif len(lines) < MOST_LINES:
            lines.append(Line([curve], curves[curve], variant))
    return Chosen(lines, left_out, len(here) - len(lines) - joined - left_out)


def kinds(curves: Iterable[Curve]) -> tuple[str, str]:
    """Return the page kinds to show: the OS page, and the largest transparent one."""
    found = {curve.page_kind for curve in curves if not curve.page_kind.startswith("hugetlb-")}
    ordered = sorted(found, key=parse_size)
    return (ordered[0], ordered[-1]) if ordered else ("", "")


def label(curves: Sequence[Curve], small: str) -> str:
    """Return what a line of these curves is called; `small` pages go without saying."""
    names, verb = [], ""
    for curve in curves:
        words = [curve.verb] if curve.verb != verb else []
        verb = curve.verb
        words += [curve.method] if len(METHODS.get(verb, ())) != 1 else []
        names.append(" ".join(words))
    kind, mode, threads = _pages(curves[0])
    pages = [] if kind == small else [format_size(parse_size(kind))]
    pages += [] if mode == MODES[0] else [mode]
    pages += [] if threads == 1 else [f"{threads} threads"]
    if pages and len(names) > 1:
        names.append("both" if len(names) == 2 else "all")
    # No-break spaces: a number and its unit stay on one line of a label.
    return f"{', '.join(names)} {', '.join(pages).replace(' ', chr(0xA0))}".rstrip()


def _pages(curve: Curve) -> tuple[str, str, int]:
    return curve.page_kind, curve.mode, curve.threads


def _apart(cells: Sequence[Measured], line: Line) -> float:
    """Return the largest ratio at any of the cells' lengths; infinite where the line has none."""
    at = {one.cell.nbytes: one.times.median for one in line.cells if one.times is not None}
    medians = [(one.cell.nbytes, one.times.median) for one in cells if one.times is not None]
    ratios = [median / at[nbytes] if nbytes in at else math.inf for nbytes, median in medians]
    return max(max(ratio, 1 / ratio) for ratio in ratios)
