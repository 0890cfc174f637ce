"""The figures of an explanation that are shown, and their tables for ``str()`` and notebooks."""
# ruff: noqa: D102 - the attributes of Explained are those of AddressSpace

from collections.abc import Sequence
from typing import Protocol

from pyreserve._system.report import Report, Table
from pyreserve.procmem.judge.classes import (
    ACCESSIBLE,
    ACCESSIBLE_LABEL,
    LABELS,
    NAMES,
    MemoryClass,
)
from pyreserve.procmem.judge.owners import Owner
from pyreserve.procmem.mappings import Mapping
from pyreserve.units import format_size

CLASS_LABELS = {**dict(zip(NAMES, LABELS, strict=True)), ACCESSIBLE: ACCESSIBLE_LABEL}
_MAX_OWNERS = 12


class Explained(Protocol):
    """The attributes of `pyreserve.procmem.AddressSpace` that are shown."""

    @property
    def pid(self) -> int | None: ...
    @property
    def name(self) -> str: ...
    @property
    def vsz(self) -> int: ...
    @property
    def rss(self) -> int | None: ...
    @property
    def pss(self) -> int | None: ...
    @property
    def uss(self) -> int | None: ...
    @property
    def swap(self) -> int | None: ...
    @property
    def mappings(self) -> int: ...
    @property
    def classes(self) -> tuple[MemoryClass, ...]: ...
    @property
    def owners(self) -> tuple[Owner, ...]: ...
    @property
    def warnings(self) -> tuple[str, ...]: ...
    @property
    def verdict(self) -> str: ...

    def maps(self) -> Sequence[Mapping]:
        """All mappings in address order."""


def report(space: Explained) -> Report:
    """Return the verdict, the warnings, and the sizes by class and by owner."""
    heading = space.name or "a process"
    if space.pid is not None:
        heading += f", pid {space.pid}"
    totals = [
        f"{name} {size_text(size)}"
        for name, size in (
            ("VSZ", space.vsz),
            ("RSS", space.rss),
            ("PSS", space.pss),
            ("USS", space.uss),
            ("swap", space.swap),
        )
    ]
    shown, rest = space.owners[:_MAX_OWNERS], space.owners[_MAX_OWNERS:]
    owners = [(owner.name, owner.size, owner.rss) for owner in shown]
    if rest:
        size, rss = sum(owner.size for owner in rest), sum(owner.rss for owner in rest)
        owners.append((f"{len(rest)} more", size, rss))
    return Report(
        heading,
        (
            space.verdict,
            *(f"Warning: {warning}." for warning in space.warnings),
            f"{', '.join(totals)}, {space.mappings:,} mappings.",
        ),
        (
            Table(
                ("by class", "size", "share", "mappings"),
                [
                    (CLASS_LABELS[name], format_size(size), _share(size, space.vsz), f"{count:,}")
                    for name, size, count in space.classes
                    if size
                ],
            ),
            Table(
                ("by owner", "size", "share", "in memory"),
                [
                    (
                        name,
                        format_size(size),
                        _share(size, space.vsz),
                        size_text(None if space.uss is None else rss),
                    )
                    for name, size, rss in owners
                ],
            ),
        ),
    )


def size_text(nbytes: int | None) -> str:
    """Format a size; ``"?"`` if it is not known."""
    return "?" if nbytes is None else format_size(nbytes)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / (whole or 1):.1f} %"
