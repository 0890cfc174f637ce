"""What page faults cost a block of code, and what huge pages would have saved."""

import os
import resource
import time
from _thread import RLock
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pyreserve._system import forks, proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.machine import thp_size
from pyreserve._system.report import Report, Table
from pyreserve.costs import faultmodel
from pyreserve.costs.faultlog import (
    LOST,
    PERIOD,
    Extent,
    FaultLog,
    Holding,
    Places,
    Record,
    extents,
    places,
)
from pyreserve.costs.faultmodel import Counts, Figure, Prices
from pyreserve.costs.table import CostTable
from pyreserve.errors import OutOfMemoryError, StateError
from pyreserve.units import MiB, format_size, format_time

if TYPE_CHECKING:
    from typing_extensions import Self

_NOT_ENTERED = "faults must be entered first: with pyreserve.costs.faults() as f"


class _Usage(NamedTuple):
    """What this process has used so far; times in seconds."""

    minor: int
    major: int
    user: float
    system: float
    wall: float

    @classmethod
    def now(cls) -> "_Usage":
        wall, usage = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        return cls(usage.ru_minflt, usage.ru_majflt, usage.ru_utime, usage.ru_stime, wall)

    def since(self, before: "_Usage") -> "_Usage":
        return _Usage(
            self.minor - before.minor,
            self.major - before.major,
            self.user - before.user,
            self.system - before.system,
            self.wall - before.wall,
        )


class _Memory(NamedTuple):
    """Readings of /proc, made outside of the timed block. None if unreadable."""

    holding: Holding | None
    mappings: list[Extent]
    machine_huge: int | None

    @classmethod
    def now(cls, huge_page: int) -> "_Memory":
        holding, mappings = None, list[Extent]()
        try:
            table = proc.smaps()
            holding, mappings = Holding.of(table, huge_page), extents(table)
        except proc.UNREADABLE:
            pass
        try:
            machine_huge = proc.vm_counter("thp_fault_alloc")
        except proc.UNREADABLE:
            machine_huge = None
        return cls(holding, mappings, machine_huge)


class faults:  # noqa: N801 - used like a function
    """Measure what the page faults of a ``with`` block cost this process.

    ::

        with pyreserve.costs.faults() as f:
            work()
        print(f)  # 1.2 s of 3.4 s went into 900,000 page faults; huge pages would have saved ...

    ``minor``, ``major``, ``user``, ``system``, ``wall`` and ``huge`` are exact and may be read
    inside the block too; they are changes so far. They are those of the whole process, all of its
    threads included (getrusage(2)); without forked processes.

    `cost` and `saving`, and so ``str()``, are estimates by the cost model. Without `costs` they
    first measure this machine, for about two seconds in child processes, once a process, so call
    them after the block.

    Method. perf_event_open(2) records the address of one fault of 127, and each new mapping; this
    slows faults by about 5 %. A fault could have been huge if a whole aligned huge page around it
    lay in its private anonymous mapping. `saving` compares the first touches of these faults in
    small and in huge pages, and the price of giving back the memory that is gone at the end. A
    mapping in which huge pages would cost more, because little of each is touched, saves nothing,
    and neither does memory that is in huge pages already. No estimate exceeds the system time of
    the block. An interval wider than a factor of 3 is unknown, unless it ends below 1 % of the
    block's time.

    Limits. Where the kernel allows no log (``kernel.perf_event_paranoid`` above 2, most
    containers), only memory that is still there at the end is known, and the rest makes the
    figures unknown. Faults inside system calls such as read(2) are recorded for privileged
    processes only. The cost of file-backed faults is not measured: it lies between that of a
    fault that allocates nothing and the system time. Copies of pages after a fork (copy on write)
    only widen the interval. First reads, which map the kernel's page of zeros, count as writes. A
    huge page that was partly touched, given back and touched again within one mapping counts once.
    Fewer TLB misses, colder caches, compaction of memory for huge pages, and waits for a disk are
    in no figure.

    Args:
        costs: a `CostTable` or the path of its JSON; None measures.

    Raises:
        OSError, ValueError: the file cannot be read; see `CostTable.load`.
    """

    _start: _Usage | None = None
    _end: _Usage | None = None
    _after: _Memory | None = None

    def __init__(self, costs: CostTable | str | Path | None = None) -> None:
        self._table = CostTable.load(costs) if isinstance(costs, str | Path) else costs
        self._lock = RLock()
        forks.register(self._lock)
        self._huge_page = thp_size() or 2 * MiB
        self._log: FaultLog | None = None
        self._no_log = ""
        self._records: list[Record] = []
        self._pid = 0

    def __enter__(self) -> "Self":
        """Begin, also anew after the end of an earlier block.

        Raises:
            StateError: the block has begun and not ended.
        """
        with self._lock:
            if self._start is not None and self._end is None and self._pid == os.getpid():
                msg = "this object's block has not ended: use another one inside it"
                raise StateError(msg)
            self._pid, self._records = os.getpid(), []
            self._before = _Memory.now(self._huge_page)
            try:
                self._log = FaultLog()
            except OSError as error:
                self._log = None
                self._no_log = f"perf_event_open was refused ({error.strerror})"
            self._end = self._after = None
            self._start = _Usage.now()
        return self

    def __exit__(self, *exc: object) -> None:
        usage = _Usage.now()
        if self._pid != os.getpid():  # a forked child: the block is the parent's
            return
        with self._lock:
            if self._start is None or self._end is not None:
                return
            self._end = usage
            if self._log is not None:
                self._take(self._log)
                self._log.stop()
            self._after = _Memory.now(self._huge_page)

    def _take(self, log: FaultLog) -> None:
        try:
            self._records += log.take()
        except MemoryError:  # must not replace an exception of the block
            self._records.append(Record(0, 0, 1, LOST))

    def _used(self) -> _Usage:
        if self._start is None:
            raise StateError(_NOT_ENTERED)
        if self._pid != os.getpid():
            msg = "the block began in another process, which this one was forked from"
            raise StateError(msg)
        return (self._end or _Usage.now()).since(self._start)

    @property
    def minor(self) -> int:
        """Page faults that needed no disk."""
        return self._used().minor

    @property
    def major(self) -> int:
        """Page faults that waited for a disk or for swap."""
        return self._used().major

    @property
    def user(self) -> float:
        """User time of all threads, in seconds."""
        return self._used().user

    @property
    def system(self) -> float:
        """System time of all threads, in seconds."""
        return self._used().system

    @property
    def wall(self) -> float:
        """Elapsed time in seconds."""
        return self._used().wall

    @property
    def huge(self) -> int | None:
        """Growth of the memory in transparent huge pages in bytes; None if smaps is unreadable.

        The kernel counts huge-page faults, most of which add to it, for the whole machine only.
        """
        self._used()
        before, after = self._before.holding, self._memory().holding
        return None if before is None or after is None else (after.huge - before.huge) * PAGE_SIZE

    @property
    def machine_huge(self) -> int | None:
        """Huge-page faults of the whole machine, a limit of this process's; None if not known.

        ``thp_fault_alloc`` of /proc/vmstat.
        """
        self._used()
        before, after = self._before.machine_huge, self._memory().machine_huge
        return None if before is None or after is None else after - before

    def cost(self) -> Figure:
        """Estimate the part of the system time that page faults took; measures if needed."""
        return self._estimated(faultmodel.cost)

    def saving(self) -> Figure:
        """Estimate the time that huge pages would have saved; measures if needed."""
        return self._estimated(faultmodel.saving)

    def _memory(self) -> _Memory:
        """Return the readings at the end of the block, or of now inside it."""
        return self._after or _Memory.now(self._huge_page)

    def _places(self) -> Places | None:
        with self._lock:
            if self._log is None:
                return None
            self._take(self._log)
            self._records.sort()
            return places(self._before.mappings, self._records, self._huge_page)

    def _counts(self) -> Counts:
        used, after = self._used(), self._memory()
        return Counts(
            faults=used.minor + used.major,
            system=used.system,
            time=max(used.wall, used.user + used.system),
            before=self._before.holding,
            after=after.holding,
            machine_huge=self.machine_huge,
            places=self._places(),
            no_places=self._no_log,
            huge_page=self._huge_page,
        )

    def _estimated(self, question: Callable[[Counts, Prices, int], Figure]) -> Figure:
        counts = self._counts()
        if not counts.faults:
            return Figure(0.0, 0.0, 0.0)
        try:
            if self._table is None:
                self._table = faultmodel.measured()
            return question(counts, Prices(self._table.model()), PERIOD)
        except OutOfMemoryError as error:
            why = str(error)
        except LookupError as error:
            cells = () if self._table is None else self._table.cells
            causes = [entry.why for entry in cells if entry.why is not None]
            why = ": ".join([str(error.args[0]), *causes[:1]])
        return Figure(None, 0.0, counts.system, why)

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        used, cost, saving = self._used(), self.cost(), self.saving()
        rows: list[tuple[str, ...]] = [
            ("minor faults", f"{used.minor:,}"),
            ("major faults", f"{used.major:,}"),
            ("user time", _seconds(used.user)),
            ("system time", _seconds(used.system)),
            ("wall time", _seconds(used.wall)),
        ]
        if self.huge is not None:
            rows.append(("growth of memory in huge pages", format_size(self.huge)))
        reasons = {
            f"{name} is unknown: {figure.why}."
            for name, figure in (("The cost", cost), ("The saving", saving))
            if figure.seconds is None
        }
        return Report(
            sentence(
                used.minor + used.major, max(used.wall, used.user + used.system), cost, saving
            ),
            tuple(sorted(reasons)),
            (Table(("this process", ""), rows),),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; keys carry their unit. Measures if needed."""
        used = self._used()
        return {
            "minor_faults": used.minor,
            "major_faults": used.major,
            "user_seconds": used.user,
            "system_seconds": used.system,
            "wall_seconds": used.wall,
            "huge_bytes": self.huge,
            "machine_huge_faults": self.machine_huge,
            "cost": self.cost().to_dict(),
            "saving": self.saving().to_dict(),
        }


def sentence(number: int, seconds: float, cost: Figure, saving: Figure) -> str:
    """Say what a number of faults in a block of `seconds` cost, and what would have saved time."""
    faults_text = f"{number:,} page fault{'' if number == 1 else 's'}"
    least = faultmodel.NEGLIGIBLE * seconds
    if cost.high <= least:
        first = f"{faults_text} took less than 1 % of {_seconds(seconds)}"
    elif cost.seconds is None:
        first = f"{faults_text} took at most {_seconds(cost.high)} of {_seconds(seconds)}"
    else:
        first = f"{_seconds(cost.seconds)} of {_seconds(seconds)} went into {faults_text}"
    if saving.high <= least:
        second = "huge pages would have saved less than 1 %"
    elif saving.seconds is None:
        second = f"what huge pages would have saved is unknown, at most {_seconds(saving.high)}"
    else:
        second = f"huge pages would have saved about {_seconds(saving.seconds)}"
    return f"{first}; {second}."


def _seconds(seconds: float) -> str:
    return format_time(float(f"{seconds:.2g}") * 1e9)
