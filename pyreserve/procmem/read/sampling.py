"""Sample the sizes of a process, and measure what a block of code changes."""

import errno
from typing import TYPE_CHECKING, NamedTuple

from pyreserve._system import proc
from pyreserve.errors import AccessError, StateError
from pyreserve.procmem.read.sources import LiveSource, name_exhausted_limit
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from typing_extensions import Self


class Sample(NamedTuple):
    """The sizes of a process at one moment, in bytes.

    Attributes:
        vsz: virtual size (VmSize).
        reserved: the part of VSZ that is neither readable nor writable nor executable.
        committed: the part of VSZ that is private and writable.
        rss: resident memory (Rss; VmRSS if neither smaps_rollup nor smaps can be read).
        pss: resident memory, shared pages divided by the number of their users (Pss); None if
            neither smaps_rollup nor smaps can be read.
        mappings: number of mappings, as vm.max_map_count counts them.
    """

    vsz: int
    reserved: int
    committed: int
    rss: int
    pss: int | None
    mappings: int

    def since(self, before: "Sample") -> "Sample":
        """Return the change of each figure; ``pss`` is None unless both samples know it."""
        both_known = self.pss is not None and before.pss is not None
        return Sample(
            vsz=self.vsz - before.vsz,
            reserved=self.reserved - before.reserved,
            committed=self.committed - before.committed,
            rss=self.rss - before.rss,
            pss=(self.pss or 0) - (before.pss or 0) if both_known else None,
            mappings=self.mappings - before.mappings,
        )


def sample(pid: int | None = None) -> Sample:
    """Read the sizes of a process (this one by default) from its maps and smaps_rollup.

    Without smaps_rollup (Linux before 4.14, some sandboxes) smaps is added up.

    Raises:
        TypeError, ValueError: `pid` is not a positive integer.
        NoAddressSpaceError: there is no such process, or it is a zombie or a kernel thread.
        AccessError: the process may not be read, or /proc is not mounted.
        OutOfMemoryError: memory ran out; the error names the limit.
    """
    source = LiveSource(pid)
    with name_exhausted_limit():
        sums, (rss, pss) = source.retry_after_exec(lambda: (source.sums(), resident(source)))
    return Sample(sums.size, sums.reserved, sums.committed, rss, pss, sums.mappings)


def resident(source: LiveSource) -> tuple[int, int | None]:
    """Return a process's Rss and Pss in bytes; Pss is None if it can't be read."""
    text = source.text("smaps_rollup")
    if text is not None:
        rollup = dict(proc.parse_kib(text))
        return rollup.get("Rss", 0) * KiB, rollup.get("Pss", 0) * KiB
    smaps = source.smaps()
    if smaps is not None:
        return sum(smaps.rss) * KiB, sum(smaps.pss) * KiB
    status = dict(proc.parse_kib(source.text("status") or ""))
    if "VmRSS" not in status:
        msg = "resident memory is not known: none of smaps_rollup, smaps and status can be read"
        raise AccessError(errno.EACCES, msg)
    return status["VmRSS"] * KiB, None


class track:  # noqa: N801 - used like a function
    """Measure what a ``with`` block changes in this process.

    ::

        with pyreserve.track() as t:
            region = pyreserve.reserve(136 * GiB)
        assert t.reserved == 136 * GiB and t.rss < MiB
        print(t)  # VSZ +136 GiB, reserved +136 GiB, committed 0 B, RSS 0 B, mappings +1

    ``vsz``, ``reserved``, ``committed``, ``rss`` and ``pss`` are changes in bytes, ``mappings`` is
    the change in the number of mappings; inside the block, they are changes so far. Python's own
    allocations are included: a few KiB of RSS, sometimes an arena of 1 MiB. ``before`` and
    ``after`` are the samples.

    Entering, leaving and reading raise what `sample` raises.
    """

    _before: Sample | None = None
    _after: Sample | None = None

    def __init__(self) -> None:
        # Let Python's own memory grow now to what later samples need.
        for _ in range(2):
            sample()

    def __enter__(self) -> "Self":
        self._after = None
        self._before = sample()
        return self

    def __exit__(self, *exc: object) -> None:
        self._after = sample()

    @property
    def before(self) -> Sample:
        """The sample taken at the beginning of the block.

        Raises:
            StateError: the ``with`` block has not begun.
        """
        if self._before is None:
            msg = "track must be entered first: with pyreserve.track() as t"
            raise StateError(msg)
        return self._before

    @property
    def after(self) -> Sample | None:
        """The sample taken at the end of the block; None inside it."""
        return self._after

    def _change(self) -> Sample:
        """Return the change of each figure, up to now or to the end of the block."""
        return (sample() if self.after is None else self.after).since(self.before)

    @property
    def vsz(self) -> int:
        """Change of VSZ in bytes."""
        return self._change().vsz

    @property
    def reserved(self) -> int:
        """Change of the reserved size (no access), in bytes."""
        return self._change().reserved

    @property
    def committed(self) -> int:
        """Change of the private writable size, in bytes."""
        return self._change().committed

    @property
    def rss(self) -> int:
        """Change of RSS in bytes."""
        return self._change().rss

    @property
    def pss(self) -> int | None:
        """Change of PSS in bytes; None if not known."""
        return self._change().pss

    @property
    def mappings(self) -> int:
        """Change of the number of mappings."""
        return self._change().mappings

    def __str__(self) -> str:
        change = self._change()
        sizes = (
            ("VSZ", change.vsz),
            ("reserved", change.reserved),
            ("committed", change.committed),
            ("RSS", change.rss),
        )
        words = [f"{name} {'+' if size > 0 else ''}{format_size(size)}" for name, size in sizes]
        mappings = change.mappings
        words.append(f"mappings {mappings:+}" if mappings else "mappings 0")
        if change.pss is None:
            words.append("PSS not known (smaps can't be read)")
        return ", ".join(words)

    __repr__ = __str__
