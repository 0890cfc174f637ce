"""Warnings: limits that a process is near, and memory that costs more than it should."""

from collections.abc import Iterator

from pyreserve._system.maps import FLAGS, SHARED
from pyreserve.procmem.read.snapshot import Capture
from pyreserve.units import GiB, KiB, format_size

# Any process has some page tables: a few KiB are no reason for a warning.
_NEAR_LIMIT = 0.9
_PAGE_TABLE_SHARE, _MIN_PAGE_TABLES_KIB = 0.1, 128
_MIN_DUMP_WALK = GiB


def warnings(capture: Capture, vsz: int, resident: int | None, mappings: int) -> list[str]:
    """Return the warnings about a process; `vsz` and `resident` in KiB, None if not known."""
    return [
        *_limits(capture, vsz),
        *_cgroups(capture),
        *_machine(capture),
        *_map_count(capture, mappings),
        *_page_tables(capture, resident),
        *_commit_limit(capture),
        *_core_dumps(capture),
        *_inconsistent_files(capture),
    ]


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %"


def _limits(capture: Capture, vsz: int) -> Iterator[str]:
    uses = (
        ("address space", "RLIMIT_AS (ulimit -v)", "VSZ", vsz),
        ("data size", "RLIMIT_DATA (ulimit -d)", "VmData", capture.status.get("VmData", 0)),
        ("locked memory", "RLIMIT_MEMLOCK (ulimit -l)", "VmLck", capture.status.get("VmLck", 0)),
    )
    for name, limit_name, figure, kib in uses:
        limit = capture.limits.get(name)
        if limit is not None and kib and kib * KiB >= _NEAR_LIMIT * limit:
            yield (
                f"{figure} is {_share(kib * KiB, limit) if limit else 'all'} of {limit_name}, "
                f"{format_size(limit)}: soon the kernel refuses more"
            )


def _cgroups(capture: Capture) -> Iterator[str]:
    for limit, used in capture.cgroups:
        if used >= _NEAR_LIMIT * limit:
            yield (
                f"its memory cgroup uses {format_size(used)} of {format_size(limit)}, page cache "
                "left out: soon the kernel kills a process in it"
            )


def _machine(capture: Capture) -> Iterator[str]:
    available, total = (capture.machine.get(name) for name in ("MemAvailable", "MemTotal"))
    if available is not None and total is not None and available <= (1 - _NEAR_LIMIT) * total:
        yield (
            f"the machine has {format_size(available * KiB)} of its {format_size(total * KiB)} of "
            "memory left (MemAvailable): soon it swaps, or the kernel kills a process"
        )


def _map_count(capture: Capture, mappings: int) -> Iterator[str]:
    limit = capture.machine.get("max_map_count")
    if limit is not None and mappings >= _NEAR_LIMIT * limit:
        yield (
            f"it has {mappings:,} mappings and vm.max_map_count is {limit:,}: soon mmap, mprotect "
            "and munmap are refused (sysctl -w vm.max_map_count raises it)"
        )


def _page_tables(capture: Capture, resident: int | None) -> Iterator[str]:
    tables = capture.status.get("VmPTE", 0)
    if resident and tables >= _MIN_PAGE_TABLES_KIB and tables > _PAGE_TABLE_SHARE * resident:
        yield (
            f"page tables take {format_size(tables * KiB)}, {_share(tables, resident)} of resident "
            "memory: pages are used far apart, or were used and given back"
        )


def _commit_limit(capture: Capture) -> Iterator[str]:
    used, limit = (capture.machine.get(name, 0) for name in ("Committed_AS", "CommitLimit"))
    if capture.machine.get("overcommit_memory") == 2 and limit and used >= _NEAR_LIMIT * limit:
        yield (
            f"vm.overcommit_memory is 2 and the system has promised {format_size(used * KiB)} of "
            f"{format_size(limit * KiB)} (Committed_AS, CommitLimit): soon a commit is refused"
        )


def _core_dumps(capture: Capture) -> Iterator[str]:
    """Core dumps walk private mappings that were ever written to (vma_dump_size, fs/coredump.c)."""
    if capture.limits.get("core file size", 0) == 0 and not capture.machine.get("core_piped"):
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
