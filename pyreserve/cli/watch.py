"""What ``pyreserve explain --watch`` does: a screen on a terminal, a line a sample elsewhere."""

import errno
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.live import Live

from pyreserve._system.output import check_writable
from pyreserve.cli.screen import console_for
from pyreserve.cli.terminal import keys, signals
from pyreserve.cli.watch_screen import frame
from pyreserve.cli.watched import COLUMNS, Watched
from pyreserve.procmem import Sample, sample

_TICK = 1.0  # seconds after which the time on the screen is old
_REFRESH = 0.05  # and between two drawings at least
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def watch(
    pid: int,
    interval: float = 1.0,
    *,
    csv: Path | None = None,
    take: Callable[[int], Sample] = sample,
) -> None:
    """Show a process's memory every `interval` seconds, until q is hit or the process ends.

    On a terminal this is a screen of its own, whose last state then stays on the normal one; else a
    line a sample, as long as somebody reads them. What is shown is in the file `csv` before.

    Raises:
        ValueError: `interval` is not a positive, finite number of seconds.
        KeyboardInterrupt: Ctrl-C, once the terminal is as it was and the last state shown.
        ProcessLookupError: there is no such process; that it ends later is no error.
        PermissionError: it may not be read, or `csv` can't be written.
        OSError: `csv` can't be written any more.
    """
    if not 0 < interval < math.inf:
        msg = f"the interval is a positive number of seconds, not {interval}"
        raise ValueError(msg)
    if csv is not None:
        check_writable(csv)
    console = console_for()
    number = None
    with Watched(pid, interval, take, csv) as watched:
        watched.sample()
        try:
            if console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty():
                try:
                    number = _on_a_screen(watched, console)
                finally:
                    console.print(frame(watched, console))
            else:
                _in_lines(watched)
        except OSError as error:
            if error.filename is not None or error.errno not in {errno.EPIPE, errno.EIO}:
                raise
            _discard_output()  # nobody reads it, or the terminal is gone
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    if number is not None:
        signal.raise_signal(number)  # the end that whoever sent it expects


def _in_lines(watched: Watched) -> None:
    def show(row: Iterable[str]) -> None:
        time_, *values = row
        print(f"{time_:24}", *(f"{value:>13}" for value in values), flush=True)

    show(COLUMNS)
    show(watched.row)
    while not watched.ended:
        watched.wait(until=watched.due)
        if watched.sample_when_due():
            show(watched.row)


def _discard_output() -> None:
    """Let what is still buffered go nowhere, instead of failing again at the end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _on_a_screen(watched: Watched, console: Console) -> int | None:
    """Show a screen until the end, and return the signal that brought it, if one did."""
    while True:
        with (
            signals(*_ENDING, signal.SIGTSTP, signal.SIGWINCH) as signalled,
            keys() as typed,
            Live(
                console=console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live,
        ):
            number = _follow(watched, live, signalled, typed)
        if number != signal.SIGTSTP:
            return number
        os.kill(os.getpid(), signal.SIGSTOP)  # by Ctrl-Z, on the user's own screen


def _follow(watched: Watched, live: Live, signalled: int, typed: int | None) -> int | None:
    """Draw until q, the end of the process, or a signal, which is returned."""
    quits = "Ctrl-C" if typed is None else "q or Ctrl-C"
    stale, drawn = True, -math.inf
    while not watched.ended:
        if stale and time.monotonic() >= drawn + _REFRESH:
            live.update(frame(watched, live.console, quits), refresh=True)
            stale, drawn = False, time.monotonic()
        next_drawing = drawn + (_REFRESH if stale else _TICK)
        ready = watched.wait(signalled, typed, until=min(watched.due, next_drawing))
        if signalled in ready:
            number = os.read(signalled, 1)[0]
            if number != signal.SIGWINCH:
                return number
        if typed is not None and typed in ready:
            hit = os.read(typed, 1024).lower()
            if not hit or (b"q" in hit and not hit.startswith(b"\x1b")):  # nothing: it hung up
                return None
        watched.sample_when_due()
        stale = True
    return None
