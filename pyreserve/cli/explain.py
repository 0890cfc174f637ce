"""What ``pyreserve explain`` does, from its options to its files."""

from pathlib import Path

from pyreserve.cli import explain_screen
from pyreserve.procmem import AddressSpace, compare, explain, load, save


def explained(pid: int | None, folder: Path | None, keep: Path | None) -> AddressSpace:
    """Explain a process, this one by default, or a folder with the files of one.

    If its files are kept in `keep`, it is explained from these, so that both say the same.
    """
    if keep is None:
        return explain(pid, path=folder)
    save(pid, keep)
    return explain(path=keep)


def draw(space: AddressSpace, path: Path) -> None:
    """Draw the picture."""
    from pyreserve.procmem.show.picture import draw as plot  # noqa: PLC0415

    plot(space, path)


def diff(old: Path, new: Path, *, as_json: bool) -> None:
    """Tell what grew between two files of ``--json``."""
    import json  # noqa: PLC0415

    difference = compare(load(old), load(new))
    if as_json:
        print(json.dumps(difference.to_dict(), indent=2))
    else:
        explain_screen.show_difference(difference)
