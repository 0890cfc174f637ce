"""Choose the curves that a picture shows, merge those that coincide, and label them.

The candidates of a panel have a fixed order: on small pages each verb's first method, then the
other methods; the same on transparent huge pages; then the other mode, then the most threads. A
candidate that coincides with an earlier one of the same pages, mode and threads is merged with it.
Candidates after the small pages are omitted if they are near a line; any if the panel is full.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyreserve.costs.cells import METHODS, MODES, Curve
from pyreserve.costs.results import Measured
from pyreserve.units import format_size, parse_size

MOST_LINES = 9
"""Maximum number of lines in a panel: more cannot be told apart."""

JOINED, NEAR = 1.3, 1.5
"""Maximum ratio, over all lengths, at which two curves are merged or (NEAR) one is omitted."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a panel.

    Attributes:
        curves: the drawn curve, then those merged with it; all have the same pages, mode and
            threads.
        cells: the measured cells of the drawn curve, shortest first.
        variant: 0 for small pages, 1 for huge pages, 2 for the other mode, 3 for more threads.
    """

    curves: list[Curve]
    cells: Sequence[Measured]
    variant: int

    @property
    def method(self) -> tuple[str, str]:
        """The verb and the method of the drawn curve."""
        return self.curves[0].verb, self.curves[0].method


@dataclass(frozen=True, slots=True)
class Chosen:
    """The lines of a panel, the number of curves omitted near them, and of others omitted."""

    lines: list[Line]
    near: int
    others: int


def choose(curves: Mapping[Curve, Sequence[Measured]], verbs: Sequence[str]) -> Chosen:
    """Choose the lines of a panel for these verbs; all medians must be positive."""
    small, huge = kinds(curves)
    (plain, other), threads = MODES, max((curve.threads for curve in curves), default=1)
    variants = [(small, plain, 1), (huge, plain, 1), (small, other, 1), (small, plain, threads)]
    in_panel = [curve for curve in curves if curve.verb in verbs]
    candidates = []
    for curve in in_panel:
        if _pages(curve) in variants:
            methods = [*METHODS.get(curve.verb, ()), curve.method]
            rank, variant = methods.index(curve.method), variants.index(_pages(curve))
            candidates.append((variant, rank > 0, verbs.index(curve.verb), rank, curve))
    lines: list[Line] = []
    omitted = merged = 0
    for variant, _, _, _, curve in sorted(candidates):
        near = [(ratio, line) for line in lines if (ratio := _apart(curves[curve], line)) <= NEAR]
        same = [pair for pair in near if pair[0] <= JOINED and pair[1].variant == variant]
        if same:
            min(same, key=lambda pair: pair[0])[1].curves.append(curve)
            merged += 1
        elif variant and any(
            line.variant == variant or line.method == (curve.verb, curve.method) for _, line in near
        ):
            omitted += 1
        elif len(lines) < MOST_LINES:
            lines.append(Line([curve], curves[curve], variant))
    return Chosen(lines, omitted, len(in_panel) - len(lines) - merged - omitted)


def kinds(curves: Iterable[Curve]) -> tuple[str, str]:
    """Return the page kinds to show: the OS page and the largest transparent huge page."""
    names = {curve.page_kind for curve in curves if not curve.page_kind.startswith("hugetlb-")}
    ordered = sorted(names, key=parse_size)
    return (ordered[0], ordered[-1]) if ordered else ("", "")


def label(curves: Sequence[Curve], small: str) -> str:
    """Return the label of a line of these curves; the page kind `small` is not named."""
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
    # No-break spaces keep a number and its unit on one line.
    return f"{', '.join(names)} {', '.join(pages).replace(' ', chr(0xA0))}".rstrip()


def _pages(curve: Curve) -> tuple[str, str, int]:
    return curve.page_kind, curve.mode, curve.threads


def _apart(cells: Sequence[Measured], line: Line) -> float:
    """Return the largest ratio of medians at the cells' lengths; infinite if the line lacks one."""
    drawn, other = _medians(line.cells), _medians(cells)
    ratios = [ns / drawn[nbytes] if nbytes in drawn else math.inf for nbytes, ns in other.items()]
    return max(max(ratio, 1 / ratio) for ratio in ratios)


def _medians(cells: Iterable[Measured]) -> dict[int, float]:
    return {entry.cell.nbytes: entry.times.median for entry in cells if entry.times is not None}
