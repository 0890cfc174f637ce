"""The limits of a process in one table: refusals, doctor and the warnings of explain read it.

A limit is read after a refusal, never to predict one.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from pyreserve._native import lib
from pyreserve._system import proc, rlimits, tasks
from pyreserve._system.limitbase import OWN, Assessment, Limit, Process, Use
from pyreserve._system.rlimits import ALLOCATE, RLIMIT_AS
from pyreserve.errors import OutOfMemoryError, VMError
from pyreserve.units import KiB, format_size

PAGE_SIZE: int = lib.vm_page_size()
# The verbs that allocate the pages of a shared region.
_ALLOCATING = {"commit", "populate", "discard", "seal"}
_RAN_OUT = {errno.ENOMEM, errno.EAGAIN, errno.ENOSPC}


def address_bits() -> int:
    """Return the number of bits of a user address: mappings are below ``2**address_bits()``.

    Derived from the initial stack, which the kernel places at the top of the user addresses (47
    bits on x86-64, also with 5-level page tables; Documentation/arch/x86/x86_64/mm.rst).
    """
    return int(lib.vm_address_bits())


# -- map entries, memory and addresses --------------------------------------------------------


class _MapCount(Limit):
    """The number of map entries (Documentation/admin-guide/sysctl/vm.rst)."""

    name = "max_map_count"
    _setting = "vm.max_map_count"
    _change = f"sysctl -w {_setting}"
    _most, _suggested = 2**31 - 1, 262144
    # A committed range inside a reserved mapping splits it: two more entries.
    _entries_per_range = 2

    def use(self, process: Process) -> Use:
        """Read the limit and the number of mappings."""
        return Use(process.setting(self.name), process.map_count())

    def uses(self, process: Process) -> Iterator[Use]:
        yield self.use(process)

    def refuses(self, verb: str, err: int) -> bool:
        return err == errno.ENOMEM or (err == errno.EAGAIN and verb != "fork")

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        limit, used = self.use(OWN)
        assert limit is not None
        if used + self._entries_per_range <= limit:
            return None
        return f"the process has {self._count(used, limit)}"

    def _count(self, used: int, limit: int) -> str:
        return f"{used:,} mappings and {self._setting} is {limit:,}"

    def assess(self) -> Iterator[Assessment]:
        use = self.use(OWN)
        limit, used, left = use.limit or 0, use.used, use.left() or 0
        pieces = left // self._entries_per_range
        ranges = "About {:,} more separate ranges can be committed{}."
        assessment = Assessment(
            self.name,
            "limited" if limit < proc.default_setting(self.name) or left < limit // 2 else "good",
            f"The limit is {limit:,} mappings, of which this process has {used:,}.",
            ranges.format(pieces, "; adjacent ranges merge"),
            {"limit": limit, "used": used, "pieces": pieces},
        )
        raised = min(self._most, max(self._suggested, 4 * limit))
        if raised > limit:
            assessment = assessment._replace(
                change=f"{self._change}={raised}",
                effect=ranges.format((raised - used) // self._entries_per_range, ""),
                risk="Each map entry takes about 200 bytes of kernel memory.",
            )
        yield assessment

    def warning(self, use: Use) -> str:
        return (
            f"it has {self._count(use.used, use.limit or 0)}: soon mmap, mprotect and munmap are "
            f"refused ({self._change} raises it)"
        )


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
        parts = " and ".join(f"{format_size(size)} {purpose}" for size, purpose in reserves if size)
        return (
            f"Committed_AS is {format_size(self.used)} of a CommitLimit of "
            f"{format_size(self.limit)}"
            + (f", of which the kernel keeps back {parts}" if parts else "")
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


class _Overcommit(Limit):
    """How commits are accounted (Documentation/mm/overcommit-accounting.rst)."""

    name = "overcommit"
    _setting = "vm.overcommit_memory"
    _heuristic, _strict = 0, 2

    def uses(self, process: Process) -> Iterator[Use]:
        """See `Limit`. Only strict accounting has a limit."""
        if process.setting("overcommit_memory") == self._strict:
            limit, used = process.meminfo_kib("CommitLimit"), process.meminfo_kib("Committed_AS")
            if limit:
                yield Use(limit * KiB, used * KiB)

    def refuses(self, verb: str, err: int) -> bool:
        return err in {errno.ENOMEM, errno.ENOSPC} and verb != "reserve"

    def refusal(self, nbytes: int, _address: int | None) -> str | None:
        mode = OWN.setting("overcommit_memory")
        if mode == self._strict:
            strict = strict_commit()
            if nbytes >= strict.left - strict.inexact:
                return f"{self._setting} is 2, and {strict}"
        elif mode == self._heuristic:
            most = self._memory_and_swap()
            if nbytes > most:
                return (
                    f"{self._setting} is 0, which refuses a single request above the size of "
                    f"memory and swap ({format_size(most)})"
                )
        return None

    def _memory_and_swap(self) -> int:
        return (OWN.meminfo_kib("MemTotal") + OWN.meminfo_kib("SwapTotal")) * KiB

    def assess(self) -> Iterator[Assessment]:
        mode, most = OWN.setting("overcommit_memory"), self._memory_and_swap()
        ratio, fixed = OWN.setting("overcommit_ratio"), OWN.setting("overcommit_kbytes")
        values = {
            "mode": mode,
            "committed_as": OWN.meminfo_kib("Committed_AS") * KiB,
            "commit_limit": OWN.meminfo_kib("CommitLimit") * KiB,
            "overcommit_ratio_percent": ratio,
            "overcommit_kbytes": fixed,
            "memory_and_swap": most,
        }
        if mode == self._strict:
            strict = strict_commit()
            values |= {"admin_reserve": strict.admin_reserve, "user_reserve": strict.user_reserve}
            setting = f"vm.overcommit_kbytes={fixed}" if fixed else f"vm.overcommit_ratio={ratio}"
            yield Assessment(
                self.name,
                "limited",
                f"{self._setting} is 2 (strict, {setting}): {strict}.",
                f"All processes together can commit at most {format_size(strict.left)} more; "
                'mode="noreserve" is charged like "charge". Reserving is not charged, but lowers '
                "the process's limit by up to 1/32 of its address space.",
                values,
                f"sysctl -w {self._setting}={self._heuristic}",
                f'One commit can have up to {format_size(most)}, and mode="noreserve" is not '
                "charged. Alternative that keeps strict accounting: sysctl -w "
                "vm.overcommit_ratio=100",
                "Committed memory can then exceed memory and swap, and the OOM killer ends "
                "processes.",
            )
            return
        fact = f"{self._setting} is 1 (always)."
        allows = (
            'Commits are never refused in mode "charge" or "noreserve"; the OOM killer ends '
            "processes when memory runs out."
        )
        if mode == self._heuristic:
            fact = f"{self._setting} is 0 (heuristic). Memory and swap total {format_size(most)}."
            allows = (
                f'One commit in mode="charge" is refused above {format_size(most)}; '
                'mode="noreserve" is never refused.'
            )
        yield Assessment(self.name, "good", fact, allows, values)

    def warning(self, use: Use) -> str:
        return (
            f"{self._setting} is 2 and the system has promised {format_size(use.used)} of "
            f"{format_size(use.limit or 0)} (Committed_AS, CommitLimit): soon a commit is refused"
        )


class _AddressSpace(Limit):
    """The free addresses below ``2**address_bits()``."""

    name, is_slow = "address space", True
    # Security modules forbid lower addresses whatever the setting (CONFIG_LSM_MMAP_MIN_ADDR).
    _lowest = 64 * KiB

    def _largest_gap(self) -> int:
        low = max(proc.setting_or_default("mmap_min_addr"), self._lowest)
        gaps = proc.free_gaps(proc.read_maps(), low, 1 << address_bits())
        return max((high - low for low, high in gaps), default=0) // PAGE_SIZE * PAGE_SIZE

    def refuses(self, verb: str, err: int) -> bool:
        return err == errno.ENOMEM and verb in {"reserve", "map"}

    def refusal(self, nbytes: int, address: int | None) -> str | None:
        top = 1 << address_bits()
        clause = f"user addresses have {self._bits()}"
        beyond = nbytes >= top or (address is not None and address + nbytes > top)
        try:
            largest = self._largest_gap()
        except proc.UNREADABLE:
            if not beyond:
                raise
            return clause
        if beyond or nbytes > largest:
            return f"{clause}, and the largest free range is {format_size(largest)}"
        return None

    def _bits(self) -> str:
        bits = address_bits()
        return f"{bits} bits ({format_size(1 << bits)})"

    def assess(self) -> Iterator[Assessment]:
        """See `Limit`. One reservation has at most the largest gap, and what RLIMIT_AS leaves."""
        bits, gap, left = address_bits(), self._largest_gap(), RLIMIT_AS.use(OWN).left()
        most = gap if left is None else min(gap, left // PAGE_SIZE * PAGE_SIZE)
        assessment = Assessment(
            self.name,
            "good",
            f"User addresses have {self._bits()}. The largest free range is {format_size(gap)}.",
            f"One reservation can now have up to {format_size(most)}"
            + (f"; {RLIMIT_AS.name} leaves no more." if most < gap else "."),
            {
                "address_bits": bits,
                "largest_gap": gap,
                "largest_reservation": most,
                "page_size": PAGE_SIZE,
            },
            command=False,
        )
        if bits <= 32:
            assessment = assessment._replace(
                state="limited",
                change="use a 64-bit Python",
                effect="Reservations of many TiB become possible.",
            )
        yield assessment


class _LowestAddress(Limit):
    """The lowest address that a process without CAP_SYS_RAWIO may map."""

    name = "mmap_min_addr"

    def refuses(self, verb: str, err: int) -> bool:
        return err == errno.EPERM and verb == "reserve"

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        with suppress(*proc.UNREADABLE):
            return f"vm.mmap_min_addr is {OWN.setting(self.name):#x}"
        return "the address is below vm.mmap_min_addr"


class _Cgroup(Limit):
    """The memory cgroups above a process. Only a shared region's pages are refused (ENOMEM).

    Otherwise the OOM killer ends a process.
    """

    name = "cgroup limit"
    # Topic, file, and the fields allows, effect and risk of the assessment of each kind of limit.
    _KINDS = (
        (
            name,
            "",  # the hard limit, whose file has another name in each version
            "{left} more can be touched; beyond that the OOM killer ends a process of the group. "
            "Reserving and committing are not refused.",
            "The machine's memory is the limit, unless a parent group has one.",
            "Other groups have less memory left.",
        ),
        (
            "cgroup high",
            "memory.high",
            "{left} more can be touched at full speed; beyond that the kernel reclaims memory of "
            "the group and throttles it.",
            "The group is not throttled below its hard limit.",
            "The kernel may reclaim memory of other groups instead.",
        ),
    )

    def uses(self, process: Process) -> Iterator[Use]:
        for limit, used in process.cgroups():
            yield Use(limit, used)

    def refuses(self, verb: str, err: int) -> bool:
        return verb == ALLOCATE and err == errno.ENOMEM

    def refusal(self, nbytes: int, _address: int | None) -> str | None:
        for use in self.uses(OWN):
            if nbytes > (use.left() or 0):
                return f"the limit of a memory cgroup is {use}"
        return None

    def warning(self, use: Use) -> str:
        return (
            f"its memory cgroup uses {format_size(use.used)} of {format_size(use.limit or 0)}, "
            "page cache left out: soon the kernel kills a process in it"
        )

    def assess(self) -> Iterator[Assessment]:
        """See `Limit`. The group that leaves the least is reported, and the one that throttles."""
        total = OWN.meminfo_kib("MemTotal") * KiB
        is_visible = is_limited = False
        for topic, name, allows, effect, risk in self._KINDS:
            groups = list(self._groups(name))
            is_visible |= bool(groups)
            limits = [
                (limit - used, limit, used, file)
                for limit, used, file in groups
                if limit is not None and limit < total
            ]
            if not limits:
                continue
            is_limited = True
            left, limit, used, file = min(limits)
            if not os.access(file, os.W_OK):
                writers = "Only root, or the host of the container,"
                risk = f"{writers} can write the file. {risk}"  # noqa: PLW2901
            yield Assessment(
                topic,
                "limited",
                f"{file} is {Use(limit, used)}.",
                allows.format(left=format_size(max(0, left))),
                {"file": file, "limit": limit, "used": used},
                f"echo {-1 if file.endswith('limit_in_bytes') else 'max'} > {file}",
                effect,
                risk,
            )
        if is_limited:
            return
        # Without a cgroup mount a limit can exist and stay invisible.
        values = {"file": None, "limit": None}
        if is_visible or os.listdir(proc.CGROUP_ROOT):
            fact = "No visible memory cgroup has a limit below the machine's memory."
            allows = "All of the machine's memory can be touched."
            yield Assessment(self.name, "good", fact, allows, values)
        else:
            fact = f"No cgroup is visible: nothing is mounted at {proc.CGROUP_ROOT}."
            change = f"mount -t cgroup2 none {proc.CGROUP_ROOT}"
            effect = "The limit is checked."
            yield Assessment(
                self.name, "limited", fact, "A limit may exist.", values, change, effect
            )

    @staticmethod
    def _groups(name: str) -> Iterator[tuple[int | None, int, str]]:
        """Yield the limit in the file `name`, its use and its path of each group that has it."""
        for group in proc.memory_cgroups():
            with suppress(FileNotFoundError):  # the root, or no memory controller
                limit = group.limit(name)
                used = 0 if limit is None else group.used()
                yield limit, used, f"{group.folder}/{name or group.limit_file}"


class _Memory(Limit):
    """The machine's memory. It refuses only to allocate a shared region's pages."""

    name = "memory"

    def uses(self, process: Process) -> Iterator[Use]:
        total = process.meminfo_kib("MemTotal")
        yield Use(total * KiB, (total - process.meminfo_kib("MemAvailable")) * KiB)

    def refuses(self, verb: str, err: int) -> bool:
        return verb == ALLOCATE and err == errno.ENOMEM

    def refusal(self, nbytes: int, _address: int | None) -> str | None:
        use = next(self.uses(OWN))
        return f"the machine's memory is {use}" if nbytes > (use.left() or 0) else None

    def warning(self, use: Use) -> str:
        return (
            f"the machine has {format_size(use.left() or 0)} of its {format_size(use.limit or 0)} "
            "of memory left (MemAvailable): soon it swaps, or the kernel kills a process"
        )


# -- the table --------------------------------------------------------------------------------


LIMITS: tuple[Limit, ...] = (
    _AddressSpace(),
    RLIMIT_AS,
    rlimits.RLIMIT_DATA,
    rlimits.RLIMIT_FSIZE,
    rlimits.RLIMIT_NOFILE,
    rlimits.RLIMIT_MEMLOCK,
    _Cgroup(),
    _Memory(),
    _MapCount(),
    _Overcommit(),
    _LowestAddress(),
    *tasks.LIMITS,
    rlimits.RLIMIT_STACK,
    rlimits.RLIMIT_CORE,
)
"""All limits, in the order of doctor's findings and of the warnings."""
_IN_ORDER = sorted(LIMITS, key=lambda limit: limit.is_slow)


# -- refusals ---------------------------------------------------------------------------------


def refusing_limit(
    verb: str, err: int, nbytes: int, address: int | None = None
) -> tuple[str | None, str | None]:
    """Return the name of the refusing limit and the clause that explains it; None if unknown."""
    unread = None
    for limit in _IN_ORDER:
        if not limit.refuses(verb, err):
            continue
        try:
            clause = limit.refusal(nbytes, address)
        except proc.UNREADABLE as error:  # at a limit, even reading /proc may fail
            cause = getattr(error, "strerror", None) or repr(error)
            unread = f"no known limit explains it, and /proc is unreadable ({cause})"
            continue
        if clause is not None:
            return limit.name, clause
    return None, unread


_REASONS = {
    errno.EEXIST: "the range is already mapped, and a mapping is never replaced",
    errno.ENOSYS: "this kernel does not support it",
    errno.EINVAL: "this kernel does not support it, or the memory is locked (mlock)",
}


def refusal(
    verb: str,
    err: int,
    nbytes: int,
    address: int | None = None,
    why: str | None = None,
    *,
    shared: bool = False,
) -> VMError:
    """Return the exception for a verb that the kernel refused with errno `err`.

    It names the verb, the bytes, the address, the errno and, if known, the limit. The verb
    ``"map"`` reserves and commits in one call; ``"fork"`` creates a process. `why` replaces the
    reason. `shared` bytes are those of a file in memory.
    """
    allocates = shared and verb in _ALLOCATING
    limit, clause = refusing_limit(ALLOCATE if allocates else verb, err, nbytes, address)
    place = "" if address is None else f" at {address:#x}"
    reason = why or clause or _REASONS.get(err, "no known limit explains it")
    cls = OutOfMemoryError if err in _RAN_OUT else VMError
    return cls(
        err,
        f"{verb} of {format_size(nbytes)}{place} refused ({errno.errorcode.get(err, err)}): "
        f"{reason}",
        verb=verb,
        nbytes=nbytes,
        address=address,
        limit=limit,
    )
