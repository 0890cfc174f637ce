"""Which cells to measure: the smallest useful set, or all."""

import errno
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index as _index

from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import METHODS, MODES, Cell, page_kinds
from pyreserve.costs.programs import SCRIPTS, Program, Setting, untouched, write
from pyreserve.errors import OutOfMemoryError
from pyreserve.units import GiB, MiB, format_size

# Beside the memory measured: the two interpreters, and the kernel's page tables.
_BESIDE = 128 * MiB
_ARTICLE = 136 * GiB  # what Go's first 64-bit layout reserved
# Where caches end, and the kernel's lists of free pages, what touches memory bends.
_BENDS = [PAGE_SIZE * n for n in (8, 24, 32)] + [4 * MiB, 12 * MiB, 24 * MiB]
_EVERY_SCRIPT = tuple(SCRIPTS)


@dataclass(frozen=True, slots=True)
class Group:
    """Programs that are run, taking turns, in one child process."""

    setting: Setting
    programs: tuple[Program, ...]

    @property
    def memory(self) -> int:
        """How much memory its programs hold at most, in bytes."""
        return max((program.memory for program in self.programs), default=0)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `measure` is to do.

    Attributes:
        groups: what is run; see `Group`.
        unmeasurable: cells that can't be measured here, and why.
    """

    groups: tuple[Group, ...]
    unmeasurable: tuple[tuple[Cell, str], ...] = ()

    @property
    def cells(self) -> tuple[Cell, ...]:
        """Every cell that is to be measured, each once."""
        programs = (program for group in self.groups for program in group.programs)
        return tuple(dict.fromkeys(cell for program in programs for cell in program.cells))

    @property
    def memory(self) -> int:
        """How much memory measuring takes at most, in bytes."""
        return max((group.memory for group in self.groups), default=0) + _BESIDE

    def check_memory(self) -> None:
        """Refuse to begin what this machine, or this process's cgroup, has not the memory for.

        Raises:
            OutOfMemoryError: it has less than `memory`.
        """
        available = proc.available_bytes()
        if self.memory > available:
            msg = (
                f"measuring needs {format_size(self.memory)} of memory and "
                f"{format_size(available)} are available; a smaller longest piece (--longest) needs"
                " less"
            )
            raise OutOfMemoryError(errno.ENOMEM, msg, verb="populate", nbytes=self.memory)


def plan(*, full: bool = False, only: Iterable[str] | None = None, longest: int = GiB) -> Plan:
    """Choose what to measure.

    The default is what answers the common questions in a minute: small pages at lengths from one
    to 1 GiB, transparent huge pages of 2 MiB where they are switched on, the mode ``"noreserve"``
    and two threads at a few lengths.

    Args:
        full: all page kinds, both modes and one to all threads, at every power of two.
        only: verbs to measure; None for all.
        longest: the longest piece of memory, in bytes, up to 1 GiB; `Plan.memory` follows from it.

    Raises:
        ValueError: a verb that there is not, none at all, `longest` is less than an OS page, or
            nothing is left to measure.
    """
    verbs, longest = _verbs(only), _index(longest)
    if longest < PAGE_SIZE:
        msg = f"the longest piece is at least an OS page of {PAGE_SIZE} bytes, not {longest}"
        raise ValueError(msg)
    groups, unmeasurable = [], {}
    for setting, written in _full(longest) if full else _default(longest):
        programs = [program.timing_only(verbs) for program in written]
        programs = [program for program in programs if program.cells]
        if setting.kind.why_not is not None:
            for cell in (cell for program in programs for cell in program.cells):
                unmeasurable[cell] = setting.kind.why_not
        elif programs:
            groups.append(Group(setting, tuple(programs)))
    if not groups and not unmeasurable:
        msg = f"nothing to measure: no piece of {format_size(longest)} or less has these verbs"
        raise ValueError(msg)
    return Plan(tuple(groups), tuple(unmeasurable.items()))


def _verbs(only: Iterable[str] | None) -> frozenset[str]:
    if only is None:
        return frozenset(METHODS)
    verbs = [only] if isinstance(only, str) else list(only)
    unknown = [verb for verb in verbs if verb not in METHODS]
    if unknown or not verbs:
        named = f"unknown verb {unknown[0]!r}" if unknown else "no verb"
        msg = f"{named}; there are {', '.join(METHODS)}"
        raise ValueError(msg)
    return frozenset(verbs)


def _default(longest: int) -> Iterator[tuple[Setting, list[Program]]]:
    large = [2 * MiB, 8 * MiB, 16 * MiB, 32 * MiB, 128 * MiB, GiB]
    lengths = _up_to(longest, [PAGE_SIZE * n for n in (1, 4, 16, 64, 256)] + large)
    some = _up_to(longest, [PAGE_SIZE, 16 * PAGE_SIZE, 2 * MiB, 32 * MiB])
    small, *kinds = page_kinds()
    first = Setting(small, "charge", 1)
    yield (
        first,
        [
            *write(first, _EVERY_SCRIPT, lengths),
            *write(first, ("life", "populated", "forked"), _up_to(longest, _BENDS[:3])),
            *write(first, ("life", "populated"), _up_to(longest, _BENDS[3:])),
            untouched(first, _ARTICLE),
        ],
    )
    for kind in kinds:
        setting = Setting(kind, "charge", 1)
        if kind.sort == "transparent" and not kind.next_size:
            yield (
                setting,
                [
                    *write(setting, _EVERY_SCRIPT, _up_to(longest, large)),
                    *write(setting, ("life", "populated"), _up_to(longest, _BENDS[3:])),
                ],
            )
        elif kind.sort == "hugetlb" and kind.size <= 32 * MiB:
            yield setting, list(write(setting, ("life",), _up_to(longest, [kind.size])))
    names = ("life", "growth mprotect")
    for setting in (Setting(small, "noreserve", 1), Setting(small, "charge", 2)):
        if setting.threads <= _cpus():
            yield setting, list(write(setting, names, some))


def _full(longest: int) -> Iterator[tuple[Setting, list[Program]]]:
    powers = (PAGE_SIZE << shift for shift in range((GiB // PAGE_SIZE).bit_length()))
    every = sorted({*powers, *_BENDS})
    for kind in page_kinds():
        for mode in MODES if kind.sort != "hugetlb" else MODES[:1]:
            for threads in _thread_counts():
                setting = Setting(kind, mode, threads)
                programs = list(write(setting, _EVERY_SCRIPT, _up_to(longest // threads, every)))
                if setting == Setting(kind, MODES[0], 1) and kind.sort == "small":
                    programs.append(untouched(setting, _ARTICLE))
                yield setting, programs


def _up_to(longest: int, lengths: list[int]) -> list[int]:
    return [nbytes for nbytes in lengths if nbytes <= longest]


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _thread_counts() -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= _cpus():
        counts.append(counts[-1] * 2)
    return sorted({*counts, _cpus()})
