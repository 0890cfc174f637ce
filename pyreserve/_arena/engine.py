"""The engine that brings a layout to life: reserve, grow, and map the metadata that follows."""

import errno
from collections.abc import Callable, Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pyreserve import layouts
from pyreserve._native import ffi, lib
from pyreserve._region.region import Mode, Region, effective_mode, reserve
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE, address_bits, refusal
from pyreserve.errors import OutOfMemoryError, RangeError, ReleasedError, VMError
from pyreserve.layouts import Layout, Piece, Placement, Request
from pyreserve.units import GiB, KiB, MiB, format_size, round_up

if TYPE_CHECKING:
    from typing_extensions import Self

WORD: int = ffi.sizeof("void *")
_PROBE = 64 * KiB  # what Go mapped to see whether a place is free (src/runtime/mem_linux.c)
_LOW = 4 * GiB  # where the 32-bit mechanism looks for its window
_LOW_STEP = 16 * MiB
_BRK_ROOM = 64 * MiB  # left to the C library's heap, which grows upward from the program's end


class FellBack(NamedTuple):
    """Why a layout was refused: in words, and the limit if it is known."""

    because: str
    limit: str | None


class Engine:
    """A layout at work: what `pyreserve.Arena` stands on.

    Raises:
        KeyError, RangeError, OutOfMemoryError: as for `pyreserve.Arena`.
    """

    def __init__(self, layout: str | None, size: int | None, mode: Mode) -> None:
        name = layouts.default_name(WORD) if layout is None else layout
        self._requested_layout = self._layout = layouts.get(name, size=size, word=WORD)
        self._mode: Mode = mode
        self._fell_back: FellBack | None = None
        self._metadata_regions: list[Region] = []  # metadata that does not lie beside the arena
        self._taken = self._by_hand = 0  # bytes of arena: all, and those handed out by `grow`
        self._undo: list[tuple[Any, ...]] | None = None  # while growing
        self._placement: Placement
        other = layouts.fallback_of(self._layout)
        try:
            self._region = self._open(self._layout)
        except VMError as refused:
            if other is None:
                raise
            self._fell_back = FellBack(refused.strerror or str(refused), refused.limit)
        if self._fell_back is not None:
            assert other is not None
            self._layout, self._region = other, self._open(other)
        self._lock = self._region._make_lock()

    # -- what it is ---------------------------------------------------------------------------

    @property
    def requested_layout(self) -> Layout:
        """The layout that was asked for."""
        return self._requested_layout

    @property
    def layout(self) -> Layout:
        """The layout in use; differs from `requested_layout` after a fallback."""
        return self._layout

    @property
    def fell_back(self) -> FellBack | None:
        """Why the requested layout was refused; None if it was not."""
        return self._fell_back

    @property
    def placement(self) -> Placement:
        """Where everything lies at this moment; addresses."""
        return self._placement

    @property
    def region(self) -> Region:
        """The region that holds spans, bitmap and arena."""
        return self._region

    def maps(self) -> list[Piece]:
        """What /proc/self/maps shows inside the addresses that the arena owns, lowest first."""
        with self._lock:
            base, placement = self._region.base, self._placement
            owned = [(base + at, base + at + n) for at, n in self._region._runs("reserved")]
        pieces = []
        for mapping in proc.read_maps():
            for low, high in owned:
                start, end = max(low, mapping.start), min(high, mapping.end)
                if start < end:
                    what = placement.what(start, end)
                    pieces.append(Piece(start, end, mapping.perms, what))
        return pieces

    # -- growth -------------------------------------------------------------------------------

    def grow(self, nbytes: int) -> int:
        """Take `nbytes` more of the arena, commit them and the metadata for them.

        Rounded up to whole pages of the layout. Where the arena is used up, more addresses are
        asked for by the layout's rules.

        Returns:
            The address of the first of the new bytes. They read zero.

        Raises:
            RangeError: not positive.
            OutOfMemoryError: refused; nothing has changed.
            VMError: somebody mapped addresses that were only probed (EEXIST).
            ReleasedError: the arena was released or closed.
            RuntimeError: called by a finaliser or signal handler inside another growth.
        """
        nbytes = _index(nbytes)
        if nbytes <= 0:
            msg = f"an arena grows by a positive number of bytes, not {nbytes}"
            raise RangeError(msg)
        with self._lock:
            nbytes = round_up(nbytes, self._page)
            address = self._take(nbytes, lambda _: None)
            self._by_hand += nbytes
        return address

    @property
    def _page(self) -> int:
        """Bytes of a page of the arena: the layout's, or the kernel's if that is larger."""
        return max(self._layout.page, PAGE_SIZE)

    def _take(self, nbytes: int, then: Callable[[int], None]) -> int:
        """Grow by whole pages; `then` gets the address, and what it raises undoes the growth."""
        with self._lock:
            self._alive()
            if self._undo is not None:
                msg = "grow called from inside grow of the same arena"
                raise RuntimeError(msg)
            before = self._in_heap()
            self._undo = []
            # No view may be made of bytes that an undoing would take away.
            self._region._busy, busy = True, self._region._busy
            try:
                after, block = self._grown(nbytes)
                then(block)
            except BaseException:
                if self._in_heap() != before:
                    # A signal handler raised after the heap had taken the bytes: they stay.
                    self._placement, self._taken = after, self._taken + nbytes
                    raise
                for step, *arguments in reversed(self._undo):
                    step(*arguments)
                if self._region._released:  # what interrupted the growth closed the arena
                    self._close_elsewhere()
                raise
            finally:
                self._undo, self._region._busy = None, busy
            # No handler comes in between: nothing here or above calls or jumps.
            self._placement = after
            self._taken += nbytes
            if self._region._released:
                self._close_elsewhere()
        return block

    def _in_heap(self) -> int:
        """Bytes of arena that blocks are made of."""
        return 0

    def _grown(self, nbytes: int) -> tuple[Placement, int]:
        """Take, commit and map; note in `_undo` how to take each step back."""
        after, block = self._placement, None
        if not after.fits(nbytes):
            after, block = self._extend(nbytes)
        if block is None:
            block, after = after.arena_used, after.advanced(nbytes)
        mapped = self._placement.mapped(PAGE_SIZE)
        for piece in after.mapped(PAGE_SIZE):
            for low, high in layouts.without(piece, mapped):
                self._commit(low, high)
        if self._layout.arena_metadata:
            self._map_elsewhere(after)
        return after, block

    def _extend(self, nbytes: int) -> layouts.Answer:
        """Ask for more addresses; return what follows."""
        handle = self._region._handle
        refusals: list[VMError] = []
        reason = None
        for request in self._placement.growth(nbytes):
            err, address = self._ask(request)
            if err == errno.ERANGE:
                reason = self._placement.out_of_range(address)
            elif err in {errno.ENOMEM, errno.EAGAIN} and not refusals:
                refusals.append(refusal("map", err, request.size))
            if err:
                continue
            claimed = self._offsets(address, address + round_up(request.size, PAGE_SIZE))
            answer = self._placement.granted(request, address, nbytes)
            if answer is not None:
                self._note(lib.region_disclaim, handle, *claimed)
                return answer
            lib.region_disclaim(handle, *claimed)
            reason = self._placement.out_of_range(address)
        if refusals:
            raise refusals.pop()
        if reason is None:
            low, high = self._placement.arena
            reason = f"the arena of {format_size(high - low)} is used up"
        reserved = self._region.reserved
        msg = (
            f"{reason}: cannot allocate {nbytes}-byte block ({self._taken} in use), "
            f"{reserved} reserved"
        )
        raise OutOfMemoryError(errno.ENOMEM, msg, verb="grow", nbytes=nbytes, limit="layout")

    def _note(self, *step: Any) -> None:
        assert self._undo is not None
        self._undo.append(step)

    def _ask(self, request: Request) -> tuple[int, int]:
        """Put a request to the kernel; return an errno and an address."""
        handle, access = self._region._handle, lib.VM_COMMITTED if request.committed else 0
        size = round_up(request.size, PAGE_SIZE)
        if size >> (8 * WORD - 1):
            return errno.ENOMEM, 0
        if request.exact:
            err = lib.region_claim(handle, request.hint - self._region.base, size, access)
            return err, request.hint
        address = ffi.new("uintptr_t *")
        floor = self._placement.arena_start - self._region.base
        err = lib.region_claim_near(handle, floor, request.hint, size, access, address)
        return err, int(address[0])

    def _commit(self, low: int, high: int) -> None:
        """Make a range that the placement has just come to map readable and writable."""
        handle, err, verb = self._region._handle, 0, "commit"
        if self._layout.strategy == "reserve":
            base = self._region.base
            committed = [(base + at, base + at + n) for at, n in self._region.committed_runs()]
            for piece in layouts.without((low, high), committed):
                self._note(lib.region_decommit, handle, *self._offsets(*piece))
            err = lib.region_commit(handle, *self._offsets(low, high))
        elif self._layout.strategy == "probe":
            verb = "map"
            self._note(lib.region_disclaim, handle, *self._offsets(low, high))
            err = lib.region_claim(handle, *self._offsets(low, high), lib.VM_COMMITTED)
            if err:
                assert self._undo is not None
                self._undo.pop()
        # The third strategy claims an arena readable and writable.
        if err:
            self._alive()
            conflict = "address space conflict: somebody mapped it since it was probed"
            why = conflict if err == errno.EEXIST else None
            raise refusal(verb, err, high - low, low, why)

    def _map_elsewhere(self, after: Placement) -> None:
        """Map the metadata of each arena that has none yet, and enter it in the index."""
        unit = self._layout.unit
        units = [at // unit for low, high in after.arenas for at in range(low, high, unit)]
        index = ffi.cast("uintptr_t *", self._metadata_regions[0].base)
        for number in units[len(self._metadata_regions) - 1 :]:
            metadata = _committed(self._layout.arena_metadata, self._mode)
            self._metadata_regions.append(metadata)
            self._note(self._metadata_regions.pop)
            index[number] = metadata.base
            self._note(index.__setitem__, number, 0)

    def _offsets(self, low: int, high: int) -> tuple[int, int]:
        return low - self._region.base, high - low

    # -- opening ------------------------------------------------------------------------------

    def _open(self, layout: Layout) -> Region:
        """Take the first addresses of a layout."""
        if layout.window:
            region, self._placement = _open_window(layout, self._mode)
        elif layout.strategy == "reserve":
            region, self._placement = _open_whole(layout, self._mode)
        elif layout.strategy == "probe":
            region, self._placement = _open_probed(layout, self._mode)
        else:
            self._metadata_regions = [_committed(layout.index, self._mode)]
            start = layout.hints[0]
            self._placement = layout.place(start)
            region = _window(start, (1 << address_bits()) - start, self._mode)
        return region

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Give all addresses back.

        Raises:
            ViewError: live views hold some of the bytes.
            ReleasedError: it was released or closed.
        """
        try:
            self._region._release()
        finally:
            if self._region.released:
                self._close_elsewhere()

    def close(self) -> None:
        """Refuse new use; release the addresses with the last view. See `Region.close`."""
        with self._lock:
            self._region._close()
            if self._undo is None:  # else the growth under way still needs them
                self._close_elsewhere()

    def _close_elsewhere(self) -> None:
        for metadata in self._metadata_regions:
            metadata._close()

    def __reduce__(self) -> NoReturn:
        msg = "an Arena is addresses of this process: it can't be pickled or copied"
        raise TypeError(msg)

    def _alive(self) -> None:
        if self._region.released:
            msg = "the arena was released or closed"
            raise ReleasedError(msg)

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# -- how the first addresses are taken --------------------------------------------------------


def _committed(nbytes: int, mode: Mode) -> Region:
    region = reserve(nbytes, mode=mode)
    region.commit(0, region.size)
    return region


def _window(start: int, size: int, mode: Mode) -> Region:
    """Open a region over addresses that are claimed piece by piece."""
    size &= -PAGE_SIZE
    mode, accounting = effective_mode(mode)
    region = Region(size, mode, "copy", None)
    try:
        err = lib.region_window(region._handle, start, size, accounting, lib.VM_NO_DUMP)
    except OverflowError:
        err = errno.ENOMEM
    if err:
        raise refusal("reserve", err, size, start)
    return region


def _open_whole(layout: Layout, mode: Mode) -> tuple[Region, Placement]:
    """Reserve all of a layout at once, near the first hint that the kernel accepts."""
    refusals: list[VMError] = []
    for hint in layout.hints or (None,):
        fits = hint is None or hint >> (8 * WORD) == 0
        try:
            region = reserve(
                layout.total(),
                mode=mode,
                hint=hint if fits else None,
                align=None if layout.slack else max(layout.page, PAGE_SIZE),
            )
        except OutOfMemoryError as refused:
            refusals = [refused]
        else:
            return region, layout.place(region.base)
    raise refusals.pop()


def _open_probed(layout: Layout, mode: Mode) -> tuple[Region, Placement]:
    """Take the first hint at which a few pages are free, without keeping them."""
    err = errno.ENOMEM
    for hint in layout.hints:
        if hint >> (8 * WORD):
            break
        err = lib.vm_map_at(hint, _PROBE, lib.VM_RESERVED)
        if err == 0:
            err = lib.vm_release(hint, _PROBE)
            if err:
                raise refusal("release", err, _PROBE, hint)
            return _window(hint, layout.total(), mode), layout.place(hint)
    raise refusal("reserve", err, layout.total())


def _open_window(layout: Layout, mode: Mode) -> tuple[Region, Placement]:
    """Reserve the first piece of the 32-bit mechanism, its window free above it if possible.

    Smaller arenas are tried in turn.
    """
    refusals: list[VMError] = []
    for arena in layout.arena_sizes:
        try:
            return _reserve_in_window(layout, arena, mode)
        except VMError as error:
            refusals = [error.with_traceback(None)]
    refused = refusals.pop()
    msg = f"cannot reserve arena virtual address space: {refused.strerror}"
    raise OutOfMemoryError(
        refused.errno or errno.ENOMEM,
        msg,
        verb="reserve",
        nbytes=refused.nbytes,
        limit=refused.limit,
    ) from refused


def _reserve_in_window(layout: Layout, arena: int, mode: Mode) -> tuple[Region, Placement]:
    total = round_up(layout.total(arena), PAGE_SIZE)
    metadata = layout.spans + layout.bitmap + layout.page
    top = 1 << address_bits()
    for base in _window_bases(layout, metadata + layout.window):
        region = _window(base, min(metadata + layout.window, top - base), mode)
        err = lib.region_claim(region._handle, 0, total, lib.VM_RESERVED)
        if err == 0:
            return region, layout.place(base, arena)
        if err != errno.EEXIST:
            raise refusal("reserve", err, total, base)
    raise refusal("reserve", errno.EEXIST, total)


def _window_bases(layout: Layout, span: int) -> Iterator[int]:
    """Yield where `span` bytes are free, best first, then wherever the kernel likes.

    Where /proc can't be read all places count as free: a claim replaces nothing.
    """
    lowest = max(proc.setting_or_default("mmap_min_addr"), _LOW_STEP // 16)
    try:
        mappings = _with_brk_room(proc.read_maps())
    except OSError:
        mappings = []
    gaps = list(proc.free_gaps(mappings, lowest, _low_top()))
    for base in (*layout.hints, *range(_LOW_STEP, _LOW, _LOW_STEP)):
        if any(low <= base and base + span <= high for low, high in gaps):
            yield base
    for _ in range(3):  # another thread may take the place between the question and the claim
        with reserve(layout.total()) as anywhere:
            base = anywhere.base
        yield base


def _low_top() -> int:
    return min(_LOW, 1 << address_bits())


def _with_brk_room(mappings: list[proc.Mapping]) -> list[proc.Mapping]:
    return [
        mapping._replace(end=mapping.end + _BRK_ROOM) if mapping.name == "[heap]" else mapping
        for mapping in mappings
    ]
