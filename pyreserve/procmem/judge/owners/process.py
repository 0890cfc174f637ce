"""The mappings of a process as recognisers see them: queries over table and flags."""

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

from pyreserve._system.cached import lazily
from pyreserve._system.maps import EXECUTE, FLAGS, READ, SHARED, WRITE
from pyreserve.procmem.judge.owners.claims import Claims
from pyreserve.procmem.read.snapshot import Capture

RW = READ | WRITE
RWX = READ | WRITE | EXECUTE
NONE = 0  # private, no access
LIBC = r"libc(\.so\.6|-2\.\d+\.so)$"
"""Pattern of the file name of glibc."""


class ProcessMappings:
    """The mappings of a process, their claims, and what recognisers ask about them.

    A mapping is its index in the table. The columns, lookups and claims that recognisers use most
    are attributes here too. VmFlags are known only if `knows_flags`.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.table = table = capture.table
        self.start, self.end, self.perms = table.start, table.end, table.perms
        self.flags, self.names, self.inode = table.flags, table.names, table.inode
        self.named, self.knows_flags = table.named, table.knows_flags
        self.mapping_at, self.mappings_in = table.mapping_at, table.mappings_in
        self.mapping_after = table.mapping_after
        self._code: dict[str, str | None] = {}
        self.claims = claims = Claims(table)
        self.claim, self.claim_range = claims.claim, claims.claim_range
        self.is_unclaimed = claims.is_unclaimed
        self.highest_end = self.end[table.user_mappings - 1] if table.user_mappings else 0
        """End of the highest mapping in user space, usually the stack."""
        self.is_32_bit = 0 < self.highest_end <= 1 << 32
        """A 32-bit process."""

    @lazily
    def code_files(self) -> list[str]:
        """The paths of files mapped executable: programs and libraries."""
        paths = {name for i, name in self.named if self.perms[i] & EXECUTE and name.startswith("/")}
        return sorted(path.removesuffix(" (deleted)") for path in paths)

    def runs_code_of(self, pattern: str) -> str | None:
        """Return the path of the first code file whose file name matches, or None."""
        if pattern not in self._code:
            match = re.compile(pattern).match
            paths = (path for path in self.code_files if match(path.rpartition("/")[2]))
            self._code[pattern] = next(paths, None)
        return self._code[pattern]

    @lazily
    def libc(self) -> str | None:
        """Glibc's path, if its code is mapped."""
        return self.runs_code_of(LIBC)

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
        """Return whether a mapping is MAP_NORESERVE without dc, dd and nh, as allocators map."""
        return self.is_plain(i, never_charged=True)

    def is_plain(self, i: int, *, never_charged: bool) -> bool:
        """Return whether a mapping has no dc, dd or nh, and has nr exactly if `never_charged`."""
        return self.lacks_flags(i, "dc dd nh") and self.has_flags(i, "nr") == never_charged

    def size(self, i: int) -> int:
        """Return the bytes of a mapping."""
        return self.end[i] - self.start[i]

    def group_adjacent(self, mappings: Iterable[int]) -> list[range]:
        """Group adjacent mappings into ranges; `mappings` must be in address order."""
        groups: list[range] = []
        for i in mappings:
            if groups and groups[-1].stop == i and self.end[i - 1] == self.start[i]:
                groups[-1] = range(groups[-1].start, i + 1)
            else:
                groups.append(range(i, i + 1))
        return groups


def plural(n: int, noun: str) -> str:
    """Return a number with its noun: ``1 heap``, ``3 heaps``."""
    return f"{n:,} {noun if n == 1 else noun + 's'}"
