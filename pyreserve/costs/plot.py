"""Draw a cost table: time against length, with a panel for each group of verbs.

A panel has the curves of small pages and of the largest huge pages, in the order of `METHODS`, as
far as nine of them can be told apart.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from pyreserve._system.pictures import DPI, GREY, check_suffix, own_settings, write_picture
from pyreserve.costs.cells import GROUPS, METHODS, Curve
from pyreserve.costs.results import Measured
from pyreserve.costs.stats import ENOUGH, is_known
from pyreserve.units import format_size, format_time, parse_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDTH, _HEAD, _PANEL = 10.4, 1.1, 3.2  # inches; shown 1000 pixels wide, 8 points are 11 pixels
_TEXT, _TITLE = 8.0, 13.0  # points
# Dark enough for text; the markers distinguish the lines without colours.
_COLOURS = ["#0b5394", "#b04a00", "#1b7a47", "#a3163a", "#6a3d9a", "#00707a", "#6f5500", "#a82f78"]
_COLOURS += ["#3f3f3f"]
_MARKERS = "os^DvPX<>"
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.6)))  # for small pages, huge pages


class Line(NamedTuple):
    """A curve to draw, and its measured cells, shortest first; `variant` is 1 for huge pages."""

    curve: Curve
    cells: Sequence[Measured]
    variant: int

    @property
    def label(self) -> str:
        """The verb, the method if there are several, and the size of a huge page."""
        verb, method, kind = self.curve.verb, self.curve.method, self.curve.page_kind
        name = verb if len(METHODS[verb]) == 1 else f"{verb} {method}"
        return f"{name}, {format_size(parse_size(kind))}" if self.variant else name


def choose(curves: Mapping[Curve, Sequence[Measured]], verbs: Sequence[str]) -> list[Line]:
    """Choose the lines of a panel for these verbs: each verb's first method before the others."""
    kinds = sorted({curve.page_kind for curve in curves}, key=parse_size)
    methods = [(i > 0, verb, m) for verb in verbs for i, m in enumerate(METHODS[verb])]
    lines = []
    for variant, kind in enumerate(dict.fromkeys(kinds[:1] + kinds[-1:])):
        for _, verb, method in sorted(methods, key=lambda method: method[0]):
            curve = Curve(verb, method, kind)
            if curve in curves:
                lines.append(Line(curve, curves[curve], variant))
    return lines[: len(_COLOURS)]


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

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
    """
    with own_settings():
        from matplotlib.figure import Figure  # noqa: PLC0415  # slow to import

        curves = {curve: _drawable(cells) for curve, cells in table.curves().items()}
        curves = {curve: cells for curve, cells in curves.items() if cells}
        chosen = {group: choose(curves, verbs) for group, verbs in GROUPS.items()}
        panels = {group: lines for group, lines in chosen.items() if lines}
        rows = -(-len(panels) // 2) or 1
        size = (_WIDTH, _HEAD + rows * _PANEL)
        picture = Figure(size, dpi=DPI, facecolor="white", layout="constrained")
        cpu, kernel = table.machine.get("cpu"), table.machine.get("kernel")
        machine = f"{cpu or 'an unknown CPU'}{f', Linux {kernel}' if kernel else ''}"
        title = picture.suptitle(f"What virtual memory costs on {machine}", fontsize=_TITLE)
        title.set_parse_math(False)
        cold = _drawable(entry for entry in table.measured() if entry.host == "cold")
        places = iter(picture.subplots(rows, 2, squeeze=False).flat)
        for group, lines in panels.items():
            _panel(next(places), group, lines, cold)
        for empty in places:
            empty.remove()
        omitted = len(curves) - sum(map(len, panels.values()))
        notes = "\n".join(_notes(table, panels, omitted, bool(cold)))
        picture.supxlabel(notes, fontsize=_TEXT, color=GREY).set_parse_math(False)
        return picture


def _notes(
    table: Drawable, panels: Mapping[str, Sequence[Line]], omitted: int, cold: bool
) -> Iterator[str]:
    """Yield the notes on how to read the picture and on what it omits."""
    if not panels:
        yield "Nothing was measured that can be drawn."
        return
    yield "Medians, with 95 % bands where known. Dashed: huge pages."
    if cold:
        yield "Hollow: cold, the hypervisor had to supply the memory."
    if omitted:
        yield f"Curves not drawn: {omitted}: see table or JSON."
    if table.disturbed:
        yield f"Noise: {table.disturbed}."
    if not table.complete:
        yield "The measurement was interrupted."


def _panel(axes: "Axes", group: str, lines: Sequence[Line], cold: Iterable[Measured]) -> None:
    axes.set(xscale="log", yscale="log")
    axes.set_title(group, loc="left", fontsize=_TEXT + 2, fontweight="bold")
    methods = list(dict.fromkeys((line.curve.verb, line.curve.method) for line in lines))
    for line in lines:
        style = methods.index((line.curve.verb, line.curve.method))
        colour, marker = _COLOURS[style], _MARKERS[style]
        xs, ys = zip(*map(_point, line.cells), strict=True)
        low, high = zip(*map(_band, line.cells), strict=True)
        axes.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
        options: dict[str, Any] = {"c": colour, "ms": 3.6, "lw": 1.3, "mew": 0}
        axes.plot(xs, ys, marker, ls=_DASHES[line.variant], label=line.label, **options)
        for entry in cold:
            if Curve.of(entry.cell) == line.curve:
                x, y = _point(entry)
                axes.plot([x], [y], marker, c=colour, mfc="white", ms=5.5, mew=1.1)
    times, lengths = axes.yaxis, axes.xaxis
    times.set_major_formatter(lambda ns, _: format_time(ns) if ns < 1e12 else f"{ns / 1e9:.0f} s")
    first, last = (max(1, round(math.log2(limit))) for limit in axes.get_xlim())
    step = max(1, (last - first) // 5)
    sizes = [1 << power for power in range(first, last + 1, step)]
    axes.set_xticks(sizes, [format_size(size) for size in sizes])
    lengths.set_minor_locator(_no_ticks())
    times.set_minor_locator(_no_ticks())
    axes.tick_params(labelsize=_TEXT, labelcolor=GREY, color=GREY, length=3)
    axes.grid(visible=True, color="#e6e6e6", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=_TEXT, frameon=False)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator  # noqa: PLC0415  # slow to import

    return NullLocator()


def _drawable(cells: Iterable[Measured]) -> list[Measured]:
    """Return the cells with a positive median: the axes are logarithmic."""
    return [entry for entry in cells if entry.times is not None and entry.times.median > 0]


def _point(entry: Measured) -> tuple[float, float]:
    assert entry.times is not None
    return entry.cell.nbytes, entry.times.median


def _band(entry: Measured) -> tuple[float, float]:
    """Return the interval of a cell; (nan, nan), which is not drawn, if it is too uncertain."""
    assert entry.times is not None
    certain = entry.times.passes >= ENOUGH and is_known(entry.times.ci95)
    return entry.times.ci95 if certain else (math.nan, math.nan)
