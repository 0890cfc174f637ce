"""pyreserve's own reservations: exactly in this process, by their shape in another."""

import os

from pyreserve._region.handles import live_ranges
from pyreserve.procmem.judge.owners.sight import NONE, RW, Sight

NAME = "pyreserve regions"
# Runtimes that reserve addresses and keep them out of core dumps too: .NET, sanitizers, MariaDB.
_ALIKE = r"libcoreclr|lib[atl]san|libmariadbd"


def own_regions(sight: Sight) -> None:
    """Claim the regions of this very process, whose addresses it knows."""
    if not sight.capture.live or sight.capture.pid != os.getpid():
        return
    for low, high in live_ranges():
        sight.claim_range(low, high, NAME, "this process's own regions, by their addresses")


def regions(sight: Sight) -> None:
    """Claim another process's regions: reserved, and kept out of core dumps (``dd``).

    Being kept out of dumps is not enough: libraries hide secrets that way, and droppable memory has
    it too. A part must also be reserved, so a fully committed region can't be distinguished.
    """
    if sight.pyreserve is None or not sight.knows_flags or sight.runs_code_of(_ALIKE):
        return
    alike = (
        i
        for i in sight.unclaimed()
        if sight.perms[i] in {RW, NONE} and sight.has(i, "dd") and sight.lacks(i, "nh io dp")
    )
    runs = sight.neighbours(alike)
    sight.claim(
        (i for run in runs if any(sight.perms[j] == NONE for j in run) for i in run),
        NAME,
        "reserved without access and kept out of core dumps (dd), as pyreserve does by default; "
        f"{sight.pyreserve} is mapped",
    )
