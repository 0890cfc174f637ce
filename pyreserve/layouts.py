"""Address-space layouts: where spans, bitmap and arena lie, and when each is mapped.

This module is arithmetic only; it maps nothing.

A Go heap of 2013-2018 is one range of addresses, low to high::

    [ spans | bitmap | arena | slack ]

Memory is allocated from the arena, from ``arena_start`` up to ``arena_used``. The bitmap describes
the arena's words and grows *backward* from its end, which is ``arena_start``; spans has one word
for each 8 KiB page and grows forward. With u = ``arena_used - arena_start``, the mapped bytes are u
of arena, u * bits / (8 * word) of bitmap and u / 8192 * word of spans: at 4 bits and 8-byte words,
a heap of H bytes commits H + H/16 + H/1024.

There are two strategies on 64 bits: *reserve* maps the whole range PROT_NONE at once, which ``ps``
shows as 138 GB; *probe* only checks that the range is free and maps each piece at first use. A
third, *arenas* (Go 1.11), maps 64 MiB at a time and keeps the metadata elsewhere. The 32-bit
mechanism reserves 512 MiB of arena and then requests more inside a *window* of 2 GiB, the range
that the metadata can describe.

Sources: Go 1.3 to 1.4 ``src/runtime/malloc.goc``, ``malloc.h``, ``mheap.c``; Go 1.5 to 1.10
``src/runtime/malloc.go``, ``mbitmap.go``, ``mheap.go``; Go 1.11 ``src/runtime/malloc.go``; checked
against /proc/PID/maps of binaries built with these.
"""

from collections.abc import Iterable, Iterator
from operator import index as _index
from typing import Literal, NamedTuple, get_args

from pyreserve.errors import RangeError
from pyreserve.units import GiB, KiB, MiB, as_bytes, format_size, round_up

Strategy = Literal["reserve", "probe", "arenas"]
LayoutName = Literal[
    "native",
    "go1.3/amd64",
    "go1.4/amd64",
    "go-tip-2014-12/amd64",
    "go1.5/amd64",
    "go1.6/amd64",
    "go1.7/amd64",
    "go1.8/amd64",
    "go1.9/amd64",
    "go1.10/amd64",
    "go1.11/amd64",
    "go1.4/386",
    "go-tip-2014-12/386",
    "go1.5/386",
    "fallback",
]
"""The name of a layout: `names` lists all."""

GO_PAGE = 8 * KiB
_HINTS_64 = tuple(i << 40 | 0x00C0 << 32 for i in range(0x80))
_GROWTH_STEP_32 = 256 * MiB
_WINDOW_32 = 2 * GiB
_X86_PAGE = 4 * KiB


class Layout(NamedTuple):
    """An address-space layout. Sizes in bytes.

    Attributes:
        name: release and GOARCH, such as ``"go1.4/amd64"``.
        strategy: ``"reserve"``, ``"probe"`` or ``"arenas"`` (see the module).
        word: pointer size of the target.
        arena_sizes: initial arena sizes, tried in order, largest first.
        bitmap: bytes reserved for the bitmap.
        bitmap_bits: bitmap bits mapped for each word of arena; 0: no bitmap.
        spans: bytes reserved for spans; 0: no spans.
        slack: extra bytes requested, so that an unaligned address can be rounded up.
        hints: addresses to request, in order; empty: any address.
        window: under the 32-bit mechanism, bytes from ``arena_start`` that the metadata can
            describe; 0: the arena does not grow beyond its reservation.
        page: allocation granularity of the heap.
        growth: minimum number of bytes by which the heap extends into the arena.
        unit: granularity in which arenas are mapped.
        index: size of the table of arenas, which is mapped once, elsewhere.
        arena_metadata: bytes of metadata mapped elsewhere for each arena.
        source: Go version and files that the facts are from.
    """

    name: LayoutName
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
    index: int = 0  # type: ignore[assignment]  # hides tuple.index
    arena_metadata: int = 0
    source: str = ""

    @property
    def arena(self) -> int:
        """Bytes of arena to reserve initially: the first of `arena_sizes`."""
        return self.arena_sizes[0]

    def total(self, arena: int | None = None) -> int:
        """Bytes to reserve initially with `arena` bytes of arena (None: the default)."""
        nbytes = self.arena if arena is None else _index(arena)
        return self.spans + self.bitmap + nbytes + self.slack

    def place(self, address: int, arena: int | None = None) -> "Placement":
        """Return the placement of `total(arena)` bytes at `address`. Reserves nothing itself."""
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
    """A request to the kernel for addresses.

    Attributes:
        size: bytes.
        hint: the address to request; 0: any.
        committed: map readable and writable, instead of only reserving.
        exact: accept no other address than the hint.
    """

    size: int
    hint: int
    committed: bool
    exact: bool


class Piece(NamedTuple):
    """A line of /proc/PID/maps.

    Attributes:
        start: first address.
        end: first address above it.
        perms: permissions, such as ``"rw-p"``.
        parts: the parts of the layout there, such as ``"spans + bitmap"``.
    """

    start: int
    end: int
    perms: str
    parts: str


class Answer(NamedTuple):
    """The effect of a granted request.

    Attributes:
        placement: the grown placement.
        block: address of the allocated bytes; None: not allocated, but they fit now.
    """

    placement: "Placement"
    block: int | None


class Placement(NamedTuple):
    """A layout at an address, with part of its arena in use. Immutable: growth returns a new one.

    Attributes:
        layout: the layout.
        start: first address.
        arena_start, arena_used, arena_end: addresses, named as in the Go runtime.
        owned: reserved address ranges, lowest first (none under *probe*).
        arenas: mapped address ranges of arena, lowest first.
    """

    layout: Layout
    start: int
    arena_start: int
    arena_used: int
    arena_end: int
    owned: tuple[tuple[int, int], ...]
    arenas: tuple[tuple[int, int], ...]

    # -- parts of the layout ------------------------------------------------------------------

    @property
    def end(self) -> int:
        """The first address above the heap."""
        return self.arena_end

    @property
    def used(self) -> int:
        """``arena_used - arena_start`` in bytes: the length that the metadata describes."""
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
        """Address range of the arena including the slack, mapped or not."""
        return self.arena_start, self.arena_end

    @property
    def window_end(self) -> int:
        """End of the window under the 32-bit mechanism; else ``arena_end``."""
        return self.arena_start + self.layout.window if self.layout.window else self.arena_end

    def mapped_bitmap(self, os_page: int = _X86_PAGE) -> tuple[int, int]:
        """Mapped address range of the bitmap."""
        layout, start = self.layout, self.arena_start
        nbytes = (self.arena_used - start) * layout.bitmap_bits // (8 * layout.word)
        nbytes = round_up(round_up(nbytes, layout.page), os_page)
        return start - nbytes, start

    def mapped_spans(self, os_page: int = _X86_PAGE) -> tuple[int, int]:
        """Mapped address range of spans."""
        layout, start = self.layout, self.arena_start
        low = start - layout.bitmap - layout.spans
        words = (self.arena_used - start) // layout.page if layout.spans else 0
        return low, low + round_up(words * layout.word, os_page)

    def mapped(self, os_page: int = _X86_PAGE) -> tuple[tuple[int, int], ...]:
        """Readable and writable address ranges, lowest first, adjacent ones joined."""
        metadata = [self.mapped_spans(os_page)]
        if self.layout.bitmap:
            metadata.append(self.mapped_bitmap(os_page))
        return joined([*metadata, *self.arenas])

    def maps(self, os_page: int = _X86_PAGE) -> list[Piece]:
        """Lines that /proc/PID/maps shows for the heap, lowest first."""
        mapped = self.mapped(os_page)
        pieces = [Piece(low, high, "rw-p", self.parts(low, high)) for low, high in mapped]
        for low, high in self.owned:
            pieces += [
                Piece(a, b, "---p", self.parts(a, b)) for a, b in without((low, high), mapped)
            ]
        return sorted(pieces)

    def parts(self, low: int, high: int) -> str:
        """Name the parts in an address range: ``"spans"``, ``"spans + bitmap"``, ..."""
        names = {"spans": self.spans, "bitmap": self.bitmap, "arena": self.arena}
        return " + ".join(name for name, (a, b) in names.items() if a < high and low < b)

    # -- growth -------------------------------------------------------------------------------

    def fits(self, nbytes: int) -> bool:
        """Whether the arena has space for `nbytes` more without growing."""
        return nbytes <= self.arena_end - self.arena_used

    def advanced(self, nbytes: int) -> "Placement":
        """Return the placement after allocating `nbytes`, which must fit."""
        return self._with_arena(self.arena_used, self.arena_used + nbytes)

    def growth(self, nbytes: int) -> list[Request]:
        """Return the requests to try, in order, when `nbytes` do not fit.

        Pass the address of each mapping to `granted`; unmap it if that returns None. When all
        requests fail, the heap is out of memory. A full 64-bit arena does not grow: the list is
        empty.
        """
        layout = self.layout
        if layout.strategy == "arenas":
            size = round_up(nbytes, layout.unit)
            adjacent = [self.arena_end] if self.arenas else []
            above = [hint for hint in layout.hints if hint >= self.arena_end]
            return [Request(size, hint, committed=True, exact=True) for hint in adjacent + above]
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
        """Return the effect of `request` mapped at `address`; None if the range is unusable."""
        end = address + request.size
        if self.layout.strategy == "arenas":
            block = self.arena_used if self.arenas and address == self.arena_end else address
            grown = self._with_arena(address, end)
            return Answer(grown._replace(arena_used=block + nbytes, arena_end=end), block)
        if address < self.arena_start or end > self.window_end:
            return None
        first = round_up(address, self.layout.page)
        owned = joined([*self.owned, (address, end)])
        if request.committed:
            grown = self._with_arena(address, end)._replace(
                arena_used=max(self.arena_used, first + nbytes),
                arena_end=max(self.arena_end, end),
                owned=owned,
            )
            return Answer(grown, first)
        if address == self.arena_end:
            return Answer(self._replace(arena_end=end, owned=owned), None)
        if address < self.arena_used:
            return None
        # A jump: the unused end of the old range is lost, and the metadata covers the hole.
        return Answer(self._replace(arena_used=first, arena_end=end, owned=owned), None)

    def out_of_range(self, address: int) -> str:
        """Return the runtime's message for memory outside the window."""
        return (
            f"memory allocated by OS ({address}) not in usable range "
            f"[{self.arena_start:#x},{self.window_end:#x})"
        )

    def _with_arena(self, low: int, high: int) -> "Placement":
        return self._replace(
            arena_used=max(self.arena_used, high),
            arenas=joined([*self.arenas, (low, high)]),
        )


def joined(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sort ranges, drop empty ones and join adjacent ones."""
    result: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if low == high:
            continue
        if result and low <= result[-1][1]:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def without(whole: tuple[int, int], taken: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the parts of `whole` outside the sorted ranges `taken`."""
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


def _go64(
    name: LayoutName, strategy: Strategy, arena: int, bitmap: int, bits: int, source: str
) -> Layout:
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
    name: LayoutName, word: int, base: int, sizes: tuple[int, ...], bits: int, source: str
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
    # The base is the first free megabyte above the program, as loaders placed it then; only a hint.
    _go32("go-tip-2014-12/386", 4, 0x0820_0000, (512 * MiB,), 4, _GO_1_4),
    _go32("go1.4/386", 4, 0x0820_0000, (512 * MiB,), 4, _GO_1_4),
    _go32("go1.5/386", 4, 0x0820_0000, (512 * MiB, 256 * MiB, 128 * MiB), 2, _GO_1_5),
    # A 64-bit runtime falls back to this when its reservation is refused.
    _go32("fallback", 8, 0x0060_0000, (512 * MiB,), 4, _GO_1_4),
)
_BY_NAME = {layout.name: layout for layout in _TABLE}
# Releases with the same layout as another one.
_ALIASES: dict[LayoutName, LayoutName] = {
    "go1.3/amd64": "go1.4/amd64",
    "go1.6/amd64": "go1.5/amd64",
    "go1.7/amd64": "go1.10/amd64",
    "go1.8/amd64": "go1.10/amd64",
    "go1.9/amd64": "go1.10/amd64",
}
_NATIVE_SIZE_64 = 128 * GiB
_NATIVE_SIZE_32 = 512 * MiB


def names() -> list[LayoutName]:
    """Return the names of all layouts."""
    return list(get_args(LayoutName))


def get(name: str, *, size: int | str | None = None, word: int = 8) -> Layout:
    """Return a layout by name.

    ``"native"`` is pyreserve's own layout: one arena of `size` bytes at any address, without
    metadata, window or slack.

    Args:
        name: one of `names`.
        size: bytes, or a size such as ``"4GiB"``, for ``"native"`` only. None: 128 GiB, or 512 MiB
            if `word` is 4.
        word: pointer size of the target in bytes, for ``"native"`` only.

    Raises:
        KeyError: no layout has this name.
        RangeError: `size` is not positive, or was given for another layout than ``"native"``.
        ValueError: `size` is a string that is not a size.
    """
    size, word = None if size is None else as_bytes(size), _index(word)
    listed = next((listed for listed in names() if listed == name), None)
    if listed is None:
        msg = f"no layout {name!r}; layouts: {', '.join(names())}"
        raise KeyError(msg)
    if listed == "native":
        size = (_NATIVE_SIZE_64 if word == 8 else _NATIVE_SIZE_32) if size is None else size
        if size <= 0:
            msg = f"size must be positive, got {size}"
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
        msg = f"size is valid for the layout native only, got {size} for {name}"
        raise RangeError(msg)
    layout = _BY_NAME[_ALIASES.get(listed, listed)]
    return layout if layout.name == listed else layout._replace(name=listed)


def fallback_of(layout: Layout) -> Layout | None:
    """Return the layout that the Go runtime tries when `layout` is refused; None if it has none."""
    is_go64 = (
        layout.word == 8 and layout.strategy != "arenas" and not layout.window and layout.spans
    )
    return _BY_NAME["fallback"] if is_go64 else None


def default_name(word: int) -> LayoutName:
    """Return the name of the layout behind "136 GiB of VSZ", for pointers of `word` bytes."""
    return "go-tip-2014-12/amd64" if word == 8 else "go-tip-2014-12/386"


def describe(layout: Layout) -> str:
    """Describe a layout in one line."""
    if layout.strategy == "arenas":
        return f"{format_size(layout.unit)} arenas, mapped one at a time, metadata elsewhere"
    ranges = [
        f"{format_size(size)} {part}"
        for size, part in (
            (layout.spans, "spans"),
            (layout.bitmap, "bitmap"),
            (layout.arena, "arena"),
        )
        if size
    ]
    mapping = {"reserve": "reserved at once", "probe": "mapped piece by piece"}[layout.strategy]
    growth = f", growing inside {format_size(layout.window)}" if layout.window else ""
    return f"{' + '.join(ranges)}, {mapping}{growth}"
