"""Draw an address space: bars of its classes to scale, and its blocks in address order.

`pyreserve.procmem.show.blocks` chooses the blocks and their labels.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve._system.pictures import (
    GREY,
    HEADING,
    INK,
    LINE,
    Sheet,
    check_suffix,
    own_settings,
    write_picture,
)
from pyreserve._system.report import printable
from pyreserve.errors import MapsError
from pyreserve.procmem.judge.classes import (
    FILE,
    LABELS,
    NO_ACCESS,
    PRIVATE,
    SHARED,
    SPECIAL,
    SWAPPED,
    UNTOUCHED,
)
from pyreserve.procmem.show.blocks import (
    Block,
    blocks,
    holes,
    label,
    min_large_hole,
    shorten,
)
from pyreserve.procmem.show.explained import Explained
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

# Inches and points. At 900 pixels for 9 inches, 8-point text is 11 pixels high.
_WIDTH, _MARGIN = 9.0, 0.15
_LEFT, _STRIP, _NAMES = 1.02, 2.2, 3.38  # left edge of bars, width of the strip, left edge of names
_SIZES, _MEMORY = 7.95, _WIDTH - _MARGIN  # right edges of the two columns of figures
_SMALL, _TEXT, _TITLE = 7.2, 8.2, 13.0
_BAR = 0.2
# Heights in the strip: a 4 KiB block, each doubling, the maximum of all blocks, holes.
_MIN_HEIGHT, _DOUBLING, _MAX_HEIGHT = 0.16, 0.032, 6.0
_HOLE, _BREAK = 0.19, 0.05
_TWO_LINES = 0.32
_MIN_MEMORY_WIDTH = 0.03
_FRAME, _LINES = "#8a8a8a", "#dddddd"
_BOLD_PERCENT = 20  # share of the total from which a figure is bold

# From classes that cost memory, dark, to those that cost nothing, pale: readable in grey too.
_ORDER = (PRIVATE, SHARED, SWAPPED, SPECIAL, FILE, UNTOUCHED, NO_ACCESS)
_SHORT = {
    SWAPPED: "in swap",
    SPECIAL: "the kernel's own",
    FILE: "file",
    UNTOUCHED: "untouched",
    NO_ACCESS: "reserved",
}
_IN_MEMORY = (PRIVATE, SHARED)
_STYLES: dict[int, dict[str, Any]] = {
    PRIVATE: {"facecolor": "#08306b"},
    SHARED: {"facecolor": "#3f7fc1"},
    SWAPPED: {"facecolor": "#a3265a", "edgecolor": "#ffffff", "hatch": "\\\\\\\\\\\\"},
    SPECIAL: {"facecolor": "#9a9a9a", "edgecolor": "#ffffff", "hatch": "xxxxxx"},
    FILE: {"facecolor": "#bfe3d3", "edgecolor": "#5aa98a", "hatch": "-----"},
    UNTOUCHED: {"facecolor": "#f7dc9c", "edgecolor": "#c79a35", "hatch": "...."},
    NO_ACCESS: {"facecolor": "#fafafa", "edgecolor": "#b9b9b9", "hatch": "////"},
}


def draw(space: Explained, path: str | Path | None = None) -> "Figure":
    """Draw the picture; also write it to a file if given, in the format of the suffix.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``; `MapsError`: see `figure`.
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: the file can't be written.
    """
    if path is None:
        return figure(space)
    path = Path(path)
    check_suffix(path)
    picture = figure(space)
    write_picture(picture, path)
    return picture


def figure(space: Explained) -> "Figure":
    """Draw the classes to scale, and the blocks in address order on a logarithmic scale.

    Artists have names (``get_gid``), which become ids in an SVG: block ``block-7`` has the label
    ``label-7``.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
        MapsError: it is not known which mappings are resident (smaps can't be read).
    """
    if space.uss is None:
        msg = "the picture needs to know which mappings are in memory, but smaps can't be read"
        raise MapsError(msg)
    with own_settings():
        return _Picture(space).figure


class _Picture(Sheet):
    """A picture during drawing. Positions are inches from the left and from the top."""

    def __init__(self, space: Explained) -> None:
        super().__init__(_WIDTH, 1)
        self.space = space
        self.blocks = blocks(space.maps())
        self.memory = sum(block.memory for block in self.blocks)
        self.placed: list[tuple[Any, float]] = []
        y = self.heading(_MARGIN)
        y = self.totals(y + 0.12)
        y = self.strip(y + 0.2)
        self.finish(y + _MARGIN)

    def finish(self, height: float) -> None:
        """Set the height, and move all artists: matplotlib counts from the bottom."""
        self.figure.set_size_inches(_WIDTH, height)
        for artist, y in self.placed:
            artist.set_y(height - y)

    def text(
        self, x: float, y: float, text: str, size: float = _TEXT, colour: str = INK, **style: Any
    ) -> "Text":
        """Write a text with its upper left corner at (x, y)."""
        artist = super().text(x, 0, text, size, colour, **style)
        self.placed.append((artist, y))
        return artist

    def box(self, x: float, y: float, width: float, height: float, **style: Any) -> None:
        """Draw a rectangle with this upper left corner."""
        from matplotlib.patches import Rectangle  # noqa: PLC0415

        options: dict[str, Any] = {"edgecolor": "none", "linewidth": 0} | style
        artist = Rectangle((x, 0), width, height, transform=self.figure.dpi_scale_trans, **options)
        self.figure.add_artist(artist)
        self.placed.append((artist, y + height))

    def heading(self, y: float) -> float:
        space = self.space
        width = _WIDTH - 2 * _MARGIN
        process = printable(space.name) or "a process"
        title = (
            f"{process}{f', pid {space.pid}' if space.pid is not None else ''}: "
            f"{format_size(space.vsz)} of addresses, "
            f"{format_size(self.memory)} of memory"
        )
        title = shorten(title, lambda text: self.text_width(text, _TITLE, "bold") <= width)
        self.text(_MARGIN, y, title, _TITLE, weight="bold", gid="title")
        y += _TITLE * 1.45 / 72
        lines = [
            line
            for text in (
                space.verdict,
                *(f"Worth a look: {warning}." for warning in space.warnings),
            )
            for line in self.wrapped(text, _TEXT + 0.6, width)
        ]
        self.text(_MARGIN, y, "\n".join(lines), _TEXT + 0.6, linespacing=LINE, gid="verdict")
        return y + len(lines) * (_TEXT + 0.6) * 1.25 * LINE / 72

    def totals(self, y: float) -> float:
        """Draw VSZ and resident memory to scale, with a legend."""
        space = self.space
        sizes = [memory_class.size for memory_class in space.classes]
        vsz = max(1, space.vsz)
        y = self.caption(y, "To scale", "linear, with a minimum width for memory")
        width = _SIZES - 0.75 - _LEFT
        in_memory = [size if index in _IN_MEMORY else 0 for index, size in enumerate(sizes)]
        for name, amount, bar in (("VSZ", vsz, sizes), ("memory", self.memory, in_memory)):
            style: dict[str, Any] = {"va": "center_baseline"}
            self.text(_LEFT - 0.08, y + _BAR / 2, name, ha="right", weight="bold", **style)
            bar_width = self.shares(_LEFT, y, width * amount / vsz, _BAR, bar)
            share = "" if name == "VSZ" else f" ({_percent(amount, vsz)} of VSZ)"
            words = f"{format_size(amount)}{share}"
            self.text(_LEFT + bar_width + 0.08, y + _BAR / 2, words, **style)
            y += _BAR + 0.07
        y += 0.06
        shown = [index for index in _ORDER if sizes[index]]
        columns = [_LEFT + i * (_MEMORY - _LEFT) / 3 for i in range(3)]
        rows = math.ceil(len(shown) / 3)
        for i, index in enumerate(shown):
            x, line = columns[i // rows], y + i % rows * 0.2
            self.box(x, line, 0.26, 0.14, **_STYLES[index])
            self.box(x, line, 0.26, 0.14, facecolor="none", edgecolor=_FRAME, linewidth=0.5)
            words = f"{LABELS[index]}: {format_size(sizes[index])}"
            self.text(x + 0.33, line + 0.07, words, va="center")
        return y + rows * 0.2

    def caption(self, y: float, title: str, words: str) -> float:
        """Write the title of a part of the picture and how to read it."""
        self.text(_MARGIN, y, title, HEADING, weight="bold")
        left = _MARGIN + self.text_width(title, HEADING, "bold") + 0.12
        self.text(left, y + 0.034, words, _SMALL, GREY)
        return y + 0.27

    def shares(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        sizes: list[int],
        gid: str | None = None,
    ) -> float:
        """Draw a bar divided by class; return its width, at least what visible memory needs."""
        total = sum(sizes) or 1
        memory = sum(sizes[index] for index in _IN_MEMORY)
        memory_width = max(width * memory / total, _MIN_MEMORY_WIDTH if memory else 0)
        other_scale = (max(width, memory_width) - memory_width) / ((total - memory) or 1)
        at = x
        for index in _ORDER:
            if sizes[index]:
                part = sizes[index] * (
                    memory_width / memory if index in _IN_MEMORY else other_scale
                )
                self.box(at, y, part, height, **_STYLES[index])
                at += part
        frame = {"facecolor": "none", "edgecolor": _FRAME, "linewidth": 0.6, "gid": gid}
        self.box(x, y, at - x, height, **frame)
        return at - x

    def strip(self, y: float) -> float:
        """Draw the blocks, from low addresses to high ones."""
        words = (
            "height: logarithm of a block's size; colours: share of each class, linear, "
            "with a minimum width for memory"
        )
        y = self.caption(y, "In address order", words)
        for x, name, ha in (
            (_LEFT - 0.08, "address", "right"),
            (_NAMES, "owner", "left"),
            (_SIZES, "size", "right"),
            (_MEMORY, "in memory", "right"),
        ):
            self.text(x, y, name, _SMALL, GREY, ha=ha)
        y += 0.17
        gaps = holes(self.blocks)
        large = min_large_hole(self.blocks)
        doublings = [math.log2(max(4 * KiB, block.size) / (4 * KiB)) for block in self.blocks]
        fixed = _MIN_HEIGHT * len(doublings) + sum(_HOLE for gap in gaps if gap > large)
        doubling = min(_DOUBLING, max(0.006, (_MAX_HEIGHT - fixed) / (sum(doublings) or 1)))
        for i, (block, power) in enumerate(zip(self.blocks, doublings, strict=True)):
            height = _MIN_HEIGHT + power * doubling
            self.block(i, block, y, height)
            y += height
            gap = gaps[i] if i < len(gaps) else 0
            if i == len(gaps) or gap > large:
                self.address(block.end, y)
            if gap > large:
                middle = _LEFT + _STRIP / 2
                words = f"hole of {format_size(gap)}"
                self.text(middle, y + _HOLE / 2, words, _SMALL, GREY, ha="center", va="center")
                y += _HOLE
            elif gap:
                y += _BREAK
        return y + 0.15

    def block(self, i: int, block: Block, y: float, height: float) -> None:
        self.box(_LEFT, y, _MEMORY - _LEFT, 0.006, facecolor=_LINES)
        self.shares(_LEFT, y, _STRIP, height, block.sizes, f"block-{i}")
        self.address(block.start, y)
        size, memory = block.size, block.memory
        weight = "bold" if 100 * size >= _BOLD_PERCENT * self.space.vsz else "normal"
        width = _SIZES - 0.75 - _NAMES
        name = label(block, lambda text: self.text_width(text, _TEXT, weight) <= width)
        detail = _detail(block) if height >= _TWO_LINES else ""
        detail = shorten(detail, lambda text: self.text_width(text, _SMALL) <= width)
        middle = y + height / 2 - (0.07 if detail else 0)
        style: dict[str, Any] = {"va": "center_baseline"}
        self.text(_NAMES, middle, name, gid=f"label-{i}", weight=weight, **style)
        if detail:
            self.text(_NAMES, middle + 0.145, detail, _SMALL, GREY, **style)
        self.text(_SIZES, middle, format_size(size), ha="right", weight=weight, **style)
        style["weight"] = "bold" if 100 * memory >= _BOLD_PERCENT * self.memory > 0 else "normal"
        words = format_size(memory) if memory else "0"
        self.text(_MEMORY, middle, words, ha="right", **style)

    def address(self, address: int, y: float) -> None:
        """Write an address under the border that it belongs to."""
        self.box(_LEFT - 0.06, y, 0.06, 0.008, facecolor=_FRAME)
        self.text(
            _LEFT - 0.08, y, f"{address:x}", _SMALL - 0.2, GREY, ha="right", family="monospace"
        )


def _detail(block: Block) -> str:
    """Return the sizes of a block's classes outside memory, largest first."""
    sizes = block.sizes
    order = sorted((index for index in _ORDER if sizes[index]), key=lambda index: -sizes[index])
    parts = [
        f"{_SHORT[index]} {format_size(sizes[index])}" for index in order if index not in _IN_MEMORY
    ]
    return ", ".join(parts)


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"
