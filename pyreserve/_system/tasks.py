"""The limit on processes and threads behind an EAGAIN of clone(2)."""

import contextlib
import os
import resource
from pathlib import Path

from pyreserve._system import proc

_PIDS_ROOTS = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/pids")  # versions 2 and 1


def refusing_limit() -> tuple[str, str] | None:
    """Return (name, sentence) of the limit that is reached, None if no visible one is.

    Limits are checked in the kernel's order (``copy_process``, kernel/fork.c).
    """
    return _rlimit_nproc() or _threads_max() or _pid_max() or _pids_cgroup()


def _rlimit_nproc() -> tuple[str, str] | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    user = os.getuid()
    if limit == resource.RLIM_INFINITY or user == 0 or _is_exempt():
        return None
    used = _tasks_of(user)
    if used < limit:
        return None
    return (
        "RLIMIT_NPROC",
        f"RLIMIT_NPROC (ulimit -u) is {limit:,}, and user {user} has {used:,} processes and "
        "threads",
    )


def _is_exempt() -> bool:
    return proc.capable(proc.CAP_SYS_RESOURCE) or proc.capable(proc.CAP_SYS_ADMIN)


def _tasks_of(user: int) -> int:
    """Count the threads of all processes of a real user ID that /proc shows."""
    count = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, KeyError):  # the process has ended
                status = proc.status(entry)
                if int(status["Uid"].split()[0]) == user:
                    count += int(status["Threads"])
    return count


def _all_tasks() -> int:
    return int(Path("/proc/loadavg").read_bytes().split()[3].split(b"/")[1])


def _threads_max() -> tuple[str, str] | None:
    limit, used = int(proc.kernel_setting("threads-max")), _all_tasks()
    if used < limit:
        return None
    return (
        "threads-max",
        f"kernel.threads-max is {limit:,}, and the machine has {used:,} processes and threads",
    )


def _pid_max() -> tuple[str, str] | None:
    limit, used = int(proc.kernel_setting("pid_max")), _all_tasks()
    # The lowest 300 IDs are not reused (RESERVED_PIDS, kernel/pid.c).
    if used < limit - 300:
        return None
    return (
        "pid_max",
        f"kernel.pid_max is {limit:,}, and the machine has {used:,} process IDs in use",
    )


def _pids_cgroup() -> tuple[str, str] | None:
    for group, _ in proc.cgroup_folders("pids", _PIDS_ROOTS):
        try:
            limit = (group / "pids.max").read_bytes().strip()
            used = int((group / "pids.current").read_bytes())
        except OSError:  # the root cgroup, or no pids controller
            continue
        if limit != b"max" and used >= int(limit):
            return (
                "pids cgroup",
                f"pids.max of the cgroup {group} is {int(limit):,}, and it has {used:,} processes "
                "and threads",
            )
    return None
