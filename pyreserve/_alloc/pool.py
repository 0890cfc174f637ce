"""Slots of one size in a region that grows where it stands."""

import errno
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import index as _index
from typing import TYPE_CHECKING, Literal, NoReturn

from pyreserve._alloc.integers import integers
from pyreserve._alloc.pages import PageAllocator
from pyreserve._native import ffi, lib
from pyreserve._region.exports import view_error
from pyreserve._region.owner import as_step
from pyreserve._region.region import Mode, reserve
from pyreserve._system.limits import PAGE_SIZE
from pyreserve.errors import FreeError, OutOfMemoryError, RangeError, ReleasedError
from pyreserve.units import GiB, MiB, format_size, round_up

if TYPE_CHECKING:
    from typing_extensions import Self

    from pyreserve._alloc.integers import Integers

_alloc = lib.pagealloc_alloc
_free = lib.pagealloc_free


class Pool:
    """Slots of `item_size` bytes, numbered from 0, at addresses that never change.

    All addresses are reserved at first; memory is committed `step` bytes at a time. Which slots are
    free is kept in a hierarchical bitmap, a `PageAllocator`: the lowest free slot is handed out
    first, which keeps slots together, in a time that hardly depends on how many there are.

    Args:
        item_size: bytes of a slot.
        capacity: the most slots there can be; None: as many as fit in 1 GiB of addresses.
        align: slots lie at multiples of this power of two, in bytes, and so many apart; None: the
            next power of two that holds a slot, at most 16.
        mode: how commits are accounted, as for `pyreserve.reserve`.
        step: bytes to commit at a time, whole OS pages; or ``"measured"``: what suits this machine,
            as `pyreserve.costs.measured_step` finds it in up to two seconds, once in a process.

    Any number of threads may use a pool. A forked child has a copy of its own.

    Raises (all methods):
        TypeError: something that is not an integer.
        RangeError: a number that makes no sense, or of no slot here.
        OutOfMemoryError: no free slot (``limit`` is ``"layout"``), or the kernel refused memory;
            nothing has changed.
        ReleasedError: the pool was released or closed.
    """

    def __init__(
        self,
        item_size: int,
        *,
        capacity: int | None = None,
        align: int | None = None,
        mode: Mode = "charge",
        step: int | Literal["measured"] = 2 * MiB,
    ) -> None:
        """Reserve the addresses."""
        size = _index(item_size)
        align = min(1 << max(size - 1, 0).bit_length(), 16) if align is None else _index(align)
        if size <= 0 or align <= 0 or align & (align - 1):
            msg = f"no pool of {size}-byte slots aligned to {align}"
            raise RangeError(msg)
        stride = -(-size // align) * align
        most = max(GiB // stride, 1) if capacity is None else _index(capacity)
        if most <= 0:
            msg = f"no pool of {most} slots"
            raise RangeError(msg)
        step = as_step(step)
        self._pages = PageAllocator(most, capacity=most)
        self._tables = self._pages._handle
        # Steps end on multiples of themselves, as huge pages need it.
        base = max(align, step & -step)
        self._region = reserve(most * stride, align=base, mode=mode)
        self._lock = self._region._make_lock()
        self._item_size, self._stride, self._capacity, self._step = size, stride, most, step
        self._committed = 0
        self._at_work = False  # a call is about to touch memory
        # Slots below were handed out, so they are committed and may be dirty; no other is dirty.
        self._seen = 0

    # -- what it is ---------------------------------------------------------------------------

    @property
    def item_size(self) -> int:
        """Bytes of a slot."""
        return self._item_size

    @property
    def capacity(self) -> int:
        """How many slots there can be in use."""
        return self._capacity

    @property
    def in_use(self) -> int:
        """Bytes of the slots in use, up to the next one each."""
        return len(self) * self._stride

    @property
    def committed(self) -> int:
        """How many bytes are committed."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether the pool was released or closed."""
        return self._region.released

    # -- slots --------------------------------------------------------------------------------

    def alloc(self, *, zero: bool = False) -> int:
        """Take the lowest free slot; return its number.

        Its bytes are as its last user left them, zero if there was none; `zero` clears them then.
        """
        with self._lock:
            slot = _alloc(self._tables, 1, 1, 0)
            if zero or not 0 <= slot < self._seen:
                self._prepare((slot,), zero)
        return slot  # type: ignore[no-any-return]

    def free(self, slot: int) -> None:
        """Give a slot back. Its memory stays committed, until `trim`.

        Raises:
            FreeError: it is free already.
            ViewError: live views hold some of its bytes.
        """
        slot = _index(slot)
        region = self._region
        with self._lock:
            interrupting, region._busy = region._busy, True
            try:
                if region._views is not None or region._released:
                    self._refuse_views((slot,), interrupting)
                err = _free(self._tables, slot, 1)
            except OverflowError:
                err = lib.PAGEALLOC_OUTSIDE
            finally:
                region._busy = interrupting
        if err:
            self._refuse(slot, err)

    def alloc_many(self, n: int, *, zero: bool = False) -> "array[int]":
        """Take the `n` lowest free slots, all or none; return their numbers in rising order."""
        n = _index(n)
        with self._lock:
            self._alive()
            if not 0 <= n <= self._pages.free_pages:
                raise self._full(n)
            slots = self._pages.alloc_many(1, array("q", bytes(8 * n)))
            if n:
                self._prepare(slots, zero)
        return slots

    def free_many(self, slots: "Integers") -> None:
        """Give slots back, all or none: integers in a buffer or an iterable.

        Raises:
            FreeError: one of them is free already, or there twice.
            ViewError: live views hold some of their bytes.
        """
        given, one = integers(slots, "slots"), integers(1, "lengths", allow_scalar=True)
        count, failed = len(given.values), ffi.new("size_t *")
        with self._lock, self._region._taking_away() as interrupting:
            self._refuse_views(given.values, interrupting)
            err = lib.pagealloc_free_many(self._tables, one.struct, given.struct, count, failed)
        if err:
            self._refuse(given.values[failed[0]], err)

    def view(self, slot: int, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of a slot in use: `item_size` unsigned bytes, safe as a region's.

        While it, or anything made from it, is alive, the slot can't be freed.

        Raises:
            FreeError: the slot is free.
            RuntimeError: see `pyreserve.Region.view`.
        """
        slot = _index(slot)
        with self._lock:
            view = self._region.view(self._offset(slot), self._item_size, readonly=readonly)
            self._offset(slot)  # a signal handler may have freed it meanwhile
        return view

    def address(self, slot: int) -> int:
        """Return the address of a slot in use. Touching memory through it is at your own risk.

        Raises:
            FreeError: the slot is free.
        """
        with self._lock:
            return self._region.base + self._offset(slot)

    # -- memory -------------------------------------------------------------------------------

    def trim(self) -> int:
        """Decommit the whole OS pages above the highest slot in use; return their bytes.

        Raises:
            VMError: refused (max_map_count); nothing has changed, unless it was the policies of the
                fresh addresses that the kernel refused: see `Region.decommit`.
        """
        with self._lock:
            self._alive()
            first, low = self._take_tail()
            cut = min(-(-low // PAGE_SIZE) * PAGE_SIZE, self._committed)
            nbytes = self._committed - cut
            try:
                if low < cut:
                    self._clear(low, cut - low)
                if nbytes:
                    self._region.decommit(cut, nbytes)
            finally:
                if not nbytes or not self._region.is_committed(cut, nbytes):
                    self._committed, self._seen = cut, min(self._seen, first)
                if first < self._capacity:
                    _free(self._tables, first, self._capacity - first)
        return nbytes

    def release(self) -> None:
        """Give all addresses back. The allocator's own tables go with this object.

        Raises:
            ViewError: live views hold some of the bytes.
            ReleasedError: it was released or closed.
            RuntimeError: called by a finaliser or signal handler inside another call.
        """
        with self._lock:
            self._alive()
            if self._at_work:
                msg = "release called from inside another call on the same pool"
                raise RuntimeError(msg)
            self._region.release()
            self._seen = 0  # so that each `alloc` looks whether the region is there

    def close(self) -> None:
        """Refuse new use; release the addresses with the last view. See `Region.close`.

        The allocator's own tables go with this object.
        """
        with self._lock:
            self._region._retire()
            self._seen = 0
            if not self._at_work:  # else the call under way still needs the memory
                self._region._close()

    # -- Python's protocols -------------------------------------------------------------------

    def __len__(self) -> int:
        """How many slots are in use."""
        with self._lock:
            self._alive()
            return self._capacity - self._pages.free_pages

    def __contains__(self, slot: int) -> bool:
        """Tell whether a slot is in use; False for what is no slot here."""
        with self._lock:
            self._alive()
            return self._pages.is_used(slot)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the slots that are in use now, lowest first."""
        with self._lock:
            self._alive()
            runs = list(self._pages.used_runs())
        return chain.from_iterable(range(start, stop) for start, stop in runs)

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        with self._lock:
            if self.released:
                return f"<Pool of {self._item_size}-byte slots, released>"
            return (
                f"<Pool of {self._item_size}-byte slots: {len(self):,} of {self._capacity:,} in "
                f"use, {format_size(self.committed)} committed>"
            )

    def __reduce__(self) -> NoReturn:
        msg = "a Pool is memory of this process: it can't be pickled or copied"
        raise TypeError(msg)

    # -- inside -------------------------------------------------------------------------------

    def _alive(self) -> None:
        if self._region.released:
            msg = "the pool was released or closed"
            raise ReleasedError(msg)

    def _full(self, n: int) -> RangeError | OutOfMemoryError:
        msg = f"can't take {n} slots: {self._pages.free_pages} of {self._capacity} are free"
        if n < 0:
            return RangeError(msg)
        nbytes = n * self._stride
        return OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit="layout")

    def _prepare(self, slots: Sequence[int], zero: bool) -> None:
        """Commit slots just taken, in rising order, and clear what may be dirty; or free them."""
        self._alive()
        if slots[0] < 0:
            raise self._full(1)
        try:
            end = slots[-1] + 1
            if end * self._stride > self._committed:
                self._commit(end * self._stride)
            if zero:
                for slot in slots:
                    if slot < self._seen:
                        self._clear(slot * self._stride, self._item_size)
            self._seen = max(self._seen, end)
            if self._region._released:  # by what interrupted this call
                self._seen = 0
                self._alive()
        except BaseException:
            self._pages.free_many(slots)
            raise

    def _commit(self, end: int) -> None:
        """Commit to the end of a step, or if that is refused just up to `end`."""
        begin, need = self._committed, round_up(end, PAGE_SIZE)
        ahead = min(round_up(end, self._step), self._region.size)
        try:
            self._region.commit(begin, ahead - begin)
        except OutOfMemoryError:
            if ahead == need:
                raise
            self._region.commit(begin, need - begin)
            ahead = need
        self._committed = max(self._committed, ahead)

    def _clear(self, offset: int, nbytes: int) -> None:
        inside, self._at_work = self._at_work, True
        try:
            self._alive()
            ffi.memmove(self._region._anchor(offset), bytes(nbytes), nbytes)
        finally:
            self._at_work = inside
            if not inside and self._region._released:  # by what interrupted this call
                self._region._close()

    def _take_tail(self) -> tuple[int, int]:
        """Take all slots above the highest in use; return the first of them and its offset."""
        while True:
            first = max((stop for _, stop in self._pages.used_runs()), default=0)
            n = self._capacity - first
            # Refused if a finaliser took one meanwhile.
            if not n or not lib.pagealloc_alloc_at(self._tables, first, n):
                return first, first * self._stride

    def _offset(self, slot: int) -> int:
        slot = _index(slot)
        self._alive()
        if not self._pages.is_used(slot):
            self._refuse(slot, lib.PAGEALLOC_NOT_IN_USE)
        return slot * self._stride

    def _refuse_views(self, slots: Sequence[int], interrupting: bool) -> None:
        self._alive()
        views = self._region._views
        if views is None:
            return
        low, n = (slots[0] * self._stride, 1) if len(slots) == 1 else (0, self._capacity)
        live = views.live(low, low + n * self._stride, prune=not interrupting)
        held = {lo // self._stride for _, lo, _ in live}.intersection(slots) if live else ()
        if held:
            slot = min(held)
            raise view_error(
                f"can't free slot {slot}",
                [each for each in live if each[1] // self._stride == slot],
            )

    def _refuse(self, slot: int, err: int) -> NoReturn:
        if err == lib.PAGEALLOC_NOT_IN_USE and 0 <= slot < self._capacity:
            msg = f"slot {slot} is free: freed already, or never allocated"
            raise FreeError(msg)
        msg = f"no slot {slot} in a pool of {self._capacity}"
        raise RangeError(msg)
