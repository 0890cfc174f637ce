"""The work of ``pyreserve explain`` behind its options."""

from pathlib import Path

from pyreserve.cli import explain_screen
from pyreserve.procmem import AddressSpace, compare, explain, load, save


def explained(pid: int | None, folder: Path | None, keep: Path | None) -> AddressSpace:
    """Explain a process (by default this one) or a folder of saved files.

    With `keep` the files are saved there first and then explained, so that both agree.
    """
    if keep is None:
        return explain(pid, path=folder)
    save(pid, keep)
    return explain(path=keep)


def draw(space: AddressSpace, path: Path) -> None:
    """Draw the address space into a file."""
    from pyreserve.procmem.show.picture import draw as plot  # noqa: PLC0415

    plot(space, path)


def diff(old: Path, new: Path, *, as_json: bool) -> None:
    """Print the changes between two files of ``--json``."""
    import json  # noqa: PLC0415

    difference = compare(load(old), load(new))
    if as_json:
        print(json.dumps(difference.to_dict(), indent=2))
    else:
        explain_screen.show_difference(difference)
