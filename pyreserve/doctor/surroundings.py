"""Checks of the environment: other processes, containers, optional packages."""

import os
import re
import shlex
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

from pyreserve._system import proc
from pyreserve.doctor.findings import Finding

_CAP_SYS_PTRACE = 19  # linux/capability.h
_PTRACE_SCOPES = (
    "a debugger may attach to any process of its user",
    "a debugger may attach to its descendants only",
    "a debugger needs CAP_SYS_PTRACE to attach",
    "no debugger may attach",
)


def other_processes() -> Iterator[Finding]:
    """Check which processes' mappings can be read, by trying process 1.

    Reading maps, smaps and pagemap takes ``PTRACE_MODE_READ`` (ptrace(2), "Ptrace access mode
    checking").
    """
    uid, capable = os.geteuid(), proc.capable(_CAP_SYS_PTRACE)
    refused = None
    try:
        proc.read_maps(1)
    except OSError as error:
        refused = error.strerror
    hidden = _hidepid()
    values = {"uid": uid, "cap_sys_ptrace": capable, "process_1": refused, "hidepid": hidden}
    process = "This process has CAP_SYS_PTRACE"
    if not capable:
        process = f"This process is of user {uid} and lacks CAP_SYS_PTRACE"
    if capable and refused is None:
        yield Finding(
            "other processes",
            "good",
            f"{process}.",
            "The mappings of all processes in /proc can be read.",
            values=values,
        )
        return
    trial = f"process 1 is not readable ({refused})" if refused else "process 1 is readable"
    hides = f"; /proc is mounted with hidepid={hidden}" if hidden else ""
    if capable:
        change = "change the sandbox: a security module refuses (Landlock, SELinux, ...)"
    else:
        change = f"sudo {shlex.quote(sys.executable)} -m pyreserve ..."
    yield Finding(
        "other processes",
        "limited",
        f"{process}; {trial}{hides}.",
        "The mappings of some processes can't be read."
        if capable
        else f"The mappings of user {uid}'s own processes can be read, except those that changed "
        "their user or are marked undumpable.",
        change,
        "The mappings of all processes can be read.",
        None if capable else "The command then runs with all rights of root.",
        values,
        command=not capable,
    )


def _hidepid() -> str | None:
    """Return the mount option ``hidepid`` of /proc (proc(5)); None if it hides nothing."""
    for option in proc.mount_options("/proc"):
        name, _, value = option.partition("=")
        if name == "hidepid" and value not in {"0", "off"}:
            return value
    return None


def ptrace_scope() -> Iterator[Finding]:
    """Check Yama (Documentation/admin-guide/LSM/Yama.rst): it restricts attaching, not reading."""
    try:
        scope = int(proc.kernel_setting("yama/ptrace_scope"))
    except FileNotFoundError:
        yield Finding(
            "ptrace_scope",
            "good",
            "This kernel does not use Yama.",
            "Debuggers and reading mappings are not restricted by it.",
            values={"ptrace_scope": None},
        )
        return
    yield Finding(
        "ptrace_scope",
        "good",
        f"kernel.yama.ptrace_scope is {scope}: {_PTRACE_SCOPES[min(scope, 3)]}.",
        "Reading /proc/PID/maps, smaps and pagemap is not restricted.",
        values={"ptrace_scope": scope},
    )


def container() -> Iterator[Finding]:
    """Check whether the process has its own namespaces or a seccomp filter."""
    own, status = proc.own_namespaces(), proc.status()
    filtered = status.get("Seccomp") == "2"
    marks = [mark for mark in ("/.dockerenv", "/run/.containerenv") if os.path.exists(mark)]
    runtime = os.environ.get("container")  # noqa: SIM112  # set by systemd and podman
    values = {
        "namespaces": own,
        "marks": marks,
        "container": runtime,
        "seccomp_filter": filtered,
        "no_new_privs": status.get("NoNewPrivs") == "1",
    }
    signs = [
        *([f"own namespaces: {', '.join(own)}"] if own else []),
        *(["a seccomp filter"] if filtered else []),
        *(f"the file {mark}" for mark in marks),
        *([f"container={runtime} in the environment"] if runtime else []),
    ]
    if not own and not filtered:
        yield Finding(
            "container",
            "good",
            "The process shares the machine's namespaces and has no seccomp filter"
            f"{f', despite {signs[0]}' if signs else ''}.",
            "The settings read here are the machine's, and the limits of all cgroups are visible.",
            values=values,
        )
        return
    yield Finding(
        "container",
        "limited",
        f"The process seems to be in a container or sandbox: {'; '.join(signs)}.",
        "Limits of outer cgroups are invisible, and system calls that the kernel supports may be "
        "refused.",
        "change sysctls, /sys and cgroups on the host, as root",
        "These settings belong to the machine and apply in the container too.",
        values=values,
        command=False,
    )


_EXTRAS = {
    "cli": "the pyreserve command",
    "numpy": "Region.ndarray and GrowableArray",
    "plot": "the option --plot of pyreserve costs and explain",
    "prometheus": "metrics for Prometheus",
}
_FOR_DEVELOPERS = {"test", "bench", "docs", "dev"}


def extras() -> Iterator[Finding]:
    """Check the optional packages that pyreserve's own metadata lists."""
    try:
        lines = requires("pyreserve") or []
    except PackageNotFoundError:
        yield Finding(
            "extras",
            "limited",
            "pyreserve is imported from its source folder and is not installed.",
            "Its extras are unknown.",
            "pip install -e .",
            "The extras are checked.",
        )
        return
    packages_of: dict[str, list[str]] = {}
    for line in lines:
        match = re.match(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match and match[2] not in _FOR_DEVELOPERS:
            packages_of.setdefault(match[2], []).append(match[1])
    for extra, packages in packages_of.items():
        yield _extra(extra, packages)


def _extra(extra: str, packages: list[str]) -> Finding:
    versions = {name: _installed(name) for name in packages}
    absent = [name for name, version in versions.items() if version is None]
    feature = _EXTRAS.get(extra, f"features that need {' and '.join(packages)}")
    if absent:
        return Finding(
            f"extra {extra}",
            "missing",
            f"Not installed: {', '.join(absent)}.",
            f"Unavailable: {feature}.",
            f"pip install 'pyreserve[{extra}]'",
            f"Available: {feature}.",
            values=versions,
        )
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding(
        f"extra {extra}",
        "good",
        f"Installed: {installed}.",
        f"Available: {feature}.",
        values=versions,
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


CHECKS = (
    ("other processes", other_processes),
    ("ptrace_scope", ptrace_scope),
    ("container", container),
    ("extras", extras),
)
