"""The command ``pyreserve`` in a forked child: a process of its own, spared an interpreter's start.

For all that the command says and refuses. What depends on a start of its own (limits, memory, the
terminal, Ctrl-C) runs ``python -m pyreserve``.
"""

import faulthandler
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import NoReturn

from helpers.witness import PATIENCE
from pyreserve import costs as _costs  # noqa: F401
from pyreserve import procmem  # noqa: F401
from pyreserve.cli import app, costs, doctor, explain, main, screen, vsz  # noqa: F401

# The parent imports what its children need, so that they don't.


def run(
    *arguments: str | Path,
    env: Mapping[str, str] = os.environ,
    prepare: Callable[[], object] = lambda: None,
) -> "subprocess.CompletedProcess[str]":
    """Run the command in a child after calling `prepare` there; return its status and output."""
    argv = ["pyreserve", *map(str, arguments)]
    with TemporaryFile() as out, TemporaryFile() as err:
        pid = os.fork()
        if pid == 0:
            _run_in_child(argv, dict(env), (out.fileno(), err.fileno()), prepare)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        out.seek(0)
        err.seek(0)
        return subprocess.CompletedProcess(argv, status, out.read().decode(), err.read().decode())


def _run_in_child(
    argv: list[str], env: dict[str, str], files: tuple[int, int], prepare: Callable[[], object]
) -> NoReturn:
    status = 70
    try:
        faulthandler.disable()
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in enumerate(files, 1):
            os.dup2(file, number)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(number, mode, encoding="utf-8", errors=errors, closefd=False)
            for number, mode, errors in (
                (0, "r", "strict"),
                (1, "w", "strict"),
                (2, "w", "backslashreplace"),
            )
        )
        os.environ.clear()
        os.environ.update(env)
        sys.argv = argv
        status = _status_of(prepare)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def _status_of(prepare: Callable[[], object]) -> int:
    """Run the command; return the status that the interpreter would end with."""
    try:
        prepare()
        main()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:  # noqa: BLE001, RUF100
        traceback.print_exc()
        return 1
    return 0
