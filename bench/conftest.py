"""Benchmarks run side by side with what they are compared with; a table of ratios ends the run."""

import ctypes
import subprocess
from pathlib import Path
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


def _nanoseconds(bench: Any) -> float:
    calls: int = bench.extra_info.get("calls", 1)
    return float(bench.stats.min) * 1e9 / calls


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print each group's fastest rounds beside those of its reference."""
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = {}
    for bench in session.benchmarks if session else []:
        groups.setdefault(bench.group or bench.name, []).append(bench)
    if not groups:
        return
    terminalreporter.section("side by side, fastest round, ns a call")
    width = max(len(bench.name) for group in groups.values() for bench in group)
    for group, benches in groups.items():
        reference = next((b for b in benches if b.extra_info.get("reference")), None)
        terminalreporter.write_line(group)
        for bench in benches:
            spent, line = _nanoseconds(bench), ""
            if reference is not None and bench is not reference:
                base = _nanoseconds(reference)
                line = f"{spent - base:+14,.0f}   x{spent / base:.3g}"
            terminalreporter.write_line(f"  {bench.name:{width}} {spent:14,.0f}{line}")
