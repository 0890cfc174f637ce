"""Facts about the machine that determine the cost of its memory."""

import os
from contextlib import suppress
from typing import Any

from pyreserve._system import proc
from pyreserve._system.extras import own_version
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.units import KiB

MM = "/sys/kernel/mm"
"""The folder of the kernel's memory management."""
BUS = "/sys/bus"
"""The folder of the buses, whose drivers list their devices."""
THP, HUGETLB = f"{MM}/transparent_hugepage", f"{MM}/hugepages"
"""The folders of transparent huge pages and of the pools of huge pages."""


def facts() -> dict[str, Any]:
    """Return the facts as a JSON-compatible dict; sizes in bytes, None if unknown.

    A vm setting that is unreadable has the kernel's default.

    - ``cpu``, ``cpus`` (the CPUs that this process may use), ``architecture``, ``kernel``;
    - ``memory``, ``page_size``, ``overcommit_memory`` (vm.overcommit_memory), ``max_map_count``;
    - ``transparent_huge_pages`` (size: setting), ``transparent_huge_pages_defrag``,
      ``hugetlb_free`` (size: free pages);
    - ``virtualised``: the hypervisor's name, ``"yes"`` if it has none, ``"no"`` on bare metal;
    - ``balloon``: whether a virtio balloon device may reclaim idle memory;
    - ``clocksource``, ``python``, ``pyreserve``.
    """
    import platform  # noqa: PLC0415  # slow to import

    cpu = _cpu_info()
    return {
        "cpu": cpu.get("model name") or cpu.get("Model") or platform.processor() or None,
        "cpus": len(os.sched_getaffinity(0)),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "memory": memory(),
        "page_size": PAGE_SIZE,
        "overcommit_memory": proc.setting_or_default("overcommit_memory"),
        "max_map_count": proc.setting_or_default("max_map_count"),
        "transparent_huge_pages": {str(size): setting for size, setting in thp_settings().items()},
        "transparent_huge_pages_defrag": thp_defrag(),
        "hugetlb_free": {str(size): free for size, free in hugetlb_free().items()},
        "virtualised": virtualised(),
        "balloon": has_balloon(),
        "clocksource": _text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "python": platform.python_version(),
        "pyreserve": own_version(),
    }


def memory() -> int:
    """Return the size of the machine's memory in bytes."""
    try:
        return proc.meminfo_kib()["MemTotal"] * KiB
    except proc.UNREADABLE:
        return os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE


def _cpu_info() -> dict[str, str]:
    try:
        return proc.cpu_info()
    except proc.UNREADABLE:
        return {}


def virtualised() -> str:
    """Return the hypervisor's name, ``"yes"`` if it has none, ``"no"`` on bare metal."""
    hypervisor = _text("/sys/hypervisor/type")
    if hypervisor is None and "hypervisor" not in _cpu_info().get("flags", "").split():
        return "no"
    return hypervisor or _text("/sys/class/dmi/id/sys_vendor") or "yes"


def has_balloon() -> bool:
    """Return whether a virtio balloon device may reclaim idle memory."""
    try:
        entries = os.listdir(f"{BUS}/virtio/drivers/virtio_balloon")
    except OSError:
        return False
    return any(entry.startswith("virtio") for entry in entries)


# -- huge pages -------------------------------------------------------------------------------


def thp_size() -> int | None:
    """Return the size of a transparent huge page in bytes; None if the kernel has no THP.

    If /sys is unreadable: the bytes that one page of page table entries maps, which is the size on
    every architecture so far.
    """
    size = _text(f"{THP}/hpage_pmd_size")
    if size is not None:
        return int(size)
    no_thp = os.path.isdir(os.path.dirname(THP)) and not os.path.isdir(THP)
    return None if no_thp else PAGE_SIZE * (PAGE_SIZE // 8)


def free_memory() -> tuple[int, int] | None:
    """Return the free bytes, and how many lie in blocks of at least a huge page; None if unknown.

    Free memory in smaller blocks is fragmented: it can become a huge page only by compaction.
    """
    size = thp_size()
    try:
        pages = proc.buddy_pages()
    except proc.UNREADABLE:
        return None
    if size is None or not pages:
        return None
    order = (size // PAGE_SIZE).bit_length() - 1
    return sum(pages) * PAGE_SIZE, sum(pages[order:]) * PAGE_SIZE


def thp_setting() -> str | None:
    """Return the general setting of transparent huge pages; None if the kernel has no THP.

    A setting is ``"always"``, ``"madvise"`` or ``"never"``
    (Documentation/admin-guide/mm/transhuge.rst).
    """
    return _choice(f"{THP}/enabled")


def thp_defrag() -> str | None:
    """Return when a page fault waits for memory to be compacted; None if unknown."""
    return _choice(f"{THP}/defrag")


def thp_settings() -> dict[int, str]:
    """Return the setting of each size of transparent huge page, keyed by bytes, smallest first.

    Each size has its own switch since Linux 6.8.
    """
    general, settings = thp_setting(), {}
    if general is None:
        return {}
    for size in sorted(_sizes_in(THP)):
        own = _choice(thp_switch(size))
        if own is not None:
            settings[size] = general if own == "inherit" else own
    largest = thp_size()
    if largest is not None:
        settings.setdefault(largest, general)
    return settings


def thp_switch(size: int) -> str:
    """Return the file with the setting of one size of transparent huge page."""
    return f"{THP}/hugepages-{size // KiB}kB/enabled"


def effective_thp_switch(size: int) -> str:
    """Return the file whose setting applies to a size: its own, or the general one."""
    own = thp_switch(size)
    return own if _choice(own) not in {None, "inherit"} else f"{THP}/enabled"


def huge_page_sizes() -> tuple[int, ...]:
    """Return the sizes of huge pages (transparent and hugetlb) in bytes, smallest first."""
    sizes = _sizes_in(HUGETLB)
    transparent = thp_size()
    if transparent is not None:
        sizes.add(transparent)
    return tuple(sorted(sizes))


def hugetlb_free() -> dict[int, int]:
    """Return the number of free, unreserved hugetlb pages of each size, keyed by bytes."""
    free_pages = {}
    for size in sorted(_sizes_in(HUGETLB)):
        pool = os.path.dirname(hugetlb_switch(size))
        free, reserved = (_text(f"{pool}/{name}_hugepages") for name in ("free", "resv"))
        if free is not None and reserved is not None:
            free_pages[size] = int(free) - int(reserved)
    return free_pages


def hugetlb_switch(size: int) -> str:
    """Return the file with the number of hugetlb pages of one size."""
    return f"{HUGETLB}/hugepages-{size // KiB}kB/nr_hugepages"


def _sizes_in(folder: str) -> set[int]:
    """Return the sizes that a folder has entries for, such as ``hugepages-2048kB``."""
    sizes = set()
    with suppress(OSError):
        for name in os.listdir(folder):
            kib = name.removeprefix("hugepages-").removesuffix("kB")
            if proc.is_natural(kib) and name == f"hugepages-{kib}kB":
                sizes.add(int(kib) * KiB)
    return sizes


def _choice(switch: str) -> str | None:
    """Return the choice in brackets in a file of /sys; None if it is unreadable."""
    choices = _text(switch)
    return None if choices is None else choices[choices.index("[") + 1 : choices.index("]")]


def _text(path: str) -> str | None:
    """Return the text of a file of /sys; None if it is empty or unreadable."""
    try:
        return proc.sys_text(path).strip() or None
    except OSError:
        return None
