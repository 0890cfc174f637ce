"""The base class of limits, the processes they are read from, and the assessments of doctor."""

import resource
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from pyreserve._system import proc
from pyreserve.units import format_size

_NEAR = 0.9  # the share of a limit above which a process is warned


def rlimit(number: int) -> int | None:
    """Return a soft resource limit in bytes; None if unlimited."""
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


class Assessment(NamedTuple):
    """The state of a limit or a feature, with the fields of `pyreserve.doctor.Finding`.

    A named tuple: refusals load this module, and dataclasses are slow to import.
    """

    topic: str
    state: Literal["good", "limited", "missing"]
    fact: str
    allows: str
    values: dict[str, Any]
    change: str | None = None
    effect: str | None = None
    risk: str | None = None
    command: bool = True


class Use(NamedTuple):
    """A limit, None if unlimited, and the amount that counts against it."""

    limit: int | None
    used: int

    def left(self) -> int | None:
        """Return the amount that the limit leaves; None if unlimited."""
        return None if self.limit is None else max(0, self.limit - self.used)

    def is_near(self) -> bool:
        """Return whether most of the limit is used."""
        return self.limit is not None and 0 < self.used >= _NEAR * self.limit

    def share(self) -> str:
        """Return the used share of the limit, such as ``"93 %"``."""
        return percent(self.used, self.limit) if self.limit else "all"

    def __str__(self) -> str:
        assert self.limit is not None
        return f"{format_size(self.limit)}, of which {format_size(self.used)} is in use"


def percent(part: float, whole: float) -> str:
    """Return a share in words, such as ``"93 %"``."""
    return f"{100 * part / whole:.0f} %"


class Process:
    """The readings of this process and its machine. Each raises one of `proc.UNREADABLE`."""

    def rlimit(self, number: int, _row: str) -> int | None:
        """Return a soft limit in bytes; None if unlimited.

        Args:
            number: the limit for getrlimit.
            _row: its name in /proc/PID/limits.
        """
        return rlimit(number)

    def status_kib(self, field: str) -> int:
        """Return a size of /proc/PID/status."""
        return proc.status_kib()[field]

    def setting(self, name: str) -> int:
        """Return the integer /proc/sys/vm/NAME."""
        return proc.vm_setting(name)

    def meminfo_kib(self, field: str) -> int:
        """Return a size of /proc/meminfo."""
        return proc.meminfo_kib()[field]

    def map_count(self) -> int:
        """Return the number of mappings that vm.max_map_count limits."""
        return proc.map_count()

    def cgroups(self) -> Iterable[tuple[int, int]]:
        """Return limit and use in bytes of each limited memory cgroup."""
        return proc.cgroup_memory()

    def pipes_core(self) -> bool:
        """Return whether core dumps are piped to a program."""
        return proc.kernel_setting("core_pattern").startswith("|")


OWN = Process()
"""This process."""


class CapturedProcess(Process):
    """The readings of another process, or of saved files; a missing one raises KeyError.

    Args:
        limits: soft limits by their name in /proc/PID/limits; None is unlimited.
        status: the sizes of /proc/PID/status in KiB.
        machine: the integers of /proc/sys/vm, the sizes of /proc/meminfo in KiB, and
            ``core_piped``.
        cgroups: see `Process.cgroups`.
        map_count: see `Process.map_count`.
    """

    def __init__(
        self,
        limits: Mapping[str, int | None],
        status: Mapping[str, int],
        machine: Mapping[str, int],
        cgroups: tuple[tuple[int, int], ...],
        map_count: int,
    ) -> None:
        self._limits = limits
        self._status = status
        self._machine = machine
        self._cgroups = cgroups
        self._map_count = map_count

    def rlimit(self, _number: int, row: str) -> int | None:
        """See `Process`."""
        return self._limits[row]

    def status_kib(self, field: str) -> int:
        """See `Process`."""
        return self._status[field]

    def setting(self, name: str) -> int:
        """See `Process`."""
        return self._machine[name]

    def meminfo_kib(self, field: str) -> int:
        """See `Process`."""
        return self._machine[field]

    def map_count(self) -> int:
        """See `Process`."""
        return self._map_count

    def cgroups(self) -> Iterable[tuple[int, int]]:
        """See `Process`."""
        return self._cgroups

    def pipes_core(self) -> bool:
        """See `Process`."""
        return bool(self._machine.get("core_piped"))


class Limit:
    """One limit: its readings, the calls it refuses, and the texts about it.

    Attributes:
        name: the name in `VMError.limit`.
        topic: the topic in doctor; the name by default.
        is_slow: all mappings are read; a refusal checks the limit after all others.
    """

    name: str
    topic = ""
    is_slow = False

    def uses(self, _process: Process) -> Iterator[Use]:
        """Yield each instance of the limit with its use."""
        return iter(())

    def refuses(self, _verb: str, _err: int) -> bool:
        """Return whether the limit can refuse a verb with this errno."""
        return False

    def refusal(self, _nbytes: int, _address: int | None) -> str | None:
        """Return the clause of an error if the limit refused these bytes to this process.

        Raises:
            OSError, MemoryError, KeyError, ValueError: it can't be read (`proc.UNREADABLE`).
        """
        return None

    def assess(self) -> Iterator[Assessment]:
        """Yield assessments of this process, for doctor."""
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
