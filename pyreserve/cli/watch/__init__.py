"""``pyreserve explain --watch``: a live screen on a terminal, a line per sample elsewhere."""

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
from pyreserve.cli.console import discard_output
from pyreserve.cli.screen import console_for
from pyreserve.cli.watch.frame import frame
from pyreserve.cli.watch.terminal import keys, signals
from pyreserve.cli.watch.watched import COLUMNS, Watched
from pyreserve.procmem import Sample, sample

_CLOCK_TICK = 1.0  # seconds between two updates of the elapsed time
_MIN_REFRESH = 0.05  # minimum seconds between two drawings
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def watch(
    pid: int,
    interval: float = 1.0,
    *,
    csv: Path | None = None,
    take: Callable[[int], Sample] = sample,
) -> None:
    """Show a process's memory every `interval` seconds, until q is pressed or the process ends.

    On a terminal this uses the alternate screen; the last state then stays on the normal screen.
    Elsewhere it prints a line per sample. Each sample is written to the file `csv` before it is
    shown.

    Raises:
        ValueError: `interval` is not a positive, finite number of seconds.
        KeyboardInterrupt: Ctrl-C, after the terminal is restored and the last state shown.
        ProcessLookupError: there is no such process at the start; its later end is no error.
        PermissionError: the process can't be read, or `csv` can't be written.
        BrokenPipeError: the reader closed the pipe.
        OSError: writing `csv` failed.
    """
    if not 0 < interval < math.inf:
        msg = f"interval must be a positive number of seconds, got {interval}"
        raise ValueError(msg)
    if csv is not None:
        check_writable(csv)
    console = console_for()
    signum = None
    with Watched(pid, interval, take, csv) as watched:
        watched.sample()
        try:
            if console.is_terminal and not console.is_dumb_terminal and sys.stdout.isatty():
                try:
                    signum = _on_a_screen(watched, console)
                finally:
                    console.print(frame(watched, console))
            else:
                _in_lines(watched)
        except OSError as error:
            if error.filename is not None or error.errno != errno.EIO:
                raise
            discard_output()  # the terminal was closed
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    if signum is not None:
        signal.raise_signal(signum)  # end as the sender expects: killed by this signal


def _in_lines(watched: Watched) -> None:
    def show(row: Iterable[str]) -> None:
        timestamp, *values = row
        print(f"{timestamp:24}", *(f"{value:>13}" for value in values), flush=True)

    show(COLUMNS)
    show(watched.row)
    while not watched.ended:
        watched.wait(until=watched.due)
        if watched.sample_when_due():
            show(watched.row)


def _on_a_screen(watched: Watched, console: Console) -> int | None:
    """Show the screen until the end; return the signal that ended it, if any."""
    while True:
        with (
            signals(*_ENDING, signal.SIGTSTP, signal.SIGWINCH) as signal_fd,
            keys() as key_fd,
            Live(
                console=console,
                screen=True,
                auto_refresh=False,
                redirect_stdout=False,
                redirect_stderr=False,
            ) as live,
        ):
            signum = _follow(watched, live, signal_fd, key_fd)
        if signum != signal.SIGTSTP:
            return signum
        os.kill(os.getpid(), signal.SIGSTOP)  # Ctrl-Z, with the terminal restored


def _follow(watched: Watched, live: Live, signal_fd: int, key_fd: int | None) -> int | None:
    """Draw until q is pressed, the process ends or a signal arrives, which is returned."""
    quits = "Ctrl-C" if key_fd is None else "q or Ctrl-C"
    stale, drawn = True, -math.inf
    while not watched.ended:
        if stale and time.monotonic() >= drawn + _MIN_REFRESH:
            live.update(frame(watched, live.console, quits), refresh=True)
            stale, drawn = False, time.monotonic()
        next_drawing = drawn + (_MIN_REFRESH if stale else _CLOCK_TICK)
        ready = watched.wait(signal_fd, key_fd, until=min(watched.due, next_drawing))
        if signal_fd in ready:
            signum = os.read(signal_fd, 1)[0]
            if signum != signal.SIGWINCH:
                return signum
        if key_fd is not None and key_fd in ready:
            pressed = os.read(key_fd, 1024).lower()
            # An empty read means that the terminal hung up.
            if not pressed or (b"q" in pressed and not pressed.startswith(b"\x1b")):
                return None
        watched.sample_when_due()
        stale = True
    return None
