"""Which live buffers overlap a byte range, in a time that does not grow with their number.

A buffer is known by a weak reference to its anchor: the address, a plain cdata, that its
``ffi.buffer`` object keeps alive, as every consumer keeps that object alive: memoryviews and their
slices, ndarrays, and also those that drop the Py_buffer and hold only the object, which an export
counter misses. The anchor and not the buffer, since the garbage collector clears references to
what it tracks before it runs finalisers, which may still use the buffer; it does not track a plain
cdata. There are no weakref callbacks here; the dead are dropped when met, and all of them once
twice as many buffers have been added as were alive at the last clean-up.
"""

import gc
import sys
import weakref
from operator import itemgetter
from typing import Any

from pyreserve._native import ffi
from pyreserve.errors import ViewError

# A buffer of n bytes stands in a bucket of at least n bytes, so it reaches into one more at the
# most. Buckets of level k hold 2**(16 + 3k) bytes each. A bucket that exists stands among its
# parent's children, wherever an exception out of a signal handler may strike: links are made from
# above and undone from below. Children that are gone may stay named until the next sweep.
_FIRST_SHIFT = 16
_STEP = 3
_SWEEP_MIN = 256

# A buffer by its anchor, and the offsets where it begins and ends.
Entry = tuple["weakref.ref[Any]", int, int]


class _Bucket:
    __slots__ = ("children", "entries")

    def __init__(self) -> None:
        self.entries: list[Entry] = []
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
        self._until_sweep = _SWEEP_MIN

    def add(self, anchor: Any, lo: int, hi: int) -> None:
        """Take in a buffer over [lo, hi) by its anchor."""
        if self._until_sweep == 0:
            self._sweep()
        self._until_sweep -= 1
        self._insert((weakref.ref(anchor), lo, hi))

    def live(self, lo: int, hi: int, *, prune: bool) -> list[Entry]:
        """Return every live buffer that overlaps [lo, hi).

        `prune` drops the dead that are met; without it the table is only read.
        """
        found: list[Entry] = []
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
        made = self._levels[level][index] = _Bucket()
        return made

    def _descend(
        self,
        bucket: _Bucket,
        level: int,
        lo: int,
        hi: int,
        found: list[Entry],
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
    def _scan(bucket: _Bucket, lo: int, hi: int, found: list[Entry], prune: bool) -> None:
        entries = bucket.entries
        if entries:
            alive = [entry for entry in entries if entry[0]() is not None]
            if prune and len(alive) < len(entries):
                bucket.entries = alive
            found.extend(entry for entry in alive if entry[1] < hi and entry[2] > lo)

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


# -- what holds a view ------------------------------------------------------------------------

_NAMED = 3  # views that a message names
_BATCH = 10_000  # objects
_LONGEST_CHAIN = 100  # of arrays and memoryviews on one another
_ADVICE = {
    "release": "delete the holder, or call close(), which defers the release to the last view",
    "free": "delete the holder, or call the block's close(), which frees it with the last view",
}


def view_error(prefix: str, held: list[Entry], verb: str = "") -> ViewError:
    """Build the ViewError for `verb`; `prefix` is the start of the message."""
    held = sorted(held, key=itemgetter(1, 2))
    some = ", ".join(f"[{lo:#x}, {hi:#x})" for _, lo, hi in held[:_NAMED])
    more = ", ..." if len(held) > _NAMED else ""
    views = "1 live view holds" if len(held) == 1 else f"{len(held)} live views hold"
    advice = _ADVICE.get(verb, "delete the holder first")
    text = f"{prefix}: {views} bytes of it: {some}{more}; {advice}"
    return ViewError(text, _Holders(held[:_NAMED]))


class _Holders:
    """Describes the holders of views, lazily: scanning all objects is slow."""

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries

    def __call__(self) -> list[str]:
        alive = {
            id(anchor): (int(ffi.cast("uintptr_t", anchor)), hi - lo)
            for ref, lo, hi in self._entries
            if (anchor := ref()) is not None
        }
        found: dict[int, set[str]] = {}
        for holder in _find_holders() if alive else ():
            found.setdefault(id(_anchor_behind(holder)), set()).add(type(holder).__name__)
        return [
            f"{' and '.join(sorted(found[key]))} over {address:#x}-{address + nbytes:#x}"
            for key, (address, nbytes) in alive.items()
            if key in found
        ]


def _find_holders() -> list[Any]:
    """List the memoryviews and ndarrays that variables, containers and attributes refer to.

    An array that is not found is represented by its memoryview. Looks at every object that the
    garbage collector knows.
    """
    numpy = sys.modules.get("numpy")
    kinds = (memoryview,) if numpy is None else (memoryview, numpy.ndarray)
    holders: list[Any] = []
    memoryviews = []
    objects = gc.get_objects()
    for start in range(0, len(objects), _BATCH):
        batch = objects[start : start + _BATCH]
        holders += [each for each in gc.get_referents(*batch) if issubclass(type(each), kinds)]
        memoryviews += [each for each in batch if type(each) is memoryview]
    holders += [each for each in _variables() if issubclass(type(each), kinds)]
    seen = {id(_anchor_behind(holder)) for holder in holders}
    return holders + [view for view in memoryviews if id(_anchor_behind(view)) not in seen]


def _variables() -> list[Any]:
    """List what the variables of running functions refer to, from Python 3.13 on.

    Before 3.13, reading f_locals keeps the values alive.
    """
    found: list[Any] = []
    frames = list(sys._current_frames().values()) if sys.version_info >= (3, 13) else []
    try:
        while frames:
            frame = frames.pop()
            if frame.f_globals is not globals():
                found += frame.f_locals.values()
            frames += [] if frame.f_back is None else [frame.f_back]
        return found
    finally:
        frame = found = frames = None  # type: ignore[assignment]  # this frame is one of them


def _anchor_behind(holder: Any) -> Any:
    """Return the anchor of the buffer that a memoryview or an ndarray shows; else None.

    Runs no code of the objects that it meets.
    """
    numpy = sys.modules.get("numpy")
    for _ in range(_LONGEST_CHAIN):
        if type(holder) is ffi.buffer:
            return next(iter(gc.get_referents(holder)), None)
        if type(holder) is memoryview:
            try:
                holder = holder.obj
            except ValueError:  # a released one
                return None
        elif numpy is not None and issubclass(type(holder), numpy.ndarray):
            holder = numpy.ndarray.base.__get__(holder)
        else:
            return None
    return None
