"""Reserve virtual memory now, commit it later.

- `reserve` owns addresses; a `Region` commits pieces of them, exports safe views, and gives back.
- `Bitmap` is a bitmap of any size that takes memory only where bits were set.
- `layouts` are Go's address-space plans as data; `Arena` brings one to life and allocates in it.
- `BumpArena`, `Pool` and `PageAllocator` are allocators for what needs less than that.
- `GrowableBuffer` and `GrowableArray` grow where they stand: growing ends no view of them.
- `explain` says what a process's address space holds, `track` what a block of code changed in it.
- `capabilities` says what this kernel and process offer.
"""

from pyreserve import layouts
from pyreserve.arena import Arena
from pyreserve.bitmap import Bitmap
from pyreserve.blocks import Block, Blocks
from pyreserve.bump import BumpArena
from pyreserve.capabilities import Capabilities, capabilities
from pyreserve.errors import (
    AccessError,
    FreeError,
    MapsError,
    NoAddressSpaceError,
    OutOfMemoryError,
    PyreserveError,
    RangeError,
    ReleasedError,
    ViewError,
    VMError,
)
from pyreserve.growable import GrowableArray, GrowableBuffer
from pyreserve.heapbitmap import HeapBitmap
from pyreserve.limits import PAGE_SIZE
from pyreserve.memstats import MemStats
from pyreserve.pagealloc import PageAllocator
from pyreserve.pool import Pool
from pyreserve.procmem import AddressSpace, explain, track
from pyreserve.region import Region, reserve
from pyreserve.scavenger import Scavenger
from pyreserve.units import GiB, KiB, MiB, TiB, format_size, parse_size

__all__ = [
    "PAGE_SIZE",
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
