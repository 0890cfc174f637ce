"""A thread that gives an arena's idle memory back to the system, as Go's runtime has one."""

import atexit
import contextlib
import threading
import weakref
from _thread import RLock, allocate_lock
from typing import TYPE_CHECKING

from pyreserve._system import forks
from pyreserve.errors import ReleasedError

if TYPE_CHECKING:
    from pyreserve._arena.arena import Arena

FIVE_MINUTES = 300.0
"""How long Go keeps idle memory, in seconds (Go 1.4 src/runtime/mheap1.c, ``limit``)."""

_MOST_BETWEEN = 60.0  # Go's ``tick`` (same file): seconds between two looks
_JOIN_POLL_SECONDS = 0.1  # seconds between checks while waiting for the thread to end
_LEAST_BETWEEN = 1.0  # where memory of any age shall go


class Scavenger:
    """Calls ``arena.scavenge(older_than=...)`` again and again until it is stopped.

    It ends by itself when the arena is released or dropped, when another one is started for the
    arena, and with the interpreter. It does not keep the arena alive, and a forked child has none.
    """

    def __init__(self, worker: "Worker", older_than: float, lazy: bool) -> None:
        """For `Arena.start_scavenger`."""
        self._worker = worker
        self._older_than = older_than
        self._lazy = lazy
        self._given_back = 0

    @property
    def older_than(self) -> float:
        """Seconds that memory must have been idle."""
        return self._older_than

    @property
    def lazy(self) -> bool:
        """As for `Arena.scavenge`."""
        return self._lazy

    @property
    def given_back(self) -> int:
        """Bytes that it has given back so far."""
        return self._given_back

    @property
    def running(self) -> bool:
        """Whether the thread is at work in this process."""
        return self._worker.serves(self)

    def __repr__(self) -> str:
        state = "running" if self.running else "ended"
        return f"<Scavenger of what is idle for {self._older_than:g} s, {state}>"

    def stop(self) -> None:
        """Stop the thread and wait for it to end. Calling it again does nothing."""
        self._worker.stop(self)

    def add(self, nbytes: int) -> None:
        """Count bytes that the thread has given back."""
        self._given_back += nbytes


class Worker:
    """The thread of an arena: one at most, whose scavenger may be replaced by another.

    No lock is waited for while this one is held, except to join a thread that takes none.
    """

    def __init__(self, arena: "Arena") -> None:
        """For `Arena`: without a thread yet."""
        self._lock = RLock()
        forks.register(self._lock)
        # Released to wake the thread. The garbage collector, which may run anywhere, can do that
        # without waiting for anything.
        self._wake = allocate_lock()
        self._wake.acquire()
        self._scavenger: Scavenger | None = None
        self._thread: threading.Thread | None = None
        self._ended: threading.Thread | None = None  # finished its work, not yet exited
        self._arena = weakref.ref(arena, self._tell_to_stop)
        _workers.add(self)

    def start(self, older_than: float, lazy: bool) -> Scavenger:
        """Have the thread work for a new scavenger; start it if there is none.

        Raises:
            RuntimeError: no thread can be started.
        """
        scavenger = Scavenger(self, older_than, lazy)
        with self._lock:
            if _exiting:
                msg = "can't start a scavenger at the end of the interpreter"
                raise RuntimeError(msg)
            self._scavenger = scavenger
            if self._alive():
                self._notify()
            else:
                self._start_thread()
        return scavenger

    def _start_thread(self) -> None:
        if self._ended is not None:
            self._ended.join(1.0)  # bounded: a finaliser in it may be waiting for this lock
        self._thread = threading.Thread(target=self._run, name="pyreserve-scavenger", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._tell_to_stop()
            raise

    def _alive(self) -> bool:
        # A forked child has the object, but not the thread.
        return self._thread is not None and self._thread.is_alive()

    def serves(self, scavenger: Scavenger) -> bool:
        """Tell whether the thread is alive and works for this scavenger."""
        return self._scavenger is scavenger and self._alive()

    def stop(self, scavenger: Scavenger | None = None) -> None:
        """Stop the thread if it works for `scavenger`, and wait for its end.

        Does not wait in the thread itself, nor where it interrupts a call that holds the lock.
        """
        with self._lock:
            if scavenger is not None and self._scavenger is not scavenger:
                return
            self._tell_to_stop()
            thread = self._thread if self._alive() else None
        # The thread takes this lock before it ends; an interrupted call may hold it.
        if thread is threading.current_thread() or self._lock._is_owned():  # type: ignore[attr-defined]
            return
        # Another thread may start a new scavenger; this thread then serves it.
        while thread is not None and thread.is_alive() and self._scavenger is None:
            thread.join(_JOIN_POLL_SECONDS)

    def _tell_to_stop(self, _: object = None) -> None:
        """Tell the thread to end. Waits for nothing."""
        self._scavenger = None
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # already released, not yet consumed
            self._wake.release()

    def _run(self) -> None:
        while (scavenger := self._next()) is not None:
            pause = min(_MOST_BETWEEN, scavenger.older_than / 2) or _LEAST_BETWEEN
            if not self._wake.acquire(timeout=pause):
                self._scavenge(scavenger)

    def _next(self) -> Scavenger | None:
        """Return the scavenger to serve; None ends the thread, and `start` then makes a new one."""
        with self._lock:
            if self._scavenger is None:
                self._thread, self._ended = None, self._thread
            return self._scavenger

    def _scavenge(self, scavenger: Scavenger) -> None:
        arena = self._arena()
        if arena is not None:
            try:
                arena.scavenge_for(scavenger, lambda: self._scavenger is scavenger)
            except ReleasedError:
                self._tell_to_stop()


_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_exiting = False


@atexit.register
def _end_threads() -> None:
    """End all threads before interpreter shutdown, which would freeze one that holds a lock."""
    global _exiting  # noqa: PLW0603
    _exiting = True
    for worker in list(_workers):
        worker.stop()
