"""Explain the address space of any process, live or from saved files.

`explain` divides VSZ twice: every byte is in one class, by what it costs (`judge.classes`), and has
one owner, recognised by the shape of the maps (`judge.owners`). `save` keeps a process's files,
`compare` lists the changes between two explanations, `track` measures what a block of code changes
in this process, and `sample` reads a process's sizes quickly.
"""

from pyreserve.procmem.comparison import Change, Difference, compare, load
from pyreserve.procmem.judge.classes import MemoryClass
from pyreserve.procmem.judge.owners import NamedRange, Owner, Part
from pyreserve.procmem.mappings import Mapping
from pyreserve.procmem.read.sampling import Sample, sample, track
from pyreserve.procmem.read.sources import save
from pyreserve.procmem.space import AddressSpace, explain

__all__ = [
    "AddressSpace",
    "Change",
    "Difference",
    "Mapping",
    "MemoryClass",
    "NamedRange",
    "Owner",
    "Part",
    "Sample",
    "compare",
    "explain",
    "load",
    "sample",
    "save",
    "track",
]
