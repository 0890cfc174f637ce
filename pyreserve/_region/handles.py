"""Handles: the C structs of regions, each a ``struct region *``, and the refusals of C."""

import errno
import weakref
from typing import Any

from pyreserve._native import ffi, lib
from pyreserve._system.forks import References
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve.errors import RangeError, ReleasedError, VMError

# What the packages above need of C.
region_claim = lib.region_claim
region_disclaim = lib.region_disclaim
region_commit = lib.region_commit
region_decommit = lib.region_decommit
region_load = lib.region_load
region_store = lib.region_store
region_count = lib.region_count
region_counted_bytes = lib.region_counted_bytes
VM_COMMITTED: int = lib.VM_COMMITTED
VM_RESERVED: int = lib.VM_RESERVED
Buffer = ffi.buffer
from_buffer = ffi.from_buffer
memmove = ffi.memmove


def address_of(pointer: Any) -> int:
    """Return the address that a pointer of C holds."""
    return int(ffi.cast("uintptr_t", pointer))


def words(start: int) -> Any:
    """Return the memory from an address up as a ``uintptr_t *``."""
    return ffi.cast("uintptr_t *", start)


def offset_cell(offset: int) -> Any:
    """Return a ``size_t *`` to a cell of its own, which calls of C can change."""
    return ffi.new("size_t *", offset)


def claim_near(handle: Any, floor: int, hint: int, length: int, access: int) -> tuple[int, int]:
    """Call region_claim_near; return an errno and the address."""
    start = ffi.new("uintptr_t *")
    err = lib.region_claim_near(handle, floor, hint, length, access, start)
    return err, int(start[0])


def probe(address: int, length: int) -> int:
    """Map bytes at exactly this address and unmap them; return the errno of the mapping.

    Raises:
        VMError: the kernel refused to unmap them.
    """
    err: int = lib.vm_map_at(address, length, VM_RESERVED)
    if err == 0:
        unmapped = lib.vm_release(address, length)
        if unmapped:
            raise refusal("release", unmapped, length, address)
    return err


# -- handles ----------------------------------------------------------------------------------

_new, _HANDLE = ffi.new, ffi.typeof("struct region *")
CLOSED: Any = _new(_HANDLE)
"""The handle of a region after its end: C refuses each call with REGION_RELEASED."""

# Handles that later regions reuse.
_spares: list[Any] = []
_MAX_SPARES = 16
# All handles, also those that wait for a region to reuse them.
_handles: References["weakref.ref[Any]"] = References()


def take() -> Any:
    """Return a handle without addresses."""
    try:
        return _spares.pop() if _spares else _create()
    except IndexError:  # another thread took the last
        return _create()


def _create() -> Any:
    handle = _new(_HANDLE)
    _handles.add(weakref.ref(handle))
    return handle


def reuse(handle: Any) -> bool:
    """Keep a handle that nothing else refers to for the next region, if it has no addresses."""
    if handle.base or len(_spares) >= _MAX_SPARES:
        return False
    _spares.append(handle)
    return True


def copy_runs(handle: Any, *, committed: bool) -> list[tuple[int, int]]:
    """Return the committed, else the reserved ranges [start, end) of a region, lowest first.

    One C call copies them out, so they are consistent. The caller holds the lock of the region.
    """
    capacity, count = 0, 1
    while count > capacity:
        capacity = 2 * count
        runs = ffi.new("struct run[]", capacity)
        count = lib.region_runs(handle, committed, runs, capacity)
    return [(runs[i].lo, runs[i].hi) for i in range(count)]


def live_ranges() -> list[tuple[int, int]]:
    """Return the addresses [start, end) of all open regions, without keeping any alive."""
    ranges = []
    for _, handle in _handles.alive():
        if handle.base:
            base = address_of(handle.base)
            ranges.append((base, base + int(handle.size)))
    return ranges


# -- refusals ---------------------------------------------------------------------------------


def released() -> ReleasedError:
    """Create the exception for a region that was released or closed."""
    return ReleasedError("the region was released or closed")


def outside(verb: str, offset: int, length: int, size: int) -> RangeError:
    """Create the exception for a range that is not within the `size` bytes of a region."""
    return RangeError(
        f"cannot {verb} {length} bytes at offset {offset}: not a range of the region's {size} bytes"
    )


def refused(handle: Any, size: int, verb: str, err: int, offset: int, length: int) -> Exception:
    """Create the exception for `err`, an errno or an enum region_refusal."""
    address = address_of(handle.base) + offset
    if err == lib.REGION_RELEASED:
        return released()
    if err == lib.REGION_SEALED:
        msg = f"cannot {verb}: the region is sealed until the process ends (mseal)"
        return VMError(errno.EPERM, msg, verb=verb, nbytes=length, address=address)
    if err == lib.REGION_OUTSIDE:
        return outside(verb, offset, length, size)
    if err < 0:
        reason = {
            lib.REGION_MISALIGNED: f"both must be multiples of the OS page ({PAGE_SIZE})",
            lib.REGION_NOT_RESERVED: "not all of it is reserved",
            lib.REGION_NOT_COMMITTED: "not all of it is committed",
            lib.REGION_GUARDED: "some of it is a guard",
            lib.REGION_MIRRORED: "a mirrored region takes this verb as a whole",
        }[err]
        return RangeError(f"cannot {verb} {length} bytes at offset {offset}: {reason}")
    return refusal(verb, err, length, address, shared=bool(handle.shared))
