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

On shared memory commit is ``fallocate`` and ``mprotect``; discard is ``fallocate(PUNCH_HOLE)``, the
same as ``MADV_REMOVE``; decommit is ``mprotect(PROT_NONE)``, then as discard.

Sizes, offsets and lengths are in bytes. Verbs take whole OS pages (`pyreserve.PAGE_SIZE`). A length
of None reaches to the end of the region.
"""

from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn

from pyreserve._native import lib
from pyreserve._region import handles
from pyreserve._region.allocation import LARGE, check_memory
from pyreserve._region.arrays import ArrayPlan
from pyreserve._region.exports import ENDED, Exports
from pyreserve._region.handles import address_of, outside, refused, released
from pyreserve._region.policies import HugePages, Mode, RegionFork
from pyreserve._system.forks import registry_lock as _registry_lock
from pyreserve.errors import StateError
from pyreserve.units import format_size

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from pyreserve._region.arrays import Shape

# The tracemalloc domain of committed bytes, for tracemalloc.DomainFilter.
TRACEMALLOC_DOMAIN: int = lib.TRACING_DOMAIN
# Bound once: an attribute lookup on the library costs a third of an empty call.
_commit = lib.region_commit
_is_committed = lib.region_is_committed
_end = lib.region_end
_release = lib.region_release


class Region:
    """A reservation of `size` bytes from address `base`, returned by `reserve`.

    A view is a memoryview or ndarray over committed bytes. While it, or an object made from it, is
    alive, its bytes cannot be decommitted or released. If the region is closed, by `close` or the
    end of a ``with`` block, or garbage, its addresses stay reserved until the last view is gone.
    `discard` keeps bytes readable, so it is allowed under views, which then read zero.

    The bytes of a region made with ``shared=True`` are those of a file in memory:

    - `commit` allocates memory for the whole range at once, so that no later access runs out of
      memory, which would end the process (SIGBUS).
    - `discard` gives memory back at once, also with `lazy`. An access, even a read, allocates again
      what it touches; `populate` does so in advance. The kernel may refuse to allocate under
      ``vm.overcommit_memory=2``, so there `discard` allocates at once and gives nothing back.
      (The setting is read by `reserve`. Linux before 5.2 may refuse also with 0.)
    - `decommit` gives memory back, `release` all of it once no other process has the file.
    - Each process has its own record of what is committed, but there is one content: `discard`,
      `decommit` and a refused `commit` drop it for all. So let only one process call them.

    All methods are thread-safe. After a fork the child has its own copy, see `fork`. A finaliser or
    signal handler that interrupts a call on a region may call all methods of that region except
    `view` and `ndarray`, which raise StateError there.

    After `release` or `close`, methods raise `ReleasedError`, a ValueError. `committed` and
    `reserved` of a closed region stay exact while views keep its addresses.
    """

    __slots__ = (
        "__weakref__",
        "_exports",
        "_fork",
        "_handle",
        "_huge_pages",
        "_mode",
        "_name",
        "_size",
        "_unused",
    )

    def __init__(
        self,
        handle: Any,
        size: int,
        mode: Mode,
        fork: RegionFork,
        huge_pages: HugePages,
        name: str | None,
    ) -> None:
        """Called by `reserve` alone, which then opens the handle."""
        self._handle = handle
        # `del self._unused` succeeds exactly once, so it elects either the creator of the Exports
        # or a release that needs none.
        self._unused = None
        self._exports: Exports | None = None
        self._size = size
        self._mode: Mode = mode
        self._fork: RegionFork = fork
        self._huge_pages: HugePages = huge_pages
        self._name = name

    def __del__(self) -> None:
        try:
            exports = self._exports
        except AttributeError:  # Region() without arguments raised TypeError
            return
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
    def fork(self) -> RegionFork:
        """Contents in a forked child: ``"copy"``, ``"wipe"`` or ``"share"``; see `reserve`."""
        return self._fork

    @property
    def huge_pages(self) -> HugePages:
        """Policy of huge pages: ``"default"``, ``"prefer"`` or ``"never"``; see `reserve`."""
        return self._huge_pages

    @property
    def shared(self) -> bool:
        """Whether the bytes are those of a file in memory; see `reserve`."""
        return self._fork == "share"

    @property
    def fd(self) -> int:
        """The file descriptor of a shared region, which owns it: duplicate it, never close it.

        Offsets in the file are offsets in the region; the file's size is fixed. A forked child
        inherits the descriptor; exec closes it.

        Raises:
            StateError: the region is private.
            ReleasedError: the region is released or closed.
        """
        with (self._exports or self._open_exports()).lock:
            self._check_open()
            if not self.shared:
                msg = "a private region has no file descriptor: reserve with shared=True"
                raise StateError(msg)
            return int(self._handle.file)

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
            self._check_open()
            return address_of(self._handle.base)

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
            self._check_open()
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
            self._check_open()
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

    def commit(self, offset: int = 0, length: int | None = None) -> None:
        """Make [offset, offset + length) readable and writable.

        Newly committed bytes read zero; bytes that were already committed keep their contents. In
        mode ``"charge"`` the whole range is charged against the commit limit at once.

        Raises:
            RangeError: the range is not whole OS pages inside the region.
            OutOfMemoryError: refused; ``limit`` names the limit. For a shared region also if the
                memory is not available, rather than let the kernel kill a process.
            ReleasedError: the region is released or closed.
        """
        offset = _index(offset)
        length = self._size - offset if length is None else _index(length)
        with (self._exports or self._open_exports()).lock:
            if length >= LARGE and self._handle.shared:
                check_memory(self._handle, self._size, "commit", offset, length)
            try:
                err = _commit(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("commit", err, offset, length)

    def populate(self, offset: int = 0, length: int | None = None) -> None:
        """Back committed bytes with pages now instead of at first touch; keep their contents.

        Raises:
            RangeError: the range is not whole OS pages inside the region, or not all committed.
            VMError: the kernel refused.
            ReleasedError: the region is released or closed.
        """
        offset = _index(offset)
        length = self._size - offset if length is None else _index(length)
        with (self._exports or self._open_exports()).lock:
            try:
                err = lib.region_populate(self._handle, offset, length)
            except OverflowError:
                err = lib.REGION_OUTSIDE
        if err:
            self._fail("populate", err, offset, length)

    def discard(self, offset: int = 0, length: int | None = None, *, lazy: bool = False) -> None:
        """Drop the contents of committed bytes; they stay committed and read zero afterwards.

        With `lazy` the kernel drops the contents only under memory pressure: until then reads
        return old contents or zero, and the memory counts in RSS. A write keeps a page. Allowed
        under live views.

        Raises:
            RangeError: the range is not whole OS pages inside the region, or not all committed.
            StateError: the region is part of an arena or another object, which alone may do this.
            VMError: the kernel refused (before Linux 5.18: memory locked by mlock).
            OutOfMemoryError: a shared region under ``vm.overcommit_memory=2``: the contents are
                dropped, but not all pages allocated again. `populate` tries once more.
            ReleasedError: the region is released or closed.
        """
        offset = _index(offset)
        length = self._size - offset if length is None else _index(length)
        lazy = bool(lazy)
        exports = self._exports or self._open_exports()
        if exports.owner is not None:
            self._refuse_owned("discard", exports.owner)
        exports.discard(offset, length, lazy=lazy)

    def decommit(self, offset: int = 0, length: int | None = None) -> None:
        """Return [offset, offset + length) to reserved: no access; memory and charge given back.

        Bytes that are not committed are left as they are.

        Raises:
            RangeError: the range is not whole OS pages inside the region.
            StateError: the region is part of an arena or another object, which alone may do this.
            ViewError: live views show some of the bytes.
            VMError: refused (max_map_count: a hole splits a mapping), or the region is sealed. Also
                if the kernel refuses the region's policies for the new mapping; only then are the
                bytes decommitted nevertheless.
            ReleasedError: the region is released or closed.
        """
        offset = _index(offset)
        length = self._size - offset if length is None else _index(length)
        exports = self._exports or self._open_exports()
        if exports.owner is not None:
            self._refuse_owned("decommit", exports.owner)
        exports.decommit(offset, length)

    def release(self) -> None:
        """Give the addresses back.

        Raises:
            ViewError: live views show some of the bytes.
            VMError: refused (max_map_count), or the region is sealed.
            StateError: the region is part of an arena or another object: release that.
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
            StateError: the region is part of an arena or another object: close that.
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

    def view(
        self, offset: int = 0, length: int | None = None, *, readonly: bool = False
    ) -> memoryview:
        """Return a memoryview of committed bytes, format ``"B"``, shape (length,). Any alignment.

        The bytes stay committed while the view, or an object made from it, is alive: slices, casts,
        ndarrays, ctypes objects. Two uses are not protected: the raw address, and calling
        ``release`` of a memoryview whose consumer keeps no reference to the buffer behind it
        (``torch.frombuffer``). ``obj`` of a readonly view is the writable buffer behind it.

        Raises:
            RangeError: the range is outside the region, or not all committed.
            ReleasedError: the region is released or closed.
            StateError: called by a finaliser or signal handler inside another call on the region.
        """
        offset = _index(offset)
        length = self._size - offset if length is None else _index(length)
        size = self._size
        if not 0 <= offset <= size - length < size:
            self._check_open()
            raise outside("view", offset, length, size)
        view = (self._exports or self._open_exports()).view(offset, length)
        return view.toreadonly() if readonly else view

    def ndarray(
        self,
        offset: int,
        shape: "Shape",
        dtype: "npt.DTypeLike" = "uint8",
        *,
        readonly: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """Return a C-ordered ndarray of `shape` and `dtype` over committed bytes, from `offset`.

        `shape` is an int, or a tuple or list of ints. The array protects its bytes as a `view`
        does; an array without items protects nothing.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            ValueError: the items hold references to objects.
            RangeError, ReleasedError, StateError: as for `view`.
        """
        plan = ArrayPlan(shape, dtype)
        if plan.nbytes:
            return plan.over(self.view(offset, plan.nbytes, readonly=readonly))
        offset = _index(offset)
        self._check_open()
        if not 0 <= offset <= self._size:
            raise outside("view", offset, 0, self._size)
        return plan.empty(readonly=readonly)

    # -- Python protocols ---------------------------------------------------------------------

    def __len__(self) -> int:
        """Return the size in bytes, also after the end of the region."""
        return self._size

    def __enter__(self) -> "Self":
        self._check_open()
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
            base = address_of(self._handle.base)
            committed, count = int(runs.total), int(runs.count)
        name = f" {self.name!r}" if self.name else ""
        pieces = f" in {count} piece{'s' if count != 1 else ''}" if count else ""
        kind = ", shared" * self.shared + ", sealed" * bool(self._handle.sealed)
        return (
            f"<Region{name} {base:#x}-{base + self._size:#x} of {format_size(self._size)}: "
            f"{format_size(committed)} committed{pieces}, mode {self.mode}{kind}>"
        )

    def __reduce__(self) -> NoReturn:
        msg = "Region cannot be pickled or copied: it owns addresses of this process"
        raise TypeError(msg)

    # -- private ------------------------------------------------------------------------------

    def _check_open(self) -> None:
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
        self._check_open()
        article = "an" if owner[0] in "aeiou" else "a"
        msg = f"cannot {verb} a region that is part of {article} {owner}: use the owner's methods"
        raise StateError(msg)

    def _fail(self, verb: str, err: int, offset: int, length: int) -> NoReturn:
        raise refused(self._handle, self._size, verb, err, offset, length)
