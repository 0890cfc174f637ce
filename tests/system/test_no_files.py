"""All verbs work without /proc and /sys, and with no free file descriptor."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pyreserve
from helpers import witness
from pyreserve import GiB, KiB, MiB, OutOfMemoryError
from pyreserve._system import limits, proc
from pyreserve._system.extras import import_extra

# Every public constructor and the verbs that follow; prints {name: error}.
VERBS = """
import errno, json, os, resource, sys
import numpy, prometheus_client
from pyreserve import *
from pyreserve import costs, doctor, layouts, prometheus

def region(**wish):
    with reserve(MiB, **wish) as region:
        region.commit(0, 64 * KiB)
        region.populate(0, PAGE_SIZE)
        region.ndarray(0, 4, "int64")[:] = 1
        region.view(0, 16)[0] = 1
        region.discard(0, PAGE_SIZE)
        region.decommit(0, 64 * KiB)

def refused(verb, limit):
    try:
        verb()
    except OutOfMemoryError as error:
        assert error.limit == limit, error
    else:
        raise AssertionError("not refused")

def arena(name):
    with Arena(layout=name) as arena:
        arena.alloc(100).free()
        arena.free_many(arena.alloc_many([1, 2]))
        arena.grow(1)
        arena.memstats()
        arena.start_scavenger(100)
        arena.stop_scavenger()
        arena.trim()

def pool():
    with Pool(64) as pool:
        slot = pool.alloc()
        pool.view(slot)[0] = 1
        pool.free(slot)
        pool.trim()

def bump():
    with BumpArena(MiB) as bump, bump.scope():
        bump.alloc(100)

def bitmap():
    bitmap = Bitmap(1000)
    bitmap.set(3, 5)
    bitmap.release()

def scraped():
    registry = prometheus_client.CollectorRegistry()
    with reserve(MiB) as region:
        prometheus.register(region, registry=registry)
        assert list(registry.collect())

VERBS = {
    "reserve": region,
    "noreserve": lambda: region(mode="noreserve"),
    "prefer": lambda: region(huge_pages="prefer"),
    "placed": lambda: region(name="x", guard=True, align=MiB, hint=1 << 30),
    "too much": lambda: refused(lambda: reserve(1 << 60), "address space"),
    "PageAllocator": lambda: PageAllocator(10).alloc(3),
    "Pool": pool,
    "BumpArena": bump,
    "Bitmap": bitmap,
    "GrowableBuffer": lambda: GrowableBuffer(MiB).extend(b"x"),
    "GrowableArray": lambda: GrowableArray("i8", 1000).append(1),
    **{name: (lambda name=name: arena(name)) for name in layouts.names()},
    "capabilities": capabilities,
    "diagnose": doctor.diagnose,
    "prometheus": scraped,
}

def problems(verbs=VERBS):
    problems_by_name = {}
    for name, verb in verbs.items():
        try:
            verb()
        except BaseException as error:
            problems_by_name[name] = repr(error)
    return problems_by_name
"""
NO_DESCRIPTOR = """
problems({"too much": VERBS["too much"], "diagnose": VERBS["diagnose"], "prometheus": scraped})
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
held = []
try:
    while True:
        held.append(os.open("/dev/null", os.O_RDONLY))
except OSError as error:
    assert error.errno == errno.EMFILE
problems_by_name = problems()
for descriptor in held:
    os.close(descriptor)
print(json.dumps(problems_by_name))
"""
# Where nobody may unmount anything: the names under which the package knows the two.
RENAMED = """
from pyreserve import capabilities as _
from pyreserve._system import proc
module = sys.modules["pyreserve._system.machine"]
proc._PROC = "/nowhere/proc"
proc._CGROUPS = ()
module.HUGETLB, module.THP = "/nowhere/hugepages", "/nowhere/transparent_hugepage"
print(json.dumps(problems()))
"""
MEASURES = """
def measured():
    table = costs.measure(costs.plan(only=["commit"], longest=1 << 16), budget=0.1)
    assert table.machine["memory"] > 0
print(json.dumps(problems(VERBS | {"costs": measured})))
"""


def _unshared(command: list[str]) -> list[str]:
    hidden = 'mount -t tmpfs none /proc && mount -t tmpfs none /sys && exec "$@"'
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    return ["unshare", *own, "--mount", "sh", "-c", hidden, "sh", *command]


def test_no_file_descriptor_is_left() -> None:
    """All verbs work without a free file descriptor."""
    assert witness.fresh_python(VERBS + NO_DESCRIPTOR) == {}


def test_proc_and_sys_are_elsewhere() -> None:
    """All verbs work if /proc and /sys lack the files that are read."""
    assert witness.fresh_python(VERBS + RENAMED) == {}


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run(_unshared(["true"]), capture_output=True, check=False).returncode != 0,
    reason="nothing can be mounted over /proc here",
)
def test_proc_and_sys_are_not_mounted() -> None:
    """All verbs and the measuring of costs work without /proc and /sys mounted."""
    done = subprocess.run(
        _unshared([sys.executable, "-c", VERBS + MEASURES]),
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {}


class TestDefaults:
    @pytest.fixture
    def nowhere(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(proc, "_PROC", tmp_path)

    @pytest.mark.usefixtures("nowhere")
    def test_settings(self) -> None:
        """An unreadable setting has the kernel's default; a name without one raises KeyError."""
        assert proc.setting_or_default("overcommit_memory") == 0
        assert proc.setting_or_default("max_map_count") == 65530
        assert proc.setting_or_default("mmap_min_addr") == 65536
        with pytest.raises(KeyError):
            proc.setting_or_default("no_such_setting")

    @pytest.mark.usefixtures("nowhere")
    def test_capabilities(self) -> None:
        """Capabilities have the defaults, and address_bits is still right."""
        caps = pyreserve.capabilities()

        assert (caps.overcommit_memory, caps.max_map_count) == (0, 65530)
        stack = next(m for m in Path("/proc/self/maps").read_text().splitlines() if "[stack]" in m)
        end = int(re.split("[- ]", stack)[1], 16)
        assert caps.address_bits == (end - 1).bit_length()

    @pytest.mark.usefixtures("nowhere")
    def test_available_memory(self) -> None:
        """Free physical memory counts as available."""
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert 0 < proc.available_bytes() <= total

    @pytest.mark.usefixtures("nowhere")
    def test_a_refusal_says_that_it_could_not_look(self) -> None:
        """If the limit is unreadable, the error says so."""
        error = limits.refusal("commit", errno.ENOMEM, MiB)

        assert error.limit is None
        assert "no known limit explains it, and /proc is unreadable (No such file" in str(error)

    def test_a_limit_that_needs_no_looking(self) -> None:
        """A limit below the requested bytes is named although /proc is unreadable."""

        def child() -> tuple[str | None, str]:
            proc._PROC = "/nowhere"
            resource.setrlimit(resource.RLIMIT_AS, (64 * GiB, 64 * GiB))
            with pytest.raises(OutOfMemoryError) as refused:
                pyreserve.reserve(128 * GiB)
            return refused.value.limit, str(refused.value)

        limit, text = witness.in_child(child)

        assert limit == "RLIMIT_AS"
        assert text.endswith("RLIMIT_AS (ulimit -v) is 64 GiB")


FULL = """
import json, pyreserve, sys
from pyreserve import PAGE_SIZE, capabilities, reserve
before = capabilities()
region, at = reserve(1 << 40), 0
try:
    while True:
        region.commit(at, PAGE_SIZE)
        at += 2 * PAGE_SIZE
except pyreserve.OutOfMemoryError as error:
    limit = error.limit
try:
    # Full, and with one, two and three pieces less: the kernel may refuse a page, or to split it.
    same = [capabilities() == before]
    for _ in range(3):
        at -= 2 * PAGE_SIZE
        region.decommit(at, PAGE_SIZE)
        same.append(capabilities() == before)
    region.commit(at, PAGE_SIZE)
    try:
        pyreserve.GrowableArray("i8", 1000)
        numpy = None
    except BaseException as error:
        numpy = type(error).__name__, str(error)
finally:
    region.release()
print(json.dumps([limit, same, numpy]))
"""


@pytest.mark.skipif(
    witness.vm_setting("max_map_count") > 140_000, reason="vm.max_map_count is too high to reach"
)
def test_the_map_table_is_full() -> None:
    """With a full address space capabilities() is unchanged, numpy not "missing"."""
    limit, same, numpy = witness.fresh_python(FULL)

    assert (limit, same) == ("max_map_count", [True] * 4)
    kind, text = numpy
    assert kind in {"ImportError", "MemoryError", "OSError"}
    assert "pip install 'pyreserve" not in text


class TestExtras:
    def test_one_that_is_missing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The error names the extra."""
        monkeypatch.setitem(sys.modules, "no_such_library", None)
        with pytest.raises(ImportError, match=r"^it needs no_such_library: .*'pyreserve\[x\]'$"):
            import_extra("no_such_library", "x", "it")
        with pytest.raises(ImportError, match=r"^it needs no_such_one: .*'pyreserve\[x\]'$"):
            import_extra("no_such_one.part", "x", "it")

    @pytest.mark.parametrize(
        ("source", "error", "pattern"),
        [
            ("raise ImportError('x.so: failed to map segment')", ImportError, "^x.so: failed"),
            ("import no_such_dependency", ModuleNotFoundError, "no_such_dependency"),
            ("raise MemoryError('too much')", MemoryError, "too much"),
            ("raise OSError(24, 'Too many open files')", OSError, "Too many"),
        ],
    )
    def test_one_that_fails(
        self,
        source: str,
        error: type[Exception],
        pattern: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Other import errors are raised unchanged."""
        (tmp_path / "a_library_that_fails.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

        with pytest.raises(error, match=pattern):
            import_extra("a_library_that_fails", "x", "it")


class TestStrictOvercommit:
    """vm.overcommit_memory=2 on a machine of 8 GiB, simulated by files."""

    LIMIT, USED = 4 * GiB, 3 * GiB

    @pytest.fixture
    def machine(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        """Write the files of /proc; `status` is this process's."""

        def write(*, vsz: int, root: bool = False, used: int = self.USED) -> None:
            (tmp_path / "sys/vm").mkdir(parents=True, exist_ok=True)
            settings = {
                "overcommit_memory": 2,
                "overcommit_ratio": 50,
                "overcommit_kbytes": 0,
                "max_map_count": 65530,
                "admin_reserve_kbytes": 8192,
                "user_reserve_kbytes": 131072,
            }
            for name, value in settings.items():
                (tmp_path / "sys/vm" / name).write_text(f"{value}\n")
            sizes = {
                "MemTotal": 8 * GiB,
                "SwapTotal": 0,
                "Committed_AS": used,
                "CommitLimit": self.LIMIT,
            }
            text = "".join(f"{name}: {size // KiB} kB\n" for name, size in sizes.items())
            (tmp_path / "meminfo").write_text(text)
            (tmp_path / "self").mkdir(exist_ok=True)
            (tmp_path / "self/maps").write_text("00001000-00002000 rw-p 00000000 00:00 0\n")
            capabilities = f"{1 << 21 if root else 0:016x}"
            (tmp_path / "self/status").write_text(
                f"VmSize: {vsz // KiB} kB\nVmData: 0 kB\nCapEff:\t{capabilities}\n"
            )

        monkeypatch.setattr(proc, "_PROC", tmp_path)
        return write

    def test_the_kernels_reserves(self, machine: Any) -> None:
        """The reserves are 8 MiB for root, and 1/32 of the VSZ, at most 128 MiB."""
        machine(vsz=GiB)
        assert limits.strict_commit().left == GiB - 8 * MiB - 32 * MiB
        machine(vsz=1 << 40)
        assert limits.strict_commit().left == GiB - 8 * MiB - 128 * MiB
        machine(vsz=GiB, root=True)
        assert limits.strict_commit().left == GiB - 32 * MiB
        machine(vsz=GiB, used=self.LIMIT)
        assert limits.strict_commit().left == 0

    def test_a_refusal_counts_it(self, machine: Any) -> None:
        """A refusal caused by the kernel's reserves names them."""
        machine(vsz=1 << 40)

        error = limits.refusal("commit", errno.ENOMEM, GiB - 100 * MiB)

        assert error.limit == "overcommit"
        assert (
            "vm.overcommit_memory is 2, and Committed_AS is 3 GiB of a CommitLimit of 4 GiB, of "
            "which the kernel keeps back 8 MiB for root (vm.admin_reserve_kbytes) and 128 MiB for "
            "user_reserve (1/32 of this process's VSZ, at most vm.user_reserve_kbytes)"
        ) in str(error)

    def test_the_kernel_counts_in_batches(self, machine: Any) -> None:
        """Committed_AS may differ from the kernel's own count by at most 1/256 of memory."""
        machine(vsz=0, root=True)

        near, far = (
            limits.refusal("commit", errno.ENOMEM, GiB - nbytes) for nbytes in (32 * MiB, 33 * MiB)
        )

        assert (near.limit, far.limit) == ("overcommit", None)

    def test_the_doctor_counts_it(self, machine: Any) -> None:
        """`left` is the number of bytes that the kernel allows."""
        from pyreserve.doctor import limits as checks

        machine(vsz=1 << 40)

        (finding,) = dict(checks.CHECKS)["overcommit"]()

        assert "at most 888 MiB more" in finding.allows
        assert "of which the kernel keeps back 8 MiB for root" in finding.fact
        assert finding.values["admin_reserve"] == 8 * MiB
        assert finding.values["user_reserve"] == 128 * MiB
