"""A region: addresses reserved now, memory committed later.

======== ===================================================== =====================================
verb     means                                                 Linux
======== ===================================================== =====================================
reserve  own the addresses; no access, no memory, no charge    ``mmap(PROT_NONE)``
commit   make a piece readable and writable, zero at first     ``mprotect``
populate back a committed piece with memory now                ``MADV_POPULATE_WRITE``
discard  drop the contents, stay committed                     ``MADV_DONTNEED``, ``MADV_FREE``
decommit back to reserved; memory and charge given back        ``mmap(MAP_FIXED, PROT_NONE)``
release  give the addresses back                               ``munmap``
======== ===================================================== =====================================

All sizes, offsets and lengths are bytes. Verbs take whole OS pages (`pyreserve.PAGE_SIZE`).
"""

import errno
import math
import sys
import weakref
from _thread import RLock
from collections.abc import Iterator
from contextlib import contextmanager
from operator import index as _index
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pyreserve._native import ffi, lib
from pyreserve._region.exports import ViewTable, view_error
from pyreserve._system import forks, proc
from pyreserve._system.extras import import_extra
from pyreserve._system.features import thp_size
from pyreserve._system.forks import registry_lock as _registry_lock
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve.errors import RangeError, ReleasedError, VMError
from pyreserve.units import format_size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

Mode = Literal["charge", "noreserve"]
Fork = Literal["copy", "wipe"]
HugePages = Literal["default", "prefer", "never"]

_MODES = {"charge": 0, "noreserve": lib.VM_NORESERVE}
_FORKS = {"copy": 0, "wipe": lib.VM_WIPE_ON_FORK}
_HUGE = {"default": 0, "prefer": lib.VM_HUGE_PREFER, "never": lib.VM_HUGE_NEVER}
_POLICIES = {
    (mode, fork, huge, no_dump): (
        accounting,
        forked | paged | (lib.VM_NO_DUMP if no_dump else 0),
    )
    for mode, accounting in _MODES.items()
    for fork, forked in _FORKS.items()
    for huge, paged in _HUGE.items()
    for no_dump in (False, True)
}

# Where tracemalloc shows committed bytes, for tracemalloc.DomainFilter.
TRACEMALLOC_DOMAIN: int = lib.TRACING_DOMAIN
_ADDRESS_LIMIT = 1 << (8 * ffi.sizeof("size_t"))
# Bound once: an attribute look-up on the library costs a third of an empty call.
_buffer = ffi.buffer
_commit = lib.region_commit
_decommit = lib.region_decommit
_is_committed = lib.region_is_committed
_end = lib.region_end
_release = lib.region_release
_reserve = lib.region_reserve
_NULL = ffi.NULL
# What a region has for a handle after its end, and handles for the next regions to use.
_CLOSED = ffi.new("struct region *")
_spare_handles: list[Any] = []
_SPARES = 16
# Every handle, entered once for all the regions that have it one after the other.
_handles: dict[int, "weakref.ref[Any]"] = {}


class Region:
    """A reservation of `size` bytes from address `base`, made by `reserve`.

    Views, memoryviews over committed bytes, are safe: while anything that was made from one is
    alive, its bytes can't be decommitted or released. A region that is closed, by `close` or the
    end of a ``with``, or dropped keeps its addresses until the last view is gone. `discard` keeps
    bytes readable, so it is allowed under views, which then read zero.

    The methods may be called from any thread. After a fork the child has its own copy, subject to
    `fork`. A finaliser or signal handler that interrupts a call on a region may call every method
    of that region but `view` and `ndarray`, which raise RuntimeError there.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError, except that
    `committed` and `reserved` of a closed region are exact as long as views keep it.
    """

    __slots__ = (
        "__weakref__",
        "_busy",
        "_closed",
        "_fork",
        "_handle",
        "_in_heap",
        "_lock",
        "_mode",
        "_name",
        "_owner",
        "_released",
        "_size",
        "_unused",
        "_views",
    )

    def __init__(self, size: int, mode: Mode, fork: Fork, name: str | None) -> None:
        """For `reserve`: a region whose ``struct region`` is still to be opened."""
        try:
            self._handle = _spare_handles.pop()
        except IndexError:
            self._handle = _new_handle()
        # Who takes this away is alone with a region that nobody has used: its first user, who makes
        # the lock, or its release, which then needs none.
        self._unused = None
        self._lock: RLock | None = None
        self._views: ViewTable | None = None
        # A call that must not be interrupted by the making of a view is under way.
        self._busy = False
        self._released = False
        # Closed: its addresses are gone, or left to the views that show them.
        self._closed = False
        # How many heaps in C use the handle; they keep this object as long.
        self._in_heap = 0
        self._size = size
        self._mode: Mode = mode
        self._fork: Fork = fork
        self._name = name
        # Who alone may take access and contents away, in words.
        self._owner: str | None = None

    def __del__(self) -> None:
        # Only where it is called by hand can another thread have the lock.
        if self._lock is None:
            self._drop()
        else:
            with self._lock:
                self._drop()

    def _drop(self) -> None:
        handle = self._handle
        if handle is _CLOSED or self._in_heap:
            return
        self._handle, was_closed, self._released = _CLOSED, self._closed, True
        if self._views is not None:
            del _view_tables[id(self)]
        if was_closed:
            return
        if not handle.base and len(_spare_handles) < _SPARES:
            # Nobody has this handle any more: the next region may use it.
            _spare_handles.append(handle)
        elif not _leave_to_views(handle, self._views):
            _end(handle)

    # -- what it is ---------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Bytes from the first to the last, guards not counted."""
        return self._size

    @property
    def mode(self) -> Mode:
        """How commits are accounted."""
        return self._mode

    @property
    def fork(self) -> Fork:
        """What a forked child finds."""
        return self._fork

    @property
    def name(self) -> str | None:
        """The name given, whether or not the kernel shows it."""
        return self._name

    @property
    def released(self) -> bool:
        """Whether the region was released or closed."""
        return self._released

    @property
    def base(self) -> int:
        """Address of the first byte. Touching memory through it is at your own risk."""
        with self._lock or self._make_lock():
            self._alive()
            return int(ffi.cast("uintptr_t", self._handle.base))

    @property
    def committed(self) -> int:
        """How many bytes are committed. Exact."""
        with self._lock or self._make_lock():
            if not self._handle.base:
                raise _released()
            return int(self._handle.committed.total)

    @property
    def reserved(self) -> int:
        """How many bytes the region owns: `size`, guards not counted."""
        with self._lock or self._make_lock():
            if not self._handle.base:
                raise _released()
            return int(self._handle.reserved.total)

    @property
    def sealed(self) -> bool:
        """Whether the region is sealed until the process ends."""
        with self._lock or self._make_lock():
            self._alive()
            return bool(self._handle.sealed)

    def is_committed(self, offset: int, length: int) -> bool:
        """Tell whether all of [offset, offset + length) is committed. Any alignment.

        Asks the region's own books, not the kernel. Bytes outside the region are not committed.

        Raises:
            RangeError: a negative offset, or a length that is not positive.
            ReleasedError: the region was released or closed.
        """
        offset, length = _index(offset), _index(length)
        if offset < 0 or length <= 0:
            raise _out_of_range("is_committed", offset, length, self._size)
        if offset + length > self._size:
            self._alive()
            return False
        with self._lock or self._make_lock():
            answer = _is_committed(self._handle, offset, length)
        if answer < 0:
            raise _released()
        return bool(answer)

    def committed_runs(self) -> list[tuple[int, int]]:
        """List the committed pieces as (offset, length), lowest first; neighbours are one piece."""
        return self._runs("committed")

    # -- the verbs ----------------------------------------------------------------------------

    def commit(self, offset: int, length: int) -> None:
        """Make [offset, offset + length) readable and writable.

        Fresh bytes read zero; bytes that were committed keep their contents. In mode ``"charge"``
        the whole range counts against the commit limit at once.

        Raises:
            RangeError: not whole OS pages inside the region.
            OutOfMemoryError: refused; ``limit`` says by what.
            ReleasedError: the region was released or closed.
        """
        offset, length = _index(offset), _index(length)
        with self._lock or self._make_lock():
            try:
                err = _commit(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("commit", err, offset, length)

    def populate(self, offset: int, length: int) -> None:
        """Back committed bytes with memory now instead of at first touch; contents stay.

        Raises:
            RangeError: not whole OS pages inside the region, or not all committed.
            VMError: the kernel could not.
            ReleasedError: the region was released or closed.
        """
        offset, length = _index(offset), _index(length)
        with self._lock or self._make_lock():
            try:
                err = lib.region_populate(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("populate", err, offset, length)

    def discard(self, offset: int, length: int, lazy: bool = False) -> None:
        """Drop the contents of committed bytes; they stay committed and read zero from now on.

        With `lazy` the kernel may keep the contents until it needs the memory or they are written
        again, so reads show either; the memory counts in RSS until then. Allowed under live views.

        Raises:
            RangeError: not whole OS pages inside the region, or not all committed; or the region is
                part of an arena.
            VMError: the kernel could not (before Linux 5.18: memory locked by mlock).
            ReleasedError: the region was released or closed.
        """
        offset, length, lazy = _index(offset), _index(length), bool(lazy)
        self._refuse_owned("discard")
        with self._lock or self._make_lock():
            try:
                err = lib.region_discard(self._handle, offset, length, lazy)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("discard", err, offset, length)

    def decommit(self, offset: int, length: int) -> None:
        """Take [offset, offset + length) back to reserved: no access, memory and charge given back.

        Bytes that are not committed stay so.

        Raises:
            RangeError: not whole OS pages inside the region, or the region is part of an arena.
            ViewError: live views hold some of the bytes.
            VMError: refused (max_map_count: a hole splits a mapping), or the region is sealed.
                Should the kernel refuse the region's policies for the fresh addresses, that is
                raised although the bytes are decommitted.
            ReleasedError: the region was released or closed.
        """
        offset, length = _index(offset), _index(length)
        self._refuse_owned("decommit")
        with self._lock or self._make_lock():
            interrupting, self._busy = self._busy, True
            try:
                if self._views is not None and offset >= 0 < length <= self._size - offset:
                    self._refuse_views("decommit", offset, offset + length, interrupting)
                err = _decommit(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
            finally:
                self._busy = interrupting
        if err:
            self._fail("decommit", err, offset, length)

    def release(self) -> None:
        """Give the addresses back.

        Raises:
            ViewError: live views hold some of the bytes.
            VMError: refused (max_map_count), or the region is sealed.
            RangeError: the region is part of an arena: release the arena.
            ReleasedError: it was released or closed.
        """
        self._refuse_owned("release")
        self._release()

    def close(self) -> None:
        """Refuse new use now; release the addresses when the last view is gone.

        With no view they are released now. Leaving a ``with`` block calls this. Calling it again
        does nothing. A sealed region keeps its addresses until the process ends.

        Raises:
            RangeError: the region is part of an arena: close the arena.
        """
        self._refuse_owned("close")
        self._close()

    def _close(self) -> None:
        try:
            del self._unused
        except AttributeError:
            self._close_used()
        else:
            self._released = True
            _end(self._handle)

    def _close_used(self) -> None:
        if self._lock is None:  # released or closed before anybody used it
            return
        with self._lock:
            if self._closed or not self._handle.base:
                return
            self._retire()
            if not _leave_to_views(self._handle, self._views):
                _end(self._handle)
            self._closed = True

    def _retire(self) -> None:
        """Refuse new use but keep the addresses.

        The caller holds the lock and calls `_close` next.
        """
        self._released = True
        lib.region_retire(self._handle)

    def _release(self) -> None:
        unused = True
        try:
            del self._unused
        except AttributeError:
            unused = False
        if unused:
            err = _release(self._handle)
            if err:
                self._unused = None
            self._released = not err
        else:
            err = self._release_used()
        if err:
            self._fail("release", err, 0, self._size)

    def _release_used(self) -> int:
        with self._lock or self._make_lock():
            self._alive()
            interrupting, self._busy = self._busy, True
            try:
                if self._views is not None:
                    self._refuse_views("release", 0, self._size, interrupting)
                err: int = _release(self._handle)
                self._released = not err
            finally:
                self._busy = interrupting
        return err

    # -- views --------------------------------------------------------------------------------

    def view(self, offset: int, length: int, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of committed bytes, one unsigned byte an item. Any alignment.

        The bytes are pinned while the view, or anything made from it, is alive: slices, casts,
        ndarrays, ctypes objects. Two ways around this guard are at your own risk: the raw address,
        and consumers that keep only the memoryview object (``torch.frombuffer``) when you call its
        ``release``. A readonly view's ``obj`` is the writable buffer behind it.

        Raises:
            RangeError: outside the region, or not all committed.
            ReleasedError: the region was released or closed.
            RuntimeError: called by a finaliser or signal handler inside another call on the region.
        """
        offset, length = _index(offset), _index(length)
        if offset < 0 or length <= 0 or offset + length > self._size:
            self._alive()
            raise _out_of_range("view", offset, length, self._size)
        with self._lock or self._make_lock():
            if self._busy:
                msg = "view called from inside another call on the same region"
                raise RuntimeError(msg)
            self._alive()
            self._busy = True
            try:
                if self._views is None:
                    _view_tables[id(self)] = self._views = ViewTable(self._size)
                # A fresh cdata each time: it lives exactly as long as the buffer made of it.
                anchor = self._anchor(offset)
                exported = _buffer(anchor, length)
                # Known as live first, found committed afterwards: whatever decommits from here on
                # is refused, and what was decommitted before is seen.
                self._views.add(anchor, offset, offset + length)
                known = _is_committed(self._handle, offset, length)
                if known != 1:
                    self._fail("view", known or lib.REGION_NOT_COMMITTED, offset, length)
                view = memoryview(exported)
            finally:
                self._busy = False
        return view.toreadonly() if readonly else view

    def ndarray(
        self,
        offset: int,
        shape: int | tuple[int, ...],
        dtype: "npt.DTypeLike" = "uint8",
        *,
        readonly: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """Return a C-ordered numpy array over committed bytes, pinned like a view.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            RangeError, ReleasedError, RuntimeError: as for `view`.
        """
        numpy = import_numpy("ndarray")
        kind = numpy.dtype(dtype)
        sides = tuple(_index(side) for side in (shape if isinstance(shape, tuple) else (shape,)))
        nbytes = math.prod(sides, start=kind.itemsize)
        view = self.view(offset, nbytes, readonly=readonly)
        array: np.ndarray[Any, Any] = numpy.frombuffer(view, dtype=kind).reshape(sides)
        return array

    # -- Python's protocols -------------------------------------------------------------------

    def __enter__(self) -> "Self":
        self._alive()
        self._refuse_owned("close")
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.released:
            return f"<Region of {format_size(self._size)}, released>"
        with self._lock or self._make_lock():
            runs = self._handle.committed
            base = int(ffi.cast("uintptr_t", self._handle.base))
            committed, count = int(runs.total), int(runs.count)
        name = f" {self.name!r}" if self.name else ""
        pieces = f" in {count} piece{'s' if count != 1 else ''}" if count else ""
        sealed = ", sealed" if self._handle.sealed else ""
        return (
            f"<Region{name} {base:#x}-{base + self._size:#x} of {format_size(self._size)}: "
            f"{format_size(committed)} committed{pieces}, mode {self.mode}{sealed}>"
        )

    def __reduce__(self) -> NoReturn:
        msg = "a Region is addresses of this process: it can't be pickled or copied"
        raise TypeError(msg)

    # -- inside -------------------------------------------------------------------------------

    def _alive(self) -> None:
        if self._released:
            raise _released()

    def _make_lock(self) -> RLock:
        """Return the lock, made at the first use: a region that is only reserved does without."""
        with _registry_lock:
            if self._lock is None:
                lock = RLock()
                forks.register(lock)
                try:
                    del self._unused
                except AttributeError:
                    raise _released() from None
                self._lock = lock
            return self._lock

    def _anchor(self, offset: int) -> Any:
        base = self._handle.base
        if offset <= sys.maxsize:
            return base + offset
        return ffi.cast("char *", int(ffi.cast("uintptr_t", base)) + offset)

    def _runs(self, which: Literal["committed", "reserved"]) -> list[tuple[int, int]]:
        """Copy runs out in one call, so that nothing can come in between."""
        with self._lock or self._make_lock():
            self._alive()
            room, count = 0, 1
            while count > room:
                room = 2 * count
                runs = ffi.new("struct run[]", room)
                count = lib.region_runs(self._handle, which == "committed", runs, room)
            self._alive()
        return [(runs[i].lo, runs[i].hi - runs[i].lo) for i in range(count)]

    def _refuse_owned(self, verb: str) -> None:
        if self._owner is not None:
            self._alive()
            msg = f"can't {verb}: the region is part of {self._owner}, which does that itself"
            raise RangeError(msg)

    @contextmanager
    def _taking_away(self) -> Iterator[bool]:
        """Let no view be made inside; yields whether this interrupts another such call.

        For whoever holds the lock, looks for live views, and then takes bytes away.
        """
        interrupting, self._busy = self._busy, True
        try:
            yield interrupting
        finally:
            self._busy = interrupting

    def _pinned(self, offset: int, length: int) -> Any:
        """Return what pins bytes that are in view already, as long as it lives."""
        anchor = self._anchor(offset)
        assert self._views is not None
        self._views.add(anchor, offset, offset + length)
        self._alive()
        return anchor

    def _refuse_views(self, verb: str, lo: int, hi: int, interrupting: bool) -> None:
        assert self._views is not None
        held = self._views.live(lo, hi, prune=not interrupting)
        if held:
            raise view_error(f"can't {verb} [{lo:#x}, {hi:#x})", held, verb)

    def _fail(self, verb: str, err: int, offset: int, length: int) -> NoReturn:
        """Raise what `err`, an errno or an enum region_misuse, means."""
        if err == lib.REGION_RELEASED:
            raise _released()
        if err == lib.REGION_SEALED:
            msg = f"can't {verb}: the region is sealed until the process ends (mseal)"
            raise VMError(errno.EPERM, msg, verb=verb, nbytes=length, address=self.base + offset)
        if err == lib.REGION_OUTSIDE:
            raise _out_of_range(verb, offset, length, self._size)
        if err < 0:
            reason = {
                lib.REGION_MISALIGNED: f"not whole OS pages of {PAGE_SIZE} bytes",
                lib.REGION_NOT_RESERVED: "not all of it is reserved",
                lib.REGION_NOT_COMMITTED: "not all of it is committed",
            }[err]
            msg = f"can't {verb} {length} bytes at offset {offset}: {reason}"
            raise RangeError(msg)
        raise refusal(verb, err, length, self.base + offset)


def reserve(
    size: int,
    *,
    at: int | None = None,
    hint: int | None = None,
    align: int | None = None,
    mode: Mode = "charge",
    dump: bool = False,
    fork: Fork = "copy",
    huge_pages: HugePages = "default",
    guard: bool = False,
    name: str | None = None,
    seal: bool = False,
) -> Region:
    """Reserve `size` bytes of addresses, rounded up to whole OS pages: no memory, no charge.

    Args:
        size: in bytes, positive.
        at: exactly this address; what is mapped there is never replaced.
        hint: near this address if that is free, else anywhere.
        align: the base is a multiple of this power of two (bytes).
        mode: ``"charge"``: a commit counts against the commit limit, a decommit gives it back.
            ``"noreserve"``: never charged (MAP_NORESERVE), except under
            ``vm.overcommit_memory=2``, where the kernel ignores that and ``Region.mode``
            says ``"charge"``. There a reservation is not charged, but 1/32 of a process's
            addresses, at most vm.user_reserve_kbytes (128 MiB), is kept back from its commits.
        dump: whether core dumps include the region (else MADV_DONTDUMP).
        fork: what a forked child finds: ``"copy"`` as usual, or ``"wipe"`` zeros
            (MADV_WIPEONFORK), which copies no page tables. In mode ``"charge"`` the child is
            charged for the committed bytes either way (``dup_mmap`` in Linux's kernel/fork.c).
        huge_pages: ``"prefer"`` (MADV_HUGEPAGE, the base aligned to a huge page), ``"never"``
            (MADV_NOHUGEPAGE), or as the system is set.
        guard: keep one OS page at each end that is never accessible, besides `size`.
        name: shown in /proc/PID/maps as ``[anon:NAME]`` where the kernel was built with
            CONFIG_ANON_VMA_NAME; at most 79 printable ASCII characters, none of them a bracket,
            a backslash, a dollar sign or a backquote.
        seal: commit all of it at once and forbid, until the process ends, to unmap it or change
            its access (mseal, Linux 6.10): it can be discarded, never decommitted or released.

    Raises:
        TypeError: a number that is not an integer.
        ValueError: a number or a word that makes no sense (`RangeError` for sizes and addresses).
        OutOfMemoryError: refused; ``limit`` says by what, ``"address space"`` among them.
        VMError: `at` is occupied (EEXIST), or a policy is not to be had here.
    """
    size, guard = _index(size), bool(guard)
    at = None if at is None else _index(at)
    hint = None if hint is None else _index(hint)
    align = None if align is None else _index(align)
    if size <= 0:
        msg = f"a region has a positive size, not {size}"
        raise RangeError(msg)
    if size % PAGE_SIZE:
        size += PAGE_SIZE - size % PAGE_SIZE
    try:
        accounting, advice = _POLICIES[mode, fork, huge_pages, not dump]
    except (KeyError, TypeError):
        raise _unknown_word(mode, fork, huge_pages) from None
    if accounting:
        mode, accounting = effective_mode(mode)
    if huge_pages == "prefer" and align is None and at is None:
        align = thp_size()
    if at is None and hint is None and align is None and not guard and name is None:
        wish = _NULL
    else:
        wish = _wish(at, hint, align, guard, name)
    region = Region(size, mode, fork, name)
    try:
        err = _reserve(region._handle, size, accounting, advice, wish)
    except OverflowError:  # more bytes than an address can tell apart
        err = errno.ENOMEM
    if err:
        raise refusal("reserve", err, size + (align or 0) + 2 * PAGE_SIZE * bool(guard), at)
    if seal:
        err = lib.region_seal(region._handle)
        if err:
            region.release()
            raise refusal("seal", err, size)
    return region


def resident(region: Region) -> int:
    """How much of a region is in memory, in bytes, as the kernel says."""
    total, seen = 0, ffi.new("size_t *")
    for offset, length in region.committed_runs():
        err = lib.vm_resident(region.base + offset, length, seen)
        if err:
            raise refusal("look at", err, length, region.base + offset)
        total += int(seen[0])
    return total


def import_numpy(user: str) -> Any:
    """Import numpy where it is needed, and only there: importing pyreserve is cheap.

    Raises:
        ImportError: not installed (extra ``numpy``); the message names `user`. Or as numpy
                raised it.
    """
    return import_extra("numpy", "numpy", user)


def _new_handle() -> Any:
    handle = ffi.new("struct region *")
    key, forget = id(handle), _handles.pop  # bound: the module may be gone first

    def gone(_: "weakref.ref[Any]") -> None:
        forget(key, None)

    _handles[key] = weakref.ref(handle, gone)
    return handle


def live_ranges() -> list[tuple[int, int]]:
    """Return the addresses [start, end) of every region that is open, without keeping any alive."""
    found = []
    for reference in list(_handles.values()):
        handle = reference()
        if handle is not None and handle.base:
            base = int(ffi.cast("uintptr_t", handle.base))
            found.append((base, base + int(handle.size)))
    return found


def effective_mode(mode: Mode) -> tuple[Mode, int]:
    """Return a mode as the kernel takes it, and the accounting of ``csrc/region.h`` for it.

    Where /proc can't be read, vm.overcommit_memory counts as 0, the kernel's default.

    Raises:
        ValueError: there is no such mode.
    """
    if mode not in _MODES:
        raise _unknown_word(mode, "copy", "default")
    if mode == "noreserve" and proc.setting_or_default("overcommit_memory") == 2:
        mode = "charge"
    return mode, _MODES[mode]


def _wish(
    at: int | None, hint: int | None, align: int | None, guard: bool, name: str | None
) -> Any:
    """Check what a reservation shall have and put it in a ``struct region_wish``."""
    wish = ffi.new("struct region_wish *")
    if at is not None and hint is not None:
        msg = "at and hint exclude each other"
        raise ValueError(msg)
    if at is not None or hint is not None:
        address = hint if at is None else at
        assert address is not None
        if not 0 < address < _ADDRESS_LIMIT or address % PAGE_SIZE:
            msg = f"not the address of an OS page of {PAGE_SIZE} bytes: {address:#x}"
            raise RangeError(msg)
        wish.address, wish.exact = address, at is not None
    if align is not None:
        if not 0 < align < _ADDRESS_LIMIT or align & (align - 1):
            msg = f"an alignment is a power of two, not {align}"
            raise RangeError(msg)
        if at is not None and at % align:
            msg = f"the address {at:#x} is not a multiple of {align:#x}"
            raise RangeError(msg)
        wish.align = align
    if guard:
        wish.guard = PAGE_SIZE
        if at is not None and at <= PAGE_SIZE:
            msg = f"no room for a guard below the address {at:#x}"
            raise RangeError(msg)
    if name is not None:
        wish.name = _checked_name(name)
    return wish


def _checked_name(name: str) -> bytes:
    if not isinstance(name, str):
        msg = f"a name is a string, not {type(name).__name__}"
        raise TypeError(msg)
    name = str.__str__(name)  # a subclass's methods may do anything
    # The kernel's own rule (prctl(2), PR_SET_VMA_ANON_NAME).
    if not 0 < len(name) < 80 or any(not " " <= c <= "~" or c in "[]\\$`" for c in name):
        msg = f"not a name for a mapping: {name!r}"
        raise ValueError(msg)
    return name.encode("ascii")


def _unknown_word(mode: object, fork: object, huge_pages: object) -> ValueError:
    for given, known, what in ((mode, _MODES, "mode"), (fork, _FORKS, "fork")):
        if given not in list(known):
            return ValueError(f"{what} is one of {', '.join(known)}; not {given!r}")
    return ValueError(f"huge_pages is one of {', '.join(_HUGE)}; not {huge_pages!r}")


def _released() -> ReleasedError:
    return ReleasedError("the region was released or closed")


def _out_of_range(verb: str, offset: int, length: int, size: int) -> RangeError:
    return RangeError(f"can't {verb} {length} bytes at offset {offset} of a region of {size} bytes")


# -- views that outlive their region ----------------------------------------------------------

# The view tables of all regions that have one. What is reachable only from a region that is garbage
# itself loses its weak references before finalisers run; these are reachable from here.
_view_tables: dict[int, ViewTable] = {}

# What is unmapped when the last anchor is gone.
_outliving: dict[int, "_Outlived"] = {}
_FIRST_SWEEP = 16
_sweep_at = _FIRST_SWEEP


class _Outlived:
    """The addresses of a closed or dropped region that live views still show."""

    def __init__(self, handle: Any, anchors: list[Any]) -> None:
        self.handle = handle
        self.anchors = {id(ref): ref for ref in (weakref.ref(a, self._gone) for a in anchors)}

    def _gone(self, ref: "weakref.ref[Any]") -> None:
        self.anchors.pop(id(ref), None)
        if not self.anchors:
            self.end_if_unseen()

    def end_if_unseen(self) -> None:
        """Unmap unless a view is left. Twice does no harm: the handle is nobody else's."""
        if all(ref() is None for ref in list(self.anchors.values())):
            _end(self.handle)
            _outliving.pop(id(self), None)


def _leave_to_views(handle: Any, views: ViewTable | None) -> bool:
    """Give the addresses of a region back when its last view is gone; False: there is none."""
    anchors = [] if views is None else views.anchors()
    if not anchors:
        return False
    left = _Outlived(handle, anchors)
    _outliving[id(left)] = left
    if len(_outliving) >= _sweep_at:
        _sweep_outliving()
    return True


def _sweep_outliving() -> None:
    """End what a signal handler that raised in `_Outlived._gone` has kept from its end."""
    global _sweep_at  # noqa: PLW0603
    for left in list(_outliving.values()):
        left.end_if_unseen()
    _sweep_at = 2 * len(_outliving) + _FIRST_SWEEP
