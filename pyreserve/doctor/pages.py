"""Checks of the page sizes, and of a hypervisor that may reclaim memory."""

from collections.abc import Iterator
from pathlib import Path

from pyreserve._system import machine, proc
from pyreserve._system.features import chosen, hugetlb_free, thp_settings, thp_size
from pyreserve.doctor.findings import Finding
from pyreserve.units import KiB, MiB, format_size

_MM = Path("/sys/kernel/mm")
_THP = _MM / "transparent_hugepage"
_HUGETLB = _MM / "hugepages"


def transparent_huge_pages() -> Iterator[Finding]:
    """Check the setting of each size (Documentation/admin-guide/mm/transhuge.rst)."""
    general = chosen(_THP / "enabled")
    settings, largest = thp_settings(), thp_size()
    if general is None or largest is None:
        _MM.stat()  # raises if /sys is missing, which says nothing about the kernel
        yield Finding(
            "transparent huge pages",
            "missing",
            f"The kernel was built without transparent huge pages: there is no {_THP}.",
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
    topic, own = "transparent huge pages", _switch(size)
    # A size without a switch of its own follows the general one.
    switch = own if chosen(own) not in {None, "inherit"} else _THP / "enabled"
    values = {
        "general": general,
        "size": size,
        "setting": setting,
        "defrag": chosen(_THP / "defrag"),
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
            f"echo madvise > {switch}",
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
            f"echo madvise > {_switch(suggested)}",
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


def _switch(size: int) -> Path:
    return _THP / f"hugepages-{size // KiB}kB/enabled"


def hugetlb() -> Iterator[Finding]:
    """Check the pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""
    _MM.stat()
    free = hugetlb_free()
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
            f"echo 64 > {_HUGETLB}/hugepages-{size // KiB}kB/nr_hugepages",
            "pyreserve costs --full measures them.",
            f"Nothing else can use these {format_size(64 * size)}.",
            values,
        )
    else:
        yield Finding(
            "hugetlb pools",
            "missing",
            f"The kernel was built without hugetlb pages: there is no {_HUGETLB}.",
            "pyreserve costs leaves hugetlb pages out; regions do not use them.",
            "build the kernel with CONFIG_HUGETLBFS=y",
            "pyreserve costs --full measures them.",
            values=values,
            command=False,
        )


def host() -> Iterator[Finding]:
    """Check for a hypervisor, and for a balloon by which it reclaims idle memory."""
    Path("/sys/bus").stat()  # raises if /sys is missing: a balloon would be listed there
    facts = machine.facts()
    virtualised, balloon = facts["virtualised"], facts["balloon"]
    values = {"virtualised": virtualised, "balloon": balloon}
    known = "" if virtualised in {"yes", "no"} else f" ({virtualised})"
    if balloon:
        yield Finding(
            "host",
            "limited",
            f"This is a virtual machine{known} with a balloon.",
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
        else f"This is a virtual machine{known} without a balloon.",
        "Discarded memory stays with this machine.",
        values=values,
    )


CHECKS = (
    ("transparent huge pages", transparent_huge_pages),
    ("hugetlb pools", hugetlb),
    ("host", host),
)
