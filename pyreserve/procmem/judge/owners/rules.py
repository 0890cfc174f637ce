"""The table of owners that are recognised mapping by mapping.

A row states the shape of a mapping and what must be mapped beside it. Owners whose evidence is in
several mappings together have a function of their own, in the module of their kind.
"""

import re
from typing import NamedTuple

from pyreserve._system.maps import EXECUTE, FLAGS, READ, SHARED, WRITE
from pyreserve.procmem.judge.owners.process import LIBC, ProcessMappings
from pyreserve.units import MiB, TiB

_LETTERS = (("r", READ), ("w", WRITE), ("x", EXECUTE), ("s", SHARED))


class Rule(NamedTuple):
    """The shape of an owner's mappings; a field with its default matches anything.

    Attributes:
        owner: name of the owner.
        evidence: a sentence; ``{code}`` is the path that `code` matched, ``{name}`` the name of the
            first mapping.
        names: how the names begin; without names the mappings are anonymous.
        has_inode: mappings of an inode, as shared memory has; else names that the kernel gives to
            private mappings.
        perms: as in /proc/PID/maps, ``?`` for either.
        flags, no_flags: VmFlags that are set, and that are not; if VmFlags are not known, a rule
            with either claims nothing.
        without_flags: only if VmFlags are not known.
        max_size: maximum size in bytes.
        starts: range of addresses where the mappings start.
        code: pattern of the file name of mapped code.
        no_code: pattern that the file name of no mapped code matches.
        beside: the beginning of the name of a kernel's page that must be mapped.
    """

    owner: str
    evidence: str
    names: tuple[str, ...] = ()
    has_inode: bool = False
    perms: str = "????"
    flags: str = ""
    no_flags: str = ""
    without_flags: bool = False
    max_size: int | None = None
    starts: tuple[int, int] | None = None
    code: str = ""
    no_code: str = ""
    beside: str = ""

    def claim(self, process: ProcessMappings) -> None:
        """Claim the mappings of this shape."""
        if process.knows_flags:
            if self.without_flags:
                return
        elif self.flags or self.no_flags:
            return
        code = process.runs_code_of(self.code) if self.code else ""
        if code is None or (self.no_code and process.runs_code_of(self.no_code)):
            return
        if self.beside and not process.named_by_kernel(self.beside):
            return
        mappings = self._select(process)
        if mappings:
            name = process.names[mappings[0]].removesuffix(" (deleted)")
            process.claim(mappings, self.owner, self.evidence.format(code=code, name=name))

    def _select(self, process: ProcessMappings) -> list[int]:
        """Return the unclaimed mappings of this shape."""
        if self.has_inode:
            candidates = [
                i for i, name in process.named if process.inode[i] and name.startswith(self.names)
            ]
        elif self.names:
            candidates = process.named_by_kernel(*self.names)
        else:
            candidates = process.anonymous
        fixed = [
            (bit, bit if letter == expected else 0)
            for (letter, bit), expected in zip(_LETTERS, self.perms, strict=True)
            if expected != "?"
        ]
        mask, value = sum(bit for bit, _ in fixed), sum(bit for _, bit in fixed)
        set_flags = _bits(self.flags)
        flags = set_flags | _bits(self.no_flags)
        low, high = self.starts or (0, 1 << 64)
        return [
            i
            for i in candidates
            if process.perms[i] & mask == value
            and process.is_unclaimed(i)
            and low <= process.start[i] < high
            and (self.max_size is None or process.size(i) <= self.max_size)
            and process.flags[i] & flags == set_flags
        ]


def _bits(codes: str) -> int:
    return sum(FLAGS[code] for code in codes.split())


KERNEL = (
    Rule(
        "kernel pages (vdso, vvar)",
        "read-only, with a name that the kernel gives",
        names=("[vdso", "[vvar", "[uprobes", "[sigpage", "[vectors"),
        perms="?-??",
    ),
    Rule("main stack", "the kernel names it [stack]", names=("[stack]",), perms="rw??"),
)
# 144 bytes for each thread; MAP_DROPPABLE (dp) has wf, dd and nr too (glibc 2.41, Linux 6.11).
GETRANDOM = (
    Rule(
        "vDSO getrandom state",
        "droppable pages (dp), wiped on fork (wf); [vdso] and {code} are mapped",
        perms="rw-p",
        flags="wf dd nr dp",
        max_size=MiB,
        code=LIBC,
        beside="[vdso]",
    ),
)
ALLOCATORS = (
    Rule(
        "mimalloc",
        "{code} is mapped, and these are never charged (nr)",
        flags="nr",
        no_flags="dc dd nh",
        code="libmimalloc",
    ),
    Rule(
        "mimalloc",
        "{code} is mapped, and these are at the addresses that it asks for",
        without_flags=True,
        starts=(2 * TiB, 30 * TiB),  # its hints, mimalloc src/os.c
        code="libmimalloc",
    ),
    Rule(
        "jemalloc",
        "{code} is mapped, and these are readable, writable and never charged (nr)",
        perms="rw-p",
        flags="nr",
        no_flags="dc dd nh",
        code="libjemalloc",
    ),
)


def _shared_memory(owner: str, name: str) -> Rule:
    return Rule(owner, f"the kernel names it {name}", names=(name,), has_inode=True)


SHARED_MEMORY = (
    Rule(
        "PostgreSQL shared memory",
        "{code} is mapped and shares {name}",
        names=("/dev/zero", "/dev/shm/", "/SYSV"),
        has_inode=True,
        code=r"postgres$|postmaster$",
    ),
    _shared_memory("System V shared memory", "/SYSV"),
    _shared_memory("POSIX shared memory", "/dev/shm/"),
    _shared_memory("memfd", "/memfd:"),
    _shared_memory("huge pages (hugetlb)", "/anon_hugepage"),
    _shared_memory("anonymous inodes", "anon_inode:"),
    _shared_memory("shared anonymous memory", "/dev/zero"),
)
BRK_HEAP = (
    Rule(
        "tcmalloc (brk heap)",
        "the kernel names it [heap], {code} is mapped",
        names=("[heap]",),
        perms="rw-p",
        code="libtcmalloc",
    ),
    Rule(
        "glibc malloc main heap",
        "the kernel names it [heap], {code} is mapped",
        names=("[heap]",),
        perms="rw-p",
        code=LIBC,
        no_code="libjemalloc|libmimalloc|libpypy|ld-musl|libhoard",
    ),
    Rule("main heap (brk)", "the kernel names it [heap]", names=("[heap]",), perms="rw-p"),
)
PROGRAM_NAMES = (
    ("glibc: malloc arena", "glibc malloc arenas"),
    ("glibc: (loader )?malloc", "glibc malloc"),
    ("glibc: pthread (user )?stack", "thread stacks"),
    ("[Gg]o: heap", "Go heap arenas"),
    ("[Gg]o: ", "Go runtime tables"),
    ("jemalloc", "jemalloc"),
    ("mimalloc", "mimalloc"),
    ("tcmalloc", "tcmalloc"),
    ("(cpython|pymalloc).*(pymalloc|arena)|pymalloc", "pymalloc arenas"),
    ("partition_alloc", "PartitionAlloc"),
    ("v8", "V8"),
)
"""Patterns of the names that programs give to mappings, and the owners."""


def owner_named(label: str) -> str:
    """Return the owner of a mapping that its program named."""
    matching = (owner for pattern, owner in PROGRAM_NAMES if re.match(pattern, label))
    return next(matching, f"named {label}")
