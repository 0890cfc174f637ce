"""A background thread that gives an arena's idle memory back, like the scavenger of Go."""

import atexit
import contextlib
import threading
import weakref
from _thread import RLock, allocate_lock

from pyreserve._arena.heap import Heap
from pyreserve._system import forks
from pyreserve.errors import ReleasedError

FIVE_MINUTES = 300.0
"""Seconds that Go keeps idle memory (Go 1.4 src/runtime/mheap1.c, ``limit``)."""

_MAX_INTERVAL = 60.0  # seconds between two scavenges: Go's ``tick`` (same file)
_ZERO_AGE_INTERVAL = 1.0  # seconds between two scavenges when older_than is 0
_JOIN_POLL_SECONDS = 0.1  # seconds between checks while waiting for the thread to end


class Scavenger:
    """Gives the memory of free pages back periodically, as `Arena.trim` does, until it is stopped.

    It also ends when the arena is released, closed or dropped, when a new scavenger is started for
    the arena, and when the interpreter exits. It does not keep the arena alive. A forked child has
    no scavenger.
    """

    def __init__(self, worker: "Worker", older_than: float, lazy: bool) -> None:
        """Called by `Arena.start_scavenger` alone."""
        self._worker = worker
        self._older_than = older_than
        self._lazy = lazy
        self._given_back = 0

    @property
    def older_than(self) -> float:
        """Seconds that memory must have been idle before it is given back."""
        return self._older_than

    @property
    def lazy(self) -> bool:
        """Whether memory is given back lazily (MADV_FREE); see `Arena.trim`."""
        return self._lazy

    @property
    def given_back(self) -> int:
        """Bytes given back so far."""
        return self._given_back

    @property
    def running(self) -> bool:
        """Whether the thread of this process runs for this scavenger."""
        return self._worker.serves(self)

    def __repr__(self) -> str:
        state = "running" if self.running else "ended"
        return f"<Scavenger of memory idle for {self._older_than:g} s, {state}>"

    def stop(self) -> None:
        """Stop the thread and wait for it to end. Does nothing if it has ended."""
        self._worker.stop(self)

    def add(self, nbytes: int) -> None:
        """Add to `given_back`."""
        self._given_back += nbytes


class Worker:
    """Runs an arena's scavenger in a thread: at most one thread, for the latest scavenger.

    A call that holds the lock waits for no other lock, and joins only a thread that takes none.
    """

    def __init__(self, heap: Heap) -> None:
        """Called by `Arena` alone. Starts no thread."""
        self._lock = RLock()
        forks.register(self._lock)
        # Released to wake the thread. Releasing never blocks, so a weakref callback may do it
        # wherever the garbage collector runs.
        self._wake = allocate_lock()
        self._wake.acquire()
        self._scavenger: Scavenger | None = None
        self._thread: threading.Thread | None = None
        self._ended: threading.Thread | None = None  # finished its work, not yet exited
        self._heap = weakref.ref(heap, self._request_stop)
        _workers.add(self)

    def start(self, older_than: float, lazy: bool) -> Scavenger:
        """Replace the scavenger by a new one; start the thread if none runs.

        Raises:
            RuntimeError: no thread can be started, or the interpreter is exiting.
        """
        scavenger = Scavenger(self, older_than, lazy)
        with self._lock:
            if _exiting:
                msg = "cannot start a scavenger: the interpreter is exiting"
                raise RuntimeError(msg)
            self._scavenger = scavenger
            if self._alive():
                self._notify()
            else:
                self._start_thread()
        return scavenger

    def _start_thread(self) -> None:
        if self._ended is not None:
            self._ended.join(1.0)  # bounded: a finaliser in it may wait for this lock
        self._thread = threading.Thread(target=self._run, name="pyreserve-scavenger", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            self._request_stop()
            raise

    def _alive(self) -> bool:
        # A forked child inherits the Thread object without the thread.
        return self._thread is not None and self._thread.is_alive()

    def serves(self, scavenger: Scavenger) -> bool:
        """Return whether the thread is alive and runs for `scavenger`."""
        return self._scavenger is scavenger and self._alive()

    def stop(self, scavenger: Scavenger | None = None) -> None:
        """Stop the thread and wait for its end; if `scavenger` is given, only if it runs for it.

        Does not wait if called in the thread itself, or by a signal handler or finaliser that
        interrupts a call holding the lock.
        """
        with self._lock:
            if scavenger is not None and self._scavenger is not scavenger:
                return
            self._request_stop()
            thread = self._thread if self._alive() else None
        # The thread takes this lock before it ends, and an interrupted call may hold the lock.
        if thread is threading.current_thread() or self._lock._is_owned():  # type: ignore[attr-defined]
            return
        # Another thread may start a new scavenger, and the thread goes on for that one.
        while thread is not None and thread.is_alive() and self._scavenger is None:
            thread.join(_JOIN_POLL_SECONDS)

    def _request_stop(self, _: object = None) -> None:
        """Ask the thread to end, without blocking."""
        self._scavenger = None
        self._notify()

    def _notify(self) -> None:
        with contextlib.suppress(RuntimeError):  # already released, not yet consumed
            self._wake.release()

    def _run(self) -> None:
        while (scavenger := self._next()) is not None:
            pause = min(_MAX_INTERVAL, scavenger.older_than / 2) or _ZERO_AGE_INTERVAL
            if not self._wake.acquire(timeout=pause):
                self._scavenge(scavenger)

    def _next(self) -> Scavenger | None:
        """Return the current scavenger. None ends the thread; `start` then creates a new one."""
        with self._lock:
            if self._scavenger is None:
                self._thread, self._ended = None, self._thread
            return self._scavenger

    def _scavenge(self, scavenger: Scavenger) -> None:
        heap = self._heap()
        if heap is not None:
            try:
                total, _ = heap.give_back(
                    None, scavenger.older_than, scavenger.lazy, lambda: self._scavenger is scavenger
                )
            except ReleasedError:
                self._request_stop()
            else:
                scavenger.add(total)


_workers: "weakref.WeakSet[Worker]" = weakref.WeakSet()
_exiting = False


@atexit.register
def _end_threads() -> None:
    """End all threads before interpreter shutdown, which would freeze a thread holding a lock."""
    global _exiting  # noqa: PLW0603
    _exiting = True
    for worker in list(_workers):
        worker.stop()
