"""Giving idle memory back, and the memory statistics of an arena; /proc is the witness."""

import gc
import math
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from helpers import witness
from helpers.arenas import PAGE, check, fill, holds, layout_names, needs_64_bits
from helpers.subjects import wait_until
from pyreserve import (
    Arena,
    FreeError,
    KiB,
    MiB,
    OutOfMemoryError,
    RangeError,
    ViewError,
    format_size,
)
from pyreserve._arena.heap import Heap
from pyreserve.layouts import LayoutName

LAYOUTS = [name for name in layout_names() if name in {"native", "go1.4/amd64", "go1.11/amd64"}]


@pytest.fixture(params=["charge", "noreserve"])
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """A native arena in each accounting mode."""
    opened = Arena(64 * MiB, mode=request.param)
    yield opened
    gc.collect()
    if not opened.region.released:
        opened.release()


def rss(arena: Arena) -> int:
    """Return the resident bytes of an arena as the kernel counts them."""
    return witness.total_kib(arena.region.base, arena.region.size, "Rss") * KiB


class TestScavenge:
    def test_memory_goes_back(self, arena: Arena) -> None:
        """Memory of freed blocks is not resident after trim, and the statistics are exact."""
        block, keep = arena.alloc(8 * MiB), arena.alloc(PAGE)
        fill(block, 1)
        fill(keep, 2)
        block.free()
        committed = arena.region.committed

        assert arena.trim() == 8 * MiB

        assert arena.memstats().heap_released == 8 * MiB
        assert rss(arena) == arena.memstats().resident == PAGE
        assert holds(keep, 2)
        given_back = 8 * MiB if arena.region.mode == "charge" else 0
        assert arena.region.committed == committed - given_back
        assert arena.trim() == 0

    def test_highest_first(self, arena: Arena) -> None:
        """A limited trim gives back the highest addresses first."""
        blocks = arena.alloc_many([MiB] * 4)
        for block in blocks:
            fill(block, 1)
        blocks[::2].free()

        assert arena.trim(MiB + 1) == MiB + PAGE

        base = arena.region.base
        assert witness.total_kib(base + 2 * MiB, MiB, "Rss") in {0, rss(arena) // KiB}
        assert rss(arena) == 4 * MiB - MiB - PAGE
        first, third = arena.alloc(MiB), arena.alloc(MiB)
        assert not first.zeroed
        assert third.zeroed

    def test_zero_when_used_again(self, arena: Arena) -> None:
        """Pages that were given back read zero and are known to; heap_released decreases."""
        block = arena.alloc(4 * MiB)
        fill(block, 1)
        block.free()
        arena.trim()

        again = arena.alloc(3 * MiB)

        assert again.zeroed
        assert holds(again, 0)
        fill(again, 3)
        assert arena.memstats().heap_released == MiB

    def test_older_than_keeps_recently_freed_pages(self, arena: Arena) -> None:
        """With older_than recently freed pages stay."""
        age, young_age = 0.1, math.inf
        while young_age > age / 2:  # repeat until no delay distorts the ages; the clock is coarse
            age *= 2
            old, fence, young = arena.alloc(MiB), arena.alloc(PAGE), arena.alloc(2 * MiB)
            fill(old, 1)
            fill(young, 1)
            old.free()
            time.sleep(1.1 * age)
            freed_at = time.monotonic()
            young.free()

            of_an_hour = arena.trim(older_than=3600)
            given_back = arena.trim(older_than=age)
            young_age = time.monotonic() - freed_at
            rest = arena.trim(older_than=0)
            assert of_an_hour == 0
            assert given_back + rest == 3 * MiB
            assert not fence.freed
            fence.free()
            arena.trim()

        assert given_back == MiB

    def test_lazily(self, arena: Arena) -> None:
        """After a lazy trim pages count as released, not as zero, and can still be discarded."""
        block = arena.alloc(2 * MiB)
        fill(block, 1)
        block.free()

        assert arena.trim(lazy=True) == 2 * MiB
        assert arena.trim(lazy=True) == 0
        assert arena.memstats().heap_released == 2 * MiB
        part = arena.alloc(MiB)
        assert not part.zeroed
        assert arena.memstats().heap_released == MiB
        cleared = arena.alloc(MiB, zero=True)
        assert holds(cleared, 0)
        part.free()
        cleared.free()
        assert arena.trim() == 2 * MiB
        assert rss(arena) == 0

    def test_not_under_a_view(self, arena: Arena) -> None:
        """Free bytes that a view of the region shows are not given back."""
        block = arena.alloc(MiB)
        fill(block, 1)
        offset = block.offset
        block.free()
        view = arena.region.view(offset + PAGE, 8)

        with pytest.raises(ViewError, match="cannot trim"):
            arena.trim()

        assert view[0] == 1
        assert arena.memstats().heap_released == 0
        del view
        assert arena.trim() == MiB

    @pytest.mark.parametrize("wrong", [{"nbytes": -1}, {"older_than": -0.1}])
    def test_negative_numbers(self, arena: Arena, wrong: dict[str, float]) -> None:
        """Negative bytes and ages are refused."""
        with pytest.raises(RangeError):
            arena.trim(**wrong)  # type: ignore[arg-type]

    def test_many_small_holes_take_no_mappings(self, arena: Arena) -> None:
        """Scattered pages are discarded in place, which splits no mapping."""
        blocks = list(arena.alloc_many([PAGE] * 4000))
        for block in blocks:
            fill(block, 1)
        arena.free_many(blocks[::2])

        assert arena.trim() == 2000 * PAGE

        assert len(witness.spans(arena.region.base, arena.region.size)) <= 2
        assert rss(arena) == 2000 * PAGE
        assert all(holds(block, 1) for block in blocks[1::2])


BURST = """
    import array, ctypes, json
    from helpers import witness
    from pyreserve import Arena, GiB
    layout, mode, size = {layout!r}, {mode!r}, {size}
    def charge():
        "This process's part of Committed_AS: its mappings with VM_ACCOUNT."
        found = witness.pieces(0, 1 << 63)
        return sum(piece.kib["Size"] << 10 for piece in found if "ac" in piece.flags)
    def now():
        # What malloc keeps of Python's own arrays is not meant.
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
        with open("/proc/self/maps") as maps:
            entries = sum(1 for _ in maps)
        return [witness.status("VmRSS"), charge(), entries]
    arena = Arena(layout=layout, mode=mode)
    arena.alloc_many([size] * 64).free()
    arena.alloc(10).free()
    keep = arena.alloc(5000)
    sizes = array.array("q", [size]) * (2 * GiB // size)
    before = now()
    blocks = arena.alloc_many(sizes)
    first, last = blocks[0].address, blocks[-1].address + size
    ctypes.memset(first, 1, last - first)
    during, vsz = now(), witness.status("VmSize")
    blocks.free()
    given = arena.trim()
    del blocks
    print(json.dumps([before, during, now(), given, vsz - witness.status("VmSize")]))
"""


@needs_64_bits
@pytest.mark.heavy
class TestBurst:
    @pytest.mark.skipif(witness.meminfo("MemAvailable") < 4 << 30, reason="needs 4 GiB of memory")
    @pytest.mark.parametrize(
        ("layout", "mode", "size"),
        [
            ("native", "charge", 8 * KiB),
            ("native", "noreserve", MiB),
            ("go-tip-2014-12/amd64", "charge", 8 * KiB),
            ("go1.11/amd64", "charge", MiB),
        ],
    )
    def test_two_gib(self, layout: str, mode: str, size: int) -> None:
        """After 2 GiB were used, freed and trimmed only the addresses are left."""
        before, during, after, given, vsz = witness.fresh_python(
            BURST.format(layout=layout, mode=mode, size=size)
        )

        assert during[0] - before[0] >= 2 << 30
        assert after[0] - before[0] <= 2 * MiB
        assert after[2] - before[2] <= 10
        assert given >= 2 << 30
        assert vsz <= 17 * MiB  # the list of a quarter of a million blocks is freed
        # The metadata of Go's layouts stays mapped.
        if mode == "charge":
            assert during[1] - before[1] >= (2 << 30) - 256 * MiB
            assert after[1] - before[1] <= 256 * MiB
        else:
            assert abs(during[1] - before[1]) <= 256 * MiB


class TestScavenger:
    def test_idle_memory_is_given_back(self) -> None:
        """The thread gives idle memory back by itself, and ends with the arena."""
        arena = Arena()
        scavenger = arena.start_scavenger(0.05)
        block = arena.alloc(MiB)
        fill(block, 1)
        block.free()

        wait_until(lambda: scavenger.given_back == MiB, "the scavenger to give back")
        assert arena.memstats().heap_released == MiB
        arena.release()
        assert not scavenger.running

    def test_stopped_and_started(self, arena: Arena) -> None:
        """stop waits for the end of the thread; a new scavenger can then be started."""
        first = arena.start_scavenger(0.01)
        second = arena.start_scavenger(10)
        assert not first.running
        assert second.running
        arena.stop_scavenger()
        arena.stop_scavenger()
        assert not second.running

    def test_it_lets_the_arena_go(self) -> None:
        """A dropped arena ends its thread."""
        arena = Arena(MiB)
        scavenger, base = arena.start_scavenger(0.01), arena.region.base
        del arena

        wait_until(lambda: gc.collect() >= 0 and not scavenger.running, "the thread to end")
        wait_until(lambda: not witness.is_mapped(base), "the addresses to go")

    def test_views_are_no_reason_to_end(
        self, arena: Arena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The thread continues after views caused a refusal."""
        give_back, refused = Heap.give_back, threading.Event()

        def observed(*arguments: Any) -> tuple[int, list[Exception]]:
            total, refusals = give_back(*arguments)
            if any(isinstance(refusal, ViewError) for refusal in refusals):
                refused.set()
            return total, refusals

        monkeypatch.setattr(Heap, "give_back", observed)
        block = arena.alloc(MiB)
        fill(block, 1)
        offset = block.offset
        block.free()
        view = arena.region.view(offset, 8)
        scavenger = arena.start_scavenger(0.01)
        assert refused.wait(witness.PATIENCE)
        assert scavenger.given_back == 0
        del view

        wait_until(lambda: scavenger.given_back == MiB, "the scavenger to give back")
        arena.stop_scavenger()

    def test_a_child_has_none(self, arena: Arena) -> None:
        """The thread stays in the parent; the child may start its own."""
        scavenger = arena.start_scavenger(0.01)

        def child() -> list[bool]:
            inherited = scavenger.running
            arena.alloc(MiB).free()
            other = arena.start_scavenger(0.01)
            return [inherited, other.running]

        for _ in range(20):
            assert witness.in_child(child) == [False, True]
        assert scavenger.running
        arena.stop_scavenger()

    def test_it_ends_with_the_interpreter(self) -> None:
        """A process exits cleanly while the thread is working."""
        script = """
import pyreserve
arena = pyreserve.Arena(scavenge_after=0.001)
for _ in range(200): arena.alloc(1 << 20).free()
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")

    def test_no_negative_age(self, arena: Arena) -> None:
        """An age must be a non-negative number of seconds."""
        with pytest.raises(RangeError):
            arena.start_scavenger(-1)


class TestMemStats:
    @pytest.mark.parametrize("name", layout_names())
    def test_invariants(self, name: LayoutName) -> None:
        """The documented equations hold after each step, and the counters are exact."""
        random, live, mallocs = Random(5), [], 0
        with Arena(layout=name) as arena:
            check(arena.memstats())
            by_hand = arena.grow(100 * KiB) and -(-100 * KiB // PAGE) * PAGE
            for _ in range(300):
                step = random.random()
                if step < 0.5:
                    live.append(arena.alloc(random.randrange(1, 300_000)))
                    mallocs += 1
                elif step < 0.9 and live:
                    live.pop(random.randrange(len(live))).free()
                else:
                    arena.trim(random.randrange(MiB), lazy=random.random() < 0.5)
                stats = arena.memstats()
                check(stats)
                pages = sum(-(-block.nbytes // PAGE) * PAGE for block in live)
                assert stats.heap_inuse == pages + by_hand
                assert stats.heap_alloc == sum(block.nbytes for block in live) + by_hand
                assert (stats.mallocs, stats.heap_objects) == (mallocs, len(live))

    def test_against_the_kernel(self, arena: Arena) -> None:
        """reserved, committed and resident agree with /proc."""
        fill(arena.alloc(3 * MiB), 1)
        arena.alloc(MiB)
        stats, base, size = arena.memstats(), arena.region.base, arena.region.size

        assert stats.reserved == size
        assert stats.committed == witness.nbytes(base, size)
        assert stats.resident == rss(arena)

    def test_as_text(self) -> None:
        """Text and HTML have every field: sizes with units, counts as numbers."""
        with Arena(64 * MiB) as arena:
            arena.alloc_many([MiB] * 3)[0].free()
            stats = arena.memstats()
            lines = dict(line.split(None, 1) for line in str(stats).splitlines() if line)
            html = stats._repr_html_()

            assert lines["Arena:"] == "2 MiB in use of 3 MiB"
            assert (lines["heap_inuse"], lines["mallocs"], lines["frees"]) == ("2 MiB", "3", "1")
            assert lines["committed"] == format_size(stats.committed)
            for name in stats._fields:
                assert f">{name}</td>" in html
                assert name in lines

    @pytest.mark.parametrize("name", LAYOUTS)
    def test_at_every_moment(self, name: LayoutName) -> None:
        """The equations hold while threads allocate, free and trim."""
        arena, stop, failures = Arena(layout=name), threading.Event(), []

        def work(number: int) -> None:
            random = Random(number)
            try:
                while not stop.is_set():
                    blocks = arena.alloc_many([random.randrange(1, 200_000) for _ in range(20)])
                    fill(blocks[0], 1)
                    blocks[:7].free()
                    if random.random() < 0.2:
                        arena.trim(MiB)
                    blocks[7:].free()
            except (OutOfMemoryError, FreeError, ViewError, AssertionError) as failure:
                failures.append(failure)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(300):
            check(arena.memstats())
        stop.set()
        for thread in threads:
            thread.join()

        assert not failures
        assert arena.memstats().heap_inuse == 0
        arena.release()


class TestOneThread:
    """The scavenger's thread under restarts, handlers and exits."""

    def test_started_from_many_threads(self, arena: Arena) -> None:
        """After starts by many threads at most one thread runs, and none after a stop."""
        most = 0

        def alive() -> int:
            return sum(thread.name == "pyreserve-scavenger" for thread in threading.enumerate())

        def start() -> None:
            nonlocal most
            for _ in range(200):
                arena.start_scavenger(100)
                most = max(most, alive())

        before = alive()
        threads = [threading.Thread(target=start) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arena.stop_scavenger()

        assert before == 0
        assert most == 1
        assert alive() == 0

    def test_given_when_the_arena_is_made(self) -> None:
        """`scavenge_after` starts the scavenger with the arena."""
        with Arena(16 * MiB, scavenge_after=0.01) as arena:
            block = arena.alloc(MiB)
            fill(block, 1)
            block.free()

            wait_until(lambda: arena.memstats().heap_released == MiB, "the scavenger to give back")

    def test_a_replaced_one(self, arena: Arena) -> None:
        """Stopping a replaced scavenger does not stop the current one."""
        first, second = arena.start_scavenger(100), arena.start_scavenger(100, lazy=True)
        first.stop()

        assert (first.running, second.running, second.lazy) == (False, True, True)
        second.stop()
        assert not second.running

    @pytest.mark.parametrize("end", ["stop_scavenger", "release", "close"])
    def test_ended_by_a_handler(self, end: str) -> None:
        """A signal handler may stop the thread while it waits for the interrupted call's lock."""
        running = witness.fresh_python(
            f"""
            import json, signal, time
            from pyreserve import *
            arena = Arena(GiB)
            arena.alloc(8)
            scavenger = arena.start_scavenger(0.001)
            waits, wait = [], type(arena.heap)._acquire_while
            def lock_while(self, proceed):
                waits.append(1)
                try: return wait(self, proceed)
                finally: waits.pop()
            type(arena.heap)._acquire_while = lock_while
            done = []
            def handler(*_):
                while not waits: time.sleep(0.001)  # until the thread waits for the lock
                arena.{end}()
                done.append(scavenger.running)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            with arena._lock:  # as in any call
                while not done: time.sleep(0.001)
            print(json.dumps(done))
            """
        )

        assert running == [False]

    @pytest.mark.parametrize("end", ["stop_scavenger", "close"])
    def test_ended_by_a_handler_while_it_is_ended(self, end: str) -> None:
        """A handler may stop the scavenger while another call stops or starts it."""
        running = witness.fresh_python(
            f"""
            import json, random, signal
            from pyreserve import *
            arenas = []
            def handler(*_): arenas[-1].{end}()
            signal.signal(signal.SIGALRM, handler)
            for _ in range(400):
                arenas[:] = [Arena(MiB)]
                try:
                    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 4e-4))
                    scavenger = arenas[-1].start_scavenger(100)
                    arenas[-1].stop_scavenger()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except ReleasedError: pass
                arenas[-1].close()
            print(json.dumps(scavenger.running))
            """
        )

        assert running is False

    @pytest.mark.parametrize("exits", [5, pytest.param(200, marks=pytest.mark.heavy)])
    def test_at_the_end_of_the_interpreter(self, exits: int) -> None:
        """An exit during a scavenge waits for its end, because a finaliser needs the same lock."""
        script = """
import builtins, sys, time
from pyreserve import *
arena = Arena(4 * GiB)
class Last:
    def __del__(self):
        self.block.free()
        print("freed")
builtins.last = last = Last()
last.block = arena.alloc(100)
blocks = arena.alloc_many([64 * KiB] * 2000)
for block in blocks[::2]:
    block.view()[0] = 1
    block.free()
arena.start_scavenger(0.001)
time.sleep(float(sys.argv[1]))
"""
        for i in range(exits):
            done = subprocess.run(
                [sys.executable, "-c", script, str(0.0005 + 0.0004 * (i % 20))],
                capture_output=True,
                text=True,
                timeout=witness.PATIENCE,
                check=False,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "freed\n", "")

    def test_not_started_at_the_end(self) -> None:
        """No scavenger can be started during interpreter exit."""
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                """
import atexit
box = []
def late():
    try: box[0].start_scavenger(1)
    except RuntimeError as error: print(error)
atexit.register(late)
from pyreserve import *
box.append(Arena(MiB))
""",
            ],
            capture_output=True,
            text=True,
            check=True,
        )

        assert done.stdout == "cannot start a scavenger: the interpreter is exiting\n"
