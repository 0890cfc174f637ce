"""How much memory can be committed, used and locked, and who refuses more."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

from pyreserve._system import proc
from pyreserve._system.limits import strict_commit
from pyreserve.doctor.findings import Finding, soft_limit
from pyreserve.units import KiB, format_size

_CAP_IPC_LOCK = 14  # linux/capability.h


def rlimit_data() -> Iterator[Finding]:
    """See what RLIMIT_DATA leaves: private writable mappings count (getrlimit(2), Linux 4.7)."""
    limit, how = soft_limit(resource.RLIMIT_DATA, "-d")
    used = proc.status_kib()["VmData"] * KiB
    if limit is None:
        yield Finding(
            "RLIMIT_DATA",
            "good",
            "RLIMIT_DATA (ulimit -d) is unlimited.",
            "It refuses no commit.",
            values={"limit": limit, "used": used},
        )
        return
    yield Finding(
        "RLIMIT_DATA",
        "limited",
        f"RLIMIT_DATA (ulimit -d) is {format_size(limit)}, of which {format_size(used)} are in "
        "use.",
        f"Commits of up to {format_size(max(0, limit - used))} more, in either mode; what is only "
        "reserved does not count.",
        effect="Commits are bounded by memory and overcommit alone.",
        values={"limit": limit, "used": used},
        **how,
    )


def rlimit_memlock() -> Iterator[Finding]:
    """See how much may be locked (mlock(2)); CAP_IPC_LOCK lifts the limit."""
    limit, how = soft_limit(resource.RLIMIT_MEMLOCK, "-l")
    used = proc.status_kib()["VmLck"] * KiB
    exempt = proc.capable(_CAP_IPC_LOCK)
    values = {"limit": limit, "used": used, "cap_ipc_lock": exempt}
    if limit is None or exempt:
        says = "unlimited" if limit is None else format_size(limit)
        yield Finding(
            "RLIMIT_MEMLOCK",
            "good",
            f"RLIMIT_MEMLOCK (ulimit -l) is {says}"
            + ("." if limit is None else ", and CAP_IPC_LOCK overrides it."),
            "mlock and mlockall may lock any region.",
            values=values,
        )
        return
    yield Finding(
        "RLIMIT_MEMLOCK",
        "limited",
        f"RLIMIT_MEMLOCK (ulimit -l) is {format_size(limit)}, of which {format_size(used)} are "
        "locked.",
        f"Locking {format_size(max(0, limit - used))} more; after mlockall(MCL_FUTURE) reserving "
        "and committing stop there, too.",
        effect="Any region can be kept from being swapped out.",
        values=values,
        **how,
    )


def overcommit() -> Iterator[Finding]:
    """See how commits are accounted (Documentation/mm/overcommit-accounting.rst)."""
    mode, memory = proc.vm_setting("overcommit_memory"), proc.meminfo_kib()
    most = (memory["MemTotal"] + memory["SwapTotal"]) * KiB
    ratio, fixed = proc.vm_setting("overcommit_ratio"), proc.vm_setting("overcommit_kbytes")
    values = {
        "mode": mode,
        "committed_as": memory["Committed_AS"] * KiB,
        "commit_limit": memory["CommitLimit"] * KiB,
        "overcommit_ratio_percent": ratio,
        "overcommit_kbytes": fixed,
        "memory_and_swap": most,
    }
    if mode == 2:
        strict = strict_commit()
        values |= {"admin_reserve": strict.admin_reserve, "user_reserve": strict.user_reserve}
        by = f"vm.overcommit_kbytes={fixed}" if fixed else f"vm.overcommit_ratio={ratio}"
        yield Finding(
            "overcommit",
            "limited",
            f"vm.overcommit_memory is 2 (strict, {by}): {strict}.",
            f"Commits of at most {format_size(strict.left)} more, of all processes; "
            'mode="noreserve" is charged like "charge". Reserving is not charged, but '
            "1/32 of a process's addresses is withheld from its commits.",
            "sysctl -w vm.overcommit_memory=0",
            f"One commit may have {format_size(most)}, and noreserve is not charged. Or stay "
            "strict with a higher limit: sysctl -w vm.overcommit_ratio=100",
            "What was committed may then be more than there is, and the OOM killer decide.",
            values,
        )
        return
    yield Finding(
        "overcommit",
        "good",
        "vm.overcommit_memory is 1 (always)."
        if mode
        else f"vm.overcommit_memory is 0 (heuristic): memory and swap have {format_size(most)}.",
        'mode="charge" and "noreserve" are never refused; what does not fit ends in the OOM killer.'
        if mode
        else f'mode="charge" is refused beyond {format_size(most)} at once; "noreserve" never.',
        values=values,
    )


def cgroup_limit() -> Iterator[Finding]:
    """See which cgroup bounds the memory of this process, and which slows it down."""
    groups, total = 0, proc.meminfo_kib()["MemTotal"] * KiB
    hard: list[tuple[int, int, int, Path]] = []
    soft: list[tuple[int, int, int, Path]] = []
    for group in proc.memory_cgroups():
        for name, found in ((group.limit_file, hard), ("memory.high", soft)):
            try:
                limit = group.limit(name)
                used = group.used() if limit is not None else 0
            except FileNotFoundError:  # the root group, or one without the memory controller
                continue
            groups += 1
            if limit is not None and limit < total:
                found.append((limit - used, limit, used, group.folder / name))
    if hard:
        left, limit, used, file = min(hard)
        yield Finding(
            "cgroup limit",
            "limited",
            f"{file} is {format_size(limit)}, of which {format_size(used)} are in use.",
            f"Touching {format_size(max(0, left))} more. Reserving and committing are not refused; "
            "touching more makes the OOM killer end a process of the group.",
            f"echo {'max' if file.name == 'memory.max' else -1} > {file}",
            "The machine's memory is the limit, if no group above has another.",
            f"{_writable(file)}Other groups lose what this one then takes.",
            {"file": str(file), "limit": limit, "used": used},
        )
    if soft:
        left, limit, used, file = min(soft)
        yield Finding(
            "cgroup high",
            "limited",
            f"{file} is {format_size(limit)}, of which {format_size(used)} are in use.",
            f"Touching {format_size(max(0, left))} more at full speed; beyond it the kernel "
            "reclaims and slows the group down.",
            f"echo max > {file}",
            "Touching is not slowed down before the hard limit.",
            f"{_writable(file)}The group may then push others into reclaim.",
            {"file": str(file), "limit": limit, "used": used},
        )
    if not hard and not soft:
        # With nothing mounted there, a limit could not be seen.
        seen = groups > 0 or bool(os.listdir("/sys/fs/cgroup"))
        yield Finding(
            "cgroup limit",
            "good" if seen else "limited",
            "No memory cgroup that is visible here has a limit below the machine's memory."
            if seen
            else "No cgroup is visible: nothing is mounted at /sys/fs/cgroup.",
            "All of the machine's memory." if seen else "A limit may be there all the same.",
            None if seen else "mount -t cgroup2 none /sys/fs/cgroup",
            None if seen else "A limit shows here.",
            values={"file": None, "limit": None},
        )


def _writable(file: Path) -> str:
    return "" if os.access(file, os.W_OK) else "Only root, or the container's host, can write it. "


def swap() -> Iterator[Finding]:
    """See whether idle memory can leave RAM by itself."""
    memory = proc.meminfo_kib()
    total, free = memory["SwapTotal"] * KiB, memory["SwapFree"] * KiB
    values = {"total": total, "free": free}
    if total:
        yield Finding(
            "swap",
            "good",
            f"There are {format_size(total)} of swap, {format_size(free)} of them free.",
            "Idle memory can leave RAM before it is discarded.",
            values=values,
        )
        return
    yield Finding(
        "swap",
        "missing",
        "There is no swap.",
        "What was touched stays in RAM until it is discarded, decommitted or released; "
        "discard(lazy=True) lets the kernel take it all the same.",
        "fallocate -l 4G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile",
        "Idle memory can leave RAM, and the commit limit rises by as much.",
        "What was swapped out costs a disk's time to touch again.",
        values,
    )


CHECKS = (
    ("overcommit", overcommit),
    ("cgroup limit", cgroup_limit),
    ("RLIMIT_DATA", rlimit_data),
    ("RLIMIT_MEMLOCK", rlimit_memlock),
    ("swap", swap),
)
