"""The heap bitmap: a few bits for each word of the arena, where the layout's runtime had them."""

from collections.abc import Iterator
from operator import index as _index

from pyreserve._arena.engine import Engine
from pyreserve._native import lib
from pyreserve._region.region import Region
from pyreserve.errors import RangeError


class HeapBitmap:
    """The collector's notes on each word of the arena, as the layout's runtime kept them.

    Four bits a word up to Go 1.4: entry o stands in byte ``arena_start - o // 2 - 1`` at bit
    ``o % 2 * 4``: bit 0 object start, bit 1 marked, bits 2-3 type (0 dead, 1 scalar, 2 pointer,
    3 multi-word); Go 1.4 ``src/runtime/mgc0.h``. Two bits from Go 1.5 on: bit 0 pointer, bit 1 mark
    or "more follows"; four entries a byte, pointer bits in its lower half (Go 1.5
    ``src/runtime/mbitmap.go``). From Go 1.11 on each arena has a bitmap of its own, which runs
    forward.

    The lowest bit of the entry of a block's first word is set while the block lives, in each form
    (that is its meaning up to Go 1.4; later releases found starts by their spans). The rest is for
    the user, who has all entries of a block; freeing it clears the first one.

    ``bitmap[o]`` is the entry of word o from ``arena_start``, an int; `at` and `set_at` take an
    address. Only words that the arena has handed out have entries.

    Raises (all methods):
        RangeError: no such word, or not an entry.
        ReleasedError: the arena was released or closed.
    """

    __slots__ = ("_arena", "_bits", "_layout")

    def __init__(self, arena: Engine) -> None:
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
