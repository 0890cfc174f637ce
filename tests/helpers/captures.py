"""Saved processes with the truth about each: what tests/data/captures holds.

Each was stopped when its files were read. The owners of ranges come from tracing every mmap and brk
of the program, from its own words (pthread_getattr_np, NMT, ASan's log), or from layouts, and never
from the shape of the maps.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data" / "captures"
NAMES = sorted(path.name for path in FOLDER.iterdir())


def truth(name: str) -> dict[str, Any]:
    """Return what is true of a capture."""
    found: dict[str, Any] = json.loads((FOLDER / name / "truth.json").read_text(encoding="utf-8"))
    return found
