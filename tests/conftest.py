"""Fixtures and settings that all tests share."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TESTS = Path(__file__).resolve().parent

pytest.register_assert_rewrite("helpers")

# The installed package is tested; `python -m pytest` puts the checkout before it.
sys.path.sort(key=lambda entry: Path(entry).resolve() == TESTS.parent)

import pyreserve  # noqa: E402
from pyreserve import PAGE_SIZE, Region  # noqa: E402

# Chosen by --hypothesis-profile. No profile lets the machine's load decide a test.
for name, derandomize, most in (("default", True, 100), ("ci", False, 200), ("long", False, 5000)):
    settings.register_profile(
        name,
        derandomize=derandomize,
        max_examples=most,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile("default")


# A shell lets what it runs in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Let ``-n auto`` take the CPUs there are, but at most four: each takes 200 MiB and more."""
    return min(4, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """State machines are heavy: thousands of steps against a model."""
    for item in items:
        if item.path.stem.endswith("_machine"):
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session", autouse=True)
def _children_import_the_same() -> Iterator[None]:
    """``python -c`` puts the working directory first: let that be one without the package."""
    before = Path.cwd()
    os.chdir(TESTS)
    yield
    os.chdir(before)


@given(st.none())
def _first_example(_: None) -> None:
    pass


@pytest.fixture(scope="session", autouse=True)
def _hypothesis_has_started() -> None:
    _first_example()  # Hypothesis asks who refers to its Random, and freeze hides the answer


@pytest.fixture(scope="module", autouse=True)
def _collections_are_quick(_hypothesis_has_started: None) -> None:
    """Tests that collect garbage need not look at what was imported and collected before."""
    gc.collect()
    gc.freeze()


def _end(region: Region) -> None:
    if not region.released:
        gc.collect()
        region.release()


@pytest.fixture
def region() -> Iterator[Region]:
    """A region of 64 OS pages, released at the end unless the test did."""
    made = pyreserve.reserve(64 * PAGE_SIZE)
    yield made
    _end(made)


@pytest.fixture(params=["charge", "noreserve"])
def any_mode(request: pytest.FixtureRequest) -> Iterator[Region]:
    """A region of 64 OS pages in each of the two ways to account."""
    made = pyreserve.reserve(64 * PAGE_SIZE, mode=request.param)
    yield made
    _end(made)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let idle workers steal tests. As an option in addopts it would disable benchmarks."""
    from xdist.scheduler import WorkStealingScheduling  # only where it is used

    return WorkStealingScheduling(config, log)
