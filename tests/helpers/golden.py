"""What real Go binaries showed: /proc/PID/maps of their heaps, in data/go-traces.json."""

import json
from pathlib import Path
from typing import NamedTuple

from pyreserve import MiB

GOLDEN_PAGE = 4096
"""The OS page of the machine on which the traces were taken."""

FIRST_GROWTH = MiB
"""What each of those runtimes had taken of its arena before the program touched anything."""


class Trace(NamedTuple):
    """One run of a Go program that touched so many MiB.

    `heap_maps` are address ranges and permissions as /proc/PID/maps shows them; `fatal` is what a
    run that died wrote. `memstats` are fields of its runtime.MemStats, in bytes.
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
        """For the test report."""
        limited = f"-limited-to-{self.rlimit_as_kib}KiB" if self.rlimit_as_kib else ""
        return f"{self.runtime}/{self.goarch}-{self.touched_mib}MiB{limited}"

    @property
    def layout(self) -> str:
        """The layout that was asked for."""
        return f"{self.runtime}/{self.goarch}"

    @property
    def used_layout(self) -> str:
        """The layout that was had, which is another one where a limit forbade the first."""
        return "fallback" if self.rlimit_as_kib else self.layout

    @property
    def growths(self) -> int:
        """How often the arena had grown by 1 MiB."""
        return FIRST_GROWTH // MiB + self.touched_mib

    def ranges(self, base: int = 0) -> list[tuple[int, int, str]]:
        """Return (start, end, permissions) of the heap, less `base`."""
        found = []
        for addresses, perms in self.heap_maps:
            start, end = (int(address, 16) for address in addresses.split("-"))
            found.append((start - base, end - base, perms))
        return found


def _load() -> list[Trace]:
    text = (Path(__file__).parents[1] / "data" / "go-traces.json").read_text(encoding="ascii")
    return [
        Trace(
            runtime=found["runtime"],
            goarch=found["goarch"],
            touched_mib=found["touched_mib"],
            rlimit_as_kib=found["rlimit_as_kib"],
            heap_maps=[(addresses, perms) for addresses, perms in found.get("heap_maps", [])],
            fatal=found.get("fatal", []),
            memstats=found.get("memstats", {}),
        )
        for found in json.loads(text)
    ]


TRACES = _load()
MAPPED = [trace for trace in TRACES if trace.heap_maps]
"""The traces of runs that lived."""
FATAL = next(trace for trace in TRACES if trace.fatal)
"""The run on 386 that used its window up."""


def find(layout: str, touched_mib: int, *, limited: bool = False) -> Trace:
    """Return the trace of one run."""
    return next(
        trace
        for trace in MAPPED
        if (trace.layout, trace.touched_mib) == (layout, touched_mib)
        and (trace.rlimit_as_kib is not None) == limited
    )
