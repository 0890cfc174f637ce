"""Engine: reserves a layout's addresses, grows its arena and maps the metadata it needs."""

import errno
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from pyreserve import layouts
from pyreserve._region.handles import (
    VM_COMMITTED,
    VM_RESERVED,
    claim_near,
    probe,
    region_claim,
    region_commit,
    region_decommit,
    region_disclaim,
    words,
)
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.region import Region
from pyreserve._region.reserve import reserve, window
from pyreserve._system import proc
from pyreserve._system.limits import PAGE_SIZE, address_bits, refusal
from pyreserve._system.machine import thp_size
from pyreserve.errors import OutOfMemoryError, ReleasedError, StateError, VMError
from pyreserve.layouts import Layout, LayoutName, Piece, Placement, Request
from pyreserve.units import WORD, GiB, KiB, MiB, format_size, round_up

_PROBE_SIZE = 64 * KiB  # mapped to test whether an address is free (Go src/runtime/mem_linux.c)
_WINDOW_LIMIT = 4 * GiB  # the window of the 32-bit mechanism lies below this address
_WINDOW_STEP = 16 * MiB  # between two addresses tried for the window
_BRK_SPACE = 64 * MiB  # left free above [heap], which the C library extends upward by brk(2)


class FellBack(NamedTuple):
    """Why the requested layout was refused.

    Attributes:
        reason: the reason in words.
        limit: the limit that refused it; None if unknown.
    """

    reason: str
    limit: str | None


class Policies(NamedTuple):
    """The policies of an arena's memory, as for `pyreserve.reserve`."""

    mode: Mode = "charge"
    huge_pages: HugePages = "default"
    fork: Fork = "copy"
    name: str | None = None


class Engine:
    """A layout at its addresses: reserves them, commits arena and metadata, and undoes failures.

    It knows nothing about blocks. Other modules only read its attributes.

    Args:
        layout: name of a layout.
        size: bytes of arena or a size, for the layout ``"native"`` only.
        policies: the policies of the memory.

    Attributes:
        requested_layout: the layout named in the constructor.
        layout: the layout in use; the fallback if `requested_layout` was refused.
        fell_back: why the requested layout was refused; None if it was not.
        placement: current address ranges of spans, bitmap and arena.
        region: the region that contains them.
        lock: the lock of `region`, which guards the engine too.
        metadata: regions outside `region`, in layouts with separate arenas: the index of arenas,
            then the metadata of each arena.
        taken: bytes of arena taken so far.
        taken_by_grow: bytes of them taken by `grow`, which no heap allocates from.

    Raises:
        KeyError, RangeError, OutOfMemoryError: as for `pyreserve.Arena`.
    """

    placement: Placement

    def __init__(self, layout: LayoutName, size: int | str | None, policies: Policies) -> None:
        self.requested_layout = self.layout = layouts.get(layout, size=size, word=WORD)
        self.fell_back: FellBack | None = None
        self.metadata: list[Region] = []
        self.taken = self.taken_by_grow = 0
        self._policies = policies
        self._undo_log: list[tuple[Any, ...]] | None = None  # None: no growth under way
        fallback = layouts.fallback_of(self.layout)
        try:
            self.region = self._open(self.layout)
        except VMError as refused:
            if fallback is None:
                raise
            self.fell_back = FellBack(refused.strerror or str(refused), refused.limit)
        if self.fell_back is not None:
            assert fallback is not None
            self.layout, self.region = fallback, self._open(fallback)
        self.lock = self.region.exports.lock

    @property
    def page(self) -> int:
        """Page size of the arena in bytes: the layout's, or the OS page if that is larger."""
        return max(self.layout.page, PAGE_SIZE)

    @property
    def limit(self) -> str:
        """The ``limit`` of an error at the end of the arena: its own size, or Go's layout."""
        return "capacity" if self.layout.name == "native" else "layout"

    @property
    def growing(self) -> bool:
        """Whether a growth is under way."""
        return self._undo_log is not None

    @property
    def unit_bitmap(self) -> int:
        """Bytes of heap bitmap of one arena, in layouts with separate arenas."""
        return self.layout.arena_metadata - self._unit_spans

    @property
    def _unit_spans(self) -> int:
        """Bytes of spans of one arena, in layouts with separate arenas."""
        return self.layout.unit // self.layout.page * self.layout.word

    def metadata_mapped(self) -> tuple[int, int]:
        """Return the mapped bytes of the heap bitmap, and those of spans and index."""
        layout, placement = self.layout, self.placement
        if layout.arena_metadata:
            arenas = len(self.metadata) - 1
            return self.unit_bitmap * arenas, layout.index + self._unit_spans * arenas
        bitmap = placement.mapped_bitmap(PAGE_SIZE) if layout.bitmap else (0, 0)
        spans = placement.mapped_spans(PAGE_SIZE)
        return bitmap[1] - bitmap[0], spans[1] - spans[0]

    def maps(self) -> list[Piece]:
        """Return the mappings in /proc/self/maps within the arena's addresses, lowest first."""
        with self.lock:
            base, placement = self.region.base, self.placement
            reserved = self.region.exports.runs(committed=False)
            owned = [(base + at, base + at + n) for at, n in reserved]
        pieces = []
        for mapping in proc.read_maps():
            for low, high in owned:
                start, end = max(low, mapping.start), min(high, mapping.end)
                if start < end:
                    parts = placement.parts(start, end)
                    pieces.append(Piece(start, end, mapping.perms, parts))
        return pieces

    # -- growth -------------------------------------------------------------------------------

    def grow(self, nbytes: int) -> int:
        """Take `nbytes` bytes, rounded up to whole pages; return their address."""
        with self.lock:
            nbytes = round_up(nbytes, self.page)
            try:
                address = self.take_pages(nbytes)
            except OutOfMemoryError as refused:
                if refused.verb != "grow":  # the kernel refused a commit or a mapping
                    raise
                msg = (
                    f"cannot allocate {nbytes}-byte block ({self.taken} in use), "
                    f"{self.region.reserved} reserved: {refused.strerror}"
                )
                raise OutOfMemoryError(
                    errno.ENOMEM, msg, verb="grow", nbytes=nbytes, limit=refused.limit
                ) from None
            self.taken_by_grow += nbytes
        return address

    def take_pages(
        self,
        nbytes: int,
        use: Callable[[int], None] = lambda _: None,
        used: Callable[[], int] = lambda: 0,
    ) -> int:
        """Grow by whole pages, call `use` with their address, and return it.

        If the layout has no more addresses, the error has the verb ``"grow"`` and only the reason.
        An exception from `use` undoes the growth, unless `used`, the bytes of arena that the heap
        allocates from, has changed: then the heap has taken the pages.
        """
        # No view may be created of bytes that a rollback would decommit.
        with self.lock, self.region.exports.removal():
            self.check_open()
            if self._undo_log is not None:
                msg = "grow called from inside another growth of the same arena"
                raise StateError(msg)
            used_before = used()
            self._undo_log = []
            try:
                grown, address = self._commit_growth(nbytes)
                use(address)
            except BaseException:
                if used() != used_before:
                    # A signal handler raised after the heap had taken the pages: keep the growth.
                    self.placement, self.taken = grown, self.taken + nbytes
                    raise
                for step, *arguments in reversed(self._undo_log):
                    step(*arguments)
                if self.region.released:  # closed by a handler that interrupted the growth
                    self._close_metadata()
                raise
            finally:
                self._undo_log = None
            # No signal handler runs between `use` and here: there is no call or backward jump.
            self.placement = grown
            self.taken += nbytes
            if self.region.released:
                self._close_metadata()
        return address

    def _commit_growth(self, nbytes: int) -> tuple[Placement, int]:
        """Commit the next `nbytes` and their metadata; log in `_undo_log` how to undo each step."""
        grown, address = self.placement, None
        if not grown.fits(nbytes):
            grown, address = self._extend_arena(nbytes)
        if address is None:
            address, grown = grown.arena_used, grown.advanced(nbytes)
        mapped = self.placement.mapped(PAGE_SIZE)
        for addresses in grown.mapped(PAGE_SIZE):
            for low, high in layouts.without(addresses, mapped):
                self._commit_range(low, high)
        if self.layout.arena_metadata:
            self._map_arena_metadata(grown)
        return grown, address

    def _extend_arena(self, nbytes: int) -> layouts.Answer:
        """Request more addresses by the layout's rules; return the extended placement."""
        handle = self.region.exports.handle
        refusals: list[VMError] = []
        reason = None
        for request in self.placement.growth(nbytes):
            err, address = self._request_addresses(request)
            if err == errno.ERANGE:
                reason = self.placement.out_of_range(address)
            elif err in {errno.ENOMEM, errno.EAGAIN} and not refusals:
                refusals.append(refusal("map", err, request.size))
            if err:
                continue
            claimed = self._offset_and_length(address, address + round_up(request.size, PAGE_SIZE))
            answer = self.placement.granted(request, address, nbytes)
            if answer is not None:
                self._log_undo(region_disclaim, handle, *claimed)
                return answer
            region_disclaim(handle, *claimed)
            reason = self.placement.out_of_range(address)
        if refusals:
            raise refusals.pop()
        if reason is None and self.layout.strategy == "arenas":
            reason = f"none of the addresses that {self.layout.name} tries is free"
        if reason is None:
            low, high = self.placement.arena
            left = high - self.placement.arena_used
            reason = (
                f"the arena of {format_size(high - low)} has {left} bytes left, and growth needs "
                f"{nbytes}"
            )
        raise OutOfMemoryError(errno.ENOMEM, reason, verb="grow", nbytes=nbytes, limit=self.limit)

    def _log_undo(self, *step: Any) -> None:
        assert self._undo_log is not None
        self._undo_log.append(step)

    def _request_addresses(self, request: Request) -> tuple[int, int]:
        """Claim the addresses of a request; return an errno and the first address."""
        handle, access = self.region.exports.handle, VM_COMMITTED if request.committed else 0
        size = round_up(request.size, PAGE_SIZE)
        if size >> (8 * WORD - 1):
            return errno.ENOMEM, 0
        if request.exact:
            err = region_claim(handle, request.hint - self.region.base, size, access)
            return err, request.hint
        floor = self.placement.arena_start - self.region.base
        return claim_near(handle, floor, request.hint, size, access)

    def _commit_range(self, low: int, high: int) -> None:
        """Make a range of the new placement readable and writable.

        Under the strategy *arenas* it already is: that claims its ranges readable and writable.
        """
        handle, err, verb = self.region.exports.handle, 0, "commit"
        if self.layout.strategy == "reserve":
            base = self.region.base
            committed = [(base + at, base + at + n) for at, n in self.region.committed_runs()]
            for gap in layouts.without((low, high), committed):
                self._log_undo(region_decommit, handle, *self._offset_and_length(*gap))
            err = region_commit(handle, *self._offset_and_length(low, high))
        elif self.layout.strategy == "probe":
            verb = "map"
            self._log_undo(region_disclaim, handle, *self._offset_and_length(low, high))
            err = region_claim(handle, *self._offset_and_length(low, high), VM_COMMITTED)
            if err:
                assert self._undo_log is not None
                self._undo_log.pop()
        if err:
            self.check_open()
            conflict = "address space conflict: another mapping was created since the probe"
            reason = conflict if err == errno.EEXIST else None
            raise refusal(verb, err, high - low, low, reason)

    def _map_arena_metadata(self, grown: Placement) -> None:
        """Map the metadata of each new arena and store its address in the index."""
        unit = self.layout.unit
        units = [at // unit for low, high in grown.arenas for at in range(low, high, unit)]
        index = words(self.metadata[0].base)
        for number in units[len(self.metadata) - 1 :]:
            metadata = _reserve_metadata(self.layout.arena_metadata, self._policies)
            self.metadata.append(metadata)
            self._log_undo(self.metadata.pop)
            index[number] = metadata.base
            self._log_undo(index.__setitem__, number, 0)

    def _offset_and_length(self, low: int, high: int) -> tuple[int, int]:
        return low - self.region.base, high - low

    # -- opening ------------------------------------------------------------------------------

    def _open(self, layout: Layout) -> Region:
        """Reserve or probe the first addresses of a layout; set the placement."""
        if layout.window:
            region, self.placement = _open_window(layout, self._policies)
        elif layout.strategy == "reserve":
            region, self.placement = _open_reserved(layout, self._policies)
        elif layout.strategy == "probe":
            region, self.placement = _open_probed(layout, self._policies)
        else:
            self.metadata = [_reserve_metadata(layout.index, self._policies)]
            start = layout.hints[0]
            self.placement = layout.place(start)
            region = window(start, (1 << address_bits()) - start, **self._policies._asdict())
        return region

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Release all addresses. Raises as `Region.release`; nothing was released then."""
        try:
            self.region.exports.release()
        finally:
            if self.region.released:
                self._close_metadata()

    def close(self) -> None:
        """Refuse new calls; release the addresses when the last view is gone."""
        with self.lock:
            self.region.exports.close()
            if self._undo_log is None:  # a growth under way still needs the metadata
                self._close_metadata()

    def _close_metadata(self) -> None:
        for metadata in self.metadata:
            metadata.exports.close()

    def check_open(self) -> None:
        """Raise ReleasedError if the arena was released or closed."""
        if self.region.released:
            msg = "the arena was released or closed"
            raise ReleasedError(msg)


# -- opening a layout: its first addresses ----------------------------------------------------


def _reserve_metadata(nbytes: int, policies: Policies) -> Region:
    """Reserve and commit metadata outside the arena's region."""
    # A forked child keeps it in any case: C reads addresses from the index of arenas.
    region = reserve(nbytes, **policies._replace(fork="copy")._asdict())
    region.commit(0, region.size)
    return region


def _open_reserved(layout: Layout, policies: Policies) -> tuple[Region, Placement]:
    """Reserve a whole layout near the first hint that the kernel accepts."""
    refusals: list[VMError] = []
    align = None if layout.slack else max(layout.page, PAGE_SIZE)
    if align is not None and policies.huge_pages == "prefer":
        align = max(align, thp_size() or 0)
    for hint in layout.hints or (None,):
        fits = hint is None or hint >> (8 * WORD) == 0
        try:
            region = reserve(
                layout.total(),
                hint=hint if fits else None,
                align=align,
                **policies._asdict(),
            )
        except OutOfMemoryError as refused:
            refusals = [refused]  # the last refusal is raised
        else:
            return region, layout.place(region.base)
    raise refusals.pop()


def _open_probed(layout: Layout, policies: Policies) -> tuple[Region, Placement]:
    """Place a layout at the first hint where `_PROBE_SIZE` bytes are free; own none of them."""
    err = errno.ENOMEM
    for hint in layout.hints:
        if hint >> (8 * WORD):
            break
        err = probe(hint, _PROBE_SIZE)
        if err == 0:
            return window(hint, layout.total(), **policies._asdict()), layout.place(hint)
    raise refusal("reserve", err, layout.total())


def _open_window(layout: Layout, policies: Policies) -> tuple[Region, Placement]:
    """Reserve the first range of the 32-bit mechanism, with a free window above it if possible.

    Smaller arenas are tried in turn when the kernel refuses.
    """
    refusals: list[VMError] = []
    for arena in layout.arena_sizes:
        try:
            return _reserve_in_window(layout, arena, policies)
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


def _reserve_in_window(layout: Layout, arena: int, policies: Policies) -> tuple[Region, Placement]:
    total = round_up(layout.total(arena), PAGE_SIZE)
    metadata = layout.spans + layout.bitmap + layout.page
    top = 1 << address_bits()
    for base in _window_bases(layout, metadata + layout.window):
        size = min(metadata + layout.window, top - base)
        region = window(base, size, **policies._asdict())
        err = region_claim(region.exports.handle, 0, total, VM_RESERVED)
        if err == 0:
            return region, layout.place(base, arena)
        if err != errno.EEXIST:
            raise refusal("reserve", err, total, base)
    raise refusal("reserve", errno.EEXIST, total)


def _window_bases(layout: Layout, span: int) -> Iterator[int]:
    """Yield addresses with `span` free bytes, best first, then three that the kernel chooses.

    If /proc/self/maps cannot be read all addresses count as free: a claim replaces no mapping.
    """
    lowest = max(proc.setting_or_default("mmap_min_addr"), _WINDOW_STEP // 16)
    try:
        mappings = _with_brk_space(proc.read_maps())
    except OSError:
        mappings = []
    gaps = list(proc.free_gaps(mappings, lowest, min(_WINDOW_LIMIT, 1 << address_bits())))
    for base in (*layout.hints, *range(_WINDOW_STEP, _WINDOW_LIMIT, _WINDOW_STEP)):
        if any(low <= base and base + span <= high for low, high in gaps):
            yield base
    for _ in range(3):  # another thread may map the range before it is claimed
        with reserve(layout.total()) as anywhere:
            base = anywhere.base
        yield base


def _with_brk_space(mappings: list[proc.MapsLine]) -> list[proc.MapsLine]:
    return [
        mapping._replace(end=mapping.end + _BRK_SPACE) if mapping.name == "[heap]" else mapping
        for mapping in mappings
    ]
