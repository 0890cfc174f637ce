"""The programs that `csrc/timing` runs: steps that bring a mapping into the state of each cell.

A program is the life of one mapping, from reserve to release; most of its steps are cells. The
measured piece is part of a larger reservation, as in an arena: the memory around it is reserved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.machine import thp_settings, thp_size
from pyreserve.costs.cells import Cell, Curve, PageKind, describe_setting
from pyreserve.units import MiB

_TABLE = PAGE_SIZE // 8 * PAGE_SIZE  # bytes that one table of page table entries maps
_GROWTHS = 8  # steps of growth timed in one life
_PIECES, _FRESH = 8, 128  # most pieces of a life, and the OS pages that they have together


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a program; see ``struct timing_step``.

    Attributes:
        verb: name of the enum constant, without ``TIMING_``.
        offset, nbytes: the piece of the mapping, in bytes.
        cell: the cell that its time is a sample of; None if it is not timed.
        repeat: as in C.
        bound: number of the following steps that depend on it and are dropped with it if the
            kernel refuses it; None if all of them depend on it.
    """

    verb: str
    offset: int
    nbytes: int
    cell: Cell | None = None
    repeat: int = 1
    bound: int | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """The life of one mapping; see ``struct timing_program``.

    Attributes:
        script: name of the script that wrote it.
        setting: the page kind, mode and threads of its cells.
        steps: its steps, in order.
        nbytes: length of the mapping.
        piece: length of the measured piece.
        memory: peak memory of all threads, in bytes.
        align, phase: as in C.
        advice: names of constants of ``enum vm_advice``, without ``VM_``.
    """

    script: str
    setting: "Setting"
    steps: tuple[Step, ...]
    nbytes: int
    piece: int
    memory: int
    align: int
    phase: int
    advice: tuple[str, ...]

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells that it times, each once."""
        return tuple(dict.fromkeys(step.cell for step in self.steps if step.cell is not None))

    def timing_only(self, verbs: frozenset[str]) -> "Program":
        """Return the program with only the cells of these verbs timed."""
        steps = (
            replace(step, cell=None) if step.cell and step.cell.verb not in verbs else step
            for step in self.steps
        )
        return replace(self, steps=tuple(steps))


@dataclass(frozen=True, slots=True)
class Setting:
    """The page kind, mode and threads that the cells of a program share."""

    kind: PageKind
    mode: str
    threads: int

    @property
    def unit(self) -> int:
        """Bytes that lengths are multiples of."""
        return self.kind.size

    @property
    def longest(self) -> int | None:
        """The longest piece, in bytes, that gets pages of this kind only; None if unlimited.

        The kernel uses the largest page that fits. A piece of a smaller kind therefore begins one
        page after a multiple of the next larger size and ends before a larger page fits.
        """
        if not self.kind.next_size:
            return None
        return 2 * self.kind.next_size - 2 * self.kind.size

    @property
    def advice(self) -> tuple[str, ...]:
        """The advice that gives a mapping pages of this kind; see `Program.advice`.

        Small pages need none unless the machine always gives huge ones.
        """
        if self.kind.sort == "transparent":
            return ("HUGE_PREFER",)
        return ("HUGE_NEVER",) if "always" in thp_settings().values() else ()

    def cell(self, verb: str, method: str, nbytes: int) -> Cell:
        """Return a cell of this setting."""
        return Curve(verb, method, self.kind.name, self.mode, self.threads).at(nbytes)

    def __str__(self) -> str:
        return describe_setting(self.kind.name, self.mode, self.threads)

    def program(
        self,
        script: str,
        steps: list[Step],
        piece: int,
        *,
        memory: int,
        more_advice: tuple[str, ...] = (),
    ) -> Program:
        """Return a program: reserve a unit behind what the steps use, do the steps, release."""
        advice = self.advice + more_advice
        nbytes = max(step.offset + step.nbytes for step in steps) + self.unit
        whole = [Step("RESERVE", 0, nbytes), Step("ADVISE", 0, nbytes), *steps]
        whole.append(Step("RELEASE", 0, nbytes))
        if not advice:
            whole = [step for step in whole if step.verb != "ADVISE"]
        kind = self.kind
        # Freeing page tables takes time, so their number must not depend on chance. A piece of a
        # smaller transparent kind begins one page after a multiple of the next larger size.
        align = 2 * kind.next_size or max(kind.size, _TABLE)
        first = min(step.offset for step in steps)
        phase = ((kind.size if kind.next_size else 0) - first) % align
        return Program(
            script=script,
            setting=self,
            steps=tuple(whole),
            nbytes=nbytes,
            piece=piece,
            memory=memory * self.threads,
            align=align,
            phase=phase,
            advice=advice,
        )


def untouched(s: Setting, n: int) -> Program:
    """Reserve a mapping and release it untouched."""
    steps = (
        Step("RESERVE", 0, n, s.cell("reserve", "mmap", n)),
        Step("RELEASE", 0, n, s.cell("release", "untouched", n)),
    )
    program = s.program("untouched", [Step("READ", 0, n)], n, memory=0)
    return replace(program, steps=steps, nbytes=n, align=0, phase=0)


def life(s: Setting, n: int) -> Program:
    """Commit and touch; then give pieces back and use them again, by every method.

    Several pieces take turns, so that pages have left the kernel's batch of fresh ones before they
    are given back. Lazy discard comes last: its pages are cheaper to free.
    """
    cell = s.cell
    # A new mapping has no advice: with huge pages to give it again is part of the price.
    advised = cell("advise", "hugepage", n) if s.kind.sort == "transparent" else None
    again = max(1, 1024 * PAGE_SIZE // n)
    stages = [
        Step("COMMIT", 0, n, cell("commit", "mprotect", n)),
        Step("WRITE", 0, n, cell("touch", "write", n)),
        Step("REWRITE", 0, n, cell("retouch", "resident", n), repeat=again),
        Step("DISCARD", 0, n, cell("discard", "dontneed", n), bound=1),
        Step("WRITE", 0, n, cell("retouch", "after-dontneed", n)),
        Step("UNCOMMIT", 0, n, cell("decommit", "mprotect", n)),
        Step("COMMIT", 0, n, cell("recommit", "after-mprotect", n)),
        Step("WRITE", 0, n, cell("retouch", "after-mprotect", n)),
        Step("DISCARD_OFF", 0, n, cell("decommit", "dontneed+mprotect", n), bound=2),
        Step("COMMIT", 0, n, cell("recommit", "after-dontneed+mprotect", n)),
        Step("WRITE", 0, n, cell("retouch", "after-dontneed+mprotect", n)),
        Step("DECOMMIT", 0, n, cell("decommit", "mmap-fixed", n)),
        Step("ADVISE", 0, n, advised),
        Step("COMMIT", 0, n, cell("recommit", "after-mmap-fixed", n)),
        Step("WRITE", 0, n, cell("retouch", "after-mmap-fixed", n)),
        Step("UNMAP", 0, n, cell("release", "piece", n)),
        Step("MAP", 0, n, cell("recommit", "after-release", n)),
        Step("ADVISE", 0, n, advised),
        Step("WRITE", 0, n, cell("retouch", "after-release", n)),
        Step("DISCARD_LAZY", 0, n, cell("discard", "free", n), bound=1),
        Step("WRITE", 0, n, cell("retouch", "after-free", n)),
    ]
    return _lives(s, n, "life", stages, memory=n)


def read(s: Setting, n: int) -> Program:
    """Commit by mmap(MAP_FIXED), and read."""
    stages = [
        Step("COMMIT_MAP", 0, n, s.cell("commit", "mmap-fixed", n)),
        Step("ADVISE", 0, n),
        Step("READ", 0, n, s.cell("touch", "read", n)),
    ]
    # Reads map the zero page: only page tables take memory.
    return _lives(s, n, "read", stages, memory=n // 256)


def populated(s: Setting, n: int) -> Program:
    """Commit and populate."""
    stages = [Step("COMMIT", 0, n), Step("POPULATE", 0, n, s.cell("populate", "madvise", n))]
    return _lives(s, n, "populated", stages, memory=n)


def _lives(s: Setting, n: int, script: str, stages: list[Step], memory: int) -> Program:
    """Return a program in which several short pieces, or a long one, take each stage in turn."""
    pieces = min(_PIECES, max(1, _FRESH // (n // PAGE_SIZE)))
    steps = [
        replace(
            stage,
            offset=s.unit + i * (n + s.unit),
            bound=None if stage.bound is None else pieces - 1 - i + stage.bound * pieces,
        )
        for stage in stages
        for i in range(pieces)
    ]
    return s.program(script, steps, n, memory=memory * pieces)


def growth(s: Setting, n: int, method: str, verb: str) -> Program:
    """Commit piece after piece and touch the first page of each."""
    cell, steps = s.cell("grow", method, n), [Step("COMMIT", 0, n), Step("WRITE", 0, PAGE_SIZE)]
    for i in range(1, _GROWTHS + 1):
        steps += [Step(verb, i * n, n, cell), Step("WRITE", i * n, PAGE_SIZE)]
        if verb == "COMMIT_MAP":
            steps.insert(-1, Step("ADVISE", i * n, n))
    return s.program(f"growth {method}", steps, n, memory=(_GROWTHS + 1) * max(s.unit, PAGE_SIZE))


def guards(s: Setting, n: int, method: str, guard: str, unguard: str) -> Program:
    """Guard an untouched piece inside committed memory, and remove the guard.

    Each method has its own program: guard pages leave page tables that mprotect would walk.
    """
    steps = [
        Step("COMMIT", 0, 3 * n),
        Step("WRITE", 0, PAGE_SIZE),
        Step(guard, n, n, s.cell("guard", method, n)),
        Step(unguard, n, n, s.cell("unguard", method, n)),
    ]
    return s.program(f"guards {method}", steps, n, memory=n // 256 + s.unit)


def collapsed(s: Setting, n: int) -> Program:
    """Touch small pages and collapse them into huge ones."""
    steps = [
        Step("COMMIT", 0, n),
        Step("WRITE", 0, n),
        Step("HUGE_PREFER", 0, n),
        Step("COLLAPSE", 0, n, s.cell("collapse", "madvise", n)),
    ]
    program = s.program("collapsed", steps, n, memory=n + s.unit)
    return replace(program, advice=("HUGE_NEVER",))


def forked(s: Setting, n: int) -> Program:
    """Fork with touched pages, and touch them again while the child shares them."""
    steps = [
        Step("COMMIT", 0, n),
        Step("WRITE", 0, n),
        Step("FORK", 0, n, s.cell("fork", "inherit", n)),
        Step("WRITE", 0, n, s.cell("retouch", "after-fork", n)),
        Step("REAP", 0, n),
    ]
    return s.program("forked", steps, n, memory=2 * n)


def not_inherited(s: Setting, n: int) -> Program:
    """Fork with touched pages that the child does not inherit."""
    steps = [
        Step("COMMIT", 0, n),
        Step("WRITE", 0, n),
        Step("FORK", 0, n, s.cell("fork", "dontfork", n)),
        Step("REAP", 0, n),
    ]
    return s.program("not inherited", steps, n, memory=n, more_advice=("NO_FORK",))


@dataclass(frozen=True, slots=True)
class Script:
    """A function that writes programs, and the settings and lengths that it applies to."""

    write: Callable[[Setting, int], Program]
    longest: int | None = None
    sorts: tuple[str, ...] = ("small", "transparent")
    one_thread: bool = False
    largest_kind: bool = False  # only the largest transparent size

    def suits(self, setting: Setting, nbytes: int) -> bool:
        """Whether the script applies to a setting and a length in bytes."""
        longest = min(self.longest or nbytes, setting.longest or nbytes)
        return (
            setting.kind.sort in self.sorts
            and nbytes % setting.unit == 0
            and nbytes <= longest
            and not (self.one_thread and setting.threads > 1)
            and not (self.largest_kind and setting.kind.size != thp_size())
        )


SCRIPTS: dict[str, Script] = {
    "untouched": Script(untouched, sorts=("small",)),
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
    """Yield the programs of the named scripts, for each length that a script applies to."""
    for nbytes in lengths:
        for name in names:
            if SCRIPTS[name].suits(setting, nbytes):
                yield SCRIPTS[name].write(setting, nbytes)
