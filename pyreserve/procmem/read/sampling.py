"""Sample the sizes of a process, and measure what a block of code changes."""

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyreserve._system import proc
from pyreserve.errors import AccessError
from pyreserve.procmem.read.sources import LiveSource, name_exhausted_limit
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, slots=True)
class Sample:
    """The sizes of a process at one moment, in KiB.

    Attributes:
        vsz_kib: virtual size (VmSize).
        reserved_kib: the part of VSZ that is neither readable nor writable nor executable.
        committed_kib: the part of VSZ that is private and writable.
        rss_kib: resident memory (Rss; VmRSS if neither smaps_rollup nor smaps can be read).
        pss_kib: resident memory, shared pages divided by the number of their users (Pss); None if
            neither smaps_rollup nor smaps can be read.
        mappings: number of mappings, as vm.max_map_count counts them.
    """

    vsz_kib: int
    reserved_kib: int
    committed_kib: int
    rss_kib: int
    pss_kib: int | None
    mappings: int


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
    return Sample(
        vsz_kib=sums.size // KiB,
        reserved_kib=sums.reserved // KiB,
        committed_kib=sums.committed // KiB,
        rss_kib=rss,
        pss_kib=pss,
        mappings=sums.mappings,
    )


def resident(source: LiveSource) -> tuple[int, int | None]:
    """Return a process's Rss and Pss in KiB; Pss is None if it can't be read."""
    text = source.text("smaps_rollup")
    if text is not None:
        rollup = dict(proc.parse_kib(text))
        return rollup.get("Rss", 0), rollup.get("Pss", 0)
    smaps = source.smaps()
    if smaps is not None:
        return sum(smaps.rss), sum(smaps.pss)
    status = dict(proc.parse_kib(source.text("status") or ""))
    if "VmRSS" not in status:
        msg = "resident memory is not known: none of smaps_rollup, smaps and status can be read"
        raise AccessError(errno.EACCES, msg)
    return status["VmRSS"], None


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

    _before: Sample
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
        """The sample taken at the beginning of the block."""
        return self._before

    @property
    def after(self) -> Sample | None:
        """The sample taken at the end of the block; None inside it."""
        return self._after

    def _change(self) -> Sample:
        """Return the change of each figure, up to now or to the end of the block."""
        after = sample() if self.after is None else self.after
        before = self.before
        known = after.pss_kib is not None and before.pss_kib is not None
        return Sample(
            vsz_kib=after.vsz_kib - before.vsz_kib,
            reserved_kib=after.reserved_kib - before.reserved_kib,
            committed_kib=after.committed_kib - before.committed_kib,
            rss_kib=after.rss_kib - before.rss_kib,
            pss_kib=(after.pss_kib or 0) - (before.pss_kib or 0) if known else None,
            mappings=after.mappings - before.mappings,
        )

    @property
    def vsz(self) -> int:
        """Change of VSZ in bytes."""
        return self._change().vsz_kib * KiB

    @property
    def reserved(self) -> int:
        """Change of the reserved size (no access), in bytes."""
        return self._change().reserved_kib * KiB

    @property
    def committed(self) -> int:
        """Change of the private writable size, in bytes."""
        return self._change().committed_kib * KiB

    @property
    def rss(self) -> int:
        """Change of RSS in bytes."""
        return self._change().rss_kib * KiB

    @property
    def pss(self) -> int | None:
        """Change of PSS in bytes; None if not known."""
        kib = self._change().pss_kib
        return None if kib is None else kib * KiB

    @property
    def mappings(self) -> int:
        """Change of the number of mappings."""
        return self._change().mappings

    def __str__(self) -> str:
        change = self._change()
        sizes_kib = (
            ("VSZ", change.vsz_kib),
            ("reserved", change.reserved_kib),
            ("committed", change.committed_kib),
            ("RSS", change.rss_kib),
        )
        words = [
            f"{name} {'+' if kib > 0 else ''}{format_size(kib * KiB)}" for name, kib in sizes_kib
        ]
        mappings = change.mappings
        words.append(f"mappings {mappings:+}" if mappings else "mappings 0")
        if change.pss_kib is None:
            words.append("PSS not known (smaps can't be read)")
        return ", ".join(words)

    __repr__ = __str__
