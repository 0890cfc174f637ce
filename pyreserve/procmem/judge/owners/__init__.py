"""Recognise the owner of each mapping by the shape of the maps, with the evidence, or "unknown".

Recognisers are rows of the table `rules`, or functions. They run in order; each claims mappings
that it is sure of and that no earlier one has claimed. The shapes come from processes whose every
mmap and brk was traced; a shape that two owners share stays unknown.
"""

from collections.abc import Callable

from pyreserve.procmem.judge.owners import allocators, ghc, go, jvm, ours, plain, rules, v8
from pyreserve.procmem.judge.owners.claims import UNKNOWN, Claims, NamedRange, Part
from pyreserve.procmem.judge.owners.process import ProcessMappings
from pyreserve.procmem.judge.owners.summary import Owner, owners
from pyreserve.procmem.read.snapshot import Capture

__all__ = ["UNKNOWN", "Claims", "NamedRange", "Owner", "Part", "owners", "recognise"]

_RECOGNISERS: tuple[rules.Rule | Callable[[ProcessMappings], None], ...] = (
    *rules.KERNEL,
    ours.own_regions,
    plain.named_by_program,
    *rules.GETRANDOM,
    plain.bss,
    plain.stacks,
    go.go,
    ghc.ghc,
    ours.regions,
    ours.shared_regions,
    allocators.address_sanitizer,
    allocators.glibc_arenas,
    jvm.jvm,
    *rules.ALLOCATORS,
    v8.v8,
    *rules.SHARED_MEMORY,
    *rules.BRK_HEAP,
    plain.files,
    plain.describe_unknown,
)


def recognise(capture: Capture) -> Claims:
    """Run all recognisers over a process's mappings."""
    process = ProcessMappings(capture)
    for recogniser in _RECOGNISERS:
        if isinstance(recogniser, rules.Rule):
            recogniser.claim(process)
        else:
            recogniser(process)
    return process.claims
