"""Cells: the operations that can be measured.

A cell is a verb, a method, a page kind, a mode, a length and a number of threads. A method names
the system call, or the state of the memory before it: see `OPERATIONS`.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.machine import thp_settings
from pyreserve.units import format_size


@dataclass(frozen=True, slots=True)
class Operation:
    """What a method does.

    Attributes:
        call: the system call with its flags, as in a program's source.
        sample: the work that one sample times, for people.
    """

    call: str
    sample: str


_ANONYMOUS = "MAP_PRIVATE|MAP_ANONYMOUS"
_RW = "PROT_READ|PROT_WRITE"
_PROTECT, _REVOKE = f"mprotect({_RW})", "mprotect(PROT_NONE)"
_STORE = "page fault (store)"

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("reserve", "mmap"): Operation(
        f"mmap(PROT_NONE, {_ANONYMOUS})", "mapping addresses without access"
    ),
    ("commit", "mprotect"): Operation(_PROTECT, "a piece of a larger reservation"),
    ("commit", "mmap-fixed"): Operation(
        f"mmap({_RW}, {_ANONYMOUS}|MAP_FIXED)", "a piece of a larger reservation"
    ),
    ("grow", "mprotect"): Operation(_PROTECT, "the piece that follows committed, touched memory"),
    ("grow", "mmap-fixed"): Operation(f"mmap({_RW}, {_ANONYMOUS}|MAP_FIXED)", "the same piece"),
    ("guard", "madvise"): Operation(
        "madvise(MADV_GUARD_INSTALL)", "untouched pages inside committed memory"
    ),
    ("guard", "mprotect"): Operation(_REVOKE, "the same pages"),
    ("unguard", "madvise"): Operation("madvise(MADV_GUARD_REMOVE)", "pages guarded by madvise"),
    ("unguard", "mprotect"): Operation(_PROTECT, "pages guarded by mprotect"),
    ("touch", "write"): Operation(_STORE, "the first store to each OS page"),
    ("touch", "read"): Operation("page fault (load)", "the first load from each OS page"),
    ("populate", "madvise"): Operation("madvise(MADV_POPULATE_WRITE)", "committed memory"),
    ("collapse", "madvise"): Operation(
        "madvise(MADV_COLLAPSE)", "resident small pages, made huge pages"
    ),
    ("discard", "dontneed"): Operation("madvise(MADV_DONTNEED)", "touched pages"),
    ("discard", "free"): Operation("madvise(MADV_FREE)", "touched pages"),
    ("decommit", "mmap-fixed"): Operation(
        f"mmap(PROT_NONE, {_ANONYMOUS}|MAP_FIXED)", "a touched piece of a larger reservation"
    ),
    ("decommit", "mprotect"): Operation(
        _REVOKE, "a touched piece; its memory and commit charge stay"
    ),
    ("decommit", "dontneed+mprotect"): Operation(
        f"madvise(MADV_DONTNEED); {_REVOKE}", "a touched piece; its commit charge stays"
    ),
    ("release", "piece"): Operation("munmap()", "a touched piece of a larger reservation"),
    ("release", "untouched"): Operation("munmap()", "a whole mapping, none of it touched"),
    ("retouch", "resident"): Operation("store", "a store to each OS page, all of them resident"),
    ("retouch", "after-dontneed"): Operation(_STORE, "each OS page, after discard dontneed"),
    ("retouch", "after-free"): Operation(
        _STORE, "each OS page, after discard free, before the kernel reclaims it"
    ),
    ("retouch", "after-mmap-fixed"): Operation(_STORE, "each OS page, after recommit"),
    ("retouch", "after-mprotect"): Operation("store", "each OS page, after recommit"),
    ("retouch", "after-dontneed+mprotect"): Operation(_STORE, "each OS page, after recommit"),
    ("retouch", "after-release"): Operation(_STORE, "each OS page, after recommit"),
    ("retouch", "after-fork"): Operation(
        f"{_STORE}, copy on write", "each OS page, while a forked child shares it"
    ),
    ("recommit", "after-mmap-fixed"): Operation(_PROTECT, "after decommit mmap-fixed"),
    ("recommit", "after-mprotect"): Operation(_PROTECT, "after decommit mprotect"),
    ("recommit", "after-dontneed+mprotect"): Operation(
        _PROTECT, "after decommit dontneed+mprotect"
    ),
    ("recommit", "after-release"): Operation(
        f"mmap({_RW}, {_ANONYMOUS}|MAP_FIXED_NOREPLACE)", "the addresses of release piece"
    ),
    ("advise", "hugepage"): Operation(
        "madvise(MADV_HUGEPAGE)", "a mapping that MAP_FIXED or mmap made anew"
    ),
    ("fork", "inherit"): Operation(
        "fork()", "a process with touched pages; the fixed cost is that of the measuring Python"
    ),
    ("fork", "dontfork"): Operation("fork()", "the same, with the pages under MADV_DONTFORK"),
}
"""What each method of each verb does, the default method of a verb first."""

GROUPS: dict[str, tuple[str, ...]] = {
    "get memory": ("reserve", "commit", "grow", "guard", "unguard"),
    "first use": ("touch", "populate", "collapse"),
    "give back": ("discard", "decommit", "release"),
    "use again": ("retouch", "recommit", "advise"),
    "fork": ("fork",),
}
"""The verbs by purpose."""

METHODS: dict[str, tuple[str, ...]] = {
    verb: tuple(method for other, method in OPERATIONS if other == verb)
    for verbs in GROUPS.values()
    for verb in verbs
}
"""The methods of each verb, the default one first."""

MODES = ("charge", "noreserve")


def name_of(size: int) -> str:
    """Return the name of the page kind of a size in bytes."""
    return format_size(size).replace(" ", "")


SMALL = name_of(PAGE_SIZE)
"""Name of the page kind that every machine has: the OS page."""


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """An operation to measure.

    Attributes:
        verb, method: see `OPERATIONS`.
        page_kind: kind of page that backs the memory: ``"4KiB"``, ``"64KiB"`` (a transparent huge
            page of that size), ``"2MiB"``.
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

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; the length is ``bytes``."""
        item = asdict(self)
        return {"bytes": item.pop("nbytes"), **item}

    @property
    def call(self) -> str | None:
        """The system call with its flags; None if the verb or its method is unknown here."""
        operation = OPERATIONS.get((self.verb, self.method))
        if operation is None:
            return None
        more = "|MAP_NORESERVE" if self.mode == "noreserve" else ""
        return operation.call.replace(_ANONYMOUS, _ANONYMOUS + more)

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
        sort: ``"small"`` or ``"transparent"``.
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
        kinds.append(PageKind(name_of(size), size, "transparent", larger))
    largest = max(thp, default=0)
    if largest and largest not in enabled:
        why = f"transparent huge pages of {format_size(largest)} are switched off (never)"
        kinds.append(PageKind(name_of(largest), largest, "transparent", why_not=why))
    return kinds
