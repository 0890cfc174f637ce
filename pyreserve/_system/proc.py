"""What Linux's /proc says: mappings, sizes and settings. Reading only (proc(5))."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_PROC = Path("/proc")


class Mapping(NamedTuple):
    """One line of /proc/PID/maps: addresses [start, end), permissions, name (may be empty)."""

    start: int
    end: int
    perms: str
    name: str


def parse_maps_line(line: str) -> Mapping:
    """Read one line of /proc/PID/maps."""
    fields = line.rstrip("\n").split(" ", 5)
    start, end = fields[0].split("-")
    name = fields[5].strip(" ") if len(fields) == 6 else ""
    return Mapping(int(start, 16), int(end, 16), fields[1], name)


def read_maps(pid: int | str = "self") -> list[Mapping]:
    """Read all mappings of a process in address order."""
    text = (_PROC / str(pid) / "maps").read_bytes().decode(errors="surrogateescape")
    return [parse_maps_line(line) for line in text.split("\n") if line]


def map_count() -> int:
    """Count this process's mappings as the kernel counts them against vm.max_map_count."""
    count = 0
    with (_PROC / "self/maps").open("rb", buffering=0) as maps:
        last = b""
        while chunk := maps.read(1 << 16):
            count += chunk.count(b"\n")
            last = chunk
    # The vsyscall page, in the kernel's half, is printed, but belongs to no process.
    start = last.rstrip(b"\n").rpartition(b"\n")[2].partition(b"-")[0]
    return count - (int(start or b"0", 16) >> 63)


def _kib_fields(path: Path) -> Iterator[tuple[str, int]]:
    return parse_kib(path.read_bytes().decode("ascii", errors="replace"))


def parse_kib(text: str) -> Iterator[tuple[str, int]]:
    """Yield the lines with a size, such as ``VmRSS: 12 kB``, of status, meminfo or smaps_rollup."""
    # Not splitlines: a process's name may hold what Python takes for the end of a line.
    for line in text.split("\n"):
        key, _, rest = line.partition(":")
        value = rest.split()
        if len(value) == 2 and value[1] == "kB" and is_natural(value[0]):
            yield key, int(value[0])


def is_natural(text: str) -> bool:
    """Tell whether a text is a number as the kernel prints it, of at most 64 bits or so."""
    return text.isascii() and text.isdigit() and len(text) <= 20


def status_kib(pid: int | str = "self") -> dict[str, int]:
    """Read the sizes of /proc/PID/status, such as ``VmSize`` and ``VmRSS``, in KiB."""
    return dict(_kib_fields(_PROC / str(pid) / "status"))


def rollup_kib(pid: int | str = "self") -> dict[str, int]:
    """Read /proc/PID/smaps_rollup, such as ``Pss``, in KiB."""
    return dict(_kib_fields(_PROC / str(pid) / "smaps_rollup"))


def started(pid: int) -> int:
    """Read when a process was started, in clock ticks since boot: tells users of a number apart.

    Raises:
        OSError: there is no such process.
    """
    stat = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the name before may hold anything


def meminfo_kib() -> dict[str, int]:
    """Read /proc/meminfo, such as ``Committed_AS`` and ``CommitLimit``, in KiB."""
    return dict(_kib_fields(_PROC / "meminfo"))


def vm_setting(name: str) -> int:
    """Read the integer /proc/sys/vm/NAME."""
    return int((_PROC / "sys/vm" / name).read_text(encoding="ascii"))


# The kernel's defaults (Documentation/admin-guide/sysctl/vm.rst; the reserves on 4 GiB or more).
_DEFAULTS = {
    "overcommit_memory": 0,
    "max_map_count": 65530,
    "mmap_min_addr": 65536,
    "admin_reserve_kbytes": 8192,
    "user_reserve_kbytes": 131072,
}
# What reading /proc raises: no file or descriptor, no memory, a field missing, no number.
UNREADABLE = (OSError, MemoryError, KeyError, ValueError)


def setting_or_default(name: str) -> int:
    """Read the integer /proc/sys/vm/NAME; where it can't be read, return the kernel's default."""
    try:
        return vm_setting(name)
    except UNREADABLE:
        return _DEFAULTS[name]


def free_gaps(mappings: list[Mapping], low: int, high: int) -> Iterator[tuple[int, int]]:
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
    """Estimate how much memory this process can still take: MemAvailable, or less by its cgroup.

    Falls back to free physical memory if /proc can't be read.
    """
    try:
        available = meminfo_kib()["MemAvailable"] * 1024
    except UNREADABLE:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(*UNREADABLE):
        for limit, used in cgroup_memory():
            available = min(available, max(0, limit - used))
    return available


class MemoryCgroup(NamedTuple):
    """A cgroup above this process: its folder, and how its files about memory are called.

    In version 2 and in version 1 (Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst).
    """

    place: Path
    limit_file: str
    use_file: str
    cache_line: str  # of memory.stat

    def limit(self, name: str = "") -> int | None:
        """Read a limit in bytes, of `name` if not the hard one; None means there is none.

        Raises:
            FileNotFoundError: the group has no such limit.
        """
        text = (self.place / (name or self.limit_file)).read_text(encoding="ascii").strip()
        # Version 1 has no word for it, and says the most that a counter of pages can hold.
        return None if text == "max" or int(text) >= 1 << 62 else int(text)

    def used(self) -> int:
        """Read how many bytes are in use, page cache left out."""
        used = int((self.place / self.use_file).read_text(encoding="ascii"))
        stat = (self.place / "memory.stat").read_text(encoding="ascii").splitlines()
        cache = sum(int(row.split()[1]) for row in stat if row.startswith(self.cache_line))
        return max(0, used - cache)  # the two are not of one moment


_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file "),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache ",
    ),
)


def cgroup_places(
    controller: str, roots: tuple[Path, Path], pid: int | str = "self"
) -> Iterator[tuple[Path, bool]]:
    """Yield (folder, is_version_1) of the cgroups above a process, innermost first.

    Only of those that may have `controller`. `roots`: mount points of versions 2 and 1. The root
    group and one without the controller have none of its files.
    """
    text = (_PROC / str(pid) / "cgroup").read_bytes().decode(errors="surrogateescape")
    for line in filter(None, text.split("\n")):
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = roots[bool(controllers)]
        group = root / name.lstrip("/")
        for place in (group, *group.parents):
            if not place.is_relative_to(root):
                break
            yield place, bool(controllers)


def memory_cgroups(pid: int | str = "self") -> Iterator[MemoryCgroup]:
    """Yield the places of the cgroups above a process, innermost first.

    The root group and one without the memory controller have none of the files.
    """
    (root, *files), (root_1, *files_1) = _CGROUPS
    for place, version_1 in cgroup_places("memory", (root, root_1), pid):
        yield MemoryCgroup(place, *(files_1 if version_1 else files))


def cgroup_memory(pid: int | str = "self") -> Iterator[tuple[int, int]]:
    """Yield limit and use in bytes, page cache left out, of each limited cgroup of a process."""
    for group in memory_cgroups(pid):
        try:
            limit = group.limit()
            if limit is not None:
                yield limit, group.used()
        except OSError:  # the root group, one without the memory controller, or one just removed
            continue


def status(pid: int | str = "self") -> dict[str, str]:
    """Read all of /proc/PID/status as it stands, such as ``CapEff`` and ``Seccomp``."""
    text = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    # Not splitlines, as in `parse_kib`.
    pairs = (line.partition(":") for line in text.split("\n") if line)
    return {key: value.strip() for key, _, value in pairs}


# Inodes of the namespaces that the kernel boots with (include/linux/proc_ns.h).
_FIRST_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC, "cgroup": 0xEFFFFFFB}


def own_namespaces() -> list[str]:
    """Name which of ``user``, ``pid`` and ``cgroup`` are not those that the machine booted with."""
    links = {kind: (_PROC / "self/ns" / kind) for kind in _FIRST_NAMESPACES}
    return [
        kind
        for kind, link in links.items()
        if link.is_symlink() and str(link.readlink()) != f"{kind}:[{_FIRST_NAMESPACES[kind]}]"
    ]


CAP_SYS_ADMIN, CAP_SYS_RESOURCE = 21, 24  # linux/capability.h


def capable(capability: int) -> bool:
    """Tell whether this process has a capability (its number in linux/capability.h) everywhere.

    Not only over a user namespace of its own (capabilities(7)).
    """
    effective = int(status()["CapEff"], 16)
    return bool(effective >> capability & 1) and "user" not in own_namespaces()


def kernel_setting(name: str) -> str:
    """Read /proc/sys/kernel/NAME."""
    return (_PROC / "sys/kernel" / name).read_text(encoding="utf-8").strip()
