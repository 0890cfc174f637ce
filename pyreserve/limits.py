"""Which limit refused. Asked after a refusal, never before: the kernel decides, this explains."""

import errno
import resource
from typing import NamedTuple

from pyreserve import procfs, tasks
from pyreserve._native import lib
from pyreserve.errors import OutOfMemoryError, VMError
from pyreserve.units import KiB, format_size

_RAN_OUT = {errno.ENOMEM, errno.EAGAIN}
PAGE_SIZE: int = lib.vm_page_size()


class Limit(NamedTuple):
    """A limit by its name, and one sentence on how it stands."""

    name: str
    detail: str


def address_bits() -> int:
    """How many bits a user address has here: mappings lie below ``2**address_bits()``.

    Read off the highest mapping, the stack, which the kernel puts right below the end (47 on
    x86-64, also with 5-level page tables; Documentation/arch/x86/x86_64/mm.rst).
    """
    mappings = procfs.read_maps()
    return max(m.end - 1 for m in mappings if m.name != "[vsyscall]").bit_length()


def rlimit(which: int) -> int | None:
    """Read a soft resource limit in bytes; None means unlimited."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _address_space(nbytes: int, address: int | None) -> Limit | None:
    top = 1 << address_bits()
    largest = max((high - low for low, high in procfs.free_gaps(procfs.read_maps(), 0, top)))
    if nbytes > largest or (address is not None and address + nbytes > top):
        return Limit(
            "address space",
            f"a user address has {address_bits()} bits here ({format_size(top)}), and the largest "
            f"free piece is {format_size(largest)}",
        )
    return None


def _rlimit_as(nbytes: int) -> Limit | None:
    limit = rlimit(resource.RLIMIT_AS)
    used = procfs.status_kib().get("VmSize", 0) * KiB
    if limit is not None and used + nbytes > limit:
        return Limit(
            "RLIMIT_AS",
            f"RLIMIT_AS (ulimit -v) is {format_size(limit)}, of which {format_size(used)} are "
            "in use",
        )
    return None


def _rlimit_data(nbytes: int) -> Limit | None:
    limit = rlimit(resource.RLIMIT_DATA)
    used = procfs.status_kib().get("VmData", 0) * KiB
    if limit is not None and used + nbytes > limit:
        return Limit(
            "RLIMIT_DATA",
            f"RLIMIT_DATA (ulimit -d) is {format_size(limit)}, of which {format_size(used)} are "
            "in use",
        )
    return None


def _rlimit_memlock(nbytes: int) -> Limit | None:
    limit = rlimit(resource.RLIMIT_MEMLOCK)
    used = procfs.status_kib().get("VmLck", 0) * KiB
    if limit is not None and used + nbytes > limit:
        return Limit(
            "RLIMIT_MEMLOCK",
            f"all future memory is to be locked, and RLIMIT_MEMLOCK (ulimit -l) is "
            f"{format_size(limit)}, of which {format_size(used)} are in use",
        )
    return None


def _max_map_count() -> Limit | None:
    limit, used = procfs.vm_setting("max_map_count"), procfs.map_count()
    # A split in the middle of a mapping adds two.
    if used + 2 > limit:
        return Limit(
            "max_map_count",
            f"the process has {used:,} mappings and vm.max_map_count is {limit:,}",
        )
    return None


def _overcommit(nbytes: int) -> Limit | None:
    mode, memory = procfs.vm_setting("overcommit_memory"), procfs.meminfo_kib()
    if mode == 2:
        used, limit = memory["Committed_AS"] * KiB, memory["CommitLimit"] * KiB
        if used + nbytes > limit:
            return Limit(
                "overcommit",
                f"vm.overcommit_memory is 2, Committed_AS is {format_size(used)} and "
                f"CommitLimit is {format_size(limit)}",
            )
    elif mode == 0:
        most = (memory["MemTotal"] + memory["SwapTotal"]) * KiB
        if nbytes > most:
            return Limit(
                "overcommit",
                f"vm.overcommit_memory is 0, which refuses more at once than memory and swap "
                f"have ({format_size(most)})",
            )
    return None


def _find(verb: str, err: int, nbytes: int, address: int | None) -> Limit | None:
    if err == errno.EPERM and verb == "reserve":
        lowest = procfs.vm_setting("mmap_min_addr")
        return Limit("mmap_min_addr", f"vm.mmap_min_addr is {lowest:#x}")
    if err == errno.EAGAIN and verb == "fork":
        found = tasks.refusing_limit()
        return Limit(*found) if found else None
    if err == errno.EAGAIN:
        return _rlimit_memlock(nbytes) or _max_map_count()
    if err != errno.ENOMEM:
        return None
    takes_addresses, takes_memory = verb in {"reserve", "map"}, verb != "reserve"
    return (
        (takes_addresses and _rlimit_as(nbytes))
        or (takes_memory and _rlimit_data(nbytes))
        or _max_map_count()
        or (takes_memory and _overcommit(nbytes))
        or (takes_addresses and _address_space(nbytes, address))
        or None
    )


_REASONS = {
    errno.EEXIST: "something is mapped there already, and it is never replaced",
    errno.ENOSYS: "this kernel does not have it",
    errno.EINVAL: "this kernel does not do it, or the memory is locked (mlock)",
}


def refusal(
    verb: str, err: int, nbytes: int, address: int | None = None, why: str | None = None
) -> VMError:
    """Make the exception for a verb that the kernel refused with `err`.

    The verb ``"map"`` reserves and commits in one; ``"fork"`` makes a process.

    It names the verb, the bytes, the address, the errno and, where it can be known, the limit.
    """
    try:
        limit = _find(verb, err, nbytes, address)
    except (OSError, MemoryError):  # at the limit, even looking at /proc may be refused
        limit = None
    where = "" if address is None else f" at {address:#x}"
    reason = why or (limit.detail if limit else _REASONS.get(err, "the kernel did not say why"))
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
