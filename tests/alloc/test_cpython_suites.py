"""CPython's own tests of BytesIO, bytearray and list, with the containers that grow instead."""

import json
import subprocess
import sys

import pytest

from helpers.cpython_failures import FAILURES
from helpers.witness import PATIENCE


@pytest.mark.heavy
@pytest.mark.parametrize("suite", FAILURES)
def test_suite(suite: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly the tests that are listed with a reason fail."""
    command = [sys.executable, "-m", "helpers.cpython_suites", suite]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=PATIENCE)
    result = json.loads(done.stdout)
    if "missing" in result:
        pytest.skip(result["missing"])
    passed, failed = set(result["passed"]), result["failed"]
    with capsys.disabled():
        print(f"\n{suite}: {len(passed)} of {len(passed) + len(failed)} tests of CPython pass")
    reasons = {test for tests in FAILURES[suite].values() for test in tests}
    unexpected = {test: failed[test] for test in set(failed) - reasons}
    assert unexpected == {}
    assert passed & reasons == set()
