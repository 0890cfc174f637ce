"""Figures placed in inches and written reproducibly, whatever the user's matplotlib settings."""

import functools
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyreserve._system.extras import import_extra
from pyreserve._system.output import write_bytes
from pyreserve._system.report import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

DPI = 200
HEADING = 10.5  # points
LINE = 1.3  # line height over font size
INK, GREY = "#222222", "#595959"
_SUFFIXES = (".png", ".svg")


class Sheet:
    """A white figure whose texts are placed in inches from its lower left corner."""

    def __init__(self, width: float, height: float) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
        from matplotlib.figure import Figure  # noqa: PLC0415

        self.figure = Figure((width, height), dpi=DPI, facecolor="white")
        # Any: the methods of the canvas have no types.
        canvas: Any = FigureCanvasAgg(self.figure)
        self._renderer = canvas.get_renderer()

    def text(
        self, x: float, y: float, text: str, size: float, colour: str = INK, **style: Any
    ) -> "Text":
        """Write a text of `size` points with its upper left corner at (x, y)."""
        # parse_math: a name may contain dollar signs.
        options: dict[str, Any] = {"va": "top", "parse_math": False} | style
        inches = self.figure.dpi_scale_trans
        return self.figure.text(
            x, y, _replace_missing(text), fontsize=size, color=colour, transform=inches, **options
        )

    def text_width(self, text: str, size: float, weight: str = "normal") -> float:
        """Return the width of a text in inches."""
        from matplotlib.font_manager import FontProperties  # noqa: PLC0415

        font = FontProperties(size=size, weight=weight)
        extent = self._renderer.get_text_width_height_descent(_replace_missing(text), font, False)
        return float(extent[0]) / DPI

    def wrapped(self, text: str, size: float, width: float) -> list[str]:
        """Break a text into lines of at most `width` inches at its spaces."""
        lines = [""]
        for word in map(printable, text.split()):
            longer = f"{lines[-1]} {word}".strip()
            if lines[-1] and self.text_width(longer, size) > width:
                lines.append(word)
            else:
                lines[-1] = longer
        return lines


def _replace_missing(text: str) -> str:
    """Replace characters that are missing in the font by question marks."""
    drawable = _font_characters()
    return "".join(char if ord(char) in drawable or char == "\n" else "?" for char in text)


@functools.cache
def _font_characters() -> frozenset[int]:
    """Return the code points in the font."""
    from matplotlib.font_manager import FontProperties, findfont, get_font  # noqa: PLC0415

    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())


def check_suffix(path: Path) -> None:
    """Check that the suffix of a file name selects a format.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``.
    """
    if path.suffix not in _SUFFIXES:
        msg = f"a picture's file name must end in {' or '.join(_SUFFIXES)}, got {path}"
        raise ValueError(msg)


def write_picture(picture: "Figure", path: Path) -> None:
    """Write a figure atomically, in the format of the suffix.

    Raises:
        ValueError: see `check_suffix`.
        OSError: the file cannot be written.
        ImportError: matplotlib is missing (extra ``plot``).
    """
    check_suffix(path)
    data = io.BytesIO()
    undated = {"Date": None} if path.suffix == ".svg" else None
    with own_settings():
        picture.savefig(data, format=path.suffix[1:], metadata=undated)
    write_bytes(path, data.getvalue())


@contextmanager
def own_settings() -> Iterator[None]:
    """Use matplotlib's defaults inside the block instead of the user's settings.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
    """
    matplotlib = import_extra("matplotlib", "plot", "drawing")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Keep text as text in an SVG, and make its ids reproducible.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pyreserve"})
        yield
