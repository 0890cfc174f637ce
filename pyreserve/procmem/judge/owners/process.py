"""What a recogniser sees of a process, and how it claims bytes for an owner."""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from pyreserve._system.cached import lazily
from pyreserve.layouts import Piece, without
from pyreserve.procmem.read.maps import EXECUTE, FLAGS, READ, SHARED, WRITE, escape_invalid_utf8
from pyreserve.procmem.read.snapshot import Capture
from pyreserve.units import KiB

RW = READ | WRITE
RWX = READ | WRITE | EXECUTE
NONE = 0  # private, no access
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Owner:
    """Who has how much of the address space, in KiB, and by which evidence.

    Attributes:
        name: such as ``"thread stacks"``; ``"unknown"`` for what was not recognised.
        kib: all of it.
        rss_kib: of it, in memory (pages of huge page pools included); 0 if not known.
        no_access_kib: of it, neither readable nor writable nor executable, and not in memory.
        mappings: how many mappings it has or shares.
        evidence: what told it, in words.
    """

    name: str
    kib: int = 0
    rss_kib: int = 0
    no_access_kib: int = 0
    mappings: int = 0
    evidence: str = ""


@dataclass(slots=True)
class _Sum:
    """What an owner has, as far as it is added up."""

    kib: int = 0
    rss_kib: int = 0
    no_access_kib: int = 0
    mappings: int = 0


@dataclass(slots=True)
class Claims:
    """Who has which bytes: an owner's name for every mapping, and for parts of those divided."""

    whole: list[str | None]
    parts: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)
    evidence: dict[str, str] = field(default_factory=dict)


class ProcessMappings:
    """The mappings of a process as a recogniser sees them, those that are taken left out.

    Mappings are named by their index in the table, ``start``, ``end``, ``perms``, ``flags`` and
    ``names`` are its columns; the bits of VmFlags are only known where `knows_flags`.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.table = table = capture.table
        self.start, self.end, self.perms = table.start, table.end, table.perms
        self.flags, self.names, self.inode = table.flags, table.names, table.inode
        self.claims = Claims([None] * len(table))
        self.ranges: list[Piece] = []
        """Address ranges that a recogniser can name more finely than by owner."""
        self.named, self.knows_flags = table.named, table.knows_flags
        self.highest_end = self.end[table.user_mappings - 1] if table.user_mappings else 0
        """Where the highest mapping ends, most often the stack."""
        self.is_32_bit = 0 < self.highest_end <= 1 << 32
        """A 32-bit process."""

    # -- looking ------------------------------------------------------------------------------

    @lazily
    def code_files(self) -> list[str]:
        """The paths of what has code mapped: a file that is merely data tells nothing."""
        found = {name for i, name in self.named if self.perms[i] & EXECUTE and name.startswith("/")}
        return sorted(name.removesuffix(" (deleted)") for name in found)

    def runs_code_of(self, pattern: str) -> str | None:
        """Return the first program or library whose file name matches, or None."""
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
        """Mappings of no file and no name of the kernel's."""
        found: list[int] = []
        at = 0
        for i, _ in [*self.named, (len(self.names), "")]:
            found += range(at, i)
            at = i + 1
        return found

    @lazily
    def runs(self) -> list[tuple[int, int]]:
        """Ranges [i, j) of anonymous mappings without a gap between them."""
        holes = [
            i
            for i, (end, start) in enumerate(zip(self.end, self.start[1:], strict=False), 1)
            if end != start
        ]
        named = {i for i, _ in self.named}
        borders = sorted({0, len(self.start), *holes, *named, *(i + 1 for i in named)})
        return [run for run in pairwise(borders) if run[0] not in named]

    def named_by_kernel(self, *names: str) -> list[int]:
        """Return what the kernel itself calls by names that begin so: of no file, and not shared.

        A name alone tells nothing: a file may have any.
        """
        return [
            i
            for i, name in self.named
            if name.startswith(names) and not self.inode[i] and not self.perms[i] & SHARED
        ]

    def is_unclaimed(self, i: int) -> bool:
        """Tell whether nobody has claimed any of a mapping."""
        return self.claims.whole[i] is None and i not in self.claims.parts

    def unclaimed(self) -> Iterator[int]:
        """Yield the anonymous mappings that nobody has."""
        return (i for i in self.anonymous if self.is_unclaimed(i))

    def has_flags(self, i: int, codes: str) -> bool:
        """Tell whether a mapping's VmFlags hold all of these, as in ``"nr dd"``."""
        return all(self.flags[i] & FLAGS[code] for code in codes.split())

    def lacks_flags(self, i: int, codes: str) -> bool:
        """Tell whether none of these is among a mapping's VmFlags."""
        return not any(self.flags[i] & FLAGS[code] for code in codes.split())

    def is_never_charged(self, i: int) -> bool:
        """Tell whether a mapping is MAP_NORESERVE and has no other advice, as allocators map."""
        return self.is_plain(i, never_charged=True)

    def is_plain(self, i: int, *, never_charged: bool) -> bool:
        """Tell whether a mapping has no other advice, and is MAP_NORESERVE or is not."""
        return self.lacks_flags(i, "dc dd nh") and self.has_flags(i, "nr") == never_charged

    def size(self, i: int) -> int:
        """Return a mapping's bytes."""
        return self.end[i] - self.start[i]

    def mapping_at(self, address: int) -> int | None:
        """Return the mapping that an address is in."""
        i = bisect_right(self.start, address) - 1
        return i if i >= 0 and address < self.end[i] else None

    def mappings_in(self, low: int, high: int) -> range:
        """Return the mappings that [low, high) touches."""
        first = bisect_right(self.end, low)
        last = first
        while last < len(self.start) and self.start[last] < high:
            last += 1
        return range(first, last)

    def mapping_after(self, i: int) -> int | None:
        """Return the mapping that begins where this one ends."""
        j = i + 1
        return j if j < len(self.start) and self.start[j] == self.end[i] else None

    def group_adjacent(self, mappings: Iterable[int]) -> list[range]:
        """Join mappings, which come in address order, where no gap and no other is between."""
        found: list[range] = []
        for i in mappings:
            if found and found[-1].stop == i and self.end[i - 1] == self.start[i]:
                found[-1] = range(found[-1].start, i + 1)
            else:
                found.append(range(i, i + 1))
        return found

    # -- claiming -----------------------------------------------------------------------------

    def claim(self, mappings: Iterable[int], name: str, evidence: str) -> None:
        """Give whole mappings to an owner, but for those that have one."""
        for i in mappings:
            if i < self.table.user_mappings and self.is_unclaimed(i):
                self.claims.whole[i] = name
                self.claims.evidence.setdefault(name, evidence)

    def claim_range(self, low: int, high: int, name: str, evidence: str) -> None:
        """Give the anonymous bytes of an address range that nobody has to an owner."""
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
                taken = sorted(part[:2] for part in parts)
                parts += [(a, b, name) for a, b in without((start, end), taken)]
            self.claims.evidence.setdefault(name, evidence)

    def owner_of(self, i: int) -> str:
        """Return who has a mapping, or the largest part of it."""
        parts = self.claims.parts.get(i)
        if parts:
            return max(parts, key=lambda part: part[1] - part[0])[2]
        return self.claims.whole[i] or UNKNOWN

    def summary(self) -> list[Owner]:
        """Add up what everyone has, most first. All bytes but ``[vsyscall]`` have an owner."""
        owners: dict[str, _Sum] = {}
        table = self.table
        taken = [(i, name) for i, name in enumerate(self.claims.whole) if name]
        for i, name in taken:
            owner = owners.get(name)
            if owner is None:
                owner = owners[name] = _Sum()
            self._add(owner, i)
        unknown = owners.setdefault(UNKNOWN, _Sum())
        unknown.kib += sum(table.size) - sum(table.size[i] for i, _ in taken)
        in_memory = sum(table.private) + sum(table.shared)
        unknown.rss_kib += in_memory - sum(table.private[i] + table.shared[i] for i, _ in taken)
        unknown.no_access_kib += sum(
            [
                rest
                for rest, perms in zip(table.rest, self.perms, strict=True)
                if rest and not perms & RWX
            ]
        ) - sum(table.rest[i] for i, _ in taken if not self.perms[i] & RWX)
        unknown.mappings += table.user_mappings - len(taken)
        for i, parts in self.claims.parts.items():
            self._divide(i, parts, owners)
        evidence = self.claims.evidence
        everyone = [
            Owner(
                name,
                has.kib,
                has.rss_kib,
                has.no_access_kib,
                has.mappings,
                escape_invalid_utf8(evidence.get(name, "")),
            )
            for name, has in owners.items()
            if has.kib
        ]
        return sorted(everyone, key=lambda o: (-o.kib, o.name))

    def _add(self, owner: _Sum, i: int) -> None:
        table = self.table
        owner.kib += table.size[i]
        owner.rss_kib += table.private[i] + table.shared[i]
        owner.no_access_kib += 0 if self.perms[i] & RWX else table.rest[i]
        owner.mappings += 1

    def _divide(self, i: int, parts: list[tuple[int, int, str]], owners: dict[str, _Sum]) -> None:
        """Move parts of a mapping from unknown to their owners.

        What is in memory goes with the largest part: where in the mapping it lies is not known.
        """
        unknown = owners[UNKNOWN]
        unknown.mappings -= 1
        whole = self.table.size[i]
        none = 0 if self.perms[i] & RWX else self.table.rest[i]
        rss = self.table.private[i] + self.table.shared[i]
        unknown.rss_kib -= rss
        sizes: dict[str, int] = {}
        for start, end, name in parts:
            sizes[name] = sizes.get(name, 0) + (end - start) // KiB
        left = whole - sum(sizes.values())
        unknown.kib -= whole
        unknown.no_access_kib -= none
        if left:
            sizes[UNKNOWN] = left
        for name, kib in sizes.items():
            owner = owners.setdefault(name, _Sum())
            owner.kib += kib
            owner.mappings += 1
            owner.no_access_kib += none * kib // whole
        owners[max(sizes, key=lambda name: sizes[name])].rss_kib += rss


def plural(n: int, one: str, many: str | None = None) -> str:
    """Write ``1 heap`` or ``3 heaps``."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"
