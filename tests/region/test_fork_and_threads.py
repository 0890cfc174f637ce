"""Regions in forked children, and in many threads at once."""

import contextlib
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from random import Random
from typing import Literal

import pytest

import pyreserve
from helpers import witness
from pyreserve import PAGE_SIZE, Region, ReleasedError, ViewError
from pyreserve._system import forks

Mode = Literal["charge", "noreserve"]
modes = pytest.mark.parametrize("mode", ["charge", "noreserve"])


@contextlib.contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def assert_books_are_true(region: Region) -> None:
    seen = witness.runs(region.base, region.size)
    assert region.committed_runs() == seen
    assert region.committed == sum(length for _, length in seen)
    assert region.reserved == region.size


class TestForkCopy:
    @modes
    def test_the_child_has_a_copy(self, mode: Mode) -> None:
        """A child reads bytes written before the fork; later writes are private to each process."""
        region = pyreserve.reserve(8 * PAGE_SIZE, mode=mode)
        region.commit(0, 4 * PAGE_SIZE)
        view = region.view(0, 4)
        view[:] = b"both"

        def child() -> bytes:
            contents = bytes(view)
            view[:] = b"mine"
            assert bytes(region.view(0, 4)) == b"mine"
            region.commit(4 * PAGE_SIZE, PAGE_SIZE)
            assert_books_are_true(region)
            return contents

        contents = witness.in_child(child)

        assert contents == b"both"
        assert bytes(view) == b"both"
        assert region.committed == 4 * PAGE_SIZE
        assert_books_are_true(region)
        view.release()
        region.release()

    def test_the_childs_views_are_guarded(self) -> None:
        """An inherited view pins bytes of the child, and in the child only."""
        region = pyreserve.reserve(8 * PAGE_SIZE)
        region.commit(0, region.size)
        held = [region.view(0, 4)]

        def child() -> None:
            with pytest.raises(ViewError):
                region.decommit(0, PAGE_SIZE)
            with pytest.raises(ViewError):
                region.release()
            held.clear()
            region.decommit(0, PAGE_SIZE)
            region.release()

        witness.in_child(child)

        assert bytes(held[0]) == bytes(4)
        held.clear()
        region.release()

    def test_the_child_may_release(self) -> None:
        """A release in the child does not affect the parent."""
        region = pyreserve.reserve(8 * PAGE_SIZE)
        region.commit(0, PAGE_SIZE)
        region.view(0, 4)[:] = b"kept"

        witness.in_child(region.release)

        assert not region.released
        assert bytes(region.view(0, 4)) == b"kept"
        region.release()

    def test_an_unused_region(self) -> None:
        """A region that was unused before the fork can be used in the child."""
        region = pyreserve.reserve(8 * PAGE_SIZE)

        def child() -> None:
            region.commit(0, PAGE_SIZE)
            assert_books_are_true(region)
            region.release()

        witness.in_child(child)

        region.release()


class TestForkWipe:
    @modes
    def test_the_child_reads_zero(self, mode: Mode) -> None:
        """The bytes are committed in the child and read zero; the parent keeps its contents."""
        region = pyreserve.reserve(8 * PAGE_SIZE, mode=mode, fork="wipe")
        region.commit(PAGE_SIZE, 4 * PAGE_SIZE)
        view = region.view(PAGE_SIZE, 4 * PAGE_SIZE)
        view[:] = b"\xaa" * (4 * PAGE_SIZE)

        def child() -> bytes:
            contents = bytes(view)
            view[:4] = b"mine"
            assert region.committed_runs() == [(PAGE_SIZE, 4 * PAGE_SIZE)]
            assert_books_are_true(region)
            return contents

        assert witness.in_child(child) == bytes(4 * PAGE_SIZE)
        assert bytes(view) == b"\xaa" * (4 * PAGE_SIZE)
        view.release()
        region.release()

    def test_also_after_decommit_and_commit(self) -> None:
        """Bytes decommitted and committed again are wiped, too."""
        region = pyreserve.reserve(8 * PAGE_SIZE, fork="wipe")
        region.commit(0, region.size)
        region.decommit(2 * PAGE_SIZE, 4 * PAGE_SIZE)
        region.commit(0, region.size)
        region.view(0, region.size)[:] = b"\xaa" * region.size

        contents = witness.in_child(lambda: bytes(region.view(0, region.size)))

        assert contents == bytes(region.size)
        region.release()


class Hammer:
    """Threads that use regions without pause until stopped."""

    THREADS = 4
    SLICE = 16

    def __init__(self, region: Region) -> None:
        self.region = region
        self.stop = threading.Event()
        self.rounds = [0] * self.THREADS
        self.errors: list[BaseException] = []
        self.threads = [
            threading.Thread(target=self._guarded, args=(i,), daemon=True)
            for i in range(self.THREADS)
        ]

    def _guarded(self, number: int) -> None:
        try:
            while not self.stop.is_set():
                self._round(number)
                self.rounds[number] += 1
        except BaseException as error:  # noqa: BLE001, RUF100
            self.errors.append(error)

    def _round(self, number: int) -> None:
        offset, length = number * self.SLICE * PAGE_SIZE, self.SLICE * PAGE_SIZE
        self.region.commit(offset, length)
        view = self.region.view(offset, length)
        view[0] = 1
        view.release()
        self.region.decommit(offset, length)
        with pyreserve.reserve(4 * PAGE_SIZE) as fresh:
            fresh.commit(0, PAGE_SIZE)

    def __enter__(self) -> "Hammer":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(witness.PATIENCE)
        assert not any(thread.is_alive() for thread in self.threads)


def forked(child: Callable[[], bool]) -> int:
    """Fork, run the function in the child, and return the child's wait status."""
    with warnings.catch_warnings():
        # From Python 3.12 on, a fork in a process with threads warns. These tests need such forks.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(witness.PATIENCE)
            status = 0 if child() else 2
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]


class TestForkUnderThreads:
    @pytest.mark.parametrize("times", [8, pytest.param(40, marks=pytest.mark.heavy)])
    @pytest.mark.parametrize("fork", ["copy", "wipe"])
    def test_the_child_can_use_the_region(self, fork: Literal["copy", "wipe"], times: int) -> None:
        """After a fork while four threads use a region, the child can take all locks."""
        own = Hammer.THREADS * Hammer.SLICE * PAGE_SIZE
        region = pyreserve.reserve(own + 16 * PAGE_SIZE, fork=fork)

        def child() -> bool:
            region.commit(own, PAGE_SIZE)
            region.view(own, 4)[:] = b"mine"
            region.decommit(own, PAGE_SIZE)
            with pyreserve.reserve(PAGE_SIZE) as fresh:
                fresh.commit(0, PAGE_SIZE)
            runs = region.committed_runs()
            return runs == witness.runs(region.base, region.size)

        with switching_often(), Hammer(region) as hammer:
            statuses = [forked(child) for _ in range(times)]

        assert statuses == [0] * times
        assert hammer.errors == []
        assert region.committed == 0
        assert_books_are_true(region)
        gc.collect()
        region.release()

    def test_the_parents_threads_go_on(self) -> None:
        """The threads of the parent make progress after each fork."""
        region = pyreserve.reserve(Hammer.THREADS * Hammer.SLICE * PAGE_SIZE)

        with switching_often(), Hammer(region) as hammer:
            for _ in range(10):
                before = list(hammer.rounds)
                assert forked(lambda: True) == 0
                while any(a == b for a, b in zip(before, hammer.rounds, strict=True)):
                    assert hammer.errors == []
                    threading.Event().wait(0.001)

        gc.collect()
        region.release()

    def test_a_fork_under_a_call_that_uses_another_region(self) -> None:
        """A fork and a thread that holds one region's lock while it uses another do not deadlock.

        A finaliser that runs inside a call on a region is in that state.
        """

        def child() -> bool:
            first, second = pyreserve.reserve(PAGE_SIZE), pyreserve.reserve(PAGE_SIZE)
            first.commit(0, PAGE_SIZE)
            lock = first.exports.lock
            inside, is_forked = threading.Event(), threading.Event()
            sys.setswitchinterval(1e-6)

            def work() -> None:
                registry = forks.registry_lock
                with lock:
                    inside.set()
                    for _ in range(20_000):
                        if is_forked.is_set() or not registry.acquire(blocking=False):
                            break
                        registry.release()
                    second.commit(0, PAGE_SIZE)

            thread = threading.Thread(target=work, daemon=True)
            thread.start()
            inside.wait()
            status = forked(lambda: True)
            is_forked.set()
            thread.join()
            return status == 0 and second.committed == PAGE_SIZE

        assert witness.in_child(child)


class TestThreads:
    THREADS = 4
    SLICE = 32
    ROUNDS = 400

    @modes
    def test_counters_end_exact(self, mode: Mode) -> None:
        """Counters are exact after four threads commit, decommit and view slices of their own."""
        region = pyreserve.reserve(self.THREADS * self.SLICE * PAGE_SIZE, mode=mode)
        models = [[False] * self.SLICE for _ in range(self.THREADS)]
        errors: list[BaseException] = []

        def work(number: int) -> None:
            random, model = Random(number), models[number]
            base = number * self.SLICE
            for _ in range(self.ROUNDS):
                first = random.randrange(self.SLICE)
                count = random.randint(1, self.SLICE - first)
                place = ((base + first) * PAGE_SIZE, count * PAGE_SIZE)
                if random.random() < 0.5:
                    region.commit(*place)
                    model[first : first + count] = [True] * count
                    view = region.view(*place)
                    view[0] = view[-1] = number + 1
                    with pytest.raises(ViewError):
                        region.decommit(*place)
                    assert view[0] == view[-1] == number + 1
                    view.release()
                else:
                    region.decommit(*place)
                    model[first : first + count] = [False] * count

        def guarded(number: int) -> None:
            try:
                work(number)
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        threads = [threading.Thread(target=guarded, args=(i,)) for i in range(self.THREADS)]
        with switching_often():
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        assert errors == []
        expected = [page for model in models for page in model]
        perms = witness.perms_by_page(region.base, region.size, PAGE_SIZE)
        assert [p == witness.COMMITTED for p in perms] == expected
        assert region.committed == sum(expected) * PAGE_SIZE
        assert_books_are_true(region)
        gc.collect()
        region.release()

    def test_a_view_or_a_decommit_wins(self) -> None:
        """A view never shows bytes that another thread decommits.

        Each returned view is written to; a crash would end the child.
        """

        def child() -> tuple[int, int]:
            region = pyreserve.reserve(PAGE_SIZE)
            counts = [0, 0]
            errors: list[BaseException] = []

            def view() -> None:
                for _ in range(5000):
                    try:
                        shown = region.view(0, PAGE_SIZE)
                    except pyreserve.RangeError:
                        continue
                    shown[0] = 1
                    counts[0] += 1
                    shown.release()

            def decommit() -> None:
                for _ in range(5000):
                    region.commit(0, PAGE_SIZE)
                    with contextlib.suppress(ViewError):
                        region.decommit(0, PAGE_SIZE)
                        counts[1] += 1

            def guarded(work: Callable[[], None]) -> None:
                try:
                    work()
                except BaseException as error:  # noqa: BLE001, RUF100
                    errors.append(error)

            threads = [threading.Thread(target=guarded, args=(w,)) for w in (view, view, decommit)]
            with switching_often():
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
            assert errors == []
            assert_books_are_true(region)
            return counts[0], counts[1]

        _, decommits = witness.in_child(child)

        assert decommits > 0

    def test_a_finaliser_by_hand_waits_for_a_call(self) -> None:
        """A direct call of __del__ waits for calls of other threads on the region."""

        def child() -> bool:
            sys.setswitchinterval(1e-5)
            for _ in range(30):
                region = pyreserve.reserve(64 * PAGE_SIZE)
                errors: list[BaseException] = []

                def work(region: Region = region, errors: list[BaseException] = errors) -> None:
                    try:
                        while True:
                            for page in range(64):
                                region.commit(page * PAGE_SIZE, PAGE_SIZE)
                            for page in range(0, 64, 2):
                                region.decommit(page * PAGE_SIZE, PAGE_SIZE)
                    except BaseException as caught:  # noqa: BLE001, RUF100
                        errors.append(caught)

                threads = [threading.Thread(target=work) for _ in range(2)]
                for thread in threads:
                    thread.start()
                region.commit(0, PAGE_SIZE)
                region.__del__()
                for thread in threads:
                    thread.join()
                if not all(isinstance(error, ReleasedError) for error in errors):
                    return False
            return True

        assert witness.in_child(child)

    def test_one_release_of_many_wins(self) -> None:
        """If many threads release a region, one succeeds and the others raise ReleasedError."""
        for _ in range(50):
            region = pyreserve.reserve(4 * PAGE_SIZE)
            start = threading.Barrier(4)
            outcomes: list[str] = []

            def release(
                region: Region = region,
                start: threading.Barrier = start,
                outcomes: list[str] = outcomes,
            ) -> None:
                start.wait()
                try:
                    region.release()
                    outcomes.append("released")
                except ReleasedError:
                    outcomes.append("too late")

            threads = [threading.Thread(target=release) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

            assert sorted(outcomes) == ["released", "too late", "too late", "too late"]

    def test_a_release_and_a_first_use_exclude_each_other(self) -> None:
        """A release and a first commit at the same moment do not overlap."""
        regions = [pyreserve.reserve(4 * PAGE_SIZE) for _ in range(3000)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)

        def use() -> None:
            for region in regions:
                with contextlib.suppress(ReleasedError):
                    region.commit(0, 2 * PAGE_SIZE)

        def release() -> None:
            for region in regions:
                region.release()

        try:
            threads = [threading.Thread(target=work) for work in (use, release)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(witness.PATIENCE)
        finally:
            sys.setswitchinterval(before)

        assert all(region.released for region in regions)
        for region in regions:
            with pytest.raises(ReleasedError):
                region.commit(0, PAGE_SIZE)
