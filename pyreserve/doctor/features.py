"""What the kernel's newer calls bring, and what pyreserve does without them; each was tried."""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyreserve._system import proc
from pyreserve._system.features import capabilities
from pyreserve.doctor.findings import Finding


@dataclass(frozen=True, slots=True)
class _Feature:
    """A field of `pyreserve.Capabilities`, and what it means."""

    field: str
    topic: str
    since: tuple[int, int]  # of Linux; the man pages madvise(2) and mseal(2) and the kernel's log
    allows: str
    without: str
    effect: str
    config: str | None = None


_FEATURES = (
    _Feature(
        "madv_populate_write",
        "MADV_POPULATE_WRITE",
        (5, 14),
        "populate() backs a piece with memory in one call.",
        "populate() touches page by page instead.",
        "populate() is one system call, not a fault a page.",
    ),
    _Feature(
        "madv_free",
        "MADV_FREE",
        (4, 5),
        "discard(lazy=True) leaves the memory until the kernel needs it.",
        "discard(lazy=True) drops the contents at once.",
        "What is used again soon is not faulted in again.",
    ),
    _Feature(
        "madv_wipeonfork",
        "MADV_WIPEONFORK",
        (4, 14),
        'reserve(fork="wipe") gives children zeros.',
        'reserve(fork="wipe") is refused.',
        'reserve(fork="wipe") works.',
    ),
    _Feature(
        "madv_guard_install",
        "guard pages",
        (6, 13),
        "MADV_GUARD_INSTALL guards pages without a map entry (pyreserve costs measures it).",
        "A guard page costs map entries: reserve(guard=True) keeps to PROT_NONE.",
        "Guards cost no map entries.",
    ),
    _Feature(
        "mseal",
        "mseal",
        (6, 10),
        "reserve(seal=True) forbids unmapping and changes of access.",
        "reserve(seal=True) is refused.",
        "reserve(seal=True) works, in 64-bit processes.",
    ),
    _Feature(
        "pagemap_scan",
        "PAGEMAP_SCAN",
        (6, 7),
        "Which pages are in memory or were written can be asked for in one call.",
        "Which pages are in memory must be read page by page (mincore, /proc/PID/pagemap).",
        "Large regions are looked at in one call.",
    ),
    _Feature(
        "procmap_query",
        "PROCMAP_QUERY",
        (6, 11),
        "One mapping can be asked for by its address.",
        "All of /proc/PID/maps must be read to find one mapping.",
        "One mapping is found without reading thousands.",
    ),
    _Feature(
        "anon_vma_names",
        "names in maps",
        (5, 17),
        "reserve(name=...) shows in /proc/PID/maps as [anon:NAME].",
        "Regions have no name in /proc/PID/maps; everything else works.",
        "reserve(name=...) shows in /proc/PID/maps and smaps.",
        "CONFIG_ANON_VMA_NAME",
    ),
)


def features() -> Iterator[Finding]:
    """Tell of each feature whether it works here, and if not why."""
    offered = capabilities()
    for feature in _FEATURES:
        works = bool(getattr(offered, feature.field))
        yield (_works if works else _missing)(feature)


def _works(feature: _Feature) -> Finding:
    return Finding(
        feature.topic, "good", "Tried, and it works.", feature.allows, values={"works": True}
    )


def _missing(feature: _Feature) -> Finding:
    release, version = platform.release(), ".".join(map(str, feature.since))
    filtered = proc.status().get("Seccomp") == "2"
    if _version(release) < feature.since:
        fact = f"Linux {release} does not have it."
        change = f"boot Linux {version} or later"
        if feature.config is not None:
            change += f" that was built with {feature.config}=y"
    elif feature.config is not None:
        fact = f"Linux {release} was built without {feature.config}."
        change = f"build the kernel with {feature.config}=y"
    elif filtered:
        fact = f"It is refused, though Linux {release} has it: a seccomp filter is in force."
        change = "allow it in the container's seccomp profile"
    else:
        fact = f"It is refused, though Linux has it since {version}, and this is {release}."
        change = "ask for a kernel that is configured with it"
    return Finding(
        feature.topic,
        "missing",
        fact,
        feature.without,
        change,
        feature.effect,
        values={"works": False, "since": version, "seccomp_filter": filtered},
        command=False,
    )


def _version(release: str) -> tuple[int, int]:
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


CHECKS = (("kernel features", features),)
