"""Search and comparison of the bytes of memoryviews, without a copy of the whole.

A memoryview has no search, so pieces are copied to ``bytes`` and searched there: 1 KiB at first,
later up to 256 KiB or twice the length of `sub`.

Each function of (view, sub, lo, hi) searches [lo, hi) as the method of ``bytes`` does; ``lo`` may
be above ``hi``.
"""

from pyreserve.units import KiB

_FIRST_PIECE = KiB
_PIECE = 256 * KiB


def find(view: memoryview, sub: bytes | memoryview, lo: int, hi: int) -> int:
    """Return the lowest offset of `sub`, or -1."""
    overlap, length = max(len(sub) - 1, 0), _FIRST_PIECE
    while lo + len(sub) <= hi:
        end = min(hi, lo + max(length, overlap) + overlap)
        at = bytes(view[lo:end]).find(sub)
        if at >= 0:
            return lo + at
        lo, length = end - overlap, min(2 * length, _PIECE)
    return -1


def rfind(view: memoryview, sub: bytes | memoryview, lo: int, hi: int) -> int:
    """Return the highest offset of `sub`, or -1."""
    overlap, length = max(len(sub) - 1, 0), _FIRST_PIECE
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


def compare(left: memoryview, right: memoryview) -> int:
    """Return a number below, equal to or above 0, as `left` is below, equal to or above `right`."""
    for at in range(0, min(len(left), len(right)), _PIECE):
        a, b = bytes(left[at : at + _PIECE]), bytes(right[at : at + _PIECE])
        if a != b:
            return -1 if a < b else 1
    return len(left) - len(right)
