"""The live buffers of a region. The time of a lookup by range does not grow with their number.

A buffer is represented by a weak reference to its anchor: its address as a plain cdata, which its
``ffi.buffer`` object keeps alive. Every consumer keeps that object alive: memoryviews and their
slices, ndarrays, and consumers that release the Py_buffer and keep only the object, which an export
counter misses. The reference is to the anchor because the garbage collector clears weak references
to objects that it tracks before it runs finalisers, which may still use the buffer; it does not
track a plain cdata. There are no weakref callbacks: dead references are removed when a lookup meets
them, and all at once when twice as many buffers were added as were alive at the last sweep.

Most buffers die before anything looks for them. So a new one is only appended to a list, and sorted
in by the next lookup if it is still alive.
"""

import weakref
from itertools import chain
from typing import Any

# A bucket of level k covers 2**(16 + 3k) bytes. A buffer belongs to the bucket where it begins, at
# a level whose buckets are at least as long as the buffer: it overlaps at most one bucket more.
# Parents are linked before their children and removed after them, so an exception from a signal
# handler loses no bucket; indices of removed children may remain until the next sweep.
_FIRST_SHIFT = 16
_STEP = 3
_SWEEP_MIN = 256

# Number of new entries from which on `flush` is called.
MANY = 256

# The anchor of a buffer, and the offsets of its start and end.
Entry = tuple["weakref.ref[Any]", int, int]


class _Bucket:
    __slots__ = ("children", "entries")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.children: set[int] = set()


class ViewTable:
    """The live buffers of one region.

    Not synchronised: `Exports` holds its lock around each call. A finaliser or signal handler that
    interrupts a call may append to `new` and call `live`, which then only reads.

    Attributes:
        new: entries that were appended since the last `flush`.
        filled: levels with entries. Without these and without `new` ones no buffer is alive.
    """

    __slots__ = ("_active", "_levels", "_until_sweep", "filled", "new")

    def __init__(self, size: int) -> None:
        top = max(0, -(-(size.bit_length() - _FIRST_SHIFT) // _STEP))
        self._levels: list[dict[int, _Bucket]] = [{} for _ in range(top + 1)]
        self.filled: list[int] = []
        self._until_sweep = _SWEEP_MIN
        self.new: list[Entry] = []
        # A call is in progress.
        self._active = False

    def flush(self) -> None:
        """Sort the new buffers in, except the dead ones. An interrupting call does nothing."""
        if self._active:
            return
        self._active = True
        try:
            n = len(self.new)
            for entry in [entry for entry in self.new[:n] if entry[0]() is not None]:
                self._add(entry)
            del self.new[:n]  # only now: an interrupting call finds each entry in one of the places
        finally:
            self._active = False

    def _add(self, entry: Entry) -> None:
        if self._until_sweep <= 0:
            self._sweep()
        self._until_sweep -= 1
        level = self._level_of(entry[2] - entry[1])
        index = entry[1] >> (_FIRST_SHIFT + _STEP * level)
        bucket = self._levels[level].get(index)
        if bucket is None:
            bucket = self._new_bucket(level, index)
        if level not in self.filled:
            self.filled.append(level)
        bucket.entries.append(entry)

    def live(self, lo: int, hi: int) -> list[Entry]:
        """Return every live buffer that overlaps [lo, hi); remove the dead references met."""
        overlapping: list[Entry] = []
        if self.new:
            self.flush()
            if self.new:  # this call interrupts another one
                entries = list(self.new)
                overlapping = [e for e in entries if e[1] < hi and e[2] > lo and e[0]() is not None]
        if not self.filled:
            return overlapping
        prune, active, self._active = not self._active, self._active, True
        try:
            self._until_sweep -= 1
            if self._until_sweep <= 0 and prune:
                self._sweep()
            # From the level where the range spans at most three buckets, look buckets up by index;
            # below it, visit only the buckets that exist.
            start = self._level_of(hi - lo)
            below = False
            for level in self.filled:
                if level < start:
                    below = True
                    continue
                shift = _FIRST_SHIFT + _STEP * level
                buckets = self._levels[level]
                for index in range((lo >> shift) - 1, ((hi - 1) >> shift) + 1):
                    if index in buckets:
                        self._scan(buckets[index], lo, hi, overlapping, prune)
            if below:
                for bucket in self._spanned(start, lo, hi):
                    self._descend(bucket, start, lo, hi, overlapping, prune)
        finally:
            self._active = active
        if len(overlapping) > 1:  # an exception inside `flush` left entries in both places
            overlapping = list({id(entry): entry for entry in overlapping}.values())
        return overlapping

    def anchors(self) -> list[Any]:
        """Return the anchors of all live buffers."""
        sorted_in = (
            entry
            for buckets in self._levels
            for bucket in buckets.values()
            for entry in bucket.entries
        )
        anchors = (entry[0]() for entry in chain(self.new, sorted_in))
        return [anchor for anchor in anchors if anchor is not None]

    def _level_of(self, length: int) -> int:
        bits = (length - 1).bit_length() - _FIRST_SHIFT
        return 0 if bits <= 0 else min(-(-bits // _STEP), len(self._levels) - 1)

    def _spanned(self, level: int, lo: int, hi: int) -> list[_Bucket]:
        """Return the buckets of a level whose entries may overlap [lo, hi)."""
        shift = _FIRST_SHIFT + _STEP * level
        buckets = self._levels[level]
        return [
            buckets[index]
            for index in range((lo >> shift) - 1, ((hi - 1) >> shift) + 1)
            if index in buckets
        ]

    def _new_bucket(self, level: int, index: int) -> _Bucket:
        if level + 1 < len(self._levels):
            above = index >> _STEP
            parent = self._levels[level + 1].get(above) or self._new_bucket(level + 1, above)
            parent.children.add(index)
        bucket = self._levels[level][index] = _Bucket()
        return bucket

    def _descend(
        self,
        bucket: _Bucket,
        level: int,
        lo: int,
        hi: int,
        overlapping: list[Entry],
        prune: bool,
    ) -> None:
        shift = _FIRST_SHIFT + _STEP * (level - 1)
        for index in bucket.children:
            if (index << shift) < hi and ((index + 2) << shift) > lo:
                child = self._levels[level - 1].get(index)
                if child is not None:
                    self._scan(child, lo, hi, overlapping, prune)
                    self._descend(child, level - 1, lo, hi, overlapping, prune)

    @staticmethod
    def _scan(bucket: _Bucket, lo: int, hi: int, overlapping: list[Entry], prune: bool) -> None:
        entries = bucket.entries
        if entries:
            alive = [entry for entry in entries if entry[0]() is not None]
            if prune and len(alive) < len(entries):
                bucket.entries = alive
            overlapping.extend(entry for entry in alive if entry[1] < hi and entry[2] > lo)

    def _sweep(self) -> None:
        alive, filled = 0, []
        for level, buckets in enumerate(self._levels):
            below = alive
            for bucket in buckets.values():
                if bucket.entries:
                    bucket.entries = [entry for entry in bucket.entries if entry[0]() is not None]
                    alive += len(bucket.entries)
                if bucket.children:
                    bucket.children = {i for i in bucket.children if i in self._levels[level - 1]}
            for index in [i for i, b in buckets.items() if not b.entries and not b.children]:
                del buckets[index]
            if alive > below:
                filled.append(level)
        self.filled = filled
        self._until_sweep = 2 * alive + _SWEEP_MIN
