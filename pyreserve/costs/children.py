"""Run a child process that does a job and answers line by line."""

import json
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

GRACE = 3.0
"""Seconds after the deadline until a child that has not ended is killed."""

_POLL = 3600.0  # seconds that one poll may wait for an answer


def start_of(module: str) -> str:
    """Return the code of a child that runs the function ``main`` of a module."""
    # Set the caller's sys.path before any import: with -c it begins with the working directory.
    return f"import sys; sys.path[:] = sys.argv[1:]; from {module} import main; main()"


def answers(
    start: str, job: object, deadline: float, grace: float = GRACE
) -> Iterator[dict[str, Any]]:
    """Run a child process; yield its answers, and finally ``died`` if it did not finish its job.

    The child is killed when the iteration ends, for whatever reason.

    Args:
        start: the code it runs; see `start_of`.
        job: it is pickled for the child's standard input.
        deadline: time.monotonic() at which the job should end, in seconds.
        grace: seconds after the deadline until a child that has not ended is killed.
    """
    child, done = None, False
    with ExitStack() as stack:
        try:
            try:
                stderr = stack.enter_context(tempfile.TemporaryFile())
                with _sigint_blocked():  # an interrupt before `child` is bound would leak it
                    child = _start(start, job, stderr)
            except OSError as error:
                yield {"died": f"the measuring process cannot be started: {error}"}
                return
            for answer in _read_answers(child, deadline + grace):
                done = done or "done" in answer
                yield answer
            if done:
                return
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline + grace - time.monotonic()))
        finally:
            if child is not None:
                child.kill()
                child.wait()
                assert child.stdout is not None
                child.stdout.close()
        if time.monotonic() < deadline:
            yield {"died": _describe_exit(child.returncode, stderr)}


@contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Delay Ctrl-C until the end of the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(start: str, job: object, stderr: IO[bytes]) -> "subprocess.Popen[bytes]":
    if not sys.executable:
        msg = "sys.executable does not name a Python interpreter"
        raise FileNotFoundError(msg)
    # Python itself ignores entries of sys.path that are not strings.
    command = [sys.executable, "-c", start, *(path for path in sys.path if isinstance(path, str))]
    # Pass the job in a file: unlike a pipe it cannot block or raise EPIPE.
    with tempfile.TemporaryFile() as stdin:
        pickle.dump(job, stdin)
        stdin.seek(0)
        # A new session: Ctrl-C in the terminal reaches only the parent, which kills the child.
        return subprocess.Popen(
            command,
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )


def _read_answers(child: "subprocess.Popen[bytes]", until: float) -> Iterator[dict[str, Any]]:
    """Yield a child's answers until its output ends or time.monotonic() reaches `until`."""
    assert child.stdout is not None
    pipe, rest = child.stdout.fileno(), b""
    readable = select.poll()
    readable.register(pipe, select.POLLIN)
    while (left := until - time.monotonic()) > 0:
        if not readable.poll(1000 * min(left, _POLL)):
            continue
        chunk = os.read(pipe, 1 << 16)
        if not chunk:
            return
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # Ignore other output: a sitecustomize may print.
            with suppress(ValueError):
                answer = json.loads(line)
                if isinstance(answer, dict):
                    yield answer


def _describe_exit(status: int, stderr: IO[bytes]) -> str:
    if status < 0:
        names = {member.value: member.name for member in signal.Signals}
        name = names.get(-status, f"signal {-status}")  # most real-time signals have no name
        hint = ": the system may be out of memory" if status == -signal.SIGKILL else ""
        return f"the measuring process was ended by {name}{hint}"
    stderr.seek(0)
    last = stderr.read().decode(errors="replace").strip().rpartition("\n")[2]
    return f"the measuring process ended with status {status}: {last}"
