"""What can be measured: a cell is a verb, done by a method, on a page kind, at one length.

The words are those of the README; the methods are the system calls that do it:

========  ==================  ===========================================================
verb      method              what one sample is
========  ==================  ===========================================================
reserve   mmap                mmap(PROT_NONE)
commit    mprotect            mprotect of a piece of a larger reservation
commit    mmap-fixed          mmap(MAP_FIXED) of a piece of a larger reservation
grow      mprotect            the next piece, right after what is committed and touched
grow      mmap-fixed          the same by mmap(MAP_FIXED)
guard     madvise             MADV_GUARD_INSTALL in a committed piece, where nothing was touched
guard     mprotect            mprotect(PROT_NONE) there
unguard   madvise, mprotect   the way back
touch     write               the first store into each OS page
touch     read                the first load from each OS page
populate  madvise             MADV_POPULATE_WRITE
collapse  madvise             MADV_COLLAPSE of small pages that are in memory
discard   dontneed, free      MADV_DONTNEED; MADV_FREE (lazy), of touched pages
decommit  mmap-fixed          mmap(MAP_FIXED, PROT_NONE) over touched pages
decommit  mprotect            mprotect(PROT_NONE) alone: they keep memory and charge
decommit  dontneed+mprotect   MADV_DONTNEED, then mprotect(PROT_NONE)
release   untouched, touched  munmap of the whole, nothing or all of it touched
retouch   resident            a store into each OS page, all of them in memory
retouch   after-dontneed      the next store after discard/dontneed
retouch   after-free          the next store after discard/free, not yet taken by the kernel
retouch   after-fork          the next store after a fork: copy on write
recommit  after-mmap-fixed    mprotect after a decommit by that method; likewise
                              after-mprotect and after-dontneed+mprotect
fork      inherit, dontfork   fork(2) with touched pages, without and with MADV_DONTFORK; the
                              fixed part is that of the measuring Python
========  ==================  ===========================================================
"""

from dataclasses import dataclass
from typing import Any

from pyreserve._system.features import hugetlb_free, thp_settings
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.units import format_size

GROUPS: dict[str, tuple[str, ...]] = {
    "get memory": ("reserve", "commit", "grow", "guard", "unguard"),
    "first use": ("touch", "populate", "collapse"),
    "give back": ("discard", "decommit", "release"),
    "use again": ("retouch", "recommit"),
    "fork": ("fork",),
}
"""The verbs as a person thinks of them."""

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
"""The methods of each verb, the one that is meant when none is named first."""

MODES = ("charge", "noreserve")


def _name(size: int) -> str:
    return format_size(size).replace(" ", "")


SMALL = _name(PAGE_SIZE)
"""The name of the page kind that every machine has: the OS page."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One thing to measure.

    Attributes:
        verb, method: see this module's table.
        page_kind: what backs the memory: ``"4KiB"``, ``"64KiB"`` (a transparent huge page of that
            size), ``"2MiB"``, ``"hugetlb-2MiB"``.
        mode: ``"charge"`` or ``"noreserve"``, as of a region.
        nbytes: length of the piece, in bytes.
        threads: how many threads do it at once in one address space, each on a mapping of its own.
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
    """The cells that differ in nothing but their length."""

    verb: str
    method: str
    page_kind: str = SMALL
    mode: str = "charge"
    threads: int = 1

    @classmethod
    def of(cls, cell: Cell) -> "Curve":
        """Return the curve on which a cell lies."""
        return cls(cell.verb, cell.method, cell.page_kind, cell.mode, cell.threads)

    @classmethod
    def named(cls, verb: str, method: str | None, **rest: Any) -> "Curve":
        """Name a curve, by the verb's first method if by none.

        Raises:
            ValueError: there is no such verb, or it has no such method.
        """
        methods = METHODS.get(verb)
        if methods is None:
            msg = f"unknown verb {verb!r}; there are {', '.join(METHODS)}"
            raise ValueError(msg)
        if method is not None and method not in methods:
            msg = f"{verb} has no method {method!r}, but {', '.join(methods)}"
            raise ValueError(msg)
        return cls(verb, method or methods[0], **rest)

    def at(self, nbytes: int) -> Cell:
        """Return the cell of this curve at one length."""
        return Cell(self.verb, self.method, self.page_kind, self.mode, nbytes, self.threads)

    def __str__(self) -> str:
        return f"{self.verb} {self.method}, {in_words(self.page_kind, self.mode, self.threads)}"


def in_words(page_kind: str, mode: str, threads: int) -> str:
    """Say what the cells of a setting have in common."""
    return f"{page_kind} pages, {mode}" + ("" if threads == 1 else f", {threads} threads")


@dataclass(frozen=True, slots=True)
class PageKind:
    """A way to have memory backed.

    Attributes:
        name: as in `Cell.page_kind`.
        size: bytes of such a page.
        sort: ``"small"``, ``"transparent"`` or ``"hugetlb"``.
        next_size: the next larger transparent page that the kernel would prefer where it fits; 0 if
            there is none.
        why_not: why there are none here; None if there are.
    """

    name: str
    size: int
    sort: str
    next_size: int = 0
    why_not: str | None = None


def page_kinds() -> list[PageKind]:
    """Return what this machine backs memory with, or could if it were set so."""
    thp = thp_settings()
    kinds = [PageKind(SMALL, PAGE_SIZE, "small")]
    on = [size for size, setting in thp.items() if setting in {"always", "madvise"}]
    for size in on:
        larger = min((other for other in on if other > size), default=0)
        kinds.append(PageKind(_name(size), size, "transparent", larger))
    largest = max(thp, default=0)
    if largest and largest not in on:
        why = f"transparent huge pages of {format_size(largest)} are switched off (never)"
        kinds.append(PageKind(_name(largest), largest, "transparent", why_not=why))
    for size, free in hugetlb_free().items():
        why_not = None if free else f"no huge page of {format_size(size)} is free in the pool"
        kinds.append(PageKind(f"hugetlb-{_name(size)}", size, "hugetlb", why_not=why_not))
    return kinds
