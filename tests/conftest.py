"""Fixtures and settings that all tests share."""

import gc
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

import pyreserve
from pyreserve import PAGE_SIZE, Region

# Deadlines would let the machine's load decide a test.
settings.register_profile("pyreserve", deadline=None, print_blob=True)
settings.load_profile("pyreserve")


# A shell lets what it runs in the background ignore Ctrl-C, and so would all that tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """State machines are heavy: thousands of steps against a model."""
    for item in items:
        if item.path.stem.endswith("_machine"):
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session", autouse=True)
def _collections_are_quick() -> None:
    """Tests that collect garbage need not look at all the modules that were imported, each time."""
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
