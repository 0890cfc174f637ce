"""Group an address space into blocks for a picture, each byte in one block, and label them."""

import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from pyreserve._system.report import printable
from pyreserve.procmem.judge.classes import NAMES, PRIVATE, SHARED, SWAPPED
from pyreserve.procmem.mappings import Mapping
from pyreserve.units import MiB

MAX_BLOCKS = 18
"""Maximum number of blocks in a picture."""

# Merges that cost at most _SMALL are made down to _FEW blocks. Costs are weights: a share of VSZ
# plus _MEMORY times a share of resident memory.
_FEW, _SMALL, _MEMORY = 9, 0.02, 0.3
# A hole of at least this size and this share of the address range divides even one owner.
_LARGE_HOLE, _LARGE_HOLE_SHARE = 64 * MiB, 1 / 4096
_HOLE_COST, _FILES_COST, _OTHER_COST = 1.0, 0.1, 0.4
# Owners of the mappings of a program or library.
_FILES = ("mapped files", "library data", "program data")


@dataclass(slots=True)
class Block:
    """Adjacent mappings that are drawn as one block.

    Attributes:
        start, end: addresses [start, end); the other figures exclude holes between mappings.
        sizes: bytes by class, in the order of `pyreserve.procmem.judge.classes.NAMES`.
        owners: bytes by owner.
        files: bytes by file name.
        places: number of groups of mappings, with large holes between them.
    """

    start: int
    end: int
    sizes: list[int]
    owners: dict[str, int] = field(default_factory=dict)
    files: dict[str, int] = field(default_factory=dict)
    places: int = 1

    @property
    def size(self) -> int:
        """Mapped bytes."""
        return sum(self.sizes)

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return self.sizes[PRIVATE] + self.sizes[SHARED]

    def merge(self, other: "Block", large_hole: int) -> None:
        """Append the next block, as a new place after a hole of more than `large_hole` bytes."""
        is_apart = other.start - self.end > large_hole
        self.places += other.places - (not is_apart)
        self.end = other.end
        self.sizes = [a + b for a, b in zip(self.sizes, other.sizes, strict=True)]
        self.owners = _sum(self.owners, other.owners)
        self.files = _sum(self.files, other.files)


def _sum(sizes: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    """Add the smaller dict to the larger one, in place: copies would make merging quadratic."""
    if len(sizes) < len(other):
        sizes, other = other, sizes
    for name, size in other.items():
        sizes[name] = sizes.get(name, 0) + size
    return sizes


def min_large_hole(in_order: list[Block]) -> int:
    """Return the size in bytes above which a hole divides the address space in the picture."""
    if not in_order:
        return 0
    return max(_LARGE_HOLE, int((in_order[-1].end - in_order[0].start) * _LARGE_HOLE_SHARE))


def blocks(mappings: Iterable[Mapping], most: int = MAX_BLOCKS) -> list[Block]:
    """Divide a process's mappings into at most `most` blocks in address order.

    A block begins where the owner changes or a large hole ends. Blocks that are small in size and
    resident memory are merged with adjacent ones, and more until at most `most` are left.
    """
    pieces = list(_pieces(mappings))
    large_hole = min_large_hole(pieces)
    runs: list[Block] = []
    for piece in pieces:
        last = runs[-1] if runs else None
        if (
            last
            and last.owners.keys() == piece.owners.keys()
            and piece.start - last.end <= large_hole
        ):
            last.merge(piece, large_hole)
        else:
            runs.append(piece)
    return _merge(runs, large_hole, most)


def _pieces(mappings: Iterable[Mapping]) -> Iterator[Block]:
    """Yield a block for each mapping, or for each owner's part of a divided one."""
    for mapping in mappings:
        if not mapping.class_name:  # [vsyscall] is not in VSZ
            continue
        rest_class = NAMES.index(mapping.class_name)
        sizes = [0] * len(NAMES)
        sizes[PRIVATE], sizes[SHARED] = mapping.private, mapping.shared
        sizes[SWAPPED] = mapping.swap
        sizes[rest_class] += mapping.size - sum(sizes)
        if len(mapping.parts) > 1:
            yield from _divide(mapping, sizes, rest_class)
        else:
            files = {mapping.name: mapping.size} if mapping.name.startswith("/") else {}
            yield Block(mapping.start, mapping.end, sizes, {mapping.owner: mapping.size}, files)


def _divide(mapping: Mapping, sizes: list[int], rest_class: int) -> Iterator[Block]:
    """Yield a block for each part of a mapping; bytes in memory or swap go to the largest parts.

    Their actual place in the mapping is not known.
    """
    left = [0 if index == rest_class else size for index, size in enumerate(sizes)]
    divided = [Block(low, high, [0] * len(NAMES), {owner: 0}) for low, high, owner in mapping.parts]
    for block in sorted(divided, key=lambda block: block.start - block.end):
        [owner] = block.owners
        free = block.owners[owner] = block.end - block.start
        for index, size in enumerate(left):
            block.sizes[index] = moved = min(size, free)
            left[index] -= moved
            free -= moved
        block.sizes[rest_class] += free
    yield from divided


def _is_of_files(block: Block) -> bool:
    return all(name.startswith(_FILES) for name in block.owners)


def _merge(runs: list[Block], large_hole: int, most: int) -> list[Block]:
    """Merge adjacent blocks, cheapest merge first."""
    size = sum(block.size for block in runs) or 1
    memory = sum(block.memory for block in runs) or 1
    before, after = list(range(-1, len(runs) - 1)), list(range(1, len(runs) + 1))
    version = [0] * len(runs)  # counts merges, to recognise outdated entries of the queue
    count = len(runs)

    def weight(i: int) -> float:
        return runs[i].size / size + _MEMORY * runs[i].memory / memory

    def offer(i: int, j: int) -> tuple[float, int, int, int]:
        low, high = runs[i], runs[j]
        small, large = sorted((weight(i), weight(j)))
        is_apart = high.start - low.end > large_hole
        if low.owners.keys() == high.owners.keys():
            cost = small if is_apart else 0  # no information is lost
        elif _is_of_files(low) and _is_of_files(high):
            cost = _FILES_COST * small + _HOLE_COST * is_apart
        else:  # a large block's label becomes less clear
            cost = small + _OTHER_COST * large + _HOLE_COST * is_apart
        return cost, i, j, version[i] + version[j]

    queue = [offer(i, i + 1) for i in range(count - 1)]
    heapq.heapify(queue)
    is_merged = [False] * len(runs)
    while queue:
        cost, i, j, versions = heapq.heappop(queue)
        if is_merged[i] or is_merged[j] or version[i] + version[j] != versions or after[i] != j:
            continue
        if count <= most and cost > (_SMALL if count > _FEW else 0):
            break
        runs[i].merge(runs[j], large_hole)
        is_merged[j], after[i], count = True, after[j], count - 1
        version[i] += 1
        if after[i] < len(runs):
            before[after[i]] = i
            heapq.heappush(queue, offer(i, after[i]))
        if before[i] >= 0:
            heapq.heappush(queue, offer(before[i], i))
    return [block for block, merged in zip(runs, is_merged, strict=True) if not merged]


def holes(in_order: list[Block]) -> list[int]:
    """Return the unmapped bytes between each block and the next."""
    return [after.start - before.end for before, after in itertools.pairwise(in_order)]


def label(block: Block, fits: Callable[[str], bool]) -> str:
    """Return the first label that `fits`, from detailed to short.

    It names the block's owners, or its files if it has nothing else.
    """
    owners = [printable(name) for name in _largest(block.owners)]
    names = [printable(name.rpartition("/")[2] or name) for name in _largest(block.files)]
    short = list(dict.fromkeys(owner.partition(" (")[0] or owner for owner in owners))
    labels = owners if len(owners) == 1 else _shortened_lists(short)
    if _is_of_files(block):
        kind = owners[0] if len(owners) == 1 else "files and their data"
        count = f"{len(names):,} files{' and their data' if len(owners) > 1 else ''}"
        labels = (
            [f"{kind}: {files}" for files in _shortened_lists(names)]
            + [count] * (len(names) > 1)
            + labels
        )
    if block.places > 1:
        labels = [f"{text}, {block.places:,} places" for text in labels] + labels[-1:]
    for text in labels:
        if fits(text):
            return text
    return shorten(labels[-1], fits)


def shorten(text: str, fits: Callable[[str], bool]) -> str:
    """Replace the middle of a text by an ellipsis if it does not fit."""
    if fits(text):
        return text
    low, high = 0, len(text) // 2  # letters kept at each end
    while low < high:
        kept = (low + high + 1) // 2
        low, high = (kept, high) if fits(f"{text[:kept]}…{text[-kept:]}") else (low, kept - 1)
    return f"{text[:low]}…{text[len(text) - low :]}"


def _largest(sizes: dict[str, int]) -> list[str]:
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def _shortened_lists(names: list[str]) -> list[str]:
    """Return enumerations of the names, from up to four names down to one."""
    texts = []
    for shown in range(min(len(names), 4), 0, -1):
        more = len(names) - shown
        if more:
            texts.append(f"{', '.join(names[:shown])} and {more:,} more")
        else:
            texts.append(" and ".join(filter(None, [", ".join(names[:-1]), names[-1]])))
    return texts
