"""An arena that eight threads share while a scavenger gives idle memory back.

Each thread fills its blocks with its own patterns and checks the patterns before it frees the
blocks.

    python examples/shared_arena.py
"""

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

from pyreserve import Arena, Block, KiB, MiB, format_size

THREADS, STEPS, MAX_BLOCKS = 8, 600, 24


def times(pattern: bytes, nbytes: int) -> bytes:
    """Repeat a pattern up to a length of `nbytes`."""
    return (pattern * (nbytes // len(pattern) + 1))[:nbytes]


def work(arena: Arena, number: int) -> int:
    """Allocate and free at random; return the number of blocks that kept their patterns."""
    chance, good = random.Random(number), 0
    mine: list[tuple[Block, bytes]] = []
    for step in range(STEPS):
        block = arena.alloc(chance.randint(1, 128 * KiB), zero=True)
        assert not any(block.view()[:: 4 * KiB]), "zero=True must clear the block"
        mine.append((block, b"thread %d, step %d; " % (number, step)))
        block.view()[:] = times(mine[-1][1], len(block))
        if len(mine) == MAX_BLOCKS or step == STEPS - 1:
            chance.shuffle(mine)
            done, mine = mine[MAX_BLOCKS // 4 :], mine[: MAX_BLOCKS // 4]
            good += sum(block.view() == times(pattern, len(block)) for block, pattern in done)
            arena.free_many(block for block, _ in done)
    good += sum(block.view() == times(pattern, len(block)) for block, pattern in mine)
    arena.free_many(block for block, _ in mine)
    return good


def show(when: str, arena: Arena) -> None:
    """Print a line of the arena's statistics."""
    stats = arena.memstats()
    sizes = map(format_size, (stats.heap_inuse, stats.heap_idle, stats.resident))
    print("{:>22}: {} in use, {} idle, {} resident".format(when, *sizes))


def main() -> None:
    """Run the threads, and print the memory that is left."""
    with Arena(256 * MiB) as arena, ThreadPoolExecutor(THREADS) as threads:
        scavenger = arena.start_scavenger(older_than=0.02)
        good = sum(threads.map(work, repeat(arena), range(THREADS)))
        arena.stop_scavenger()
        print(f"{good} of {arena.memstats().mallocs} blocks held their patterns to the end")
        print(f"the scavenger gave back {format_size(scavenger.given_back)}")
        show("when the threads ended", arena)
        arena.trim()
        show("after a trim", arena)


if __name__ == "__main__":
    main()
