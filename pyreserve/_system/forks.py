"""Locks across a fork.

A forked child has only the forking thread, so no other thread may hold a lock at the fork: every
registered lock is acquired before the fork and released after it, in parent and child. Waiting for
one lock while holding others could deadlock: the fork acquires all of them without waiting, or
releases those it has, waits for the one that is held, and starts again.

The fork handlers are C (``csrc/forklocks.h``). Other at-fork handlers of the forking thread may
call everything here, since the thread can re-enter each lock.
"""

import os
import threading
import weakref
from _thread import RLock
from typing import Any

from pyreserve._native import ffi, lib

registry_lock = RLock()
"""Held across each fork: no other thread forks while it is held."""

_FIRST_LIMIT = 64


class _Registry:
    """Weak references to the owners of locks, each with the address of its tables.

    A registered lock is its own owner and has address 0. Dead references are removed when the list
    has doubled since the last removal.
    """

    def __init__(self) -> None:
        self.entries: list[tuple[weakref.ref[Any], int]] = []
        self._limit = _FIRST_LIMIT

    def add(self, keeper: Any, address: int) -> None:
        with registry_lock:
            self.entries.append((weakref.ref(keeper), address))
            if len(self.entries) > self._limit:
                # A finaliser that runs here may append: entries after `checked` are kept.
                checked = len(self.entries)
                self.entries[:checked] = [e for e in self.entries[:checked] if e[0]() is not None]
                self._limit = 2 * len(self.entries) + _FIRST_LIMIT


_locks = _Registry()
_tables = _Registry()


def register(lock: RLock) -> None:
    """Hold `lock` across forks. The reference is weak."""
    _locks.add(lock, 0)


def register_tables(keeper: Any, tables: Any) -> None:
    """Hold the lock of a ``struct pagealloc *`` across forks while `keeper` is alive."""
    _tables.add(keeper, int(ffi.cast("uintptr_t", tables)))


def _collect() -> tuple[list[RLock], list[tuple[Any, int]]]:
    return (
        [lock for ref, _ in list(_locks.entries) if (lock := ref()) is not None],
        [(keeper, at) for ref, at in list(_tables.entries) if (keeper := ref()) is not None],
    )


lib.forklocks_open(id(registry_lock), id(_collect), threading.main_thread().ident or 0)
os.register_at_fork(
    before=lib.forklocks_before,
    after_in_parent=lib.forklocks_after_in_parent,
    after_in_child=lib.forklocks_after_in_child,
)
