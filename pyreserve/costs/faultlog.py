"""A sample of this process's page faults: the Python interface of ``csrc/faultlog``.

`FaultLog` records one fault of `PERIOD` with its address, and each new mapping. `places` divides
the faults by the mapping that they fell into.
"""

import errno
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

from pyreserve._native import ffi, lib
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.maps import SHARED, MapTable
from pyreserve.units import KiB, MiB, round_up

PERIOD = 127
"""One fault of this number is recorded; odd, so that no pattern of a program keeps step with it."""

FAULT: int = lib.FAULTLOG_FAULT
ANONYMOUS: int = lib.FAULTLOG_ANONYMOUS
OTHER: int = lib.FAULTLOG_OTHER
FORK: int = lib.FAULTLOG_FORK
LOST: int = lib.FAULTLOG_LOST

_MOST_EVENTS = 256  # file descriptors of one log; with more, only the calling thread is recorded
_RINGS = tuple(size for size in (512 * KiB, 128 * KiB, 64 * KiB) if size >= PAGE_SIZE)
_MOST_MEMORY = 16 * MiB
_CHUNK = 4096
_RECORD = struct.Struct("=4Q")


class Record(NamedTuple):
    """A record of the log; see ``struct faultlog_record``."""

    time: int
    address: int
    length: int
    kind: int


class Extent(NamedTuple):
    """The addresses of a mapping, and whether its memory is private and anonymous."""

    start: int
    end: int
    anonymous: bool


class FaultLog:
    """A running log. Its methods may be called by one thread at a time; a child has no records.

    It records the thread that starts it, the threads that exist then unless they are too many,
    and the threads that those start.

    Raises:
        OSError: the kernel does not allow a log; the errno is that of ``perf_event_open``.
    """

    def __init__(self) -> None:
        cpus = os.cpu_count() or 1
        threads = [threading.get_native_id()]
        try:
            others = [tid for tid in proc.own_threads() if tid != threads[0]]
        except proc.UNREADABLE:
            others = []
        if (1 + len(others)) * cpus <= _MOST_EVENTS:
            threads += others
        log = ffi.new("struct faultlog **")
        for ring in _RINGS:
            if ring * cpus > _MOST_MEMORY and ring != _RINGS[-1]:
                continue
            err = lib.faultlog_open(threads, len(threads), PERIOD, ring, log)
            if err not in {errno.EPERM, errno.ENOMEM}:  # the limit on the memory of rings
                break
        if err:
            raise OSError(err, os.strerror(err))
        self._log: Any = ffi.gc(log[0], lib.faultlog_close)

    def take(self) -> list[Record]:
        """Return the records since the last call, in order of time; none after `stop`."""
        if self._log is None:
            return []
        records = ffi.new("struct faultlog_record[]", _CHUNK)
        taken: list[Record] = []
        while count := lib.faultlog_take(self._log, records, _CHUNK):
            taken += map(Record._make, _RECORD.iter_unpack(ffi.buffer(records)[: 32 * count]))
        taken.sort()
        return taken

    def stop(self) -> None:
        """Stop recording and free the log."""
        log, self._log = self._log, None
        if log is not None:
            ffi.release(log)


class Fresh:
    """The faults in one mapping that could have been huge: in whole aligned huge pages of it.

    A huge page that was touched before the mapping held the whole of it stays small.
    """

    __slots__ = ("samples", "small")

    def __init__(self) -> None:
        self.samples: dict[int, int] = {}  # by number of the huge page
        self.small: set[int] = set()  # numbers of those that stay small

    def faults(self, weight: float, least: int = 1) -> float:
        """Return the number of faults if each sample stands for `weight` of them.

        With `least` only those in huge pages with as many samples.
        """
        return weight * sum(n for n in self.samples.values() if n >= least)

    def huge_pages(self, weight: float, pages: int, least: int = 1) -> float:
        """Return the number of huge pages of `pages` OS pages that would have held the memory.

        A huge page with more faults than OS pages was filled several times.
        """
        counts = (n for n in self.samples.values() if n >= least)
        return sum(max(1.0, weight * n / pages) for n in counts)


class Places(NamedTuple):
    """Where sampled faults fell.

    Attributes:
        fresh: samples in anonymous mappings, inside whole aligned huge pages.
        small: number of samples in other anonymous memory.
        other: number of samples in file-backed and shared mappings, and outside known mappings.
        forks: number of forks during the log.
        lost: whether records were lost.
    """

    fresh: tuple[Fresh, ...]
    small: int
    other: int
    forks: int
    lost: bool

    @property
    def samples(self) -> int:
        """The number of all samples."""
        fresh = sum(n for mapping in self.fresh for n in mapping.samples.values())
        return fresh + self.small + self.other


class _Piece(NamedTuple):
    start: int
    end: int
    fresh: Fresh | None  # None: not anonymous


def extents(table: MapTable) -> list[Extent]:
    """Return the mappings of a process in address order."""
    rows = zip(table.start, table.end, anonymous(table), strict=True)
    return [Extent(*row) for row in rows]


def anonymous(table: MapTable) -> list[bool]:
    """Whether each mapping is private and anonymous, and can have transparent huge pages."""
    return [
        not perms & SHARED and not inode and (name in {"", "[heap]"} or name.startswith("[anon"))
        for perms, inode, name in zip(table.perms, table.inode, table.names, strict=True)
    ]


def places(before: Iterable[Extent], records: Iterable[Record], huge_page: int) -> Places:
    """Divide sampled faults by the mapping that held their address at that time.

    Args:
        before: the mappings at the start of the log.
        records: the records in order of time.
        huge_page: bytes of a huge page.
    """
    pieces = [_Piece(e.start, e.end, Fresh() if e.anonymous else None) for e in before]
    starts = [piece.start for piece in pieces]
    found: dict[int, Fresh] = {}
    small = other = forks = 0
    lost = False
    for record in records:
        if record.kind == FAULT:
            i = bisect_right(starts, record.address) - 1
            piece = pieces[i] if i >= 0 and record.address < pieces[i].end else None
            if piece is None or piece.fresh is None:
                other += 1
                continue
            number = record.address // huge_page
            whole = number * huge_page >= piece.start and (number + 1) * huge_page <= piece.end
            if whole and number not in piece.fresh.small:
                samples = piece.fresh.samples
                samples[number] = samples.get(number, 0) + 1
                found[id(piece.fresh)] = piece.fresh
            else:
                piece.fresh.small.add(number)
                small += 1
        elif record.kind in {ANONYMOUS, OTHER}:
            end = record.address + record.length
            _place(pieces, starts, record.address, end, record.kind == ANONYMOUS)
        elif record.kind == FORK:
            forks += 1
        else:
            lost = True
    return Places(tuple(found.values()), small, other, forks, lost)


def _place(
    pieces: list[_Piece], starts: list[int], start: int, end: int, is_anonymous: bool
) -> None:
    """Put a mapping over the pieces that it overlaps.

    The kernel reports a mapping that grew as its new whole. An anonymous one that exceeds an older
    one is therefore the older one, grown; any other one is new.
    """
    first = max(0, bisect_right(starts, start) - 1)
    if first < len(pieces) and pieces[first].end <= start:
        first += 1
    last, fresh, kept = first, None, []
    while last < len(pieces) and pieces[last].start < end:
        piece = pieces[last]
        if piece.start < start:
            kept.append(piece._replace(end=start))
        elif piece.end <= end and (piece.start, piece.end) != (start, end) and fresh is None:
            fresh = piece.fresh
        if piece.end > end:
            kept.append(piece._replace(start=end))
        last += 1
    new = _Piece(start, end, (fresh or Fresh()) if is_anonymous else None)
    pieces[first:last] = sorted([*kept, new], key=lambda piece: piece.start)
    starts[first:last] = [piece.start for piece in pieces[first : first + len(kept) + 1]]


class Holding(NamedTuple):
    """The anonymous memory of this process, in OS pages.

    Attributes:
        small: in small pages.
        hugeable: the part of `small` in whole aligned huge pages of their mappings; an estimate
            for mappings with small pages outside of them.
        slots: whole aligned huge pages of the mappings that have small pages.
        huge: in huge pages.
        shared: shared with a forked process, to be copied on the next write.
    """

    small: float
    hugeable: float
    slots: int
    huge: int
    shared: int

    @classmethod
    def of(cls, table: MapTable, huge_page: int) -> "Holding":
        """Add up the mappings of /proc/self/smaps; see `proc.smaps`."""
        small = hugeable = 0.0
        slots = huge = shared = 0
        columns = (table.start, table.end, table.anonymous, table.anon_huge, table.shared_dirty)
        for is_anonymous, *row in zip(anonymous(table), *columns, strict=True):
            start, end, total, of_huge, of_shared = row
            if not is_anonymous or not total:
                continue
            small += total - of_huge
            huge += of_huge
            shared += of_shared
            whole = max(0, end // huge_page * huge_page - round_up(start, huge_page))
            if total > of_huge:
                hugeable += (total - of_huge) * whole / (end - start)
                slots += whole // huge_page
        unit = PAGE_SIZE // KiB
        return cls(small / unit, hugeable / unit, slots, huge // unit, shared // unit)
