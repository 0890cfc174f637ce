"""Reserve virtual memory now, commit it later.

- `reserve` returns a `Region`: it owns addresses, commits and decommits parts of them, and gives
  safe views of committed bytes.
- `Bitmap` is a bitmap of any size that uses memory only where bits were set.
- `layouts` describes Go's address-space layouts; an `Arena` reserves one and allocates in it.
- `BumpArena`, `Pool` and `PageAllocator` are simpler allocators.
- `GrowableBuffer` and `GrowableArray` grow in place: existing views stay valid.
- `explain` describes a process's address space, `track` how a block of code changes it.
- `capabilities` lists the features of this kernel and the limits of this process.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyreserve import layouts
from pyreserve._alloc.bitmap import Bitmap
from pyreserve._alloc.bump import BumpArena
from pyreserve._alloc.growable import GrowableArray, GrowableBuffer
from pyreserve._alloc.pages import PageAllocator
from pyreserve._alloc.pool import Pool
from pyreserve._arena.arena import Arena
from pyreserve._arena.blocks import Block, Blocks
from pyreserve._arena.heapbitmap import HeapBitmap
from pyreserve._arena.memstats import MemStats
from pyreserve._arena.scavenger import Scavenger
from pyreserve._region.region import TRACEMALLOC_DOMAIN, Region
from pyreserve._region.reserve import reserve
from pyreserve._system.features import Capabilities, capabilities
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import (
    AccessError,
    FreeError,
    MapsError,
    NoAddressSpaceError,
    OutOfMemoryError,
    PyreserveError,
    RangeError,
    ReleasedError,
    StateError,
    ViewError,
    VMError,
)
from pyreserve.units import GiB, KiB, MiB, TiB, format_size, parse_size

if TYPE_CHECKING:
    from pyreserve import costs as costs
    from pyreserve import doctor as doctor
    from pyreserve import procmem as procmem
    from pyreserve import prometheus as prometheus
    from pyreserve.procmem import AddressSpace, explain, track

__all__ = [
    "PAGE_SIZE",
    "TRACEMALLOC_DOMAIN",
    "AccessError",
    "AddressSpace",
    "Arena",
    "Bitmap",
    "Block",
    "Blocks",
    "BumpArena",
    "Capabilities",
    "FreeError",
    "GiB",
    "GrowableArray",
    "GrowableBuffer",
    "HeapBitmap",
    "KiB",
    "MapsError",
    "MemStats",
    "MiB",
    "NoAddressSpaceError",
    "OutOfMemoryError",
    "PageAllocator",
    "Pool",
    "PyreserveError",
    "RangeError",
    "Region",
    "ReleasedError",
    "Scavenger",
    "StateError",
    "TiB",
    "VMError",
    "ViewError",
    "capabilities",
    "explain",
    "format_size",
    "layouts",
    "parse_size",
    "reserve",
    "track",
]


# Imported at first use: a program that only reserves memory does not pay for them.
_LAZY_MODULES = {"costs", "doctor", "procmem", "prometheus"}
_PROCMEM_NAMES = {"AddressSpace", "explain", "track"}


def __getattr__(name: str) -> Any:
    if name in _LAZY_MODULES:
        return import_module(f"pyreserve.{name}")
    if name in _PROCMEM_NAMES:
        return getattr(import_module("pyreserve.procmem"), name)
    msg = f"module 'pyreserve' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_LAZY_MODULES})
