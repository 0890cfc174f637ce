"""The screens of ``pyreserve explain`` and ``--diff``."""

import sys
from collections.abc import Iterable
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pyreserve.cli.screen import PlainTable, console_for, printable
from pyreserve.procmem import AddressSpace, Change, Difference, Mapping
from pyreserve.procmem.judge.classes import ACCESSIBLE, ACCESSIBLE_WORDS, NAMES, WORDS
from pyreserve.procmem.judge.owners import UNKNOWN
from pyreserve.procmem.space import state
from pyreserve.units import KiB, format_size

_STYLES = ("dim yellow", "cyan", "bold red", "magenta", "blue", "red", "dim")
_CLASSES = {name: (words, style) for name, words, style in zip(NAMES, WORDS, _STYLES, strict=True)}
_CLASSES[ACCESSIBLE] = ACCESSIBLE_WORDS, "cyan"
_UNKNOWN_SIZE = "?"
_BAR, _MIN_BAR = 20, 5  # columns
_MIN_NAME = 12
_GAP = 2
_MAX_OWNERS = 12


def show(space: AddressSpace, top: int, *, all_maps: bool) -> None:
    """Print the explanation, with the `top` largest mappings or all of them.

    Without a standard output nothing is printed.
    """
    if sys.stdout is None:
        return
    console = console_for()
    pid = f"pid {space.pid} " if space.pid is not None else ""
    name = printable(space.name, console) or "?"
    _line(console, Text.assemble(("pyreserve explain", "bold"), f"  {pid}({name})"))
    console.print()
    console.print(Text(printable(space.verdict, console)))
    for warning in space.warnings:
        console.print(Text.assemble(("warning: ", "bold yellow"), printable(warning, console)))
    console.print()
    console.print(_classes(space, console))
    console.print()
    _line(
        console,
        Text(
            f"RSS {_kib(space.rss_kib)}, PSS {_kib(space.pss_kib)}, USS {_kib(space.uss_kib)}, "
            f"swap {_kib(space.swap_kib)}, page tables {_kib(space.page_tables_kib)}"
        ),
    )
    _details(console, space.details)
    console.print()
    console.print(_owners(space, console))
    _evidence(space, console)
    if space.ranges:
        console.print()
        console.print(_ranges(space, console))
    mappings = space.maps() if all_maps else space.top(top)
    if mappings:
        console.print()
        title = "all mappings" if all_maps else f"largest of {space.mappings:,} mappings"
        title += ": addresses, access, size, in memory, class of the rest, owner"
        _line(console, Text(title, "bold"))
        for row in _mappings(space, mappings, console):
            _line(console, row)


def show_difference(difference: Difference) -> None:
    """Print the changes between two explanations; without a standard output print nothing."""
    if sys.stdout is None:
        return
    console = console_for()
    console.print(Text(printable(difference.verdict, console)))
    if not difference.same_process:
        console.print(Text("The two files describe different processes.", "yellow"))
    for title, changes in (
        ("totals", [change for change in difference.totals if change.by]),
        ("by class", difference.classes),
        ("addresses by owner", difference.owners),
        ("memory by owner", difference.owners_resident),
    ):
        if changes:
            console.print()
            console.print(_changes(title, changes, console))


def _line(console: Console, text: Text) -> None:
    """Print a line without wrapping or cutting it, so that piped output can be searched."""
    console.print(text, soft_wrap=True)


def _kib(kib: int | None) -> str:
    return _UNKNOWN_SIZE if kib is None else format_size(kib * KiB)


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    if part and share < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if part < whole and share >= 99.95 else f"{share:.1f} %"


def _bar(part: int, whole: int, width: int, style: str, console: Console) -> Text:
    """Draw a bar in eighth blocks (in ASCII: #); any non-zero share shows at least one."""
    blocks = "" if console.options.ascii_only else "▏▎▍▌▋▊▉█"
    steps = len(blocks) or 1
    full, rest = divmod(max(1, round(steps * width * part / whole)) if part and whole else 0, steps)
    return Text((blocks[-1:] or "#") * full + (blocks[rest - 1] if rest else ""), style)


def _table() -> Table:
    return PlainTable(_GAP)


def _column(
    table: Table,
    console: Console,
    title: str = "",
    *,
    right: bool = False,
    width: int | None = None,
) -> None:
    """Add a column of single lines, cut at its width; in ASCII without rich's ellipsis."""
    table.add_column(
        title,
        justify="right" if right else "left",
        no_wrap=True,
        width=width,
        overflow="crop" if console.options.ascii_only else "ellipsis",
    )


class _Row(NamedTuple):
    """A row of `_shares`: a name, its size and the text of the last column."""

    name: str
    kib: int
    note: str
    style: str = ""
    bar: str | None = None
    """The style of the bar; None draws no bar."""


def _shares(titles: tuple[str, str], rows: list[_Row], whole: int, console: Console) -> Table:
    """Lay out sizes and shares. On a narrow console first the bars get shorter, then the names."""
    name_title, note_title = titles
    headings = ("size", "share", note_title)
    cells = [(_kib(row.kib), _share(row.kib, whole), row.note) for row in rows]
    figures = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    left = console.width - sum(figures) - _GAP * len(figures)
    longest = max(len(name_title), *(len(row.name) for row in rows))
    bar = min(_BAR, left - longest - _GAP)
    table = _table()
    _column(table, console, name_title, width=max(_MIN_NAME, min(longest, left)))
    for title, width in zip(headings, figures, strict=True):
        _column(table, console, title, right=True, width=width)
    if bar >= _MIN_BAR:
        _column(table, console, width=bar)
    for row, (size, share, note) in zip(rows, cells, strict=True):
        drawn = [] if row.bar is None else [_bar(row.kib, whole, bar, row.bar, console)]
        table.add_row(
            Text(row.name, row.bar or ""),
            size,
            share,
            note,
            *(drawn if bar >= _MIN_BAR else []),
            style=row.style,
        )
    return table


def _classes(space: AddressSpace, console: Console) -> Table:
    rows = [
        _Row(_CLASSES[item.name][0], item.kib, f"{item.mappings:,}", bar=_CLASSES[item.name][1])
        for item in space.classes
        if item.kib
    ]
    total = _Row("VSZ", space.vsz_kib, f"{space.mappings:,}", style="bold")
    return _shares(("by class", "mappings"), [*rows, total], space.vsz_kib, console)


def _in_memory(space: AddressSpace, kib: int) -> str:
    return _UNKNOWN_SIZE if space.uss_kib is None else _kib(kib)


def _owners(space: AddressSpace, console: Console) -> Table:
    rows = [
        _Row(
            printable(owner.name, console),
            owner.kib,
            _in_memory(space, owner.rss_kib),
            bar="dim" if owner.name == UNKNOWN else "green",
        )
        for owner in space.owners[:_MAX_OWNERS]
    ]
    rest = space.owners[len(rows) :]
    if rest:
        kib = sum(owner.kib for owner in rest)
        resident = _in_memory(space, sum(owner.rss_kib for owner in rest))
        rows.append(_Row(f"{len(rest)} more", kib, resident))
    return _shares(("by owner", "in memory"), rows, space.vsz_kib, console)


def _evidence(space: AddressSpace, console: Console) -> None:
    """Print how the owners of at least 1 % of the addresses or of the memory were recognised."""
    resident = sum(owner.rss_kib for owner in space.owners)
    for owner in space.owners:
        if owner.evidence and (
            100 * owner.kib >= space.vsz_kib or 100 * owner.rss_kib >= max(1, resident)
        ):
            console.print(Text(printable(f"{owner.name}: {owner.evidence}", console), "dim"))


def _details(console: Console, details: dict[str, int]) -> None:
    """Print how much memory is dirty, in huge pages and so on, omitting zeros."""
    huge = sum(details.get(name, 0) for name in ("anon_huge", "shmem_huge", "file_huge"))
    figures = (
        (details.get("dirty", 0), "dirty"),
        (huge, "in transparent huge pages"),
        (details.get("hugetlb", 0), "in hugetlb pages"),
        (details.get("lazy_free", 0), "lazily discarded"),
        (details.get("locked", 0), "locked"),
        (details.get("no_access_resident", 0), "without access"),
        (details.get("stacks_resident", 0), "in stacks"),
    )
    parts = [f"{_kib(kib)} {label}" for kib, label in figures if kib]
    if parts:
        console.print(Text(f"Of the memory: {', '.join(parts)}"))


def _ranges(space: AddressSpace, console: Console) -> Table:
    table = _table()
    table.show_header = False
    for i in range(4):
        _column(table, console, right=i == 1)
    for piece in space.ranges:
        reserved = state(piece) == "reserved"
        table.add_row(
            f"{piece.start:08x}-{piece.end:08x}",
            format_size(piece.end - piece.start),
            piece.what,
            state(piece),
            style="dim yellow" if reserved else "green",
        )
    return table


def _mappings(space: AddressSpace, mappings: list[Mapping], console: Console) -> Iterable[Text]:
    addresses = [f"{mapping.start:08x}-{mapping.end:08x}" for mapping in mappings]
    width = max(map(len, addresses))
    for address, mapping in zip(addresses, mappings, strict=True):
        name = printable(mapping.name, console)
        words, style = _CLASSES[mapping.class_name or "special_pfn"]
        if mapping.rss_kib == mapping.kib:
            words, style = "in memory", _CLASSES["resident_private"][1]
        yield Text.assemble(
            f"{address:{width}} {mapping.perms} {_kib(mapping.kib):>10} "
            f"{_in_memory(space, mapping.rss_kib):>10}  ",
            (f"{words:<23}  ", style),
            printable(mapping.owner, console),
            f"  {name}" if name else "",
        )


def _changes(title: str, changes: Iterable[Change], console: Console) -> Table:
    table = _table()
    _column(table, console, title)
    for column in ("before", "after", "change"):
        _column(table, console, column, right=True)
    for change in changes:
        form = "{:,}".format if change.name == "mappings" else _kib
        name = _CLASSES[change.name][0] if change.name in _CLASSES else change.name
        table.add_row(
            printable(name.removesuffix("_kib").replace("_", " "), console),
            form(change.old),
            form(change.new),
            f"{'+' if change.by > 0 else '-'}{form(abs(change.by))}",
            style="yellow" if change.by > 0 else "green",
        )
    return table
