"""A toy mark-and-sweep collector that keeps its mark and pointer bits in the arena's heap bitmap.

As in Go 1.4, each word has an entry. One bit says that the word is a pointer, which may point into
the middle of an object. Another bit, in the entry of an object's first word, marks the object.

    python examples/mark_and_sweep.py
"""

import random
import struct

from pyreserve import Arena, HeapBitmap, format_size, layouts

MARKED, POINTER = 1 << 1, 2 << 2


def heap_bitmap(arena: Arena) -> HeapBitmap:
    """Return the heap bitmap, which the layout of this example has."""
    bits = arena.heap_bitmap
    assert bits is not None
    return bits


def new(arena: Arena, *pointers: int) -> int:
    """Allocate an object that holds `pointers` and a final zero; return its address."""
    bits, word = heap_bitmap(arena), arena.layout.word
    block = arena.alloc((len(pointers) + 1) * word, zero=True)
    words, first = block.view().cast("P"), bits.index(block.address)
    for i, pointer in enumerate(pointers):
        words[i] = pointer
        bits[first + i] |= POINTER
    bits[first + len(pointers)] &= ~POINTER  # an earlier object may have left it set
    return block.address


def mark(arena: Arena, roots: list[int]) -> int:
    """Mark all objects reachable from `roots`; return their number."""
    bits, grey, reached = heap_bitmap(arena), list(roots), 0
    while grey:
        block = arena.block_at(grey.pop())
        assert block is not None, "a pointer to outside the heap"
        first, words = bits.index(block.address), block.view().cast("P")
        if not bits[first] & MARKED:
            bits[first] |= MARKED
            grey += (word for i, word in enumerate(words) if bits[first + i] & POINTER)
            reached += 1
    return reached


def sweep(arena: Arena) -> int:
    """Free all unmarked objects and clear the other marks; return the number of objects freed."""
    bits, dead = heap_bitmap(arena), []
    for block in arena.blocks():
        if not bits.at(block.address) & MARKED:
            dead.append(block)
        bits.set_at(block.address, bits.at(block.address) & ~MARKED)
    arena.free_many(dead)
    return len(dead)


def main() -> None:
    """Make 3000 objects that point to each other; drop most of the roots, then all."""
    with Arena(layout=layouts.default_name(struct.calcsize("P"))) as arena:
        chance, objects = random.Random(2014), [new(arena)]
        for _ in range(2999):
            known = chance.sample(objects[-50:], min(2, len(objects)))
            objects.append(new(arena, known[0], known[-1] + arena.layout.word // 2))
        for roots in ([objects[1500]], []):
            before, reached, dead = arena.memstats(), mark(arena, roots), sweep(arena)
            given, after = format_size(arena.trim()), arena.memstats()
            print(
                f"{len(roots)} roots: {reached} objects reached, {dead} freed; {given} given back"
            )
            for stats in before, after:
                sizes = map(format_size, (stats.heap_inuse, stats.heap_idle, stats.resident))
                print("  {:>9} in use, {:>9} idle, {:>9} resident".format(*sizes))


if __name__ == "__main__":
    main()
