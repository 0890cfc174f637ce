"""The command ``pyreserve``. Needs the extra ``cli`` (click, rich)."""

import sys


def main() -> None:
    """Run the command. Its dependencies are imported here, not with the library."""
    try:
        from pyreserve.cli.app import app  # noqa: PLC0415

        app()
    except ModuleNotFoundError as missing:
        if missing.name not in {"click", "rich"}:
            raise
        sys.exit("pyreserve: the command needs click and rich: pip install 'pyreserve[cli]'")
    except KeyboardInterrupt:  # during the imports; later the command handles it
        sys.exit(130)
    except MemoryError:
        sys.exit("pyreserve: not enough memory to start; see ulimit -v")
