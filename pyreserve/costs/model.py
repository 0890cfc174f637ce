"""Fit a fixed cost and a cost per page to each curve, and estimate the cost of any length.

Imports cells and results only: `CostTable.model` passes its curves.
"""

import math
import random
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import index as _index
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import SMALL, Curve
from pyreserve.costs.results import Measured
from pyreserve.units import GiB, as_float

_DRAWS = 99  # lines fitted to drawn medians, for the intervals
_MAX_RATIO = 100.0  # limit of an interval's ends, as a ratio to the median
_FORMULA = "ns = fixed_ns + ns_per_page * pages"

# A measured length in pages, its median, and the median's 95 % interval; all times in ns.
Point = tuple[float, float, float, float]


class Estimate(float):
    """Nanoseconds, with the interval that holds the median with about 95 % confidence.

    Attributes:
        low, high: the interval's ends, in nanoseconds.
    """

    __slots__ = ("_high", "_low")

    _low: float
    _high: float

    def __new__(cls, ns: float, low: float, high: float) -> "Estimate":
        """Create an estimate from a time and its interval, all in nanoseconds."""
        estimate = super().__new__(cls, ns)
        estimate._low, estimate._high = low, high
        return estimate

    @property
    def low(self) -> float:
        """The lower end of the interval, in nanoseconds."""
        return self._low

    @property
    def high(self) -> float:
        """The upper end of the interval, in nanoseconds."""
        return self._high

    def __reduce__(self) -> tuple[type["Estimate"], tuple[float, float, float]]:
        """Include the interval in copies and pickles."""
        return type(self), (float(self), self.low, self.high)

    def __repr__(self) -> str:
        return f"Estimate({float(self):.4g} ns, {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Fit:
    """A straight line through the medians of a curve, and their deviation from it.

    The line minimises the sum of relative deviations, so neither the longest lengths nor a single
    outlier dominates it (least absolute deviations; Bloomfield and Steiger, 1983). The intervals
    come from lines through medians that are drawn from their own intervals.

    Attributes:
        curve: the curve that was fitted.
        fixed_ns, fixed_ci95: the fixed cost of a call, in ns, and its interval.
        ns_per_page, ns_per_page_ci95: the cost per OS page, in ns, and its interval.
        residual: the largest relative deviation of a measured median from the line; 0.2 is 20 %.
        points: the measured lengths, shortest first: OS pages, median ns, low and high end of the
            median's interval.
    """

    curve: Curve
    fixed_ns: float
    fixed_ci95: tuple[float, float]
    ns_per_page: float
    ns_per_page_ci95: tuple[float, float]
    residual: float
    points: tuple[Point, ...]

    @property
    def gib_per_second(self) -> float:
        """Speed at the longest measured length."""
        pages, ns, *_ = self.points[-1]
        return pages * PAGE_SIZE / GiB / ns * 1e9

    @classmethod
    def of(cls, curve: Curve, points: Sequence[Point]) -> "Fit":
        """Fit a line to at least one point, shortest first."""
        lengths = [x for x, *_ in points]
        medians = [y for _, y, *_ in points]
        fixed, per_page = _line(lengths, medians)
        rng = random.Random(0)  # a fixed seed: the same table gives the same figures
        lines = [_line(lengths, [_draw(rng, *p[1:]) for p in points]) for _ in range(_DRAWS)]
        return cls(
            curve=curve,
            fixed_ns=fixed,
            fixed_ci95=_interval([line[0] for line in lines], fixed),
            ns_per_page=per_page,
            ns_per_page_ci95=_interval([line[1] for line in lines], per_page),
            residual=max(abs(fixed + per_page * x - y) / y for x, y, *_ in points),
            points=tuple(points),
        )

    def line(self, pages: float) -> float:
        """Return the straight line's ns for a number of OS pages."""
        return self.fixed_ns + self.ns_per_page * pages

    def at(self, nbytes: float) -> Estimate:
        """Estimate the ns of a length in bytes; see `estimate`."""
        return self.estimate(nbytes / PAGE_SIZE)

    def estimate(self, pages: float) -> Estimate:
        """Estimate the ns of a length in OS pages: the line, corrected to meet the medians.

        Between two measured lengths the relative deviation from the line is interpolated over the
        logarithm of the length; beyond the last one it is constant.
        """
        xs = [math.log(x) for x, *_ in self.points]
        x = math.log(pages)
        deviations = [
            [math.log(point[k] / self.line(point[0])) for point in self.points] for k in (1, 2, 3)
        ]
        line = self.line(pages)
        return Estimate(*(line * math.exp(_interpolate(xs, ys, x)) for ys in deviations))


@dataclass(frozen=True, slots=True)
class CostModel:
    """The costs of any length on the machine whose cells were measured.

    Attributes:
        fits: the fit of each measured curve.
    """

    fits: dict[Curve, Fit]

    @classmethod
    def fit(cls, curves: Mapping[Curve, Iterable[Measured]]) -> "CostModel":
        """Fit curves to their warm cells, shortest first, as `CostTable.curves` returns them."""
        fits = {}
        for curve, cells in curves.items():
            points = [
                # Not an integer if the table comes from a machine with a smaller OS page.
                (entry.cell.nbytes / PAGE_SIZE, entry.times.median, *entry.times.ci95)
                for entry in cells
                if entry.times is not None and entry.times.median > 0
            ]
            if points:
                fits[curve] = Fit.of(curve, [_bounded(p) for p in points])
        return cls(fits)

    def estimate(
        self,
        verb: str,
        *,
        pages: float | None = None,
        nbytes: float | None = None,
        method: str | None = None,
        page_kind: str = SMALL,
        mode: str = "charge",
        threads: int = 1,
    ) -> Estimate:
        """Estimate the cost of a verb, in nanoseconds.

        Args:
            verb: a verb of `pyreserve.costs.METHODS`.
            pages: length in OS pages; give either `pages` or `nbytes`.
            nbytes: length in bytes.
            method: a method of the verb; None for the first.
            page_kind: as in `Cell`.
            mode: ``"charge"`` or ``"noreserve"``.
            threads: number of threads that run it at once.

        Raises:
            ValueError: the verb or the method is unknown, the length is not positive and finite,
                or not exactly one of `pages` and `nbytes` is given.
            LookupError: the curve was not measured.
        """
        if (pages is None) == (nbytes is None):
            msg = "exactly one of pages and nbytes must be given"
            raise ValueError(msg)
        threads = _index(threads)
        length = as_float(nbytes or 0) / PAGE_SIZE if pages is None else as_float(pages)
        if not 0 < length < math.inf:
            msg = f"the length must be positive and finite, got {length} pages"
            raise ValueError(msg)
        curve = Curve.named(verb, method, page_kind=page_kind, mode=mode, threads=threads)
        return self.of(curve).estimate(length)

    def of(self, curve: Curve) -> Fit:
        """Return a curve's fit.

        Raises:
            LookupError: the curve was not measured.
        """
        fit = self.fits.get(curve)
        if fit is None:
            msg = f"{curve} was not measured"
            raise LookupError(msg)
        return fit

    def to_dict(self) -> dict[str, Any]:
        """Return the model's part of the JSON; times in ns, pages are OS pages."""
        return {
            "formula": _FORMULA,
            "fits": [
                {
                    **asdict(fit.curve),
                    "fixed_ns": _digits(fit.fixed_ns),
                    "fixed_ns_ci95": [_digits(ns) for ns in fit.fixed_ci95],
                    "ns_per_page": _digits(fit.ns_per_page),
                    "ns_per_page_ci95": [_digits(ns) for ns in fit.ns_per_page_ci95],
                    "residual": _digits(fit.residual),
                }
                for fit in self.fits.values()
            ],
        }


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return the fixed and the per-page cost, neither negative, with the least deviation.

    The best line passes through two points, or through one point with one of the costs zero.
    """
    candidates = [(y, 0.0) for y in ys] + [(0.0, y / x) for x, y in zip(xs, ys, strict=True)]
    n = len(xs)
    for i in range(n):
        for j in range(i + 1, n):
            slope = (ys[j] - ys[i]) / (xs[j] - xs[i])
            fixed = ys[i] - slope * xs[i]
            if slope >= 0 and fixed >= 0:
                candidates.append((fixed, slope))
    shares = [(1 / y, x / y) for x, y in zip(xs, ys, strict=True)]
    return min(candidates, key=lambda c: sum(abs(c[0] * a + c[1] * b - 1) for a, b in shares))


def _draw(rng: random.Random, median: float, low: float, high: float) -> float:
    """Draw a median from its interval: its logarithm is taken as normal to either side."""
    z = rng.gauss(0, 1)
    end = high if z > 0 else low
    return median * math.exp(abs(z) / 1.96 * math.log(end / median))


def _interval(drawn: list[float], value: float) -> tuple[float, float]:
    """Return the middle 95 % of drawn values, widened to include `value`."""
    drawn.sort()
    cut = _DRAWS // 40
    return min(drawn[cut], value), max(drawn[-1 - cut], value)


def _bounded(point: Point) -> Point:
    """Limit the ends of the interval: logarithms of zero and infinity are not finite."""
    x, y, low, high = point
    return x, y, max(low, y / _MAX_RATIO), min(high, y * _MAX_RATIO)


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    i = bisect_right(xs, x)
    if i == 0 or i == len(xs):
        return ys[max(0, i - 1)]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + (ys[i] - ys[i - 1]) * share


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
