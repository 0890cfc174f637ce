"""Kernel features, checked by other means than pyreserve's."""

import contextlib
import ctypes
import mmap
import os
import platform
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import pyreserve
from pyreserve import PAGE_SIZE, Capabilities, capabilities

MADV_FREE = 8
MADV_WIPEONFORK = 18
MADV_POPULATE_WRITE = 23
MADV_GUARD_INSTALL = 102
PR_SET_VMA = 0x53564D41


def kernel() -> tuple[int, int]:
    """The version of the running kernel."""
    version = re.match(r"(\d+)\.(\d+)", platform.release())
    assert version
    return int(version[1]), int(version[2])


def advice_works(advice: int) -> bool:
    """Call madvise with the advice on a private page."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, PAGE_SIZE, flags=private) as page:
        try:
            page.madvise(advice)
        except OSError:
            return False
    return True


def names_work() -> bool:
    """Name a page of memory, and look for the name in /proc/self/maps."""
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with mmap.mmap(-1, PAGE_SIZE, flags=private) as page:
        libc = ctypes.CDLL(None, use_errno=True)
        exported = ctypes.c_char.from_buffer(page)
        address = ctypes.c_ulong(ctypes.addressof(exported))
        name = ctypes.c_char_p(b"test of names")
        size = ctypes.c_ulong(PAGE_SIZE)
        libc.prctl(PR_SET_VMA, ctypes.c_ulong(0), address, size, name)
        del exported
        return "[anon:test of names]" in Path("/proc/self/maps").read_text(errors="replace")


def sys_vm(name: str) -> int:
    """Read /proc/sys/vm/NAME."""
    return int(Path("/proc/sys/vm", name).read_text())


class TestValues:
    def test_sizes_and_settings_are_the_kernels(self) -> None:
        """Page size and vm settings equal those read from sysconf and /proc."""
        caps = capabilities()

        assert caps.page_size == PAGE_SIZE == os.sysconf("SC_PAGE_SIZE") == mmap.PAGESIZE
        assert caps.overcommit_memory == sys_vm("overcommit_memory")
        assert caps.max_map_count == sys_vm("max_map_count")

    def test_huge_pages_are_those_of_sys(self) -> None:
        """The sizes of huge pages come from /sys, ascending, the transparent one among them."""
        caps = capabilities()

        sizes = caps.huge_page_sizes
        assert list(sizes) == sorted(set(sizes))
        assert all(size > PAGE_SIZE and size & (size - 1) == 0 for size in sizes)
        listed = Path("/sys/kernel/mm/hugepages")
        assert {int(e.name[10:-2]) * 1024 for e in listed.glob("hugepages-*kB")} <= set(sizes)
        transparent = Path("/sys/kernel/mm/transparent_hugepage/enabled")
        if transparent.exists():
            assert f"[{caps.transparent_huge_pages}]" in transparent.read_text()
        else:
            assert caps.transparent_huge_pages is None

    def test_address_bits(self) -> None:
        """All mappings are below 2**address_bits, and the stack is in the upper half."""
        bits = capabilities().address_bits

        lines = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        ends = {
            line.split()[-1]: int(line.split()[0].split("-")[1], 16)
            for line in lines
            if "[vsyscall]" not in line
        }
        assert max(ends.values()) <= 1 << bits
        assert ends["[stack]"] > 1 << (bits - 1)
        fits = bits < 8 * ctypes.sizeof(ctypes.c_void_p)
        with pytest.raises(pyreserve.OutOfMemoryError if fits else pyreserve.RangeError):
            pyreserve.reserve(PAGE_SIZE, at=1 << bits)

    @pytest.mark.parametrize("which", ["AS", "DATA"])
    def test_limits_are_those_of_the_process(self, which: str) -> None:
        """The limits are the process's soft limits in bytes, None if unlimited."""
        script = f"""
import resource
from pyreserve import capabilities
first = capabilities().rlimit_{which.lower()}
resource.setrlimit(resource.RLIMIT_{which}, (3 << 30, -1))
second = capabilities().rlimit_{which.lower()}
resource.setrlimit(resource.RLIMIT_{which}, (-1, -1))
print(first, second, capabilities().rlimit_{which.lower()})
"""
        soft, hard = resource.getrlimit(getattr(resource, f"RLIMIT_{which}"))
        if hard != resource.RLIM_INFINITY:
            pytest.skip("this process cannot raise the limit")

        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )

        first = None if soft == resource.RLIM_INFINITY else soft
        assert done.stdout.split() == [str(first), str(3 << 30), "None"]


class TestFeatures:
    @pytest.mark.parametrize(
        ("feature", "advice"),
        [
            ("madv_free", MADV_FREE),
            ("madv_wipeonfork", MADV_WIPEONFORK),
            ("madv_populate_write", MADV_POPULATE_WRITE),
            ("madv_guard_install", MADV_GUARD_INSTALL),
        ],
    )
    def test_capabilities_of_madvise(self, feature: str, advice: int) -> None:
        """The kernel accepts an advice exactly if the capability is True."""
        assert getattr(capabilities(), feature) is advice_works(advice)

    def test_names_of_mappings(self) -> None:
        """anon_vma_names is True exactly if a name set here appears in /proc."""
        assert capabilities().anon_vma_names is names_work()

    @pytest.mark.parametrize(
        ("feature", "since"),
        [
            ("madv_free", (4, 5)),
            ("madv_wipeonfork", (4, 14)),
            ("madv_populate_write", (5, 14)),
            ("anon_vma_names", (5, 17)),
            ("pagemap_scan", (6, 7)),
            ("mseal", (6, 10)),
            ("procmap_query", (6, 11)),
            ("madv_guard_install", (6, 13)),
        ],
    )
    def test_no_feature_is_older_than_its_kernel(
        self, feature: str, since: tuple[int, int]
    ) -> None:
        """A feature is False on kernels older than its version."""
        offered = getattr(capabilities(), feature)

        assert isinstance(offered, bool)
        assert kernel() >= since or not offered

    @pytest.mark.parametrize("huge_pages", ["prefer", "never"])
    def test_huge_page_policies_are_accepted(self, huge_pages: str) -> None:
        """Huge page policies are accepted where there are transparent huge pages."""
        if capabilities().transparent_huge_pages is None:
            pytest.skip("this kernel has no transparent huge pages")

        with pyreserve.reserve(PAGE_SIZE, huge_pages=huge_pages) as region:  # type: ignore[arg-type]
            region.commit(0, PAGE_SIZE)

    def test_wipe_on_fork(self) -> None:
        """A region with fork="wipe" can be reserved exactly if madv_wipeonfork is True."""
        offered = capabilities().madv_wipeonfork
        expected: contextlib.AbstractContextManager[object] = (
            contextlib.nullcontext() if offered else pytest.raises(pyreserve.VMError)
        )

        with expected, pyreserve.reserve(PAGE_SIZE, fork="wipe") as region:
            region.commit(0, PAGE_SIZE)

            assert offered


class TestTrying:
    def test_repeated_calls_leave_nothing_behind(self) -> None:
        """Repeated calls leave no mapping and no open file."""
        script = """
import os
from pathlib import Path
from pyreserve import capabilities

def now():
    return len(Path("/proc/self/maps").read_text().splitlines()), len(os.listdir("/proc/self/fd"))

for _ in range(3):
    capabilities(), now()
before = now()
for _ in range(50):
    capabilities()
print(before == now())
"""

        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )

        assert done.stdout == "True\n"

    def test_results_are_equal_and_immutable(self) -> None:
        """Two results are equal, and a result is immutable."""
        caps = capabilities()

        assert isinstance(caps, Capabilities)
        assert caps == capabilities()
        with pytest.raises(AttributeError):
            caps.page_size = 1  # type: ignore[misc]
