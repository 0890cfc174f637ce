"""The samples of a watched process, and their CSV file."""

import io
import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from pyreserve._system import proc
from pyreserve.procmem import Sample
from pyreserve.units import KiB

FIGURES = {
    "VSZ": "vsz_kib",
    "reserved": "reserved_kib",
    "committed": "committed_kib",
    "RSS": "rss_kib",
    "PSS": "pss_kib",
    "mappings": "mappings",
}
COLUMNS = ("time", *FIGURES.values())
_MAX_SAMPLES = 1000  # more than a terminal has columns


@dataclass(slots=True)
class Series:
    """The history of one figure: its newest values, and the first, lowest and highest of all."""

    first: int
    low: int
    high: int
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=_MAX_SAMPLES))

    def add(self, value: int) -> None:
        """Append the next value."""
        self.newest.append(value)
        self.low, self.high = min(self.low, value), max(self.high, value)


class Watched:
    """A process, its samples so far, and the time of the next sample."""

    def __init__(
        self, pid: int, interval: float, take: Callable[[int], Sample], csv: Path | None
    ) -> None:
        self.pid, self.interval, self.csv, self._take = pid, interval, csv, take
        self.series: dict[str, Series] = {}
        self.row: tuple[str, ...] = ()
        self.name = ""
        self.count = 0
        self.ended = False
        self.began = self.sampled = self.due = time.monotonic()
        self.since_last = 0.0
        self._record: io.FileIO | None = None
        self.pidfd: int | None = None

    def __enter__(self) -> "Watched":
        # A pidfd reports the end at once, and can't refer to a new process with the same PID.
        with suppress(OSError, AttributeError):  # Linux before 5.3, or a Python built there
            self.pidfd = os.pidfd_open(self.pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
        if self._record is not None:
            self._record.close()

    def sample(self) -> None:
        """Take a sample and write it to the file.

        Raises:
            ProcessLookupError: the process has ended.
            PermissionError: it can't be read.
            OSError: the file can't be written.
        """
        now = time.monotonic()
        stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        sample = self._take(self.pid)
        with suppress(OSError):  # read again each time: exec changes the name
            self.name = proc.command_name(self.pid)
        values: dict[str, int | None] = {
            name: _in_unit(sample, key) for name, key in FIGURES.items()
        }
        for name, value in values.items():
            if value is not None:
                self.series.setdefault(name, Series(value, value, value)).add(value)
        # An unknown value is an empty field.
        row = ("" if value is None else str(value) for value in values.values())
        self.row = (stamp.replace("+00:00", "Z"), *row)
        self.count += 1
        self.since_last, self.sampled = now - self.sampled, now
        # Count from the previous deadline, so that delays don't add up; a missed one is due now.
        self.due = max(self.due + self.interval, time.monotonic())
        if self.csv is not None:
            self._write(self.csv)

    def _write(self, csv: Path) -> None:
        """Write a sample unbuffered, so that a kill loses none."""
        try:
            if self._record is None:
                self._record = csv.open("wb", buffering=0)
                self._record.write(_csv_line(COLUMNS))
            self._record.write(_csv_line(self.row))
        except OSError as error:
            error.filename = str(csv)
            raise

    def wait(self, *others: int | None, until: float) -> list[int]:
        """Wait for the end of the process, another descriptor or a time; return the ready ones."""
        sources = [fd for fd in (self.pidfd, *others) if fd is not None]
        left = until - time.monotonic()
        ready = select.select(sources, (), (), min(max(0.0, left), 3600.0))[0]
        self.ended = self.pidfd in ready
        return ready

    def sample_when_due(self) -> bool:
        """Take the next sample if it is due; return whether one was taken. May set `ended`."""
        if self.ended or time.monotonic() < self.due:
            return False
        try:
            self.sample()
        except ProcessLookupError:
            self.ended = True
        return not self.ended


def _in_unit(sample: Sample, key: str) -> int | None:
    """Return a figure of a sample in the unit that its key names."""
    value: int | None = getattr(sample, key.removesuffix("_kib"))
    return value // KiB if value is not None and key.endswith("_kib") else value


def _csv_line(row: Iterable[str]) -> bytes:
    """Return a line in the form of RFC 4180; no field needs quotes."""
    return (",".join(row) + "\r\n").encode()
