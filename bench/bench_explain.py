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
# Not ru_maxrss: that begins with what the process had before it ran this program.
PEAK = """
import sys
import pyreserve
from pyreserve._system import proc
before = proc.status_kib()["VmHWM"]
assert pyreserve.explain(int(sys.argv[1])).mappings > 30_000
print(proc.status_kib()["VmHWM"] - before)
"""


@pytest.fixture(scope="module")
def many() -> Iterator[int]:
    """The pid of a process with as many mappings."""
    with subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        yield child.pid
        child.kill()


def _beside(benchmark: Any, pid: int, group: str, name: str, other: Callable[[], object]) -> None:
    """Run the other before each round: the machine's mood swings hit both sides alike."""
    took: list[float] = []

    def prepare() -> None:
        start = perf_counter_ns()
        other()
        took.append(float(perf_counter_ns() - start))

    benchmark.group = group
    benchmark.extra_info.update(calls=1, beside=name, beside_ns=took)
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
    # Its filter is for command names: what this child runs is in no other's.
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
    """How much memory it takes at most, beyond the interpreter's with pyreserve imported."""
    benchmark.group = "explain 30,000 mappings in a process of its own"

    def measure() -> int:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(many)], capture_output=True, text=True, check=True
        )
        return int(done.stdout) * KiB

    peak = benchmark.pedantic(measure, rounds=3)
    benchmark.extra_info.update(
        calls=1,
        note=f"peak {format_size(peak)} above the interpreter's, aim {format_size(60 * MiB)}",
    )
