"""The command ``pyreserve``. Needs the extra ``cli`` (typer, rich)."""

import sys


def main() -> None:
    """Run the command. Its dependencies are imported here, not with the library."""
    try:
        from pyreserve.cli.app import app  # noqa: PLC0415

        app()
    except ModuleNotFoundError as missing:
        if missing.name not in {"typer", "rich"}:
            raise
        sys.exit("pyreserve: the command needs typer and rich: pip install 'pyreserve[cli]'")
    except KeyboardInterrupt:  # before the command handles it itself
        sys.exit(130)
    except MemoryError:
        sys.exit("pyreserve: not enough memory to start; see ulimit -v")
