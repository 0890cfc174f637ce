"""Objects are freed without the cyclic garbage collector, also if their creation was refused."""

import contextlib
import gc
import resource
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import pyreserve
from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    Arena,
    Bitmap,
    BumpArena,
    GiB,
    GrowableArray,
    GrowableBuffer,
    KiB,
    MiB,
    PageAllocator,
    Pool,
    layouts,
)
from pyreserve.layouts import LayoutName
from pyreserve.units import WORD


def is_ours(obj: object) -> bool:
    """Return whether an object is a frame of the package, or has a type of it or of cffi."""
    if isinstance(obj, types.FrameType):
        return str(obj.f_globals.get("__name__")).startswith("pyreserve")
    return type(obj).__module__.partition(".")[0] in {"pyreserve", "_cffi_backend"}


def left_behind(act: Callable[[], object]) -> list[str]:
    """Call with the collector disabled; return the package's objects that only it would free."""
    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(pyreserve.PyreserveError, TypeError, ValueError, KeyError):
            act()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        objects = [f"{type(obj).__name__}: {obj!r:.200}" for obj in gc.garbage if is_ours(obj)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    gc.collect()
    return objects


def _region() -> None:
    region = pyreserve.reserve(MiB, name="x", align=2 * MiB, guard=True)
    region.commit(0, MiB)
    held = np.frombuffer(region.view(0, 16), np.uint8)
    with contextlib.suppress(pyreserve.ViewError):
        region.release()
    with contextlib.suppress(pyreserve.ViewError):
        region.decommit(0, MiB)
    with contextlib.suppress(pyreserve.RangeError):
        region.commit(1, 1)
    held[0] = 1
    region.close()


def _arena(name: LayoutName) -> None:
    arena = Arena(GiB if name == "native" else None, layout=name)
    blocks = arena.alloc_many([8 * KiB] * 100)
    view = blocks[3].view()
    for refused in (blocks.free, blocks[3].free, lambda: arena.alloc(1 << 61), arena.release):
        with contextlib.suppress(pyreserve.PyreserveError):
            refused()
    offset = blocks[5].offset
    blocks[5].free()
    held = arena.region.view(offset, 8)
    with contextlib.suppress(pyreserve.ViewError):
        arena.trim()
    with arena.alloc(8) as block:
        late = block.view()
    del view, held, late
    arena.start_scavenger(60)
    arena.memstats()
    if arena.layout.bitmap_bits:
        assert arena.heap_bitmap is not None
        _ = arena.heap_bitmap[0]


def _used_up() -> None:
    arena = Arena(4 * MiB)
    arena.alloc_many([MiB] * 5)


def _bump() -> None:
    arena = BumpArena(MiB)
    mark = arena.mark()
    with arena.scope():
        held = arena.alloc(8)
    with contextlib.suppress(pyreserve.ViewError):
        arena.reset(mark)
    with contextlib.suppress(pyreserve.OutOfMemoryError):
        arena.alloc(GiB)
    del held
    arena.reset(keep=False)


def _pool() -> None:
    pool = Pool(48, capacity=1000)
    slots = pool.alloc_many(10)
    held = pool.view(slots[3])
    for refused in (lambda: pool.free_many(slots), lambda: pool.alloc_many(2000), pool.release):
        with contextlib.suppress(pyreserve.PyreserveError):
            refused()
    del held
    pool.trim()


def _pages() -> None:
    pages = PageAllocator(1000)
    pages.alloc_many([3] * 10)
    with contextlib.suppress(pyreserve.PyreserveError):
        pages.alloc(5000)


def _bitmap() -> None:
    bits = Bitmap(1000)
    bits.set(5)
    held = bits.words(0, 64)
    with contextlib.suppress(pyreserve.ViewError):
        bits.release()
    del held
    _ = bits[2:7], bits == bits.copy(), list(bits.runs())


def _growable(make: Callable[[], Any]) -> None:
    obj = make()
    obj.resize(100)
    held = obj.view() if isinstance(obj, GrowableBuffer) else obj.array
    for refused in (lambda: obj.resize(0), lambda: obj.resize(1 << 40), obj.release):
        with contextlib.suppress(pyreserve.PyreserveError):
            refused()
    del held
    obj.trim()


ACTS: dict[str, Callable[[], object]] = {
    "region": _region,
    "too large": lambda: pyreserve.reserve(1 << 62, align=MiB),
    "occupied": lambda: pyreserve.reserve(
        PAGE_SIZE, at=id(object()) // PAGE_SIZE * PAGE_SIZE, name="x"
    ),
    "no word": lambda: pyreserve.reserve(PAGE_SIZE, mode="x"),  # type: ignore[arg-type]
    "an arena with a step that is none": lambda: Arena(step=PAGE_SIZE + 1),
    "an arena that is too large": lambda: Arena(1 << 60),
    "an arena without a layout": lambda: Arena(layout="none"),  # type: ignore[arg-type]
    "an arena that is used up": _used_up,
    "bump": _bump,
    "bump, too large": lambda: BumpArena(1 << 60),
    "pool": _pool,
    "pool, too large": lambda: Pool(48, capacity=1 << 43),
    "pages": _pages,
    "pages, too many": lambda: PageAllocator(1 << 50),
    "bitmap": _bitmap,
    "bitmap, too large": lambda: Bitmap(1 << 62),
    "buffer": lambda: _growable(lambda: GrowableBuffer(MiB)),
    "buffer, too large": lambda: GrowableBuffer(1 << 60),
    "array": lambda: _growable(lambda: GrowableArray("f8", 1000)),
    "array of objects": lambda: GrowableArray("O", 1000),
    **{
        f"arena {name}": lambda name=name: _arena(name)  # type: ignore[misc]
        for name in layouts.names()
        if layouts.get(name).word <= WORD
    },
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_it_goes_with_its_last_reference(act: Callable[[], object]) -> None:
    """An object is freed with its last reference, without the cyclic collector."""
    assert left_behind(act) == []


@witness.only_64_bit
@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)
def test_scarce_addresses(act: Callable[[], object]) -> None:
    """Also if RLIMIT_AS refuses most reservations, so that layouts fall back."""

    def child() -> list[str]:
        used = witness.status("VmSize")
        left = []
        for spare in (MiB, 64 * MiB, 700 * MiB, 3 * GiB):
            resource.setrlimit(resource.RLIMIT_AS, (used + spare, resource.RLIM_INFINITY))
            left += left_behind(act)
        return left

    assert witness.in_child(child) == []


@witness.only_64_bit
def test_arenas_that_fell_back() -> None:
    """The addresses of dropped arenas that had fallen back are free for the next arenas."""
    layouts_used = witness.fresh_python(
        """
        import gc, json, resource
        from pyreserve import *
        gc.disable()
        resource.setrlimit(resource.RLIMIT_AS, (2 * GiB, 2 * GiB))
        names = []
        for _ in range(6):
            arena = Arena(layout="go-tip-2014-12/amd64")
            names.append((arena.layout.name, arena.fell_back.limit))
            del arena
        print(json.dumps(names))
        """
    )

    assert layouts_used == [["fallback", "RLIMIT_AS"]] * 6
