"""pyreserve's own reservations: exactly in this process, by their shape in another."""

import os

from pyreserve._region.region import live_ranges
from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings

NAME = "pyreserve regions"
# Runtimes that reserve addresses and keep them out of core dumps too: .NET, sanitizers, MariaDB.
_ALIKE = r"libcoreclr|lib[atl]san|libmariadbd"


def own_regions(process: ProcessMappings) -> None:
    """Claim the regions of this very process, whose addresses it knows."""
    if not process.capture.live or process.capture.pid != os.getpid():
        return
    for low, high in live_ranges():
        process.claim_range(low, high, NAME, "this process's own regions, by their addresses")


def regions(process: ProcessMappings) -> None:
    """Claim another process's regions: reserved, and kept out of core dumps (``dd``).

    Being kept out of dumps is not enough: libraries hide secrets that way, and droppable memory has
    it too. A part must also be reserved, so a fully committed region can't be distinguished.
    """
    if process.pyreserve is None or not process.knows_flags or process.runs_code_of(_ALIKE):
        return
    alike = (
        i
        for i in process.unclaimed()
        if process.perms[i] in {RW, NONE}
        and process.has_flags(i, "dd")
        and process.lacks_flags(i, "nh io dp")
    )
    runs = process.group_adjacent(alike)
    process.claim(
        (i for run in runs if any(process.perms[j] == NONE for j in run) for i in run),
        NAME,
        "reserved without access and kept out of core dumps (dd), as pyreserve does by default; "
        f"{process.pyreserve} is mapped",
    )
