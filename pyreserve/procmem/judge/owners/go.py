"""Go's heap, recognised by the arithmetic of its layouts; also pyreserve arenas that use them."""

from pyreserve import layouts
from pyreserve.layouts import Layout, Piece, Placement
from pyreserve.procmem.judge.owners.claims import NamedRange
from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings
from pyreserve.units import MiB, format_size

_HINT = 0xC0 << 32
_HINT_MASK = (1 << 40) - 1
_ARENA, _ARENA_32 = 64 * MiB, 4 * MiB
# Page summaries that Go 1.14 and later reserve for 48-bit addresses: 8 bytes for each of 2^14,
# 2^17, 2^20, 2^23 and 2^26 chunks (src/runtime/mpagealloc_64bit.go), and since 1.19 an index of
# 8 MiB or less for the scavenger. Go 1.26 and later reserve another 512 MiB.
_SUMMARY_SIZES = (512 * MiB, 1024 * MiB)  # minimum without access, before and since Go 1.26

# One layout of each group that looks the same in maps.
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
    """Claim Go's heap of any release, and in a static program the runtime's tables."""
    hinted = _runs_at_hints(process)
    has_heap = _contiguous_heap(process, hinted) or _arena_heap(process, hinted)
    if has_heap and process.is_static:
        process.claim(
            process.unclaimed(),
            "Go runtime tables",
            "the rest of a program that maps no C library, so that only Go's runtime maps memory",
        )


def _runtime_name(process: ProcessMappings, low: int) -> str:
    """Return ``Go``, or ``pyreserve Go`` for a heap excluded from core dumps (dd) by pyreserve."""
    i = process.mapping_at(low)
    if (
        process.pyreserve
        and i is not None
        and (not process.knows_flags or process.has_flags(i, "dd"))
    ):
        return "pyreserve Go"
    return "Go"


# -- up to Go 1.10: spans, bitmap and arena in one range --------------------------------------


def _contiguous_heap(process: ProcessMappings, hinted: list[int]) -> bool:
    for placement in _candidate_placements(process, hinted):
        expected = placement.maps()
        if not expected or _mapped_ranges(
            process, placement.start, placement.end
        ) != _expected_ranges(expected):
            continue
        layout = placement.layout
        runtime = _runtime_name(process, placement.start)
        used = placement.used
        evidence = (
            f"its parts lie as in the layout {layout.name} ({_RELEASES[layout.name]}) with "
            f"{format_size(used)} of arena in use: the bitmap ends at {placement.arena_start:x} "
            f"and has {layout.bitmap_bits} bits for each word of arena, spans a word for each page"
        )
        for part, (low, high) in (
            ("spans", placement.spans),
            ("bitmap", placement.bitmap),
            ("arena", placement.arena),
        ):
            low = placement.start if part == "spans" else low  # noqa: PLW2901
            span = f"{low:x}-{high:x}"
            process.claim_range(
                low,
                high,
                f"{runtime} {part}",
                f"{span}: {evidence}" if part == "arena" else f"{span} of the arena's layout",
            )
        process.claims.ranges += [NamedRange(*piece) for piece in expected]
        return True
    return False


def _candidate_placements(process: ProcessMappings, hinted: list[int]) -> list[Placement]:
    """Return the placements of old layouts that start at some mapping."""
    placements = []
    for i in hinted:
        placements += [_placement_at(process, layout, process.start[i]) for layout in _CONTIGUOUS]
    for first, last in process.runs:
        if process.start[first] >= 1 << 32:
            break
        for i in range(first, last):
            if process.start[i] % MiB == 0 and process.perms[i] == RW:
                placements += [
                    _placement_at(process, layout, process.start[i], process.end[last - 1])
                    for layout in _WINDOWED
                ]
    return [placement for placement in placements if placement is not None]


def _runs_at_hints(process: ProcessMappings) -> list[int]:
    return [first for first, _ in process.runs if process.start[first] & _HINT_MASK == _HINT]


def _placement_at(
    process: ProcessMappings, layout: Layout, low: int, end: int | None = None
) -> Placement | None:
    """Place a layout at `low`, with an arena used to the end of the writable mappings there."""
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
        placement = placement._replace(arena_end=end, owned=((low, end),))
    used = process.end[i] - placement.arena_start
    return placement.advanced(used) if placement.fits(used) else None


def _mapped_ranges(process: ProcessMappings, low: int, high: int) -> list[tuple[int, int, bool]]:
    """Return the mappings in [low, high) as merged ranges (start, end, writable).

    The list is empty if a mapping is of a file or has access other than read-write or none.
    """
    pieces = []
    for i in process.mappings_in(low, high):
        if process.inode[i] or process.perms[i] not in {RW, NONE}:
            return []
        pieces.append((process.start[i], process.end[i], process.perms[i] == RW))
    return _merge_adjacent(pieces)


def _expected_ranges(pieces: list[Piece]) -> list[tuple[int, int, bool]]:
    return _merge_adjacent([(piece.start, piece.end, piece.perms == "rw-p") for piece in pieces])


def _merge_adjacent(pieces: list[tuple[int, int, bool]]) -> list[tuple[int, int, bool]]:
    joined: list[tuple[int, int, bool]] = []
    for start, end, writable in pieces:
        if joined and joined[-1][1:] == (start, writable):
            joined[-1] = (joined[-1][0], end, writable)
        else:
            joined.append((start, end, writable))
    return joined


# -- since Go 1.11: arenas of 64 MiB, tables elsewhere ----------------------------------------


def _arena_heap(process: ProcessMappings, hinted: list[int]) -> bool:
    tables = [] if process.is_32_bit else _page_summaries(process)
    static = process.is_static and not process.named_by_kernel("[heap]")
    if not tables and not static:
        return False
    table_mappings = set(tables)
    runs = [run for run in _plain_runs(process) if not table_mappings.intersection(run)]
    if process.is_32_bit:
        heaps = [run for run in runs if static and _is_32_bit_heap(process, run)]
        release, reason = (
            "1.11 or later, 32 bits",
            "the first reservation of 32-bit Go, 512 MiB and more",
        )
    else:
        heaps = [run for run in runs if _is_aligned(process, run)]
        firsts = {run[0] for run in heaps}
        if not tables:
            heaps = [run for run in heaps if firsts.intersection(hinted)]
            release, reason = (
                "1.11 to 1.13",
                "from Go's first hint, without page summaries beside it",
            )
        elif firsts.intersection(hinted):
            release, reason = "1.14 or later", "from Go's first hint, with page summaries beside it"
        else:
            release, reason = "1.26 or later", "at a random address, with page summaries beside it"
    if not heaps:
        return False
    size = sum(process.end[heap[-1]] - process.start[heap[0]] for heap in heaps)
    for heap in heaps:
        process.claim(
            heap,
            f"Go heap arenas (Go {release})",
            f"{format_size(size)} from {process.start[heaps[0][0]]:x}, in whole arenas, {reason}",
        )
    process.claim(
        tables,
        "Go runtime tables",
        "page summaries, 585 MiB reserved for 48-bit addresses (since Go 1.26 512 MiB more), and "
        "the mappings between them",
    )
    return True


def _plain_runs(process: ProcessMappings, least: int = 0) -> list[range]:
    """Return unclaimed runs with the flags of Go's memory: neither nr nor dd nor dc."""
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
    """Return whether a run consists of whole 64 MiB arenas."""
    return process.start[run[0]] % _ARENA == 0 == process.end[run[-1]] % _ARENA


def _is_32_bit_heap(process: ProcessMappings, run: range) -> bool:
    """Return whether a run has the size of sysReserve's first reservation plus alignment."""
    size = process.end[run[-1]] - process.start[run[0]]
    return (
        process.start[run[0]] % _ARENA_32 == 0
        and process.perms[run[0]] == RW
        and any(0 <= size - most <= 8 * MiB for most in (512 * MiB, 256 * MiB, 128 * MiB))
    )


def _page_summaries(process: ProcessMappings) -> list[int]:
    """Return the mappings of the page summaries: runs with the right size without access.

    They have five levels, each committed in part; the upper two may be one mapping.
    """
    summaries: list[int] = []
    for run in _plain_runs(process, least=512 * MiB):
        reserved = [process.size(i) for i in run if process.perms[i] == NONE]
        no_access = sum(reserved)
        if len(reserved) < 4 or len(run) - len(reserved) < 4:
            continue  # an ordinary reservation, committed from its start
        if any(size <= no_access <= size + 128 * MiB for size in _SUMMARY_SIZES) and (
            not _is_aligned(process, run)
        ):
            summaries += run
    return summaries
