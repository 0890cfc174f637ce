"""`pyreserve.explain` held against the kernel, psutil and smem, on processes that run here.

They are stopped, so that nothing of theirs moves. Yet PSS and USS do when any process that shares a
page with them starts or ends: what is compared may need a second look.
"""

import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest
import subjects
from subjects import PATIENCE, SUBJECTS, Stopped, kib_of, tool
from witness import only_64_bit

from pyreserve import PAGE_SIZE, GiB, KiB, MiB, TiB, explain
from pyreserve.procmem import AddressSpace, capture, save

Figures = TypeVar("Figures")

only_x86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="these are x86-64's addresses"
)
every_subject = pytest.mark.parametrize("name", SUBJECTS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    """Stopped processes by their name; all are ended at the end of this file."""
    with ExitStack() as stack:
        yield Stopped(tmp_path_factory.mktemp("subjects"), stack)


def assert_agree(both: Callable[[], tuple[Figures, Figures]]) -> None:
    """Assert that two answers are the same, at once or soon."""
    deadline = time.monotonic() + PATIENCE
    ours, theirs = both()
    while ours != theirs and time.monotonic() < deadline:
        ours, theirs = both()
    assert ours == theirs


def figures(space: AddressSpace) -> tuple[int, int, int]:
    """RSS, PSS and USS in KiB."""
    return space.rss_kib, space.pss_kib, space.uss_kib


def kib_by_class(space: AddressSpace) -> dict[str, int]:
    return {one.name: one.kib for one in space.classes}


def kib_by_owner(space: AddressSpace) -> dict[str, int]:
    return {owner.name: owner.kib for owner in space.owners}


@every_subject
class TestAgreement:
    """What others say of the same processes."""

    def test_the_classes_are_all_of_vmsize(self, stopped: Stopped, name: str) -> None:
        """Every byte of VmSize is in one class and has one owner."""
        space = explain(stopped(name))

        assert sum(one.kib for one in space.classes) == kib_of(space.pid, "status")["VmSize"]
        assert sum(owner.kib for owner in space.owners) == space.vsz_kib
        assert sum(one.kib for one in space.maps() if one.class_name) == space.vsz_kib
        assert len([one for one in space.maps() if one.class_name]) == space.mappings

    def test_the_figures_are_the_kernels(self, stopped: Stopped, name: str) -> None:
        """RSS, PSS and USS are those of smaps_rollup, and it says that all is of one moment."""
        pid = stopped(name)

        def both() -> tuple[object, object]:
            space, kernel = explain(pid), kib_of(pid, "smaps_rollup")
            uss = sum(kernel[f"Private_{what}"] for what in ("Clean", "Dirty", "Hugetlb"))
            return (*figures(space), space.settled), (kernel["Rss"], kernel["Pss"], uss, True)

        assert_agree(both)

    def test_memory_has_owners(self, stopped: Stopped, name: str) -> None:
        """The owners' memory, and the mappings', is that of the classes."""
        space = explain(stopped(name))

        resident = space.class_kib("resident_private") + space.class_kib("resident_shared")
        assert sum(owner.rss_kib for owner in space.owners) == resident
        assert sum(one.rss_kib for one in space.maps()) == resident

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # psutil is renaming it
    def test_psutil_says_the_same(self, stopped: Stopped, name: str) -> None:
        """psutil's USS, PSS, RSS and VMS are the same to the KiB."""
        psutil = pytest.importorskip("psutil")
        pid = stopped(name)
        # Its RSS is of statm, which is not exact on older kernels (percpu_counter_read_positive).
        exact = tuple(map(int, platform.release().split(".")[:2])) >= (6, 17)

        def both() -> tuple[object, object]:
            space, theirs = explain(pid), psutil.Process(pid).memory_full_info()
            return (space.uss_kib, space.pss_kib, space.rss_kib if exact else 0, space.vsz_kib), (
                theirs.uss // KiB,
                theirs.pss // KiB,
                theirs.rss // KiB if exact else 0,
                theirs.vms // KiB,
            )

        assert_agree(both)

    def test_smem_says_the_same(self, stopped: Stopped, name: str, tmp_path: Path) -> None:
        """smem's USS, PSS and RSS of the files that `save` wrote are the same to the KiB.

        It adds up the PSS of the mappings, each of which the kernel rounds down; so does `explain`
        where there is no smaps_rollup. While smem itself runs, what it shares counts otherwise.
        """
        smem = tool("smem")
        pid = stopped(name)
        folder = tmp_path / "proc" / str(pid)
        save(pid, folder)
        whole = explain(path=folder)
        (folder / "smaps_rollup").unlink()
        (folder / "meminfo").rename(tmp_path / "proc/meminfo")  # where smem looks for it

        done = subprocess.run(
            [smem, "-S", tmp_path, "-H", "-c", "pid uss pss rss"],
            capture_output=True,
            text=True,
            check=True,
        )

        space = explain(path=folder)
        rss, pss, uss = figures(space)
        assert list(map(int, done.stdout.split())) == [pid, uss, pss, rss]
        assert figures(whole) == (rss, whole.pss_kib, uss)
        assert 0 <= whole.pss_kib - pss <= space.mappings

    def test_saved_it_is_the_same(self, stopped: Stopped, name: str, tmp_path: Path) -> None:
        """What was saved of a process is explained as the process is."""
        pid = stopped(name)

        def both() -> tuple[object, object]:
            live, folder = explain(pid), tmp_path / str(time.monotonic_ns())
            save(pid, folder)
            saved = explain(path=folder)
            if (
                live.details.keys() != saved.details.keys()
            ):  # the pages of the live one were counted
                shared = live.details.keys() & saved.details.keys()
                assert "dirty" not in shared
                return _without_flags(live), _without_flags(saved)
            return live, saved

        assert_agree(both)


def _without_flags(space: AddressSpace) -> object:
    """All but what needs the details of smaps."""
    plain = space.to_dict()
    del plain["details_kib"]
    for owner in plain["owners"]:
        del owner["evidence"]
    return plain


class TestOwners:
    """Each process is known by what is special to it."""

    @only_64_bit
    def test_pyreserve_playing_go(self, stopped: Stopped) -> None:
        """`pyreserve vsz --hold` is told from Go, and its arena is the 128 GiB of the article."""
        space = explain(stopped("vsz"))

        owners = kib_by_owner(space)
        # Go asks for one of its pages more, to align the start.
        assert owners["pyreserve Go arena"] * KiB == 0xE208002000 - 0xC208000000
        assert owners["pyreserve Go bitmap"] * KiB == 8 * GiB
        assert owners["pyreserve Go spans"] * KiB == 128 * MiB
        assert space.ranges[0][:2] == (0xC000000000, 0xC000001000)
        assert space.ranges[-1] == (0xC208100000, 0xE208002000, "---p", "arena")
        assert "is pyreserve Go arena" in space.verdict

    def test_numpy(self, stopped: Stopped) -> None:
        """numpy's files are files; an array looks like any large block of malloc's."""
        space = explain(stopped("numpy"))

        owners = {owner.name: owner for owner in space.owners}
        assert owners["unknown"].rss_kib >= 64 * 1024
        assert "anonymous mapping" in owners["unknown"].evidence
        assert owners["mapped files"].kib > 10 * 1024
        assert any("/numpy/" in one.name for one in space.maps())
        assert space.class_kib("resident_private") >= 64 * 1024

    @only_x86_64
    def test_node(self, stopped: Stopped) -> None:
        """V8 is named, and the guards of its WebAssembly memory apart."""
        owners = {owner.name: owner for owner in explain(stopped("node")).owners}

        wasm = owners["V8 WebAssembly memories and guards"]
        assert 8 * GiB <= wasm.kib * KiB <= 17 * GiB
        assert 0 <= wasm.kib - wasm.no_access_kib <= 1024
        assert owners["V8 heap"].rss_kib > 1024
        assert owners["mapped files"].rss_kib > 1024

    @only_64_bit
    def test_java(self, stopped: Stopped) -> None:
        """The JVM's heap is -Xmx exactly."""
        owners = kib_by_owner(explain(stopped("java")))

        assert owners["JVM heap"] == subjects.JAVA_HEAP_MIB * 1024
        assert owners["JVM code cache"] > 1024
        assert owners["thread stacks"] > 1024

    @only_x86_64
    def test_address_sanitizer(self, stopped: Stopped) -> None:
        """AddressSanitizer's shadow is 14 TiB and may be used, its gap 2 TiB and may not."""
        space = explain(stopped("sanitized"))

        owners = {owner.name: owner for owner in space.owners}
        shadow = owners["AddressSanitizer shadow"]
        assert 0 <= shadow.kib * KiB - 14 * TiB <= MiB
        assert shadow.no_access_kib == 0
        gap = owners["AddressSanitizer shadow gap"]
        assert (gap.kib * KiB, gap.no_access_kib * KiB) == (2 * TiB, 2 * TiB)
        assert owners["AddressSanitizer allocator"].kib * KiB >= 4 * TiB
        assert space.class_kib("accessible_untouched") > 14 * TiB // KiB - 1024

    @only_64_bit
    def test_threads_and_their_arenas(self, stopped: Stopped) -> None:
        """Each thread has a stack of the limit's size with a guard, and here a malloc arena."""
        space = explain(stopped("threads"))

        owners = {owner.name: owner for owner in space.owners}
        stacks, arenas = owners["thread stacks"], owners["glibc malloc arenas"]
        assert stacks.kib == subjects.THREADS * (subjects.STACK_KIB + PAGE_SIZE // KiB)
        assert stacks.no_access_kib == subjects.THREADS * PAGE_SIZE // KiB
        assert arenas.kib * KiB == subjects.THREADS * 64 * MiB
        assert arenas.mappings == 2 * subjects.THREADS
        assert space.details["stacks"] == stacks.kib + owners["main stack"].kib

    def test_many_mappings(self, stopped: Stopped) -> None:
        """Of pages that are writable by turns every mapping is counted, whoever made them."""
        space = explain(stopped("mappings"))

        unknown = next(owner for owner in space.owners if owner.name == "unknown")
        page = PAGE_SIZE // KiB
        assert subjects.PIECES <= unknown.mappings <= subjects.PIECES + 10
        assert space.mappings == len(space.maps()) - (space.maps()[-1].name == "[vsyscall]")
        assert unknown.no_access_kib == subjects.PIECES // 2 * page
        assert unknown.rss_kib >= -(-subjects.PIECES // 6) * page

    def test_pages_are_counted_as_smaps_does(
        self, stopped: Stopped, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where there are many mappings their pages are counted: smaps says the same."""
        pid = stopped("mappings")
        if tuple(map(int, platform.release().split(".")[:2])) >= (6, 7):
            assert "dirty" not in explain(pid).details

        def both() -> tuple[object, object]:
            counted = explain(pid)
            with monkeypatch.context() as patch:
                patch.setattr(capture, "_MANY", 1 << 62)
                from_smaps = explain(pid)
            assert "dirty" in from_smaps.details
            return _without_flags(counted), _without_flags(from_smaps)

        assert_agree(both)
