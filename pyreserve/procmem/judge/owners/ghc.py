"""The heap of programs compiled by GHC, which reserve a terabyte."""

from pyreserve.procmem.judge.owners.sight import NONE, RW, Sight
from pyreserve.units import MiB, TiB

_LOW = 0x4200000000  # rts/posix/OSMem.c, osReserveHeapMemory: the first address that it asks for


def ghc(sight: Sight) -> None:
    """Claim the two-step allocator's reservation: 1 TiB, never charged, out of core dumps."""
    for first, last in sight.runs:
        run = range(first, last)
        size = sight.end[last - 1] - sight.start[first]
        if sight.start[first] != _LOW or not TiB <= size <= TiB + MiB:
            continue
        if sight.knows_flags and not all(
            sight.has(i, "nr dd") for i in run if sight.perms[i] == NONE
        ):
            continue
        if all(sight.perms[i] in {RW, NONE} for i in run):
            sight.claim(run, "GHC heap", "1 TiB from 4200000000, where GHC's runtime reserves it")
