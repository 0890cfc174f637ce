"""Recommendations derived from measured costs, each with its reason."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.report import Report
from pyreserve.costs.cells import Curve
from pyreserve.costs.measuring import measure
from pyreserve.costs.model import CostModel, Fit
from pyreserve.costs.planning import plan
from pyreserve.costs.table import CostTable
from pyreserve.errors import OutOfMemoryError
from pyreserve.units import GiB, MiB, format_size, format_time, parse_size

_SHARE = 0.05  # a growth call may cost this share of touching the memory
_LONGEST_STEP = 64 * MiB
_SURE = 1.3  # ratio of an interval's ends up to which a figure is reliable
_DEFAULT_STEP = 2 * MiB
_BUDGET, _STEP_BUDGET, _WIDTH = 10.0, 2.0, 0.1


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to one question.

    Attributes:
        question: the question, with its question mark.
        text: the answer in words; if it is not known, why, and what to try.
        figures: the figures that it is based on, in words.
        sure: whether the run decides it.
        value: the recommended method or figure; None if it is not known.
    """

    question: str
    text: str
    figures: str
    sure: bool
    value: str | float | None

    def __str__(self) -> str:
        return f"{self.question} {self.text}. {self.figures}."

    def _repr_html_(self) -> str:
        return Report(self.question, (self.text, self.figures)).html()


def Answer(value: float | None, text: str, reason: str) -> Verdict:  # noqa: N802
    return Verdict("", text, reason, value is not None, value)


@dataclass(frozen=True, slots=True)
class Recommendations:
    """Recommendations for the machine that was measured.

    ``str()`` gives the answers with their reasons, in a notebook as HTML.

    Attributes:
        step_bytes: growth step in bytes from which growth calls cost under 5 % of touching the
            memory.
        huge_step_bytes: the same with transparent huge pages; a multiple of the huge page.
        idle_seconds: seconds of idleness after which giving memory back pays.
        lazy_above: probability, 0 to 1, that memory is used again before the kernel reclaims it,
            above which lazy discard (MADV_FREE) is cheaper than eager discard (MADV_DONTNEED).
        huge_above: share of each huge page, 0 to 1, that must be used for huge pages to be cheaper
            than small ones.
        islands: number of separate committed pieces that vm.max_map_count allows.
        map_entries: map entries that each way to use a piece adds, by ``"VERB METHOD"``.
    """

    step_bytes: Verdict
    huge_step_bytes: Verdict
    idle_seconds: Verdict
    lazy_above: Verdict
    huge_above: Verdict
    islands: Verdict
    map_entries: Mapping[str, float]

    def verdicts(self) -> dict[str, Verdict]:
        """Return the verdicts by name."""
        values = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in values if isinstance(value, Verdict)}

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        answers = self.verdicts()
        known = tuple(str(answer) for answer in answers.values() if answer.value is not None)
        unknown = [name for name, answer in answers.items() if answer.value is None]
        missing = (f"Not known, its cells were not measured: {', '.join(unknown)}.",)
        return Report("Recommendations", known + (missing if unknown else ()))

    def entries_of(self, pieces: Mapping[str, int]) -> int:
        """Return the number of map entries of a reservation with these separate pieces.

        Args:
            pieces: number of pieces by way of use, ``"VERB METHOD"`` as in `map_entries`:
                ``{"commit mprotect": 1000, "guard madvise": 1000}``.

        Raises:
            LookupError: the entries of a way of use were not counted.
        """
        unknown = [way for way in pieces if way not in self.map_entries]
        if unknown:
            msg = f"{unknown[0]!r} was not counted; counted: {', '.join(self.map_entries)}"
            raise LookupError(msg)
        return 1 + math.ceil(sum(self.map_entries[way] * n for way, n in pieces.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return the answers as a dict for JSON."""
        return {
            name: {"value": answer.value, "text": answer.text, "reason": answer.figures}
            for name, answer in self.verdicts().items()
        }


def recommend(table: CostTable | None = None) -> Recommendations:
    """Return recommendations for the measured machine, with their reasons.

    Args:
        table: the measured costs, such as ``CostTable.load("costs.json")``. None: those of a
            measurement of at most ten seconds, which each process makes once.

    Raises:
        OutOfMemoryError: there is not enough memory to measure.
    """
    if table is None:
        table = _measured()
    model = table.model()
    return Recommendations(
        step_bytes=_answered(_step, model, table),
        huge_step_bytes=_answered(_huge_step, model, table),
        idle_seconds=_answered(_idle, model, table),
        lazy_above=_answered(_lazy, model, table),
        huge_above=_answered(_huge, model, table),
        islands=_answered(_islands, model, table),
        map_entries=dict(table.machine.get("map_entries", {})),
    )


def measured_step(*, huge_pages: bool = False) -> int:
    """Return the growth step that suits this machine, in bytes, for the argument ``step``.

    For example ``BumpArena("64MiB", step=pyreserve.costs.measured_step())``. It is
    `Recommendations.step_bytes` of a measurement of at most two seconds, which each process makes
    once by starting ``sys.executable``. If the cells cannot be measured or memory is short, it is
    2 MiB.

    Args:
        huge_pages: whether the memory is backed with transparent huge pages; then the step is
            `Recommendations.huge_step_bytes`.
    """
    try:
        table = _measured_growth()
    except OutOfMemoryError:
        return _DEFAULT_STEP
    answer = _answered(_huge_step if huge_pages else _step, table.model(), table)
    return _DEFAULT_STEP if answer.value is None else int(answer.value)


_measuring = threading.Lock()  # concurrent measurements would disturb each other


def _measured() -> CostTable:
    with _measuring:
        return _measured_once(("grow", "touch", "discard", "retouch"), 128 * MiB, _BUDGET)


def _measured_growth() -> CostTable:
    with _measuring:
        return _measured_once(("grow", "touch"), 8 * MiB, _STEP_BUDGET)


@cache
def _measured_once(verbs: tuple[str, ...], longest: int, budget: float) -> CostTable:
    whole = plan(only=verbs, longest=longest)
    groups = (
        group
        for group in whole.groups
        if group.setting.mode == "charge" and group.setting.threads == 1
    )
    return measure(replace(whole, groups=tuple(groups)), budget=budget, width=_WIDTH)


def _answered(
    question: Callable[[CostModel, CostTable], Verdict], model: CostModel, table: CostTable
) -> Verdict:
    """Return the answer to a question; without a value if its cells were not measured."""
    try:
        return question(model, table)
    except LookupError as error:
        return Answer(None, "not known", str(error.args[0]))


def _step(model: CostModel, _table: CostTable) -> Verdict:
    grow, touch = model.of(Curve("grow", "mprotect")), model.of(Curve("touch", "write"))
    step = PAGE_SIZE
    while step < _LONGEST_STEP and grow.at(step) > _SHARE * touch.at(step):
        step *= 2
    share = _share_of_touching(grow, touch, step)
    return Answer(
        step,
        f"Grow by {format_size(step)} or more: the calls then cost {share}.",
        f"a step of {format_size(step)} costs {format_time(grow.at(step))}, "
        f"touching it {format_time(touch.at(step))}",
    )


def _huge_step(model: CostModel, _table: CostTable) -> Verdict:
    kind, size = _huge_kind(model)
    grow = model.of(Curve("grow", "mprotect", kind))
    touch = model.of(Curve("touch", "write", kind))
    step = size
    while step < _LONGEST_STEP and grow.at(step) > _SHARE * touch.at(step):
        step *= 2
    return Answer(
        step,
        f"With huge pages grow by {format_size(step)} or more, in steps that end on multiples of "
        f"{format_size(size)}: a smaller or unaligned step gets small pages.",
        f"a step of {format_size(step)} costs {format_time(grow.at(step))}, "
        f"touching it {format_time(touch.at(step))}",
    )


def _idle(model: CostModel, table: CostTable) -> Verdict:
    discard = model.of(Curve("discard", "dontneed"))
    retouch, resident = (
        model.of(Curve("retouch", method)) for method in ("after-dontneed", "resident")
    )
    nbytes = _longest(discard, retouch, resident)
    discarding, touching, kept = (fit.at(nbytes) for fit in (discard, retouch, resident))
    gib_per_cpu = table.machine["memory"] / GiB / table.machine["cpus"]

    def seconds_per_gib(ns: float) -> float:
        return ns * (GiB / nbytes) / 1e9

    per_gib = seconds_per_gib(discarding + touching - kept)
    low = max(0.0, seconds_per_gib(discarding.low + touching.low - kept.high) * gib_per_cpu)
    high = seconds_per_gib(discarding.high + touching.high - kept.low) * gib_per_cpu
    idle = per_gib * gib_per_cpu
    reason = (
        f"discarding 1 GiB and touching it again costs {_two_digits(per_gib)} s of CPU time, and "
        f"this machine has {_two_digits(gib_per_cpu)} GiB per CPU: at that price, holding 1 GiB "
        f"for {_two_digits(idle)} s ({_two_digits(low)} to {_two_digits(high)}) costs the same "
        "(after Gray and Putzolu's five-minute rule, 1987)"
    )
    cold = [
        entry for entry in table.measured() if entry.host == "cold" and entry.cell.verb == "touch"
    ]
    if cold:
        worst_ns = max(entry.times.median / entry.cell.nbytes for entry in cold if entry.times)
        worst = worst_ns * GiB / 1e9
        reason += (
            f"; if the hypervisor takes the memory, touching 1 GiB again costs "
            f"{_two_digits(worst)} s, and giving it back pays after "
            f"{_two_digits(worst * gib_per_cpu)} s"
        )
    text = f"Give back memory that stays idle for more than {_two_digits(idle)} s."
    return Answer(idle, text, reason)


def _two_digits(value: float) -> str:
    """Format with two significant digits, without an exponent."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _lazy(model: CostModel, _table: CostTable) -> Verdict:
    discards = [model.of(Curve("discard", method)) for method in ("dontneed", "free")]
    retouches = [model.of(Curve("retouch", method)) for method in ("after-dontneed", "after-free")]
    nbytes = _longest(*discards, *retouches)
    eager, lazy = (fit.at(nbytes) for fit in discards)
    after_eager, after_lazy = (fit.at(nbytes) for fit in retouches)
    saved = after_eager - after_lazy
    above = min(1.0, max(0.0, (lazy - eager) / saved)) if saved > 0 else 1.0
    if above >= 1:
        text = "Discard eagerly (MADV_DONTNEED): lazy discard (MADV_FREE) is no cheaper here."
    else:
        chance = f"is over {above:.0%} likely to" if above >= 0.005 else "may"
        text = (
            f"Discard lazily (MADV_FREE) if the memory {chance} be used again before the kernel "
            "reclaims it, and RSS may include it until then; otherwise eagerly (MADV_DONTNEED)."
        )
    return Answer(
        above,
        text,
        f"{format_size(nbytes)}: eager {format_time(eager)} and {format_time(after_eager)} to "
        f"touch again, lazy {format_time(lazy)} and {format_time(after_lazy)}; the kernel's cost "
        "of reclaiming lazily discarded memory is not included",
    )


def _huge(model: CostModel, _table: CostTable) -> Verdict:
    kind, size = _huge_kind(model)
    small, huge = model.of(Curve("touch", "write")), model.of(Curve("touch", "write", kind))
    nbytes = _longest(small, huge)
    huge_ns, small_ns = huge.at(nbytes), small.at(nbytes)
    above = min(1.0, huge_ns / small_ns)
    low, high = huge_ns.low / small_ns.high, min(1.0, huge_ns.high / small_ns.low)
    return Answer(
        above,
        f"Huge pages are faster at first touch if over {above:.0%} ({low:.0%} to {high:.0%}) of "
        f"each {format_size(size)} is used; fully used, they are "
        f"{_two_digits(small_ns / huge_ns)} times as fast. Each takes "
        f"{format_size(size)} of memory, used or not.",
        f"touching {format_size(nbytes)} takes {format_time(small_ns)} in small pages and "
        f"{format_time(huge_ns)} in huge pages",
    )


def _longest(*fits: Fit) -> int:
    """Return the longest length, in bytes, that all fits have; a reliable one if there is any."""
    common = set[float].intersection(*({pages for pages, *_ in fit.points} for fit in fits))
    sure = set[float].intersection(
        *({pages for pages, _, low, high in fit.points if high <= _SURE * low} for fit in fits)
    )
    return int(max(sure or common, default=min(fit.points[-1][0] for fit in fits))) * PAGE_SIZE


def _share_of_touching(grow: Fit, touch: Fit, step: int) -> str:
    share = grow.at(step) / touch.at(step)
    return f"under {_SHARE:.0%} of touching" if share <= _SHARE else f"{share:.0%} of touching"


def _islands(_model: CostModel, table: CostTable) -> Verdict:
    limit, entries = table.machine["max_map_count"], table.machine["map_entries"]
    per_piece = entries["commit mprotect"]
    # The count is a mean of 16 places: anything below 1/16 is zero.
    islands = limit if per_piece < 1e-3 else int(limit / per_piece)
    guards = ", ".join(
        f"{entries[way]:.2g} for a guard by {way.split()[1]}"
        for way in ("guard madvise", "guard mprotect")
        if way in entries
    )
    return Answer(
        islands,
        f"Keep the number of separate committed pieces well under {islands:,}, or commit adjacent "
        "pieces: growth directly behind committed memory adds no map entry.",
        f"map entries counted: {per_piece:.2g} for a separate piece, "
        f"{entries.get('grow mprotect', 0):.2g} for growth, {guards}; vm.max_map_count is "
        f"{limit:,}",
    )


def _huge_kind(model: CostModel) -> tuple[str, int]:
    """Return the largest transparent page kind that was measured, and its size in bytes."""
    sizes = {
        parse_size(curve.page_kind): curve.page_kind
        for curve in model.fits
        if not curve.page_kind.startswith("hugetlb")
    }
    size = max(sizes, default=0)
    if size <= PAGE_SIZE:
        msg = "no transparent huge pages were measured"
        raise LookupError(msg)
    return sizes[size], size
