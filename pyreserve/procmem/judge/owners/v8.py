"""V8 in Node.js and Chromium: its pages, code and WebAssembly memories; PartitionAlloc's pools."""

from pyreserve.procmem.judge.owners.sight import NONE, RWX, Sight
from pyreserve.units import GiB, KiB, MiB, TiB, format_size

_PROGRAMS = r"node$|nodejs$|node-v|deno$|electron|chrom|d8$|workerd|libnode\.so|libv8"
_CODE_RANGE = 512 * MiB  # kMaximalCodeRangeSize, V8 src/common/globals.h, x86-64


def v8(sight: Sight) -> None:
    """Claim what V8 maps: not for children (``dc``)."""
    program = sight.runs_code_of(_PROGRAMS)
    if program is None or not sight.knows_flags:
        return
    # Its pages are charged since Node.js 24; in Chromium the kernel may name its code [heap].
    mine = [i for i in sight.unclaimed() if sight.has(i, "dc") and sight.lacks(i, "dd nh")]
    code = [i for i in sight.called("[heap]") if sight.perms[i] == RWX]
    sight.claim(code, "V8 code range", f"writable and executable; {program} is mapped")
    _code_range(sight, set(mine), program)
    for group in sight.neighbours([i for i in mine if sight.free(i)]):
        none = sum(sight.size(i) for i in group if sight.perms[i] == NONE)
        if none >= 4 * GiB:
            sight.claim(
                group,
                "V8 WebAssembly memories and guards",
                "4 GiB and more without access, around what is used: V8 reserves some 10 GiB for "
                f"each memory, so that compiled code need not check bounds; {program} is mapped",
            )
        else:
            sight.claim(
                group,
                "V8 heap",
                f"not for children (dc), as V8 maps; {program} is mapped",
            )
    _sandbox(sight, program)


def _code_range(sight: Sight, mine: set[int], program: str) -> None:
    for i in sorted(mine):
        if sight.perms[i] != RWX or not sight.free(i):
            continue
        first = i
        while (
            first - 1 in mine
            and sight.end[first - 1] == sight.start[first]
            and (sight.start[i] - sight.start[first - 1] <= 64 * KiB)
        ):
            first -= 1
        low = sight.start[first]
        sight.claim(
            (
                j
                for j in sight.between(low, low + _CODE_RANGE)
                if j in mine and sight.end[j] <= low + _CODE_RANGE
            ),
            "V8 code range",
            f"up to {format_size(_CODE_RANGE)} from {low:x} with writable and executable pages; "
            f"{program} is mapped",
        )


def _sandbox(sight: Sight, program: str) -> None:
    """Claim Chromium's largest reservations."""
    if not sight.runs_code_of(r"chrom|electron"):
        return
    for first, last in sight.runs:
        run = range(first, last)
        cage = [i for i in run if sight.has(i, "nr dd") and sight.perms[i] == NONE]
        if sum(sight.size(i) for i in cage) >= TiB:
            low, high = sight.start[cage[0]], sight.end[cage[-1]]
            sight.claim_range(
                low,
                high,
                "V8 sandbox",
                f"{format_size(high - low)} at {low:x}, never charged (nr): the address space that "
                f"V8's pointers are confined to, 1 TiB and its guards; {program} is mapped",
            )
    pools = [i for i in sight.unclaimed() if sight.lacks(i, "nr dc nh")]
    for group in sight.neighbours(pools):
        low = sight.start[group[0]]
        if low % (32 * GiB) == 0 and sight.end[group[-1]] - low == 32 * GiB:
            sight.claim(
                group,
                "PartitionAlloc pools",
                f"32 GiB aligned to as much, at {low:x}: its two core pools; {program} is mapped",
            )
