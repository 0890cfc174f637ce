"""Search and comparison of bytes behind memoryviews, without a copy of the whole.

``bytes`` searches with memchr and two-way search, a memoryview not at all, so pieces are copied:
1 KiB at first, up to 256 KiB or twice the length of what is searched for.

Each function of (view, sub, lo, hi) looks at [lo, hi) as the method of ``bytes`` does; ``lo`` may
be above ``hi``.
"""

from pyreserve.units import KiB

_FIRST = KiB
_PIECE = 256 * KiB


def find(view: memoryview, sub: bytes | memoryview, lo: int, hi: int) -> int:
    """Return the lowest offset of `sub`, or -1."""
    overlap, length = max(len(sub) - 1, 0), _FIRST
    while lo + len(sub) <= hi:
        end = min(hi, lo + max(length, overlap) + overlap)
        at = bytes(view[lo:end]).find(sub)
        if at >= 0:
            return lo + at
        lo, length = end - overlap, min(2 * length, _PIECE)
    return -1


def rfind(view: memoryview, sub: bytes | memoryview, lo: int, hi: int) -> int:
    """Return the highest offset of `sub`, or -1."""
    overlap, length = max(len(sub) - 1, 0), _FIRST
    while lo + len(sub) <= hi:
        start = max(lo, hi - max(length, overlap) - overlap)
        at = bytes(view[start:hi]).rfind(sub)
        if at >= 0:
            return start + at
        hi, length = start + overlap, min(2 * length, _PIECE)
    return -1


def count(view: memoryview, sub: bytes | memoryview, lo: int, hi: int) -> int:
    """Return how often `sub` occurs without overlaps."""
    if not sub:
        return max(hi - lo + 1, 0)
    total, overlap = 0, len(sub) - 1
    while lo + len(sub) <= hi:
        end = min(hi, lo + max(_PIECE, overlap) + overlap)
        piece = bytes(view[lo:end])
        if overlap:
            # Unlike `count`, `split` also tells where the last occurrence ends.
            parts = piece.split(sub)
            total += len(parts) - 1
            lo = end - min(len(parts[-1]), overlap)
        else:
            total += piece.count(sub)
            lo = end
    return total


def starts(view: memoryview, sub: memoryview, lo: int, hi: int) -> bool:
    """Tell whether `sub` is at `lo`."""
    return len(sub) <= hi - lo and not compare(view[lo : lo + len(sub)], sub)


def ends(view: memoryview, sub: memoryview, lo: int, hi: int) -> bool:
    """Tell whether `sub` ends at `hi`."""
    return len(sub) <= hi - lo and not compare(view[hi - len(sub) : hi], sub)


def compare(one: memoryview, other: memoryview) -> int:
    """Return 0 if the bytes are equal, a negative number if `one` is less, else a positive one."""
    for at in range(0, min(len(one), len(other)), _PIECE):
        ours, theirs = bytes(one[at : at + _PIECE]), bytes(other[at : at + _PIECE])
        if ours != theirs:
            return -1 if ours < theirs else 1
    return len(one) - len(other)
