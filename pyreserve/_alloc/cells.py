"""Cells: a sequence over a container's memory, into which its fast calls store items.

A store into a memoryview runs no Python code if the value is a number or a buffer of plain items.
With a GIL neither another thread nor a signal handler runs between its bytecodes and those of an
assignment to an attribute, so both in one line, which excludes tracers too, are one step.
"""

import sys

HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
# Raised by cells that have no item at the index, or cannot store the value.
REFUSED = (IndexError, TypeError, ValueError, OverflowError)
NO_CELLS = memoryview(b"")
NOWHERE = sys.maxsize  # an index beyond all cells
