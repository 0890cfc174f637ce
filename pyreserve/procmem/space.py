"""A process's address space, explained: one object for the screen, for JSON and for programs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyreserve.layouts import Piece
from pyreserve.procmem.judge import classes, details
from pyreserve.procmem.judge import warnings as concerns
from pyreserve.procmem.judge.classes import MemoryClass
from pyreserve.procmem.judge.owners import UNKNOWN, Owner, ProcessMappings, recognise
from pyreserve.procmem.read.maps import EXECUTE, READ, SHARED, WRITE, escape_invalid_utf8
from pyreserve.procmem.read.snapshot import Capture, capture
from pyreserve.procmem.read.sources import LiveSource, SavedSource, name_exhausted_limit
from pyreserve.units import KiB, format_size

SCHEMA = 1


class Mapping(NamedTuple):
    """One mapping. Addresses in bytes, sizes in KiB.

    Attributes:
        start, end: addresses [start, end).
        perms: as in /proc/PID/maps, such as ``"rw-p"``.
        name: of a file, or what the kernel or the program calls it; may be empty.
        kib: all of it.
        rss_kib: of it, in memory, pages of huge page pools included; 0 if not known.
        class_name: the class of what is not in memory; see `pyreserve.procmem.judge.classes`.
        owner: whose it is, or of the largest part.
    """

    start: int
    end: int
    perms: str
    name: str
    kib: int
    rss_kib: int
    class_name: str
    owner: str


@dataclass(frozen=True)
class AddressSpace:
    r"""See `explain`. Sizes in KiB.

    Attributes:
        pid: the process, None if its files do not say.
        name: its command's name (``comm``); bytes that are no UTF-8 as ``\xNN``.
        vsz_kib: virtual size, VmSize: the sum of ``classes``.
        rss_kib: in memory (Rss; VmRSS if that is all there is); None if not known: none of smaps,
            smaps_rollup and status could be read.
        pss_kib: in memory, what is shared divided by those who share it (Pss); None if not known.
        uss_kib: in memory of this process alone, pages of huge page pools included (Private); None
            if not known.
        swap_kib: in swap (Swap; VmSwap if that is all there is); None if not known, as ``rss_kib``.
        page_tables_kib: what translating the addresses takes, in no other figure (VmPTE); None if
            not known: status could not be read.
        mappings: how many, as vm.max_map_count counts them.
        classes: what every byte of ``vsz_kib`` is; see `pyreserve.procmem.judge.classes`.
        owners: whose it is, most first; what was not recognised is ``"unknown"``.
        details: finer figures; see `pyreserve.procmem.judge.details`. Those of pages are missing
            where there were too many mappings to ask for them.
        ranges: address ranges that are known by name, such as a Go heap's spans, bitmap and arena.
        warnings: what is worth worrying about, in words.
        settled: all was read of one moment.
        missing: the unreadable files among smaps, smaps_rollup, status and limits. Without
            smaps_rollup PSS is the sum of the mappings', each rounded down; without smaps, unless
            pages could be counted, it is not known which mappings are in memory.
    """

    pid: int | None
    name: str
    vsz_kib: int
    rss_kib: int | None
    pss_kib: int | None
    uss_kib: int | None
    swap_kib: int | None
    page_tables_kib: int | None
    mappings: int
    classes: tuple[MemoryClass, ...]
    owners: tuple[Owner, ...]
    details: dict[str, int]
    ranges: tuple[Piece, ...]
    warnings: tuple[str, ...]
    settled: bool
    missing: tuple[str, ...]
    _process: ProcessMappings = field(repr=False, compare=False)
    _kinds: list[int | None] = field(repr=False, compare=False)

    def class_kib(self, name: str) -> int:
        """Return the KiB of one class.

        Raises:
            KeyError: there is none of that name.
        """
        for one in self.classes:
            if one.name == name:
                return one.kib
        raise KeyError(name)

    @property
    def verdict(self) -> str:
        """What the address space is, and whether to worry, in a few sentences."""
        return verdict(self)

    def maps(self) -> list[Mapping]:
        """List all mappings in address order."""
        return [self._mapping(i) for i in range(len(self._kinds))]

    def top(self, n: int) -> list[Mapping]:
        """List the `n` largest mappings, largest first."""
        size = self._process.table.size
        real = (i for i, kind in enumerate(self._kinds) if kind is not None)
        return [self._mapping(i) for i in sorted(real, key=lambda i: (-size[i], i))[: max(0, n)]]

    def _mapping(self, i: int) -> Mapping:
        process, table = self._process, self._process.table
        kind = self._kinds[i]
        class_name = "" if kind is None else classes.NAMES[kind]
        if not process.capture.knows_memory and kind in {classes.UNTOUCHED, classes.FILE}:
            class_name = classes.ACCESSIBLE
        return Mapping(
            start=table.start[i],
            end=table.end[i],
            perms=perms_text(table.perms[i]),
            name=table.names[i],
            kib=(table.end[i] - table.start[i]) // KiB,
            rss_kib=table.private[i] + table.shared[i],
            class_name=class_name,
            owner="kernel" if kind is None else process.owner_of(i),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return what `to_json` writes."""
        return {
            "schema": SCHEMA,
            "pid": self.pid,
            "name": self.name,
            "settled": self.settled,
            "missing": list(self.missing),
            "vsz_kib": self.vsz_kib,
            "rss_kib": self.rss_kib,
            "pss_kib": self.pss_kib,
            "uss_kib": self.uss_kib,
            "swap_kib": self.swap_kib,
            "page_tables_kib": self.page_tables_kib,
            "mappings": self.mappings,
            "classes": [one._asdict() for one in self.classes],
            "owners": [
                {
                    "name": owner.name,
                    "kib": owner.kib,
                    "rss_kib": None if self.uss_kib is None else owner.rss_kib,
                    "no_access_kib": owner.no_access_kib,
                    "mappings": owner.mappings,
                    "evidence": owner.evidence,
                }
                for owner in self.owners
            ],
            "ranges": [
                {
                    "start": f"{piece.start:x}",
                    "end": f"{piece.end:x}",
                    "perms": piece.perms,
                    "name": piece.what,
                    "state": state(piece),
                    "kib": (piece.end - piece.start) // KiB,
                }
                for piece in self.ranges
            ],
            "details_kib": self.details,
            "warnings": list(self.warnings),
            "verdict": self.verdict,
        }

    def to_json(self) -> str:
        """Write what ``pyreserve explain --json`` prints; README.md documents it."""
        import json  # noqa: PLC0415

        return json.dumps(self.to_dict(), indent=2)


def explain(pid: int | None = None, *, path: str | Path | None = None) -> AddressSpace:
    """Explain what a process's address space holds, and of whom.

    Reads /proc/PID/maps, smaps, smaps_rollup, status, limits and cgroup. Where there are ten
    thousand mappings and more, pages are counted through /proc/PID/pagemap (PAGEMAP_SCAN, Linux
    6.7) instead of smaps, if the sums are the kernel's own: some evidence (VmFlags) is then
    missing. To read smaps keeps the process from mapping memory for a moment.

    Args:
        pid: the process; this one by default.
        path: instead of a process, a folder with such files of one, each perhaps ``.gz``, as `save`
            writes them. smaps or maps is required.

    Raises:
        TypeError, ValueError: `pid` is no process number, or both were given.
        NoAddressSpaceError: there is no such process, or it is a zombie or a kernel thread.
        AccessError: it may not be looked into, or /proc is not mounted.
        MapsError: a file makes no sense.
        FileNotFoundError: the folder has neither smaps nor maps.
        OutOfMemoryError: no memory for it; the error names the limit, such as vm.max_map_count.
    """
    source: LiveSource | SavedSource
    if path is not None:
        if pid is not None:
            msg = "pid and path are mutually exclusive"
            raise ValueError(msg)
        source = SavedSource(Path(path))
    else:
        source = LiveSource(pid)
    with name_exhausted_limit():
        return explained(capture(source))


def explained(read: Capture) -> AddressSpace:
    """Explain what was read."""
    known = read.knows_memory
    kinds = classes.rest_classes(read.table)
    totals = classes.totals(read.table, kinds, knows_memory=known)
    process = recognise(read)
    owners = tuple(process.summary())
    vsz = sum(one.kib for one in totals)
    uss = sum(read.table.private)
    resident = uss + sum(read.table.shared) if known else read.rss
    mappings = read.table.user_mappings
    return AddressSpace(
        pid=read.pid,
        name=escape_invalid_utf8(read.facts.get("Name", "")),
        vsz_kib=vsz,
        rss_kib=read.rss,
        pss_kib=read.pss,
        uss_kib=uss if known else None,
        swap_kib=read.swap,
        page_tables_kib=read.status.get("VmPTE"),
        mappings=mappings,
        classes=totals,
        owners=owners,
        details={
            **(details.page_figures(read.table) if read.table.knows_flags else {}),
            **(details.address_figures(read.table, kinds) if known else {}),
            **details.stack_figures(owners, knows_memory=known),
        },
        ranges=tuple(process.ranges),
        warnings=tuple(concerns.warnings(read, vsz, resident, mappings)),
        settled=read.settled,
        missing=read.missing,
        _process=process,
        _kinds=kinds,
    )


def state(piece: Piece) -> str:
    """Return ``"committed"`` or ``"reserved"``."""
    return "reserved" if piece.perms.startswith("---") else "committed"


def perms_text(perms: int) -> str:
    """Write permissions as the kernel does."""
    return "".join(
        letter if perms & bit else "-"
        for letter, bit in (("r", READ), ("w", WRITE), ("x", EXECUTE))
    ) + ("s" if perms & SHARED else "p")


def verdict(space: AddressSpace) -> str:
    """See `AddressSpace.verdict`."""
    kib = {one.name: one.kib for one in space.classes}
    parts = [
        f"{format_size(kib[name] * KiB)} {what}"
        for name, what, least in (
            ("no_access_reserved", "is reserved address space that costs nothing", 1),
            ("accessible_untouched", "may be used and is not, and becomes memory at first use", 10),
            ("file_not_resident", "is of files, read when used", 10),
            ("swapped", "is in swap", 0),
        )
        if kib.get(name) and 100 * kib[name] >= least * space.vsz_kib
    ]
    unread = ""
    if space.rss_kib is None:
        unread = (
            "; how much of it is memory is not known (none of smaps, smaps_rollup and status can "
            "be read)"
        )
    elif classes.ACCESSIBLE in kib:
        unknown = "USS" if space.pss_kib is not None else "PSS, USS"
        parts.append(
            f"{format_size(space.rss_kib * KiB)} is memory (smaps can't be read: {unknown} and "
            "which mappings it is in are not known)"
        )
    else:
        shared = kib["resident_shared"]
        memory = f"{format_size((kib['resident_private'] + shared) * KiB)} is memory"
        if shared:
            memory += f", {format_size(shared * KiB)} of it shared"
        parts.append(memory)
    largest = max(space.owners, key=lambda owner: owner.kib, default=None)
    text = f"VSZ is {format_size(space.vsz_kib * KiB)}"
    text += f"{', of which ' if parts else ''}{'; '.join(parts)}{unread}."
    if largest is not None and largest.name != UNKNOWN and 2 * largest.kib >= space.vsz_kib:
        text += f" {100 * largest.kib / space.vsz_kib:.0f} % is {largest.name}."
    if not space.warnings and not space._process.capture.limits:
        return f"{text} Whether it comes near a limit is not known: no limits were saved with it."
    if not space.warnings:
        return f"{text} No reason to worry: nothing comes near a limit."
    n = len(space.warnings)
    return f"{text} {'One thing is' if n == 1 else f'{n} things are'} worth a look."
