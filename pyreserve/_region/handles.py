"""Handles: the C structs of regions, each a ``struct region *``."""

import weakref
from typing import Any

from pyreserve._native import ffi

CLOSED: Any = ffi.new("struct region *")
"""The handle of a region after its end: C refuses each call with REGION_RELEASED."""

# Handles that later regions reuse.
_spares: list[Any] = []
_MAX_SPARES = 16
# Weak references to all handles by id; a handle stays here while regions reuse it.
_handles: dict[int, "weakref.ref[Any]"] = {}


def take() -> Any:
    """Return a handle without addresses."""
    try:
        return _spares.pop()
    except IndexError:
        handle = ffi.new("struct region *")
    key, remove = id(handle), _handles.pop  # bound: at exit the module may be cleared first

    def on_death(_: "weakref.ref[Any]") -> None:
        remove(key, None)

    _handles[key] = weakref.ref(handle, on_death)
    return handle


def reuse(handle: Any) -> bool:
    """Keep a handle that nothing else refers to for the next region, if it has no addresses."""
    if handle.base or len(_spares) >= _MAX_SPARES:
        return False
    _spares.append(handle)
    return True


def live_ranges() -> list[tuple[int, int]]:
    """Return the addresses [start, end) of all open regions, without keeping any alive."""
    ranges = []
    for reference in list(_handles.values()):
        handle = reference()
        if handle is not None and handle.base:
            base = int(ffi.cast("uintptr_t", handle.base))
            ranges.append((base, base + int(handle.size)))
    return ranges
