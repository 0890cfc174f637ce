"""Reserve virtual memory now, commit it later.

- `reserve` returns a `Region`: it owns addresses, commits and decommits parts of them, and gives
  safe views of committed bytes.
- `Bitmap` is a bitmap of any size that uses memory only where bits were set.
- `layouts` describes Go's address-space layouts; an `Arena` reserves one and allocates in it.
- `BumpArena`, `Pool` and `PageAllocator` are simpler allocators.
- `GrowableBuffer` and `GrowableArray` grow in place: existing views stay valid.
- `RingArray` keeps the latest items; any number of them is one array without a copy.
- `explain` describes a process's address space, `track` how a block of code changes it.
- `capabilities` lists the features of this kernel and the limits of this process.

Importing pyreserve loads the exceptions and sizes; every other name is loaded at its first use, or
by ``from pyreserve import NAME``.
"""

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

TYPE_CHECKING = False  # True for type checkers, which know this name; typing is slow to import
if TYPE_CHECKING:
    from pyreserve import costs as costs
    from pyreserve import doctor as doctor
    from pyreserve import layouts
    from pyreserve import procmem as procmem
    from pyreserve import prometheus as prometheus
    from pyreserve._alloc.bitmap import Bitmap
    from pyreserve._alloc.bump import BumpArena
    from pyreserve._alloc.growablearray import GrowableArray
    from pyreserve._alloc.growablebuffer import GrowableBuffer
    from pyreserve._alloc.pages import PageAllocator
    from pyreserve._alloc.pool import Pool
    from pyreserve._alloc.ring import RingArray
    from pyreserve._arena.arena import Arena
    from pyreserve._arena.blocks import Block, Blocks
    from pyreserve._arena.heapbitmap import HeapBitmap
    from pyreserve._arena.memstats import MemStats
    from pyreserve._arena.scavenger import Scavenger
    from pyreserve._region.region import TRACEMALLOC_DOMAIN, Region
    from pyreserve._region.reserve import reserve
    from pyreserve._system.features import Capabilities, capabilities
    from pyreserve._system.limits import PAGE_SIZE
    from pyreserve.procmem import AddressSpace, explain, track

    __version__: str

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
    "RingArray",
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

_HOMES = {
    "PAGE_SIZE": "_system.limits",
    "TRACEMALLOC_DOMAIN": "_region.region",
    "AddressSpace": "procmem",
    "Arena": "_arena.arena",
    "Bitmap": "_alloc.bitmap",
    "Block": "_arena.blocks",
    "Blocks": "_arena.blocks",
    "BumpArena": "_alloc.bump",
    "Capabilities": "_system.features",
    "GrowableArray": "_alloc.growablearray",
    "GrowableBuffer": "_alloc.growablebuffer",
    "HeapBitmap": "_arena.heapbitmap",
    "MemStats": "_arena.memstats",
    "PageAllocator": "_alloc.pages",
    "Pool": "_alloc.pool",
    "Region": "_region.region",
    "RingArray": "_alloc.ring",
    "Scavenger": "_arena.scavenger",
    "capabilities": "_system.features",
    "explain": "procmem",
    "reserve": "_region.reserve",
    "track": "procmem",
}
"""The modules of the names that are loaded at first use."""
_MODULES = {"costs", "doctor", "layouts", "procmem", "prometheus"}

if not TYPE_CHECKING:  # a type checker would accept any name

    def __getattr__(name: str) -> object:
        from importlib import import_module  # noqa: PLC0415  # slow to import

        if name in _MODULES:
            return import_module(f"pyreserve.{name}")
        if name in _HOMES:
            value = getattr(import_module(f"pyreserve.{_HOMES[name]}"), name)
        elif name == "__version__":
            from pyreserve._system.extras import own_version  # noqa: PLC0415

            value = own_version() or "unknown"
        else:
            msg = f"module 'pyreserve' has no attribute {name!r}"
            raise AttributeError(msg)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES, "__version__", "errors", "units"})
