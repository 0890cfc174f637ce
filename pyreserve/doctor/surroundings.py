"""What surrounds the process: other processes, core dumps, containers, optional packages."""

import os
import re
import resource
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from pyreserve._system import proc
from pyreserve.doctor.findings import Finding, soft_limit
from pyreserve.units import format_size

_CAP_SYS_PTRACE = 19  # linux/capability.h
_PTRACE_SCOPES = (
    "to any process of its user",
    "to its descendants only",
    "with CAP_SYS_PTRACE only",
    "to nothing",
)


def other_processes() -> Iterator[Finding]:
    """See whose mappings can be read: ptrace(2), "Ptrace access mode checking"; tried on process 1.

    ``PTRACE_MODE_READ`` is enough for maps, smaps and pagemap.
    """
    uid, power = os.geteuid(), proc.capable(_CAP_SYS_PTRACE)
    refused = None
    try:
        proc.read_maps(1)
    except OSError as error:
        refused = error.strerror
    hidden = _hidepid()
    values = {"uid": uid, "cap_sys_ptrace": power, "process_1": refused, "hidepid": hidden}
    has = "CAP_SYS_PTRACE" if power else f"user {uid} without CAP_SYS_PTRACE"
    if power and refused is None:
        yield Finding(
            "other processes",
            "good",
            f"This process has {has}.",
            "Mappings of all processes that /proc shows can be read.",
            values=values,
        )
        return
    tried = f"process 1 refuses ({refused})" if refused else "process 1 lets itself be read"
    hides = f"; /proc is mounted with hidepid={hidden}" if hidden else ""
    if power:
        change = "ask who set up this sandbox: a security module refuses (Landlock, SELinux, ...)"
    else:
        change = f"sudo {shlex.quote(sys.executable)} -m pyreserve ..."
    yield Finding(
        "other processes",
        "limited",
        f"This is {'a process with ' if power else ''}{has}, and {tried}{hides}.",
        "Mappings of some processes can't be read."
        if power
        else f"Mappings of user {uid}'s own processes can be read, of those that changed "
        "their user or are marked undumpable not.",
        change,
        "Mappings of all processes can be read.",
        None if power else "What runs as root can do everything else, too.",
        values,
        command=not power,
    )


def _hidepid() -> str | None:
    """Return which option hides processes in /proc (proc(5)), if any."""
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").split("\n"):
        _, place, _, options = (*line.split(" "), "", "", "", "")[:4]
        found = re.search(r"\bhidepid=(\w+)", options) if place == "/proc" else None
        if found and found[1] not in {"0", "off"}:
            return found[1]
    return None


def ptrace_scope() -> Iterator[Finding]:
    """See what Yama restricts (Documentation/admin-guide/LSM/Yama.rst): attaching, not reading."""
    try:
        scope = int(proc.kernel_setting("yama/ptrace_scope"))
    except FileNotFoundError:
        yield Finding(
            "ptrace_scope",
            "good",
            "This kernel has no Yama.",
            "It restricts neither debuggers nor the reading of mappings.",
            values={"ptrace_scope": None},
        )
        return
    yield Finding(
        "ptrace_scope",
        "good",
        f"kernel.yama.ptrace_scope is {scope}: a debugger may attach "
        f"{_PTRACE_SCOPES[min(scope, 3)]}.",
        "It does not restrict the reading of /proc/PID/maps, smaps and pagemap.",
        values={"ptrace_scope": scope},
    )


def core_dumps() -> Iterator[Finding]:
    """See where core dumps go and what they hold (core(5), MADV_DONTDUMP of madvise(2))."""
    pattern = proc.kernel_setting("core_pattern")
    limit, how = soft_limit(resource.RLIMIT_CORE, "-c")
    values = {"core_pattern": pattern, "limit": limit}
    piped = pattern.startswith("|")  # a program's dump has no limit
    left_out = "Regions are left out of core dumps (MADV_DONTDUMP) but for reserve(dump=True)."
    if piped or limit is None:
        where = f"to the program {pattern[1:].split()[0]}" if piped else f"to {pattern}"
        yield Finding("core dumps", "good", f"They go {where}.", left_out, values=values)
        return
    yield Finding(
        "core dumps",
        "limited",
        f"RLIMIT_CORE (ulimit -c) is {format_size(limit)}, and they would go to {pattern}.",
        left_out
        if limit
        else "A crash leaves no core dump, so that reserve(dump=True) is in none.",
        effect="A crash leaves a core dump, without the regions but for reserve(dump=True).",
        values=values,
        **{"risk": "It holds what was in memory, secrets too.", **how},
    )


def container() -> Iterator[Finding]:
    """See whether the process is in namespaces of its own, or under a seccomp filter."""
    own, status = proc.own_namespaces(), proc.status()
    filtered = status.get("Seccomp") == "2"
    marks = [mark for mark in ("/.dockerenv", "/run/.containerenv") if Path(mark).exists()]
    named = os.environ.get("container")  # noqa: SIM112  # as systemd and podman spell it
    values = {
        "namespaces": own,
        "marks": marks,
        "container": named,
        "seccomp_filter": filtered,
        "no_new_privs": status.get("NoNewPrivs") == "1",
    }
    signs = [
        *([f"{', '.join(own)} namespace of its own"] if own else []),
        *(["a seccomp filter"] if filtered else []),
        *(f"there is {mark}" for mark in marks),
        *([f"container={named}"] if named else []),
    ]
    if not own and not filtered:
        yield Finding(
            "container",
            "good",
            f"It has the machine's own namespaces{f' ({signs[0]} all the same)' if signs else ''}.",
            "What is read here are the machine's settings, and the limits of all cgroups.",
            values=values,
        )
        return
    yield Finding(
        "container",
        "limited",
        f"It looks like a container or sandbox: {'; '.join(signs)}.",
        "Limits of cgroups outside are not seen, and system calls may be refused that the kernel "
        "has.",
        "change sysctls, /sys and cgroups on the host, as root",
        "They are the machine's, and hold in here as well.",
        values=values,
        command=False,
    )


_EXTRAS = {
    "cli": "The command pyreserve.",
    "numpy": "Region.ndarray and GrowableArray.",
    "plot": "--plot of pyreserve costs and explain.",
    "pyperf": "pyreserve costs --pyperf.",
    "prometheus": "Metrics for Prometheus.",
}
_FOR_DEVELOPERS = {"test", "bench", "dev"}


def extras() -> Iterator[Finding]:
    """See which optional packages are installed, as pyreserve's own metadata lists them."""
    try:
        lines = requires("pyreserve") or []
    except PackageNotFoundError:
        yield Finding(
            "extras",
            "limited",
            "pyreserve is not installed, and is used from its folder.",
            "Which extras it has is not known.",
            "pip install -e .",
            "Its extras show here.",
        )
        return
    wanted: dict[str, list[str]] = {}
    for line in lines:
        found = re.match(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"]", line)
        if found and found[2] not in _FOR_DEVELOPERS:
            wanted.setdefault(found[2], []).append(found[1])
    for extra, packages in wanted.items():
        yield _extra(extra, packages)


def _extra(extra: str, packages: list[str]) -> Finding:
    versions = {name: _installed(name) for name in packages}
    absent = [name for name, has in versions.items() if has is None]
    gives = _EXTRAS.get(extra, f"What needs {' and '.join(packages)}.")
    if absent:
        return Finding(
            f"extra {extra}",
            "missing",
            f"Not installed: {', '.join(absent)}.",
            f"Not to be had: {gives}",
            f"pip install 'pyreserve[{extra}]'",
            gives,
            values=versions,
        )
    has = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(f"extra {extra}", "good", f"Installed: {has}.", gives, values=versions)


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


CHECKS = (
    ("other processes", other_processes),
    ("ptrace_scope", ptrace_scope),
    ("core dumps", core_dumps),
    ("container", container),
    ("extras", extras),
)
