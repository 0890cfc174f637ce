"""HotSpot's heap, class data, code cache and other reservations, in processes that run libjvm."""

import re

from pyreserve.procmem.judge.owners.sight import NONE, RW, RWX, Sight
from pyreserve.units import GiB, MiB, format_size

_LOW = 32 * GiB  # compressed pointers to objects reach so far
_ZGC = "/memfd:java_heap"
_CLASS_SPACE = GiB  # CompressedClassSpaceSize, hotspot/share/runtime/globals.hpp
_NODE = 64 * MiB  # of metaspace: VirtualSpaceNode, hotspot/share/memory/metaspace
_ROOT_CHUNK = 4 * MiB
_CDS = "JVM CDS archive (mapped file)"


def jvm(sight: Sight) -> None:
    """Claim them, each by its own shape; HotSpot reserves with MAP_NORESERVE (``nr``)."""
    library = sight.runs_code_of(r"libjvm\.so$")
    if library is None:
        return
    where = f"in a process of {library}"
    _code_cache(sight, where)
    _heap(sight, where)
    _class_data(sight)
    _metaspace(sight, where)
    _others(sight, where)


def _is_committed(sight: Sight, i: int) -> bool:
    return sight.perms[i] == RW and sight.lacks(i, "nr dc dd nh")


def _is_reserved(sight: Sight, i: int) -> bool:
    if sight.perms[i] != NONE:
        return False
    return sight.is_never_charged(i) if sight.knows_flags else True


def _is_hotspots(sight: Sight, i: int) -> bool:
    """Tell whether a mapping is free, anonymous, and committed or reserved as HotSpot does."""
    if sight.names[i] or sight.inode[i] or not sight.free(i):
        return False
    return _is_committed(sight, i) or _is_reserved(sight, i)


def _hotspots(sight: Sight) -> list[range]:
    return sight.neighbours(i for i in range(len(sight.start)) if _is_hotspots(sight, i))


def _code_cache(sight: Sight, where: str) -> None:
    for first, last in sight.runs:
        i = first
        while i < last:
            if sight.perms[i] != RWX or not sight.free(i):
                i += 1
                continue
            j = i
            while j + 1 < last and (sight.perms[j + 1] == RWX or _is_reserved(sight, j + 1)):
                j += 1
            sight.claim(
                range(i, j + 1),
                "JVM code cache",
                f"writable and executable, with reserved memory between, {where}",
            )
            i = j + 1


# -- the heap ---------------------------------------------------------------------------------


def _heap(sight: Sight, where: str) -> None:
    zgc = _zgc_heap(sight)
    archived = {i for i in _archives(sight) if sight.start[i] < _LOW}
    low_ones = (
        i
        for i in range(len(sight.start))
        if sight.end[i] <= _LOW + _CLASS_SPACE and (_is_hotspots(sight, i) or i in archived)
    )
    for group in sight.neighbours(low_ones):
        low, high = sight.start[group[0]], sight.end[group[-1]]
        if low >= _LOW or low % MiB or high - low < 8 * MiB:
            continue
        border = low if zgc else _class_space(sight, low, high)
        if border > low:
            sight.claim(
                [i for i in group if sight.start[i] < border],
                "JVM heap",
                f"{format_size(border - low)} at {low:x}, below 32 GiB, where compressed pointers "
                f"reach, {where}",
            )
        if border < high:
            sight.claim_range(
                border,
                high,
                "JVM class space",
                f"{format_size(high - border)} at {border:x}, committed from its start, {where}",
            )


def _class_space(sight: Sight, low: int, high: int) -> int:
    """Return where the class space begins that may lie right behind a heap; `high` if it does not.

    It takes 1 GiB at 4 GiB or 32 GiB, or up to 32 GiB, and begins with a little committed memory.
    """
    border = high - _CLASS_SPACE
    i = sight.at(border)
    if border > low and i is not None and sight.start[i] == border:
        canonical = border in {4 * GiB, _LOW} or high == _LOW
        if canonical and sight.perms[i] == RW and sight.size(i) <= 4 * MiB:
            return border
    return high


def _zgc_heap(sight: Sight) -> bool:
    """Claim the views of ZGC's memory with the reserved addresses beside them."""
    views = {i for i, name in sight.named if name.startswith(_ZGC)}
    if not views:
        return False
    mine = (i for i in range(len(sight.start)) if i in views or _is_reserved(sight, i))
    for group in sight.neighbours(mine):
        if views.intersection(group):
            sight.claim(
                group,
                "JVM heap (ZGC)",
                f"{_ZGC} is mapped, in views of one memory with reserved addresses beside it",
            )
    return True


# -- class data -------------------------------------------------------------------------------


def _archives(sight: Sight) -> list[int]:
    return [i for i, name in sight.named if re.search(r"\.jsa( \(deleted\))?$", name)]


def _class_data(sight: Sight) -> None:
    """Claim the CDS archive, the class space behind it and a metaspace node right before it."""
    archives = [i for i in _archives(sight) if sight.free(i)]
    if not archives:
        return
    first, last = archives[0], archives[-1]
    name = f"{sight.names[first]} is mapped"
    sight.claim(archives, _CDS, name)
    i = sight.next_to(last)
    if i is not None and _is_hotspots(sight, i) and sight.size(i) < 16 * MiB:
        sight.claim([i], _CDS, name)
        last = i
    low = sight.end[last]
    high = _hotspots_until(sight, last, low + _CLASS_SPACE)
    if high > low:
        sight.claim_range(
            low,
            high,
            "JVM class space",
            f"{format_size(high - low)} right behind the CDS archive, committed from its start",
        )


def _hotspots_until(sight: Sight, i: int, most: int) -> int:
    """Return where the run of HotSpot's memory behind a mapping ends, or `most`."""
    at = sight.end[i]
    while at < most and (j := sight.next_to(i)) is not None and _is_hotspots(sight, j):
        i, at = j, min(sight.end[j], most)
    return at


def _metaspace(sight: Sight, where: str) -> None:
    """Claim nodes of metaspace: 64 MiB, committed in pieces that begin at root chunks."""
    for group in _hotspots(sight):
        top = sight.end[group[-1]]
        low = top - _NODE
        chunks = {sight.start[i] for i in group if sight.perms[i] == RW}
        inside = sight.start[group[0]] <= low and sight.perms[sight.between(low, top)[0]] == RW
        if low % _ROOT_CHUNK == 0 and inside and low + _ROOT_CHUNK in chunks:
            sight.claim_range(
                low,
                top,
                "JVM metaspace",
                f"a node of 64 MiB, committed in pieces from its root chunks of 4 MiB on, {where}",
            )


# -- the rest ---------------------------------------------------------------------------------


def _others(sight: Sight, where: str) -> None:
    """Claim what else is reserved as HotSpot does: tables of the collector, a heap out of reach."""
    if not sight.knows_flags:
        return
    name, evidence = (
        "JVM other reservations",
        f"reserved without charge (nr), committed piece by piece, {where}",
    )
    for group in _hotspots(sight):
        reserved = [i for i in group if sight.perms[i] == NONE]
        if not reserved:
            continue
        # What is writable belongs to it between what is reserved, and before it if it starts as
        # large mappings do: malloc's blocks may lie right below.
        low = reserved[0]
        if low > group[0] and sight.start[low - 1] % (2 * MiB) == 0:
            low -= 1
        sight.claim(range(low, reserved[-1] + 1), name, evidence)
    # The end of what merged with the inaccessible tail of a heap of malloc's.
    for i in list(sight.claims.parts):
        if _is_reserved(sight, i):
            sight.claim_range(sight.start[i], sight.end[i], name, evidence)
