"""pyreserve's regions: by address in this process, by shape in another one."""

import os

from pyreserve._region.handles import live_ranges
from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings

NAME = "pyreserve regions"
# .NET, sanitizers and MariaDB also reserve addresses and exclude them from core dumps.
_SAME_SHAPE = r"libcoreclr|lib[atl]san|libmariadbd"


def own_regions(process: ProcessMappings) -> None:
    """Claim the regions of this process, whose addresses are known."""
    if not process.capture.live or process.capture.pid != os.getpid():
        return
    evidence = "this process's own regions, by their addresses"
    for low, high in live_ranges():
        process.claim_range(low, high, NAME, evidence)
        shared = (i for i in process.mappings_in(low, high) if _is_in_memory_file(process, i))
        process.claim(shared, NAME, evidence)


def regions(process: ProcessMappings) -> None:
    """Claim another process's regions: partly reserved, and excluded from core dumps (``dd``).

    ``dd`` alone is not enough: libraries hide secrets with it, and droppable memory has it. One
    part must be reserved, so a fully committed region is not recognised.
    """
    if process.pyreserve is None or not process.knows_flags or process.runs_code_of(_SAME_SHAPE):
        return
    candidates = (
        i
        for i in process.unclaimed()
        if process.perms[i] in {RW, NONE}
        and process.has_flags(i, "dd")
        and process.lacks_flags(i, "nh io dp")
    )
    groups = process.group_adjacent(candidates)
    process.claim(
        (i for group in groups if any(process.perms[j] == NONE for j in group) for i in group),
        NAME,
        "reserved without access and kept out of core dumps (dd), as pyreserve does by default; "
        f"{process.pyreserve} is mapped",
    )


def shared_regions(process: ProcessMappings) -> None:
    """Claim another process's shared regions: files in memory kept out of core dumps (``dd``)."""
    if process.pyreserve is None or not process.knows_flags:
        return
    process.claim(
        (
            i
            for i, _ in process.named
            if _is_in_memory_file(process, i)
            and process.is_unclaimed(i)
            and process.has_flags(i, "sh dd")
        ),
        NAME,
        "shared memory (memfd) kept out of core dumps (dd), as pyreserve does by default; "
        f"{process.pyreserve} is mapped",
    )


def _is_in_memory_file(process: ProcessMappings, i: int) -> bool:
    return bool(process.inode[i]) and process.names[i].startswith("/memfd:")
