"""Choose the cells to measure: the smallest useful set, or all."""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.machine import thp_size
from pyreserve.costs.cells import METHODS, MODES, Cell, page_kinds
from pyreserve.costs.programs import SCRIPTS, Program, Setting, untouched, write
from pyreserve.errors import OutOfMemoryError
from pyreserve.units import GiB, MiB, as_bytes, format_size

# Memory besides that of the programs: two interpreters, and the kernel's page tables.
_OVERHEAD = 128 * MiB
_ARTICLE = 136 * GiB  # reserved by Go's first 64-bit layout
# The cost per page changes at the sizes of the caches and of the kernel's lists of free pages.
_BENDS = [PAGE_SIZE * n for n in (8, 24, 32)] + [4 * MiB, 12 * MiB, 24 * MiB]
_EVERY_SCRIPT = tuple(SCRIPTS)

BLOCK, HUGE = 16, 512
"""The lengths that verdicts compare, in OS pages: methods on small pages; small pages with huge
ones, and ways to fork."""


@dataclass(frozen=True, slots=True)
class Group:
    """Programs that take turns in one child process, the most important first."""

    programs: tuple[Program, ...]

    @property
    def memory(self) -> int:
        """Peak memory of its programs, in bytes."""
        return max((program.memory for program in self.programs), default=0)

    def __str__(self) -> str:
        settings = dict.fromkeys(str(program.setting) for program in self.programs)
        return "verdicts" if len(settings) > 1 else next(iter(settings), "nothing")


@dataclass(frozen=True, slots=True)
class Plan:
    """The work of `measure`.

    Attributes:
        groups: the programs to run; see `Group`.
        unmeasurable: cells that cannot be measured on this machine, and why.
    """

    groups: tuple[Group, ...]
    unmeasurable: tuple[tuple[Cell, str], ...] = ()

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells to measure, each once."""
        programs = (program for group in self.groups for program in group.programs)
        return tuple(dict.fromkeys(cell for program in programs for cell in program.cells))

    @property
    def memory(self) -> int:
        """Peak memory of measuring, in bytes."""
        return max((group.memory for group in self.groups), default=0) + _OVERHEAD

    def check_memory(self) -> None:
        """Check that enough memory is available to measure.

        Raises:
            OutOfMemoryError: this machine, or this process's cgroup, has less than `memory`.
        """
        available = proc.available_bytes()
        if self.memory > available:
            msg = (
                f"measuring needs {format_size(self.memory)} of memory, but only "
                f"{format_size(available)} is available; shorter pieces (longest, --longest) need "
                "less"
            )
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="populate", nbytes=self.memory)


def plan(
    *,
    details: bool = False,
    full: bool = False,
    only: Iterable[str] | None = None,
    longest: int | str = GiB,
) -> Plan:
    """Choose the cells to measure, the most important first.

    By default the few that the verdicts of `pyreserve.costs.recommend` need: small pages and the
    largest transparent huge page, at lengths of at most 2 MiB.

    Args:
        details: also lengths from one page to 128 MiB, for the fits of `CostModel`, and at a few
            lengths the mode ``"noreserve"`` and two threads.
        full: also all page kinds, both modes, one thread to one per CPU, at every power of two up
            to 1 GiB.
        only: verbs to measure; None for all.
        longest: length of the longest piece of memory: bytes, or a size such as ``"64MiB"``.
            `Plan.memory` depends on it.

    Raises:
        ValueError: a verb is unknown, `only` is empty, `longest` is not a size or less than an OS
            page, or no cell remains.
    """
    verbs, longest = _verbs(only), as_bytes(longest)
    if longest < PAGE_SIZE:
        msg = f"longest must be at least an OS page ({PAGE_SIZE} bytes), got {longest}"
        raise ValueError(msg)
    planned: set[Program] = set()
    groups: list[Group] = []
    unmeasurable: dict[Cell, str] = {}
    sources = [_decisions(longest)]
    if details or full:
        sources.append(_full(longest) if full else _details(longest))
    for all_programs in (programs for source in sources for programs in source):
        programs = []
        for program in (program.timing_only(verbs) for program in all_programs):
            if program.setting.kind.why_not is not None:
                unmeasurable |= dict.fromkeys(program.cells, program.setting.kind.why_not)
            elif program.cells and program not in planned:
                programs.append(program)
        planned |= set(programs)
        groups += [Group(tuple(programs))] if programs else []
    if not groups and not unmeasurable:
        msg = f"nothing to measure: these verbs have no cells of {format_size(longest)} or less"
        raise ValueError(msg)
    return Plan(tuple(groups), tuple(unmeasurable.items()))


def _verbs(only: Iterable[str] | None) -> frozenset[str]:
    if only is None:
        return frozenset(METHODS)
    verbs = [only] if isinstance(only, str) else list(only)
    unknown = [verb for verb in verbs if verb not in METHODS]
    if unknown or not verbs:
        problem = f"unknown verb {unknown[0]!r}" if unknown else "only names no verb"
        msg = f"{problem}; the verbs are {', '.join(METHODS)}"
        raise ValueError(msg)
    return frozenset(verbs)


def _decisions(longest: int) -> Iterator[list[Program]]:
    """Yield the programs whose cells verdicts compare: alternatives share a child process."""
    small, *kinds = page_kinds()
    settings = [Setting(small, "charge", 1)]
    settings += [Setting(kind, "charge", 1) for kind in kinds if kind.size == thp_size()]
    programs: list[Program] = []
    for names, lengths in (
        (("life", "growth mprotect"), (BLOCK, HUGE)),
        (("read", "growth mmap-fixed"), (BLOCK,)),
        (("populated",), (BLOCK, HUGE)),
        (("forked", "not inherited"), (HUGE,)),
        (("life", "growth mprotect"), (1,)),
    ):
        for setting in settings:
            if setting.kind is small or (names[0] in {"life", "populated"} and HUGE in lengths):
                lengths_in_bytes = [pages * PAGE_SIZE for pages in lengths]
                programs += write(setting, names, _up_to(longest, lengths_in_bytes))
    yield programs


def _details(longest: int) -> Iterator[list[Program]]:
    huge_lengths = [2 * MiB, 8 * MiB, 16 * MiB, 32 * MiB, 128 * MiB]
    lengths = [PAGE_SIZE * n for n in (1, 4, 16, 64, 256)] + huge_lengths
    small, *kinds = page_kinds()
    first = Setting(small, "charge", 1)
    yield [
        *write(first, _EVERY_SCRIPT, _up_to(longest, lengths)),
        *write(first, ("life", "populated"), _up_to(longest, _BENDS)),
        untouched(first, _ARTICLE),
    ]
    for kind in kinds:
        setting = Setting(kind, "charge", 1)
        if not kind.next_size:
            yield [
                *write(setting, _EVERY_SCRIPT, _up_to(longest, huge_lengths)),
                *write(setting, ("life", "populated"), _up_to(longest, _BENDS)),
            ]
    few_lengths = _up_to(longest, [PAGE_SIZE, 16 * PAGE_SIZE, 2 * MiB, 32 * MiB])
    for setting in (Setting(small, "noreserve", 1), Setting(small, "charge", 2)):
        if setting.threads <= _cpus():
            yield list(write(setting, ("life", "growth mprotect"), few_lengths))


def _full(longest: int) -> Iterator[list[Program]]:
    powers = (PAGE_SIZE << shift for shift in range((GiB // PAGE_SIZE).bit_length()))
    lengths = sorted({*powers, *_BENDS})
    for kind in page_kinds():
        for mode in MODES:
            for threads in _thread_counts():
                setting = Setting(kind, mode, threads)
                programs = list(write(setting, _EVERY_SCRIPT, _up_to(longest // threads, lengths)))
                if setting == Setting(kind, MODES[0], 1) and kind.sort == "small":
                    programs.append(untouched(setting, _ARTICLE))
                yield programs


def _up_to(longest: int, lengths: list[int]) -> list[int]:
    return [nbytes for nbytes in lengths if nbytes <= longest]


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _thread_counts() -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= _cpus():
        counts.append(counts[-1] * 2)
    return sorted({*counts, _cpus()})
