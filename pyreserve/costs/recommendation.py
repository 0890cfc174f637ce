"""Verdicts: the answers that measured costs give, with their figures and their certainty.

Alternatives are compared by the ratio of their costs within each pass: a verdict is sure if the
95 % interval of the median ratio decides it, or shows that no alternative is over 10 % faster.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from pyreserve._system.report import Report
from pyreserve.costs.measuring import ONE_AT_A_TIME, measure
from pyreserve.costs.planning import BLOCK, HUGE, plan
from pyreserve.costs.stats import ENOUGH, Interval, over_passes
from pyreserve.costs.table import CostTable
from pyreserve.costs.text import UNKNOWN, time_text
from pyreserve.costs.ways import (
    SITUATIONS,
    PassCosts,
    PassTimes,
    Situation,
    WayCosts,
    ratio,
    way_costs,
)
from pyreserve.errors import OutOfMemoryError
from pyreserve.units import MiB, format_size, parse_size

_NEAR = 1.1  # a ratio up to which a difference does not matter
_EQUAL = 1.05  # a ratio up to which the order of the alternatives decides
_SHARE = 0.05  # a growth call may cost this share of touching the memory
_LONGEST_STEP = 64 * MiB
_BECAME_HUGE = 0.9  # share of the pieces that must have become huge pages
_DEFAULT_STEP = 2 * MiB
_BUDGET, _STEP_BUDGET = 10.0, 2.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to one question.

    Attributes:
        question: the question, with its question mark.
        text: the answer in words; if it is not known, why, and what to try.
        figures: the figures that it is based on, in words.
        sure: whether the run decides it.
        value: the recommended method or figure; None if the run does not decide it.
        as_good: the other methods that are at most 10 % slower.
    """

    question: str
    text: str
    figures: str
    sure: bool
    value: str | int | None
    as_good: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.question} {self.text}." + (f" {self.figures}." if self.figures else "")

    def _repr_html_(self) -> str:
        return Report(self.question, tuple(filter(None, (self.text, self.figures)))).html()


@dataclass(frozen=True, slots=True)
class Recommendations:
    """The verdicts for the machine that was measured.

    ``str()`` gives the questions with their answers, in a notebook as HTML.

    Attributes:
        by_name: the verdicts by name, in the order of the screen: ``commit``, ``grow``,
            ``used-again-at-once``, ``may-be-used-again``, ``not-used-again``, each of these four
            also with ``-huge`` for huge pages, ``huge-pages``, ``populate`` and ``fork``.
        ways: the table of ways to give memory back.
    """

    by_name: Mapping[str, Verdict]
    ways: tuple[WayCosts, ...]

    def verdicts(self) -> dict[str, Verdict]:
        """Return the verdicts by name."""
        return dict(self.by_name)

    def __getitem__(self, name: str) -> Verdict:
        """Return a verdict by name."""
        return self.by_name[name]

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        return Report("Verdicts", tuple(str(verdict) for verdict in self.by_name.values()))

    def to_dict(self) -> dict[str, Any]:
        """Return the part of the JSON of ``pyreserve costs --json``."""
        return {
            "verdicts": {
                name: {
                    "question": verdict.question,
                    "text": verdict.text,
                    "figures": verdict.figures,
                    "sure": verdict.sure,
                    "value": verdict.value,
                    "as_good": list(verdict.as_good),
                }
                for name, verdict in self.by_name.items()
            },
            "ways": [row.to_dict() for row in self.ways],
        }


def recommend(table: CostTable | None = None) -> Recommendations:
    """Return the verdicts for the measured machine.

    Args:
        table: the measured costs, such as ``CostTable.load("costs.json")``. None: those of a
            measurement of at most ten seconds, which each process makes once.

    Raises:
        OutOfMemoryError: there is not enough memory to measure.
    """
    if table is None:
        table = _measured(None, _BUDGET)
    return Recommendations(dict(_Judge(table).verdicts()), tuple(way_costs(table)))


def measured_step(*, huge_pages: bool = False) -> int:
    """Return the growth step that suits this machine, in bytes, for the argument ``step``.

    For example ``BumpArena("64MiB", step=pyreserve.costs.measured_step())``. It is the value of the
    verdict ``grow`` of a measurement of at most two seconds, which each process makes once by
    starting ``sys.executable``. If the run does not decide it or memory is short, it is 2 MiB.

    Args:
        huge_pages: whether the memory is backed with transparent huge pages; then the step is the
            value of ``grow-huge``.
    """
    try:
        table = _measured(("grow", "touch"), _STEP_BUDGET)
    except OutOfMemoryError:
        return _DEFAULT_STEP
    step = recommend(table)["grow-huge" if huge_pages else "grow"].value
    return step if isinstance(step, int) else _DEFAULT_STEP


def _measured(verbs: tuple[str, ...] | None, budget: float) -> CostTable:
    with ONE_AT_A_TIME:
        return _measured_once(verbs, budget)


@cache
def _measured_once(verbs: tuple[str, ...] | None, budget: float) -> CostTable:
    return measure(plan(only=verbs), budget=budget)


@dataclass(frozen=True, slots=True)
class _Choice:
    """The cheapest of some alternatives, or the first of those that cost the same.

    `ratios` are the costs of the others over its own.
    """

    best: str
    cost: Interval
    ratios: dict[str, Interval]

    @property
    def sure(self) -> bool:
        return all(ratio.low >= 1 / _NEAR for ratio in self.ratios.values())

    @property
    def near(self) -> list[str]:
        """The others that are not over 10 % slower: no difference that matters."""
        return [name for name, ratio in self.ratios.items() if ratio.high <= _NEAR]

    @property
    def text(self) -> str:
        return self.best + (f" (as good: {', '.join(self.near)})" if self.near else "")

    @property
    def figures(self) -> str:
        others = (f"{name} {_times(ratio)}" for name, ratio in self.ratios.items())
        return ", ".join((f"{self.best} {time_text(self.cost)}", *others))


def _choose(costs: Mapping[str, PassCosts]) -> _Choice:
    """Choose between alternatives, the preferred one first.

    Raises:
        LookupError: no pass has them all.
    """
    medians = {name: over_passes(values).median for name, values in costs.items()}
    fastest = min(medians, key=lambda name: medians[name])
    over = {name: ratio(costs[name], costs[fastest]) for name in costs}
    equal = (name for name, r in over.items() if r.median <= _EQUAL and r.high <= _NEAR)
    best = next(equal, fastest)
    ratios = {name: ratio(costs[name], costs[best]) for name in costs if name != best}
    return _Choice(best, over_passes(costs[best]), ratios)


def _times(factor: Interval) -> str:
    if not factor.known:
        return UNKNOWN
    return f"{factor.median:,.0f} times" if factor.median >= 100 else f"{factor.median:.3g} times"


def _percent(share: float) -> str:
    return f"{max(0.1, 100 * share) if share else 0:.2g} %"


def _part(share: Interval) -> str:
    """Return a share under 1; where its interval is too wide, a round one above it."""
    if share.known:
        return _percent(share.median)
    return "half" if share.high <= 1 / 2 else "nine tenths"


def _pages(kind: str) -> str:
    return f"{format_size(parse_size(kind))} pages"


class _Judge:
    """Answers the questions from one table."""

    def __init__(self, table: CostTable) -> None:
        self._table, self._times = table, PassTimes(table)

    def verdicts(self) -> Iterator[tuple[str, Verdict]]:
        """Yield each verdict with its name."""
        kinds = {"": self._times.small, "-huge": self._times.huge}
        by_suffix = {suffix: kind for suffix, kind in kinds.items() if kind is not None}
        yield "commit", self._answer("How to commit memory?", self._commit)
        for suffix, kind in by_suffix.items():
            question = "How to grow, and by how much?"
            yield f"grow{suffix}", self._answer(question, partial(self._grow, kind))
        for situation in SITUATIONS:
            for suffix, kind in by_suffix.items():
                answer = partial(self._give_back, situation, kind)
                yield f"{situation.name}{suffix}", self._answer(situation.question, answer)
        question = "Do huge pages pay, now, on this machine?"
        yield "huge-pages", self._answer(question, self._huge_pages)
        yield "populate", self._answer("Populate memory, or touch it?", self._populate)
        yield "fork", self._answer("Fork with the memory, or without?", self._fork)

    def _answer(
        self, question: str, answer: Callable[[], tuple[str, str, str | int | _Choice | None]]
    ) -> Verdict:
        """Return the verdict of a function that returns text, figures and value or choice.

        Without a value the run does not decide the question: the text is the reason, if known.
        """
        try:
            text, figures, choice = answer()
        except LookupError as error:
            text, figures, choice = str(error.args[0]), "", None
        as_good = tuple(choice.near) if isinstance(choice, _Choice) else ()
        value = choice.best if isinstance(choice, _Choice) else choice
        if value is None:
            text = f"can't tell from this run: {text or self._why()}, {self._advice()}"
            figures = "" if UNKNOWN in figures else figures
        return Verdict(question, text, figures, value is not None, value, as_good)

    def _why(self) -> str:
        passes = max((e.times.passes for e in self._table.cells if e.times), default=0)
        if passes < ENOUGH:
            count = {0: "no pass", 1: "a single pass"}.get(passes, f"only {passes} passes")
            return f"{count} of the {ENOUGH} that an interval needs"
        return self._table.disturbed or "the samples spread too widely"

    def _advice(self) -> str:
        return f"try --budget {max(60, 60 * math.ceil(self._table.seconds / 45))}"

    def _commit(self) -> tuple[str, str, _Choice | None]:
        times = self._times
        choice = _choose(
            {
                "mprotect": times.of(times.cell("commit", "mprotect", BLOCK)),
                "mmap(MAP_FIXED)": times.of(times.cell("commit", "mmap-fixed", BLOCK)),
            }
        )
        figures = f"{format_size(BLOCK * times.page)}: {choice.figures}"
        return (choice.text, figures, choice) if choice.sure else ("", figures, None)

    def _grow(self, kind: str) -> tuple[str, str, int | None]:
        """Return the step from which calls cost under 5 % of touching, in bytes."""
        times = self._times
        pages = times.nbytes(kind) // times.page
        grow, touch = (
            times.of(times.cell(verb, method, pages, kind))
            for verb, method in (("grow", "mprotect"), ("touch", "write"))
        )
        share = ratio(grow, touch)
        least = Interval(*(value / _SHARE * pages * times.page for value in share))
        step = self._step(least.median, kind)
        text, length = "", format_size(pages * times.page)
        figures = f"{length}: mprotect {time_text(over_passes(grow))}"
        if kind == times.small:
            other = times.of(times.cell("grow", "mmap-fixed", pages))
            choice = _choose({"mprotect": grow, "mmap(MAP_FIXED)": other})
            if not choice.sure:
                return "", f"{length}: {choice.figures}", None
            text, figures = f"{choice.text}, ", f"{length}: {choice.figures}"
        figures += f", touching {time_text(over_passes(touch))}"
        if not 0 < least.low <= least.high <= 2 * step <= 2 * _LONGEST_STEP:
            return "", figures, None
        text += f"by {format_size(step)} or more of {_pages(kind)}"
        if kind != times.small:
            text += f" that end on multiples of {format_size(parse_size(kind))}"
        return f"{text}: calls then cost under 5 % of touching", figures, step

    def _step(self, least: float, kind: str) -> int:
        """Return the smallest step of at least `least` bytes: a power of two times a page."""
        step = parse_size(kind)
        while step < least and step <= _LONGEST_STEP:
            step *= 2
        return step

    def _give_back(self, situation: Situation, kind: str) -> tuple[str, str, _Choice | None]:
        times = self._times
        choice = _choose(
            {way.name: times.of_way(way, kind, situation.again) for way in situation.candidates()}
        )
        figures = f"{format_size(times.nbytes(kind))} of {_pages(kind)}: {choice.figures}"
        if not choice.sure:
            return "", figures, None
        return f"{_pages(kind)}: {choice.text}", figures, choice

    def _huge_pages(self) -> tuple[str, str, str | None]:
        times, table = self._times, self._table
        if times.huge is None:
            return "no: this machine has no transparent huge pages", "", "no"
        cell = times.cell("touch", "write", HUGE, times.huge)
        why = next((e.why for e in table.cells if e.cell == cell and e.times is None), None)
        state = table.machine.get("huge_pages") or {}
        tried, got = state.get("tried", 0), state.get("got", 0)
        size = format_size(parse_size(times.huge))
        figures = f"{got} of {tried} pieces became huge" if tried else ""
        if state.get("free_bytes"):
            share = min(1.0, state.get("free_bytes_in_huge_blocks", 0) / state["free_bytes"])
            figures += f", {_percent(share)} of free memory is in blocks of {size} or more"
        if why is not None and not (tried and got):
            return f"no: {why}", figures, "no"
        small = times.of(times.cell("touch", "write", HUGE))
        huge = times.of(cell)
        share = ratio(huge, small)
        figures = (
            f"touching {size} takes {time_text(over_passes(small))} in small pages, "
            f"{time_text(over_passes(huge))} in a huge one; {figures}"
        )
        if tried and got < _BECAME_HUGE * tried:
            return f"not now: {got} of {tried} pieces became huge pages", figures, "no"
        if share.high <= 1 / _NEAR:
            return f"yes, where over {_part(share)} of each {size} is used", figures, "yes"
        if share.low >= 1 / _NEAR:
            return "no: the first touch is no faster", figures, "no"
        return "", figures, None

    def _populate(self) -> tuple[str, str, _Choice | None]:
        times = self._times
        costs = {
            "touch": times.of(times.cell("touch", "write", BLOCK)),
            "populate": times.of(times.cell("populate", "madvise", BLOCK)),
        }
        choice = _choose(costs)
        figures = f"{format_size(BLOCK * times.page)}: {choice.figures}"
        if not choice.sure:
            return "", figures, None
        if choice.best == "touch":
            return f"touch{' (no difference that matters)' * bool(choice.near)}", figures, choice
        share = ratio(costs["populate"], costs["touch"])
        return f"populate, where over {_part(share)} of the pages are used", figures, choice

    def _fork(self) -> tuple[str, str, _Choice | None]:
        times = self._times
        fork, again = (
            times.cell(verb, method, HUGE)
            for verb, method in (("fork", "inherit"), ("retouch", "after-fork"))
        )
        choice = _choose(
            {
                "with": times.of(fork, again),
                "without": times.of(times.cell("fork", "dontfork", HUGE)),
            }
        )
        page = over_passes(times.cost([(again, 1 / HUGE)]))
        figures = (
            f"{format_size(HUGE * times.page)} touched: without "
            f"{time_text(over_passes(times.of(times.cell('fork', 'dontfork', HUGE))))}, with "
            f"{time_text(over_passes(times.of(fork)))} and {time_text(page)} for each page that is "
            "written while the child lives"
        )
        if not choice.sure:
            return "", figures, None
        if choice.best == "with":
            return "with: no difference that matters", figures, choice
        return "without (MADV_DONTFORK), where the child does not need it", figures, choice
