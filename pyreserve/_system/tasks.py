"""The limits on processes and threads behind an EAGAIN of clone(2)."""

import contextlib
import os
import resource

from pyreserve._system import proc

_PIDS_ROOTS = proc.CGROUP_ROOT, f"{proc.CGROUP_ROOT}/pids"  # versions 2 and 1


def _rlimit_nproc() -> str | None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    user = os.getuid()
    if limit == resource.RLIM_INFINITY or user == 0 or _is_exempt():
        return None
    used = _tasks_of(user)
    if used < limit:
        return None
    return (
        f"RLIMIT_NPROC (ulimit -u) is {limit:,}, and user {user} has {used:,} processes and threads"
    )


def _is_exempt() -> bool:
    return proc.capable(proc.CAP_SYS_RESOURCE) or proc.capable(proc.CAP_SYS_ADMIN)


def _tasks_of(user: int) -> int:
    """Count the threads of all processes of a real user ID that /proc shows."""
    count = 0
    for pid in proc.processes():
        with contextlib.suppress(OSError, KeyError):  # the process has ended
            status = proc.status(pid)
            if int(status["Uid"].split()[0]) == user:
                count += int(status["Threads"])
    return count


def _threads_max() -> str | None:
    limit, used = int(proc.kernel_setting("threads-max")), proc.task_count()
    if used < limit:
        return None
    return f"kernel.threads-max is {limit:,}, and the machine has {used:,} processes and threads"


def _pid_max() -> str | None:
    limit, used = int(proc.kernel_setting("pid_max")), proc.task_count()
    # The lowest 300 IDs are not reused (RESERVED_PIDS, kernel/pid.c).
    if used < limit - 300:
        return None
    return f"kernel.pid_max is {limit:,}, and the machine has {used:,} process IDs in use"


def _pids_cgroup() -> str | None:
    for group, _ in proc.cgroup_folders("pids", _PIDS_ROOTS):
        try:
            limit, used = (proc.sys_text(f"{group}/pids.{name}") for name in ("max", "current"))
        except OSError:  # the root cgroup, or no pids controller
            continue
        if limit != "max" and int(used) >= int(limit):
            return (
                f"pids.max of the cgroup {group} is {int(limit):,}, and it has {int(used):,} "
                "processes and threads"
            )
    return None


CHECKS = (
    ("RLIMIT_NPROC", _rlimit_nproc),
    ("threads-max", _threads_max),
    ("pid_max", _pid_max),
    ("pids cgroup", _pids_cgroup),
)
"""Names of the limits, and functions that return the clause of an error if the limit is reached.

In the order in which the kernel checks them (``copy_process``, kernel/fork.c).
"""


def refusing_limit() -> tuple[str, str] | None:
    """Return name and clause of the limit that is reached; None if no visible one is."""
    for name, check in CHECKS:
        clause = check()
        if clause is not None:
            return name, clause
    return None
