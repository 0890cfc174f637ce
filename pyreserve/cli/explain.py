"""What ``pyreserve explain`` does, from its options to its files."""

from dataclasses import dataclass
from pathlib import Path

from pyreserve.cli import explain_screen
from pyreserve.procmem import AddressSpace, compare, explain, load, save


@dataclass(frozen=True, slots=True)
class Subject:
    """Which process is asked about: a pid, a folder with its files, or this one."""

    pid: int | None
    folder: Path | None
    keep: Path | None = None

    def explain(self) -> AddressSpace:
        """Explain it; if it is to be kept, from what was kept, so that both say the same."""
        if self.keep is not None:
            save(self.pid, self.keep)
            return explain(path=self.keep)
        return explain(self.pid, path=self.folder)


def draw(space: AddressSpace, path: Path) -> None:
    """Draw the picture."""
    from pyreserve.procmem.plot import draw as plot  # noqa: PLC0415

    plot(space, path)


def diff(old: Path, new: Path, *, as_json: bool) -> None:
    """Tell what grew between two files of ``--json``."""
    import json  # noqa: PLC0415

    difference = compare(load(old), load(new))
    if as_json:
        print(json.dumps(difference.to_dict(), indent=2))
    else:
        explain_screen.show_difference(difference)
