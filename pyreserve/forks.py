"""Locks across a fork.

Other threads do not exist in a forked child, so no lock may be held by one of them at the fork:
every registered lock is taken before it and given back after it, on both sides. To wait for one
lock while holding others could deadlock: a fork takes all of them without waiting, or gives back
what it has, waits for the one that was taken, and begins again.

The handlers of the fork are C (``csrc/forklocks.h``). While a thread forks, other at-fork handlers
in it may call everything here: the thread can take each lock again.
"""

import os
import threading
import weakref
from _thread import RLock
from typing import Any

from pyreserve._native import ffi, lib

registry_lock = RLock()
"""Held from before a fork until after it: who holds it knows that no fork is under way."""

_FIRST_LIMIT = 64

# An RLock and 0, or what keeps an allocator's tables and their address.
_registered: list[tuple["weakref.ref[Any]", int]] = []
_limit = _FIRST_LIMIT


def register(lock: RLock) -> None:
    """Have a lock taken before a fork, while it is alive."""
    _add(weakref.ref(lock), 0)


def register_tables(keeper: Any, tables: Any) -> None:
    """Have the lock of a ``struct pagealloc *`` taken before a fork, while `keeper` is alive."""
    _add(weakref.ref(keeper), int(ffi.cast("uintptr_t", tables)))


def _add(ref: "weakref.ref[Any]", address: int) -> None:
    global _limit  # noqa: PLW0603
    with registry_lock:
        _registered.append((ref, address))
        if len(_registered) > _limit:
            # A finaliser may register something else meanwhile, at the end: it stays.
            seen = len(_registered)
            _registered[:seen] = [entry for entry in _registered[:seen] if entry[0]() is not None]
            _limit = 2 * len(_registered) + _FIRST_LIMIT


def _collect() -> list[tuple[Any, int]]:
    return [(thing, at) for ref, at in _registered if (thing := ref()) is not None]


lib.forklocks_open(id(registry_lock), id(_collect), threading.main_thread().ident or 0)
os.register_at_fork(
    before=lib.forklocks_before,
    after_in_parent=lib.forklocks_after_in_parent,
    after_in_child=lib.forklocks_after_in_child,
)
