"""A thread that gives an arena's idle memory back to the system, as Go's runtime has one."""

import contextlib
import os
import threading
import weakref
from typing import TYPE_CHECKING

from pyreserve.errors import ReleasedError, ViewError, VMError

if TYPE_CHECKING:
    from pyreserve.arena import Arena

FIVE_MINUTES = 300.0
"""How long Go keeps idle memory, in seconds (Go 1.4 src/runtime/mheap1.c, ``limit``)."""

_MOST_BETWEEN = 60.0  # Go's ``tick`` (same file): seconds between two looks
_LEAST_BETWEEN = 1.0  # where memory of any age shall go


class Scavenger:
    """Calls ``arena.scavenge(older_than=...)`` again and again until it is stopped.

    It ends by itself when the arena is released or dropped, and with the interpreter. It is no
    reason for the arena to live, and a forked child has none.

    Attributes:
        older_than: seconds that memory must have been idle.
        lazy: as for `Arena.scavenge`.
        given_back: bytes that it has given back so far.
    """

    def __init__(self, arena: "Arena", older_than: float, lazy: bool) -> None:
        """Start the thread; `older_than` in seconds."""
        self.older_than = older_than
        self.lazy = lazy
        self.given_back = 0
        # Released when the thread shall end. No Event: the garbage collector, which may run in the
        # thread itself, must be able to say so without waiting for anything.
        self._going_on = threading.Lock()
        self._going_on.acquire()
        self._arena = weakref.ref(arena, self._end)
        self._thread: threading.Thread | None = threading.Thread(
            target=self._run, name="pyreserve-scavenger", daemon=True
        )
        _running.add(self)
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether the thread is at work in this process."""
        return self._thread is not None and self._thread.is_alive()

    def __repr__(self) -> str:
        state = "running" if self.running else "ended"
        return f"<Scavenger of what is idle for {self.older_than:g} s, {state}>"

    def stop(self) -> None:
        """Stop the thread and wait for its end. Once is enough, and twice no harm."""
        self._end()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _end(self, _: object = None) -> None:
        with contextlib.suppress(RuntimeError):  # it was released before
            self._going_on.release()

    def _run(self) -> None:
        pause = min(_MOST_BETWEEN, self.older_than / 2) or _LEAST_BETWEEN
        while not self._going_on.acquire(timeout=pause):
            if not self._scavenge():
                break

    def _scavenge(self) -> bool:
        arena = self._arena()
        if arena is None:
            return False
        try:
            # Views over idle pages, or a kernel that refuses just now, are no reason to give up.
            with contextlib.suppress(ViewError, VMError):
                self.given_back += arena.scavenge(older_than=self.older_than, lazy=self.lazy)
        except ReleasedError:
            return False
        return True


_running: "weakref.WeakSet[Scavenger]" = weakref.WeakSet()


def _forget_threads() -> None:
    for scavenger in list(_running):
        scavenger._thread = None


# Threads do not survive a fork, and their locks may be held by nobody.
os.register_at_fork(after_in_child=_forget_threads)
