"""The answers that people want from the figures, each with its reason."""

import math
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import Curve
from pyreserve.costs.measuring import measure
from pyreserve.costs.model import CostModel, Fit
from pyreserve.costs.planning import plan
from pyreserve.costs.table import CostTable
from pyreserve.errors import OutOfMemoryError
from pyreserve.units import GiB, MiB, format_size, format_time, parse_size

FILE = "PYRESERVE_COSTS"
"""The environment variable that names a file of ``pyreserve costs --json`` to use."""

_SHARE = 0.05  # of touching: what calls for growing may cost
_LONGEST_STEP = 64 * MiB
_SURE = 1.3  # an interval from one end to 1.3 times that is good enough to build on
_DEFAULT_STEP = 2 * MiB
_BUDGET, _STEP_BUDGET, _WIDTH = 10.0, 2.0, 0.1


@dataclass(frozen=True, slots=True)
class Answer:
    """One recommendation.

    Attributes:
        value: the figure, in the unit that its name in `Recommendations` says; None if what it
            takes was not measured.
        text: the recommendation in words.
        because: the figures that it rests on.
    """

    value: float | None
    text: str
    because: str


@dataclass(frozen=True, slots=True)
class Recommendations:
    """What to do on the machine that was measured.

    Attributes:
        step_bytes: by how much to grow: from there on, what calls for growing cost is under 5 % of
            what touching the memory costs.
        huge_step_bytes: the same where transparent huge pages are wanted; whole huge pages.
        idle_seconds: how long memory must stay idle before giving it back pays.
        lazy_above: how likely it must be that memory is used again, before the system wants it, for
            lazy discard (MADV_FREE) to be cheaper than eager (MADV_DONTNEED); 0 to 1.
        huge_above: which share of each huge page must be used for it to be cheaper than small ones.
        islands: how many separate committed pieces fit into vm.max_map_count.
        map_entries: map entries that each way to use a piece adds, by ``"VERB METHOD"``.
    """

    step_bytes: Answer
    huge_step_bytes: Answer
    idle_seconds: Answer
    lazy_above: Answer
    huge_above: Answer
    islands: Answer
    map_entries: Mapping[str, float]

    def answers(self) -> dict[str, Answer]:
        """Return the answers by name."""
        named = ((one.name, getattr(self, one.name)) for one in fields(self))
        return {name: value for name, value in named if isinstance(value, Answer)}

    def entries_of(self, pieces: Mapping[str, int]) -> int:
        """Return how many map entries a plan costs, one reservation included.

        Args:
            pieces: how many separate pieces of it are used in which way, by ``"VERB METHOD"`` as in
                `map_entries`: ``{"commit mprotect": 1000, "guard madvise": 1000}``.

        Raises:
            LookupError: such a way was not counted.
        """
        unknown = [way for way in pieces if way not in self.map_entries]
        if unknown:
            msg = f"{unknown[0]!r} was not counted; there are {', '.join(self.map_entries)}"
            raise LookupError(msg)
        return 1 + math.ceil(sum(self.map_entries[way] * n for way, n in pieces.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return them ready for JSON."""
        return {
            name: {"value": one.value, "text": one.text, "because": one.because}
            for name, one in self.answers().items()
        }


def recommend(table: CostTable | None = None) -> Recommendations:
    """Say what to do on this machine, and why.

    Args:
        table: what was measured. None: the file that the environment variable ``PYRESERVE_COSTS``
            names, or else a measurement of ten seconds at most, made once in a process.

    Raises:
        OSError, ValueError: the file can't be read, or is not of ``pyreserve costs --json``.
        OutOfMemoryError: there is not enough memory to measure.
    """
    if table is None:
        table = _from_file() or _measured()
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
    """Return the growth step for this machine, in bytes: what ``step="measured"`` stands for.

    It comes from the file that ``PYRESERVE_COSTS`` names, or else from a measurement of two seconds
    at most, made once in a process by starting ``sys.executable``. Where that can't measure what it
    takes, or has too little memory, it is 2 MiB.

    Args:
        huge_pages: whether the memory shall be backed with transparent huge pages.

    Raises:
        OSError, ValueError: as `recommend`.
    """
    try:
        table = _from_file() or _measured_growth()
    except OutOfMemoryError:
        return _DEFAULT_STEP
    answer = _answered(_huge_step if huge_pages else _step, table.model(), table)
    return _DEFAULT_STEP if answer.value is None else int(answer.value)


def _from_file() -> CostTable | None:
    path = os.environ.get(FILE)
    if not path:
        return None
    try:
        return CostTable.load(path)
    except ValueError as error:
        msg = f"{FILE} names {error}"
        raise ValueError(msg) from None


_measuring = threading.Lock()  # two at once would disturb each other


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


def _answered(question: Callable[[CostModel, CostTable], Answer], *of: Any) -> Answer:
    try:
        return question(*of)
    except LookupError as error:
        return Answer(None, "not known", str(error.args[0]))


def _step(model: CostModel, _table: CostTable) -> Answer:
    grow, touch = model.of(Curve("grow", "mprotect")), model.of(Curve("touch", "write"))
    step = PAGE_SIZE
    while step < _LONGEST_STEP and grow.at(step) > _SHARE * touch.at(step):
        step *= 2
    return Answer(
        step,
        f"Grow by {format_size(step)} or more: the calls then cost {_little(grow, touch, step)}.",
        f"a step of {format_size(step)} costs {format_time(grow.at(step))}, "
        f"touching it {format_time(touch.at(step))}",
    )


def _huge_step(model: CostModel, _table: CostTable) -> Answer:
    kind, size = _huge_kind(model)
    grow = model.of(Curve("grow", "mprotect", kind))
    touch = model.of(Curve("touch", "write", kind))
    step = size
    while step < _LONGEST_STEP and grow.at(step) > _SHARE * touch.at(step):
        step *= 2
    return Answer(
        step,
        f"With huge pages grow by {format_size(step)} or more, ending on lines of "
        f"{format_size(size)}: a smaller or crooked step gets small pages.",
        f"a step of {format_size(step)} costs {format_time(grow.at(step))}, "
        f"touching it {format_time(touch.at(step))}",
    )


def _idle(model: CostModel, table: CostTable) -> Answer:
    discard = model.of(Curve("discard", "dontneed"))
    again, kept = (model.of(Curve("retouch", way)) for way in ("after-dontneed", "resident"))
    nbytes = _longest(discard, again, kept)
    gone, touched, spared = (fit.at(nbytes) for fit in (discard, again, kept))
    gib_per_cpu = table.machine["memory"] / GiB / table.machine["cpus"]

    def seconds(cost: float) -> float:
        return cost * (GiB / nbytes) / 1e9

    per_gib = seconds(gone + touched - spared)
    low = seconds(gone.low + touched.low - spared.high) * gib_per_cpu
    high = seconds(gone.high + touched.high - spared.low) * gib_per_cpu
    idle = per_gib * gib_per_cpu
    because = (
        f"discarding 1 GiB and touching it again costs {per_gib:.2g} s of a CPU, and this machine "
        f"has {gib_per_cpu:.2g} GiB for each of its CPUs: at that price, holding 1 GiB for "
        f"{idle:.2g} s ({low:.2g} to {high:.2g}) costs as much (after Gray and Putzolu's "
        "five-minute rule, 1987)"
    )
    cold = [one for one in table.measured() if one.host == "cold" and one.cell.verb == "touch"]
    if cold:
        worst = max(one.times.median / one.cell.nbytes for one in cold if one.times) * GiB / 1e9
        because += (
            f"; if the host takes it meanwhile, touching 1 GiB again costs {worst:.2g} s, and it "
            f"pays after {worst * gib_per_cpu:.2g} s"
        )
    return Answer(idle, f"Give back what stays idle for more than {idle:.2g} s.", because)


def _lazy(model: CostModel, _table: CostTable) -> Answer:
    eager, lazy = (model.of(Curve("discard", way)) for way in ("dontneed", "free"))
    then_eager, then_lazy = (
        model.of(Curve("retouch", way)) for way in ("after-dontneed", "after-free")
    )
    fits = (eager, then_eager, lazy, then_lazy)
    nbytes = _longest(*fits)
    gone, touched, marked, kept = (fit.at(nbytes) for fit in fits)
    saved = touched - kept
    above = min(1.0, max(0.0, (marked - gone) / saved)) if saved > 0 else 1.0
    if above >= 1:
        text = "Discard eagerly (MADV_DONTNEED): lazy discard (MADV_FREE) is no cheaper here."
    else:
        likely = f"if the chance is over {above:.0%} that" if above >= 0.005 else "whenever"
        text = (
            f"Discard lazily (MADV_FREE) {likely} the memory may be used again before the system "
            "wants it, and RSS may show it until then; else eagerly (MADV_DONTNEED)."
        )
    return Answer(
        above,
        text,
        f"{format_size(nbytes)}: eager {format_time(gone)} and {format_time(touched)} to touch "
        f"again, lazy {format_time(marked)} and {format_time(kept)}; what the kernel spends on "
        "taking lazily discarded memory is not in it",
    )


def _huge(model: CostModel, _table: CostTable) -> Answer:
    kind, size = _huge_kind(model)
    small, huge = model.of(Curve("touch", "write")), model.of(Curve("touch", "write", kind))
    nbytes = _longest(small, huge)
    one, other = huge.at(nbytes), small.at(nbytes)
    above = min(1.0, one / other)
    return Answer(
        above,
        f"Huge pages win at first touch once {above:.0%} ({one.low / other.high:.0%} to "
        f"{one.high / other.low:.0%}) of each {format_size(size)} is used; if all of it is, they "
        f"are {other / one:.2g} times as fast. All of it is in memory, used or not.",
        f"touching {format_size(nbytes)} takes {format_time(small.at(nbytes))} in small pages and "
        f"{format_time(huge.at(nbytes))} in huge ones",
    )


def _longest(*fits: Fit) -> int:
    """Return the longest length, in bytes, that all of them have a good figure of; or just have."""
    common = set[float].intersection(*({pages for pages, *_ in fit.points} for fit in fits))
    sure = set[float].intersection(
        *({pages for pages, _, low, high in fit.points if high <= _SURE * low} for fit in fits)
    )
    return int(max(sure or common, default=min(fit.points[-1][0] for fit in fits))) * PAGE_SIZE


def _little(grow: Fit, touch: Fit, step: int) -> str:
    share = grow.at(step) / touch.at(step)
    return f"under {_SHARE:.0%} of touching" if share <= _SHARE else f"{share:.0%} of touching"


def _islands(_model: CostModel, table: CostTable) -> Answer:
    most, entries = table.machine["max_map_count"], table.machine["map_entries"]
    each = entries["commit mprotect"]
    islands = most if each < 1e-3 else int(most / each)  # counted at 16 places
    guards = ", ".join(
        f"{entries[way]:.2g} for a guard by {way.split()[1]}"
        for way in ("guard madvise", "guard mprotect")
        if way in entries
    )
    return Answer(
        islands,
        f"Keep separate committed pieces well under {islands:,}, or commit neighbours: growth "
        "right behind what is committed adds no map entry.",
        f"map entries counted: {each:.2g} for a piece apart from others, "
        f"{entries.get('grow mprotect', 0):.2g} for growth, {guards}; vm.max_map_count is {most:,}",
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
