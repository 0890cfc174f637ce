"""What page faults cost, and what huge pages would save, by the cost model. Times in seconds."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import SMALL, page_kinds
from pyreserve.costs.faultlog import Fresh, Holding, Places
from pyreserve.costs.measuring import ONE_AT_A_TIME, measure
from pyreserve.costs.model import CostModel
from pyreserve.costs.planning import Group, Plan
from pyreserve.costs.programs import Program, Setting, Step
from pyreserve.costs.results import Measured
from pyreserve.costs.schema import FIGURES
from pyreserve.costs.stats import is_known
from pyreserve.costs.table import CostTable
from pyreserve.units import MiB, format_size, parse_size

BUDGET = 2.0
"""Limit of the measurement that a process makes, in seconds."""

_WIDTH = 0.05
_PIECE, _SMALL, _LARGE = 2 * MiB, 4 * MiB, 32 * MiB
_FEW_PASSES = 4
_WIDENED = 1.25  # factor to either side of the range of few passes
NEGLIGIBLE = 0.01
"""Share of a block's time below which a figure needs no interval."""


class Span(NamedTuple):
    """A time with its interval; `low` <= `value` <= `high`."""

    low: float
    value: float
    high: float

    def plus(self, other: "Span") -> "Span":
        """Return the sum."""
        return Span(*(a + b for a, b in zip(self, other, strict=True)))

    def minus(self, other: "Span") -> "Span":
        """Return the difference of independent times: the interval's ends add up as squares."""
        value = self.value - other.value
        below = math.hypot(self.value - self.low, other.high - other.value)
        above = math.hypot(self.high - self.value, other.value - other.low)
        return Span(value - below, value, value + above)

    def times(self, factor: float) -> "Span":
        """Return the product with a factor that is not negative."""
        return Span(*(factor * a for a in self))

    def within(self, low: float, high: float) -> "Span":
        """Return the span cut to [low, high]."""
        return Span(*(min(max(a, low), high) for a in self))


NOTHING = Span(0.0, 0.0, 0.0)


class Figure(NamedTuple):
    """An estimate in seconds, or why there is none.

    Attributes:
        seconds: the estimate; None if it is unknown.
        low, high: its interval; also an unknown figure is not above `high`.
        why: why it is unknown.
    """

    seconds: float | None
    low: float
    high: float
    why: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; times in seconds."""
        return {
            "seconds": self.seconds,
            "low_seconds": self.low,
            "high_seconds": self.high,
            "why": self.why,
        }

    @classmethod
    def of(cls, span: Span, time: float, reasons: list[str]) -> "Figure":
        """Return the figure of a span: unknown if the span is wide and not a small part of `time`.

        Args:
            span: the estimate.
            time: the time of the block that the figure is compared with, in seconds.
            reasons: why the interval is wide, the main reason first.
        """
        known = is_known((span.low, span.high)) or span.high <= NEGLIGIBLE * time
        if known:
            return cls(span.value, span.low, span.high, None)
        why = "; ".join(reasons) or "the measured costs vary too much, the machine may be busy"
        return cls(None, span.low, span.high, why)


class Counts(NamedTuple):
    """The facts of a block of code that estimates rest on.

    Attributes:
        faults: all page faults.
        system: system time in seconds, the limit of each estimate.
        time: the longer of the wall and the CPU time, in seconds.
        before, after: this process's memory; None if it cannot be read.
        machine_huge: huge-page faults of the whole machine; None if not known.
        places: where faults fell; None if they were not recorded.
        no_places: why not.
        huge_page: bytes of a huge page of this machine.
    """

    faults: int
    system: float
    time: float
    before: Holding | None
    after: Holding | None
    machine_huge: int | None
    places: Places | None
    no_places: str
    huge_page: int


class Prices:
    """The prices of faults by a cost model."""

    def __init__(self, model: CostModel) -> None:
        sizes = {
            parse_size(curve.page_kind): curve.page_kind
            for curve in model.fits
            if curve.verb == "touch"
        }
        self._model, self._kinds = model, sizes
        self._cache: dict[tuple[str, str, str, int], Span] = {}

    def _span(self, verb: str, method: str, kind: str, length: float) -> Span:
        """Return the seconds of one OS page in a piece of about `length` bytes.

        Raises:
            LookupError: it was not measured.
        """
        # Lengths that were measured, in steps of two: there may be thousands of mappings.
        exponent = min(max(round(length), _SMALL), _LARGE).bit_length() - 1
        key = verb, method, kind, exponent
        if key not in self._cache:
            nbytes = 1 << exponent
            ns = self._model.estimate(verb, method=method, nbytes=nbytes, page_kind=kind)
            scale = PAGE_SIZE / nbytes / 1e9
            self._cache[key] = Span(ns.low * scale, float(ns) * scale, ns.high * scale)
        return self._cache[key]

    def touch(self, pages: float, length: float) -> Span:
        """Return the seconds of first touches of small pages in a piece of a length in bytes."""
        return self._span("touch", "write", SMALL, length).times(pages)

    def touch_huge(self, huge_pages: float, huge_page: int, length: float) -> Span:
        """Return the seconds of first touches of huge pages.

        Raises:
            LookupError: huge pages of this size were not measured.
        """
        kind = self._kinds.get(huge_page)
        if kind is None:
            msg = f"the costs of huge pages of {format_size(huge_page)} were not measured"
            raise LookupError(msg)
        pages = huge_pages * huge_page / PAGE_SIZE
        return self._span("touch", "write", kind, length).times(pages)

    def read(self, faults: float) -> Span:
        """Return the seconds of faults that allocate nothing; zero if they were not measured."""
        try:
            return self._span("touch", "read", SMALL, _SMALL).times(faults)
        except LookupError:
            return NOTHING

    def given_back(self, pages: float, huge_page: int) -> Span:
        """Return what giving pages back costs more in small pages than in huge ones."""
        kind = self._kinds.get(huge_page, "")
        try:
            small = self._span("release", "piece", SMALL, _SMALL)
            huge = self._span("release", "piece", kind, _SMALL)
        except LookupError:
            return NOTHING
        return small.minus(huge).within(0, math.inf).times(pages)


class _Division(NamedTuple):
    """The faults by what they were. `weight`: the number of faults that a sample stands for."""

    weight: float
    fresh: float
    small: float
    other: float
    unknown: float


def _divide(counts: Counts, period: int) -> _Division:
    places = counts.places
    if places is None:
        known = 0.0
        if counts.before and counts.after:
            known = min(counts.faults, max(0.0, counts.after.hugeable - counts.before.hugeable))
        return _Division(1.0, known, 0.0, 0.0, counts.faults - known)
    samples = places.samples
    # The kernel does not record all faults where it may not look, nor the last few of each CPU.
    recorded = samples * period
    complete = recorded >= 0.9 * counts.faults - 2 * period
    weight = counts.faults / samples if samples and complete else float(period)
    fresh = sum(mapping.faults(weight) for mapping in places.fresh)
    small, other = weight * places.small, weight * places.other
    return _Division(weight, fresh, small, other, max(0.0, counts.faults - fresh - small - other))


def cost(counts: Counts, prices: Prices, period: int) -> Figure:
    """Return what the faults cost.

    Raises:
        LookupError: first touches were not measured.
    """
    parts = _divide(counts, period)
    span, reasons = _cost(counts, parts, prices)
    return Figure.of(span.within(0, counts.system), counts.time, reasons)


def _cost(counts: Counts, parts: _Division, prices: Prices) -> tuple[Span, list[str]]:
    """Return the cost, which may exceed the system time, and why its interval is wide."""
    anonymous = parts.fresh + parts.small
    span = prices.touch(parts.fresh, _LARGE).plus(prices.touch(parts.small, _SMALL))
    # Faults that may be file-backed cost at least a fault that allocates nothing, at most all.
    uncertain = parts.other + parts.unknown
    least, most = prices.read(uncertain), prices.touch(uncertain, _SMALL)
    highest = math.inf if uncertain > 0.01 * counts.faults else most.high
    span = span.plus(Span(min(least.low, most.low), most.value, highest))
    grown = counts.after.huge - counts.before.huge if counts.before and counts.after else 0
    fewest = min(counts.faults, max(0, grown * PAGE_SIZE // counts.huge_page))
    most_huge = counts.faults if counts.machine_huge is None else counts.machine_huge
    most_huge = max(fewest, min(most_huge, math.ceil(anonymous + parts.unknown)))
    if most_huge:
        size = counts.huge_page
        try:
            least, most = (prices.touch_huge(n, size, n * size) for n in (fewest, most_huge))
        except LookupError:
            least, most = NOTHING, Span(0, 0, math.inf)
        span = span.plus(Span(least.low, least.value, most.high))
    reasons: list[str] = []
    if most_huge > 2 * fewest and most_huge > 0.01 * counts.faults:
        reasons.append(
            f"{fewest:,} to {most_huge:,} of the faults were for huge pages: the kernel counts "
            "them for the whole machine only"
        )
    if parts.other > 0.1 * counts.faults:
        reasons.append(
            f"{parts.other / counts.faults:.0%} of the faults were in file-backed or shared "
            "memory, whose cost is not measured"
        )
    return span, reasons + _why_unknown(counts, parts)


def saving(counts: Counts, prices: Prices, period: int) -> Figure:
    """Return what huge pages would have saved.

    Raises:
        LookupError: first touches of small or huge pages were not measured.
    """
    parts, size = _divide(counts, period), counts.huge_page
    per_huge = size // PAGE_SIZE
    span, sparse = NOTHING, False
    if counts.places is not None:
        for mapping in counts.places.fresh:
            # A huge page with a single sample may be one of many that were hardly touched.
            sure, all_of_it = (
                _saved(mapping, parts.weight, size, prices, least).within(0, math.inf)
                for least in (2, 1)
            )
            span = span.plus(all_of_it._replace(low=min(sure.low, all_of_it.low)))
            sparse = sparse or 2 * sure.low < all_of_it.low
    elif parts.fresh and counts.before and counts.after:
        slots = max(counts.after.slots, 1)
        small = prices.touch(parts.fresh, parts.fresh * PAGE_SIZE)
        counted = parts.fresh / per_huge, min(slots, parts.fresh)
        few, many = (prices.touch_huge(n, size, _LARGE) for n in counted)
        span = Span(small.low - many.high, small.value - few.value, small.high - few.low)
        span = span.within(0, math.inf)
    # Memory that came and went was also given back, which is cheaper in huge pages.
    grown = counts.after.small - counts.before.small if counts.before and counts.after else 0.0
    if counts.places is not None and counts.before and counts.after:
        gone = max(0.0, parts.fresh - max(0.0, grown))
        share = min(1.0, span.value / max(prices.touch(parts.fresh, _LARGE).value, 1e-12))
        span = span.plus(prices.given_back(gone if share > 0 else 0.0, size))
    most = prices.touch(parts.unknown, _LARGE).minus(
        prices.touch_huge(parts.unknown / per_huge, size, _LARGE)
    )
    most = most.plus(prices.given_back(parts.unknown, size)).within(0, math.inf)
    span = Span(span.low, span.value, span.high + most.high)
    copied = _most_copies(counts, parts)
    if parts.fresh and copied:
        span = span._replace(low=span.low * max(0.0, 1 - copied / parts.fresh))
    # Prices by which the faults would have taken more than the system time are too high.
    priced = _cost(counts, parts, prices)[0].value
    if priced > counts.system:
        span = span.times(counts.system / priced)
    reasons = _why_unknown(counts, parts)
    if copied > 0.1 * parts.fresh:
        reasons.append(
            "this process forked, and copies of pages are not told apart from first touches"
        )
    if sparse:
        reasons.append("little of each huge page was touched, too little to tell how much")
    return Figure.of(span.within(0, counts.system), counts.time, reasons)


def _saved(mapping: Fresh, weight: float, size: int, prices: Prices, least: int) -> Span:
    """Return the first touches of a mapping in small pages minus those in huge pages."""
    faults = mapping.faults(weight, least)
    huge = mapping.huge_pages(weight, size // PAGE_SIZE, least)
    length = faults * PAGE_SIZE
    return prices.touch(faults, length).minus(prices.touch_huge(huge, size, length))


def _most_copies(counts: Counts, parts: _Division) -> float:
    """Return how many faults at most were copies of pages that a fork shares (copy on write)."""
    if counts.before is None or counts.after is None:
        return 0.0
    forks = 0 if counts.places is None else counts.places.forks
    held = max(counts.before.small, counts.after.small)
    return min(parts.fresh, counts.before.shared + forks * held)


def _why_unknown(counts: Counts, parts: _Division) -> list[str]:
    if parts.unknown <= 0.1 * counts.faults:
        return []
    if counts.places is None:
        return [f"it is not known where the faults were: {counts.no_places}"]
    if counts.places.lost:
        return ["there were more faults than the record holds: watch a shorter block"]
    return [
        f"the kernel did not record {parts.unknown / counts.faults:.0%} of the faults, such as "
        "those inside system calls"
    ]


def measured(budget: float = BUDGET) -> CostTable:
    """Return the costs of faults on this machine, measured once a process in `budget` seconds.

    Raises:
        OutOfMemoryError: there is not enough memory to measure.
    """
    with ONE_AT_A_TIME:
        return _measured_once(budget)


@cache
def _measured_once(budget: float) -> CostTable:
    small, *others = page_kinds()
    kinds = [small, *(k for k in others if k.sort == "transparent" and not k.next_size)]
    fit = [kind for kind in kinds if kind.why_not is None and kind.size <= _PIECE]
    settings = [Setting(kind, "charge", 1) for kind in fit]
    groups = (Group(tuple(_programs(setting))) for setting in settings)
    table = measure(Plan(tuple(groups)), budget=budget, width=_WIDTH)
    return replace(table, cells=tuple(map(_whole, table.cells)))


def _programs(s: Setting) -> Iterator[Program]:
    """Yield programs for memory that fits into the caches, and for memory that does not.

    The large one is touched in pieces, each shorter than a time slice of a busy machine.
    """
    touch = s.cell("touch", "write", _PIECE)
    pieces = [Step("WRITE", at, _PIECE, touch) for at in range(0, _LARGE, _PIECE)]
    yield s.program("pieces", [Step("COMMIT", 0, _LARGE), *pieces], _LARGE, memory=_LARGE)
    life = [
        Step("COMMIT", 0, _SMALL),
        Step("WRITE", 0, _SMALL, s.cell("touch", "write", _SMALL)),
        Step("UNMAP", 0, _SMALL, s.cell("release", "piece", _SMALL)),
    ]
    yield s.program("whole", life, _SMALL, memory=_SMALL)
    if s.kind.sort == "small":
        read = Step("READ", 0, _SMALL, s.cell("touch", "read", _SMALL))
        yield s.program("read", [Step("COMMIT", 0, _SMALL), read], _SMALL, memory=_SMALL // 256)


def _whole(entry: Measured) -> Measured:
    """Return the cell of the whole memory for that of one of its pieces.

    The interval of few passes is too wide to be of use: their range, widened, replaces it.
    """
    cell, times, scale = entry.cell, entry.times, 1.0
    if cell.verb == "touch" and cell.nbytes < _SMALL:
        cell, scale = replace(cell, nbytes=_LARGE), _LARGE / cell.nbytes
    medians = [ns * scale for ns in entry.medians if ns is not None]
    if times is not None:
        if times.passes >= _FEW_PASSES:
            low, high = (ns * scale for ns in times.ci95)
        else:
            ends = [*medians, times.median * scale]
            low, high = min(ends) / _WIDENED, max(ends) * _WIDENED
        figures = {name: getattr(times, name) * scale for name in FIGURES}
        times = replace(times, **figures, ci95=(low, high))
    return replace(entry, cell=cell, times=times, medians=tuple(medians))
