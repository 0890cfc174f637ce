"""V8 in Node.js and Chromium: its heap, code and WebAssembly memories; PartitionAlloc's pools."""

from pyreserve.procmem.judge.owners.process import NONE, RWX, ProcessMappings
from pyreserve.units import GiB, KiB, MiB, TiB, format_size

_PROGRAMS = r"node$|nodejs$|node-v|deno$|electron|chrom|d8$|workerd|libnode\.so|libv8"
_CODE_RANGE = 512 * MiB  # kMaximalCodeRangeSize, V8 src/common/globals.h, x86-64


def v8(process: ProcessMappings) -> None:
    """Claim V8's memory, which is not inherited by children (``dc``)."""
    program = process.runs_code_of(_PROGRAMS)
    if program is None or not process.knows_flags:
        return
    # V8's pages are charged since Node.js 24; in Chromium the kernel may name V8's code [heap].
    v8_mappings = [
        i
        for i in process.unclaimed()
        if process.has_flags(i, "dc") and process.lacks_flags(i, "dd nh")
    ]
    code = [i for i in process.named_by_kernel("[heap]") if process.perms[i] == RWX]
    process.claim(code, "V8 code range", f"writable and executable; {program} is mapped")
    _code_range(process, set(v8_mappings), program)
    for group in process.group_adjacent([i for i in v8_mappings if process.is_unclaimed(i)]):
        no_access = sum(process.size(i) for i in group if process.perms[i] == NONE)
        if no_access >= 4 * GiB:
            process.claim(
                group,
                "V8 WebAssembly memories and guards",
                "4 GiB and more without access, around the used part: V8 reserves some 10 GiB for "
                f"each memory, so that compiled code need not check bounds; {program} is mapped",
            )
        else:
            process.claim(
                group,
                "V8 heap",
                f"not inherited by children (dc), like V8's heap; {program} is mapped",
            )
    _sandbox(process, program)


def _code_range(process: ProcessMappings, v8_mappings: set[int], program: str) -> None:
    for i in sorted(v8_mappings):
        if process.perms[i] != RWX or not process.is_unclaimed(i):
            continue
        first = i
        while (
            first - 1 in v8_mappings
            and process.end[first - 1] == process.start[first]
            and (process.start[i] - process.start[first - 1] <= 64 * KiB)
        ):
            first -= 1
        low = process.start[first]
        process.claim(
            (
                j
                for j in process.mappings_in(low, low + _CODE_RANGE)
                if j in v8_mappings and process.end[j] <= low + _CODE_RANGE
            ),
            "V8 code range",
            f"up to {format_size(_CODE_RANGE)} from {low:x} with writable and executable pages; "
            f"{program} is mapped",
        )


def _sandbox(process: ProcessMappings, program: str) -> None:
    """Claim V8's sandbox and PartitionAlloc's pools in Chromium and Electron."""
    if not process.runs_code_of(r"chrom|electron"):
        return
    for first, last in process.runs:
        run = range(first, last)
        reserved = [i for i in run if process.has_flags(i, "nr dd") and process.perms[i] == NONE]
        if sum(process.size(i) for i in reserved) >= TiB:
            low, high = process.start[reserved[0]], process.end[reserved[-1]]
            process.claim_range(
                low,
                high,
                "V8 sandbox",
                f"{format_size(high - low)} at {low:x}, never charged (nr): the address space that "
                f"V8's pointers are confined to, 1 TiB and its guards; {program} is mapped",
            )
    pools = [i for i in process.unclaimed() if process.lacks_flags(i, "nr dc nh")]
    for group in process.group_adjacent(pools):
        low = process.start[group[0]]
        if low % (32 * GiB) == 0 and process.end[group[-1]] - low == 32 * GiB:
            process.claim(
                group,
                "PartitionAlloc pools",
                f"32 GiB at {low:x}, aligned to 32 GiB: its two core pools; {program} is mapped",
            )
