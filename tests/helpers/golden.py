"""/proc/PID/maps of the heaps of real Go binaries, saved in data/go-traces.json."""

import json
from pathlib import Path
from typing import NamedTuple

from pyreserve import MiB

GOLDEN_PAGE = 4096
"""The OS page of the machine on which the traces were taken."""

FIRST_GROWTH = MiB
"""Bytes of arena that each runtime had used before the program touched any memory."""


class Trace(NamedTuple):
    """One run of a Go program that touched `touched_mib` MiB.

    `heap_maps` are address ranges and permissions as /proc/PID/maps shows them; `fatal` is the
    output of a run that died. `memstats` are fields of its runtime.MemStats, in bytes.
    """

    runtime: str
    goarch: str
    touched_mib: int
    rlimit_as_kib: int | None
    heap_maps: list[tuple[str, str]]
    fatal: list[str]
    memstats: dict[str, int]

    @property
    def name(self) -> str:
        """Name of the run, for test IDs."""
        limited = f"-limited-to-{self.rlimit_as_kib}KiB" if self.rlimit_as_kib else ""
        return f"{self.runtime}/{self.goarch}-{self.touched_mib}MiB{limited}"

    @property
    def layout(self) -> str:
        """The layout that the runtime tried first."""
        return f"{self.runtime}/{self.goarch}"

    @property
    def used_layout(self) -> str:
        """The layout that was used: the fallback where a limit forbade the first."""
        return "fallback" if self.rlimit_as_kib else self.layout

    @property
    def growths(self) -> int:
        """Number of times the arena had grown by 1 MiB."""
        return FIRST_GROWTH // MiB + self.touched_mib

    def ranges(self, base: int = 0) -> list[tuple[int, int, str]]:
        """Return (start, end, permissions) of the heap, relative to `base`."""
        ranges = []
        for addresses, perms in self.heap_maps:
            start, end = (int(address, 16) for address in addresses.split("-"))
            ranges.append((start - base, end - base, perms))
        return ranges


def _load() -> list[Trace]:
    text = (Path(__file__).parents[1] / "data" / "go-traces.json").read_text(encoding="ascii")
    return [
        Trace(
            runtime=run["runtime"],
            goarch=run["goarch"],
            touched_mib=run["touched_mib"],
            rlimit_as_kib=run["rlimit_as_kib"],
            heap_maps=[(addresses, perms) for addresses, perms in run.get("heap_maps", [])],
            fatal=run.get("fatal", []),
            memstats=run.get("memstats", {}),
        )
        for run in json.loads(text)
    ]


TRACES = _load()
MAPPED = [trace for trace in TRACES if trace.heap_maps]
"""The traces of runs that did not die."""
FATAL = next(trace for trace in TRACES if trace.fatal)
"""The run on 386 that filled its window."""


def find(layout: str, touched_mib: int, *, limited: bool = False) -> Trace:
    """Return the trace of one run."""
    return next(
        trace
        for trace in MAPPED
        if (trace.layout, trace.touched_mib) == (layout, touched_mib)
        and (trace.rlimit_as_kib is not None) == limited
    )
