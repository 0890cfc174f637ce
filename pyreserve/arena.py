"""The engine that brings a layout to life: reserve, grow, and map the metadata that follows."""

import errno
from collections.abc import Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from pyreserve import layouts, procfs
from pyreserve._native import ffi, lib
from pyreserve.errors import OutOfMemoryError, RangeError, ReleasedError, VMError
from pyreserve.layouts import Layout, Piece, Placement, Request, round_up
from pyreserve.limits import PAGE_SIZE, address_bits, refusal
from pyreserve.region import Region, reserve
from pyreserve.units import GiB, KiB, MiB, format_size

if TYPE_CHECKING:
    from typing_extensions import Self

WORD: int = ffi.sizeof("void *")
_PROBE = 64 * KiB  # what Go mapped to see whether a place is free (src/runtime/mem_linux.c)
_LOW = 4 * GiB  # where the 32-bit mechanism looks for its window
_LOW_STEP = 16 * MiB
_BRK_ROOM = 64 * MiB  # left to the C library's heap, which grows upward from the program's end


class FellBack(NamedTuple):
    """Why a layout could not be had: in words, and the limit that refused if it is known."""

    because: str
    limit: str | None


class Arena:
    """A layout at work: addresses reserved as it says, memory committed as the arena grows.

    Args:
        layout: a name from `pyreserve.layouts.names`; None takes the article's layout for this
            interpreter's word size.
        size: bytes of arena, for ``"native"`` only.

    A 64-bit Go layout whose reservation is refused falls back to the 32-bit mechanism, as the
    runtime did; `layout` then differs from `requested_layout`, and `fell_back` says why.

    The methods may be called from any thread.

    Raises:
        KeyError: no such layout.
        RangeError: a size that makes no sense.
        OutOfMemoryError: the addresses were refused; ``limit`` says by what.
    """

    def __init__(self, layout: str | None = None, *, size: int | None = None) -> None:
        name = layouts.default_name(WORD) if layout is None else layout
        self.requested_layout = layouts.get(name, size=size, word=WORD)
        self.fell_back: FellBack | None = None
        self._elsewhere: list[Region] = []  # metadata that does not lie beside the arena
        self._in_use = 0
        self._undo: list[tuple[Any, ...]] | None = None  # while growing
        try:
            self.layout, self._region = self.requested_layout, self._open(self.requested_layout)
        except VMError as refused:
            other = layouts.fallback_of(self.requested_layout)
            if other is None:
                raise
            self.fell_back = FellBack(refused.strerror or str(refused), refused.limit)
            self.layout, self._region = other, self._open(other)
        self._lock = self._region._make_lock()

    # -- what it is ---------------------------------------------------------------------------

    placement: Placement
    """Where everything lies at this moment; addresses."""

    @property
    def region(self) -> Region:
        """The region that holds spans, bitmap and arena."""
        return self._region

    @property
    def in_use(self) -> int:
        """Bytes of arena handed out by `grow`."""
        return self._in_use

    @property
    def heap_bitmap(self) -> "HeapBitmap":
        """The heap bitmap.

        Raises:
            ValueError: the layout has none.
        """
        if not self.layout.bitmap_bits:
            msg = f"the layout {self.layout.name} has no heap bitmap"
            raise ValueError(msg)
        return HeapBitmap(self)

    def maps(self) -> list[Piece]:
        """What /proc/self/maps shows inside the addresses that the arena owns, lowest first."""
        with self._lock:
            base, placement = self._region.base, self.placement
            owned = [(base + at, base + at + n) for at, n in self._region._runs("reserved")]
        pieces = []
        for mapping in procfs.read_maps():
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
            ReleasedError: the arena was released.
            RuntimeError: called by a finaliser or signal handler inside another growth.
        """
        nbytes = _index(nbytes)
        if nbytes <= 0:
            msg = f"an arena grows by a positive number of bytes, not {nbytes}"
            raise RangeError(msg)
        nbytes = round_up(nbytes, max(self.layout.page, PAGE_SIZE))
        with self._lock:
            self._alive()
            if self._undo is not None:
                msg = "grow called from inside grow of the same arena"
                raise RuntimeError(msg)
            self._undo = []
            # No view may be made of bytes that an undoing would take away.
            self._region._busy, busy = True, self._region._busy
            try:
                after, block = self._grown(nbytes)
            except BaseException:
                for step, *arguments in reversed(self._undo):
                    step(*arguments)
                raise
            finally:
                self._undo, self._region._busy = None, busy
            self.placement = after
            self._in_use += nbytes
        return block

    def _grown(self, nbytes: int) -> tuple[Placement, int]:
        """Take, commit and map; note in `_undo` how to take each step back."""
        after, block = self.placement, None
        if not after.fits(nbytes):
            after, block = self._extend(nbytes)
        if block is None:
            block, after = after.arena_used, after.advanced(nbytes)
        mapped = self.placement.mapped(PAGE_SIZE)
        for piece in after.mapped(PAGE_SIZE):
            for low, high in layouts.without(piece, mapped):
                self._commit(low, high)
        if self.layout.arena_metadata:
            self._map_elsewhere(after)
        return after, block

    def _extend(self, nbytes: int) -> layouts.Answer:
        """Ask for more addresses; return what follows."""
        handle = self._region._handle
        refused, reason = None, None
        for request in self.placement.growth(nbytes):
            err, address = self._ask(request)
            if err == errno.ERANGE:
                reason = self.placement.out_of_range(address)
            elif err == errno.ENOMEM and refused is None:
                refused = request
            if err:
                continue
            claimed = self._offsets(address, address + round_up(request.size, PAGE_SIZE))
            answer = self.placement.granted(request, address, nbytes)
            if answer is not None:
                self._note(lib.region_disclaim, handle, *claimed)
                return answer
            lib.region_disclaim(handle, *claimed)
            reason = self.placement.out_of_range(address)
        if refused is not None:
            raise refusal("map", errno.ENOMEM, refused.size)
        if reason is None:
            low, high = self.placement.arena
            reason = f"the arena of {format_size(high - low)} is used up"
        msg = f"{reason}: cannot allocate {nbytes}-byte block ({self._in_use} in use)"
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
        floor = self.placement.arena_start - self._region.base
        err = lib.region_claim_near(handle, floor, request.hint, size, access, address)
        return err, int(address[0])

    def _commit(self, low: int, high: int) -> None:
        """Make a range that the placement has just come to map readable and writable."""
        handle, err, verb = self._region._handle, 0, "commit"
        if self.layout.strategy == "reserve":
            base = self._region.base
            committed = [(base + at, base + at + n) for at, n in self._region.committed_runs()]
            for piece in layouts.without((low, high), committed):
                self._note(lib.region_decommit, handle, *self._offsets(*piece))
            err = lib.region_commit(handle, *self._offsets(low, high))
        elif self.layout.strategy == "probe":
            verb = "map"
            self._note(lib.region_disclaim, handle, *self._offsets(low, high))
            err = lib.region_claim(handle, *self._offsets(low, high), lib.VM_COMMITTED)
            if err:
                assert self._undo is not None
                self._undo.pop()
        # The third strategy claims an arena readable and writable.
        if err:
            conflict = "address space conflict: somebody mapped it since it was probed"
            why = conflict if err == errno.EEXIST else None
            raise refusal(verb, err, high - low, low, why)

    def _map_elsewhere(self, after: Placement) -> None:
        """Map the metadata of each arena that has none yet."""
        arenas = sum(high - low for low, high in after.arenas) // self.layout.unit
        while len(self._elsewhere) < arenas + 1:
            self._elsewhere.append(_committed(self.layout.arena_metadata))
            self._note(self._elsewhere.pop)

    def _offsets(self, low: int, high: int) -> tuple[int, int]:
        return low - self._region.base, high - low

    # -- opening ------------------------------------------------------------------------------

    def _open(self, layout: Layout) -> Region:
        """Take the first addresses of a layout."""
        if layout.window:
            region, self.placement = _open_window(layout)
        elif layout.strategy == "reserve":
            region, self.placement = _open_whole(layout)
        elif layout.strategy == "probe":
            region, self.placement = _open_probed(layout)
        else:
            self._elsewhere = [_committed(layout.index)]
            start = layout.hints[0]
            self.placement = layout.place(start)
            region = _window(start, (1 << address_bits()) - start)
        return region

    # -- the end ------------------------------------------------------------------------------

    def release(self) -> None:
        """Give all addresses back.

        Raises:
            ViewError: live views hold some of the bytes.
            ReleasedError: it was released before.
        """
        try:
            self._region.release()
        finally:
            if self._region.released:
                self._elsewhere.clear()

    def __reduce__(self) -> NoReturn:
        msg = "an Arena is addresses of this process: it can't be pickled or copied"
        raise TypeError(msg)

    def _alive(self) -> None:
        if self._region.released:
            msg = "the arena was released"
            raise ReleasedError(msg)

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        if not self._region.released:
            self.release()

    def __repr__(self) -> str:
        if self._region.released:
            return f"<Arena {self.layout.name}, released>"
        low, high = self.placement.arena
        return (
            f"<Arena {self.layout.name} {low:#x}-{high:#x}: {format_size(self._in_use)} in use "
            f"of {format_size(high - low)}>"
        )


class HeapBitmap:
    """The collector's notes on each word of the arena, as the layout's runtime kept them.

    Four bits a word up to Go 1.4: entry o stands in byte ``arena_start - o // 2 - 1`` at bit
    ``o % 2 * 4``: bit 0 object start, bit 1 marked, bits 2-3 type (0 dead, 1 scalar, 2 pointer,
    3 multi-word); Go 1.4 ``src/runtime/mgc0.h``. Two bits from Go 1.5 on: bit 0 pointer, bit 1 mark
    or "more follows"; four entries a byte, pointer bits in its lower half (Go 1.5
    ``src/runtime/mbitmap.go``). From Go 1.11 on each arena has a bitmap of its own, which runs
    forward.

    ``bitmap[o]`` is the entry of word o from ``arena_start``, an int; `at` and `set_at` take an
    address. Only words that the arena has handed out have entries.

    Raises (all methods):
        RangeError: no such word, or not an entry.
        ReleasedError: the arena was released.
    """

    __slots__ = ("_arena", "_bits", "_layout")

    def __init__(self, arena: Arena) -> None:
        """For `Arena.heap_bitmap`."""
        self._arena = arena
        self._layout = arena.layout
        self._bits = arena.layout.bitmap_bits

    def __len__(self) -> int:
        """How many words have entries."""
        self._arena._alive()
        return self._arena.placement.used // self._layout.word

    def index(self, address: int) -> int:
        """Return the word index of an address inside the arena."""
        word = (_index(address) - self._arena.placement.arena_start) // self._layout.word
        self._check(word)
        return word

    def at(self, address: int) -> int:
        """Return the entry of the word that holds `address`."""
        return self[self.index(address)]

    def set_at(self, address: int, value: int) -> None:
        """Set the entry of the word that holds `address`."""
        self[self.index(address)] = value

    def __getitem__(self, word: int) -> int:
        with self._arena._lock:
            region, offset, shifts = self._entry(_index(word))
            byte = self._known(lib.region_load(region._handle, offset))
        return sum((byte >> shift & 1) << bit for bit, shift in enumerate(shifts))

    def __setitem__(self, word: int, value: int) -> None:
        value = _index(value)
        if not 0 <= value < 1 << self._bits:
            msg = f"an entry has {self._bits} bits: {value} is none"
            raise RangeError(msg)
        with self._arena._lock:
            region, offset, shifts = self._entry(_index(word))
            byte = self._known(lib.region_load(region._handle, offset))
            for bit, shift in enumerate(shifts):
                byte = byte & ~(1 << shift) | (value >> bit & 1) << shift
            self._known(lib.region_store(region._handle, offset, byte))

    def __iter__(self) -> Iterator[int]:
        return (self[word] for word in range(len(self)))

    def _check(self, word: int) -> None:
        if not 0 <= word < len(self):
            msg = f"no word {word}: the arena has handed out {len(self)}"
            raise RangeError(msg)

    def _known(self, answer: int) -> int:
        """Pass on what region_load or region_store answered, unless it could not."""
        if answer < 0:
            self._arena._alive()
            msg = "this part of the bitmap was decommitted"
            raise RangeError(msg)
        return answer

    def _entry(self, word: int) -> tuple[Region, int, tuple[int, ...]]:
        """Where an entry is: region and offset of its byte, and where its bits stand there."""
        self._check(word)
        a_byte = 8 // self._bits
        at, place = divmod(word, a_byte)
        shifts = tuple(range(4 * place, 4 * place + 4)) if self._bits == 4 else (place, place + 4)
        if self._layout.arena_metadata:
            region, inside = self._own_bitmap(word)
            return region, inside // a_byte, shifts
        region = self._arena.region
        return region, self._arena.placement.arena_start - region.base - 1 - at, shifts

    def _own_bitmap(self, word: int) -> tuple[Region, int]:
        """The bitmap of the arena with this word, and the word's index in that arena."""
        placement, unit = self._arena.placement, self._layout.unit
        address = placement.arena_start + word * self._layout.word
        before = 0
        for low, high in placement.arenas:
            if low <= address < high:
                arena, inside = divmod(address - low, unit)
                metadata = self._arena._elsewhere[1 + before // unit + arena]
                return metadata, inside // self._layout.word
            before += high - low
        msg = f"word {word} lies in no arena"
        raise RangeError(msg)


# -- how the first addresses are taken --------------------------------------------------------


def _committed(nbytes: int) -> Region:
    region = reserve(nbytes)
    region.commit(0, region.size)
    return region


def _window(start: int, size: int) -> Region:
    """Open a region over addresses that are claimed piece by piece."""
    size &= -PAGE_SIZE
    region = Region(size, "charge", "copy", None)
    try:
        err = lib.region_window(region._handle, start, size, 0, lib.VM_NO_DUMP)
    except OverflowError:
        err = errno.ENOMEM
    if err:
        raise refusal("reserve", err, size, start)
    return region


def _open_whole(layout: Layout) -> tuple[Region, Placement]:
    """Reserve all of a layout at once, near the first hint that the kernel accepts."""
    refused = None
    for hint in layout.hints or (None,):
        fits = hint is None or hint >> (8 * WORD) == 0
        try:
            region = reserve(
                layout.total(),
                hint=hint if fits else None,
                align=None if layout.slack else max(layout.page, PAGE_SIZE),
            )
        except OutOfMemoryError as error:
            refused = error
        else:
            return region, layout.place(region.base)
    assert refused is not None
    raise refused


def _open_probed(layout: Layout) -> tuple[Region, Placement]:
    """Take the first hint at which a few pages are free, without keeping them."""
    err = errno.ENOMEM
    for hint in layout.hints:
        if hint >> (8 * WORD):
            break
        err = lib.vm_map_at(hint, _PROBE, lib.VM_RESERVED)
        if err == 0:
            lib.vm_release(hint, _PROBE)
            return _window(hint, layout.total()), layout.place(hint)
    raise refusal("reserve", err, layout.total())


def _open_window(layout: Layout) -> tuple[Region, Placement]:
    """Reserve the first piece of the 32-bit mechanism, its window free above it if possible.

    Smaller arenas are tried in turn.
    """
    refused = None
    for arena in layout.arena_sizes:
        try:
            return _reserve_in_window(layout, arena)
        except VMError as error:
            refused = error
    assert refused is not None
    msg = f"cannot reserve arena virtual address space: {refused.strerror}"
    raise OutOfMemoryError(
        refused.errno or errno.ENOMEM,
        msg,
        verb="reserve",
        nbytes=refused.nbytes,
        limit=refused.limit,
    ) from refused


def _reserve_in_window(layout: Layout, arena: int) -> tuple[Region, Placement]:
    total = round_up(layout.total(arena), PAGE_SIZE)
    metadata = layout.spans + layout.bitmap + layout.page
    top = 1 << address_bits()
    for base in _window_bases(layout, metadata + layout.window):
        region = _window(base, min(metadata + layout.window, top - base))
        err = lib.region_claim(region._handle, 0, total, lib.VM_RESERVED)
        if err == 0:
            return region, layout.place(base, arena)
        if err != errno.EEXIST:
            raise refusal("reserve", err, total, base)
    raise refusal("reserve", errno.EEXIST, total)


def _window_bases(layout: Layout, span: int) -> Iterator[int]:
    """Yield where `span` bytes are free, best first, then wherever the kernel likes."""
    lowest = max(procfs.vm_setting("mmap_min_addr"), _LOW_STEP // 16)
    gaps = list(procfs.free_gaps(_with_brk_room(procfs.read_maps()), lowest, _low_top()))
    for base in (*layout.hints, *range(_LOW_STEP, _LOW, _LOW_STEP)):
        if any(low <= base and base + span <= high for low, high in gaps):
            yield base
    for _ in range(3):  # another thread may take the place between the question and the claim
        with reserve(layout.total()) as anywhere:
            base = anywhere.base
        yield base


def _low_top() -> int:
    return min(_LOW, 1 << address_bits())


def _with_brk_room(mappings: list[procfs.Mapping]) -> list[procfs.Mapping]:
    return [
        mapping._replace(end=mapping.end + _BRK_ROOM) if mapping.name == "[heap]" else mapping
        for mapping in mappings
    ]
