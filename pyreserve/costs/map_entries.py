"""Count the map entries that each use of a mapping adds (vm.max_map_count is the budget)."""

from collections.abc import Callable

from pyreserve._native import ffi, lib
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE

_PLACES = 16
_SPAN = 4 * PAGE_SIZE  # distance between places, so that changed pages cannot merge


def map_entries() -> dict[str, float]:
    """Return the map entries that each way to give a piece back adds to the process.

    Keys are ``"VERB METHOD"``. Each value is the mean of 16 separate places. Ways that the kernel
    refuses are left out.
    """
    page, reserved = PAGE_SIZE, lib.VM_RESERVED
    ways: dict[str, Callable[[int], int]] = {
        "decommit mmap-fixed": lambda at: lib.vm_renew(at, page, reserved),
        "decommit mprotect": lambda at: lib.vm_protect(at, page, reserved),
        "decommit dontneed+mprotect": lambda at: lib.vm_protect(at, page, reserved),
        "release piece": lambda at: lib.vm_release(at, page),
        "discard dontneed": lambda at: lib.vm_discard(at, page),
        "discard free": lambda at: lib.vm_discard_lazy(at, page),
    }
    added = {name: _added(way) for name, way in ways.items()}
    return {name: entries for name, entries in added.items() if entries is not None}


def _added(way: Callable[[int], int]) -> float | None:
    """Return the map entries that one more place adds; None if the kernel refuses."""
    length = (_PLACES + 2) * _SPAN
    address = ffi.new("uintptr_t *")
    if lib.vm_map(0, length, lib.VM_COMMITTED, address):
        return None
    try:
        lib.vm_advise(address[0], length, lib.VM_NO_DUMP)  # prevents merging with a neighbour
        begin = address[0] + PAGE_SIZE
        if way(begin):
            return None
        before = proc.map_count()
        if any(way(begin + i * _SPAN) for i in range(1, _PLACES + 1)):
            return None
        return (proc.map_count() - before) / _PLACES
    except OSError:  # /proc/self/maps cannot be read
        return None
    finally:
        lib.vm_release(address[0], length)
