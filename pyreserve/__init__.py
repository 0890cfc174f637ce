"""Reserve virtual memory now, commit it later."""

from pyreserve.errors import (
    OutOfMemoryError,
    PyreserveError,
    RangeError,
    ReleasedError,
    ViewError,
    VMError,
)
from pyreserve.limits import PAGE_SIZE
from pyreserve.region import Region, reserve
from pyreserve.units import GiB, KiB, MiB, TiB, format_size, parse_size

__all__ = [
    "PAGE_SIZE",
    "GiB",
    "KiB",
    "MiB",
    "OutOfMemoryError",
    "PyreserveError",
    "RangeError",
    "Region",
    "ReleasedError",
    "TiB",
    "VMError",
    "ViewError",
    "format_size",
    "parse_size",
    "reserve",
]
