"""Owners in any process: files, stacks, zeroed data, mappings named by their program."""

import re

from pyreserve._system.maps import FLAGS, escape_invalid_utf8
from pyreserve.procmem.judge.classes import is_shared_memory
from pyreserve.procmem.judge.owners.claims import UNKNOWN
from pyreserve.procmem.judge.owners.process import NONE, RW, ProcessMappings, plural
from pyreserve.procmem.judge.owners.rules import owner_named
from pyreserve.procmem.read.snapshot import MIN_STACK
from pyreserve.units import GiB, KiB, MiB, format_size

_MAX_BSS, _SMALL_BSS = 8 * MiB, 256 * KiB
_MAX_GUARD = 64 * KiB
_ANON_NAME = re.compile(r"\[anon(?:_shmem)?:(.*)\]", re.DOTALL)


def named_by_program(process: ProcessMappings) -> None:
    """Claim named mappings (prctl(PR_SET_VMA), Linux 5.17, CONFIG_ANON_VMA_NAME)."""
    owners: dict[str, str] = {}
    for i, name in process.named:
        match = _ANON_NAME.fullmatch(name)
        if match is None or (process.inode[i] and not name.startswith("[anon_shmem:")):
            continue
        label = escape_invalid_utf8(match[1].strip())
        if label not in owners:
            owners[label] = owner_named(label)
        process.claim([i], owners[label], f"the program named it [anon:{label}]")


def stacks(process: ProcessMappings) -> None:
    """Claim thread stacks with their guards."""
    _stacks_above_guards(process)
    _stacks_with_inner_guards(process)


def _stacks_with_inner_guards(process: ProcessMappings) -> None:
    """Claim stacks whose guard is inside the mapping (MADV_GUARD_INSTALL, Linux 6.13).

    glibc uses such guards since 2.42; adjacent stacks merge into one mapping. Evidence is VmFlags
    ``gu`` (Linux 6.18), the lowest page in pagemap (6.15), or the size.
    """
    limit = process.capture.limits.get("stack size", 8 * MiB) or 2 * MiB  # unlimited: 2 MiB
    sizes = [limit + guard for guard in (4 * KiB, 16 * KiB, 64 * KiB)]  # a guard is an OS page
    guarded = process.capture.guarded
    stacks: list[int] = []
    all_guarded = True
    for i in process.unclaimed():
        if process.perms[i] != RW or process.size(i) <= MIN_STACK:
            continue
        if process.knows_flags and (
            process.lacks_flags(i, "nh") or not process.lacks_flags(i, "nr dd dc")
        ):
            continue
        fits = process.libc is not None and any(process.size(i) % size == 0 for size in sizes)
        has_guard = process.has_flags(i, "gu") or process.start[i] in guarded
        if (has_guard or fits) if process.knows_flags else (has_guard and fits):
            stacks.append(i)
            all_guarded = all_guarded and has_guard
    process.claim(
        stacks,
        "thread stacks",
        f"{plural(len(stacks), 'mapping')} for stacks"
        + (" (nh)" if process.knows_flags else "")
        + (
            ", guards inside (MADV_GUARD_INSTALL)"
            if all_guarded
            else f", each {format_size(limit)}"
        ),
    )


def _stacks_above_guards(process: ProcessMappings) -> None:
    """Claim pairs of a guard without access and the stack right above it.

    glibc maps both at once with MAP_STACK, which disables huge pages (VmFlags ``nh``) since Linux
    6.7; on older kernels the stack's size must equal the limit. HotSpot's guard has several pages.
    """
    limit = process.capture.limits.get("stack size", 8 * MiB) or 2 * MiB  # unlimited: 2 MiB
    java = process.runs_code_of(r"libjvm\.so") is not None
    start, end, perms, flags = process.start, process.end, process.perms, process.flags
    stack_flag, other_flags = FLAGS["nh"], FLAGS["nr"] | FLAGS["dd"] | FLAGS["dc"]
    pairs: list[int] = []
    sizes: dict[int, int] = {}
    all_marked = True
    # The last mapping has nothing above it.
    guards = [
        i
        for i in process.anonymous[:-1]
        if (java or flags[i + 1] & stack_flag or end[i + 1] - end[i] == limit)
        and perms[i] == NONE
        and perms[i + 1] == RW
        and start[i + 1] == end[i]
    ]
    for i in guards:
        j = i + 1
        guard, stack = end[i] - start[i], end[j] - start[j]
        if flags[j] & stack_flag:
            fits = guard <= _MAX_GUARD and (flags[i] & stack_flag or java)
        else:
            fits = (guard == 4 * KiB and stack == limit) or (
                java and guard <= _MAX_GUARD and guard + stack in {limit, MiB}
            )
        if not fits or (flags[i] | flags[j]) & other_flags:
            continue
        if (
            process.inode[j]
            or process.names[j]
            or not (process.is_unclaimed(i) and process.is_unclaimed(j))
        ):
            continue
        pairs += [i, j]
        all_marked = all_marked and bool(flags[j] & stack_flag)
        sizes[stack] = sizes.get(stack, 0) + 1
    largest = ", ".join(f"{n} of {format_size(size)}" for size, n in sorted(sizes.items())[-3:])
    process.claim(
        pairs,
        "thread stacks",
        f"{plural(len(pairs) // 2, 'pair')} of a guard without access and a readable and "
        f"writable mapping right above it ({largest})"
        + (", both mapped for a stack (nh)" if all_marked else ""),
    )


def files(process: ProcessMappings) -> None:
    """Claim mapped files."""
    mappings = _file_mappings(process)
    process.claim(
        mappings,
        "mapped files",
        f"their names; {plural(len({process.names[i] for i in mappings}), 'file')}, of which "
        f"{len(process.code_files)} with code",
    )


def _file_mappings(process: ProcessMappings) -> list[int]:
    return [
        i
        for i, name in process.named
        if process.inode[i] and name.startswith("/") and not is_shared_memory(name)
    ]


def bss(process: ProcessMappings) -> None:
    """Claim zeroed data (.bss), mapped right behind the writable data of a program's file.

    Unrelated memory may happen to be there: a large and full mapping stays unknown, and any large
    mapping in a process that runs Python, which maps arenas.
    """
    most = _SMALL_BSS if process.runs_code_of(r"(lib)?python\d") else _MAX_BSS
    if process.is_static:
        most = GiB  # a static Go program
    mappings = _file_mappings(process)
    code_files = set(process.code_files)
    program = next((process.names[i] for i in mappings if process.names[i] in code_files), None)
    for i in mappings:
        j = process.mapping_after(i)
        if j is None or process.names[i] not in code_files or process.perms[i] != RW:
            continue
        if (
            process.names[j]
            or process.inode[j]
            or process.perms[j] != RW
            or not process.is_unclaimed(j)
        ):
            continue
        size, full = process.size(j), 4 * process.table.rss[j] > process.table.size[j]
        # A size of whole huge pages suggests an allocator that aligned it.
        doubtful = size > _SMALL_BSS and (full or size % (2 * MiB) == 0)
        if size > most or doubtful or not process.lacks_flags(j, "nr dd dc nh"):
            continue
        process.claim(
            [j],
            "program data (.bss)"
            if process.names[i] == program
            else "library data (.bss, dynamic loader)",
            "readable and writable memory right behind a file's writable data",
        )


def describe_unknown(process: ProcessMappings) -> None:
    """Describe the mappings that no recogniser claimed."""
    owners, parts, size = process.claims.whole, process.claims.parts, process.table.size
    unclaimed = [i for i in process.anonymous if owners[i] is None and i not in parts]
    if not unclaimed:
        return
    sizes = [size[i] for i in unclaimed]
    largest = max(sizes)
    address = process.start[unclaimed[sizes.index(largest)]]
    perms = process.perms
    plain = sum([size[i] for i in unclaimed if perms[i] == RW])
    process.claims.evidence[UNKNOWN] = (
        f"{plural(len(unclaimed), 'anonymous mapping')} of no known shape, the largest "
        f"{format_size(largest * KiB)} at {address:x}; {format_size(plain * KiB)} readable and "
        "writable, like malloc's large blocks, Python's arenas and a program's own mappings"
    )
