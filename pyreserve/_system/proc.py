"""The one reader of /proc and /sys: mappings, sizes, settings, cgroups (proc(5))."""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pyreserve._system.maps import MapTable, escape_invalid_utf8, perms_text
from pyreserve.units import KiB

_PROC = "/proc"


def open_file(name: str) -> io.FileIO:
    """Open a file of /proc unbuffered by its name there, such as ``self/maps``."""
    return open(f"{_PROC}/{name}", "rb", buffering=0)


def text(name: str) -> str:
    """Read a file of /proc by its name there; bytes that are not UTF-8 are surrogate-escaped."""
    with open_file(name) as file:
        return file.readall().decode(errors="surrogateescape")


def sys_text(path: str) -> str:
    """Read a file of /sys without the last newline; bytes that are not UTF-8 become U+FFFD."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read().removesuffix("\n")


def is_mounted() -> bool:
    """Return whether /proc is mounted."""
    return any(os.path.exists(f"{_PROC}/{name}") for name in ("self", "stat", "version"))


class MapsLine(NamedTuple):
    """One line of /proc/PID/maps: addresses [start, end), permissions, name (may be empty)."""

    start: int
    end: int
    perms: str
    name: str


def read_maps(pid: int | str = "self") -> list[MapsLine]:
    """Read all mappings of a process in address order."""
    with open_file(f"{pid}/maps") as file:
        table = MapTable.read(file)
    return list(map(MapsLine, table.start, table.end, map(perms_text, table.perms), table.names))


def smaps() -> MapTable:
    """Read this process's mappings with the figures of /proc/self/smaps."""
    with open_file("self/smaps") as file:
        return MapTable.read(file)


def map_count() -> int:
    """Count this process's mappings as the kernel counts them against vm.max_map_count.

    The vsyscall page, in the kernel's half, is listed but not counted.
    """
    with open_file("self/maps") as file:
        return MapTable.sums(file).mappings


def has_mappings(pid: int) -> bool:
    """Return whether a process has mappings: a kernel thread and a zombie have none."""
    with open_file(f"{pid}/maps") as file:
        return bool(file.read(1))


def parse_kib(lines: str) -> Iterator[tuple[str, int]]:
    """Yield (key, KiB) for each line such as ``VmRSS: 12 kB`` of status, meminfo, smaps_rollup."""
    # Not splitlines: a process's name may contain characters that it splits at.
    for line in lines.split("\n"):
        key, _, rest = line.partition(":")
        value = rest.split()
        if len(value) == 2 and value[1] == "kB" and is_natural(value[0]):
            yield key, int(value[0])


def is_natural(number: str) -> bool:
    """Whether a text is a decimal number of at most 20 digits, as the kernel prints 64 bits."""
    return number.isascii() and number.isdigit() and len(number) <= 20


def status_kib(pid: int | str = "self") -> dict[str, int]:
    """Read the sizes of /proc/PID/status, such as ``VmSize`` and ``VmRSS``, in KiB."""
    return dict(parse_kib(text(f"{pid}/status")))


def rollup_kib(pid: int | str = "self") -> dict[str, int]:
    """Read /proc/PID/smaps_rollup, such as ``Pss``, in KiB."""
    return dict(parse_kib(text(f"{pid}/smaps_rollup")))


def started(pid: int) -> int:
    """Read the start time of a process in clock ticks since boot: it tells reused PIDs apart.

    Raises:
        OSError: there is no such process.
    """
    # Field 22; field 2, the name, may contain anything.
    return int(text(f"{pid}/stat").rpartition(")")[2].split()[19])


def meminfo_kib() -> dict[str, int]:
    """Read /proc/meminfo, such as ``Committed_AS`` and ``CommitLimit``, in KiB."""
    return dict(parse_kib(text("meminfo")))


def buddy_pages() -> list[int]:
    """Return the pages in free blocks of each order (proc(5), /proc/buddyinfo), of all zones."""
    zones = [line.split()[4:] for line in text("buddyinfo").splitlines()]
    return [sum(map(int, counts)) << order for order, counts in enumerate(zip(*zones, strict=True))]


def vm_setting(name: str) -> int:
    """Read the integer /proc/sys/vm/NAME."""
    return int(text(f"sys/vm/{name}"))


# The kernel's defaults (Documentation/admin-guide/sysctl/vm.rst; the reserves on 4 GiB or more).
_DEFAULTS = {
    "overcommit_memory": 0,
    "max_map_count": 65530,
    "mmap_min_addr": 65536,
    "admin_reserve_kbytes": 8192,
    "user_reserve_kbytes": 131072,
}
# Raised by readers of /proc: no file, descriptor or memory, a missing field, not a number.
UNREADABLE = (OSError, MemoryError, KeyError, ValueError)


def setting_or_default(name: str) -> int:
    """Read the integer /proc/sys/vm/NAME; if it is unreadable, return the kernel's default."""
    try:
        return vm_setting(name)
    except UNREADABLE:
        return default_setting(name)


def default_setting(name: str) -> int:
    """Return the kernel's default of /proc/sys/vm/NAME."""
    return _DEFAULTS[name]


def free_gaps(mappings: Iterable[MapsLine], low: int, high: int) -> Iterator[tuple[int, int]]:
    """Yield the address ranges of [low, high) that no mapping covers, lowest first."""
    at = low
    for mapping in mappings:
        if mapping.start >= high:
            break
        if mapping.start > at:
            yield at, mapping.start
        at = max(at, mapping.end)
    if at < high:
        yield at, high


def available_bytes() -> int:
    """Estimate the bytes that this process can still use: MemAvailable, or less by its cgroups.

    If /proc is unreadable: free physical memory.
    """
    try:
        available = meminfo_kib()["MemAvailable"] * KiB
    except UNREADABLE:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(*UNREADABLE):
        for limit, used in cgroup_memory():
            available = min(available, max(0, limit - used))
    return available


def free_swap() -> int:
    """Return the bytes of free swap space; 0 if /proc is unreadable."""
    try:
        return meminfo_kib().get("SwapFree", 0) * KiB
    except UNREADABLE:
        return 0


class MemoryCgroup(NamedTuple):
    """A memory cgroup: its folder, and the names of its files.

    The names differ between version 2 and version 1 (Documentation/admin-guide/cgroup-v2.rst,
    cgroup-v1/memory.rst).
    """

    folder: str
    limit_file: str
    use_file: str
    cache_line: str  # of memory.stat

    def limit(self, name: str = "") -> int | None:
        """Read the hard limit, or the limit in the file `name`, in bytes; None if unlimited.

        Raises:
            FileNotFoundError: the cgroup has no such file.
        """
        limit = sys_text(f"{self.folder}/{name or self.limit_file}")
        # Version 1 has no word for "unlimited": it prints the maximum of its page counter.
        return None if limit == "max" or int(limit) >= 1 << 62 else int(limit)

    def used(self) -> int:
        """Read the bytes in use, without the page cache."""
        used = int(sys_text(f"{self.folder}/{self.use_file}"))
        rows = sys_text(f"{self.folder}/memory.stat").splitlines()
        cache = sum(int(row.split()[1]) for row in rows if row.startswith(self.cache_line))
        return max(0, used - cache)  # read at two different times


CGROUP_ROOT = "/sys/fs/cgroup"
_CGROUPS = (
    (CGROUP_ROOT, "memory.max", "memory.current", "file "),
    (
        f"{CGROUP_ROOT}/memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache ",
    ),
)


def cgroup_folders(
    controller: str, roots: tuple[str, str], pid: int | str = "self"
) -> Iterator[tuple[str, bool]]:
    """Yield (folder, is_version_1) of the cgroups above a process, innermost first.

    Only hierarchies that may have `controller`. `roots`: mount points of versions 2 and 1. The root
    cgroup and one without the controller have none of its files.
    """
    for line in filter(None, text(f"{pid}/cgroup").split("\n")):
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in name.split("/") if part]
        for depth in range(len(parts), -1, -1):
            yield "/".join((roots[bool(controllers)], *parts[:depth])), bool(controllers)


def memory_cgroups(pid: int | str = "self") -> Iterator[MemoryCgroup]:
    """Yield the memory cgroups above a process, innermost first.

    The root cgroup and one without the memory controller have none of the files.
    """
    (root, *files), (root_1, *files_1) = _CGROUPS
    for folder, version_1 in cgroup_folders("memory", (root, root_1), pid):
        yield MemoryCgroup(folder, *(files_1 if version_1 else files))


def cgroup_memory(pid: int | str = "self") -> Iterator[tuple[int, int]]:
    """Yield (limit, bytes in use without page cache) of each limited cgroup above a process."""
    for group in memory_cgroups(pid):
        try:
            limit = group.limit()
            if limit is not None:
                yield limit, group.used()
        except OSError:  # the root, no memory controller, or just removed
            continue


def status(pid: int | str = "self") -> dict[str, str]:
    """Read all fields of /proc/PID/status as text, such as ``CapEff`` and ``Seccomp``."""
    return parse_status(text(f"{pid}/status"))


def parse_status(lines: str) -> dict[str, str]:
    """Return the fields of a text of /proc/PID/status, with values as printed."""
    # Not splitlines, as in `parse_kib`.
    return dict(line.split(":\t", 1) for line in lines.split("\n") if ":\t" in line)


def processes() -> list[int]:
    """Return the numbers of all processes that /proc shows."""
    return [int(entry) for entry in os.listdir(_PROC) if is_natural(entry)]


def command_name(pid: int) -> str:
    r"""Read the command name of a process (``comm``); bytes that are not UTF-8 as ``\xNN``."""
    return escape_invalid_utf8(text(f"{pid}/comm").removesuffix("\n"))


def user_of(pid: int) -> int:
    """Return the user ID that owns the files of a process."""
    return os.stat(f"{_PROC}/{pid}").st_uid


def cpu_ticks() -> list[int]:
    """Read the first line of /proc/stat: ticks that all CPUs spent in each state since boot."""
    return [int(ticks) for ticks in text("stat").split("\n")[0].split()[1:]]


def vm_counter(name: str) -> int:
    """Read a counter of the whole machine since boot in /proc/vmstat, such as ``pgfault``.

    Raises:
        KeyError: the kernel has no such counter.
    """
    for line in text("vmstat").split("\n"):
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    raise KeyError(name)


def own_threads() -> list[int]:
    """Return the kernel's numbers of this process's threads."""
    return [int(entry) for entry in os.listdir(f"{_PROC}/self/task")]


def interrupts() -> dict[str, dict[int, int]]:
    """Read /proc/interrupts: interrupts since boot by name, such as ``TLB``, and by CPU.

    Only lines that count each CPU.

    Raises:
        OSError: the file cannot be read.
    """
    heading, *lines = text("interrupts").split("\n")
    cpus = [int(name.removeprefix("CPU")) for name in heading.split()]
    counts = {}
    for line in lines:
        name, _, rest = line.partition(":")
        numbers = rest.split()[: len(cpus)]
        if len(numbers) == len(cpus) and all(map(is_natural, numbers)):
            counts[name.strip()] = dict(zip(cpus, map(int, numbers), strict=True))
    return counts


def task_count() -> int:
    """Return the number of processes and threads of the machine (/proc/loadavg)."""
    return int(text("loadavg").split()[3].split("/")[1])


def cpu_info() -> dict[str, str]:
    """Return the fields of the first processor of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in text("cpuinfo").split("\n\n")[0].split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def mount_options(path: str) -> list[str]:
    """Return the options of the last mount at `path`; empty if nothing is mounted there."""
    options: list[str] = []
    for line in text("self/mounts").split("\n"):
        fields = line.split(" ")
        if fields[1:2] == [path]:
            options = fields[3].split(",")
    return options


# Inodes of the initial namespaces (include/linux/proc_ns.h).
_INITIAL_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC, "cgroup": 0xEFFFFFFB}


def own_namespaces() -> list[str]:
    """Return which of the ``user``, ``pid`` and ``cgroup`` namespaces are not the initial ones."""
    own = []
    for kind, inode in _INITIAL_NAMESPACES.items():
        with suppress(FileNotFoundError):  # a kernel without this kind
            if os.readlink(f"{_PROC}/self/ns/{kind}") != f"{kind}:[{inode}]":
                own.append(kind)
    return own


CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24  # linux/capability.h


def capable(capability: int) -> bool:
    """Whether this process has a capability (numbered as in linux/capability.h).

    A capability inside a user namespace other than the initial one does not count
    (capabilities(7)).
    """
    effective = int(status()["CapEff"], 16)
    return bool(effective >> capability & 1) and "user" not in own_namespaces()


def kernel_setting(name: str) -> str:
    """Read /proc/sys/kernel/NAME."""
    return text(f"sys/kernel/{name}").strip()
