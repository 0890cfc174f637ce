"""Limits, and the exceptions that name them. Read after a refusal, never to predict one."""

import errno
import resource
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from pyreserve._native import lib
from pyreserve._system import proc, tasks
from pyreserve.errors import OutOfMemoryError, VMError
from pyreserve.units import KiB, format_size

_RAN_OUT = {errno.ENOMEM, errno.EAGAIN}
PAGE_SIZE: int = lib.vm_page_size()


class Limit(NamedTuple):
    """Name of a limit, and a clause with its value and its use."""

    name: str
    detail: str


def address_bits() -> int:
    """Return the number of bits of a user address: mappings are below ``2**address_bits()``.

    Derived from the initial stack, which the kernel places at the top of the user addresses (47
    bits on x86-64, also with 5-level page tables; Documentation/arch/x86/x86_64/mm.rst).
    """
    return int(lib.vm_address_bits())


def rlimit(which: int) -> int | None:
    """Return a soft resource limit in bytes; None if unlimited."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _address_space(nbytes: int, address: int | None) -> Limit | None:
    bits = address_bits()
    top = 1 << bits
    detail = f"user addresses have {bits} bits ({format_size(top)})"
    beyond = nbytes >= top or (address is not None and address + nbytes > top)
    try:
        gaps = proc.free_gaps(proc.read_maps(), 0, top)
        largest = max(high - low for low, high in gaps)
    except proc.UNREADABLE:
        if not beyond:
            raise
        return Limit("address space", detail)
    if beyond or nbytes > largest:
        detail += f", and the largest free range is {format_size(largest)}"
        return Limit("address space", detail)
    return None


# (name, text before it, ulimit option, field of /proc/self/status that counts against it)
_RLIMITS = {
    resource.RLIMIT_AS: ("RLIMIT_AS", "", "-v", "VmSize"),
    resource.RLIMIT_DATA: ("RLIMIT_DATA", "", "-d", "VmData"),
    resource.RLIMIT_MEMLOCK: (
        "RLIMIT_MEMLOCK",
        "all future memory is locked (MCL_FUTURE), and ",
        "-l",
        "VmLck",
    ),
}


def _rlimit(which: int, nbytes: int) -> Limit | None:
    limit = rlimit(which)
    if limit is None:
        return None
    name, before, option, field = _RLIMITS[which]
    detail = f"{before}{name} (ulimit {option}) is {format_size(limit)}"
    if nbytes > limit:  # refused whatever is in use, which may be unreadable
        with suppress(*proc.UNREADABLE):
            detail += _in_use(proc.status_kib()[field] * KiB)
        return Limit(name, detail)
    used = proc.status_kib().get(field, 0) * KiB
    return Limit(name, detail + _in_use(used)) if used + nbytes > limit else None


def _in_use(nbytes: int) -> str:
    return f", of which {format_size(nbytes)} are in use"


def _max_map_count() -> Limit | None:
    limit, used = proc.vm_setting("max_map_count"), proc.map_count()
    # Splitting a mapping in its middle adds two.
    if used + 2 > limit:
        return Limit(
            "max_map_count",
            f"the process has {used:,} mappings and vm.max_map_count is {limit:,}",
        )
    return None


class StrictCommit(NamedTuple):
    """Commit accounting under vm.overcommit_memory=2, in bytes (Linux mm/util.c).

    Attributes:
        used: Committed_AS, the charge of all processes.
        limit: CommitLimit.
        admin_reserve: unavailable to processes without CAP_SYS_ADMIN (vm.admin_reserve_kbytes).
        user_reserve: unavailable to this process: 1/32 of its VSZ, at most
            vm.user_reserve_kbytes.
        inexact: the largest difference between Committed_AS and the kernel's per-CPU count.
    """

    used: int
    limit: int
    admin_reserve: int
    user_reserve: int
    inexact: int

    @property
    def left(self) -> int:
        """Bytes that this process may still commit."""
        return max(0, self.limit - self.admin_reserve - self.user_reserve - self.used)

    def __str__(self) -> str:
        reserves = (
            (self.admin_reserve, "for root (vm.admin_reserve_kbytes)"),
            (
                self.user_reserve,
                "for user_reserve (1/32 of this process's VSZ, at most vm.user_reserve_kbytes)",
            ),
        )
        kept = " and ".join(f"{format_size(size)} {purpose}" for size, purpose in reserves if size)
        return (
            f"Committed_AS is {format_size(self.used)} of a CommitLimit of "
            f"{format_size(self.limit)}"
            + (f", of which the kernel keeps back {kept}" if kept else "")
        )


def strict_commit() -> StrictCommit:
    """Read the commit accounting of vm.overcommit_memory=2.

    Raises:
        OSError, KeyError: /proc is unreadable.
    """
    memory = proc.meminfo_kib()
    user = proc.setting_or_default("user_reserve_kbytes")
    admin = proc.setting_or_default("admin_reserve_kbytes")
    return StrictCommit(
        used=memory["Committed_AS"] * KiB,
        limit=memory["CommitLimit"] * KiB,
        admin_reserve=0 if proc.capable(proc.CAP_SYS_ADMIN) else admin * KiB,
        user_reserve=min(proc.status_kib()["VmSize"] // 32, user) * KiB,
        inexact=memory["MemTotal"] * KiB // 256,  # mm_compute_batch of mm/mm_init.c
    )


def _overcommit(nbytes: int) -> Limit | None:
    mode = proc.vm_setting("overcommit_memory")
    if mode == 2:
        strict = strict_commit()
        if nbytes >= strict.left - strict.inexact:
            return Limit("overcommit", f"vm.overcommit_memory is 2, and {strict}")
    elif mode == 0:
        memory = proc.meminfo_kib()
        most = (memory["MemTotal"] + memory["SwapTotal"]) * KiB
        if nbytes > most:
            return Limit(
                "overcommit",
                f"vm.overcommit_memory is 0, which refuses a single request above the size of "
                f"memory and swap ({format_size(most)})",
            )
    return None


def _mmap_min_addr() -> Limit:
    with suppress(*proc.UNREADABLE):
        return Limit("mmap_min_addr", f"vm.mmap_min_addr is {proc.vm_setting('mmap_min_addr'):#x}")
    return Limit("mmap_min_addr", "the address is below vm.mmap_min_addr")


def _tasks() -> Limit | None:
    limit = tasks.refusing_limit()
    return Limit(*limit) if limit else None


def _checks(
    verb: str, err: int, nbytes: int, address: int | None
) -> list[Callable[[], Limit | None]]:
    """Return the checks that may explain the refusal, in order."""
    if err == errno.EPERM and verb == "reserve":
        return [_mmap_min_addr]
    if err == errno.EAGAIN and verb == "fork":
        return [_tasks]
    if err == errno.EAGAIN:
        return [partial(_rlimit, resource.RLIMIT_MEMLOCK, nbytes), _max_map_count]
    if err != errno.ENOMEM:
        return []
    takes_addresses, takes_memory = verb in {"reserve", "map"}, verb != "reserve"
    return [
        check
        for applies, check in (
            (takes_addresses, partial(_rlimit, resource.RLIMIT_AS, nbytes)),
            (takes_memory, partial(_rlimit, resource.RLIMIT_DATA, nbytes)),
            (True, _max_map_count),
            (takes_memory, partial(_overcommit, nbytes)),
            (takes_addresses, partial(_address_space, nbytes, address)),
        )
        if applies
    ]


def _find(verb: str, err: int, nbytes: int, address: int | None) -> tuple[Limit | None, str]:
    """Return the limit that refused, or None and a clause that says if /proc was unreadable."""
    unread = ""
    for check in _checks(verb, err, nbytes, address):
        try:
            limit = check()
        except proc.UNREADABLE as error:  # at a limit, even reading /proc may fail
            cause = getattr(error, "strerror", None) or repr(error)
            unread = f", and /proc is unreadable ({cause})"
            continue
        if limit is not None:
            return limit, ""
    return None, unread


_REASONS = {
    errno.EEXIST: "the range is already mapped, and a mapping is never replaced",
    errno.ENOSYS: "this kernel does not support it",
    errno.EINVAL: "this kernel does not support it, or the memory is locked (mlock)",
}


def refusal(
    verb: str, err: int, nbytes: int, address: int | None = None, why: str | None = None
) -> VMError:
    """Return the exception for a verb that the kernel refused with errno `err`.

    It names the verb, the bytes, the address, the errno and, if known, the limit. The verb
    ``"map"`` reserves and commits in one call; ``"fork"`` creates a process. `why` replaces the
    reason.
    """
    limit, unread = _find(verb, err, nbytes, address)
    where = "" if address is None else f" at {address:#x}"
    reason = why or (
        limit.detail if limit else _REASONS.get(err, f"no known limit explains it{unread}")
    )
    cls = OutOfMemoryError if err in _RAN_OUT else VMError
    return cls(
        err,
        f"{verb} of {format_size(nbytes)}{where} refused ({errno.errorcode.get(err, err)}): "
        f"{reason}",
        verb=verb,
        nbytes=nbytes,
        address=address,
        limit=limit.name if limit else None,
    )
