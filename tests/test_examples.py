"""The examples run, and say what they are to show."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_arena import needs_64_bits

EXAMPLES = Path(__file__).parent.parent / "examples"
TELLING = {
    "mark_and_sweep": "objects can be reached",
    "request_scoped_arena": "0 B in use",
    "shared_arena": "24,000 blocks allocated, 24,000 freed, 0 mistakes",
}


@pytest.mark.skipif(not EXAMPLES.exists(), reason="the wheel has no examples")
@needs_64_bits
class TestExamples:
    def test_each_has_a_telling_line(self) -> None:
        """No example is left out here."""
        assert sorted(TELLING) == sorted(path.stem for path in EXAMPLES.glob("*.py"))

    @pytest.mark.parametrize("name", TELLING)
    def test_it_runs(self, name: str) -> None:
        """It ends well, quietly, and with the line that it is about."""
        done = subprocess.run(
            [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, check=False
        )

        assert (done.returncode, done.stderr) == (0, "")
        assert TELLING[name] in done.stdout
