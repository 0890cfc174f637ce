"""Fixtures and settings for all tests."""

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

# Test the installed package, although `python -m pytest` puts the checkout first.
sys.path.sort(key=lambda entry: Path(entry).resolve() == TESTS.parent)

import pyreserve  # noqa: E402
from pyreserve import PAGE_SIZE, Region  # noqa: E402

# Selected by --hypothesis-profile. No profile has a deadline: results must not depend on load.
for name, derandomize, examples in (
    ("default", True, 100),
    ("ci", False, 200),
    ("long", False, 5000),
):
    settings.register_profile(
        name,
        derandomize=derandomize,
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile("default")


# A background job of a shell ignores SIGINT, and the processes that tests start would inherit it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Use all CPUs for ``-n auto``, but at most four: a worker needs 200 MiB and more."""
    return min(4, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark state machines as heavy: they run thousands of steps against a model."""
    for item in items:
        if item.path.stem.endswith("_machine"):
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session", autouse=True)
def _children_import_the_same() -> Iterator[None]:
    """Run in a directory without the package, since ``python -c`` imports from it first."""
    before = Path.cwd()
    os.chdir(TESTS)
    yield
    os.chdir(before)


@given(st.none())
def _first_example(_: None) -> None:
    pass


@pytest.fixture(scope="session", autouse=True)
def _hypothesis_has_started() -> None:
    _first_example()  # Hypothesis uses gc.get_referrers once, which gc.freeze breaks


@pytest.fixture(scope="module", autouse=True)
def _collections_are_quick(_hypothesis_has_started: None) -> None:
    """Freeze imported objects, so that tests collect garbage faster."""
    gc.collect()
    gc.freeze()


def _end(region: Region) -> None:
    if not region.released:
        gc.collect()
        region.release()


@pytest.fixture
def region() -> Iterator[Region]:
    """A region of 64 OS pages, released at the end unless the test did."""
    reserved = pyreserve.reserve(64 * PAGE_SIZE)
    yield reserved
    _end(reserved)


@pytest.fixture(params=["charge", "noreserve"])
def any_mode(request: pytest.FixtureRequest) -> Iterator[Region]:
    """A region of 64 OS pages in each accounting mode."""
    reserved = pyreserve.reserve(64 * PAGE_SIZE, mode=request.param)
    yield reserved
    _end(reserved)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Let idle workers steal tests. As an option in addopts it would disable benchmarks."""
    from xdist.scheduler import WorkStealingScheduling  # only where it is used

    return WorkStealingScheduling(config, log)
