"""Each memory call of each operation is made to fail in turn: nothing is lost, leaked or half done.

A library that is preloaded into a fresh interpreter stands between the extension and the kernel. An
operation is run once to count its calls, and then, on a fresh object each time, with the first, the
second, ... of them failing. What the operation does about it is its own matter: it may raise, or do
without. If it raises, all that can be asked of the object, and what the kernel shows of its
addresses, must be as before; and in any case the operation must succeed when it is repeated.
"""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import pytest
from test_arena import needs_64_bits

HERE = Path(__file__).parent


class Operation(NamedTuple):
    """What to run: `make` an object x, then `do` something with it.

    `leaves` says what a refusal may leave behind, as its documentation says.
    """

    make: str
    do: str
    leaves: str = ""


ARENA = "x = Arena({layout!r}, mode={mode!r}); keep = x.alloc(5000); keep.view[:3] = b'abc'"
USED = "; b = x.alloc(9 << 20); c = x.alloc(5000); fill(b); b.free()"


def _arena(layout: str, mode: str = "charge") -> str:
    return ARENA.format(layout=layout, mode=mode)


UNDRESSED = "decommitted bytes that the kernel refused to keep out of core dumps"
LAYOUTS = ["native", "go-tip-2014-12/amd64", "go1.4/amd64", "go1.11/amd64", "fallback"]
OPERATIONS = {
    **{
        f"a first block, {name}": Operation(f"x = Arena({name!r})", "x.alloc(5000)")
        for name in LAYOUTS
    },
    **{
        f"a block that needs growth, {name}": Operation(_arena(name), "x.alloc(70 << 20)")
        for name in LAYOUTS
    },
    **{
        f"many blocks that need growth, {name}": Operation(
            _arena(name), "x.alloc_many([3 << 20] * 30)", leaves="growth"
        )
        for name in LAYOUTS
    },
    "a growth by hand": Operation(_arena("go1.4/amd64"), "x.grow(3 << 20)"),
    **{
        f"scavenge, {mode}": Operation(_arena("native", mode) + USED, "x.scavenge()")
        for mode in ("charge", "noreserve")
    },
    "scavenge lazily": Operation(_arena("native") + USED, "x.scavenge(lazy=True)"),
    "a block of memory that was given back": Operation(
        _arena("native") + USED + "; x.scavenge()", "x.alloc(8 << 20)"
    ),
    "release": Operation(_arena("go-tip-2014-12/amd64"), "x.release(); x = None"),
    "a bump arena": Operation("x = BumpArena(1 << 30); x.alloc(100)", "x.alloc(5 << 20)"),
    "a bump arena that gives back": Operation(
        "x = BumpArena(1 << 30); x.alloc(5 << 20)",
        "x.reset(keep=False)",
        leaves=UNDRESSED,
    ),
    "a slot": Operation("x = Pool(100)", "x.alloc()"),
    "slots that need growth": Operation("x = Pool(4096); x.alloc()", "x.alloc_many(2000)"),
    "a trimmed pool": Operation(
        "x = Pool(4096); x.free_many(x.alloc_many(2000))", "x.trim()", leaves=UNDRESSED
    ),
    "a page allocator": Operation("x = None", "x = PageAllocator(1000)"),
    "a commit": Operation("x = reserve(1 << 30)", "x.commit(1 << 20, 1 << 20)"),
    "bits": Operation("x = Bitmap(1 << 30)", "x.set(1 << 20, 1 << 24)"),
}

SCRIPT = """
import ctypes, errno, gc, json, sys
from pathlib import Path
from pyreserve import *

shim = ctypes.CDLL(sys.argv[1])
make, do = sys.argv[2:4]

def fill(block):
    ctypes.memset(block.address, 1, block.nbytes)

def live(region):
    "What the kernel shows of what the region owns."
    owned = [(region.base + at, region.base + at + n) for at, n in region._runs("reserved")]
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, perms = line.split()[:2]
        start, end = (int(address, 16) for address in addresses.split("-"))
        found += [(max(start, low), min(end, high), perms)
                  for low, high in owned if start < high and end > low]
    joined = []
    for start, end, perms in found:
        if joined and joined[-1][1:] == (start, perms):
            start = joined.pop()[0]
        joined.append((start, end, perms))
    return joined

def state(x):
    if x is None or isinstance(x, PageAllocator):
        return [repr(x)]
    region = x if isinstance(x, Region) else getattr(x, "_region", None)
    told = [region.committed_runs(), region.reserved, live(region)]
    if isinstance(x, Arena):
        stats = x.memstats()
        told += [[(b.address, b.nbytes) for b in x.blocks()], x.placement, x.in_use]
        told += [getattr(stats, name) for name in (
            "heap_sys", "heap_inuse", "heap_released", "heap_alloc", "mallocs", "frees",
            "gc_sys", "other_sys", "committed", "reserved")]
        told.append([bytes(b.view[:3]) for b in list(x.blocks())[:1]])
    elif isinstance(x, BumpArena):
        told.append(x.in_use)
    elif isinstance(x, Pool):
        told.append(list(x))
    elif isinstance(x, Bitmap):
        told.append(x.count())
    return told

def once(call, error):
    names = dict(globals())
    exec(make, names)
    gc.collect()
    before = state(names["x"])
    raised, x = None, names["x"]
    shim.faults_arm(call, error)
    try:
        exec(do, names)
    except Exception as refused:
        raised = [type(refused).__name__, isinstance(refused, (VMError, MemoryError))]
        refused.__traceback__ = None
    calls = shim.faults_disarm()
    changed = None
    if raised:
        after = state(x)
        changed = [i for i, (a, b) in enumerate(zip(before, after)) if a != b]
        exec(do, names)
    if names["x"] is not None:
        state(names["x"])
        if not isinstance(names["x"], PageAllocator):
            names.pop("keep", None), names.pop("c", None), names.pop("b", None)
            names["x"].release()
    return [calls, raised, changed]

found = {"calls": once(0, 0)[0], "runs": []}
for error in (errno.ENOMEM, errno.EAGAIN, errno.EINVAL):
    for call in range(1, found["calls"] + 1):
        found["runs"].append([errno.errorcode[error], call, *once(call, error)[1:]])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/faults.c, compiled."""
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    subprocess.run(
        ["cc", "-std=c11", "-O1", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"],
        check=True,
    )
    return library


@needs_64_bits
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_is_half_done(shim: Path, name: str) -> None:
    """Whichever call fails: the state before, or success; and then success."""
    operation = OPERATIONS[name]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(shim), operation.make, operation.do],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)

    assert found["calls"] > 0
    for error, call, raised, changed in found["runs"]:
        where = f"{error} at call {call}: {raised}"
        assert raised is None or raised[1], where
        if not operation.leaves:
            assert not changed, f"{where}: changed {changed}"
    assert any(raised for _, _, raised, _ in found["runs"]) or name.startswith("scavenge")
