"""Finer figures than the classes: dirty, huge, lazily freed memory and others."""

from pyreserve._system.maps import EXECUTE, FLAGS, READ, WRITE, MapTable
from pyreserve.procmem.judge.classes import NO_ACCESS, SPECIAL, UNTOUCHED, is_shared_memory
from pyreserve.procmem.judge.owners import Owner
from pyreserve.units import KiB

_ACCESS = READ | WRITE | EXECUTE
_NR, _DEVICE = FLAGS["nr"], FLAGS["pf"] | FLAGS["io"]


def page_figures(table: MapTable) -> dict[str, int]:
    """Return the figures of smaps that are not classes, in bytes (proc(5)).

    ``dirty`` and ``clean`` sum to RSS; ``lazy_free`` was given back with MADV_FREE and stays
    resident until the kernel needs memory; ``*_huge`` is in transparent huge pages, ``hugetlb`` in
    pages of a huge page pool, which are in USS but not in RSS; ``locked`` can't be swapped.
    """
    hugetlb = sum(table.private_hugetlb) + sum(table.shared_hugetlb)
    dirty = sum(table.private_dirty) + sum(table.shared_dirty)
    kib = {
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
    return {name: size * KiB for name, size in kib.items()}


def address_figures(table: MapTable, rest_class: list[int | None]) -> dict[str, int]:
    """Return figures of addresses by access and flags, in bytes.

    ``no_access_resident`` is resident memory without access (used, then protected);
    ``no_access_file`` is between a library's segments; ``untouched_noreserve`` is never charged as
    commit, so that it is a reservation too; ``untouched_shared`` is shared memory that this process
    has not touched, though another may have; ``device`` is memory of a device or of the kernel,
    which no figure of memory includes.

    Args:
        table: the mappings.
        rest_class: the result of `classes.rest_classes`.
    """
    rest, perms, inode = table.rest, table.perms, table.inode
    named = [i for i, _ in table.named if inode[i]]
    files = [i for i in named if not is_shared_memory(table.names[i])]
    kib = {
        "no_access_file": sum(rest[i] for i in files if not perms[i] & _ACCESS),
        "no_access_resident": sum(
            [size for size, perm in zip(table.rss, perms, strict=True) if not perm & _ACCESS]
        ),
        "untouched_noreserve": sum(
            rest[i]
            for i, flags in enumerate(table.flags if table.knows_flags else ())
            if flags & _NR and rest_class[i] == UNTOUCHED
        ),
        "device": sum(
            rest[i]
            for i, flags in enumerate(table.flags if table.knows_flags else ())
            if flags & _DEVICE and rest_class[i] not in {SPECIAL, NO_ACCESS, None}
        ),
        "untouched_shared": sum(rest[i] for i in named if rest_class[i] == UNTOUCHED),
    }
    return {name: size * KiB for name, size in kib.items()}


def stack_figures(owners: tuple[Owner, ...], *, knows_memory: bool) -> dict[str, int]:
    """Return the size and the resident memory of all stacks, in bytes."""
    stacks = [owner for owner in owners if owner.name in {"main stack", "thread stacks"}]
    figures = {"stacks": sum(owner.size for owner in stacks)}
    if knows_memory:
        figures["stacks_resident"] = sum(owner.rss for owner in stacks)
    return figures
