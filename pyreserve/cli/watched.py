"""A process that is watched: its samples so far, and their record."""

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

from pyreserve.procmem import Sample

FIGURES = {
    "VSZ": "vsz_kib",
    "reserved": "reserved_kib",
    "committed": "committed_kib",
    "RSS": "rss_kib",
    "PSS": "pss_kib",
    "mappings": "mappings",
}
COLUMNS = ("time", *FIGURES.values())
_KEPT = 1000  # samples, more than any terminal has columns


@dataclass(slots=True)
class Series:
    """One figure since the start."""

    first: int
    low: int
    high: int
    newest: deque[int] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def add(self, value: int) -> None:
        """Note the next value."""
        self.newest.append(value)
        self.low, self.high = min(self.low, value), max(self.high, value)


class Watched:
    """A process, its samples so far, and when the next one is due."""

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
        # Tells of the end at once, and is not fooled by a new process of the same number.
        with suppress(OSError, AttributeError):  # Linux before 5.3, a Python that was built there
            self.pidfd = os.pidfd_open(self.pid)
        return self

    def __exit__(self, *_: object) -> None:
        if self.pidfd is not None:
            os.close(self.pidfd)
        if self._record is not None:
            self._record.close()

    def sample(self) -> None:
        """Take a sample and record it."""
        now = time.monotonic()
        stamp = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        sample = self._take(self.pid)
        with suppress(OSError):  # a process changes its name when it runs another program
            self.name = Path(f"/proc/{self.pid}/comm").read_text(errors="replace").rstrip("\n")
        values: dict[str, int | None] = {
            name: getattr(sample, key) for name, key in FIGURES.items()
        }
        for name, value in values.items():
            if value is not None:
                self.series.setdefault(name, Series(value, value, value)).add(value)
        # What is not known is an empty field.
        row = ("" if value is None else str(value) for value in values.values())
        self.row = (stamp.replace("+00:00", "Z"), *row)
        self.count += 1
        self.since_last, self.sampled = now - self.sampled, now
        # From deadline to deadline, so that delays don't add up; at once where one was missed.
        self.due = max(self.due + self.interval, time.monotonic())
        if self.csv is not None:
            self._write(self.csv)

    def _write(self, csv: Path) -> None:
        """Record a sample, unbuffered: a kill takes nothing of what was recorded."""
        try:
            if self._record is None:
                self._record = csv.open("wb", buffering=0)
                self._record.write(_csv_line(COLUMNS))
            self._record.write(_csv_line(self.row))
        except OSError as error:
            error.filename = str(csv)
            raise

    def wait(self, *others: int | None, until: float) -> list[int]:
        """Wait for the end of the process or for another descriptor, and return which are ready."""
        sources = [one for one in (self.pidfd, *others) if one is not None]
        left = until - time.monotonic()
        ready = select.select(sources, (), (), min(max(0.0, left), 3600.0))[0]
        self.ended = self.pidfd in ready
        return ready

    def sample_when_due(self) -> bool:
        """Take the next sample if it is time, and say whether it was; note if there is none."""
        if self.ended or time.monotonic() < self.due:
            return False
        try:
            self.sample()
        except ProcessLookupError:
            self.ended = True
        return not self.ended


def _csv_line(row: Iterable[str]) -> bytes:
    """Write a line as RFC 4180 has it; nothing here needs quotes."""
    return (",".join(row) + "\r\n").encode()
