"""Ways to give memory back and to use it again: what comes back, and what there and back cost.

All figures are medians over the passes of a run: alternatives ran in the same process and in turns,
so their ratio within a pass tells them apart also on a machine whose speed changes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import Cell, name_of
from pyreserve.costs.planning import BLOCK, HUGE
from pyreserve.costs.stats import Interval, over_passes
from pyreserve.costs.table import CostTable
from pyreserve.units import parse_size

Operations = tuple[tuple[str, str], ...]
PassCosts = Sequence[float | None]
"""A cost in each pass of a run, in ns; None if the pass lacks a part of it."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to give a touched piece back, and to use it again.

    Attributes:
        name: its system calls.
        memory: when the kernel gets the memory: ``"now"``, ``"when short"``, ``"never"``.
        charge, addresses: whether the commit charge, and the addresses, come back.
        give, again: the verbs and methods that give it back, and that use it again: every page is
            written. Each ``advise`` is for huge pages only.
        when: the memory or program that it suits, in words.
    """

    name: str
    memory: str
    charge: bool
    addresses: bool
    give: Operations
    again: Operations
    when: str

    @property
    def back(self) -> str:
        """What comes back, in words."""
        if self.memory == "never":
            return "nothing"
        others = [name for name in ("charge", "addresses") if getattr(self, name)]
        return ", ".join((f"memory {self.memory}", *others))

    def cells(self, kind: str, nbytes: int, page: int) -> tuple[list[Cell], list[Cell]]:
        """Return the cells that give back, and those that use again, for a page kind."""
        skipped = "advise" if parse_size(kind) == page else None
        give, again = (
            [Cell(verb, method, kind, "charge", nbytes) for verb, method in ops if verb != skipped]
            for ops in (self.give, self.again)
        )
        return give, again


_ADVISE = ("advise", "hugepage")

WAYS: tuple[Way, ...] = (
    Way(
        "MADV_FREE",
        "when short",
        False,
        False,
        (("discard", "free"),),
        (("retouch", "after-free"),),
        "soon used again, RSS may count it",
    ),
    Way(
        "MADV_DONTNEED",
        "now",
        False,
        False,
        (("discard", "dontneed"),),
        (("retouch", "after-dontneed"),),
        "perhaps used again",
    ),
    Way(
        "MADV_DONTNEED + mprotect",
        "now",
        False,
        False,
        (("decommit", "dontneed+mprotect"),),
        (("recommit", "after-dontneed+mprotect"), ("retouch", "after-dontneed+mprotect")),
        "perhaps used again; a stray access faults",
    ),
    Way(
        "munmap",
        "now",
        True,
        True,
        (("release", "piece"),),
        (("recommit", "after-release"), _ADVISE, ("retouch", "after-release")),
        "not used again",
    ),
    Way(
        "MAP_FIXED",
        "now",
        True,
        False,
        (("decommit", "mmap-fixed"),),
        (_ADVISE, ("recommit", "after-mmap-fixed"), ("retouch", "after-mmap-fixed")),
        "not soon used again; keeps addresses",
    ),
    Way(
        "mprotect",
        "never",
        False,
        False,
        (("decommit", "mprotect"),),
        (("recommit", "after-mprotect"), ("retouch", "after-mprotect")),
        "a stray access faults",
    ),
)
"""The ways, in the order in which verdicts prefer those that cost the same."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the program does with memory that it gives back.

    A touched piece of a larger reservation (`BLOCK` small pages, or a huge page) is given back.
    With the probability `again` it is then used again at once: every OS page is written.

    Attributes:
        name: name of its verdict, without the page kind.
        question: the question.
        again: the probability, 0 to 1.
        memory: when the kernel must get the memory; see `Way.memory`.
        charge: whether the commit charge must come back.
    """

    name: str
    question: str
    again: float
    memory: tuple[str, ...]
    charge: bool

    def candidates(self) -> list[Way]:
        """Return the ways that give back what must come back."""
        return [
            way for way in WAYS if way.memory in self.memory and (way.charge or not self.charge)
        ]


SITUATIONS: tuple[Situation, ...] = (
    Situation(
        "used-again-at-once",
        "How to give memory back that is used again at once?",
        1.0,
        ("now", "when short"),
        False,
    ),
    Situation(
        "may-be-used-again",
        "How to give memory back that may be used again?",
        0.5,
        ("now",),
        False,
    ),
    Situation(
        "not-used-again",
        "How to give memory back that is not used again?",
        0.0,
        ("now",),
        True,
    ),
)
"""The situations; in the last one the commit charge must come back too."""


class PassTimes:
    """The medians of a table's cells, pass by pass."""

    def __init__(self, table: CostTable) -> None:
        """Index the cells of a table."""
        self.page: int = table.machine.get("page_size") or PAGE_SIZE
        self.small = name_of(self.page)
        sizes = {parse_size(entry.cell.page_kind): entry.cell.page_kind for entry in table.cells}
        largest = max(sizes, default=0)
        self.huge = sizes[largest] if largest > self.page else None
        self._warm = {entry.cell: entry for entry in table.cells if entry.host == "warm"}

    def nbytes(self, kind: str) -> int:
        """Return the length for which ways are compared on a page kind."""
        return (BLOCK if kind == self.small else HUGE) * self.page

    def cell(self, verb: str, method: str, pages: int, kind: str | None = None) -> Cell:
        """Return a cell on small pages, or on another kind."""
        return Cell(verb, method, kind or self.small, "charge", pages * self.page)

    def cost(self, parts: Iterable[tuple[Cell, float]]) -> PassCosts:
        """Return the sum of cells, each times a weight, in each pass.

        Raises:
            LookupError: a cell was not measured; the message says why.
        """
        rows = []
        for cell, weight in parts:
            entry = self._warm.get(cell)
            if entry is None or entry.times is None or not entry.medians:
                why = entry.why if entry is not None and entry.why else "it is not in this table"
                msg = f"{cell.verb} {cell.method} on {cell.page_kind} pages was not measured: {why}"
                raise LookupError(msg)
            rows.append([ns if ns is None else ns * weight for ns in entry.medians])
        passes = zip(*rows, strict=False)
        return [None if None in values else sum(v for v in values if v) for values in passes]

    def of(self, *cells: Cell) -> PassCosts:
        """Return the sum of cells in each pass; see `cost`."""
        return self.cost((cell, 1.0) for cell in cells)

    def of_way(self, way: Way, kind: str, again: float) -> PassCosts:
        """Return the cost of a way that is used again with a probability; see `cost`."""
        give, back = way.cells(kind, self.nbytes(kind), self.page)
        return self.cost([(cell, 1.0) for cell in give] + [(cell, again) for cell in back if again])


def ratio(costs: PassCosts, to: PassCosts) -> Interval:
    """Return the ratio of two costs, taken pass by pass.

    Raises:
        LookupError: no pass has both.
    """
    return over_passes(a / b if a and b else None for a, b in zip(costs, to, strict=False))


@dataclass(frozen=True, slots=True)
class WayCosts:
    """A row of the table of ways, for one page kind.

    Attributes:
        way: the way.
        kind: the page kind.
        give, again: the cost to give back, and to use again, in ns.
        entries: map entries that a separate piece adds while it is given back; None if not counted.
    """

    way: Way
    kind: str
    give: Interval
    again: Interval
    entries: float | None

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data; a cost that is not known is null."""
        return {
            "way": self.way.name,
            "page_kind": self.kind,
            "memory": self.way.memory,
            "commit_charge": self.way.charge,
            "addresses": self.way.addresses,
            "map_entries": self.entries,
            "give_back_ns": self.give.median if self.give.known else None,
            "use_again_ns": self.again.median if self.again.known else None,
            "when": self.way.when,
        }


def way_costs(table: CostTable) -> Iterator[WayCosts]:
    """Yield the costs of each way for small pages, then for huge ones; measured ones only."""
    times = PassTimes(table)
    entries: Mapping[str, float] = table.machine.get("map_entries") or {}
    for kind in filter(None, (times.small, times.huge)):
        for way in WAYS:
            give, again = way.cells(kind, times.nbytes(kind), times.page)
            try:
                yield WayCosts(
                    way,
                    kind,
                    over_passes(times.of(*give)),
                    over_passes(times.of(*again)),
                    entries.get(" ".join(way.give[-1])),
                )
            except LookupError:
                continue
