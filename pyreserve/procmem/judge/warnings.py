"""Warnings: limits that a process is near, and memory that costs more than it should."""

from collections.abc import Iterator

from pyreserve._system.limitbase import CapturedProcess, percent
from pyreserve._system.limits import LIMITS
from pyreserve._system.maps import FLAGS, SHARED
from pyreserve._system.rlimits import RLIMIT_CORE
from pyreserve.procmem.read.snapshot import Capture
from pyreserve.units import GiB, KiB, format_size

# Any process has some page tables: a few KiB are no reason for a warning.
_PAGE_TABLE_SHARE, _MIN_PAGE_TABLES = 0.1, 128 * KiB
_MIN_DUMP_WALK = GiB


def warnings(capture: Capture, vsz: int, resident: int | None, mappings: int) -> list[str]:
    """Return the warnings about a process; `vsz` and `resident` in bytes, None if not known."""
    process = CapturedProcess(
        limits=capture.limits,
        status={**capture.status, "VmSize": vsz // KiB},
        machine=capture.machine,
        cgroups=capture.cgroups,
        map_count=mappings,
    )
    return [
        *(warning for limit in LIMITS for warning in limit.warnings(process)),
        *_page_tables(capture, resident),
        *_core_dumps(capture, process),
        *_inconsistent_files(capture),
    ]


def _page_tables(capture: Capture, resident: int | None) -> Iterator[str]:
    tables = capture.status.get("VmPTE", 0) * KiB
    if resident and tables >= _MIN_PAGE_TABLES and tables > _PAGE_TABLE_SHARE * resident:
        yield (
            f"page tables take {format_size(tables)}, {percent(tables, resident)} of resident "
            "memory: pages are used far apart, or were used and given back"
        )


def _core_dumps(capture: Capture, process: CapturedProcess) -> Iterator[str]:
    """Core dumps walk private mappings that were ever written to (vma_dump_size, fs/coredump.c)."""
    if not RLIMIT_CORE.dumps(process):
        return
    table, left_out = capture.table, FLAGS["dd"] | FLAGS["io"]
    walked = sum(
        rest
        for rest, anonymous, swap, flags, perms in zip(
            table.rest, table.anonymous, table.swap, table.flags, table.perms, strict=True
        )
        if (anonymous or swap) and flags and not flags & left_out and not perms & SHARED
    )
    if walked * KiB >= _MIN_DUMP_WALK:
        yield (
            f"a core dump would walk {format_size(walked * KiB)} of addresses without memory, in "
            "sparsely used mappings: madvise(MADV_DONTDUMP) excludes them"
        )


def _inconsistent_files(capture: Capture) -> Iterator[str]:
    if capture.settled:
        return
    if capture.live:
        yield (
            "the process changed while it was read: the figures are sums over its mappings and "
            "do not match the kernel's totals"
        )
    else:
        yield "the files were not read at one moment: smaps and the kernel's totals do not match"
