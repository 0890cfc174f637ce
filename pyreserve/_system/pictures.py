"""Pictures as files: the same whatever somebody has set for pictures of their own."""

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
    """Refuse a name that tells no format.

    Raises:
        ValueError: the suffix is neither ``.png`` nor ``.svg``.
    """
    if path.suffix not in _SUFFIXES:
        msg = f"a picture's file ends in {' or '.join(_SUFFIXES)}, and {path} does not"
        raise ValueError(msg)


def write_picture(picture: "Figure", path: Path) -> None:
    """Write a picture, whole or not at all; its format follows the suffix.

    Raises:
        ValueError: see `check_suffix`.
        OSError: it can't be written.
    """
    check_suffix(path)
    data = io.BytesIO()
    undated = {"Date": None} if path.suffix == ".svg" else None
    with own_settings():
        picture.savefig(data, format=path.suffix[1:], metadata=undated)
    write_bytes(path, data.getvalue())


@contextmanager
def own_settings() -> Iterator[None]:
    """Draw alike everywhere, whatever somebody has set for pictures of their own.

    Raises:
        ImportError: matplotlib is missing (extra ``plot``).
    """
    matplotlib = import_extra("matplotlib", "plot", "drawing")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        # Text stays text in an SVG, and the same data make the same file.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "pyreserve"})
        yield
