"""Allocators: glibc's arenas, AddressSanitizer."""

from collections.abc import Iterator

from pyreserve._system.maps import FLAGS
from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings, plural
from pyreserve.units import GiB, KiB, MiB, TiB, format_size

_MAX_HEAPS_KIB = 64 * MiB  # 1,024 adjacent full heaps; larger is a sanitizer's shadow
# HEAP_MIN_SIZE, glibc malloc/arena.c; 132 KiB with the default M_TOP_PAD.
_MIN_HEAP = 32 * KiB
_GO_STEP = 4 * MiB  # runtime/malloc.go: growth step of Go's heap


def glibc_arenas(process: ProcessMappings) -> None:
    """Claim the heaps of malloc's thread arenas.

    glibc malloc/arena.c new_heap: HEAP_MAX_SIZE bytes (64 MiB, 32-bit 1 MiB) aligned to their size,
    reserved PROT_NONE and MAP_NORESERVE, read-write from the start as far as needed. Since 2.41
    without MAP_NORESERVE: then glibc must be mapped and the shape complete.
    """
    if process.runs_code_of(r"libmimalloc|ld-musl|libc\.musl"):
        return
    if process.libc is None and not process.knows_flags:
        return
    size = MiB if process.is_32_bit else 64 * MiB
    tails = {low: _heap_tail(process, low, low + size) for low in _heap_candidates(process, size)}
    full_heaps = _full_heaps_below_a_tail(tails, size)
    heaps = [
        low
        for low, tail in tails.items()
        if tail or (tail == 0 and _is_full_heap(process, low, size, full_heaps))
    ]
    charged = not heaps and process.knows_flags and process.libc is not None
    if charged:
        heaps = _charged_heaps(process, size)
    if not heaps:
        return
    evidence = (
        f"{plural(len(heaps), 'range')} of {format_size(size)}, aligned to it: readable and "
        "writable from the start, then without access to the exact end"
        + (", never charged (nr)" if process.knows_flags and not charged else "")
        + (f"; {process.libc} is mapped" if process.libc else "")
    )
    for low in heaps:
        process.claim_range(low, low + size, "glibc malloc arenas", evidence)


def _heap_candidates(
    process: ProcessMappings, size: int, *, charged: bool = False
) -> Iterator[int]:
    """Yield the multiples of `size` inside unclaimed writable mappings."""
    perms, flags = process.perms, process.flags
    never_charged = FLAGS["nr"] if process.knows_flags and not charged else 0
    forbidden = FLAGS["dc"] | FLAGS["dd"] | FLAGS["nh"] | (FLAGS["nr"] if charged else 0)
    last = -1
    size_kib, least_kib = process.table.size, _MIN_HEAP // KiB
    for i in [i for i in process.anonymous if size_kib[i] >= least_kib and perms[i] == RW]:
        if not process.is_unclaimed(i):
            continue
        if flags[i] & (never_charged | forbidden) != never_charged or size_kib[i] > _MAX_HEAPS_KIB:
            continue
        low = -(-process.start[i] // size) * size
        while low < process.end[i]:
            if low != last:
                yield low
            last = low
            low += size


def _full_heaps_below_a_tail(tails: dict[int, int | None], size: int) -> set[int]:
    """Return the full heaps below a partially used one, or below such a full heap."""
    full: set[int] = set()
    for low in sorted(tails, reverse=True):
        if tails[low] == 0 and (tails.get(low + size) or low + size in full):
            full.add(low)
    return full


def _is_full_heap(process: ProcessMappings, low: int, size: int, full_heaps: set[int]) -> bool:
    """Return whether a candidate without a tail is a full heap.

    A writable mapping must begin at it, and it must be below a partially used heap; 32-bit heaps
    are small and not adjacent.
    """
    i = process.mapping_at(low)
    return (
        i is not None and not process.start[i] % size and (process.is_32_bit or low in full_heaps)
    )


def _charged_heaps(process: ProcessMappings, size: int) -> list[int]:
    """Return heaps as glibc maps them since 2.41, with the flags of ordinary memory.

    The tail must end with the range and never have been writable (no ``ac``), and the address must
    be the kernel's choice: above a third of the address space (TASK_UNMAPPED_BASE). A head that is
    a multiple of Go's growth step may be a Go arena.
    """
    heaps: set[int] = set()
    for low in sorted(_heap_candidates(process, size, charged=True), reverse=True):
        last = process.mapping_at(low + size - 1)
        if last is None or process.end[last] != low + size or 3 * low < process.highest_end:
            continue
        tail = _heap_tail(process, low, low + size, charged=True)
        if tail:
            is_heap = (size - tail) % _GO_STEP != 0 and process.lacks_flags(last, "ac")
        else:
            # A full heap: a program's own mapping would have merged with the heap above.
            is_heap = tail == 0 and process.start[last] == low and low + size in heaps
        if is_heap:
            heaps.add(low)
    return sorted(heaps)


def _heap_tail(
    process: ProcessMappings, low: int, high: int, *, charged: bool = False
) -> int | None:
    """Return the bytes of a heap's inaccessible tail; None if [low, high) is not like a heap."""
    covered = low
    tail = used = 0
    for i in process.mappings_in(low, high):
        if (
            process.start[i] > covered
            or process.names[i]
            or process.inode[i]
            or not process.is_unclaimed(i)
        ):
            return None
        if process.knows_flags and not process.is_plain(i, never_charged=not charged):
            return None
        if process.perms[i] == RW and not tail:
            used += process.table.rss[i] + process.table.swap[i]
        elif process.perms[i] == NONE and covered >= low + _MIN_HEAP:
            if process.end[i] > high and not process.knows_flags:
                return None  # maybe another owner's; with flags known, it merged with a neighbour
            tail += min(high, process.end[i]) - process.start[i]
        else:
            return None
        covered = process.end[i]
    if covered < high:
        return None
    # Heaps grow on use: the header is touched, and a part of a large or full heap.
    writable = (high - low - tail) // KiB
    share = 4 if not tail else 32 if writable > MiB // KiB else writable
    return tail if used * share >= writable else None


# Ranges of the shadow and addresses of the allocator (compiler-rt/lib/asan/asan_mapping.h,
# asan_allocator.h), x86-64, then i386.
_SHADOWS = ((0x7FFF7000, 0x10007FFF8000), (0x1FFFF000, 0x40000000))
_ALLOCATORS = (0x600000000000, 0x500000000000)
_ALLOCATOR = 4 * TiB  # kAllocatorSize on x86-64


def address_sanitizer(process: ProcessMappings) -> None:
    """Claim AddressSanitizer's shadow and allocator, which have fixed addresses."""
    for low, high in _SHADOWS:
        inside = process.mappings_in(low, high)
        if not inside or (process.start[inside[0]], process.end[inside[-1]]) != (low, high):
            continue
        if any(process.names[i] or process.inode[i] for i in inside) or any(
            process.end[i] != process.start[i + 1] for i in inside[:-1]
        ):
            continue
        evidence = f"all of {low:x}-{high:x} is mapped, where its shadow is"
        shadow = [i for i in inside if process.perms[i] != NONE]
        process.claim(shadow, "AddressSanitizer shadow", f"{evidence}, one byte for each eight")
        process.claim(inside, "AddressSanitizer shadow gap", f"{evidence}: the part without access")
        run = _asan_allocator(process)
        if run is not None:
            base, end = process.start[run[0]], process.end[run[1] - 1]
            process.claim(
                range(*run),
                "AddressSanitizer allocator",
                f"{format_size(end - base)} at {base:x}, beside its shadow",
            )
        return


def _asan_allocator(process: ProcessMappings) -> tuple[int, int] | None:
    """Return the run [i, j) of the allocator, at its fixed address or where the kernel put it.

    GCC 16 lets the kernel choose the address, so that other mappings may be adjacent.
    """
    sizes = {(i, j): process.end[j - 1] - process.start[i] for i, j in process.runs}
    fixed = (run for run in sizes if process.start[run[0]] in _ALLOCATORS)
    chosen = (run for run, nbytes in sizes.items() if nbytes < _ALLOCATOR + GiB)
    return next((run for run in (*fixed, *chosen) if sizes[run] >= _ALLOCATOR), None)
