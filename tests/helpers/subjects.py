"""Live processes to inspect: started, brought to a known state, stopped and always ended."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import pytest

from helpers.witness import PATIENCE

THREADS, PIECES = 64, 30_000
JAVA_HEAP_MIB, STACK_KIB = 48, 8192

_HOLD = """
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
static void hold(void) { puts("ready"); fflush(stdout); for (;;) pause(); }
"""

_SIMPLE = f"{_HOLD}int main(void) {{ hold(); }}"

_RESTARTING = f"""
{_HOLD}
int main(int count, char **arguments) {{
    if (count == 1) {{ puts("ready"); fflush(stdout); }}
    execl(arguments[0], arguments[0], "again", (char *)NULL);
    return 1;
}}
"""

_THREADS = f"""
#include <malloc.h>
{_HOLD}
static pthread_barrier_t all;
static void *work(void *unused) {{
    volatile char *block = malloc(1000);
    block[0] = 1;
    pthread_barrier_wait(&all);
    for (;;) pause();
    return unused;
}}
int main(void) {{
    pthread_t thread;
    mallopt(M_ARENA_MAX, {THREADS + 1}); /* one is the main thread's */
    pthread_barrier_init(&all, NULL, {THREADS + 1});
    for (int i = 0; i < {THREADS}; i++)
        if (pthread_create(&thread, NULL, work, NULL)) return 1;
    pthread_barrier_wait(&all);
    hold();
}}
"""

_MAPPINGS = f"""
#include <sys/mman.h>
{_HOLD}
int main(void) {{
    size_t page = sysconf(_SC_PAGESIZE);
    char *base = mmap(NULL, {PIECES} * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) return 1;
    for (size_t i = 0; i < {PIECES}; i += 2) {{
        if (mprotect(base + i * page, page, PROT_READ | PROT_WRITE)) return 1;
        if (i % 6 == 0) base[i * page] = 1;
    }}
    hold();
}}
"""

_SANITIZED = f"""
{_HOLD}
int main(void) {{
    volatile char *block = malloc(100);
    block[99] = 1;
    hold();
}}
"""


def kib_of(pid: int | None, file: str) -> dict[str, int]:
    """Return the sizes that a file such as /proc/PID/status or smaps_rollup holds, in KiB."""
    text = Path(f"/proc/{pid}/{file}").read_text(errors="replace")
    return {key: int(kib) for key, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def wait_until(condition: Callable[[], bool], event: str) -> None:
    """Wait until the condition holds; fail after `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"waited for {event} in vain")
        time.sleep(0.005)


def thread_states(pid: int) -> set[str]:
    """Return the state of each thread, such as ``R``, ``S`` or ``T``."""
    states = set()
    for stat in Path(f"/proc/{pid}/task").glob("*/stat"):
        states.add(stat.read_bytes().rpartition(b") ")[2][:1].decode())
    return states


def stop(pid: int) -> None:
    """Stop a process and wait until every thread of it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: thread_states(pid) == {"T"}, f"all threads of {pid} to stop")


def wait_for_line(stream: IO[bytes], pattern: str) -> None:
    """Read until a line matches."""
    deadline = time.monotonic() + PATIENCE
    seen = b""
    while not re.search(pattern.encode(), seen, re.MULTILINE):
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([stream], [], [], left)[0]:
            pytest.fail(f"waited for {pattern!r} in vain; there was {seen[-1000:]!r}")
        got = os.read(stream.fileno(), 1 << 16)
        if not got:
            pytest.fail(f"it ended before {pattern!r}; there was {seen[-1000:]!r}")
        seen += got


@contextmanager
def running(
    *command: str | Path | bytes, ready: str = "^ready", cwd: Path | None = None
) -> Iterator[int]:
    """Run a command until the end of the block, which begins when it has said that it is ready."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=cwd
    )
    assert process.stdout is not None
    try:
        wait_for_line(process.stdout, ready)
        yield process.pid
    finally:
        process.kill()  # a stopped process dies of it too
        process.wait()
        process.stdout.close()


@contextmanager
def running_python(
    script: str, *arguments: str | Path | bytes, cwd: Path | None = None
) -> Iterator[int]:
    """Run a script that prints ``ready`` and holds, see `HOLD`."""
    with running(sys.executable, "-c", f"{script}\n{HOLD}", *arguments, cwd=cwd) as pid:
        yield pid


HOLD = "import signal; print('ready', flush=True)\nwhile True: signal.pause()"


def tool(name: str) -> str:
    """Return the path of a program, or skip the test."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def compiled(folder: Path, name: str, source: str, *options: str) -> Path:
    """Compile a program, or skip the test if that fails."""
    program, text = folder / name, folder / f"{name}.c"
    text.write_text(source)
    done = subprocess.run(
        [tool("gcc"), "-O1", "-pthread", *options, "-o", program, text],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        pytest.skip(f"gcc {' '.join(options)} can't build here: {reason[0]}")
    return program


def simple_program(folder: Path, *options: str) -> Path:
    """Compile a program that does nothing."""
    return compiled(folder, "simple", _SIMPLE, *options)


def restarting_program(folder: Path) -> Path:
    """Compile a program that executes itself again and again."""
    return compiled(folder, "restarting", _RESTARTING)


def mappings_program(folder: Path) -> Path:
    """Compile the program with `PIECES` mappings."""
    if int(Path("/proc/sys/vm/max_map_count").read_text()) < 2 * PIECES:
        pytest.skip("vm.max_map_count allows too few mappings")
    return compiled(folder, "mappings", _MAPPINGS)


# -- the processes, inspected while stopped -----------------------------------------------------


def _vsz(folder: Path) -> list[str | Path]:
    return [sys.executable, "-m", "pyreserve", "vsz", "--hold"]


def _numpy(folder: Path) -> list[str | Path]:
    script = "import numpy; ones = numpy.ones(8 << 20)"
    return [sys.executable, "-c", f"{script}\n{HOLD}"]


def _node(folder: Path) -> list[str | Path]:
    script = (
        "globalThis.memory = new WebAssembly.Memory({initial: 1});"
        "console.log('ready'); setInterval(() => {}, 1e6)"
    )
    return [tool("node"), "-e", script]


def _java(folder: Path) -> list[str | Path]:
    # The JVM prints the debugger's address and waits for a debugger before it runs Java code.
    agent = "-agentlib:jdwp=transport=dt_socket,server=y,suspend=y,address=127.0.0.1:0"
    return [tool("java"), f"-Xmx{JAVA_HEAP_MIB}m", agent, "-version"]


def _sanitized(folder: Path) -> list[str | Path]:
    return [compiled(folder, "sanitized", _SANITIZED, "-fsanitize=address")]


def _threads(folder: Path) -> list[str | Path]:
    program = compiled(folder, "threads", _THREADS)
    return ["sh", "-c", f'ulimit -S -s {STACK_KIB} && exec "$0"', program]


def _mappings(folder: Path) -> list[str | Path]:
    return [mappings_program(folder)]


class Subject(NamedTuple):
    """The command of a process, and the line it prints when it is ready."""

    command: Callable[[Path], list[str | Path]]
    ready: str = "^ready"


SUBJECTS = {
    "vsz": Subject(_vsz, r"^pid \d+ stays"),
    "numpy": Subject(_numpy),
    "node": Subject(_node),
    "java": Subject(_java, "^Listening"),
    "sanitized": Subject(_sanitized),
    "threads": Subject(_threads),
    "mappings": Subject(_mappings),
}


class Stopped:
    """Stopped processes of `SUBJECTS`, each started at first use."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder = folder
        self._stack = stack
        self._pids: dict[str, int] = {}

    def __call__(self, name: str) -> int:
        """Return the PID of the process of this name."""
        if name not in self._pids:
            subject = SUBJECTS[name]
            command = subject.command(self._folder)
            pid = self._stack.enter_context(running(*command, ready=subject.ready))
            stop(pid)
            self._pids[name] = pid
        return self._pids[name]
