"""Checks of the limits on committed, resident and locked memory, and of swap."""

import os
import resource
from collections.abc import Iterator

from pyreserve._system import proc
from pyreserve._system.limits import strict_commit
from pyreserve.doctor.findings import Finding, soft_limit
from pyreserve.units import KiB, format_size

_CAP_IPC_LOCK = 14  # linux/capability.h


def rlimit_data() -> Iterator[Finding]:
    """Check RLIMIT_DATA, which counts private writable mappings (getrlimit(2), Linux 4.7)."""
    limit, advice = soft_limit(resource.RLIMIT_DATA, "-d")
    used = proc.status_kib()["VmData"] * KiB
    if limit is None:
        yield Finding(
            "RLIMIT_DATA",
            "good",
            "No limit is set (ulimit -d).",
            "It refuses no commit.",
            values={"limit": limit, "used": used},
        )
        return
    yield Finding(
        "RLIMIT_DATA",
        "limited",
        f"The limit (ulimit -d) is {format_size(limit)}, of which {format_size(used)} is in use.",
        f"{format_size(max(0, limit - used))} more can be committed, in either mode; reserved "
        "memory does not count.",
        effect="Only memory and overcommit bound commits.",
        values={"limit": limit, "used": used},
        **advice,
    )


def rlimit_memlock() -> Iterator[Finding]:
    """Check RLIMIT_MEMLOCK, which bounds locked memory (mlock(2)) without CAP_IPC_LOCK."""
    limit, advice = soft_limit(resource.RLIMIT_MEMLOCK, "-l")
    used = proc.status_kib()["VmLck"] * KiB
    exempt = proc.capable(_CAP_IPC_LOCK)
    values = {"limit": limit, "used": used, "cap_ipc_lock": exempt}
    if limit is None or exempt:
        yield Finding(
            "RLIMIT_MEMLOCK",
            "good",
            "No limit is set (ulimit -l)."
            if limit is None
            else f"The limit (ulimit -l) is {format_size(limit)}, but CAP_IPC_LOCK overrides it.",
            "mlock and mlockall can lock any region.",
            values=values,
        )
        return
    yield Finding(
        "RLIMIT_MEMLOCK",
        "limited",
        f"The limit (ulimit -l) is {format_size(limit)}, of which {format_size(used)} is locked.",
        f"{format_size(max(0, limit - used))} more can be locked; after mlockall(MCL_FUTURE) the "
        "limit also bounds reserving and committing.",
        effect="Any region can be locked into RAM.",
        values=values,
        **advice,
    )


def overcommit() -> Iterator[Finding]:
    """Check how commits are accounted (Documentation/mm/overcommit-accounting.rst)."""
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
        setting = f"vm.overcommit_kbytes={fixed}" if fixed else f"vm.overcommit_ratio={ratio}"
        yield Finding(
            "overcommit",
            "limited",
            f"vm.overcommit_memory is 2 (strict, {setting}): {strict}.",
            f"All processes together can commit at most {format_size(strict.left)} more; "
            'mode="noreserve" is charged like "charge". Reserving is not charged, but lowers the '
            "process's limit by up to 1/32 of its address space.",
            "sysctl -w vm.overcommit_memory=0",
            f'One commit can have up to {format_size(most)}, and mode="noreserve" is not charged. '
            "Alternative that keeps strict accounting: sysctl -w vm.overcommit_ratio=100",
            "Committed memory can then exceed memory and swap, and the OOM killer ends processes.",
            values,
        )
        return
    yield Finding(
        "overcommit",
        "good",
        "vm.overcommit_memory is 1 (always)."
        if mode
        else f"vm.overcommit_memory is 0 (heuristic). Memory and swap total {format_size(most)}.",
        'Commits are never refused in mode "charge" or "noreserve"; the OOM killer ends processes '
        "when memory runs out."
        if mode
        else f'One commit in mode="charge" is refused above {format_size(most)}; '
        'mode="noreserve" is never refused.',
        values=values,
    )


def cgroup_limit() -> Iterator[Finding]:
    """Check which cgroup bounds the memory of this process, and which one throttles it."""
    groups, total = 0, proc.meminfo_kib()["MemTotal"] * KiB
    hard: list[tuple[int, int, int, str]] = []
    soft: list[tuple[int, int, int, str]] = []
    for group in proc.memory_cgroups():
        for name, limits in ((group.limit_file, hard), ("memory.high", soft)):
            try:
                limit = group.limit(name)
                used = group.used() if limit is not None else 0
            except FileNotFoundError:  # the root group, or one without the memory controller
                continue
            groups += 1
            if limit is not None and limit < total:
                limits.append((limit - used, limit, used, f"{group.folder}/{name}"))
    if hard:
        left, limit, used, file = min(hard)
        yield Finding(
            "cgroup limit",
            "limited",
            f"{file} is {format_size(limit)}, of which {format_size(used)} is in use.",
            f"{format_size(max(0, left))} more can be touched; beyond that the OOM killer ends a "
            "process of the group. Reserving and committing are not refused.",
            f"echo {'max' if file.endswith('memory.max') else -1} > {file}",
            "The machine's memory is the limit, unless a parent group has one.",
            f"{_writable(file)}Other groups have less memory left.",
            {"file": file, "limit": limit, "used": used},
        )
    if soft:
        left, limit, used, file = min(soft)
        yield Finding(
            "cgroup high",
            "limited",
            f"{file} is {format_size(limit)}, of which {format_size(used)} is in use.",
            f"{format_size(max(0, left))} more can be touched at full speed; beyond that the "
            "kernel reclaims memory of the group and throttles it.",
            f"echo max > {file}",
            "The group is not throttled below its hard limit.",
            f"{_writable(file)}The kernel may reclaim memory of other groups instead.",
            {"file": file, "limit": limit, "used": used},
        )
    if not hard and not soft:
        # Without a cgroup mount a limit can exist and stay invisible.
        seen = groups > 0 or bool(os.listdir("/sys/fs/cgroup"))
        yield Finding(
            "cgroup limit",
            "good" if seen else "limited",
            "No visible memory cgroup has a limit below the machine's memory."
            if seen
            else "No cgroup is visible: nothing is mounted at /sys/fs/cgroup.",
            "All of the machine's memory can be touched." if seen else "A limit may exist.",
            None if seen else "mount -t cgroup2 none /sys/fs/cgroup",
            None if seen else "The limit is checked.",
            values={"file": None, "limit": None},
        )


def _writable(file: str) -> str:
    return (
        ""
        if os.access(file, os.W_OK)
        else "Only root, or the host of the container, can write the file. "
    )


def swap() -> Iterator[Finding]:
    """Check whether the kernel can swap idle memory out."""
    memory = proc.meminfo_kib()
    total, free = memory["SwapTotal"] * KiB, memory["SwapFree"] * KiB
    values = {"total": total, "free": free}
    if total:
        yield Finding(
            "swap",
            "good",
            f"Swap has {format_size(total)}, of which {format_size(free)} is free.",
            "The kernel can swap idle memory out.",
            values=values,
        )
        return
    yield Finding(
        "swap",
        "missing",
        "There is no swap.",
        "Touched memory stays in RAM until it is discarded, decommitted or released. "
        "discard(lazy=True) lets the kernel reclaim it without swap.",
        "fallocate -l 4G /swapfile && chmod 600 /swapfile && mkswap /swapfile && swapon /swapfile",
        "The kernel can swap idle memory out, and the commit limit rises by 4 GiB.",
        "Touching memory that was swapped out waits for the disk.",
        values,
    )


CHECKS = (
    ("overcommit", overcommit),
    ("cgroup limit", cgroup_limit),
    ("RLIMIT_DATA", rlimit_data),
    ("RLIMIT_MEMLOCK", rlimit_memlock),
    ("swap", swap),
)
