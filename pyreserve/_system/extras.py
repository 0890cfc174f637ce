"""Optional dependencies, imported where they are needed and only there; and our own version."""

from importlib import import_module
from typing import Any


def import_extra(module: str, extra: str, user: str) -> Any:
    """Import a module that an extra installs.

    Raises:
        ImportError: not installed; the message names `user`. Any other failure of the import, such
            as a library that can't be mapped, is raised as it is.
    """
    package = module.partition(".")[0]
    try:
        # The package first: Python 3.15 words the error for a submodule differently.
        import_module(package)
        return import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != package:
            raise
        msg = f"{user} needs {package}: pip install 'pyreserve[{extra}]'"
        raise ImportError(msg, name=package) from missing


def own_version() -> str | None:
    """Return the version of pyreserve; None if it is not installed, or can't be read."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  # takes long

    try:
        return version("pyreserve")
    except (PackageNotFoundError, OSError):
        return None
