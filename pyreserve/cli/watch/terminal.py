"""Key presses and signals as file descriptors; terminal settings are restored on exit."""

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDIN = 0


@contextmanager
def signals(*numbers: int) -> Iterator[int]:
    """Yield a file descriptor that delivers the numbers of these signals, one byte each.

    Until the block ends the signals have no other effect, so none interrupts drawing or restoring
    the terminal. Ignored signals stay ignored. For the main thread only.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def enqueue(number: int, _: object) -> None:
        with suppress(BlockingIOError):  # the pipe already holds thousands of signals
            os.write(writer, bytes([number]))

    handlers = {}
    try:
        for number in numbers:
            if signal.getsignal(number) not in {signal.SIG_IGN, None}:
                handlers[number] = signal.signal(number, enqueue)
        yield reader
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


@contextmanager
def keys() -> Iterator[int | None]:
    """Yield a file descriptor that delivers keys at once and unechoed; None without a terminal.

    Ctrl-C and other control keys still send signals.
    """
    if not os.isatty(_STDIN):
        yield None
        return
    settings = termios.tcgetattr(_STDIN)
    try:
        # TCSADRAIN keeps input that was typed ahead, unlike TCSAFLUSH.
        tty.setcbreak(_STDIN, termios.TCSADRAIN)
        yield _STDIN
    finally:
        with suppress(termios.error):  # the terminal was closed
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, settings)
