"""Fault injection: a refused system call changes nothing, and the operation works afterwards.

A shim, tests/c/faults.c, replaces the mapping call of csrc/vm in a fresh interpreter. Each
operation runs once for each of its calls and each errno that the call can fail with: with that call
refused alone, and with all later calls like it refused too.
"""

import ctypes
import errno
import gc
import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

from helpers import witness
from helpers.witness import only_64_bit
from pyreserve import (
    PAGE_SIZE,
    Arena,
    Bitmap,
    Block,
    BumpArena,
    GrowableBuffer,
    OutOfMemoryError,
    PageAllocator,
    Pool,
    Region,
    RingArray,
    VMError,
    capabilities,
    reserve,
)
from pyreserve._native import ffi, lib
from pyreserve.layouts import LayoutName
from pyreserve.units import KiB, MiB

pytestmark = [
    only_64_bit,
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]

# -- the shim ---------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    _fields_: ClassVar = [
        ("verb", ctypes.c_int),
        ("argument", ctypes.c_int),
        ("length", ctypes.c_uint64),
        ("refused", ctypes.c_int),
    ]


_EXACT = 0x100000  # MAP_FIXED_NOREPLACE
_NAMES = {
    ("m", 0): "mmap",
    ("m", 0x10): "mmap(fixed)",
    ("m", _EXACT): "mmap(exact)",
    ("m", 0x11): "mmap(file)",
    ("u", 0): "munmap",
    ("p", 0): "mprotect(none)",
    ("p", mmap.PROT_READ | mmap.PROT_WRITE): "mprotect(rw)",
    ("a", 4): "madvise(dontneed)",
    ("a", 8): "madvise(free)",
    ("a", 15): "madvise(nohugepage)",
    ("a", 16): "madvise(dontdump)",
    ("a", 23): "madvise(populate)",
    ("a", 24): "madvise(dontneed locked)",
    ("a", 102): "madvise(guard)",
    ("n", 0): "prctl(name)",
    ("r", 0): "mincore",
    ("s", 0): "mseal",
    ("f", 0): "memfd_create",
    ("t", 0): "ftruncate",
    ("l", 0): "fcntl(seal)",
    ("e", 1): "fallocate",
    ("e", 3): "fallocate(punch)",
    ("c", 0): "close",
}
# The errors that each call is refused with. (EEXIST: the address is occupied.)
_ERRORS = {
    "mmap": (errno.ENOMEM,),
    "mmap(fixed)": (errno.ENOMEM,),
    "mmap(exact)": (errno.ENOMEM, errno.EEXIST),
    "munmap": (errno.ENOMEM,),
    "mprotect(none)": (errno.ENOMEM,),
    "mprotect(rw)": (errno.ENOMEM,),
    "prctl(name)": (errno.ENOMEM, errno.EINVAL),
    "mincore": (errno.ENOMEM, errno.EAGAIN),
    "mseal": (errno.ENOMEM, errno.ENOSYS),
    "mmap(file)": (errno.ENOMEM,),
    "memfd_create": (errno.EMFILE, errno.EINVAL, errno.ENOSYS),
    "ftruncate": (errno.EFBIG,),
    "fcntl(seal)": (errno.EPERM,),
    "fallocate": (errno.ENOMEM, errno.ENOSPC),
    "fallocate(punch)": (errno.ENOMEM, errno.EPERM),
    "close": (errno.EINTR,),
}
_ADVICE_ERRORS = (errno.ENOMEM, errno.EAGAIN, errno.EINVAL)


class Faults:
    """The shim, which replaces the mapping call of this process from its creation on."""

    def __init__(self, shim: str) -> None:
        self._lib = ctypes.CDLL(shim)
        self._lib.faults_arm.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
        self._lib.faults_disarm.restype = ctypes.c_size_t
        self._lib.faults_seen.restype = ctypes.POINTER(_Call)
        self._lib.faults_mapped.restype = ctypes.c_int64
        address = ctypes.cast(self._lib.faults_call, ctypes.c_void_p).value
        lib.vm_replace(ffi.cast("vm_system_call", address))

    def arm(self, k: int = 0, err: int = 0, then: int = 0) -> None:
        self._lib.faults_arm(k, err, then)

    def disarm(self) -> list[tuple[str, int]]:
        """Return the calls since `arm`, each with the errno of its injected refusal, or 0."""
        n, seen = self._lib.faults_disarm(), self._lib.faults_seen()
        return [(_NAMES[chr(seen[i].verb), seen[i].argument], seen[i].refused) for i in range(n)]

    @property
    def mapped(self) -> int:
        """Bytes of addresses that the extension has mapped."""
        return int(self._lib.faults_mapped())


class Report(NamedTuple):
    """The failed expectations of each operation, and the kinds of refusals that occurred."""

    wrong: dict[str, list[str]]
    struck: set[str]


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a fresh interpreter that runs all operations under the shim."""
    shim = tmp_path_factory.mktemp("faults") / "faults.so"
    source = Path(__file__).parents[1] / "c" / "faults.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", shim, source], check=True)
    here = str(Path(__file__).parent)
    wrong, struck = witness.fresh_python(
        f"import sys; sys.path.append({here!r})\n"
        f"import test_faults; test_faults.main({str(shim)!r})"
    )
    return Report(wrong, set(struck))


# -- operations -------------------------------------------------------------------------------


class Scene:
    """A prepared state, and one operation on it."""

    def __init__(self) -> None:
        self.old: list[tuple[int, int, int]] = []  # address, bytes, contents to keep

    def act(self) -> None:
        raise NotImplementedError

    def look(self) -> dict[str, object]:
        """Return all observable state."""
        return {}

    def may_differ(self, refused: str) -> set[str]:
        """Return the facts that may differ after this call was refused and `act` raised."""
        return set()

    def undo(self) -> None:
        """Undo a successful `act`, as far as a second one needs it."""

    def end(self) -> None:
        """Release everything."""

    def keep(self, address: int, nbytes: int, tag: int) -> None:
        ctypes.memset(address, tag, nbytes)
        self.old.append((address, nbytes, tag))

    def is_intact(self) -> bool:
        return all(witness.peek(at, n) == bytes([tag]) * n for at, n, tag in self.old)


def _perms(base: int, size: int) -> list[tuple[int, int, str]]:
    """Return the mappings of the range as the kernel shows them, equal neighbours joined."""
    joined: list[tuple[int, int, str]] = []
    for span in witness.spans(base, size):
        start = span.start
        if joined and joined[-1][1:] == (start, span.perms):
            start = joined.pop()[0]
        joined.append((start, span.end, span.perms))
    return joined


def _region(region: Region) -> dict[str, object]:
    if region.released:
        return {"released": True}
    owned = [(region.base + at, n) for at, n in region.exports.runs(committed=False)]
    return {
        "released": False,
        "committed": region.committed_runs(),
        "reserved": region.exports.runs(committed=False),
        "shown": [
            (base + at - region.base, n)
            for base, size in owned
            for at, n in witness.runs(base, size)
        ],
        "maps": _perms(region.base, min(region.size, 4 << 30)),
    }


class ArenaScene(Scene):
    """An arena with two blocks; the operation allocates one more."""

    def __init__(self, layout: LayoutName, *, nbytes: int = 5 * MiB, mode: Any = "charge") -> None:
        super().__init__()
        self.nbytes = nbytes
        self.arena = Arena(layout=layout, mode=mode)
        self.created: list[Block] = []
        self.prepare()

    def prepare(self) -> None:
        for tag, nbytes in ((1, 300 * KiB), (2, 8 * KiB)):
            self.keep(self.arena.alloc(nbytes).address, nbytes, tag)

    def act(self) -> None:
        self.created = [self.arena.alloc(self.nbytes)]

    def look(self) -> dict[str, object]:
        arena = self.arena
        stats = arena.memstats()._asdict()
        del stats["resident"]
        return {
            "stats": stats,
            "blocks": [(block.address, block.nbytes) for block in arena.blocks()],
            "placement": arena.placement,
            "in use": arena.in_use,
            "elsewhere": [(region.base, region.size) for region in arena._engine.metadata],
            **_region(arena.region),
        }

    def is_intact(self) -> bool:
        for block in self.created:
            ctypes.memset(block.address + block.nbytes - 100, 7, 100)
            assert self.arena.block_at(block.address + block.nbytes - 1) == block
        return super().is_intact()

    def undo(self) -> None:
        for block in self.created:
            block.free()
        self.created = []

    def end(self) -> None:
        self.created = []
        self.arena.release()
        del self.arena


class ResizeBlock(ArenaScene):
    """The last block grows beyond the arena."""

    def prepare(self) -> None:
        super().prepare()
        self.last = self.arena.alloc(100)
        self.keep(self.last.address, 100, 3)

    def act(self) -> None:
        self.last.resize(self.nbytes)

    def undo(self) -> None:
        ctypes.memset(self.last.address + self.nbytes - 100, 7, 100)
        self.last.resize(100)


class ResizeOverReleased(ResizeBlock):
    """A block grows over pages that were decommitted."""

    def prepare(self) -> None:
        super().prepare()
        self.arena.alloc(self.nbytes).free()
        self.arena.trim()


class FirstBlock(ArenaScene):
    """The first allocation opens the heap."""

    def prepare(self) -> None:
        pass

    def may_differ(self, refused: str) -> set[str]:
        # The heap's tables are created once and stay.
        return {"stats", "mapped"}


class NewAddresses(ArenaScene):
    """The arena's first range of addresses is used up."""

    def prepare(self) -> None:
        super().prepare()
        self.arena.grow(500 * MiB)


class Recommit(ArenaScene):
    """The free pages were given back and decommitted."""

    def prepare(self) -> None:
        block = self.arena.alloc(6 * MiB)
        super().prepare()
        ctypes.memset(block.address, 9, block.nbytes)
        block.free()
        assert self.arena.trim() >= 6 * MiB

    def act(self) -> None:
        super().act()
        assert self.created[0].zeroed


class AllocMany(ArenaScene):
    """A list of blocks for which the arena must grow."""

    def act(self) -> None:
        sizes = [30 * MiB, 20 * MiB, 8 * KiB, 40 * MiB]
        self.created = list(self.arena.alloc_many(sizes))

    def may_differ(self, refused: str) -> set[str]:
        # The arena may have grown; the blocks are unchanged.
        return {
            "stats",
            "placement",
            "in use",
            "elsewhere",
            "committed",
            "shown",
            "reserved",
            "maps",
            "mapped",
        }


class Scavenge(ArenaScene):
    """Three runs of free pages: two large ones with a small one between."""

    lazy = False

    def prepare(self) -> None:
        blocks = []
        for tag, nbytes in ((1, 2 * MiB), (2, 8 * KiB), (3, 64 * KiB), (4, 8 * KiB), (5, 3 * MiB)):
            blocks.append(self.arena.alloc(nbytes))
            self.keep(blocks[-1].address, nbytes, tag)
        for i in (4, 2, 0):
            blocks[i].free()
            del self.old[i]
        self.free = 2 * MiB + 64 * KiB + 3 * MiB
        self.given = 0

    def act(self) -> None:
        self.given = self.arena.trim(lazy=self.lazy)
        assert 0 < self.given <= self.free

    def is_intact(self) -> bool:
        assert self.arena.memstats().heap_released == self.given
        return super().is_intact()

    def undo(self) -> None:
        # The second call gives back the runs that the first one skipped.
        if self.given < self.free:
            assert self.arena.trim(lazy=self.lazy) == self.free - self.given
            self.given = self.free
        assert self.arena.memstats().heap_released == self.free


class Statistics(ArenaScene):
    """The resident bytes of an arena, asked from the kernel."""

    def act(self) -> None:
        assert self.arena.memstats().resident >= 300 * KiB


class ScavengeLazily(Scavenge):
    lazy = True


class Open(Scene):
    """The creation of an arena."""

    def __init__(self, layout: LayoutName) -> None:
        super().__init__()
        self.layout = layout
        self.arena: Arena | None = None

    def act(self) -> None:
        self.arena = Arena(layout=self.layout)

    def is_intact(self) -> bool:
        try:
            return self.arena is None or self.arena.alloc(100).zeroed
        except VMError:
            return False

    def undo(self) -> None:
        self.end()

    def end(self) -> None:
        if self.arena is not None:
            self.arena.release()
        self.arena = None


class ReleaseArena(ArenaScene):
    def act(self) -> None:
        self.arena.release()

    def is_intact(self) -> bool:
        return self.arena.region.released or super().is_intact()

    def look(self) -> dict[str, object]:
        return {"released": True} if self.arena.region.released else super().look()

    def end(self) -> None:
        del self.arena


class BumpScene(Scene):
    """A bump arena with a block below a mark and one above."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = BumpArena(64 * MiB)
        self._keep(self.arena.alloc(10 * KiB), 1)
        self.mark = self.arena.mark()
        self._keep(self.arena.alloc(20 * KiB), 2)
        self.created: memoryview | None = None

    def _keep(self, block: memoryview, tag: int) -> None:
        address = ctypes.addressof(ctypes.c_char.from_buffer(block))
        self.keep(address, len(block), tag)

    def act(self) -> None:
        self.created = self.arena.alloc(3 * MiB)
        self.created[0] = self.created[-1] = 1

    def look(self) -> dict[str, object]:
        arena = self.arena
        return {"in use": arena.in_use, "end": arena._end, **_region(arena.region)}

    def end(self) -> None:
        self.created = None
        self.arena.release()


class BumpReset(BumpScene):
    def __init__(self) -> None:
        super().__init__()
        self.created = self.arena.alloc(5 * MiB)
        self.created = None
        del self.old[1:]

    def act(self) -> None:
        self.arena.reset(self.mark, keep=False)
        assert self.arena.in_use == self.mark.offset

    def may_differ(self, refused: str) -> set[str]:
        # The blocks stay in use; their contents and memory may be gone.
        return {"end"} if refused == "mmap(fixed)" else {"end", "committed", "shown", "maps"}


class BumpResetUnderWindow(BumpReset):
    """A live view spans bytes below the mark and blocks above it."""

    def __init__(self) -> None:
        super().__init__()
        self.pin: memoryview | None = self.arena.region.view(0, 3 * MiB)

    def end(self) -> None:
        self.pin = None
        super().end()


class PoolScene(Scene):
    def __init__(self) -> None:
        super().__init__()
        self.pool = Pool(100, capacity=100_000, step=64 * KiB)
        self.used = [self.pool.alloc() for _ in range(600)]
        for slot in (0, 5, 599):
            self.keep(self.pool.address(slot), 100, 1 + slot % 200)
        self.created: list[int] = []

    def act(self) -> None:
        self.created = list(self.pool.alloc_many(2000))

    def look(self) -> dict[str, object]:
        return {
            "slots": list(self.pool),
            "len": len(self.pool),
            "books": self.pool._end,
            **_region(self.pool._region),
        }

    def undo(self) -> None:
        self.pool.free_many(self.created)

    def end(self) -> None:
        self.pool.release()
        del self.pool


class PoolOne(PoolScene):
    """The next slot is not committed yet."""

    def __init__(self) -> None:
        super().__init__()
        while (len(self.pool) + 1) * 112 <= self.pool.committed:
            self.pool.alloc()

    def act(self) -> None:
        self.created = [self.pool.alloc()]


class PoolGuarded(PoolScene):
    """New slots have to be committed and guarded."""

    def __init__(self) -> None:
        Scene.__init__(self)
        self.pool = Pool(100, capacity=100, step=64 * KiB, guard=True)
        self.pool.alloc_many(20)
        self.keep(self.pool.address(5), 100, 7)

    def act(self) -> None:
        self.created = list(self.pool.alloc_many(10))

    def may_differ(self, refused: str) -> set[str]:
        # The slots stay committed; they are not used before they are guarded.
        return {"books", "committed", "shown", "maps"} if refused == "madvise(guard)" else set()

    def undo(self) -> None:
        slot = self.created[-1] if self.created else self.pool.alloc_many(10)[-1]
        assert witness.faults(self.pool.address(slot) + 112)
        self.pool.free_many(range(20, 30))


class PoolTrim(PoolScene):
    def __init__(self) -> None:
        super().__init__()
        self.pool.free_many(self.pool.alloc_many(5000))

    def act(self) -> None:
        self.pool.trim()
        assert self.pool.committed == -(-600 * 112 // PAGE_SIZE) * PAGE_SIZE

    def may_differ(self, refused: str) -> set[str]:
        # The bytes are decommitted; only the region's policies were refused.
        return {"books", "committed", "shown", "maps"} if refused == "madvise(dontdump)" else set()

    def undo(self) -> None:
        assert self.pool.alloc(zero=True) == 600
        assert witness.peek(self.pool.address(600), 100) == bytes(100)
        self.pool.free(600)


class PoolHole(PoolTrim):
    """The free slots lie between slots in use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool.trim()
        self.pool.free_many(range(6, 599))

    def act(self) -> None:
        self.pool.trim()
        pages = -(-600 * 112 // PAGE_SIZE) - (599 * 112 // PAGE_SIZE - 1)
        assert self.pool.committed == pages * PAGE_SIZE

    def undo(self) -> None:
        slot = self.pool.alloc_many(100)[-1]
        assert witness.peek(self.pool.address(slot), 100) == bytes(100)
        self.pool.free_many(range(6, 106))


class PoolFill(PoolHole):
    """Slots in a hole are allocated again."""

    def __init__(self) -> None:
        super().__init__()
        self.pool.trim()

    def act(self) -> None:
        self.created = list(self.pool.alloc_many(593))

    def may_differ(self, refused: str) -> set[str]:
        return set()

    def undo(self) -> None:
        self.pool.free_many(self.created)


class Make(Scene):
    """The creation of an object, and its first use."""

    def __init__(self, make: Callable[[], Any], use: Callable[[Any], None]) -> None:
        super().__init__()
        self.make, self.use = make, use
        self.created: Any = None

    def act(self) -> None:
        self.created = self.make()

    def is_intact(self) -> bool:
        if self.created is not None:
            self.use(self.created)
        return True

    def undo(self) -> None:
        self.created = None

    end = undo


class Drop(Scene):
    """A buffer of 16 pages from which five are dropped, the third of them under a view."""

    def __init__(self, mode: Any = "charge") -> None:
        super().__init__()
        self.buffer = GrowableBuffer(16 * PAGE_SIZE, step=4 * PAGE_SIZE, mode=mode)
        self.text = b"".join(bytes([n]) * PAGE_SIZE for n in range(1, 17))
        self.buffer.extend(self.text)
        self.view: memoryview | None = self.buffer.view(2 * PAGE_SIZE, 3 * PAGE_SIZE)

    def act(self) -> None:
        self.buffer.drop_front(5 * PAGE_SIZE)

    def look(self) -> dict[str, object]:
        return {"dropped": self.buffer.dropped, **_region(self.buffer.region)}

    def is_intact(self) -> bool:
        assert self.view is None or bytes(self.view) == bytes([3]) * PAGE_SIZE
        return bytes(self.buffer.view()) == self.text[self.buffer.dropped :]

    def undo(self) -> None:
        self.buffer.drop_front(0)
        expected = [(2 * PAGE_SIZE, PAGE_SIZE), (5 * PAGE_SIZE, 11 * PAGE_SIZE)]
        assert self.buffer.region.committed_runs() == expected

    def end(self) -> None:
        self.view = None
        self.buffer.release()
        del self.buffer


class Move(Drop):
    """The addresses of a buffer are used up, so its seven pages move to the start."""

    def __init__(self, mode: Any = "charge") -> None:
        super().__init__(mode)
        self.view = None
        self.buffer.drop_front(9 * PAGE_SIZE)

    def act(self) -> None:
        self.buffer.extend(bytes([17]) * 2 * PAGE_SIZE)
        self.text += bytes([17]) * 2 * PAGE_SIZE

    def may_differ(self, refused: str) -> set[str]:
        # The bytes have moved, or pages were given back by another way.
        return {"committed", "shown", "maps"}

    def undo(self) -> None:
        self.buffer.trim()
        assert self.buffer.region.committed_runs() == [(0, 9 * PAGE_SIZE)]


class RegionScene(Scene):
    """A region with two committed runs of pages, [1, 4) and [6, 9), and an operation on it."""

    shared = False

    def __init__(self, do: Callable[[Region], object], mode: Any = "charge") -> None:
        super().__init__()
        self.do = do
        self.region = reserve(16 * PAGE_SIZE, mode=mode, shared=self.shared)
        for first, tag in ((1, 3), (6, 4)):
            self.region.commit(first * PAGE_SIZE, 3 * PAGE_SIZE)
            self.keep(self.region.base + first * PAGE_SIZE, 3 * PAGE_SIZE, tag)
        self.done = False

    def act(self) -> None:
        self.do(self.region)
        self.done = True

    def look(self) -> dict[str, object]:
        return _region(self.region)

    def is_intact(self) -> bool:
        return self.done or self.region.committed != 6 * PAGE_SIZE or super().is_intact()

    def end(self) -> None:
        if not self.region.released:
            self.region.release()
        del self.region


class Commit(RegionScene):
    def __init__(self, mode: Any) -> None:
        super().__init__(lambda region: region.commit(0, 16 * PAGE_SIZE), mode)

    def is_intact(self) -> bool:
        return Scene.is_intact(self)


class Decommit(RegionScene):
    def __init__(self, mode: Any, first: int, n: int) -> None:
        super().__init__(lambda region: region.decommit(first * PAGE_SIZE, n * PAGE_SIZE), mode)

    def may_differ(self, refused: str) -> set[str]:
        # The bytes are decommitted; only the region's policies were refused.
        return {"committed", "shown", "maps"} if refused == "madvise(dontdump)" else set()


class SharedScene(RegionScene):
    """The same with a shared region; its file and all descriptors are observed too."""

    shared = True

    def look(self) -> dict[str, object]:
        files = {"descriptors": len(os.listdir("/proc/self/fd"))}
        region = self.region
        if region.released:
            return {"released": True, **files}
        return {
            **_region(region),
            "shown": witness.runs(region.base, region.size, "rw-s"),
            "allocated": os.fstat(region.fd).st_blocks * 512,
            **files,
        }


class CommitShared(SharedScene):
    def is_intact(self) -> bool:
        return Scene.is_intact(self)


class BitmapScene(Scene):
    """A bitmap with a few bits set far apart; the operation sets others."""

    def __init__(self, do: Callable[[Bitmap], object]) -> None:
        super().__init__()
        self.do = do
        self.bitmap = Bitmap(1 << 26)
        for bit in (5, 70, 1 << 24, (1 << 26) - 1):
            self.bitmap.set(bit)

    def act(self) -> None:
        self.do(self.bitmap)

    def look(self) -> dict[str, object]:
        return {"bits": list(self.bitmap.runs()), **_region(self.bitmap._region)}

    def is_intact(self) -> bool:
        return all(bit in self.bitmap for bit in (5, 70, 1 << 24, (1 << 26) - 1))

    def end(self) -> None:
        self.bitmap.release()
        del self.bitmap


def _sliced(bitmap: Bitmap) -> None:
    bitmap[100 :: 1 << 21] = True


class BitmapCopy(BitmapScene):
    def __init__(self) -> None:
        super().__init__(lambda bitmap: None)
        self.copy: Bitmap | None = None

    def act(self) -> None:
        self.copy = self.bitmap.copy()

    def undo(self) -> None:
        assert self.copy == self.bitmap
        self.copy = None


class BitmapOr(BitmapScene):
    def __init__(self) -> None:
        super().__init__(lambda bitmap: None)
        self.other = Bitmap(1 << 26)
        self.other.set(1 << 20)
        self.other.set(1 << 23, 3 << 23)

    def act(self) -> None:
        self.bitmap |= self.other

    def end(self) -> None:
        super().end()
        self.other.release()


def _use_pages(pages: PageAllocator) -> None:
    assert pages.alloc(3) == 0
    assert pages.npages == 1000


def _use_region(region: Region) -> None:
    region.commit(0, PAGE_SIZE)
    region.view(0, 1)[0] = 1


@dataclass(frozen=True)
class Fault:
    """The refusal of call number `k`, and with `more` of all later calls like it."""

    k: int
    call: str
    err: int
    more: bool

    @property
    def ran_out(self) -> bool:
        return self.err in {errno.ENOMEM, errno.EAGAIN, errno.ENOSPC}


def _never(fault: Fault) -> bool:
    return False


def _grows(fault: Fault) -> bool:
    """A refused growth is retried with a smaller size."""
    return fault.ran_out and not fault.more


def _finds_addresses(fault: Fault) -> bool:
    """Refused at one address, for any reason, it tries the next."""
    return not fault.more and (fault.ran_out or fault.k <= 2)


def _after_tables(copes: Callable[[Fault], bool]) -> Callable[[Fault], bool]:
    """Creating the heap's tables takes the first four calls; they have no second place to try."""
    return lambda fault: (
        copes(replace(fault, k=fault.k - 4)) if fault.k > 4 else _does_without(fault)
    )


def _does_without(fault: Fault) -> bool:
    """Tables are created without MADV_NOHUGEPAGE or MADV_DONTDUMP on kernels that lack it."""
    unknown = fault.err == errno.EINVAL and fault.call.startswith("madvise")
    return unknown and (fault.call != "madvise(dontdump)" or not fault.more)


def _falls_back(fault: Fault) -> bool:
    """If the layout is refused, the 32-bit mechanism replaces it."""
    return not fault.more or fault.call == "mmap"


def _other_place(fault: Fault) -> bool:
    return fault.err == errno.EEXIST and not fault.more


def _moves(fault: Fault) -> bool:
    """Memory at the start is needed first; what is refused later only stays committed."""
    return fault.call != "mprotect(rw)" or (fault.k > 1 and not fault.more)


def _old_kernel(fault: Fault) -> bool:
    """If the kernel does not know this advice, another way is used."""
    return fault.err == errno.EINVAL and fault.call != "madvise(dontdump)"


def _gives_some(fault: Fault) -> bool:
    """A refused run is skipped, as long as others are given back."""
    return not fault.more or fault.k > 1 or _old_kernel(fault)


def _always(fault: Fault) -> bool:
    return True


def _nameless(fault: Fault) -> bool:
    """A name only informs readers of /proc, so its refusal is ignored."""
    return fault.call == "prctl(name)"


def _needs_less(fault: Fault) -> bool:
    return not fault.more


def _needs_less_memory(fault: Fault) -> bool:
    return fault.call == "mprotect(rw)" and not fault.more


def _other_way(fault: Fault) -> bool:
    """A range of several mappings is joined into one before it is replaced."""
    return fault.call == "mmap(fixed)" and not fault.more


def _older_file(fault: Fault) -> bool:
    """Before Linux 6.3 a file is made without MFD_NOEXEC_SEAL. close is never tried again."""
    older = fault.call == "memfd_create" and fault.err == errno.EINVAL and not fault.more
    return older or fault.call == "close"


def _closes(fault: Fault) -> bool:
    return fault.call == "close"


def _fresh_mapping(fault: Fault) -> bool:
    """If contents cannot be dropped, a fresh mapping replaces them."""
    return fault.call == "madvise(dontneed)"


@dataclass(frozen=True)
class Operation:
    """The scene of an operation, and the refusals that it handles without raising."""

    make: Callable[[], Scene]
    copes: Callable[[Fault], bool]


def _operation(make: Callable[[], Scene], copes: Callable[[Fault], bool] = _never) -> Operation:
    return Operation(make, copes)


_GROWS: dict[LayoutName, Callable[[Fault], bool]] = {
    "go-tip-2014-12/amd64": _grows,
    "go1.4/amd64": _grows,
    "go1.11/amd64": _finds_addresses,
    "fallback": _grows,
    "native": _grows,
}
_MAKES: dict[LayoutName, Callable[[Fault], bool]] = {
    "go-tip-2014-12/amd64": _falls_back,
    "go1.4/amd64": _falls_back,
    "go1.11/amd64": _never,
    "fallback": _other_place,
    "native": _never,
}

OPERATIONS: dict[str, Operation] = {
    **{f"make {name}": Operation(partial(Open, name), copes) for name, copes in _MAKES.items()},
    **{
        f"alloc first {name}": Operation(partial(FirstBlock, name), _after_tables(copes))
        for name, copes in _GROWS.items()
    },
    **{
        f"alloc grows {name}": Operation(partial(ArenaScene, name, nbytes=70 * MiB), copes)
        for name, copes in _GROWS.items()
    },
    "alloc grows two units": _operation(
        partial(ArenaScene, "go1.11/amd64", nbytes=100 * MiB), _finds_addresses
    ),
    "alloc grows, never charged": _operation(
        partial(ArenaScene, "native", mode="noreserve"), _grows
    ),
    "alloc asks for addresses": _operation(
        partial(NewAddresses, "fallback", nbytes=20 * MiB), _finds_addresses
    ),
    "alloc recommits": _operation(partial(Recommit, "go-tip-2014-12/amd64", nbytes=4 * MiB)),
    "alloc recommits, probe": _operation(partial(Recommit, "go1.4/amd64", nbytes=4 * MiB)),
    **{
        f"alloc_many grows {name}": Operation(partial(AllocMany, name), copes)
        for name, copes in _GROWS.items()
    },
    "Block.resize": _operation(partial(ResizeBlock, "native"), _needs_less),
    "Block.resize recommits": _operation(partial(ResizeOverReleased, "native")),
    "scavenge": _operation(partial(Scavenge, "go-tip-2014-12/amd64"), _always),
    "scavenge go1.11": _operation(partial(Scavenge, "go1.11/amd64"), _always),
    "scavenge, never charged": _operation(
        partial(Scavenge, "native", mode="noreserve"), _gives_some
    ),
    "scavenge lazily": _operation(partial(ScavengeLazily, "go-tip-2014-12/amd64"), _gives_some),
    "Arena.memstats": _operation(partial(Statistics, "go-tip-2014-12/amd64")),
    "release an arena": _operation(partial(ReleaseArena, "go-tip-2014-12/amd64")),
    "BumpArena": _operation(partial(Make, lambda: BumpArena(MiB), lambda a: a.alloc(10))),
    "BumpArena.alloc": _operation(BumpScene, _needs_less),
    "BumpArena.reset": _operation(BumpReset),
    "BumpArena.reset under a window": _operation(BumpResetUnderWindow, _old_kernel),
    "drop_front": _operation(Drop, _always),
    "drop_front, never charged": _operation(partial(Drop, "noreserve"), _always),
    "move a buffer": _operation(Move, _moves),
    "move a buffer, never charged": _operation(partial(Move, "noreserve"), _moves),
    "Pool": _operation(
        partial(Make, lambda: Pool(64), lambda pool: pool.alloc()), _after_tables(_never)
    ),
    "Pool.alloc": _operation(PoolOne, _needs_less),
    "Pool.alloc_many": _operation(PoolScene, _needs_less),
    **(
        {"Pool.alloc_many with guards": _operation(PoolGuarded, _needs_less_memory)}
        if capabilities().madv_guard_install
        else {}
    ),
    "Pool.trim": _operation(PoolTrim),
    "Pool.trim, a hole": _operation(PoolHole),
    "Pool.alloc_many in a hole": _operation(PoolFill, _needs_less),
    "PageAllocator": _operation(
        partial(Make, lambda: PageAllocator(1000), _use_pages), _does_without
    ),
    "reserve": _operation(partial(Make, lambda: reserve(MiB), _use_region)),
    "reserve aligned": _operation(
        partial(Make, lambda: reserve(MiB, align=64 * MiB, guard=True), _use_region)
    ),
    "reserve with a name": _operation(
        partial(Make, lambda: reserve(MiB, name="faults"), _use_region), _nameless
    ),
    "Region.commit": _operation(partial(Commit, "charge")),
    "Region.commit, never charged": _operation(partial(Commit, "noreserve")),
    "Region.decommit": _operation(partial(Decommit, "charge", 2, 2)),
    "Region.decommit over a gap": _operation(partial(Decommit, "charge", 0, 16), _other_way),
    "Region.decommit, never charged": _operation(
        partial(Decommit, "noreserve", 2, 6), _fresh_mapping
    ),
    "Region.discard": _operation(
        partial(RegionScene, lambda region: region.discard(PAGE_SIZE, PAGE_SIZE)), _old_kernel
    ),
    "Region.discard lazily": _operation(
        partial(RegionScene, lambda region: region.discard(PAGE_SIZE, PAGE_SIZE, lazy=True)),
        _old_kernel,
    ),
    "Region.populate": _operation(
        partial(RegionScene, lambda region: region.populate(PAGE_SIZE, PAGE_SIZE)), _old_kernel
    ),
    "Region.release": _operation(partial(RegionScene, lambda region: region.release())),
    "reserve shared": _operation(
        partial(Make, lambda: reserve(MiB, shared=True, guard=True), _use_region), _older_file
    ),
    "RingArray": _operation(
        partial(Make, lambda: RingArray("f8", 1000), lambda ring: ring.append(1)), _older_file
    ),
    "Region.commit, shared": _operation(
        partial(CommitShared, lambda region: region.commit(0, 16 * PAGE_SIZE))
    ),
    "Region.decommit, shared": _operation(
        partial(SharedScene, lambda region: region.decommit(0, 16 * PAGE_SIZE))
    ),
    "Region.discard, shared": _operation(
        partial(SharedScene, lambda region: region.discard(PAGE_SIZE, PAGE_SIZE))
    ),
    "Region.populate, shared": _operation(
        partial(SharedScene, lambda region: region.populate(PAGE_SIZE, PAGE_SIZE)), _old_kernel
    ),
    "Region.release, shared": _operation(
        partial(SharedScene, lambda region: region.release()), _closes
    ),
    "Bitmap.set": _operation(partial(BitmapScene, lambda bitmap: bitmap.set(1 << 20, 1 << 22))),
    "Bitmap.set steps": _operation(partial(BitmapScene, _sliced)),
    "Bitmap.copy": _operation(BitmapCopy),
    "Bitmap |=": _operation(BitmapOr),
}

# -- trials -----------------------------------------------------------------------------------

ALONE, ALIKE = 0, 1


class Trial:
    """One operation with some of its calls refused."""

    def __init__(self, faults: Faults, operation: Operation) -> None:
        self.faults, self.operation = faults, operation
        self.wrong: list[str] = []
        self.struck: set[str] = set()

    def calls(self) -> list[str]:
        """Run without a fault; return the calls that the operation makes."""
        scene = self.operation.make()
        self.faults.arm()
        scene.act()
        calls = self.faults.disarm()
        self.expect(scene.is_intact(), "without a fault, contents are lost")
        scene.end()
        return [call for call, _ in calls]

    def expect(self, holds: bool, failure: str) -> None:
        if not holds:
            self.wrong.append(failure)

    def look(self, scene: Scene) -> dict[str, object]:
        gc.collect()
        return {**scene.look(), "mapped": self.faults.mapped}

    def run(self, k: int, call: str, err: int, then: int) -> None:
        """Prepare the scene, refuse calls, compare the state, and try again."""
        start = self.faults.mapped
        scene = self.operation.make()
        before = self.look(scene)
        self.faults.arm(k, err, then)
        refused = _refusal_of(scene.act)
        seen = self.faults.disarm()
        self.struck |= {f"{name} {errno.errorcode[with_]}" for name, with_ in seen if with_}
        words = ("", " and its like")[then]
        where = f"{call} {errno.errorcode[err]}{words}, call {k} of {[c for c, _ in seen[:20]]}"
        self.expect(len(seen) >= k and seen[k - 1] == (call, err), f"{where}: other calls")
        self.expect(scene.is_intact(), f"{where}: contents are lost")
        fault = Fault(k, call, err, then == ALIKE)
        copes = self.operation.copes(fault)
        self.expect(copes == (refused is None), f"{where}: {'raises' if copes else 'copes'}")
        if refused is not None:
            kind = refused[0]
            fits = kind is OutOfMemoryError or (kind is VMError and not fault.ran_out)
            self.expect(fits, f"{where}: {refused}")
            self.compare(before, self.look(scene), scene.may_differ(call), where)
            second = _refusal_of(scene.act)
            self.expect(second is None, f"{where}: another try: {second}")
            self.expect(scene.is_intact(), f"{where}: contents are lost by another try")
        scene.undo()
        self.expect(scene.is_intact(), f"{where}: contents are lost by undoing")
        scene.end()
        del scene
        gc.collect()
        # Addresses that the kernel refuses to unmap stay mapped.
        unmaps = any(call == "munmap" and err for call, err in seen)
        leaked = self.faults.mapped - start
        self.expect(leaked == 0 or unmaps, f"{where}: {leaked} bytes stay mapped")

    def compare(
        self,
        before: dict[str, object],
        after: dict[str, object],
        may_differ: set[str],
        where: str,
    ) -> None:
        """Check that only facts in `may_differ` have changed."""
        runs, shown = after.get("committed"), after.get("shown")
        self.expect(runs == shown, f"{where}: books {runs}, but the kernel {shown}")
        may_differ = may_differ | ({"mapped"} if "munmap" in where else set())
        for key in sorted((before.keys() | after.keys()) - may_differ):
            was, now = before.get(key), after.get(key)
            self.expect(was == now, f"{where}: {key} was {was}, is {now}")


def _refusal_of(act: Callable[[], None]) -> tuple[type[BaseException], str] | None:
    """Return the exception that `act` raises, without the traceback, which keeps objects alive."""
    try:
        act()
    except Exception as error:
        return type(error), str(error)
    return None


def _try(shim: str, name: str) -> tuple[list[str], set[str]]:
    # Exclude imported objects from the collections.
    gc.collect()
    gc.freeze()
    trial = Trial(Faults(shim), OPERATIONS[name])
    trial.calls()  # creates the objects that are created once
    gc.collect()
    calls = trial.calls()
    trial.expect(bool(calls), "no system call")
    for k, call in enumerate(calls, 1):
        for err, then in product(_ERRORS.get(call, _ADVICE_ERRORS), (ALONE, ALIKE)):
            trial.run(k, call, err, then)
    return trial.wrong, trial.struck


def main(shim: str, names: "list[str] | None" = None) -> None:
    """Run each operation in a child of its own; print failed expectations and refusals."""
    wrong: dict[str, list[str]] = {}
    struck: set[str] = set()
    for name in names or OPERATIONS:
        try:
            wrong[name], refused = witness.in_child(partial(_try, shim, name))
            struck |= refused
        except pytest.fail.Exception as failed:
            wrong[name] = [str(failed)]
    print(json.dumps([wrong, sorted(struck)]))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_refused_call_changes_nothing(name: str, report: Report) -> None:
    """A refused call is handled or raises; then nothing has changed, and a second try works."""
    wrong = report.wrong[name]
    # A range that could not be unmapped changes the calls of the next trial.
    went_another_way = [
        line for line in wrong if line.startswith("munmap") and line.endswith("other calls")
    ]
    assert [line for line in wrong if line not in went_another_way] == []


# Kinds of refusals that must have occurred; more are allowed.
_AT_LEAST = """
madvise(dontdump) EAGAIN
madvise(dontdump) EINVAL
madvise(dontdump) ENOMEM
madvise(dontneed) EAGAIN
madvise(dontneed) EINVAL
madvise(dontneed) ENOMEM
madvise(free) EAGAIN
madvise(free) EINVAL
madvise(free) ENOMEM
madvise(nohugepage) EAGAIN
madvise(nohugepage) EINVAL
madvise(nohugepage) ENOMEM
madvise(populate) EAGAIN
madvise(populate) EINVAL
madvise(populate) ENOMEM
mincore EAGAIN
mincore ENOMEM
mmap ENOMEM
mmap(exact) EEXIST
mmap(exact) ENOMEM
mmap(fixed) ENOMEM
mprotect(none) ENOMEM
mprotect(rw) ENOMEM
munmap ENOMEM
prctl(name) EINVAL
prctl(name) ENOMEM
close EINTR
fallocate ENOMEM
fallocate ENOSPC
fallocate(punch) ENOMEM
fallocate(punch) EPERM
fcntl(seal) EPERM
ftruncate EFBIG
memfd_create EINVAL
memfd_create EMFILE
memfd_create ENOSYS
mmap(file) ENOMEM
""".strip().splitlines()


def test_no_kind_of_refusal_is_left_out(report: Report, capsys: pytest.CaptureFixture[str]) -> None:
    """The set of refusals that the tests inject does not shrink."""
    with capsys.disabled():
        print("\nrefused:", *sorted(report.struck), sep="\n  ")
    assert sorted(set(_AT_LEAST) - report.struck) == []
