"""Draw a cost table: time against length, with a panel for each group of verbs.

A panel has the curves of small pages and of the largest huge pages, in the order of `METHODS`, as
far as nine of them can be told apart.
"""

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pyreserve._system.pictures import (
    GREY,
    HEADING,
    LINE,
    Sheet,
    check_suffix,
    own_settings,
    write_picture,
)
from pyreserve.costs.cells import GROUPS, METHODS, Curve
from pyreserve.costs.results import Measured
from pyreserve.units import format_size, format_time, parse_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

# A band needs this many passes and at most this ratio of its ends; others carry no information.
_PASSES, _SPAN = 3, 3.0

# Inches and points. Shown 1000 pixels wide, text of 8 points is 11 pixels high.
_CELL, _MARGIN, _TICKS, _GUTTER, _LABELS = 5.2, 0.12, 0.50, 0.28, 1.70
_TOP, _PANEL, _ABOVE, _BELOW = 0.72, 3.7, 0.32, 0.38
_AXES = (_CELL - 2 * _MARGIN - _TICKS - _GUTTER - _LABELS, _PANEL - _ABOVE - _BELOW)
_SMALL_TEXT, _TEXT, _TITLE = 7.6, 8.0, 14.0
_FRAME, _GRID = "#9a9a9a", "#e6e6e6"
# Dark enough for text; the markers distinguish the lines without colours.
_COLOURS = ["#0b5394", "#b04a00", "#1b7a47", "#a3163a", "#6a3d9a", "#00707a", "#6f5500", "#a82f78"]
_COLOURS += ["#3f3f3f"]
_MARKERS = "os^DvPX<>"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)))  # for small pages, huge pages
# Candidate ticks of the axes, densest series first.
_SIZES = [[1 << power for power in range(12 % step, 64, step)] for step in (2, 4, 8, 16)]
_TIMES = [
    [digit * 10.0**power for power in range(-3, 16, step) for digit in digits]
    for step, digits in ((1, (1, 2, 5)), (1, (1,)), (3, (1,)))
]


class Line(NamedTuple):
    """A curve to draw, and its measured cells, shortest first; `variant` is 1 for huge pages."""

    curve: Curve
    cells: Sequence[Measured]
    variant: int


def choose(curves: Mapping[Curve, Sequence[Measured]], verbs: Sequence[str]) -> list[Line]:
    """Choose the lines of a panel for these verbs: each verb's first method before the others."""
    lines = []
    for variant, kind in enumerate(dict.fromkeys(_kinds(curves))):
        methods = [(i > 0, verb, m) for verb in verbs for i, m in enumerate(METHODS[verb])]
        for _, verb, method in sorted(methods, key=lambda method: method[0]):
            curve = Curve(verb, method, kind)
            if curve in curves:
                lines.append(Line(curve, curves[curve], variant))
    return lines[: len(_COLOURS)]


def _kinds(curves: Iterable[Curve]) -> tuple[str, str]:
    """Return the page kinds to show: the OS page and the largest transparent huge page."""
    ordered = sorted({curve.page_kind for curve in curves}, key=parse_size)
    return (ordered[0], ordered[-1]) if ordered else ("", "")


def label(line: Line) -> str:
    """Return a line's label: verb, method if there are several, and the size of a huge page."""
    verb, method = line.curve.verb, line.curve.method
    name = verb if len(METHODS[verb]) == 1 else f"{verb} {method}"
    # A no-break space keeps a number and its unit on one line.
    return f"{name} {_size(line.curve.page_kind).replace(' ', chr(0xA0))}" if line.variant else name


class Drawable(Protocol):
    """The attributes of `pyreserve.costs.CostTable` that are drawn."""

    @property
    def machine(self) -> Mapping[str, Any]:
        """The facts of the machine."""

    @property
    def complete(self) -> bool:
        """False if the measurement was interrupted."""

    @property
    def disturbed(self) -> str | None:
        """Why small changes are doubtful."""

    def curves(self) -> Mapping[Curve, Sequence[Measured]]:
        """Return the warm measured cells by curve, shortest first."""

    def measured(self) -> Iterable[Measured]:
        """Return the cells that have times."""


def draw(table: Drawable, path: Path | None = None) -> "Figure":
    """Draw the picture; also write it to a file if given, in the format of the suffix.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``.
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: the file cannot be written.
    """
    if path is not None:
        check_suffix(path)
    picture = figure(table)
    if path is not None:
        write_picture(picture, path)
    return picture


def figure(table: Drawable) -> "Figure":
    """Draw time against length, with a panel for each of `GROUPS` that has measured cells.

    The artists have group ids (``get_gid``), which are their ids in an SVG: the line ``line-7`` has
    the label ``label-7``; ``cold-...`` are the texts at hollow markers.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
    """
    with own_settings():
        return _Picture(table).figure


class _Picture(Sheet):
    """A picture being drawn. Positions are inches from the left and from the bottom."""

    def __init__(self, table: Drawable) -> None:
        curves = {curve: _drawable(cells) for curve, cells in table.curves().items()}
        curves = {curve: cells for curve, cells in curves.items() if cells}
        panels = {group: choose(curves, verbs) for group, verbs in GROUPS.items()}
        panels = {group: lines for group, lines in panels.items() if lines}
        omitted = len(curves) - sum(map(len, panels.values()))
        self.cold = _drawable(entry for entry in table.measured() if entry.host == "cold")
        self.drawn = 0  # lines drawn so far
        rows, odd = -(-len(panels) // 2), len(panels) % 2
        # The note takes the free place of an odd last row, or else a strip below all panels.
        left, space = (_CELL + _TICKS, _CELL - _TICKS) if odd else (0.0, 2 * _CELL)
        notes = self.notes(table, [line for lines in panels.values() for line in lines], omitted)
        wrapped = [line for note in notes for line in _wrap(note, space - 2 * _MARGIN, 0.53)]
        strip = 0.0 if odd else _MARGIN + len(wrapped) * LINE * 1.2 * _TEXT / 72
        width, height = 2 * _CELL, _TOP + rows * _PANEL + strip
        super().__init__(width, height)
        title, top = _title(table), height - _MARGIN
        size = min(_TITLE, (width - 2 * _MARGIN) * 72 / (0.7 * len(title)))
        self.text(_MARGIN, top, title, size, weight="bold").set_gid("title")
        subtitle = "Time of a call against the length of the memory: medians with 95 % bands"
        self.text(_MARGIN, top - 0.29, subtitle, _TEXT + 1, GREY)
        for i, (group, lines) in enumerate(panels.items()):
            self.panel(group, lines, i % 2 * _CELL, height - _TOP - i // 2 * _PANEL)
        top = _PANEL - _ABOVE if odd else strip
        self.text(left + _MARGIN, top, "\n".join(wrapped), _TEXT, GREY, linespacing=LINE)

    def panel(self, group: str, lines: Sequence[Line], left: float, top: float) -> None:
        """Draw a panel whose upper left corner is at (left, top)."""
        self.text(left + _MARGIN, top - _ABOVE + 0.25, group, HEADING, weight="bold")
        (page_wide, page_high), (wide, high) = self.figure.get_size_inches(), _AXES
        left, bottom = left + _MARGIN + _TICKS, top - _ABOVE - high
        right = left + wide
        box = (left / page_wide, bottom / page_high, wide / page_wide, high / page_high)
        axes = self.figure.add_axes(box, xscale="log", yscale="log", facecolor="none")
        methods = [(line.curve.verb, line.curve.method) for line in lines]
        styles = [list(dict.fromkeys(methods)).index(method) for method in methods]
        cold: list[Point] = []
        for i, (line, style) in enumerate(zip(lines, styles, strict=True), self.drawn):
            cold += _draw(axes, line, style, f"line-{i}", self.cold)
        _scale(axes, lines, cold)
        if cold:  # name only the highest marker
            x, y = max(cold, key=lambda point: point[1])
            side = "right" if x * x > math.prod(axes.get_xlim()) else "left"
            options: dict[str, Any] = {"textcoords": "offset points", "gid": f"cold-{self.drawn}"}
            axes.annotate("cold host", (x, y), (0, 5), ha=side, fontsize=_TEXT, **options)
        names = [_wrap(label(line), _LABELS, 0.57) for line in lines]
        ends = axes.transData.transform([_point(line.cells[-1]) for line in lines])
        ends /= self.figure.dpi
        heights = [len(name) * LINE * _TEXT / 72 for name in names]
        places = spread([y for _, y in ends], heights, bottom, bottom + high)
        for name, style, (x, y), place in zip(names, styles, ends, places, strict=True):
            # A thin connector from the end of the line to its label.
            path = (x + 0.05, right + 0.03, right + _GUTTER - 0.09, right + _GUTTER - 0.04)
            inches: dict[str, Any] = {"transform": self.figure.dpi_scale_trans, "clip_on": False}
            axes.plot(path, (y, y, place, place), c=_COLOURS[style], lw=0.5, alpha=0.7, **inches)
            options = {"va": "center", "linespacing": 1.1, "gid": f"label-{self.drawn}"}
            self.text(right + _GUTTER, place, "\n".join(name), _TEXT, _COLOURS[style], **options)
            self.drawn += 1

    def notes(self, table: Drawable, lines: Sequence[Line], omitted: int) -> Iterator[str]:
        """Yield the notes on how to read the picture and on what it omits."""
        if not lines:
            yield "Nothing was measured that can be drawn."
            return
        kinds = {line.variant: _size(line.curve.page_kind) for line in lines}
        yield "; ".join(f"{('solid', 'dashed')[v]}: {size} pages" for v, size in kinds.items())
        yield f"Bands: only with {_PASSES} or more passes and a span under {_SPAN:g} times."
        drawn = {line.curve for line in lines}
        if any(Curve.of(entry.cell) in drawn for entry in self.cold):
            yield "Hollow: cold, the hypervisor had to supply the memory."
        if omitted:
            yield f"Curves not drawn: {omitted}: see table or JSON."
        warnings = [f"Noise: {table.disturbed}."] if table.disturbed else []
        warnings += [] if table.complete else ["The measurement was interrupted."]
        yield " ".join(warnings)


def _draw(axes: "Axes", line: Line, style: int, gid: str, cold: Iterable[Measured]) -> list[Point]:
    """Draw a line, its band and the hollow markers of its cold cells; return their positions."""
    colour, marker = _COLOURS[style], _MARKERS[style]
    xs, ys = zip(*map(_point, line.cells), strict=True)
    low, high = zip(*map(_band, line.cells), strict=True)
    axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
    width, dashes = 1.1 if line.variant else 1.5, _DASHES[line.variant]
    axes.plot(xs, ys, marker, c=colour, ms=3.6, mew=0, lw=width, ls=dashes, gid=gid)
    hollow = [_point(entry) for entry in cold if Curve.of(entry.cell) == line.curve]
    for x, y in hollow:
        axes.plot([x, x], [dict(zip(xs, ys, strict=True)).get(x, y), y], ":", c=colour, lw=0.8)
        axes.plot([x], [y], marker, c=colour, mfc="white", ms=5.5, mew=1.1)
    return hollow


def _scale(axes: "Axes", lines: Iterable[Line], cold: Iterable[Point]) -> None:
    """Set the limits of the axes to the points, without the bands, and set the ticks."""
    xs, ys = zip(*(_point(entry) for line in lines for entry in line.cells), *cold, strict=True)
    low, high = min(ys), max(ys)
    middle = math.sqrt(low * high)
    axes.set_xlim(min(xs) / 1.5, max(xs) * 1.5)
    # Leave space for a band, and show at least a decade.
    axes.set_ylim(min(low / 1.6, middle / 3.5), max(high * 1.6, middle * 3.5))
    sizes, times = ticks(*axes.get_xlim(), _SIZES, 5), ticks(*axes.get_ylim(), _TIMES, 9)
    axes.set_xticks([], minor=True)
    axes.set_yticks([], minor=True)
    axes.set_xticks(sizes, [format_size(int(size)) for size in sizes])
    # `format_time` writes 1000 s and more with an exponent.
    axes.set_yticks(times, [format_time(ns) if ns < 1e12 else f"{ns / 1e9:.0f} s" for ns in times])
    axes.tick_params(labelsize=_SMALL_TEXT, labelcolor=GREY, color=_FRAME, length=3)
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_FRAME)


def ticks(low: float, high: float, series: Iterable[Sequence[float]], most: int) -> list[float]:
    """Return the ticks in [low, high] from the first series with at most `most` of them."""
    inside = [[value for value in values if low <= value <= high] for values in series]
    return next((values for values in inside if len(values) <= most), inside[-1])


def spread(
    wanted: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Move the centres of labels apart with the least sum of squared movements.

    The order stays, no label reaches below `low`, and none above `high` unless they do not fit.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # Isotonic regression: subtract from each centre its least distance to the lowest edge, then
    # merge neighbours that are out of order into blocks at the mean of their wanted places.
    offsets, total = [], 0.0
    blocks: list[tuple[float, int]] = []
    for i in order:
        offsets.append(total + heights[i] / 2)
        total += heights[i]
        mean, size = wanted[i] - offsets[-1], 1
        while blocks and blocks[-1][0] >= mean:
            mean_before, before = blocks.pop()
            mean = (mean * size + mean_before * before) / (size + before)
            size += before
        blocks.append((mean, size))
    places = [mean for mean, size in blocks for _ in range(size)]
    centres = [0.0] * len(wanted)
    for i, offset, place in zip(order, offsets, places, strict=True):
        centres[i] = max(min(place, high - total), low) + offset
    return centres


def _drawable(cells: Iterable[Measured]) -> list[Measured]:
    """Return the cells with a positive median: the axes are logarithmic."""
    return [entry for entry in cells if entry.times is not None and entry.times.median > 0]


def _point(entry: Measured) -> Point:
    assert entry.times is not None
    return entry.cell.nbytes, entry.times.median


def _band(entry: Measured) -> Point:
    """Return the interval of a cell; (nan, nan), which is not drawn, if it is too uncertain."""
    assert entry.times is not None
    low, high = entry.times.ci95
    certain = entry.times.passes >= _PASSES and 0 < high <= _SPAN * low
    return (low, high) if certain else (math.nan, math.nan)


def _title(table: Drawable) -> str:
    cpu, kernel = table.machine.get("cpu"), table.machine.get("kernel")
    machine = ", ".join([str(cpu or "an unknown CPU")] + ([f"Linux {kernel}"] if kernel else []))
    return f"What virtual memory costs on {machine}"


def _size(page_kind: str) -> str:
    return format_size(parse_size(page_kind))


def _wrap(text: str, inches: float, width: float) -> list[str]:
    """Wrap a text to a width in inches; letters average `width` times the text size."""
    letters = int(inches * 72 / (width * _TEXT))
    return textwrap.wrap(text, letters, break_on_hyphens=False, break_long_words=False)
