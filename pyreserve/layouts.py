"""Address-space plans: where spans, bitmap and arena lie, and what is mapped when. Arithmetic only.

A Go heap of 2013-2018 is one range of addresses, low to high::

    [ spans | bitmap | arena | slack ]

Memory is handed out from the arena, from ``arena_start`` up to ``arena_used``. The bitmap describes
the arena's words and grows *backward* from its end, which is ``arena_start``; spans has one word
for each 8 KiB page and grows forward. With u = ``arena_used - arena_start``, mapped are u bytes of
arena, u * bits / (8 * word) of bitmap and u / 8192 * word of spans: at 4 bits and 8-byte words, a
heap of H bytes commits H + H/16 + H/1024.

Two strategies on 64 bits: *reserve* maps all of it PROT_NONE at once, which is what ``ps`` shows as
138 GB; *probe* only looks whether the place is free and maps each piece when it is used. A third,
*arenas* (Go 1.11), maps 64 MiB at a time and keeps the metadata elsewhere. The 32-bit mechanism
reserves 512 MiB of arena and then asks for more inside a *window* of 2 GiB that the metadata can
describe.

Sources: Go 1.3 to 1.4 ``src/runtime/malloc.goc``, ``malloc.h``, ``mheap.c``; Go 1.5 to 1.10
``src/runtime/malloc.go``, ``mbitmap.go``, ``mheap.go``; Go 1.11 ``src/runtime/malloc.go``; checked
against /proc/PID/maps of binaries built with these.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from operator import index as _index
from typing import Literal, NamedTuple

from pyreserve.errors import RangeError
from pyreserve.units import GiB, KiB, MiB, format_size, round_up

Strategy = Literal["reserve", "probe", "arenas"]

GO_PAGE = 8 * KiB
_HINTS_64 = tuple(i << 40 | 0x00C0 << 32 for i in range(0x80))
_GROWTH_STEP_32 = 256 * MiB
_WINDOW_32 = 2 * GiB
_X86_PAGE = 4 * KiB


@dataclass(frozen=True, slots=True)
class Layout:
    """One plan. Sizes in bytes.

    Attributes:
        name: release and GOARCH, such as ``"go1.4/amd64"``.
        strategy: how addresses are taken (see the module).
        word: pointer size of the target.
        arena_sizes: arena to reserve at first; smaller ones are tried in turn.
        bitmap: reserved for the bitmap.
        bitmap_bits: bits a word that are really mapped; 0: there is no bitmap.
        spans: reserved for spans; 0: there are none.
        slack: extra bytes asked for, so that an unaligned answer can be rounded up.
        hints: addresses to ask for, in order; empty: any will do.
        window: the 32-bit mechanism: bytes from ``arena_start`` that the metadata can describe;
            0: the arena does not grow beyond what was reserved.
        page: what the heap hands out is a multiple of this.
        growth: the heap takes at least so much of the arena at once.
        unit: arenas are mapped in this unit.
        index: a table of arenas, mapped once, elsewhere.
        arena_metadata: mapped elsewhere with each arena.
        source: where the facts are from.
    """

    name: str
    strategy: Strategy
    word: int
    arena_sizes: tuple[int, ...]
    bitmap: int
    bitmap_bits: int
    spans: int
    slack: int
    hints: tuple[int, ...]
    window: int = 0
    page: int = GO_PAGE
    growth: int = MiB  # HeapAllocChunk, Go 1.4 src/runtime/malloc.h
    unit: int = GO_PAGE
    index: int = 0
    arena_metadata: int = 0
    source: str = ""

    @property
    def arena(self) -> int:
        """Bytes of arena reserved at first, where the first size is to be had."""
        return self.arena_sizes[0]

    def total(self, arena: int | None = None) -> int:
        """Bytes to ask the kernel for at first, with this much arena."""
        nbytes = self.arena if arena is None else _index(arena)
        return self.spans + self.bitmap + nbytes + self.slack

    def place(self, address: int, arena: int | None = None) -> "Placement":
        """Lay the plan out at `address`, where `total(arena)` bytes are (or could be) reserved."""
        address = _index(address)
        end = address + self.total(arena)
        arena_start = round_up(address, self.page) + self.spans + self.bitmap
        return Placement(
            layout=self,
            start=address,
            arena_start=arena_start,
            arena_used=arena_start,
            arena_end=end,
            owned=((address, end),) if self.strategy == "reserve" else (),
            arenas=(),
        )


class Request(NamedTuple):
    """Addresses to ask the kernel for: `size` bytes near `hint` (0: anywhere)."""

    size: int
    hint: int
    committed: bool  # readable and writable from the start, or reserved only
    exact: bool  # nothing but the hint will do


class Piece(NamedTuple):
    """Addresses [start, end) as /proc/PID/maps shows them, and what they are."""

    start: int
    end: int
    perms: str
    what: str


class Answer(NamedTuple):
    """What an answered request leads to."""

    placement: "Placement"
    block: int | None  # address of the bytes that were wanted; None: they fit the arena now


@dataclass(frozen=True, slots=True)
class Placement:
    """A layout at an address, with so much of its arena in use. Immutable: growth makes new ones.

    Attributes:
        start: first address.
        arena_start, arena_used, arena_end: addresses, as the runtime calls them.
        owned: address ranges reserved as a whole, lowest first (none under *probe*).
        arenas: address ranges of arena that are mapped, lowest first.
    """

    layout: Layout
    start: int
    arena_start: int
    arena_used: int
    arena_end: int
    owned: tuple[tuple[int, int], ...]
    arenas: tuple[tuple[int, int], ...]

    # -- which bytes are what -----------------------------------------------------------------

    @property
    def end(self) -> int:
        """The first address above everything that belongs to the heap."""
        return self.arena_end

    @property
    def used(self) -> int:
        """``arena_used - arena_start`` in bytes: what the metadata describes."""
        return self.arena_used - self.arena_start

    @property
    def spans(self) -> tuple[int, int]:
        """Address range of spans, mapped or not."""
        high = self.arena_start - self.layout.bitmap
        return high - self.layout.spans, high

    @property
    def bitmap(self) -> tuple[int, int]:
        """Address range of the bitmap, mapped or not."""
        return self.arena_start - self.layout.bitmap, self.arena_start

    @property
    def arena(self) -> tuple[int, int]:
        """Address range of the arena, mapped or not, with the slack."""
        return self.arena_start, self.arena_end

    @property
    def window_end(self) -> int:
        """Under the 32-bit mechanism, where the metadata ends to describe; else ``arena_end``."""
        return self.arena_start + self.layout.window if self.layout.window else self.arena_end

    def mapped_bitmap(self, os_page: int = _X86_PAGE) -> tuple[int, int]:
        """Address range of the bitmap that is mapped."""
        nbytes = self.used * self.layout.bitmap_bits // (8 * self.layout.word)
        nbytes = round_up(round_up(nbytes, self.layout.page), os_page)
        return self.arena_start - nbytes, self.arena_start

    def mapped_spans(self, os_page: int = _X86_PAGE) -> tuple[int, int]:
        """Address range of spans that is mapped."""
        low, _ = self.spans
        words = self.used // self.layout.page if self.layout.spans else 0
        return low, low + round_up(words * self.layout.word, os_page)

    def mapped(self, os_page: int = _X86_PAGE) -> tuple[tuple[int, int], ...]:
        """Readable and writable address ranges, lowest first, neighbours joined."""
        metadata = [self.mapped_spans(os_page)]
        if self.layout.bitmap:
            metadata.append(self.mapped_bitmap(os_page))
        return _joined([*metadata, *self.arenas])

    def maps(self, os_page: int = _X86_PAGE) -> list[Piece]:
        """What /proc/PID/maps shows of the heap, lowest first."""
        mapped = self.mapped(os_page)
        pieces = [Piece(low, high, "rw-p", self.what(low, high)) for low, high in mapped]
        for low, high in self.owned:
            pieces += [
                Piece(a, b, "---p", self.what(a, b)) for a, b in without((low, high), mapped)
            ]
        return sorted(pieces)

    def what(self, low: int, high: int) -> str:
        """Name what lies in an address range: ``"spans"``, ``"spans + bitmap"``, ..."""
        names = {"spans": self.spans, "bitmap": self.bitmap, "arena": self.arena}
        return " + ".join(name for name, (a, b) in names.items() if a < high and low < b)

    # -- growth -------------------------------------------------------------------------------

    def fits(self, nbytes: int) -> bool:
        """Tell whether the arena that is there has room for `nbytes` more."""
        return nbytes <= self.arena_end - self.arena_used

    def advanced(self, nbytes: int) -> "Placement":
        """Return the placement after handing out `nbytes` that fit."""
        return self._with_arena(self.arena_used, self.arena_used + nbytes)

    def growth(self, nbytes: int) -> list[Request]:
        """Return what to ask the kernel for, in order, when `nbytes` do not fit.

        Each answer goes to `granted`, and back to the kernel if that has no use for it; when none
        is left, memory is out. A 64-bit arena that is used up does not grow: the list is empty.
        """
        layout = self.layout
        if layout.strategy == "arenas":
            size = round_up(nbytes, layout.unit)
            onward = [self.arena_end] if self.arenas else []
            beyond = [hint for hint in layout.hints if hint >= self.arena_end]
            return [Request(size, hint, committed=True, exact=True) for hint in onward + beyond]
        if not layout.window:
            return []
        requests = []
        size = round_up(nbytes + layout.page, _GROWTH_STEP_32)
        if self.arena_end + size <= self.window_end:
            requests.append(Request(size, self.arena_end, committed=False, exact=False))
        size = round_up(nbytes, layout.page) + layout.page
        requests.append(Request(size, 0, committed=True, exact=False))
        return requests

    def granted(self, request: Request, address: int, nbytes: int) -> Answer | None:
        """Return what follows from `request` answered at `address`; None: it is of no use."""
        end = address + request.size
        if self.layout.strategy == "arenas":
            block = self.arena_used if self.arenas and address == self.arena_end else address
            grown = self._with_arena(address, end)
            return Answer(replace(grown, arena_used=block + nbytes, arena_end=end), block)
        if address < self.arena_start or end > self.window_end:
            return None
        first = round_up(address, self.layout.page)
        owned = _joined([*self.owned, (address, end)])
        if request.committed:
            grown = replace(
                self._with_arena(address, end),
                arena_used=max(self.arena_used, first + nbytes),
                arena_end=max(self.arena_end, end),
                owned=owned,
            )
            return Answer(grown, first)
        if address == self.arena_end:
            return Answer(replace(self, arena_end=end, owned=owned), None)
        if address < self.arena_used:
            return None
        # A jump: what was left of the old piece is stranded, and the metadata covers the hole.
        return Answer(replace(self, arena_used=first, arena_end=end, owned=owned), None)

    def out_of_range(self, address: int) -> str:
        """Say, as the runtime does, that memory came from where the metadata does not reach."""
        return (
            f"memory allocated by OS ({address}) not in usable range "
            f"[{self.arena_start:#x},{self.window_end:#x})"
        )

    def _with_arena(self, low: int, high: int) -> "Placement":
        return replace(
            self,
            arena_used=max(self.arena_used, high),
            arenas=_joined([*self.arenas, (low, high)]),
        )


def _joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort ranges, drop empty ones and join neighbours."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if low == high:
            continue
        if joined and low <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(high, joined[-1][1]))
        else:
            joined.append((low, high))
    return tuple(joined)


def without(whole: tuple[int, int], taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield what of `whole` is in none of the sorted ranges `taken`."""
    at, end = whole
    for low, high in taken:
        if high <= at or low >= end:
            continue
        if low > at:
            yield at, low
        at = high
    if at < end:
        yield at, end


# -- the table --------------------------------------------------------------------------------


def _go64(name: str, strategy: Strategy, arena: int, bitmap: int, bits: int, source: str) -> Layout:
    return Layout(
        name=name,
        strategy=strategy,
        word=8,
        arena_sizes=(arena,),
        bitmap=bitmap,
        bitmap_bits=bits,
        spans=arena // GO_PAGE * 8,
        slack=GO_PAGE,
        hints=_HINTS_64,
        source=source,
    )


def _go32(
    name: str, word: int, base: int, sizes: tuple[int, ...], bits: int, source: str
) -> Layout:
    return Layout(
        name=name,
        strategy="reserve",
        word=word,
        arena_sizes=sizes,
        bitmap=_WINDOW_32 // (word * 8 // 4),
        bitmap_bits=bits,
        spans=_WINDOW_32 // GO_PAGE * word,
        slack=GO_PAGE,
        hints=(base,),
        window=_WINDOW_32,
        source=source,
    )


_GO_1_4 = "Go 1.4 src/runtime/malloc2.go, malloc1.go, mheap1.go"
_GO_1_5 = "Go 1.5 src/runtime/malloc.go, mbitmap.go"
_TABLE = (
    _go64(
        "go-tip-2014-12/amd64",
        "reserve",
        128 * GiB,
        8 * GiB,
        4,
        "Go development tree, 5 to 23 December 2014, src/runtime/malloc1.go, mem_linux.go",
    ),
    _go64("go1.4/amd64", "probe", 128 * GiB, 8 * GiB, 4, _GO_1_4),
    _go64("go1.5/amd64", "probe", 512 * GiB, 32 * GiB, 2, _GO_1_5),
    _go64("go1.10/amd64", "probe", 512 * GiB, 16 * GiB, 2, "Go 1.10 src/runtime/malloc.go"),
    Layout(
        name="go1.11/amd64",
        strategy="arenas",
        word=8,
        arena_sizes=(0,),
        bitmap=0,
        bitmap_bits=2,
        spans=0,
        slack=0,
        hints=_HINTS_64,
        unit=64 * MiB,
        index=32 * MiB,
        arena_metadata=2 * MiB + 64 * KiB,
        source="Go 1.11 src/runtime/malloc.go, mheap.go",
    ),
    # The bases are where the loader of that time left the first free megabyte: a hint, no more.
    _go32("go-tip-2014-12/386", 4, 0x0820_0000, (512 * MiB,), 4, _GO_1_4),
    _go32("go1.4/386", 4, 0x0820_0000, (512 * MiB,), 4, _GO_1_4),
    _go32("go1.5/386", 4, 0x0820_0000, (512 * MiB, 256 * MiB, 128 * MiB), 2, _GO_1_5),
    # What a 64-bit runtime falls back to when its reservation is refused.
    _go32("fallback", 8, 0x0060_0000, (512 * MiB,), 4, _GO_1_4),
)
_BY_NAME = {layout.name: layout for layout in _TABLE}
# Releases that share a row.
_ALIASES = {
    "go1.3/amd64": "go1.4/amd64",
    "go1.6/amd64": "go1.5/amd64",
    "go1.7/amd64": "go1.10/amd64",
    "go1.8/amd64": "go1.10/amd64",
    "go1.9/amd64": "go1.10/amd64",
}
_NATIVE_SIZE_64 = 128 * GiB
_NATIVE_SIZE_32 = 512 * MiB


def names() -> list[str]:
    """List the names of all layouts."""
    return [*_BY_NAME, "native", *_ALIASES]


def get(name: str, *, size: int | None = None, word: int = 8) -> Layout:
    """Return a layout by its name.

    ``"native"`` is our own: one arena of `size` bytes (128 GiB; 512 MiB where `word` is 4), no
    metadata beside it, no window, no slack, any address.

    Raises:
        KeyError: no layout has this name.
        RangeError: a size that is not positive, or given to a layout that has its own.
    """
    size, word = None if size is None else _index(size), _index(word)
    if name == "native":
        size = (_NATIVE_SIZE_64 if word == 8 else _NATIVE_SIZE_32) if size is None else size
        if size <= 0:
            msg = f"an arena has a positive size, not {size}"
            raise RangeError(msg)
        return Layout(
            name="native",
            strategy="reserve",
            word=word,
            arena_sizes=(round_up(size, GO_PAGE),),
            bitmap=0,
            bitmap_bits=0,
            spans=0,
            slack=0,
            hints=(),
            growth=2 * MiB,  # a huge page
            source="pyreserve",
        )
    if size is not None:
        msg = f"only the layout native takes a size, {name} has its own"
        raise RangeError(msg)
    layout = _BY_NAME.get(_ALIASES.get(name, name))
    if layout is None:
        msg = f"no layout {name!r}; there are {', '.join(names())}"
        raise KeyError(msg)
    return layout if layout.name == name else replace(layout, name=name)


def fallback_of(layout: Layout) -> Layout | None:
    """Return what the runtime falls back to when `layout` can't be reserved; None: nothing."""
    is_go64 = (
        layout.word == 8 and layout.strategy != "arenas" and not layout.window and layout.spans
    )
    return _BY_NAME["fallback"] if is_go64 else None


def default_name(word: int) -> str:
    """Name the article's layout for an interpreter with pointers of `word` bytes."""
    return "go-tip-2014-12/amd64" if word == 8 else "go-tip-2014-12/386"


def describe(layout: Layout) -> str:
    """Put a layout in one line."""
    if layout.strategy == "arenas":
        return f"{format_size(layout.unit)} arenas, mapped one at a time, metadata elsewhere"
    ranges = [
        f"{format_size(size)} {what}"
        for size, what in (
            (layout.spans, "spans"),
            (layout.bitmap, "bitmap"),
            (layout.arena, "arena"),
        )
        if size
    ]
    how = {"reserve": "reserved at once", "probe": "mapped piece by piece"}[layout.strategy]
    more = f", growing inside {format_size(layout.window)}" if layout.window else ""
    return f"{' + '.join(ranges)}, {how}{more}"
