"""The result of a cell, and the noise of a run. Imports cells and their statistics only."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyreserve.costs.cells import Cell
from pyreserve.costs.stats import Times

MEASURED_FACTS = frozenset({"system_call_ns", "map_entries"})
"""The facts of `CostTable.machine` that a run measures: they may differ on the same machine."""

# Noise thresholds: CPUs busy elsewhere, CPUs stolen, relative spread of system call times.
_OTHERS, _STOLEN, _SPREAD = 0.25, 0.1, 0.25


@dataclass(frozen=True, slots=True)
class Measured:
    """A cell and its result.

    Attributes:
        cell: the cell.
        host: ``"cold"`` for samples whose memory the hypervisor had to supply (it takes idle memory
            from a virtual machine), ``"warm"`` for all others. The two are never mixed.
        times: the statistics of its samples; None if it could not be measured.
        why: why it could not be measured.
        passes: all samples in ns, pass by pass in the order measured; empty if read from JSON.
    """

    cell: Cell
    host: str
    times: Times | None
    why: str | None = None
    passes: Sequence[Sequence[float]] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Noise:
    """Other load on the machine during the measurement.

    Attributes:
        other_cpus: average number of CPUs that other processes kept busy.
        stolen_cpus: average number of CPUs whose time the hypervisor gave to other machines.
        speed_spread: interquartile range of a fixed system call's time over the passes, as a share
            of its median.
    """

    other_cpus: float
    stolen_cpus: float
    speed_spread: float

    def why(self, cpus: int) -> str | None:
        """Return why small changes are doubtful on a machine of `cpus` CPUs; None if not."""
        if self.other_cpus > max(_OTHERS, cpus / 8):
            return f"other processes kept {self.other_cpus:.1f} CPUs busy"
        if self.stolen_cpus > _STOLEN:
            return f"the hypervisor gave the time of {self.stolen_cpus:.1f} CPUs to others"
        if self.speed_spread > _SPREAD:
            return f"a fixed system call's times differed by {self.speed_spread:.0%} between passes"
        return None
