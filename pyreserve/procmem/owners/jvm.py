"""HotSpot's heap, class data, code cache and other reservations, in processes that run libjvm."""

import re

from pyreserve.procmem.owners.sight import NONE, RW, RWX, Sight
from pyreserve.units import GiB, MiB, format_size

_LOW = 32 * GiB  # compressed pointers to objects reach so far
_ZGC = "/memfd:java_heap"


def jvm(sight: Sight) -> None:
    """Claim them, each by its own shape; HotSpot reserves with MAP_NORESERVE (``nr``)."""
    library = sight.runs_code_of(r"libjvm\.so$")
    if library is None:
        return
    _code_cache(sight, library)
    _class_data(sight)
    _heap(sight, library)
    _others(sight, library)


def _is_committed(sight: Sight, i: int) -> bool:
    return sight.perms[i] == RW and sight.lacks(i, "nr dc dd nh")


def _is_reserved(sight: Sight, i: int) -> bool:
    if sight.perms[i] != NONE:
        return False
    return sight.has(i, "nr") and sight.lacks(i, "dc dd nh") if sight.knows_flags else True


def _code_cache(sight: Sight, library: str) -> None:
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
                f"writable and executable, with reserved memory between, in a process of {library}",
            )
            i = j + 1


def _class_data(sight: Sight) -> None:
    """Claim the CDS archive, the class space behind it and a metaspace node right before it."""
    archives = [
        i for i, name in enumerate(sight.names) if re.search(r"\.jsa( \(deleted\))?$", name)
    ]
    if not archives:
        return
    name = f"{sight.names[archives[0]]} is mapped"
    first, last = archives[0], archives[-1]
    sight.claim(archives, "JVM CDS archive", name)
    i = sight.next_to(last)
    if i is not None and _is_reserved(sight, i) and sight.free(i) and sight.size(i) < 16 * MiB:
        sight.claim([i], "JVM CDS archive", name)
        last = i
    low = sight.end[last]
    high = _reserved_until(sight, last, low + GiB)
    if high > low:
        sight.claim_range(
            low,
            high,
            "JVM class space",
            f"{format_size(high - low)} right behind the CDS archive, committed from its start",
        )
    top = sight.start[first]
    node = sight.between(top - 64 * MiB, top)
    if (
        node
        and sight.end[node[-1]] == top
        and sight.start[node[0]] <= top - 64 * MiB
        and all(_is_committed(sight, i) or _is_reserved(sight, i) for i in node)
        and any(sight.perms[i] == NONE for i in node)
        and not any(sight.names[i] for i in node)
    ):
        sight.claim_range(
            top - 64 * MiB,
            top,
            "JVM metaspace",
            "a node of 64 MiB right before the CDS archive, committed in pieces",
        )


def _reserved_until(sight: Sight, i: int, most: int) -> int:
    """Return where the run of committed and reserved memory behind a mapping ends, or `most`."""
    at = sight.end[i]
    while at < most:
        j = sight.next_to(i)
        if j is None or sight.names[j] or sight.inode[j] or not sight.free(j):
            break
        if not (_is_committed(sight, j) or _is_reserved(sight, j)):
            break
        i, at = j, min(sight.end[j], most)
    return at


def _heap(sight: Sight, library: str) -> None:
    views = [i for i, name in enumerate(sight.names) if name.startswith(_ZGC)]
    if views:
        evidence = f"{_ZGC} is mapped, in views of one memory with reserved addresses beside it"
        for i in views:
            sight.claim([i], "JVM heap (ZGC)", evidence)
            for j in (i - 1, i + 1):
                touching = 0 <= j < len(sight.start) and (
                    sight.end[j] == sight.start[i] or sight.end[i] == sight.start[j]
                )
                if touching and not sight.names[j] and _is_reserved(sight, j):
                    sight.claim([j], "JVM heap (ZGC)", evidence)
        return
    modern = re.search(r"(java|jdk|jre|openjdk)-?(1[7-9]|[2-9]\d)", library) is not None
    for first, last in sight.runs:
        mine = [
            i
            for i in range(first, last)
            if sight.free(i) and (_is_committed(sight, i) or _is_reserved(sight, i))
        ]
        if not mine or sight.start[mine[0]] >= _LOW:
            continue
        size = sight.end[mine[-1]] - sight.start[mine[0]]
        if size < 8 * MiB or sight.start[mine[0]] % MiB:
            continue
        # Before JDK 17 the class space may lie right behind the heap, with no border to see.
        both = size > GiB and not modern
        sight.claim(
            mine,
            "JVM heap and class space" if both else "JVM heap",
            f"{format_size(size)} at {sight.start[mine[0]]:x}, below 32 GiB, where compressed "
            f"pointers reach, in a process of {library}",
        )


def _others(sight: Sight, library: str) -> None:
    """Claim what else is reserved as HotSpot does: tables of the collector, mostly."""
    if not sight.knows_flags:
        return
    for first, last in sight.runs:
        i = first
        while i < last:
            j = i
            while (
                j < last and sight.free(j) and (_is_committed(sight, j) or _is_reserved(sight, j))
            ):
                j += 1
            group = range(i, j)
            reserved = [k for k in group if sight.perms[k] == NONE]
            if reserved:
                # What is writable belongs to it only between and right before what is reserved.
                low = max(group[0], reserved[0] - 1)
                sight.claim(
                    range(low, reserved[-1] + 1),
                    "JVM other reservations (GC tables)",
                    f"reserved without charge (nr), committed with it, in a process of {library}",
                )
            i = max(j, i + 1)
