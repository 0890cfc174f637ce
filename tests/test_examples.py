"""Each example runs as a script and prints the expected lines."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.witness import PATIENCE

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))

EXPECTED = {
    "cluster_costs.py": r"(tcp://127\.0\.0\.1:\d+: \d+ cells in [\d.]+ s\n){2}"
    r"Costs of several machines\n\n2 machines, ",
    "mark_and_sweep.py": r"1 roots: ([1-9]\d*) objects reached, [1-9]\d* freed; (?s:.*)"
    r"0 roots: 0 objects reached, \1 freed; ",
    "request_scoped_arena.py": r"request 301: .* RSS [\d.]+ MiB\n",
    "shared_arena.py": r"(?m:^(4800) of \1 blocks held their patterns to the end$)",
}


@pytest.mark.skipif(not EXAMPLES, reason="the examples are not beside the tests here")
def test_each_example_has_an_expected_output() -> None:
    assert {example.name for example in EXAMPLES} == EXPECTED.keys()


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, tmp_path: Path) -> None:
    if example.name == "cluster_costs.py" and find_spec("distributed") is None:
        pytest.skip("Dask (extra dask) is not installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", example],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=PATIENCE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert re.search(EXPECTED[example.name], done.stdout), done.stdout
