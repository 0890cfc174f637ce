"""Benchmarks run side by side with what they are compared with; a table of ratios ends the run."""

import ctypes
import subprocess
from pathlib import Path
from statistics import median
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def c_loops(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """bench/c_loops.c, compiled for this run."""
    library = tmp_path_factory.mktemp("c_loops") / "c_loops.so"
    subprocess.run(
        ["cc", "-std=c11", "-O2", "-shared", "-fPIC", "-o", library, HERE / "c_loops.c"],
        check=True,
    )
    loops = ctypes.CDLL(str(library))
    loops.reserve_release.restype = ctypes.c_double
    loops.reserve_release.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_long)
    loops.commit.restype = ctypes.c_double
    loops.commit.argtypes = (ctypes.c_size_t, ctypes.c_long)
    return loops


def _fastest(bench: Any) -> float:
    calls: int = bench.extra_info.get("calls", 1)
    return float(bench.stats.min) * 1e9 / calls


def _beside_c(bench: Any) -> str:
    """Compare each round with the C loop that ran just before."""
    calls: int = bench.extra_info["calls"]
    in_c = bench.extra_info["c_loop_ns"]
    rounds = [spent * 1e9 / calls for spent in bench.stats.data][-len(in_c) :]
    more = median(ours - theirs for ours, theirs in zip(rounds, in_c, strict=True))
    return f"{median(rounds):14,.0f}   C loop {median(in_c):,.0f}, median difference {more:+,.0f}"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print each group side by side: nanoseconds a call."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = {}
    for bench in session.benchmarks if session else []:
        groups.setdefault(bench.group or bench.name, []).append(bench)
    if not groups:
        return
    terminalreporter.section("side by side, ns a call")
    width = max(len(bench.name) for group in groups.values() for bench in group)
    for group, benches in groups.items():
        reference = next((b for b in benches if b.extra_info.get("reference")), None)
        terminalreporter.write_line(group)
        for bench in benches:
            if "c_loop_ns" in bench.extra_info:
                line = _beside_c(bench)
            else:
                line = f"{_fastest(bench):14,.0f}"
                if reference is not None and bench is not reference:
                    line += f"   x{_fastest(bench) / _fastest(reference):.3g}"
            terminalreporter.write_line(f"  {bench.name:{width}} {line}")
