"""The cost laboratory: what its figures mean, and that they are measured on the real kernel."""

import copy
import csv
import io
import json
import math
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import costs_tables
from helpers.costs_tables import LOUD, QUIET, USUAL, line, measured
from helpers.profiles import examples
from pyreserve import PAGE_SIZE, BumpArena, GiB, KiB, MiB, OutOfMemoryError, costs
from pyreserve._system import machine, proc
from pyreserve._system.machine import facts
from pyreserve.costs import (
    METHODS,
    Cell,
    CostTable,
    Curve,
    Interrupted,
    Measured,
    Noise,
    Plan,
    Progress,
    compare,
    measure,
    measuring,
    plan,
    recommend,
    recommendation,
)
from pyreserve.costs.cells import SMALL, PageKind, page_kinds
from pyreserve.costs.child import Job, run
from pyreserve.costs.model import Fit
from pyreserve.costs.programs import SCRIPTS, Program, Setting, write
from pyreserve.costs.stats import quantile, split_cold, summarise

TOUCH = Curve("touch", "write")
COMMIT = Curve("commit", "mprotect")


def children() -> set[int]:
    """The processes that this one has and has not waited for."""
    tasks = Path("/proc/self/task")
    return {int(pid) for t in tasks.iterdir() for pid in (t / "children").read_text().split()}


def child_of(code: str, *, ulimit: str = "", **environment: str) -> Any:
    """What a process of its own prints as JSON at its end, behind ``ulimit`` if need be."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    if ulimit:
        command = ["sh", "-c", f'ulimit {ulimit} && exec "$@"', "sh", *command]
    ended = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


class TestTimes:
    def test_the_figures_are_order_statistics(self) -> None:
        """Minimum, median, percentiles and maximum are those of all samples of all passes."""
        passes = [[float(n) for n in range(1, 51)], [float(n) for n in range(51, 102)]]

        times = summarise(passes)

        assert (times.min, times.median, times.max) == (1, 51, 101)
        assert (times.p90, times.p99) == (91, 100)
        assert (times.samples, times.passes) == (101, 2)

    def test_outliers_are_counted_and_kept(self) -> None:
        """A sample far above the rest is an outlier, and the maximum still shows it."""
        times = summarise([[10.0, 11, 12, 13, 14, 15, 16, 900]])

        assert times.outliers == 1
        assert times.max == 900
        assert times.samples == 8

    def test_the_interval_holds_the_true_median(self) -> None:
        """Of intervals of noisy samples, about 95 of 100 hold the median they were drawn around."""
        random = Random(7)
        held = 0
        for _ in range(400):
            shifts = [random.gauss(0, 0.05) for _ in range(6)]
            passes = [[100 * math.exp(s + random.gauss(0, 0.1)) for _ in range(30)] for s in shifts]
            low, high = summarise(passes).ci95
            held += low <= 100 <= high

        assert held >= 360

    def test_passes_that_disagree_widen_it(self) -> None:
        """Samples of one pass agree more than those of others, and the interval knows."""
        together = summarise([[100.0 + i % 3 for i in range(100)]] * 2)
        apart = summarise([[90.0 + i % 3 for i in range(100)], [110.0 + i % 3 for i in range(100)]])

        assert apart.width > 10 * together.width

    def test_a_single_pass(self) -> None:
        """However alike its samples are, one pass leaves a quarter to either side."""
        assert summarise([[100.0] * 50]).ci95 == (80, 125)

    def test_one_sample_says_nothing(self) -> None:
        """A single sample's interval has no end."""
        assert summarise([[5.0]]).ci95 == (0, math.inf)

    @given(st.lists(st.floats(1, 1e9), min_size=1, max_size=50))
    def test_any_samples(self, values: list[float]) -> None:
        """The median is one that statistics knows, and lies in its interval."""
        times = summarise([values])

        assert times.median == median(values)
        assert times.ci95[0] <= times.median <= times.ci95[1]
        assert times.min <= times.p90 <= times.p99 <= times.max

    def test_quantiles(self) -> None:
        """A quantile between two values is interpolated."""
        assert quantile([0.0, 10.0], 0.25) == 2.5
        assert quantile([3.0], 0.9) == 3


def quiet(*passes: list[float]) -> list[list[tuple[float, bool]]]:
    """Samples that nothing interrupted."""
    return [[(ns, False) for ns in one] for one in passes]


class TestCold:
    def test_two_modes_are_parted(self) -> None:
        """Samples thirty times as long are the host's, and are mixed with no others."""
        warm = [[100.0 + i for i in range(20)] for _ in range(5)]
        cold = [3000.0 + i for i in range(10)]

        found_warm, found_cold = split_cold(quiet(*warm), quiet(cold))

        assert found_warm == warm
        assert found_cold == [cold]

    def test_within_one_pass(self) -> None:
        """A pass that began cold and ended warm is parted too."""
        passes = quiet([3000.0] * 6 + [100.0] * 60)

        assert split_cold(passes) == ([[100.0] * 60], [[3000.0] * 6])

    def test_what_came_first_joins_no_median(self) -> None:
        """Warm samples of the warm-up are of another state, and are left out."""
        assert split_cold(quiet([100.0] * 30), quiet([101.0] * 100)) == ([[100.0] * 30], [])

    @pytest.mark.parametrize("strange", [[900.0], [250.0] * 10, [5000.0, 9000.0]])
    def test_noise_is_not_cold(self, strange: list[float]) -> None:
        """A few long samples, or many that are twice as long, are noise."""
        values = [100.0 + i % 10 for i in range(100)] + strange

        assert split_cold(quiet(values)) == ([values], [])

    def test_what_was_preempted_is_not_cold(self) -> None:
        """Samples that another process's turn fell into are long, and stay where they are."""
        passes = [[(100.0, False)] * 60 + [(4100.0, True)] * 10]

        assert split_cold(passes) == ([[100.0] * 60 + [4100.0] * 10], [])

    @pytest.mark.parametrize("few", [[95.0, 900.0], [900.0], [400.0, 101.0, 7500.0]])
    def test_a_few_samples_of_a_long_piece(self, few: list[float]) -> None:
        """Where there are too few to see a gap, what a shorter piece costs tells cold from warm."""
        warm, cold = split_cold(quiet(few), (), usual=100.0)

        assert [ns for one in warm for ns in one] == [ns for ns in few if ns < 200]
        assert [ns for one in cold for ns in one] == [ns for ns in few if ns >= 200]


class TestModel:
    def test_a_straight_line_is_found(self) -> None:
        """From medians on a line come its fixed cost and its cost per page."""
        points = [(x, 700 + 3 * x, 699 + 3 * x, 701 + 3 * x) for x in (1.0, 4.0, 64.0, 4096.0)]

        fit = Fit.of(COMMIT, points)

        assert fit.fixed_ns == pytest.approx(700)
        assert fit.ns_per_page == pytest.approx(3)
        assert fit.residual == pytest.approx(0, abs=1e-9)
        assert fit.fixed_ci95[0] < 700 < fit.fixed_ci95[1]

    def test_an_odd_point_does_not_decide(self) -> None:
        """One median that is far off moves the line little, and the residual tells of it."""
        points = [
            (x, 700 + 3 * x, 690 + 3 * x, 710 + 3 * x) for x in (1.0, 4.0, 16.0, 64.0, 4096.0)
        ]
        points[3] = (64.0, 5000.0, 4900.0, 5100.0)

        fit = Fit.of(COMMIT, points)

        assert fit.fixed_ns == pytest.approx(700, rel=0.02)
        assert fit.ns_per_page == pytest.approx(3, rel=0.02)
        assert fit.residual > 0.5

    def test_estimates_go_through_what_was_measured(self) -> None:
        """At a measured length the estimate is the median, and its interval the median's."""
        points = [(1.0, 900.0, 880.0, 950.0), (16.0, 1000.0, 990.0, 1010.0), (256.0, 9e4, 8e4, 1e5)]
        fit = Fit.of(TOUCH, points)

        for pages, ns, low, high in points:
            estimate = fit.estimate(pages)
            assert estimate == pytest.approx(ns)
            assert [estimate.low, estimate.high] == pytest.approx([low, high])

    @settings(max_examples=examples(50))
    @given(st.floats(1, 1e6), st.floats(0.01, 1e4), st.floats(1, 65536))
    def test_between_measured_lengths(self, fixed: float, per_page: float, pages: float) -> None:
        """Estimates of a straight line are right at every length."""
        exact = [(x, fixed + per_page * x) for x in (1.0, 8.0, 512.0, 65536.0)]
        points = [(x, y, y, y) for x, y in exact]

        assert Fit.of(TOUCH, points).estimate(pages) == pytest.approx(fixed + per_page * pages)

    def test_a_bent_curve(self) -> None:
        """Between lengths 4 times apart the estimate of a curve that bends is within 25 %."""

        def bent(pages: float) -> float:
            return 500 + 50 * pages + 300 * pages * pages / (pages + 2000)

        points = [(4.0**k, bent(4.0**k), bent(4.0**k), bent(4.0**k)) for k in range(10)]
        fit = Fit.of(TOUCH, points)

        for k in range(9):
            between = 2 * 4.0**k
            assert fit.estimate(between) == pytest.approx(bent(between), rel=0.25)

    def test_verbs_and_methods(self) -> None:
        """A verb without a method means its first; bytes are pages times the OS page."""
        model = costs_tables.table(
            {TOUCH: line(100, 7), Curve("touch", "read"): line(9, 1)}
        ).model()

        write = model.estimate("touch", pages=100)
        assert write == pytest.approx(800, rel=0.05)
        assert write == model.estimate("touch", nbytes=100 * PAGE_SIZE, method="write")
        assert model.estimate("touch", method="read", pages=100) == pytest.approx(109, rel=0.05)
        assert write.low <= write <= write.high

    @pytest.mark.parametrize(
        ("arguments", "error"),
        [
            ({"verb": "touch"}, ValueError),
            ({"verb": "touch", "pages": 1, "nbytes": 4096}, ValueError),
            ({"verb": "touch", "pages": 0}, ValueError),
            ({"verb": "touch", "pages": -3}, ValueError),
            ({"verb": "touch", "pages": math.nan}, ValueError),
            ({"verb": "touch", "pages": math.inf}, ValueError),
            ({"verb": "tuch", "pages": 1}, ValueError),
            ({"verb": "touch", "pages": 1, "method": "mmap"}, ValueError),
            ({"verb": "touch", "pages": 1, "method": "read"}, LookupError),
            ({"verb": "touch", "pages": 1, "page_kind": "3MiB"}, LookupError),
            ({"verb": "touch", "pages": 1, "threads": 7}, LookupError),
        ],
    )
    def test_what_can_not_be_estimated(
        self, arguments: dict[str, Any], error: type[Exception]
    ) -> None:
        """A wrong name is a ValueError, what was not measured a LookupError."""
        model = costs_tables.table({TOUCH: line(100, 7)}).model()

        with pytest.raises(error):
            model.estimate(**arguments)

    def test_an_estimate_can_be_copied(self) -> None:
        """Copies and pickles have the interval too."""
        one = costs_tables.table({TOUCH: line(100, 7)}).model().estimate("touch", pages=3)

        others = [copy.copy(one), copy.deepcopy(one)]
        others += [pickle.loads(pickle.dumps(one, protocol)) for protocol in range(5)]

        assert {(other, other.low, other.high) for other in others} == {(one, one.low, one.high)}

    def test_a_sample_that_took_no_time(self) -> None:
        """One sample of which the clock's own time leaves nothing takes no length off a curve."""
        passes = [[100.0] * 60 for _ in range(6)]
        passes[3][7] = -1.0
        one = Measured(TOUCH.at(PAGE_SIZE), "warm", summarise(passes))

        model = CostTable({}, (one,), QUIET, 1.0).model()

        assert model.estimate("touch", pages=1) == pytest.approx(100)

    def test_cold_memory_is_left_out(self) -> None:
        """The model is of warm memory."""
        cold = replace(measured(TOUCH.at(2 * MiB), 1e9), host="cold")
        with_cold = costs_tables.table({TOUCH: line(100, 7)}, more=[cold])

        assert with_cold.model() == costs_tables.table({TOUCH: line(100, 7)}).model()


def at(path: tuple[Any, ...], *values: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return [(path, value) for value in values]


HOSTILE: list[tuple[tuple[Any, ...], Any]] = [
    *at((), "[" * 100_000, "NaN"),
    *at(("machine",), 5, None, []),
    *at(("machine", "cpus"), 0, "4", True),
    (("machine", "memory"), []),
    (("machine", "max_map_count"), "many"),
    *at(("machine", "map_entries"), None, [1], {"a": "b"}),
    *at(("machine", "system_call_ns"), "fast", 0, -1),
    *at(("noise", "other_cpus"), "none", math.nan, -1),
    (("noise",), {}),
    *at(("seconds",), "x", math.inf),
    (("complete",), "no"),
    *at(("cells",), {}, 3, "abc", [1]),
    *at(("cells", 0, "verb"), [1], None),
    *at(("cells", 0, "bytes"), 0, -PAGE_SIZE, "x", 0.5, 10**400),
    (("cells", 0, "threads"), "z"),
    (("cells", 0, "host"), []),
    (("cells", 0, "why"), [1]),
    *at(("cells", 0, "samples"), math.inf, 0, -1),
    *at(("cells", 0, "ns"), [], {}),
    *at(("cells", 0, "ns", "median"), math.nan, 10**400, "x"),
    *at(("cells", 0, "ns", "ci95"), [1], [None, 1], [1, math.inf]),
    (("cells", 1, "bytes"), PAGE_SIZE),  # which cell 0 is of
]
"""Values that do not belong where they are put in the JSON; the text itself where there is no
path."""


class TestTable:
    def test_json_there_and_back(self) -> None:
        """What JSON holds is read back: the cells, their figures, and what was not measured."""
        unmeasured = Measured(
            Cell("guard", "madvise", SMALL, "charge", PAGE_SIZE), "warm", None, "no"
        )
        single = Measured(
            Cell("fork", "inherit", SMALL, "charge", PAGE_SIZE), "warm", summarise([[7.0]])
        )
        one = costs_tables.table({TOUCH: line(100, 7)}, noise=LOUD, more=[unmeasured, single])

        back = CostTable.from_json(one.to_json())

        assert [(c.cell, c.host, c.why) for c in back.cells] == [
            (c.cell, c.host, c.why) for c in one.cells
        ]
        for before, after in zip(one.cells, back.cells, strict=True):
            if before.times is not None and after.times is not None:
                assert after.times.median == pytest.approx(before.times.median, rel=1e-3)
                assert after.times.ci95 == pytest.approx(before.times.ci95, rel=1e-3)
                assert after.times.samples == before.times.samples
        assert (back.noise, back.machine, back.complete) == (LOUD, one.machine, True)
        assert CostTable.from_json(back.to_json()).to_json() == back.to_json()

    def test_the_schema(self) -> None:
        """The JSON is strict, and has the documented fields with the documented units."""
        one = costs_tables.table({TOUCH: line(100, 7)})

        found = json.loads(one.to_json(), parse_constant=pytest.fail)

        assert found["schema"] == 1
        assert set(found) == {
            *("schema", "machine", "complete", "seconds", "noise", "cells", "model")
        }
        cell = found["cells"][2]
        assert set(cell) == {
            *("verb", "method", "page_kind", "mode", "bytes", "pages", "threads", "host"),
            *("ns", "samples", "passes", "outliers", "why"),
        }
        assert (cell["verb"], cell["bytes"], cell["pages"]) == ("touch", 16 * PAGE_SIZE, 16)
        assert set(cell["ns"]) == {"min", "median", "p90", "p99", "max", "ci95"}
        assert cell["ns"]["median"] == pytest.approx(212, rel=0.05)
        (fit,) = found["model"]["fits"]
        assert (fit["verb"], fit["method"]) == ("touch", "write")
        assert fit["ns_per_page"] == pytest.approx(7, rel=0.05)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "3", "null", "{}", '{"schema": 2}', '{"schema": 1}'),
            '{"schema": 1, "machine": {}, "cells": [{}], "noise": {}, "seconds": 1}',
        ],
    )
    def test_what_is_not_such_json(self, text: str) -> None:
        """Anything else is a ValueError."""
        with pytest.raises(ValueError, match=r"not what|schema|Expecting"):
            CostTable.from_json(text)

    @pytest.mark.parametrize(("path", "value"), HOSTILE)
    def test_what_is_hostile(self, path: tuple[Any, ...], value: Any) -> None:
        """Whatever stands in it where something else belongs is a ValueError at once: nothing that
        was read makes comparing or recommending fail."""
        found: Any = json.loads(costs_tables.table({TOUCH: line(100, 7)}).to_json())
        inside = found
        for key in path[:-1]:
            inside = inside[key]
        if path:
            inside[path[-1]] = value

        with pytest.raises(ValueError, match="this is not what pyreserve costs --json writes"):
            CostTable.from_json(json.dumps(found) if path else value)

    @pytest.mark.parametrize(
        ("ns", "nbytes"),
        [
            (0, 1),
            (-3.5, PAGE_SIZE - 1),
            (1e-300, PAGE_SIZE + 1),
            (1e18, 2**60),
            *(
                pytest.param(ns, nbytes, marks=pytest.mark.heavy)
                for i, ns in enumerate([0, -3.5, 1e-300, 1e18])
                for j, nbytes in enumerate([1, PAGE_SIZE - 1, PAGE_SIZE + 1, 2**60])
                if i != j
            ),
        ],
    )
    def test_what_is_only_odd(self, ns: float, nbytes: int) -> None:
        """Figures of no time or less, and lengths that are no whole OS pages here, can be compared
        and recommended from, both ways."""
        usual = costs_tables.table(USUAL)
        found: Any = json.loads(usual.to_json())
        for cell in found["cells"][::2]:
            cell["ns"] = dict.fromkeys(cell["ns"], ns) | {"ci95": [ns, None]}
        found["cells"][4]["bytes"] = nbytes
        found["machine"]["map_entries"]["commit mprotect"] = 1e-320

        odd = CostTable.from_json(json.dumps(found))

        for one in compare(odd, usual).cells + compare(usual, odd).cells:
            assert not math.isnan(one.ratio)
        assert recommend(odd).islands.value == usual.machine["max_map_count"]
        assert CostTable.from_json(odd.to_json()).to_json() == odd.to_json()

    def test_csv(self) -> None:
        """The CSV has a line a cell, and the same figures."""
        no = Measured(
            Cell("guard", "madvise", SMALL, "charge", PAGE_SIZE), "warm", None, "no, never"
        )
        one = costs_tables.table({TOUCH: line(100, 7)}, more=[no])

        rows = list(csv.DictReader(io.StringIO(one.to_csv())))

        assert len(rows) == len(one.cells)
        assert float(rows[0]["median_ns"]) == pytest.approx(107, rel=0.05)
        assert (rows[-1]["median_ns"], rows[-1]["why"]) == ("", "no, never")


class TestComparison:
    def test_what_did_not_change(self) -> None:
        """Two runs of the same thing have no changes."""
        old = costs_tables.table(USUAL, seed=1, jitter=0.1)
        new = costs_tables.table(USUAL, seed=2, jitter=0.1)

        found = compare(old, new)

        assert found.count("same") + found.count("unsure") >= 0.95 * len(found.cells)
        assert found.noisy is None
        assert found.differences == ()

    def test_what_changed(self) -> None:
        """Intervals that do not overlap are a change, with its direction and its ratio."""
        old = costs_tables.table({TOUCH: line(0, 100), COMMIT: line(900, 0)})
        new = costs_tables.table({TOUCH: line(0, 150), COMMIT: line(450, 0)}, seed=1)

        found = compare(old, new)

        verdicts = {(one.cell.verb, one.verdict) for one in found.cells}
        assert verdicts == {("touch", "slower"), ("commit", "faster")}
        assert {round(one.ratio, 1) for one in found.cells} == {1.5, 0.5}

    def test_what_can_not_be_told(self) -> None:
        """Where an interval is wider than half its median, no change seen means little."""
        old = costs_tables.table({TOUCH: line(0, 100)}, jitter=3.0)
        new = costs_tables.table({TOUCH: line(0, 130)}, jitter=3.0, seed=1)

        found = compare(old, new)

        assert found.count("unsure") >= 0.8 * len(found.cells)

    def test_many_cpus_have_room_for_others(self) -> None:
        """On a machine of 64 CPUs one that is busy elsewhere disturbs nothing."""
        table = costs_tables.table({TOUCH: line(0, 100)}, noise=LOUD)
        table.machine["cpus"] = 64

        assert table.disturbed is None

    def test_a_change_too_small_to_mean_anything(self) -> None:
        """Three per cent are no change, however narrow the intervals."""
        old = costs_tables.table({TOUCH: line(0, 100)}, jitter=1e-4)
        new = costs_tables.table({TOUCH: line(0, 103)}, jitter=1e-4, seed=1)

        assert compare(old, new).count("same") == len(costs_tables.LENGTHS)

    @pytest.mark.parametrize(
        ("before", "now", "why"),
        [
            (LOUD, QUIET, "the old run was disturbed: other processes kept 1.9 CPUs busy"),
            (QUIET, LOUD, "this run was disturbed: other processes kept 1.9 CPUs busy"),
            (QUIET, Noise(0, 0.5, 0), "this run was disturbed: the hypervisor"),
            (QUIET, Noise(0, 0, 0.4), "this run was disturbed: a fixed system call"),
        ],
    )
    def test_a_disturbed_run_has_no_changes(self, before: Noise, now: Noise, why: str) -> None:
        """Under load everything is noisy that would else be a change, and it says why."""
        old = costs_tables.table({TOUCH: line(0, 100)}, noise=before)
        new = costs_tables.table({TOUCH: line(0, 300)}, noise=now)

        found = compare(old, new)

        assert {one.verdict for one in found.cells} == {"noisy"}
        assert found.noisy is not None
        assert found.noisy.startswith(why)

    def test_a_machine_at_another_speed(self) -> None:
        """The same machine that enters its kernel half as fast is noisy; another machine is not."""
        old = costs_tables.table({TOUCH: line(0, 100)})
        slow = costs_tables.table({TOUCH: line(0, 200)})
        slow.machine["system_call_ns"] = 300.0
        other = costs_tables.table({TOUCH: line(0, 200)})
        other.machine.update(system_call_ns=300.0, kernel="7.0")

        assert compare(old, slow).count("noisy") == len(costs_tables.LENGTHS)
        found = compare(old, other)
        assert found.count("slower") == len(costs_tables.LENGTHS)
        assert found.differences == (("kernel", "6.1.0", "7.0"),)

    def test_cells_of_one_table_only(self) -> None:
        """What only one of them has is counted and not compared."""
        found = compare(
            costs_tables.table({TOUCH: line(0, 100)}), costs_tables.table({COMMIT: line(9, 0)})
        )

        assert found.cells == ()
        assert (found.only_old, found.only_new) == (9, 9)


class TestRecommendations:
    def test_the_figures(self) -> None:
        """Each answer is what follows from the costs by its definition."""
        found = recommend(costs_tables.table(USUAL, jitter=1e-4))

        # 1000 ns are 5 % of 40 pages' touch of 500 ns; the next power of two is 64.
        assert found.step_bytes.value == 64 * PAGE_SIZE
        assert found.huge_step_bytes.value == 4 * MiB
        # 598 ns a page to give back and touch again, 4 GiB for each CPU.
        per_gib = 598e-9 * (GiB // PAGE_SIZE)
        assert found.idle_seconds.value == pytest.approx(per_gib * 4, rel=0.01)
        assert found.lazy_above.value == pytest.approx(50 / 480, rel=0.02)
        assert found.huge_above.value == pytest.approx(0.1, rel=0.01)
        assert found.islands.value == 32765
        for answer in found.answers().values():
            assert answer.text
            assert answer.because
        assert json.dumps(found.to_dict())

    def test_map_entries_of_a_plan(self) -> None:
        """A plan costs one entry for the reservation and what each of its pieces adds."""
        found = recommend(costs_tables.table(USUAL))

        assert found.entries_of({}) == 1
        assert found.entries_of({"commit mprotect": 100, "guard madvise": 100}) == 201
        with pytest.raises(LookupError, match="was not counted"):
            found.entries_of({"commit magic": 1})

    def test_what_was_not_measured(self) -> None:
        """An answer without its figures is None, and says what is missing."""
        found = recommend(costs_tables.table({TOUCH: line(0, 100)}))

        assert found.step_bytes.value is None
        assert "grow mprotect" in found.step_bytes.because
        assert found.huge_above.value is None

    def test_lazy_that_is_no_cheaper(self) -> None:
        """Where a lazy discard and what follows cost more, eager is the answer."""
        dear = {**USUAL, Curve("discard", "free"): line(0, 9000)}

        found = recommend(costs_tables.table(dear))

        assert found.lazy_above.value == 1
        assert found.lazy_above.text.startswith("Discard eagerly")

    def test_a_file_is_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """PYRESERVE_COSTS names a file to take the figures from."""
        path = tmp_path / "costs.json"
        path.write_text(costs_tables.table(USUAL, jitter=1e-4).to_json())
        monkeypatch.setenv("PYRESERVE_COSTS", str(path))

        assert recommend().step_bytes.value == 64 * PAGE_SIZE
        assert costs.measured_step() == 64 * PAGE_SIZE
        assert costs.measured_step(huge_pages=True) == 4 * MiB
        with BumpArena(MiB, step=costs.measured_step()) as arena:
            arena.alloc(1)

    def test_a_wrong_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A file that is not there or of another kind is an error, not a silent measurement."""
        monkeypatch.setenv("PYRESERVE_COSTS", str(tmp_path / "none"))
        with pytest.raises(FileNotFoundError):
            costs.measured_step()

        (tmp_path / "none").write_text("{}")
        with pytest.raises(ValueError, match=r"PYRESERVE_COSTS names .*not what pyreserve costs"):
            costs.measured_step()

    def test_too_little_memory_to_measure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where there is no memory to measure with, the step is the usual one."""
        monkeypatch.delenv("PYRESERVE_COSTS", raising=False)
        monkeypatch.setattr(proc, "available_bytes", lambda: 10 * MiB)
        recommendation._measured_once.cache_clear()

        assert costs.measured_step() == 2 * MiB

    def test_threads_measure_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of several threads that ask at once one measures, and all get the same."""
        monkeypatch.delenv("PYRESERVE_COSTS", raising=False)
        recommendation._measured_once.cache_clear()
        runs: list[Plan] = []

        def count(plan: Plan, **_: object) -> CostTable:
            runs.append(plan)
            time.sleep(0.1)
            return costs_tables.table(USUAL, jitter=1e-4)

        monkeypatch.setattr(recommendation, "measure", count)
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(costs.measured_step())) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        recommendation._measured_once.cache_clear()

        assert len(runs) == 1
        assert found == [64 * PAGE_SIZE] * 4
        assert {(g.setting.mode, g.setting.threads) for g in runs[0].groups} == {("charge", 1)}

    def test_measured_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without a file it is measured, a few seconds at most, and once in a process."""
        monkeypatch.delenv("PYRESERVE_COSTS", raising=False)

        step = costs.measured_step()

        assert step & (step - 1) == 0
        assert PAGE_SIZE <= step <= 64 * MiB
        monkeypatch.setattr(measuring, "_answers", None)
        assert costs.measured_step() == step


class TestPlan:
    def test_the_default_has_every_verb(self) -> None:
        """Without options each verb is there, on small pages from one page to 1 GiB."""
        chosen = plan()

        small = {c.verb for c in chosen.cells if c.page_kind == SMALL}
        assert small | {"collapse"} == set(METHODS)
        lengths = {c.nbytes for c in chosen.cells if c.verb == "touch"}
        assert {PAGE_SIZE, GiB} <= lengths
        assert {c.mode for c in chosen.cells} == {"charge", "noreserve"}
        methods = {(c.verb, c.method) for c in chosen.cells if c.page_kind == SMALL}
        everything = {(verb, method) for verb, all_of in METHODS.items() for method in all_of}
        assert everything - methods == {("collapse", "madvise")}

    def test_its_memory(self) -> None:
        """The default takes less than 1.5 GiB."""
        assert plan().memory < 1.5 * GiB

    def test_full_is_more(self) -> None:
        """A full plan has all of the default's cells of memory, and every power of two."""
        full = set(plan(full=True).cells)

        assert set(plan().cells) <= full
        lengths = {
            c.nbytes for c in full if (c.verb, c.page_kind, c.threads) == ("touch", SMALL, 1)
        }
        assert {PAGE_SIZE << k for k in range((GiB // PAGE_SIZE).bit_length())} <= lengths

    def test_only(self) -> None:
        """Only the verbs named are timed."""
        assert {c.verb for c in plan(only=["commit", "fork"]).cells} == {"commit", "fork"}
        assert plan(only="commit") == plan(only=("commit",))

    def test_longest(self) -> None:
        """No piece of memory is longer than the longest; less memory is needed."""
        chosen = plan(longest=MiB)

        assert max(c.nbytes for c in chosen.cells if c.verb not in {"reserve", "release"}) <= MiB
        assert chosen.memory < 256 * MiB

    @pytest.mark.parametrize(
        "arguments",
        [
            {"only": ["comit"]},
            {"only": []},
            {"only": "x"},
            {"longest": 1},
            {"only": "collapse", "longest": PAGE_SIZE},
        ],
    )
    def test_what_makes_no_sense(self, arguments: dict[str, Any]) -> None:
        """An unknown verb, none at all, or less than a page is a ValueError."""
        with pytest.raises(ValueError, match=r"there are|at least an OS page|nothing to"):
            plan(**arguments)

    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A machine or cgroup with less memory than it takes is refused before anything is done."""
        monkeypatch.setattr(proc, "available_bytes", lambda: 300 * MiB)
        before = children()

        with pytest.raises(OutOfMemoryError, match=r"measuring needs 1\.\d+ GiB .* 300 MiB"):
            measure(plan())

        assert children() == before
        plan(longest=32 * MiB).check_memory()

    def test_huge_pages_that_there_are_none_of(self) -> None:
        """A page kind without pages is not run, and its cells say why."""
        none = [kind for kind in page_kinds() if kind.why_not and kind.size <= 32 * MiB]
        if not none:
            pytest.skip("this machine has all of them")

        chosen = plan()

        reasons = {c.page_kind: why for c, why in chosen.unmeasurable}
        assert reasons == {kind.name: kind.why_not for kind in none}
        assert not {c.page_kind for c in chosen.cells} & set(reasons)


SMALL_PLAN = plan(only=["reserve", "commit", "touch", "discard"], longest=16 * PAGE_SIZE)
ONE = Setting(page_kinds()[0], "charge", 1)
AMPLE = 1000.0  # seconds that no run here needs: what ends it is its passes


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end after one pass, if its width is wide."""
    monkeypatch.setattr(measuring, "_LEAST_PASSES", 1)


def answers_of(
    seconds: Callable[[], float], ns: Callable[[Cell], float], spend: Callable[[], None]
) -> Callable[[Job], Iterator[dict[str, Any]]]:
    """What measuring processes answer where each program takes what `spend` spends."""

    def answers(job: Job) -> Iterator[dict[str, Any]]:
        for number, program in job.programs.items():
            if seconds() >= job.deadline:
                return
            spend()
            samples = [[(ns(cell), False)] for cell in program.cells]
            numbers = list(range(len(samples)))
            yield {"program": number, "seconds": 1.0, "cells": numbers, "samples": samples}

    return answers


class TestMeasure:
    def test_every_cell_of_a_plan(self) -> None:
        """Each cell comes back with times, in at least six passes."""
        seen: list[Progress] = []
        before = children()

        table = measure(SMALL_PLAN, budget=AMPLE, width=10, progress=seen.append)

        assert table.complete
        found = {one.cell: one for one in table.cells if one.host == "warm"}
        assert set(SMALL_PLAN.cells) <= set(found)
        for cell in SMALL_PLAN.cells:
            times = found[cell].times
            assert times is not None, found[cell].why
            assert times.passes >= 6
            assert times.samples >= 6
            assert times.median > 0
            assert sum(map(len, found[cell].passes)) == times.samples
        assert children() == before
        assert seen[-1].passes >= 5
        assert {one.cells for one in seen} == {len(SMALL_PLAN.cells)}
        assert table.machine["map_entries"]["commit mprotect"] == 2
        assert table.machine["system_call_ns"] > 0

    def test_each_cell_has_its_own_samples(
        self, one_pass: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A sample counts for the cell that it was taken of."""
        costs_of = {cell: 100.0 * (1 + number) for number, cell in enumerate(SMALL_PLAN.cells)}
        answers = answers_of(time.monotonic, costs_of.__getitem__, lambda: None)
        monkeypatch.setattr(measuring, "_answers", answers)

        table = measure(SMALL_PLAN, budget=AMPLE, width=10)

        found = {one.cell: one.times.median for one in table.cells if one.times is not None}
        assert found == costs_of

    def test_a_touch_is_a_first_touch(self) -> None:
        """Touching 64 pages takes 63 more faults than touching one."""
        one, many = write(ONE, ("life",), [PAGE_SIZE, 64 * PAGE_SIZE])

        def faults(program: Program) -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run(program, 1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        assert faults(many) >= faults(one) + 63

    def test_the_budget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It ends when the budget is spent, and what had no turn says so."""
        now = [0.0]

        def spend() -> None:
            now[0] += 1

        answers = answers_of(lambda: now[0], lambda _: 100.0, spend)
        monkeypatch.setattr(measuring, "_answers", answers)
        monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: now[0]))

        table = measure(plan(longest=MiB), budget=3.5, width=1e-9)

        assert 3.5 <= table.seconds <= 4.5
        assert table.complete
        assert any(one.times is not None for one in table.cells)
        whys = [one.why for one in table.cells if one.times is None]
        assert "the budget was spent before its turn" in whys

    @pytest.mark.parametrize(
        "wrong", [{"budget": 0}, {"budget": -1}, {"budget": math.inf}, {"width": 0}]
    )
    def test_what_makes_no_sense(self, wrong: dict[str, Any]) -> None:
        """Budget and width are positive, and a budget ends."""
        with pytest.raises(ValueError, match="positive"):
            measure(SMALL_PLAN, **wrong)

    def test_ctrl_c_keeps_what_there_is(self) -> None:
        """An interrupted run hands over a valid partial table, and leaves no process."""
        before = children()

        def interrupt(now: Progress) -> None:
            if now.passes >= 1:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted) as caught:
            measure(SMALL_PLAN, budget=AMPLE, width=1e-9, progress=interrupt)

        table = caught.value.table
        assert isinstance(caught.value, KeyboardInterrupt)
        assert not table.complete
        assert any(one.times is not None for one in table.cells)
        assert not CostTable.from_json(table.to_json()).complete
        assert children() == before

    def test_ctrl_c_at_the_very_end(self, one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interrupt while the figures are put together loses none of them."""
        answers: list[Any] = [KeyboardInterrupt(), facts()]

        def facts_then() -> dict[str, Any]:
            answer = answers.pop(0)
            if isinstance(answer, KeyboardInterrupt):
                raise answer
            return dict(answer)

        monkeypatch.setattr(machine, "facts", facts_then)

        with pytest.raises(Interrupted) as caught:
            measure(SMALL_PLAN, budget=AMPLE, width=10)

        assert any(one.times is not None for one in caught.value.table.cells)

    def test_an_exception_of_the_callers(self) -> None:
        """Whatever the progress function raises comes out, and no process stays."""
        before = children()

        with pytest.raises(ZeroDivisionError):
            measure(SMALL_PLAN, progress=lambda now: print(1 / (now.passes - now.passes)))

        assert children() == before

    @pytest.mark.parametrize(
        ("code", "why"),
        [
            ("raise SystemExit('no luck')", "ended with status 1: no luck"),
            ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL: the system may be out of"),
            ("import os; os.kill(os.getpid(), 15)", "ended by SIGTERM"),
            ("import os; os.kill(os.getpid(), 40)", "ended by signal 40"),
            ("pass", "ended with status 0"),
        ],
    )
    def test_a_child_that_dies(self, code: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Cells that it was to measure say what it died of, and the run goes on."""
        monkeypatch.setattr(measuring, "_START", code)

        table = measure(SMALL_PLAN, budget=AMPLE)

        assert {one.times for one in table.cells} == {None}
        assert all(why in (one.why or "") for one in table.cells if one.cell in SMALL_PLAN.cells)

    @pytest.mark.parametrize("executable", ["", None, "/nonexistent/python", "/"])
    def test_a_child_that_can_not_be_started(
        self, executable: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cells say why there is no measuring process, and a measured step is the usual one."""
        monkeypatch.setattr(sys, "executable", executable)
        recommendation._measured_once.cache_clear()

        table = measure(SMALL_PLAN)
        step = costs.measured_step()
        recommendation._measured_once.cache_clear()

        whys = {one.why for one in table.cells if one.cell in SMALL_PLAN.cells}
        assert {(why or "").partition(": ")[0] for why in whys} == {
            "the measuring process can't be started"
        }
        assert step == 2 * MiB

    def test_a_python_that_is_a_grandchild(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is measured where the process started only starts another, and it says so."""
        wrapper = tmp_path / "python"
        wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit 0\n')
        wrapper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(wrapper))

        table = measure(SMALL_PLAN)

        whys = {one.why for one in table.cells if one.cell in SMALL_PLAN.cells}
        assert len(whys) == 1
        assert f"process {os.getpid()}, whose job it is" in str(whys)

    def test_no_thread_is_needed(self, one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """It measures where no thread can be started: under a limit one may never begin."""

        def refused(*_: object) -> None:
            msg = "can't start new thread"
            raise RuntimeError(msg)

        monkeypatch.setattr(threading.Thread, "start", refused)

        table = measure(SMALL_PLAN, budget=AMPLE, width=10)

        assert any(one.times is not None for one in table.cells)

    def test_modules_beside_the_caller(
        self, one_pass: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A module of the working directory is not imported, nor what sitecustomize prints taken
        for an answer; what is no string in sys.path counts for nothing, as for Python itself."""
        for name in ("json", "sys", "pickle", "pyreserve"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('not the one meant')")
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("print('hello'); print(5)")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(site))
        monkeypatch.setattr(sys, "path", [*filter(None, sys.path), tmp_path / "nothing"])

        table = measure(SMALL_PLAN, budget=AMPLE, width=10)

        assert {one.why for one in table.cells} == {None}

    def test_a_child_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is ended once the budget is spent."""
        monkeypatch.setattr(measuring, "_START", "import time; time.sleep(1000)")
        monkeypatch.setattr(measuring, "_GRACE", 0.2)
        before = children()

        measure(SMALL_PLAN, budget=0.3)

        assert children() == before

    def test_the_parent_that_dies(self) -> None:
        """A measuring process ends with its parent, however that ends."""
        found = child_of(
            """
            import json, os, signal, subprocess, sys, time
            code = '''
            from pyreserve.costs import measure, plan
            measure(plan(longest=1 << 20), progress=lambda now: print(now.passes, flush=True))
            '''
            parent = subprocess.Popen([sys.executable, "-c", code.replace("            ", "")],
                                      stdout=subprocess.PIPE)
            parent.stdout.readline(), parent.stdout.readline()
            kids = open(f"/proc/{parent.pid}/task/{parent.pid}/children").read().split()
            parent.kill()
            parent.wait()
            def alive(pid):
                try:
                    return "Z" not in open(f"/proc/{pid}/stat").read().split(")")[1]
                except OSError:
                    return False
            deadline = time.time() + 120
            while any(map(alive, kids)) and time.time() < deadline:
                time.sleep(0.01)
            print(json.dumps([len(kids), sum(map(alive, kids))]))
            """
        )

        assert found == [1, 0]

    @pytest.mark.heavy
    def test_too_few_addresses(self) -> None:
        """Under a small RLIMIT_AS what needs more says so, and the rest is measured."""
        found = child_of(
            """
            import json
            from pyreserve.costs import measure, plan
            table = measure(plan(only=["reserve"]), budget=1000, width=10)
            print(json.dumps([[c.cell.nbytes, c.why] for c in table.cells
                              if c.cell.page_kind == table.cells[0].cell.page_kind]))
            """,
            ulimit="-v 400000",
        )

        why = dict(found)
        assert why[PAGE_SIZE] is None
        assert why[MiB * 128] is None
        assert "RLIMIT_AS (ulimit -v) is 390.6 MiB" in why[GiB]
        assert "RLIMIT_AS" in why[136 * GiB]

    @pytest.mark.heavy
    def test_a_kernel_that_lacks_verbs(self, tmp_path: Path) -> None:
        """What an old kernel refuses says so, what hangs on it too, and the other steps go on."""
        shim = tmp_path / "old_kernel.so"
        source = Path(__file__).parents[1] / "c/old_kernel.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source], check=True)
        # Every interpreter runs this first, the child that measures too.
        (tmp_path / "sitecustomize.py").write_text(
            textwrap.dedent(
                f"""
                import ctypes
                from pyreserve._native import ffi, lib
                shim = ctypes.CDLL({str(shim)!r})
                address = ctypes.cast(shim.old_kernel, ctypes.c_void_p).value
                lib.vm_replace(ffi.cast("vm_system_call", address))
                """
            )
        )

        found = child_of(
            """
            import json
            from pyreserve import PAGE_SIZE
            from pyreserve.costs import measure, plan
            table = measure(plan(longest=PAGE_SIZE), budget=1000, width=10)
            print(json.dumps([[c.cell.verb, c.cell.method, c.why] for c in table.cells
                              if c.cell.page_kind == table.cells[0].cell.page_kind]))
            """,
            PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        )

        why = {(verb, method): why for verb, method, why in found}
        for refused in (("discard", "free"), ("guard", "madvise"), ("unguard", "madvise")):
            assert "EINVAL" in why[refused], refused
        assert "lazy discard" in why["retouch", "after-free"]
        for verb, method in (("discard", "dontneed"), ("guard", "mprotect"), ("touch", "write")):
            assert why[verb, method] is None
        assert why["decommit", "dontneed+mprotect"] is None


SETTINGS = [
    Setting(kind, mode, threads)
    for kind in page_kinds()
    for mode in ("charge", "noreserve")
    for threads in (1, 2)
    if kind.why_not is None and kind.sort != "hugetlb"
]


class TestPrograms:
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_each_leaves_nothing(self, setting: Setting) -> None:
        """Each program gives samples of all its cells, and leaves no mapping and no child."""
        lengths = [setting.unit, 2 * setting.unit]
        programs = list(write(setting, tuple(SCRIPTS), lengths))
        before, pids = proc.map_count(), children()

        for program in programs:
            samples = run(program, 2)

            assert len(samples) == len(program.cells)
            assert all(len(values) >= 2 * setting.threads for values in samples)

        assert len(programs) > 5
        assert abs(proc.map_count() - before) < 10  # the interpreter's own come and go
        assert children() == pids

    def test_untimed_cells_stay_untimed(self) -> None:
        """A program told to time some verbs does the rest all the same."""
        (life,) = write(ONE, ("life",), [PAGE_SIZE])

        timed = life.timing_only(frozenset({"discard"}))

        assert [step.verb for step in timed.steps] == [step.verb for step in life.steps]
        assert {cell.verb for cell in timed.cells} == {"discard"}
        assert len(run(timed, 1)) == 2

    def test_sizes_between_huge_pages(self) -> None:
        """A smaller kind of transparent page is kept from the next larger one."""
        kind = PageKind("64KiB", 64 * KiB, "transparent", next_size=2 * MiB)
        setting = Setting(kind, "charge", 1)

        programs = list(write(setting, ("life",), [64 * KiB, 2 * MiB, 8 * MiB]))

        assert [program.piece for program in programs] == [64 * KiB, 2 * MiB]
        for program in programs:
            first = program.phase
            assert program.align == 4 * MiB
            assert first % (128 * KiB) == 64 * KiB
            whole = -(-first // (2 * MiB)) * 2 * MiB
            assert whole + 2 * MiB > first + program.piece


class TestMachine:
    def test_its_facts(self) -> None:
        """The facts are ready for JSON, and those that others know too agree."""
        found = facts()

        assert json.loads(json.dumps(found)) == found
        assert found["cpus"] == len(os.sched_getaffinity(0))
        assert found["kernel"] == os.uname().release
        assert found["page_size"] == resource.getpagesize()
        assert found["memory"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert found["virtualised"]
