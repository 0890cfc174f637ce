"""The kernel's view of this process, read without any code of pyreserve.

Also runs functions in forked children and scripts in fresh interpreters, so that limits, crashes
and hangs stay there.
"""

import ctypes
import faulthandler
import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import traceback
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest

Answer = TypeVar("Answer")

RESERVED, COMMITTED = "---p", "rw-p"

PATIENCE = 120  # seconds until a wait counts as a hang; long, since the machine may be busy

only_64_bit = pytest.mark.skipif(sys.maxsize < 1 << 62, reason="needs 64-bit addresses")


class Span(NamedTuple):
    """A mapping, or its part inside the requested addresses."""

    start: int
    end: int
    perms: str
    name: str


class Piece(NamedTuple):
    """A span with the sizes and flags that /proc/self/smaps gives for its whole mapping."""

    start: int
    end: int
    perms: str
    name: str
    kib: dict[str, int]
    flags: frozenset[str]


def _addresses(head: str) -> tuple[int, int]:
    """Read the start and end in the line that maps and smaps have for a mapping."""
    lo, _, rest = head.partition("-")
    return int(lo, 16), int(rest.partition(" ")[0], 16)


def _span(head: str, base: int, end: int) -> Span | None:
    """Read that line, cut to [base, end)."""
    lo, hi = _addresses(head)
    if lo >= end or hi <= base:
        return None
    fields = head.split(None, 5)
    name = fields[5].strip() if len(fields) > 5 else ""
    return Span(max(lo, base), min(hi, end), fields[1], name)


def spans(base: int, size: int) -> list[Span]:
    """Return the mappings in [base, base + size); fast, and needs little memory."""
    end = base + size
    with Path("/proc/self/maps").open(errors="replace") as maps:
        below = takewhile(lambda line: _addresses(line)[0] < end, maps)
        in_range = (_span(line, base, end) for line in below)
        return [span for span in in_range if span is not None]


def pieces(base: int, size: int) -> list[Piece]:
    """Return the mappings in [base, base + size) with their sizes and flags."""
    in_range: list[Piece] = []
    span: Span | None = None
    kib: dict[str, int] = {}
    with Path("/proc/self/smaps").open(errors="replace") as smaps:
        for line in smaps:
            if "-" in line.partition(" ")[0]:
                if _addresses(line)[0] >= base + size:
                    break
                span, kib = _span(line, base, base + size), {}
            elif span is not None:
                key, _, rest = line.partition(":")
                if key == "VmFlags":
                    in_range.append(Piece(*span, kib, frozenset(rest.split())))
                elif rest.endswith(" kB\n"):
                    kib[key] = int(rest.split()[0])
    return in_range


def runs(base: int, size: int, perms: str = COMMITTED) -> list[tuple[int, int]]:
    """Return the pieces that have these permissions as (offset, length), neighbours joined."""
    joined: list[tuple[int, int]] = []
    for span in spans(base, size):
        if span.perms == perms:
            offset, length = span.start - base, span.end - span.start
            if joined and sum(joined[-1]) == offset:
                offset, length = joined[-1][0], joined.pop()[1] + length
            joined.append((offset, length))
    return joined


def nbytes(base: int, size: int, perms: str = COMMITTED) -> int:
    """Return how many bytes of [base, base + size) have these permissions."""
    return sum(length for _, length in runs(base, size, perms))


def total_kib(base: int, size: int, key: str) -> int:
    """Return the sum of a size such as ``Rss`` over the mappings that touch the range."""
    return sum(piece.kib[key] for piece in pieces(base, size))


def perms_by_page(base: int, size: int, page: int) -> list[str]:
    """Return the permissions of each page; the empty string where nothing is mapped."""
    perms = [""] * (size // page)
    for span in spans(base, size):
        first, end = (span.start - base) // page, (span.end - base) // page
        perms[first:end] = [span.perms] * (end - first)
    return perms


def is_mapped(address: int) -> bool:
    """Whether any mapping contains the address."""
    return bool(spans(address, 1))


def _field(path: str, key: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def status(key: str) -> int:
    """Return a size of /proc/self/status in bytes."""
    return _field("/proc/self/status", key)


def meminfo(key: str) -> int:
    """Return a size of /proc/meminfo in bytes."""
    return _field("/proc/meminfo", key)


def vm_setting(name: str) -> int:
    """Return /proc/sys/vm/NAME."""
    return int(Path("/proc/sys/vm", name).read_text())


def peek(address: int, length: int = 1) -> bytes:
    """Read memory at an address, which must be readable."""
    return ctypes.string_at(address, length)


class Hang(BaseException):
    """Raised in a child that takes too long."""


def _hang(*_: object) -> None:
    # If the exception is swallowed, as in a hook of os.fork, the next alarm ends the process.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(2)
    raise Hang


def _fork_and_run(function: Callable[[], Any]) -> tuple[int, bytes]:
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read_end)
            faulthandler.disable()
            signal.signal(signal.SIGALRM, _hang)
            signal.alarm(PATIENCE)
            # For a loop in C, which no handler interrupts: the default action ends the child.
            signal.setitimer(signal.ITIMER_PROF, PATIENCE + 1)
            try:
                answer = (True, function())
            except BaseException:  # noqa: BLE001, RUF100
                answer = (False, traceback.format_exc())
            with open(write_end, "wb") as pipe:  # noqa: PTH123, RUF100
                pipe.write(pickle.dumps(answer))
        finally:
            os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as pipe:  # noqa: PTH123, RUF100
        answer_bytes = pipe.read()
    _, wait_status = os.waitpid(pid, 0)
    return wait_status, answer_bytes


def in_child(function: Callable[[], Answer]) -> Answer:
    """Run the function in a forked child and return its answer; a failure there fails the test.

    A child that hangs is ended by a timer, so that a hang fails one test instead of stopping all
    of them.
    """
    wait_status, answer_bytes = _fork_and_run(function)
    if os.WIFSIGNALED(wait_status):
        number = os.WTERMSIG(wait_status)
        pytest.fail(f"the child was ended by {signal.Signals(number).name}")
    assert answer_bytes, "the child ended without an answer"
    passed, answer = pickle.loads(answer_bytes)
    if not passed:
        pytest.fail(f"in the child:\n{answer}")
    return answer  # type: ignore[no-any-return]


def faults(address: int) -> bool:
    """Tell whether reading a byte at the address ends a process by SIGSEGV."""
    wait_status, _ = _fork_and_run(lambda: peek(address))
    return os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status) == signal.SIGSEGV


def fresh_python(script: str) -> Any:
    """Run a script in a fresh interpreter and return what it prints, read as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, f"status {done.returncode}\n{done.stderr}"
    return json.loads(done.stdout)
