"""Statistics of samples: medians and ratios with intervals, warm and cold samples.

Samples come in passes. The samples of one pass share a process, its addresses and a state of the
machine, so they agree better with each other than with those of another pass. An interval that
ignores this is too narrow: two runs of the same cell would look different.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, stdev
from typing import NamedTuple

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
ENOUGH = 6
"""Passes from which on the order of their medians bounds 95 %, whatever the distribution."""

_ONE_PASS = 1.25  # the interval of a single pass: at least this factor to either side
# Cold memory measured 30 times as slow as warm; ordinary noise stays below these thresholds.
_COLD_RATIO = 4.0  # median of the cold samples over that of the warm ones
_COLD_GAP = 2.0  # smallest cold sample over the largest warm one
_COLD_COUNT, _COLD_SHARE = 3, 0.03  # number of cold samples, and their share of all
_COLD_LONG = 2.0  # a long sample is partly cold if it takes twice what shorter ones predict

_UNDISTURBED = 2  # samples of a pass that are enough without the preempted ones
_SPAN = 3.0  # ratio of an interval's ends from which on its middle says nothing

Sample = tuple[float, bool]
"""Nanoseconds, and whether the thread may have been preempted during the sample."""


class Interval(NamedTuple):
    """A median over passes and its 95 % interval; (0, inf) from fewer than `ENOUGH` passes."""

    median: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether the median may be printed: the interval excludes zero and is narrow enough."""
        return is_known((self.low, self.high))


def is_known(interval: tuple[float, float]) -> bool:
    """Whether an interval excludes zero, and its ends differ by at most a factor of three."""
    low, high = interval
    return low > 0 and high <= _SPAN * low


def over_passes(values: Iterable[float | None]) -> Interval:
    """Return the median over passes and its interval, from order statistics; None is no value.

    Raises:
        LookupError: there is no value.
    """
    ordered = sorted(value for value in values if value is not None)
    if not ordered:
        msg = "no pass has a value"
        raise LookupError(msg)
    if len(ordered) < ENOUGH:
        return Interval(median(ordered), 0.0, math.inf)
    return Interval(median(ordered), *_median_bounds(ordered))


def undisturbed(samples: Iterable[Sample]) -> list[float]:
    """Return the times of a pass without those of preempted samples, if two or more remain."""
    samples = list(samples)
    kept = [ns for ns, preempted in samples if not preempted]
    return kept if len(kept) >= _UNDISTURBED else [ns for ns, _ in samples]


@dataclass(frozen=True, slots=True)
class Times:
    """Order statistics of samples, in nanoseconds.

    Attributes:
        min, median, p90, p99, max: of all samples of all passes.
        ci95: 95 % confidence interval of the median: the wider of the binomial interval of all
            samples and that of the passes' medians. For a single pass, which does not show how
            passes differ, at least 25 % to either side; for a single sample, 0 to infinity.
        samples, passes: their numbers.
    """

    min: float
    median: float
    p90: float
    p99: float
    max: float
    ci95: tuple[float, float]
    samples: int
    passes: int

    @property
    def width(self) -> float:
        """Width of `ci95`, as a share of the median."""
        lo, hi = self.ci95
        return (hi - lo) / self.median if self.median > 0 else math.inf


def summarise(passes: Sequence[Sequence[float]]) -> Times:
    """Summarise the samples of a cell, pass by pass; there must be at least one."""
    values = sorted(value for samples in passes for value in samples)
    middle, filled = median(values), [samples for samples in passes if samples]
    return Times(
        min=values[0],
        median=middle,
        p90=quantile(values, 0.90),
        p99=quantile(values, 0.99),
        max=values[-1],
        ci95=_interval(values, middle, sorted(median(samples) for samples in filled)),
        samples=len(values),
        passes=len(filled),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return a quantile of ordered values, interpolated between neighbours."""
    rank = q * (len(ordered) - 1)
    low = int(rank)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (rank - low)


def _median_bounds(ordered: Sequence[float]) -> tuple[float, float]:
    """Return the values whose ranks bound 95 % of a binomial(n, 1/2)."""
    n = len(ordered)
    half = 0.98 * math.sqrt(n)
    return (
        ordered[max(0, math.floor(n / 2 - half - 0.5))],
        ordered[min(n - 1, math.ceil(n / 2 + half - 0.5))],
    )


def _interval(
    ordered: Sequence[float], middle: float, medians: Sequence[float]
) -> tuple[float, float]:
    """Return the 95 % interval of the median; see `Times.ci95`."""
    n, k = len(ordered), len(medians)
    if n == 1:
        return 0.0, math.inf
    low, high = _median_bounds(ordered)
    if k == 1:
        low, high = min(low, middle / _ONE_PASS), max(high, middle * _ONE_PASS)
    if k >= ENOUGH:
        least, most = _median_bounds(medians)
        return min(low, least), max(high, most)
    # Too few for ranks: Student's interval of the logarithms.
    values = medians if k > 1 else ordered if n <= len(_T95) else ()
    if values and min(values) > 0:
        k = len(values)
        spread = _T95[k - 2] * stdev(math.log(value) for value in values) / math.sqrt(k)
        low, high = min(low, middle * math.exp(-spread)), max(high, middle * math.exp(spread))
    return low, high


def split_cold(
    passes: Sequence[Sequence[Sample]], expected: float | None = None
) -> tuple[list[list[float]], list[list[float]]]:
    """Separate cold samples (the hypervisor had to supply the memory) from warm ones.

    Cold samples lie above a wide gap and far above the rest. Long pieces have too few samples to
    show a gap: their cold samples are those far above `expected`. A preempted sample is never cold.

    Args:
        passes: the samples.
        expected: the ns that shorter pieces predict for a sample; None if that is not known.

    Returns:
        The warm passes and the cold ones; a pass may be empty.
    """
    calm = sorted(ns for row in passes for ns, preempted in row if ns > 0 and not preempted)
    limits = [_cold_limit(calm), expected and expected * _COLD_LONG]
    limit = min((ns for ns in limits if ns is not None), default=math.inf)

    def is_cold(sample: Sample) -> bool:
        return sample[0] >= limit and not sample[1]

    warm = [undisturbed(s for s in samples if not is_cold(s)) for samples in passes]
    return warm, [[sample[0] for sample in samples if is_cold(sample)] for samples in passes]


def _cold_limit(ordered: Sequence[float]) -> float | None:
    """Return the smallest cold value, or None if no gap separates cold from warm values."""
    count = max(_COLD_COUNT, round(_COLD_SHARE * len(ordered)))
    inner = range(_COLD_COUNT, len(ordered) - count + 1)
    widest = max(inner, key=lambda i: ordered[i] / ordered[i - 1], default=None)
    if widest is None or ordered[widest] / ordered[widest - 1] < _COLD_GAP:
        return None
    ratio = median(ordered[widest:]) / median(ordered[:widest])
    return ordered[widest] if ratio >= _COLD_RATIO else None
