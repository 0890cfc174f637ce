"""Where limits are read, of this process or another, and the words about them as data."""

import resource
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from pyreserve._system import proc
from pyreserve.units import format_size

_NEAR = 0.9  # the share of a limit above which a process is warned


def rlimit(which: int) -> int | None:
    """Return a soft resource limit in bytes; None if unlimited."""
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


class Report(NamedTuple):
    """The words about a limit or a feature; `pyreserve.doctor.Finding` explains each field."""

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
