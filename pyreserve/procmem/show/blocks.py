"""What a picture of an address space shows: blocks of neighbours, each byte in one, and words."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyreserve.procmem.judge.classes import NAMES, PRIVATE, SHARED, SWAPPED
from pyreserve.procmem.judge.owners import UNKNOWN
from pyreserve.units import KiB, MiB

if TYPE_CHECKING:
    from pyreserve.procmem.space import AddressSpace

MOST = 18
"""No picture has more blocks."""

# So many blocks need no joining of what is small: less than this of VSZ and, counting a part only
# since whoever draws this wonders about VSZ, of the memory.
_FEW, _SMALL, _MEMORY = 9, 0.02, 0.3
# A hole of so many bytes and this part of all addresses divides even one owner's mappings.
_FAR_LEAST, _FAR = 64 * MiB, 1 / 4096
_APART, _LIKE, _UNLIKE = 1.0, 0.1, 0.4
# A program or library is its file and what lies right behind.
_FILES = ("mapped files", "library data", "program data")


@dataclass(slots=True)
class Block:
    """Neighbours that are drawn as one.

    Attributes:
        start, end: addresses [start, end); holes between its mappings are in no other figure.
        kib: its KiB by class, as `pyreserve.procmem.judge.classes.NAMES` orders them.
        owners: KiB by owner.
        files: KiB by the name of a file.
        places: how many there are of it, with large holes between.
    """

    start: int
    end: int
    kib: list[int]
    owners: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    places: int = 1

    @property
    def size_kib(self) -> int:
        """All that is mapped."""
        return sum(self.kib)

    @property
    def memory_kib(self) -> int:
        """What is in memory."""
        return self.kib[PRIVATE] + self.kib[SHARED]

    def join(self, other: "Block", least: int) -> None:
        """Take in the next one; holes of more than `least` bytes make places."""
        apart = other.start - self.end > least
        self.places += other.places - (not apart)
        self.end = other.end
        self.kib = [a + b for a, b in zip(self.kib, other.kib, strict=True)]
        self.owners = _sum(self.owners, other.owners)
        self.files = _sum(self.files, other.files)


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Add up, in the larger one: thousands of joins must not copy thousands of names each."""
    if len(one) < len(other):
        one, other = other, one
    for name, kib in other.items():
        one[name] = one.get(name, 0) + kib
    return one


def far(space: list[Block]) -> int:
    """Return the bytes from which on a hole divides the address space for whoever looks at it."""
    return max(_FAR_LEAST, int((space[-1].end - space[0].start) * _FAR)) if space else 0


def blocks(space: "AddressSpace", most: int = MOST) -> list[Block]:
    """Divide an address space into blocks in address order, `most` at most.

    A block begins where the owner changes or a large hole ends. What is small in size and in memory
    is joined with its neighbours, and more is until no more than `most` are left.
    """
    pieces = list(_pieces(space))
    least = far(pieces)
    found: list[Block] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last and last.owners.keys() == piece.owners.keys() and piece.start - last.end <= least:
            last.join(piece, least)
        else:
            found.append(piece)
    return _joined(found, least, most)


def _pieces(space: "AddressSpace") -> Iterator[Block]:
    """Yield each mapping, or each owner's part of one."""
    process, table = space._process, space._process.table
    whole, divided = process.claims.whole, process.claims.parts
    private, shared, swap, rest = table.private, table.shared, table.swap, table.rest
    for i, kind in enumerate(space._kinds):
        if kind is None:  # [vsyscall] is not in VSZ
            continue
        kib = [0] * len(NAMES)
        kib[PRIVATE], kib[SHARED], kib[SWAPPED] = private[i], shared[i], swap[i]
        kib[kind] += rest[i]
        start, end, name = table.start[i], table.end[i], table.names[i]
        files = {name: table.size[i]} if name.startswith("/") else {}
        if i in divided:
            parts = list(_parts(start, end, divided[i]))
            yield from _divided(parts, kib, kind)
        else:
            yield Block(start, end, kib, {whole[i] or UNKNOWN: table.size[i]}, files)


def _parts(
    start: int, end: int, claimed: Iterable[tuple[int, int, str]]
) -> Iterator[tuple[int, int, str]]:
    """Yield what was claimed of [start, end), and as unknown what is between: each byte once."""
    for low, high, owner in sorted(claimed):
        low, high = max(low, start), min(high, end)  # noqa: PLW2901
        if low >= high:
            continue
        if start < low:
            yield start, low, UNKNOWN
        yield low, high, owner
        start = high
    if start < end:
        yield start, end, UNKNOWN


def _divided(parts: list[tuple[int, int, str]], kib: list[int], kind: int) -> Iterator[Block]:
    """Yield the parts of a mapping, what is in memory or swap in the largest that have room for it.

    Where in a mapping it really lies is not known.
    """
    left = [0 if which == kind else size for which, size in enumerate(kib)]
    found = [Block(low, high, [0] * len(NAMES), {owner: 0}) for low, high, owner in parts]
    for block in sorted(found, key=lambda block: block.start - block.end):
        [owner] = block.owners
        room = block.owners[owner] = (block.end - block.start) // KiB
        for which, size in enumerate(left):
            block.kib[which] = taken = min(size, room)
            left[which] -= taken
            room -= taken
        block.kib[kind] += room
    yield from found


def _of_files(block: Block) -> bool:
    return all(name.startswith(_FILES) for name in block.owners)


def _joined(found: list[Block], least: int, most: int) -> list[Block]:
    """Join neighbours, those first whose joining hides least."""
    size = sum(block.size_kib for block in found) or 1
    memory = sum(block.memory_kib for block in found) or 1
    before, after = list(range(-1, len(found) - 1)), list(range(1, len(found) + 1))
    changed = [0] * len(found)  # how often, to tell what in the queue is of the past
    count = len(found)

    def weight(i: int) -> float:
        return found[i].size_kib / size + _MEMORY * found[i].memory_kib / memory

    def offer(i: int, j: int) -> tuple[float, int, int, int]:
        one, other = found[i], found[j]
        small, large = sorted((weight(i), weight(j)))
        apart = other.start - one.end > least
        if one.owners.keys() == other.owners.keys():
            cost = small if apart else 0  # nothing is lost by it
        elif _of_files(one) and _of_files(other):
            cost = _LIKE * small + _APART * apart
        else:  # a large block's name would become less clear
            cost = small + _UNLIKE * large + _APART * apart
        return cost, i, j, changed[i] + changed[j]

    queue = [offer(i, i + 1) for i in range(count - 1)]
    heapq.heapify(queue)
    gone = [False] * len(found)
    while queue:
        cost, i, j, age = heapq.heappop(queue)
        if gone[i] or gone[j] or changed[i] + changed[j] != age or after[i] != j:
            continue
        if count <= most and cost > (_SMALL if count > _FEW else 0):
            break
        found[i].join(found[j], least)
        gone[j], after[i], count = True, after[j], count - 1
        changed[i] += 1
        if after[i] < len(found):
            before[after[i]] = i
            heapq.heappush(queue, offer(i, after[i]))
        if before[i] >= 0:
            heapq.heappush(queue, offer(before[i], i))
    return [block for block, hidden in zip(found, gone, strict=True) if not hidden]


def holes(found: list[Block]) -> list[int]:
    """Return the bytes that are not mapped between each block and the next."""
    return [after.start - before.end for before, after in itertools.pairwise(found)]


def label(block: Block, fits: Callable[[str], bool]) -> str:
    """Name a block by its owners, and by its files if they are all, as far as it `fits`."""
    owners = [printable(name) for name in _largest(block.owners)]
    names = [printable(name.rpartition("/")[2] or name) for name in _largest(block.files)]
    short = list(dict.fromkeys(owner.partition(" (")[0] or owner for owner in owners))
    tries = owners if len(owners) == 1 else _some(short)
    if _of_files(block):
        kind = owners[0] if len(owners) == 1 else "files and their data"
        count = f"{len(names):,} files{' and their data' if len(owners) > 1 else ''}"
        tries = [f"{kind}: {some}" for some in _some(names)] + [count] * (len(names) > 1) + tries
    if block.places > 1:
        tries = [f"{text}, {block.places:,} places" for text in tries] + tries[-1:]
    for text in tries:
        if fits(text):
            return text
    return shorten(tries[-1], fits)


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Leave the middle of a text out if it does not fit."""
    if fits(text):
        return text
    low, high = 0, len(text) // 2  # letters kept at each end
    while low < high:
        kept = (low + high + 1) // 2
        low, high = (kept, high) if fits(f"{text[:kept]}…{text[-kept:]}") else (low, kept - 1)
    return f"{text[:low]}…{text[len(text) - low :]}"


def _largest(sizes: dict[str, int]) -> list[str]:
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _some(names: list[str]) -> list[str]:
    """Write names in a row, all of them first, then fewer."""
    rows = []
    for shown in range(min(len(names), 4), 0, -1):
        more = len(names) - shown
        if more:
            rows.append(f"{', '.join(names[:shown])} and {more:,} more")
        else:
            rows.append(" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])))
    return rows


def printable(text: str) -> str:
    """Write what can't be seen as it is written in source code (PEP 383 for odd bytes)."""
    return "".join(one if one.isprintable() else _escaped(one) for one in text)


def _escaped(one: str) -> str:
    code = ord(one)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return one.encode("unicode_escape").decode("ascii")
