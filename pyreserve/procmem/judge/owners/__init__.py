"""Recognise the owner of each mapping by the shape of the maps, with the evidence, or "unknown".

Recognisers run in order; each claims mappings that it is sure of and that no earlier one has
claimed. The shapes come from processes whose every mmap and brk was traced; a shape that two owners
share stays unknown.
"""

from pyreserve.procmem.judge.owners import allocators, ghc, go, jvm, ours, plain, v8
from pyreserve.procmem.judge.owners.claims import UNKNOWN, Claims, NamedRange, Part
from pyreserve.procmem.judge.owners.process import ProcessMappings
from pyreserve.procmem.judge.owners.summary import Owner, owners
from pyreserve.procmem.read.snapshot import Capture

__all__ = ["UNKNOWN", "Claims", "NamedRange", "Owner", "Part", "owners", "recognise"]

_RECOGNISERS = (
    plain.kernel_pages,
    ours.own_regions,
    plain.named_by_program,
    plain.getrandom_state,
    plain.bss,
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
    plain.describe_unknown,
)


def recognise(capture: Capture) -> Claims:
    """Run all recognisers over a process's mappings."""
    process = ProcessMappings(capture)
    for recogniser in _RECOGNISERS:
        recogniser(process)
    return process.claims
