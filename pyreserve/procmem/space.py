"""The explanation of an address space: one object for screen, picture, JSON and programs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyreserve._system.maps import escape_invalid_utf8, perms_text
from pyreserve.layouts import Piece
from pyreserve.procmem.judge import classes, details
from pyreserve.procmem.judge import warnings as concerns
from pyreserve.procmem.judge.classes import MemoryClass
from pyreserve.procmem.judge.owners import UNKNOWN, Owner, ProcessMappings, recognise
from pyreserve.procmem.read.snapshot import Capture, capture
from pyreserve.procmem.read.sources import LiveSource, SavedSource, name_exhausted_limit
from pyreserve.units import KiB, format_size

SCHEMA = 1


class Mapping(NamedTuple):
    """One mapping. Addresses in bytes, sizes in KiB.

    Attributes:
        start, end: addresses [start, end).
        perms: as in /proc/PID/maps, such as ``"rw-p"``.
        name: path of a file, or the name given by kernel or program; may be empty.
        kib: size.
        rss_kib: resident size, pages of huge page pools included; 0 if not known.
        class_name: class of the bytes outside memory; see `pyreserve.procmem.judge.classes`.
        owner: owner of the mapping, or of its largest part.
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
    r"""The explanation of a process's address space; see `explain`. Sizes in KiB.

    Attributes:
        pid: process number; None if saved files do not have it.
        name: command name (``comm``); bytes that are not UTF-8 as ``\xNN``.
        vsz_kib: virtual size (VmSize): the sum of ``classes``.
        rss_kib: resident size (Rss, or else VmRSS); None if none of smaps, smaps_rollup and status
            is readable.
        pss_kib: resident size, shared pages divided by their number of users (Pss); None if not
            known.
        uss_kib: resident size of this process alone, pages of huge page pools included (Private);
            None if not known.
        swap_kib: size in swap (Swap, or else VmSwap); None in the same case as ``rss_kib``.
        page_tables_kib: size of the page tables, in no other figure (VmPTE); None if status is not
            readable.
        mappings: number of mappings, as vm.max_map_count counts them.
        classes: the classes of all bytes of ``vsz_kib``; see `pyreserve.procmem.judge.classes`.
        owners: the owners of all bytes, largest first; unrecognised bytes have ``"unknown"``.
        details: finer figures; see `pyreserve.procmem.judge.details`. Figures of pages are missing
            if pages were counted instead of smaps.
        ranges: address ranges known by name, such as a Go heap's spans, bitmap and arena.
        warnings: limits that are near, and memory that costs more than it should.
        settled: the files show one moment.
        missing: the unreadable files among smaps, smaps_rollup, status and limits. Without
            smaps_rollup PSS is the sum over mappings, each rounded down; without smaps, unless
            pages could be counted, it is not known which mappings are resident.
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
    _rest_classes: list[int | None] = field(repr=False, compare=False)

    def class_kib(self, name: str) -> int:
        """Return the size of a class in KiB.

        Raises:
            KeyError: there is no class of that name.
        """
        for memory_class in self.classes:
            if memory_class.name == name:
                return memory_class.kib
        raise KeyError(name)

    @property
    def verdict(self) -> str:
        """A summary of sizes, the largest owner and warnings, in a few sentences."""
        return verdict(self)

    def maps(self) -> list[Mapping]:
        """List all mappings in address order."""
        return [self._mapping(i) for i in range(len(self._rest_classes))]

    def top(self, n: int) -> list[Mapping]:
        """List the `n` largest mappings, largest first."""
        size = self._process.table.size
        user = (i for i, kind in enumerate(self._rest_classes) if kind is not None)
        return [self._mapping(i) for i in sorted(user, key=lambda i: (-size[i], i))[: max(0, n)]]

    def _mapping(self, i: int) -> Mapping:
        process, table = self._process, self._process.table
        kind = self._rest_classes[i]
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
        """Return the explanation as plain data, as `to_json` writes it."""
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
            "classes": [memory_class._asdict() for memory_class in self.classes],
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
        """Return the JSON that ``pyreserve explain --json`` prints; README.md documents it."""
        import json  # noqa: PLC0415

        return json.dumps(self.to_dict(), indent=2)


def explain(pid: int | None = None, *, path: str | Path | None = None) -> AddressSpace:
    """Explain a process's address space: classes, owners, warnings.

    Reads /proc/PID/maps, smaps, smaps_rollup, status, limits and cgroup. From 10,000 mappings on,
    pages are counted through /proc/PID/pagemap (PAGEMAP_SCAN, Linux 6.7) instead of smaps, if the
    sums match the kernel's totals; VmFlags, which some owners need as evidence, are then missing.
    Reading smaps briefly blocks the process from mapping memory.

    Args:
        pid: process number; this process by default.
        path: a folder with saved files of a process, plain or ``.gz``, as `save` writes them. smaps
            or maps is required.

    Raises:
        TypeError, ValueError: `pid` is not a positive integer, or `pid` and `path` are both given.
        NoAddressSpaceError: there is no such process, or it is a zombie or a kernel thread.
        AccessError: the process may not be read, or /proc is not mounted.
        MapsError: a file is malformed.
        FileNotFoundError: the folder has neither smaps nor maps.
        OutOfMemoryError: memory ran out; the error names the limit, such as vm.max_map_count.
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


def explained(snapshot: Capture) -> AddressSpace:
    """Explain a snapshot."""
    known = snapshot.knows_memory
    rest_classes = classes.rest_classes(snapshot.table)
    totals = classes.totals(snapshot.table, rest_classes, knows_memory=known)
    process = recognise(snapshot)
    owners = tuple(process.summary())
    vsz = sum(memory_class.kib for memory_class in totals)
    uss = sum(snapshot.table.private)
    resident = uss + sum(snapshot.table.shared) if known else snapshot.rss
    mappings = snapshot.table.user_mappings
    return AddressSpace(
        pid=snapshot.pid,
        name=escape_invalid_utf8(snapshot.facts.get("Name", "")),
        vsz_kib=vsz,
        rss_kib=snapshot.rss,
        pss_kib=snapshot.pss,
        uss_kib=uss if known else None,
        swap_kib=snapshot.swap,
        page_tables_kib=snapshot.status.get("VmPTE"),
        mappings=mappings,
        classes=totals,
        owners=owners,
        details={
            **(details.page_figures(snapshot.table) if snapshot.table.knows_flags else {}),
            **(details.address_figures(snapshot.table, rest_classes) if known else {}),
            **details.stack_figures(owners, knows_memory=known),
        },
        ranges=tuple(process.ranges),
        warnings=tuple(concerns.warnings(snapshot, vsz, resident, mappings)),
        settled=snapshot.settled,
        missing=snapshot.missing,
        _process=process,
        _rest_classes=rest_classes,
    )


def state(piece: Piece) -> str:
    """Return the state of a named range: ``"committed"`` or ``"reserved"``."""
    return "reserved" if piece.perms.startswith("---") else "committed"


def verdict(space: AddressSpace) -> str:
    """Return the text of `AddressSpace.verdict`."""
    kib = {memory_class.name: memory_class.kib for memory_class in space.classes}
    parts = [
        f"{format_size(kib[name] * KiB)} {text}"
        for name, text, min_percent in (
            ("no_access_reserved", "is reserved address space that costs nothing", 1),
            ("accessible_untouched", "may be used and is not, and becomes memory at first use", 10),
            ("file_not_resident", "is of files, read when used", 10),
            ("swapped", "is in swap", 0),
        )
        if kib.get(name) and 100 * kib[name] >= min_percent * space.vsz_kib
    ]
    rss_note = ""
    if space.rss_kib is None:
        rss_note = (
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
    text += f"{', of which ' if parts else ''}{'; '.join(parts)}{rss_note}."
    if largest is not None and largest.name != UNKNOWN and 2 * largest.kib >= space.vsz_kib:
        text += f" {100 * largest.kib / space.vsz_kib:.0f} % is {largest.name}."
    if not space.warnings and not space._process.capture.limits:
        return f"{text} Whether it comes near a limit is not known: no limits were saved with it."
    if not space.warnings:
        return f"{text} No reason to worry: nothing comes near a limit."
    n = len(space.warnings)
    return f"{text} {'One thing is' if n == 1 else f'{n} things are'} worth a look."
