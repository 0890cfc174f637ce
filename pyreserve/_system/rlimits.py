"""The resource limits (getrlimit(2)) of the table in `pyreserve._system.limits`."""

import errno
import resource
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pyreserve._system import proc
from pyreserve._system.limitbase import OWN, Assessment, Limit, Process, Use
from pyreserve.units import KiB, format_size

_CAP_IPC_LOCK = 14  # linux/capability.h
ALLOCATE = "allocate"
"""The verb, for limits, of allocating the pages of a shared region: no limit on private memory."""


class Rlimit(Limit):
    """A resource limit.

    Attributes:
        number: the number for getrlimit.
        option: the option of ulimit.
        row: the name in /proc/PID/limits.
    """

    number: int
    option: str
    row: str

    @property
    def label(self) -> str:
        """The name of the limit with its option."""
        return f"{self.name} (ulimit {self.option})"

    def read(self, process: Process) -> int | None:
        """Read the limit in bytes; None if unlimited."""
        return process.rlimit(self.number, self.row)

    def raising(self) -> dict[str, Any]:
        """Return ``change`` and ``risk`` of the assessment: how to raise the limit.

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


class _SizeRlimit(Rlimit):
    """A resource limit on a size of the process.

    Attributes:
        field: the size in /proc/PID/status that counts against the limit.
        figure: the name of that size in warnings.
        condition: the clause of an error before the limit's name.
        unlimited, limited, effect: `Assessment.allows` without and with a limit ({left}: the bytes
            that it leaves), and `Assessment.effect`.
    """

    field: str
    figure: str
    condition = ""
    unlimited: str
    limited: str
    effect: str

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

    def assess(self) -> Iterator[Assessment]:
        """See `Limit`."""
        use = self.use(OWN)
        if use.limit is None:
            fact = f"No limit is set (ulimit {self.option})."
            yield Assessment(self.name, "good", fact, self.unlimited, use._asdict())
            return
        yield Assessment(
            self.name,
            "limited",
            f"The limit (ulimit {self.option}) is {use}.",
            self.limited.format(left=format_size(use.left() or 0)),
            use._asdict(),
            effect=self.effect,
            **self.raising(),
        )

    def warning(self, use: Use) -> str:
        """See `Limit`."""
        return (
            f"{self.figure} is {use.share()} of {self.label}, {format_size(use.limit or 0)}: soon "
            "the kernel refuses more"
        )


class _AddressSpace(_SizeRlimit):
    """It counts all mappings, reserved ones too."""

    name, number, option = "RLIMIT_AS", resource.RLIMIT_AS, "-v"
    row, field, figure = "address space", "VmSize", "VSZ"
    unlimited = "Only the address space bounds reservations."
    limited = "New reservations can have up to {left} in total, committed or not."
    effect = "A reservation can have up to the largest free range."

    def refuses(self, verb: str, err: int) -> bool:
        return err == errno.ENOMEM and verb in {"reserve", "map"}


class _Data(_SizeRlimit):
    """It counts private writable mappings (Linux 4.7)."""

    name, number, option = "RLIMIT_DATA", resource.RLIMIT_DATA, "-d"
    row, field, figure = "data size", "VmData", "VmData"
    unlimited = "It refuses no commit."
    limited = "{left} more can be committed, in either mode; reserved memory does not count."
    effect = "Only memory and overcommit bound commits."

    def refuses(self, verb: str, err: int) -> bool:
        return err == errno.ENOMEM and verb not in {"reserve", ALLOCATE}


class _Locked(_SizeRlimit):
    """It bounds locked memory (mlock(2)) without CAP_IPC_LOCK."""

    name, number, option = "RLIMIT_MEMLOCK", resource.RLIMIT_MEMLOCK, "-l"
    row, field, figure = "locked memory", "VmLck", "VmLck"
    condition = "all future memory is locked (MCL_FUTURE), and "
    unlimited = "mlock and mlockall can lock any region."
    limited = (
        "{left} more can be locked; after mlockall(MCL_FUTURE) the limit also bounds reserving and "
        "committing."
    )
    effect = "Any region can be locked into RAM."

    def refuses(self, verb: str, err: int) -> bool:
        return err == errno.EAGAIN and verb != "fork"

    def assess(self) -> Iterator[Assessment]:
        exempt = proc.capable(_CAP_IPC_LOCK)
        for assessment in super().assess():
            values = {**assessment.values, "cap_ipc_lock": exempt}
            limit = values["limit"]
            if exempt and limit is not None:
                fact = (
                    f"The limit (ulimit -l) is {format_size(limit)}, but CAP_IPC_LOCK overrides it."
                )
                yield Assessment(self.name, "good", fact, self.unlimited, values)
            else:
                yield assessment._replace(values=values)


class _FileSize(Rlimit):
    """It bounds the file of a shared region."""

    name, number, option, row = "RLIMIT_FSIZE", resource.RLIMIT_FSIZE, "-f", "file size"

    def refuses(self, _verb: str, err: int) -> bool:
        return err == errno.EFBIG

    def refusal(self, nbytes: int, _address: int | None) -> str | None:
        limit = self.read(OWN)
        if limit is None or nbytes <= limit:
            return None
        return f"{self.label} is {format_size(limit)}"


class _OpenFiles(Rlimit):
    """It bounds the descriptors of a process, one for each shared region."""

    name, number, option, row = "RLIMIT_NOFILE", resource.RLIMIT_NOFILE, "-n", "open files"

    def refuses(self, _verb: str, err: int) -> bool:
        return err == errno.EMFILE

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        return f"{self.label} is {self.read(OWN)}, and a shared region takes a file descriptor"


class _Stack(Rlimit):
    """It is the size of a thread's stack (pthread_create(3)). A full stack is a signal."""

    name, number, option, row = "RLIMIT_STACK", resource.RLIMIT_STACK, "-s", "stack size"

    def assess(self) -> Iterator[Assessment]:
        limit = self.read(OWN)
        if limit is None:
            yield Assessment(
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
        yield Assessment(
            self.name,
            "good",
            f"The limit (ulimit -s) is {format_size(limit)}.",
            "Each new thread reserves that size for its stack; RLIMIT_AS counts it.",
            {"limit": limit},
        )


class _Core(Rlimit):
    """It cuts core dumps, except those that are piped to a program (core(5))."""

    name, number, option, row = "RLIMIT_CORE", resource.RLIMIT_CORE, "-c", "core file size"
    topic = "core dumps"

    def dumps(self, process: Process) -> bool:
        """Return whether a crash of the process leaves a core dump; False if unknown."""
        with suppress(KeyError):
            return self.read(process) != 0 or process.pipes_core()
        return process.pipes_core()

    def assess(self) -> Iterator[Assessment]:
        """See `Limit`. What a dump contains: MADV_DONTDUMP in madvise(2)."""
        pattern, limit = proc.kernel_setting("core_pattern"), self.read(OWN)
        values = {"core_pattern": pattern, "limit": limit}
        contents = (
            "They leave out regions (MADV_DONTDUMP), except those made by reserve(dump=True)."
        )
        piped = OWN.pipes_core()
        if piped or limit is None:
            target = f"the program {pattern[1:].split()[0]}" if piped else pattern
            yield Assessment(self.topic, "good", f"They go to {target}.", contents, values)
            return
        risk = "The file contains the process's memory, including secrets."
        yield Assessment(
            self.topic,
            "limited",
            f"{self.label} is {format_size(limit)}; the target is {pattern}.",
            contents if limit else "A crash leaves no core dump; reserve(dump=True) has no effect.",
            values,
            effect="A crash leaves a core dump with the regions made by reserve(dump=True).",
            **{"risk": risk, **self.raising()},
        )


RLIMIT_AS = _AddressSpace()
RLIMIT_DATA = _Data()
RLIMIT_MEMLOCK = _Locked()
RLIMIT_FSIZE = _FileSize()
RLIMIT_NOFILE = _OpenFiles()
RLIMIT_STACK = _Stack()
RLIMIT_CORE = _Core()
