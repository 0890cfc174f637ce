"""Bystanders: what one thread's calls cost the others; windows, figures, table, and processes."""

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.subjects import wait_until
from helpers.witness import PATIENCE
from pyreserve import KiB, MiB
from pyreserve._system import proc
from pyreserve.costs import (
    BystanderCost,
    BystandersInterrupted,
    BystanderTable,
    FaultCost,
    Interval,
    ReaderCost,
    bystanders,
    measure_bystanders,
)
from pyreserve.costs.bystander_child import Case, Counts, Refused, evaluate, is_disturbed, run
from pyreserve.costs.bystanders import cases_of, counts_of

CPUS = sorted(os.sched_getaffinity(0))
two_cpus = pytest.mark.skipif(len(CPUS) < 2, reason="needs two CPUs")


def children() -> set[int]:
    """The PIDs of this process's children, including those not waited for."""
    tasks = Path("/proc/self/task")
    return {int(pid) for t in tasks.iterdir() for pid in (t / "children").read_text().split()}


def sample(work: int, lost: int = 0, wall: int = 1_000_000, **other: int) -> Counts:
    """Counts of a thread in a window, undisturbed unless `other` says otherwise."""
    counts = Counts(wall, wall, late=0, preemptions=0, work=work, lost=lost, longest=0)
    return counts._replace(**other)


def on_and_off(
    work: str, on: tuple[Counts, ...], off: tuple[Counts, ...], case: Case | None = None
) -> dict[str, float] | None:
    """The figures of one window with calls and one without."""
    case = case or Case("munmap", work=work)
    return evaluate(case, [on, off], [True, False], irq_apart=False)


class TestWindows:
    def test_a_spinner_loses_its_gaps(self) -> None:
        """100 calls that interrupt for 7 µs each: the caller waits 9 µs longer, 7 µs are lost."""
        on = sample(100, 1_100_000), sample(9000, 710_000)
        off = sample(500, 1_000_000), sample(30_000, 10_000)

        found = on_and_off("spin", on, off)

        assert found == pytest.approx({"alone": 2000, "added": 9000, "lost": 7000})

    def test_others_lose_work(self) -> None:
        """A bystander that works at half the rate loses half of the window to its calls."""
        on = sample(100, 1_100_000), sample(1000)
        off = sample(500, 1_000_000), sample(2000)

        found = on_and_off("read", on, off)

        assert found is not None
        assert found["lost"] == pytest.approx(5000)

    @pytest.mark.parametrize("thread", [0, 1])
    @pytest.mark.parametrize("what", [{"preemptions": 1}, {"late": 60_000}, {"cpu": 960_000}])
    def test_a_disturbed_window_is_dropped(self, thread: int, what: dict[str, int]) -> None:
        """A preempted, late or descheduled thread of either side removes the window."""
        window = [sample(100, 200_000), sample(1000)]
        assert not is_disturbed(Case("munmap"), window, irq_apart=False)
        window[thread] = sample(100, 200_000, **what)

        assert is_disturbed(Case("munmap"), window, irq_apart=False)
        assert on_and_off("spin", tuple(window), (sample(1), sample(1))) is None
        assert on_and_off("spin", (sample(1), sample(1)), tuple(window)) is None

    def test_cpu_time_without_interrupts(self) -> None:
        """Where the kernel accounts interrupts apart, less CPU time is no sign of preemption."""
        window = sample(100, 200_000), sample(1000, cpu=400_000)

        assert not is_disturbed(Case("munmap"), window, irq_apart=True)

    def test_waiting_for_a_lock_is_no_disturbance(self) -> None:
        """Threads that fault in the caller's mapping wait for its lock, which is measured."""
        window = sample(100, 200_000, cpu=400_000), sample(1000, cpu=400_000)

        assert not is_disturbed(Case("munmap", work="fault-shared"), window, irq_apart=False)
        assert not is_disturbed(Case("munmap", reader="maps"), window, irq_apart=False)
        assert is_disturbed(Case("munmap", work="fault-own"), window, irq_apart=False)

    def test_only_disturbed_windows_give_no_figure(self) -> None:
        """Without one undisturbed window of each kind there is no figure."""
        bad = sample(100, preemptions=1), sample(100)
        good = sample(100), sample(100)

        assert on_and_off("spin", bad, good) is None
        assert on_and_off("spin", good, bad) is None

    def test_a_reader_delays_few_loops_for_long(self) -> None:
        """With a reader the figures are means: 9 windows of 4 µs a loop and one that waits."""
        case = Case("munmap", bystanders=0, reader="smaps_rollup")
        quick, waits = (sample(100, wall=400_000),), (sample(100, wall=10_400_000),)
        windows = [quick] * 19 + [waits]

        found = evaluate(case, windows, [False] * 10 + [True] * 10, irq_apart=False)

        assert found == pytest.approx({"alone": 4000, "added": 10_000})

    def test_faults_without_a_caller(self) -> None:
        """Without a caller the figure is the time of a fault of each thread."""
        window = (sample(0, wall=0), sample(2000), sample(4000))

        found = on_and_off("", window, window, Case("", work="fault-own", bystanders=2))

        assert found == pytest.approx({"alone": 375})


class TestFigures:
    @pytest.mark.parametrize(
        ("cpus", "counts"), [(2, [1]), (3, [1, 2]), (4, [1, 3]), (6, [1, 3, 5]), (8, [1, 3, 7])]
    )
    def test_numbers_of_bystanders(self, cpus: int, counts: list[int]) -> None:
        """Bystanders double, and the last has one on each CPU but the caller's."""
        assert counts_of(cpus) == counts
        cases = cases_of(cpus, 2 * MiB)
        assert len(set(cases)) == len(cases)
        assert {c.bystanders for c in cases if c.call and c.work == "spin" and not c.reader} == set(
            counts
        )


def known(ns: float) -> Interval:
    return Interval(ns, ns * 0.95, ns * 1.05)


UNKNOWN = Interval(100.0, -50.0, 300.0)


def imagined(*calls: BystanderCost, **fields: Any) -> BystanderTable:
    """A table with a bare interrupt of 9 µs and 7 µs, and these calls."""
    bare = BystanderCost(
        "membarrier", 4096, "4KiB", "spin", 1, known(150), known(9000), known(7000), 1.0
    )
    return BystanderTable(2, (bare, *calls), windows=100, kept=90, **fields)


def row(added: Interval | None, lost: Interval | None, **fields: Any) -> BystanderCost:
    alone = BystanderCost("munmap", 4096, "4KiB", "spin", 1, known(2000), added, lost)
    return replace(alone, **fields)


class TestTable:
    def test_the_sentence(self) -> None:
        """A sentence gives both costs, in time and as multiples of a bare IPI."""
        table = imagined(row(known(18000), known(7000)))

        assert table.sentences() == [
            "membarrier, a bare IPI: each bystander costs the caller 9 µs and loses 7 µs.",
            "munmap, 1 page: each bystander costs the caller 18 µs (2.0 IPIs) and loses 7 µs "
            "(1.0 IPIs).",
        ]

    def test_several_bystanders(self) -> None:
        """What several bystanders add together is divided by their number."""
        many = row(known(18000), known(7000), bystanders=3)

        sentence = imagined(many).sentence(many)

        assert "each bystander costs the caller 6 µs and loses 7 µs" in sentence

    def test_unknown_figures_are_no_numbers(self) -> None:
        """What is not known is called so in the text, the tables and the JSON."""
        half, none = row(known(18000), UNKNOWN), row(UNKNOWN, None, nbytes=65536)
        table = imagined(half, none)
        text = str(table)

        assert "costs the caller 18 µs (2.0 IPIs) and loses an unknown time." in text
        assert "unknown" in text
        assert "16 pages" not in text
        assert "-50" not in text
        assert "300 ns" not in text
        found = table.to_dict()["calls"][1]
        assert (found["lost"]["ns"], found["lost_ipis"]) == (None, None)

    def test_a_busy_machine(self) -> None:
        """If nothing is known of a call, the text says so, why, and what to try."""
        table = BystanderTable(2, (row(UNKNOWN, UNKNOWN),), windows=100, kept=2)

        assert "2 of 100 windows count (2%)" in str(table)
        assert "Can't tell from this run what bystanders cost (munmap, 1 page)" in str(table)
        assert "a quieter machine" in str(table)

    def test_an_unsteady_machine(self) -> None:
        """A bare IPI that varies is reported, since it moves every other figure."""
        shaky = BystanderCost(
            "membarrier", 4096, "4KiB", "spin", 1, known(150), Interval(9000, 7000, 11000)
        )

        assert "a bare IPI varies by ±22%" in str(BystanderTable(2, (shaky,)))
        assert "varies" not in str(imagined())

    def test_without_counted_interrupts(self) -> None:
        """Where /proc/interrupts has no such lines, the text says that nothing is counted."""
        assert "interrupts are not counted" in str(imagined(counted=False))
        assert "not counted" not in str(imagined())

    def test_an_early_end(self) -> None:
        """If the measuring process dies early, its figures stay and the table has the reason."""
        text = str(imagined(why="the measuring process was ended by SIGKILL"))

        assert "ended early: the measuring process was ended by SIGKILL." in text
        assert "costs the caller 9 µs" in text

    def test_refused_calls(self) -> None:
        """A refused call is named with the reason."""
        refused = row(None, None, why="it was refused (ENOSYS: Function not implemented)")

        assert "Not measured (munmap, 1 page): it was refused (ENOSYS" in str(imagined(refused))

    def test_faults_and_readers(self) -> None:
        """Page faults of threads and readers of /proc have tables of their own."""
        table = imagined(
            faults=(FaultCost(2, "one", known(500)),),
            readers=(ReaderCost("maps", 0, known(1600), known(800)),),
        )
        text = str(table)

        assert "500 ns" in text
        assert "x1.5" in text
        assert "<table>" in table._repr_html_()


class TestRefusals:
    @pytest.mark.parametrize("budget", [0, -1, float("nan"), float("inf")])
    def test_a_budget_that_makes_no_sense(self, budget: float) -> None:
        """A budget is positive and finite."""
        with pytest.raises(ValueError, match="budget must be positive"):
            measure_bystanders(budget)

    def test_one_cpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On one CPU nothing is started, and a sentence says why there is no figure."""
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})

        table = measure_bystanders()

        assert table.calls == ()
        assert "can't be measured: this process may use one CPU alone" in str(table)
        assert table.to_dict()["why"] == table.why

    @two_cpus
    def test_too_little_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With little memory only cases that need none are measured; the others say why."""
        monkeypatch.setattr(proc, "available_bytes", lambda: 16 * MiB)

        table = measure_bystanders(0.5)

        assert {r.why for r in table.calls if r.work != "spin"} == {"it needs 64 MiB of memory"}
        assert {r.why for r in table.calls if r.work == "spin"} == {None}

    def test_a_refused_case(self) -> None:
        """A CPU that the process may not use is refused, and nothing is left."""
        before = children(), threading.active_count()

        with pytest.raises(Refused):
            run(Case("munmap"), [CPUS[0], 8191], [True])

        assert (children(), threading.active_count()) == before

    @two_cpus
    def test_a_child_that_cannot_start(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """If the measuring process cannot be started, the table says why."""
        monkeypatch.setattr(sys, "executable", "/nowhere/python")

        assert "cannot be started" in str(measure_bystanders(1).why)


def vm_size() -> int:
    return proc.status_kib()["VmSize"]


@two_cpus
class TestMeasuring:
    def test_the_shape(self) -> None:
        """Each call, length and number of bystanders has a row; nothing is left behind."""
        before = children()
        measure_bystanders(0.2)
        size = vm_size()

        table = measure_bystanders(4)

        assert table.complete
        assert table.why is None
        assert 0 <= table.kept <= table.windows
        assert table.windows > 0
        spinners = {(r.call, r.nbytes) for r in table.calls if r.page_kind == "4KiB"}
        lengths = (4 * KiB, 64 * KiB, 2 * MiB) if os.sysconf("SC_PAGE_SIZE") == 4 * KiB else ()
        assert spinners >= {(call, nbytes) for call in bystanders.CALLS for nbytes in lengths}
        assert ("membarrier", os.sysconf("SC_PAGE_SIZE")) in spinners
        assert {(r.threads, r.mapping) for r in table.faults} >= {(1, "own"), (2, "one")}
        assert [r.file for r in table.readers] == ["maps", "smaps_rollup"]
        assert str(table)
        assert children() == before
        assert vm_size() <= size + 1024

    def test_a_munmap_interrupts_a_running_bystander(self) -> None:
        """The TLB line of the bystander's CPU rises by at least one for each undisturbed call."""
        try:
            proc.interrupts()["TLB"]
        except (OSError, KeyError):
            pytest.skip("/proc/interrupts has no TLB line here")
        case, counted = Case("munmap"), False
        for _ in range(50):
            before = proc.interrupts()["TLB"][CPUS[1]]
            windows = run(case, CPUS[:2], [True] * 4)
            got = proc.interrupts()["TLB"][CPUS[1]] - before
            calls = sum(w[0].work for w in windows if not is_disturbed(case, w, irq_apart=False))
            assert got >= 0.95 * calls
            counted = counted or calls >= 20
        if not counted:
            pytest.skip("the machine was too busy: no undisturbed window in 50 runs")

    def test_several_bystanders(self) -> None:
        """Each bystander has counts of its own, even where they share a CPU."""
        windows = run(Case("munmap", bystanders=3), (CPUS[:2] * 2), [True, False])

        assert [len(window) for window in windows] == [4, 4]
        assert all(sample.work for window in windows for sample in window)

    def test_without_bystanders_nothing_is_interrupted(self) -> None:
        """Calls of a process without running threads do not interrupt the other CPU each time."""
        try:
            before = proc.interrupts()["TLB"][CPUS[1]]
        except (OSError, KeyError):
            pytest.skip("/proc/interrupts has no TLB line here")
        calls = quiet = 0
        for _ in range(5):
            before = proc.interrupts()["TLB"][CPUS[1]]
            windows = run(Case("munmap", bystanders=0), CPUS[:2], [False] * 8)
            calls = sum(w[0].work for w in windows)
            quiet += proc.interrupts()["TLB"][CPUS[1]] - before < calls / 2
        assert calls > 0
        assert quiet > 0

    def test_ctrl_c(self) -> None:
        """Ctrl-C keeps what was measured, and leaves no process."""
        before, calls = children(), 0

        def interrupt(_: float) -> None:
            nonlocal calls
            calls += 1
            if calls > 5:
                raise KeyboardInterrupt

        with pytest.raises(BystandersInterrupted) as caught:
            measure_bystanders(60, progress=interrupt)

        assert not caught.value.table.complete
        assert caught.value.table.windows > 0
        assert "interrupted" in str(caught.value.table)
        assert children() == before

    def test_a_killed_parent(self) -> None:
        """If the caller's process is killed, both measuring processes end."""
        code = "from pyreserve.costs import measure_bystanders; measure_bystanders(1000)"
        parent = subprocess.Popen([sys.executable, "-c", code])

        def below(pid: int) -> set[int]:
            try:
                tasks = list(Path(f"/proc/{pid}/task").iterdir())
                kids = {int(kid) for t in tasks for kid in (t / "children").read_text().split()}
            except OSError:
                return set()
            return kids.union(*map(below, kids))

        try:
            wait_until(lambda: len(below(parent.pid)) >= 2, "both processes")
            started = below(parent.pid)
        finally:
            parent.send_signal(signal.SIGKILL)
            parent.wait(PATIENCE)
        wait_until(lambda: all(map(_has_ended, started)), "the processes to end")


def _has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1] == "Z"
    except OSError:
        return True
