"""Refuses to allocate more memory for a shared region than there is.

Private memory is only promised by a commit; that of a file is allocated. Beyond what is available
the kernel does not refuse that: the OOM killer ends a process, usually this one.
"""

import errno
from typing import Any

from pyreserve._region.handles import copy_runs, refused
from pyreserve._system import proc
from pyreserve.units import MiB

LARGE = 64 * MiB
"""Smaller commits are not checked: reading /proc would take longer than to allocate."""


def check_memory(handle: Any, size: int, verb: str, offset: int, length: int) -> None:
    """Check that the memory of a shared range that is to be committed is available.

    It may be taken by others before it is allocated. The caller holds the lock of the region.

    Raises:
        OutOfMemoryError: there is not as much memory and free swap space.
    """
    if not 0 <= offset <= size - length < size:
        return  # C refuses it
    missing = _uncommitted(handle, offset, offset + length)
    if handle.mirrored:
        missing //= 2
    if missing > proc.available_bytes() + proc.free_swap():
        raise refused(handle, size, verb, errno.ENOMEM, offset, missing)


def _uncommitted(handle: Any, lo: int, hi: int) -> int:
    runs = copy_runs(handle, committed=True)
    pieces = ((max(start, lo), min(end, hi)) for start, end in runs)
    return hi - lo - sum(max(0, end - start) for start, end in pieces)
