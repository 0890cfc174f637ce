"""All that is known of a process's memory at one moment, read as consistently as it lets us."""

import os
import sys
from dataclasses import dataclass, field

from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import MapsError
from pyreserve.procmem.read.maps import FLAGS, READ, WRITE, MapTable
from pyreserve.procmem.read.sources import LiveSource, SavedSource, Source
from pyreserve.units import KiB

# From so many mappings on, the kernel's printing of smaps takes longer than counting pages.
_MANY = 10_000
_ATTEMPTS = 4
STACK_LEAST = 16 * KiB  # PTHREAD_STACK_MIN
_OF_MEMINFO = {"CommitLimit", "Committed_AS", "MemAvailable", "MemTotal"}


@dataclass(frozen=True, slots=True)
class Capture:
    """What was read of a process.

    Attributes:
        table: its mappings.
        rss: KiB in memory, the sum of the mappings'; None, as the next two, if no file has it.
        pss: KiB by the kernel's own sum, which rounds once; the mappings' lose up to 1 KiB each.
        swap: KiB in swap, the sum of the mappings'.
        settled: the kernel's totals are those of the mappings: all is of one moment.
        status: the sizes of /proc/PID/status in KiB, such as ``VmPTE``; may be empty.
        facts: other lines of it, such as ``Name``.
        limits: soft limits by their name in /proc/PID/limits; None is unlimited.
        machine: ``max_map_count``, ``overcommit_memory``, and of /proc/meminfo ``CommitLimit``,
            ``Committed_AS``, ``MemAvailable`` and ``MemTotal`` (KiB), as far as known;
            ``core_piped`` 1 if core dumps go to a program.
        cgroups: limit and use in bytes of each limited memory cgroup.
        live: the process runs on this machine.
        pid: its number, None if not known.
        missing: the unreadable files among smaps, smaps_rollup, status and limits.
        knows_memory: resident bytes are known for each mapping; else at most the totals are.
        guarded: starts of mappings whose lowest page is a guard inside (MADV_GUARD_INSTALL), of
            those that may be stacks; not known of saved files.
    """

    table: MapTable
    rss: int | None
    pss: int | None
    swap: int | None
    settled: bool
    status: dict[str, int]
    facts: dict[str, str]
    limits: dict[str, int | None] = field(default_factory=dict)
    machine: dict[str, int] = field(default_factory=dict)
    cgroups: tuple[tuple[int, int], ...] = ()
    live: bool = True
    pid: int | None = None
    missing: tuple[str, ...] = ()
    knows_memory: bool = True
    guarded: frozenset[int] = frozenset()


def capture(source: LiveSource | SavedSource) -> Capture:
    """Read it all.

    Raises:
        MapsError: a file makes no sense.
        OSError: see the source.
    """
    read, settled = _of_one_moment(source)
    table, rollup = read.table, read.rollup or {}
    status = dict(proc.parse_kib(read.status or ""))
    lines = (read.status or "").split("\n")
    facts = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    limits = source.text("limits")
    there = {
        "smaps": read.has_smaps,
        "smaps_rollup": read.rollup is not None,
        "status": read.status is not None,
        "limits": limits is not None,
    }
    rss, pss, swap = (
        (sum(table.rss), rollup.get("Pss", sum(table.pss)), sum(table.swap))
        if read.knows_memory
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
        limits=_limits(limits or ""),
        machine=_machine(source),
        cgroups=_cgroups(source.text("cgroup_memory") or ""),
        live=isinstance(source, LiveSource),
        pid=_pid(source, facts),
        missing=tuple(name for name, found in there.items() if not found),
        knows_memory=read.knows_memory,
        guarded=_guarded(source, table),
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """What was read at once; None where there is no such file."""

    table: MapTable
    status: str | None
    rollup: dict[str, int] | None
    has_smaps: bool
    knows_memory: bool

    def agree(self) -> bool:
        """Tell whether the kernel's totals, as far as they are known, are the mappings' sums."""
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


def _of_one_moment(source: LiveSource | SavedSource) -> tuple[_Read, bool]:
    """Read mappings and totals until they agree: a process that never rests is read as it comes."""
    if not isinstance(source, LiveSource):
        read = _all(source)
        return read, read.agree()
    for _ in range(_ATTEMPTS):
        read = source.again(lambda: _all(source))
        if read.agree():
            return read, True
    if read.status is not None and "\nVmSize:" not in read.status:  # it ended before all was read
        raise source.without_memory()
    return read, False


def _all(source: LiveSource | SavedSource) -> _Read:
    text = source.text("smaps_rollup")
    rollup = None if text is None else dict(proc.parse_kib(text))
    table, has_smaps, knows_memory = _table(source, rollup or {})
    return _Read(table, source.text("status"), rollup, has_smaps, knows_memory)


def _table(source: LiveSource | SavedSource, rollup: dict[str, int]) -> tuple[MapTable, bool, bool]:
    """Return the mappings, whether smaps can be read, and whether resident bytes are known."""
    maps = source.table("maps") if isinstance(source, LiveSource) else None
    if maps is not None and len(maps) >= _MANY and _counted(source, maps, rollup):
        return maps, True, True
    smaps = source.smaps()
    if smaps is not None:
        smaps.divide()
        return smaps, True, True
    maps = source.table("maps")
    if _counted(source, maps, rollup):
        return maps, False, True
    maps = source.table("maps")  # the counts of the other are wrong
    maps.divide()
    return maps, False, False


def _counted(source: LiveSource | SavedSource, table: MapTable, rollup: dict[str, int]) -> bool:
    """Count pages instead of reading smaps; False unless the sums are the kernel's own."""
    if not isinstance(source, LiveSource) or not rollup:
        return False
    if rollup.get("Shared_Hugetlb", 0) + rollup.get("Private_Hugetlb", 0):
        return False
    try:
        with source.open("pagemap") as pagemap:
            # Memory of no file is shared after a fork only: most often it need not be asked for.
            for forked in (False, True):
                table.count_pages(pagemap.fileno(), forked=forked)
                if sum(table.private) == _private_kib(rollup):
                    break
    # An older kernel, a 32-bit Python looking at a 64-bit process, a seccomp filter.
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


def _guarded(source: LiveSource | SavedSource, table: MapTable) -> frozenset[int]:
    """Look at the lowest page of what may be stacks (pagemap.rst, bit 58, Linux 6.15)."""
    marked = FLAGS["nh"] if table.knows_flags else 0
    names = {i for i, _ in table.named}
    starts = [
        table.start[i]
        for i, perms in enumerate(table.perms)
        if perms == READ | WRITE
        and table.flags[i] & marked == marked
        and table.end[i] - table.start[i] > STACK_LEAST
        and i not in names
    ]
    if not starts or not isinstance(source, LiveSource):
        return frozenset()
    try:
        with source.open("pagemap") as pagemap:
            entries = [os.pread(pagemap.fileno(), 8, start // PAGE_SIZE * 8) for start in starts]
    except OSError:  # a sandbox, or it has just ended
        return frozenset()
    pairs = zip(starts, entries, strict=True)
    return frozenset(at for at, entry in pairs if int.from_bytes(entry, sys.byteorder) >> 58 & 1)


def _limits(text: str) -> dict[str, int | None]:
    """Read the soft limits: columns of 25 and 20 characters (proc_pid_limits, fs/proc/base.c)."""
    found: dict[str, int | None] = {}
    for line in text.splitlines()[1:]:
        name, soft = line[:25].removeprefix("Max ").strip(), line[25:46].split()
        if not soft or not (soft[0] == "unlimited" or proc.is_natural(soft[0])):
            msg = f"limits: no limit in {line[:60]!r}"
            raise MapsError(msg)
        found[name] = None if soft[0] == "unlimited" else int(soft[0])
    return found


def _machine(source: Source) -> dict[str, int]:
    found = {}
    for name in ("max_map_count", "overcommit_memory"):
        text = source.text(name)
        if text is not None:
            if not proc.is_natural(text.strip()):
                msg = f"{name}: not a number"
                raise MapsError(msg)
            found[name] = int(text)
    for name, kib in proc.parse_kib(source.text("meminfo") or ""):
        if name in _OF_MEMINFO:
            found[name] = kib
    found["core_piped"] = (source.text("core_pattern") or "").startswith("|")
    return found


def _cgroups(text: str) -> tuple[tuple[int, int], ...]:
    pairs = [line.split() for line in text.splitlines()]
    if any(len(pair) != 2 or not all(map(proc.is_natural, pair)) for pair in pairs):
        msg = "cgroup_memory: lines of a limit and a use in bytes were expected"
        raise MapsError(msg)
    return tuple((int(limit), int(used)) for limit, used in pairs)


def _pid(source: LiveSource | SavedSource, facts: dict[str, str]) -> int | None:
    if isinstance(source, LiveSource):
        return source.pid
    pid = facts.get("Pid", "")
    return int(pid) if proc.is_natural(pid) else None
