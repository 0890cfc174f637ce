"""Imports of optional dependencies, and the version of pyreserve."""

from typing import Any


def import_extra(module: str, extra: str, user: str) -> Any:
    """Import a module that the extra `extra` installs.

    Raises:
        ImportError: the package is not installed; the message names `user` and the extra. Other
            import failures, such as a shared library that cannot be mapped, are raised unchanged.
    """
    from importlib import import_module  # noqa: PLC0415  # slow to import

    package = module.partition(".")[0]
    try:
        # Import the package first: Python 3.15 words the error for a submodule differently.
        import_module(package)
        return import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != package:
            raise
        msg = f"{user} needs {package}: pip install 'pyreserve[{extra}]'"
        raise ImportError(msg, name=package) from missing


def own_version() -> str | None:
    """Return the version of pyreserve; None if it is not installed or unreadable."""
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415  # slow to import

    try:
        return version("pyreserve")
    except (PackageNotFoundError, OSError):
        return None
