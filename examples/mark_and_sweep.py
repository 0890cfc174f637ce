"""A toy mark-and-sweep collector that keeps its notes in the arena's heap bitmap.

As in Go 1.4, a word's entry says whether the word is a pointer, which may lead anywhere into an
object; the entry of an object's first word says whether it was reached.

    python examples/mark_and_sweep.py
"""

import random

from pyreserve import Arena, format_size

MARKED, POINTER = 1 << 1, 2 << 2


def new(arena: Arena, *pointers: int) -> int:
    """Make an object that holds `pointers` and ends with a zero; return its address."""
    bits, block = arena.heap_bitmap, arena.alloc((len(pointers) + 1) * arena.layout.word, zero=True)
    words, first = block.view.cast("P"), bits.index(block.address)
    for i, pointer in enumerate(pointers):
        words[i] = pointer
        bits[first + i] |= POINTER
    bits[first + len(pointers)] &= ~POINTER  # an entry may be left from an earlier object
    return block.address


def mark(arena: Arena, roots: list[int]) -> int:
    """Mark all objects that can be reached; return how many."""
    bits, grey, reached = arena.heap_bitmap, list(roots), 0
    while grey:
        block = arena.block_at(grey.pop())
        assert block is not None, "a pointer out of the heap"
        first, words = bits.index(block.address), block.view.cast("P")
        if not bits[first] & MARKED:
            bits[first] |= MARKED
            grey += (word for i, word in enumerate(words) if bits[first + i] & POINTER)
            reached += 1
    return reached


def sweep(arena: Arena) -> int:
    """Free all objects without a mark, and take the others' marks away; return how many died."""
    bits, dead = arena.heap_bitmap, []
    for block in arena.blocks():
        if not bits.at(block.address) & MARKED:
            dead.append(block)
        bits.set_at(block.address, bits.at(block.address) & ~MARKED)
    arena.free_many(dead)
    return len(dead)


def main() -> None:
    """Make 3000 objects that point at each other, and forget most of them, then the rest."""
    with Arena() as arena:
        chance, objects = random.Random(2014), [new(arena)]
        for _ in range(2999):
            known = chance.sample(objects[-50:], min(2, len(objects)))
            objects.append(new(arena, known[0], known[-1] + arena.layout.word // 2))
        for roots in ([objects[1500]], []):
            before, reached, dead = arena.memstats(), mark(arena, roots), sweep(arena)
            given, after = format_size(arena.scavenge()), arena.memstats()
            print(
                f"{len(roots)} roots: {reached} objects reached, {dead} freed; {given} given back"
            )
            for it in before, after:
                sizes = map(format_size, (it.heap_inuse, it.heap_idle, it.resident))
                print("  {:>9} in use, {:>9} idle, {:>9} resident".format(*sizes))


if __name__ == "__main__":
    main()
