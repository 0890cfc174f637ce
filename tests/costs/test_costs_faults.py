"""`costs.faults`: exact counts on the real kernel, estimates from synthetic costs and records."""

import json
import mmap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import costs_tables
from helpers.costs_tables import line
from helpers.witness import in_child
from pyreserve import PAGE_SIZE, MiB, StateError, costs, reserve
from pyreserve._system import proc
from pyreserve.costs import Curve, faultlog, faultmodel
from pyreserve.costs.faultlog import (
    ANONYMOUS,
    FAULT,
    FORK,
    LOST,
    OTHER,
    Extent,
    Holding,
    Places,
    Record,
    places,
)
from pyreserve.costs.faultmodel import Counts, Figure, Prices

HUGE = 2 * MiB
PAGES = HUGE // PAGE_SIZE  # in a huge page
BASE = 1 << 40
SMALL_US, HUGE_US, GIVEN_BACK_US = 2.0, 0.5, 0.25  # a page
TABLE = costs_tables.table(
    {
        Curve("touch", "write"): line(0, SMALL_US * 1000),
        Curve("touch", "read"): line(0, 500),
        Curve("touch", "write", "2MiB"): line(0, HUGE_US * 1000),
        Curve("release", "piece"): line(0, GIVEN_BACK_US * 1000),
        Curve("release", "piece", "2MiB"): line(0, 1),
    },
    jitter=0.001,
)
PRICES = Prices(TABLE.model())
EMPTY = Holding(0, 0, 0, 0, 0)
only_4k = pytest.mark.skipif(PAGE_SIZE != 4096, reason="the synthetic table has 4 KiB pages")


def touch(pages: int, region_pages: int | None = None) -> None:
    """Touch fresh small pages and release them."""
    with reserve((region_pages or pages) * PAGE_SIZE, huge_pages="never") as region:
        region.commit(0, region.reserved)
        with region.view(0, pages * PAGE_SIZE) as view:
            view[::PAGE_SIZE] = b"\1" * pages


def faults_at(start: int, pages: int, step: int = 1) -> list[Record]:
    """The sampled faults of touching one page of `step`, at time 1."""
    touched = range(start, start + pages * PAGE_SIZE, step * PAGE_SIZE)
    return [Record(1, at, 0, FAULT) for at in touched[:: faultlog.PERIOD]]


def counts(
    faults: int,
    fallen: Places | None,
    *,
    system: float = 100.0,
    time: float = 0.2,
    before: Holding | None = EMPTY,
    after: Holding | None = EMPTY,
    machine_huge: int | None = 0,
) -> Counts:
    """The facts of a block."""
    return Counts(faults, system, time, before, after, machine_huge, fallen, "not allowed", HUGE)


def filled(length: int, times: int = 1) -> tuple[int, Places]:
    """The number and the places of the faults of mapping, filling and unmapping memory."""
    records: list[Record] = []
    for _ in range(times):
        records.append(Record(1, BASE, length, ANONYMOUS))
        records += faults_at(BASE, length // PAGE_SIZE)
    return times * length // PAGE_SIZE, places([], records, HUGE)


def saving(facts: Counts) -> Figure:
    """The saving by the synthetic prices."""
    return faultmodel.saving(facts, PRICES, faultlog.PERIOD)


def cost(facts: Counts) -> Figure:
    """The cost by the synthetic prices."""
    return faultmodel.cost(facts, PRICES, faultlog.PERIOD)


class TestCounts:
    def test_each_fresh_page_is_a_fault(self) -> None:
        """Touching n fresh small pages raises the count by at least n."""
        with costs.faults(TABLE) as f:
            touch(5000)
        assert f.minor >= 5000
        assert f.major >= 0

    def test_resident_pages_are_none(self) -> None:
        """Touching pages again raises no fault for each of them."""
        with reserve(5000 * PAGE_SIZE, huge_pages="never") as region:
            region.commit(0, region.reserved)
            region.populate(0, region.reserved)
            with region.view() as view, costs.faults(TABLE) as f:
                view[::PAGE_SIZE] = b"\1" * 5000
        assert f.minor < 5000

    def test_it_counts_inside_the_block_and_stops_after_it(self) -> None:
        """The figures grow inside the block and are fixed after it."""
        with costs.faults(TABLE) as f:
            touch(1000)
            inside = f.minor
            assert inside >= 1000
            touch(1000)
            assert f.minor >= inside + 1000
            assert f.saving().high <= f.system
        after = f.minor, f.system, f.user, f.wall, f.huge
        touch(1000)
        assert after == (f.minor, f.system, f.user, f.wall, f.huge)

    def test_blocks_nest(self) -> None:
        """An inner block's faults are in the outer one too."""
        with costs.faults(TABLE) as outer:
            with costs.faults(TABLE) as inner:
                touch(1000)
            touch(1000)
        assert inner.minor >= 1000
        assert outer.minor >= inner.minor + 1000

    def test_all_threads_count(self) -> None:
        """Faults of a thread that began before or in the block count."""
        go, done = threading.Event(), threading.Event()

        def work() -> None:
            go.wait()
            touch(1000)
            done.set()

        early = threading.Thread(target=work)
        early.start()
        with costs.faults(TABLE) as f:
            late = threading.Thread(target=touch, args=(1000,))
            late.start()
            go.set()
            done.wait()
            late.join()
        early.join()
        assert f.minor >= 2000

    def test_it_can_be_entered_again(self) -> None:
        """A second block begins at zero; entering a running block is refused."""
        f = costs.faults(TABLE)
        with f:
            touch(3000)
        with f:
            with pytest.raises(StateError, match="has not ended"):
                f.__enter__()
            assert f.minor < 3000

    def test_it_must_be_entered(self) -> None:
        """A figure before the block is refused; leaving without entering does nothing."""
        f = costs.faults(TABLE)
        f.__exit__(None, None, None)
        for figure in (lambda: f.minor, lambda: f.huge, f.saving, f.to_dict, lambda: str(f)):
            with pytest.raises(StateError, match="entered first"):
                figure()

    def test_a_forked_child_has_no_figures(self) -> None:
        """In a child the block belongs to the parent: figures are refused, its end is silent."""
        with costs.faults(TABLE) as f:

            def child() -> str:
                f.__exit__(None, None, None)
                with pytest.raises(StateError, match="another process"):
                    f.saving()
                with costs.faults(TABLE) as own:
                    touch(1000)
                return "" if own.minor >= 1000 else "too few"

            assert in_child(child) == ""
        assert f.minor > 0

    def test_an_exception_passes(self) -> None:
        """An exception in the block passes through, and the figures are there."""
        f = costs.faults(TABLE)

        def block() -> None:
            with f:
                touch(1000)
                raise KeyError

        with pytest.raises(KeyError):
            block()
        assert f.minor >= 1000

    def test_without_proc_counts_remain(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without /proc and without a log the counts are exact, and the saving says nothing."""
        monkeypatch.setattr(proc, "_PROC", str(tmp_path))
        monkeypatch.setattr("pyreserve.costs.faulting.FaultLog", _refused)
        with costs.faults(TABLE) as f:
            touch(50_000)
        assert f.minor >= 50_000
        assert f.huge is None
        assert f.machine_huge is None
        assert f.saving().low == 0
        assert "unknown" in str(f) or "less than 1 %" in str(f)


def _refused() -> None:
    raise PermissionError(13, "Permission denied")


@pytest.fixture
def log() -> Iterator[faultlog.FaultLog]:
    """A running log; skips where the kernel allows none."""
    try:
        log = faultlog.FaultLog()
    except OSError as error:
        pytest.skip(f"page faults cannot be logged here: {error}")
    yield log
    log.stop()


class TestLog:
    def test_it_knows_memory_that_is_gone(self, log: faultlog.FaultLog) -> None:
        """Faults in memory that was released again count as memory that could have been huge."""
        touch(20 * PAGES)
        found = places(faultlog.extents(proc.smaps()), log.take(), HUGE)
        faults = sum(mapping.faults(faultlog.PERIOD) for mapping in found.fresh)
        assert faults >= 18 * PAGES

    def test_it_knows_file_backed_memory(self, log: faultlog.FaultLog, tmp_path: Path) -> None:
        """Faults in a file that was mapped and unmapped are those of other mappings."""
        path = tmp_path / "file"
        path.write_bytes(bytes(64 * MiB))
        with path.open("rb") as file:
            for _ in range(4):
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    mapped[::PAGE_SIZE]
        found = places([], log.take(), HUGE)
        assert found.other >= 1

    def test_a_stopped_log_is_empty(self, log: faultlog.FaultLog) -> None:
        """After `stop`, which may be called twice, there are no records."""
        touch(5000)
        log.stop()
        log.stop()
        assert log.take() == []


class TestPlaces:
    def test_small_mappings_are_told_apart(self) -> None:
        """Only faults in whole aligned huge pages of a mapping could have been huge."""
        records = [
            Record(1, BASE + PAGE_SIZE, 2 * HUGE, ANONYMOUS),  # one whole huge page, two parts
            Record(2, BASE + PAGE_SIZE, 0, FAULT),
            Record(2, BASE + HUGE, 0, FAULT),
            Record(2, BASE + 2 * HUGE - 1, 0, FAULT),
            Record(2, BASE + 2 * HUGE, 0, FAULT),
            Record(2, BASE + 3 * HUGE, 0, FAULT),  # in no mapping
        ]
        found = places([], records, HUGE)
        assert [mapping.samples for mapping in found.fresh] == [{BASE // HUGE + 1: 2}]
        assert (found.small, found.other, found.samples) == (2, 1, 5)

    def test_a_mapping_that_grows_is_the_same(self) -> None:
        """A larger mapping over an anonymous one is that one, grown; the same one is new."""
        records = [
            Record(1, BASE, HUGE, ANONYMOUS),
            Record(2, BASE, 0, FAULT),
            Record(3, BASE, 2 * HUGE, ANONYMOUS),
            Record(4, BASE, 0, FAULT),
            Record(5, BASE, 2 * HUGE, ANONYMOUS),
            Record(6, BASE, 0, FAULT),
        ]
        found = places([], records, HUGE)
        assert [sum(mapping.samples.values()) for mapping in found.fresh] == [2, 1]

    def test_memory_that_was_touched_too_early_stays_small(self) -> None:
        """A huge page that was touched before the mapping held the whole of it stays small."""
        records = [
            Record(1, BASE + HUGE // 2, HUGE, ANONYMOUS),
            Record(2, BASE + HUGE // 2, 0, FAULT),
            Record(3, BASE, 2 * HUGE, ANONYMOUS),
            Record(4, BASE, 0, FAULT),
            Record(4, BASE + HUGE, 0, FAULT),
        ]
        found = places([], records, HUGE)
        assert [mapping.samples for mapping in found.fresh] == [{BASE // HUGE + 1: 1}]
        assert found.small == 2

    def test_a_mapping_inside_another_leaves_the_rest(self) -> None:
        """A file that is mapped over the middle of anonymous memory leaves both ends of it."""
        records = [
            Record(1, BASE + HUGE, HUGE, OTHER),
            *(Record(2, BASE + i * HUGE, 0, FAULT) for i in range(4)),
        ]
        found = places([Extent(BASE, BASE + 3 * HUGE, True)], records, HUGE)
        assert sum(mapping.faults(1) for mapping in found.fresh) == 2
        assert found.other == 2

    def test_forks_and_losses_are_reported(self) -> None:
        """Forks are counted; a loss is known."""
        found = places([], [Record(0, 0, 9, LOST), Record(1, 0, 0, FORK)], HUGE)
        assert (found.forks, found.lost) == (1, True)

    def test_memory_that_is_filled_again_counts_again(self) -> None:
        """A huge page with twice as many faults as OS pages stands for two huge pages."""
        _, once = filled(8 * HUGE)
        records = [Record(1, BASE, 8 * HUGE, ANONYMOUS)]
        records += faults_at(BASE, 8 * PAGES) + faults_at(BASE, 8 * PAGES)
        (mapping,) = places([], records, HUGE).fresh
        assert once.fresh[0].huge_pages(faultlog.PERIOD, PAGES) == pytest.approx(8, rel=0.05)
        assert mapping.huge_pages(faultlog.PERIOD, PAGES) == pytest.approx(16, rel=0.05)


@only_4k
class TestEstimates:
    def test_memory_that_came_and_went(self) -> None:
        """The saving is small minus huge first touches, and giving the memory back."""
        faults, fallen = filled(32 * MiB, times=10)
        expected = faults * (SMALL_US - HUGE_US + GIVEN_BACK_US) / 1e6
        figure = saving(counts(faults, fallen))
        assert figure.seconds == pytest.approx(expected, rel=0.05)
        spent = cost(counts(faults, fallen))
        assert spent.seconds == pytest.approx(faults * SMALL_US / 1e6, rel=0.02)

    def test_memory_that_stayed(self) -> None:
        """Memory that is still there was not given back."""
        faults, fallen = filled(64 * MiB)
        after = Holding(faults, faults, 32, 0, 0)
        expected = faults * (SMALL_US - HUGE_US) / 1e6
        figure = saving(counts(faults, fallen, after=after))
        assert figure.seconds == pytest.approx(expected, rel=0.05)

    def test_sparse_memory_saves_nothing(self) -> None:
        """Where one page of 16 is touched, a huge page costs more than the small ones."""
        records = [Record(1, BASE, 1 << 30, ANONYMOUS)]
        records += faults_at(BASE, (1 << 30) // PAGE_SIZE, step=64)
        fallen = places([], records, HUGE)
        figure = saving(counts((1 << 30) // PAGE_SIZE // 64, fallen, time=0.1))
        assert figure.low == 0
        assert figure.high < 0.01

    def test_small_mappings_save_nothing(self) -> None:
        """Faults in mappings without a whole huge page cost, and save nothing."""
        records: list[Record] = []
        for i in range(100):
            at = BASE + i * HUGE
            records.append(Record(1, at, HUGE - PAGE_SIZE, ANONYMOUS))
            records += faults_at(at, PAGES - 1)
        facts = counts(100 * (PAGES - 1), places([], records, HUGE))
        assert saving(facts) == Figure(0, 0, 0)
        assert cost(facts).seconds == pytest.approx(100 * PAGES * SMALL_US / 1e6, rel=0.05)

    def test_huge_memory_saves_nothing(self) -> None:
        """Few faults on memory that is huge already save next to nothing."""
        records = [Record(1, BASE, 1 << 30, ANONYMOUS)]
        records += [Record(1, BASE + i * HUGE, 0, FAULT) for i in range(0, 512, faultlog.PERIOD)]
        after = Holding(0, 0, 0, 512 * PAGES, 0)
        facts = counts(512, places([], records, HUGE), time=1.0, after=after, machine_huge=512)
        assert saving(facts).high < 0.01
        spent = cost(facts)
        assert spent.seconds == pytest.approx(512 * PAGES * HUGE_US / 1e6, rel=0.02)

    def test_huge_faults_of_the_machine_widen_the_cost(self) -> None:
        """Huge pages that may be another process's make the cost unknown, and say so."""
        _, fallen = filled(16 * HUGE)
        figure = cost(counts(16 * PAGES, fallen, machine_huge=10_000))
        assert figure.seconds is None
        assert figure.why is not None
        assert "whole machine" in figure.why

    def test_the_system_time_is_the_limit(self) -> None:
        """No end of an estimate exceeds the system time, and the saving is scaled with it."""
        faults, fallen = filled(32 * MiB, times=10)
        system = faults * SMALL_US / 2e6
        facts = counts(faults, fallen, system=system)
        assert cost(facts).high == system
        assert saving(facts).high <= system
        # Prices that are twice too high halve the saving.
        expected = faults * (SMALL_US - HUGE_US + GIVEN_BACK_US) / 2e6
        assert saving(facts).seconds == pytest.approx(expected, rel=0.05)

    def test_file_backed_faults_save_nothing(self) -> None:
        """Faults in files save nothing, and their cost is known up to the system time only."""
        records = [Record(1, BASE, 1 << 30, OTHER), *faults_at(BASE, 100_000)]
        facts = counts(100_000, places([], records, HUGE), system=10.0)
        assert saving(facts) == Figure(0, 0, 0)
        assert cost(facts).seconds is None
        assert cost(facts).high == 10.0
        assert "file-backed" in str(cost(facts).why)

    def test_without_a_log_memory_that_is_gone_is_unknown(self) -> None:
        """Without a log only memory that stayed is known; the rest is said to be unknown."""
        figure = saving(counts(100_000, None))
        assert figure.seconds is None
        assert figure.high > 0
        assert figure.why == "it is not known where the faults were: not allowed"

    def test_without_a_log_memory_that_stayed_is_known(self) -> None:
        """Without a log the growth of memory that could be huge gives an estimate."""
        after = Holding(100_000, 100_000, 100_000 // PAGES + 1, 0, 0)
        figure = saving(counts(100_000, None, after=after))
        assert figure.seconds == pytest.approx(100_000 * (SMALL_US - HUGE_US) / 1e6, rel=0.05)

    def test_faults_that_were_not_recorded_are_unknown(self) -> None:
        """If the log has a part of the faults only, the rest widens the interval."""
        faults, fallen = filled(32 * MiB)
        whole, part = saving(counts(faults, fallen)), saving(counts(10 * faults, fallen))
        assert part.seconds is None
        assert part.low == pytest.approx(whole.low, rel=0.05)
        assert part.high > 9 * whole.high
        assert "90%" in str(part.why)

    @pytest.mark.parametrize(
        ("before", "forks"), [(Holding(8192, 8192, 16, 0, 8192), 0), (Holding(8192, 0, 0, 0, 0), 1)]
    )
    def test_copies_after_a_fork_are_not_first_touches(self, before: Holding, forks: int) -> None:
        """Pages that a child shares may be copied: the saving is unknown, and says why."""
        faults, fallen = filled(32 * MiB)
        facts = counts(faults, fallen._replace(forks=forks), before=before, after=before)
        figure = saving(facts)
        assert figure.low == 0
        assert figure.seconds is None
        assert "forked" in str(figure.why)

    def test_few_faults_need_no_interval(self) -> None:
        """A figure that is below 1 % of the time is known, however wide its interval."""
        figure = cost(counts(100, None, system=0.005, time=10.0))
        assert figure.seconds is not None
        assert figure.high <= 0.005

    def test_costs_that_were_not_measured_are_named(self) -> None:
        """Without the curve of huge pages the saving is unknown; the cost is known."""
        table = costs_tables.table({Curve("touch", "write"): line(0, 2000)}, jitter=0.001)
        with costs.faults(table) as f:
            touch(50_000)
        assert f.saving().seconds is None
        assert "huge pages of 2 MiB were not measured" in str(f.saving().why)

    def test_nothing_measured(self) -> None:
        """A table without any first touch gives no figure, and says so."""
        with costs.faults(costs_tables.table({})) as f:
            touch(5000)
        assert f.cost().seconds is None
        assert f.cost().high <= f.system
        assert "not measured" in str(f.cost().why)

    def test_why_they_were_not_measured_is_said(self) -> None:
        """If the measurement failed, the figure says why it did."""
        cell = Curve("touch", "write").at(4 * MiB)
        failed = costs.Measured(cell, "warm", None, "no interpreter")
        with costs.faults(costs_tables.table({}, more=[failed])) as f:
            touch(5000)
        assert f.cost().why == "touch write, 4KiB pages, charge was not measured: no interpreter"


class TestReports:
    @pytest.mark.parametrize(
        ("spent", "saved", "text"),
        [
            (
                Figure(1.2, 1.1, 1.3),
                Figure(1.0, 0.9, 1.1),
                "1.2 s of 3.4 s went into 900,000 page faults; "
                "huge pages would have saved about 1 s.",
            ),
            (
                Figure(None, 0.1, 1.3, "x"),
                Figure(None, 0.0, 1.1, "y"),
                "900,000 page faults took at most 1.3 s of 3.4 s; "
                "what huge pages would have saved is unknown, at most 1.1 s.",
            ),
            (
                Figure(0.001, 0.0, 0.01),
                Figure(0.0, 0.0, 0.0),
                "900,000 page faults took less than 1 % of 3.4 s; "
                "huge pages would have saved less than 1 %.",
            ),
        ],
    )
    def test_the_sentence(self, spent: Figure, saved: Figure, text: str) -> None:
        """Known figures are numbers, unknown ones a limit, small ones a share."""
        from pyreserve.costs.faulting import sentence

        assert sentence(900_000, 3.4, spent, saved) == text

    def test_text_html_and_dict_agree(self) -> None:
        """All forms carry the counts; keys carry their unit."""
        with costs.faults(TABLE) as f:
            touch(5000)
        data = json.loads(json.dumps(f.to_dict()))
        assert data["minor_faults"] == f.minor
        assert {"user_seconds", "system_seconds", "wall_seconds", "huge_bytes"} < set(data)
        assert set(data["saving"]) == {"seconds", "low_seconds", "high_seconds", "why"}
        for text in (str(f), f._repr_html_()):
            assert f"{f.minor:,}" in text

    def test_a_saved_table_is_read(self, tmp_path: Path) -> None:
        """The path of a table's JSON gives the figures of the table."""
        path = tmp_path / "costs.json"
        path.write_text(TABLE.to_json())
        with costs.faults(path) as f:
            touch(1000)
        assert f.cost().high <= f.system
        with pytest.raises(OSError, match="missing"):
            costs.faults(tmp_path / "missing.json")

    def test_the_machine_is_measured_when_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a table nothing is measured until a figure is asked for, and then once."""
        calls: list[str] = []

        def measured(budget: float = 2.0) -> costs.CostTable:
            calls.append("measured")
            return TABLE

        monkeypatch.setattr(faultmodel, "measured", measured)
        with costs.faults() as f:
            touch(1000)
        assert (f.minor >= 1000, f.huge, calls) == (True, f.huge, [])
        f.cost()
        f.saving()
        str(f)
        assert calls == ["measured"]


def test_the_machine_can_be_measured() -> None:
    """The short measurement gives the prices of small pages, and of huge ones where they are on."""
    table = faultmodel.measured(0.5)
    curves = {str(entry.cell.verb) for entry in table.cells}
    assert curves == {"touch", "release"}
    assert {entry.cell.nbytes for entry in table.cells} == {4 * MiB, 32 * MiB}
