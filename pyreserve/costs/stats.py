"""What samples say: the median and how sure it is, and which samples are of another kind.

Samples come in passes. Those of one pass share a process, its addresses and a moment of the
machine, so they agree with each other better than with the next pass; an interval that forgets it
is too narrow, and two runs of the same thing would look different.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median, stdev

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom; 1.96 beyond.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)
_ONE_PASS = 1.25
# Cold memory measured thirty times as slow as warm; noise of a few times is not that, nor is a rare
# sample. What is partly cold, in a long piece, is twice as slow as a shorter one lets expect.
_COLD_RATIO, _COLD_GAP, _COLD_LEAST, _COLD_SHARE, _COLD_USUAL = 4.0, 2.0, 3, 0.03, 2.0

Sample = tuple[float, bool]
"""Nanoseconds, and whether another process may have had the CPU meanwhile."""


@dataclass(frozen=True, slots=True)
class Times:
    """Order statistics of samples, in nanoseconds.

    Attributes:
        min, median, p90, p99, max: of all samples of all passes.
        ci95: where the median lies with 95 % confidence: the wider of the binomial interval of all
            samples and Student's interval of the logarithms of the passes' medians. A single pass
            can't tell what the next would say, and has 25 % to either side at least; one sample
            alone says nothing, from 0 to infinity.
        samples, passes: how many there were.
        outliers: how many lie above the third quartile by more than three times the distance of the
            quartiles (Tukey's outer fence). They are among the samples of all the above.
    """

    min: float
    median: float
    p90: float
    p99: float
    max: float
    ci95: tuple[float, float]
    samples: int
    passes: int
    outliers: int

    @property
    def width(self) -> float:
        """Width of the interval, as a share of the median."""
        lo, hi = self.ci95
        return (hi - lo) / self.median if self.median > 0 else math.inf


def summarise(passes: Sequence[Sequence[float]]) -> Times:
    """Summarise the samples of one cell, at least one, pass by pass."""
    values = sorted(value for one in passes for value in one)
    middle, full = median(values), [one for one in passes if one]
    q1, q3 = quantile(values, 0.25), quantile(values, 0.75)
    return Times(
        min=values[0],
        median=middle,
        p90=quantile(values, 0.90),
        p99=quantile(values, 0.99),
        max=values[-1],
        ci95=_interval(values, middle, [median(one) for one in full]),
        samples=len(values),
        passes=len(full),
        outliers=len(values) - bisect_right(values, q3 + 3 * (q3 - q1)),
    )


def quantile(ordered: Sequence[float], q: float) -> float:
    """Return a quantile of ordered values, between two of them if need be."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def _interval(
    ordered: Sequence[float], middle: float, medians: Sequence[float]
) -> tuple[float, float]:
    n = len(ordered)
    if n == 1:
        return 0.0, math.inf
    # The ranks between which a binomial(n, 1/2) lies: the median is between those two values.
    half = 0.98 * math.sqrt(n)
    low = ordered[max(0, math.floor(n / 2 - half - 0.5))]
    high = ordered[min(n - 1, math.ceil(n / 2 + half - 0.5))]
    if len(medians) == 1:
        low, high = min(low, middle / _ONE_PASS), max(high, middle * _ONE_PASS)
    alike = medians if len(medians) > 1 else ordered if n <= len(_T95) else ()
    if alike and min(alike) > 0:
        k = len(alike)
        t = _T95[k - 2] if k - 2 < len(_T95) else 1.96
        spread = t * stdev(math.log(one) for one in alike) / math.sqrt(k)
        low, high = min(low, middle * math.exp(-spread)), max(high, middle * math.exp(spread))
    return low, high


def split_cold(
    passes: Sequence[Sequence[Sample]],
    first: Sequence[Sequence[Sample]] = (),
    usual: float | None = None,
) -> tuple[list[list[float]], list[list[float]]]:
    """Part the samples whose memory the host of a virtual machine had to bring from all others.

    Cold is what lies beyond a wide gap and far above the rest, and for long pieces, which have few
    samples, what is far above what their length should take. A sample that was preempted is never
    taken for cold, however long it is.

    Args:
        passes: the samples.
        first: others of the same thing, from the first time that a process used its memory; they
            help to find the cold ones, and only those of them are kept.
        usual: what a sample should take, in ns, as shorter pieces have it; None if that is not
            known.

    Returns:
        The warm passes and the cold ones, without those that are empty.
    """
    every = [*passes, *first]
    quiet = sorted(ns for one in every for ns, preempted in one if ns > 0 and not preempted)
    borders = [_border(quiet), usual and usual * _COLD_USUAL]
    border = min((one for one in borders if one is not None), default=math.inf)

    def is_cold(sample: Sample) -> bool:
        return sample[0] >= border and not sample[1]

    warm = ([sample[0] for sample in one if not is_cold(sample)] for one in passes)
    cold = ([sample[0] for sample in one if is_cold(sample)] for one in every)
    return [one for one in warm if one], [one for one in cold if one]


def _border(ordered: Sequence[float]) -> float | None:
    """Return the least of the cold values, or None if no gap tells them from the others."""
    least = max(_COLD_LEAST, round(_COLD_SHARE * len(ordered)))
    inner = range(_COLD_LEAST, len(ordered) - least + 1)
    widest = max(inner, key=lambda i: ordered[i] / ordered[i - 1], default=None)
    if widest is None or ordered[widest] / ordered[widest - 1] < _COLD_GAP:
        return None
    ratio = median(ordered[widest:]) / median(ordered[:widest])
    return ordered[widest] if ratio >= _COLD_RATIO else None
