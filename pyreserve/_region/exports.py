"""The live buffers of a region, with a lookup by range whose time does not grow with their number.

A buffer is represented by a weak reference to its anchor: its address as a plain cdata, which its
``ffi.buffer`` object keeps alive. Every consumer keeps that object alive: memoryviews and their
slices, ndarrays, and consumers that release the Py_buffer and keep only the object, which an export
counter misses. The reference is to the anchor because the garbage collector clears weak references
to objects that it tracks before it runs finalisers, which may still use the buffer; it does not
track a plain cdata. There are no weakref callbacks: dead references are removed when a lookup meets
them, and all at once when twice as many buffers were added as were alive at the last sweep.
"""

import gc
import sys
import weakref
from operator import itemgetter
from typing import Any

from pyreserve._native import ffi
from pyreserve.errors import ViewError

# A bucket of level k covers 2**(16 + 3k) bytes. A buffer is in a bucket at least as long as itself,
# the one where it begins, so it overlaps at most the next bucket too. Parents are linked before
# their children and removed after them, so an exception from a signal handler loses no bucket;
# indices of removed children may remain until the next sweep.
_FIRST_SHIFT = 16
_STEP = 3
_SWEEP_MIN = 256

# The anchor of a buffer, and the offsets of its start and end.
Entry = tuple["weakref.ref[Any]", int, int]


class _Bucket:
    __slots__ = ("children", "entries")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.children: set[int] = set()


class ViewTable:
    """The live buffers of one region.

    Not synchronised: the region holds its lock around each call. A finaliser or signal handler that
    interrupts a call may only read.
    """

    __slots__ = ("_filled", "_levels", "_until_sweep")

    def __init__(self, size: int) -> None:
        top = max(0, -(-(size.bit_length() - _FIRST_SHIFT) // _STEP))
        self._levels: list[dict[int, _Bucket]] = [{} for _ in range(top + 1)]
        self._filled: list[int] = []  # levels with entries
        self._until_sweep = _SWEEP_MIN

    def add(self, anchor: Any, lo: int, hi: int) -> None:
        """Add the buffer over [lo, hi) with this anchor."""
        if self._until_sweep == 0:
            self._sweep()
        self._until_sweep -= 1
        self._insert((weakref.ref(anchor), lo, hi))

    def live(self, lo: int, hi: int, *, prune: bool) -> list[Entry]:
        """Return every live buffer that overlaps [lo, hi).

        `prune` removes the dead references that it meets; without it the table is only read.
        """
        overlapping: list[Entry] = []
        # From the level where the range spans at most three buckets, look buckets up by index;
        # below it, visit only the buckets that exist.
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
                    self._scan(buckets[index], lo, hi, overlapping, prune)
        if below:
            for bucket in self._spanned(start, lo, hi):
                self._descend(bucket, start, lo, hi, overlapping, prune)
        return overlapping

    def anchors(self) -> list[Any]:
        """Return the anchors of all live buffers."""
        anchors = (
            entry[0]()
            for buckets in self._levels
            for bucket in buckets.values()
            for entry in bucket.entries
        )
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

    def _insert(self, entry: Entry) -> None:
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
        self._filled = filled
        self._until_sweep = 2 * alive + _SWEEP_MIN


# -- holders of views -------------------------------------------------------------------------

_NAMED = 3  # views listed in a message
_BATCH = 10_000  # objects examined at a time
_LONGEST_CHAIN = 100  # maximum number of nested arrays and memoryviews
_ADVICE = {
    "release": "delete the holder, or call close(), which defers the release to the last view",
    "free": "delete the holder, or call the block's close(), which frees it with the last view",
}


def view_error(prefix: str, held: list[Entry], verb: str = "") -> ViewError:
    """Return the ViewError for `verb`; the message starts with `prefix`."""
    held = sorted(held, key=itemgetter(1, 2))
    some = ", ".join(f"[{lo:#x}, {hi:#x})" for _, lo, hi in held[:_NAMED])
    more = ", ..." if len(held) > _NAMED else ""
    views = "1 live view holds" if len(held) == 1 else f"{len(held)} live views hold"
    advice = _ADVICE.get(verb, "delete the holder first")
    text = f"{prefix}: {views} bytes of it: {some}{more}; {advice}"
    return ViewError(text, _Holders(held[:_NAMED]))


class _Holders:
    """Find and describe the holders of views when called: scanning all objects is slow."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    def __call__(self) -> list[str]:
        alive = {
            id(anchor): (int(ffi.cast("uintptr_t", anchor)), hi - lo)
            for ref, lo, hi in self._entries
            if (anchor := ref()) is not None
        }
        types: dict[int, set[str]] = {}
        for holder in _find_holders() if alive else ():
            types.setdefault(id(_anchor_behind(holder)), set()).add(type(holder).__name__)
        return [
            f"{' and '.join(sorted(types[key]))} over {address:#x}-{address + nbytes:#x}"
            for key, (address, nbytes) in alive.items()
            if key in types
        ]


def _find_holders() -> list[Any]:
    """Return the memoryviews and ndarrays that variables, containers and attributes refer to.

    A memoryview stands for an array that was not found. Examines every object that the garbage
    collector tracks.
    """
    numpy = sys.modules.get("numpy")
    kinds = (memoryview,) if numpy is None else (memoryview, numpy.ndarray)
    holders: list[Any] = []
    memoryviews = []
    objects = gc.get_objects()
    for start in range(0, len(objects), _BATCH):
        batch = objects[start : start + _BATCH]
        holders += [obj for obj in gc.get_referents(*batch) if issubclass(type(obj), kinds)]
        memoryviews += [obj for obj in batch if type(obj) is memoryview]
    holders += [obj for obj in _variables() if issubclass(type(obj), kinds)]
    seen = {id(_anchor_behind(holder)) for holder in holders}
    return holders + [view for view in memoryviews if id(_anchor_behind(view)) not in seen]


def _variables() -> list[Any]:
    """Return the values of the local variables of running functions; none before Python 3.13.

    Before 3.13, reading f_locals keeps the values alive.
    """
    values: list[Any] = []
    frames = list(sys._current_frames().values()) if sys.version_info >= (3, 13) else []
    try:
        while frames:
            frame = frames.pop()
            if frame.f_globals is not globals():
                values += frame.f_locals.values()
            frames += [] if frame.f_back is None else [frame.f_back]
        return values
    finally:
        frame = values = frames = None  # type: ignore[assignment]  # this frame is in `frames`


def _anchor_behind(holder: Any) -> Any:
    """Return the anchor of the buffer behind a memoryview or ndarray; None for other objects.

    Runs no code of the objects.
    """
    numpy = sys.modules.get("numpy")
    for _ in range(_LONGEST_CHAIN):
        if type(holder) is ffi.buffer:
            return next(iter(gc.get_referents(holder)), None)
        if type(holder) is memoryview:
            try:
                holder = holder.obj
            except ValueError:  # a released memoryview
                return None
        elif numpy is not None and issubclass(type(holder), numpy.ndarray):
            holder = numpy.ndarray.base.__get__(holder)
        else:
            return None
    return None
