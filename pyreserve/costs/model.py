"""A fixed cost and a cost per page for each curve, and estimates for lengths not measured."""

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from operator import index as _index
from typing import TYPE_CHECKING, Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import SMALL, Curve
from pyreserve.units import GiB, as_float

if TYPE_CHECKING:
    from pyreserve.costs.table import CostTable

_DRAWS = 99
_FAR = 100.0
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
        """Make one of a time and its interval."""
        made = super().__new__(cls, ns)
        made._low, made._high = low, high
        return made

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self._low

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self._high

    def __reduce__(self) -> tuple[type["Estimate"], tuple[float, float, float]]:
        """Copy and pickle the interval too."""
        return type(self), (float(self), self.low, self.high)

    def __repr__(self) -> str:
        return f"Estimate({float(self):.4g} ns, {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True, slots=True)
class Fit:
    """A straight line through the medians of one curve, and how far they are from it.

    The line has the least sum of relative deviations, so neither the longest lengths nor an odd
    point decide alone (least absolute deviations; Bloomfield and Steiger, 1983). The interval of
    each figure is of lines through medians drawn from their own intervals.

    Attributes:
        curve: of what.
        fixed_ns, fixed_ci95: the cost of a call of no length, in ns, and its interval.
        ns_per_page, ns_per_page_ci95: the cost per OS page, in ns, and its interval.
        residual: the largest relative deviation of a measured median from the line; 0.2 is 20 %.
        points: what was measured, by length: pages, median ns, its interval's two ends.
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
        """How fast the longest measured length is done."""
        pages, ns, *_ = self.points[-1]
        return pages * PAGE_SIZE / GiB / ns * 1e9

    @classmethod
    def of(cls, curve: Curve, points: Sequence[Point]) -> "Fit":
        """Fit a line to points, of which there is at least one, shortest first."""
        lengths = [x for x, *_ in points]
        medians = [y for _, y, *_ in points]
        fixed, per_page = _line(lengths, medians)
        drawn = random.Random(0)  # the same figures from the same table
        lines = [_line(lengths, [_draw(drawn, *p[1:]) for p in points]) for _ in range(_DRAWS)]
        return cls(
            curve=curve,
            fixed_ns=fixed,
            fixed_ci95=_middle([line[0] for line in lines], fixed),
            ns_per_page=per_page,
            ns_per_page_ci95=_middle([line[1] for line in lines], per_page),
            residual=max(abs(fixed + per_page * x - y) / y for x, y, *_ in points),
            points=tuple(points),
        )

    def line(self, pages: float) -> float:
        """Return what the straight line says for so many OS pages, in ns."""
        return self.fixed_ns + self.ns_per_page * pages

    def at(self, nbytes: float) -> Estimate:
        """Return what so many bytes take; see `estimate`."""
        return self.estimate(nbytes / PAGE_SIZE)

    def estimate(self, pages: float) -> Estimate:
        """Return what so many OS pages take: the line, bent to go through what was measured.

        Between two measured lengths the relative deviation from the line is interpolated over the
        logarithm of the length; beyond them it stays.
        """
        xs = [math.log(x) for x, *_ in self.points]
        at = math.log(pages)
        bends = [
            [math.log(value[k] / self.line(value[0])) for value in self.points] for k in (1, 2, 3)
        ]
        line = self.line(pages)
        return Estimate(*(line * math.exp(_interpolate(xs, bend, at)) for bend in bends))


@dataclass(frozen=True, slots=True)
class CostModel:
    """What any length costs on the machine that a `CostTable` was measured on.

    Attributes:
        fits: by curve.
    """

    fits: dict[Curve, Fit]

    @classmethod
    def fit(cls, table: "CostTable") -> "CostModel":
        """Fit every curve of a table; memory that the host had to bring is left out."""
        fits = {}
        for curve, cells in table.curves().items():
            points = [
                # Not whole pages if the table is of a machine whose OS page is smaller.
                (one.cell.nbytes / PAGE_SIZE, one.times.median, *one.times.ci95)
                for one in cells
                if one.times is not None and one.times.median > 0
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
        """Estimate what a verb takes, in nanoseconds.

        Args:
            verb: see `pyreserve.costs.cells`.
            pages: how much, in OS pages; either this
            nbytes: or this, in bytes.
            method: the verb's first if None.
            page_kind: as of a cell, like the next two.
            mode: ``"charge"`` or ``"noreserve"``.
            threads: how many do it at once.

        Raises:
            ValueError: no such verb or method, a length that is not positive, or none or two.
            LookupError: that curve was not measured.
        """
        if (pages is None) == (nbytes is None):
            msg = "an estimate is for a number of pages or of bytes: name one of them"
            raise ValueError(msg)
        threads = _index(threads)
        length = as_float(nbytes or 0) / PAGE_SIZE if pages is None else as_float(pages)
        if not 0 < length < math.inf:
            msg = f"an estimate is for a positive length with an end, not {length} pages"
            raise ValueError(msg)
        curve = Curve.named(verb, method, page_kind=page_kind, mode=mode, threads=threads)
        return self.of(curve).estimate(length)

    def of(self, curve: Curve) -> Fit:
        """Return a curve's fit.

        Raises:
            LookupError: it was not measured.
        """
        found = self.fits.get(curve)
        if found is None:
            msg = f"{curve} was not measured"
            raise LookupError(msg)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Return what the JSON says of it; times in ns, a page is an OS page."""
        return {
            "formula": _FORMULA,
            "fits": [
                {
                    **asdict(fit.curve),
                    "fixed_ns": _digits(fit.fixed_ns),
                    "fixed_ci95": [_digits(ns) for ns in fit.fixed_ci95],
                    "ns_per_page": _digits(fit.ns_per_page),
                    "ns_per_page_ci95": [_digits(ns) for ns in fit.ns_per_page_ci95],
                    "residual": _digits(fit.residual),
                }
                for fit in self.fits.values()
            ],
        }


def _line(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float]:
    """Return the fixed and the per-page cost, neither below zero, that deviate least.

    The best line goes through two of the points, or through one with one of the costs zero.
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


def _draw(numbers: random.Random, median: float, low: float, high: float) -> float:
    """Draw a median out of its interval, as if its logarithm were normal to either side."""
    z = numbers.gauss(0, 1)
    end = high if z > 0 else low
    return median * math.exp(abs(z) / 1.96 * math.log(end / median))


def _middle(values: list[float], value: float) -> tuple[float, float]:
    values.sort()
    cut = _DRAWS // 40
    return min(values[cut], value), max(values[-1 - cut], value)


def _bounded(point: Point) -> Point:
    """Keep the interval's ends off zero and infinity, whose logarithms are not finite."""
    x, y, low, high = point
    return x, y, max(low, y / _FAR), min(high, y * _FAR)


def _interpolate(xs: Sequence[float], ys: Sequence[float], at: float) -> float:
    i = bisect_right(xs, at)
    if i == 0 or i == len(xs):
        return ys[max(0, i - 1)]
    share = (at - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + (ys[i] - ys[i - 1]) * share


def _digits(value: float) -> float:
    return float(f"{value:.6g}")
