"""Runs of pages by address-ordered first fit, in nearly constant time.

Pages are numbers from 0 up; the caller decides their size and address. See ``csrc/pagealloc.h``.
"""

import errno
import weakref
from array import array
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from pyreserve._alloc.integers import IntegersForC, integers, item_width, same_count, wrap_bytes
from pyreserve._native import ffi, lib
from pyreserve._region.region import Region
from pyreserve._region.reserve import reserve
from pyreserve._system import forks
from pyreserve.errors import FreeError, OutOfMemoryError, RangeError, StateError, VMError

if TYPE_CHECKING:
    from pyreserve._alloc.integers import Integers

    Out = TypeVar("Out")  # not Buffer: before Python 3.12, ndarrays are not typed as buffers

_RUNS_PER_CALL = 256
_MAX_PAGES: int = lib.pagealloc_max_pages()

# Bound once: an attribute lookup on the library costs a third of an empty call.
alloc_run = lib.pagealloc_alloc
alloc_run_at = lib.pagealloc_alloc_at
free_run = lib.pagealloc_free
free_run_unless = lib.pagealloc_free_unless
is_run_used = lib.pagealloc_in_use
NOT_IN_USE: int = lib.PAGEALLOC_NOT_IN_USE
OUTSIDE: int = lib.PAGEALLOC_OUTSIDE


class PageAllocator:
    """`npages` pages, initially free, allocated in runs of neighbours: the lowest run that fits.

    The cost of `alloc` and `free` hardly depends on the number of pages (2**10 or 2**33) or on the
    length of the run. The tables take about 0.2 bytes per page if every page is used, and only
    where pages were allocated singly. They live as long as the allocator, which has no `release`.

    Any number of threads may use an allocator; each call is atomic. A forked child has its own
    copy.

    Raises (all methods):
        TypeError: an argument is not an integer.
        RangeError: pages outside the allocator, a number of pages that is not positive, or an
            integer of 2**63 or more.
    """

    __slots__ = ("__weakref__", "_capacity", "_handle")

    def __init__(self, npages: int, *, capacity: int | None = None) -> None:
        """Make an allocator of `npages` (0 or more) pages that can `grow` to `capacity` pages.

        The default capacity is at least twice `npages`.

        Raises:
            OutOfMemoryError: the tables' addresses could not be reserved.
        """
        npages = _index(npages)
        limit = _MAX_PAGES if capacity is None else _index(capacity)
        if not 0 < limit <= _MAX_PAGES:
            msg = f"capacity must be between 1 and {_MAX_PAGES}, got {limit}"
            raise RangeError(msg)
        if not 0 <= npages <= limit:
            msg = f"npages must be between 0 and {limit}, got {npages}"
            raise RangeError(msg)
        if capacity is None:
            limit = int(lib.pagealloc_tree_capacity(min(max(2 * npages, 1), _MAX_PAGES)))
        tables = reserve_tables(lib.pagealloc_bytes(limit))
        # A call into C keeps this cdata alive. The garbage collector does not track it, so it dies
        # after the last finaliser that could still use it.
        self._handle = lib.pagealloc_open(tables.exports.handle.base, limit)
        close_with(self._handle, tables)
        self._capacity = limit
        forks.register_tables(self._handle, self._handle)
        if npages:
            self.grow(npages)

    # -- state --------------------------------------------------------------------------------

    @property
    def npages(self) -> int:
        """Number of pages, free or in use."""
        return int(lib.pagealloc_part_pages(self._handle))

    @property
    def capacity(self) -> int:
        """The number of pages that `grow` can reach."""
        return self._capacity

    @property
    def free_pages(self) -> int:
        """Number of free pages."""
        return int(lib.pagealloc_free_pages(self._handle))

    @property
    def longest_free(self) -> int:
        """Length of the longest free run, in pages."""
        return int(lib.pagealloc_longest(self._handle))

    def is_used(self, page: int) -> bool:
        """Tell whether a page is in use; False for a page outside the allocator."""
        page = _index(page)
        if not 0 <= page < self._capacity:
            return False
        return bool(is_run_used(self._handle, page, 1))

    def free_runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over the runs of free pages as (start, stop), lowest first.

        Runs are read in batches of a few hundred; later batches show changes made since.
        """
        return self._iterate_runs(free=True)

    def used_runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over the runs of pages in use, as `free_runs` does.

        Adjacent runs are one, whether or not they were allocated together.
        """
        return self._iterate_runs(free=False)

    # -- one run ------------------------------------------------------------------------------

    def alloc(self, n: int = 1, *, align: int = 1) -> int:
        """Allocate the lowest run of `n` free pages; return its first page.

        The first page is a multiple of `align`, a power of two. If more than 64 runs are long
        enough but misaligned, the result may not be the lowest aligned run.

        Raises:
            OutOfMemoryError: no run is long enough; ``limit`` is ``"capacity"``, ``nbytes`` 0.
        """
        n, align = _index(n), _index(align)
        try:
            page = alloc_run(self._handle, n, align, 0)
        except OverflowError:
            page = OUTSIDE
        if page < 0:
            self._refuse("alloc", page, 0, n, align)
        return page  # type: ignore[no-any-return]

    def alloc_at(self, page: int, n: int = 1) -> None:
        """Allocate the pages [page, page + n).

        Raises:
            StateError: some of them are in use.
        """
        page, n = _index(page), _index(n)
        try:
            err = alloc_run_at(self._handle, page, n)
        except OverflowError:
            err = OUTSIDE
        if err:
            self._refuse("alloc_at", err, page, n)

    def free(self, page: int, n: int = 1) -> None:
        """Free the pages [page, page + n), whether or not they were allocated together.

        Raises:
            FreeError: some of them are free already.
        """
        page, n = _index(page), _index(n)
        try:
            err = free_run(self._handle, page, n)
        except OverflowError:
            err = OUTSIDE
        if err:
            self._refuse("free", err, page, n)

    def grow(self, n: int) -> int:
        """Add `n` free pages at the end, within `capacity`; return the first of them.

        Raises:
            OutOfMemoryError: the C heap has no memory for a list entry (a few bytes).
        """
        n = _index(n)
        while True:
            page = self.npages
            if not 0 < n <= self._capacity - page:
                spare = self._capacity - page
                msg = f"n must be between 1 and {spare} (capacity {self._capacity}), got {n}"
                raise RangeError(msg)
            err = lib.pagealloc_add(self._handle, page, n)
            if not err:
                return page
            if err != lib.PAGEALLOC_IN_USE:  # else another thread has grown it first
                self._refuse("grow", err, page, n)

    # -- many runs ----------------------------------------------------------------------------

    @overload
    def alloc_many(self, lengths: "Integers | int", out: "Out") -> "Out": ...
    @overload
    def alloc_many(self, lengths: "Integers", out: None = None) -> "array[int]": ...
    def alloc_many(self, lengths: "Integers | int", out: Any = None) -> Any:
        """Allocate a run for each of `lengths`, all or none; return the first page of each.

        Args:
            lengths: in pages: a buffer or an iterable of integers, or one integer for all items of
                `out`.
            out: a writable contiguous buffer (array, ndarray, memoryview) of one integer, of 8 to
                64 bits, per length; None makes an ``array("q")``. Written only on success.

        Raises:
            OutOfMemoryError: no free run is long enough; the message names the item of `lengths`.
            RangeError: also if `out` has another number of items, or items too narrow for a page.
            TypeError, ValueError: `lengths` or `out` is of another kind.
        """
        sizes = integers(lengths, "lengths", allow_scalar=True)
        if out is None:
            if not sizes.struct.width:
                msg = "out is required if lengths is a single integer"
                raise TypeError(msg)
            out = array("q", bytes(8 * len(sizes.values)))
        # This export lasts to the end, so nobody can resize `out`.
        view = memoryview(out)
        width = item_width(view, "out")
        if view.readonly:
            msg = "out must be writable, got a read-only buffer"
            raise TypeError(msg)
        first, failed = wrap_bytes(bytearray(view.nbytes), width), ffi.new("size_t *")
        count = same_count(first, sizes, "out")
        err = lib.pagealloc_alloc_many(self._handle, sizes.struct, first.struct, count, failed)
        if err:
            at = failed[0]
            self._refuse("alloc_many", err, 0, sizes.item(at), at=at)
        ffi.memmove(ffi.from_buffer(view), first.pin, view.nbytes)
        return out

    def free_many(self, pages: "Integers", lengths: "Integers | int" = 1) -> None:
        """Free a run at each of `pages`, all or none.

        Args:
            pages: the first page of each run: a buffer or an iterable of integers.
            lengths: the length of each run, in pages; or one integer for all runs.

        Raises:
            FreeError: pages of a run are free already, or are in two runs; the message names the
                item of `pages`.
            RangeError: also if there is another number of lengths than of pages.
            TypeError, ValueError: `pages` or `lengths` is of another kind.
        """
        first, sizes = integers(pages, "pages"), integers(lengths, "lengths", allow_scalar=True)
        err, at = free_each(self._handle, first, sizes)
        if err:
            self._refuse("free_many", err, first.item(at), sizes.item(at), at=at)

    # -- Python's protocols -------------------------------------------------------------------

    def __len__(self) -> int:
        return self.npages

    def __repr__(self) -> str:
        return (
            f"<PageAllocator of {self.npages:,} pages: {self.free_pages:,} free, "
            f"{self.longest_free:,} of them together>"
        )

    def __reduce__(self) -> NoReturn:
        msg = "a PageAllocator can't be pickled or copied"
        raise TypeError(msg)

    # -- inside -------------------------------------------------------------------------------

    def _iterate_runs(self, *, free: bool) -> Iterator[tuple[int, int]]:
        buffer = ffi.new("struct pagealloc_run[]", _RUNS_PER_CALL)
        position, n = 0, _RUNS_PER_CALL
        while n == _RUNS_PER_CALL:
            n = lib.pagealloc_runs(self._handle, free, position, self._capacity, buffer, n)
            edges = ffi.unpack(ffi.cast("uint64_t *", buffer), 2 * n) if n else []
            yield from zip(edges[::2], edges[1::2], strict=True)
            position = edges[-1] if edges else position

    def _refuse(
        self, verb: str, err: int, page: int, n: int, align: int = 1, at: int | None = None
    ) -> NoReturn:
        """Raise the exception for `err`, an enum pagealloc_refusal; `at` is the run's index."""
        if align <= 0 or align & (align - 1) or align >> 64:
            msg = f"align must be a power of two below 2**64, got {align}"
            raise RangeError(msg)
        if n <= 0:
            msg = f"{'n' if at is None else f'lengths[{at}]'} must be positive, got {n}"
            raise RangeError(msg)
        if verb in ("alloc", "alloc_many"):
            pages = f"{n} page{'s' if n != 1 else ''}"
        else:
            pages = f"page {page}" if n == 1 else f"pages [{page}, {page + n})"
        action = {"free_many": "free", "free": "free", "grow": "add"}.get(verb, "allocate")
        if at is not None:
            pages += f" ({'pages' if verb == 'free_many' else 'lengths'}[{at}])"
        if align > 1:
            pages += f" at a multiple of {align}"
        prefix = f"cannot {action} {pages}"
        if err == lib.PAGEALLOC_FULL:
            raise OutOfMemoryError(
                errno.ENOMEM,
                f"{prefix}: {self.free_pages} are free, the longest run is {self.longest_free}",
                verb=verb,
                limit="capacity",
            )
        if err == lib.PAGEALLOC_IN_USE:
            in_use = "already in use" if n == 1 else "some are in use"
            msg = f"{prefix}: {in_use}"
            raise StateError(msg)
        if err == lib.PAGEALLOC_NO_MEMORY:
            raise OutOfMemoryError(errno.ENOMEM, f"{prefix}: the C heap is exhausted", verb=verb)
        if err == NOT_IN_USE:
            free = "it is free" if n == 1 else "some are free"
            msg = f"{prefix}: {free} (freed already or never allocated)"
            raise FreeError(msg)
        if err == lib.PAGEALLOC_NARROW:
            msg = f"{prefix}: the page number does not fit the items of out"
            raise RangeError(msg)
        msg = f"{prefix}: the allocator has pages [0, {self.npages})"
        raise RangeError(msg)


def free_each(handle: Any, pages: IntegersForC, lengths: IntegersForC) -> tuple[int, int]:
    """Free a run at each of `pages`, all or none; return 0 or a refusal, and the run refused.

    Raises:
        RangeError: there is another number of lengths than of pages.
    """
    count, failed = same_count(pages, lengths, "pages"), ffi.new("size_t *")
    err = lib.pagealloc_free_many(handle, lengths.struct, pages.struct, count, failed)
    return err, int(failed[0])


def reserve_tables(nbytes: int) -> Region:
    """Reserve and commit `nbytes` for tables: never charged, backed with pages where touched."""
    try:
        region = reserve(nbytes, mode="noreserve", huge_pages="never")
    except VMError as error:
        if error.errno != errno.EINVAL:
            raise
        # A kernel without transparent huge pages rejects MADV_NOHUGEPAGE and does not need it.
        region = reserve(nbytes, mode="noreserve")
    region.commit(0, region.size)
    return region


def close_with(cdata: Any, tables: Region, heap_of: Region | None = None, *kept: object) -> None:
    """Close the allocator in `tables` when `cdata` dies; keep the other arguments alive until then.

    Until then the region `heap_of`, if given, counts one more C heap that uses its handle.
    """
    if heap_of is not None:
        heap_of.exports.heaps += 1
    weakref.finalize(cdata, _close, tables, heap_of, *kept).atexit = False


def _close(tables: Region, heap_of: Region | None, *_: object) -> None:
    lib.pagealloc_close(ffi.cast("struct pagealloc *", tables.exports.handle.base))
    if heap_of is not None:
        heap_of.exports.heaps -= 1
