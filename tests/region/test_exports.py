"""Exports: the lock and the live views of a region, for containers built on it."""

import contextlib
import signal
import sys
import threading
import weakref
from typing import Any

import pytest

import pyreserve
from helpers.interruptions import Struck, alarms_raise
from pyreserve import PAGE_SIZE, Region, ReleasedError, StateError, ViewError
from pyreserve._region.viewtable import ViewTable


def add(table: ViewTable, exported: Any, lo: int, hi: int) -> None:
    table.new.append((weakref.ref(exported), lo, hi))
    table.flush()


class TestRemove:
    def test_results_and_exceptions_of_the_function(self, region: Region) -> None:
        """remove returns what the function returns, and lets its exception through."""
        with region.exports.lock:
            assert region.exports.remove("cut", 0, PAGE_SIZE, divmod, 7, 2) == (3, 1)
            with pytest.raises(ZeroDivisionError):
                region.exports.remove("cut", 0, PAGE_SIZE, divmod, 7, 0)
        region.commit()
        assert len(region.view()) == region.size

    def test_under_a_view(self, region: Region) -> None:
        """Under a live view of its bytes the function is not called; the message has the verb."""
        region.commit()
        view = region.view(10, 10)
        called: list[int] = []

        with region.exports.lock:
            with pytest.raises(ViewError, match=r"cannot cut \[0x0, 0xb\): 1 live view holds"):
                region.exports.remove("cut", 0, 11, called.append, 1)
            region.exports.remove("cut", 0, 10, called.append, 2)
            del view
            region.exports.remove("cut", 0, 11, called.append, 3)

        assert called == [2, 3]

    @pytest.mark.parametrize("viewed", [False, True])
    def test_no_view_inside(self, region: Region, viewed: bool) -> None:
        """No view can be made inside a removal, not even of other bytes, nor after a nested one."""
        region.commit()
        if viewed:
            region.view()
        exports, refused = region.exports, []

        def attempt() -> None:
            try:
                region.view(0, 1)
            except StateError as error:
                refused.append(str(error))

        def nested() -> None:
            exports.remove("cut", 0, 1, attempt)
            region.decommit(PAGE_SIZE, PAGE_SIZE)
            attempt()

        with exports.lock:
            exports.remove("cut", 0, 1, nested)
            with contextlib.suppress(KeyError), exports.removal():
                nested()
                raise KeyError

        message = "view cannot be called from inside another call on the same region"
        assert refused == [message] * 4
        assert len(region.view(0, 1)) == 1

    def test_a_handler_that_raises_ends_it(self, region: Region) -> None:
        """Where a signal handler raises, inside or around a removal, views can be made again."""
        region.commit()
        exports, strikes = region.exports, 0
        with alarms_raise():
            while strikes < 1000:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 2e-5 + strikes * 1e-7)
                    while True:
                        with exports.lock, exports.removal():
                            pass
                except Struck:  # while the exception refers to the frames that it left
                    strikes += 1
                    assert len(region.view(0, 1)) == 1

    def test_other_threads_wait(self, region: Region) -> None:
        """Another thread's view waits for the end of a removal instead of being refused."""
        region.commit()
        sizes: list[int] = []
        thread = threading.Thread(target=lambda: sizes.append(len(region.view(0, 5))))

        with region.exports.lock, region.exports.removal():
            thread.start()
            thread.join(0.05)
            assert sizes == []
        thread.join()

        assert sizes == [5]


class TestViews:
    def test_viewed(self, region: Region) -> None:
        """viewed tells whether a view may be alive; live lists the live ones."""
        region.commit()
        exports = region.exports

        assert (exports.viewed, exports.live(0, region.size)) == (False, [])
        view = region.view(3, 4)

        assert exports.viewed
        assert [(lo, hi) for _, lo, hi in exports.live(0, 4)] == [(3, 7)]
        assert exports.live(7, region.size) == []
        del view
        assert exports.live(0, region.size) == []

    @pytest.mark.parametrize("others", [0, 1000])
    def test_viewed_ends(self, region: Region, others: int) -> None:
        """viewed ends, some removals after the last view, however many there were."""
        region.commit()
        exports = region.exports
        kept = [region.view(i, 1) for i in range(others + 1)]
        with exports.lock:
            for _ in range(3 * others + 3000):
                exports.remove("cut", PAGE_SIZE, 2 * PAGE_SIZE, int)
            assert exports.viewed
            assert exports.handle.viewed

            kept.clear()
            for _ in range(3 * others + 3000):
                exports.remove("cut", PAGE_SIZE, 2 * PAGE_SIZE, int)
            assert not exports.viewed
            assert not exports.handle.viewed
        view = region.view(0, 1)
        assert exports.viewed
        assert exports.handle.viewed
        with pytest.raises(ViewError):
            region.decommit()
        del view

    def test_a_removal_inside_a_view(self, region: Region) -> None:
        """A signal handler that removes bytes inside a call of view does not lose that view."""
        region.commit()
        exports, events, strike = region.exports, 0, 0
        while events >= strike:
            exports.viewed = exports.handle.viewed = False
            events = 0

            def interrupt(*_: object, strike: int = strike) -> None:
                nonlocal events
                events += 1
                if events == strike:
                    exports.remove("cut", 4 * PAGE_SIZE, 5 * PAGE_SIZE, int)

            sys.setprofile(interrupt)
            view = exports.view(0, 8)
            sys.setprofile(None)
            assert exports.viewed
            assert exports.handle.viewed
            with pytest.raises(ViewError):
                region.decommit()
            del view
            strike += 1
        assert strike > 5

    def test_the_object_behind_a_view_pins_its_bytes(self, region: Region) -> None:
        """The obj of a view keeps the bytes in place without the view."""
        region.commit()
        pin = region.exports.view(0, 10).obj

        with pytest.raises(ViewError):
            region.decommit()
        del pin
        region.decommit()

    def test_a_call_that_interrupts_an_addition_only_reads(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The table prunes dead entries, but not while one of its own calls is interrupted."""
        table, kept = ViewTable(1 << 40), threading.Event()
        for _ in range(5):
            add(table, threading.Event(), 0, 10)
        new_bucket, sizes = ViewTable._new_bucket, []

        def entries() -> int:
            return sum(len(bucket.entries) for bucket in table._levels[0].values())

        def interrupted(self: ViewTable, level: int, index: int) -> object:
            sizes.append((self.live(0, 10), entries()))
            return new_bucket(self, level, index)

        monkeypatch.setattr(ViewTable, "_new_bucket", interrupted)
        add(table, kept, 1 << 30, (1 << 30) + 10)

        assert all(size == ([], 5) for size in sizes)
        assert sizes
        assert table.live(0, 10) == []
        assert entries() == 1


class TestOwner:
    def test_it_keeps_the_verbs(self, region: Region) -> None:
        """Only the region's methods refuse for an owner; those of its Exports are the owner's."""
        region.commit()
        region.exports.owner = "test"

        for verb in (region.decommit, region.discard, region.release, region.close):
            with pytest.raises(StateError, match="part of a test: use the owner's methods"):
                verb()
        region.exports.discard(0, PAGE_SIZE)
        region.exports.decommit(0, PAGE_SIZE)
        assert region.committed == region.size - PAGE_SIZE
        region.exports.release()
        assert region.released

    @pytest.mark.parametrize("end", [Region.release, Region.close, Region.__del__])
    def test_of_a_region_that_ended_unused(self, end: object) -> None:
        """The Exports of a region that ended before its first use is released."""
        region = pyreserve.reserve(PAGE_SIZE)
        assert callable(end)
        end(region)

        exports = region.exports

        assert exports.released
        for use in (
            lambda: exports.view(0, 1),
            lambda: exports.decommit(0, PAGE_SIZE),
            lambda: exports.discard(0, PAGE_SIZE),
            lambda: exports.runs(committed=True),
            exports.release,
        ):
            with pytest.raises(ReleasedError):
                use()
        exports.close()
