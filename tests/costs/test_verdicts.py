"""Verdicts: what follows from synthetic tables, and what their texts may never say."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import costs_tables
from helpers.costs_tables import LOUD, USUAL, line, usual
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, BumpArena, KiB, MiB, costs
from pyreserve._system import proc
from pyreserve.costs import (
    METHODS,
    OPERATIONS,
    WAYS,
    CostTable,
    Curve,
    Measured,
    Plan,
    Verdict,
    measuring,
    recommend,
    recommendation,
)
from pyreserve.costs.stats import ENOUGH, Interval, over_passes, summarise, undisturbed
from pyreserve.costs.text import figure_text

TOUCH, COMMIT = Curve("touch", "write"), Curve("commit", "mprotect")
SITUATIONS = ("used-again-at-once", "may-be-used-again", "not-used-again")
REFERENCE = Path(__file__).parents[2] / "docs/reference"


def values(table: CostTable) -> dict[str, Any]:
    """Return the value of each verdict."""
    return {name: verdict.value for name, verdict in recommend(table).verdicts().items()}


class TestStatistics:
    def test_too_few_passes_have_no_interval(self) -> None:
        """Below six passes the interval is 0 to infinity, so nothing is known."""
        assert over_passes([5.0] * 5) == Interval(5, 0, float("inf"))
        assert not over_passes([5.0] * 5).known
        assert over_passes([5.0, None] * 6) == Interval(5, 5, 5)

    def test_odd_passes_do_not_decide(self) -> None:
        """Of thirty passes nine may be disturbed, and the interval stays narrow."""
        interval = over_passes([100.0] * 21 + [9000.0] * 9)

        assert interval == Interval(100, 100, 100)

    @pytest.mark.parametrize(
        ("low", "high", "known"), [(0, 1, False), (-1, 1, False), (1, 3, True), (1, 3.01, False)]
    )
    def test_what_may_be_printed(self, low: float, high: float, known: bool) -> None:
        """A figure is unknown if its interval includes zero or spans more than a factor of 3."""
        assert Interval(2, low, high).known == known

    def test_preempted_samples(self) -> None:
        """Preempted samples are left out, unless fewer than two others remain."""
        assert undisturbed([(1.0, False), (99.0, True), (2.0, False)]) == [1.0, 2.0]
        assert undisturbed([(1.0, False), (99.0, True)]) == [1.0, 99.0]


class TestVerdicts:
    def test_the_usual_costs(self) -> None:
        """Each verdict follows from the costs by its definition."""
        advice = recommend(usual())

        assert values(usual()) == {
            "commit": "mprotect",
            # Touching 40 pages at 500 ns costs 20 times 1000 ns; the next power of two is 64.
            "grow": 64 * PAGE_SIZE,
            # Touching a huge page costs 25.6 µs: a call of 1000 ns is under a twentieth.
            "grow-huge": 512 * PAGE_SIZE,
            "used-again-at-once": "MADV_FREE",
            "used-again-at-once-huge": "MADV_FREE",
            "may-be-used-again": "MADV_DONTNEED",
            "may-be-used-again-huge": "MADV_DONTNEED",
            "not-used-again": "munmap",
            "not-used-again-huge": "munmap",
            "huge-pages": "yes",
            "populate": "populate",
            "fork": "without",
        }
        for name, verdict in advice.verdicts().items():
            assert verdict.sure
            assert verdict.question.endswith("?")
            assert verdict.figures
            assert advice[name] is verdict
            assert str(verdict) in str(advice)
        assert "over 10 % of each 2 MiB" in advice["huge-pages"].text
        assert "96 of 96 pieces became huge, 75 % of free memory" in advice["huge-pages"].figures
        assert "over 40 % of the pages" in advice["populate"].text
        assert "2 µs for each page that is written" in advice["fork"].figures

    def test_a_table_read_from_json(self) -> None:
        """The JSON keeps what verdicts need: they are the same afterwards."""
        table = usual()

        again = recommend(CostTable.from_json(table.to_json()))

        assert again.verdicts() == recommend(table).verdicts()
        assert len(again.ways) == 2 * len(WAYS)

    @pytest.mark.parametrize("drift", [0.1, 0.5])
    def test_a_machine_that_changes_speed(self, drift: float) -> None:
        """Ratios within a pass decide, however much the speed differs between passes."""
        assert values(usual(drift=drift, passes=12)) == values(usual())

    def test_samples_that_spread_too_widely(self) -> None:
        """Costs that the spread does not tell apart give no verdict, but reason and advice."""
        costs_of = {**USUAL, Curve("commit", "mmap-fixed"): line(900, 0)}
        table = costs_tables.table(costs_of, lengths=costs_tables.COMPARED, jitter=3, noise=LOUD)

        verdict = recommend(table)["commit"]

        assert verdict.value is None
        assert not verdict.sure
        assert verdict.text == (
            "can't tell from this run: other processes kept 1.9 CPUs busy, try --budget 60"
        )

    def test_too_few_passes(self) -> None:
        """Five passes decide nothing, and a single pass is called that."""
        five, one = (recommend(usual(passes=n)) for n in (5, 1))

        assert set(values(usual(passes=5)).values()) == {None}
        assert "only 5 passes of the 6 that an interval needs" in five["commit"].text
        assert "a single pass of the 6" in one["commit"].text
        assert one["commit"].figures == ""

    def test_a_longer_budget_is_advised_after_a_long_run(self) -> None:
        """The advised budget is longer than the run was."""
        table = replace(usual(passes=1), seconds=100.0)

        assert "try --budget 180" in recommend(table)["commit"].text

    def test_a_difference_that_does_not_matter(self) -> None:
        """Methods within 10 % are both named, the preferred one first, and the verdict is sure."""
        near = {**USUAL, Curve("commit", "mmap-fixed"): line(680, 0)}

        verdict = recommend(costs_tables.table(near, lengths=costs_tables.COMPARED))["commit"]

        assert verdict.sure
        assert verdict.text == "mprotect (as good: mmap(MAP_FIXED))"

    def test_missing_cells_are_named(self) -> None:
        """A verdict whose cells were not measured says which and why."""
        cell = Curve("commit", "mmap-fixed").at(16 * PAGE_SIZE)
        missing = Measured(cell, "warm", None, "no luck")
        table = costs_tables.table({COMMIT: line(700, 0)}, lengths=[16 * PAGE_SIZE], more=[missing])

        advice = recommend(table)

        assert "commit mmap-fixed on 4KiB pages was not measured: no luck" in advice["commit"].text
        assert "grow mprotect" in advice["grow"].text
        assert not recommend(CostTable({}, (), LOUD, 1.0))["fork"].sure

    @pytest.mark.parametrize(
        ("got", "value", "text"),
        [(90, "yes", "yes, where over 10 %"), (3, "no", "not now: 3 of 96 pieces became huge")],
    )
    def test_huge_pages_that_are_not_to_be_had(self, got: int, value: str, text: str) -> None:
        """Huge pages do not pay where few pieces became huge, whatever they cost."""
        table = usual()
        table.machine["huge_pages"]["got"] = got

        verdict = recommend(table)["huge-pages"]

        assert (verdict.value, verdict.sure) == (value, True)
        assert verdict.text.startswith(text)

    def test_huge_pages_that_are_switched_off(self) -> None:
        """The reason why there are none is the verdict."""
        curves = {curve: ns for curve, ns in USUAL.items() if curve.page_kind != "2MiB"}
        off = Measured(Curve("touch", "write", "2MiB").at(2 * MiB), "warm", None, "never")
        table = costs_tables.table(curves, lengths=costs_tables.COMPARED, more=[off])
        table.machine["huge_pages"] |= {"tried": 0, "got": 0}

        verdicts = recommend(table).verdicts()

        assert (verdicts["huge-pages"].text, verdicts["huge-pages"].value) == ("no: never", "no")
        assert verdicts["used-again-at-once"].sure
        assert not verdicts["used-again-at-once-huge"].sure

    @pytest.mark.parametrize("per_page", [49.0, 55.0, 500.0])
    def test_huge_pages_that_are_slower(self, per_page: float) -> None:
        """Where touching small pages is as fast, huge pages do not pay."""
        slow = {**USUAL, TOUCH: line(0, 50), Curve("touch", "write", "2MiB"): line(0, per_page)}

        verdict = recommend(costs_tables.table(slow, lengths=costs_tables.COMPARED))["huge-pages"]

        assert (verdict.value, verdict.sure) == ("no", True)

    def test_populating_that_is_slower(self) -> None:
        """Where populating is no faster, the advice is to touch."""
        slow = {**USUAL, Curve("populate", "madvise"): line(0, 700)}

        verdict = recommend(costs_tables.table(slow, lengths=costs_tables.COMPARED))["populate"]

        assert (verdict.value, verdict.text) == ("touch", "touch")


class TestWays:
    def test_the_table(self) -> None:
        """Each way has a row for both page kinds, with the sum of its calls."""
        rows = {(row.way.name, row.kind): row for row in recommend(usual()).ways}

        assert len(rows) == 2 * len(WAYS)
        fixed = rows["MAP_FIXED", "4KiB"]
        assert fixed.give.median == pytest.approx(3000 + 16 * 110, rel=0.02)
        assert fixed.again.median == pytest.approx(1000 + 16 * 500, rel=0.02)
        assert fixed.entries == 2
        huge = rows["munmap", "2MiB"]
        assert huge.again.median == pytest.approx(1000 + 600 + 512 * 50, rel=0.02)
        assert rows["munmap", "4KiB"].way.back == "memory now, charge, addresses"

    def test_candidates_give_back_what_must_come_back(self) -> None:
        """mprotect alone is no candidate, and only ways that return the charge are for good."""
        candidates = {
            situation.name: {way.name for way in situation.candidates()}
            for situation in costs.SITUATIONS
        }

        assert set(candidates) == set(SITUATIONS)
        assert candidates["used-again-at-once"] == {way.name for way in WAYS} - {"mprotect"}
        assert candidates["may-be-used-again"] == candidates["used-again-at-once"] - {"MADV_FREE"}
        assert candidates["not-used-again"] == {"munmap", "MAP_FIXED"}

    def test_free_that_is_dear(self) -> None:
        """Where lazy discard costs more in total, another way is recommended."""
        dear = {**USUAL, Curve("discard", "free"): line(0, 9000)}

        table = costs_tables.table(dear, lengths=costs_tables.COMPARED)

        assert values(table)["used-again-at-once"] == "MADV_DONTNEED"


# A number with its unit, as texts of verdicts write times, shares and ratios.
_NUMBER = re.compile(r"(-?[\d.,]+(?:e[+-]?\d+)?|nan|-?inf)(?: (%|times|[nµm]?s)\b|(?= %))")


def check_text(text: str) -> None:
    """Check that a text has no figure that a careful reader would call nonsense."""
    assert not re.search(r"nan|inf\b|e[+-]\d", text), text
    assert not re.search(r"(?<![\w)])-\d", text), text
    for number in re.findall(r"([\d.]+) ?%", text):
        assert 0 <= float(number) <= 100, text


@st.composite
def any_tables(draw: st.DrawFn) -> CostTable:
    """Tables of the usual curves, with any medians in some of the passes."""
    passes = draw(st.sampled_from([0, 1, 5, 6, 7, 9, 30]))
    spread = draw(st.sampled_from([0.0, 0.05, 1.0, 5.0]))
    rng = Random(draw(st.integers(0, 1 << 32)))
    cells = []
    for curve, ns in USUAL.items():
        for nbytes in costs_tables.COMPARED:
            middle = ns(nbytes // PAGE_SIZE) * 10 ** rng.uniform(-spread, spread)
            medians = tuple(
                None if rng.random() < 0.1 else middle * 10 ** rng.uniform(-spread, spread) - 1
                for _ in range(passes)
            )
            known = [[value] for value in medians if value is not None]
            times = summarise(known) if known else None
            cells.append(Measured(curve.at(nbytes), "warm", times, "why", medians))
    table = replace(usual(), cells=tuple(cells))
    huge = draw(st.fixed_dictionaries({"tried": st.integers(0, 9), "got": st.integers(0, 9)}))
    table.machine["huge_pages"] |= huge
    return table


class TestTexts:
    @settings(max_examples=examples(60), deadline=None)
    @given(any_tables())
    def test_no_number_without_meaning(self, table: CostTable) -> None:
        """No text has a negative or infinite figure, a share above 100 %, or one that the passes
        do not bound; a verdict that is not sure has no value and says what to try."""
        advice = recommend(table)

        for verdict in advice.verdicts().values():
            check_text(str(verdict))
            assert verdict.sure == (verdict.value is not None)
            assert verdict.sure != ("can't tell" in verdict.text)
            assert verdict.sure or "try --budget" in verdict.text
        passes = max((entry.times.passes for entry in table.cells if entry.times), default=0)
        if passes < ENOUGH:
            assert not re.search(r"\d (?:[nµm]?s|times)\b", str(advice))
        for row in advice.ways:
            for cost in (row.give, row.again):
                shown = costs.text.time_text(cost)
                assert shown == "unknown" or 0 < cost.low <= cost.high <= 3 * cost.low

    @given(st.floats(0, 1e9), st.floats(0, 1e9), st.floats(0, 1e9))
    def test_figures_of_fits(self, one: float, other: float, third: float) -> None:
        """A figure of a fit is a time with at most a half for its interval, or unknown."""
        low, ns, high = sorted((one, other, third))

        text = figure_text(ns, (low, high))

        check_text(text)
        percent = re.search(r"± *(\d+)%", text)
        assert percent is None or int(percent[1]) <= 100


class TestMeasuredStep:
    @pytest.fixture(autouse=True)
    def fresh(self) -> Any:
        recommendation._measured_once.cache_clear()
        yield
        recommendation._measured_once.cache_clear()

    def test_steps_of_the_allocators(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The measured step is the recommended one, and an allocator takes it as its step."""
        monkeypatch.setattr(recommendation, "measure", lambda plan, **_: usual())
        small, huge = (costs.measured_step(huge_pages=huge) for huge in (False, True))

        with BumpArena(MiB, step=small) as arena:
            arena.alloc(64 * KiB + 1)
            assert (arena.base + arena.committed) % (64 * PAGE_SIZE) == 0
        assert (small, huge) == (64 * PAGE_SIZE, 512 * PAGE_SIZE)

    def test_a_run_that_does_not_decide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the run does not decide it, the step is the default one."""
        monkeypatch.setattr(recommendation, "measure", lambda plan, **_: usual(passes=1))

        assert costs.measured_step() == 2 * MiB

    def test_too_little_memory_to_measure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where memory is too short to measure, the step is the default one."""
        monkeypatch.setattr(proc, "available_bytes", lambda: 10 * MiB)

        assert costs.measured_step() == 2 * MiB

    def test_threads_measure_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of several threads that ask at once, one measures and all get its result."""
        runs: list[Plan] = []

        def count(plan: Plan, **_: object) -> CostTable:
            runs.append(plan)
            time.sleep(0.1)
            return usual()

        monkeypatch.setattr(recommendation, "measure", count)
        steps: list[int] = []
        threads = [
            threading.Thread(target=lambda: steps.append(costs.measured_step())) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

        assert len(runs) == 1
        assert steps == [64 * PAGE_SIZE] * 4
        assert {cell.verb for cell in runs[0].cells} == {"grow", "touch"}

    def test_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The step is measured once per process, within a few seconds."""
        step = costs.measured_step()

        assert step & (step - 1) == 0
        assert PAGE_SIZE <= step <= 64 * MiB
        monkeypatch.setattr(measuring, "_answers", None)
        assert costs.measured_step() == step


class TestOperations:
    def test_every_method_has_its_call(self) -> None:
        """Each method names its call as in a program's source, and says what a sample is."""
        assert list(OPERATIONS) == [(verb, m) for verb in METHODS for m in METHODS[verb]]
        assert COMMIT.at(PAGE_SIZE).call == "mprotect(PROT_READ|PROT_WRITE)"
        charged, free = (
            Curve("reserve", "mmap", mode=mode).at(PAGE_SIZE).call
            for mode in ("charge", "noreserve")
        )
        assert charged == "mmap(PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS)"
        assert free == "mmap(PROT_NONE, MAP_PRIVATE|MAP_ANONYMOUS|MAP_NORESERVE)"
        assert costs.Cell("other", "kernel", "4KiB", "charge", PAGE_SIZE).call is None

    def test_the_reference_page(self) -> None:
        """The reference page has a row for each method, with its call and its sample."""
        page = (REFERENCE / "cells.md").read_text(encoding="utf-8")

        rows = [re.split(r" *(?<!\\)\| *", row)[1:-1] for row in page.splitlines()]
        assert [row for row in rows if len(row) == 4][2:] == [
            [verb, method, f"`{operation.call}`".replace("|", "\\|"), operation.sample]
            for (verb, method), operation in OPERATIONS.items()
        ]


def test_a_verdict_is_a_report() -> None:
    """A verdict's text has question, answer and figures; in a notebook it is HTML."""
    verdict = Verdict("Why?", "<so>", "1 µs", True, "so")

    assert str(verdict) == "Why? <so>. 1 µs."
    assert "&lt;so&gt;" in verdict._repr_html_()
