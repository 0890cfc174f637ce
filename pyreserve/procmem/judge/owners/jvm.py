"""HotSpot's heap, class data, code cache and other reservations, in processes that map libjvm."""

import re

from pyreserve.procmem.judge.owners.process import NONE, RW, RWX, ProcessMappings
from pyreserve.units import GiB, MiB, format_size

_COMPRESSED_OOPS_END = 32 * GiB  # limit of compressed object pointers
_ZGC = "/memfd:java_heap"
_CLASS_SPACE = GiB  # CompressedClassSpaceSize, hotspot/share/runtime/globals.hpp
_METASPACE_NODE = 64 * MiB  # VirtualSpaceNode, hotspot/share/memory/metaspace
_ROOT_CHUNK = 4 * MiB
_CDS = "JVM CDS archive (mapped file)"


def jvm(process: ProcessMappings) -> None:
    """Claim HotSpot's memory, each part by its shape; it reserves with MAP_NORESERVE (``nr``)."""
    library = process.runs_code_of(r"libjvm\.so$")
    if library is None:
        return
    context = f"in a process of {library}"
    _code_cache(process, context)
    _heap(process, context)
    _class_data(process)
    _metaspace(process, context)
    _other_reservations(process, context)


def _is_committed(process: ProcessMappings, i: int) -> bool:
    return process.perms[i] == RW and process.lacks_flags(i, "nr dc dd nh")


def _is_reserved(process: ProcessMappings, i: int) -> bool:
    if process.perms[i] != NONE:
        return False
    return process.is_never_charged(i) if process.knows_flags else True


def _is_hotspot_memory(process: ProcessMappings, i: int) -> bool:
    """Return whether an unclaimed anonymous mapping is committed or reserved like HotSpot's."""
    if process.names[i] or process.inode[i] or not process.is_unclaimed(i):
        return False
    return _is_committed(process, i) or _is_reserved(process, i)


def _hotspot_groups(process: ProcessMappings) -> list[range]:
    return process.group_adjacent(
        i for i in range(len(process.start)) if _is_hotspot_memory(process, i)
    )


def _code_cache(process: ProcessMappings, context: str) -> None:
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
                f"writable and executable, with reserved memory between, {context}",
            )
            i = j + 1


# -- the heap ---------------------------------------------------------------------------------


def _heap(process: ProcessMappings, context: str) -> None:
    zgc = _zgc_heap(process)
    archived = {i for i in _archives(process) if process.start[i] < _COMPRESSED_OOPS_END}
    low_mappings = (
        i
        for i in range(len(process.start))
        if process.end[i] <= _COMPRESSED_OOPS_END + _CLASS_SPACE
        and (_is_hotspot_memory(process, i) or i in archived)
    )
    for group in process.group_adjacent(low_mappings):
        low, high = process.start[group[0]], process.end[group[-1]]
        if low >= _COMPRESSED_OOPS_END or low % MiB or high - low < 8 * MiB:
            continue
        border = low if zgc else _class_space(process, low, high)
        if border > low:
            process.claim(
                [i for i in group if process.start[i] < border],
                "JVM heap",
                f"{format_size(border - low)} at {low:x}, below 32 GiB, where compressed pointers "
                f"reach, {context}",
            )
        if border < high:
            process.claim_range(
                border,
                high,
                "JVM class space",
                f"{format_size(high - border)} at {border:x}, committed from its start, {context}",
            )


def _class_space(process: ProcessMappings, low: int, high: int) -> int:
    """Return the start of a class space right behind a heap; `high` if there is none.

    It has 1 GiB from 4 GiB or 32 GiB, or ends at 32 GiB, and begins with a little committed memory.
    """
    border = high - _CLASS_SPACE
    i = process.mapping_at(border)
    if border > low and i is not None and process.start[i] == border:
        canonical = border in {4 * GiB, _COMPRESSED_OOPS_END} or high == _COMPRESSED_OOPS_END
        if canonical and process.perms[i] == RW and process.size(i) <= 4 * MiB:
            return border
    return high


def _zgc_heap(process: ProcessMappings) -> bool:
    """Claim ZGC's heap: mappings of its memfd and the reserved addresses beside them."""
    views = {i for i, name in process.named if name.startswith(_ZGC)}
    if not views:
        return False
    mappings = (i for i in range(len(process.start)) if i in views or _is_reserved(process, i))
    for group in process.group_adjacent(mappings):
        if views.intersection(group):
            process.claim(
                group,
                "JVM heap (ZGC)",
                f"{_ZGC} is mapped, in several views with reserved addresses beside them",
            )
    return True


# -- class data -------------------------------------------------------------------------------


def _archives(process: ProcessMappings) -> list[int]:
    return [i for i, name in process.named if re.search(r"\.jsa( \(deleted\))?$", name)]


def _class_data(process: ProcessMappings) -> None:
    """Claim the CDS archive and the class space right behind it."""
    archives = [i for i in _archives(process) if process.is_unclaimed(i)]
    if not archives:
        return
    first, last = archives[0], archives[-1]
    name = f"{process.names[first]} is mapped"
    process.claim(archives, _CDS, name)
    i = process.mapping_after(last)
    if i is not None and _is_hotspot_memory(process, i) and process.size(i) < 16 * MiB:
        process.claim([i], _CDS, name)
        last = i
    low = process.end[last]
    high = _hotspot_end(process, last, low + _CLASS_SPACE)
    if high > low:
        process.claim_range(
            low,
            high,
            "JVM class space",
            f"{format_size(high - low)} right behind the CDS archive, committed from its start",
        )


def _hotspot_end(process: ProcessMappings, i: int, limit: int) -> int:
    """Return the end of HotSpot's adjacent memory above a mapping, at most `limit`."""
    end = process.end[i]
    while (
        end < limit
        and (j := process.mapping_after(i)) is not None
        and _is_hotspot_memory(process, j)
    ):
        i, end = j, min(process.end[j], limit)
    return end


def _metaspace(process: ProcessMappings, context: str) -> None:
    """Claim metaspace nodes: 64 MiB, committed in pieces that begin at root chunks."""
    for group in _hotspot_groups(process):
        top = process.end[group[-1]]
        low = top - _METASPACE_NODE
        chunks = {process.start[i] for i in group if process.perms[i] == RW}
        inside = (
            process.start[group[0]] <= low and process.perms[process.mappings_in(low, top)[0]] == RW
        )
        if low % _ROOT_CHUNK == 0 and inside and low + _ROOT_CHUNK in chunks:
            process.claim_range(
                low,
                top,
                "JVM metaspace",
                "a node of 64 MiB, committed in pieces from its root chunks of 4 MiB on, "
                f"{context}",
            )


# -- the rest ---------------------------------------------------------------------------------


def _other_reservations(process: ProcessMappings, context: str) -> None:
    """Claim HotSpot's other reservations: the collector's tables, a heap above 32 GiB."""
    if not process.knows_flags:
        return
    name, evidence = (
        "JVM other reservations",
        f"reserved without charge (nr), committed piece by piece, {context}",
    )
    for group in _hotspot_groups(process):
        reserved = [i for i in group if process.perms[i] == NONE]
        if not reserved:
            continue
        # A writable mapping below the first reserved one is HotSpot's only if it has the alignment
        # of large mappings: malloc's blocks may be right below.
        low = reserved[0]
        if low > group[0] and process.start[low - 1] % (2 * MiB) == 0:
            low -= 1
        process.claim(range(low, reserved[-1] + 1), name, evidence)
    # Reservations that merged with the inaccessible tail of a malloc heap.
    for i in list(process.claims.parts):
        if _is_reserved(process, i):
            process.claim_range(process.start[i], process.end[i], name, evidence)
