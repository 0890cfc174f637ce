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
from typing import Any, Generic, TypeVar

from pyreserve._native import ffi, lib

registry_lock = RLock()
"""Held across each fork: no other thread forks while it is held."""

_FIRST_LIMIT = 64


_Ref = TypeVar("_Ref", bound="weakref.ref[Any]")


class References(Generic[_Ref]):
    """Weak references to objects of which there may be many.

    Dead references are removed when the list has doubled since the last removal: cheaper than a
    callback for each.
    """

    def __init__(self) -> None:
        self._references: list[_Ref] = []
        self._limit = _FIRST_LIMIT

    def add(self, reference: _Ref) -> None:
        """Add a reference."""
        with registry_lock:
            references = self._references
            references.append(reference)
            if len(references) > self._limit:
                # A finaliser that runs here may append: references after `checked` are kept.
                checked = len(references)
                references[:checked] = [ref for ref in references[:checked] if ref() is not None]
                self._limit = 2 * len(references) + _FIRST_LIMIT

    def alive(self) -> list[tuple[_Ref, Any]]:
        """Return the references to living objects, each with its object."""
        pairs = [(reference, reference()) for reference in list(self._references)]
        return [(reference, item) for reference, item in pairs if item is not None]


class _TablesRef(weakref.ref[Any]):
    """A reference to the owner of a ``struct pagealloc``, with the address of that."""

    __slots__ = ("address",)
    address: int


_locks: References["weakref.ref[RLock]"] = References()
_tables: References[_TablesRef] = References()


def register(lock: RLock) -> None:
    """Hold `lock` across forks. The reference is weak."""
    _locks.add(weakref.ref(lock))


def register_tables(keeper: Any, tables: Any) -> None:
    """Hold the lock of a ``struct pagealloc *`` across forks while `keeper` is alive."""
    reference = _TablesRef(keeper)
    reference.address = int(ffi.cast("uintptr_t", tables))
    _tables.add(reference)


def _collect() -> tuple[list[RLock], list[tuple[Any, int]]]:
    return (
        [lock for _, lock in _locks.alive()],
        [(keeper, reference.address) for reference, keeper in _tables.alive()],
    )


lib.forklocks_open(id(registry_lock), id(_collect), threading.main_thread().ident or 0)
os.register_at_fork(
    before=lib.forklocks_before,
    after_in_parent=lib.forklocks_after_in_parent,
    after_in_child=lib.forklocks_after_in_child,
)
