"""The claims of owners on the mappings of a process."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pyreserve._system.maps import SHARED, MapTable
from pyreserve.layouts import without

UNKNOWN = "unknown"


class Part(NamedTuple):
    """Addresses [start, end) of a mapping, and their owner."""

    start: int
    end: int
    owner: str


class NamedRange(NamedTuple):
    """Addresses [start, end) known by name, such as a Go heap's spans, bitmap and arena.

    Attributes:
        start, end: addresses.
        perms: as in /proc/PID/maps, such as ``"rw-p"``.
        name: the part of a layout, such as ``"bitmap + arena"``.
    """

    start: int
    end: int
    perms: str
    name: str

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def state(self) -> str:
        """``"committed"``, or ``"reserved"`` if there is no access."""
        return "reserved" if self.perms.startswith("---") else "committed"


class Claims:
    """The owners of a table's mappings, as far as recognisers have claimed them.

    Attributes:
        whole: the owner of each mapping; None for an unclaimed or divided one.
        parts: for each divided mapping the claimed parts, in any order.
        evidence: the evidence for each owner.
        ranges: ranges that a recogniser names in more detail than by owner.
    """

    def __init__(self, table: MapTable) -> None:
        self._table = table
        self.whole: list[str | None] = [None] * len(table)
        self.parts: dict[int, list[Part]] = {}
        self.evidence: dict[str, str] = {}
        self.ranges: list[NamedRange] = []

    def is_unclaimed(self, i: int) -> bool:
        """Return whether no owner has claimed any part of a mapping."""
        return self.whole[i] is None and i not in self.parts

    def claim(self, mappings: Iterable[int], name: str, evidence: str) -> None:
        """Record an owner for those of the mappings that are unclaimed."""
        for i in mappings:
            if i < self._table.user_mappings and self.is_unclaimed(i):
                self.whole[i] = name
                self.evidence.setdefault(name, evidence)

    def claim_range(self, low: int, high: int, name: str, evidence: str) -> None:
        """Record an owner for the unclaimed anonymous bytes of [low, high)."""
        table = self._table
        for i in table.mappings_in(low, high):
            if self.whole[i] is not None or table.inode[i] or table.perms[i] & SHARED:
                continue
            if i >= table.user_mappings:
                continue
            start, end = max(low, table.start[i]), min(high, table.end[i])
            if (start, end) == (table.start[i], table.end[i]) and self.is_unclaimed(i):
                self.whole[i] = name
            else:
                parts = self.parts.setdefault(i, [])
                claimed = sorted(part[:2] for part in parts)
                parts += [Part(a, b, name) for a, b in without((start, end), claimed)]
            self.evidence.setdefault(name, evidence)

    def owner_of(self, i: int) -> str:
        """Return the owner of a mapping, or of its largest part."""
        parts = self.parts.get(i)
        if parts:
            return max(parts, key=lambda part: part.end - part.start).owner
        return self.whole[i] or UNKNOWN

    def parts_of(self, i: int) -> tuple[Part, ...]:
        """Return the parts of a mapping by owner, in address order; they cover it."""
        start, end = self._table.start[i], self._table.end[i]
        if i not in self.parts:
            return (Part(start, end, self.whole[i] or UNKNOWN),)
        return tuple(fill(start, end, self.parts[i]))


def fill(start: int, end: int, claimed: Iterable[tuple[int, int, str]]) -> Iterator[Part]:
    """Yield the claimed parts of [start, end), and the ranges between them as unknown."""
    for low, high, owner in sorted(claimed):
        low, high = max(low, start), min(high, end)  # noqa: PLW2901
        if low >= high:
            continue
        if start < low:
            yield Part(start, low, UNKNOWN)
        yield Part(low, high, owner)
        start = high
    if start < end:
        yield Part(start, end, UNKNOWN)
