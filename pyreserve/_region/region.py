"""Regions: addresses reserved now, memory committed later.

======== ===================================================== =====================================
verb     meaning                                               Linux
======== ===================================================== =====================================
reserve  own addresses; no access, no memory, no commit charge ``mmap(PROT_NONE)``
commit   make a range readable and writable; reads zero        ``mprotect``
populate back committed memory with pages now                  ``MADV_POPULATE_WRITE``
discard  drop the contents, stay committed                     ``MADV_DONTNEED``, ``MADV_FREE``
decommit back to reserved; memory and charge given back        ``mmap(MAP_FIXED, PROT_NONE)``
release  give the addresses back                               ``munmap``
======== ===================================================== =====================================

Sizes, offsets and lengths are in bytes. Verbs take whole OS pages (`pyreserve.PAGE_SIZE`).
"""

import errno
import math
from operator import index as _index
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from pyreserve._native import ffi, lib
from pyreserve._region import handles
from pyreserve._region.exports import ENDED, Exports
from pyreserve._region.refusals import outside, refused, released
from pyreserve._system import proc
from pyreserve._system.extras import import_extra
from pyreserve._system.features import thp_size
from pyreserve._system.forks import registry_lock as _registry_lock
from pyreserve._system.limits import PAGE_SIZE, refusal
from pyreserve.errors import RangeError
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
        fork_flag | huge_flag | (lib.VM_NO_DUMP if no_dump else 0),
    )
    for mode, accounting in _MODES.items()
    for fork, fork_flag in _FORKS.items()
    for huge, huge_flag in _HUGE.items()
    for no_dump in (False, True)
}

# The tracemalloc domain of committed bytes, for tracemalloc.DomainFilter.
TRACEMALLOC_DOMAIN: int = lib.TRACING_DOMAIN
_ADDRESS_LIMIT = 1 << (8 * ffi.sizeof("size_t"))
# Bound once: an attribute lookup on the library costs a third of an empty call.
_commit = lib.region_commit
_is_committed = lib.region_is_committed
_end = lib.region_end
_release = lib.region_release
_reserve = lib.region_reserve
_NULL = ffi.NULL


class Region:
    """A reservation of `size` bytes from address `base`, returned by `reserve`.

    A view is a memoryview or ndarray over committed bytes. While it, or an object made from it, is
    alive, its bytes cannot be decommitted or released. If the region is closed, by `close` or the
    end of a ``with`` block, or garbage, its addresses stay reserved until the last view is gone.
    `discard` keeps bytes readable, so it is allowed under views, which then read zero.

    All methods are thread-safe. After a fork the child has its own copy, see `fork`. A finaliser or
    signal handler that interrupts a call on a region may call all methods of that region except
    `view` and `ndarray`, which raise RuntimeError there.

    After `release` or `close`, methods raise `ReleasedError`, a ValueError. `committed` and
    `reserved` of a closed region stay exact while views keep its addresses.
    """

    __slots__ = (
        "__weakref__",
        "_exports",
        "_fork",
        "_handle",
        "_mode",
        "_name",
        "_size",
        "_unused",
    )

    def __init__(self, size: int, mode: Mode, fork: Fork, name: str | None) -> None:
        """Create a region without addresses; only `reserve` calls this."""
        self._handle = handles.take()
        # `del self._unused` succeeds exactly once, so it elects either the creator of the Exports
        # or a release that needs none.
        self._unused = None
        self._exports: Exports | None = None
        self._size = size
        self._mode: Mode = mode
        self._fork: Fork = fork
        self._name = name

    def __del__(self) -> None:
        exports = self._exports
        if exports is None or exports is ENDED:
            handle, self._handle, self._exports = self._handle, handles.CLOSED, ENDED
            if handle is not handles.CLOSED and not handles.reuse(handle):
                _end(handle)
        elif exports.drop():
            self._handle = handles.CLOSED

    # -- properties ---------------------------------------------------------------------------

    @property
    def size(self) -> int:
        """Size in bytes, without guards."""
        return self._size

    @property
    def mode(self) -> Mode:
        """Accounting mode: ``"charge"`` or ``"noreserve"``; see `reserve`."""
        return self._mode

    @property
    def fork(self) -> Fork:
        """Contents in a forked child: ``"copy"`` or ``"wipe"``; see `reserve`."""
        return self._fork

    @property
    def name(self) -> str | None:
        """The name given to `reserve`, whether or not the kernel shows it; None if none."""
        return self._name

    @property
    def released(self) -> bool:
        """Whether the region is released or closed."""
        return self._exports is not None and self._exports.released

    @property
    def exports(self) -> Exports:
        """The lock, the live views and the unchecked verbs of the region: low-level.

        For containers that are built on a region.
        """
        return self._exports or self._open_exports()

    @property
    def base(self) -> int:
        """Address of the first byte. Access through raw addresses is at your own risk."""
        with (self._exports or self._open_exports()).lock:
            self._alive()
            return int(ffi.cast("uintptr_t", self._handle.base))

    @property
    def committed(self) -> int:
        """Number of committed bytes. Exact."""
        with (self._exports or self._open_exports()).lock:
            if not self._handle.base:
                raise released()
            return int(self._handle.committed.total)

    @property
    def reserved(self) -> int:
        """Number of bytes that the region owns: `size`, without guards."""
        with (self._exports or self._open_exports()).lock:
            if not self._handle.base:
                raise released()
            return int(self._handle.reserved.total)

    @property
    def sealed(self) -> bool:
        """Whether the region is sealed until the process ends."""
        with (self._exports or self._open_exports()).lock:
            self._alive()
            return bool(self._handle.sealed)

    def is_committed(self, offset: int, length: int) -> bool:
        """Return whether all of [offset, offset + length) is committed. Any alignment.

        Reads the region's own records, not the kernel's. Bytes outside the region count as not
        committed.

        Raises:
            RangeError: `offset` is negative, or `length` not positive.
            ReleasedError: the region is released or closed.
        """
        offset, length = _index(offset), _index(length)
        if offset < 0 or length <= 0:
            raise outside("is_committed", offset, length, self._size)
        if offset + length > self._size:
            self._alive()
            return False
        with (self._exports or self._open_exports()).lock:
            answer = _is_committed(self._handle, offset, length)
        if answer < 0:
            raise released()
        return bool(answer)

    def committed_runs(self) -> list[tuple[int, int]]:
        """Return the committed ranges as (offset, length), lowest first, adjacent ones joined."""
        return (self._exports or self._open_exports()).runs(committed=True)

    # -- verbs --------------------------------------------------------------------------------

    def commit(self, offset: int, length: int) -> None:
        """Make [offset, offset + length) readable and writable.

        Newly committed bytes read zero; bytes that were already committed keep their contents. In
        mode ``"charge"`` the whole range is charged against the commit limit at once.

        Raises:
            RangeError: the range is not whole OS pages inside the region.
            OutOfMemoryError: refused; ``limit`` names the limit.
            ReleasedError: the region is released or closed.
        """
        offset, length = _index(offset), _index(length)
        with (self._exports or self._open_exports()).lock:
            try:
                err = _commit(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("commit", err, offset, length)

    def populate(self, offset: int, length: int) -> None:
        """Back committed bytes with pages now instead of at first touch; keep their contents.

        Raises:
            RangeError: the range is not whole OS pages inside the region, or not all committed.
            VMError: the kernel refused.
            ReleasedError: the region is released or closed.
        """
        offset, length = _index(offset), _index(length)
        with (self._exports or self._open_exports()).lock:
            try:
                err = lib.region_populate(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("populate", err, offset, length)

    def discard(self, offset: int, length: int, lazy: bool = False) -> None:
        """Drop the contents of committed bytes; they stay committed and read zero afterwards.

        With `lazy` the kernel drops the contents only under memory pressure: until then reads
        return old contents or zero, and the memory counts in RSS. A write keeps a page. Allowed
        under live views.

        Raises:
            RangeError: the range is not whole OS pages inside the region, or not all committed; or
                the region is part of an arena.
            VMError: the kernel refused (before Linux 5.18: memory locked by mlock).
            ReleasedError: the region is released or closed.
        """
        offset, length, lazy = _index(offset), _index(length), bool(lazy)
        exports = self._exports or self._open_exports()
        if exports.owner is not None:
            self._refuse_owned("discard", exports.owner)
        exports.discard(offset, length, lazy=lazy)

    def decommit(self, offset: int, length: int) -> None:
        """Return [offset, offset + length) to reserved: no access; memory and charge given back.

        Bytes that are not committed are left as they are.

        Raises:
            RangeError: the range is not whole OS pages inside the region, or the region is part of
                an arena.
            ViewError: live views show some of the bytes.
            VMError: refused (max_map_count: a hole splits a mapping), or the region is sealed. Also
                if the kernel refuses the region's policies for the new mapping; only then are the
                bytes decommitted nevertheless.
            ReleasedError: the region is released or closed.
        """
        offset, length = _index(offset), _index(length)
        exports = self._exports or self._open_exports()
        if exports.owner is not None:
            self._refuse_owned("decommit", exports.owner)
        exports.decommit(offset, length)

    def release(self) -> None:
        """Give the addresses back.

        Raises:
            ViewError: live views show some of the bytes.
            VMError: refused (max_map_count), or the region is sealed.
            RangeError: the region is part of an arena: release the arena.
            ReleasedError: the region is already released or closed.
        """
        try:
            del self._unused
        except AttributeError:
            exports = self._exports or self._open_exports()
        else:
            err = _release(self._handle)
            if err:
                self._unused = None
                raise refused(self._handle, self._size, "release", err, 0, self._size)
            self._exports = ENDED
            return
        if exports.owner is not None:
            self._refuse_owned("release", exports.owner)
        exports.release()

    def close(self) -> None:
        """Refuse new use now; release the addresses when the last view is gone.

        Without live views they are released at once. Leaving a ``with`` block calls this; a second
        call does nothing. A sealed region keeps its addresses until the process ends.

        Raises:
            RangeError: the region is part of an arena: close the arena.
        """
        try:
            del self._unused
        except AttributeError:
            exports = self._exports
        else:
            _end(self._handle)
            self._exports = ENDED
            return
        if exports is None:
            with _registry_lock:  # wait for another thread that creates it
                exports = self._exports
            if exports is None:  # another thread releases or closes the region
                return
        if exports.owner is not None:
            self._refuse_owned("close", exports.owner)
        exports.close()

    # -- views --------------------------------------------------------------------------------

    def view(self, offset: int, length: int, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of committed bytes, format ``"B"``, shape (length,). Any alignment.

        The bytes stay committed while the view, or an object made from it, is alive: slices, casts,
        ndarrays, ctypes objects. Two uses are not protected: the raw address, and calling
        ``release`` of a memoryview whose consumer keeps no reference to the buffer behind it
        (``torch.frombuffer``). ``obj`` of a readonly view is the writable buffer behind it.

        Raises:
            RangeError: the range is outside the region, or not all committed.
            ReleasedError: the region is released or closed.
            RuntimeError: called by a finaliser or signal handler inside another call on the region.
        """
        offset, length = _index(offset), _index(length)
        if offset < 0 or length <= 0 or offset + length > self._size:
            self._alive()
            raise outside("view", offset, length, self._size)
        view = (self._exports or self._open_exports()).view(offset, length)
        return view.toreadonly() if readonly else view

    def ndarray(
        self,
        offset: int,
        shape: int | tuple[int, ...],
        dtype: "npt.DTypeLike" = "uint8",
        *,
        readonly: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """Return a C-ordered ndarray of `shape` and `dtype` over committed bytes, from `offset`.

        It protects its bytes as a `view` does.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            RangeError, ReleasedError, RuntimeError: as for `view`.
        """
        numpy = import_numpy("ndarray")
        item_type = numpy.dtype(dtype)
        sides = tuple(_index(side) for side in (shape if isinstance(shape, tuple) else (shape,)))
        nbytes = math.prod(sides, start=item_type.itemsize)
        view = self.view(offset, nbytes, readonly=readonly)
        array: np.ndarray[Any, Any] = numpy.frombuffer(view, dtype=item_type).reshape(sides)
        return array

    # -- Python protocols ---------------------------------------------------------------------

    def __enter__(self) -> "Self":
        self._alive()
        if self._exports is not None and self._exports.owner is not None:
            self._refuse_owned("close", self._exports.owner)
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self.released:
            return f"<Region of {format_size(self._size)}, released>"
        with (self._exports or self._open_exports()).lock:
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
        msg = "Region cannot be pickled or copied: it owns addresses of this process"
        raise TypeError(msg)

    # -- private ------------------------------------------------------------------------------

    def _alive(self) -> None:
        if self._exports is not None and self._exports.released:
            raise released()

    def _open_exports(self) -> Exports:
        """Return the Exports, created at first use: a region that is only reserved has none."""
        with _registry_lock:
            if self._exports is None:
                exports = Exports(self._handle, self._size)
                try:
                    del self._unused
                except AttributeError:
                    raise released() from None
                self._exports = exports
            return self._exports

    def _refuse_owned(self, verb: str, owner: str) -> NoReturn:
        self._alive()
        msg = f"cannot {verb} a region that is part of {owner}: use the owner's methods"
        raise RangeError(msg)

    def _fail(self, verb: str, err: int, offset: int, length: int) -> NoReturn:
        raise refused(self._handle, self._size, verb, err, offset, length)


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
        size: bytes, positive.
        at: reserve exactly at this address; an existing mapping is never replaced.
        hint: reserve near this address if it is free, else anywhere.
        align: alignment of the base in bytes, a power of two.
        mode: ``"charge"``: a commit is charged against the commit limit, a decommit refunds it.
            ``"noreserve"``: never charged (MAP_NORESERVE), except under
            ``vm.overcommit_memory=2``, where the kernel ignores the flag and ``Region.mode``
            is ``"charge"``. There a reservation is not charged, but 1/32 of a process's
            addresses, at most vm.user_reserve_kbytes (128 MiB), is unavailable to its commits.
        dump: include the region in core dumps (default: MADV_DONTDUMP).
        fork: contents in a forked child: ``"copy"``, or ``"wipe"``: zeros (MADV_WIPEONFORK),
            which copies no page tables. In mode ``"charge"`` the child is charged for the
            committed bytes either way (``dup_mmap``, Linux kernel/fork.c).
        huge_pages: ``"prefer"`` (MADV_HUGEPAGE, the base aligned to a huge page), ``"never"``
            (MADV_NOHUGEPAGE), or ``"default"``: the system's setting.
        guard: add an OS page that is never accessible at each end, in addition to `size`.
        name: shown in /proc/PID/maps as ``[anon:NAME]`` if the kernel has CONFIG_ANON_VMA_NAME
            (prctl(2), PR_SET_VMA_ANON_NAME); 1 to 79 printable ASCII characters except brackets,
            backslash, dollar sign and backquote.
        seal: commit the whole region and forbid unmapping it or changing its access until the
            process ends (mseal, Linux 6.10): it can be discarded, never decommitted or released.

    Raises:
        TypeError: a number is not an integer, or `name` not a string.
        ValueError: an invalid or conflicting argument (`RangeError` for sizes and addresses).
        OutOfMemoryError: refused; ``limit`` names the limit, such as ``"address space"``.
        VMError: `at` is occupied (EEXIST), or this kernel lacks a policy.
    """
    size, guard = _index(size), bool(guard)
    at = None if at is None else _index(at)
    hint = None if hint is None else _index(hint)
    align = None if align is None else _index(align)
    if size <= 0:
        msg = f"size must be positive, got {size}"
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
        options = _NULL
    else:
        options = _placement_options(at, hint, align, guard, name)
    region = Region(size, mode, fork, name)
    try:
        err = _reserve(region._handle, size, accounting, advice, options)
    except OverflowError:  # size does not fit in size_t
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
    """Return the number of bytes of a region that are resident, as counted by mincore(2)."""
    total, nbytes = 0, ffi.new("size_t *")
    for offset, length in region.committed_runs():
        err = lib.vm_resident(region.base + offset, length, nbytes)
        if err:
            raise refusal("inspect", err, length, region.base + offset)
        total += int(nbytes[0])
    return total


def import_numpy(user: str) -> Any:
    """Import numpy at first use; importing pyreserve does not import it.

    Raises:
        ImportError: numpy is missing (extra ``numpy``), the message names `user`; or raised by
            numpy itself.
    """
    return import_extra("numpy", "numpy", user)


def effective_mode(mode: Mode) -> tuple[Mode, int]:
    """Return the mode that takes effect, and its accounting flag of ``csrc/region.h``.

    If /proc is unreadable, vm.overcommit_memory counts as 0, the kernel's default.

    Raises:
        ValueError: `mode` is not a mode.
    """
    if mode not in _MODES:
        raise _unknown_word(mode, "copy", "default")
    if mode == "noreserve" and proc.setting_or_default("overcommit_memory") == 2:
        mode = "charge"
    return mode, _MODES[mode]


def _placement_options(
    at: int | None, hint: int | None, align: int | None, guard: bool, name: str | None
) -> Any:
    """Check the placement arguments of `reserve` and return them as a C struct."""
    options = ffi.new("struct region_options *")
    if at is not None and hint is not None:
        msg = "at and hint are mutually exclusive"
        raise ValueError(msg)
    if at is not None or hint is not None:
        argument, address = ("hint", hint) if at is None else ("at", at)
        assert address is not None
        if not 0 < address < _ADDRESS_LIMIT or address % PAGE_SIZE:
            msg = (
                f"{argument} must be a positive address that is a multiple of the OS page "
                f"({PAGE_SIZE}), got {address:#x}"
            )
            raise RangeError(msg)
        options.address, options.exact = address, at is not None
    if align is not None:
        if not 0 < align < _ADDRESS_LIMIT or align & (align - 1):
            msg = f"align must be a power of two, got {align}"
            raise RangeError(msg)
        if at is not None and at % align:
            msg = f"at must be a multiple of align ({align:#x}), got {at:#x}"
            raise RangeError(msg)
        options.align = align
    if guard:
        options.guard = PAGE_SIZE
        if at is not None and at <= PAGE_SIZE:
            msg = f"at must be above {PAGE_SIZE:#x} with a guard, got {at:#x}"
            raise RangeError(msg)
    if name is not None:
        options.name = _checked_name(name)
    return options


def _checked_name(name: str) -> bytes:
    if not isinstance(name, str):
        msg = f"name must be a string, got {type(name).__name__}"
        raise TypeError(msg)
    name = str.__str__(name)  # a subclass may override any method
    # The kernel's own rule (prctl(2), PR_SET_VMA_ANON_NAME).
    if not 0 < len(name) < 80 or any(not " " <= c <= "~" or c in "[]\\$`" for c in name):
        msg = f"name must be 1 to 79 printable ASCII characters without []\\$`, got {name!r}"
        raise ValueError(msg)
    return name.encode("ascii")


def _unknown_word(mode: object, fork: object, huge_pages: object) -> ValueError:
    for argument, value, words in (("mode", mode, _MODES), ("fork", fork, _FORKS)):
        if value not in list(words):
            return ValueError(f"{argument} must be one of {', '.join(words)}, got {value!r}")
    return ValueError(f"huge_pages must be one of {', '.join(_HUGE)}, got {huge_pages!r}")
