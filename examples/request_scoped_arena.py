"""A request-scoped arena: scratch memory that is freed at the end of each request.

A server answers lists of doubles with their running means. The end of the scope frees all buffers
of a request at once. So the buffers of every request have the same addresses, and RSS stays flat
for any number of requests.

    python examples/request_scoped_arena.py
"""

import socket
import struct
import threading
from itertools import accumulate
from pathlib import Path

from pyreserve import PAGE_SIZE, BumpArena, GiB, format_size


def serve(arena: BumpArena, client: socket.socket, length: int) -> str:
    """Answer one request of `length` bytes; return the memory it used, for printing."""
    with arena.scope():
        request, received = arena.alloc(length), 0
        first = arena.base + arena.in_use - length
        while received < length:
            received += client.recv_into(request[received:])
        answer = arena.alloc(length)
        means = answer.cast("d")
        for i, total in enumerate(accumulate(request.cast("d"))):
            means[i] = total / (i + 1)
        client.sendall(answer)
        del request, answer, means  # a live view would keep the blocks in use after the scope
        return f"{format_size(arena.in_use):>9} from {first:#x} on"


def ask(server: socket.socket, count: int) -> None:
    """Send a request of `count` doubles and receive the answer."""
    server.sendall(struct.pack(f"{count}d", *range(count)))
    server.recv(8 * count, socket.MSG_WAITALL)


def main() -> None:
    """Serve a few hundred requests."""
    here, there = socket.socketpair()
    with here, there, BumpArena(GiB) as arena:
        for n in range(1, 302):
            count = 1 + n * 7919 % 20_000
            client = threading.Thread(target=ask, args=(there, count))
            client.start()
            used = serve(arena, here, 8 * count)
            client.join()
            if n % 50 == 1:
                rss = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_SIZE
                print(f"request {n:3}: {used}; RSS {format_size(rss)}")
        print(arena)


if __name__ == "__main__":
    main()
