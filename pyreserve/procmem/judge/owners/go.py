"""Go's heap, told by the arithmetic of its layouts, and pyreserve's where it runs one of them."""

from dataclasses import replace

from pyreserve import layouts
from pyreserve.layouts import Layout, Piece, Placement
from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings
from pyreserve.units import MiB, format_size

_HINT = 0xC0 << 32
_HINT_MASK = (1 << 40) - 1
_ARENA, _ARENA_32 = 64 * MiB, 4 * MiB
# Page summaries that Go 1.14 and later reserve for 48-bit addresses: 8 bytes for each of 2^14,
# 2^17, 2^20, 2^23 and 2^26 chunks (src/runtime/mpagealloc_64bit.go), and since 1.19 an index of
# 8 MiB or less for the scavenger. Go 1.26 and later reserve another 512 MiB.
_SUMMARIES = (512 * MiB, 1024 * MiB)  # the least of them that has no access

# Layouts that differ in nothing that maps show are one row.
_CONTIGUOUS = tuple(
    layouts.get(name)
    for name in ("go-tip-2014-12/amd64", "go1.4/amd64", "go1.5/amd64", "go1.10/amd64")
)
_WINDOWED = tuple(layouts.get(name) for name in ("go1.4/386", "go1.5/386", "fallback"))
_RELEASES = {
    "go-tip-2014-12/amd64": "Go's development tree of December 2014",
    "go1.4/amd64": "Go 1.3 or 1.4",
    "go1.5/amd64": "Go 1.5 or 1.6",
    "go1.10/amd64": "Go 1.7 to 1.10",
    "go1.4/386": "Go 1.4 or earlier, 32 bits",
    "go1.5/386": "Go 1.5 or 1.6, 32 bits",
    "fallback": "Go 1.4 or earlier, after its reservation was refused",
}


def go(process: ProcessMappings) -> None:
    """Claim Go's heap, of whichever generation, and in a static program the runtime's tables."""
    hinted = _at_a_hint(process)
    found = _old_heap(process, hinted) or _new_heap(process, hinted)
    if found and process.is_static:
        process.claim(
            process.unclaimed(),
            "Go runtime tables",
            "the rest of a program that maps no C library, so that only Go's runtime maps memory",
        )


def _whose(process: ProcessMappings, low: int) -> str:
    """Return ``Go``, or ``pyreserve`` where it plays Go: it asks for no core dumps (dd)."""
    i = process.mapping_at(low)
    if (
        process.pyreserve
        and i is not None
        and (not process.knows_flags or process.has_flags(i, "dd"))
    ):
        return "pyreserve Go"
    return "Go"


# -- up to 1.10: spans, bitmap and arena in one range -----------------------------------------


def _old_heap(process: ProcessMappings, hinted: list[int]) -> bool:
    for placement in _candidates(process, hinted):
        expected = placement.maps()
        if not expected or _shown(process, placement.start, placement.end) != _merged(expected):
            continue
        layout = placement.layout
        who = _whose(process, placement.start)
        used = placement.used
        evidence = (
            f"its pieces lie as {layout.name} puts them ({_RELEASES[layout.name]}) with "
            f"{format_size(used)} of arena used: the bitmap ends at {placement.arena_start:x} and "
            f"has {layout.bitmap_bits} bits a word of it, spans a word a page"
        )
        for part, (low, high) in (
            ("spans", placement.spans),
            ("bitmap", placement.bitmap),
            ("arena", placement.arena),
        ):
            low = placement.start if part == "spans" else low  # noqa: PLW2901
            where = f"{low:x}-{high:x}"
            process.claim_range(
                low,
                high,
                f"{who} {part}",
                f"{where}: {evidence}" if part == "arena" else f"{where} of the arena's layout",
            )
        process.ranges += expected
        return True
    return False


def _candidates(process: ProcessMappings, hinted: list[int]) -> list[Placement]:
    """Return placements that some mapping's start and the end of what is writable suggest."""
    found = []
    for i in hinted:
        found += [_used_up_to(process, layout, process.start[i]) for layout in _CONTIGUOUS]
    for first, last in process.runs:
        if process.start[first] >= 1 << 32:
            break
        for i in range(first, last):
            if process.start[i] % MiB == 0 and process.perms[i] == RW:
                found += [
                    _used_up_to(process, layout, process.start[i], process.end[last - 1])
                    for layout in _WINDOWED
                ]
    return [placement for placement in found if placement is not None]


def _at_a_hint(process: ProcessMappings) -> list[int]:
    return [first for first, _ in process.runs if process.start[first] & _HINT_MASK == _HINT]


def _used_up_to(
    process: ProcessMappings, layout: Layout, low: int, end: int | None = None
) -> Placement | None:
    """Place a layout at an address, its arena used as far as what is writable there goes on."""
    placement = layout.place(low)
    i = process.mapping_at(placement.arena_start)
    if i is None or process.perms[i] != RW or process.start[i] >= placement.arena_start:
        return None
    while (
        (j := process.mapping_after(i)) is not None
        and process.perms[j] == RW
        and not process.names[j]
    ):
        i = j
    if end is not None:
        if end < placement.end or (end - placement.end) % (256 * MiB):
            return None
        placement = replace(placement, arena_end=end, owned=((low, end),))
    used = process.end[i] - placement.arena_start
    return placement.advanced(used) if placement.fits(used) else None


def _shown(process: ProcessMappings, low: int, high: int) -> list[tuple[int, int, bool]]:
    """Return what is mapped of a range and whether it is writable, neighbours joined."""
    pieces = []
    for i in process.mappings_in(low, high):
        if process.inode[i] or process.perms[i] not in {RW, NONE}:
            return []
        pieces.append((process.start[i], process.end[i], process.perms[i] == RW))
    return _joined(pieces)


def _merged(pieces: list[Piece]) -> list[tuple[int, int, bool]]:
    return _joined([(piece.start, piece.end, piece.perms == "rw-p") for piece in pieces])


def _joined(pieces: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    joined: list[tuple[int, int, bool]] = []
    for start, end, writable in pieces:
        if joined and joined[-1][1:] == (start, writable):
            joined[-1] = (joined[-1][0], end, writable)
        else:
            joined.append((start, end, writable))
    return joined


# -- since 1.11: arenas of 64 MiB, tables elsewhere -------------------------------------------


def _new_heap(process: ProcessMappings, hinted: list[int]) -> bool:
    tables = [] if process.is_32_bit else _summaries(process)
    static = process.is_static and not process.named_by_kernel("[heap]")
    if not tables and not static:
        return False
    taken = set(tables)
    runs = [run for run in _plain_runs(process) if not taken.intersection(run)]
    if process.is_32_bit:
        heaps = [run for run in runs if static and _is_heap_of_32_bits(process, run)]
        release, why = (
            "1.11 or later, 32 bits",
            "the first reservation of 32-bit Go, 512 MiB and more",
        )
    else:
        heaps = [run for run in runs if _is_aligned(process, run)]
        firsts = {run[0] for run in heaps}
        if not tables:
            heaps = [run for run in heaps if firsts.intersection(hinted)]
            release, why = "1.11 to 1.13", "from Go's first hint, without page summaries beside it"
        elif firsts.intersection(hinted):
            release, why = "1.14 or later", "from Go's first hint, with page summaries beside it"
        else:
            release, why = "1.26 or later", "at a random address, with page summaries beside it"
    if not heaps:
        return False
    size = sum(process.end[heap[-1]] - process.start[heap[0]] for heap in heaps)
    for heap in heaps:
        process.claim(
            heap,
            f"Go heap arenas (Go {release})",
            f"{format_size(size)} from {process.start[heaps[0][0]]:x}, in whole arenas, {why}",
        )
    process.claim(
        tables,
        "Go runtime tables",
        "page summaries, 585 MiB reserved for 48-bit addresses (since Go 1.26 512 MiB more), and "
        "what lies between them",
    )
    return True


def _plain_runs(process: ProcessMappings, least: int = 0) -> list[range]:
    """Return runs of what is mapped as Go maps: charged, for children and for core dumps."""
    return [
        run
        for first, last in process.runs
        if process.end[last - 1] - process.start[first] >= least
        for run in process.group_adjacent(
            i
            for i in range(first, last)
            if process.is_unclaimed(i)
            and process.lacks_flags(i, "nr dd dc")
            and process.perms[i] in {RW, NONE}
        )
    ]


def _is_aligned(process: ProcessMappings, run: range) -> bool:
    """Tell whether a run is of whole arenas of 64 MiB."""
    return process.start[run[0]] % _ARENA == 0 == process.end[run[-1]] % _ARENA


def _is_heap_of_32_bits(process: ProcessMappings, run: range) -> bool:
    """Tell what sysReserve took at first: 512 MiB, 256 or 128 and a bit for the alignment."""
    size = process.end[run[-1]] - process.start[run[0]]
    return (
        process.start[run[0]] % _ARENA_32 == 0
        and process.perms[run[0]] == RW
        and any(0 <= size - most <= 8 * MiB for most in (512 * MiB, 256 * MiB, 128 * MiB))
    )


def _summaries(process: ProcessMappings) -> list[int]:
    """Return the mappings of the page summaries: a run with the right amount without access.

    It is of five levels, each used somewhere, and the uppermost two may be used as one.
    """
    found: list[int] = []
    for run in _plain_runs(process, least=512 * MiB):
        reserved = [process.size(i) for i in run if process.perms[i] == NONE]
        none = sum(reserved)
        if len(reserved) < 4 or len(run) - len(reserved) < 4:
            continue  # reserved, and used from its start on
        if any(size <= none <= size + 128 * MiB for size in _SUMMARIES) and (
            not _is_aligned(process, run)
        ):
            found += run
    return found
