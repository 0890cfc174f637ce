"""How much address space there is, and in how many pieces it can be used."""

import resource
from collections.abc import Iterator

from pyreserve import layouts
from pyreserve._arena.arena import WORD
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE, address_bits
from pyreserve.doctor.findings import Finding, soft_limit
from pyreserve.units import KiB, format_size

# Security modules keep the lowest addresses free whatever the setting (CONFIG_LSM_MMAP_MIN_ADDR).
_LOWEST = 64 * KiB
_DEFAULT_MAP_COUNT = 65530
_MOST_MAP_COUNT = 2**31 - 1


def _vm_size() -> int:
    return proc.status_kib()["VmSize"] * KiB


def address_space() -> Iterator[Finding]:
    """See how large one reservation can be now: the largest gap, and what RLIMIT_AS leaves."""
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
        f"A user address has {bits} bits ({format_size(1 << bits)}), and the largest free piece is "
        f"{format_size(gap)}.",
        f"One reservation of up to {format_size(most)} now"
        + (", which is what RLIMIT_AS leaves." if most < gap else "."),
        "use a 64-bit Python" if narrow else None,
        "Reservations of many TiB." if narrow else None,
        values={
            "address_bits": bits,
            "largest_gap": gap,
            "largest_reservation": most,
            "page_size": PAGE_SIZE,
        },
        command=False,
    )


def rlimit_as() -> Iterator[Finding]:
    """See what RLIMIT_AS leaves: all mappings count, reserved ones too (getrlimit(2))."""
    limit, how = soft_limit(resource.RLIMIT_AS, "-v")
    used = _vm_size()
    values = {"limit": limit, "used": used}
    if limit is None:
        yield Finding(
            "RLIMIT_AS",
            "good",
            "RLIMIT_AS (ulimit -v) is unlimited.",
            "Reservations are bounded by the address space alone.",
            values=values,
        )
        return
    left = max(0, limit - used)
    falls_back = left < layouts.get(layouts.default_name(WORD)).total()
    yield Finding(
        "RLIMIT_AS",
        "limited",
        f"RLIMIT_AS (ulimit -v) is {format_size(limit)}, of which {format_size(used)} are in use.",
        f"All reservations together up to {format_size(left)}, committed or not"
        + ("; pyreserve vsz falls back to a smaller layout." if falls_back else "."),
        effect="Addresses cost nothing: reservations up to the largest free piece.",
        values=values,
        **how,
    )


def rlimit_stack() -> Iterator[Finding]:
    """See what a thread takes of the addresses: its stack has RLIMIT_STACK (pthread_create(3))."""
    limit, _ = soft_limit(resource.RLIMIT_STACK, "-s")
    if limit is None:
        yield Finding(
            "RLIMIT_STACK",
            "limited",
            "RLIMIT_STACK (ulimit -s) is unlimited.",
            "The kernel keeps much room below the stack free for it, so that mappings lie amid the "
            "address space and the largest free piece is smaller.",
            "ulimit -s 8192",
            "Mappings lie right below the stack, as usual.",
            values={"limit": None},
        )
        return
    yield Finding(
        "RLIMIT_STACK",
        "good",
        f"RLIMIT_STACK (ulimit -s) is {format_size(limit)}.",
        "Each thread reserves so much for its stack, which counts under RLIMIT_AS.",
        values={"limit": limit},
    )


def max_map_count() -> Iterator[Finding]:
    """See how many map entries are left (Documentation/admin-guide/sysctl/vm.rst)."""
    limit, used = proc.vm_setting("max_map_count"), proc.map_count()
    left = max(0, limit - used)
    more = min(_MOST_MAP_COUNT, max(262144, 4 * limit))
    # A committed piece apart from others splits the reserved mapping around it: two entries more.
    yield Finding(
        "max_map_count",
        "limited" if limit < _DEFAULT_MAP_COUNT or left < limit // 2 else "good",
        f"vm.max_map_count is {limit:,}, and this process has {used:,} mappings.",
        f"About {left // 2:,} more committed pieces that lie apart; neighbours merge into one.",
        f"sysctl -w vm.max_map_count={more}" if more > limit else None,
        f"About {(more - used) // 2:,} pieces." if more > limit else None,
        "A map entry takes some 200 bytes of kernel memory." if more > limit else None,
        {"limit": limit, "used": used, "pieces": left // 2},
    )


CHECKS = (
    ("address space", address_space),
    ("RLIMIT_AS", rlimit_as),
    ("max_map_count", max_map_count),
    ("RLIMIT_STACK", rlimit_stack),
)
