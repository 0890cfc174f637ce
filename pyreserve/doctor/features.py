"""Checks of newer kernel features: each is tried, and a missing one names its substitute."""

import platform
import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyreserve._system import proc
from pyreserve._system.features import capabilities
from pyreserve.doctor.findings import Finding


@dataclass(frozen=True, slots=True)
class _Feature:
    """A field of `pyreserve.Capabilities` and its texts."""

    field: str
    topic: str
    since: tuple[int, int]  # Linux version, from madvise(2), mseal(2) and the kernel's git log
    allows: str
    without: str
    effect: str
    config: str | None = None


_FEATURES = (
    _Feature(
        "madv_populate_write",
        "MADV_POPULATE_WRITE",
        (5, 14),
        "populate() backs a range with pages in one system call.",
        "populate() touches each page instead.",
        "populate() takes one system call instead of one fault per page.",
    ),
    _Feature(
        "madv_free",
        "MADV_FREE",
        (4, 5),
        "discard(lazy=True) keeps pages until the kernel needs the memory.",
        "discard(lazy=True) drops the contents at once, as discard() does.",
        "Memory that is soon reused takes no new page faults.",
    ),
    _Feature(
        "madv_wipeonfork",
        "MADV_WIPEONFORK",
        (4, 14),
        'reserve(fork="wipe") is supported: forked children read zeros.',
        'reserve(fork="wipe") is refused.',
        'reserve(fork="wipe") is supported.',
    ),
    _Feature(
        "madv_guard_install",
        "guard pages",
        (6, 13),
        "MADV_GUARD_INSTALL guards pages without map entries; pyreserve costs measures it.",
        "Guard pages cost map entries: reserve(guard=True) uses PROT_NONE mappings.",
        "Guard pages cost no map entries.",
    ),
    _Feature(
        "mseal",
        "mseal",
        (6, 10),
        "reserve(seal=True) is supported: the range can't be unmapped or reprotected.",
        "reserve(seal=True) is refused.",
        "reserve(seal=True) is supported in 64-bit processes.",
    ),
    _Feature(
        "pagemap_scan",
        "PAGEMAP_SCAN",
        (6, 7),
        "One call reports which pages of a range are resident or were written.",
        "Resident pages are read page by page (mincore, /proc/PID/pagemap).",
        "One call reports the resident pages of a large region.",
    ),
    _Feature(
        "procmap_query",
        "PROCMAP_QUERY",
        (6, 11),
        "One call reports the mapping at an address.",
        "Finding one mapping takes reading all of /proc/PID/maps.",
        "One mapping is found without reading all others.",
    ),
    _Feature(
        "anon_vma_names",
        "names in maps",
        (5, 17),
        "A region made by reserve(name=...) appears in /proc/PID/maps as [anon:NAME].",
        "Regions have no names in /proc/PID/maps; nothing else is lost.",
        "A region made by reserve(name=...) has its name in /proc/PID/maps and smaps.",
        "CONFIG_ANON_VMA_NAME",
    ),
)


def features() -> Iterator[Finding]:
    """Check for each feature whether it works here, and if not, why."""
    offered = capabilities()
    for feature in _FEATURES:
        works = bool(getattr(offered, feature.field))
        yield (_works if works else _missing)(feature)


def _works(feature: _Feature) -> Finding:
    return Finding(
        feature.topic,
        "good",
        "It works: a trial succeeded.",
        feature.allows,
        values={"works": True},
    )


def _missing(feature: _Feature) -> Finding:
    release, version = platform.release(), ".".join(map(str, feature.since))
    filtered = proc.status().get("Seccomp") == "2"
    if _version(release) < feature.since:
        fact = f"Linux {release} does not have it."
        change = f"boot Linux {version} or later"
        if feature.config is not None:
            change += f" built with {feature.config}=y"
    elif feature.config is not None:
        fact = f"Linux {release} was built without {feature.config}."
        change = f"build the kernel with {feature.config}=y"
    elif filtered:
        fact = f"Linux {release} has it, but a seccomp filter is active and the trial failed."
        change = "allow it in the container's seccomp profile"
    else:
        fact = f"Linux has it since {version}, but the trial failed on Linux {release}."
        change = "use a kernel that is configured with it"
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
    match = re.match(r"(\d+)\.(\d+)", release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


CHECKS = (("kernel features", features),)
