"""`pyreserve.explain` compared with the kernel, psutil and smem, on running processes.

The processes are stopped. Their PSS and USS still change when a process that shares a page with
them starts or ends, so comparisons are repeated until they agree.
"""

import errno
import io
import itertools
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sysconfig
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import pytest

from helpers import subjects
from helpers.processes import COMMAND, environment, refused_in_one_line, run
from helpers.subjects import SUBJECTS, Stopped, kib_of, tool
from helpers.witness import PATIENCE, fresh_python, in_child, only_64_bit
from pyreserve import PAGE_SIZE, GiB, KiB, MiB, Region, TiB, explain, reserve, track
from pyreserve._system import proc
from pyreserve._system.maps import MapTable
from pyreserve.errors import AccessError, NoAddressSpaceError, RangeError, StateError
from pyreserve.procmem import AddressSpace, Owner, Sample, compare, load, sample, save
from pyreserve.procmem.read import snapshot
from pyreserve.procmem.read.sources import LiveSource

# Large processes, and what the kernel says of them: the same whatever the interpreter.
pytestmark = pytest.mark.heavy

Figures = TypeVar("Figures")

only_x86_64 = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="these are x86-64's addresses"
)
every_subject = pytest.mark.parametrize("name", SUBJECTS)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stopped]:
    """Stopped processes by name; all are ended after this module."""
    with ExitStack() as stack:
        yield Stopped(tmp_path_factory.mktemp("subjects"), stack)


def assert_agree(both: Callable[[], tuple[Figures, Figures]]) -> None:
    """Assert that two results agree, at once or within `PATIENCE` seconds."""
    deadline = time.monotonic() + PATIENCE
    ours, theirs = both()
    while ours != theirs and time.monotonic() < deadline:
        ours, theirs = both()
    assert ours == theirs


def figures(space: AddressSpace) -> tuple[int, int, int]:
    """RSS, PSS and USS in KiB."""
    assert space.rss is not None
    assert space.pss is not None
    assert space.uss is not None
    return space.rss // KiB, space.pss // KiB, space.uss // KiB


def kib_by_class(space: AddressSpace) -> dict[str, int]:
    return {memory_class.name: memory_class.size // KiB for memory_class in space.classes}


def kib_by_owner(space: AddressSpace) -> dict[str, int]:
    return {owner.name: owner.size // KiB for owner in space.owners}


@every_subject
class TestAgreement:
    """Other tools report the same figures."""

    def test_the_classes_are_all_of_vmsize(self, stopped: Stopped, name: str) -> None:
        """Every byte of VmSize is in one class and has one owner."""
        space = explain(stopped(name))

        assert (
            sum(memory_class.size for memory_class in space.classes)
            == kib_of(space.pid, "status")["VmSize"] * KiB
        )
        assert sum(owner.size for owner in space.owners) == space.vsz
        assert sum(mapping.size for mapping in space.maps() if mapping.class_name) == space.vsz
        assert len([mapping for mapping in space.maps() if mapping.class_name]) == space.mappings

    def test_the_figures_are_the_kernels(self, stopped: Stopped, name: str) -> None:
        """RSS, PSS and USS equal smaps_rollup, and `settled` is true."""
        pid = stopped(name)

        def both() -> tuple[object, object]:
            space, kernel = explain(pid), kib_of(pid, "smaps_rollup")
            uss = sum(kernel[f"Private_{what}"] for what in ("Clean", "Dirty", "Hugetlb"))
            return (*figures(space), space.settled), (kernel["Rss"], kernel["Pss"], uss, True)

        assert_agree(both)

    def test_memory_has_owners(self, stopped: Stopped, name: str) -> None:
        """The resident sizes of owners and of mappings sum to those of the classes."""
        space = explain(stopped(name))

        resident = space.class_size("resident_private") + space.class_size("resident_shared")
        assert sum(owner.rss for owner in space.owners) == resident
        assert sum(mapping.rss for mapping in space.maps()) == resident

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # psutil is renaming it
    def test_psutil_says_the_same(self, stopped: Stopped, name: str) -> None:
        """psutil's USS, PSS, RSS and VMS agree to the KiB."""
        psutil = pytest.importorskip("psutil")
        pid = stopped(name)
        # Its RSS is of statm, which is not exact on older kernels (percpu_counter_read_positive).
        exact = tuple(map(int, platform.release().split(".")[:2])) >= (6, 17)

        def both() -> tuple[object, object]:
            space, theirs = explain(pid), psutil.Process(pid).memory_full_info()
            return (space.uss, space.pss, space.rss if exact else 0, space.vsz), (
                theirs.uss,
                theirs.pss,
                theirs.rss if exact else 0,
                theirs.vms,
            )

        assert_agree(both)

    def test_smem_says_the_same(self, stopped: Stopped, name: str, tmp_path: Path) -> None:
        """smem's USS, PSS and RSS of the files that `save` wrote agree to the KiB.

        It adds up the PSS of the mappings, each of which the kernel rounds down; so does `explain`
        where there is no smaps_rollup. While smem itself runs, what it shares counts otherwise.
        """
        smem = tool("smem")
        pid = stopped(name)

        def both() -> tuple[object, object]:
            root = tmp_path / str(time.monotonic_ns())
            folder = root / "proc" / str(pid)
            save(pid, folder)
            whole = explain(path=folder)
            (folder / "smaps_rollup").unlink()
            (folder / "meminfo").rename(root / "proc/meminfo")  # where smem looks for it
            done = subprocess.run(
                [smem, "-S", root, "-H", "-c", "pid uss pss rss"],
                capture_output=True,
                text=True,
                check=True,
            )
            space = explain(path=folder)
            rss, pss, uss = figures(space)
            # What others share with it may have changed between smaps and its sum.
            near = 0 <= figures(whole)[1] - pss <= space.mappings
            return [pid, uss, pss, rss, rss, uss, True], [
                *map(int, done.stdout.split()),
                figures(whole)[0],
                figures(whole)[2],
                near,
            ]

        assert_agree(both)

    def test_saved_it_is_the_same(self, stopped: Stopped, name: str, tmp_path: Path) -> None:
        """The saved files of a process give the same explanation as the process."""
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
    """The explanation without the fields that need smaps."""
    plain = space.to_dict()
    del plain["details_kib"]
    for owner in plain["owners"]:
        del owner["evidence"]
    return plain


class TestOwners:
    """Each kind of process has its own owners."""

    @only_64_bit
    def test_pyreserve_playing_go(self, stopped: Stopped) -> None:
        """`pyreserve vsz --hold` is not taken for Go; its arena is the 128 GiB of the article."""
        space = explain(stopped("vsz"))

        owners = kib_by_owner(space)
        # Go asks for one of its pages more, to align the start.
        assert owners["pyreserve Go arena"] * KiB == 0xE208002000 - 0xC208000000
        assert owners["pyreserve Go bitmap"] * KiB == 8 * GiB
        assert owners["pyreserve Go spans"] * KiB == 128 * MiB
        assert space.ranges[0][:2] == (0xC000000000, 0xC000001000)
        assert space.ranges[-1] == (0xC208100000, 0xE208002000, "---p", "arena")
        assert "Largest owner: pyreserve Go arena" in space.verdict

    def test_numpy(self, stopped: Stopped) -> None:
        """numpy's libraries are mapped files; an array looks like any large malloc block."""
        space = explain(stopped("numpy"))

        owners = {owner.name: owner for owner in space.owners}
        assert owners["unknown"].rss >= 64 * MiB
        assert "anonymous mapping" in owners["unknown"].evidence
        assert owners["mapped files"].size > 10 * MiB
        assert any("/numpy/" in mapping.name for mapping in space.maps())
        assert space.class_size("resident_private") >= 64 * MiB

    @only_x86_64
    def test_node(self, stopped: Stopped) -> None:
        """V8's heap and the guards of its WebAssembly memory are separate owners."""
        owners = {owner.name: owner for owner in explain(stopped("node")).owners}

        wasm = owners["V8 WebAssembly memories and guards"]
        assert 8 * GiB <= wasm.size <= 17 * GiB
        assert 0 <= wasm.size - wasm.no_access <= MiB
        assert owners["V8 heap"].rss > MiB
        assert owners["mapped files"].rss > MiB

    @only_64_bit
    def test_java(self, stopped: Stopped) -> None:
        """The JVM's heap has exactly the size of -Xmx."""
        owners = kib_by_owner(explain(stopped("java")))

        assert owners["JVM heap"] == subjects.JAVA_HEAP_MIB * 1024
        assert owners["JVM code cache"] > 1024
        assert owners["thread stacks"] > 1024

    @only_x86_64
    def test_address_sanitizer(self, stopped: Stopped) -> None:
        """AddressSanitizer's shadow is 14 TiB, accessible; its gap is 2 TiB without access."""
        space = explain(stopped("sanitized"))

        owners = {owner.name: owner for owner in space.owners}
        shadow = owners["AddressSanitizer shadow"]
        assert 0 <= shadow.size - 14 * TiB <= MiB
        assert shadow.no_access == 0
        gap = owners["AddressSanitizer shadow gap"]
        assert (gap.size, gap.no_access) == (2 * TiB, 2 * TiB)
        assert owners["AddressSanitizer allocator"].size >= 4 * TiB
        assert space.class_size("accessible_untouched") > 14 * TiB - MiB

    @only_64_bit
    def test_threads_and_their_arenas(self, stopped: Stopped) -> None:
        """Each thread has a stack of the limit's size with a guard, and here a malloc arena.

        From glibc 2.42 on the guards are inside the stack's mapping, where they are not seen.
        """
        space = explain(stopped("threads"))

        owners = {owner.name: owner for owner in space.owners}
        stacks, arenas = owners["thread stacks"], owners["glibc malloc arenas"]
        assert stacks.size == subjects.THREADS * (subjects.STACK_KIB * KiB + PAGE_SIZE)
        hidden = "MADV_GUARD_INSTALL" in stacks.evidence
        assert stacks.no_access == (0 if hidden else subjects.THREADS * PAGE_SIZE)
        assert arenas.size == subjects.THREADS * 64 * MiB
        assert arenas.mappings == 2 * subjects.THREADS
        assert space.details["stacks"] == stacks.size + owners["main stack"].size

    def test_many_mappings(self, stopped: Stopped) -> None:
        """Every mapping of alternately writable pages is counted."""
        space = explain(stopped("mappings"))

        unknown = next(owner for owner in space.owners if owner.name == "unknown")
        assert subjects.PIECES <= unknown.mappings <= subjects.PIECES + 10
        assert space.mappings == len(space.maps()) - (space.maps()[-1].name == "[vsyscall]")
        assert unknown.no_access == subjects.PIECES // 2 * PAGE_SIZE
        assert unknown.rss >= -(-subjects.PIECES // 6) * PAGE_SIZE

    def test_pages_are_counted_as_smaps_does(
        self, stopped: Stopped, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Page counts, used for many mappings, agree with smaps."""
        pid = stopped("mappings")
        if tuple(map(int, platform.release().split(".")[:2])) >= (6, 7):
            assert "dirty" not in explain(pid).details

        def both() -> tuple[object, object]:
            counted = explain(pid)
            with monkeypatch.context() as patch:
                patch.setattr(snapshot, "_MANY_MAPPINGS", 1 << 62)
                from_smaps = explain(pid)
            assert "dirty" in from_smaps.details
            return _without_flags(counted), _without_flags(from_smaps)

        assert_agree(both)


class Mortal(io.FileIO):
    """A file of a process that calls `happen` before each read."""

    def __init__(self, file: io.FileIO, happen: Callable[[], None]) -> None:
        super().__init__(file.fileno(), closefd=False)
        self._happen = happen

    def readinto(self, buffer: Any, /) -> int:
        self._happen()
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self._happen()
        return super().readall()


def kill_before_read(
    which: int, process: "subprocess.Popen[bytes]", patch: pytest.MonkeyPatch, *, reaped: bool
) -> None:
    """End the process before open or read number `which` of its /proc files."""
    moments = itertools.count()
    opened, cgroups = LiveSource.open, proc.cgroup_memory

    def happen() -> None:
        if next(moments) == which:
            end(process, reaped=reaped)

    @contextmanager
    def mortal(source: LiveSource, name: str) -> Iterator[io.FileIO]:
        happen()
        with opened(source, name) as file:
            yield Mortal(file, happen)

    def cgroup_memory(pid: int) -> Iterator[tuple[int, int]]:
        happen()
        return cgroups(pid)

    patch.setattr(LiveSource, "open", mortal)
    patch.setattr(proc, "cgroup_memory", cgroup_memory)


def end(process: "subprocess.Popen[bytes]", *, reaped: bool) -> None:
    """Kill a child and wait until it is a zombie, or until it is reaped."""
    process.kill()
    if reaped:
        process.wait()
    else:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def consistent(space: AddressSpace) -> bool:
    return (
        0 < sum(memory_class.size for memory_class in space.classes) == space.vsz
        and 0 < figures(space)[2] <= figures(space)[0]
        and space.mappings > 0
    )


@pytest.fixture
def sleeping() -> Iterator["subprocess.Popen[bytes]"]:
    """A sleeping process."""
    with sleep() as process:
        yield process


@contextmanager
def sleep() -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen([tool("sleep"), "1000"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


class Merging(io.FileIO):
    """Open maps of this process; the region's mappings merge after the first read."""

    def __init__(self, path: str, region: Region) -> None:
        super().__init__(path)
        self._region = region

    def readinto(self, buffer: Any, /) -> int | None:
        got = super().readinto(buffer[:4096])
        self._region.commit(0, self._region.size)
        return got


def test_mappings_that_become_one_while_they_are_printed() -> None:
    """A mapping that merged during the reading replaces its earlier parts."""
    with reserve(8 * MiB) as region:
        for offset in range(0, region.size, 2 * PAGE_SIZE):
            region.commit(offset, PAGE_SIZE)
        with Merging("/proc/self/maps", region) as file:
            table = MapTable.read(file)

        assert all(end <= start for end, start in zip(table.end, table.start[1:], strict=False))
        assert any(
            start <= region.base and region.base + region.size <= end
            for start, end in zip(table.start, table.end, strict=True)
        )


class TestEnds:
    """Processes that end before or during reading, or have no memory."""

    @pytest.mark.parametrize("reaped", [False, True], ids=["zombie", "gone"])
    def test_before_each_reading(self, reaped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """At each moment of the end, the result is a consistent answer or NoAddressSpaceError."""
        endings = []
        for which in itertools.count():
            with sleep() as process, monkeypatch.context() as patch:
                kill_before_read(which, process, patch, reaped=reaped)
                try:
                    assert consistent(explain(process.pid))
                    endings.append("answer")
                except NoAddressSpaceError:
                    endings.append("error")
                if not ended(process):
                    break

        assert endings[0] == "error"
        assert endings.count("error") > 5

    def test_before_each_reading_of_the_last_attempt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same on the last attempt, which is not repeated."""
        monkeypatch.setattr(snapshot, "_ATTEMPTS", 1)
        for which in itertools.count():
            with sleep() as process, monkeypatch.context() as patch:
                kill_before_read(which, process, patch, reaped=False)
                with suppress(NoAddressSpaceError):
                    space = explain(process.pid)
                    assert consistent(space) or not space.settled
                    assert space.mappings > 0
                if not ended(process):
                    break

    def test_before_each_reading_of_a_sample(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """`sample` returns all figures or raises NoAddressSpaceError."""
        for which in itertools.count():
            with sleep() as process, monkeypatch.context() as patch:
                kill_before_read(which, process, patch, reaped=False)
                with suppress(NoAddressSpaceError):
                    found = sample(process.pid)
                    assert found.pss is not None
                    assert min(found.vsz, found.rss, found.pss, found.mappings) > 0
                if not ended(process):
                    break

    def test_before_each_reading_of_save(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """`save` writes files that can be explained, or none."""
        for which in itertools.count():
            folder = tmp_path / str(which)
            with sleep() as process, monkeypatch.context() as patch:
                kill_before_read(which, process, patch, reaped=False)
                try:
                    save(process.pid, folder)
                    assert consistent(explain(path=folder))
                except NoAddressSpaceError:
                    assert not folder.exists()
                if not ended(process):
                    break

    def test_at_any_moment(self, tmp_path: Path) -> None:
        """A process with many mappings is killed by another thread during the reading."""
        program = subjects.mappings_program(tmp_path)
        random = Random(1)
        for _ in range(10):
            with subjects.running(program) as pid:
                killer = threading.Timer(random.uniform(0, 0.15), os.kill, (pid, signal.SIGKILL))
                killer.start()
                try:
                    with suppress(NoAddressSpaceError):
                        while True:
                            space = explain(pid)
                            assert consistent(space) or not space.settled
                finally:
                    killer.join()

    def test_a_zombie(self, sleeping: "subprocess.Popen[bytes]") -> None:
        """The error calls a process that ended without being waited for a zombie."""
        end(sleeping, reaped=False)

        for read in (explain, sample):
            with pytest.raises(NoAddressSpaceError, match="zombie"):
                read(sleeping.pid)
        assert "zombie" in refused_in_one_line(run("explain", str(sleeping.pid)))

    def test_no_such_process(self, sleeping: "subprocess.Popen[bytes]", tmp_path: Path) -> None:
        """An unused process number is reported as unused."""
        end(sleeping, reaped=True)

        for read in (explain, sample, lambda pid: save(pid, tmp_path / "saved")):
            with pytest.raises(NoAddressSpaceError, match=f"no process {sleeping.pid}") as refused:
                read(sleeping.pid)
            assert isinstance(refused.value, ProcessLookupError)
            assert refused.value.errno == errno.ESRCH
        assert not (tmp_path / "saved").exists()
        refusal = refused_in_one_line(run("explain", str(sleeping.pid)))
        assert refusal == f"pyreserve: there is no process {sleeping.pid}"

    def test_a_kernel_thread(self) -> None:
        """A kernel thread has no address space; the error calls it a kernel thread."""
        pid = kernel_thread()

        with pytest.raises(NoAddressSpaceError, match="kernel thread"):
            explain(pid)
        assert "kernel thread" in refused_in_one_line(run("explain", str(pid)))

    @pytest.mark.parametrize("pid", [True, False, 1.0, "1", "self", b"1", "..", [1]])
    def test_pids_that_are_not_integers(self, pid: Any) -> None:
        """pid must be an integer."""
        for read in (explain, sample):
            with pytest.raises(TypeError):
                read(pid)

    @pytest.mark.parametrize("pid", [0, -1, -(2**70)])
    def test_pids_that_are_not_positive(self, pid: int) -> None:
        """pid must be positive."""
        for read in (explain, sample):
            with pytest.raises(ValueError, match="positive"):
                read(pid)
        assert run("explain", "--", str(pid)).returncode == 2

    @pytest.mark.parametrize("digits", [10, 11, 300, 4000])
    def test_numbers_that_are_too_large(self, digits: int) -> None:
        """A number above the maximum is reported as no process, however long."""
        for read in (explain, sample):
            with pytest.raises(NoAddressSpaceError, match="no such process"):
                read(10**digits)

    def test_a_number_that_is_too_large_for_the_command(self) -> None:
        """The command reports it in one line."""
        assert "no such process" in refused_in_one_line(run("explain", str(10**20)))

    def test_a_pid_and_a_path(self, tmp_path: Path) -> None:
        """pid and path are mutually exclusive."""
        with pytest.raises(ValueError, match="mutually exclusive"):
            explain(os.getpid(), path=tmp_path)


def ended(process: "subprocess.Popen[bytes]") -> bool:
    return process.returncode is not None or bool(
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
    )


def kernel_thread() -> int:
    """Find a kernel thread, or skip."""
    for status in Path("/proc").glob("[0-9]*/status"):
        with suppress(OSError):
            if re.search(r"^PPid:\t2$", status.read_text(errors="replace"), re.MULTILINE):
                return int(status.parent.name)
    pytest.skip("no kernel thread can be seen from here")


class TestPermission:
    """Processes that may not be read."""

    def test_a_process_of_another_user(self, sleeping: "subprocess.Popen[bytes]") -> None:
        """The error names the user that the process belongs to, and the capability needed."""
        pid = sleeping.pid if os.geteuid() == 0 else 1

        def refusals() -> list[str]:
            become_nobody()
            texts = []
            for read in (explain, sample, lambda pid: save(pid, Path("/nowhere"))):
                with pytest.raises(AccessError) as refused:
                    read(pid)
                texts.append(str(refused.value.strerror))
            return texts

        texts = in_child(refusals)

        assert len(texts) == 3
        assert issubclass(AccessError, PermissionError)
        assert all(f"process {pid} belongs to user 0" in text for text in texts)

    def test_the_command(self) -> None:
        """`pyreserve explain 1` reports the refusal in one line and exits with 1."""

        def exit_and_error() -> tuple[object, str]:
            # A user may not read root's virtual environment: all must have been imported by then.
            explained_by_the_command(os.getpid())
            become_nobody()
            return explained_by_the_command(1)

        code, err = in_child(exit_and_error)

        assert code == 1
        assert err.startswith("pyreserve: process 1 belongs to user ")
        assert err.count("\n") == 1


def explained_by_the_command(pid: int) -> tuple[object, str]:
    """Run the command in this process; return its exit status and standard error."""
    from pyreserve.cli.app import app

    err = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(err), pytest.raises(SystemExit) as left:
        app(["explain", str(pid)])
    return left.value.code, err.getvalue()


def become_nobody() -> None:
    """Drop root permanently."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)


class TestKinds:
    """Processes that differ from this one."""

    def test_one_that_runs_program_after_program(self, tmp_path: Path) -> None:
        """A process that runs execve repeatedly is never reported as ended."""
        program = subjects.restarting_program(tmp_path)
        with subjects.running(program) as pid:
            for number in range(200):
                assert explain(pid).pid == pid
                assert sample(pid).vsz > 0
                if number % 20 == 0:
                    save(pid, tmp_path / str(number))

    def test_a_32_bit_process(self, tmp_path: Path) -> None:
        """All addresses are below 4 GiB, and RSS and PSS equal the kernel's."""
        program = subjects.simple_program(tmp_path, "-m32")
        with subjects.running(program) as pid:
            subjects.stop(pid)

            def both() -> tuple[object, object]:
                space, kernel = explain(pid), kib_of(pid, "smaps_rollup")
                return figures(space)[:2], (kernel["Rss"], kernel["Pss"])

            assert_agree(both)
            space = explain(pid)

        assert space.maps()[-1].end <= 1 << 32
        assert {owner.name for owner in space.owners} >= {"main stack", "mapped files"}
        assert space.settled

    def test_another_namespace_of_processes(self, tmp_path: Path) -> None:
        """A process in another PID namespace is named by its number in this one."""
        unshare, program = tool("unshare"), subjects.simple_program(tmp_path)
        tried = subprocess.run(
            [unshare, "--pid", "--fork", "true"], capture_output=True, check=False
        )
        if tried.returncode:
            pytest.skip("unshare --pid is not allowed here")
        with subjects.running(unshare, "--pid", "--fork", "--kill-child", program) as outer:
            (pid,) = map(int, Path(f"/proc/{outer}/task/{outer}/children").read_text().split())
            assert re.search(rf"^NSpid:\t{pid}\t1$", Path(f"/proc/{pid}/status").read_text(), re.M)
            subjects.stop(pid)

            space = explain(pid)
            save(pid, tmp_path / "saved")

            assert (space.pid, space.name, space.settled) == (pid, "simple", True)
            assert space.vsz == kib_of(pid, "status")["VmSize"] * KiB
            assert explain(path=tmp_path / "saved").pid == pid

    def test_this_process_names_its_regions(self) -> None:
        """Regions have exact sizes, committed or not, and none once dropped or released."""
        found = fresh_python(
            """
            import gc, json
            from pyreserve import GiB, MiB, OutOfMemoryError, explain, reserve

            def regions():
                owners = [o for o in explain().owners if o.name == "pyreserve regions"]
                return [(o.size >> 10, o.rss >> 10, o.no_access >> 10, o.evidence) for o in owners]

            found = {"none": regions()}
            first = reserve(3 * GiB)
            found["one"] = regions()
            second = reserve(5 * MiB, mode="noreserve", dump=True, huge_pages="never")
            second.commit(0, 2 * MiB)
            second.view(0, MiB)[:] = b"1" * MiB
            found["two"] = regions()
            del first
            gc.collect()
            found["dropped"] = regions()
            second.release()
            found["released"] = regions()
            try:
                reserve(1 << 62)
            except OutOfMemoryError as error:  # its traceback keeps what was refused
                refused = error
            found["refused"] = regions()
            print(json.dumps(found))
            """
        )

        evidence = "this process's own regions, by their addresses"
        kib = {name: [tuple(owner) for owner in owners] for name, owners in found.items()}
        assert kib["none"] == kib["released"] == kib["refused"] == []
        assert kib["one"] == [(3 << 20, 0, 3 << 20, evidence)]
        assert kib["two"] == [((3 << 20) + 5120, 1024, (3 << 20) + 3072, evidence)]
        assert kib["dropped"] == [(5120, 1024, 3072, evidence)]

    def test_regions_of_another_process(self) -> None:
        """Regions are recognised by dd and reserved parts; getrandom's state page is not one."""
        script = """
        import os, threading
        import pyreserve
        os.urandom(8), {*map(hash, "ab")}
        held = [pyreserve.reserve(3 << 20), pyreserve.reserve(5 << 20)]
        held[1].commit(0, 1 << 20)
        """
        with subjects.running_python(textwrap.dedent(script)) as pid:
            subjects.stop(pid)

            owners = {owner.name: owner for owner in explain(pid).owners}

            smaps = Path(f"/proc/{pid}/smaps").read_text()
            assert (regions := owners["pyreserve regions"]).size == 8 * MiB
            assert regions.no_access == 7 * MiB
            assert "dd" in regions.evidence
            droppable = len(re.findall(r"^VmFlags:.* wf .*dd .*dp", smaps, re.MULTILINE))
            assert owners.get("vDSO getrandom state", Owner("")).mappings == droppable

    def test_threads_of_python(self) -> None:
        """With any libc, the stacks of 16 threads and malloc's arenas are recognised."""
        script = """
        import threading
        ready = threading.Barrier(17)
        def work():
            kept = [bytes(1000) for _ in range(100)]
            ready.wait()
            threading.Event().wait()
        for _ in range(16):
            threading.Thread(target=work, daemon=True).start()
        ready.wait()
        """
        with subjects.running_python(textwrap.dedent(script)) as pid:
            subjects.stop(pid)

            space = explain(pid)

            owners = kib_by_owner(space)
            limit, _ = resource.getrlimit(resource.RLIMIT_STACK)
            if limit == 8 * MiB:
                assert owners["thread stacks"] == 16 * (8 * MiB + PAGE_SIZE) // KiB
            has_mimalloc = sysconfig.get_config_var("Py_GIL_DISABLED")
            if any("/libc.so.6" in mapping.name for mapping in space.maps()) and not has_mimalloc:
                assert owners["glibc malloc arenas"] % (64 * KiB) == 0
                assert owners["unknown"] < 64 * KiB

    def test_guards_inside_a_mapping(self) -> None:
        """pagemap shows a guard in the lowest page, also without the flag in smaps."""
        found = fresh_python(
            """
            import json, platform
            from pyreserve import MiB, reserve
            from pyreserve._native import lib
            from pyreserve._system.limits import PAGE_SIZE
            from pyreserve.procmem.read.snapshot import capture
            from pyreserve.procmem.read.sources import LiveSource

            region = reserve(4 * MiB, huge_pages="never")
            region.commit(0, MiB)
            region.commit(2 * MiB, MiB)
            err = lib.vm_guard(region.base + 2 * MiB, PAGE_SIZE)
            places = {region.base: "none", region.base + 2 * MiB: "guarded"}
            guarded = capture(LiveSource(None)).guarded
            print(json.dumps([err, [places[at] for at in places if at in guarded]]))
            """
        )

        if tuple(map(int, platform.release().split(".")[:2])) >= (6, 15):
            assert found == [0, ["guarded"]]
        else:
            assert found[1] == []

    def test_regions_that_come_and_go_meanwhile(self) -> None:
        """Another thread may reserve, view and release regions during explain."""
        over = threading.Event()
        errors = []

        def churn() -> None:
            try:
                while not over.is_set():
                    region = reserve(PAGE_SIZE)
                    region.commit(0, PAGE_SIZE)
                    region.view(0, PAGE_SIZE)[0] = 1  # a view that nobody keeps
                    region.release()
            except BufferError as error:
                errors.append(error)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for _ in range(30):
                assert explain().pid == os.getpid()
        finally:
            over.set()
            thread.join()
        assert not errors


def test_a_fork_while_others_explain() -> None:
    """A child forked while other threads explain can explain itself: no lock is inherited."""
    ends = fresh_python(
        """
        import json, os, signal, threading
        from pyreserve import explain
        explain()  # the first one imports, and Python's own import locks are inherited
        over = threading.Event()

        def look():
            while not over.is_set():
                explain()

        threads = [threading.Thread(target=look, daemon=True) for _ in range(4)]
        for thread in threads:
            thread.start()
        ends = []
        for _ in range(40):
            child = os.fork()
            if child == 0:
                signal.alarm(60)
                explain()
                os._exit(0)
            ends.append(os.waitpid(child, 0)[1])
        over.set()
        print(json.dumps(ends))
        """
    )

    assert ends == [0] * 40


STRANGE_FILES = {
    "newline": b"a\nb",
    "escape": b"\x1b[31mred\x07",
    "deleted": b"not (deleted)",
    "space": b" both ends ",
    "header": b"00400000-00401000 rw-p 00000000 00:00 0 [heap]",
    "header line": b"x\n00400000-00401000 rw-p 00000000 00:00 0 [heap]\nVmFlags: rd wr",
    "sizes": b"x\nRss:                 100 kB",
    "backslash": rb"back\012slash",
    "no UTF-8": b"\xff\xfe\x80",
    "halves": "\ud800".encode(errors="surrogatepass"),
    "python's line ends": "a\x0b\x0c\x1c\x85\u2028b\r".encode(),
    "markup": b"[bold]x[-bold]",
    "long": b"n" * 255,
}

_STRANGE = """
import ctypes, mmap, os, sys
folder = os.fsencode(sys.argv[1])
kept = []
for name in sorted(os.listdir(folder)):
    with open(os.path.join(folder, name), "r+b") as file:
        access = mmap.PROT_READ | mmap.PROT_EXEC if name.startswith(b"no") else mmap.PROT_READ
        kept.append(mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=access))
    if name.startswith(b"x"):
        os.unlink(os.path.join(folder, name))
with open("/proc/self/comm", "wb") as comm:
    comm.write(b"a\\x0b\\n\\x1b[1m\\xff\\\\b")
"""


@pytest.fixture(scope="module")
def strange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, set[str]]]:
    """A stopped process with strange names of its own and of mappings; and the latter."""
    folder = tmp_path_factory.mktemp("strange")
    names = set()
    for name in STRANGE_FILES.values():
        path = os.path.join(os.fsencode(folder), name)
        with open(path, "wb") as file:
            file.write(bytes(PAGE_SIZE))
        printed = path.replace(b"\n", rb"\012") + b" (deleted)" * name.startswith(b"x")
        names.add(printed.decode(errors="surrogateescape"))
    with subjects.running_python(_STRANGE, folder) as pid:
        subjects.stop(pid)
        yield pid, names


class TestStrangeNames:
    """A name may contain any byte except zero, and in files except a slash."""

    def test_names_are_as_the_kernel_prints_them(self, strange: tuple[int, set[str]]) -> None:
        """Each name is complete, newlines as \\012, and adds no mapping and no size."""
        pid, names = strange
        space = explain(pid)

        found = {mapping.name for mapping in space.maps() if "/strange0/" in mapping.name}
        assert found == names
        assert space.vsz == kib_of(pid, "status")["VmSize"] * KiB
        assert space.settled
        starts = [mapping.start for mapping in space.maps()]
        lines = Path(f"/proc/{pid}/maps").read_bytes().split(b"\n")[:-1]
        assert starts == [int(line.partition(b"-")[0], 16) for line in lines]

    def test_json_escapes_bytes_that_are_not_utf_8(self, strange: tuple[int, set[str]]) -> None:
        """Bytes that are not UTF-8 are written as \\xNN: JSON readers refuse lone surrogates."""
        pid, _ = strange
        space = explain(pid)

        text = space.to_json()

        assert text.isascii()
        found = json.loads(text)
        assert found == space.to_dict()
        assert json.loads(json.dumps(found, ensure_ascii=False).encode()) == found
        # The kernel itself escapes newlines and backslashes here.
        assert found["name"] == space.name == "a\x0b\\n\x1b[1m\\xff\\\\b"

    def test_evidence_of_a_strange_program(self, tmp_path: Path) -> None:
        """A program path that is not UTF-8 is in the evidence, as \\xNN."""
        folder = tmp_path / os.fsdecode(b"\xff\n")
        folder.mkdir()
        program = subjects.simple_program(tmp_path).rename(folder / "libtcmalloc")
        with subjects.running(program) as pid:
            space = explain(pid)
            assert any(
                mapping.name == f"{tmp_path}/\udcff\\012/libtcmalloc" for mapping in space.maps()
            )

        found = json.loads(space.to_json())
        assert space.settled
        assert rf"{tmp_path}/\xff\012/libtcmalloc is mapped" in " ".join(
            owner["evidence"] for owner in found["owners"]
        )
        assert json.dumps(found, ensure_ascii=False).encode()

    @pytest.mark.parametrize(
        "locale",
        [
            {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
            {"LC_ALL": "C"},
            {"PYTHONUTF8": "1"},
            {"PYTHONIOENCODING": "latin-1"},
        ],
        ids=["ASCII", "C", "UTF-8", "Latin-1"],
    )
    def test_the_screen(self, strange: tuple[int, set[str]], locale: dict[str, str]) -> None:
        """The screen lists all mappings in any locale, without terminal control characters."""
        pid, names = strange
        done = subprocess.run(
            [*COMMAND, "explain", str(pid), "--maps"],
            capture_output=True,
            check=False,
            env={**environment(), **locale},
        )

        assert (done.returncode, done.stderr) == (0, b"")
        text = done.stdout.decode("latin-1" if "PYTHONIOENCODING" in locale else "utf-8")
        lines = text.split("\n")[:-1]
        assert len([line for line in lines if "/strange0/" in line]) == len(names)
        assert [line for line in lines if not line.isprintable()] == []
        assert f"pyreserve explain  pid {pid} (a?\\n?[1m?\\\\b)".replace("m?", "m\\xff") in lines
        assert any(line.endswith("/[bold]x[-bold]") for line in lines)
        ascii_only = "PYTHONCOERCECLOCALE" in locale or "PYTHONIOENCODING" in locale
        assert ("#" * 5 in text) == ascii_only
        assert ("\u2588" in text) != ascii_only

    def test_a_long_name_in_ascii(self, strange: tuple[int, set[str]], tmp_path: Path) -> None:
        """A long owner name is cut with ASCII characters only."""
        folder = tmp_path / "saved"
        save(strange[0], folder)
        smaps = folder / "smaps"
        long = b"[anon:" + b"n" * 79 + b"]"
        smaps.write_bytes(smaps.read_bytes().replace(b"[heap]", long, 1))

        done = subprocess.run(
            [*COMMAND, "explain", "--from", str(folder)],
            capture_output=True,
            check=False,
            env={**environment(), "PYTHONIOENCODING": "ascii"},
        )

        assert (done.returncode, done.stderr) == (0, b"")
        assert re.search(rb"^named nnnnn+\.\.\. ", done.stdout, re.MULTILINE)


class TestTrack:
    """`track` measures what a block of code changes."""

    def test_before_its_block(self) -> None:
        """Before the ``with`` block the figures are refused."""
        for read in (lambda: track().vsz, lambda: str(track()), lambda: track().before):
            with pytest.raises(StateError, match="track must be entered first"):
                read()

    def test_each_verb_changes_its_figures(self) -> None:
        """reserve, commit, touch, decommit and release change exactly the right figures."""
        found = fresh_python(
            """
            import json
            from pyreserve import MiB, reserve, track

            found = {}

            def note(name, tracked):
                found[name] = [
                    getattr(tracked, figure)
                    for figure in ("vsz", "reserved", "committed", "mappings", "rss")
                ]

            for _ in range(2):  # the second time Python has all that it needs
                with track() as reserving:
                    region = reserve(64 * MiB)
                with track() as committing:
                    region.commit(0, 16 * MiB)
                with track() as touching:
                    region.view(0, 8 * MiB)[::4096] = b"1" * 2048
                with track() as decommitting:
                    region.decommit(0, 16 * MiB)
                with track() as releasing:
                    region.release()
                for name, tracked in list(locals().items()):
                    if type(tracked) is track:
                        note(name, tracked)
            print(json.dumps(found))
            """
        )

        exact = {name: changes[:4] for name, changes in found.items()}
        assert exact["reserving"] == [64 * MiB, 64 * MiB, 0, 1]
        assert exact["committing"] == [0, -16 * MiB, 16 * MiB, 1]
        assert exact["touching"] == [0, 0, 0, 0]
        assert exact["decommitting"] == [0, 16 * MiB, -16 * MiB, -1]
        assert exact["releasing"] == [-64 * MiB, -64 * MiB, 0, -1]
        rss = {name: changes[4] for name, changes in found.items()}
        assert abs(rss["touching"] - 8 * MiB) < MiB // 2
        assert abs(rss["decommitting"] + 8 * MiB) < MiB // 2
        assert all(abs(rss[name]) < MiB // 2 for name in ("reserving", "committing", "releasing"))

    def test_inside_the_block(self) -> None:
        """Inside the block the changes are those so far; after it they stay."""
        with track() as tracked:
            first = tracked.reserved
            with reserve(GiB):
                assert tracked.reserved - first == GiB
                assert tracked.after is None
            inside = tracked.reserved
        with reserve(GiB):
            assert tracked.reserved == inside == first
            assert tracked.after is not None

    def test_nested(self) -> None:
        """A block inside another counts its own changes, and the outer one counts both."""
        with track() as outer, reserve(GiB):
            with track() as inner, reserve(2 * GiB):
                assert (outer.reserved, inner.reserved) == (3 * GiB, 2 * GiB)
            assert (outer.reserved, inner.reserved) == (GiB, 0)

        assert outer.reserved == 0

    def test_the_same_twice(self) -> None:
        """A tracker can be reused and starts again."""
        tracked = track()
        with tracked:
            kept = reserve(GiB)
        assert tracked.reserved == GiB
        with tracked:
            pass
        assert tracked.reserved == 0
        kept.release()

    def test_after_an_exception(self) -> None:
        """An exception passes through, and the changes until then are recorded."""
        tracked, kept = track(), []

        def fail() -> None:
            with tracked, reserve(GiB) as region:
                kept.append(reserve(2 * GiB))
                region.commit(0, 2 * GiB)

        with pytest.raises(RangeError):
            fail()

        assert tracked.reserved == 2 * GiB
        assert "reserved +2 GiB" in str(tracked)
        kept[0].release()

    @every_subject
    def test_a_sample_is_the_kernels(self, stopped: Stopped, name: str) -> None:
        """`sample` of a stopped process equals maps and smaps_rollup."""
        pid = stopped(name)

        def both() -> tuple[object, object]:
            kernel = kib_of(pid, "smaps_rollup")
            found = []
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                addresses, perms, *_ = line.split()
                start, _, end = addresses.partition("-")
                if "[vsyscall]" not in line:
                    found.append((perms, int(end, 16) - int(start, 16)))
            return sample(pid), Sample(
                vsz=sum(size for _, size in found),
                reserved=sum(size for perms, size in found if perms[:3] == "---"),
                committed=sum(size for perms, size in found if perms[1::2] == "wp"),
                rss=kernel["Rss"] * KiB,
                pss=kernel["Pss"] * KiB,
                mappings=len(found),
            )

        assert_agree(both)
        assert sample(pid).vsz == kib_of(pid, "status")["VmSize"] * KiB


class TestSave:
    """`save` writes the files of a process."""

    @pytest.mark.parametrize("there", ["smaps", "status", "maps.gz", "link"])
    def test_files_that_are_there_stay(self, tmp_path: Path, there: str) -> None:
        """`save` overwrites no file, follows no dangling link, and leaves none when refused."""
        if there == "link":
            (tmp_path / "smaps").symlink_to(tmp_path / "elsewhere")
        else:
            (tmp_path / there).write_text("mine")
        before = sorted(os.listdir(tmp_path))

        with pytest.raises(FileExistsError):
            save(None, tmp_path)

        assert sorted(os.listdir(tmp_path)) == before
        assert there == "link" or (tmp_path / there).read_text() == "mine"

    def test_a_folder_that_can_not_be_written(self, tmp_path: Path) -> None:
        """A refusal in an unwritable folder leaves no file."""
        os.chmod(tmp_path, 0o755)
        folder = tmp_path / "saved"
        folder.mkdir(mode=0o555)

        def refused() -> str:
            become_nobody()
            os.chdir("/")
            with pytest.raises(PermissionError) as error:
                save(None, folder)
            return str(error.value)

        assert in_child(refused)
        assert list(folder.iterdir()) == []

    def test_no_room(self, tmp_path: Path) -> None:
        """A file that can't be written completely leaves no file."""

        def refused() -> object:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
            with pytest.raises(OSError, match="too large") as error:
                save(None, tmp_path)
            return error.value.errno

        assert in_child(refused) == errno.EFBIG
        assert list(tmp_path.iterdir()) == []

    def test_paths_that_are_not_folders(self, tmp_path: Path) -> None:
        """A file in place of the folder or of a parent is refused."""
        file = tmp_path / "file"
        file.write_text("mine")

        for folder in (file, file / "below"):
            with pytest.raises((FileExistsError, NotADirectoryError)):
                save(None, folder)
        assert file.read_text() == "mine"

    def test_from_shows_the_saved_files(self, stopped: Stopped, tmp_path: Path) -> None:
        """`--save` and `--from` show the same; a second `--save` to the folder is refused."""
        pid, folder = str(stopped("threads")), tmp_path / "saved"

        saved = run("explain", pid, "--save", str(folder), "--json")

        assert saved.returncode == 0, saved.stderr
        assert json.loads(saved.stdout) == json.loads(
            run("explain", "--from", str(folder), "--json").stdout
        )
        again = run("explain", pid, "--save", str(folder))
        assert "exists already" in refused_in_one_line(again)


_GROWING = """
import json, sys
from pathlib import Path
from pyreserve import MiB, explain, reserve
first = explain().to_json()
region = reserve(1024 * MiB)
region.commit(0, 4 * MiB)
region.view(0, 2 * MiB)[:] = b"1" * (2 * MiB)
second = explain().to_json()
print(json.dumps([first, second]))
"""


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two explanations of a process that reserved and used memory in between."""
    folder = tmp_path_factory.mktemp("grown")
    files = folder / "a.json", folder / "b.json"
    for file, text in zip(files, fresh_python(_GROWING), strict=True):
        file.write_text(text)
    return files


class TestDiff:
    """`compare` reports what grew between two explanations."""

    def test_a_grown_process(self, grown: tuple[Path, Path]) -> None:
        """The growth of owner and class is exact."""
        difference = compare(*map(load, grown))

        assert difference.same_process
        owners = {change.name: change.by for change in difference.owners}
        resident = {change.name: change.by for change in difference.owners_resident}
        classes = {change.name: change.by for change in difference.classes}
        totals = {change.name: change.by for change in difference.totals}
        assert owners["pyreserve regions"] == GiB
        assert resident["pyreserve regions"] == 2 * MiB
        assert classes["no_access_reserved"] == GiB - 4 * MiB
        assert totals["vsz"] == sum(classes.values()) == sum(owners.values())
        assert difference.owners[0].name == "pyreserve regions"
        assert "Most addresses went to pyreserve regions: 1 GiB." in difference.verdict

    def test_the_command(self, grown: tuple[Path, Path]) -> None:
        """`--diff` shows the growth; with the files swapped, the signs are reversed."""
        forward = run("explain", "--diff", *map(str, grown))
        backward = run("explain", "--diff", *map(str, reversed(grown)), "--json")

        assert forward.returncode == 0, forward.stderr
        assert re.search(r"^pyreserve regions +0 B +1 GiB +\+1 GiB", forward.stdout, re.MULTILINE)
        assert json.loads(backward.stdout)["owners"][0]["change"] == -(1 << 20)

    def test_the_same_twice(self, grown: tuple[Path, Path]) -> None:
        """An explanation does not differ from itself."""
        difference = compare(load(grown[0]), load(grown[0]))

        assert difference.classes == difference.owners == difference.owners_resident == ()
        assert not any(change.by for change in difference.totals)
        assert difference.verdict == "VSZ did not change, memory (RSS) did not change."

    @pytest.mark.parametrize(
        "garbage",
        [
            b"",
            b"\0\xff",
            b"[]",
            b"null",
            b'"text"',
            b"[" * 100_000,
            b'{"schema": 1}',
            b'{"schema": 2}',
            b"1" * 5000,
            b"{",
        ],
        ids=range(10),
    )
    def test_garbage(self, grown: tuple[Path, Path], tmp_path: Path, garbage: bytes) -> None:
        """A file of another kind is refused in one line that names it."""
        file = tmp_path / "garbage.json"
        file.write_bytes(garbage)

        with pytest.raises(ValueError, match=r"garbage\.json") as refused:
            load(file)
        assert "\n" not in str(refused.value)

    @pytest.mark.parametrize("key", ["vsz_kib", "classes", "owners", "mappings"])
    @pytest.mark.parametrize("value", [None, "1", 1.5, True, [1], [{}], [{"name": 1}], {"a": 1}])
    def test_a_figure_of_another_type(
        self, grown: tuple[Path, Path], tmp_path: Path, key: str, value: object
    ) -> None:
        """One invalid field is enough to refuse a file."""
        file = tmp_path / "changed.json"
        file.write_text(json.dumps({**json.loads(grown[0].read_text()), key: value}))

        with pytest.raises(ValueError, match="was not written by pyreserve explain"):
            load(file)

    def test_the_command_refuses_garbage(self, grown: tuple[Path, Path], tmp_path: Path) -> None:
        """The command reports the same, and a missing file, without a traceback."""
        (tmp_path / "garbage").write_text("{")

        done = run("explain", "--diff", str(grown[0]), str(tmp_path / "garbage"))

        assert (done.returncode, done.stdout) == (2, "")
        assert "is not JSON" in done.stderr
        assert "Traceback" not in done.stderr
        missing = run("explain", "--diff", str(grown[0]), str(tmp_path / "missing"))
        assert "missing" in refused_in_one_line(missing)
