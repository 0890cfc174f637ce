"""Figures as files, reproducible: the user's matplotlib settings are ignored."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pyreserve._system.extras import import_extra
from pyreserve._system.output import write_bytes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg")


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
