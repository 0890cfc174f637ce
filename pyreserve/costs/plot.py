"""A table of costs as a picture: cost against length, a panel for each group of verbs.

A panel holds nine lines or so; more can't be told apart. Which ones is decided here: those of
mode charge and one thread on small and on transparent huge pages come first. Lines that lie on each
other become one with a joint label, then the one nearest to another goes, again and again. What
room is left goes to noreserve and to more threads where they make a difference. The picture says
what it leaves out.
"""

import io
import math
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve.costs.cells import GROUPS, METHODS, Curve
from pyreserve.costs.files import write_bytes
from pyreserve.costs.stats import Times
from pyreserve.costs.table import CostTable, Measured
from pyreserve.units import format_size, format_time, parse_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

MOST_LINES = 9
"""How many lines a panel has at most."""

# Lines nearer than this at all lengths are one in a picture, and so are those that are a little
# farther apart where the intervals overlap; variants that differ by less are not news.
_ALIKE, _PERHAPS_ALIKE, _NEWS = 1.15, 1.3, 1.3
# To this power the distance of a small page's line counts.
_HARDER = 1.5

_SUFFIXES = (".png", ".svg")
_DPI = 200
# Inches and points: shown 1000 pixels wide, 8 points of 10 inches are 11 pixels high.
_WIDTH, _MARGIN, _GUTTER, _TICKS, _APART = 10.4, 0.12, 0.30, 0.50, 0.03
_TOP, _PANEL, _ABOVE, _BELOW, _LINE = 0.72, 3.7, 0.32, 0.38, 1.3
# Inches that a length takes on its axis, and letters of a line of a label.
_TICK, _LABEL = 0.44, 26
# Share of a panel's width that a name at a hollow marker may take.
_ROOM_FOR_COLD = 0.3
_SMALL_TEXT, _TEXT, _HEADING, _TITLE = 7.6, 8.0, 10.5, 14.0
_INK, _GREY, _FRAME, _GRID = "#222222", "#595959", "#9a9a9a", "#e6e6e6"
# Dark enough to read text in; the markers tell the same things apart without them.
_COLOURS = (
    "#0b5394",
    "#b04a00",
    "#1b7a47",
    "#a3163a",
    "#6a3d9a",
    "#00707a",
    "#6f5500",
    "#a82f78",
    "#3f3f3f",
    "#4a6b1f",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d", "*", "8")


def draw(table: CostTable, path: Path) -> None:
    """Write the picture, whole or not at all; its format follows the suffix.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``.
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: it can't be written.
    """
    if path.suffix not in _SUFFIXES:
        msg = f"a picture's file ends in {' or '.join(_SUFFIXES)}, and {path} does not"
        raise ValueError(msg)
    picture = figure(table)
    data = io.BytesIO()
    with _own_settings():
        if path.suffix == ".svg":
            picture.savefig(data, format="svg", metadata={"Date": None})
        else:
            picture.savefig(data, format="png", dpi=_DPI)
    write_bytes(path, data.getvalue())


def figure(table: CostTable) -> "Figure":
    """Draw cost against length, a panel for each of `GROUPS` of which anything was measured.

    The artists have names (``get_gid``), which are their ids in an SVG: a line ``line-7`` has the
    label ``label-7``; ``cold-1`` and so on are the texts at hollow markers.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
    """
    try:
        import matplotlib  # noqa: F401, PLC0415  # only where needed: it is an extra
    except ImportError as missing:
        msg = "drawing needs matplotlib: pip install 'pyreserve[plot]'"
        raise ImportError(msg) from missing
    with _own_settings():
        return _Picture(table).figure


@contextmanager
def _own_settings() -> Iterator[None]:
    """Draw alike everywhere, whatever somebody has set for pictures of their own."""
    import matplotlib  # noqa: PLC0415

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Text stays text in an SVG, and the same table makes the same file.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pyreserve"})
        yield


# Which curves a panel has, and what they are called.


@dataclass
class Shown:
    """A line of a panel.

    Attributes:
        curve: what is drawn.
        cells: its measured cells, shortest first.
        joined: the curves that lie on it and are not drawn themselves.
    """

    curve: Curve
    cells: list[Measured]
    joined: list[Curve] = field(default_factory=list)


@dataclass
class LeftOut:
    """A curve that is not drawn, and the line nearest to it: less than `factor` away anywhere."""

    curve: Curve
    near: Curve
    factor: float


@dataclass
class Chosen:
    """The lines of a panel, and what has no place in it."""

    lines: list[Shown]
    left_out: list[LeftOut]


def choose(curves: dict[Curve, list[Measured]], verbs: Sequence[str]) -> Chosen:
    """Choose which curves a panel of these verbs shows; see this module."""
    here = {curve: cells for curve, cells in curves.items() if curve.verb in verbs}
    small, huge = _kinds(curves)
    plain = [curve for curve in here if curve.mode == "charge" and curve.threads == 1]
    lines: list[Shown] = []
    for curve in sorted(
        (curve for curve in plain if curve.page_kind in {small, huge}),
        key=lambda curve: (curve.page_kind != small, *_place(curve, verbs)),
    ):
        _add(lines, Shown(curve, here[curve]))
    left_out = _thin(lines, small)
    variants = [
        (_difference(here[curve], here[sibling]), curve)
        for curve in here
        if curve.page_kind == small
        and curve not in plain
        and (sibling := Curve(curve.verb, curve.method, curve.page_kind)) in here
    ]
    for difference, curve in sorted(variants, key=lambda pair: (-pair[0], pair[1])):
        if difference > _NEWS and len(lines) < MOST_LINES:
            _add(lines, Shown(curve, here[curve]))
    return Chosen(lines, left_out)


def _kinds(curves: Iterable[Curve]) -> tuple[str, str]:
    """Return the page kinds to show: the OS page, and the largest transparent one."""
    kinds = {curve.page_kind for curve in curves if not curve.page_kind.startswith("hugetlb-")}
    ordered = sorted(kinds, key=parse_size)
    return (ordered[0], ordered[-1]) if ordered else ("", "")


def _place(curve: Curve, verbs: Sequence[str]) -> tuple[Any, ...]:
    methods = METHODS.get(curve.verb, ())
    rank = methods.index(curve.method) if curve.method in methods else len(methods)
    return verbs.index(curve.verb), rank, curve


def _add(lines: list[Shown], new: Shown) -> None:
    """Add a line, or its curve to the line that it lies on."""
    for line in lines:
        if _akin(new.curve, line.curve) and _alike(new.cells, line.cells):
            line.joined.append(new.curve)
            return
    lines.append(new)


def _akin(curve: Curve, other: Curve) -> bool:
    """Whether one name for both would be understood."""
    variants = [(one.page_kind, one.mode, one.threads) for one in (curve, other)]
    return variants[0] == variants[1] or _method(curve) == _method(other)


def _alike(cells: Sequence[Measured], line: Sequence[Measured]) -> bool:
    at = {one.cell.nbytes: one for one in line}
    return all(one.cell.nbytes in at and _alike_there(one, at[one.cell.nbytes]) for one in cells)


def _alike_there(one: Measured, other: Measured) -> bool:
    assert one.times is not None
    assert other.times is not None
    ratio = _ratio(one, other)
    overlap = max(one.times.ci95[0], other.times.ci95[0]) <= min(
        one.times.ci95[1], other.times.ci95[1]
    )
    return ratio <= _ALIKE or (ratio <= _PERHAPS_ALIKE and overlap)


def _ratio(one: Measured, other: Measured) -> float:
    """Return how many times as long as the other the slower one takes."""
    assert one.times is not None
    assert other.times is not None
    low, high = sorted((one.times.median, other.times.median))
    return high / low if low > 0 else math.inf


def _difference(cells: Sequence[Measured], line: Sequence[Measured]) -> float:
    """Return the largest ratio at any length that both have; infinite if there is none."""
    at = {one.cell.nbytes: one for one in line}
    common = [one for one in cells if one.cell.nbytes in at]
    return max((_ratio(one, at[one.cell.nbytes]) for one in common), default=math.inf)


def _thin(lines: list[Shown], small: str) -> list[LeftOut]:
    """Take away the line that is nearest to an earlier one, until few enough are left.

    Those of small pages, which everybody has, are the harder to take away.
    """
    gone: list[Shown] = []
    while len(lines) > MOST_LINES:
        nearest = [_nearest(line, lines[:i])[0] for i, line in enumerate(lines)]
        loss = [
            factor**_HARDER if line.curve.page_kind == small else factor
            for factor, line in zip(nearest, lines, strict=True)
        ]
        gone.append(lines.pop(min(range(len(lines)), key=lambda i: (loss[i], -i))))
    left_out: list[LeftOut] = []
    for one in gone:
        factor, line = _nearest(one, lines)
        left_out += [LeftOut(curve, line.curve, factor) for curve in (one.curve, *one.joined)]
    return left_out


def _nearest(line: Shown, others: Sequence[Shown]) -> tuple[float, Shown]:
    """Return the nearest of the lines whose names are alike, and how far away it is."""
    near = ((_difference(line.cells, one.cells), one) for one in others if _related(line, one))
    return min(near, key=lambda pair: pair[0], default=(math.inf, line))


def _related(line: Shown, other: Shown) -> bool:
    return line.curve.verb == other.curve.verb or line.curve.page_kind == other.curve.page_kind


def label(curves: Sequence[Curve], small: str) -> str:
    """Return what a line of these curves is called; `small` pages go without saying."""
    variants: dict[tuple[str, str], list[str]] = {}
    for curve in curves:
        variants.setdefault(_method(curve), []).append(_variant(curve, small))
    common = next(iter(variants.values()))[0]
    words, before = [], None
    for (verb, method), found in variants.items():
        one_way = len(METHODS.get(verb, ())) == 1
        word = f"{'' if verb == before else verb} {'' if one_way else method}".strip()
        others = [variant for variant in found if variant != common]
        words.append(word + (f" (also {', '.join(others)})" if others else ""))
        before = verb
    if common and len(words) > 1:
        words.append("both" if len(words) == 2 else "all")
    return f"{', '.join(words)} {common}".rstrip()


def _variant(curve: Curve, small: str) -> str:
    words = []
    if curve.page_kind != small:
        words.append(_kind_name(curve.page_kind))
    if curve.mode != "charge":
        words.append(curve.mode)
    if curve.threads != 1:
        words.append(f"{curve.threads} threads")
    # No-break spaces: a number and its unit stay on one line of a label.
    return ", ".join(words).replace(" ", "\u00a0")


def _kind_name(kind: str) -> str:
    prefix = "hugetlb " if kind.startswith("hugetlb-") else ""
    return prefix + format_size(parse_size(kind.removeprefix("hugetlb-")))


# Where things go.


def spread(
    wanted: Sequence[float], heights: Sequence[float], low: float, high: float
) -> list[float]:
    """Move the centres of labels apart, by as little as possible.

    The sum of the squares of all moves is the least there is, and no two change places.

    Args:
        wanted: where each centre would best be.
        heights: how high each label is.
        low: no label reaches below it, unless they are too many.
        high: nor above it.

    Returns:
        The centres, in the order of `wanted`.
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    # How far each centre is at least from the lowest label's lower edge. Less that, the centres
    # need only not to fall: each block of those that would is at the mean of what its labels want.
    offsets, total = [], 0.0
    for i in order:
        offsets.append(total + heights[i] / 2)
        total += heights[i]
    blocks: list[tuple[float, int]] = []
    for i, offset in zip(order, offsets, strict=True):
        mean, size = wanted[i] - offset, 1
        while blocks and blocks[-1][0] >= mean:
            mean_before, before = blocks.pop()
            mean = (mean * size + mean_before * before) / (size + before)
            size += before
        blocks.append((mean, size))
    places = [mean for mean, size in blocks for _ in range(size)]
    found = [0.0] * len(wanted)
    for i, offset, place in zip(order, offsets, places, strict=True):
        found[i] = min(max(place, low), high - total) + offset
    return found


def size_ticks(low: float, high: float, most: int = 8) -> list[int]:
    """Return at most so many lengths to name on an axis: 4 KiB, 64 KiB, 1 MiB, ... if they fit."""
    every = [power for power in range(64) if low <= 1 << power <= high]
    for step in (4, 8, 12, 16):
        powers = [power for power in every if (power - 12) % step == 0]
        if len(powers) <= most:
            break
    return [1 << power for power in (powers if len(powers) > 1 else every)[:most]]


def time_ticks(low: float, high: float) -> list[float]:
    """Return the times to name on an axis, in ns: powers of ten, closer if they are few."""
    for digits in ((1,), (1, 2, 5)):
        ticks = [
            digit * 10.0**power
            for power in range(-3, 13)
            for digit in digits
            if low <= digit * 10.0**power <= high
        ]
        if len(ticks) > 2:
            break
    return ticks


# The picture.


@dataclass
class _Panel:
    """A panel while it is drawn: its lines, each with its label."""

    axes: "Axes"
    labels: "list[tuple[Text, Line2D]]"
    cold: "list[tuple[float, float]]"


class _Picture:
    """One picture while it is drawn. Lengths are inches, from the left and from the bottom."""

    def __init__(self, table: CostTable) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        curves = {curve: _drawable(cells) for curve, cells in table.curves().items()}
        curves = {curve: cells for curve, cells in curves.items() if cells}
        self._line_numbers, self._cold_numbers = count(1), count(1)
        self._cold = _drawable(one for one in table.measured() if one.host == "cold")
        self._small, huge = _kinds(curves)
        groups = {group: choose(curves, verbs) for group, verbs in GROUPS.items()}
        groups = {group: chosen for group, chosen in groups.items() if chosen.lines}
        columns = 2 if len(groups) > 1 else 1
        rows = -(-len(groups) // columns)
        self.width = _WIDTH if columns == 2 else 0.7 * _WIDTH
        cell = self.width / columns
        notes = _notes(table, groups.values(), self._small, huge)
        # They fill the place that a last panel would have.
        beside = columns * rows > len(groups)
        # A letter is a little over half as wide as it is high.
        room = (cell - _TICKS if beside else self.width) - 2 * _MARGIN
        letters = int(room * 72 / (0.57 * _TEXT))
        wrapped = [line for note in notes for line in (*_wrap(note, letters), "")]
        below = 0.0 if beside else len(wrapped) * _TEXT * _LINE * 1.2 / 72
        self.height = _TOP + rows * _PANEL + below
        self.figure = Figure((self.width, self.height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self._head(table)
        panels = []
        for i, (group, chosen) in enumerate(groups.items()):
            left, top = i % columns * cell, self.height - _TOP - i // columns * _PANEL
            panels.append(self._panel(group, chosen, left, top))
        for column in range(columns):
            self._make_room(panels[column::columns], (column + 1) * cell)
        for panel in panels:
            self._place_labels(panel)
            self._name_cold(panel)
        left, top = ((columns - 1) * cell, self.height - _TOP - (rows - 1) * _PANEL)
        if beside:
            left, top = left + _MARGIN + _TICKS, top - _ABOVE
        else:
            left, top = _MARGIN, below
        self._text(left, top, "\n".join(wrapped), _TEXT, _GREY, linespacing=_LINE)

    def _text(
        self, left: float, y: float, text: str, size: float, colour: str = _INK, **rest: Any
    ) -> "Text":
        # A processor's name may have dollars in it.
        how: dict[str, Any] = {"va": "top", "parse_math": False} | rest
        place = (left / self.width, y / self.height)
        return self.figure.text(*place, text, fontsize=size, color=colour, **how)

    def _extent(self, text: "Text") -> tuple[float, float]:
        """Return how wide and how high a text is."""
        box = text.get_window_extent()
        return box.width / self.figure.dpi, box.height / self.figure.dpi

    def _head(self, table: CostTable) -> None:
        top = self.height - _MARGIN
        title = self._text(_MARGIN, top, _title(table), _TITLE, weight="bold")
        title.set_gid("title")
        width, _ = self._extent(title)
        title.set_fontsize(_TITLE * min(1.0, (self.width - 2 * _MARGIN) / width))
        subtitle = (
            "How long a call takes on a piece of memory, by its length: medians with 95 % bands"
        )
        self._text(_MARGIN, top - 0.29, subtitle, _TEXT + 1, _GREY)

    def _panel(self, group: str, chosen: Chosen, left: float, top: float) -> _Panel:
        left, top = left + _MARGIN + _TICKS, top - _ABOVE
        high = _PANEL - _ABOVE - _BELOW
        box = (left / self.width, (top - high) / self.height, 0.1, high / self.height)
        axes = self.figure.add_axes(box)
        self._text(left - _TICKS, top + 0.25, group, _HEADING, weight="bold")
        axes.set(xscale="log", yscale="log", facecolor="none")
        axes.set_axisbelow(True)
        panel = _Panel(axes, [], [])
        shown = [line.curve for line in chosen.lines]
        colours = _numbers((curve.verb, curve.method) for curve in shown)
        markers = _numbers((*_method(curve), curve.mode, curve.threads) for curve in shown)
        for line in chosen.lines:
            curve = line.curve
            marker = markers[(*_method(curve), curve.mode, curve.threads)]
            style: dict[str, Any] = {
                "color": _COLOURS[colours[_method(curve)] % len(_COLOURS)],
                "marker": _MARKERS[marker % len(_MARKERS)],
                "linestyle": self._dash(curve),
                "linewidth": 1.5 if curve.page_kind == self._small else 1.1,
            }
            self._line(panel, line, style)
        lengths = [one.cell.nbytes for line in chosen.lines for one in line.cells]
        axes.set_xlim(min(lengths) / 1.5, max(lengths) * 1.5)
        low, high = axes.get_ylim()
        middle = math.sqrt(low * high)
        axes.set_ylim(min(low, middle / 3.5), max(high, middle * 3.5))
        axes.yaxis.set_ticks([], minor=True)
        _name(axes.yaxis, time_ticks(*axes.get_ylim()), format_time)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FRAME)
        return panel

    def _dash(self, curve: Curve) -> Any:
        """Return the dashes of a page kind, other ones for other modes and threads."""
        if curve.mode != "charge":
            return (0, (1, 1.2))
        if curve.threads != 1:
            return (0, (5, 1.5, 1, 1.5))
        return "-" if curve.page_kind == self._small else (0, (4, 1.6))

    def _line(self, panel: _Panel, line: Shown, style: dict[str, Any]) -> None:
        axes, curves = panel.axes, (line.curve, *line.joined)
        times = [one.times for one in line.cells if one.times is not None]
        lengths, medians = [one.cell.nbytes for one in line.cells], [one.median for one in times]
        # A band of one sample reaches from nothing to infinity: it is not drawn.
        bands = [_band(one) for one in times]
        axes.fill_between(
            lengths,
            [low for low, _ in bands],
            [high for _, high in bands],
            color=style["color"],
            alpha=0.14,
            linewidth=0,
        )
        (drawn,) = axes.plot(lengths, medians, markersize=3.6, markeredgewidth=0, **style)
        number = next(self._line_numbers)
        drawn.set_gid(f"line-{number}")
        words = "\n".join(_wrap(label(curves, self._small), _LABEL))
        text = self._text(0, 0, words, _TEXT, style["color"], va="center", linespacing=1.1)
        text.set_gid(f"label-{number}")
        panel.labels.append((text, drawn))
        for one in self._cold:
            if Curve.of(one.cell) in curves and one.times is not None:
                low, high = _band(one.times)
                x, y = one.cell.nbytes, one.times.median
                axes.plot([x, x], [low, high], color=style["color"], alpha=0.35, linewidth=2.5)
                if x in lengths:  # how far above the line it is, and above which
                    warm = medians[lengths.index(x)]
                    axes.plot([x, x], [warm, y], color=style["color"], linewidth=0.8, linestyle=":")
                hollow: dict[str, Any] = {
                    "markerfacecolor": "white",
                    "markersize": 5.5,
                    "markeredgewidth": 1.1,
                }
                axes.plot([x], [y], color=style["color"], marker=style["marker"], **hollow)
                panel.cold.append((x, y))

    def _make_room(self, panels: Sequence[_Panel], right: float) -> None:
        """Make the panels of a column as wide as the widest of their labels lets them be."""
        widths = [self._extent(text)[0] for panel in panels for text, _ in panel.labels]
        for panel in panels:
            box = panel.axes.get_position()
            left = box.x0 * self.width
            width = right - _MARGIN - max(widths) - _GUTTER - left
            panel.axes.set_position((box.x0, box.y0, width / self.width, box.height))
            places = size_ticks(*panel.axes.get_xlim(), most=int(width / _TICK))
            _name(panel.axes.xaxis, places, format_size)
            panel.axes.xaxis.set_ticks(size_ticks(*panel.axes.get_xlim(), most=64), minor=True)
            panel.axes.xaxis.set_tick_params(
                which="minor", color=_FRAME, length=2, labelbottom=False
            )

    def _place_labels(self, panel: _Panel) -> None:
        import numpy as np  # noqa: PLC0415
        from matplotlib.lines import Line2D  # noqa: PLC0415

        dpi, box = self.figure.dpi, panel.axes.get_window_extent()
        ends = []
        for _, line in panel.labels:
            end = np.asarray(line.get_xydata())[-1]
            x, y = panel.axes.transData.transform(end)
            ends.append((x / dpi, y / dpi))
        edge, low, high = box.x1 / dpi, box.y0 / dpi, box.y1 / dpi
        heights = [self._extent(text)[1] + _APART for text, _ in panel.labels]
        wanted = [y for _, y in ends]
        for (text, line), (x, y), place in zip(
            panel.labels, ends, spread(wanted, heights, low, high), strict=True
        ):
            left = edge + _GUTTER
            text.set_position((left / self.width, place / self.height))
            path = [(x + 0.05, y), (edge + 0.03, y), (left - 0.09, place), (left - 0.04, place)]
            leader = Line2D(
                [x / self.width for x, _ in path],
                [y / self.height for _, y in path],
                color=line.get_color(),
                linewidth=0.5,
                alpha=0.7,
            )
            self.figure.add_artist(leader)

    def _name_cold(self, panel: _Panel) -> None:
        """Name the hollow markers, one of those that are close together."""
        from matplotlib.patheffects import withStroke  # noqa: PLC0415

        named: list[Any] = []
        for x, y in sorted(panel.cold, key=lambda place: -place[1]):
            # To the left, where the lines are far below, unless that is off the panel.
            across = panel.axes.transAxes.inverted().transform(
                panel.axes.transData.transform((x, y))
            )[0]
            side, align = (-6, "right") if across > _ROOM_FOR_COLD else (6, "left")
            text = panel.axes.annotate(
                "cold host",
                (x, y),
                (side, 1),
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=_TEXT,
                color=_INK,
                path_effects=[withStroke(linewidth=2, foreground="white")],
            )
            box = text.get_window_extent()
            if any(box.overlaps(other) for other in named):
                text.remove()
            else:
                text.set_gid(f"cold-{next(self._cold_numbers)}")
                named.append(box)


def _drawable(cells: Iterable[Measured]) -> list[Measured]:
    """Return the cells that a logarithmic axis has a place for."""
    return [one for one in cells if one.times is not None and one.times.median > 0]


def _method(curve: Curve) -> tuple[str, str]:
    return curve.verb, curve.method


def _numbers(things: Iterable[Any]) -> dict[Any, int]:
    """Number things from 0 in the order in which they come first."""
    return {thing: number for number, thing in enumerate(dict.fromkeys(things))}


def _band(times: Times) -> tuple[float, float]:
    low, high = times.ci95
    if low <= 0 or math.isinf(high):
        return times.median, times.median
    return low, high


def _name(axis: "Axis", places: Sequence[float], write: Callable[[Any], str]) -> None:
    """Name places on an axis."""
    axis.set_ticks(places, [write(place) for place in places])
    axis.set_tick_params(labelsize=_SMALL_TEXT, labelcolor=_GREY, color=_FRAME, length=3)
    axis.grid(visible=True, color=_GRID, linewidth=0.6)


def _title(table: CostTable) -> str:
    cpu, kernel = table.machine.get("cpu"), table.machine.get("kernel")
    machine = ", ".join([str(cpu or "an unknown CPU")] + ([f"Linux {kernel}"] if kernel else []))
    return f"What virtual memory costs on {machine}"


def _notes(table: CostTable, panels: Iterable[Chosen], small: str, huge: str) -> list[str]:
    """Say how to read the picture and what is not in it."""
    found, panels = [], list(panels)
    if not panels:
        found.append("Nothing was measured.")
        return found
    lines = [line for chosen in panels for line in chosen.lines]
    pages = f"Solid lines and labels that name none: {_kind_name(small)} pages"
    if any(line.curve.page_kind == huge != small for line in lines):
        pages += f"; dashed lines: {_kind_name(huge)} pages"
    found.append(f"{pages}. Mode charge and one thread, unless the label says otherwise.")
    if any(one.host == "cold" for one in table.measured()):
        found.append(
            "Hollow, cold host: the host of this virtual machine had to bring the memory first."
        )
    if any(line.joined for line in lines):
        found.append(
            f"Several names on one line: within {_ALIKE - 1:.0%} of each other at all lengths, or "
            f"{_PERHAPS_ALIKE - 1:.0%} where the bands overlap."
        )
    left_out = [one for chosen in panels for one in chosen.left_out]
    if left_out:
        texts = []
        for one in left_out:
            text = label([one.curve], small)
            if math.isfinite(one.factor):
                times = math.ceil(10 * one.factor) / 10
                text += f" (within {times:g} times {label([one.near], small)})"
            texts.append(text)
        found.append(f"Not drawn: {'; '.join(texts)}.")
    if table.disturbed:
        found.append(f"Noise: {table.disturbed}.")
    if not table.complete:
        found.append("The measuring was interrupted.")
    return found


def _wrap(text: str, letters: int) -> list[str]:
    return textwrap.wrap(text, letters, break_on_hyphens=False, break_long_words=False)
