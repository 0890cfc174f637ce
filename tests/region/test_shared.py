"""Shared regions: their bytes are those of a sealed file in memory."""

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyreserve
from helpers import witness
from helpers.witness import only_64_bit
from pyreserve import (
    PAGE_SIZE,
    MiB,
    OutOfMemoryError,
    RangeError,
    Region,
    ReleasedError,
    RingArray,
    StateError,
    TiB,
    ViewError,
    VMError,
    reserve,
)
from pyreserve._region import reserve as placement
from pyreserve._region.reserve import reserve_mirrored
from pyreserve._system import limitbase, limits, proc

SHARED = "rw-s"


def allocated(region: Region) -> int:
    """The bytes of memory that the file has."""
    return os.fstat(region.fd).st_blocks * 512


def books_are_true(region: Region) -> bool:
    runs = witness.runs(region.base, region.size, SHARED)
    hidden = witness.nbytes(region.base, region.size, "---s")
    total = region.committed
    return region.committed_runs() == runs and hidden + total == region.size == region.reserved


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def limited(kind: int, soft: int, function: Callable[[], Any]) -> Any:
    """Call a function in a child under a resource limit."""

    def run() -> Any:
        resource.setrlimit(kind, (soft, resource.getrlimit(kind)[1]))
        return function()

    return witness.in_child(run)


def refusal(function: Callable[[], object]) -> tuple[str, int | None, str | None, str]:
    with pytest.raises(VMError) as refused:
        function()
    error = refused.value
    return type(error).__name__, error.errno, error.limit, str(error)


# -- verbs ------------------------------------------------------------------------------------


def test_commit_allocates_what_it_opens() -> None:
    """Committed bytes have memory before they are touched, read zero and keep their contents."""
    with reserve(16 * PAGE_SIZE, shared=True) as region:
        assert (region.shared, region.fork, region.mode) == (True, "share", "charge")
        assert allocated(region) == region.committed == 0
        assert books_are_true(region)

        region.commit(4 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert allocated(region) == region.committed == 4 * PAGE_SIZE
        assert books_are_true(region)
        view = region.view(4 * PAGE_SIZE, 4 * PAGE_SIZE)
        assert bytes(view) == bytes(4 * PAGE_SIZE)
        view[:3] = b"abc"

        region.commit()
        assert allocated(region) == 16 * PAGE_SIZE
        assert books_are_true(region)
        assert bytes(view[:3]) == b"abc"
        region.populate()
        assert witness.total_kib(region.base, region.size, "Rss") * 1024 == region.size


def test_the_file_is_the_bytes() -> None:
    """Reads and writes through the descriptor and through views see each other."""
    with reserve(4 * PAGE_SIZE, shared=True) as region:
        region.commit()
        region.view(PAGE_SIZE, 3)[:] = b"abc"
        assert os.pread(region.fd, 3, PAGE_SIZE) == b"abc"
        os.pwrite(region.fd, b"xyz", 2 * PAGE_SIZE)
        assert bytes(region.view(2 * PAGE_SIZE, 3)) == b"xyz"


def test_the_file_is_sealed() -> None:
    """Nobody can change the file's size or its seals, so no access is beyond its end."""
    with reserve(4 * PAGE_SIZE, shared=True) as region:
        assert os.fstat(region.fd).st_size == region.size
        for size in (0, PAGE_SIZE, 5 * PAGE_SIZE):
            with pytest.raises(PermissionError):
                os.ftruncate(region.fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(region.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


@pytest.mark.parametrize("lazy", [False, True])
def test_discard_gives_memory_back_under_views(lazy: bool) -> None:
    """Discarded bytes stay committed and read zero in old views; populate allocates them again."""
    with reserve(8 * PAGE_SIZE, shared=True) as region:
        region.commit()
        view = region.view()
        view[:] = b"x" * len(view)
        region.discard(2 * PAGE_SIZE, 3 * PAGE_SIZE, lazy=lazy)
        assert allocated(region) == 5 * PAGE_SIZE
        assert region.committed == 8 * PAGE_SIZE
        assert books_are_true(region)
        region.populate(2 * PAGE_SIZE, PAGE_SIZE)
        assert allocated(region) == 6 * PAGE_SIZE
        x = b"x" * PAGE_SIZE
        assert bytes(view) == x * 2 + bytes(3 * PAGE_SIZE) + x * 3
        view[2 * PAGE_SIZE] = 1
        assert view[2 * PAGE_SIZE] == 1


def test_discard_keeps_its_memory_under_strict_accounting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an allocation at touch could be refused, discard allocates again at once."""
    monkeypatch.setattr(placement, "is_strict", lambda: True)
    with reserve(8 * PAGE_SIZE, shared=True) as region:
        region.commit()
        view = region.view()
        view[:] = b"x" * len(view)
        region.discard(0, 4 * PAGE_SIZE)
        assert allocated(region) == 8 * PAGE_SIZE
        assert bytes(view) == bytes(4 * PAGE_SIZE) + b"x" * (4 * PAGE_SIZE)


def test_decommit_gives_memory_back() -> None:
    """Decommitted bytes are inaccessible and cost nothing; committed again they read zero."""
    with reserve(8 * PAGE_SIZE, shared=True) as region:
        region.commit()
        np.asarray(region.view())[:] = 1
        region.decommit(PAGE_SIZE, 2 * PAGE_SIZE)
        assert allocated(region) == region.committed == 6 * PAGE_SIZE
        assert books_are_true(region)
        assert witness.faults(region.base + PAGE_SIZE)
        region.commit(PAGE_SIZE, PAGE_SIZE)
        assert witness.peek(region.base + PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)
        region.decommit()
        assert allocated(region) == region.committed == 0
        assert books_are_true(region)


def test_nothing_viewed_is_taken_away() -> None:
    """Under live views decommit and release are refused, and nothing has changed."""
    region = reserve(8 * PAGE_SIZE, shared=True)
    region.commit()
    array = region.ndarray(0, 10, "f8")
    array[:] = 7
    for take in (region.decommit, region.release):
        with pytest.raises(ViewError):
            take()
    assert array.tolist() == [7] * 10
    assert allocated(region) == 8 * PAGE_SIZE
    del array
    region.release()


def test_release_closes_the_file() -> None:
    """release, close and the end of a garbage region give descriptor and addresses back."""
    before = open_files()
    for end in (Region.release, Region.close, Region.__exit__, lambda region: None):
        region = reserve(MiB, shared=True)
        assert open_files() == before + 1
        base, fd = region.base, region.fd
        end(region)
        if region.released:
            with pytest.raises(ReleasedError):
                _ = region.fd
        del region
        assert open_files() == before
        assert not witness.is_mapped(base)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_views_outlive_their_region() -> None:
    """A view of a closed or garbage region stays right; the file is closed with the last view."""
    before = open_files()
    region = reserve(MiB, shared=True)
    region.commit()
    view, second = region.view(0, 4), region.view(4, 4)
    region.close()
    del region
    view[:] = b"abcd"
    assert bytes(view) == b"abcd"
    del view
    assert bytes(second) == bytes(4)
    assert open_files() == before + 1
    del second
    assert open_files() == before


@only_64_bit
def test_a_tebibyte_is_addresses_only() -> None:
    """A large shared region costs neither memory nor a charge until it is committed."""
    with reserve(TiB, shared=True) as region:
        region.commit(TiB - 2 * PAGE_SIZE, PAGE_SIZE)
        region.view(TiB - 2 * PAGE_SIZE, 1)[0] = 1
        assert allocated(region) == region.committed == PAGE_SIZE


# -- options ----------------------------------------------------------------------------------


def test_its_name_is_the_files() -> None:
    """The name shows in /proc/PID/maps, also without CONFIG_ANON_VMA_NAME."""
    with reserve(MiB, shared=True, name="the name") as region, reserve(MiB, shared=True) as other:
        assert {span.name for span in witness.spans(region.base, MiB)} == {
            "/memfd:the name (deleted)"
        }
        assert {s.name for s in witness.spans(other.base, MiB)} == {"/memfd:pyreserve (deleted)"}
        assert "'the name'" in repr(region)
        assert "mode charge, shared>" in repr(region)


def test_placement_and_policies() -> None:
    """Placement, guard, dump and huge pages hold as for a private region."""
    with reserve(MiB, shared=True, align=8 * MiB, guard=True) as region:
        base = region.base
        assert base % (8 * MiB) == 0
        for page in (base - PAGE_SIZE, base + MiB):
            assert [span.perms for span in witness.spans(page, PAGE_SIZE)] == ["---p"]
        with pytest.raises(VMError) as refused:
            reserve(MiB, shared=True, at=base)
        assert refused.value.errno == errno.EEXIST
    with reserve(MiB, shared=True, at=base) as region:
        assert region.base == base
        assert "dd" in witness.pieces(base, MiB)[0].flags
    with reserve(MiB, shared=True, hint=base, dump=True, huge_pages="never") as region:
        (piece,) = witness.pieces(region.base, MiB)
        assert "dd" not in piece.flags
        assert region.base == base
    with reserve(MiB, shared=True, huge_pages="prefer") as region:
        region.commit()
        assert region.huge_pages == "prefer"


@pytest.mark.skipif(not pyreserve.capabilities().mseal, reason="needs mseal")
def test_sealed() -> None:
    """A sealed shared region can be written and discarded, not decommitted or released."""

    def use() -> bool:
        region = reserve(4 * PAGE_SIZE, shared=True, seal=True)
        assert allocated(region) == region.committed == 4 * PAGE_SIZE
        region.view()[0] = 1
        region.discard()
        assert region.view()[0] == 0
        for take in (region.decommit, region.release):
            with pytest.raises(VMError, match="sealed"):
                take()
        return True

    assert witness.in_child(use)


def test_what_needs_private_memory_is_refused() -> None:
    """The policies that only private memory has are refused by name; a private region has no fd."""
    before = open_files()
    policies: list[tuple[dict[str, Any], str]] = [
        ({"mode": "noreserve"}, "mode must not be 'noreserve' with shared=True"),
        ({"fork": "wipe"}, "fork must not be 'wipe' with shared=True"),
        ({"fork": "share"}, "fork must be one of copy, wipe, got 'share'"),
    ]
    for arguments, message in policies:
        with pytest.raises(ValueError, match=message):
            reserve(MiB, shared=True, **arguments)
    assert open_files() == before
    with reserve(MiB) as region:
        assert (region.shared, region.fork) == (False, "copy")
        with pytest.raises(StateError, match="a private region has no file descriptor"):
            _ = region.fd


# -- limits -----------------------------------------------------------------------------------


def test_too_many_open_files() -> None:
    """Without a free descriptor reserve is refused by name, and works again afterwards."""

    def fill() -> tuple[Any, int]:
        regions = []
        try:
            while True:
                regions.append(reserve(MiB, shared=True))
        except VMError as error:
            refused = type(error).__name__, error.errno, error.limit, str(error)
        regions.pop().release()
        regions.append(reserve(MiB, shared=True))
        return refused, len(regions)

    refused, count = limited(resource.RLIMIT_NOFILE, 64, fill)
    assert refused[:3] == ("VMError", errno.EMFILE, "RLIMIT_NOFILE")
    assert "RLIMIT_NOFILE (ulimit -n) is 64" in refused[3]
    assert count > 30


def test_the_file_size_limit() -> None:
    """RLIMIT_FSIZE refuses a larger region by name; a smaller one works in full."""

    def try_both() -> Any:
        before = open_files()
        refused = refusal(lambda: reserve(MiB + 1, shared=True))
        assert open_files() == before
        with reserve(MiB, shared=True) as region:
            region.commit()
            region.view()[-1] = 1
        return refused

    refused = limited(resource.RLIMIT_FSIZE, MiB, try_both)
    assert refused[:3] == ("VMError", errno.EFBIG, "RLIMIT_FSIZE")
    assert "RLIMIT_FSIZE (ulimit -f) is 1 MiB" in refused[3]


@pytest.mark.parametrize("make", [lambda size: reserve(size, shared=True), reserve_mirrored])
def test_the_file_size_limit_sends_no_signal(make: Callable[[int], object]) -> None:
    """RLIMIT_FSIZE refuses a region where SIGXFSZ, which Python ignores, would end the process."""

    def try_it() -> Any:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        return refusal(lambda: make(2 * MiB))

    refused = limited(resource.RLIMIT_FSIZE, MiB, try_it)
    assert refused[:3] == ("VMError", errno.EFBIG, "RLIMIT_FSIZE")


def test_the_address_space_limit() -> None:
    """RLIMIT_AS refuses a shared region as a private one, and no descriptor leaks."""

    def try_it() -> Any:
        before = open_files()
        refused = refusal(lambda: reserve(4 << 30, shared=True))
        return refused, open_files() - before

    limit = witness.status("VmSize") + (1 << 30)
    refused, leaked = limited(resource.RLIMIT_AS, limit, try_it)
    assert refused[:3] == ("OutOfMemoryError", errno.ENOMEM, "RLIMIT_AS")
    assert leaked == 0


@pytest.mark.parametrize("size", [1 << 47, 1 << 62, 1 << 63, (1 << 64) - PAGE_SIZE, 1 << 70])
def test_sizes_beyond_the_addresses(size: int) -> None:
    """A size that no address space has is refused as memory, and no descriptor leaks."""
    before = open_files()
    with pytest.raises(OutOfMemoryError):
        reserve(size, shared=True)
    with pytest.raises(OutOfMemoryError):
        reserve_mirrored(size)
    assert open_files() == before


def test_a_commit_beyond_memory_names_what_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused allocation names the memory cgroup or the machine's memory, not RLIMIT_DATA."""
    left = 5 * MiB
    process = limitbase.OWN
    monkeypatch.setattr(process, "cgroups", lambda: [(100 * MiB, 100 * MiB - left)])
    error = limits.refusal("commit", errno.ENOMEM, left + 1, shared=True)
    assert (error.limit, error.verb) == ("cgroup limit", "commit")
    assert "the limit of a memory cgroup is 100 MiB, of which 95 MiB is in use" in str(error)
    assert limits.refusal("commit", errno.ENOMEM, left + 1).limit != "cgroup limit"

    monkeypatch.setattr(process, "cgroups", list)
    meminfo = {"MemTotal": 1 << 20, "MemAvailable": 1 << 10}
    monkeypatch.setattr(process, "meminfo_kib", meminfo.__getitem__)
    error = limits.refusal("commit", errno.ENOMEM, 2 * MiB, shared=True)
    assert isinstance(error, OutOfMemoryError)
    assert error.limit == "memory"
    assert isinstance(limits.refusal("commit", errno.ENOSPC, 1, shared=True), OutOfMemoryError)


def test_a_commit_beyond_memory_ends_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not available is refused before the kernel would kill a process for it.

    Memory that the region has already is not counted; that of a mirrored region once.
    """
    monkeypatch.setattr(proc, "available_bytes", lambda: 65 * MiB)
    monkeypatch.setattr(proc, "free_swap", lambda: 5 * MiB)
    before = open_files()
    with reserve(80 * MiB, shared=True) as region:
        with pytest.raises(OutOfMemoryError):
            region.commit()
        assert region.committed == allocated(region) == 0
        region.commit(0, 10 * MiB)
        region.commit()
    with pytest.raises(OutOfMemoryError):
        reserve(80 * MiB, shared=True, seal=True)
    with pytest.raises(OutOfMemoryError):
        RingArray("u1", 80 * MiB)
    RingArray("u1", 64 * MiB).release()
    reserve(80 * MiB).commit()
    assert open_files() == before


@only_64_bit
def test_a_ring_larger_than_the_machine() -> None:
    """A ring that no memory can hold is refused, and says that memory is what lacks."""
    with pytest.raises(OutOfMemoryError) as refused:
        RingArray("u1", 4 * TiB)
    assert refused.value.limit in {"memory", "cgroup limit"}


def test_a_fast_timer_does_not_stop_a_commit() -> None:
    """A commit that signals interrupt again and again is complete in the end."""

    def commit() -> int:
        ticks: list[int] = []
        signal.signal(signal.SIGALRM, lambda *_: ticks.append(1))
        with reserve(96 * MiB, shared=True) as region:
            signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
            region.commit()
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert ticks
            return allocated(region)

    assert witness.in_child(commit) == 96 * MiB


# -- fork and exec ----------------------------------------------------------------------------


def test_a_child_shares_the_bytes() -> None:
    """Parent and child see each other's writes; each has its own record and its own end."""
    with reserve(8 * PAGE_SIZE, shared=True) as region:
        region.commit(0, 2 * PAGE_SIZE)
        view = region.view(0, 8)
        view[:] = b"original"

        def change() -> bytes:
            seen = bytes(region.view(0, 8))
            view[:] = b"from son"
            region.commit(2 * PAGE_SIZE, PAGE_SIZE)
            region.view(2 * PAGE_SIZE, 1)[0] = 9
            assert os.fstat(region.fd).st_size == region.size
            region.close()
            return seen

        assert witness.in_child(change) == b"original"
        assert bytes(view) == b"from son"
        assert region.committed == 2 * PAGE_SIZE
        assert books_are_true(region)
        assert allocated(region) == 3 * PAGE_SIZE
        region.commit(2 * PAGE_SIZE, PAGE_SIZE)
        assert region.view(2 * PAGE_SIZE, 1)[0] == 9


def test_a_discard_of_a_child_is_seen_but_takes_no_access() -> None:
    """What a child discards or decommits reads zero in the parent, which keeps its access."""
    with reserve(2 * PAGE_SIZE, shared=True) as region:
        region.commit()
        view = region.view()
        view[:] = b"x" * len(view)

        def take() -> None:
            region.discard(0, PAGE_SIZE)

        witness.in_child(take)
        assert bytes(view) == bytes(PAGE_SIZE) + b"x" * PAGE_SIZE
        view[0] = 1
        assert view[0] == 1


def test_exec_closes_the_file() -> None:
    """A program that the process starts does not inherit the descriptor."""
    with reserve(MiB, shared=True, name="unseen") as region:
        assert not os.get_inheritable(region.fd)
        fds = "os.listdir('/proc/self/fd')"
        script = f"import os; print([os.path.realpath('/proc/self/fd/' + n) for n in {fds}])"
        done = subprocess.run(
            [sys.executable, "-c", script],
            close_fds=False,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "unseen" not in done.stdout
        assert "unseen" in os.readlink(f"/proc/self/fd/{region.fd}")


# -- explain ----------------------------------------------------------------------------------


def overlaps(mapping: Any, region: Region) -> bool:
    end: int = region.base + region.size
    return bool(mapping.start < end and mapping.end > region.base)


def test_explain_knows_its_owner() -> None:
    """explain() gives all of a shared region to pyreserve, by its addresses."""
    with (
        reserve(8 * MiB, shared=True, name="known", dump=True) as region,
        reserve_mirrored(4 * MiB) as mirrored,
    ):
        region.commit(MiB, MiB)
        space = pyreserve.explain()
        for each in (region, mirrored):
            owners = {mapping.owner for mapping in space.top(10**6) if overlaps(mapping, each)}
            assert owners == {"pyreserve regions"}


def test_explain_knows_it_in_another_process() -> None:
    """In another process a memory file kept out of dumps is pyreserve's if its code is mapped."""
    script = (
        "from pyreserve import MiB, reserve\n"
        "region = reserve(8 * MiB, shared=True, name='theirs')\n"
        "region.commit(0, MiB)\n"
        "print(flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        space = pyreserve.explain(child.pid)
        child.communicate(b"\n")
    names = {m.owner for m in space.top(10**6) if m.name and m.name.startswith("/memfd:theirs")}
    assert names == {"pyreserve regions"}


# -- mirrored ---------------------------------------------------------------------------------


def test_a_mirrored_region_shows_its_bytes_twice() -> None:
    """The second half shows the bytes of the first, and its memory counts once."""
    with reserve_mirrored(4 * PAGE_SIZE, name="twice") as region:
        array = region.ndarray(0, 8 * PAGE_SIZE)
        array[: 4 * PAGE_SIZE] = np.arange(4 * PAGE_SIZE) % 251
        assert (array[4 * PAGE_SIZE :] == array[: 4 * PAGE_SIZE]).all()
        array[-1] = 255
        assert array[4 * PAGE_SIZE - 1] == 255
        assert allocated(region) == 4 * PAGE_SIZE
        assert region.committed == region.reserved == 8 * PAGE_SIZE
        assert books_are_true(region)
        del array
        for verb in (region.decommit, region.discard):
            with pytest.raises(RangeError, match="a mirrored region takes this verb as a whole"):
                verb(0, 4 * PAGE_SIZE)
        region.decommit()
        assert allocated(region) == region.committed == 0
        with pytest.raises(RangeError, match="as a whole"):
            region.commit(0, PAGE_SIZE)
        region.commit()
        assert region.view()[4 * PAGE_SIZE - 1] == 0
