"""Kernel features in one table, which `capabilities` and doctor read. Each feature is tried.

The version of the kernel only explains why a feature is missing.
"""

import errno
import os
import re
import resource
from collections.abc import Callable
from typing import Any, NamedTuple

from pyreserve._native import lib
from pyreserve._system import machine, proc
from pyreserve._system.limitbase import Assessment, rlimit
from pyreserve._system.limits import PAGE_SIZE, address_bits, refusal
from pyreserve.errors import VMError


class Feature(NamedTuple):
    """A feature of the kernel.

    Attributes:
        field: its field in `Capabilities`.
        attempt: tries it; returns 0 or an errno.
        topic: its topic in doctor.
        since: the Linux version, from madvise(2), mseal(2) and the kernel's git log.
        allows: its use in pyreserve.
        without: the substitute where it is missing.
        effect: the benefit over the substitute.
        config: the option that the kernel must be built with.
    """

    field: str
    attempt: Callable[[], int]
    topic: str
    since: tuple[int, int]
    allows: str
    without: str
    effect: str
    config: str | None = None

    def works(self) -> bool:
        """Try the feature.

        Raises:
            OutOfMemoryError: no memory to try it.
        """
        err = self.attempt()
        if err == errno.ENOMEM:
            raise refusal("map", err, PAGE_SIZE)
        return err == 0

    def require(self, user: str) -> None:
        """Raise `VMError` unless the feature works; the message says that `user` needs it."""
        if not self.works():
            missing = self._missing()
            msg = f"{user} needs {self.topic}: {missing.fact} To have it, {missing.change}."
            raise VMError(self.attempt(), msg, verb="guard")

    def assess(self) -> Assessment:
        """Return the assessment for doctor."""
        if not self.works():
            return self._missing()
        fact = "It works: a trial succeeded."
        return Assessment(self.topic, "good", fact, self.allows, {"works": True})

    def _missing(self) -> Assessment:
        release, since = os.uname().release, ".".join(map(str, self.since))
        filtered = proc.status().get("Seccomp") == "2"
        if _version(release) < self.since:
            fact = f"Linux {release} does not have it."
            change = f"boot Linux {since} or later"
            if self.config is not None:
                change += f" built with {self.config}=y"
        elif self.config is not None:
            fact = f"Linux {release} was built without {self.config}."
            change = f"build the kernel with {self.config}=y"
        elif filtered:
            fact = f"Linux {release} has it, but a seccomp filter is active and the trial failed."
            change = "allow it in the container's seccomp profile"
        else:
            fact = f"Linux has it since {since}, but the trial failed on Linux {release}."
            change = "use a kernel that is configured with it"
        return Assessment(
            self.topic,
            "missing",
            fact,
            self.without,
            {"works": False, "since": since, "seccomp_filter": filtered},
            change,
            self.effect,
            command=False,
        )


def _version(release: str) -> tuple[int, int]:
    """Return major and minor version of a kernel release such as ``"6.18-rc1"``."""
    digits = re.match(r"(\d+)\.(\d+)", release)
    return (int(digits[1]), int(digits[2])) if digits else (0, 0)


GUARD_PAGES = Feature(
    "madv_guard_install",
    lib.vm_try_guard,
    "guard pages",
    (6, 13),
    "Pool(guard=True) is supported: MADV_GUARD_INSTALL guards pages without map entries.",
    "Pool(guard=True) is refused, and reserve(guard=True) uses PROT_NONE mappings.",
    "Pool(guard=True) is supported: guard pages cost no map entries.",
)

FEATURES = (
    Feature(
        "madv_populate_write",
        lib.vm_try_populate,
        "MADV_POPULATE_WRITE",
        (5, 14),
        "populate() backs a range with pages in one system call.",
        "populate() touches each page instead.",
        "populate() takes one system call instead of one fault per page.",
    ),
    Feature(
        "madv_free",
        lib.vm_try_discard_lazy,
        "MADV_FREE",
        (4, 5),
        "discard(lazy=True) keeps pages until the kernel needs the memory.",
        "discard(lazy=True) drops the contents at once, as discard() does.",
        "Memory that is soon reused takes no new page faults.",
    ),
    Feature(
        "madv_wipeonfork",
        lib.vm_try_wipe_on_fork,
        "MADV_WIPEONFORK",
        (4, 14),
        'reserve(fork="wipe") is supported: forked children read zeros.',
        'reserve(fork="wipe") is refused.',
        'reserve(fork="wipe") is supported.',
    ),
    GUARD_PAGES,
    Feature(
        "mseal",
        lib.vm_try_seal,
        "mseal",
        (6, 10),
        "reserve(seal=True) is supported: the range can't be unmapped or reprotected.",
        "reserve(seal=True) is refused.",
        "reserve(seal=True) is supported in 64-bit processes.",
    ),
    Feature(
        "pagemap_scan",
        lib.sys_try_pagemap_scan,
        "PAGEMAP_SCAN",
        (6, 7),
        "One call reports which pages of a range are resident or were written.",
        "Resident pages are read page by page (mincore, /proc/PID/pagemap).",
        "One call reports the resident pages of a large region.",
    ),
    Feature(
        "procmap_query",
        lib.sys_try_procmap_query,
        "PROCMAP_QUERY",
        (6, 11),
        "One call reports the mapping at an address.",
        "Finding one mapping takes reading all of /proc/PID/maps.",
        "One mapping is found without reading all others.",
    ),
    Feature(
        "anon_vma_names",
        lib.vm_try_name,
        "names in maps",
        (5, 17),
        "A region made by reserve(name=...) appears in /proc/PID/maps as [anon:NAME].",
        "Regions have no names in /proc/PID/maps; nothing else is lost.",
        "A region made by reserve(name=...) has its name in /proc/PID/maps and smaps.",
        "CONFIG_ANON_VMA_NAME",
    ),
)


class Capabilities(NamedTuple):
    """Kernel features and limits of this process. Sizes in bytes; a limit of None is unlimited.

    ``pyreserve doctor`` tells for each feature the Linux version and what is lost without it.

    Attributes:
        page_size: the OS page.
        huge_page_sizes: huge page sizes of the kernel (transparent and hugetlb), smallest first.
        transparent_huge_pages: ``"always"``, ``"madvise"`` or ``"never"``; None without THP.
        address_bits: user addresses are below ``2**address_bits``.
        overcommit_memory: vm.overcommit_memory: 0 heuristic, 1 always, 2 strict.
        rlimit_as, rlimit_data: soft limits (ulimit -v, -d).
        max_map_count: vm.max_map_count.
        madv_populate_write, madv_free, madv_wipeonfork, madv_guard_install: the kernel accepts the
            advice (madvise(2)).
        mseal: mseal(2) works; 64-bit processes only.
        pagemap_scan, procmap_query: the ioctls PAGEMAP_SCAN and PROCMAP_QUERY work.
        anon_vma_names: PR_SET_VMA_ANON_NAME works (CONFIG_ANON_VMA_NAME).
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
    works: dict[str, Any] = {feature.field: feature.works() for feature in FEATURES}
    return Capabilities(
        page_size=PAGE_SIZE,
        huge_page_sizes=machine.huge_page_sizes(),
        transparent_huge_pages=machine.thp_setting(),
        address_bits=address_bits(),
        overcommit_memory=proc.setting_or_default("overcommit_memory"),
        rlimit_as=rlimit(resource.RLIMIT_AS),
        rlimit_data=rlimit(resource.RLIMIT_DATA),
        max_map_count=proc.setting_or_default("max_map_count"),
        **works,
    )
