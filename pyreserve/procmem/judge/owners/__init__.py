"""Who has mapped what: told by the shape of the maps, with the evidence, or "unknown".

Each recogniser claims what it is sure of; what an earlier one has, a later one leaves alone. The
shapes were learned from processes whose every mmap and brk was traced, so that a name is never a
guess: what looks like two things is named by neither.
"""

from pyreserve.procmem.judge.owners import allocators, ghc, go, jvm, ours, plain, v8
from pyreserve.procmem.judge.owners.process import UNKNOWN, Owner, ProcessMappings
from pyreserve.procmem.read.snapshot import Capture

__all__ = ["UNKNOWN", "Owner", "ProcessMappings", "recognise"]

_RECOGNISERS = (
    plain.kernel_pages,
    ours.own_regions,
    plain.named,
    plain.getrandom_state,
    plain.zeroed_data,
    plain.stacks,
    go.go,
    ghc.ghc,
    ours.regions,
    allocators.address_sanitizer,
    allocators.glibc_arenas,
    jvm.jvm,
    allocators.mimalloc,
    allocators.jemalloc,
    v8.v8,
    plain.shared_memory,
    plain.heap,
    plain.files,
    plain.rest,
)


def recognise(capture: Capture) -> ProcessMappings:
    """Find the owners of a process's mappings."""
    process = ProcessMappings(capture)
    for recogniser in _RECOGNISERS:
        recogniser(process)
    return process
