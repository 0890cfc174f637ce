"""The limits on processes and threads behind an EAGAIN of clone(2)."""

import contextlib
import errno
import os
import resource
from collections.abc import Callable

from pyreserve._system import proc
from pyreserve._system.limitbase import Limit

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


class _TaskLimit(Limit):
    """A limit on processes and threads.

    Args:
        name: the name of the limit.
        check: returns the clause of an error if the limit is reached.
    """

    def __init__(self, name: str, check: Callable[[], str | None]) -> None:
        self.name = name
        self._check = check

    def refuses(self, verb: str, err: int) -> bool:
        return (verb, err) == ("fork", errno.EAGAIN)

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        return self._check()


LIMITS = (
    _TaskLimit("RLIMIT_NPROC", _rlimit_nproc),
    _TaskLimit("threads-max", _threads_max),
    _TaskLimit("pid_max", _pid_max),
    _TaskLimit("pids cgroup", _pids_cgroup),
)
"""In the order in which the kernel checks them (``copy_process``, kernel/fork.c)."""
