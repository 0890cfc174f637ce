"""Locks across a fork.

Other threads do not exist in a forked child, so no lock may be held by one of them at the fork:
the lock of every registered object is taken before it and given back after it, on both sides. To
wait for one lock while holding others could deadlock: a fork takes all of them without waiting, or
gives back what it has, waits for the one that was taken, and begins again.
"""

import gc
import os
import signal
import weakref
from _thread import RLock
from typing import Protocol


class Lock(Protocol):
    """What is taken before a fork."""

    def acquire(self, blocking: bool = ...) -> bool:
        """Take it; or, if not `blocking` and another thread has it, return False."""

    def release(self) -> None:
        """Give it back."""


class Registered(Protocol):
    """What has a lock. It may have a method `_forked_in_child` too.

    That one is called in the child, where there are no other threads, before locks are given back.
    """

    def _fork_lock(self) -> Lock | None:
        """The lock, or None if there is none yet: it is made under `registry_lock`."""


registry_lock = RLock()
"""Held from before a fork until after it: who holds it knows that no fork is under way."""

_registry: list["weakref.ref[Registered]"] = []
_registry_limit = 64
_held: list[Lock] = []
_masks: list[set[int]] = []  # of signals, one for each fork under way
_collects = False


def register(thing: Registered) -> None:
    """Have the lock of `thing` taken before a fork, while it is alive."""
    global _registry_limit  # noqa: PLW0603
    with registry_lock:
        _registry.append(weakref.ref(thing))
        if len(_registry) > _registry_limit:
            # A finaliser may register something else meanwhile, at the end: it stays.
            seen = len(_registry)
            _registry[:seen] = [ref for ref in _registry[:seen] if ref() is not None]
            _registry_limit = 2 * len(_registry) + 64


def _registered() -> list[Registered]:
    return list({id(thing): thing for ref in _registry if (thing := ref()) is not None}.values())


def _before_fork() -> None:
    global _collects  # noqa: PLW0603
    blocked: Lock | None = None
    while True:
        if blocked is not None:
            blocked.acquire()
            blocked.release()
        # Signal handlers that come in while this thread has locks in C would wait for it, for ever.
        _masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()))
        registry_lock.acquire()
        # A lock in C can't be taken twice: no finaliser shall want it while this thread has it.
        _collects = gc.isenabled()
        gc.disable()
        _held[:] = [lock for thing in _registered() if (lock := thing._fork_lock()) is not None]
        blocked = _first_blocked(_held)
        if blocked is None:
            return
        _end()


def _first_blocked(locks: list[Lock]) -> Lock | None:
    """Take all locks; or none, and return one that another thread has."""
    for i, lock in enumerate(locks):
        if not lock.acquire(blocking=False):
            for held in locks[:i]:
                held.release()
            return lock
    return None


def _end() -> None:
    _held.clear()
    if _collects:
        gc.enable()
    registry_lock.release()
    signal.pthread_sigmask(signal.SIG_SETMASK, _masks.pop())


def _after_fork_in_parent() -> None:
    for lock in _held:
        lock.release()
    _end()


def _after_fork_in_child() -> None:
    for thing in _registered():
        forked = getattr(thing, "_forked_in_child", None)
        if forked is not None:
            forked()
    _after_fork_in_parent()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
