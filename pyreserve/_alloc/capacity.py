"""The default capacity of growing containers: more addresses than the machine has memory.

All regions of a default size together take at most a quarter of the address space and of RLIMIT_AS.
The more they take, the smaller the next one is. A region counts until its addresses are released.
"""

import resource
from collections.abc import Callable
from functools import cache

from pyreserve._region.handles import region_count, region_counted_bytes
from pyreserve._region.region import Region
from pyreserve._system import proc
from pyreserve._system.limitbase import OWN, rlimit
from pyreserve._system.limits import address_bits
from pyreserve._system.machine import memory
from pyreserve._system.rlimits import RLIMIT_AS
from pyreserve.errors import OutOfMemoryError
from pyreserve.units import WORD, GiB, MiB

_LEAST, _GRAIN = MiB, 2 * MiB  # bytes; sizes are multiples of _GRAIN
_FIRST = 64 * GiB
# The first default takes at most a quarter of the addresses for all defaults.
_LARGEST_SHARE = 4


def reserve_default(reserve: Callable[[int], Region], least: int) -> Region:
    """Reserve a region of the default size, or smaller ones until the kernel grants one.

    Args:
        reserve: reserves a region of the given bytes; raises OutOfMemoryError if refused.
        least: the minimum size, in bytes; raised to 1 MiB if smaller.

    Raises:
        OutOfMemoryError: the kernel refused even the minimum size.
    """
    least = max(least, _LEAST)
    size = max(_default_size() // _GRAIN * _GRAIN, least)
    while True:
        try:
            region = reserve(size)
        except OutOfMemoryError:
            if size == least:
                raise
            size = max(size // 2 // _GRAIN * _GRAIN, least)
        else:
            region_count(region.exports.handle)
            return region


def _default_size() -> int:
    """Return the bytes of the next default: full size at first, less as others take more."""
    limit = rlimit(resource.RLIMIT_AS)
    pool, first = _pool(limit)
    taken = region_counted_bytes()
    if taken * 4 > pool:
        # A full size does not exceed a quarter of the pool, so this never exceeds what is left.
        left = max(0, pool - taken)
        first = min(first, 2 * first * left * left // (pool * pool))
    return first if limit is None else min(first, _limited_size(limit))


def _limited_size(limit: int) -> int:
    """Return an eighth of what RLIMIT_AS leaves: malloc needs addresses too."""
    try:
        left = RLIMIT_AS.use(OWN).left()
    except proc.UNREADABLE:
        left = None
    return (limit if left is None else left) // 8


@cache
def _pool(limit: int | None) -> tuple[int, int]:
    """Return the bytes that all defaults may take, and the size of the first."""
    space = 1 << address_bits()
    if WORD == 4:
        space = min(space, 3 * GiB)
    if limit is not None:
        space = min(space, limit)
    pool = max(space // 4, 1)
    return pool, min(max(2 * memory(), _FIRST), pool // _LARGEST_SHARE)
