"""The reader of /proc and of the cgroups in /sys: mappings, sizes, settings (proc(5))."""

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
    """Parse one line of /proc/PID/maps."""
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
    # The vsyscall page, in the kernel's half, is listed but not counted.
    start = last.rstrip(b"\n").rpartition(b"\n")[2].partition(b"-")[0]
    return count - (int(start or b"0", 16) >> 63)


def _kib_fields(path: Path) -> Iterator[tuple[str, int]]:
    return parse_kib(path.read_bytes().decode("ascii", errors="replace"))


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
    return dict(_kib_fields(_PROC / str(pid) / "status"))


def rollup_kib(pid: int | str = "self") -> dict[str, int]:
    """Read /proc/PID/smaps_rollup, such as ``Pss``, in KiB."""
    return dict(_kib_fields(_PROC / str(pid) / "smaps_rollup"))


def started(pid: int) -> int:
    """Read the start time of a process in clock ticks since boot: it tells reused PIDs apart.

    Raises:
        OSError: there is no such process.
    """
    stat = (_PROC / str(pid) / "stat").read_text(encoding="ascii", errors="replace")
    return int(stat.rpartition(")")[2].split()[19])  # field 22; the name may contain anything


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
# Raised by readers of /proc: no file, descriptor or memory, a missing field, not a number.
UNREADABLE = (OSError, MemoryError, KeyError, ValueError)


def setting_or_default(name: str) -> int:
    """Read the integer /proc/sys/vm/NAME; if it is unreadable, return the kernel's default."""
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
    """Estimate the bytes that this process can still use: MemAvailable, or less by its cgroups.

    If /proc is unreadable: free physical memory.
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
    """A memory cgroup: its folder, and the names of its files.

    The names differ between version 2 and version 1 (Documentation/admin-guide/cgroup-v2.rst,
    cgroup-v1/memory.rst).
    """

    folder: Path
    limit_file: str
    use_file: str
    cache_line: str  # of memory.stat

    def limit(self, name: str = "") -> int | None:
        """Read the hard limit, or the limit in the file `name`, in bytes; None if unlimited.

        Raises:
            FileNotFoundError: the cgroup has no such file.
        """
        text = (self.folder / (name or self.limit_file)).read_text(encoding="ascii").strip()
        # Version 1 has no word for "unlimited": it prints the maximum of its page counter.
        return None if text == "max" or int(text) >= 1 << 62 else int(text)

    def used(self) -> int:
        """Read the bytes in use, without the page cache."""
        used = int((self.folder / self.use_file).read_text(encoding="ascii"))
        stat = (self.folder / "memory.stat").read_text(encoding="ascii").splitlines()
        cache = sum(int(row.split()[1]) for row in stat if row.startswith(self.cache_line))
        return max(0, used - cache)  # read at two different times


_CGROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file "),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_cache ",
    ),
)


def cgroup_folders(
    controller: str, roots: tuple[Path, Path], pid: int | str = "self"
) -> Iterator[tuple[Path, bool]]:
    """Yield (folder, is_version_1) of the cgroups above a process, innermost first.

    Only hierarchies that may have `controller`. `roots`: mount points of versions 2 and 1. The root
    cgroup and one without the controller have none of its files.
    """
    text = (_PROC / str(pid) / "cgroup").read_bytes().decode(errors="surrogateescape")
    for line in filter(None, text.split("\n")):
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = roots[bool(controllers)]
        group = root / name.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            yield folder, bool(controllers)


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
    text = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
    # Not splitlines, as in `parse_kib`.
    pairs = (line.partition(":") for line in text.split("\n") if line)
    return {key: value.strip() for key, _, value in pairs}


# Inodes of the initial namespaces (include/linux/proc_ns.h).
_INITIAL_NAMESPACES = {"user": 0xEFFFFFFD, "pid": 0xEFFFFFFC, "cgroup": 0xEFFFFFFB}


def own_namespaces() -> list[str]:
    """Return which of the ``user``, ``pid`` and ``cgroup`` namespaces are not the initial ones."""
    links = {kind: (_PROC / "self/ns" / kind) for kind in _INITIAL_NAMESPACES}
    return [
        kind
        for kind, link in links.items()
        if link.is_symlink() and str(link.readlink()) != f"{kind}:[{_INITIAL_NAMESPACES[kind]}]"
    ]


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
    return (_PROC / "sys/kernel" / name).read_text(encoding="utf-8").strip()
