"""Finer than the classes: what of the memory is dirty, huge, lazily freed, and the like."""

from pyreserve.procmem.judge.classes import NO_ACCESS, SPECIAL, UNTOUCHED, is_shared_memory
from pyreserve.procmem.judge.owners import Owner
from pyreserve.procmem.read.maps import EXECUTE, FLAGS, READ, WRITE, MapTable

_ACCESS = READ | WRITE | EXECUTE
_NR, _DEVICE = FLAGS["nr"], FLAGS["pf"] | FLAGS["io"]


def of_pages(table: MapTable) -> dict[str, int]:
    """Return the figures of smaps that are no class of their own, in KiB (proc(5)).

    ``dirty`` and ``clean`` divide what is in memory; ``lazy_free`` was given back with MADV_FREE
    and is in memory until the kernel wants it; ``*_huge`` lies in transparent huge pages,
    ``hugetlb`` in those of a pool, which are in USS but not in RSS; ``locked`` can't be swapped.
    """
    hugetlb = sum(table.private_hugetlb) + sum(table.shared_hugetlb)
    dirty = sum(table.private_dirty) + sum(table.shared_dirty)
    return {
        "dirty": dirty,
        "clean": sum(table.rss) - dirty,
        "anonymous": sum(table.anonymous),
        "lazy_free": sum(table.lazy_free),
        "anon_huge": sum(table.anon_huge),
        "shmem_huge": sum(table.shmem_huge),
        "file_huge": sum(table.file_huge),
        "hugetlb": hugetlb,
        "locked": sum(table.locked),
    }


def of_addresses(table: MapTable, kind: list[int | None]) -> dict[str, int]:
    """Return what the addresses without memory are, in KiB; `kind` is what `classes.kinds` found.

    ``no_access_resident`` is memory that nobody can reach now (it was used, then forbidden);
    ``no_access_file`` lies between a library's segments; ``untouched_noreserve`` is never charged
    as commit, so it is a reservation too; ``untouched_shared`` is shared memory not touched by this
    process, though perhaps by another; ``device`` is memory of a device or of the kernel, which
    counts in no figure of memory.
    """
    rest, perms, inode = table.rest, table.perms, table.inode
    named = [i for i, _ in table.named if inode[i]]
    files = [i for i in named if not is_shared_memory(table.names[i])]
    return {
        "no_access_file": sum(rest[i] for i in files if not perms[i] & _ACCESS),
        "no_access_resident": sum(
            [kib for kib, perm in zip(table.rss, perms, strict=True) if not perm & _ACCESS]
        ),
        "untouched_noreserve": sum(
            rest[i]
            for i, flags in enumerate(table.flags if table.knows_flags else ())
            if flags & _NR and kind[i] == UNTOUCHED
        ),
        "device": sum(
            rest[i]
            for i, flags in enumerate(table.flags if table.knows_flags else ())
            if flags & _DEVICE and kind[i] not in {SPECIAL, NO_ACCESS, None}
        ),
        "untouched_shared": sum(rest[i] for i in named if kind[i] == UNTOUCHED),
    }


def of_stacks(owners: tuple[Owner, ...], *, knows_memory: bool) -> dict[str, int]:
    """Return the addresses and the memory of stacks, in KiB."""
    stacks = [owner for owner in owners if owner.name in {"main stack", "thread stacks"}]
    found = {"stacks": sum(owner.kib for owner in stacks)}
    if knows_memory:
        found["stacks_resident"] = sum(owner.rss_kib for owner in stacks)
    return found
