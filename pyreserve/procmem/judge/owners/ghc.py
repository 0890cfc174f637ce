"""The heap of programs compiled by GHC."""

from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings
from pyreserve.units import MiB, TiB

_LOW = 0x4200000000  # rts/posix/OSMem.c, osReserveHeapMemory: first hint


def ghc(process: ProcessMappings) -> None:
    """Claim the two-step allocator's reservation: 1 TiB, never charged, not in core dumps."""
    for first, last in process.runs:
        run = range(first, last)
        size = process.end[last - 1] - process.start[first]
        if process.start[first] != _LOW or not TiB <= size <= TiB + MiB:
            continue
        if process.knows_flags and not all(
            process.has_flags(i, "nr dd") for i in run if process.perms[i] == NONE
        ):
            continue
        if all(process.perms[i] in {RW, NONE} for i in run):
            process.claim(run, "GHC heap", "1 TiB from 4200000000, where GHC's runtime reserves it")
