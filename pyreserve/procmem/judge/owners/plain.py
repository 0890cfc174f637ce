"""Owners that any process has: files, shared memory, stacks, the heap, the kernel."""

import re

from pyreserve.procmem.judge.classes import is_shared_memory
from pyreserve.procmem.judge.owners.sight import NONE, RW, UNKNOWN, Sight, count
from pyreserve.procmem.read.maps import FLAGS, WRITE, written
from pyreserve.procmem.read.snapshot import STACK_LEAST
from pyreserve.units import GiB, KiB, MiB, format_size

_BSS_MOST, _BSS_SMALL = 8 * MiB, 256 * KiB
_GUARD_MOST = 64 * KiB
_GETRANDOM_MOST = MiB  # 144 bytes a thread


def kernel_pages(sight: Sight) -> None:
    """Claim what the kernel maps into every process, and the first stack."""
    pages = sight.called("[vdso", "[vvar", "[uprobes", "[sigpage", "[vectors")
    sight.claim(
        (i for i in pages if not sight.perms[i] & WRITE),
        "kernel pages (vdso, vvar)",
        "read-only, with a name that the kernel gives",
    )
    stack = (i for i in sight.called("[stack]") if sight.perms[i] & RW == RW)
    sight.claim(stack, "main stack", "the kernel names it [stack]")


def getrandom_state(sight: Sight) -> None:
    """Claim the pages that glibc keeps the state of the vDSO's getrandom in (2.41, Linux 6.11).

    MAP_DROPPABLE memory (``dp``), which is always ``wf dd nr`` too, and little of it.
    """
    if sight.libc is None or not sight.called("[vdso]"):
        return
    sight.claim(
        (
            i
            for i in sight.unclaimed()
            if sight.perms[i] == RW
            and sight.has(i, "wf dd nr dp")
            and sight.size(i) <= _GETRANDOM_MOST
        ),
        "vDSO getrandom state",
        f"droppable pages (dp), wiped on fork (wf); [vdso] and {sight.libc} are mapped",
    )


_NAMED = re.compile(r"\[anon(?:_shmem)?:(.*)\]", re.DOTALL)
_LABELS = tuple(
    (re.compile(pattern), owner)
    for pattern, owner in (
        (r"glibc: malloc arena", "glibc malloc arenas"),
        (r"glibc: (loader )?malloc", "glibc malloc"),
        (r"glibc: pthread (user )?stack", "thread stacks"),
        (r"[Gg]o: heap", "Go heap arenas"),
        (r"[Gg]o: ", "Go runtime tables"),
        (r"jemalloc", "jemalloc"),
        (r"mimalloc", "mimalloc"),
        (r"tcmalloc", "tcmalloc"),
        (r"(cpython|pymalloc).*(pymalloc|arena)|pymalloc", "pymalloc arenas"),
        (r"partition_alloc", "PartitionAlloc"),
        (r"v8", "V8"),
    )
)


def named(sight: Sight) -> None:
    """Claim what its program has named (prctl(PR_SET_VMA), Linux 5.17, CONFIG_ANON_VMA_NAME)."""
    owners: dict[str, str] = {}
    for i, name in sight.named:
        match = _NAMED.fullmatch(name)
        if match is None or (sight.inode[i] and not name.startswith("[anon_shmem:")):
            continue
        label = written(match[1].strip())
        if label not in owners:
            known = (owner for pattern, owner in _LABELS if pattern.match(label))
            owners[label] = next(known, f"named {label}")
        sight.claim([i], owners[label], f"the program named it [anon:{label}]")


def stacks(sight: Sight) -> None:
    """Claim stacks of threads, their guards included."""
    _stacks_above_guards(sight)
    _stacks_with_hidden_guards(sight)


def _stacks_with_hidden_guards(sight: Sight) -> None:
    """Claim stacks whose guards are in their own mapping (MADV_GUARD_INSTALL, Linux 6.13).

    glibc does so since 2.42, and neighbouring stacks become one mapping. It has VmFlags ``gu``
    since Linux 6.18; before, the lowest page is seen in pagemap (6.15), or the size tells.
    """
    limit = sight.capture.limits.get("stack size", 8 * MiB) or 2 * MiB  # unlimited: 2 MiB
    whole = [limit + guard for guard in (4 * KiB, 16 * KiB, 64 * KiB)]  # a guard is an OS page
    guarded = sight.capture.guarded
    found: list[int] = []
    seen = True
    for i in sight.unclaimed():
        if sight.perms[i] != RW or sight.size(i) <= STACK_LEAST:
            continue
        if sight.knows_flags and (sight.lacks(i, "nh") or not sight.lacks(i, "nr dd dc")):
            continue
        fits = sight.libc is not None and any(sight.size(i) % size == 0 for size in whole)
        has_guard = sight.has(i, "gu") or sight.start[i] in guarded
        if (has_guard or fits) if sight.knows_flags else (has_guard and fits):
            found.append(i)
            seen = seen and has_guard
    sight.claim(
        found,
        "thread stacks",
        f"{count(len(found), 'mapping')} for stacks"
        + (" (nh)" if sight.knows_flags else "")
        + (", guards inside (MADV_GUARD_INSTALL)" if seen else f", each {format_size(limit)}"),
    )


def _stacks_above_guards(sight: Sight) -> None:
    """Claim one guard page without access and, right above it, the stack.

    glibc maps both at once with MAP_STACK, which keeps huge pages away (VmFlags ``nh``) since Linux
    6.7; older kernels show a stack of the limit's size. HotSpot's guard zone is of several pages.
    """
    limit = sight.capture.limits.get("stack size", 8 * MiB) or 2 * MiB  # unlimited: 2 MiB
    java = sight.runs_code_of(r"libjvm\.so") is not None
    start, end, perms, flags = sight.start, sight.end, sight.perms, sight.flags
    stack_flag, other_flags = FLAGS["nh"], FLAGS["nr"] | FLAGS["dd"] | FLAGS["dc"]
    found: list[int] = []
    sizes: dict[int, int] = {}
    all_marked = True
    # The last mapping has nothing above it.
    guards = [
        i
        for i in sight.anonymous[:-1]
        if (java or flags[i + 1] & stack_flag or end[i + 1] - end[i] == limit)
        and perms[i] == NONE
        and perms[i + 1] == RW
        and start[i + 1] == end[i]
    ]
    for i in guards:
        j = i + 1
        guard, stack = end[i] - start[i], end[j] - start[j]
        if flags[j] & stack_flag:
            fits = guard <= _GUARD_MOST and (flags[i] & stack_flag or java)
        else:
            fits = (guard == 4 * KiB and stack == limit) or (
                java and guard <= _GUARD_MOST and guard + stack in {limit, MiB}
            )
        if not fits or (flags[i] | flags[j]) & other_flags:
            continue
        if sight.inode[j] or sight.names[j] or not (sight.free(i) and sight.free(j)):
            continue
        found += [i, j]
        all_marked = all_marked and bool(flags[j] & stack_flag)
        sizes[stack] = sizes.get(stack, 0) + 1
    each = ", ".join(f"{n} of {format_size(size)}" for size, n in sorted(sizes.items())[-3:])
    sight.claim(
        found,
        "thread stacks",
        f"{count(len(found) // 2, 'pair')} of a guard without access and what is readable and "
        f"writable right above it ({each})"
        + (", both mapped for a stack (nh)" if all_marked else ""),
    )


def heap(sight: Sight) -> None:
    """Claim what brk made, ``[heap]``: whose it is depends on the allocator."""
    mine = [i for i in sight.called("[heap]") if sight.perms[i] == RW]
    tcmalloc = sight.runs_code_of(r"libtcmalloc")
    others = tcmalloc or sight.runs_code_of(r"libjemalloc|libmimalloc|libpypy|ld-musl|libhoard")
    if tcmalloc:
        sight.claim(
            mine, "tcmalloc (brk heap)", f"the kernel names it [heap], {tcmalloc} is mapped"
        )
    elif sight.libc and not others:
        evidence = f"the kernel names it [heap], {sight.libc} is mapped"
        sight.claim(mine, "glibc malloc main heap", evidence)
    else:
        sight.claim(mine, "main heap (brk)", "the kernel names it [heap]")


def shared_memory(sight: Sight) -> None:
    """Claim memory that has an inode but no file."""
    postgres = sight.runs_code_of(r"postgres$|postmaster$")
    kinds = (
        ("/SYSV", "System V shared memory"),
        ("/dev/shm/", "POSIX shared memory"),
        ("/memfd:", "memfd"),
        ("/anon_hugepage", "huge pages (hugetlb)"),
        ("anon_inode:", "anonymous inodes"),
        ("/dev/zero", "shared anonymous memory"),
    )
    for i, name in sight.named:
        if not sight.inode[i] or not name.startswith(tuple(start for start, _ in kinds)):
            continue
        for start, owner in kinds:
            if name.startswith(start):
                if postgres and start in {"/dev/zero", "/dev/shm/", "/SYSV"}:
                    sight.claim(
                        [i],
                        "PostgreSQL shared memory",
                        f"{postgres} is mapped and shares {name.removesuffix(' (deleted)')}",
                    )
                else:
                    sight.claim([i], owner, f"the kernel names it {start}")
                break


def files(sight: Sight) -> None:
    """Claim mapped files."""
    mine = _of_files(sight)
    sight.claim(
        mine,
        "mapped files",
        f"their names; {count(len({sight.names[i] for i in mine}), 'file')}, of which "
        f"{len(sight.programs)} with code",
    )


def _of_files(sight: Sight) -> list[int]:
    return [
        i
        for i, name in sight.named
        if sight.inode[i] and name.startswith("/") and not is_shared_memory(name)
    ]


def zeroed_data(sight: Sight) -> None:
    """Claim the zeroed data (.bss) that is mapped behind the writable data of a program's file.

    Other memory may happen to lie there: what is large and full is nobody's, and where Python maps
    arenas what is large.
    """
    most = _BSS_SMALL if sight.runs_code_of(r"(lib)?python\d") else _BSS_MOST
    if sight.is_static:
        most = GiB  # a static program of Go's
    mine = _of_files(sight)
    programs = set(sight.programs)
    program = next((sight.names[i] for i in mine if sight.names[i] in programs), None)
    for i in mine:
        j = sight.next_to(i)
        if j is None or sight.names[i] not in programs or sight.perms[i] != RW:
            continue
        if sight.names[j] or sight.inode[j] or sight.perms[j] != RW or not sight.free(j):
            continue
        size, full = sight.size(j), 4 * sight.table.rss[j] > sight.table.size[j]
        # What is of whole huge pages was put there for their sake, and is no program's data.
        doubtful = size > _BSS_SMALL and (full or size % (2 * MiB) == 0)
        if size > most or doubtful or not sight.lacks(j, "nr dd dc nh"):
            continue
        sight.claim(
            [j],
            "program data (.bss)"
            if sight.names[i] == program
            else "library data (.bss, dynamic loader)",
            "readable and writable memory right behind a file's writable data",
        )


def rest(sight: Sight) -> None:
    """Say of what nobody has claimed why it is hard to tell."""
    owners, parts, size = sight.claims.whole, sight.claims.parts, sight.table.size
    left = [i for i in sight.anonymous if owners[i] is None and i not in parts]
    if not left:
        return
    sizes = [size[i] for i in left]
    largest = max(sizes)
    where = sight.start[left[sizes.index(largest)]]
    perms = sight.perms
    plain = sum([size[i] for i in left if perms[i] == RW])
    sight.claims.evidence[UNKNOWN] = (
        f"{count(len(left), 'anonymous mapping')} of no shape that is known, the largest "
        f"{format_size(largest * KiB)} at {where:x}; {format_size(plain * KiB)} readable and "
        "writable, as malloc's large blocks, Python's arenas and a program's own mmap all look"
    )
