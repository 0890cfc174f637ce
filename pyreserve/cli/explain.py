"""``pyreserve explain``: explain an address space, live, saved, drawn, watched or compared."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

import pyreserve
from pyreserve._system import proc
from pyreserve.cli.console import (
    Command,
    Output,
    OutputFile,
    Picture,
    Seconds,
    completions,
    output_options,
)
from pyreserve.units import format_size

if TYPE_CHECKING:
    from rich.table import Table

    import pyreserve.procmem.comparison
    import pyreserve.procmem.judge.owners
    import pyreserve.procmem.show.explained
    from pyreserve.cli.screen import Screen
    from pyreserve.procmem import AddressSpace, Difference, Mapping

# The colours of the classes.
_STYLES = {
    "no_access_reserved": "dim yellow",
    "accessible": "cyan",
    "accessible_untouched": "cyan",
    "resident_private": "bold red",
    "resident_shared": "magenta",
    "file_not_resident": "blue",
    "swapped": "red",
    "special_pfn": "dim",
}
_BAR, _MIN_BAR = 20, 5  # columns
_MIN_NAME = 12
_GAP = 2
_MAX_OWNERS = 12


def _complete_pid(_: click.Context, __: click.Parameter, incomplete: str) -> list[Any]:
    return completions(_processes(), incomplete)


def _processes() -> Iterator[tuple[str, str]]:
    """Yield the PID and name of each process that this user may read; kernel threads have none."""
    with suppress(OSError):  # no /proc
        for pid in proc.processes():
            with suppress(OSError):  # it has ended, or belongs to another user
                if proc.has_mappings(pid):
                    yield str(pid), proc.command_name(pid)


_PATH = click.Path(path_type=Path)


@click.command(
    cls=Command,
    examples=(
        ("pyreserve explain 1234", "what the address space of process 1234 holds"),
        ("pyreserve explain 1234 --plot space.png", "also as a picture"),
        ("pyreserve explain 1234 --watch 5 --csv sizes.csv", "its sizes, every 5 seconds"),
        ("pyreserve explain 1234 --save kept", "keep its files; explain them anywhere:"),
        ("pyreserve explain --from kept --maps", "all mappings of the saved process"),
        ("pyreserve explain 1234 --json --output old.json", "the explanation for programs"),
        ("pyreserve explain --diff old.json new.json", "what changed between two of them"),
    ),
)
@click.argument("pid", type=int, required=False, shell_complete=_complete_pid)
@click.option(
    "--top",
    type=click.IntRange(min=0),
    metavar="N",
    default=10,
    help="List the N largest mappings; by default 10.",
)
@click.option("--maps", is_flag=True, help="List all mappings.")
@click.option(
    "--watch",
    "interval",
    type=Seconds(),
    is_flag=False,
    flag_value="1",
    metavar="[SECONDS]",
    help="Show VSZ, reserved, committed, RSS and PSS over time, every second by default. q or "
    "Ctrl-C ends it.",
)
@click.option(
    "--csv", type=OutputFile(), metavar="FILE", help="With --watch: write the samples to FILE."
)
@click.option(
    "--plot", type=Picture(), metavar="FILE.png|.svg", help="Draw the blocks of the address space."
)
@click.option(
    "--from",
    "folder",
    type=_PATH,
    metavar="DIR",
    help="Explain saved files of /proc/PID (maps, smaps, ...).",
)
@click.option(
    "--save", type=_PATH, metavar="DIR", help="Save the files of /proc/PID in DIR, for --from."
)
@click.option(
    "--diff",
    type=_PATH,
    nargs=2,
    metavar="A.json B.json",
    help="Compare two files written by --json --output.",
)
@output_options
def command(
    pid: int | None,
    top: int,
    maps: bool,
    interval: float | None,
    csv: Path | None,
    plot: Path | None,
    folder: Path | None,
    save: Path | None,
    diff: tuple[Path, Path] | None,
    as_json: bool,
    output_file: Path | None,
) -> None:
    """Explain a process's address space.

    PID is the process; by default this command itself. Each byte of VSZ is counted in one class, by
    its cost, and for one owner, which reserved it. Warnings name the limits that the process comes
    near.
    """
    outputs = {
        "--json": as_json,
        "--output": output_file is not None,
        "--maps": maps,
        "--plot": plot is not None,
        "--save": save is not None,
    }
    given = [name for name, present in outputs.items() if present]
    _check(pid, interval, csv, folder, diff, given)
    output = Output(as_json, output_file)
    if diff is not None:
        _compare(*diff, output)
    elif interval is not None and pid is not None:
        from pyreserve.cli.watch import watch  # noqa: PLC0415

        watch(pid, interval, csv=csv)
    else:
        _explain(pid, folder, save, plot, output, top=-1 if maps else top)


def _check(
    pid: int | None,
    interval: float | None,
    csv: Path | None,
    folder: Path | None,
    diff: tuple[Path, Path] | None,
    outputs: list[str],
) -> None:
    """Refuse options that exclude each other; `outputs` are the given options that add output."""
    subjects = {"PID": pid, "--from": folder, "--diff": diff}
    given = [name for name, value in subjects.items() if value is not None]
    no_diff = [option for option in outputs if option not in {"--json", "--output"}]
    if len(given) > 1:
        msg = f"{' and '.join(given)} are mutually exclusive"
    elif "--save" in outputs and (folder is not None or diff is not None):
        msg = "--save needs a running process"
    elif interval is not None and outputs:
        msg = f"--watch can't be combined with {' and '.join(outputs)}"
    elif diff is not None and no_diff:
        msg = f"--diff can't be combined with {' and '.join(no_diff)}"
    elif pid is not None and pid <= 0:
        msg = f"PID must be positive, got {pid}"
    elif interval is not None and pid is None:
        msg = "--watch needs a process: pyreserve explain PID --watch [SECONDS]"
    elif csv is not None and interval is None:
        msg = "--csv needs --watch"
    else:
        return
    raise click.BadParameter(msg)


def _compare(old: Path, new: Path, output: Output) -> None:
    procmem = pyreserve.procmem
    try:
        difference = procmem.compare(procmem.load(old), procmem.load(new))
    except ValueError as error:
        raise click.BadParameter(str(error)) from None
    output.write(
        lambda: json.dumps(difference.to_dict(), indent=2),
        lambda screen: show_difference(screen, difference),
    )


def _explain(
    pid: int | None,
    folder: Path | None,
    save: Path | None,
    plot: Path | None,
    output: Output,
    *,
    top: int,
) -> None:
    procmem = pyreserve.procmem
    if save is not None:
        # Explain the saved files, so that both agree.
        procmem.save(pid, save)
        pid, folder = None, save
    space = procmem.explain(pid, path=folder)
    if plot is not None:
        space.plot(plot)
    output.write(space.to_json, lambda screen: show(screen, space, top))


def show(screen: "Screen", space: "AddressSpace", top: int) -> None:
    """Draw the explanation, with the `top` largest mappings; a negative number lists all."""
    pid = f"pid {space.pid} " if space.pid is not None else ""
    name = screen.printable(space.name) or "?"
    screen.text(("pyreserve explain", "bold"), f"  {pid}({name})")
    screen.blank()
    screen.text(screen.printable(space.verdict))
    for warning in space.warnings:
        screen.text(("warning: ", "bold yellow"), screen.printable(warning))
    screen.blank()
    screen.table(_by_class(screen, space))
    screen.blank()
    screen.text(
        f"RSS {_size(space.rss)}, PSS {_size(space.pss)}, USS {_size(space.uss)}, "
        f"swap {_size(space.swap)}, page tables {_size(space.page_tables)}"
    )
    _details(screen, space.details)
    screen.blank()
    screen.table(_by_owner(screen, space))
    _evidence(screen, space)
    if space.ranges:
        screen.blank()
        screen.text("parts of the heap", style="bold")
        screen.widest(_ranges(screen, space, gap) for gap in (_GAP, 1))
    mappings = space.maps() if top < 0 else space.top(top)
    if mappings:
        screen.blank()
        title = "all mappings" if top < 0 else f"largest of {space.mappings:,} mappings"
        title += ": addresses, access, size, in memory, class of the rest, owner"
        screen.text(title, style="bold")
        _mappings(screen, space, mappings)


def show_difference(screen: "Screen", difference: "Difference") -> None:
    """Draw the changes between two explanations."""
    screen.text(screen.printable(difference.verdict))
    if not difference.same_process:
        screen.text("The two files describe different processes.", style="yellow")
    for changes in pyreserve.procmem.comparison.changes_tables(difference):
        screen.blank()
        screen.table(_changes(screen, changes.titles, changes.rows))


def _size(nbytes: int | None) -> str:
    return pyreserve.procmem.show.explained.size_text(nbytes)


def _label(name: str) -> str:
    """Return the words of a class."""
    return pyreserve.procmem.show.explained.CLASS_LABELS[name]


def _share(part: int, whole: int) -> str:
    share = 100 * part / whole if whole else 0.0
    if part and share < 0.05:
        return "< 0.1 %"
    return "> 99.9 %" if part < whole and share >= 99.95 else f"{share:.1f} %"


def _bar(part: int, whole: int, width: int, *, ascii_only: bool) -> str:
    """Draw a bar in eighth blocks (in ASCII: #); any non-zero share shows at least one."""
    blocks = "" if ascii_only else "▏▎▍▌▋▊▉█"
    steps = len(blocks) or 1
    full, rest = divmod(max(1, round(steps * width * part / whole)) if part and whole else 0, steps)
    return (blocks[-1:] or "#") * full + (blocks[rest - 1] if rest else "")


class _Row(NamedTuple):
    """A row of `_shares`: a name, its size and the text of the last column."""

    name: str
    size: int
    note: str
    style: str = ""
    bar: str | None = None
    """The style of the bar; None draws no bar."""


def _shares(screen: "Screen", titles: tuple[str, str], rows: list[_Row], whole: int) -> "Table":
    """Lay out sizes and shares. On a narrow screen first the bars get shorter, then the names."""
    name_title, note_title = titles
    headings = ("size", "share", note_title)
    cells = [(_size(row.size), _share(row.size, whole), row.note) for row in rows]
    figures = [max(map(len, column)) for column in zip(headings, *cells, strict=True)]
    left = screen.width - sum(figures) - _GAP * len(figures)
    longest = max(len(name_title), *(len(row.name) for row in rows))
    names = max(_MIN_NAME, min(longest, left))
    bar = min(_BAR, left - longest - _GAP)
    table = screen.new_table(_GAP)
    table.add_column(name_title, no_wrap=True, width=names)
    for title, width in zip(headings, figures, strict=True):
        table.add_column(title, justify="right", no_wrap=True, width=width)
    if bar >= _MIN_BAR:
        table.add_column("", no_wrap=True, width=bar)
    for row, (size, share, note) in zip(rows, cells, strict=True):
        drawn = []
        if row.bar is not None and bar >= _MIN_BAR:
            blocks = _bar(row.size, whole, bar, ascii_only=screen.ascii_only)
            drawn.append(screen.styled(blocks, row.bar))
        name = screen.styled(screen.shorten(row.name, names), row.bar or "")
        table.add_row(name, size, share, note, *drawn, style=row.style)
    return table


def _by_class(screen: "Screen", space: "AddressSpace") -> "Table":
    rows = [
        _Row(_label(item.name), item.size, f"{item.mappings:,}", bar=_STYLES[item.name])
        for item in space.classes
        if item.size
    ]
    total = _Row("VSZ", space.vsz, f"{space.mappings:,}", style="bold")
    return _shares(screen, ("by class", "mappings"), [*rows, total], space.vsz)


def _in_memory(space: "AddressSpace", nbytes: int) -> str:
    return _size(None if space.uss is None else nbytes)


def _by_owner(screen: "Screen", space: "AddressSpace") -> "Table":
    unknown = pyreserve.procmem.judge.owners.UNKNOWN
    rows = [
        _Row(
            screen.printable(owner.name),
            owner.size,
            _in_memory(space, owner.rss),
            bar="dim" if owner.name == unknown else "green",
        )
        for owner in space.owners[:_MAX_OWNERS]
    ]
    rest = space.owners[len(rows) :]
    if rest:
        size = sum(owner.size for owner in rest)
        resident = _in_memory(space, sum(owner.rss for owner in rest))
        rows.append(_Row(f"{len(rest)} more", size, resident))
    return _shares(screen, ("by owner", "in memory"), rows, space.vsz)


def _evidence(screen: "Screen", space: "AddressSpace") -> None:
    """Print how the owners of at least 1 % of the addresses or of the memory were recognised."""
    resident = sum(owner.rss for owner in space.owners)
    for owner in space.owners:
        if owner.evidence and (
            100 * owner.size >= space.vsz or 100 * owner.rss >= max(1, resident)
        ):
            screen.text(screen.printable(f"{owner.name}: {owner.evidence}"), style="dim")


def _details(screen: "Screen", details: dict[str, int]) -> None:
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
    parts = [f"{_size(nbytes)} {label}" for nbytes, label in figures if nbytes]
    if parts:
        screen.text(f"Of the memory: {', '.join(parts)}")


def _ranges(screen: "Screen", space: "AddressSpace", gap: int) -> "Table":
    table = screen.new_table(gap, show_header=False)
    for column in range(4):
        table.add_column(justify="right" if column == 1 else "left", no_wrap=True)
    for named in space.ranges:
        table.add_row(
            f"{named.start:08x}-{named.end:08x}",
            format_size(named.size),
            named.name,
            named.state,
            style="dim yellow" if named.state == "reserved" else "green",
        )
    return table


def _mappings(screen: "Screen", space: "AddressSpace", mappings: "list[Mapping]") -> None:
    addresses = [f"{mapping.start:08x}-{mapping.end:08x}" for mapping in mappings]
    width = max(map(len, addresses))
    for address, mapping in zip(addresses, mappings, strict=True):
        class_name = mapping.class_name or "special_pfn"
        words, style = _label(class_name), _STYLES[class_name]
        if mapping.rss == mapping.size:
            words, style = "in memory", _STYLES["resident_private"]
        name = screen.printable(mapping.name)
        screen.fields(
            f"{address:{width}} {mapping.perms} {_size(mapping.size):>10} "
            f"{_in_memory(space, mapping.rss):>10}",
            (f"{words:<23}", style),
            screen.printable(mapping.owner),
            *([name] if name else []),
        )


def _changes(screen: "Screen", headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> "Table":
    rows = [(screen.printable(name), *figures) for name, *figures in rows]
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    names = max(_MIN_NAME, min(widths[0], screen.width - sum(widths[1:]) - 3 * _GAP))
    table = screen.new_table(_GAP)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left", no_wrap=True)
    for name, *figures in rows:
        style = "green" if figures[-1].startswith("-") else "yellow"
        table.add_row(screen.styled(screen.shorten(name, names), ""), *figures, style=style)
    return table
