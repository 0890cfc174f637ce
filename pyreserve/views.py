"""Which live buffers overlap a byte range, in a time that does not grow with their number.

A buffer is known by a weak reference to its anchor: the address, a plain cdata, that its
``ffi.buffer`` object keeps alive, as every consumer keeps that object alive: memoryviews and their
slices, ndarrays, and also those that drop the Py_buffer and hold only the object, which an export
counter misses. The anchor and not the buffer, since the garbage collector clears references to
what it tracks before it runs finalisers, which may still use the buffer; it does not track a plain
cdata. There are no weakref callbacks here; the dead are dropped when met, and all of them once
twice as many buffers have been added as were alive at the last clean-up.
"""

import weakref
from typing import Any

# A buffer of n bytes stands in a bucket of at least n bytes, so it reaches into one more at the
# most. Buckets of level k hold 2**(16 + 3k) bytes each. A bucket that exists stands among its
# parent's children, wherever an exception out of a signal handler may strike: links are made from
# above and undone from below. Children that are gone may stay named until the next sweep.
_FIRST_SHIFT = 16
_STEP = 3
_PATIENCE = 256

_Entry = tuple["weakref.ref[Any]", int, int]


class _Bucket:
    __slots__ = ("children", "entries")

    def __init__(self) -> None:
        self.entries: list[_Entry] = []
        self.children: set[int] = set()


class ViewTable:
    """The live buffers of one region.

    Not synchronised: the region holds its lock around each call, and lets no finaliser or signal
    handler that interrupts one call begin another, except to read.
    """

    __slots__ = ("_filled", "_levels", "_until_sweep")

    def __init__(self, size: int) -> None:
        top = max(0, -(-(size.bit_length() - _FIRST_SHIFT) // _STEP))
        self._levels: list[dict[int, _Bucket]] = [{} for _ in range(top + 1)]
        self._filled: list[int] = []  # the levels that have entries
        self._until_sweep = _PATIENCE

    def add(self, anchor: Any, lo: int, hi: int) -> None:
        """Take in a buffer over [lo, hi) by its anchor."""
        if self._until_sweep == 0:
            self._sweep()
        self._until_sweep -= 1
        self._insert((weakref.ref(anchor), lo, hi))

    def live(self, lo: int, hi: int, *, prune: bool) -> list[tuple[int, int]]:
        """Return the range of every live buffer that overlaps [lo, hi).

        `prune` drops the dead that are met; without it the table is only read.
        """
        found: list[tuple[int, int]] = []
        # From the level up at which the range spans three buckets at the most, buckets are asked
        # for by index; below it, only those that exist are visited.
        start = self._level_of(hi - lo)
        below = False
        for level in self._filled:
            if level < start:
                below = True
                continue
            shift = _FIRST_SHIFT + _STEP * level
            buckets = self._levels[level]
            for index in range((lo >> shift) - 1, ((hi - 1) >> shift) + 1):
                if index in buckets:
                    self._scan(buckets[index], lo, hi, found, prune)
        if below:
            for bucket in self._spanned(start, lo, hi):
                self._descend(bucket, start, lo, hi, found, prune)
        return found

    def anchors(self) -> list[Any]:
        """Return the anchors of all live buffers."""
        found = (
            entry[0]()
            for buckets in self._levels
            for bucket in buckets.values()
            for entry in bucket.entries
        )
        return [anchor for anchor in found if anchor is not None]

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

    def _insert(self, entry: _Entry) -> None:
        level = self._level_of(entry[2] - entry[1])
        index = entry[1] >> (_FIRST_SHIFT + _STEP * level)
        bucket = self._levels[level].get(index)
        if bucket is None:
            bucket = self._new_bucket(level, index)
        if level not in self._filled:
            self._filled.append(level)
        bucket.entries.append(entry)

    def _new_bucket(self, level: int, index: int) -> _Bucket:
        if level + 1 < len(self._levels):
            above = index >> _STEP
            parent = self._levels[level + 1].get(above) or self._new_bucket(level + 1, above)
            parent.children.add(index)
        made = self._levels[level][index] = _Bucket()
        return made

    def _descend(
        self,
        bucket: _Bucket,
        level: int,
        lo: int,
        hi: int,
        found: list[tuple[int, int]],
        prune: bool,
    ) -> None:
        shift = _FIRST_SHIFT + _STEP * (level - 1)
        for index in bucket.children:
            if (index << shift) < hi and ((index + 2) << shift) > lo:
                child = self._levels[level - 1].get(index)
                if child is not None:
                    self._scan(child, lo, hi, found, prune)
                    self._descend(child, level - 1, lo, hi, found, prune)

    @staticmethod
    def _scan(bucket: _Bucket, lo: int, hi: int, found: list[tuple[int, int]], prune: bool) -> None:
        entries = bucket.entries
        if entries:
            alive = [entry for entry in entries if entry[0]() is not None]
            if prune and len(alive) < len(entries):
                bucket.entries = alive
            found.extend((a, b) for _, a, b in alive if a < hi and b > lo)

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
        self._filled = filled
        self._until_sweep = 2 * alive + _PATIENCE
