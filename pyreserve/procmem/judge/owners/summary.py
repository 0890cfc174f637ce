"""The sizes of each owner, added up from the claims."""

from typing import NamedTuple

from pyreserve._system.maps import EXECUTE, READ, WRITE, MapTable, escape_invalid_utf8
from pyreserve.procmem.judge.owners.claims import UNKNOWN, Claims, Part
from pyreserve.units import KiB

_RWX = READ | WRITE | EXECUTE


class Owner(NamedTuple):
    """The sizes of one owner in bytes, and the evidence that it was recognised by.

    Attributes:
        name: such as ``"thread stacks"``; ``"unknown"`` for mappings without a recognised owner.
        size: total size.
        rss: resident size, pages of huge page pools included; 0 if not known.
        no_access: size that is neither readable nor writable nor executable, and not resident.
        mappings: number of mappings that the owner has or shares.
        evidence: a sentence about how the owner was recognised.
    """

    name: str
    size: int = 0
    rss: int = 0
    no_access: int = 0
    mappings: int = 0
    evidence: str = ""


class _Sums:
    """The sizes of an owner while they are added up, in KiB as in the table."""

    def __init__(self) -> None:
        self.size = self.rss = self.no_access = self.mappings = 0


def owners(table: MapTable, claims: Claims) -> tuple[Owner, ...]:
    """Return all owners, largest first. Every byte except ``[vsyscall]`` has an owner."""
    sums: dict[str, _Sums] = {}
    claimed = [(i, name) for i, name in enumerate(claims.whole) if name]
    for i, name in claimed:
        owner = sums.get(name)
        if owner is None:
            owner = sums[name] = _Sums()
        owner.size += table.size[i]
        owner.rss += table.private[i] + table.shared[i]
        owner.no_access += 0 if table.perms[i] & _RWX else table.rest[i]
        owner.mappings += 1
    unknown = sums.setdefault(UNKNOWN, _Sums())
    unknown.size += sum(table.size) - sum(table.size[i] for i, _ in claimed)
    resident = sum(table.private) + sum(table.shared)
    unknown.rss += resident - sum(table.private[i] + table.shared[i] for i, _ in claimed)
    unknown.no_access += sum(
        [
            rest
            for rest, perms in zip(table.rest, table.perms, strict=True)
            if rest and not perms & _RWX
        ]
    ) - sum(table.rest[i] for i, _ in claimed if not table.perms[i] & _RWX)
    unknown.mappings += table.user_mappings - len(claimed)
    for i, parts in claims.parts.items():
        _divide(table, i, parts, sums)
    result = [
        Owner(
            name,
            owner.size * KiB,
            owner.rss * KiB,
            owner.no_access * KiB,
            owner.mappings,
            escape_invalid_utf8(claims.evidence.get(name, "")),
        )
        for name, owner in sums.items()
        if owner.size
    ]
    return tuple(sorted(result, key=lambda owner: (-owner.size, owner.name)))


def _divide(table: MapTable, i: int, parts: list[Part], sums: dict[str, _Sums]) -> None:
    """Move parts of a mapping from unknown to their owners.

    Resident bytes go to the largest part: their place in the mapping is not known.
    """
    unknown = sums[UNKNOWN]
    unknown.mappings -= 1
    whole = table.size[i]
    no_access = 0 if table.perms[i] & _RWX else table.rest[i]
    rss = table.private[i] + table.shared[i]
    unknown.rss -= rss
    sizes: dict[str, int] = {}
    for start, end, name in parts:
        sizes[name] = sizes.get(name, 0) + (end - start) // KiB
    left = whole - sum(sizes.values())
    unknown.size -= whole
    unknown.no_access -= no_access
    if left:
        sizes[UNKNOWN] = left
    for name, size in sizes.items():
        owner = sums.setdefault(name, _Sums())
        owner.size += size
        owner.mappings += 1
        owner.no_access += no_access * size // whole
    sums[max(sizes, key=lambda name: sizes[name])].rss += rss
