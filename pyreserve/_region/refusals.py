"""The exceptions for calls that a region refuses."""

import errno
from typing import Any

from pyreserve._native import ffi, lib
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve.errors import RangeError, ReleasedError, VMError


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
    address = int(ffi.cast("uintptr_t", handle.base)) + offset
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
        }[err]
        return RangeError(f"cannot {verb} {length} bytes at offset {offset}: {reason}")
    return refusal(verb, err, length, address)
