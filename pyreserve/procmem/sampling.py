"""A quick look at how large a process is, and what a block of code changed of that."""

from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from pyreserve import procfs
from pyreserve.procmem.source import LiveSource
from pyreserve.procmem.table import EXECUTE, READ, SHARED, WRITE
from pyreserve.units import KiB, format_size

if TYPE_CHECKING:
    from typing_extensions import Self

_ACCESS = READ | WRITE | EXECUTE


@dataclass(frozen=True, slots=True)
class Sample:
    """How large a process is at one moment. Sizes in KiB.

    Attributes:
        vsz_kib: all its addresses (VmSize).
        reserved_kib: of them, neither readable nor writable nor executable.
        committed_kib: of them, private and writable: what may become memory of its own.
        rss_kib: in memory (Rss).
        pss_kib: in memory, what is shared divided by those who share it (Pss).
        mappings: how many there are, as vm.max_map_count counts them.
    """

    vsz_kib: int
    reserved_kib: int
    committed_kib: int
    rss_kib: int
    pss_kib: int
    mappings: int


def sample(pid: int | None = None) -> Sample:
    """Look at a process (this one by default): its maps, and smaps_rollup for what is in memory.

    Raises:
        TypeError, ValueError: `pid` is no process number.
        NoAddressSpaceError: there is no such process, or it is a zombie or a kernel thread.
        AccessError: it may not be looked into.
    """
    source = LiveSource(pid)
    table, totals = source.again(lambda: (source.table("maps"), source.text("smaps_rollup") or ""))
    rollup = dict(procfs.parse_kib(totals))
    perms, count = table.perms, table.of_process
    sizes = [table.end[i] - table.start[i] for i in range(count)]
    return Sample(
        vsz_kib=sum(sizes) // KiB,
        reserved_kib=sum(sizes[i] for i in range(count) if not perms[i] & _ACCESS) // KiB,
        committed_kib=sum(sizes[i] for i in range(count) if perms[i] & (WRITE | SHARED) == WRITE)
        // KiB,
        rss_kib=rollup.get("Rss", 0),
        pss_kib=rollup.get("Pss", 0),
        mappings=count,
    )


class track:  # noqa: N801 - it is used as a function
    """What a ``with`` block changed in this process.

    ::

        with pyreserve.track() as t:
            region = pyreserve.reserve(136 * GiB)
        assert t.reserved == 136 * GiB and t.rss < MiB
        print(t)  # VSZ +136 GiB, reserved +136 GiB, committed 0 B, RSS 0 B, mappings +1

    ``vsz``, ``reserved``, ``committed``, ``rss`` and ``pss`` are changes in bytes, ``mappings`` one
    in their number; inside the block, up to now. What Python itself allocates meanwhile counts too:
    a few KiB of RSS, now and then an arena of 1 MiB. ``before`` and ``after`` are the samples.
    """

    before: Sample
    after: Sample | None = None

    def __init__(self) -> None:
        # The first samples let Python's own memory grow to what later ones need.
        for _ in range(2):
            sample()

    def __enter__(self) -> "Self":
        self.after = None
        self.before = sample()
        return self

    def __exit__(self, *exc: object) -> None:
        self.after = sample()

    def _change(self) -> Sample:
        """Return what changed of each figure, up to now or to the end of the block."""
        after = sample() if self.after is None else self.after
        pairs = zip(astuple(after), astuple(self.before), strict=True)
        return Sample(*(new - old for new, old in pairs))

    @property
    def vsz(self) -> int:
        """Change of VSZ in bytes."""
        return self._change().vsz_kib * KiB

    @property
    def reserved(self) -> int:
        """Change of what nobody may access, in bytes."""
        return self._change().reserved_kib * KiB

    @property
    def committed(self) -> int:
        """Change of what is private and writable, in bytes."""
        return self._change().committed_kib * KiB

    @property
    def rss(self) -> int:
        """Change of what is in memory, in bytes."""
        return self._change().rss_kib * KiB

    @property
    def pss(self) -> int:
        """Change of this process's share of what is in memory, in bytes."""
        return self._change().pss_kib * KiB

    @property
    def mappings(self) -> int:
        """Change of the number of mappings."""
        return self._change().mappings

    def __str__(self) -> str:
        change = self._change()
        sizes = (
            ("VSZ", change.vsz_kib),
            ("reserved", change.reserved_kib),
            ("committed", change.committed_kib),
            ("RSS", change.rss_kib),
        )
        words = [f"{name} {'+' if kib > 0 else ''}{format_size(kib * KiB)}" for name, kib in sizes]
        mappings = change.mappings
        return ", ".join([*words, f"mappings {mappings:+}" if mappings else "mappings 0"])

    __repr__ = __str__
