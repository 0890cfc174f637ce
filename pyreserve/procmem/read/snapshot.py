"""A consistent snapshot of a process's /proc files."""

import os
import sys
from typing import NamedTuple

from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.maps import FLAGS, READ, WRITE, MapTable
from pyreserve.errors import MapsError
from pyreserve.procmem.read.sources import LiveSource, SavedSource, Source
from pyreserve.units import KiB

# From this number of mappings on, counting pages is faster than reading smaps.
_MANY_MAPPINGS = 10_000
_ATTEMPTS = 4
MIN_STACK = 16 * KiB  # PTHREAD_STACK_MIN
_MEMINFO_KEYS = {"CommitLimit", "Committed_AS", "MemAvailable", "MemTotal"}


class Capture(NamedTuple):
    """The parsed files of a process. Sizes in KiB unless stated.

    Attributes:
        table: the mappings.
        rss: resident memory, summed over the mappings; `rss`, `pss` and `swap` are None if no file
            has them.
        pss: the kernel's own sum, rounded once; a sum over mappings loses up to 1 KiB for each.
        swap: swapped memory, summed over the mappings.
        settled: the kernel's totals match the mappings: the files show one moment.
        status: the sizes in /proc/PID/status, such as ``VmPTE``; may be empty.
        facts: other lines of /proc/PID/status, such as ``Name``.
        limits: soft limits by their name in /proc/PID/limits; None is unlimited.
        machine: ``max_map_count``, ``overcommit_memory``, ``core_piped`` (1 if core dumps are piped
            to a program), and ``CommitLimit``, ``Committed_AS``, ``MemAvailable`` and ``MemTotal``
            of /proc/meminfo; unknown ones are missing.
        cgroups: limit and use in bytes of each limited memory cgroup.
        live: the process runs on this machine.
        pid: the process number, None if not known.
        missing: the unreadable files among smaps, smaps_rollup, status and limits.
        knows_memory: resident bytes are known for each mapping; otherwise at most the totals are.
        guarded: starts of possible stacks whose lowest page is a guard page inside the mapping
            (MADV_GUARD_INSTALL); empty for saved files.
    """

    table: MapTable
    rss: int | None
    pss: int | None
    swap: int | None
    settled: bool
    status: dict[str, int]
    facts: dict[str, str]
    limits: dict[str, int | None]
    machine: dict[str, int]
    cgroups: tuple[tuple[int, int], ...]
    live: bool
    pid: int | None
    missing: tuple[str, ...]
    knows_memory: bool
    guarded: frozenset[int]


def capture(source: LiveSource | SavedSource) -> Capture:
    """Read and parse all files of a process.

    Raises:
        MapsError: a file is malformed.
        OSError: see `LiveSource` and `SavedSource`.
    """
    files, settled = _read_consistent(source)
    table, rollup = files.table, files.rollup or {}
    status = dict(proc.parse_kib(files.status or ""))
    facts = proc.parse_status(files.status or "")
    limits = _parse_limits(source.text("limits") or "")
    readable = {
        "smaps": files.has_smaps,
        "smaps_rollup": files.rollup is not None,
        "status": files.status is not None,
        "limits": bool(limits),
    }
    rss, pss, swap = (
        (sum(table.rss), rollup.get("Pss", sum(table.pss)), sum(table.swap))
        if files.knows_memory
        else (
            rollup.get("Rss", status.get("VmRSS")),
            rollup.get("Pss"),
            rollup.get("Swap", status.get("VmSwap")),
        )
    )
    return Capture(
        table=table,
        rss=rss,
        pss=pss,
        swap=swap,
        settled=settled,
        status=status,
        facts=facts,
        limits=limits,
        machine=_read_machine(source),
        cgroups=_parse_cgroups(source.text("cgroup_memory") or ""),
        live=isinstance(source, LiveSource),
        pid=_pid(source, facts),
        missing=tuple(name for name, is_readable in readable.items() if not is_readable),
        knows_memory=files.knows_memory,
        guarded=_guarded_starts(source, table),
    )


class _Files(NamedTuple):
    """Files read in one go; None for a file that can't be read."""

    table: MapTable
    status: str | None
    rollup: dict[str, int] | None
    has_smaps: bool
    knows_memory: bool

    def match_totals(self) -> bool:
        """Return whether the known totals of the kernel equal the sums over the mappings."""
        table, rollup = self.table, self.rollup
        size = sum(table.size)
        sizes = dict(proc.parse_kib(self.status or ""))
        return sizes.get("VmSize", size) == size and (
            not rollup
            or not self.knows_memory
            or (
                rollup.get("Rss", sum(table.rss)) == sum(table.rss)
                and _private_kib(rollup) == sum(table.private)
            )
        )


def _read_consistent(source: LiveSource | SavedSource) -> tuple[_Files, bool]:
    """Read mappings and totals until they match; after `_ATTEMPTS` accept a mismatch."""
    if not isinstance(source, LiveSource):
        files = _read_files(source)
        return files, files.match_totals()
    for _ in range(_ATTEMPTS):
        files = source.retry_after_exec(lambda: _read_files(source))
        if files.match_totals():
            return files, True
    # Without VmSize the process ended before all files were read.
    if files.status is not None and "VmSize" not in proc.parse_status(files.status):
        raise source.no_address_space_error()
    return files, False


def _read_files(source: LiveSource | SavedSource) -> _Files:
    text = source.text("smaps_rollup")
    rollup = None if text is None else dict(proc.parse_kib(text))
    table, has_smaps, knows_memory = _read_table(source, rollup or {})
    return _Files(table, source.text("status"), rollup, has_smaps, knows_memory)


def _read_table(
    source: LiveSource | SavedSource, rollup: dict[str, int]
) -> tuple[MapTable, bool, bool]:
    """Return the mappings, whether smaps is readable, and whether resident bytes are known."""
    maps = source.table("maps") if isinstance(source, LiveSource) else None
    if maps is not None and len(maps) >= _MANY_MAPPINGS and _count_pages(source, maps, rollup):
        return maps, True, True
    smaps = source.smaps()
    if smaps is not None:
        smaps.divide()
        return smaps, True, True
    maps = source.table("maps")
    if _count_pages(source, maps, rollup):
        return maps, False, True
    maps = source.table("maps")  # the table with wrong counts is discarded
    maps.divide()
    return maps, False, False


def _count_pages(source: LiveSource | SavedSource, table: MapTable, rollup: dict[str, int]) -> bool:
    """Count pages instead of reading smaps; False unless the sums match the kernel's totals."""
    if not isinstance(source, LiveSource) or not rollup:
        return False
    if rollup.get("Shared_Hugetlb", 0) + rollup.get("Private_Hugetlb", 0):
        return False
    try:
        with source.open("pagemap") as pagemap:
            # Anonymous memory is shared only after a fork: try the cheaper count first.
            for forked in (False, True):
                table.count_pages(pagemap.fileno(), forked=forked)
                if sum(table.private) == _private_kib(rollup):
                    break
    # Older kernel, 64-bit process read by a 32-bit Python, or seccomp filter.
    except (MapsError, OSError):
        return False
    return (
        sum(table.rss) == rollup.get("Rss")
        and sum(table.swap) == rollup.get("Swap")
        and sum(table.private) == _private_kib(rollup)
    )


def _private_kib(rollup: dict[str, int]) -> int:
    parts = ("Private_Clean", "Private_Dirty", "Private_Hugetlb")
    return sum(rollup.get(part, 0) for part in parts)


def _guarded_starts(source: LiveSource | SavedSource, table: MapTable) -> frozenset[int]:
    """Return the starts of possible stacks whose lowest page is a guard.

    Bit 58 of the page's entry in /proc/PID/pagemap (pagemap.rst, Linux 6.15).
    """
    marked = FLAGS["nh"] if table.knows_flags else 0
    names = {i for i, _ in table.named}
    starts = [
        table.start[i]
        for i, perms in enumerate(table.perms)
        if perms == READ | WRITE
        and table.flags[i] & marked == marked
        and table.end[i] - table.start[i] > MIN_STACK
        and i not in names
    ]
    if not starts or not isinstance(source, LiveSource):
        return frozenset()
    try:
        with source.open("pagemap") as pagemap:
            entries = [os.pread(pagemap.fileno(), 8, start // PAGE_SIZE * 8) for start in starts]
    except OSError:  # sandbox, or the process has ended
        return frozenset()
    pairs = zip(starts, entries, strict=True)
    return frozenset(at for at, entry in pairs if int.from_bytes(entry, sys.byteorder) >> 58 & 1)


def _parse_limits(text: str) -> dict[str, int | None]:
    """Read the soft limits: columns of 25 and 20 characters (proc_pid_limits, fs/proc/base.c)."""
    limits: dict[str, int | None] = {}
    for line in text.splitlines()[1:]:
        name, soft = line[:25].removeprefix("Max ").strip(), line[25:46].split()
        if not soft or not (soft[0] == "unlimited" or proc.is_natural(soft[0])):
            msg = f"limits: no soft limit in {line[:60]!r}"
            raise MapsError(msg)
        limits[name] = None if soft[0] == "unlimited" else int(soft[0])
    return limits


def _read_machine(source: Source) -> dict[str, int]:
    facts = {}
    for name in ("max_map_count", "overcommit_memory"):
        text = source.text(name)
        if text is not None:
            number = text.strip()  # of more characters than int() strips
            if not proc.is_natural(number):
                msg = f"{name}: not a number"
                raise MapsError(msg)
            facts[name] = int(number)
    for name, kib in proc.parse_kib(source.text("meminfo") or ""):
        if name in _MEMINFO_KEYS:
            facts[name] = kib
    facts["core_piped"] = (source.text("core_pattern") or "").startswith("|")
    return facts


def _parse_cgroups(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [line.split() for line in text.splitlines()]
    if any(len(pair) != 2 or not all(map(proc.is_natural, pair)) for pair in pairs):
        msg = "cgroup_memory: each line must be a limit and a use in bytes"
        raise MapsError(msg)
    return tuple((int(limit), int(used)) for limit, used in pairs)


def _pid(source: LiveSource | SavedSource, facts: dict[str, str]) -> int | None:
    if isinstance(source, LiveSource):
        return source.pid
    pid = facts.get("Pid", "")
    return int(pid) if proc.is_natural(pid) else None
