"""Allocators told by their maps: glibc's arenas, jemalloc, mimalloc, AddressSanitizer."""

from collections.abc import Iterator

from pyreserve.procmem.judge.owners.sight import NONE, RW, Sight, count
from pyreserve.procmem.read.maps import FLAGS
from pyreserve.units import GiB, KiB, MiB, TiB, format_size

_MOST_KIB = 64 * MiB  # 1,024 full heaps side by side: more would be a sanitizer's shadow
# HEAP_MIN_SIZE, glibc malloc/arena.c; with M_TOP_PAD as it is by default, 132 KiB.
_LEAST = 32 * KiB
_GO_STEP = 4 * MiB  # runtime/malloc.go: by how much Go's heap grows


def glibc_arenas(sight: Sight) -> None:
    """Claim heaps of malloc's arenas for threads.

    glibc malloc/arena.c new_heap: HEAP_MAX_SIZE bytes aligned to as many, reserved PROT_NONE and
    MAP_NORESERVE, readable and writable from the start on as far as it was needed: 64 MiB, on 32
    bits 1 MiB. Since 2.41 without MAP_NORESERVE: then glibc must be mapped and the shape be whole.
    """
    if sight.runs_code_of(r"libmimalloc|ld-musl|libc\.musl"):
        return
    if sight.libc is None and not sight.knows_flags:
        return
    size = MiB if sight.narrow else 64 * MiB
    tails = {low: _heap_tail(sight, low, low + size) for low in _aligned(sight, size)}
    below_a_tail = _below_a_tail(tails, size)
    heaps = [
        low
        for low, tail in tails.items()
        if tail or (tail == 0 and _is_full_heap(sight, low, size, below_a_tail))
    ]
    charged = not heaps and sight.knows_flags and sight.libc is not None
    if charged:
        heaps = _charged_heaps(sight, size)
    if not heaps:
        return
    evidence = (
        f"{count(len(heaps), 'range')} of {format_size(size)}, aligned to it: readable and "
        "writable from the start, no access to exactly the end"
        + (", never charged (nr)" if sight.knows_flags and not charged else "")
        + (f"; {sight.libc} is mapped" if sight.libc else "")
    )
    for low in heaps:
        sight.claim_range(low, low + size, "glibc malloc arenas", evidence)


def _aligned(sight: Sight, size: int, *, charged: bool = False) -> Iterator[int]:
    """Yield the multiples of `size` at which something writable begins or goes on."""
    perms, flags = sight.perms, sight.flags
    never_charged = FLAGS["nr"] if sight.knows_flags and not charged else 0
    other = FLAGS["dc"] | FLAGS["dd"] | FLAGS["nh"] | (FLAGS["nr"] if charged else 0)
    last = -1
    size_kib, least_kib = sight.table.size, _LEAST // KiB
    for i in [i for i in sight.anonymous if size_kib[i] >= least_kib and perms[i] == RW]:
        if not sight.free(i):
            continue
        if flags[i] & (never_charged | other) != never_charged or size_kib[i] > _MOST_KIB:
            continue
        at = -(-sight.start[i] // size) * size
        while at < sight.end[i]:
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


def _is_full_heap(sight: Sight, low: int, size: int, below_a_tail: set[int]) -> bool:
    """Tell whether a heap without a tail, which tells little alone, is one of an arena's.

    What is writable begins at a heap, and the next above it that is not full has a tail; on 32 bits
    heaps are small and lie apart.
    """
    i = sight.at(low)
    return i is not None and not sight.start[i] % size and (sight.narrow or low in below_a_tail)


def _charged_heaps(sight: Sight, size: int) -> list[int]:
    """Find heaps as glibc maps them since 2.41: their flags are those of any memory.

    So the tail must end with the range and never have been writable (no ``ac``), and the kernel
    must have chosen the place: above a third of the addresses (TASK_UNMAPPED_BASE). A head of whole
    steps of Go's may be an arena of Go's.
    """
    heaps: set[int] = set()
    for low in sorted(_aligned(sight, size, charged=True), reverse=True):
        last = sight.at(low + size - 1)
        if last is None or sight.end[last] != low + size or 3 * low < sight.top:
            continue
        tail = _heap_tail(sight, low, low + size, charged=True)
        if tail:
            is_heap = (size - tail) % _GO_STEP != 0 and sight.lacks(last, "ac")
        else:
            # A full heap. What a program maps below another heap becomes one mapping with that.
            is_heap = tail == 0 and sight.start[last] == low and low + size in heaps
        if is_heap:
            heaps.add(low)
    return sorted(heaps)


def _heap_tail(sight: Sight, low: int, high: int, *, charged: bool = False) -> int | None:
    """Return the inaccessible bytes at the end of what looks like a heap; None if it does not."""
    at = low
    tail = used = 0
    for i in sight.between(low, high):
        if sight.start[i] > at or sight.names[i] or sight.inode[i] or not sight.free(i):
            return None
        if sight.knows_flags and not sight.is_plain(i, never_charged=not charged):
            return None
        if sight.perms[i] == RW and not tail:
            used += sight.table.rss[i] + sight.table.swap[i]
        elif sight.perms[i] == NONE and at >= low + _LEAST:
            if sight.end[i] > high and not sight.knows_flags:
                return None  # perhaps of something else: with flags, it has merged with a neighbour
            tail += min(high, sight.end[i]) - sight.start[i]
        else:
            return None
        at = sight.end[i]
    if at < high:
        return None
    # It was grown because it was used: by its header at least, and in part if it is large or full.
    writable = (high - low - tail) // KiB
    share = 4 if not tail else 32 if writable > MiB // KiB else writable
    return tail if used * share >= writable else None


def mimalloc(sight: Sight) -> None:
    """Claim what mimalloc has: all that is never charged, or in its range of hints.

    mimalloc src/os.c asks for addresses from 2 TiB up to 30 TiB.
    """
    library = sight.runs_code_of(r"libmimalloc")
    if library is None:
        return
    sight.claim(
        (
            i
            for i in sight.unclaimed()
            if (
                sight.is_never_charged(i)
                if sight.knows_flags
                else 2 * TiB <= sight.start[i] < 30 * TiB
            )
        ),
        "mimalloc",
        f"{library} is mapped, and these are "
        + ("never charged (nr)" if sight.knows_flags else "where it asks for addresses"),
    )


def jemalloc(sight: Sight) -> None:
    """Claim what jemalloc has: it maps its extents readable and writable and MAP_NORESERVE."""
    library = sight.runs_code_of(r"libjemalloc")
    if library is None or not sight.knows_flags:
        return
    sight.claim(
        (i for i in sight.unclaimed() if sight.perms[i] == RW and sight.is_never_charged(i)),
        "jemalloc",
        f"{library} is mapped, and these are readable, writable and never charged (nr)",
    )


# Where shadow begins and ends, and where the allocator may (compiler-rt/lib/asan/asan_mapping.h,
# asan_allocator.h; x86-64, then i386).
_SHADOWS = ((0x7FFF7000, 0x10007FFF8000), (0x1FFFF000, 0x40000000))
_ALLOCATORS = (0x600000000000, 0x500000000000)
_ALLOCATOR = 4 * TiB  # kAllocatorSize on x86-64


def address_sanitizer(sight: Sight) -> None:
    """Claim AddressSanitizer's shadow and allocator, at addresses that its code fixes."""
    for low, high in _SHADOWS:
        inside = sight.between(low, high)
        if not inside or (sight.start[inside[0]], sight.end[inside[-1]]) != (low, high):
            continue
        if any(sight.names[i] or sight.inode[i] for i in inside) or any(
            sight.end[i] != sight.start[i + 1] for i in inside[:-1]
        ):
            continue
        where = f"all of {low:x}-{high:x} is mapped, where its shadow is"
        shadow = [i for i in inside if sight.perms[i] != NONE]
        sight.claim(shadow, "AddressSanitizer shadow", f"{where}, a byte for each eight")
        sight.claim(inside, "AddressSanitizer shadow gap", f"{where}: the part without access")
        run = _sanitizers_allocator(sight)
        if run is not None:
            base, end = sight.start[run[0]], sight.end[run[1] - 1]
            sight.claim(
                range(*run),
                "AddressSanitizer allocator",
                f"{format_size(end - base)} at {base:x}, beside its shadow",
            )
        return


def _sanitizers_allocator(sight: Sight) -> tuple[int, int] | None:
    """Find the allocator's addresses: where its code fixes them, else where the kernel put them.

    GCC 16's leaves the place to the kernel, which may put other mappings right beside it.
    """
    sizes = {(i, j): sight.end[j - 1] - sight.start[i] for i, j in sight.runs}
    fixed = (run for run in sizes if sight.start[run[0]] in _ALLOCATORS)
    chosen = (run for run, nbytes in sizes.items() if nbytes < _ALLOCATOR + GiB)
    return next((run for run in (*fixed, *chosen) if sizes[run] >= _ALLOCATOR), None)
