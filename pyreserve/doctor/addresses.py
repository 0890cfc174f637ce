"""Checks of the address space: its size, the limits on it, and the number of mappings."""

import resource
from collections.abc import Iterator

from pyreserve import layouts
from pyreserve._arena.arena import WORD
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE, address_bits
from pyreserve.doctor.findings import Finding, soft_limit
from pyreserve.units import KiB, format_size

# Security modules forbid lower addresses whatever the setting (CONFIG_LSM_MMAP_MIN_ADDR).
_LOWEST = 64 * KiB
_DEFAULT_MAP_COUNT = 65530
_MOST_MAP_COUNT = 2**31 - 1


def _vm_size() -> int:
    return proc.status_kib()["VmSize"] * KiB


def address_space() -> Iterator[Finding]:
    """Check how large one reservation can be: the largest gap, bounded by RLIMIT_AS."""
    bits = address_bits()
    low = max(proc.vm_setting("mmap_min_addr"), _LOWEST)
    gaps = proc.free_gaps(proc.read_maps(), low, 1 << bits)
    gap = max(high - low for low, high in gaps) // PAGE_SIZE * PAGE_SIZE
    limit, _ = soft_limit(resource.RLIMIT_AS, "-v")
    left = gap if limit is None else max(0, limit - _vm_size()) // PAGE_SIZE * PAGE_SIZE
    most = min(gap, left)
    narrow = bits <= 32
    yield Finding(
        "address space",
        "limited" if narrow else "good",
        f"User addresses have {bits} bits ({format_size(1 << bits)}). The largest free range is "
        f"{format_size(gap)}.",
        f"One reservation can now have up to {format_size(most)}"
        + ("; RLIMIT_AS leaves no more." if most < gap else "."),
        "use a 64-bit Python" if narrow else None,
        "Reservations of many TiB become possible." if narrow else None,
        values={
            "address_bits": bits,
            "largest_gap": gap,
            "largest_reservation": most,
            "page_size": PAGE_SIZE,
        },
        command=False,
    )


def rlimit_as() -> Iterator[Finding]:
    """Check RLIMIT_AS, which counts all mappings, reserved ones too (getrlimit(2))."""
    limit, advice = soft_limit(resource.RLIMIT_AS, "-v")
    used = _vm_size()
    values = {"limit": limit, "used": used}
    if limit is None:
        yield Finding(
            "RLIMIT_AS",
            "good",
            "No limit is set (ulimit -v).",
            "Only the address space bounds reservations.",
            values=values,
        )
        return
    left = max(0, limit - used)
    falls_back = left < layouts.get(layouts.default_name(WORD)).total()
    yield Finding(
        "RLIMIT_AS",
        "limited",
        f"The limit (ulimit -v) is {format_size(limit)}, of which {format_size(used)} is in use.",
        f"New reservations can have up to {format_size(left)} in total, committed or not"
        + ("; pyreserve vsz falls back to a smaller layout." if falls_back else "."),
        effect="A reservation can have up to the largest free range.",
        values=values,
        **advice,
    )


def rlimit_stack() -> Iterator[Finding]:
    """Check RLIMIT_STACK, the addresses that a thread's stack takes (pthread_create(3))."""
    limit, _ = soft_limit(resource.RLIMIT_STACK, "-s")
    if limit is None:
        yield Finding(
            "RLIMIT_STACK",
            "limited",
            "No limit is set (ulimit -s).",
            "The kernel keeps a large gap below the stack, so mappings lie in the middle of the "
            "address space and the largest free range is smaller.",
            "ulimit -s 8192",
            "Mappings lie close below the stack.",
            values={"limit": None},
        )
        return
    yield Finding(
        "RLIMIT_STACK",
        "good",
        f"The limit (ulimit -s) is {format_size(limit)}.",
        "Each new thread reserves that size for its stack; RLIMIT_AS counts it.",
        values={"limit": limit},
    )


def max_map_count() -> Iterator[Finding]:
    """Check how many map entries are left (Documentation/admin-guide/sysctl/vm.rst)."""
    limit, used = proc.vm_setting("max_map_count"), proc.map_count()
    left = max(0, limit - used)
    raised = min(_MOST_MAP_COUNT, max(262144, 4 * limit))
    # A separate committed range splits the reserved mapping around it: two more entries.
    yield Finding(
        "max_map_count",
        "limited" if limit < _DEFAULT_MAP_COUNT or left < limit // 2 else "good",
        f"The limit is {limit:,} mappings, of which this process has {used:,}.",
        f"About {left // 2:,} more separate ranges can be committed; adjacent ranges merge.",
        f"sysctl -w vm.max_map_count={raised}" if raised > limit else None,
        f"About {(raised - used) // 2:,} more separate ranges can be committed."
        if raised > limit
        else None,
        "Each map entry takes about 200 bytes of kernel memory." if raised > limit else None,
        {"limit": limit, "used": used, "pieces": left // 2},
    )


CHECKS = (
    ("address space", address_space),
    ("RLIMIT_AS", rlimit_as),
    ("max_map_count", max_map_count),
    ("RLIMIT_STACK", rlimit_stack),
)
