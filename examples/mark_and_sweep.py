"""A toy mark-and-sweep collector, with its marks where Go 1.4 had them: in the heap bitmap.

Every object is a block of a Go arena: a few words, some of which are addresses of other objects.
What can't be reached from the roots is freed, and what that leaves idle goes back to the system.
"""

from random import Random

from pyreserve import Arena, Block, format_size

MARKED = 2  # bit 1 of an entry (Go 1.4 src/runtime/mgc0.h)
WORDS = 1024


class Collector:
    """Objects of WORDS words in an arena; words that are no addresses of objects point nowhere."""

    def __init__(self) -> None:
        self.arena = Arena("go1.4/amd64")
        self.roots: set[int] = set()

    def new(self) -> int:
        """Make an object of zeros; return its address."""
        return self.arena.alloc(8 * WORDS, zero=True).address

    def words(self, address: int) -> memoryview:
        """Return the words of an object."""
        return self._object(address).view.cast("Q")

    def collect(self) -> tuple[int, int]:
        """Free what the roots do not lead to; return how many objects live, and how many died."""
        bitmap, waiting = self.arena.heap_bitmap, list(self.roots)
        while waiting:
            block = self.arena.block_at(waiting.pop())
            if block is None or bitmap.at(block.address) & MARKED:
                continue
            bitmap.set_at(block.address, bitmap.at(block.address) | MARKED)
            waiting += [word for word in block.view.cast("Q") if word]
        dead, live = [], 0
        for block in self.arena.blocks():
            entry = bitmap.at(block.address)
            if entry & MARKED:
                live += 1
                bitmap.set_at(block.address, entry & ~MARKED)
            else:
                dead.append(block)
        self.arena.free_many(dead)
        return live, len(dead)

    def _object(self, address: int) -> Block:
        block = self.arena.block_at(address)
        if block is None:
            msg = f"no object at {address:#x}"
            raise ValueError(msg)
        return block


def main() -> None:
    """Make a thousand objects that point at each other, keep three of them, collect."""
    random, gc = Random(1), Collector()
    objects = [gc.new() for _ in range(1000)]
    for address in objects:
        if random.random() < 0.6:
            gc.words(address)[random.randrange(WORDS)] = random.choice(objects)
    gc.roots.update(objects[:3])
    before = gc.arena.memstats()
    live, dead = gc.collect()
    given_back = gc.arena.scavenge()
    after = gc.arena.memstats()
    print(f"{live} objects can be reached, {dead} were freed")
    print(f"in use: {format_size(before.heap_inuse)}, then {format_size(after.heap_inuse)}")
    print(f"given back to the system: {format_size(given_back)}")


if __name__ == "__main__":
    main()
