"""Slots of equal size: allocated, viewed, freed, cleared and trimmed."""

import copy
import errno
import gc
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
from array import array
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from helpers import witness
from helpers.interruptions import run_together
from pyreserve import PAGE_SIZE, KiB, MiB, capabilities
from pyreserve._alloc.pool import Pool
from pyreserve._region.exports import Exports
from pyreserve._region.policies import Mode
from pyreserve._system.features import Feature
from pyreserve._system.machine import thp_size
from pyreserve.errors import (
    FreeError,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    ViewError,
    VMError,
)


@pytest.fixture
def pool() -> Pool:
    """A pool of a hundred slots of 100 bytes."""
    return Pool(100, capacity=100)


class TestMaking:
    def test_a_new_pool_is_empty(self, pool: Pool) -> None:
        """A new pool has no slot in use and no committed memory."""
        assert (len(pool), list(pool), pool.in_use, pool.committed) == (0, [], 0, 0)
        assert (pool.item_size, pool.capacity) == (100, 100)

    @pytest.mark.parametrize(("size", "capacity"), [(16, 1 << 26), (100, 1 << 30), (3 << 30, 1)])
    def test_addresses_by_default(self, size: int, capacity: int) -> None:
        """The default capacity is the number of slots in 1 GiB, at least one."""
        with Pool(size) as pool:
            assert pool.capacity == max(1, min(capacity, (1 << 30) // (-(-size // 16) * 16)))

    @pytest.mark.parametrize(
        ("size", "align", "apart"),
        [(1, None, 1), (3, None, 4), (16, None, 16), (17, None, 32), (17, 1, 17), (5, 4096, 4096)],
    )
    def test_alignment(self, size: int, align: int | None, apart: int) -> None:
        """Slots lie at multiples of the alignment, with the smallest distance that allows."""
        with Pool(size, capacity=9, align=align) as pool:
            addresses = [pool.address(slot) for slot in pool.alloc_many(9)]

            assert {b - a for a, b in pairwise(addresses)} == {apart}
            assert all(address % (align or 1) == 0 for address in addresses)
            assert pool.in_use == 9 * apart

    @pytest.mark.parametrize(
        "wrong",
        [
            {"item_size": 0},
            {"item_size": -1},
            {"capacity": 0},
            {"capacity": -5},
            {"capacity": 1 << 60, "item_size": 1},
            {"align": 3},
            {"align": 0},
            {"step": 0},
            {"step": PAGE_SIZE + 1},
        ],
        ids=str,
    )
    def test_numbers_that_make_no_sense(self, wrong: dict[str, int]) -> None:
        """Sizes must be positive, alignments powers of two, steps whole OS pages."""
        with pytest.raises(RangeError):
            Pool(**{"item_size": 8, **wrong})  # type: ignore[arg-type]

    def test_arguments_that_are_not_integers(self, pool: Pool) -> None:
        """Arguments that are not integers are TypeErrors."""
        pool.alloc()
        calls: tuple[Any, ...] = (
            Pool,
            pool.free,
            pool.view,
            pool.address,
            pool.alloc_many,
            lambda n: pool.free_many([n]),
            pool.__contains__,
        )
        for call in calls:
            with pytest.raises(TypeError):
                call(1.0)
        assert len(pool) == 1

    def test_it_is_not_copied(self, pool: Pool) -> None:
        """A pool refuses to be pickled or copied."""
        with pytest.raises(TypeError, match="pickled"):
            pickle.dumps(pool)
        with pytest.raises(TypeError, match="copied"):
            copy.copy(pool)

    def test_repr(self, pool: Pool) -> None:
        """The repr gives the slots in use and the committed memory."""
        pool.alloc_many(3)

        assert repr(pool).startswith("<Pool of 100-byte slots: 3 of 100 in use, ")


class TestSlots:
    def test_the_lowest_free_slot(self, pool: Pool) -> None:
        """alloc takes the lowest free slot."""
        assert [pool.alloc() for _ in range(5)] == [0, 1, 2, 3, 4]

        pool.free(3)
        pool.free(1)

        assert [pool.alloc() for _ in range(3)] == [1, 3, 5]

    def test_which_are_in_use(self, pool: Pool) -> None:
        """Iteration, `in`, len and in_use agree on the slots in use."""
        pool.alloc_many(5)
        pool.free(2)

        assert list(pool) == [0, 1, 3, 4]
        assert [slot in pool for slot in (-1, 0, 2, 4, 5, 100, 1 << 70)] == [
            False,
            True,
            False,
            True,
            False,
            False,
            False,
        ]
        assert (len(pool), pool.in_use) == (4, 4 * 112)

    def test_iteration_is_of_one_moment(self, pool: Pool) -> None:
        """Iteration is over a snapshot: changes during it do not matter."""
        pool.alloc_many(3)

        seen = []
        for slot in pool:
            pool.free(slot)
            pool.alloc_many(2)
            seen.append(slot)

        assert seen == [0, 1, 2]

    def test_a_slot_is_its_users(self, pool: Pool) -> None:
        """Bytes written to a slot stay there and change no other slot."""
        slots = [pool.alloc() for _ in range(100)]
        for slot in slots:
            pool.view(slot)[:] = bytes([slot]) * 100

        assert all(bytes(pool.view(slot)) == bytes([slot]) * 100 for slot in slots)

    def test_a_view_for_reading(self, pool: Pool) -> None:
        """A read-only view refuses writes."""
        assert pool.view(pool.alloc(), readonly=True).readonly

    def test_addresses_do_not_change(self) -> None:
        """The address of a slot is the address of its view, and growth does not change it."""
        pool = Pool(3000, capacity=5000, step=16 * PAGE_SIZE)
        first = pool.alloc()
        pool.view(first)[:4] = b"mine"
        address = pool.address(first)

        pool.alloc_many(4999)

        assert pool.address(first) == address
        assert witness.peek(address, 4) == b"mine"
        gc.collect()
        pool.release()

    def test_no_slot_is_free(self, pool: Pool) -> None:
        """A full pool is an OutOfMemoryError that names the capacity, until a slot is freed."""
        pool.alloc_many(100)

        with pytest.raises(OutOfMemoryError, match=r"100 of 100 are in use") as caught:
            pool.alloc()
        assert caught.value.limit == "capacity"

        pool.free(50)
        assert pool.alloc() == 50

    def test_freed_twice(self, pool: Pool) -> None:
        """A free slot can be neither freed nor viewed."""
        slot = pool.alloc()
        pool.free(slot)

        for use in (pool.free, pool.view, pool.address, lambda slot: pool.free_many([slot])):
            for free in (slot, 99):
                with pytest.raises(FreeError, match=f"slot {free} is free"):
                    use(free)

    def test_a_free_slot_without_memory(self) -> None:
        """A slot that was never allocated, or was trimmed, is a FreeError too."""
        pool = Pool(PAGE_SIZE, capacity=100, step=PAGE_SIZE)
        pool.alloc_many(3)
        pool.free(1)
        pool.trim()

        for slot in (1, 50):
            for use in (pool.free, pool.view, pool.address):
                with pytest.raises(FreeError, match=f"slot {slot} is free"):
                    use(slot)

    @pytest.mark.parametrize("slot", [-1, 100, 1 << 40, 1 << 64, -(1 << 70)])
    def test_no_such_slot(self, pool: Pool, slot: int) -> None:
        """A slot outside the pool is a RangeError."""
        pool.alloc_many(100)
        held = pool.view(0)
        for use in (pool.free, pool.view, pool.address, lambda slot: pool.free_many([1, slot])):
            with pytest.raises(RangeError):
                use(slot)
        assert len(pool) == 100
        held.release()


class TestManySlots:
    def test_all_or_none(self, pool: Pool) -> None:
        """If fewer than n slots are free, alloc_many takes none."""
        pool.alloc_many(10)

        with pytest.raises(OutOfMemoryError, match="91 slots: 10 of 100 are in use"):
            pool.alloc_many(91)

        assert len(pool) == 10
        assert list(pool.alloc_many(90)) == list(range(10, 100))

    @pytest.mark.parametrize("n", [-1, -(1 << 70)])
    def test_fewer_than_none(self, pool: Pool, n: int) -> None:
        """A negative number of slots is a RangeError."""
        with pytest.raises(RangeError):
            pool.alloc_many(n)

    def test_none(self, pool: Pool) -> None:
        """Zero slots change nothing."""
        assert list(pool.alloc_many(0)) == []
        pool.free_many([])
        assert pool.committed == 0

    @pytest.mark.parametrize("n", [101, 1 << 62, 1 << 70])
    def test_more_than_there_are(self, pool: Pool, n: int) -> None:
        """Any number beyond the capacity is an OutOfMemoryError."""
        with pytest.raises(OutOfMemoryError):
            pool.alloc_many(n)

    def test_wherever_integers_are(self, pool: Pool) -> None:
        """free_many takes any buffer or iterable of integers."""
        slots = pool.alloc_many(10)

        pool.free_many(slots[:2])
        pool.free_many(np.array(slots[2:6], "u1"))
        pool.free_many(iter(slots[6:]))

        assert len(pool) == 0

    def test_duplicates_are_freed_none(self, pool: Pool) -> None:
        """A slot that occurs twice is a FreeError; none is freed."""
        slots = pool.alloc_many(10)

        with pytest.raises(FreeError, match="slot 4 "):
            pool.free_many([*slots, 4])

        assert list(pool) == list(slots)


class TestViews:
    def test_a_viewed_slot_stays(self, pool: Pool) -> None:
        """A slot with a live view can't be freed, alone or with others; its neighbours can."""
        slots = pool.alloc_many(10)
        view = pool.view(5)

        with pytest.raises(ViewError, match="slot 5"):
            pool.free(5)
        with pytest.raises(ViewError, match="slot 5"):
            pool.free_many(slots)
        assert len(pool) == 10
        pool.free(4)
        pool.free_many([6, 7])

        view.release()
        pool.free(5)
        assert list(pool) == [0, 1, 2, 3, 8, 9]

    def test_whatever_was_made_of_a_view(self, pool: Pool) -> None:
        """A consumer that keeps only a reference to the view's object pins the slot too."""
        slot = pool.alloc()
        kept: Any = np.ndarray((4,), np.uint8, buffer=pool.view(slot))

        with pytest.raises(ViewError):
            pool.free(slot)
        with pytest.raises(ViewError):
            pool.release()

        del kept
        pool.free(slot)

    def test_release_under_a_view(self, pool: Pool) -> None:
        """A pool still works after a refused release."""
        view = pool.view(pool.alloc())

        with pytest.raises(ViewError):
            pool.release()

        assert pool.alloc() == 1
        view.release()
        pool.release()


class TestZero:
    def test_contents_stay_unless_cleared(self, pool: Pool) -> None:
        """A slot keeps the bytes of its last user; `zero` clears this slot alone."""
        for slot in pool.alloc_many(3):
            pool.view(slot)[:] = b"\xaa" * 100
        pool.free_many([0, 1])

        assert bytes(pool.view(pool.alloc())) == b"\xaa" * 100
        assert bytes(pool.view(pool.alloc(zero=True))) == bytes(100)
        assert bytes(pool.view(0)) == bytes(pool.view(2)) == b"\xaa" * 100

    def test_many(self, pool: Pool) -> None:
        """alloc_many with `zero` clears the slots that were used before."""
        for slot in pool.alloc_many(10):
            pool.view(slot)[:] = b"\xaa" * 100
        pool.free_many(range(10))

        slots = pool.alloc_many(20, zero=True)

        assert all(bytes(pool.view(slot)) == bytes(100) for slot in slots)

    def test_unused_slots_are_not_touched(self) -> None:
        """Clearing slots that were never used touches no memory."""
        pool = Pool(64 * KiB, capacity=1024, step=64 * MiB)

        pool.alloc_many(1024, zero=True)

        assert witness.total_kib(pool.address(0), 64 * MiB, "Rss") < 64 * MiB // KiB // 2
        pool.release()


class TestMemory:
    def test_memory_comes_in_steps(self) -> None:
        """Committed memory is that of the slots in use, rounded up to a step, within the region."""
        step = 4 * PAGE_SIZE
        pool = Pool(PAGE_SIZE, capacity=10, align=1, step=step)

        committed = []
        for _ in range(10):
            pool.alloc()
            committed.append(pool.committed // PAGE_SIZE)

        assert committed == [4] * 4 + [8] * 4 + [10] * 2
        assert pool.committed == witness.nbytes(pool.address(0), 10 * PAGE_SIZE)
        pool.release()

    def test_steps_end_on_their_own_lines(self) -> None:
        """The first slot lies at a multiple of the step, so that huge pages fit."""
        with Pool(64) as pool:
            assert pool.address(pool.alloc()) % (2 * MiB) == 0

    def test_a_commit_that_is_refused(self) -> None:
        """If the kernel refuses a commit, no slot is taken, and slots in use still work."""

        def child() -> None:
            pool = Pool(64 * KiB, capacity=4096, step=MiB)
            pool.alloc_many(16)
            used = witness.status("VmData")
            resource.setrlimit(resource.RLIMIT_DATA, (used, used))
            with pytest.raises(OutOfMemoryError) as caught:
                pool.alloc()
            assert caught.value.limit == "RLIMIT_DATA"
            with pytest.raises(OutOfMemoryError):
                pool.alloc_many(100)
            assert (len(pool), pool.committed) == (16, MiB)
            pool.free(7)
            assert pool.alloc() == 7

        witness.in_child(child)

    def test_a_step_that_is_refused(self) -> None:
        """If a whole step is refused, less is committed ahead, and at the limit nothing."""

        def child() -> None:
            pool = Pool(64 * KiB, capacity=4096, step=64 * MiB)
            used = witness.status("VmData")
            resource.setrlimit(resource.RLIMIT_DATA, (used + 8 * MiB, used + 8 * MiB))
            assert pool.alloc() == 0
            assert 64 * KiB <= pool.committed <= 8 * MiB
            assert len(pool.alloc_many(100)) == 100
            assert 101 * 64 * KiB <= pool.committed <= 8 * MiB
            pool.view(100)[:1] = b"x"
            with pytest.raises(OutOfMemoryError):
                pool.alloc_many(400)
            assert len(pool) == 101

        witness.in_child(child)

    def test_trim(self) -> None:
        """trim decommits whole OS pages above the highest used slot; reused slots are zero."""
        pool = Pool(100, capacity=10_000, align=4, step=64 * PAGE_SIZE)
        for slot in pool.alloc_many(5000):
            pool.view(slot)[:] = b"\xaa" * 100
        before = pool.committed
        pool.free_many(range(10, 5000))

        given = pool.trim()

        assert pool.committed == before - given == -(-1000 // PAGE_SIZE) * PAGE_SIZE
        assert witness.nbytes(pool.address(0), 1_000_000) == pool.committed
        assert pool.trim() == 0
        slots = pool.alloc_many(4990)
        assert all(bytes(pool.view(slot)) == bytes(100) for slot in slots)
        assert all(bytes(pool.view(slot)) == b"\xaa" * 100 for slot in range(10))

    def test_trim_a_full_pool(self, pool: Pool) -> None:
        """If the highest slot is in use, trim decommits only the rest of the last step."""
        pool.alloc_many(100)

        pool.trim()

        assert len(pool) == 100
        assert pool.committed == -(-100 * 112 // PAGE_SIZE) * PAGE_SIZE

    def test_trim_an_empty_pool(self, pool: Pool) -> None:
        """Without a slot in use, trim decommits everything."""
        assert pool.trim() == 0
        pool.free(pool.alloc())

        pool.trim()

        assert (pool.committed, len(pool)) == (0, 0)
        assert pool.alloc() == 0

    def test_trim_holes(self) -> None:
        """trim decommits the whole pages between used slots; their slots can be used again."""
        pool = Pool(PAGE_SIZE, capacity=100, align=1, step=8 * PAGE_SIZE)
        for slot in pool.alloc_many(100):
            pool.view(slot)[:] = b"\xaa" * PAGE_SIZE
        pool.free_many([*range(10), *range(20, 30), 50])

        assert pool.trim() == 21 * PAGE_SIZE

        left = witness.runs(pool.base, pool.reserved)
        assert [(lo // PAGE_SIZE, n // PAGE_SIZE) for lo, n in left] == [
            (10, 10),
            (30, 20),
            (51, 49),
        ]
        assert pool.committed == 79 * PAGE_SIZE
        assert witness.total_kib(pool.base, pool.reserved, "Rss") * KiB == 79 * PAGE_SIZE
        assert pool.trim() == 0
        slots = pool.alloc_many(21)
        assert list(slots) == [*range(10), *range(20, 30), 50]
        assert all(bytes(pool.view(slot)) == bytes(PAGE_SIZE) for slot in slots)
        assert all(bytes(pool.view(slot)) == b"\xaa" * PAGE_SIZE for slot in (10, 19, 30, 49, 99))
        assert pool.committed == 100 * PAGE_SIZE
        assert len(witness.spans(pool.base, pool.reserved)) == 1
        gc.collect()
        pool.release()

    def test_a_hole_is_filled_in_steps(self) -> None:
        """A slot in a hole commits to the end of its step, as a new slot does."""
        pool = Pool(PAGE_SIZE, capacity=100, align=1, step=8 * PAGE_SIZE)
        pool.alloc_many(100)
        pool.free_many(range(99))
        pool.trim()

        committed = []
        for _ in range(20):
            pool.alloc()
            committed.append(pool.committed // PAGE_SIZE)

        assert committed == [9] * 8 + [17] * 8 + [25] * 4
        pool.release()

    def test_a_hole_that_is_not_filled(self) -> None:
        """If the kernel refuses the memory of a hole, no slot is taken and the hole stays."""

        def child() -> None:
            pool = Pool(64 * KiB, capacity=4096, step=MiB)
            pool.alloc_many(64)
            pool.free_many(range(16, 48))
            pool.trim()
            before, used = pool.committed, witness.status("VmData")
            resource.setrlimit(resource.RLIMIT_DATA, (used, resource.RLIM_INFINITY))
            for ask in (pool.alloc, lambda: pool.alloc_many(33)):
                with pytest.raises(OutOfMemoryError) as caught:
                    ask()
                assert caught.value.limit == "RLIMIT_DATA"
                assert (len(pool), pool.committed) == (32, before)
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
            assert list(pool.alloc_many(33)) == [*range(16, 48), 64]
            pool.view(47)[:] = b"x" * 64 * KiB

        witness.in_child(child)

    def test_trim_many_holes(self) -> None:
        """Beyond 512 pieces holes are discarded, the smallest ones: no map entries are taken."""
        pool = Pool(PAGE_SIZE, capacity=4096, align=1)
        for slot in pool.alloc_many(4096):
            pool.view(slot)[0] = 1
        pool.free_many(range(0, 2000, 2))  # holes of a page
        pool.free_many([slot for slot in range(2000, 4000) if slot % 4])  # of three pages

        given = pool.trim()

        assert given == 2500 * PAGE_SIZE
        assert pool.committed >= (4096 - 3 * 512) * PAGE_SIZE
        assert len(witness.runs(pool.base, pool.reserved)) <= 512 + 1
        assert witness.total_kib(pool.base, pool.reserved, "Rss") * KiB == 1596 * PAGE_SIZE
        assert pool.trim() == 0
        assert all(pool.view(slot)[0] == 1 for slot in pool)
        assert not any(pool.view(slot)[0] for slot in pool.alloc_many(2500))
        gc.collect()
        pool.release()

    def test_trim_under_a_view_of_the_region(self) -> None:
        """A hole that a view of the region shows stays; if there is no other, that is an error."""
        pool = Pool(PAGE_SIZE, capacity=10, align=1, step=PAGE_SIZE)
        pool.alloc_many(10)
        pool.free_many([2, 5])
        view = pool.region.view(5 * PAGE_SIZE, 8)
        view[0] = 7

        assert pool.trim() == PAGE_SIZE
        with pytest.raises(ViewError):
            pool.trim()

        assert (view[0], len(pool), pool.committed) == (7, 8, 9 * PAGE_SIZE)
        del view
        assert pool.trim() == PAGE_SIZE
        assert list(pool.alloc_many(2)) == [2, 5]
        pool.release()

    def test_trim_under_views(self, pool: Pool) -> None:
        """A view keeps its slot in use, so trim never decommits bytes under a view."""
        pool.alloc_many(50)
        view = pool.view(20)
        view[:] = b"\xaa" * 100
        pool.free_many([*range(20), *range(21, 50)])

        pool.trim()

        assert bytes(view) == b"\xaa" * 100

    def test_trim_inside_trim(self, pool: Pool) -> None:
        """A signal handler may trim between the decommit of another trim and its books."""
        pool.free(pool.alloc())
        returned = []

        def interrupt(frame: Any, event: str, _argument: Any) -> None:
            if event == "return" and frame.f_code.co_name == "decommit":
                sys.setprofile(None)
                returned.append(pool.trim())

        committed = pool.committed
        sys.setprofile(interrupt)
        try:
            returned.append(pool.trim())
        finally:
            sys.setprofile(None)

        assert returned == [0, committed]
        assert (pool.committed, pool.alloc(zero=True)) == (0, 0)

    @pytest.mark.parametrize("act", ["alloc", "free and trim", "close"])
    def test_calls_inside_trim_and_alloc(self, act: str) -> None:
        """Whatever a signal handler does inside a call, slots in use are accessible afterwards."""

        def interrupt(pool: Pool) -> None:
            if act == "alloc":
                pool.alloc(zero=True)
            elif act == "close":
                pool.close()
            else:
                pool.free_many(list(pool)[:3])
                pool.trim()

        def child() -> int:
            strike = 0
            while _interrupted(interrupt, strike):
                strike += 1
            return strike

        assert witness.in_child(child) > 30


def _interrupted(act: Callable[[Pool], None], strike: int) -> bool:
    """Use a pool, and call `act` at the given Python or C call; tell whether there were as many."""
    pool = Pool(PAGE_SIZE // 2, capacity=64, align=1, step=2 * PAGE_SIZE)
    pool.alloc_many(60)
    pool.free_many([*range(4), *range(10, 20), *range(30, 50)])
    events = 0

    def profile(*_: Any) -> None:
        nonlocal events
        events += 1
        if events > strike:
            sys.setprofile(None)
            act(pool)

    sys.setprofile(profile)
    try:
        with suppress(ReleasedError):
            pool.trim()
            pool.alloc_many(3, zero=True)
            pool.alloc()
            pool.trim()
            pool.alloc()
    finally:
        sys.setprofile(None)
    if not pool.released:
        pool.alloc_many(64 - len(pool))
        for slot in range(64):
            pool.view(slot)[:] = b"x" * (PAGE_SIZE // 2)
        gc.collect()
        pool.release()
    return events > strike


class TestRelease:
    def test_everything_is_refused_afterwards(self, pool: Pool) -> None:
        """Every use of a released pool raises ReleasedError."""
        pool.alloc_many(10)
        pool.release()

        calls: tuple[Any, ...] = (
            pool.alloc,
            lambda: pool.alloc(zero=True),
            lambda: pool.free(0),
            lambda: pool.free(-1),
            lambda: pool.alloc_many(1),
            lambda: pool.alloc_many(0),
            lambda: pool.free_many([0]),
            lambda: pool.view(0),
            lambda: pool.address(0),
            lambda: 0 in pool,
            lambda: iter(pool),
            lambda: len(pool),
            lambda: pool.in_use,
            lambda: pool.committed,
            pool.trim,
            pool.release,
            pool.__enter__,
        )
        for call in calls:
            with pytest.raises(ReleasedError):
                call()
        assert pool.released
        assert repr(pool) == "<Pool of 100-byte slots, released>"
        assert (pool.item_size, pool.capacity) == (100, 100)

    def test_a_block(self) -> None:
        """Leaving the with block releases the pool, also if it was released inside."""
        with Pool(8) as pool:
            pool.alloc()
        assert pool.released
        with Pool(8) as pool:
            pool.release()

    def test_a_view_outlives_the_pool(self) -> None:
        """A pool that is dropped keeps the bytes that views show."""
        pool: Pool | None = Pool(100)
        assert pool is not None
        view = pool.view(pool.alloc())
        view[:4] = b"kept"

        pool = None
        gc.collect()

        assert bytes(view[:4]) == b"kept"


class TestThreads:
    def test_no_slot_has_two_owners(self) -> None:
        """Eight threads find in their slots what they wrote, also during trims."""
        pool = Pool(100, capacity=2000, step=PAGE_SIZE)
        errors: list[BaseException] = []

        def work(number: int) -> None:
            random, mine = Random(number), list[int]()
            mark = bytes([number + 1]) * 100
            try:
                for _ in range(400):
                    if len(mine) > 100 or (mine and random.random() < 0.5):
                        slot = mine.pop(random.randrange(len(mine)))
                        view = pool.view(slot)
                        assert bytes(view) == mark
                        view.release()
                        pool.free(slot)
                    else:
                        some = [pool.alloc(zero=True)] if random.random() < 0.5 else []
                        some = some or list(pool.alloc_many(3, zero=True))
                        for slot in some:
                            view = pool.view(slot)
                            assert bytes(view) == bytes(100)
                            view[:] = mark
                            view.release()
                        mine += some
                    if number == 0:
                        pool.trim()
                pool.free_many(mine)
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        run_together(threads)

        assert errors == []
        assert len(pool) == 0

    def test_a_viewed_slot_stays_among_threads(self) -> None:
        """A slot that a thread has got a view of is not freed by others while the view lives."""
        pool = Pool(64, capacity=3, step=PAGE_SIZE)
        pool.alloc_many(3)
        wrong: list[object] = []
        seen = [0]

        def look() -> None:
            for i in range(4000):
                slot = i % 3
                try:
                    view = pool.view(slot)
                except FreeError:
                    continue
                seen[0] += 1
                wrong.extend(slot for _ in range(3) if slot not in pool)
                del view

        def reuse() -> None:
            for i in range(4000):
                with suppress(ViewError, FreeError):
                    pool.free(i % 3)
                    if i % 5 == 0:
                        pool.trim()
                with suppress(OutOfMemoryError):
                    pool.alloc()

        threads = [threading.Thread(target=work) for work in (look, reuse, look, reuse)]
        run_together(threads)

        assert wrong == []
        assert seen[0] > 100
        pool.release()

    def test_a_release_among_users(self) -> None:
        """Threads that use a pool while another releases it get ReleasedError and nothing worse."""

        def child() -> list[str]:
            wrong: list[str] = []
            for _ in range(50):
                pool = Pool(4096, capacity=1000, step=PAGE_SIZE)

                def work(pool: Pool = pool) -> None:
                    try:
                        for _ in range(10_000):
                            pool.free(pool.alloc(zero=True))
                            pool.trim()
                    except ReleasedError:
                        return
                    except BaseException as error:  # noqa: BLE001, RUF100
                        wrong.append(repr(error))

                threads = [threading.Thread(target=work) for _ in range(3)]
                for thread in threads:
                    thread.start()
                pool.alloc()
                pool.release()
                for thread in threads:
                    thread.join()
            return wrong

        assert witness.in_child(child) == []


class TestFork:
    def test_the_child_has_a_copy(self, pool: Pool) -> None:
        """A child continues with the same slots and contents, independently of the parent."""
        slot = pool.alloc()
        pool.view(slot)[:4] = b"both"

        def child() -> bytes:
            result = bytes(pool.view(slot)[:4])
            pool.view(slot)[:4] = b"mine"
            assert pool.alloc() == 1
            pool.free_many([0, 1])
            pool.trim()
            pool.release()
            return result

        assert witness.in_child(child) == b"both"
        assert list(pool) == [slot]
        assert bytes(pool.view(slot)[:4]) == b"both"

    @pytest.mark.parametrize("forks", [5, pytest.param(20, marks=pytest.mark.heavy)])
    def test_a_fork_while_threads_allocate(self, forks: int) -> None:
        """A child never inherits a lock that a thread of the parent held."""
        pool = Pool(100, capacity=10_000, step=PAGE_SIZE)
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                slots = pool.alloc_many(50)
                pool.view(slots[7])[0] = 1
                pool.free_many(slots)
                pool.free(pool.alloc(zero=True))
                pool.trim()

        def child() -> bool:
            slot = pool.alloc(zero=True)
            clear = bytes(pool.view(slot)) == bytes(100)
            pool.free(slot)
            return clear and len(list(pool)) == len(pool)

        threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
        for thread in threads:
            thread.start()
        try:
            answers = [witness.in_child(child) for _ in range(forks)]
        finally:
            stop.set()
            for thread in threads:
                thread.join()

        assert all(answers)
        assert len(pool) == 0

    def test_finalisers_give_slots_back(self) -> None:
        """Finalisers can free slots at any point, also inside fork handlers."""

        def child() -> int:
            pool = Pool(32)

            class Owner:
                def __init__(self) -> None:
                    self.me = self
                    self.slot = pool.alloc()

                def __del__(self) -> None:
                    pool.free(self.slot)

            gc.set_threshold(5, 1, 1)
            for _ in range(20):
                owners = [Owner() for _ in range(100)]
                assert len(pool) >= len(owners)
                assert witness.in_child(lambda: pool.alloc() >= 0)
            del owners
            gc.collect()
            return len(pool)

        assert witness.in_child(child) == 0


def test_the_slots_are_an_array(pool: Pool) -> None:
    """alloc_many returns an array of 64-bit integers."""
    slots = pool.alloc_many(3)

    assert isinstance(slots, array)
    assert slots.typecode == "q"


class TestNdarray:
    def test_over_a_slot(self) -> None:
        """An ndarray has the bytes of its slot, and pins the slot."""
        pool = Pool(48)
        first, second = pool.alloc_many(2)

        array = pool.ndarray(second, (2, 3), "f8")
        array[:] = 1.5

        assert array.shape == (2, 3)
        assert np.frombuffer(pool.view(second), "f8").tolist() == [1.5] * 6
        assert not any(pool.view(first))
        with pytest.raises(ViewError, match="cannot free slot 1"):
            pool.free(second)
        del array
        pool.free(second)

    def test_part_of_a_slot(self) -> None:
        """An array may be smaller than the slot, but not larger; it may be readonly."""
        pool = Pool(48)
        slot = pool.alloc()

        assert pool.ndarray(slot, [5]).shape == (5,)
        assert not pool.ndarray(slot, 6, "f8", readonly=True).flags.writeable
        with pytest.raises(RangeError, match="must fit a slot of 48 bytes, got 56 bytes"):
            pool.ndarray(slot, 7, "f8")
        with pytest.raises(RangeError, match="negative"):
            pool.ndarray(slot, -1)
        pool.free(slot)

    def test_without_items(self) -> None:
        """An array without items pins nothing, but its slot must be in use."""
        pool = Pool(48)
        slot = pool.alloc()

        array = pool.ndarray(slot, (3, 0))

        assert (array.shape, array.dtype) == ((3, 0), np.uint8)
        pool.free(slot)
        for shape in (0, 1):
            with pytest.raises(FreeError):
                pool.ndarray(slot, shape)


guards = pytest.mark.skipif(
    not capabilities().madv_guard_install, reason="this kernel has no MADV_GUARD_INSTALL"
)


def dies(pool: Pool, slot: int, offset: int) -> bool:
    """Tell whether writing at an offset from a slot ends a process by SIGSEGV."""
    return witness.faults(pool.address(slot) + offset)


@guards
class TestGuards:
    @pytest.mark.parametrize(
        ("size", "align", "first"),
        [
            (100, 1, 100),
            (100, None, 112),
            (PAGE_SIZE, None, PAGE_SIZE),
            (PAGE_SIZE + 8, 8, PAGE_SIZE + 8),
            (10, 2 * PAGE_SIZE, 2 * PAGE_SIZE),
        ],
    )
    def test_an_overflow_faults(self, size: int, align: int | None, first: int) -> None:
        """The first byte behind a slot, rounded up to its alignment, ends the process."""
        pool = Pool(size, capacity=10, align=align, step=PAGE_SIZE, guard=True)
        slots = pool.alloc_many(3)

        for slot in slots:
            pool.view(slot)[:] = bytes([slot + 1]) * size
            assert pool.address(slot) % (align or 1) == 0
            assert not dies(pool, slot, first - 1)
            assert dies(pool, slot, first)
            assert dies(pool, slot, first + PAGE_SIZE - 1)
        assert all(bytes(pool.view(slot)) == bytes([slot + 1]) * size for slot in slots)
        assert witness.peek(pool.address(1), size) == bytes([2]) * size
        assert pool.ndarray(2, size).tolist() == [3] * size
        assert pool.in_use == 3 * (pool.address(1) - pool.address(0))
        pool.free_many(slots)

    def test_an_overflow_by_the_writer_itself(self) -> None:
        """A write behind a slot ends the process that makes it."""
        script = """
            import ctypes
            from pyreserve import Pool
            pool = Pool(100, align=1, guard=True)
            slot = pool.alloc()
            ctypes.memset(pool.address(slot), 1, 100)
            print("in bounds", flush=True)
            ctypes.memset(pool.address(slot), 1, 101)
            print("out of bounds", flush=True)
        """

        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script)],
            capture_output=True,
            text=True,
            check=False,
        )

        assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "in bounds\n")

    def test_no_map_entries(self) -> None:
        """The guards of a thousand slots take no map entries and no memory."""
        pool = Pool(PAGE_SIZE, capacity=1000, guard=True, step=64 * PAGE_SIZE)
        for slot in pool.alloc_many(1000):
            pool.view(slot)[0] = 1

        assert len(witness.spans(pool.base, pool.reserved)) == 1
        assert witness.total_kib(pool.base, pool.reserved, "Rss") * KiB == 1000 * PAGE_SIZE
        gc.collect()
        pool.release()

    @pytest.mark.parametrize("mode", ["charge", "noreserve"])
    def test_guards_after_a_trim(self, mode: Mode) -> None:
        """Slots in a hole or in the tail have their guards again when they are allocated again."""
        pool = Pool(100, capacity=64, step=8 * PAGE_SIZE, guard=True, mode=mode)
        pool.alloc_many(64)
        pool.free_many([*range(8), *range(20, 30), *range(50, 64)])

        assert pool.trim() == 32 * 2 * PAGE_SIZE
        assert pool.committed == 32 * 2 * PAGE_SIZE
        assert list(pool.alloc_many(12)) == [*range(8), *range(20, 24)]
        assert pool.alloc() == 24
        pool.alloc_many(19)

        assert all(dies(pool, slot, 112) and not dies(pool, slot, 111) for slot in pool)
        assert not any(bytes(pool.view(slot)) != bytes(100) for slot in pool)

    def test_guards_after_a_discard(self) -> None:
        """A hole that is discarded keeps its guards."""
        pool = Pool(100, capacity=1400, guard=True)
        for slot in pool.alloc_many(1400):
            pool.view(slot)[0] = 1
        pool.free_many(range(0, 1400, 2))

        assert pool.trim() >= 700 * PAGE_SIZE
        assert len(witness.runs(pool.base, pool.reserved)) <= 513
        pool.alloc_many(700)

        assert all(dies(pool, slot, 112) for slot in range(0, 1400, 50))
        gc.collect()
        pool.release()

    def test_the_region_shows_no_guards(self) -> None:
        """A view of the region that would meet a guard is a RangeError."""
        pool = Pool(PAGE_SIZE, capacity=4, guard=True)
        pool.alloc_many(4)

        assert bytes(pool.region.view(2 * PAGE_SIZE, PAGE_SIZE)) == bytes(PAGE_SIZE)
        for offset, length in ((0, PAGE_SIZE + 1), (PAGE_SIZE, 1), (0, 8 * PAGE_SIZE)):
            with pytest.raises(RangeError, match="some of it is a guard"):
                pool.region.view(offset, length)
            with pytest.raises(RangeError, match="guard"):
                pool.region.ndarray(offset, length)
        gc.collect()
        pool.release()

    def test_a_child_has_guards(self) -> None:
        """A forked child has the guards too; fork="wipe" would drop them and is refused."""
        pool = Pool(64, capacity=4, guard=True)
        pool.alloc()

        assert witness.in_child(lambda: dies(pool, 0, 64) and not dies(pool, 0, 63))
        with pytest.raises(ValueError, match="mutually exclusive"):
            Pool(64, guard=True, fork="wipe")

    def test_a_guard_that_is_refused(self) -> None:
        """If the kernel refuses a guard, no slot is allocated."""
        pool = Pool(64, capacity=4, guard=True)
        refuse = VMError(errno.EINVAL, "no", verb="guard")
        with (
            patch.object(Exports, "guard_cells", side_effect=refuse),
            pytest.raises(VMError, match="no"),
        ):
            pool.alloc()

        assert len(pool) == 0
        assert dies(pool, pool.alloc(), 64)


def test_guards_are_missing() -> None:
    """On a kernel without guard pages guard=True is a VMError that says so."""
    with (
        patch.object(Feature, "works", return_value=False),
        pytest.raises(VMError, match=r"guard=True needs guard pages: .*To have it"),
    ):
        Pool(64, guard=True)


class TestPolicies:
    def test_they_reach_the_region(self) -> None:
        """The pool's region has the policies and the name given to the pool."""
        pool = Pool("4KiB", align="4KiB", mode="noreserve", huge_pages="never", name="slots")

        region = pool.region

        assert (region.mode, region.huge_pages, region.fork) == ("noreserve", "never", "copy")
        assert (pool.name, pool.base, pool.reserved) == ("slots", region.base, region.size)
        assert (pool.item_size, pool.base % 4096) == (4096, 0)

    def test_huge_pages_align_the_base(self) -> None:
        """With huge pages preferred, the pool begins on a huge page."""
        size = thp_size()
        if size is None:
            pytest.skip("this kernel has no transparent huge pages")
        with Pool(64, step=64 * KiB, huge_pages="prefer") as pool:
            assert pool.base % size == 0

    def test_a_view_of_the_region_counts(self) -> None:
        """A view got from the region protects every slot that it shows."""
        pool = Pool(64)
        slots = pool.alloc_many(4)
        view = pool.region.view(100, 100)

        with pytest.raises(ViewError, match="cannot free slot 1"):
            pool.free_many(slots)
        for slot in (1, 2, 3):
            with pytest.raises(ViewError):
                pool.free(slot)
        pool.free(0)
        del view
        pool.free_many([1, 2, 3])
