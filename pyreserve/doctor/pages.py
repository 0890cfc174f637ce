"""Which sizes of pages there are, and who may take them back."""

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
    """See the switches of each size (Documentation/admin-guide/mm/transhuge.rst)."""
    general = chosen(_THP / "enabled")
    settings, largest = thp_settings(), thp_size()
    if general is None or largest is None:
        _MM.stat()  # a /sys that is not there is another matter than a kernel without them
        yield Finding(
            "transparent huge pages",
            "missing",
            f"There is no {_THP}: this kernel was built without them.",
            'huge_pages="prefer" is refused.',
            "build the kernel with CONFIG_TRANSPARENT_HUGEPAGE=y",
            f"First touch of {format_size(2 * MiB)} is one fault, not {2 * MiB // (4 * KiB)}.",
            values={"settings": {}},
            command=False,
        )
        return
    yield _largest_thp(general, settings[largest], largest)
    yield _small_thp({size: how for size, how in settings.items() if size < largest}, largest)


def _largest_thp(general: str, setting: str, size: int) -> Finding:
    topic, own = "transparent huge pages", _switch(size)
    # Without a switch of its own a size follows the general one.
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
            "They are switched off for this process (prctl PR_SET_THP_DISABLE, or a parent's).",
            'huge_pages="prefer" gets small pages.',
            "start the process from one that did not switch them off",
            f"What is set holds: {setting}.",
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
            f'Regions with huge_pages="prefer" take {format_size(size)} with one fault, which '
            "costs a fraction of so many small ones: see pyreserve costs.",
            "A huge page is in memory as a whole, used or not.",
            values,
        )
    return Finding(
        topic,
        "good",
        f"Pages of {format_size(size)} are set to {setting}.",
        'Regions with huge_pages="prefer" get them where a whole aligned one is committed.'
        if setting == "madvise"
        else 'All regions get them, but for those with huge_pages="never".',
        values=values,
    )


def _small_thp(settings: dict[int, str], largest: int) -> Finding:
    topic = "small THP"
    values = {"settings": {str(size): how for size, how in settings.items()}}
    allowed = [size for size, how in settings.items() if how != "never"]
    if allowed:
        return Finding(
            topic,
            "good",
            f"Also set: {', '.join(f'{format_size(n)} {settings[n]}' for n in allowed)}.",
            'huge_pages="prefer" gets them where no larger page fits.',
            values=values,
        )
    if settings:
        wish = 64 * KiB if 64 * KiB in settings else min(settings)
        return Finding(
            topic,
            "missing",
            f"The sizes from {format_size(min(settings))} to {format_size(max(settings))} are set "
            "to never.",
            f"Less than {format_size(largest)} is touched page by page.",
            f"echo madvise > {_switch(wish)}",
            f'With huge_pages="prefer" first touch of {format_size(wish)} is one fault.',
            "Such a page is in memory as a whole, used or not.",
            values,
        )
    return Finding(
        topic,
        "missing",
        f"Transparent huge pages have the one size of {format_size(largest)} here.",
        f"Less than {format_size(largest)} is touched page by page.",
        "boot Linux 6.8 or later",
        "Each size has a switch of its own.",
        values=values,
        command=False,
    )


def _switch(size: int) -> Path:
    return _THP / f"hugepages-{size // KiB}kB/enabled"


def hugetlb() -> Iterator[Finding]:
    """See the pools of huge pages (Documentation/admin-guide/mm/hugetlbpage.rst)."""
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
            f"No page of the pools is free ({', '.join(format_size(n) for n in free)}).",
            "pyreserve costs leaves hugetlb pages out; regions do not need them.",
            f"echo 64 > {_HUGETLB}/hugepages-{size // KiB}kB/nr_hugepages",
            "pyreserve costs --full measures them.",
            f"{format_size(64 * size)} are then of no use for anything else.",
            values,
        )
    else:
        yield Finding(
            "hugetlb pools",
            "missing",
            f"There is no {_HUGETLB}: this kernel was built without them.",
            "pyreserve costs leaves hugetlb pages out; regions do not need them.",
            "build the kernel with CONFIG_HUGETLBFS=y",
            "pyreserve costs --full measures them.",
            values=values,
            command=False,
        )


def host() -> Iterator[Finding]:
    """See whether a hypervisor gives the memory, and may take idle memory back."""
    Path("/sys/bus").stat()  # where a balloon would show
    facts = machine.facts()
    virtualised, balloon = facts["virtualised"], facts["balloon"]
    values = {"virtualised": virtualised, "balloon": balloon}
    known = "" if virtualised in {"yes", "no"} else f" ({virtualised})"
    if balloon:
        yield Finding(
            "host",
            "limited",
            f"This is a virtual machine{known} with a balloon.",
            "The host may take back what was discarded; first touch then costs many times as "
            "much, and pyreserve costs shows it apart (host cold).",
            "on the host: a balloon without free page reporting, or none",
            "Memory that was used once stays quick to touch.",
            "The host can't give the memory to other machines.",
            values,
            command=False,
        )
        return
    yield Finding(
        "host",
        "good",
        "No hypervisor shows itself."
        if virtualised == "no"
        else f"This is a virtual machine{known} without a balloon.",
        "What was discarded stays with this machine.",
        values=values,
    )


CHECKS = (
    ("transparent huge pages", transparent_huge_pages),
    ("hugetlb pools", hugetlb),
    ("host", host),
)
