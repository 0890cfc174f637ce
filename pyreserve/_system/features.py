"""Kernel features, found by trying each one, not by version number."""

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
    """Kernel features and limits of this process. Sizes in bytes; a limit of None is unlimited.

    Attributes:
        page_size: the OS page.
        huge_page_sizes: huge page sizes of the kernel (transparent and hugetlb), smallest first.
        transparent_huge_pages: ``"always"``, ``"madvise"`` or ``"never"``; None without THP.
        address_bits: user addresses are below ``2**address_bits``.
        overcommit_memory: vm.overcommit_memory: 0 heuristic, 1 always, 2 strict.
        rlimit_as, rlimit_data: soft limits (ulimit -v, -d).
        max_map_count: vm.max_map_count.
        madv_populate_write: MADV_POPULATE_WRITE (Linux 5.14).
        madv_free: MADV_FREE (Linux 4.5).
        madv_wipeonfork: MADV_WIPEONFORK (Linux 4.14).
        madv_guard_install: MADV_GUARD_INSTALL (Linux 6.13).
        mseal: mseal (Linux 6.10, 64-bit only).
        pagemap_scan: PAGEMAP_SCAN (Linux 6.7).
        procmap_query: PROCMAP_QUERY (Linux 6.11).
        anon_vma_names: PR_SET_VMA_ANON_NAME (Linux 5.17 with CONFIG_ANON_VMA_NAME).
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
    """Return the features that the running kernel offers to this process; each one is tried.

    If /proc is unreadable, `overcommit_memory` is 0 and `max_map_count` 65530 (the kernel's
    defaults), and features that need a file of /proc are False. Creates no mapping.

    Raises:
        OutOfMemoryError: no memory to try a feature.
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
    """Return the size of a transparent huge page in bytes; None if the kernel has no THP.

    If /sys is unreadable: the bytes that one page of page table entries maps, which is the size on
    every architecture so far.
    """
    try:
        return int((_THP / "hpage_pmd_size").read_text(encoding="ascii"))
    except OSError:
        no_thp = _THP.parent.is_dir() and not _THP.is_dir()
        return None if no_thp else PAGE_SIZE * (PAGE_SIZE // 8)


def _huge_page_sizes() -> tuple[int, ...]:
    sizes = _sizes_in(_HUGE)
    transparent = thp_size()
    if transparent is not None:
        sizes.add(transparent)
    return tuple(sorted(sizes))


def thp_settings() -> dict[int, str]:
    """Return the setting of each size of transparent huge page, keyed by bytes, smallest first.

    A setting is ``"always"``, ``"madvise"`` or ``"never"``. Each size has its own switch since
    Linux 6.8 (Documentation/admin-guide/mm/transhuge.rst).
    """
    general, settings = transparent_huge_pages(), {}
    if general is None:
        return {}
    for size in sorted(_sizes_in(_THP)):
        own = chosen(_THP / f"hugepages-{size // KiB}kB/enabled")
        if own is not None:
            settings[size] = general if own == "inherit" else own
    largest = thp_size()
    if largest is not None:
        settings.setdefault(largest, general)
    return settings


def hugetlb_free() -> dict[int, int]:
    """Return the number of free, unreserved hugetlb pages of each size, keyed by bytes."""
    free_pages = {}
    for size in sorted(_sizes_in(_HUGE)):
        pool = _HUGE / f"hugepages-{size // KiB}kB"
        with suppress(OSError):
            free, reserved = (
                int((pool / name).read_text(encoding="ascii"))
                for name in ("free_hugepages", "resv_hugepages")
            )
            free_pages[size] = free - reserved
    return free_pages


def _sizes_in(folder: Path) -> set[int]:
    try:
        names = os.listdir(folder)
    except OSError:
        return set()
    matches = (re.fullmatch(r"hugepages-(\d+)kB", name) for name in names)
    return {int(match[1]) * KiB for match in matches if match}


def transparent_huge_pages() -> str | None:
    """Return the general setting; see `Capabilities.transparent_huge_pages`."""
    return chosen(_THP / "enabled")


def chosen(switch: Path) -> str | None:
    """Return the choice in brackets in a file of /sys; None if the file does not exist."""
    try:
        choices = switch.read_text(encoding="ascii")
    except OSError:
        return None
    return choices[choices.index("[") + 1 : choices.index("]")]
