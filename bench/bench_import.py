"""Starting Python and importing the package, beside starting Python alone."""

import os
import subprocess
import sys
from typing import Any

import pytest

ROUNDS = 20


@pytest.mark.parametrize(
    ("statement", "aim"),
    [
        ("pass", ""),
        ("import typing, weakref, threading, _cffi_backend", ""),
        ("import pyreserve", "15 ms more than pass"),
        ("from pyreserve import reserve", ""),
        ("from pyreserve import Arena", ""),
        ("from pyreserve import explain", ""),
    ],
)
def bench_import(benchmark: Any, tmp_path: Any, statement: str, aim: str) -> None:
    """A fresh interpreter that executes one statement, its modules compiled before."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def run() -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, env=environment)

    benchmark.group = "import"
    benchmark.name = statement
    benchmark.extra_info.update(calls=1, reference=statement == "pass")
    if aim:
        benchmark.extra_info["aim"] = aim
    run()
    benchmark.pedantic(run, rounds=ROUNDS)
