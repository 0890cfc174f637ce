"""Every byte of VSZ is in one class.

============================  ======================================================================
class                         bytes
============================  ======================================================================
``no_access_reserved``        that nobody may read, write or execute and that are not in memory:
                              address space that costs nothing
``accessible_untouched``      that the process may use and has not, or gave back: memory at first
                              use. The zero page, which reading brings, counts as untouched
``resident_private``          in memory, of this process alone (USS)
``resident_shared``           in memory, of others too
``file_not_resident``         of files, to be read when used
``swapped``                   in swap
``special_pfn``               of the kernel, ``[vvar]``: in no count of memory
============================  ======================================================================

Where smaps can't be read there are three classes: ``no_access_reserved``, ``special_pfn`` and
``accessible``, which may be used and may be in memory or not.

A mapping's bytes in memory and in swap are those of its smaps (proc(5), fs/proc/task_mmu.c); the
rest is in one class by what the mapping is. Pages of huge page pools count as resident here, as in
USS, though the kernel's RSS leaves them out. ``[vsyscall]`` is in no class: it is not in VmSize.
"""

from typing import NamedTuple

from pyreserve.procmem.read.maps import EXECUTE, FLAGS, READ, WRITE, MapTable
from pyreserve.procmem.read.maps import SHARED as SHARED_BIT

NAMES = (
    "no_access_reserved",
    "accessible_untouched",
    "resident_private",
    "resident_shared",
    "file_not_resident",
    "swapped",
    "special_pfn",
)
WORDS = (
    "reserved, no access",
    "accessible, untouched",
    "in memory, its own",
    "in memory, shared",
    "of files, not in memory",
    "in swap",
    "the kernel's own",
)
"""The classes of `NAMES` as shown on screen."""
ACCESSIBLE, ACCESSIBLE_WORDS = "accessible", "accessible, in memory or not"
"""The class of bytes that may be in memory where that is not known, and its label on screen."""
NO_ACCESS, UNTOUCHED, PRIVATE, SHARED, FILE, SWAPPED, SPECIAL = range(len(NAMES))

_ACCESS = READ | WRITE | EXECUTE
# What has an inode without being a file: memory that is shared under a name of the kernel's.
_SHARED_MEMORY = ("/dev/zero", "/memfd:", "/SYSV", "/dev/shm/", "/anon_hugepage")


class MemoryClass(NamedTuple):
    """One class: how many KiB, in how many mappings."""

    name: str
    kib: int
    mappings: int


def is_shared_memory(name: str) -> bool:
    """Tell whether a mapping with an inode is of memory and not of a file."""
    return name.startswith(_SHARED_MEMORY)


def kinds(table: MapTable) -> list[int | None]:
    """Return which class, by its index in `NAMES`, the rest of each mapping is in.

    The rest is what is neither in memory nor in swap. None is for ``[vsyscall]``.
    """
    found: list[int | None] = [UNTOUCHED if perms & _ACCESS else NO_ACCESS for perms in table.perms]
    is_file: dict[str, bool] = {}
    for i, name in table.named:
        if table.inode[i]:
            if name not in is_file:
                is_file[name] = not is_shared_memory(name)
            if is_file[name] and found[i] == UNTOUCHED:
                found[i] = FILE
        elif name.startswith("[vvar") and _is_of_kernel(table, i):
            found[i] = SPECIAL
    for i in range(table.of_process, len(found)):
        found[i] = None
    return found


def _is_of_kernel(table: MapTable, i: int) -> bool:
    """Tell whether a mapping is read-only and, where flags are known, of page frames."""
    frames = FLAGS["pf"] | FLAGS["io"]
    return not table.perms[i] & (WRITE | SHARED_BIT) and (
        not table.knows_flags or bool(table.flags[i] & frames)
    )


def totals(
    table: MapTable, kind: list[int | None], *, knows_memory: bool = True
) -> tuple[MemoryClass, ...]:
    """Add the classes up: they sum to VmSize. `kind` is what `kinds` returns."""
    if not knows_memory:
        return _totals_without_memory(table, kind)
    kib = [0] * len(NAMES)
    mappings = [0] * len(NAMES)
    for part, which in ((table.private, PRIVATE), (table.shared, SHARED), (table.swap, SWAPPED)):
        kib[which] = sum(part)
        mappings[which] = len(part) - part.count(0)
    for which in (NO_ACCESS, UNTOUCHED, FILE, SPECIAL):
        rest = [part for part, one in zip(table.rest, kind, strict=True) if one == which and part]
        kib[which] += sum(rest)
        mappings[which] += len(rest)
    return tuple(map(MemoryClass, NAMES, kib, mappings))


def _totals_without_memory(table: MapTable, kind: list[int | None]) -> tuple[MemoryClass, ...]:
    kinds = (
        (NAMES[NO_ACCESS], {NO_ACCESS}),
        (ACCESSIBLE, {UNTOUCHED, FILE}),
        (NAMES[SPECIAL], {SPECIAL}),
    )
    found = []
    for name, which in kinds:
        sizes = [size for size, one in zip(table.size, kind, strict=True) if one in which]
        found.append(MemoryClass(name, sum(sizes), len(sizes)))
    return tuple(found)
