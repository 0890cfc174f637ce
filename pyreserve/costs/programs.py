"""The programs that `csrc/timing` runs: how a mapping is brought to where a cell can be timed.

Each is a short life of one mapping, and most of its steps are cells themselves. The piece measured
is always part of a larger reservation, as in an arena: what is beside it is not accessible.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pyreserve._native import lib
from pyreserve._system.features import thp_size
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.costs.cells import Cell, Curve, PageKind, describe_setting
from pyreserve.units import MiB

_GROWTHS = 8  # steps of growth timed in one life


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a program; see ``struct timing_step``.

    Attributes:
        verb: name of the enum constant behind ``TIMING_``.
        offset, nbytes: the piece of the mapping.
        cell: what its time is a sample of; None if it is not timed.
        repeat: as in C.
        bound: how many of the next steps make no sense without it, so that if the kernel refuses it
            the others can go on; None if all of them do.
    """

    verb: str
    offset: int
    nbytes: int
    cell: Cell | None = None
    repeat: int = 1
    bound: int | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """A life of one mapping; see ``struct timing_program``.

    Attributes:
        script: which of this module's scripts wrote it.
        steps: what is done.
        nbytes: length of the mapping.
        piece: length of the piece that is measured.
        memory: how much memory it holds at most, on all threads, in bytes.
        align, phase, huge, access, advice: as in C.
        threads: how many run it at once.
    """

    script: str
    steps: tuple[Step, ...]
    nbytes: int
    piece: int
    memory: int
    align: int
    phase: int
    huge: int
    access: int
    advice: int
    threads: int

    @property
    def cells(self) -> tuple[Cell, ...]:
        """What it times, each once."""
        return tuple(dict.fromkeys(step.cell for step in self.steps if step.cell is not None))

    def timing_only(self, verbs: frozenset[str]) -> "Program":
        """Return the program with the cells of other verbs left untimed."""
        steps = (
            replace(step, cell=None) if step.cell and step.cell.verb not in verbs else step
            for step in self.steps
        )
        return replace(self, steps=tuple(steps))


@dataclass(frozen=True, slots=True)
class Setting:
    """What the cells of a program have in common."""

    kind: PageKind
    mode: str
    threads: int

    @property
    def unit(self) -> int:
        """What lengths are multiples of, in bytes."""
        return self.kind.size

    @property
    def longest(self) -> int | None:
        """The longest piece that can be kept to this kind; None for any.

        The kernel takes the largest page that fits, so a piece of the smaller kinds has to begin
        right after a line of the next larger one, and to end before that could fit.
        """
        if not self.kind.next_size:
            return None
        return 2 * self.kind.next_size - 2 * self.kind.size

    @property
    def advice(self) -> int:
        """The advice that a mapping needs to be backed so."""
        # A kernel without transparent huge pages refuses advice about them.
        if self.kind.sort == "hugetlb" or thp_size() is None:
            return 0
        return int(lib.VM_HUGE_NEVER if self.kind.sort == "small" else lib.VM_HUGE_PREFER)

    def cell(self, verb: str, method: str, nbytes: int) -> Cell:
        """Return a cell of this setting."""
        return Curve(verb, method, self.kind.name, self.mode, self.threads).at(nbytes)

    def __str__(self) -> str:
        return describe_setting(self.kind.name, self.mode, self.threads)

    def program(
        self, script: str, steps: list[Step], piece: int, *, memory: int, advice: int | None = None
    ) -> Program:
        """Put steps between a reservation with room behind the piece and its release.

        The last of the steps may be the release.
        """
        nbytes = max(step.offset + step.nbytes for step in steps) + self.unit
        every = [Step("RESERVE", 0, nbytes), Step("ADVISE", 0, nbytes), *steps]
        if every[-1].verb == "RELEASE":
            every[-1] = replace(every[-1], nbytes=nbytes)
        else:
            every.append(Step("RELEASE", 0, nbytes))
        kind = self.kind
        align = phase = 0
        if kind.sort == "transparent":
            align = 2 * kind.next_size or kind.size
            phase = kind.size if kind.next_size else 0
        return Program(
            script=script,
            steps=tuple(every),
            nbytes=nbytes,
            piece=piece,
            memory=memory * self.threads,
            align=align,
            phase=phase,
            huge=kind.size if kind.sort == "hugetlb" else 0,
            access=lib.VM_NORESERVE if self.mode == "noreserve" else 0,
            advice=self.advice if advice is None else advice,
            threads=self.threads,
        )


def untouched(s: Setting, n: int) -> Program:
    """Reserve, and release at once."""
    steps = (
        Step("RESERVE", 0, n, s.cell("reserve", "mmap", n)),
        Step("RELEASE", 0, n, s.cell("release", "untouched", n)),
    )
    whole = s.program("untouched", [Step("RELEASE", 0, n)], n, memory=0)
    return replace(whole, steps=steps, nbytes=n, align=0, phase=0)


def life(s: Setting, n: int) -> Program:
    """Commit, touch, discard, decommit and commit again, in each way that works on one piece."""
    cell = s.cell
    steps = [
        Step("COMMIT", 0, n, cell("commit", "mprotect", n)),
        Step("WRITE", 0, n, cell("touch", "write", n)),
        Step("REWRITE", 0, n, cell("retouch", "resident", n), repeat=max(1, 1024 * PAGE_SIZE // n)),
        Step("DISCARD", 0, n, cell("discard", "dontneed", n), bound=1),
        Step("WRITE", 0, n, cell("retouch", "after-dontneed", n)),
        Step("DISCARD_LAZY", 0, n, cell("discard", "free", n), bound=1),
        Step("WRITE", 0, n, cell("retouch", "after-free", n)),
        Step("UNCOMMIT", 0, n, cell("decommit", "mprotect", n)),
        Step("COMMIT", 0, n, cell("recommit", "after-mprotect", n)),
        Step("DISCARD_OFF", 0, n, cell("decommit", "dontneed+mprotect", n), bound=1),
        Step("COMMIT", 0, n, cell("recommit", "after-dontneed+mprotect", n)),
        Step("WRITE", 0, n),
        Step("DECOMMIT", 0, n, cell("decommit", "mmap-fixed", n)),
        Step("ADVISE", 0, n),
        Step("COMMIT", 0, n, cell("recommit", "after-mmap-fixed", n)),
    ]
    return s.program("life", steps, n, memory=n)


def read(s: Setting, n: int) -> Program:
    """Commit by mapping anew, and read."""
    steps = [
        Step("COMMIT_MAP", 0, n, s.cell("commit", "mmap-fixed", n)),
        Step("ADVISE", 0, n),
        Step("READ", 0, n, s.cell("touch", "read", n)),
    ]
    # Small pages read from the page of zeros, and take memory for page tables alone.
    return s.program("read", steps, n, memory=n if s.kind.sort == "hugetlb" else n // 256)


def populated(s: Setting, n: int) -> Program:
    """Commit, populate, and release with all of it in memory."""
    steps = [
        Step("COMMIT", 0, n),
        Step("POPULATE", 0, n, s.cell("populate", "madvise", n)),
        Step("RELEASE", 0, n, s.cell("release", "touched", n)),
    ]
    return s.program("populated", steps, n, memory=n)


def growth(s: Setting, n: int, method: str, verb: str) -> Program:
    """Commit piece after piece and touch the beginning of each."""
    cell, steps = s.cell("grow", method, n), [Step("COMMIT", 0, n), Step("WRITE", 0, PAGE_SIZE)]
    for i in range(1, _GROWTHS + 1):
        steps += [Step(verb, i * n, n, cell), Step("WRITE", i * n, PAGE_SIZE)]
        if verb == "COMMIT_MAP":
            steps.insert(-1, Step("ADVISE", i * n, n))
    return s.program(f"growth {method}", steps, n, memory=(_GROWTHS + 1) * max(s.unit, PAGE_SIZE))


def guards(s: Setting, n: int, method: str, guard: str, unguard: str) -> Program:
    """Guard an untouched piece in the middle of a committed one, and take the guard away.

    A life for each method: guard pages leave page tables behind, and mprotect would walk them.
    """
    steps = [
        Step("COMMIT", 0, 3 * n),
        Step("WRITE", 0, PAGE_SIZE),
        Step(guard, n, n, s.cell("guard", method, n)),
        Step(unguard, n, n, s.cell("unguard", method, n)),
    ]
    return s.program(f"guards {method}", steps, n, memory=n // 256 + s.unit)


def collapsed(s: Setting, n: int) -> Program:
    """Touch small pages, and make huge ones of them."""
    steps = [
        Step("COMMIT", 0, n),
        Step("WRITE", 0, n),
        Step("HUGE_PREFER", 0, n),
        Step("COLLAPSE", 0, n, s.cell("collapse", "madvise", n)),
    ]
    never = int(lib.VM_HUGE_NEVER)
    return s.program("collapsed", steps, n, memory=n + s.unit, advice=never)


def forked(s: Setting, n: int) -> Program:
    """Fork with touched pages, and touch them again while the child has them too."""
    steps = [
        Step("COMMIT", 0, n),
        Step("WRITE", 0, n),
        Step("FORK", 0, n, s.cell("fork", "inherit", n)),
        Step("WRITE", 0, n, s.cell("retouch", "after-fork", n)),
        Step("REAP", 0, n),
    ]
    return s.program("forked", steps, n, memory=2 * n)


def not_inherited(s: Setting, n: int) -> Program:
    """Fork with touched pages that the child does not get."""
    steps = [
        Step("COMMIT", 0, n),
        Step("WRITE", 0, n),
        Step("FORK", 0, n, s.cell("fork", "dontfork", n)),
        Step("REAP", 0, n),
    ]
    whole = s.program("not inherited", steps, n, memory=n)
    return replace(whole, advice=whole.advice | lib.VM_NO_FORK)


@dataclass(frozen=True, slots=True)
class Script:
    """A way to write programs, and for which settings and lengths it makes sense."""

    write: Callable[[Setting, int], Program]
    longest: int | None = None
    sorts: tuple[str, ...] = ("small", "transparent", "hugetlb")
    one_thread: bool = False
    largest_kind: bool = False  # the largest of the transparent sizes alone

    def suits(self, setting: Setting, nbytes: int) -> bool:
        """Whether a setting has such programs for pieces of a length."""
        longest = min(self.longest or nbytes, setting.longest or nbytes)
        return (
            setting.kind.sort in self.sorts
            and nbytes % setting.unit == 0
            and nbytes <= longest
            and not (self.one_thread and setting.threads > 1)
            and not (self.largest_kind and setting.kind.size != thp_size())
        )


SCRIPTS: dict[str, Script] = {
    "untouched": Script(untouched, sorts=("small", "hugetlb")),
    "life": Script(life),
    "read": Script(read),
    "populated": Script(populated),
    "growth mprotect": Script(lambda s, n: growth(s, n, "mprotect", "COMMIT"), 128 * MiB),
    "growth mmap-fixed": Script(lambda s, n: growth(s, n, "mmap-fixed", "COMMIT_MAP"), 128 * MiB),
    "guards madvise": Script(
        lambda s, n: guards(s, n, "madvise", "GUARD", "UNGUARD"), 128 * MiB, ("small",)
    ),
    "guards mprotect": Script(
        lambda s, n: guards(s, n, "mprotect", "UNCOMMIT", "COMMIT"), 128 * MiB, ("small",)
    ),
    "collapsed": Script(collapsed, 128 * MiB, ("transparent",), largest_kind=True),
    "forked": Script(forked, 128 * MiB, one_thread=True),
    "not inherited": Script(not_inherited, 128 * MiB, one_thread=True),
}


def write(setting: Setting, names: tuple[str, ...], lengths: list[int]) -> Iterator[Program]:
    """Write the programs of the named scripts at each length that they make sense for."""
    for nbytes in lengths:
        for name in names:
            if SCRIPTS[name].suits(setting, nbytes):
                yield SCRIPTS[name].write(setting, nbytes)
