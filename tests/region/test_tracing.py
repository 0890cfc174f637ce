"""Regions in profilers: tracemalloc counts committed bytes in a domain; memray counts RSS."""

import gc
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    TRACEMALLOC_DOMAIN,
    Arena,
    Bitmap,
    BumpArena,
    GiB,
    GrowableBuffer,
    MiB,
    Pool,
    Region,
    _native,
    layouts,
    reserve,
)
from pyreserve._region.policies import Mode
from pyreserve.units import WORD

PAGES = 24


@pytest.fixture(autouse=True)
def _leave_tracemalloc_off() -> Iterator[None]:
    was = tracemalloc.is_tracing()
    yield
    if not was:
        tracemalloc.stop()


def traces() -> list[tracemalloc.Trace]:
    """Return the traces of tracemalloc in pyreserve's domain."""
    if not tracemalloc.is_tracing():
        return []
    ours = tracemalloc.DomainFilter(True, TRACEMALLOC_DOMAIN)
    return list(tracemalloc.take_snapshot().filter_traces([ours]).traces)


def traced() -> int:
    return sum(trace.size for trace in traces())


class TestTracemalloc:
    def test_committed_bytes_are_traced_until_they_are_decommitted(self) -> None:
        """72 MiB committed are 72 MiB in the domain; reserved bytes do not count."""
        tracemalloc.start()

        with reserve(GiB) as region:
            assert traced() == 0
            region.commit(0, 72 * MiB)
            assert traced() == 72 * MiB == region.committed
            assert tracemalloc.get_traced_memory()[0] >= 72 * MiB
            region.discard(0, MiB)
            assert traced() == 72 * MiB
            region.decommit(MiB, 2 * MiB)
            assert traced() == 70 * MiB
            assert len(traces()) == 2
        assert traced() == 0

    def test_the_traceback_is_that_of_the_commit(self) -> None:
        """Adjacent commits keep their own tracebacks; committing again changes nothing."""
        tracemalloc.start(10)
        with reserve(GiB) as region:

            def first() -> None:
                region.commit(0, MiB)

            def second() -> None:
                region.commit(MiB, 2 * MiB)

            first()
            second()
            region.commit(0, 3 * MiB)

            lines = {
                trace.size: {
                    frame.lineno for frame in trace.traceback if frame.filename == __file__
                }
                for trace in traces()
            }
        assert sorted(lines) == [MiB, 2 * MiB]
        assert first.__code__.co_firstlineno + 1 in lines[MiB]
        assert second.__code__.co_firstlineno + 1 in lines[2 * MiB]

    def test_commits_inside_c_are_traced(self) -> None:
        """Commits made in C count: the growth of a heap, its tables, the storage of a bitmap."""
        gc.collect()
        tracemalloc.start()
        arena = Arena(layout=layouts.default_name(WORD))
        blocks = [arena.alloc(100 * 1024) for _ in range(50)]
        tables = 0 if arena._heap.tables is None else arena._heap.tables.committed
        elsewhere = sum(region.committed for region in arena._engine.metadata)
        assert traced() == arena.region.committed + tables + elsewhere > 5_000_000

        before = traced()
        bitmap = Bitmap(1 << 40)
        bitmap.set(1 << 20, 1 << 24)
        assert traced() - before == bitmap._region.committed >= (1 << 24) // 8 - (1 << 17)

        before = traced()
        bump, pool, buffer = BumpArena(GiB), Pool(64), GrowableBuffer(GiB)
        bump.alloc(3 * MiB)
        pool.alloc_many(1000)
        buffer.extend(bytes(MiB))
        assert traced() - before >= 4 * MiB

        del blocks
        arena.release()
        del arena, bitmap, bump, pool, buffer
        gc.collect()
        assert traced() == 0

    def test_a_dropped_region_is_traced_until_its_last_view_is_gone(self) -> None:
        """Bytes that outlive their region still count as committed."""
        tracemalloc.start()
        region = reserve(GiB)
        region.commit(0, MiB)
        view = region.view(0, 10)
        del region
        gc.collect()
        assert traced() == MiB
        del view
        gc.collect()
        assert traced() == 0

    def test_totals_after_a_fork(self) -> None:
        """Parent and child have separate totals after a fork."""
        tracemalloc.start()
        region = reserve(GiB)
        region.commit(0, MiB)

        def in_the_child() -> tuple[int, int]:
            before = traced()
            region.decommit(0, MiB // 2)
            return before, traced()

        assert witness.in_child(in_the_child) == (MiB, MiB // 2)
        assert traced() == MiB
        region.release()

    def test_sessions_from_many_threads(self) -> None:
        """The last session is exact though eight threads commit while a ninth starts and stops."""
        # A thread that starts or ends during a switch frees memory without the GIL and crashes
        # Python 3.11: all threads start before the first switch and end after the last.
        switching, done, switched = (threading.Event() for _ in range(3))
        finished = threading.Semaphore(0)

        def switch() -> None:
            switching.set()
            while not done.is_set():
                tracemalloc.start()
                tracemalloc.stop()

        def work() -> None:
            switching.wait()
            try:
                with reserve(PAGES * PAGE_SIZE) as region:
                    for i in range(400):
                        region.commit(i % 7 * PAGE_SIZE, 5 * PAGE_SIZE)
                        region.decommit((i % 7 + 1) * PAGE_SIZE, 3 * PAGE_SIZE)
            finally:
                finished.release()
                switched.wait()

        switcher = threading.Thread(target=switch)
        workers = [threading.Thread(target=work) for _ in range(8)]
        for thread in (*workers, switcher):
            thread.start()
        for _ in workers:
            finished.acquire()
        done.set()
        switcher.join()
        switched.set()
        for thread in workers:
            thread.join()

        tracemalloc.start()
        with reserve(GiB) as region:
            region.commit(0, MiB)
            assert traced() == MiB
        assert traced() == 0


# Steps: a verb with its first page and number of pages, or a change of the session.
_RANGES = st.tuples(st.integers(0, PAGES - 1), st.integers(1, PAGES))
_STEPS = st.one_of(
    st.tuples(st.sampled_from(["commit", "commit", "decommit", "decommit", "discard"]), _RANGES),
    st.tuples(st.sampled_from(["start", "stop", "clear", "release", "drop"]), st.just((0, 0))),
)


class Model:
    """The pages of a region: those committed, and of these those that tracemalloc knows."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.region: Region = reserve(PAGES * PAGE_SIZE, mode=mode)
        self.committed: set[int] = set()
        self.traced: set[int] = set()

    def take(self, step: str, first: int, n: int) -> None:
        pages = set(range(first, min(first + n, PAGES)))
        offset, length = first * PAGE_SIZE, len(pages) * PAGE_SIZE
        if step == "commit":
            self.region.commit(offset, length)
            if tracemalloc.is_tracing():
                self.traced |= pages - self.committed
            self.committed |= pages
        elif step == "decommit":
            self.region.decommit(offset, length)
            self.committed -= pages
            self.traced -= pages
        elif step == "discard" and pages <= self.committed:
            self.region.discard(offset, length)
        elif step == "start":
            tracemalloc.start()
        elif step in {"stop", "clear"}:
            {"stop": tracemalloc.stop, "clear": tracemalloc.clear_traces}[step]()
            self.traced.clear()
        elif step in {"release", "drop"}:
            if step == "release":
                self.region.release()
            self.region = reserve(PAGES * PAGE_SIZE, mode=self.mode)
            self.committed.clear()
            self.traced.clear()


@settings(deadline=None)
@given(st.sampled_from(["charge", "noreserve"]), st.lists(_STEPS, max_size=40))
def test_totals_are_exact_whatever_happens(
    mode: Mode, steps: list[tuple[str, tuple[int, int]]]
) -> None:
    """After every step the domain has the bytes committed in this session and still committed."""
    tracemalloc.start()
    model = Model(mode)
    for step, (first, n) in steps:
        model.take(step, first, n)
        assert traced() == len(model.traced) * PAGE_SIZE
        assert model.region.committed == len(model.committed) * PAGE_SIZE
    tracemalloc.stop()


class TestReplacedLibrary:
    def test_the_extension_does_not_use_the_librarys_mapping_calls(self) -> None:
        """A profiler that replaces the C library's mapping functions sees no reservation."""
        names = set(Path(str(_native.__file__)).read_bytes().split(b"\0"))
        calls = {b"mmap", b"mmap64", b"munmap", b"mprotect", b"madvise", b"mincore", b"mremap"}
        assert b"syscall" in names
        assert not calls & names

    @witness.only_64_bit
    @pytest.mark.heavy
    def test_memray_sees_no_reservation(self, tmp_path: Path) -> None:
        """136 GiB reserved and 16 MiB used: the peak in memray is far below the reservation."""
        memray = pytest.importorskip("memray", reason="memray is not installed here")
        script, results = tmp_path / "uses.py", tmp_path / "uses.bin"
        script.write_text(
            "from pyreserve import GiB, MiB, reserve\n"
            "region = reserve(136 * GiB)\n"
            "region.commit(0, 16 * MiB)\n"
            "view = region.view(0, 16 * MiB)\n"
            "view[:: 4096] = bytes(b'x' * (16 * MiB // 4096))\n"
        )
        command = [sys.executable, "-m", "memray", "run", "-q", "-o", str(results), str(script)]
        subprocess.run(command, check=True, capture_output=True)
        with memray.FileReader(results) as reader:
            assert reader.metadata.peak_memory < 16 * MiB
