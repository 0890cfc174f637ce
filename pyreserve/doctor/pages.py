"""Checks of swap, of page sizes, and of a hypervisor that may reclaim memory."""

import os
from collections.abc import Iterator

from pyreserve._system import machine, proc
from pyreserve.doctor.findings import Finding
from pyreserve.units import KiB, MiB, format_size


def transparent_huge_pages() -> Iterator[Finding]:
    """Check the setting of each size (Documentation/admin-guide/mm/transhuge.rst)."""
    general = machine.thp_setting()
    settings, largest = machine.thp_settings(), machine.thp_size()
    if general is None or largest is None:
        os.stat(machine.MM)  # raises if /sys is missing, which says nothing about the kernel
        yield Finding(
            "transparent huge pages",
            "missing",
            f"The kernel was built without transparent huge pages: there is no {machine.THP}.",
            'huge_pages="prefer" is refused.',
            "build the kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
            f"First touch of {format_size(2 * MiB)} takes one page fault instead of "
            f"{2 * MiB // (4 * KiB)}.",
            values={"settings": {}},
            command=False,
        )
        return
    yield _largest_thp(general, settings[largest], largest)
    smaller = {size: setting for size, setting in settings.items() if size < largest}
    yield _small_thp(smaller, largest)


def _largest_thp(general: str, setting: str, size: int) -> Finding:
    topic = "transparent huge pages"
    values = {
        "general": general,
        "size": size,
        "setting": setting,
        "defrag": machine.thp_defrag(),
    }
    if proc.status().get("THP_enabled") == "0":
        return Finding(
            topic,
            "missing",
            "This process or an ancestor disabled them (prctl PR_SET_THP_DISABLE).",
            'huge_pages="prefer" gets small pages.',
            "start the process from a parent that has not disabled them",
            f"The system's setting applies: {setting}.",
            values=values,
            command=False,
        )
    if setting == "never":
        return Finding(
            topic,
            "missing",
            f"Pages of {format_size(size)} are set to never.",
            'huge_pages="prefer" gets small pages.',
            f"echo madvise > {machine.effective_thp_switch(size)}",
            f'In regions with huge_pages="prefer" one page fault brings {format_size(size)}; '
            "pyreserve costs measures the gain.",
            "A huge page takes memory as a whole, used or not.",
            values,
        )
    return Finding(
        topic,
        "good",
        f"Pages of {format_size(size)} are set to {setting}.",
        'Regions with huge_pages="prefer" get them where a whole aligned page is committed.'
        if setting == "madvise"
        else 'All regions get them, except those with huge_pages="never".',
        values=values,
    )


def _small_thp(settings: dict[int, str], largest: int) -> Finding:
    topic = "small THP"
    values = {"settings": {str(size): setting for size, setting in settings.items()}}
    allowed = [size for size, setting in settings.items() if setting != "never"]
    if allowed:
        return Finding(
            topic,
            "good",
            f"Enabled: {', '.join(f'{format_size(n)} ({settings[n]})' for n in allowed)}.",
            'huge_pages="prefer" gets them where no larger page fits.',
            values=values,
        )
    if settings:
        suggested = 64 * KiB if 64 * KiB in settings else min(settings)
        return Finding(
            topic,
            "missing",
            f"Pages of {format_size(min(settings))} to {format_size(max(settings))} are set to "
            "never.",
            f"Ranges below {format_size(largest)} take one fault per OS page.",
            f"echo madvise > {machine.thp_switch(suggested)}",
            f'With huge_pages="prefer" one page fault brings {format_size(suggested)}.',
            "Such a page takes memory as a whole, used or not.",
            values,
        )
    return Finding(
        topic,
        "missing",
        f"This kernel has transparent huge pages of {format_size(largest)} only.",
        f"Ranges below {format_size(largest)} take one fault per OS page.",
        "boot Linux 6.8 or later",
        "Smaller sizes exist, each with its own setting.",
        values=values,
        command=False,
    )


def hugetlb() -> Iterator[Finding]:
    """Check the pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""
    os.stat(machine.MM)
    free = machine.hugetlb_free()
    values = {"free_pages": {str(size): pages for size, pages in free.items()}}
    if any(free.values()):
        pools = ", ".join(f"{n:,} of {format_size(size)}" for size, n in free.items() if n)
        yield Finding(
            "hugetlb pools",
            "good",
            f"Free pages: {pools}.",
            "pyreserve costs measures them.",
            values=values,
        )
    elif free:
        size = min(free)
        yield Finding(
            "hugetlb pools",
            "missing",
            f"The pools ({', '.join(format_size(n) for n in free)}) have no free page.",
            "pyreserve costs leaves hugetlb pages out; regions do not use them.",
            f"echo 64 > {machine.hugetlb_switch(size)}",
            "pyreserve costs --full measures them.",
            f"Nothing else can use these {format_size(64 * size)}.",
            values,
        )
    else:
        yield Finding(
            "hugetlb pools",
            "missing",
            f"The kernel was built without hugetlb pages: there is no {machine.HUGETLB}.",
            "pyreserve costs leaves hugetlb pages out; regions do not use them.",
            "build the kernel with CONFIG_HUGETLBFS=y",
            "pyreserve costs --full measures them.",
            values=values,
            command=False,
        )


def swap() -> Iterator[Finding]:
    """Check whether the kernel can swap idle memory out."""
    memory = proc.meminfo_kib()
    total, free = memory["SwapTotal"] * KiB, memory["SwapFree"] * KiB
    values = {"total": total, "free": free}
    if total:
        yield Finding(
            "swap",
            "good",
            f"Swap has {format_size(total)}, of which {format_size(free)} is free.",
            "The kernel can swap idle memory out.",
            values=values,
        )
        return
    yield Finding(
        "swap",
        "missing",
        "There is no swap.",
        "Touched memory stays in RAM until it is discarded, decommitted or released. "
        "discard(lazy=True) lets the kernel reclaim it without swap.",
        "fallocate -l 4G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile",
        "The kernel can swap idle memory out, and the commit limit rises by 4 GiB.",
        "Touching memory that was swapped out waits for the disk.",
        values,
    )


def host() -> Iterator[Finding]:
    """Check for a hypervisor, and for a balloon by which it reclaims idle memory."""
    os.stat(machine.BUS)  # raises if /sys is missing: a balloon would be listed there
    virtualised, balloon = machine.virtualised(), machine.has_balloon()
    values = {"virtualised": virtualised, "balloon": balloon}
    name = "" if virtualised in {"yes", "no"} else f" ({virtualised})"
    if balloon:
        yield Finding(
            "host",
            "limited",
            f"This is a virtual machine{name} with a balloon.",
            "The host may reclaim discarded memory. First touch then costs many times as much; "
            "pyreserve costs lists such samples separately (cold host).",
            "on the host: remove the balloon or its free page reporting",
            "Memory that was used once stays fast to touch.",
            "The host can't give the memory to other machines.",
            values,
            command=False,
        )
        return
    yield Finding(
        "host",
        "good",
        "No hypervisor was detected."
        if virtualised == "no"
        else f"This is a virtual machine{name} without a balloon.",
        "Discarded memory stays with this machine.",
        values=values,
    )


CHECKS = (
    ("swap", swap),
    ("transparent huge pages", transparent_huge_pages),
    ("hugetlb pools", hugetlb),
    ("host", host),
)
