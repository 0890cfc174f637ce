"""Keys and signals as things to wait for, and a terminal that is left as it was found."""

import os
import signal
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_STDIN = 0


@contextmanager
def signals(*numbers: int) -> Iterator[int]:
    """Give a descriptor to read the numbers of these signals from, a byte each.

    Until the end they do nothing else, so none comes between two halves of what is drawn or put
    back. Those that are ignored stay so. For the main thread alone.
    """
    out, into = os.pipe()
    os.set_blocking(into, False)

    def note(number: int, _: object) -> None:
        with suppress(BlockingIOError):  # thousands wait already
            os.write(into, bytes([number]))

    before = {}
    try:
        for number in numbers:
            if signal.getsignal(number) not in {signal.SIG_IGN, None}:
                before[number] = signal.signal(number, note)
        yield out
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(out)
        os.close(into)


@contextmanager
def keys() -> Iterator[int | None]:
    """Give a descriptor to read keys from as they are hit, unechoed; None if there is no keyboard.

    Ctrl-C and the like stay signals.
    """
    if not os.isatty(_STDIN):
        yield None
        return
    before = termios.tcgetattr(_STDIN)
    try:
        # What was typed ahead is kept, here for us and at the end for the shell.
        tty.setcbreak(_STDIN, termios.TCSADRAIN)
        yield _STDIN
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(_STDIN, termios.TCSADRAIN, before)
