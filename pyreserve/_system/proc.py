"""The reader of /proc and of the cgroups in /sys: mappings, sizes, settings (proc(5))."""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import NamedTuple

from pyreserve._system.maps import MapTable, perms_text
from pyreserve.units import KiB

_PROC = "/proc"


def _text(path: str) -> str:
    """Read a file of /proc under its name there; bytes that are not UTF-8 are surrogate-escaped."""
    with open(f"{_PROC}/{path}", "rb", buffering=0) as file:
        return file.readall().decode(errors="surrogateescape")


class MapsLine(NamedTuple):
    """One line of /proc/PID/maps: addresses [start, end), permissions, name (may be empty)."""

    start: int
    end: int
    perms: str
    name: str


def read_maps(pid: int | str = "self") -> list[MapsLine]:
    """Read all mappings of a process in address order."""
    with open(f"{_PROC}/{pid}/maps", "rb", buffering=0) as file:
        table = MapTable.read(file)
    return list(map(MapsLine, table.start, table.end, map(perms_text, table.perms), table.names))


def map_count() -> int:
    """Count this process's mappings as the kernel counts them against vm.max_map_count.

    The vsyscall page, in the kernel's half, is listed but not counted.
    """
    with open(f"{_PROC}/self/maps", "rb", buffering=0) as file:
        return MapTable.sums(file).mappings


def parse_kib(text: str) -> Iterator[tuple[str, int]]:
    """Yield (key, KiB) for each line such as ``VmRSS: 12 kB`` of status, meminfo, smaps_rollup."""
    # Not splitlines: a process's name may contain characters that it splits at.
    for line in text.split("\n"):
        key, _, rest = line.partition(":")
        value = rest.split()
        if len(value) == 2 and value[1] == "kB" and is_natural(value[0]):
            yield key, int(value[0])


def is_natural(text: str) -> bool:
    """Whether `text` is a decimal number of at most 20 digits, as the kernel prints 64 bits."""
    return text.isascii() and text.isdigit() and len(text) <= 20


def status_kib(pid: int | str = "self") -> dict[str, int]:
    """Read the sizes of /proc/PID/status, such as ``VmSize`` and ``VmRSS``, in KiB."""
    return dict(parse_kib(_text(f"{pid}/status")))


def rollup_kib(pid: int | str = "self") -> dict[str, int]:
    """Read /proc/PID/smaps_rollup, such as ``Pss``, in KiB."""
    return dict(parse_kib(_text(f"{pid}/smaps_rollup")))


def started(pid: int) -> int:
    """Read the start time of a process in clock ticks since boot: it tells reused PIDs apart.

    Raises:
        OSError: there is no such process.
    """
    # Field 22; field 2, the name, may contain anything.
    return int(_text(f"{pid}/stat").rpartition(")")[2].split()[19])


def meminfo_kib() -> dict[str, int]:
    """Read /proc/meminfo, such as ``Committed_AS`` and ``CommitLimit``, in KiB."""
    return dict(parse_kib(_text("meminfo")))


def vm_setting(name: str) -> int:
    """Read the integer /proc/sys/vm/NAME."""
    return int(_text(f"sys/vm/{name}"))


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
        text = self._read(name or self.limit_file).strip()
        # Version 1 has no word for "unlimited": it prints the maximum of its page counter.
        return None if text == "max" or int(text) >= 1 << 62 else int(text)

    def used(self) -> int:
        """Read the bytes in use, without the page cache."""
        used, stat = int(self._read(self.use_file)), self._read("memory.stat").splitlines()
        cache = sum(int(row.split()[1]) for row in stat if row.startswith(self.cache_line))
        return max(0, used - cache)  # read at two different times

    def _read(self, name: str) -> str:
        with open(f"{self.folder}/{name}", encoding="ascii") as file:
            return file.read()


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
    for line in filter(None, _text(f"{pid}/cgroup").split("\n")):
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
    return parse_status(_text(f"{pid}/status"))


def parse_status(text: str) -> dict[str, str]:
    """Return the fields of a text of /proc/PID/status, with values as printed."""
    # Not splitlines, as in `parse_kib`.
    return dict(line.split(":\t", 1) for line in text.split("\n") if ":\t" in line)


def processes() -> list[int]:
    """Return the numbers of all processes that /proc shows."""
    return [int(entry) for entry in os.listdir(_PROC) if is_natural(entry)]


def task_count() -> int:
    """Return the number of processes and threads of the machine (/proc/loadavg)."""
    return int(_text("loadavg").split()[3].split("/")[1])


def cpu_info() -> dict[str, str]:
    """Return the fields of the first processor of /proc/cpuinfo."""
    pairs = (line.partition(":") for line in _text("cpuinfo").split("\n\n")[0].split("\n"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def mount_options(path: str) -> list[str]:
    """Return the options of the last mount at `path`; empty if nothing is mounted there."""
    options: list[str] = []
    for line in _text("self/mounts").split("\n"):
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
    return _text(f"sys/kernel/{name}").strip()
