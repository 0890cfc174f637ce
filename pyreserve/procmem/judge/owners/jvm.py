"""HotSpot's heap, class data, code cache and other reservations, in processes that run libjvm."""

import re

from pyreserve.procmem.judge.owners.process import NONE, RW, RWX, ProcessMappings
from pyreserve.units import GiB, MiB, format_size

_LOW = 32 * GiB  # compressed pointers to objects reach so far
_ZGC = "/memfd:java_heap"
_CLASS_SPACE = GiB  # CompressedClassSpaceSize, hotspot/share/runtime/globals.hpp
_NODE = 64 * MiB  # of metaspace: VirtualSpaceNode, hotspot/share/memory/metaspace
_ROOT_CHUNK = 4 * MiB
_CDS = "JVM CDS archive (mapped file)"


def jvm(process: ProcessMappings) -> None:
    """Claim them, each by its own shape; HotSpot reserves with MAP_NORESERVE (``nr``)."""
    library = process.runs_code_of(r"libjvm\.so$")
    if library is None:
        return
    where = f"in a process of {library}"
    _code_cache(process, where)
    _heap(process, where)
    _class_data(process)
    _metaspace(process, where)
    _others(process, where)


def _is_committed(process: ProcessMappings, i: int) -> bool:
    return process.perms[i] == RW and process.lacks_flags(i, "nr dc dd nh")


def _is_reserved(process: ProcessMappings, i: int) -> bool:
    if process.perms[i] != NONE:
        return False
    return process.is_never_charged(i) if process.knows_flags else True


def _is_hotspots(process: ProcessMappings, i: int) -> bool:
    """Tell whether a mapping is free, anonymous, and committed or reserved as HotSpot does."""
    if process.names[i] or process.inode[i] or not process.is_unclaimed(i):
        return False
    return _is_committed(process, i) or _is_reserved(process, i)


def _hotspots(process: ProcessMappings) -> list[range]:
    return process.group_adjacent(i for i in range(len(process.start)) if _is_hotspots(process, i))


def _code_cache(process: ProcessMappings, where: str) -> None:
    for first, last in process.runs:
        i = first
        while i < last:
            if process.perms[i] != RWX or not process.is_unclaimed(i):
                i += 1
                continue
            j = i
            while j + 1 < last and (process.perms[j + 1] == RWX or _is_reserved(process, j + 1)):
                j += 1
            process.claim(
                range(i, j + 1),
                "JVM code cache",
                f"writable and executable, with reserved memory between, {where}",
            )
            i = j + 1


# -- the heap ---------------------------------------------------------------------------------


def _heap(process: ProcessMappings, where: str) -> None:
    zgc = _zgc_heap(process)
    archived = {i for i in _archives(process) if process.start[i] < _LOW}
    low_ones = (
        i
        for i in range(len(process.start))
        if process.end[i] <= _LOW + _CLASS_SPACE and (_is_hotspots(process, i) or i in archived)
    )
    for group in process.group_adjacent(low_ones):
        low, high = process.start[group[0]], process.end[group[-1]]
        if low >= _LOW or low % MiB or high - low < 8 * MiB:
            continue
        border = low if zgc else _class_space(process, low, high)
        if border > low:
            process.claim(
                [i for i in group if process.start[i] < border],
                "JVM heap",
                f"{format_size(border - low)} at {low:x}, below 32 GiB, where compressed pointers "
                f"reach, {where}",
            )
        if border < high:
            process.claim_range(
                border,
                high,
                "JVM class space",
                f"{format_size(high - border)} at {border:x}, committed from its start, {where}",
            )


def _class_space(process: ProcessMappings, low: int, high: int) -> int:
    """Return where the class space begins that may lie right behind a heap; `high` if it does not.

    It takes 1 GiB at 4 GiB or 32 GiB, or up to 32 GiB, and begins with a little committed memory.
    """
    border = high - _CLASS_SPACE
    i = process.mapping_at(border)
    if border > low and i is not None and process.start[i] == border:
        canonical = border in {4 * GiB, _LOW} or high == _LOW
        if canonical and process.perms[i] == RW and process.size(i) <= 4 * MiB:
            return border
    return high


def _zgc_heap(process: ProcessMappings) -> bool:
    """Claim the views of ZGC's memory with the reserved addresses beside them."""
    views = {i for i, name in process.named if name.startswith(_ZGC)}
    if not views:
        return False
    mine = (i for i in range(len(process.start)) if i in views or _is_reserved(process, i))
    for group in process.group_adjacent(mine):
        if views.intersection(group):
            process.claim(
                group,
                "JVM heap (ZGC)",
                f"{_ZGC} is mapped, in views of one memory with reserved addresses beside it",
            )
    return True


# -- class data -------------------------------------------------------------------------------


def _archives(process: ProcessMappings) -> list[int]:
    return [i for i, name in process.named if re.search(r"\.jsa( \(deleted\))?$", name)]


def _class_data(process: ProcessMappings) -> None:
    """Claim the CDS archive, the class space behind it and a metaspace node right before it."""
    archives = [i for i in _archives(process) if process.is_unclaimed(i)]
    if not archives:
        return
    first, last = archives[0], archives[-1]
    name = f"{process.names[first]} is mapped"
    process.claim(archives, _CDS, name)
    i = process.mapping_after(last)
    if i is not None and _is_hotspots(process, i) and process.size(i) < 16 * MiB:
        process.claim([i], _CDS, name)
        last = i
    low = process.end[last]
    high = _hotspots_until(process, last, low + _CLASS_SPACE)
    if high > low:
        process.claim_range(
            low,
            high,
            "JVM class space",
            f"{format_size(high - low)} right behind the CDS archive, committed from its start",
        )


def _hotspots_until(process: ProcessMappings, i: int, most: int) -> int:
    """Return where the run of HotSpot's memory behind a mapping ends, or `most`."""
    at = process.end[i]
    while at < most and (j := process.mapping_after(i)) is not None and _is_hotspots(process, j):
        i, at = j, min(process.end[j], most)
    return at


def _metaspace(process: ProcessMappings, where: str) -> None:
    """Claim nodes of metaspace: 64 MiB, committed in pieces that begin at root chunks."""
    for group in _hotspots(process):
        top = process.end[group[-1]]
        low = top - _NODE
        chunks = {process.start[i] for i in group if process.perms[i] == RW}
        inside = (
            process.start[group[0]] <= low and process.perms[process.mappings_in(low, top)[0]] == RW
        )
        if low % _ROOT_CHUNK == 0 and inside and low + _ROOT_CHUNK in chunks:
            process.claim_range(
                low,
                top,
                "JVM metaspace",
                f"a node of 64 MiB, committed in pieces from its root chunks of 4 MiB on, {where}",
            )


# -- the rest ---------------------------------------------------------------------------------


def _others(process: ProcessMappings, where: str) -> None:
    """Claim what else is reserved as HotSpot does: tables of the collector, a heap out of reach."""
    if not process.knows_flags:
        return
    name, evidence = (
        "JVM other reservations",
        f"reserved without charge (nr), committed piece by piece, {where}",
    )
    for group in _hotspots(process):
        reserved = [i for i in group if process.perms[i] == NONE]
        if not reserved:
            continue
        # What is writable belongs to it between what is reserved, and before it if it starts as
        # large mappings do: malloc's blocks may lie right below.
        low = reserved[0]
        if low > group[0] and process.start[low - 1] % (2 * MiB) == 0:
            low -= 1
        process.claim(range(low, reserved[-1] + 1), name, evidence)
    # The end of what merged with the inaccessible tail of a heap of malloc's.
    for i in list(process.claims.parts):
        if _is_reserved(process, i):
            process.claim_range(process.start[i], process.end[i], name, evidence)
