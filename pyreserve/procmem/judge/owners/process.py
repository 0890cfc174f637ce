"""The mappings of a process, queries over them, and the owners that claim them."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from pyreserve._system.cached import lazily
from pyreserve._system.maps import EXECUTE, FLAGS, READ, SHARED, WRITE, escape_invalid_utf8
from pyreserve.layouts import Piece, without
from pyreserve.procmem.read.snapshot import Capture
from pyreserve.units import KiB

RW = READ | WRITE
RWX = READ | WRITE | EXECUTE
NONE = 0  # private, no access
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Owner:
    """The sizes of one owner in KiB, and the evidence that it was recognised by.

    Attributes:
        name: such as ``"thread stacks"``; ``"unknown"`` for mappings without a recognised owner.
        kib: total size.
        rss_kib: resident size, pages of huge page pools included; 0 if not known.
        no_access_kib: size that is neither readable nor writable nor executable, and not resident.
        mappings: number of mappings that the owner has or shares.
        evidence: a sentence about how the owner was recognised.
    """

    name: str
    kib: int = 0
    rss_kib: int = 0
    no_access_kib: int = 0
    mappings: int = 0
    evidence: str = ""


@dataclass(slots=True)
class _OwnerSizes:
    """Sizes of an owner while they are summed."""

    kib: int = 0
    rss_kib: int = 0
    no_access_kib: int = 0
    mappings: int = 0


@dataclass(slots=True)
class Claims:
    """Claims of owners.

    Attributes:
        whole: the owner of each mapping; None for an unclaimed or divided one.
        parts: for each divided mapping, claimed ranges (start, end, owner).
        evidence: the evidence for each owner.
    """

    whole: list[str | None]
    parts: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)


class ProcessMappings:
    """The mappings of a process, with the owners that have claimed them.

    A mapping is its index in the table; ``start``, ``end``, ``perms``, ``flags``, ``names`` and
    ``inode`` are columns of the table. VmFlags are known only if `knows_flags`.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.table = table = capture.table
        self.start, self.end, self.perms = table.start, table.end, table.perms
        self.flags, self.names, self.inode = table.flags, table.names, table.inode
        self.claims = Claims([None] * len(table))
        self.ranges: list[Piece] = []
        """Address ranges that a recogniser names in more detail than by owner."""
        self.named, self.knows_flags = table.named, table.knows_flags
        self.highest_end = self.end[table.user_mappings - 1] if table.user_mappings else 0
        """End of the highest mapping in user space, usually the stack."""
        self.is_32_bit = 0 < self.highest_end <= 1 << 32
        """A 32-bit process."""

    # -- queries ------------------------------------------------------------------------------

    @lazily
    def code_files(self) -> list[str]:
        """The paths of files mapped executable: programs and libraries."""
        paths = {name for i, name in self.named if self.perms[i] & EXECUTE and name.startswith("/")}
        return sorted(path.removesuffix(" (deleted)") for path in paths)

    def runs_code_of(self, pattern: str) -> str | None:
        """Return the path of the first code file whose file name matches, or None."""
        for path in self.code_files:
            if re.match(pattern, path.rpartition("/")[2]):
                return path
        return None

    @lazily
    def libc(self) -> str | None:
        """Glibc's path, if its code is mapped."""
        return self.runs_code_of(r"libc(\.so\.6|-2\.\d+\.so)$")

    @lazily
    def is_static(self) -> bool:
        """Whether neither a C library nor a dynamic loader is mapped."""
        return self.runs_code_of(r"ld-linux|ld-musl|ld\.so|libc\.so|libc-2") is None

    @lazily
    def pyreserve(self) -> str | None:
        """The path of pyreserve's own library, if its code is mapped."""
        return next((path for path in self.code_files if "/pyreserve/_native." in path), None)

    @lazily
    def anonymous(self) -> list[int]:
        """Mappings without a name."""
        nameless: list[int] = []
        first = 0
        for i, _ in [*self.named, (len(self.names), "")]:
            nameless += range(first, i)
            first = i + 1
        return nameless

    @lazily
    def runs(self) -> list[tuple[int, int]]:
        """Ranges [i, j) of anonymous mappings without a gap between them."""
        after_gaps = [
            i
            for i, (end, start) in enumerate(zip(self.end, self.start[1:], strict=False), 1)
            if end != start
        ]
        named = {i for i, _ in self.named}
        borders = sorted({0, len(self.start), *after_gaps, *named, *(i + 1 for i in named)})
        return [run for run in pairwise(borders) if run[0] not in named]

    def named_by_kernel(self, *names: str) -> list[int]:
        """Return private mappings of no file whose name starts with one of `names`.

        A name alone is no evidence: a file may have any name.
        """
        return [
            i
            for i, name in self.named
            if name.startswith(names) and not self.inode[i] and not self.perms[i] & SHARED
        ]

    def is_unclaimed(self, i: int) -> bool:
        """Return whether no owner has claimed any part of a mapping."""
        return self.claims.whole[i] is None and i not in self.claims.parts

    def unclaimed(self) -> Iterator[int]:
        """Yield the unclaimed anonymous mappings."""
        return (i for i in self.anonymous if self.is_unclaimed(i))

    def has_flags(self, i: int, codes: str) -> bool:
        """Return whether a mapping has all of these VmFlags, such as ``"nr dd"``."""
        return all(self.flags[i] & FLAGS[code] for code in codes.split())

    def lacks_flags(self, i: int, codes: str) -> bool:
        """Return whether a mapping has none of these VmFlags."""
        return not any(self.flags[i] & FLAGS[code] for code in codes.split())

    def is_never_charged(self, i: int) -> bool:
        """Return whether a mapping is MAP_NORESERVE and has no dc, dd or nh, as allocators map."""
        return self.is_plain(i, never_charged=True)

    def is_plain(self, i: int, *, never_charged: bool) -> bool:
        """Return whether a mapping has no dc, dd or nh, and has nr exactly if `never_charged`."""
        return self.lacks_flags(i, "dc dd nh") and self.has_flags(i, "nr") == never_charged

    def size(self, i: int) -> int:
        """Return the bytes of a mapping."""
        return self.end[i] - self.start[i]

    def mapping_at(self, address: int) -> int | None:
        """Return the mapping that contains an address, or None."""
        i = bisect_right(self.start, address) - 1
        return i if i >= 0 and address < self.end[i] else None

    def mappings_in(self, low: int, high: int) -> range:
        """Return the mappings that overlap [low, high)."""
        first = bisect_right(self.end, low)
        last = first
        while last < len(self.start) and self.start[last] < high:
            last += 1
        return range(first, last)

    def mapping_after(self, i: int) -> int | None:
        """Return the mapping that begins where this one ends, or None."""
        j = i + 1
        return j if j < len(self.start) and self.start[j] == self.end[i] else None

    def group_adjacent(self, mappings: Iterable[int]) -> list[range]:
        """Group adjacent mappings into ranges; `mappings` must be in address order."""
        groups: list[range] = []
        for i in mappings:
            if groups and groups[-1].stop == i and self.end[i - 1] == self.start[i]:
                groups[-1] = range(groups[-1].start, i + 1)
            else:
                groups.append(range(i, i + 1))
        return groups

    # -- claims -------------------------------------------------------------------------------

    def claim(self, mappings: Iterable[int], name: str, evidence: str) -> None:
        """Record an owner for those of the mappings that are unclaimed."""
        for i in mappings:
            if i < self.table.user_mappings and self.is_unclaimed(i):
                self.claims.whole[i] = name
                self.claims.evidence.setdefault(name, evidence)

    def claim_range(self, low: int, high: int, name: str, evidence: str) -> None:
        """Record an owner for the unclaimed anonymous bytes of [low, high)."""
        for i in self.mappings_in(low, high):
            if self.claims.whole[i] is not None or self.inode[i] or self.perms[i] & SHARED:
                continue
            if i >= self.table.user_mappings:
                continue
            start, end = max(low, self.start[i]), min(high, self.end[i])
            if (start, end) == (self.start[i], self.end[i]) and self.is_unclaimed(i):
                self.claims.whole[i] = name
            else:
                parts = self.claims.parts.setdefault(i, [])
                claimed = sorted(part[:2] for part in parts)
                parts += [(a, b, name) for a, b in without((start, end), claimed)]
            self.claims.evidence.setdefault(name, evidence)

    def owner_of(self, i: int) -> str:
        """Return the owner of a mapping, or of its largest part."""
        parts = self.claims.parts.get(i)
        if parts:
            return max(parts, key=lambda part: part[1] - part[0])[2]
        return self.claims.whole[i] or UNKNOWN

    def summary(self) -> list[Owner]:
        """Return all owners, largest first. Every byte except ``[vsyscall]`` has an owner."""
        owners: dict[str, _OwnerSizes] = {}
        table = self.table
        claimed = [(i, name) for i, name in enumerate(self.claims.whole) if name]
        for i, name in claimed:
            owner = owners.get(name)
            if owner is None:
                owner = owners[name] = _OwnerSizes()
            self._add(owner, i)
        unknown = owners.setdefault(UNKNOWN, _OwnerSizes())
        unknown.kib += sum(table.size) - sum(table.size[i] for i, _ in claimed)
        resident = sum(table.private) + sum(table.shared)
        unknown.rss_kib += resident - sum(table.private[i] + table.shared[i] for i, _ in claimed)
        unknown.no_access_kib += sum(
            [
                rest
                for rest, perms in zip(table.rest, self.perms, strict=True)
                if rest and not perms & RWX
            ]
        ) - sum(table.rest[i] for i, _ in claimed if not self.perms[i] & RWX)
        unknown.mappings += table.user_mappings - len(claimed)
        for i, parts in self.claims.parts.items():
            self._divide(i, parts, owners)
        evidence = self.claims.evidence
        result = [
            Owner(
                name,
                sizes.kib,
                sizes.rss_kib,
                sizes.no_access_kib,
                sizes.mappings,
                escape_invalid_utf8(evidence.get(name, "")),
            )
            for name, sizes in owners.items()
            if sizes.kib
        ]
        return sorted(result, key=lambda owner: (-owner.kib, owner.name))

    def _add(self, owner: _OwnerSizes, i: int) -> None:
        table = self.table
        owner.kib += table.size[i]
        owner.rss_kib += table.private[i] + table.shared[i]
        owner.no_access_kib += 0 if self.perms[i] & RWX else table.rest[i]
        owner.mappings += 1

    def _divide(
        self, i: int, parts: list[tuple[int, int, str]], owners: dict[str, _OwnerSizes]
    ) -> None:
        """Move parts of a mapping from unknown to their owners.

        Resident bytes go to the largest part: their place in the mapping is not known.
        """
        unknown = owners[UNKNOWN]
        unknown.mappings -= 1
        whole = self.table.size[i]
        no_access = 0 if self.perms[i] & RWX else self.table.rest[i]
        rss = self.table.private[i] + self.table.shared[i]
        unknown.rss_kib -= rss
        sizes: dict[str, int] = {}
        for start, end, name in parts:
            sizes[name] = sizes.get(name, 0) + (end - start) // KiB
        left = whole - sum(sizes.values())
        unknown.kib -= whole
        unknown.no_access_kib -= no_access
        if left:
            sizes[UNKNOWN] = left
        for name, kib in sizes.items():
            owner = owners.setdefault(name, _OwnerSizes())
            owner.kib += kib
            owner.mappings += 1
            owner.no_access_kib += no_access * kib // whole
        owners[max(sizes, key=lambda name: sizes[name])].rss_kib += rss


def plural(n: int, noun: str) -> str:
    """Return a number with its noun: ``1 heap``, ``3 heaps``."""
    return f"{n:,} {noun if n == 1 else noun + 's'}"
