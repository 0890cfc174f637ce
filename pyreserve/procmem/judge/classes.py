"""The classes of memory: every byte of VSZ is in one of them.

============================  ======================================================================
class                         bytes
============================  ======================================================================
``no_access_reserved``        neither readable nor writable nor executable, and not in memory:
                              address space that costs nothing
``accessible_untouched``      accessible and not in memory: never used, or given back. Reading maps
                              the shared zero page, which counts as untouched
``resident_private``          in memory, of this process alone (USS)
``resident_shared``           in memory, shared with other processes
``file_not_resident``         mapped from a file, not in memory
``swapped``                   in swap
``special_pfn``               the kernel's ``[vvar]`` pages, which are in neither RSS nor swap
============================  ======================================================================

Without smaps there are three classes: ``no_access_reserved``, ``special_pfn`` and ``accessible``
(accessible, in memory or not).

A mapping's resident and swapped bytes are those of smaps (proc(5), fs/proc/task_mmu.c); its other
bytes are in the one class that fits its access and its file. hugetlb pages count as resident, as in
USS; the kernel's RSS omits them. ``[vsyscall]`` is in no class: it is not in VmSize.
"""

from typing import NamedTuple

from pyreserve._system.maps import EXECUTE, FLAGS, READ, WRITE, MapTable
from pyreserve._system.maps import SHARED as SHARED_BIT
from pyreserve.units import KiB

NAMES = (
    "no_access_reserved",
    "accessible_untouched",
    "resident_private",
    "resident_shared",
    "file_not_resident",
    "swapped",
    "special_pfn",
)
LABELS = (
    "reserved, no access",
    "accessible, untouched",
    "in memory, its own",
    "in memory, shared",
    "of files, not in memory",
    "in swap",
    "the kernel's own",
)
"""Labels of the classes in `NAMES`, for screen and picture."""
ACCESSIBLE, ACCESSIBLE_LABEL = "accessible", "accessible, in memory or not"
"""The class of accessible bytes where residency is not known, and its label."""
NO_ACCESS, UNTOUCHED, PRIVATE, SHARED, FILE, SWAPPED, SPECIAL = range(len(NAMES))

_ACCESS = READ | WRITE | EXECUTE
# Shared memory has an inode too, and a name that the kernel gives.
_SHARED_MEMORY = ("/dev/zero", "/memfd:", "/SYSV", "/dev/shm/", "/anon_hugepage")


class MemoryClass(NamedTuple):
    """The size of one class in bytes, and the number of mappings that have bytes in it."""

    name: str
    size: int
    mappings: int


def is_shared_memory(name: str) -> bool:
    """Return whether a mapping with an inode is shared memory and not a file."""
    return name.startswith(_SHARED_MEMORY)


def rest_classes(table: MapTable) -> list[int | None]:
    """Return the class of the bytes of each mapping that are neither resident nor in swap.

    A class is an index into `NAMES`; None for ``[vsyscall]``.
    """
    result: list[int | None] = [
        UNTOUCHED if perms & _ACCESS else NO_ACCESS for perms in table.perms
    ]
    is_file: dict[str, bool] = {}
    for i, name in table.named:
        if table.inode[i]:
            if name not in is_file:
                is_file[name] = not is_shared_memory(name)
            if is_file[name] and result[i] == UNTOUCHED:
                result[i] = FILE
        elif name.startswith("[vvar") and _has_kernel_frames(table, i):
            result[i] = SPECIAL
    for i in range(table.user_mappings, len(result)):
        result[i] = None
    return result


def _has_kernel_frames(table: MapTable, i: int) -> bool:
    """Return whether a mapping is read-only and, if flags are known, maps raw page frames."""
    frames = FLAGS["pf"] | FLAGS["io"]
    return not table.perms[i] & (WRITE | SHARED_BIT) and (
        not table.knows_flags or bool(table.flags[i] & frames)
    )


def totals(
    table: MapTable, rest: list[int | None], *, knows_memory: bool = True
) -> tuple[MemoryClass, ...]:
    """Return the size of each class; the sum is VmSize. `rest` is the result of `rest_classes`."""
    if not knows_memory:
        return _totals_without_memory(table, rest)
    kib = [0] * len(NAMES)
    mappings = [0] * len(NAMES)
    for column, index in (
        (table.private, PRIVATE),
        (table.shared, SHARED),
        (table.swap, SWAPPED),
    ):
        kib[index] = sum(column)
        mappings[index] = len(column) - column.count(0)
    for index in (NO_ACCESS, UNTOUCHED, FILE, SPECIAL):
        sizes = [
            size
            for size, rest_class in zip(table.rest, rest, strict=True)
            if rest_class == index and size
        ]
        kib[index] += sum(sizes)
        mappings[index] += len(sizes)
    return tuple(
        MemoryClass(name, size * KiB, count)
        for name, size, count in zip(NAMES, kib, mappings, strict=True)
    )


def _totals_without_memory(table: MapTable, rest: list[int | None]) -> tuple[MemoryClass, ...]:
    groups = (
        (NAMES[NO_ACCESS], {NO_ACCESS}),
        (ACCESSIBLE, {UNTOUCHED, FILE}),
        (NAMES[SPECIAL], {SPECIAL}),
    )
    totals = []
    for name, members in groups:
        sizes = [
            size for size, rest_class in zip(table.size, rest, strict=True) if rest_class in members
        ]
        totals.append(MemoryClass(name, sum(sizes) * KiB, len(sizes)))
    return tuple(totals)
