"""Costs: statistics, model, recommendations, and measurements on the real kernel."""

import copy
import json
import math
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import xml.etree.ElementTree as ET
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
from pyreserve import PAGE_SIZE, GiB, KiB, MiB, OutOfMemoryError, costs
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
    Progress,
    Verdict,
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
from pyreserve.costs.text import figure_text
from pyreserve.units import format_size

TOUCH = Curve("touch", "write")
COMMIT = Curve("commit", "mprotect")


def children() -> set[int]:
    """Return the PIDs of this process's children, including those not waited for."""
    tasks = Path("/proc/self/task")
    return {int(pid) for t in tasks.iterdir() for pid in (t / "children").read_text().split()}


def child_of(code: str, *, ulimit: str = "", **environment: str) -> Any:
    """Run code in a new Python, optionally under a ``ulimit``; return the JSON that it prints."""
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
        """Minimum, median, percentiles and maximum cover the samples of all passes."""
        passes = [[float(n) for n in range(1, 51)], [float(n) for n in range(51, 102)]]

        times = summarise(passes)

        assert (times.min, times.median, times.max) == (1, 51, 101)
        assert (times.p90, times.p99) == (91, 100)
        assert (times.samples, times.passes) == (101, 2)

    def test_the_interval_holds_the_true_median(self) -> None:
        """About 95 of 100 intervals of noisy samples contain the true median."""
        random = Random(7)
        hits = 0
        for _ in range(400):
            shifts = [random.gauss(0, 0.05) for _ in range(6)]
            passes = [[100 * math.exp(s + random.gauss(0, 0.1)) for _ in range(30)] for s in shifts]
            low, high = summarise(passes).ci95
            hits += low <= 100 <= high

        assert hits >= 360

    def test_passes_that_disagree_widen_the_interval(self) -> None:
        """The interval is wider where the passes differ more than their samples do."""
        together = summarise([[100.0 + i % 3 for i in range(100)]] * 2)
        apart = summarise([[90.0 + i % 3 for i in range(100)], [110.0 + i % 3 for i in range(100)]])

        assert apart.width > 10 * together.width

    def test_the_interval_of_a_single_pass(self) -> None:
        """The interval of a single pass extends 25 % to either side, however equal its samples."""
        assert summarise([[100.0] * 50]).ci95 == (80, 125)

    def test_the_interval_of_a_single_sample(self) -> None:
        """The interval of a single sample is 0 to infinity."""
        assert summarise([[5.0]]).ci95 == (0, math.inf)

    @given(st.lists(st.floats(1, 1e9), min_size=1, max_size=50))
    def test_any_samples(self, values: list[float]) -> None:
        """The median equals that of the statistics module and lies in its interval."""
        times = summarise([values])

        assert times.median == median(values)
        assert times.ci95[0] <= times.median <= times.ci95[1]
        assert times.min <= times.p90 <= times.p99 <= times.max

    def test_quantiles(self) -> None:
        """Quantiles between two values are interpolated."""
        assert quantile([0.0, 10.0], 0.25) == 2.5
        assert quantile([3.0], 0.9) == 3


def quiet(*passes: list[float]) -> list[list[tuple[float, bool]]]:
    """Return samples without preemption."""
    return [[(ns, False) for ns in samples] for samples in passes]


class TestCold:
    def test_slow_samples_are_cold(self) -> None:
        """Samples thirty times as long as the others are cold."""
        warm = [[100.0 + i for i in range(20)] for _ in range(5)]
        cold = [3000.0 + i for i in range(10)]

        split = split_cold(quiet(*warm, cold))

        assert split == ([*warm, []], [[]] * 5 + [cold])

    def test_within_one_pass(self) -> None:
        """A pass that began cold and ended warm is split too."""
        passes = quiet([3000.0] * 6 + [100.0] * 60)

        assert split_cold(passes) == ([[100.0] * 60], [[3000.0] * 6])

    @pytest.mark.parametrize("strange", [[900.0], [250.0] * 10, [5000.0, 9000.0]])
    def test_noise_is_not_cold(self, strange: list[float]) -> None:
        """A few long samples, or many of twice the length, are noise and stay warm."""
        values = [100.0 + i % 10 for i in range(100)] + strange

        assert split_cold(quiet(values)) == ([values], [[]])

    def test_preempted_samples_are_not_cold(self) -> None:
        """Preempted samples are never cold, and left out where others remain."""
        passes = [[(100.0, False)] * 60 + [(4100.0, True)] * 10, [(4100.0, True)] * 3]

        assert split_cold(passes) == ([[100.0] * 60, [4100.0] * 3], [[], []])

    @pytest.mark.parametrize("few", [[95.0, 900.0], [900.0], [400.0, 101.0, 7500.0]])
    def test_a_few_samples_of_a_long_piece(self, few: list[float]) -> None:
        """With too few samples for a gap, the cost of shorter pieces separates cold from warm."""
        warm, cold = split_cold(quiet(few), expected=100.0)

        assert [ns for samples in warm for ns in samples] == [ns for ns in few if ns < 200]
        assert [ns for samples in cold for ns in samples] == [ns for ns in few if ns >= 200]


class TestModel:
    def test_a_straight_line_is_found(self) -> None:
        """Medians on a straight line give its fixed cost and its cost per page."""
        points = [(x, 700 + 3 * x, 699 + 3 * x, 701 + 3 * x) for x in (1.0, 4.0, 64.0, 4096.0)]

        fit = Fit.of(COMMIT, points)

        assert fit.fixed_ns == pytest.approx(700)
        assert fit.ns_per_page == pytest.approx(3)
        assert fit.residual == pytest.approx(0, abs=1e-9)
        assert fit.fixed_ci95[0] < 700 < fit.fixed_ci95[1]

    def test_an_odd_point_does_not_decide(self) -> None:
        """A single outlying median hardly moves the line, and the residual shows it."""
        points = [
            (x, 700 + 3 * x, 690 + 3 * x, 710 + 3 * x) for x in (1.0, 4.0, 16.0, 64.0, 4096.0)
        ]
        points[3] = (64.0, 5000.0, 4900.0, 5100.0)

        fit = Fit.of(COMMIT, points)

        assert fit.fixed_ns == pytest.approx(700, rel=0.02)
        assert fit.ns_per_page == pytest.approx(3, rel=0.02)
        assert fit.residual > 0.5

    def test_estimates_equal_measured_medians(self) -> None:
        """At a measured length the estimate and its interval are those of the median."""
        points = [(1.0, 900.0, 880.0, 950.0), (16.0, 1000.0, 990.0, 1010.0), (256.0, 9e4, 8e4, 1e5)]
        fit = Fit.of(TOUCH, points)

        for pages, ns, low, high in points:
            estimate = fit.estimate(pages)
            assert estimate == pytest.approx(ns)
            assert [estimate.low, estimate.high] == pytest.approx([low, high])

    @settings(max_examples=examples(50))
    @given(st.floats(1, 1e6), st.floats(0.01, 1e4), st.floats(1, 65536))
    def test_between_measured_lengths(self, fixed: float, per_page: float, pages: float) -> None:
        """Estimates on a straight line are exact at every length."""
        exact = [(x, fixed + per_page * x) for x in (1.0, 8.0, 512.0, 65536.0)]
        points = [(x, y, y, y) for x, y in exact]

        assert Fit.of(TOUCH, points).estimate(pages) == pytest.approx(fixed + per_page * pages)

    def test_a_bent_curve(self) -> None:
        """Between lengths 4 times apart the estimate on a bent curve is within 25 %."""

        def bent(pages: float) -> float:
            return 500 + 50 * pages + 300 * pages * pages / (pages + 2000)

        points = [(4.0**k, bent(4.0**k), bent(4.0**k), bent(4.0**k)) for k in range(10)]
        fit = Fit.of(TOUCH, points)

        for k in range(9):
            between = 2 * 4.0**k
            assert fit.estimate(between) == pytest.approx(bent(between), rel=0.25)

    def test_verbs_and_methods(self) -> None:
        """A verb without a method uses its first; bytes are pages times the OS page."""
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
    def test_arguments_without_an_estimate(
        self, arguments: dict[str, Any], error: type[Exception]
    ) -> None:
        """A wrong name is a ValueError, a curve that was not measured a LookupError."""
        model = costs_tables.table({TOUCH: line(100, 7)}).model()

        with pytest.raises(error):
            model.estimate(**arguments)

    def test_an_estimate_can_be_copied(self) -> None:
        """Copies and pickles keep the interval."""
        estimate = costs_tables.table({TOUCH: line(100, 7)}).model().estimate("touch", pages=3)

        copies = [copy.copy(estimate), copy.deepcopy(estimate)]
        copies += [pickle.loads(pickle.dumps(estimate, protocol)) for protocol in range(5)]

        expected = {(estimate, estimate.low, estimate.high)}
        assert {(copied, copied.low, copied.high) for copied in copies} == expected

    def test_a_sample_that_took_no_time(self) -> None:
        """A length is fitted even if one of its samples is shorter than reading the clock."""
        passes = [[100.0] * 60 for _ in range(6)]
        passes[3][7] = -1.0
        entry = Measured(TOUCH.at(PAGE_SIZE), "warm", summarise(passes))

        model = CostTable({}, (entry,), QUIET, 1.0).model()

        assert model.estimate("touch", pages=1) == pytest.approx(100)

    def test_cold_memory_is_left_out(self) -> None:
        """Cold cells do not enter the model."""
        cold = replace(measured(TOUCH.at(2 * MiB), 1e9), host="cold")
        with_cold = costs_tables.table({TOUCH: line(100, 7)}, more=[cold])

        assert with_cold.model() == costs_tables.table({TOUCH: line(100, 7)}).model()


def at(path: tuple[Any, ...], *values: Any) -> list[tuple[tuple[Any, ...], Any]]:
    return [(path, value) for value in values]


HOSTILE: list[tuple[tuple[Any, ...], Any]] = [
    *at((), "[" * 100_000, "NaN"),
    *at(("machine",), 5, None, []),
    *at(("machine", "cpus"), 0, "4", True),
    *at(("machine", "memory_bytes"), [], 0),
    (("machine", "page_size_bytes"), "4KiB"),
    (("machine", "max_map_count"), "many"),
    *at(("machine", "map_entries"), None, [1], {"a": "b"}),
    *at(("machine", "huge_pages"), None, {"got": "all"}),
    *at(("cells", 0, "pass_medians_ns"), None, ["x"], [math.inf]),
    *at(("machine", "system_call_ns"), "fast", 0, -1),
    *at(("noise", "other_cpus"), "none", math.nan, -1),
    (("noise",), {}),
    *at(("seconds",), "x", math.inf),
    (("complete",), "no"),
    *at(("cells",), {}, 3, "abc", [1]),
    *at(("cells", 0, "verb"), [1], None),
    *at(("cells", 0, "page_kind"), "large", ""),
    *at(("cells", 0, "bytes"), 0, -PAGE_SIZE, "x", 0.5, 10**400),
    (("cells", 0, "threads"), "z"),
    (("cells", 0, "host"), []),
    (("cells", 0, "why"), [1]),
    *at(("cells", 0, "samples"), math.inf, 0, -1),
    *at(("cells", 0, "ns"), [], {}),
    *at(("cells", 0, "ns", "median"), math.nan, 10**400, "x"),
    *at(("cells", 0, "ns", "ci95"), [1], [None, 1], [1, math.inf]),
    (("cells", 1, "bytes"), PAGE_SIZE),  # the same as cell 0
]
"""Paths into the JSON and invalid values for them; an empty path replaces the whole text."""


class TestTable:
    def test_json_there_and_back(self) -> None:
        """JSON round trip: cells, figures and unmeasured cells are the same afterwards."""
        unmeasured = Measured(
            Cell("guard", "madvise", SMALL, "charge", PAGE_SIZE), "warm", None, "no"
        )
        single = Measured(
            Cell("fork", "inherit", SMALL, "charge", PAGE_SIZE), "warm", summarise([[7.0]])
        )
        table = costs_tables.table({TOUCH: line(100, 7)}, noise=LOUD, more=[unmeasured, single])

        back = CostTable.from_json(table.to_json())

        assert [(c.cell, c.host, c.why) for c in back.cells] == [
            (c.cell, c.host, c.why) for c in table.cells
        ]
        for before, after in zip(table.cells, back.cells, strict=True):
            if before.times is not None and after.times is not None:
                assert after.times.median == pytest.approx(before.times.median, rel=1e-3)
                assert after.times.ci95 == pytest.approx(before.times.ci95, rel=1e-3)
                assert after.times.samples == before.times.samples
        assert (back.noise, back.machine, back.complete) == (LOUD, table.machine, True)
        assert CostTable.from_json(back.to_json()).to_json() == back.to_json()

    def test_the_schema(self) -> None:
        """The JSON is strict, and has the documented fields in the documented units."""
        table = costs_tables.table({TOUCH: line(100, 7)})

        document = json.loads(table.to_json(), parse_constant=pytest.fail)

        assert document["schema"] == 2
        assert set(document) == {
            *("schema", "machine", "complete", "seconds", "noise", "cells", "model")
        }
        assert document["machine"]["memory_bytes"] == table.machine["memory"]
        assert "memory" not in document["machine"]
        cell = document["cells"][2]
        assert set(cell) == {
            *("verb", "method", "page_kind", "mode", "bytes", "pages", "threads", "host"),
            *("call", "ns", "samples", "passes", "pass_medians_ns", "why"),
        }
        assert (cell["verb"], cell["bytes"], cell["pages"]) == ("touch", 16 * PAGE_SIZE, 16)
        assert cell["call"] == "page fault (store)"
        assert len(cell["pass_medians_ns"]) == cell["passes"] == 6
        assert set(cell["ns"]) == {"min", "median", "p90", "p99", "max", "ci95"}
        assert cell["ns"]["median"] == pytest.approx(212, rel=0.05)
        (fit,) = document["model"]["fits"]
        assert (fit["verb"], fit["method"]) == ("touch", "write")
        assert {"fixed_ns", "fixed_ns_ci95", "ns_per_page", "ns_per_page_ci95"} < set(fit)
        assert fit["ns_per_page"] == pytest.approx(7, rel=0.05)

    @pytest.mark.parametrize(
        "text",
        [
            *("", "{", "[]", "3", "null", "{}", '{"schema": 2}', '{"schema": 1}'),
            '{"schema": 2, "machine": {}, "cells": [{}], "noise": {}, "seconds": 1}',
        ],
    )
    def test_text_of_another_form(self, text: str) -> None:
        """Any other text is a ValueError."""
        with pytest.raises(ValueError, match=r"not the output|schema|Expecting"):
            CostTable.from_json(text)

    @pytest.mark.parametrize(("path", "value"), HOSTILE)
    def test_invalid_values_are_refused(self, path: tuple[Any, ...], value: Any) -> None:
        """An invalid value is refused when it is read, so comparing and recommending never fail."""
        document: Any = json.loads(costs_tables.table({TOUCH: line(100, 7)}).to_json())
        container = document
        for key in path[:-1]:
            container = container[key]
        if path:
            container[path[-1]] = value

        with pytest.raises(ValueError, match="not the output of pyreserve costs --json"):
            CostTable.from_json(json.dumps(document) if path else value)

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
    def test_unusual_values_are_accepted(self, ns: float, nbytes: int) -> None:
        """Times of zero or less, and lengths of partial OS pages, can be compared both ways and
        recommended from."""
        usual = costs_tables.usual()
        document: Any = json.loads(usual.to_json())
        for cell in document["cells"][::2]:
            cell["ns"] = dict.fromkeys(cell["ns"], ns) | {"ci95": [ns, None]}
            cell["pass_medians_ns"] = [ns] * 6
        document["cells"][4]["bytes"] = nbytes
        document["machine"]["map_entries"]["decommit mprotect"] = 1e-320

        odd = CostTable.from_json(json.dumps(document))

        for compared in compare(odd, usual).cells + compare(usual, odd).cells:
            assert not math.isnan(compared.ratio)
        assert str(recommend(odd))
        assert CostTable.from_json(odd.to_json()).to_json() == odd.to_json()


class TestComparison:
    def test_equal_costs_do_not_change(self) -> None:
        """Two runs with the same costs have no changes."""
        old = costs_tables.table(USUAL, seed=1, jitter=0.1)
        new = costs_tables.table(USUAL, seed=2, jitter=0.1)

        comparison = compare(old, new)

        unchanged = comparison.count("same") + comparison.count("unsure")
        assert unchanged >= 0.95 * len(comparison.cells)
        assert comparison.noisy is None
        assert comparison.differences == ()

    def test_changed_cells(self) -> None:
        """Intervals that do not overlap are a change, with direction and ratio."""
        old = costs_tables.table({TOUCH: line(0, 100), COMMIT: line(900, 0)})
        new = costs_tables.table({TOUCH: line(0, 150), COMMIT: line(450, 0)}, seed=1)

        cells = compare(old, new).cells

        changes = {(compared.cell.verb, compared.change) for compared in cells}
        assert changes == {("touch", "slower"), ("commit", "faster")}
        assert {round(compared.ratio, 1) for compared in cells} == {1.5, 0.5}

    def test_wide_intervals_are_unsure(self) -> None:
        """Cells with an interval wider than half the median are unsure."""
        old = costs_tables.table({TOUCH: line(0, 100)}, jitter=3.0)
        new = costs_tables.table({TOUCH: line(0, 130)}, jitter=3.0, seed=1)

        comparison = compare(old, new)

        assert comparison.count("unsure") >= 0.8 * len(comparison.cells)

    def test_two_busy_cpus_of_64_are_no_noise(self) -> None:
        """On a machine of 64 CPUs, two busy CPUs do not count as noise."""
        table = costs_tables.table({TOUCH: line(0, 100)}, noise=LOUD)
        table.machine["cpus"] = 64

        assert table.disturbed is None

    def test_small_changes_do_not_count(self) -> None:
        """A difference of 3 % is no change, however narrow the intervals."""
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
        """If a run was disturbed, changes are reported as noise, with the reason."""
        old = costs_tables.table({TOUCH: line(0, 100)}, noise=before)
        new = costs_tables.table({TOUCH: line(0, 300)}, noise=now)

        comparison = compare(old, new)

        assert {compared.change for compared in comparison.cells} == {"noisy"}
        assert comparison.noisy is not None
        assert comparison.noisy.startswith(why)

    def test_a_machine_at_another_speed(self) -> None:
        """A slower system call makes the same machine noisy, but not a different machine."""
        old = costs_tables.table({TOUCH: line(0, 100)})
        slow = costs_tables.table({TOUCH: line(0, 200)})
        slow.machine["system_call_ns"] = 300.0
        other = costs_tables.table({TOUCH: line(0, 200)})
        other.machine.update(system_call_ns=300.0, kernel="7.0")

        assert compare(old, slow).count("noisy") == len(costs_tables.LENGTHS)
        comparison = compare(old, other)
        assert comparison.count("slower") == len(costs_tables.LENGTHS)
        assert comparison.differences == (("kernel", "6.1.0", "7.0"),)

    def test_cells_of_one_table_only(self) -> None:
        """Cells that only one table has are counted and not compared."""
        comparison = compare(
            costs_tables.table({TOUCH: line(0, 100)}), costs_tables.table({COMMIT: line(9, 0)})
        )

        assert comparison.cells == ()
        assert (comparison.only_old, comparison.only_new) == (9, 9)


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the table in a report's text: columns are two spaces apart."""
    return [[cell.strip() for cell in re.split(r" {2,}", row)] for row in text.splitlines()]


class TestText:
    def test_a_table(self) -> None:
        """The text of a table names the machine and has a row per curve, in the verbs' order."""
        curves = {
            TOUCH: line(100, 7),
            replace(COMMIT, threads=2): line(900, 0),
            replace(TOUCH, mode="noreserve"): line(100, 7),
        }
        table = costs_tables.table(curves, jitter=1e-6, noise=LOUD)

        text = str(replace(table, complete=False))

        heading, counts, interrupted, doubtful, *_ = text.split("\n\n")
        machine = "Imaginary 9000, 4 CPUs, 16 GiB, Linux 6.1.0"
        assert heading == f"Costs of virtual memory on {machine}"
        assert counts == "27 cells measured in 12.5 s, 0 not measured."
        assert interrupted == "The measurement was interrupted."
        assert doubtful == "Small changes are doubtful: other processes kept 1.9 CPUs busy."
        rate = f"{PAGE_SIZE / 7 * 1e9 / GiB:.3g}"
        longest = format_size(costs_tables.LENGTHS[-1])
        assert rows_of(text)[-3:] == [
            ["commit mprotect", f"{SMALL} 2 threads", "900 ns ± 0%", "0 ns"],
            ["touch write", SMALL, "100 ns ± 0%", "7 ns ± 0%", rate, longest],
            ["touch write", f"{SMALL} noreserve", "100 ns ± 0%", "7 ns ± 0%", rate, longest],
        ]

    def test_an_empty_table(self) -> None:
        """A table without facts and cells has a text too."""
        text = str(CostTable({}, (), QUIET, 0.0))

        assert text.startswith("Costs of virtual memory on unknown CPU\n\n0 cells measured")

    def test_a_figure_that_may_be_zero(self) -> None:
        """A cost whose interval includes zero, or spans more than a factor of three, is unknown."""
        assert figure_text(3, (0, 10)) == "unknown"
        assert figure_text(30, (10, 31)) == "unknown"
        assert figure_text(0, (0, 0)) == "0 ns"
        assert figure_text(100, (90, 110)) == "100 ns ±10%"

    def test_a_comparison(self) -> None:
        """The text counts the changes and has a row per change, the largest first."""
        lengths = [PAGE_SIZE]
        old, new = (
            costs_tables.table(
                {TOUCH: line(0, touch), COMMIT: line(commit, 0)}, lengths=lengths, jitter=1e-6
            )
            for touch, commit in ((100, 900), (110, 450))
        )
        new.machine["kernel"] = "7.0"

        text = str(compare(old, new))

        assert "2 cells in both runs: 0 same, 1 slower, 1 faster." in text
        assert "The machine differs: kernel was 6.1.0, is 7.0." in text
        assert rows_of(text)[-2:] == [
            [str(COMMIT.at(PAGE_SIZE)), "900 ns", "450 ns", "0.50", "faster"],
            [str(TOUCH.at(PAGE_SIZE)), "100 ns", "110 ns", "1.10", "slower"],
        ]
        assert "\ncell" not in str(compare(old, old))

    def test_html_is_escaped(self) -> None:
        """HTML is well-formed, has the words of the text, and no tag of a machine's facts."""
        hostile = "<script>&\u202e"
        old, new = costs_tables.table({TOUCH: line(0, 100)}), costs_tables.table(USUAL)
        old.machine["cpu"], new.machine["kernel"] = hostile, hostile
        answer = Verdict(hostile, hostile, hostile, True, 1)
        advice = replace(recommend(new), by_name={"commit": answer})

        for shown in (old, new, compare(old, new), answer, advice):
            document = ET.fromstring(shown._repr_html_())
            words = "".join(document.itertext())
            assert document.find(".//script") is None
            assert "<script>&\\u202e" in words
            assert "\u202e" not in words


class TestPlan:
    def test_the_default_is_what_verdicts_need(self) -> None:
        """The default plan has few cells of at most 2 MiB, in one process, and little memory."""
        chosen = plan()

        assert len(chosen.groups) == 1
        assert max(c.nbytes for c in chosen.cells) <= 2 * MiB
        assert {(c.mode, c.threads) for c in chosen.cells} == {("charge", 1)}
        assert chosen.memory < 256 * MiB

    def test_details_have_every_verb(self) -> None:
        """A plan with details has every method on small pages, from one page to 128 MiB."""
        chosen = plan(details=True)

        lengths = {c.nbytes for c in chosen.cells if c.verb == "touch"}
        assert {PAGE_SIZE, 128 * MiB} <= lengths
        assert {c.mode for c in chosen.cells} == {"charge", "noreserve"}
        methods = {(c.verb, c.method) for c in chosen.cells if c.page_kind == SMALL}
        everything = {(verb, method) for verb, all_of in METHODS.items() for method in all_of}
        assert everything - methods == {("collapse", "madvise"), ("advise", "hugepage")}
        assert len(set(chosen.groups)) == len(chosen.groups) > 1
        programs = [program for group in chosen.groups for program in group.programs]
        assert len(set(programs)) == len(programs)

    def test_full_is_more(self) -> None:
        """A full plan contains the one with details, and every power of two as a length."""
        full = set(plan(full=True).cells)

        assert set(plan().cells) <= set(plan(details=True).cells) <= full
        lengths = {
            c.nbytes for c in full if (c.verb, c.page_kind, c.threads) == ("touch", SMALL, 1)
        }
        assert {PAGE_SIZE << k for k in range((GiB // PAGE_SIZE).bit_length())} <= lengths

    def test_only(self) -> None:
        """Only the named verbs are timed."""
        assert {c.verb for c in plan(only=["commit", "fork"]).cells} == {"commit", "fork"}
        assert plan(only="commit") == plan(only=("commit",))

    def test_longest(self) -> None:
        """No piece of memory is longer than `longest`, and less memory is needed."""
        chosen = plan(longest=MiB, details=True)

        untouched = ("reserve", "mmap"), ("release", "untouched")
        assert MiB >= max(c.nbytes for c in chosen.cells if (c.verb, c.method) not in untouched)
        assert chosen.memory < 256 * MiB
        assert plan(longest="1MiB", details=True) == chosen

    @pytest.mark.parametrize(
        "arguments",
        [
            {"only": ["comit"]},
            {"only": []},
            {"only": "x"},
            {"longest": 1},
            {"longest": "lots"},
            {"only": "collapse", "longest": PAGE_SIZE, "details": True},
        ],
    )
    def test_invalid_arguments(self, arguments: dict[str, Any]) -> None:
        """An unknown verb, no verb, no size, or a length under a page is a ValueError."""
        with pytest.raises(ValueError, match=r"the verbs|longest must be|not a size|nothing to"):
            plan(**arguments)

    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A plan that needs more memory than is available is refused before any child starts."""
        monkeypatch.setattr(proc, "available_bytes", lambda: 300 * MiB)
        before = children()

        with pytest.raises(OutOfMemoryError, match=r"measuring needs \d+ MiB .* 300 MiB"):
            measure(plan(details=True))

        assert children() == before
        plan(longest=32 * MiB, details=True).check_memory()

    def test_missing_page_kinds(self) -> None:
        """A page kind that the machine lacks is not run, and its cells have the reason."""
        lacking = [kind for kind in page_kinds() if kind.why_not and kind.size <= 32 * MiB]
        if not lacking:
            pytest.skip("this machine has all page kinds")

        chosen = plan()

        reasons = {c.page_kind: why for c, why in chosen.unmeasurable}
        assert reasons == {kind.name: kind.why_not for kind in lacking}
        assert not {c.page_kind for c in chosen.cells} & set(reasons)


SMALL_PLAN = plan(only=["reserve", "commit", "touch"], longest=16 * PAGE_SIZE, details=True)
SINGLE = Setting(page_kinds()[0], "charge", 1)
AMPLE = 1000.0  # seconds; a run ends earlier, because its cells are settled


@pytest.fixture
def one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end after one pass, given a large width."""
    monkeypatch.setattr(measuring, "_MIN_PASSES", 1)


def answers_of(
    seconds: Callable[[], float], ns: Callable[[Cell], float], spend: Callable[[], None]
) -> Callable[[Job], Iterator[dict[str, Any]]]:
    """Return a substitute for `measuring._answers` that calls `spend` for each program."""

    def answers(job: Job) -> Iterator[dict[str, Any]]:
        for number, program in job.programs.items():
            if seconds() >= job.deadline:
                return
            spend()
            samples = [[(ns(cell), False)] for cell in program.cells]
            numbers = list(range(len(samples)))
            yield {"program": number, "seconds": 1.0, "cells": numbers, "samples": samples}

    return answers


def whys_of(table: CostTable) -> set[str]:
    """Return the reasons why cells of SMALL_PLAN were not measured."""
    return {entry.why or "" for entry in table.cells if entry.cell in SMALL_PLAN.cells}


class TestMeasure:
    def test_every_cell_of_a_plan(self) -> None:
        """Each cell comes back with times, in at least six passes."""
        seen: list[Progress] = []
        before = children()

        table = measure(SMALL_PLAN, budget=AMPLE, width=10, progress=seen.append)

        assert table.complete
        warm = {entry.cell: entry for entry in table.cells if entry.host == "warm"}
        assert set(SMALL_PLAN.cells) <= set(warm)
        for cell in SMALL_PLAN.cells:
            times = warm[cell].times
            assert times is not None, warm[cell].why
            assert times.passes >= 6
            assert times.samples >= 6
            assert times.median > 0
            assert sum(ns is not None for ns in warm[cell].medians) == times.passes
        assert children() == before
        assert seen[-1].passes >= 5
        assert {progress.cells for progress in seen} == {len(SMALL_PLAN.cells)}
        assert table.machine["map_entries"]["decommit mprotect"] == 2
        assert table.machine["system_call_ns"] > 0

    def test_each_cell_has_its_own_samples(
        self, one_pass: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each sample is recorded for the cell that was timed."""
        costs_of = {cell: 100.0 * (1 + number) for number, cell in enumerate(SMALL_PLAN.cells)}
        answers = answers_of(time.monotonic, costs_of.__getitem__, lambda: None)
        monkeypatch.setattr(measuring, "_answers", answers)

        table = measure(SMALL_PLAN, budget=AMPLE, width=10)

        medians = {entry.cell: entry.times.median for entry in table.measured() if entry.times}
        assert medians == costs_of

    def test_a_touch_is_a_first_touch(self) -> None:
        """Touching 64 pages takes 63 more faults than touching one."""
        short, long = write(SINGLE, ("life",), [PAGE_SIZE, 64 * PAGE_SIZE])

        def faults(program: Program) -> int:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            run(program, 1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        assert faults(long) >= faults(short) + 63

    @pytest.mark.parametrize(("budget", "some"), [(10.0, True), (30.0, True), (3000.0, False)])
    def test_a_small_budget(
        self, budget: float, some: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A small budget gives fewer cells, the most important ones, in at least six passes."""
        now = [0.0]

        def spend() -> None:
            now[0] += 0.25

        answers = answers_of(lambda: now[0], lambda _: 100.0, spend)
        monkeypatch.setattr(measuring, "_answers", answers)
        monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: now[0]))
        chosen = plan(details=True)

        table = measure(chosen, budget=budget, width=1e-9)

        assert table.seconds <= budget + 0.25
        assert table.complete
        times = [entry.times for entry in table.cells if entry.times]
        assert min(entry.passes for entry in times) >= 6
        dropped = [entry.why for entry in table.cells if entry.cell in chosen.cells]
        assert ("the budget is too small for this cell too" in dropped) == some
        assert any(entry.cell == chosen.cells[0] for entry in table.measured())

    @pytest.mark.parametrize(
        "wrong", [{"budget": 0}, {"budget": -1}, {"budget": math.inf}, {"width": 0}]
    )
    def test_invalid_budget_or_width(self, wrong: dict[str, Any]) -> None:
        """Budget and width must be positive, and the budget finite."""
        with pytest.raises(ValueError, match="positive"):
            measure(SMALL_PLAN, **wrong)

    def test_ctrl_c_keeps_the_measured_cells(self) -> None:
        """An interrupted run returns a valid partial table, and leaves no process."""
        before = children()

        def interrupt(now: Progress) -> None:
            if now.passes >= 1:
                os.kill(os.getpid(), signal.SIGINT)

        with pytest.raises(Interrupted) as caught:
            measure(SMALL_PLAN, budget=AMPLE, width=1e-9, progress=interrupt)

        table = caught.value.table
        assert isinstance(caught.value, KeyboardInterrupt)
        assert not table.complete
        assert any(table.measured())
        assert not CostTable.from_json(table.to_json()).complete
        assert children() == before

    def test_ctrl_c_at_the_very_end(self, one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """An interrupt while the table is built loses no figures."""
        answers: list[Any] = [KeyboardInterrupt(), facts()]

        def interrupted_facts() -> dict[str, Any]:
            answer = answers.pop(0)
            if isinstance(answer, KeyboardInterrupt):
                raise answer
            return dict(answer)

        monkeypatch.setattr(machine, "facts", interrupted_facts)

        with pytest.raises(Interrupted) as caught:
            measure(SMALL_PLAN, budget=AMPLE, width=10)

        assert any(caught.value.table.measured())

    def test_an_exception_of_the_callers(self) -> None:
        """An exception of the progress function propagates, and no process stays."""
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
        """The cells of a child that dies have the reason, and the run goes on."""
        monkeypatch.setattr(measuring, "_START", code)

        table = measure(SMALL_PLAN, budget=AMPLE)

        assert not any(table.measured())
        assert all(why in reason for reason in whys_of(table))

    @pytest.mark.parametrize("executable", ["", None, "/nonexistent/python", "/"])
    def test_a_child_that_can_not_be_started(
        self, executable: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Cells have the reason why no process starts, and a measured step is the default one."""
        monkeypatch.setattr(sys, "executable", executable)
        recommendation._measured_once.cache_clear()

        table = measure(SMALL_PLAN)
        step = costs.measured_step()
        recommendation._measured_once.cache_clear()

        assert {why.partition(": ")[0] for why in whys_of(table)} == {
            "the measuring process cannot be started"
        }
        assert step == 2 * MiB

    def test_a_python_that_is_a_grandchild(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nothing is measured, with a reason, if sys.executable starts Python as its own child."""
        wrapper = tmp_path / "python"
        wrapper.write_text(f'#!/bin/sh\n"{sys.executable}" "$@"\nexit 0\n')
        wrapper.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(wrapper))

        table = measure(SMALL_PLAN)

        [why] = whys_of(table)
        assert f"process {os.getpid()} is not the parent" in why

    def test_no_thread_is_needed(self, one_pass: None, monkeypatch: pytest.MonkeyPatch) -> None:
        """Measuring starts no Python thread: under a limit it might hang."""

        def refused(*_: object) -> None:
            msg = "can't start new thread"
            raise RuntimeError(msg)

        monkeypatch.setattr(threading.Thread, "start", refused)

        table = measure(SMALL_PLAN, budget=AMPLE, width=10)

        assert any(table.measured())

    def test_modules_of_the_working_directory(
        self, one_pass: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Modules of the working directory are not imported, output of sitecustomize is ignored,
        and so are entries of sys.path that are not strings."""
        for name in ("json", "sys", "pickle", "pyreserve"):
            (tmp_path / f"{name}.py").write_text("raise SystemExit('not the one meant')")
        site = tmp_path / "site"
        site.mkdir()
        (site / "sitecustomize.py").write_text("print('hello'); print(5)")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PYTHONPATH", str(site))
        monkeypatch.setattr(sys, "path", [*filter(None, sys.path), tmp_path / "nothing"])

        table = measure(SMALL_PLAN, budget=AMPLE, width=10)

        assert {entry.why for entry in table.cells} == {None}

    def test_a_child_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A child that hangs is killed once the budget is spent."""
        monkeypatch.setattr(measuring, "_START", "import time; time.sleep(1000)")
        monkeypatch.setattr(measuring, "_GRACE", 0.2)
        before = children()

        measure(SMALL_PLAN, budget=0.3)

        assert children() == before

    def test_the_parent_that_dies(self) -> None:
        """A measuring process ends when its parent is killed."""
        printed = child_of(
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

        assert printed == [1, 0]

    @pytest.mark.heavy
    def test_too_few_addresses(self) -> None:
        """Under a small RLIMIT_AS cells that need more name it, and the rest is measured."""
        printed = child_of(
            """
            import json
            from pyreserve.costs import measure, plan
            table = measure(plan(only=["reserve"], full=True), budget=1000, width=10)
            print(json.dumps([[c.cell.nbytes, c.why] for c in table.cells
                              if c.cell.page_kind == table.cells[0].cell.page_kind]))
            """,
            ulimit="-v 400000",
        )

        why = dict(printed)
        assert why[PAGE_SIZE] is None
        assert why[MiB * 128] is None
        assert "RLIMIT_AS (ulimit -v) is 390.6 MiB" in why[GiB]
        assert "RLIMIT_AS" in why[136 * GiB]

    @pytest.mark.heavy
    def test_a_kernel_that_lacks_verbs(self, tmp_path: Path) -> None:
        """Cells that an old kernel refuses have the reason, dependent ones too; others go on."""
        shim = tmp_path / "old_kernel.so"
        source = Path(__file__).parents[1] / "c/old_kernel.c"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source], check=True)
        # Every interpreter imports it first, including the measuring child.
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

        printed = child_of(
            """
            import json
            from pyreserve import PAGE_SIZE
            from pyreserve.costs import measure, plan
            table = measure(plan(longest=PAGE_SIZE, details=True), budget=1000, width=10)
            print(json.dumps([[c.cell.verb, c.cell.method, c.why] for c in table.cells
                              if c.cell.page_kind == table.cells[0].cell.page_kind]))
            """,
            PYTHONPATH=os.pathsep.join([str(tmp_path), *filter(None, sys.path)]),
        )

        why = {(verb, method): why for verb, method, why in printed}
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
    if kind.why_not is None
]


class TestPrograms:
    @pytest.mark.parametrize("setting", SETTINGS, ids=str)
    def test_each_leaves_nothing(self, setting: Setting) -> None:
        """Each program returns samples of all its cells, and leaves no mapping and no child."""
        lengths = [setting.unit, 2 * setting.unit]
        programs = list(write(setting, tuple(SCRIPTS), lengths))
        before, pids = proc.map_count(), children()

        for program in programs:
            samples = run(program, 2)

            assert len(samples) == len(program.cells)
            assert all(len(values) >= 2 * setting.threads for values in samples)

        assert len(programs) > 5
        assert abs(proc.map_count() - before) < 10  # the interpreter's own mappings vary
        assert children() == pids

    def test_untimed_cells_stay_untimed(self) -> None:
        """A program that times only some verbs still does all its steps."""
        (life,) = write(SINGLE, ("life",), [PAGE_SIZE])

        timed = life.timing_only(frozenset({"discard"}))

        assert [step.verb for step in timed.steps] == [step.verb for step in life.steps]
        assert {cell.verb for cell in timed.cells} == {"discard"}
        assert len(run(timed, 1)) == 2

    def test_sizes_between_huge_pages(self) -> None:
        """Pieces of a smaller transparent page are placed so that the next larger cannot fit."""
        kind = PageKind("64KiB", 64 * KiB, "transparent", next_size=2 * MiB)
        setting = Setting(kind, "charge", 1)

        programs = list(write(setting, ("life",), [64 * KiB, 2 * MiB, 8 * MiB]))

        assert [program.piece for program in programs] == [64 * KiB, 2 * MiB]
        for program in programs:
            first = program.phase + min(step.offset for step in program.steps if step.cell)
            assert program.align == 4 * MiB
            assert first % (128 * KiB) == 64 * KiB
            whole = -(-first // (2 * MiB)) * 2 * MiB
            assert whole + 2 * MiB > first + program.piece


class TestMachine:
    def test_its_facts(self) -> None:
        """The facts can be written as JSON, and agree with those of the os module."""
        known = facts()

        assert json.loads(json.dumps(known)) == known
        assert known["cpus"] == len(os.sched_getaffinity(0))
        assert known["kernel"] == os.uname().release
        assert known["page_size"] == resource.getpagesize()
        assert known["memory"] == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert known["virtualised"]
