"""The explanation of an address space: one object for screen, picture, JSON and programs."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pyreserve._system.maps import escape_invalid_utf8
from pyreserve.procmem.judge import classes, details
from pyreserve.procmem.judge import warnings as concerns
from pyreserve.procmem.judge.classes import MemoryClass
from pyreserve.procmem.judge.owners import UNKNOWN, NamedRange, Owner, owners, recognise
from pyreserve.procmem.mappings import Mapping, Mappings
from pyreserve.procmem.read.snapshot import Capture, capture
from pyreserve.procmem.read.sources import LiveSource, SavedSource, name_exhausted_limit
from pyreserve.procmem.show.explained import report
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure

SCHEMA = 1


@dataclass(frozen=True)
class AddressSpace:
    r"""The explanation of a process's address space; see `explain`. Sizes in bytes.

    ``str()`` gives a summary with tables of classes and owners, in a notebook as HTML.

    Attributes:
        pid: process number; None if saved files do not have it.
        name: command name (``comm``); bytes that are not UTF-8 as ``\xNN``.
        vsz: virtual size (VmSize): the sum of ``classes``.
        rss: resident size (Rss, or else VmRSS); None if none of smaps, smaps_rollup and status
            is readable.
        pss: resident size, shared pages divided by their number of users (Pss); None if not
            known.
        uss: resident size of this process alone, pages of huge page pools included (Private);
            None if not known.
        swap: size in swap (Swap, or else VmSwap); None in the same case as ``rss``.
        page_tables: size of the page tables, in no other figure (VmPTE); None if status is not
            readable.
        mappings: number of mappings, as vm.max_map_count counts them.
        classes: the classes of all bytes of ``vsz``; see `pyreserve.procmem.judge.classes`.
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
    vsz: int
    rss: int | None
    pss: int | None
    uss: int | None
    swap: int | None
    page_tables: int | None
    mappings: int
    classes: tuple[MemoryClass, ...]
    owners: tuple[Owner, ...]
    details: dict[str, int]
    ranges: tuple[NamedRange, ...]
    warnings: tuple[str, ...]
    settled: bool
    missing: tuple[str, ...]
    _mappings: Mappings = field(repr=False, compare=False)

    def class_size(self, name: str) -> int:
        """Return the size of a class in bytes.

        Raises:
            KeyError: there is no class of that name.
        """
        for memory_class in self.classes:
            if memory_class.name == name:
                return memory_class.size
        raise KeyError(name)

    @property
    def verdict(self) -> str:
        """A summary of sizes, the largest owner and warnings, in a few sentences."""
        return verdict(self)

    def maps(self) -> list[Mapping]:
        """List all mappings in address order."""
        return list(self._mappings)

    def top(self, n: int) -> list[Mapping]:
        """List the `n` largest mappings, largest first."""
        return self._mappings.largest(n)

    def plot(self, path: "str | Path | None" = None) -> "Figure":
        """Draw the picture of ``pyreserve explain --plot``; also write it to a file if given.

        Raises:
            ImportError: matplotlib is missing (extra ``plot``).
            MapsError: it is not known which mappings are resident (smaps can't be read).
            ValueError: the suffix of `path` is neither ``.png`` nor ``.svg``.
            OSError: the file can't be written.
        """
        from pyreserve.procmem.show.picture import draw  # noqa: PLC0415 - slow to import

        return draw(self, path)

    def __str__(self) -> str:
        return report(self).text()

    def _repr_html_(self) -> str:
        return report(self).html()

    def to_dict(self) -> dict[str, Any]:
        """Return the explanation as plain data, as `to_json` writes it."""
        return {
            "schema": SCHEMA,
            "pid": self.pid,
            "name": self.name,
            "settled": self.settled,
            "missing": list(self.missing),
            "vsz_kib": self.vsz // KiB,
            "rss_kib": _kib(self.rss),
            "pss_kib": _kib(self.pss),
            "uss_kib": _kib(self.uss),
            "swap_kib": _kib(self.swap),
            "page_tables_kib": _kib(self.page_tables),
            "mappings": self.mappings,
            "classes": [
                {"name": name, "kib": size // KiB, "mappings": mappings}
                for name, size, mappings in self.classes
            ],
            "owners": [
                {
                    "name": owner.name,
                    "kib": owner.size // KiB,
                    "rss_kib": None if self.uss is None else owner.rss // KiB,
                    "no_access_kib": owner.no_access // KiB,
                    "mappings": owner.mappings,
                    "evidence": owner.evidence,
                }
                for owner in self.owners
            ],
            "ranges": [
                {
                    "start": f"{named.start:x}",
                    "end": f"{named.end:x}",
                    "perms": named.perms,
                    "name": named.name,
                    "state": named.state,
                    "kib": named.size // KiB,
                }
                for named in self.ranges
            ],
            "details_kib": {name: size // KiB for name, size in self.details.items()},
            "warnings": list(self.warnings),
            "verdict": self.verdict,
        }

    def to_json(self) -> str:
        """Return the JSON of ``pyreserve explain --json``; see docs/reference/json.md."""
        import json  # noqa: PLC0415

        return json.dumps(self.to_dict(), indent=2)


def explain(pid: int | None = None, *, path: "str | Path | None" = None) -> AddressSpace:
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
        source = SavedSource(path)
    else:
        source = LiveSource(pid)
    with name_exhausted_limit():
        return explained(capture(source))


def explained(snapshot: Capture) -> AddressSpace:
    """Explain a snapshot."""
    table, knows_memory = snapshot.table, snapshot.knows_memory
    rest_classes = classes.rest_classes(table)
    totals = classes.totals(table, rest_classes, knows_memory=knows_memory)
    claims = recognise(snapshot)
    all_owners = owners(table, claims)
    vsz = sum(memory_class.size for memory_class in totals)
    rss = _bytes(snapshot.rss)
    uss = sum(table.private) * KiB
    resident = uss + sum(table.shared) * KiB if knows_memory else rss
    return AddressSpace(
        pid=snapshot.pid,
        name=escape_invalid_utf8(snapshot.facts.get("Name", "")),
        vsz=vsz,
        rss=rss,
        pss=_bytes(snapshot.pss),
        uss=uss if knows_memory else None,
        swap=_bytes(snapshot.swap),
        page_tables=_bytes(snapshot.status.get("VmPTE")),
        mappings=table.user_mappings,
        classes=totals,
        owners=all_owners,
        details={
            **(details.page_figures(table) if table.knows_flags else {}),
            **(details.address_figures(table, rest_classes) if knows_memory else {}),
            **details.stack_figures(all_owners, knows_memory=knows_memory),
        },
        ranges=tuple(claims.ranges),
        warnings=tuple(concerns.warnings(snapshot, vsz, resident, table.user_mappings)),
        settled=snapshot.settled,
        missing=snapshot.missing,
        _mappings=Mappings(table, claims, rest_classes, knows_memory=knows_memory),
    )


def _bytes(kib: int | None) -> int | None:
    return None if kib is None else kib * KiB


def _kib(nbytes: int | None) -> int | None:
    return None if nbytes is None else nbytes // KiB


def verdict(space: AddressSpace) -> str:
    """Return the text of `AddressSpace.verdict`."""
    sizes = {memory_class.name: memory_class.size for memory_class in space.classes}
    parts = [
        f"{format_size(sizes[name])} {text}"
        for name, text, min_percent in (
            ("no_access_reserved", "is reserved address space that costs nothing", 1),
            (
                "accessible_untouched",
                "is accessible and unused, and becomes memory at first use",
                10,
            ),
            ("file_not_resident", "is mapped from files and read when used", 10),
            ("swapped", "is in swap", 0),
        )
        if sizes.get(name) and 100 * sizes[name] >= min_percent * space.vsz
    ]
    rss_note = ""
    if space.rss is None:
        rss_note = (
            "; how much of it is memory is not known (none of smaps, smaps_rollup and status can "
            "be read)"
        )
    elif classes.ACCESSIBLE in sizes:
        unknown = "USS" if space.pss is not None else "PSS, USS"
        parts.append(
            f"{format_size(space.rss)} is memory (smaps can't be read: {unknown} and "
            "which mappings it is in are not known)"
        )
    else:
        shared = sizes["resident_shared"]
        memory = f"{format_size(sizes['resident_private'] + shared)} is memory"
        if shared:
            memory += f", {format_size(shared)} of it shared"
        parts.append(memory)
    largest = max(space.owners, key=lambda owner: owner.size, default=None)
    text = f"VSZ is {format_size(space.vsz)}"
    text += f"{', of which ' if parts else ''}{'; '.join(parts)}{rss_note}."
    if largest is not None and largest.name != UNKNOWN and 2 * largest.size >= space.vsz:
        text += f" Largest owner: {largest.name}, {100 * largest.size / space.vsz:.0f} %."
    if not space.warnings and "limits" in space.missing:
        return f"{text} Whether it comes near a limit is not known: no limits were saved with it."
    if not space.warnings:
        return f"{text} No reason to worry: nothing comes near a limit."
    n = len(space.warnings)
    return f"{text} {'One thing is' if n == 1 else f'{n} things are'} worth a look."
