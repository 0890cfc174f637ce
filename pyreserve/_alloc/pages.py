"""Runs of pages by address-ordered first fit, in a time that hardly depends on their number.

What a page is, and where, is the caller's business: pages are numbers from 0 on.
"""

import errno
import weakref
from array import array
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, overload

from pyreserve._alloc.integers import integers, item_width, own, same_count
from pyreserve._native import ffi, lib
from pyreserve._region.region import Region, reserve
from pyreserve._system import forks
from pyreserve.errors import FreeError, OutOfMemoryError, RangeError, VMError

if TYPE_CHECKING:
    from pyreserve._alloc.integers import Integers

    Out = TypeVar("Out")  # before Python 3.12, the types of ndarrays are no Buffers

_RUNS_AT_ONCE = 256
_MOST: int = lib.pagealloc_max_pages()

_alloc = lib.pagealloc_alloc
_alloc_at = lib.pagealloc_alloc_at
_free = lib.pagealloc_free
_OUTSIDE: int = lib.PAGEALLOC_OUTSIDE


class PageAllocator:
    """`npages` pages, all free at first, handed out in runs of neighbours: the lowest that fits.

    A pair of `alloc` and `free` costs much the same with 2**10 pages as with 2**33, for one page as
    for thousands; the tables, about 0.2 bytes a page if all of them are used, take memory only
    where pages were handed out one by one. They live as long as the allocator: there is nothing to
    release.

    Any number of threads may use an allocator; each call is atomic against the others. A forked
    child has a copy of its own.

    Raises (all methods):
        TypeError: something that is not an integer.
        RangeError: pages that are not all there, a number of pages that is not positive, or
            integers of 2**63 and more.
    """

    __slots__ = ("__weakref__", "_capacity", "_pages")

    def __init__(self, npages: int, *, capacity: int | None = None) -> None:
        """Make an allocator of `npages` pages (0 or more) that can `grow` to `capacity`.

        The default leaves room for at least as many again.

        Raises:
            OutOfMemoryError: no addresses for the tables.
        """
        npages = _index(npages)
        most = _MOST if capacity is None else _index(capacity)
        if not (0 <= npages <= most and 0 < most <= _MOST):
            msg = f"can't have {npages} pages and room for {most}; at most {_MOST}"
            raise RangeError(msg)
        if capacity is None:
            most = int(lib.pagealloc_tree_capacity(min(max(2 * npages, 1), _MOST)))
        tables = reserve_tables(lib.pagealloc_bytes(most))
        # Whatever calls into C keeps this cdata alive meanwhile. It is not tracked by the garbage
        # collector, so it dies after the last finaliser that could still use it.
        self._pages = lib.pagealloc_open(tables._handle.base, most)
        close_with(self._pages, tables)
        self._capacity = most
        forks.register_tables(self._pages, self._pages)
        if npages:
            self.grow(npages)

    # -- what it has --------------------------------------------------------------------------

    @property
    def npages(self) -> int:
        """How many pages there are, free or in use."""
        return int(lib.pagealloc_part_pages(self._pages))

    @property
    def capacity(self) -> int:
        """How many pages there can be."""
        return self._capacity

    @property
    def free_pages(self) -> int:
        """How many pages are free."""
        return int(lib.pagealloc_free_pages(self._pages))

    @property
    def longest_free(self) -> int:
        """How many pages the longest free run has."""
        return int(lib.pagealloc_longest(self._pages))

    def is_used(self, page: int) -> bool:
        """Tell whether a page is in use; False for what is no page here."""
        page = _index(page)
        if not 0 <= page < self._capacity:
            return False
        run = ffi.new("struct pagealloc_run *")
        return bool(lib.pagealloc_runs(self._pages, False, page, page + 1, run, 1))

    def free_runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over the runs of free pages as (start, stop), lowest first.

        Sees changes made meanwhile, except in the few hundred runs that it is ahead.
        """
        return self._iterate_runs(free=True)

    def used_runs(self) -> Iterator[tuple[int, int]]:
        """Iterate over the runs of pages in use, whether or not allocated together; likewise."""
        return self._iterate_runs(free=False)

    # -- one run ------------------------------------------------------------------------------

    def alloc(self, n: int = 1, *, align: int = 1) -> int:
        """Take the lowest run of `n` free pages; return its first.

        That is a multiple of `align`, a power of two. (If more than 64 runs are long enough but
        badly placed, it may not be the lowest of all.)

        Raises:
            OutOfMemoryError: no run is long enough; ``limit`` is ``"layout"``, ``nbytes`` 0.
        """
        n, align = _index(n), _index(align)
        try:
            page = _alloc(self._pages, n, align, 0)
        except OverflowError:
            page = _OUTSIDE
        if page < 0:
            self._refuse("alloc", page, 0, n, align)
        return page  # type: ignore[no-any-return]

    def alloc_at(self, page: int, n: int = 1) -> None:
        """Take exactly the `n` pages from `page` on.

        Raises:
            VMError: some of them are in use (errno EEXIST, as for ``reserve(at=...)``).
        """
        page, n = _index(page), _index(n)
        try:
            err = _alloc_at(self._pages, page, n)
        except OverflowError:
            err = _OUTSIDE
        if err:
            self._refuse("alloc_at", err, page, n)

    def free(self, page: int, n: int = 1) -> None:
        """Free the `n` pages from `page` on, whether or not they were allocated together.

        Raises:
            FreeError: some of them are free already.
        """
        page, n = _index(page), _index(n)
        try:
            err = _free(self._pages, page, n)
        except OverflowError:
            err = _OUTSIDE
        if err:
            self._refuse("free", err, page, n)

    def grow(self, n: int) -> int:
        """Add `n` free pages at the end, within `capacity`; return the first of them.

        Raises:
            OutOfMemoryError: no memory (some bytes) to note it.
        """
        n = _index(n)
        while True:
            page = self.npages
            if not 0 < n <= self._capacity - page:
                msg = f"can't grow by {n} pages: {page} of at most {self._capacity} are there"
                raise RangeError(msg)
            err = lib.pagealloc_add(self._pages, page, n)
            if not err:
                return page
            if err != lib.PAGEALLOC_IN_USE:  # else another thread was quicker
                self._refuse("grow", err, page, n)

    # -- many runs ----------------------------------------------------------------------------

    @overload
    def alloc_many(self, lengths: "Integers | int", out: "Out") -> "Out": ...
    @overload
    def alloc_many(self, lengths: "Integers", out: None = None) -> "array[int]": ...
    def alloc_many(self, lengths: "Integers | int", out: Any = None) -> Any:
        """Take a run for each of `lengths`, all or none; return the first page of each.

        Args:
            lengths: integers in a buffer or an iterable, or one integer for every item of `out`.
            out: a writable buffer (array, ndarray, memoryview) of as many integers, contiguous, of
                8 to 64 bits; None makes an ``array("q")``. Written only if all goes well.

        Raises:
            OutOfMemoryError: no run is long enough for one of them; the text says which.
            RangeError: also if `out` has not as many items, or too narrow ones.
            TypeError, ValueError: not such a buffer.
        """
        wanted = integers(lengths, "lengths", or_one=True)
        if out is None:
            if not wanted.struct.width:
                msg = "one length for all needs an out that says how many"
                raise TypeError(msg)
            out = array("q", bytes(8 * len(wanted.values)))
        # Exported until the end, so that nobody can resize it.
        view = memoryview(out)
        width = item_width(view, "out")
        if view.readonly:
            msg = "out is read-only"
            raise TypeError(msg)
        first, failed = own(bytearray(view.nbytes), width), ffi.new("size_t *")
        count = same_count(first, wanted, "out")
        err = lib.pagealloc_alloc_many(self._pages, wanted.struct, first.struct, count, failed)
        if err:
            at = failed[0]
            self._refuse("alloc_many", err, 0, wanted.item(at), where=f" (lengths[{at}])")
        ffi.memmove(ffi.from_buffer(view), first.pin, view.nbytes)
        return out

    def free_many(self, pages: "Integers", lengths: "Integers | int" = 1) -> None:
        """Free a run at each of `pages`, all or none.

        Args:
            pages: integers in a buffer or an iterable.
            lengths: likewise, as many, or one integer for all.

        Raises:
            FreeError: pages of a run are free already, or in two runs; the text says in which.
            TypeError, ValueError: no contiguous buffer of integers.
        """
        first, freed = integers(pages, "pages"), integers(lengths, "lengths", or_one=True)
        if not first.struct.width:
            msg = "pages are integers in a buffer or an iterable"
            raise TypeError(msg)
        count, failed = same_count(first, freed, "pages"), ffi.new("size_t *")
        err = lib.pagealloc_free_many(self._pages, freed.struct, first.struct, count, failed)
        if err:
            at = failed[0]
            where = f" (pages[{at}])"
            self._refuse("free_many", err, first.item(at), freed.item(at), where=where)

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
        found = ffi.new("struct pagealloc_run[]", _RUNS_AT_ONCE)
        at, n = 0, _RUNS_AT_ONCE
        while n == _RUNS_AT_ONCE:
            n = lib.pagealloc_runs(self._pages, free, at, self._capacity, found, n)
            edges = ffi.unpack(ffi.cast("uint64_t *", found), 2 * n) if n else []
            yield from zip(edges[::2], edges[1::2], strict=True)
            at = edges[-1] if edges else at

    def _refuse(
        self, verb: str, err: int, page: int, n: int, align: int = 1, where: str = ""
    ) -> NoReturn:
        """Raise what `err`, an enum pagealloc_refusal, means."""
        what = f"can't {verb} {n} page{'s' if n != 1 else ''}{where}"
        at = what if verb.startswith("alloc") and verb != "alloc_at" else f"{what} at {page}"
        if align <= 0 or align & (align - 1) or align >> 64:
            msg = f"{what}: an alignment is a power of two below 2**64, not {align}"
            raise RangeError(msg)
        if n <= 0:
            msg = f"{what}: a run has a positive length"
            raise RangeError(msg)
        if err == lib.PAGEALLOC_FULL:
            placed = f" where one can begin at a multiple of {align}" if align > 1 else ""
            raise OutOfMemoryError(
                errno.ENOMEM,
                f"{what}{placed}: {self.free_pages} are free, {self.longest_free} of them together",
                verb=verb,
                limit="layout",
            )
        if err == lib.PAGEALLOC_IN_USE:
            raise VMError(errno.EEXIST, f"{at}: some are in use", verb=verb)
        if err == lib.PAGEALLOC_NO_MEMORY:
            raise OutOfMemoryError(errno.ENOMEM, f"{at}: no memory to note it", verb=verb)
        if err == lib.PAGEALLOC_NOT_IN_USE:
            msg = f"{at}: some are free, freed already or never allocated"
            raise FreeError(msg)
        if err == lib.PAGEALLOC_NARROW:
            msg = f"{what}: the number of a page does not fit the items of out"
            raise RangeError(msg)
        msg = f"{at}: there are {self.npages}"
        raise RangeError(msg)


def reserve_tables(nbytes: int) -> Region:
    """Reserve and commit memory for tables: never charged, and taken where it is touched."""
    try:
        region = reserve(nbytes, mode="noreserve", huge_pages="never")
    except VMError as refused:
        if refused.errno != errno.EINVAL:
            raise
        # A kernel without huge pages does not know the advice, nor needs it.
        region = reserve(nbytes, mode="noreserve")
    region.commit(0, region.size)
    return region


def close_with(cdata: Any, tables: Region, heap_of: Region | None = None, *kept: object) -> None:
    """Close the allocator in `tables` when `cdata` dies; keep the others until then.

    A region `heap_of` has its pages in the hands of C as long.
    """
    if heap_of is not None:
        heap_of._in_heap += 1
    weakref.finalize(cdata, _close, tables, heap_of, *kept).atexit = False


def _close(tables: Region, heap_of: Region | None, *_: object) -> None:
    lib.pagealloc_close(ffi.cast("struct pagealloc *", tables._handle.base))
    if heap_of is not None:
        heap_of._in_heap -= 1
