"""Several machines side by side."""

import json
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from helpers import costs_tables
from helpers.costs_tables import COMPARED, LOUD, QUIET, USUAL, line
from pyreserve import PAGE_SIZE, GiB, KiB
from pyreserve.costs import CostTable, Curve, Machines, side_by_side
from pyreserve.costs.machines import Row

TOUCH, COMMIT = Curve("touch", "write"), Curve("commit", "mprotect")


def machine(factor: float = 1.0, seed: int = 0, *, commit: float = 700, **facts: Any) -> CostTable:
    """A machine on which a touch costs `factor` times the usual, and a commit `commit` ns."""
    costs = USUAL | {TOUCH: line(0, 500 * factor), COMMIT: line(commit, 0)}
    table = costs_tables.table(costs, lengths=COMPARED, seed=seed)
    return CostTable({**table.machine, **facts}, table.cells, QUIET, table.seconds)


def row(rows: tuple[Row, ...], name: str) -> Row:
    """The row of this name."""
    [found] = [row for row in rows if row.name == name]
    return found


def text_lines(machines: Machines) -> list[list[str]]:
    """The words of each line of the text."""
    return [line.split() for line in str(machines).splitlines()]


class TestFacts:
    def test_those_that_differ(self) -> None:
        """The facts that differ are marked, each with the text of every machine."""
        machines = side_by_side(
            {"a": machine(), "b": machine(kernel="6.8.0"), "c": machine(memory=64 * GiB)}
        )

        assert {fact.name for fact in machines.facts if fact.differs} == {"kernel", "memory_bytes"}
        assert row(machines.facts, "kernel").texts == ("6.1.0", "6.8.0", "6.1.0")
        assert row(machines.facts, "memory_bytes").texts == ("16 GiB", "16 GiB", "64 GiB")
        assert ["memory", "16", "GiB", "16", "GiB", "64", "GiB"] in text_lines(machines)

    def test_some_kib_of_memory_are_no_difference(self) -> None:
        """Machines of the same size agree, though their kernels keep a little for themselves."""
        machines = side_by_side({"a": machine(), "b": machine(memory=16 * GiB + 8 * KiB)})

        assert not row(machines.facts, "memory_bytes").differs

    def test_huge_pages(self) -> None:
        """Of the sizes of huge pages those in use are listed."""
        used = {"65536": "never", "2097152": "madvise"}
        machines = side_by_side(
            {
                "a": machine(transparent_huge_pages=used),
                "b": machine(transparent_huge_pages={}),
                "c": machine(),
            }
        )

        texts = row(machines.facts, "transparent_huge_pages").texts
        assert texts == ("2 MiB madvise", "none", "unknown")


class TestVerdicts:
    def test_equal_machines_agree(self) -> None:
        """Machines whose costs differ by noise have the same verdicts."""
        machines = side_by_side({"a": machine(), "b": machine(1.01, seed=1)})

        assert not any(verdict.differs for verdict in machines.verdicts)
        assert "agree on: commit, grow, grow huge, used again at once," in str(machines)

    def test_others_differ(self) -> None:
        """A cheap touch needs a longer growth step for the same share."""
        machines = side_by_side({"a": machine(), "b": machine(0.1)})

        assert row(machines.verdicts, "grow").texts == ("256 KiB", "2 MiB")
        assert row(machines.verdicts, "grow").differs
        assert ["grow", "256", "KiB", "2", "MiB"] in text_lines(machines)

    def test_ties_agree(self) -> None:
        """A best method that is at most 10 % faster than the other machine's is no difference."""
        a = machine()
        b = machine(commit=1280)  # 7 % slower than mmap(MAP_FIXED)
        c = machine(commit=1900)

        close, apart = side_by_side({"a": a, "b": b}), side_by_side({"a": a, "c": c})

        texts = ("mprotect", "mmap(MAP_FIXED)")
        assert row(close.verdicts, "commit").texts == texts
        assert not row(close.verdicts, "commit").differs
        assert set(row(close.verdicts, "commit").groups) == {"mprotect or mmap(MAP_FIXED)"}
        assert row(apart.verdicts, "commit").texts == texts
        assert row(apart.verdicts, "commit").differs

    def test_an_unknown_one_contradicts_nothing(self) -> None:
        """A machine that can't tell does not differ; a question that none answers has no row."""
        touch_only = costs_tables.table({TOUCH: line(0, 100)})
        machines = side_by_side({"a": machine(), "b": touch_only})

        assert row(machines.verdicts, "grow").texts == ("256 KiB", "can't tell")
        assert not row(machines.verdicts, "grow").differs
        alone = side_by_side({"a": touch_only, "b": touch_only})
        assert {verdict.name for verdict in alone.verdicts} == {"huge-pages"}


class TestCosts:
    def test_the_cells_that_differ(self) -> None:
        """A curve whose intervals do not overlap has a row, with a ratio below the medians'."""
        machines = side_by_side({"a": machine(), "b": machine(3.0), "c": machine(seed=1)})

        [spread] = machines.cells
        assert Curve.of(spread.cell) == TOUCH
        assert 2.7 < spread.at_least < 3.0
        assert machines.common == len(machine().cells)

    def test_wide_intervals_hide_differences(self) -> None:
        """A difference inside the intervals has no row."""
        tables = {
            str(seed): costs_tables.table({TOUCH: line(0, 100)}, jitter=1.0, seed=seed)
            for seed in range(2)
        }

        assert side_by_side(tables).cells == ()

    def test_cells_of_some_machines(self) -> None:
        """A cell that one machine has not measured is compared on the others."""
        tables = {
            "a": costs_tables.table({TOUCH: line(0, 100)}),
            "b": costs_tables.table({TOUCH: line(0, 200), COMMIT: line(9, 0)}),
            "c": costs_tables.table({COMMIT: line(900, 0)}),
        }

        machines = side_by_side(tables)

        assert machines.common == 0
        assert {spread.cell.verb for spread in machines.cells} == {"touch", "commit"}
        [touch] = [spread for spread in machines.cells if spread.cell.verb == "touch"]
        assert [times is None for times in touch.times] == [False, False, True]

    def test_a_busy_machine_is_named(self) -> None:
        """The reason why a machine's costs are doubtful is in the text."""
        busy = costs_tables.table({TOUCH: line(0, 100)}, noise=LOUD)

        machines = side_by_side({"quiet": machine(), "busy": busy})

        assert set(machines.disturbed) == {"busy"}
        assert "doubtful: busy: other processes kept 1.9 CPUs busy." in str(machines)


class TestReport:
    def test_many_machines_are_grouped(self) -> None:
        """Of 12 machines those that agree share a line with all of their answers."""
        tables = {f"node{i}": machine(1 / (1 + i % 2), i) for i in range(8)}
        tables |= {f"old{i}": machine(0.1, kernel="5.15") for i in range(4)}

        lines = text_lines(side_by_side(tables))

        eight, four = ([f"{name}{i}," for i in range(n)] for name, n in (("node", 8), ("old", 4)))
        eight[-1], four[-1] = "node7", "old3"
        assert ["kernel", "6.1.0", "8:", *eight] in lines
        assert ["5.15", "4:", *four] in lines
        assert ["grow", "256", "KiB", "or", "512", "KiB", "8:", *eight] in lines

    def test_as_data(self) -> None:
        """The data have each machine's facts, verdicts and medians under its name."""
        machines = side_by_side({"a": machine(), "b": machine(3.0, kernel="6.8.0")})

        found = json.loads(json.dumps(machines.to_dict()))

        assert (found["schema"], found["machines"]) == (1, ["a", "b"])
        [kernel] = [fact for fact in found["facts"] if fact["name"] == "kernel"]
        assert kernel["differs"]
        assert kernel["machines"]["b"] == {"text": "6.8.0", "value": "6.8.0"}
        [cell] = found["cells"]
        assert cell["verb"] == "touch"
        assert cell["median_ns"]["b"] / cell["median_ns"]["a"] == pytest.approx(3, rel=0.05)
        assert found["common_cells"] == machines.common

    def test_html_is_escaped(self) -> None:
        """HTML is well-formed and has no tag of a machine's facts or name."""
        hostile = "<script>&\u202e"
        thp = {hostile: [hostile], "-1": None}

        machines = side_by_side(
            {hostile: machine(cpu=hostile), "b": machine(transparent_huge_pages=thp)}
        )

        document = ET.fromstring(machines._repr_html_())
        assert document.find(".//script") is None
        assert "\u202e" not in "".join(document.itertext())

    def test_equal_machines(self) -> None:
        """Machines that agree in everything have no tables."""
        machines = side_by_side({"a": machine(), "b": machine()})

        assert machines.tables() == {}
        assert "The same on all: 6 facts." in str(machines)

    def test_one_machine_is_refused(self) -> None:
        """A comparison needs two machines."""
        with pytest.raises(ValueError, match="two or more machines, got 1"):
            side_by_side({"a": machine()})

    def test_the_page_size_is_a_fact(self) -> None:
        """Machines with OS pages of other sizes differ in it."""
        other = 4 * PAGE_SIZE
        machines = side_by_side({"a": machine(page_size=PAGE_SIZE), "b": machine(page_size=other)})

        assert row(machines.facts, "page_size_bytes").values == (PAGE_SIZE, other)
