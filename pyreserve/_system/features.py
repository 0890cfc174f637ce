"""What this kernel and this process offer, found by trying and not by version number."""

import errno
import os
import re
import resource
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyreserve._native import lib
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE, address_bits, refusal, rlimit
from pyreserve.units import KiB

_HUGE = Path("/sys/kernel/mm/hugepages")
_THP = Path("/sys/kernel/mm/transparent_hugepage")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """See `capabilities`. Sizes in bytes; None for a limit means unlimited.

    Attributes:
        page_size: the OS page.
        huge_page_sizes: sizes that the kernel knows, smallest first (transparent and hugetlb).
        transparent_huge_pages: ``"always"``, ``"madvise"`` or ``"never"``; None without THP.
        address_bits: user addresses lie below ``2**address_bits``.
        overcommit_memory: vm.overcommit_memory: 0 heuristic, 1 always, 2 strict.
        rlimit_as, rlimit_data: soft limits (ulimit -v, -d).
        max_map_count: vm.max_map_count.
        madv_populate_write: Linux 5.14.
        madv_free: Linux 4.5.
        madv_wipeonfork: Linux 4.14.
        madv_guard_install: Linux 6.13.
        mseal: Linux 6.10, 64-bit.
        pagemap_scan: Linux 6.7.
        procmap_query: Linux 6.11.
        anon_vma_names: CONFIG_ANON_VMA_NAME, Linux 5.17.
    """

    page_size: int
    huge_page_sizes: tuple[int, ...]
    transparent_huge_pages: str | None
    address_bits: int
    overcommit_memory: int
    rlimit_as: int | None
    rlimit_data: int | None
    max_map_count: int
    madv_populate_write: bool
    madv_free: bool
    madv_wipeonfork: bool
    madv_guard_install: bool
    mseal: bool
    pagemap_scan: bool
    procmap_query: bool
    anon_vma_names: bool


def capabilities() -> Capabilities:
    """Ask the running kernel what it offers to this process; each feature is tried.

    Where /proc can't be read: the kernel's defaults, 0 for `overcommit_memory` and 65530 for
    `max_map_count`; what needs a file there is not offered. Needs no new mapping.

    Raises:
        OutOfMemoryError: no memory to try a feature with.
    """
    return Capabilities(
        page_size=PAGE_SIZE,
        huge_page_sizes=_huge_page_sizes(),
        transparent_huge_pages=transparent_huge_pages(),
        address_bits=address_bits(),
        overcommit_memory=proc.setting_or_default("overcommit_memory"),
        rlimit_as=rlimit(resource.RLIMIT_AS),
        rlimit_data=rlimit(resource.RLIMIT_DATA),
        max_map_count=proc.setting_or_default("max_map_count"),
        madv_populate_write=_works(lib.vm_try_populate),
        madv_free=_works(lib.vm_try_discard_lazy),
        madv_wipeonfork=_works(lib.vm_try_wipe_on_fork),
        madv_guard_install=_works(lib.vm_try_guard),
        mseal=_works(lib.vm_try_seal),
        pagemap_scan=_works(lib.sys_try_pagemap_scan),
        procmap_query=_works(lib.sys_try_procmap_query),
        anon_vma_names=_works(lib.vm_try_name),
    )


def _works(attempt: Callable[[], int]) -> bool:
    err = attempt()
    if err == errno.ENOMEM:
        raise refusal("map", err, PAGE_SIZE)
    return err == 0


def thp_size() -> int | None:
    """Size of a transparent huge page; None where the kernel has none.

    Where /sys can't be read: what a page of a page table maps, which it is on every machine so far.
    """
    try:
        return int((_THP / "hpage_pmd_size").read_text(encoding="ascii"))
    except OSError:
        known_to_be_none = _THP.parent.is_dir() and not _THP.is_dir()
        return None if known_to_be_none else PAGE_SIZE * (PAGE_SIZE // 8)


def _huge_page_sizes() -> tuple[int, ...]:
    sizes = _sizes_in(_HUGE)
    transparent = thp_size()
    if transparent is not None:
        sizes.add(transparent)
    return tuple(sorted(sizes))


def thp_settings() -> dict[int, str]:
    """Return what is set for each size of transparent huge pages, in bytes, smallest first.

    ``"always"``, ``"madvise"`` or ``"never"``; each size has a switch of its own since Linux 6.8
    (Documentation/admin-guide/mm/transhuge.rst).
    """
    general, found = transparent_huge_pages(), {}
    if general is None:
        return {}
    for size in sorted(_sizes_in(_THP)):
        own = chosen(_THP / f"hugepages-{size // KiB}kB/enabled")
        if own is not None:
            found[size] = general if own == "inherit" else own
    largest = thp_size()
    if largest is not None:
        found.setdefault(largest, general)
    return found


def hugetlb_free() -> dict[int, int]:
    """Return how many huge pages of each size, in bytes, are free in the pool (hugetlb)."""
    found = {}
    for size in sorted(_sizes_in(_HUGE)):
        pool = _HUGE / f"hugepages-{size // KiB}kB"
        with suppress(OSError):
            free, reserved = (
                int((pool / name).read_text(encoding="ascii"))
                for name in ("free_hugepages", "resv_hugepages")
            )
            found[size] = free - reserved
    return found


def _sizes_in(folder: Path) -> set[int]:
    try:
        names = os.listdir(folder)
    except OSError:
        return set()
    found = (re.fullmatch(r"hugepages-(\d+)kB", name) for name in names)
    return {int(match[1]) * KiB for match in found if match}


def transparent_huge_pages() -> str | None:
    """Return what is set for them in general; see `Capabilities`."""
    return chosen(_THP / "enabled")


def chosen(switch: Path) -> str | None:
    """Read which of the choices in a file of /sys is in brackets; None if there is no such file."""
    try:
        choices = switch.read_text(encoding="ascii")
    except OSError:
        return None
    return choices[choices.index("[") + 1 : choices.index("]")]
