"""The heap bitmap of a Go layout: two or four bits for each word of the arena."""

from collections.abc import Iterator
from operator import index as _index

from pyreserve._arena.engine import Engine
from pyreserve._region.handles import region_load, region_store
from pyreserve._region.region import Region
from pyreserve.errors import RangeError


class HeapBitmap:
    """The garbage collector's bits for each word of the arena, in the format of the Go release.

    Go up to 1.4 has four bits a word. Entry o is in byte ``arena_start - o // 2 - 1`` at bit
    ``o % 2 * 4``: bit 0 object start, bit 1 marked, bits 2-3 type (0 dead, 1 scalar, 2 pointer,
    3 multi-word); Go 1.4 ``src/runtime/mgc0.h``. Go from 1.5 on has two bits a word: bit 0 pointer,
    bit 1 mark or "more follows". A byte holds four entries, with the pointer bits in its lower half
    (Go 1.5 ``src/runtime/mbitmap.go``). From Go 1.11 on each arena has its own bitmap, which grows
    forward.

    In all formats the arena sets the lowest bit of the entry of a live block's first word. (Only up
    to Go 1.4 is this the meaning of the bit; later releases find object starts through spans.) The
    other bits are the caller's. Freeing a block clears only its first entry.

    ``bitmap[o]`` is the entry of word o counted from ``arena_start``, an int below 16 or 4. `at`
    and `set_at` take an address. Words between ``arena_start`` and ``arena_used`` have entries.

    Raises (all methods):
        RangeError: the word has no entry, its entry was decommitted, or the value is out of range.
        ReleasedError: the arena was released or closed.
    """

    __slots__ = ("_bits", "_engine", "_layout")

    def __init__(self, engine: Engine) -> None:
        """Called by `Arena.heap_bitmap` alone."""
        self._engine = engine
        self._layout = engine.layout
        self._bits = engine.layout.bitmap_bits

    def __len__(self) -> int:
        """Return the number of words that have entries."""
        self._engine.check_open()
        return self._engine.placement.used // self._layout.word

    def index(self, address: int) -> int:
        """Return the index of the word that holds `address`."""
        word = (_index(address) - self._engine.placement.arena_start) // self._layout.word
        self._check(word)
        return word

    def at(self, address: int) -> int:
        """Return the entry of the word that holds `address`."""
        return self[self.index(address)]

    def set_at(self, address: int, value: int) -> None:
        """Set the entry of the word that holds `address`."""
        self[self.index(address)] = value

    def __getitem__(self, word: int) -> int:
        with self._engine.lock:
            region, offset, shifts = self._entry(_index(word))
            byte = self._checked(region_load(region.exports.handle, offset))
        return sum((byte >> shift & 1) << bit for bit, shift in enumerate(shifts))

    def __setitem__(self, word: int, value: int) -> None:
        value = _index(value)
        if not 0 <= value < 1 << self._bits:
            msg = f"value must be between 0 and {(1 << self._bits) - 1}, got {value}"
            raise RangeError(msg)
        with self._engine.lock:
            region, offset, shifts = self._entry(_index(word))
            byte = self._checked(region_load(region.exports.handle, offset))
            for bit, shift in enumerate(shifts):
                byte = byte & ~(1 << shift) | (value >> bit & 1) << shift
            self._checked(region_store(region.exports.handle, offset, byte))

    def __iter__(self) -> Iterator[int]:
        return (self[word] for word in range(len(self)))

    def _check(self, word: int) -> None:
        if not 0 <= word < len(self):
            msg = f"word {word} has no heap bitmap entry: the arena uses {len(self)} words"
            raise RangeError(msg)

    def _checked(self, result: int) -> int:
        """Return the result of region_load or region_store; raise if the byte is not committed."""
        if result < 0:
            self._engine.check_open()
            msg = "this part of the heap bitmap was decommitted"
            raise RangeError(msg)
        return result

    def _entry(self, word: int) -> tuple[Region, int, tuple[int, ...]]:
        """Return region and offset of the byte that holds an entry, and the shifts of its bits."""
        self._check(word)
        per_byte = 8 // self._bits
        byte, slot = divmod(word, per_byte)
        shifts = tuple(range(4 * slot, 4 * slot + 4)) if self._bits == 4 else (slot, slot + 4)
        if self._layout.arena_metadata:
            region, arena_word = self._arena_bitmap(word)
            return region, arena_word // per_byte, shifts
        region = self._engine.region
        return region, self._engine.placement.arena_start - region.base - 1 - byte, shifts

    def _arena_bitmap(self, word: int) -> tuple[Region, int]:
        """Return the bitmap of the arena that holds a word, and the word's index in that arena."""
        placement, unit = self._engine.placement, self._layout.unit
        address = placement.arena_start + word * self._layout.word
        bytes_below = 0
        for low, high in placement.arenas:
            if low <= address < high:
                arena, offset = divmod(address - low, unit)
                metadata = self._engine.metadata[1 + bytes_below // unit + arena]
                return metadata, offset // self._layout.word
            bytes_below += high - low
        msg = f"word {word} has no heap bitmap entry: it is in the gap between two arenas"
        raise RangeError(msg)
