"""Choose the curves that a panel of the picture shows, and label them.

The candidates have a fixed order: on small pages each verb's first method, then the other methods;
the same on transparent huge pages; then the other mode, then the most threads. A candidate near a
line of the same verb at all lengths is omitted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyreserve.costs.cells import METHODS, MODES, Curve
from pyreserve.costs.results import Measured
from pyreserve.units import format_size, parse_size

MOST_LINES = 9
"""Maximum number of lines in a panel: more cannot be told apart."""

NEAR = 1.3
"""Maximum ratio of medians, over all lengths, at which a curve is near another."""


@dataclass(frozen=True, slots=True)
class Line:
    """A curve to draw, and its measured cells, shortest first.

    `variant` is 0 for small pages, 1 for huge pages, 2 for the other mode, 3 for more threads.
    """

    curve: Curve
    cells: Sequence[Measured]
    variant: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """The lines of a panel, and how many curves it omits: those near a line, and others."""

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
        if _setting(curve) in variants:
            rank = [*METHODS.get(curve.verb, ()), curve.method].index(curve.method)
            variant = variants.index(_setting(curve))
            candidates.append((variant, rank > 0, verbs.index(curve.verb), rank, curve))
    lines: list[Line] = []
    near = 0
    for variant, _, _, _, curve in sorted(candidates):
        same_verb = (line.cells for line in lines if line.curve.verb == curve.verb)
        if any(_is_near(curves[curve], drawn) for drawn in same_verb):
            near += 1
        elif len(lines) < MOST_LINES:
            lines.append(Line(curve, curves[curve], variant))
    return Chosen(lines, near, len(in_panel) - len(lines) - near)


def kinds(curves: Iterable[Curve]) -> tuple[str, str]:
    """Return the page kinds to show: the OS page and the largest transparent huge page."""
    names = {curve.page_kind for curve in curves if not curve.page_kind.startswith("hugetlb-")}
    ordered = sorted(names, key=parse_size)
    return (ordered[0], ordered[-1]) if ordered else ("", "")


def label(curve: Curve, small: str) -> str:
    """Return a line's label, without page kind `small`, the default mode and a single thread."""
    kind, mode, threads = _setting(curve)
    name = curve.verb if len(METHODS.get(curve.verb, ())) == 1 else f"{curve.verb} {curve.method}"
    setting = [] if kind == small else [format_size(parse_size(kind))]
    setting += [] if mode == MODES[0] else [mode]
    setting += [] if threads == 1 else [f"{threads} threads"]
    # No-break spaces keep a number and its unit on one line.
    return f"{name} {', '.join(setting).replace(' ', chr(0xA0))}".rstrip()


def _setting(curve: Curve) -> tuple[str, str, int]:
    return curve.page_kind, curve.mode, curve.threads


def _is_near(cells: Iterable[Measured], drawn: Iterable[Measured]) -> bool:
    """Whether a drawn line has all lengths of the cells, with medians within the ratio `NEAR`."""
    medians = _medians(drawn)
    ratios = [medians.get(nbytes, math.inf) / ns for nbytes, ns in _medians(cells).items()]
    return all(1 / NEAR <= ratio <= NEAR for ratio in ratios)


def _medians(cells: Iterable[Measured]) -> dict[int, float]:
    return {entry.cell.nbytes: entry.times.median for entry in cells if entry.times is not None}
