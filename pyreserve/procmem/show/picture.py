"""An address space as a picture: what it is made of, to scale, and where it lies, in order.

Which blocks it has and how they are called is decided in `pyreserve.procmem.show.blocks`.
"""

import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve._system.pictures import check_suffix, own_settings, write_picture
from pyreserve.errors import MapsError
from pyreserve.procmem.judge.classes import (
    FILE,
    NO_ACCESS,
    PRIVATE,
    SHARED,
    SPECIAL,
    SWAPPED,
    UNTOUCHED,
    WORDS,
)
from pyreserve.procmem.show.blocks import Block, blocks, far, holes, label, printable, shorten
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    from pyreserve.procmem.space import AddressSpace

_DPI = 200
# Inches and points: shown 900 pixels wide, 8 points of 9 inches are 11 pixels high.
_WIDTH, _MARGIN = 9.0, 0.15
_LEFT, _STRIP, _NAMES = 1.02, 2.2, 3.38  # where bars begin, how wide the strip is, where names are
_SIZES, _MEMORY = 7.95, _WIDTH - _MARGIN  # where figures end
_SMALL, _TEXT, _HEADING, _TITLE = 7.2, 8.2, 10.5, 13.0
_LINE = 1.3  # a line's height, of its letters'
_BAR = 0.2
# Heights of the strip: of a block of 4 KiB, of each doubling, of all if there are many, of holes.
_LEAST, _DOUBLING, _HIGH = 0.16, 0.032, 6.0
_HOLE, _BREAK = 0.19, 0.05
_TWO_LINES = 0.32
_HAIR = 0.03
_INK, _GREY, _FRAME, _LINES = "#222222", "#595959", "#8a8a8a", "#dddddd"
_MUCH = 20  # percent of all, to be printed bold

# From what costs memory to what costs nothing, and from dark to pale, so that it reads in grey.
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


def draw(space: "AddressSpace", path: Path) -> None:
    """Write the picture, whole or not at all; its format follows the suffix.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``; `MapsError`: see `figure`.
        ImportError: matplotlib is missing (extra ``plot``).
        OSError: it can't be written.
    """
    check_suffix(path)
    write_picture(figure(space), path)


def figure(space: "AddressSpace") -> "Figure":
    """Draw what the addresses are, to scale, and all blocks of them in order, logarithmically.

    The artists have names (``get_gid``), which are their ids in an SVG: a block ``block-7`` has the
    label ``label-7``.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
        MapsError: it is not known which mappings are in memory.
    """
    if space.uss_kib is None:
        msg = "a picture shows which mappings are in memory: smaps is needed, and can't be read"
        raise MapsError(msg)
    with own_settings():
        return _Picture(space).figure


class _Picture:
    """One picture while it is drawn. Places are inches, from the left and from the top."""

    def __init__(self, space: "AddressSpace") -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        self.space = space
        self.blocks = blocks(space)
        self.memory = sum(block.memory_kib for block in self.blocks)
        self.figure = Figure((_WIDTH, 1), dpi=_DPI, facecolor="white")
        # Typed as anything, for its methods have no types.
        canvas: Any = FigureCanvasAgg(self.figure)
        self.renderer = canvas.get_renderer()
        self.at: list[tuple[Any, float]] = []
        y = self.heading(_MARGIN)
        y = self.totals(y + 0.12)
        y = self.strip(y + 0.2)
        self.finish(y + _MARGIN)

    def finish(self, height: float) -> None:
        """Turn what was placed from the top around, now that the height is known."""
        self.figure.set_size_inches(_WIDTH, height)
        for artist, y in self.at:
            artist.set_y(height - y)

    def text(
        self, x: float, y: float, text: str, size: float = _TEXT, colour: str = _INK, **rest: Any
    ) -> "Text":
        # A name may have dollars in it.
        how: dict[str, Any] = {"va": "top", "parse_math": False} | rest
        where = self.figure.dpi_scale_trans
        made = self.figure.text(
            x, 0, _written(text), fontsize=size, color=colour, transform=where, **how
        )
        self.at.append((made, y))
        return made

    def box(self, x: float, y: float, wide: float, high: float, **style: Any) -> None:
        """Draw a rectangle, from its upper left corner."""
        from matplotlib.patches import Rectangle  # noqa: PLC0415

        how: dict[str, Any] = {"edgecolor": "none", "linewidth": 0} | style
        made = Rectangle((x, 0), wide, high, transform=self.figure.dpi_scale_trans, **how)
        self.figure.add_artist(made)
        self.at.append((made, y + high))

    def wide(self, text: str, size: float, weight: str = "normal") -> float:
        """Measure a text, in inches."""
        from matplotlib.font_manager import FontProperties  # noqa: PLC0415

        font = FontProperties(size=size, weight=weight)
        return (
            float(self.renderer.get_text_width_height_descent(_written(text), font, False)[0])
            / _DPI
        )

    def wrapped(self, text: str, size: float, room: float) -> list[str]:
        """Break a text into lines at its spaces."""
        lines = [""]
        for word in map(printable, text.split()):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.wide(longer, size) > room:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines

    def heading(self, y: float) -> float:
        space = self.space
        room = _WIDTH - 2 * _MARGIN
        whose = printable(space.name) or "a process"
        title = (
            f"{whose}{f', pid {space.pid}' if space.pid is not None else ''}: "
            f"{format_size(space.vsz_kib * KiB)} of addresses, "
            f"{format_size(self.memory * KiB)} of memory"
        )
        title = shorten(title, lambda text: self.wide(text, _TITLE, "bold") <= room)
        self.text(_MARGIN, y, title, _TITLE, weight="bold", gid="title")
        y += _TITLE * 1.45 / 72
        lines = [
            line
            for text in (space.verdict, *(f"Worth a look: {one}." for one in space.warnings))
            for line in self.wrapped(text, _TEXT + 0.6, room)
        ]
        self.text(_MARGIN, y, "\n".join(lines), _TEXT + 0.6, linespacing=_LINE, gid="verdict")
        return y + len(lines) * (_TEXT + 0.6) * 1.25 * _LINE / 72

    def totals(self, y: float) -> float:
        """Draw VSZ and memory to scale, and say what the colours are."""
        space = self.space
        kib = [one.kib for one in space.classes]
        vsz = max(1, space.vsz_kib)
        y = self.caption(y, "To scale", "linear, but memory is at least a hair wide")
        room = _SIZES - 0.75 - _LEFT
        in_memory = [size if which in _IN_MEMORY else 0 for which, size in enumerate(kib)]
        for name, amount, sizes in (("VSZ", vsz, kib), ("memory", self.memory, in_memory)):
            how: dict[str, Any] = {"va": "center_baseline"}
            self.text(_LEFT - 0.08, y + _BAR / 2, name, ha="right", weight="bold", **how)
            long = self.shares(_LEFT, y, room * amount / vsz, _BAR, sizes)
            share = "" if name == "VSZ" else f" ({_percent(amount, vsz)} of VSZ)"
            words = f"{format_size(amount * KiB)}{share}"
            self.text(_LEFT + long + 0.08, y + _BAR / 2, words, **how)
            y += _BAR + 0.07
        y += 0.06
        shown = [which for which in _ORDER if kib[which]]
        columns = [_LEFT + i * (_MEMORY - _LEFT) / 3 for i in range(3)]
        rows = math.ceil(len(shown) / 3)
        for i, which in enumerate(shown):
            x, line = columns[i // rows], y + i % rows * 0.2
            self.box(x, line, 0.26, 0.14, **_STYLES[which])
            self.box(x, line, 0.26, 0.14, facecolor="none", edgecolor=_FRAME, linewidth=0.5)
            words = f"{WORDS[which]}: {format_size(kib[which] * KiB)}"
            self.text(x + 0.33, line + 0.07, words, va="center")
        return y + rows * 0.2

    def caption(self, y: float, title: str, words: str) -> float:
        """Name a part of the picture and say how to read it."""
        self.text(_MARGIN, y, title, _HEADING, weight="bold")
        left = _MARGIN + self.wide(title, _HEADING, "bold") + 0.12
        self.text(left, y + 0.034, words, _SMALL, _GREY)
        return y + 0.27

    def shares(
        self, x: float, y: float, wide: float, high: float, kib: list[int], gid: str | None = None
    ) -> float:
        """Draw a bar that is divided by class; return how wide it is: memory is to be seen."""
        total = sum(kib) or 1
        memory = sum(kib[which] for which in _IN_MEMORY)
        seen = max(wide * memory / total, _HAIR if memory else 0)
        others = (max(wide, seen) - seen) / ((total - memory) or 1)
        at = x
        for which in _ORDER:
            if kib[which]:
                part = kib[which] * (seen / memory if which in _IN_MEMORY else others)
                self.box(at, y, part, high, **_STYLES[which])
                at += part
        frame = {"facecolor": "none", "edgecolor": _FRAME, "linewidth": 0.6, "gid": gid}
        self.box(x, y, at - x, high, **frame)
        return at - x

    def strip(self, y: float) -> float:
        """Draw the blocks, from low addresses to high ones."""
        words = (
            "height: logarithm of a block's size; inside, across: shares, linear, "
            "memory at least a hair"
        )
        y = self.caption(y, "In address order", words)
        for x, name, ha in (
            (_LEFT - 0.08, "address", "right"),
            (_NAMES, "owner", "left"),
            (_SIZES, "size", "right"),
            (_MEMORY, "in memory", "right"),
        ):
            self.text(x, y, name, _SMALL, _GREY, ha=ha)
        y += 0.17
        gaps = holes(self.blocks)
        large = far(self.blocks)
        doublings = [math.log2(max(4, block.size_kib) / 4) for block in self.blocks]
        least = _LEAST * len(doublings) + sum(_HOLE for gap in gaps if gap > large)
        each = min(_DOUBLING, max(0.006, (_HIGH - least) / (sum(doublings) or 1)))
        for i, (block, power) in enumerate(zip(self.blocks, doublings, strict=True)):
            high = _LEAST + power * each
            self.block(i, block, y, high)
            y += high
            gap = gaps[i] if i < len(gaps) else 0
            if i == len(gaps) or gap > large:
                self.address(block.end, y)
            if gap > large:
                middle = _LEFT + _STRIP / 2
                words = f"hole of {format_size(gap)}"
                self.text(middle, y + _HOLE / 2, words, _SMALL, _GREY, ha="center", va="center")
                y += _HOLE
            elif gap:
                y += _BREAK
        return y + 0.15

    def block(self, i: int, block: Block, y: float, high: float) -> None:
        self.box(_LEFT, y, _MEMORY - _LEFT, 0.006, facecolor=_LINES)
        self.shares(_LEFT, y, _STRIP, high, block.kib, f"block-{i}")
        self.address(block.start, y)
        size, memory = block.size_kib, block.memory_kib
        weight = "bold" if 100 * size >= _MUCH * self.space.vsz_kib else "normal"
        room = _SIZES - 0.75 - _NAMES
        name = label(block, lambda text: self.wide(text, _TEXT, weight) <= room)
        detail = _detail(block) if high >= _TWO_LINES else ""
        detail = shorten(detail, lambda text: self.wide(text, _SMALL) <= room)
        middle = y + high / 2 - (0.07 if detail else 0)
        how: dict[str, Any] = {"va": "center_baseline"}
        self.text(_NAMES, middle, name, gid=f"label-{i}", weight=weight, **how)
        if detail:
            self.text(_NAMES, middle + 0.145, detail, _SMALL, _GREY, **how)
        self.text(_SIZES, middle, format_size(size * KiB), ha="right", weight=weight, **how)
        how["weight"] = "bold" if 100 * memory >= _MUCH * self.memory > 0 else "normal"
        words = format_size(memory * KiB) if memory else "0"
        self.text(_MEMORY, middle, words, ha="right", **how)

    def address(self, address: int, y: float) -> None:
        """Write an address under the border that it is of."""
        self.box(_LEFT - 0.06, y, 0.06, 0.008, facecolor=_FRAME)
        self.text(
            _LEFT - 0.08, y, f"{address:x}", _SMALL - 0.2, _GREY, ha="right", family="monospace"
        )


def _detail(block: Block) -> str:
    """Say what of a block is not memory, most first."""
    kib = block.kib
    order = sorted((which for which in _ORDER if kib[which]), key=lambda which: -kib[which])
    parts = [
        f"{_SHORT[which]} {format_size(kib[which] * KiB)}"
        for which in order
        if which not in _IN_MEMORY
    ]
    return ", ".join(parts)


def _percent(part: int, whole: int) -> str:
    share = 100 * part / whole
    return f"{share:.0f} %" if share >= 10 else f"{share:.2g} %"


def _written(text: str) -> str:
    """Put a question mark for each character that the font has not."""
    return "".join(one if ord(one) in _letters() or one == "\n" else "?" for one in text)


@functools.cache
def _letters() -> frozenset[int]:
    """Return the characters that the font has."""
    from matplotlib.font_manager import FontProperties, findfont, get_font  # noqa: PLC0415

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
