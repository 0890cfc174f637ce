"""Threads that switch often, and alarms whose handler raises."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Thread


class Struck(Exception):  # noqa: N818
    """Raised by the handler of an alarm."""


@contextmanager
def alarms_raise() -> Iterator[None]:
    """Let SIGALRM raise `Struck` in the ``with`` block, which sets the timer."""

    def handler(*_: object) -> None:
        raise Struck

    before = signal.signal(signal.SIGALRM, handler)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run_together(threads: Sequence[Thread], interval: float = 1e-5) -> None:
    """Run threads to their end, switching between them every `interval` seconds."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(interval)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
