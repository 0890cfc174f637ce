"""A pool: slots of equal size in one region that is committed in steps."""

import errno
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain
from operator import index as _index
from typing import TYPE_CHECKING, Any

from pyreserve._alloc.integers import integers
from pyreserve._alloc.pages import (
    NOT_IN_USE,
    OUTSIDE,
    alloc_run,
    alloc_run_at,
    free_each,
    free_run,
    free_run_unless,
    is_run_used,
)
from pyreserve._alloc.slots import Geometry, Slots
from pyreserve._region.arrays import ArrayPlan
from pyreserve._region.growth import Steps, as_step
from pyreserve._region.handles import memmove
from pyreserve._region.owner import InSteps
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.reserve import reserve
from pyreserve._region.residency import resident_in
from pyreserve._system.features import GUARD_PAGES
from pyreserve._system.machine import thp_size
from pyreserve.errors import (
    OutOfMemoryError,
    RangeError,
    StateError,
    ViewError,
    VMError,
)
from pyreserve.units import MiB, format_size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from pyreserve._alloc.integers import Integers
    from pyreserve._region.arrays import Shape

# A pool in this many committed pieces takes no more map entries: `trim` discards from there on.
_MAX_PIECES = 512


class Pool(InSteps):
    """Slots of `item_size` bytes, numbered from 0, at addresses that never change.

    All addresses are reserved at once; memory is committed `step` bytes at a time. `alloc` takes
    the lowest free slot, which keeps the slots in use together. Its cost hardly depends on the
    number of slots, since a `PageAllocator` keeps track of them.

    Args:
        item_size: bytes of a slot, or a size such as ``"64KiB"``.
        capacity: the maximum number of slots; None: as many as fit in 1 GiB of addresses.
        align: a power of two, in bytes. Slots begin at multiples of it; the distance between them
            is `item_size` rounded up to it. None: the next power of two that holds a slot, at
            most 16.
        step: bytes to commit at a time, a multiple of the OS page; see
            `pyreserve.costs.measured_step` for the best one on this machine.
        guard: an access behind a slot ends the process with SIGSEGV: each slot, rounded up to
            `align`, ends where a guard begins that is an OS page, or `align` if that is more. With
            ``align=1`` the first byte behind a slot is one of the guard. Guards take addresses and
            commit charge, but no memory and no map entries (MADV_GUARD_INSTALL, Linux 6.13).
        mode, huge_pages, fork, name: as for `pyreserve.reserve`, whose exceptions apply too.

    Any number of threads may use a pool. A forked child has its own copy.

    Raises (all methods):
        TypeError: an argument is not an integer.
        RangeError: an argument is out of range, or not a slot of this pool.
        OutOfMemoryError: no free slot (``limit`` is ``"capacity"``), or the kernel refused memory;
            nothing has changed.
        VMError: the kernel refused a guard; no slot is allocated, but more may be committed.
        ReleasedError: the pool was released or closed.
    """

    _noun = "pool"

    def __init__(
        self,
        item_size: int | str,
        *,
        capacity: int | None = None,
        align: int | str | None = None,
        step: int | str = 2 * MiB,
        guard: bool = False,
        mode: Mode = "charge",
        huge_pages: HugePages = "default",
        fork: Fork = "copy",
        name: str | None = None,
    ) -> None:
        """Reserve the addresses."""
        self._place = place = Geometry(item_size, capacity, align, guard)
        step = as_step(step)
        if guard:
            GUARD_PAGES.require("guard=True")
            if fork == "wipe":  # a child would have no guards
                msg = 'guard=True and fork="wipe" are mutually exclusive'
                raise ValueError(msg)
        self._slots = Slots(place.count, capacity=place.count)
        self._handle = self._slots.handle
        # Steps must end on multiples of their own size to be backed with huge pages.
        huge = thp_size() or 1 if huge_pages == "prefer" else 1
        region = reserve(
            place.count * place.stride,
            align=max(place.align, step & -step, huge),
            mode=mode,
            huge_pages=huge_pages,
            fork=fork,
            name=name,
        )
        super().__init__(region, Steps(region.base, step, small_first=False))
        if guard:
            self._exports.set_cells(place.stride, place.guard)
        self._item_size, self._capacity = place.size, place.count
        self._stride, self._start, self._guard = place.stride, place.start, place.guard
        self._viewed, self._keep = self._exports.viewed_flag, self._exports.handle  # its owner
        self._busy = False  # a call commits, clears or trims
        # Slots below _ready are committed and guarded. `trim` alone lowers it and _end, and never
        # runs inside another call: a call may raise them after it has committed.
        self._ready = 0
        self._dirty_end = 0  # slots below were allocated before, and maybe are not zero

    # -- state --------------------------------------------------------------------------------

    @property
    def item_size(self) -> int:
        """Bytes of a slot."""
        return self._item_size

    @property
    def capacity(self) -> int:
        """The maximum number of slots in use."""
        return self._capacity

    @property
    def in_use(self) -> int:
        """Bytes of the slots in use, including the padding between slots."""
        return len(self) * self._stride

    # -- slots --------------------------------------------------------------------------------

    def alloc(self, *, zero: bool = False) -> int:
        """Allocate the lowest free slot; return its number.

        Its bytes are zero if it was never allocated before, and with `zero`; else they are as its
        last user left them, or zero where `trim` gave their page back.
        """
        slot = alloc_run(self._handle, 1, 1, 0)
        if zero or not 0 <= slot < self._ready:
            return self._alloc_slowly(slot, zero)
        return slot  # type: ignore[no-any-return]

    def free(self, slot: int) -> None:
        """Free a slot. Its memory stays committed until `trim`.

        Raises:
            FreeError: the slot is free already.
            ViewError: live views hold some of its bytes.
        """
        slot = _index(slot)
        try:  # without the lock: see `region_export` in csrc/region.h
            if self._exports.viewed or free_run_unless(self._handle, slot, 1, self._viewed):
                self._free_slowly(slot)
        except OverflowError:
            self._check_open()
            self._place.refuse(slot, OUTSIDE)

    def alloc_many(self, n: int, *, zero: bool = False) -> "array[int]":
        """Allocate the `n` lowest free slots, all or none; return their numbers in rising order."""
        n = _index(n)
        with self._lock:
            self._check_open()
            if not 0 <= n <= self._slots.free_pages:
                raise self._capacity_error(n)
            try:
                slots = self._slots.alloc_many(1, array("q", bytes(8 * n)))
            except OutOfMemoryError:  # another thread has allocated some since
                raise self._capacity_error(n) from None
            if n:
                self._prepare(slots, zero)
        return slots

    def free_many(self, slots: "Integers") -> None:
        """Free slots, all or none: a buffer or an iterable of their numbers.

        Raises:
            FreeError: a slot is free already, or occurs twice.
            ViewError: live views hold some of the slots' bytes.
        """
        numbers, length = integers(slots, "slots"), integers(1, "lengths", allow_scalar=True)
        with self._lock, self._exports.removal():
            self._check_views(numbers.values)
            err, at = free_each(self._handle, numbers, length)
        if err:
            self._place.refuse(numbers.item(at), err)

    def view(self, slot: int, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of a slot in use: `item_size` unsigned bytes.

        The slot can't be freed while the view, or anything made from it, is alive; see
        `pyreserve.Region.view`.

        Raises:
            FreeError: the slot is free.
            StateError: called by a finaliser or signal handler inside another call.
        """
        slot = _index(slot)
        if not 0 <= slot < self._capacity:
            self._check_open()
            self._place.refuse(slot, OUTSIDE)
        try:
            view = self._exports.view(slot * self._stride + self._start, self._item_size)
        except RangeError:  # not committed
            self._offset_in_use(slot)
            raise
        # The view is known by now: the slot cannot be freed any more, if it is in use.
        if not is_run_used(self._handle, slot, 1):
            self._place.refuse(slot, NOT_IN_USE)
        return view.toreadonly() if readonly else view

    def ndarray(
        self,
        slot: int,
        shape: "Shape",
        dtype: "npt.DTypeLike" = "uint8",
        *,
        readonly: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """Return a C-ordered ndarray of `shape` and `dtype` over the first bytes of a slot in use.

        `shape` is an int, or a tuple or list of ints. The array protects the slot as a `view`
        does; an array without items protects nothing.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            ValueError: the items hold references to objects.
            RangeError: the array is larger than `item_size`, or a side is negative.
            FreeError, StateError: as for `view`.
        """
        plan = ArrayPlan(shape, dtype)
        if plan.nbytes > self._item_size:
            msg = f"shape must fit a slot of {self._item_size} bytes, got {plan.nbytes} bytes"
            raise RangeError(msg)
        if plan.nbytes:
            return plan.over(self.view(slot, readonly=readonly)[: plan.nbytes])
        with self._lock:
            self._offset_in_use(slot)
        return plan.empty(readonly=readonly)

    def address(self, slot: int) -> int:
        """Return the address of a slot in use. Touching memory through it is at your own risk.

        Raises:
            FreeError: the slot is free.
        """
        with self._lock:
            return self._region.base + self._offset_in_use(slot)

    # -- memory -------------------------------------------------------------------------------

    def trim(self) -> int:
        """Give back every whole OS page without a slot in use; return the bytes given back.

        The pages are decommitted, and committed again when their slots are allocated. A hole
        between slots in use takes two map entries. So the tail and the largest holes are
        decommitted until the pool is in 512 pieces. Other holes are discarded: that gives back
        their memory, which is counted, but not their commit charge.
        Called by a finaliser or signal handler inside another call on the pool, it does nothing.

        Raises:
            ViewError: nothing was given back, because views from `region` show bytes of all holes.
            VMError: nothing was given back, because the kernel refused (max_map_count).
        """
        with self._lock:
            self._check_open()
            if self._busy:
                return 0
            self._busy = True
            try:
                return self._trim()
            finally:
                self._leave(False)

    def release(self) -> None:
        """Release all addresses. The table of slots is freed with this object.

        Raises:
            ViewError: live views hold some of the bytes; nothing has changed.
            ReleasedError: the pool was released or closed.
            StateError: called by a finaliser or signal handler inside another call.
        """
        with self._lock:
            self._check_open()
            if self._busy:
                msg = "release called from inside another call on the same pool"
                raise StateError(msg)
            self._exports.release()
            self._ready = 0  # makes every `alloc` check whether the pool was released

    def close(self) -> None:
        """Refuse new use; release the addresses with the last view. See `Region.close`.

        The table of slots is freed with this object.
        """
        with self._lock:
            self._exports.retire()
            self._ready = 0
            if not self._busy:  # else the interrupted call still needs the memory
                self._exports.close()

    # -- Python's protocols -------------------------------------------------------------------

    def __len__(self) -> int:
        """Number of slots in use."""
        with self._lock:
            self._check_open()
            return self._capacity - self._slots.free_pages

    def __contains__(self, slot: int) -> bool:
        """Tell whether a slot is in use; False for a number outside the pool."""
        with self._lock:
            self._check_open()
            return self._slots.is_used(slot)

    def __iter__(self) -> Iterator[int]:
        """Iterate over the slots in use at this moment, lowest first."""
        with self._lock:
            self._check_open()
            runs = list(self._slots.used_runs())
        return chain.from_iterable(range(start, stop) for start, stop in runs)

    def __repr__(self) -> str:
        with self._lock:
            if self.released:
                return f"<Pool of {self._item_size}-byte slots, released>"
            return (
                f"<Pool of {self._item_size}-byte slots: {len(self):,} of {self._capacity:,} in "
                f"use, {format_size(self.committed)} committed>"
            )

    # -- inside -------------------------------------------------------------------------------

    def _capacity_error(self, n: int) -> RangeError | OutOfMemoryError:
        if n < 0:
            return RangeError(f"n must not be negative, got {n}")
        slots, nbytes = "a slot" if n == 1 else f"{n} slots", n * self._stride
        msg = f"cannot allocate {slots}: {len(self)} of {self._capacity} are in use"
        return OutOfMemoryError(errno.ENOMEM, msg, verb="alloc", nbytes=nbytes, limit="capacity")

    def _alloc_slowly(self, slot: int, zero: bool) -> int:
        """Prepare a slot that was allocated without the lock; if there was none, try again."""
        with self._lock:
            if slot < 0:  # maybe only because a `trim` has allocated the free ones
                slot = alloc_run(self._handle, 1, 1, 0)
            self._prepare((slot,), zero)
        return slot

    def _free_slowly(self, slot: int) -> None:
        with self._lock:
            self._check_open()
            low, high = slot * self._stride, (slot + 1) * self._stride
            if self._exports.viewed and 0 <= slot < self._capacity:
                verb = f"free slot {slot}"
                err = self._exports.remove(verb, low, high, free_run, self._handle, slot, 1)
            else:
                err = free_run(self._handle, slot, 1)
        if err:
            self._place.refuse(slot, err)

    def _leave(self, interrupting: bool) -> None:
        """End a call that has set `_busy`; `interrupting` is the value before."""
        self._busy = interrupting
        if not interrupting and self._exports.released:  # closed by a call that interrupted
            self._ready = 0
            self._exports.close()

    def _prepare(self, slots: Sequence[int], zero: bool) -> None:
        """Commit newly allocated slots, in rising order; clear dirty ones if `zero`.

        On an exception the slots are freed.
        """
        self._check_open()
        if slots[0] < 0:
            raise self._capacity_error(1)
        interrupting, self._busy = self._busy, True
        try:
            last, dirty_end = slots[-1], self._dirty_end
            if last >= self._ready:
                self._make_ready(last + 1)
            for slot in slots if zero else ():
                if slot < dirty_end:
                    self._clear(slot * self._stride + self._start, self._item_size)
            self._check_open()  # a call that interrupted this one may have closed the pool
        except BaseException:
            self._slots.free_many(slots)
            raise
        finally:
            self._leave(interrupting)

    def _make_ready(self, end: int) -> None:
        """Commit and guard the slots up to `end`."""
        self._commit(end * self._stride)  # with every hole below: those slots are all in use
        self._dirty_end = max(self._dirty_end, end)
        ready = min(self._end // self._stride, self._dirty_end)
        if self._guard and ready > self._ready:
            self._exports.guard_cells(self._ready, ready)
        self._ready = ready

    def _clear(self, offset: int, nbytes: int) -> None:
        if self._exports.released:
            self._check_open()
        memmove(self._exports.address(offset), bytes(nbytes), nbytes)

    def _trim(self) -> int:  # no other call can use a run's slots while they are allocated
        given, pieces = 0, len(self._region.committed_runs())
        refusals: list[Exception] = []
        runs = self._place.worth_trimming(self._slots.free_runs())
        while runs:
            first, stop = runs.pop()
            if alloc_run_at(self._handle, first, stop - first):
                # Another call has allocated some of the slots.
                left = (run for run in self._slots.free_runs() if first <= run[0] < stop)
                runs += self._place.worth_trimming(left)
                continue
            try:
                if stop < self._capacity and pieces >= _MAX_PIECES:
                    given += self._discard(first, stop)
                else:
                    decommitted = self._decommit(first, stop)
                    given += decommitted
                    pieces += decommitted > 0
            except (ViewError, VMError) as refused:
                refusals.append(refused.with_traceback(None))
                if isinstance(refused, VMError):
                    break
            finally:
                free_run(self._handle, first, stop - first)
        if refusals and not given:
            raise refusals.pop()
        return given

    def _decommit(self, first: int, stop: int) -> int:
        """Decommit the whole pages of an allocated run; return the bytes that were committed."""
        lo, nbytes = self._place.pages_of(first, stop)
        start, dirty = first * self._stride, first < self._dirty_end and stop == self._capacity
        # The tail reads zero from now on: clear what shares a page with a slot in use.
        if dirty and start < lo and self._region.is_committed(start, lo - start):
            self._clear(start, lo - start)
        before = self._region.committed
        try:
            if nbytes:
                self._exports.decommit(lo, nbytes)
        finally:
            end = min(self._end, lo + nbytes)
            if end > lo and not self._region.is_committed(lo, end - lo):
                self._end, self._ready = min(self._end, lo), min(self._ready, first)
        if stop == self._capacity:
            self._ready, self._dirty_end = min(self._ready, first), min(self._dirty_end, first)
        return max(before - self._region.committed, 0)  # an interrupting call may have committed

    def _discard(self, first: int, stop: int) -> int:
        """Discard the whole pages of an allocated run; return the bytes that were in memory."""
        lo, nbytes = self._place.pages_of(first, stop)
        if not self._region.is_committed(lo, nbytes):  # next to a hole: it only has to grow
            return self._decommit(first, stop)
        given = resident_in(self._region, lo, nbytes)
        if given:
            self._exports.remove("trim", lo, lo + nbytes, self._exports.discard, lo, nbytes)
        return given

    def _offset_in_use(self, slot: int) -> int:
        """Return the offset of a slot, which must be in use."""
        slot = _index(slot)
        self._check_open()
        if not self._slots.is_used(slot):
            self._place.refuse(slot, NOT_IN_USE)
        return slot * self._stride + self._start

    def _check_views(self, slots: Sequence[int]) -> None:
        """Refuse to free slots that live views hold."""
        self._check_open()
        live = self._exports.live(0, self._region.size)
        wanted, stride = set(slots) if live else set(), self._stride
        held = [
            slot
            for _, lo, hi in live
            for slot in range(lo // stride, (hi - 1) // stride + 1)
            if slot in wanted
        ]
        if held:
            slot = min(held)
            low, high = slot * stride, (slot + 1) * stride
            self._exports.refuse(f"free slot {slot}", low, high)
