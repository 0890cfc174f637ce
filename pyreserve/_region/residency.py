"""How many bytes of a region are in memory."""

from pyreserve._native import ffi, lib
from pyreserve._region.region import Region
from pyreserve._system.limits import refusal


def resident(region: Region) -> int:
    """Return the number of bytes of a region that are resident, as counted by mincore(2)."""
    return sum(resident_in(region, *run) for run in region.committed_runs())


def resident_in(region: Region, offset: int, length: int) -> int:
    """Return the number of resident bytes in [offset, offset + length), which must be mapped."""
    address, nbytes = region.base + offset, ffi.new("size_t *")
    err = lib.vm_resident(address, length, nbytes)
    if err:
        raise refusal("inspect", err, length, address)
    return int(nbytes[0])
