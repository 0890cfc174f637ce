"""The limits of a process in one table: refusals, doctor and the warnings of explain read it.

A limit is read after a refusal, never to predict one.
"""

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, ClassVar, NamedTuple

from pyreserve._native import lib
from pyreserve._system import proc, tasks
from pyreserve._system.readings import OWN, Process, Report, Use
from pyreserve.errors import OutOfMemoryError, VMError
from pyreserve.units import KiB, format_size

PAGE_SIZE: int = lib.vm_page_size()
_RAN_OUT = {errno.ENOMEM, errno.EAGAIN}
_CAP_IPC_LOCK = 14  # linux/capability.h


def address_bits() -> int:
    """Return the number of bits of a user address: mappings are below ``2**address_bits()``.

    Derived from the initial stack, which the kernel places at the top of the user addresses (47
    bits on x86-64, also with 5-level page tables; Documentation/arch/x86/x86_64/mm.rst).
    """
    return int(lib.vm_address_bits())


# -- the verbs that a limit refuses -----------------------------------------------------------


def _any(_verb: str) -> bool:
    return True


def _takes_addresses(verb: str) -> bool:
    return verb in {"reserve", "map"}


def _takes_memory(verb: str) -> bool:
    return verb != "reserve"


def _forks(verb: str) -> bool:
    return verb == "fork"


def _maps(verb: str) -> bool:
    return verb != "fork"


# -- the kinds of limits ----------------------------------------------------------------------


class Limit:
    """One limit: how it is read, the verbs that it refuses, and its words.

    Attributes:
        name: the name in `VMError.limit`.
        topic: the topic in doctor; the name by default.
        is_slow: all mappings are read; a refusal checks the limit after all others.
        refuses: for each errno, which verbs the limit refuses with it.
    """

    name: str
    topic = ""
    is_slow = False
    refuses: ClassVar[dict[int, Callable[[str], bool]]] = {}

    def uses(self, _process: Process) -> Iterator[Use]:
        """Yield each instance of the limit with its use."""
        return iter(())

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        """Return the clause of an error if the limit refused these bytes to this process."""
        return None

    def reports(self) -> Iterator[Report]:
        """Yield the findings of doctor about this process."""
        return iter(())

    def warning(self, use: Use) -> str:
        """Return the warning about a process that is near the limit.

        A subclass whose `uses` yields anything overrides it.
        """
        raise NotImplementedError

    def warnings(self, process: Process) -> Iterator[str]:
        """Yield a warning for each instance that is nearly used up; none if it is unreadable."""
        with suppress(KeyError):
            for use in self.uses(process):
                if use.is_near():
                    yield self.warning(use)


class Rlimit(Limit):
    """A resource limit (getrlimit(2)).

    Attributes:
        number: the number for getrlimit.
        option: the option of ulimit.
        row: the name in /proc/PID/limits.
        field: the size in /proc/PID/status that counts against it.
        figure: the name of that size in warnings.
        condition: the clause of an error before the limit's name.
        unlimited, limited, effect: `Report.allows` without and with a limit ({left}: the bytes that
            it leaves), and `Report.effect`.
    """

    number: int
    option: str
    row: str
    field: str
    figure: str
    condition = ""
    unlimited: str
    limited: str
    effect: str

    @property
    def label(self) -> str:
        """The name of the limit with its option."""
        return f"{self.name} (ulimit {self.option})"

    def read(self, process: Process) -> int | None:
        """Read the limit in bytes; None if unlimited."""
        return process.rlimit(self.number, self.row)

    def use(self, process: Process) -> Use:
        """Read the limit and its use."""
        return Use(self.read(process), process.status_kib(self.field) * KiB)

    def uses(self, process: Process) -> Iterator[Use]:
        """See `Limit`."""
        yield self.use(process)

    def refusal(self, nbytes: int, _address: int | None) -> str | None:
        """See `Limit`."""
        limit = self.read(OWN)
        if limit is None:
            return None
        try:
            use = self.use(OWN)
        except proc.UNREADABLE:
            if nbytes <= limit:
                raise
            # Refused whatever is in use.
            return f"{self.condition}{self.label} is {format_size(limit)}"
        return f"{self.condition}{self.label} is {use}" if use.used + nbytes > limit else None

    def reports(self) -> Iterator[Report]:
        """See `Limit`."""
        use = self.use(OWN)
        values = use._asdict()
        if use.limit is None:
            fact = f"No limit is set (ulimit {self.option})."
            yield Report(self.name, "good", fact, self.unlimited, values)
            return
        yield Report(
            self.name,
            "limited",
            f"The limit (ulimit {self.option}) is {use}.",
            self.limited.format(left=format_size(use.left() or 0)),
            values,
            effect=self.effect,
            **self.raising(),
        )

    def raising(self) -> dict[str, Any]:
        """Return the advice on raising the limit: the fields ``change`` and ``risk`` of a report.

        Raising a hard limit takes CAP_SYS_RESOURCE (setrlimit(2)).
        """
        advice = {"change": f"ulimit {self.option} unlimited"}
        _, hard = resource.getrlimit(self.number)
        if hard != resource.RLIM_INFINITY and not proc.capable(proc.CAP_SYS_RESOURCE):
            advice["risk"] = (
                f"The hard limit is {format_size(hard)}. Only root can raise it: in the shell that "
                "starts the process, in /etc/security/limits.conf or in the service's unit file."
            )
        return advice

    def warning(self, use: Use) -> str:
        """See `Limit`."""
        return (
            f"{self.figure} is {use.share()} of {self.label}, {format_size(use.limit or 0)}: soon "
            "the kernel refuses more"
        )


class _AddressSpaceRlimit(Rlimit):
    """It counts all mappings, reserved ones too."""

    name, number, option = "RLIMIT_AS", resource.RLIMIT_AS, "-v"
    row, field, figure = "address space", "VmSize", "VSZ"
    refuses: ClassVar = {errno.ENOMEM: _takes_addresses}
    unlimited = "Only the address space bounds reservations."
    limited = "New reservations can have up to {left} in total, committed or not."
    effect = "A reservation can have up to the largest free range."


class _DataRlimit(Rlimit):
    """It counts private writable mappings (Linux 4.7)."""

    name, number, option = "RLIMIT_DATA", resource.RLIMIT_DATA, "-d"
    row, field, figure = "data size", "VmData", "VmData"
    refuses: ClassVar = {errno.ENOMEM: _takes_memory}
    unlimited = "It refuses no commit."
    limited = "{left} more can be committed, in either mode; reserved memory does not count."
    effect = "Only memory and overcommit bound commits."


class _LockedRlimit(Rlimit):
    """It bounds locked memory (mlock(2)) without CAP_IPC_LOCK."""

    name, number, option = "RLIMIT_MEMLOCK", resource.RLIMIT_MEMLOCK, "-l"
    row, field, figure = "locked memory", "VmLck", "VmLck"
    refuses: ClassVar = {errno.EAGAIN: _maps}
    condition = "all future memory is locked (MCL_FUTURE), and "
    unlimited = "mlock and mlockall can lock any region."
    limited = (
        "{left} more can be locked; after mlockall(MCL_FUTURE) the limit also bounds reserving and "
        "committing."
    )
    effect = "Any region can be locked into RAM."

    def reports(self) -> Iterator[Report]:
        exempt = proc.capable(_CAP_IPC_LOCK)
        for report in super().reports():
            values = {**report.values, "cap_ipc_lock": exempt}
            limit = values["limit"]
            if exempt and limit is not None:
                fact = (
                    f"The limit (ulimit -l) is {format_size(limit)}, but CAP_IPC_LOCK overrides it."
                )
                yield Report(self.name, "good", fact, self.unlimited, values)
            else:
                yield report._replace(values=values)


class _StackRlimit(Rlimit):
    """It is the size of a thread's stack (pthread_create(3)), and refuses no verb."""

    name, number, option, row = "RLIMIT_STACK", resource.RLIMIT_STACK, "-s", "stack size"

    def uses(self, _process: Process) -> Iterator[Use]:
        """A full stack is a signal, and no limit on memory."""
        return iter(())

    def reports(self) -> Iterator[Report]:
        limit = self.read(OWN)
        if limit is None:
            yield Report(
                self.name,
                "limited",
                "No limit is set (ulimit -s).",
                "The kernel keeps a large gap below the stack, so mappings lie in the middle of "
                "the address space and the largest free range is smaller.",
                {"limit": None},
                "ulimit -s 8192",
                "Mappings lie close below the stack.",
            )
            return
        yield Report(
            self.name,
            "good",
            f"The limit (ulimit -s) is {format_size(limit)}.",
            "Each new thread reserves that size for its stack; RLIMIT_AS counts it.",
            {"limit": limit},
        )


class _CoreRlimit(Rlimit):
    """It bounds core dumps, except those to a program (core(5)), and refuses no verb."""

    name, number, option, row = "RLIMIT_CORE", resource.RLIMIT_CORE, "-c", "core file size"
    topic = "core dumps"

    def uses(self, _process: Process) -> Iterator[Use]:
        """A core dump is cut at the limit: nothing comes near it."""
        return iter(())

    def dumps(self, process: Process) -> bool:
        """Return whether a crash of the process leaves a core dump; False if unknown."""
        with suppress(KeyError):
            return self.read(process) != 0 or process.pipes_core()
        return process.pipes_core()

    def reports(self) -> Iterator[Report]:
        """See `Limit`. What a dump contains: MADV_DONTDUMP in madvise(2)."""
        pattern, limit = proc.kernel_setting("core_pattern"), self.read(OWN)
        values = {"core_pattern": pattern, "limit": limit}
        contents = (
            "They leave out regions (MADV_DONTDUMP), except those made by reserve(dump=True)."
        )
        piped = OWN.pipes_core()
        if piped or limit is None:
            target = f"the program {pattern[1:].split()[0]}" if piped else pattern
            yield Report(self.topic, "good", f"They go to {target}.", contents, values)
            return
        risk = "The file contains the process's memory, including secrets."
        yield Report(
            self.topic,
            "limited",
            f"{self.label} is {format_size(limit)}; the target is {pattern}.",
            contents if limit else "A crash leaves no core dump; reserve(dump=True) has no effect.",
            values,
            effect="A crash leaves a core dump with the regions made by reserve(dump=True).",
            **{"risk": risk, **self.raising()},
        )


class _MapCount(Limit):
    """The number of map entries (Documentation/admin-guide/sysctl/vm.rst)."""

    name = "max_map_count"
    refuses: ClassVar = {errno.ENOMEM: _any, errno.EAGAIN: _maps}
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

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        limit, used = self.use(OWN)
        assert limit is not None
        if used + self._entries_per_range <= limit:
            return None
        return f"the process has {self._count(used, limit)}"

    def _count(self, used: int, limit: int) -> str:
        return f"{used:,} mappings and {self._setting} is {limit:,}"

    def reports(self) -> Iterator[Report]:
        use = self.use(OWN)
        limit, used, left = use.limit or 0, use.used, use.left() or 0
        raised = min(self._most, max(self._suggested, 4 * limit))
        ranges = "About {:,} more separate ranges can be committed{}."
        raises = raised > limit
        yield Report(
            self.name,
            "limited" if limit < proc.default_setting(self.name) or left < limit // 2 else "good",
            f"The limit is {limit:,} mappings, of which this process has {used:,}.",
            ranges.format(left // self._entries_per_range, "; adjacent ranges merge"),
            {"limit": limit, "used": used, "pieces": left // self._entries_per_range},
            f"{self._change}={raised}" if raises else None,
            ranges.format((raised - used) // self._entries_per_range, "") if raises else None,
            "Each map entry takes about 200 bytes of kernel memory." if raises else None,
        )

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


class _Overcommit(Limit):
    """How commits are accounted (Documentation/mm/overcommit-accounting.rst)."""

    name = "overcommit"
    refuses: ClassVar = {errno.ENOMEM: _takes_memory}
    _setting = "vm.overcommit_memory"
    _heuristic, _strict = 0, 2

    def uses(self, process: Process) -> Iterator[Use]:
        """See `Limit`. Only strict accounting has a limit."""
        if process.setting("overcommit_memory") == self._strict:
            limit, used = process.meminfo_kib("CommitLimit"), process.meminfo_kib("Committed_AS")
            if limit:
                yield Use(limit * KiB, used * KiB)

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

    def reports(self) -> Iterator[Report]:
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
            yield Report(
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
        yield Report(self.name, "good", fact, allows, values)

    def warning(self, use: Use) -> str:
        return (
            f"{self._setting} is 2 and the system has promised {format_size(use.used)} of "
            f"{format_size(use.limit or 0)} (Committed_AS, CommitLimit): soon a commit is refused"
        )


class _AddressSpace(Limit):
    """The free addresses below ``2**address_bits()``."""

    name, is_slow = "address space", True
    refuses: ClassVar = {errno.ENOMEM: _takes_addresses}
    # Security modules forbid lower addresses whatever the setting (CONFIG_LSM_MMAP_MIN_ADDR).
    _lowest = 64 * KiB

    def _largest_gap(self) -> int:
        low = max(proc.setting_or_default("mmap_min_addr"), self._lowest)
        gaps = proc.free_gaps(proc.read_maps(), low, 1 << address_bits())
        return max((high - low for low, high in gaps), default=0) // PAGE_SIZE * PAGE_SIZE

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

    def reports(self) -> Iterator[Report]:
        """See `Limit`. One reservation has at most the largest gap, and what RLIMIT_AS leaves."""
        bits, gap, left = address_bits(), self._largest_gap(), RLIMIT_AS.use(OWN).left()
        most = gap if left is None else min(gap, left // PAGE_SIZE * PAGE_SIZE)
        narrow = bits <= 32
        yield Report(
            self.name,
            "limited" if narrow else "good",
            f"User addresses have {self._bits()}. The largest free range is {format_size(gap)}.",
            f"One reservation can now have up to {format_size(most)}"
            + (f"; {RLIMIT_AS.name} leaves no more." if most < gap else "."),
            {
                "address_bits": bits,
                "largest_gap": gap,
                "largest_reservation": most,
                "page_size": PAGE_SIZE,
            },
            "use a 64-bit Python" if narrow else None,
            "Reservations of many TiB become possible." if narrow else None,
            command=False,
        )


class _LowestAddress(Limit):
    """The lowest address that a process without CAP_SYS_RAWIO may map."""

    name = "mmap_min_addr"
    refuses: ClassVar = {errno.EPERM: lambda verb: verb == "reserve"}

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        with suppress(*proc.UNREADABLE):
            return f"vm.mmap_min_addr is {OWN.setting(self.name):#x}"
        return "the address is below vm.mmap_min_addr"


class _Cgroup(Limit):
    """The memory cgroups above a process. They refuse no verb: the OOM killer ends a process."""

    name = "cgroup limit"

    def uses(self, process: Process) -> Iterator[Use]:
        for limit, used in process.cgroups():
            yield Use(limit, used)

    def warning(self, use: Use) -> str:
        return (
            f"its memory cgroup uses {format_size(use.used)} of {format_size(use.limit or 0)}, "
            "page cache left out: soon the kernel kills a process in it"
        )

    def reports(self) -> Iterator[Report]:
        """See `Limit`. The group that leaves the least is reported, and the one that throttles."""
        groups, total = 0, OWN.meminfo_kib("MemTotal") * KiB
        hard: list[tuple[int, Use, str]] = []
        soft: list[tuple[int, Use, str]] = []
        for group in proc.memory_cgroups():
            for name, tightest in ((group.limit_file, hard), ("memory.high", soft)):
                try:
                    limit = group.limit(name)
                    used = group.used() if limit is not None else 0
                except FileNotFoundError:  # the root group, or one without the memory controller
                    continue
                groups += 1
                if limit is not None and limit < total:
                    tightest.append((limit - used, Use(limit, used), f"{group.folder}/{name}"))
        if hard:
            left, use, file = min(hard)
            yield self._report(
                self.name,
                use,
                file,
                f"{format_size(max(0, left))} more can be touched; beyond that the OOM killer ends "
                "a process of the group. Reserving and committing are not refused.",
                "The machine's memory is the limit, unless a parent group has one.",
                "Other groups have less memory left.",
            )
        if soft:
            left, use, file = min(soft)
            yield self._report(
                "cgroup high",
                use,
                file,
                f"{format_size(max(0, left))} more can be touched at full speed; beyond that the "
                "kernel reclaims memory of the group and throttles it.",
                "The group is not throttled below its hard limit.",
                "The kernel may reclaim memory of other groups instead.",
            )
        if hard or soft:
            return
        # Without a cgroup mount a limit can exist and stay invisible.
        seen = groups > 0 or bool(os.listdir(proc.CGROUP_ROOT))
        yield Report(
            self.name,
            "good" if seen else "limited",
            "No visible memory cgroup has a limit below the machine's memory."
            if seen
            else f"No cgroup is visible: nothing is mounted at {proc.CGROUP_ROOT}.",
            "All of the machine's memory can be touched." if seen else "A limit may exist.",
            {"file": None, "limit": None},
            None if seen else f"mount -t cgroup2 none {proc.CGROUP_ROOT}",
            None if seen else "The limit is checked.",
        )

    def _report(
        self, topic: str, use: Use, file: str, allows: str, effect: str, risk: str
    ) -> Report:
        unlimited = -1 if file.endswith("limit_in_bytes") else "max"
        if not os.access(file, os.W_OK):
            risk = f"Only root, or the host of the container, can write the file. {risk}"
        return Report(
            topic,
            "limited",
            f"{file} is {use}.",
            allows,
            {"file": file, **use._asdict()},
            f"echo {unlimited} > {file}",
            effect,
            risk,
        )


class _Memory(Limit):
    """The machine's memory. It refuses no verb."""

    name = "memory"

    def uses(self, process: Process) -> Iterator[Use]:
        total = process.meminfo_kib("MemTotal")
        yield Use(total * KiB, (total - process.meminfo_kib("MemAvailable")) * KiB)

    def warning(self, use: Use) -> str:
        return (
            f"the machine has {format_size(use.left() or 0)} of its {format_size(use.limit or 0)} "
            "of memory left (MemAvailable): soon it swaps, or the kernel kills a process"
        )


class _Tasks(Limit):
    """A limit on processes and threads; see `tasks.CHECKS`."""

    refuses: ClassVar = {errno.EAGAIN: _forks}

    def __init__(self, name: str, check: Callable[[], str | None]) -> None:
        self.name = name
        self._check = check

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        return self._check()


RLIMIT_AS = _AddressSpaceRlimit()
RLIMIT_CORE = _CoreRlimit()
LIMITS: tuple[Limit, ...] = (
    _AddressSpace(),
    RLIMIT_AS,
    _DataRlimit(),
    _LockedRlimit(),
    _Cgroup(),
    _Memory(),
    _MapCount(),
    _Overcommit(),
    _LowestAddress(),
    *(_Tasks(name, check) for name, check in tasks.CHECKS),
    _StackRlimit(),
    RLIMIT_CORE,
)
"""All limits, in the order of doctor's findings and of the warnings."""
_IN_ORDER = sorted(LIMITS, key=lambda limit: limit.is_slow)


# -- refusals ---------------------------------------------------------------------------------


def _find(verb: str, err: int, nbytes: int, address: int | None) -> tuple[str | None, str | None]:
    """Return the name of the refusing limit and the clause that explains it; None if unknown."""
    unread = None
    for limit in _IN_ORDER:
        if err not in limit.refuses or not limit.refuses[err](verb):
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
    verb: str, err: int, nbytes: int, address: int | None = None, why: str | None = None
) -> VMError:
    """Return the exception for a verb that the kernel refused with errno `err`.

    It names the verb, the bytes, the address, the errno and, if known, the limit. The verb
    ``"map"`` reserves and commits in one call; ``"fork"`` creates a process. `why` replaces the
    reason.
    """
    limit, clause = _find(verb, err, nbytes, address)
    where = "" if address is None else f" at {address:#x}"
    reason = why or clause or _REASONS.get(err, "no known limit explains it")
    cls = OutOfMemoryError if err in _RAN_OUT else VMError
    return cls(
        err,
        f"{verb} of {format_size(nbytes)}{where} refused ({errno.errorcode.get(err, err)}): "
        f"{reason}",
        verb=verb,
        nbytes=nbytes,
        address=address,
        limit=limit,
    )
