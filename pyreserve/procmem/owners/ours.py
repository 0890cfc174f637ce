"""pyreserve's own reservations: exactly in this process, by their shape in another."""

import os

from pyreserve.procmem.owners.sight import NONE, RW, Sight
from pyreserve.region import live_ranges

NAME = "pyreserve regions"


def own_regions(sight: Sight) -> None:
    """Claim the regions of this very process, whose addresses it knows."""
    if not sight.capture.live or sight.capture.pid != os.getpid():
        return
    for low, high in live_ranges():
        sight.claim_range(low, high, NAME, "this process's own regions, by their addresses")


def regions(sight: Sight) -> None:
    """Claim what is kept out of core dumps (``dd``) in a process that has pyreserve's library."""
    if sight.pyreserve is None or not sight.knows_flags:
        return
    sight.claim(
        (
            i
            for i in sight.unclaimed()
            if sight.perms[i] in {RW, NONE} and sight.has(i, "dd") and sight.lacks(i, "nh io")
        ),
        NAME,
        f"kept out of core dumps (dd), as pyreserve asks by default; {sight.pyreserve} is mapped",
    )
