"""Allocators told by their maps: glibc's arenas, jemalloc, mimalloc, AddressSanitizer."""

from collections.abc import Iterator

from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings, plural
from pyreserve.procmem.read.maps import FLAGS
from pyreserve.units import GiB, KiB, MiB, TiB, format_size

_MOST_KIB = 64 * MiB  # 1,024 full heaps side by side: more would be a sanitizer's shadow
# HEAP_MIN_SIZE, glibc malloc/arena.c; with M_TOP_PAD as it is by default, 132 KiB.
_LEAST = 32 * KiB
_GO_STEP = 4 * MiB  # runtime/malloc.go: by how much Go's heap grows


def glibc_arenas(process: ProcessMappings) -> None:
    """Claim heaps of malloc's arenas for threads.

    glibc malloc/arena.c new_heap: HEAP_MAX_SIZE bytes aligned to as many, reserved PROT_NONE and
    MAP_NORESERVE, readable and writable from the start on as far as it was needed: 64 MiB, on 32
    bits 1 MiB. Since 2.41 without MAP_NORESERVE: then glibc must be mapped and the shape be whole.
    """
    if process.runs_code_of(r"libmimalloc|ld-musl|libc\.musl"):
        return
    if process.libc is None and not process.knows_flags:
        return
    size = MiB if process.is_32_bit else 64 * MiB
    tails = {low: _heap_tail(process, low, low + size) for low in _aligned(process, size)}
    below_a_tail = _below_a_tail(tails, size)
    heaps = [
        low
        for low, tail in tails.items()
        if tail or (tail == 0 and _is_full_heap(process, low, size, below_a_tail))
    ]
    charged = not heaps and process.knows_flags and process.libc is not None
    if charged:
        heaps = _charged_heaps(process, size)
    if not heaps:
        return
    evidence = (
        f"{plural(len(heaps), 'range')} of {format_size(size)}, aligned to it: readable and "
        "writable from the start, no access to exactly the end"
        + (", never charged (nr)" if process.knows_flags and not charged else "")
        + (f"; {process.libc} is mapped" if process.libc else "")
    )
    for low in heaps:
        process.claim_range(low, low + size, "glibc malloc arenas", evidence)


def _aligned(process: ProcessMappings, size: int, *, charged: bool = False) -> Iterator[int]:
    """Yield the multiples of `size` at which something writable begins or goes on."""
    perms, flags = process.perms, process.flags
    never_charged = FLAGS["nr"] if process.knows_flags and not charged else 0
    other = FLAGS["dc"] | FLAGS["dd"] | FLAGS["nh"] | (FLAGS["nr"] if charged else 0)
    last = -1
    size_kib, least_kib = process.table.size, _LEAST // KiB
    for i in [i for i in process.anonymous if size_kib[i] >= least_kib and perms[i] == RW]:
        if not process.is_unclaimed(i):
            continue
        if flags[i] & (never_charged | other) != never_charged or size_kib[i] > _MOST_KIB:
            continue
        at = -(-process.start[i] // size) * size
        while at < process.end[i]:
            if at != last:
                yield at
            last = at
            at += size


def _below_a_tail(tails: dict[int, int | None], size: int) -> set[int]:
    """Return the heaps without a tail whose next one above that is not full has one."""
    found: set[int] = set()
    for low in sorted(tails, reverse=True):
        if tails[low] == 0 and (tails.get(low + size) or low + size in found):
            found.add(low)
    return found


def _is_full_heap(process: ProcessMappings, low: int, size: int, below_a_tail: set[int]) -> bool:
    """Tell whether a heap without a tail, which tells little alone, is one of an arena's.

    What is writable begins at a heap, and the next above it that is not full has a tail; on 32 bits
    heaps are small and lie apart.
    """
    i = process.mapping_at(low)
    return (
        i is not None and not process.start[i] % size and (process.is_32_bit or low in below_a_tail)
    )


def _charged_heaps(process: ProcessMappings, size: int) -> list[int]:
    """Find heaps as glibc maps them since 2.41: their flags are those of any memory.

    So the tail must end with the range and never have been writable (no ``ac``), and the kernel
    must have chosen the place: above a third of the addresses (TASK_UNMAPPED_BASE). A head of whole
    steps of Go's may be an arena of Go's.
    """
    heaps: set[int] = set()
    for low in sorted(_aligned(process, size, charged=True), reverse=True):
        last = process.mapping_at(low + size - 1)
        if last is None or process.end[last] != low + size or 3 * low < process.highest_end:
            continue
        tail = _heap_tail(process, low, low + size, charged=True)
        if tail:
            is_heap = (size - tail) % _GO_STEP != 0 and process.lacks_flags(last, "ac")
        else:
            # A full heap. What a program maps below another heap becomes one mapping with that.
            is_heap = tail == 0 and process.start[last] == low and low + size in heaps
        if is_heap:
            heaps.add(low)
    return sorted(heaps)


def _heap_tail(
    process: ProcessMappings, low: int, high: int, *, charged: bool = False
) -> int | None:
    """Return the inaccessible bytes at the end of what looks like a heap; None if it does not."""
    at = low
    tail = used = 0
    for i in process.mappings_in(low, high):
        if (
            process.start[i] > at
            or process.names[i]
            or process.inode[i]
            or not process.is_unclaimed(i)
        ):
            return None
        if process.knows_flags and not process.is_plain(i, never_charged=not charged):
            return None
        if process.perms[i] == RW and not tail:
            used += process.table.rss[i] + process.table.swap[i]
        elif process.perms[i] == NONE and at >= low + _LEAST:
            if process.end[i] > high and not process.knows_flags:
                return None  # perhaps of something else: with flags, it has merged with a neighbour
            tail += min(high, process.end[i]) - process.start[i]
        else:
            return None
        at = process.end[i]
    if at < high:
        return None
    # It was grown because it was used: by its header at least, and in part if it is large or full.
    writable = (high - low - tail) // KiB
    share = 4 if not tail else 32 if writable > MiB // KiB else writable
    return tail if used * share >= writable else None


def mimalloc(process: ProcessMappings) -> None:
    """Claim what mimalloc has: all that is never charged, or in its range of hints.

    mimalloc src/os.c asks for addresses from 2 TiB up to 30 TiB.
    """
    library = process.runs_code_of(r"libmimalloc")
    if library is None:
        return
    process.claim(
        (
            i
            for i in process.unclaimed()
            if (
                process.is_never_charged(i)
                if process.knows_flags
                else 2 * TiB <= process.start[i] < 30 * TiB
            )
        ),
        "mimalloc",
        f"{library} is mapped, and these are "
        + ("never charged (nr)" if process.knows_flags else "where it asks for addresses"),
    )


def jemalloc(process: ProcessMappings) -> None:
    """Claim what jemalloc has: it maps its extents readable and writable and MAP_NORESERVE."""
    library = process.runs_code_of(r"libjemalloc")
    if library is None or not process.knows_flags:
        return
    process.claim(
        (i for i in process.unclaimed() if process.perms[i] == RW and process.is_never_charged(i)),
        "jemalloc",
        f"{library} is mapped, and these are readable, writable and never charged (nr)",
    )


# Where shadow begins and ends, and where the allocator may (compiler-rt/lib/asan/asan_mapping.h,
# asan_allocator.h; x86-64, then i386).
_SHADOWS = ((0x7FFF7000, 0x10007FFF8000), (0x1FFFF000, 0x40000000))
_ALLOCATORS = (0x600000000000, 0x500000000000)
_ALLOCATOR = 4 * TiB  # kAllocatorSize on x86-64


def address_sanitizer(process: ProcessMappings) -> None:
    """Claim AddressSanitizer's shadow and allocator, at addresses that its code fixes."""
    for low, high in _SHADOWS:
        inside = process.mappings_in(low, high)
        if not inside or (process.start[inside[0]], process.end[inside[-1]]) != (low, high):
            continue
        if any(process.names[i] or process.inode[i] for i in inside) or any(
            process.end[i] != process.start[i + 1] for i in inside[:-1]
        ):
            continue
        where = f"all of {low:x}-{high:x} is mapped, where its shadow is"
        shadow = [i for i in inside if process.perms[i] != NONE]
        process.claim(shadow, "AddressSanitizer shadow", f"{where}, a byte for each eight")
        process.claim(inside, "AddressSanitizer shadow gap", f"{where}: the part without access")
        run = _sanitizers_allocator(process)
        if run is not None:
            base, end = process.start[run[0]], process.end[run[1] - 1]
            process.claim(
                range(*run),
                "AddressSanitizer allocator",
                f"{format_size(end - base)} at {base:x}, beside its shadow",
            )
        return


def _sanitizers_allocator(process: ProcessMappings) -> tuple[int, int] | None:
    """Find the allocator's addresses: where its code fixes them, else where the kernel put them.

    GCC 16's leaves the place to the kernel, which may put other mappings right beside it.
    """
    sizes = {(i, j): process.end[j - 1] - process.start[i] for i, j in process.runs}
    fixed = (run for run in sizes if process.start[run[0]] in _ALLOCATORS)
    chosen = (run for run, nbytes in sizes.items() if nbytes < _ALLOCATOR + GiB)
    return next((run for run in (*fixed, *chosen) if sizes[run] >= _ALLOCATOR), None)
