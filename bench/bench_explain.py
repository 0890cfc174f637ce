"""Explaining a process with 30,000 mappings, beside psutil's memory_maps and the command smem."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

import psutil
import pytest

from pyreserve import KiB, MiB, format_size
from pyreserve.procmem import explain

MAPPINGS = 30_000
ROUNDS = 12
CHILD = f"""
import signal
from pyreserve import PAGE_SIZE, reserve
region = reserve({MAPPINGS} * PAGE_SIZE)
for i in range(0, {MAPPINGS}, 2):
    region.commit(i * PAGE_SIZE, PAGE_SIZE)
    if i % 4 == 0:
        region.view(i * PAGE_SIZE, PAGE_SIZE)[0] = 1
print("ready", flush=True)
signal.pause()
"""
# Not ru_maxrss: it includes the memory of the process before it executed this program.
PEAK = """
import sys
from pyreserve import explain
from pyreserve._system import proc
before = proc.status_kib()["VmHWM"]
assert explain(int(sys.argv[1])).mappings > 30_000
print(proc.status_kib()["VmHWM"] - before)
"""


@pytest.fixture(scope="module")
def many() -> Iterator[int]:
    """PID of a process with MAPPINGS mappings."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
        child.kill()


def _beside(benchmark: Any, pid: int, group: str, name: str, other: Callable[[], object]) -> None:
    """Time `other` before each round of `explain`, so drift of the machine affects both."""
    times: list[float] = []

    def prepare() -> None:
        start = perf_counter_ns()
        other()
        times.append(float(perf_counter_ns() - start))

    benchmark.group = group
    benchmark.extra_info.update(calls=1, beside=name, beside_ns=times)
    benchmark.pedantic(lambda: explain(pid), setup=prepare, rounds=ROUNDS)


def bench_explain_psutil(benchmark: Any, many: int) -> None:
    process = psutil.Process(many)
    benchmark.extra_info["aim"] = "5 times faster"
    _beside(
        benchmark,
        many,
        "explain 30,000 mappings, psutil",
        "psutil memory_maps(grouped=False)",
        lambda: process.memory_maps(grouped=False),
    )


@pytest.mark.skipif(shutil.which("smem") is None, reason="smem is not installed (Debian: smem)")
def bench_explain_smem(benchmark: Any, many: int) -> None:
    # smem filters by command line: only this child's contains the text.
    command = ["smem", "-c", "pid uss pss rss", "-P", "region.commit"]
    benchmark.extra_info["aim"] = "10 times faster"
    _beside(
        benchmark,
        many,
        "explain 30,000 mappings, smem",
        "the command smem -P",
        lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True),
    )


def bench_explain_peak(benchmark: Any, many: int) -> None:
    """Peak memory of `explain`, above that of an interpreter with pyreserve imported."""
    benchmark.group = "explain 30,000 mappings in a new process"

    def measure() -> int:
        completed = subprocess.run(
            [sys.executable, "-c", PEAK, str(many)], capture_output=True, text=True, check=True
        )
        return int(completed.stdout) * KiB

    peak = benchmark.pedantic(measure, rounds=3)
    benchmark.extra_info.update(
        calls=1,
        note=f"peak {format_size(peak)} above the interpreter, aim {format_size(60 * MiB)}",
    )
