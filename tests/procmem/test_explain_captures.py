"""Explanations of saved processes, compared with the recorded truth."""

import gzip
import io
import json
import os
import re
import shutil
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from helpers.captures import FOLDER, NAMES, truth
from pyreserve._system.maps import MapTable
from pyreserve.errors import MapsError
from pyreserve.procmem import AddressSpace, compare, explain
from pyreserve.procmem.judge.owners import allocators
from pyreserve.procmem.judge.owners.process import ProcessMappings
from pyreserve.procmem.read import sources
from pyreserve.procmem.read.snapshot import capture
from pyreserve.procmem.read.sources import SavedSource
from pyreserve.units import KiB, MiB

# The right owner names for each owner in truth.json; others have none.
RIGHT = (
    (r"thread.stack|SafeStack", ["thread stacks"]),
    (r"glibc malloc arena", ["glibc malloc arenas"]),
    (r"glibc malloc main arena", ["glibc malloc main heap"]),
    (r"tcmalloc \(gperftools\) via brk", ["tcmalloc (brk heap)"]),
    (r"PyPy via brk", ["main heap (brk)"]),
    (r"^jemalloc$", ["jemalloc"]),
    (r"^mimalloc$", ["mimalloc"]),
    (r"asan LowShadow|asan HighShadow", ["AddressSanitizer shadow"]),
    (r"asan ShadowGap", ["AddressSanitizer shadow gap"]),
    (r"AddressSanitizer runtime", ["AddressSanitizer "]),
    (r"^Go heap arenas", ["Go heap arenas"]),
    (r"^Go heap arena$", ["Go arena"]),
    (r"^Go heap bitmap", ["Go bitmap"]),
    (r"^Go spans", ["Go spans"]),
    (r"^Go (page summaries|scavenge|heapArena)", ["Go runtime tables"]),
    (r"Go runtime", ["Go ", "program data"]),
    (r"JVM NMT: Java Heap", ["JVM heap"]),
    (r"JVM NMT: Class", ["JVM class space"]),
    (r"JVM NMT: Metaspace", ["JVM metaspace"]),
    (r"JVM NMT: Code", ["JVM code cache"]),
    (r"JVM NMT: GC", ["JVM other reservations"]),
    (r"HotSpot", ["JVM "]),
    (r"V8 ArrayBuffer/WebAssembly", ["V8 WebAssembly"]),
    (r"V8 code range", ["V8 code range"]),
    (r"PostgreSQL main shared memory", ["PostgreSQL shared memory"]),
    (r"GHC RTS heap", ["GHC heap"]),
    (r"hugetlb", ["huge pages (hugetlb)"]),
    (r"mapped files", ["mapped files", "JVM CDS archive (mapped file)", "JVM heap (ZGC)"]),
    (r"ELF/file", ["mapped files"]),
    (r"pyreserve region", ["pyreserve regions"]),
    (r"getrandom", ["vDSO getrandom state"]),
    (r"dynamic loader", ["library data (.bss, dynamic loader)"]),
    (r"program itself: .* shared anonymous", ["shared anonymous memory"]),
)
# The log gives address ranges of these that contain other owners' mappings, or none.
ELSEWHERE = re.compile(
    r"asan (High|Low)Mem|no call stack|anonymous mmap|strace_fine|^program itself$"
)


@cache
def explained(name: str) -> AddressSpace:
    return explain(path=FOLDER / name)


@pytest.mark.parametrize("name", NAMES)
class TestTotals:
    def test_classes_are_exactly_the_truth(self, name: str) -> None:
        """Every class has the size in truth.json, and the sizes sum to VmSize."""
        space, true = explained(name), truth(name)

        assert {
            memory_class.name: memory_class.size // KiB for memory_class in space.classes
        } == true["classes_kib"]
        assert (
            sum(memory_class.size for memory_class in space.classes)
            == space.vsz
            == true["vsz_kib"] * KiB
        )

    def test_rss_pss_uss(self, name: str) -> None:
        """RSS and USS are exact; PSS is the kernel's sum, rounded once and not for each mapping."""
        space, true = explained(name), truth(name)

        assert space.rss == true["rss_kib"] * KiB
        assert space.uss == true["uss_kib"] * KiB
        assert space.pss is not None
        assert 0 <= space.pss // KiB - true["pss_kib"] <= space.mappings
        assert space.settled

    def test_details(self, name: str) -> None:
        """The finer figures equal those in truth.json."""
        true = truth(name).get("classes_detail_kib")
        if true is None:
            pytest.skip("no such figures of this capture")
        details = {name: size // KiB for name, size in explained(name).details.items()}

        assert details["no_access_file"] == true["no_access_file"]
        assert details["no_access_resident"] == true["no_access_resident"]
        assert details["untouched_noreserve"] == true["untouched_noreserve"]
        assert details["untouched_shared"] == true["untouched_shm"]
        assert details["lazy_free"] == true["lazyfree"]
        assert details["anon_huge"] == true["anon_huge"]
        assert details["locked"] == true["locked"]

    def test_owners_have_every_byte_once(self, name: str) -> None:
        """Owners sum to VSZ, and their resident sizes to the resident classes."""
        space = explained(name)

        assert sum(owner.size for owner in space.owners) == space.vsz
        assert sum(owner.rss for owner in space.owners) == space.class_size(
            "resident_private"
        ) + space.class_size("resident_shared")
        assert all(owner.evidence for owner in space.owners)
        assert len({owner.name for owner in space.owners}) == len(space.owners)


def right_names(owner: str) -> list[str]:
    for pattern, names in RIGHT:
        if re.search(pattern, owner):
            return names
    return []


def named_ranges(space: AddressSpace) -> list[tuple[int, int, str]]:
    """Ranges (start, end, owner) of all bytes."""
    return [part for mapping in space.maps() for part in mapping.parts]


OWNED = [
    (name, i)
    for name in NAMES
    for i, owner in enumerate(truth(name)["owners"])
    if not ELSEWHERE.search(owner["name"]) and owner["source"] not in {"strace_fine"}
]


class TestOwners:
    @pytest.mark.parametrize(("name", "index"), OWNED)
    def test_the_right_name_or_none(self, name: str, index: int) -> None:
        """Bytes of an owner with 1 % of VSZ have its name or are unknown."""
        space = explained(name)
        owner = truth(name)["owners"][index]
        right = right_names(owner["name"])

        called: Counter[str] = Counter()
        spans = named_ranges(space)
        for low, high in ((int(a, 16), int(b, 16)) for a, b in owner["ranges"]):
            for start, end, who in spans:
                if start < high and low < end:
                    called[who] += (min(end, high) - max(start, low)) // KiB
        total = sum(called.values())
        wrong = sum(
            kib
            for who, kib in called.items()
            if who != "unknown" and not who.startswith(tuple(right))
        )

        assert wrong <= 0.05 * total, called

    @pytest.mark.parametrize(
        ("name", "owner", "kib"),
        [
            ("go_tip2014", "Go arena", 134_217_736),
            ("go_tip2014", "Go bitmap", 8_388_608),
            ("go_tip2014", "Go spans", 131_072),
            ("go111", "Go heap arenas (Go 1.11 to 1.13)", 131_072),
            ("go119", "Go heap arenas (Go 1.14 or later)", 131_072),
            ("go127_hello", "Go heap arenas (Go 1.26 or later)", 65_536),
            ("go124_386_hello", "Go heap arenas (Go 1.11 or later, 32 bits)", 528_384),
            ("c_asan8t", "AddressSanitizer shadow", 15_032_385_540),
            ("c_asan8t", "AddressSanitizer allocator", 4_294_967_304),
            ("c_mimalloc32t", "mimalloc", 1_151_232),
            ("c_mimalloc32t", "thread stacks", 262_272),
            ("redis", "jemalloc", 88_064),
            ("py_64threads", "glibc malloc arenas", 983_040),
            ("py_64threads", "thread stacks", 524_544),
            ("c_glibc241_arenas", "glibc malloc arenas", 393_216),
            ("c_glibc243_arenas", "glibc malloc arenas", 393_216),
            ("c_glibc243_arenas", "thread stacks", 32_784),
            ("py313_glibc241_16t", "glibc malloc arenas", 983_040),
            ("py313_glibc241_16t", "thread stacks", 131_136),
            ("py313_glibc241_16t", "pyreserve regions", 327_680),
            ("py313_glibc241_16t", "vDSO getrandom state", 4),
            ("py314_glibc243_16t", "glibc malloc arenas", 983_040),
            ("py314_glibc243_16t", "thread stacks", 131_136),
            ("py314_glibc243_16t", "pyreserve regions", 327_680),
            ("py314_glibc243_16t", "vDSO getrandom state", 4),
            ("c32_glibc8t", "glibc malloc arenas", 15_360),
            ("java_serial", "JVM heap", 1_048_576),
            ("java_serial", "JVM class space", 1_048_576),
            ("java_serial", "JVM metaspace", 65_536),
            ("java_serial", "JVM code cache", 245_760),
            ("java_z", "JVM heap (ZGC)", 50_331_648),
            ("java17_default", "JVM heap", 6_172_672),
            ("java21_g1", "JVM heap", 1_048_576),
            ("java21_g1", "JVM class space", 1_048_576),
            ("node_wasm3", "V8 WebAssembly memories and guards", 31_457_280),
            ("node_wasm3", "V8 code range", 522_680),
            ("pg_backend", "PostgreSQL shared memory", 1_101_380),
            ("haskell", "GHC heap", 1_073_742_848),
        ],
    )
    def test_known_sizes(self, name: str, owner: str, kib: int) -> None:
        """The sizes of traced owners are exact to the KiB."""
        assert {owner.name: owner.size // KiB for owner in explained(name).owners}.get(owner) == kib

    def test_the_ranges_of_gos_layout_of_2014(self) -> None:
        """Spans, bitmap and arena are separate ranges inside mappings, committed and reserved."""
        ranges = explained("go_tip2014").to_dict()["ranges"]

        assert [(piece["name"], piece["state"], piece["kib"]) for piece in ranges] == [
            ("spans", "committed", 104),
            ("spans + bitmap", "reserved", 8_513_112),
            ("bitmap + arena", "committed", 109_888),
            ("arena", "reserved", 134_114_312),
        ]

    def test_imitations_are_not_named(self) -> None:
        """A program that maps like allocators, runtimes and sanitizers gets none of their names."""
        names = {owner.name for owner in explained("c_imitator").owners}

        assert not [name for name in names if re.match(r"Go|JVM|V8|Address|jemall|mimall", name)]


def test_a_gigabyte_reserved_is_not_gos(tmp_path: Path) -> None:
    """A range committed from its start is no page summaries, whatever is aligned beside it."""
    pieces = (
        (0x100000000000, 256 << 20, "rw-p", 4),
        (0x7E0000001000, 1 << 20, "rw-p", 4),
        (0x7E0000101000, 1100 << 20, "---p", 0),
    )
    (tmp_path / "smaps").write_text(
        "".join(
            f"{low:x}-{low + size:x} {perms} 00000000 00:00 0 \nRss: {rss} kB\n"
            f"Private_Dirty: {rss} kB\nVmFlags: mr mw me ac\n"
            for low, size, perms, rss in pieces
        )
        + "7f0000000000-7f0000001000 r-xp 00000000 00:01 5 /lib/x86_64-linux-gnu/libc.so.6\n"
    )

    assert {owner.name for owner in explain(path=tmp_path).owners} == {"unknown", "mapped files"}


def test_a_shadow_of_terabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapping of many terabytes is examined once, not for each possible heap."""
    (tmp_path / "smaps").write_text(
        "".join(
            f"{low:x}-{low + (1 << 44):x} rw-p 00000000 00:00 0 \nVmFlags: rd wr nr {more}\n"
            for low, more in ((1 << 44, "dd nh"), (1 << 45, ""), (3 << 44, "nh"))
        )
        + "7f0000000000-7f0000001000 r-xp 00000000 00:01 5 /lib/x86_64-linux-gnu/libc.so.6\n"
    )
    looked = []

    class Counting(MapTable):
        def mapping_at(self, address: int) -> int | None:
            looked.append(address)
            return super().mapping_at(address)

        def mappings_in(self, low: int, high: int) -> range:
            looked.append(low)
            return super().mappings_in(low, high)

    monkeypatch.setattr(sources, "MapTable", Counting)
    process = ProcessMappings(capture(SavedSource(tmp_path)))
    allocators.glibc_arenas(process)

    assert isinstance(process.table, Counting)
    assert len(looked) < 10_000


def test_thousands_of_full_heaps(tmp_path: Path) -> None:
    """A run of full heaps is followed to its tail once for all heaps."""
    heaps = 3000
    (tmp_path / "smaps").write_text(
        "".join(
            f"{low:x}-{low + (64 << 20):x} rw-p 00000000 00:00 0 \nRss: 65536 kB\n"
            f"Private_Dirty: 65536 kB\nVmFlags: rd wr nr {more}\n"
            for low, more in (((1 << 44) + (i << 26), "mg" * (i % 2)) for i in range(heaps))
        )
        + "7f0000000000-7f0000001000 r-xp 00000000 00:01 5 /lib/x86_64-linux-gnu/libc.so.6\n"
    )
    looked = 0

    class Counting(dict[int, int | None]):
        def get(self, *key: int) -> int | None:  # type: ignore[override]
            nonlocal looked
            looked += 1
            return super().get(*key)

    process = ProcessMappings(capture(SavedSource(tmp_path)))
    size = 64 << 20
    tails = Counting(
        (low, allocators._heap_tail(process, low, low + size)) for low in process.start
    )
    assert list(tails.values())[:-1] == [0] * heaps

    assert allocators._full_heaps_below_a_tail(tails, size) == set()  # no tail above them
    assert looked <= 2 * heaps
    tails[(1 << 44) + heaps * size] = 4096  # now there is a tail
    assert len(allocators._full_heaps_below_a_tail(tails, size)) == heaps


@pytest.mark.parametrize(("used", "owner"), [(0x8000, "glibc malloc arenas"), (0x7000, "unknown")])
def test_the_smallest_arena(tmp_path: Path, used: int, owner: str) -> None:
    """With MALLOC_TOP_PAD_=0 an arena may have HEAP_MIN_SIZE committed, and not less."""
    border = 0x7F0000000000 + used
    (tmp_path / "smaps").write_text(
        f"7f0000000000-{border:x} rw-p 00000000 00:00 0 \nRss: 8 kB\nPrivate_Dirty: 8 kB\n"
        "VmFlags: rd wr mr mw me nr \n"
        f"{border:x}-7f0004000000 ---p 00000000 00:00 0 \nVmFlags: mr mw me nr \n"
    )

    owners = explain(path=tmp_path).owners

    assert [(owner.name, owner.size) for owner in owners] == [(owner, 64 * MiB)]


LIBC = "7f0000000000-7f0000001000 r-xp 00000000 00:01 5 /lib/x86_64-linux-gnu/libc.so.6\n"
STACK = "7ffff0000000-7ffff0021000 rw-p 00000000 00:00 0 [stack]\nVmFlags: rd wr mr mw gd ac\n"
LINE = 0x7E0000000000  # of 64 MiB


def owners_of(folder: Path, *pieces: tuple[int, int, str, int, str], rest: str) -> dict[str, int]:
    """Explain mappings (start, bytes, access, resident KiB, flags) and the text `rest`."""
    (folder / "smaps").write_text(
        "".join(
            f"{low:x}-{low + size:x} {perms} 00000000 00:00 0 \nRss: {rss} kB\n"
            f"Private_Dirty: {rss} kB\nVmFlags: {flags}\n"
            for low, size, perms, rss, flags in pieces
        )
        + rest
    )
    return {owner.name: owner.size // KiB for owner in explain(path=folder).owners}


HEAD, TAIL = "rd wr mr mw me ac", "mr mw me"


class TestChargedArenas:
    """glibc's heaps since 2.41, which have the flags of ordinary memory."""

    def heap(self, low: int, head: int, flags: str = HEAD) -> list[tuple[int, int, str, int, str]]:
        return [
            (low, head, "rw-p", head // KiB, flags),
            (low + head, (64 << 20) - head, "---p", 0, TAIL),
        ]

    def test_one(self, tmp_path: Path) -> None:
        """With glibc mapped, a head and a tail of 64 MiB together are a heap."""
        owners = owners_of(tmp_path, *self.heap(LINE, 0x21000), rest=LIBC + STACK)

        assert owners["glibc malloc arenas"] == 64 * KiB

    def test_a_head_merged_with_a_lower_mapping(self, tmp_path: Path) -> None:
        """A mapping that begins below the line and includes the head is divided at the line."""
        head, tail = self.heap(LINE, 0x21000)
        merged = (LINE - (1 << 20), head[1] + (1 << 20), "rw-p", 8, HEAD)

        owners = owners_of(tmp_path, merged, tail, rest=LIBC + STACK)

        assert owners["glibc malloc arenas"] == 64 * KiB
        assert owners["unknown"] == KiB

    def test_divided(self, tmp_path: Path) -> None:
        """Advice for huge pages on a part of the head, and neighbours, change nothing."""
        advised = (LINE, 2 << 20, "rw-p", 2048, f"{HEAD} hg")
        head, tail = (LINE + (2 << 20), 0x121000, "rw-p", 8, HEAD), self.heap(LINE, 0x321000)[1]

        owners = owners_of(
            tmp_path, advised, head, tail, *self.heap(LINE + (64 << 20), 0x21000), rest=LIBC + STACK
        )

        assert owners["glibc malloc arenas"] == 128 * KiB

    def test_a_full_heap_that_stayed_apart(self, tmp_path: Path) -> None:
        """A separate mapping below a heap is a full heap; a merged one may be the program's."""
        full = (LINE, 64 << 20, "rw-p", 64 * KiB, HEAD)
        head, tail = self.heap(LINE + (64 << 20), 0x21000)
        merged = (LINE, full[1] + head[1], "rw-p", full[3] + head[3], HEAD)

        apart = owners_of(tmp_path, full, head, tail, rest=LIBC + STACK)
        together = owners_of(tmp_path, merged, tail, rest=LIBC + STACK)

        assert apart["glibc malloc arenas"] == 128 * KiB
        assert together["glibc malloc arenas"] == together["unknown"] == 64 * KiB

    @pytest.mark.parametrize(
        "rest",
        [STACK, LIBC.replace("libc.so.6", "ld-musl-x86_64.so.1") + STACK],
        ids=["static", "musl"],
    )
    def test_not_without_glibc(self, tmp_path: Path, rest: str) -> None:
        """The shape alone is no evidence."""
        assert "glibc malloc arenas" not in owners_of(
            tmp_path, *self.heap(LINE, 0x21000), rest=rest
        )

    @pytest.mark.parametrize(
        ("low", "head", "tail", "flags"),
        [
            (LINE, 0x21000, 63 << 20, TAIL),  # it ends before the line
            (LINE, 0x21000, 64 << 20, TAIL),  # or behind
            (LINE, 0x21000, (64 << 20) - 0x21000, f"{TAIL} ac"),  # it was writable
            (LINE, 0x21000, (64 << 20) - 0x21000, f"{TAIL} nr"),  # HotSpot
            (LINE, 0x21000, (64 << 20) - 0x21000, f"{TAIL} dd"),  # a region of ours
            (LINE, 0x21000, (64 << 20) - 0x21000, f"{TAIL} dc"),  # V8
            (0xC000000000, 0x21000, (64 << 20) - 0x21000, TAIL),  # at an address of its own
            (LINE, 4 << 20, 60 << 20, TAIL),  # a step of Go's
            (LINE + (1 << 20), 0x21000, (64 << 20) - 0x21000, TAIL),  # not aligned
        ],
    )
    def test_similar_reservations_are_not_mallocs(
        self, tmp_path: Path, low: int, head: int, tail: int, flags: str
    ) -> None:
        """Reservations of programs that map glibc too are not malloc's."""
        pieces = (low, head, "rw-p", head // KiB, HEAD), (low + head, tail, "---p", 0, flags)

        assert "glibc malloc arenas" not in owners_of(tmp_path, *pieces, rest=LIBC + STACK)


class TestHiddenGuards:
    """Stacks with their guards inside the mapping."""

    ONE = (8 << 20) + 4096

    @pytest.mark.parametrize("mapped", [ONE, 3 * ONE, 1 << 20])
    def test_the_kernel_marks_it(self, tmp_path: Path, mapped: int) -> None:
        """A mapping with `gu` and `nh` is one or several stacks of any size."""
        piece = (LINE, mapped, "rw-p", 8, f"{HEAD} gu nh")

        assert owners_of(tmp_path, piece, rest=LIBC)["thread stacks"] == mapped // KiB

    @pytest.mark.parametrize(("mapped", "named"), [(ONE, True), (3 * ONE, True), (8 << 20, False)])
    def test_before_the_kernel_did(self, tmp_path: Path, mapped: int, named: bool) -> None:
        """Without `gu` the size must be a multiple of the limit and a guard."""
        piece = (LINE, mapped, "rw-p", 8, f"{HEAD} nh")

        assert ("thread stacks" in owners_of(tmp_path, piece, rest=LIBC)) == named

    @pytest.mark.parametrize("flags", ["gu", "gu nh dd", "gu nh nr", "gu nh dc"])
    def test_guards_of_others(self, tmp_path: Path, flags: str) -> None:
        """A guard in a mapping without `nh`, or with dd, nr or dc, is no evidence of a stack."""
        piece = (LINE, self.ONE, "rw-p", 8, f"{HEAD} {flags}")

        assert "thread stacks" not in owners_of(tmp_path, piece, rest=LIBC)


OURS = "7f1000000000-7f1000001000 r-xp 00000000 00:01 6 /x/pyreserve/_native.abi3.so\n"
RANDOM = (LINE, 4096, "rw-p", 4, "rd wr mr mw me nr wf dd dp")
VDSO = "7fff80000000-7fff80002000 r-xp 00000000 00:00 0 [vdso]\n"


class TestOutOfCoreDumps:
    """Mappings with `dd` in a process that maps pyreserve's library."""

    def test_the_state_of_getrandom(self, tmp_path: Path) -> None:
        """getrandom's state is droppable and wiped on fork, and no pyreserve region."""
        owners = owners_of(tmp_path, RANDOM, rest=LIBC + OURS + VDSO)

        assert owners["vDSO getrandom state"] == 4
        assert "pyreserve regions" not in owners

    @pytest.mark.parametrize("rest", [OURS + VDSO, LIBC + OURS], ids=["no glibc", "no vdso"])
    def test_droppable_memory_of_others(self, tmp_path: Path, rest: str) -> None:
        """Droppable memory without glibc or vDSO is unknown, and no pyreserve region."""
        assert owners_of(tmp_path, RANDOM, rest=rest)["unknown"] == 4

    @pytest.mark.parametrize(("mapped", "named"), [(16 << 10, True), (64 << 20, False)])
    def test_several_pages(self, tmp_path: Path, mapped: int, named: bool) -> None:
        """The state may have several pages; a large droppable mapping is another owner's cache."""
        piece = (LINE, mapped, *RANDOM[2:])

        owners = owners_of(tmp_path, piece, rest=LIBC + OURS + VDSO)

        assert ("vDSO getrandom state" in owners) == named
        assert "pyreserve regions" not in owners

    def test_a_secret(self, tmp_path: Path) -> None:
        """Committed memory excluded from core dumps is no region."""
        secret = (LINE, 1 << 16, "rw-p", 4, f"{HEAD} dd")
        guard = (LINE + (1 << 16), 4096, "---p", 0, TAIL)

        owners = owners_of(tmp_path, secret, guard, rest=LIBC + OURS)

        assert "pyreserve regions" not in owners

    def test_a_region(self, tmp_path: Path) -> None:
        """A reserved mapping with `dd` and its committed neighbour are a region."""
        pieces = (
            (LINE, 1 << 20, "---p", 0, f"{TAIL} dd"),
            (LINE + (1 << 20), 1 << 20, "rw-p", 4, f"{HEAD} dd"),
        )

        assert owners_of(tmp_path, *pieces, rest=LIBC + OURS)["pyreserve regions"] == 2048

    @pytest.mark.parametrize("library", ["libcoreclr.so", "libtsan.so.2", "libmariadbd.so.19"])
    def test_others_that_reserve_so(self, tmp_path: Path, library: str) -> None:
        """With a runtime mapped that reserves with `dd` too, the owner is unknown."""
        other = f"7f2000000000-7f2000001000 r-xp 00000000 00:01 7 /x/{library}\n"
        piece = (LINE, 1 << 20, "---p", 0, f"{TAIL} dd")

        owners = owners_of(tmp_path, piece, rest=LIBC + OURS + other)

        assert "pyreserve regions" not in owners


@pytest.mark.parametrize("mark", ["nh", ""])
def test_stacks_of_older_kernels(tmp_path: Path, mark: str) -> None:
    """Before Linux 6.7 a stack is recognised by its size; the evidence names `nh` only if set."""
    (tmp_path / "smaps").write_text(
        f"7f0000000000-7f0000001000 ---p 00000000 00:00 0 \nVmFlags: mr mw me {mark} \n"
        f"7f0000001000-7f0000801000 rw-p 00000000 00:00 0 \nVmFlags: rd wr mr mw me {mark} \n"
        "7ffff0000000-7ffff0021000 rw-p 00000000 00:00 0 [stack]\nVmFlags: rd wr mr mw gd ac \n"
    )

    stacks = explain(path=tmp_path).owners[0]

    assert (stacks.name, stacks.size) == ("thread stacks", 8196 * KiB)
    assert ("(nh)" in stacks.evidence) == bool(mark)


class TestWithout:
    """Missing files and files of other kinds."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        shutil.copytree(FOLDER / "redis", tmp_path / "redis")
        return tmp_path / "redis"

    def test_smaps_alone_is_enough(self, folder: Path) -> None:
        """smaps alone gives all sizes; other files add name, limits and the kernel's sums."""
        for path in folder.iterdir():
            if path.name != "smaps.gz":
                path.unlink()

        space = explain(path=folder)

        sizes = [140_696, 79_056, 72_780]
        assert [space.vsz, space.rss, space.uss] == [size * KiB for size in sizes]
        assert space.pid is None
        assert space.pss == 75_007 * KiB  # the mappings' sum, each rounded down

    def test_compressed_or_not(self, folder: Path) -> None:
        """Each file may be plain or .gz."""
        before = explain(path=folder).to_dict()
        (folder / "smaps").write_bytes(gzip.decompress((folder / "smaps.gz").read_bytes()))
        (folder / "smaps.gz").unlink()
        (folder / "status.gz").write_bytes(gzip.compress((folder / "status").read_bytes()))
        (folder / "status").unlink()

        assert explain(path=folder).to_dict() == before

    def test_no_smaps(self, folder: Path) -> None:
        """Without smaps, maps, status and smaps_rollup are used; smaps is in `missing`."""
        whole = explain(path=folder)
        (folder / "smaps.gz").unlink()

        space = explain(path=folder)

        assert space.missing == ("smaps",)
        assert (space.vsz, space.mappings) == (whole.vsz, whole.mappings)
        assert (space.rss, space.pss, space.uss) == (79_056 * KiB, whole.pss, None)
        classes = {memory_class.name: memory_class.size for memory_class in space.classes}
        assert classes.keys() == {"no_access_reserved", "accessible", "special_pfn"}
        assert sum(classes.values()) == space.vsz
        assert classes["no_access_reserved"] == whole.class_size("no_access_reserved")
        assert (
            "77.2 MiB is memory (smaps can't be read: USS and which mappings it is in are not "
            "known)." in space.verdict
        )

    def test_neither_smaps_nor_its_sums(self, folder: Path) -> None:
        """RSS is that of status, and unknown figures are null in JSON, not 0."""
        for name in ("smaps.gz", "smaps_rollup"):
            (folder / name).unlink()

        space = explain(path=folder)
        plain = json.loads(space.to_json())

        assert plain["missing"] == ["smaps", "smaps_rollup"]
        assert (plain["rss_kib"], plain["pss_kib"], plain["uss_kib"]) == (79_056, None, None)
        assert {owner["rss_kib"] for owner in plain["owners"]} == {None}
        assert sum(owner["kib"] for owner in plain["owners"]) == space.vsz // KiB
        assert "stacks" in plain["details_kib"]
        assert "stacks_resident" not in plain["details_kib"]
        assert {mapping.class_name for mapping in space.maps()} <= {
            "",
            *(c.name for c in space.classes),
        }
        with pytest.raises(KeyError):
            space.class_size("resident_private")

    @pytest.mark.parametrize(
        ("hidden", "rss", "swap", "page_tables"),
        [
            ("", 79_056, 0, 236),
            ("smaps", 79_056, 4, 236),
            ("smaps_rollup", 79_056, 0, 236),
            ("status", 79_056, 0, None),
            ("smaps smaps_rollup", 79_056, 8, 236),
            ("smaps status", 79_056, 4, None),
            ("smaps_rollup status", 79_056, 0, None),
            ("smaps smaps_rollup status", None, None, None),
        ],
    )
    def test_which_files_have_the_totals(
        self, folder: Path, hidden: str, rss: int | None, swap: int | None, page_tables: int | None
    ) -> None:
        """RSS, swap and page tables are None exactly if none of their files is readable."""
        for name, old, new in (
            ("smaps_rollup", "Swap:                  0 kB", "Swap:                  4 kB"),
            ("status", "VmSwap:\t       0 kB", "VmSwap:\t       8 kB"),
        ):
            text = (folder / name).read_text()
            assert old in text
            (folder / name).write_text(text.replace(old, new))
        for name in hidden.split():
            (folder / (f"{name}.gz" if name == "smaps" else name)).unlink()

        space = explain(path=folder)
        plain = json.loads(space.to_json())

        assert plain["missing"] == hidden.split()
        expected = [None if size is None else size * KiB for size in (rss, swap, page_tables)]
        assert [space.rss, space.swap, space.page_tables] == expected
        assert [plain[key] for key in ("rss_kib", "swap_kib", "page_tables_kib")] == [
            rss,
            swap,
            page_tables,
        ]
        assert ("how much of it is memory is not known" in space.verdict) is (rss is None)
        assert ("is memory (" in space.verdict) is (rss is not None and "smaps" in hidden.split())

    def test_maps_alone(self, folder: Path) -> None:
        """With maps alone the verdict says that resident memory is unknown."""
        page = "10000000-10001000 rw-p 00000000 00:00 0 \n"
        reserved = "20000000-60000000 ---p 00000000 00:00 0 \n"
        for path in folder.iterdir():
            path.unlink()
        (folder / "maps").write_text(page)
        without = explain(path=folder)
        (folder / "maps").write_text(page + reserved)
        space = explain(path=folder)

        unknown = (
            "how much of it is memory is not known (none of smaps, smaps_rollup and status can be "
            "read)."
        )
        assert without.verdict.startswith(f"VSZ is 4 KiB; {unknown}")
        assert space.verdict.startswith(
            "VSZ is 1 GiB, of which 1 GiB is reserved address space that costs nothing; " + unknown
        )

    def test_tables_without_memory(self, folder: Path) -> None:
        """Without RSS there is no warning about page tables."""
        for name in ("smaps.gz", "smaps_rollup"):
            (folder / name).unlink()
        status = (folder / "status").read_text().replace("236 kB", "99999 kB")
        (folder / "status").write_text(status)
        warned = explain(path=folder)
        (folder / "status").write_text(re.sub("VmRSS:.*\n", "", status))

        space = explain(path=folder)

        assert any("page tables take" in warning for warning in warned.warnings)
        assert (space.rss, space.page_tables, space.warnings) == (None, 99_999 * KiB, ())

    def test_unknown_figures_are_not_compared(self, folder: Path) -> None:
        """A figure that is unknown in one explanation is no change."""
        whole = explain(path=folder).to_dict()
        (folder / "smaps.gz").unlink()

        difference = compare(whole, explain(path=folder).to_dict())

        assert {change.name for change in difference.totals} >= {"vsz", "pss"}
        assert "uss" not in {change.name for change in difference.totals}
        assert difference.owners_resident == ()

    def test_totals_that_are_not_known_are_not_compared(self, folder: Path) -> None:
        """If RSS is unknown before or after, the verdict says that it can't be compared."""
        whole = explain(path=folder).to_dict()
        for name in ("smaps.gz", "smaps_rollup", "status"):
            (folder / name).unlink()
        maps = explain(path=folder).to_dict()

        for old, new in ((whole, maps), (maps, whole), (maps, maps)):
            difference = compare(old, new)

            assert {change.name for change in difference.totals} == {"vsz", "mappings"}
            assert "memory (RSS) can't be compared." in difference.verdict

    def test_neither_smaps_nor_maps(self, folder: Path) -> None:
        """Without smaps and maps the folder is refused."""
        for name in ("smaps.gz", "maps.gz"):
            (folder / name).unlink()

        with pytest.raises(FileNotFoundError, match="neither smaps nor maps"):
            explain(path=folder)

    def test_no_folder(self, tmp_path: Path) -> None:
        """A missing folder is reported as missing."""
        for path in (tmp_path / "nothing", "a\0b"):
            with pytest.raises(FileNotFoundError, match="no such folder"):
                explain(path=path)

    def test_a_link_to_itself(self, tmp_path: Path) -> None:
        """A file that can't be found counts as missing."""
        (tmp_path / "smaps").symlink_to(tmp_path / "smaps")

        with pytest.raises(FileNotFoundError, match="neither smaps nor maps"):
            explain(path=tmp_path)

    def test_the_current_folder(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """An empty path is the current folder, as in pathlib."""
        monkeypatch.chdir(folder)

        assert explain(path="").vsz == explain(path=folder).vsz

    @pytest.mark.parametrize("cut", [10, 100, 3000])
    def test_a_file_cut_short(self, folder: Path, cut: int) -> None:
        """A truncated file is refused, and the error names it."""
        path = folder / "smaps.gz"
        path.write_bytes(path.read_bytes()[:cut])

        with pytest.raises(MapsError, match=r"smaps\.gz"):
            explain(path=folder)

    def test_nothing_in_it(self, folder: Path) -> None:
        """An empty compressed file, of a process that had ended, is refused."""
        (folder / "smaps.gz").write_bytes(gzip.compress(b""))

        with pytest.raises(MapsError, match="no mappings"):
            explain(path=folder)

    def test_a_file_that_unpacks_to_too_much(self, folder: Path) -> None:
        """A file that unpacks to more than its maximum is refused before it fills the memory."""
        for name in ("smaps.gz", "status.gz"):
            before = (folder / name).read_bytes() if (folder / name).exists() else None
            (folder / name).write_bytes(gzip.compress(bytes(1 << 25)))
            (folder / "status").unlink(missing_ok=True)
            with pytest.raises(MapsError, match=f"{name}: .*(is longer than|must be at most)"):
                explain(path=folder)
            (folder / name).write_bytes(before or b"")

    def test_paths_that_are_not_regular_files(self, folder: Path) -> None:
        """A pipe, a folder and a device in place of a file are refused immediately."""
        (folder / "smaps.gz").unlink()
        for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero")):
            make(folder / "smaps")
            with pytest.raises(MapsError, match="smaps is not a regular file"):
                explain(path=folder)
            (folder / "smaps").rename(folder / f"was {make}".replace("/", "_"))

    def test_no_mappings(self, folder: Path) -> None:
        """An empty smaps, of a process that had ended, is refused."""
        (folder / "smaps").write_bytes(b"")

        with pytest.raises(MapsError, match="smaps: no mappings"):
            explain(path=folder)

    def test_far_too_large(self, folder: Path) -> None:
        """A few KiB that unpack to more than the maximum of status are refused."""
        (folder / "status").unlink()
        (folder / "status.gz").write_bytes(gzip.compress(bytes(1 << 24)))

        with pytest.raises(MapsError, match=r"status\.gz: status must be at most"):
            explain(path=folder)

    def test_odd_bytes_in_an_owners_name(self, folder: Path) -> None:
        """Bytes of an owner's name that are not UTF-8 are escaped: JSON has no lone surrogates."""
        (folder / "smaps").write_bytes(b"1000-2000 rw-p 0 0:0 0 [anon:a\xff]\n")
        (folder / "status").unlink()

        space = explain(path=folder)

        assert [owner.name for owner in space.owners] == ["named a\\xff"]
        assert "\\ud" not in space.to_json()

    def test_files_of_two_moments(self, folder: Path) -> None:
        """Totals that do not match cause a warning; the mappings' sums are used."""
        rollup = folder / "smaps_rollup"
        rollup.write_text(rollup.read_text().replace("79056", "79060"))

        space = explain(path=folder)

        assert not space.settled
        assert "not read at one moment" in space.warnings[-1]
        assert space.rss == 79_056 * KiB

    @pytest.mark.parametrize("name", [n for n in NAMES if (FOLDER / n / "maps.gz").exists()])
    def test_maps_and_smaps_name_the_same_mappings(self, name: str) -> None:
        """maps and smaps give the same mappings."""
        maps, smaps = (
            MapTable.read(io.BytesIO(gzip.decompress((FOLDER / name / f"{file}.gz").read_bytes())))
            for file in ("maps", "smaps")
        )

        for column in ("start", "end", "perms", "offset", "device", "inode", "names"):
            assert getattr(maps, column) == getattr(smaps, column)
