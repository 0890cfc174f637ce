"""Readers of /proc: documented lines, and the files of this process."""

import itertools
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyreserve
from pyreserve import PAGE_SIZE, KiB, MiB
from pyreserve._system import proc
from pyreserve._system.proc import MapsLine


class TestMapsLines:
    @pytest.mark.parametrize(
        ("line", "mapping"),
        [
            (
                "c000001000-c207ff0000 ---p 00000000 00:00 0 ",
                MapsLine(0xC000001000, 0xC207FF0000, "---p", ""),
            ),
            ("08200000-08201000 rw-p 00000000 00:00 0", MapsLine(0x8200000, 0x8201000, "rw-p", "")),
            (
                "7ffd3c1e2000-7ffd3c203000 rw-p 00000000 00:00 0                [stack]\n",
                MapsLine(0x7FFD3C1E2000, 0x7FFD3C203000, "rw-p", "[stack]"),
            ),
            (
                "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0          [vsyscall]",
                MapsLine(0xFFFFFFFFFF600000, 0xFFFFFFFFFF601000, "--xp", "[vsyscall]"),
            ),
            (
                "00400000-00452000 r-xp 00001000 08:02 173521      /usr/bin/dbus-daemon",
                MapsLine(0x400000, 0x452000, "r-xp", "/usr/bin/dbus-daemon"),
            ),
            (
                "00400000-00452000 r--s 00000000 fd:01 8388609     /tmp/a b  c (deleted)",
                MapsLine(0x400000, 0x452000, "r--s", "/tmp/a b  c (deleted)"),
            ),
            (
                "00400000-00452000 rw-p 00000000 00:00 0           [anon:a name]",
                MapsLine(0x400000, 0x452000, "rw-p", "[anon:a name]"),
            ),
            (
                "00400000-00452000 rw-s 00000000 00:01 1           /memfd:new\\012line (deleted)",
                MapsLine(0x400000, 0x452000, "rw-s", "/memfd:new\\012line (deleted)"),
            ),
        ],
    )
    def test_a_line_is_read(
        self, line: str, mapping: MapsLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Addresses, permissions and the name, including its spaces, are parsed."""
        (tmp_path / "self").mkdir()
        (tmp_path / "self/maps").write_text(line)
        monkeypatch.setattr(proc, "_PROC", tmp_path)

        assert proc.read_maps() == [mapping]


class TestMaps:
    def test_all_mappings_in_order(self) -> None:
        """Mappings are in address order without overlap, and include stack and program."""
        mappings = proc.read_maps()

        assert all(a.end <= b.start for a, b in itertools.pairwise(mappings))
        names = {mapping.name for mapping in mappings}
        assert "[stack]" in names
        assert str(Path(sys.executable).resolve()) in names

    def test_a_new_mapping_shows(self) -> None:
        """A reservation has its address, length and permissions in maps, until its release."""
        with pyreserve.reserve(8 * PAGE_SIZE, guard=True) as region:
            region.commit(2 * PAGE_SIZE, PAGE_SIZE)
            base = region.base

            mappings = [
                mapping for mapping in proc.read_maps() if mapping.start == base + 2 * PAGE_SIZE
            ]

            assert mappings == [MapsLine(base + 2 * PAGE_SIZE, base + 3 * PAGE_SIZE, "rw-p", "")]
        assert not any(
            mapping.start <= base + 2 * PAGE_SIZE < mapping.end for mapping in proc.read_maps()
        )

    def test_names_that_are_no_utf_8(self, tmp_path: Path) -> None:
        """A file name that is not UTF-8 is read without loss."""
        path = os.path.join(os.fsencode(tmp_path), b"n\xe4me \xff")  # noqa: PTH118, RUF100
        with open(path, "w+b") as file:  # noqa: PTH123, RUF100
            file.write(bytes(PAGE_SIZE))
            file.flush()
            with mmap.mmap(file.fileno(), PAGE_SIZE):
                names = [mapping.name for mapping in proc.read_maps()]

        assert os.fsdecode(path) in names

    def test_another_process(self) -> None:
        """Mappings and sizes of a child process are read by its PID."""
        script = "import sys; sys.stdout.write('ready'); sys.stdout.flush(); sys.stdin.read()"
        with subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            assert child.stdout is not None
            assert child.stdin is not None
            child.stdout.read(5)

            stacks = [
                [m for m in proc.read_maps(pid) if m.name == "[stack]"]
                for pid in (child.pid, str(child.pid), "self")
            ]
            size = proc.status_kib(child.pid)["VmSize"]
            child.stdin.close()
            child.wait()

        assert stacks[0] == stacks[1] != stacks[2]
        assert size > 0

    def test_a_process_that_does_not_exist(self) -> None:
        """A process that does not exist raises OSError."""
        with pytest.raises(OSError, match=r"proc"):
            proc.read_maps(2**31 - 1)

    def test_counting_is_counting_lines(self) -> None:
        """map_count counts what a reader of /proc/self/maps counts, without the vsyscall page."""
        before = proc.map_count()
        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()

        assert before == sum(not line.endswith("[vsyscall]") for line in lines)

    def test_a_file_called_as_the_vsyscall_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file named [vsyscall] is counted; the real page is recognised by its address."""
        (tmp_path / "self").mkdir()
        maps = tmp_path / "self/maps"
        line = "7f0000000000-7f0000001000 r--p 00000000 fe:01 7      /tmp/a [vsyscall]\n"
        gate = "ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0    [vsyscall]\n"
        monkeypatch.setattr(proc, "_PROC", tmp_path)

        counted = []
        for text in (line, line + gate, ""):
            maps.write_text(text)
            counted.append(proc.map_count())

        assert counted == [1, 1, 0]

    def test_counting_follows_the_mappings(self) -> None:
        """A reservation split into pieces adds as many mappings."""
        with pyreserve.reserve(64 * PAGE_SIZE, guard=True) as region:
            proc.map_count()
            before = proc.map_count()
            for page in range(1, 40, 2):
                region.commit(page * PAGE_SIZE, PAGE_SIZE)

            assert 40 <= proc.map_count() - before <= 42


class TestSizes:
    def test_the_status_of_this_process(self) -> None:
        """VmSize grows by the reserved bytes, VmData by the committed ones."""
        proc.status_kib()
        before = proc.status_kib()
        with pyreserve.reserve(512 * MiB) as region:
            region.commit(0, 64 * MiB)

            after = proc.status_kib()

        # The interpreter may map a little memory of its own between the readings.
        assert 512 * MiB <= (after["VmSize"] - before["VmSize"]) * KiB < 520 * MiB
        assert 64 * MiB <= (after["VmData"] - before["VmData"]) * KiB < 72 * MiB
        assert after["VmRSS"] > 0

    def test_only_sizes_are_read(self) -> None:
        """Lines of status that are not sizes in kB are omitted."""
        sizes = proc.status_kib()

        assert {"VmPeak", "VmSize", "VmRSS", "VmData", "VmLck"} <= set(sizes)
        assert not {"Name", "Pid", "Threads", "Uid"} & set(sizes)

    def test_the_rollup_adds_up(self) -> None:
        """Rss and Pss of smaps_rollup count touched memory, not reservations."""
        with pyreserve.reserve(64 * MiB) as region:
            region.commit(0, 8 * MiB)
            before = proc.rollup_kib()
            region.populate(0, 8 * MiB)

            after = proc.rollup_kib()

        # Pages of files come and go, and Pss shares them with other processes.
        for field in ("Rss", "Pss"):
            assert 6 * MiB <= (after[field] - before[field]) * KiB < 32 * MiB

    def test_the_memory_of_the_system(self) -> None:
        """MemTotal and the commit figures equal those of /proc/meminfo and sysconf."""
        sizes = proc.meminfo_kib()

        total = os.sysconf("SC_PHYS_PAGES") * PAGE_SIZE // KiB
        assert sizes["MemTotal"] == total
        assert {"MemAvailable", "Committed_AS", "CommitLimit", "SwapTotal"} <= set(sizes)

    def test_settings_of_vm(self) -> None:
        """vm_setting reads a number of /proc/sys/vm; an unknown name raises OSError."""
        assert proc.vm_setting("overcommit_memory") in {0, 1, 2}
        with pytest.raises(FileNotFoundError):
            proc.vm_setting("no_such_setting")


def mapped(*ranges: tuple[int, int]) -> list[MapsLine]:
    """Mappings at these addresses."""
    return [MapsLine(start, end, "rw-p", "") for start, end in ranges]


class TestGaps:
    @pytest.mark.parametrize(
        ("mappings", "gaps"),
        [
            ([], [(100, 200)]),
            ([(100, 200)], []),
            ([(0, 300)], []),
            ([(0, 100)], [(100, 200)]),
            ([(200, 300)], [(100, 200)]),
            ([(0, 150)], [(150, 200)]),
            ([(150, 300)], [(100, 150)]),
            ([(120, 130), (130, 140), (150, 160)], [(100, 120), (140, 150), (160, 200)]),
            ([(0, 10), (20, 30), (199, 201), (300, 400)], [(100, 199)]),
            ([(100, 101), (199, 200)], [(101, 199)]),
        ],
    )
    def test_gaps_between_mappings(
        self, mappings: list[tuple[int, int]], gaps: list[tuple[int, int]]
    ) -> None:
        """Gaps are the unmapped parts of the range, lowest first."""
        assert list(proc.free_gaps(mapped(*mappings), 100, 200)) == gaps

    def test_a_reservation_is_not_a_gap(self) -> None:
        """Reserved addresses are not free until they are released."""
        region = pyreserve.reserve(4 * PAGE_SIZE)
        low, high = region.base, region.base + 4 * PAGE_SIZE

        occupied = list(proc.free_gaps(proc.read_maps(), low, high))
        region.release()
        free = list(proc.free_gaps(proc.read_maps(), low, high))

        assert occupied == []
        assert free == [(low, high)]


class TestAvailableMemory:
    def test_no_more_than_the_system_has(self) -> None:
        """The estimate is positive and at most the system's memory."""
        assert 0 < proc.available_bytes() <= proc.meminfo_kib()["MemTotal"] * KiB

    @pytest.mark.parametrize(
        ("groups", "available"),
        [
            ([], 1000 * KiB),
            ([(2000 * KiB, 500 * KiB)], 1000 * KiB),
            ([(600 * KiB, 500 * KiB)], 100 * KiB),
            ([(600 * KiB, 500 * KiB), (10_000 * KiB, 9_990 * KiB)], 10 * KiB),
            ([(600 * KiB, 700 * KiB)], 0),
        ],
    )
    def test_the_tightest_group_decides(
        self, monkeypatch: pytest.MonkeyPatch, groups: list[tuple[int, int]], available: int
    ) -> None:
        """The tightest cgroup above the process decides, and the result is never below 0."""

        def limited() -> Iterator[tuple[int, int]]:
            yield from groups

        monkeypatch.setattr(proc, "meminfo_kib", lambda: {"MemAvailable": 1000})
        monkeypatch.setattr(proc, "cgroup_memory", limited)

        assert proc.available_bytes() == available

    @pytest.mark.parametrize("version", [1, 2])
    def test_both_versions_of_cgroups(
        self, version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A group's limit counts in either version, its page cache does not, and parents count.

        A group may have any name, invalid UTF-8 and Python's ends of lines among them.
        """
        proc_dir, groups = tmp_path / "proc", tmp_path / "groups"
        outer = "a\x0b:\udcff"
        (proc_dir / "self").mkdir(parents=True)
        line = f"0::/{outer}/b\n" if version == 2 else f"1:cpu:/\n7:memory,x:/{outer}/b\n"
        (proc_dir / "self/cgroup").write_bytes(os.fsencode(line))
        (groups / outer / "b").mkdir(parents=True)
        _, limit, use, cache = proc._CGROUPS[2 - version]
        for place, most in ((groups / outer / "b", "1000000"), (groups / outer, "900000")):
            (place / limit).write_text(most)
            (place / use).write_text("500000")
            (place / "memory.stat").write_text(f"anon 1\n{cache}200000\nfile_mapped 5\n")
        monkeypatch.setattr(proc, "_PROC", proc_dir)
        moved = tuple((str(groups), *rest) for _, *rest in proc._CGROUPS)
        monkeypatch.setattr(proc, "_CGROUPS", moved)

        assert list(proc.cgroup_memory()) == [(1000000, 300000), (900000, 300000)]

    def test_use_is_never_negative(self, tmp_path: Path) -> None:
        """The page cache is read after the use, and may have grown beyond it; the result is 0."""
        (tmp_path / "memory.current").write_text("4096")
        (tmp_path / "memory.stat").write_text("file 8192\n")

        group = proc.MemoryCgroup(str(tmp_path), "memory.max", "memory.current", "file ")

        assert group.used() == 0

    def test_a_name_with_ends_of_lines_of_pythons_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A process's name cannot inject lines into status."""
        (tmp_path / "self").mkdir()
        (tmp_path / "self/status").write_text("Name:\tx\x0bTHP_enabled:0\nPid:\t5\n")
        monkeypatch.setattr(proc, "_PROC", tmp_path)

        assert proc.status() == {"Name": "x\x0bTHP_enabled:0", "Pid": "5"}


class TestProcesses:
    def test_a_command_name_of_any_bytes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Only the kernel's line end is removed, and bytes that are not UTF-8 are escaped."""
        (tmp_path / "7").mkdir()
        (tmp_path / "7/comm").write_bytes(b"a\xff\n\n")
        monkeypatch.setattr(proc, "_PROC", tmp_path)

        assert proc.command_name(7) == "a\\xff\n"

    def test_a_zombie_has_no_mappings(self) -> None:
        """The maps of a process that has ended are empty."""
        child = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)

        assert (proc.has_mappings(os.getpid()), proc.has_mappings(child.pid)) == (True, False)
        child.wait()
