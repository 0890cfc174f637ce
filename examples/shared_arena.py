"""An arena shared by threads: each gets bytes of its own, and idle memory goes back by itself."""

import threading
from random import Random

from pyreserve import Arena, format_size

THREADS = 8
ROUNDS = 500


def work(arena: Arena, number: int, wrong: list[str]) -> None:
    """Allocate, write, look whether it is still there, free."""
    random = Random(number)
    for _ in range(ROUNDS):
        with arena.alloc(random.randrange(1, 200_000)) as block:
            view = block.view
            view[0] = view[-1] = number
            others = arena.alloc_many([random.randrange(1, 20_000) for _ in range(5)])
            if view[0] != number or view[-1] != number:
                wrong.append(f"thread {number} found another's byte")
            others.free()
            del view  # a block can't be freed while anything shows its bytes


def main() -> None:
    """Let eight threads use one arena, with a scavenger beside them."""
    wrong: list[str] = []
    with Arena("native", scavenge_after=0.05) as arena:
        threads = [
            threading.Thread(target=work, args=(arena, number, wrong))
            for number in range(1, THREADS + 1)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        arena.scavenge()
        stats = arena.memstats()
    print(f"{stats.mallocs:,} blocks allocated, {stats.frees:,} freed, {len(wrong)} mistakes")
    print(f"{format_size(stats.heap_sys)} of arena, {format_size(stats.heap_inuse)} in use")
    print(f"{format_size(stats.resident)} in memory, {format_size(stats.reserved)} reserved")


if __name__ == "__main__":
    main()
