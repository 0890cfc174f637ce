"""Numpy arrays over views."""

from typing import Any

from pyreserve._system.extras import import_extra


def import_numpy(user: str) -> Any:
    """Import numpy at first use; importing pyreserve does not import it.

    Raises:
        ImportError: numpy is missing (extra ``numpy``), the message names `user`; or raised by
            numpy itself.
    """
    return import_extra("numpy", "numpy", user)
