"""What a process's address space holds: any process, or files that were saved of one.

`explain` reads it and takes it apart twice: every byte of VSZ is in one class, by what it costs
(`classes`), and has one owner, by the shape of the maps (`owners`). `save` keeps the files of a
process, `compare` tells what changed between two explanations, `track` what a block of code changed
in this process, and `sample` is a quick look for those who look often.
"""

from pyreserve.procmem.comparison import Change, Difference, compare, load
from pyreserve.procmem.judge.classes import MemoryClass
from pyreserve.procmem.judge.owners import Owner
from pyreserve.procmem.read.sampling import Sample, sample, track
from pyreserve.procmem.read.sources import save
from pyreserve.procmem.space import AddressSpace, Mapping, explain

__all__ = [
    "AddressSpace",
    "Change",
    "Difference",
    "Mapping",
    "MemoryClass",
    "Owner",
    "Sample",
    "compare",
    "explain",
    "load",
    "sample",
    "save",
    "track",
]
