"""Cells: the operations that can be measured.

A cell is a verb, a method, a page kind, a mode, a length and a number of threads. A method names
the system call, or the state of the memory before it:

========  ==================  ===========================================================
verb      method              one sample
========  ==================  ===========================================================
reserve   mmap                mmap(PROT_NONE)
commit    mprotect            mprotect of a piece of a larger reservation
commit    mmap-fixed          mmap(MAP_FIXED) of a piece of a larger reservation
grow      mprotect            mprotect of the piece that follows committed, touched memory
grow      mmap-fixed          mmap(MAP_FIXED) of that piece
guard     madvise             MADV_GUARD_INSTALL on untouched pages inside committed memory
guard     mprotect            mprotect(PROT_NONE) on such pages
unguard   madvise, mprotect   MADV_GUARD_REMOVE; mprotect back to read and write
touch     write               the first store to each OS page
touch     read                the first load from each OS page
populate  madvise             MADV_POPULATE_WRITE
collapse  madvise             MADV_COLLAPSE of resident small pages
discard   dontneed, free      MADV_DONTNEED; MADV_FREE (lazy), on touched pages
decommit  mmap-fixed          mmap(MAP_FIXED, PROT_NONE) over touched pages
decommit  mprotect            mprotect(PROT_NONE) alone: memory and commit charge stay
decommit  dontneed+mprotect   MADV_DONTNEED, then mprotect(PROT_NONE)
release   untouched, touched  munmap of the whole mapping, none or all of it touched
retouch   resident            a store to each OS page, all of them resident
retouch   after-dontneed      the first store to each OS page after discard/dontneed
retouch   after-free          the same after discard/free, before the kernel reclaims it
retouch   after-fork          the same after a fork: copy on write
recommit  after-mmap-fixed    mprotect after a decommit by that method; the same for
                              after-mprotect and after-dontneed+mprotect
fork      inherit, dontfork   fork(2) with touched pages, without and with MADV_DONTFORK; the
                              fixed cost is that of forking the measuring Python process
========  ==================  ===========================================================
"""

from dataclasses import dataclass
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.machine import hugetlb_free, thp_settings
from pyreserve.units import format_size

GROUPS: dict[str, tuple[str, ...]] = {
    "get memory": ("reserve", "commit", "grow", "guard", "unguard"),
    "first use": ("touch", "populate", "collapse"),
    "give back": ("discard", "decommit", "release"),
    "use again": ("retouch", "recommit"),
    "fork": ("fork",),
}
"""The verbs by purpose."""

METHODS: dict[str, tuple[str, ...]] = {
    "reserve": ("mmap",),
    "commit": ("mprotect", "mmap-fixed"),
    "grow": ("mprotect", "mmap-fixed"),
    "guard": ("madvise", "mprotect"),
    "unguard": ("madvise", "mprotect"),
    "touch": ("write", "read"),
    "populate": ("madvise",),
    "collapse": ("madvise",),
    "discard": ("dontneed", "free"),
    "decommit": ("mmap-fixed", "mprotect", "dontneed+mprotect"),
    "release": ("touched", "untouched"),
    "retouch": ("after-dontneed", "after-free", "resident", "after-fork"),
    "recommit": ("after-mmap-fixed", "after-mprotect", "after-dontneed+mprotect"),
    "fork": ("inherit", "dontfork"),
}
"""The methods of each verb, the default one first."""

MODES = ("charge", "noreserve")


def _name(size: int) -> str:
    return format_size(size).replace(" ", "")


SMALL = _name(PAGE_SIZE)
"""Name of the page kind that every machine has: the OS page."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """An operation to measure.

    Attributes:
        verb, method: see this module's table.
        page_kind: kind of page that backs the memory: ``"4KiB"``, ``"64KiB"`` (a transparent huge
            page of that size), ``"2MiB"``, ``"hugetlb-2MiB"``.
        mode: ``"charge"`` or ``"noreserve"``, as for a region.
        nbytes: length of the piece, in bytes.
        threads: number of threads that run it at once in one address space, each on its own
            mapping.
    """

    verb: str
    method: str
    page_kind: str
    mode: str
    nbytes: int
    threads: int = 1

    @property
    def pages(self) -> int:
        """Length in OS pages."""
        return self.nbytes // PAGE_SIZE

    def __str__(self) -> str:
        return f"{Curve.of(self)}, {format_size(self.nbytes)}"


@dataclass(frozen=True, slots=True, order=True)
class Curve:
    """The cells that differ only in length."""

    verb: str
    method: str
    page_kind: str = SMALL
    mode: str = "charge"
    threads: int = 1

    @classmethod
    def of(cls, cell: Cell) -> "Curve":
        """Return the curve that a cell belongs to."""
        return cls(cell.verb, cell.method, cell.page_kind, cell.mode, cell.threads)

    @classmethod
    def named(cls, verb: str, method: str | None, **rest: Any) -> "Curve":
        """Return the curve of a verb and a method; without a method, of the verb's first one.

        Raises:
            ValueError: the verb is unknown, or does not have the method.
        """
        methods = METHODS.get(verb)
        if methods is None:
            msg = f"verb must be one of {', '.join(METHODS)}, got {verb!r}"
            raise ValueError(msg)
        if method is not None and method not in methods:
            msg = f"method of {verb} must be one of {', '.join(methods)}, got {method!r}"
            raise ValueError(msg)
        return cls(verb, method or methods[0], **rest)

    def at(self, nbytes: int) -> Cell:
        """Return the cell of this curve at one length."""
        return Cell(self.verb, self.method, self.page_kind, self.mode, nbytes, self.threads)

    def __str__(self) -> str:
        setting = describe_setting(self.page_kind, self.mode, self.threads)
        return f"{self.verb} {self.method}, {setting}"


def describe_setting(page_kind: str, mode: str, threads: int) -> str:
    """Return a description of page kind, mode and threads for people."""
    return f"{page_kind} pages, {mode}" + ("" if threads == 1 else f", {threads} threads")


@dataclass(frozen=True, slots=True)
class PageKind:
    """A kind of page that can back memory.

    Attributes:
        name: as in `Cell.page_kind`.
        size: bytes of a page.
        sort: ``"small"``, ``"transparent"`` or ``"hugetlb"``.
        next_size: bytes of the next larger transparent page, which the kernel prefers where it
            fits; 0 if there is none.
        why_not: why this machine has no such pages; None if it has.
    """

    name: str
    size: int
    sort: str
    next_size: int = 0
    why_not: str | None = None


def page_kinds() -> list[PageKind]:
    """Return the page kinds of this machine, including those that its settings disable."""
    thp = thp_settings()
    kinds = [PageKind(SMALL, PAGE_SIZE, "small")]
    enabled = [size for size, setting in thp.items() if setting in {"always", "madvise"}]
    for size in enabled:
        larger = min((other for other in enabled if other > size), default=0)
        kinds.append(PageKind(_name(size), size, "transparent", larger))
    largest = max(thp, default=0)
    if largest and largest not in enabled:
        why = f"transparent huge pages of {format_size(largest)} are switched off (never)"
        kinds.append(PageKind(_name(largest), largest, "transparent", why_not=why))
    for size, free in hugetlb_free().items():
        why_not = None if free else f"no huge page of {format_size(size)} is free in the pool"
        kinds.append(PageKind(f"hugetlb-{_name(size)}", size, "hugetlb", why_not=why_not))
    return kinds
