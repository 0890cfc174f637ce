"""The saved processes of tests/data/captures, each with its true owners.

Each was stopped when its files were read. The owners of ranges come from tracing every mmap and brk
of the program, from its own output (pthread_getattr_np, NMT, ASan's log), or from layouts, never
from the shape of the maps.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "data" / "captures"
NAMES = sorted(path.name for path in FOLDER.iterdir())


def truth(name: str) -> dict[str, Any]:
    """Return the contents of a capture's truth.json."""
    facts: dict[str, Any] = json.loads((FOLDER / name / "truth.json").read_text(encoding="utf-8"))
    return facts
