"""The parser of maps and smaps: it reads valid text and refuses all other text."""

import gzip
import io
import random
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.captures import FOLDER
from pyreserve._system.maps import FLAGS, READ, SHARED, WRITE, MapTable
from pyreserve.errors import MapsError
from pyreserve.procmem import AddressSpace, explain
from pyreserve.procmem.judge.owners import recognise
from pyreserve.procmem.read.snapshot import capture
from pyreserve.procmem.read.sources import SavedSource
from pyreserve.units import KiB

LINE = b"7fdbc9300000-7fdbc9400000 rw-s 00001000 fe:1a 2714305                    /tmp/a b\n"
SMAPS = {
    name: gzip.decompress((FOLDER / name / "smaps.gz").read_bytes())
    for name in ("c_odd", "redis", "go_tip2014", "java_serial", "c32_glibc8t", "node_wasm3")
}


def read(text: bytes) -> MapTable:
    return MapTable.read(io.BytesIO(text))


class Trickle:
    """A file that returns a few bytes at each read."""

    def __init__(self, text: bytes, size: int) -> None:
        self._rest, self._size = text, size

    def readinto(self, buffer: memoryview, /) -> int:
        size = min(self._size, len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


class Endless:
    """A file of a text followed by zeros."""

    def __init__(self, text: bytes) -> None:
        self._text = text

    def readinto(self, buffer: memoryview, /) -> int:
        start, self._text = self._text[: len(buffer)], self._text[len(buffer) :]
        buffer[: len(start)] = start
        buffer[len(start) :] = bytes(len(buffer) - len(start))
        return len(buffer)


class TestReading:
    def test_a_line(self) -> None:
        """Each field is at the place that proc(5) gives."""
        table = read(LINE)

        assert (table.start, table.end) == ([0x7FDBC9300000], [0x7FDBC9400000])
        assert table.perms == [READ | WRITE | SHARED]
        assert table.offset == [0x1000]
        assert table.device == [0xFE << 32 | 0x1A]
        assert table.inode == [2714305]
        assert table.names == ["/tmp/a b"]

    @pytest.mark.parametrize(
        "name",
        [
            "/tmp/odd dir/trailing space ",
            "/tmp/odd dir/new\\012line and  two spaces",
            "/tmp/odd dir/7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ",
            "/tmp/odd dir/not really (deleted)",
            "/tmp/odd dir/[heap]",
            "/tmp/Rss:                   4 kB",
            "[anon:a b]",
            "/tmp/\udcff\udc80",
        ],
    )
    def test_names_as_the_kernel_prints_them(self, name: str) -> None:
        """A name ends at the end of the line, whatever it contains."""
        text = LINE.replace(b"/tmp/a b", name.encode(errors="surrogateescape"))

        assert read(text + b"Size:   1024 kB\nRss:   12 kB\n").names == [name]

    def test_smaps(self) -> None:
        """Figures belong to the mapping above them; flags are bits."""
        table = read(LINE + b"Size: 1024 kB\nRss: 12 kB\nSwap: 4 kB\nVmFlags: rd wr nr \nNew: 1\n")

        assert (table.rss, table.swap) == ([12], [4])
        assert table.flags == [FLAGS["rd"] | FLAGS["wr"] | FLAGS["nr"]]

    @pytest.mark.parametrize("size", [1, 7, 100, 4096])
    def test_pieces(self, size: int) -> None:
        """The sizes of reads do not matter."""
        text = SMAPS["c_odd"]

        table = MapTable.read(Trickle(text, size))

        assert table.names == read(text).names
        assert table.rss == read(text).rss

    def test_a_last_line_without_an_end(self) -> None:
        """A file without its last newline is read completely."""
        assert len(read(LINE[:-1])) == 1

    def test_a_very_long_line(self) -> None:
        """A name may be longer than any buffer."""
        name = b"/" + b"x" * 1_000_000

        assert read(LINE.replace(b"/tmp/a b", name)).names == [name.decode()]

    def test_mappings_that_merge_during_printing(self) -> None:
        """Mappings that merged during printing are one mapping."""
        grown = LINE.replace(b"7fdbc9400000", b"7fdbc9500000")

        table = read(LINE + b"Rss: 8 kB\n" + grown + b"Rss: 12 kB\n")

        assert (table.start, table.end) == ([0x7FDBC9300000], [0x7FDBC9500000])
        assert (table.rss, table.names) == ([12], ["/tmp/a b"])

    def test_swapped_pages_in_memory_too(self) -> None:
        """Swap is cut to the size that resident memory leaves: it is counted at another moment."""
        table = read(LINE + b"Shared_Dirty: 1000 kB\nSwap: 1024 kB\n")

        table.divide()

        assert (table.shared, table.swap, table.rest) == ([1000], [24], [0])

    def test_nothing(self) -> None:
        """An empty file has no mappings."""
        assert len(read(b"")) == 0
        assert read(b"").names == []

    def test_this_process(self) -> None:
        """The mappings equal those that splitting each line gives."""
        with open("/proc/self/maps", "rb", buffering=0) as file:
            text = file.readall()

        table = read(text)

        expected = [line.split(" ", 5) for line in text.decode().splitlines()]
        assert table.start == [int(fields[0].split("-")[0], 16) for fields in expected]
        assert table.names == ["".join(fields[5:]).strip(" ") for fields in expected]


class TestRefusing:
    @pytest.mark.parametrize(
        "text",
        [
            b"\n",
            b"\0",
            b"garbage\n",
            b"Rss: 4 kB\n",
            LINE.replace(b"7fdbc9400000", b"7fdbc9300000"),
            LINE.replace(b"7fdbc9300000", b"7fdbc930000g"),
            LINE.replace(b"7fdbc9300000", b"7fdbc9300001"),
            LINE.replace(b"7fdbc9400000", b"17fdbc940000000000"),
            LINE.replace(b"rw-s", b"rwxq"),
            LINE.replace(b"2714305", b"99999999999999999999999"),
            LINE + LINE,
            LINE + b"Rss: 1025 kB\n",
            LINE + b"Rss: -1 kB\n",
            LINE + b"Rss: 4 MB\n",
            LINE + b"Rss: 4kB\n",
            LINE + b"Rss\n",
        ],
    )
    def test_malformed_files(self, text: bytes) -> None:
        """The error names the line."""
        with pytest.raises(MapsError, match=r"line \d+ is not in the format of"):
            read(text)

    def test_a_line_without_an_end(self) -> None:
        """An endless line of zeros does not fill the memory."""
        with pytest.raises(MapsError, match="line 2 is longer than"):
            MapTable.read(Endless(LINE))

    @pytest.mark.parametrize("size", [-1, 1 << 40])
    def test_a_file_that_lies(self, size: int) -> None:
        """A wrong count from readinto is refused: nothing is read outside the buffer."""

        class Lying:
            def readinto(self, buffer: memoryview, /) -> int:
                return size

        with pytest.raises(OSError, match=str(size)):
            MapTable.read(Lying())

    def test_more_memory_than_addresses(self) -> None:
        """Contradictory figures are refused."""
        table = read(LINE + b"Private_Clean: 1000 kB\nShared_Clean: 1000 kB\n")

        with pytest.raises(MapsError, match="7fdbc9300000 has more memory"):
            table.divide()

    def test_every_capture_is_settled(self) -> None:
        """Figures of real processes are not refused."""
        for text in SMAPS.values():
            read(text).divide()


# Valid, nearly valid and invalid lines, mostly valid so that parsing goes on.
PERMS = st.sampled_from(["rw-p", "---p", "r-xp", "rwxp", "rw-s", "r--s", "--xp", "rwx"])
NAMES = """[heap] [stack] [vvar] [vsyscall] [vdso] [uprobes] /usr/lib/libc.so.6
/lib/ld-linux.so /x/libjvm.so /x/classes.jsa /usr/bin/node /usr/lib/libjemalloc.so.2 /dev/zero
/usr/lib/libmimalloc.so /SYSV0
/x/pyreserve/_native.abi3.so /usr/lib/chromium/chromium /bin/postgres /usr/lib/libpython3.so"""
NAME = st.one_of(
    st.sampled_from(
        ["", "/memfd:java_heap (deleted)", "[anon:glibc: malloc arena]", *NAMES.split()]
    ),
    st.text(max_size=20),
)
SIZE = st.sampled_from([1, 2, 4, 33, 256, 2048, 16384, 16351, 131072, 1 << 20, 1 << 28, 1 << 34])
GAP = st.sampled_from([0, 0, 0, 1, 16, 1 << 14, 1 << 20])
BASE = st.sampled_from(
    [
        0x1000,
        0x400000,
        0x7FFF7000,
        0xC0000000,
        0xC000000000,
        0x7F0000000000,
        0xFFFFFFFFFF600000 - 0x2000,
    ]
)
FIELD = st.one_of(
    st.sampled_from(
        ["Rss: 4 kB", "Rss: 0 kB", "Private_Dirty: 4 kB", "Shared_Clean: 4 kB", "Swap: 4 kB"]
    ),
    st.sampled_from(["Locked: x kB", "Size: 4 kB", "Odd"]),
    st.sampled_from(["rd wr nr", "nr", "nr dc", "ac nh", "nh", "dd", "nr dd", "pf io"]).map(
        "VmFlags: {}".format
    ),
)


@st.composite
def nearly_smaps(draw: st.DrawFn) -> bytes:
    at = draw(BASE)
    lines = []
    for _ in range(draw(st.integers(0, 14))):
        at += draw(GAP) * 4096
        end = at + draw(SIZE) * 4096
        inode = draw(st.sampled_from([0, 0, 7]))
        lines.append(f"{at:08x}-{end:08x} {draw(PERMS)} 00000000 00:00 {inode}   {draw(NAME)}")
        lines += draw(st.lists(FIELD, max_size=3))
        at = end
    return "\n".join(lines).encode(errors="surrogatepass") + b"\n"


KERNELS = "vsyscall vvar vvar_vclock vdso stack heap uprobes vectors sigpage anon:x stack:7"


class TestNames:
    """A name alone is no evidence."""

    def explain(self, folder: Path, *lines: str) -> AddressSpace:
        (folder / "smaps").write_text("".join(f"{line}\n" for line in lines))
        return explain(path=folder)

    @pytest.mark.parametrize("name", KERNELS.split())
    @pytest.mark.parametrize("inode", [0, 7])
    @pytest.mark.parametrize("perms", ["rw-p", "---p", "rwxs"])
    def test_anywhere(self, tmp_path: Path, name: str, inode: int, perms: str) -> None:
        """A mapping of that name is counted, resident or not."""
        space = self.explain(
            tmp_path, f"1000-3000 {perms} 0 0:0 {inode} [{name}]", "Private_Dirty: 4 kB"
        )

        assert sum(memory_class.size for memory_class in space.classes) == space.vsz == 8 * KiB
        assert sum(owner.size for owner in space.owners) == 8 * KiB
        assert (space.uss, space.mappings) == (4 * KiB, 1)

    def test_the_kernels_half(self, tmp_path: Path) -> None:
        """A mapping in the kernel's half is in no class and not in VmSize, whatever its name."""
        place = "ffffffffff600000-ffffffffff601000"
        for name in ("[vsyscall]", "[vdso]", "", "/x"):
            space = self.explain(
                tmp_path,
                "1000-2000 rw-p 0 0:0 0",
                f"{place} --xp 0 0:0 0 {name}",
                "Rss: 4 kB",
                "Private_Dirty: 4 kB",
            )

            assert sum(memory_class.size for memory_class in space.classes) == space.vsz == 4 * KiB
            assert [(owner.name, owner.size) for owner in space.owners] == [("unknown", 4 * KiB)]
            assert (space.rss, space.uss, space.mappings) == (0, 0, 1)
            assert [mapping.size for mapping in space.maps()] == [4 * KiB, 4 * KiB]
            assert space.maps()[1].owner == "kernel"

    @pytest.mark.parametrize("name", ["[stack]", "[heap]", "[vdso]", "[vvar]", "[anon:v8]"])
    def test_a_file_may_be_called_so(self, tmp_path: Path, name: str) -> None:
        """A mapping with an inode is a file or unknown; a writable one is no kernel page."""
        for line in (f"1000-3000 r--s 0 fe:1 7 {name}", f"1000-3000 rwxp 0 fe:1 7 {name}"):
            space = self.explain(tmp_path, line)

            assert [owner.name for owner in space.owners] == ["unknown"]
            assert space.class_size("special_pfn") == 0

    def test_writable_vvar(self, tmp_path: Path) -> None:
        """The kernel's data pages are read-only."""
        space = self.explain(tmp_path, "1000-3000 rw-p 0 0:0 0 [vvar]")

        assert space.class_size("special_pfn") == 0
        assert [owner.name for owner in space.owners] == ["unknown"]


class TestFuzzed:
    """For any input, the parser and all later steps succeed or raise MapsError."""

    @given(st.binary(max_size=400))
    def test_bytes(self, text: bytes) -> None:
        """Any bytes."""
        try:
            table = read(text)
        except MapsError:
            return
        assert len(table.names) == len(table) == len(table.rss)

    @given(nearly_smaps())
    @example(
        b"00001000-00002000 rw-p 00000000 00:00 0   [vsyscall]\nPrivate_Dirty: 4 kB\n"
        b"VmFlags: rd wr\n"
    )
    def test_generated_smaps(self, tmp_path_factory: pytest.TempPathFactory, text: bytes) -> None:
        """Recognisers and classes accept every file that the parser accepts."""
        folder = tmp_path_factory.mktemp("fuzzed", numbered=True)
        (folder / "smaps").write_bytes(text)

        self.explain(folder)

    @given(nearly_smaps(), st.sampled_from(["", "VmRSS: 8 kB\n", "VmSwap: 4 kB\nName:\tx\n"]))
    def test_generated_maps(
        self, tmp_path_factory: pytest.TempPathFactory, text: bytes, status: str
    ) -> None:
        """Without smaps every byte is in a class and has an owner too."""
        folder = tmp_path_factory.mktemp("fuzzed", numbered=True)
        (folder / "maps").write_bytes(text)
        (folder / "status").write_text(status)

        self.explain(folder)

    @pytest.mark.parametrize("name", SMAPS)
    def test_mutated(self, tmp_path: Path, name: str) -> None:
        """Real files with changed bytes, and swapped, removed and doubled lines."""
        generator = random.Random(name)
        text = SMAPS[name]
        for _ in range(60):
            (tmp_path / "smaps").write_bytes(mutated(text, generator))
            self.explain(tmp_path)

    @given(
        st.dictionaries(
            st.sampled_from(
                ["status", "limits", "smaps_rollup", "meminfo", "max_map_count", "core_pattern",
                 "overcommit_memory", "cgroup_memory"]
            ),
            st.one_of(
                st.binary(max_size=100),
                st.text("VmSizeRPdklimted: \tkB0123456789\n", max_size=100).map(str.encode),
            ),
        )
    )  # fmt: skip
    @example({"max_map_count": b"\x1c0"})
    def test_the_other_files(
        self, tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]
    ) -> None:
        """The other files may contain anything."""
        folder = tmp_path_factory.mktemp("fuzzed", numbered=True)
        (folder / "smaps").write_bytes(LINE + b"Rss: 12 kB\nPrivate_Dirty: 12 kB\n")
        for name, data in files.items():
            (folder / name).write_bytes(data)

        self.explain(folder)

    def explain(self, folder: Path) -> None:
        try:
            space = explain(path=folder)
        except MapsError:
            return
        assert sum(memory_class.size for memory_class in space.classes) == space.vsz
        assert sum(owner.size for owner in space.owners) == space.vsz
        assert all(owner.size >= 0 and owner.rss >= 0 for owner in space.owners)
        assert space.to_json()
        assert len(space.maps()) >= space.mappings
        parts = recognise(capture(SavedSource(folder))).parts
        for pieces in parts.values():
            ordered = sorted(piece[:2] for piece in pieces)
            assert all(a[1] <= b[0] for a, b in pairwise(ordered))


def mutated(text: bytes, generator: random.Random) -> bytes:
    lines = text.split(b"\n")
    for _ in range(generator.randrange(1, 6)):
        at = generator.randrange(len(lines))
        what = generator.randrange(5)
        if what == 0 and lines[at]:
            line = bytearray(lines[at])
            line[generator.randrange(len(line))] = generator.randrange(256)
            lines[at] = bytes(line)
        elif what == 1:
            del lines[at : at + generator.randrange(40)]
        elif what == 2:
            lines.insert(at, lines[generator.randrange(len(lines))] if lines else b"")
        elif what == 3:
            lines[at] = lines[at][: generator.randrange(len(lines[at]) + 1)]
        else:
            lines[at] = lines[at].replace(b" 0 kB", b" 4 kB")
        lines = lines or [b""]
    return b"\n".join(lines)
