"""An arena under threads, forks, signal handlers and finalisers."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from random import Random
from typing import Any

import pytest

from helpers import witness
from helpers.arenas import PAGE, check, fill, holds, layout_names
from helpers.interruptions import run_together
from pyreserve import (
    Arena,
    Block,
    FreeError,
    KiB,
    MiB,
    OutOfMemoryError,
    Region,
    ViewError,
    layouts,
)
from pyreserve._alloc.pages import reserve_tables
from pyreserve.units import WORD

LAYOUTS = [
    name for name in layout_names() if name.startswith(("native", "go-tip", "go1.11", "fallback"))
]


@pytest.fixture(params=LAYOUTS)
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """An arena in a layout of each strategy, released at the end."""
    opened = Arena(layout=request.param)
    yield opened
    opened.release()


class Traffic:
    """Threads that allocate, free and scavenge until the end of the with block."""

    def __init__(self, arena: Arena, threads: int = 6) -> None:
        self.arena = arena
        self.failures: list[BaseException] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(number,)) for number in range(1, threads + 1)
        ]

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        random = Random(number)
        try:
            while not self._stop.is_set():
                blocks = self.arena.alloc_many([random.randrange(1, 100 * KiB) for _ in range(10)])
                block = self.arena.alloc(random.randrange(1, 100 * KiB), zero=True)
                assert holds(block, 0)
                fill(block, number)
                fill(blocks[3], number)
                if random.random() < 0.1:
                    self.arena.trim(MiB, lazy=random.random() < 0.5)
                assert holds(block, number)
                assert holds(blocks[3], number)
                block.free()
                blocks.free()
        except BaseException as failure:
            self.failures.append(failure)


class TestFork:
    @pytest.mark.parametrize("forks", [8, pytest.param(40, marks=pytest.mark.heavy)])
    def test_the_child_allocates_on(self, arena: Arena, forks: int) -> None:
        """After a fork at any moment the child has intact blocks and a working arena."""
        kept = arena.alloc(100 * KiB)
        fill(kept, 0x5A)

        def child() -> bool:
            check(arena.memstats())
            blocks = [*arena.alloc_many([5000] * 100), arena.alloc(3 * MiB, zero=True)]
            assert holds(blocks[-1], 0)
            for number, block in enumerate(blocks):
                fill(block, number + 1)
            places = [(block.address, block.nbytes) for block in arena.blocks()]
            ends = [address + nbytes for address, nbytes in places]
            assert all(end <= place[0] for end, place in zip(ends, places[1:], strict=False))
            assert all(holds(block, number + 1) for number, block in enumerate(blocks))
            arena.free_many(blocks)
            arena.trim()
            check(arena.memstats())
            return holds(kept, 0x5A)

        with Traffic(arena) as traffic:
            assert all(witness.in_child(child) for _ in range(forks))

        assert not traffic.failures
        assert list(arena.blocks()) == [kept]

    def test_the_parent_does_not_see_it(self, arena: Arena) -> None:
        """Frees, writes and scavenges of the child do not affect the parent."""
        block = arena.alloc(MiB)
        fill(block, 1)
        before = arena.memstats()

        def child() -> bool:
            fill(block, 2)
            block.free()
            return arena.trim() == MiB

        assert witness.in_child(child)
        assert holds(block, 1)
        assert arena.memstats() == before


class TestThreads:
    def test_a_viewed_block_stays(self, arena: Arena) -> None:
        """A block that a thread has got a view of is not freed by others while the view lives."""
        blocks = [arena.alloc(PAGE) for _ in range(3)]
        wrong: list[object] = []
        seen = [0]

        def look() -> None:
            for i in range(4000):
                block = blocks[i % 3]
                try:
                    view = block.view()
                except FreeError:
                    continue
                seen[0] += 1
                wrong.extend(block for _ in range(3) if block.freed)
                del view

        def reuse() -> None:
            for i in range(4000):
                with suppress(ViewError, FreeError):
                    blocks[i % 3].free()
                    blocks[i % 3] = arena.alloc(PAGE)

        threads = [threading.Thread(target=work) for work in (look, reuse, look, reuse)]
        run_together(threads)

        assert wrong == []
        assert seen[0] > 100
        assert len(list(arena.blocks())) == 3

    def test_no_block_is_taken_for_another(self) -> None:
        """A freed block never equals a later one, even after refused lists."""
        blocks: list[Block] = []
        stop = threading.Event()
        with Arena(4 * MiB) as arena:
            arena.alloc(2 * MiB)

            def be_refused() -> None:
                while not stop.is_set():
                    with pytest.raises(OutOfMemoryError):
                        arena.alloc_many([PAGE] * 50 + [8 * MiB])

            thread = threading.Thread(target=be_refused)
            thread.start()
            for _ in range(10_000):
                blocks.append(arena.alloc(PAGE))
                blocks[-1].free()
            stop.set()
            thread.join()

            assert len(set(blocks)) == len(blocks)
            assert all(block.freed for block in blocks)

    def test_one_of_many_frees_wins(self, arena: Arena) -> None:
        """If several threads free the same block, one succeeds and the others raise FreeError."""
        won: list[int] = []
        rounds = 300
        blocks = [arena.alloc(PAGE) for _ in range(rounds)]
        barrier = threading.Barrier(4)

        def race(number: int) -> None:
            barrier.wait()
            for block in blocks:
                try:
                    if number % 2:
                        block.free()
                    else:
                        arena.free_many([block])
                except ValueError:
                    continue
                won.append(number)

        threads = [threading.Thread(target=race, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        stats = arena.memstats()
        assert len(won) == stats.frees == stats.mallocs == rounds
        assert stats.heap_inuse == 0


INTERRUPTED = """
import gc, random, signal, sys
from pyreserve import *
P = max(8192, PAGE_SIZE)
name, rng, armed = sys.argv[1], random.Random(6), False
arena = Arena(64 * MiB if name == "native" else None, layout=name)
arena.alloc(1).free()
def interrupt(handler, rounds, call):
    "Do `call` again and again, a signal somewhere inside."
    global armed
    def h(*_):
        if armed:
            try: handler()
            except (RuntimeError, MemoryError, BufferError, ValueError): pass
    signal.signal(signal.SIGALRM, h)
    for _ in range(rounds):
        armed = True
        signal.setitimer(signal.ITIMER_REAL, rng.random() * .0002 + 1e-6)
        try: call()
        except (RuntimeError, MemoryError, BufferError): pass
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
"""
FACTS: dict[str, str] = {}
FACTS["a scavenge takes no access from a view that a handler made"] = """
held = []
blocks = arena.alloc_many([2 * MiB] * 16)
low, n = blocks[0].offset, 32 * MiB
blocks.free()
def look(): held.append(arena.region.view(low, n))
for _ in range(4000):
    blocks = arena.alloc_many([2 * MiB] * 16)
    blocks.free()
    interrupt(look, 1, arena.trim)
    if held: assert arena.region.is_committed(low, n), "a live view over decommitted bytes"
    held.clear()
"""
FACTS["a free frees nothing that a handler has made a view of"] = """
held = []
def look(): held.append(block.view())
for _ in range(6000):
    block = arena.alloc(P)
    block.view()
    interrupt(look, 1, block.free)
    assert not (held and block.freed), "a live view of a freed block"
    held.clear()
    if not block.freed: block.free()
"""
FACTS["a free of many frees nothing that a handler has made a view of"] = """
held = []
def look(): held.append(blocks[40].view())
for _ in range(3000):
    blocks = arena.alloc_many([P] * 64)
    blocks[0].view()
    interrupt(look, 1, blocks.free)
    gone = not list(arena.blocks())
    assert not (held and gone), "a live view of a freed block"
    held.clear()
    if not gone: blocks.free()
"""
FACTS["blocks that a handler takes inside any call overlap no others"] = """
live, inside = {}, []
def put(block):
    byte = rng.randrange(1, 256)
    with block.view() as view: view[0] = view[-1] = byte
    live[block] = byte
def work():
    step = rng.randrange(6)
    if step == 0: put(arena.alloc(rng.randrange(1, 100_000), align=rng.choice([1, 1 << 16])))
    if step == 1:
        for block in arena.alloc_many([rng.randrange(1, 50_000) for _ in range(5)]): put(block)
    if step == 2 and live:
        block, _ = live.popitem()
        arena.free(block)
    if step == 3: arena.trim(lazy=rng.random() < .3)
    if step == 4: arena.memstats(), arena.block_at(arena.placement.arena_start)
    if step == 5 and len(live) > 9:
        arena.free_many([live.popitem()[0] for _ in range(5)])
for _ in range(8):
    interrupt(work, 700, work)
    places = sorted((block.address, block.address + block.nbytes) for block in arena.blocks())
    assert all(a[1] <= b[0] for a, b in zip(places, places[1:]))
    for block, byte in live.items(): assert block.view()[0] == block.view()[-1] == byte
    arena.free_many(list(arena.blocks())); live.clear()
stats = arena.memstats()
assert stats.heap_objects == stats.heap_inuse == stats.heap_alloc == 0, stats
"""
FACTS["finalisers allocate and free inside any call"] = """
kept, ended = [], 0
class Cycle:
    def __init__(self): self.me = self
    def __del__(self):
        global ended
        ended += 1
        try:
            block = arena.alloc(3 * P)
            with block.view() as view: view[0] = view[-1] = 7
            kept.append(block)
            arena.free_many([arena.alloc(P)])
            arena.trim(8 * P)
        except (RuntimeError, MemoryError): pass  # a block may be left without an object
gc.set_threshold(1)
for _ in range(1500):
    Cycle()
    blocks = list(arena.alloc_many([P, 100, 3 * MiB]))
    with blocks[2].view() as view: view[0] = view[-1] = 9
    arena.free_many(blocks)
    while len(kept) > 20: kept.pop(0).free()
    for block in kept: assert block.view()[0] == block.view()[-1] == 7
    places = [(block.address, block.address + block.nbytes) for block in arena.blocks()]
    assert all(a[1] <= b[0] for a, b in zip(places, places[1:]))
gc.set_threshold(700); gc.collect()
arena.free_many(list(arena.blocks()))
stats = arena.memstats()
assert ended == 1500 and stats.heap_inuse == stats.heap_alloc == stats.heap_objects == 0
"""


class TestInterrupted:
    @pytest.mark.parametrize("name", ["native", layouts.default_name(WORD)])
    @pytest.mark.parametrize("fact", FACTS)
    def test_it_holds(self, fact: str, name: str) -> None:
        """The named fact holds: the process exits with status 0 and writes nothing to stderr."""
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED + FACTS[fact], name],
            capture_output=True,
            text=True,
            timeout=witness.PATIENCE,
            check=False,
        )

        assert (done.returncode, done.stderr) == (0, "")

    def test_a_first_block_inside_a_first_block(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A handler may allocate while the first allocation creates the tables."""
        interrupting: list[Block] = []
        with Arena(8 * MiB) as arena:

            def interrupted(*args: Any, **kwargs: Any) -> Region:
                monkeypatch.undo()
                interrupting.append(arena.alloc(PAGE))
                return reserve_tables(*args, **kwargs)

            monkeypatch.setattr("pyreserve._arena.nativeheap.reserve_tables", interrupted)

            block = arena.alloc(PAGE)

            assert [block.address for block in arena.blocks()] == sorted(
                [interrupting[0].address, block.address]
            )
            assert not interrupting[0].freed
            assert arena.memstats().mallocs == 2
