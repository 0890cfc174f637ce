"""Arguments are read once: any object with ``__index__`` is an integer, even with side effects."""

import array
import decimal
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import pyreserve
from pyreserve import (
    PAGE_SIZE,
    Arena,
    Bitmap,
    BumpArena,
    GrowableArray,
    GrowableBuffer,
    HeapBitmap,
    KiB,
    MiB,
    PageAllocator,
    Pool,
    TiB,
    costs,
    layouts,
    reserve,
)

HUGE = 1 << 60


class Number:
    """An integer that has ``__index__`` and nothing else; counts how often it is read."""

    def __init__(self, value: int) -> None:
        self.value, self.reads = value, 0

    def __index__(self) -> int:
        self.reads += 1
        return self.value


class Fails:
    """A number whose ``__index__`` raises."""

    def __index__(self) -> int:
        raise ZeroDivisionError


class Name(str):
    """A string whose overridden methods return wrong values."""

    __slots__ = ()

    def encode(self, *_: Any, **__: Any) -> Any:
        return 5

    def __str__(self) -> str:
        return "\0"

    def __len__(self) -> int:
        return 10**6


Make = Callable[[int], Any]


def _region() -> pyreserve.Region:
    region = reserve(MiB)
    region.commit(0, 64 * KiB)
    return region


def _pool() -> Pool:
    pool = Pool(64, capacity=1000)
    pool.alloc_many(3)
    return pool


def _pages() -> PageAllocator:
    pages = PageAllocator(100)
    pages.alloc_at(3)
    return pages


def _arena() -> Arena:
    arena = Arena(64 * MiB)
    arena.grow(1)
    return arena


def _bits() -> HeapBitmap:
    arena = Arena(layout="fallback")
    arena.grow(1)
    assert arena.heap_bitmap is not None
    return arena.heap_bitmap


def _of_bits(name: str, bitmap: Bitmap, i: Make) -> Any:
    return repr(getattr(bitmap, name)(i(3), i(5)))


# Calls on a fresh object, with numbers made by `i`. Refused calls are included, because a message
# contains the numbers too.
CALLS: dict[str, tuple[Callable[[], Any], Callable[[Any, Make], Any]]] = {
    "reserve": (lambda: None, lambda _, i: reserve(i(MiB), align=i(65536))),
    "reserve(huge)": (lambda: None, lambda _, i: reserve(i(HUGE), align=i(65536))),
    "reserve(hint)": (lambda: None, lambda _, i: reserve(i(MiB), hint=i(1 << 30))),
    "reserve(bad hint)": (lambda: None, lambda _, i: reserve(i(MiB), hint=i(1))),
    "reserve(taken)": (_region, lambda obj, i: reserve(i(MiB), at=i(obj.base))),
    "reserve(bad align)": (lambda: None, lambda _, i: reserve(i(MiB), align=i(3))),
    "commit": (_region, lambda obj, i: obj.commit(i(0), i(PAGE_SIZE))),
    "commit(misaligned)": (_region, lambda obj, i: obj.commit(i(1), i(PAGE_SIZE))),
    "commit(outside)": (_region, lambda obj, i: obj.commit(i(0), i(1 << 70))),
    "populate": (_region, lambda obj, i: obj.populate(i(0), i(PAGE_SIZE))),
    "discard": (_region, lambda obj, i: obj.discard(i(0), i(PAGE_SIZE))),
    "decommit": (_region, lambda obj, i: obj.decommit(i(0), i(PAGE_SIZE))),
    "view": (_region, lambda obj, i: obj.view(i(0), i(16))),
    "view(outside)": (_region, lambda obj, i: obj.view(i(0), i(HUGE))),
    "ndarray": (_region, lambda obj, i: obj.ndarray(i(0), (i(2), i(3)))),
    "is_committed": (_region, lambda obj, i: obj.is_committed(i(0), i(16))),
    "Arena": (lambda: None, lambda _, i: Arena(i(64 * MiB), step=i(MiB))),
    "Arena(huge)": (lambda: None, lambda _, i: Arena(i(HUGE))),
    "Arena(bad size)": (lambda: None, lambda _, i: Arena(i(0))),
    "Arena(bad step)": (lambda: None, lambda _, i: Arena(step=i(100))),
    "Arena.alloc": (_arena, lambda obj, i: obj.alloc(i(100), align=i(16)).nbytes),
    "Arena.alloc(huge)": (_arena, lambda obj, i: obj.alloc(i(HUGE), align=i(16))),
    "Arena.alloc(bad align)": (_arena, lambda obj, i: obj.alloc(i(100), align=i(3))),
    "Arena.alloc_many": (_arena, lambda obj, i: len(obj.alloc_many([i(100), i(200)]))),
    "Arena.alloc_many(bad)": (_arena, lambda obj, i: obj.alloc_many([i(100), i(0)])),
    "Arena.grow": (_arena, lambda obj, i: obj.grow(i(100)) > 0),
    "Arena.grow(huge)": (_arena, lambda obj, i: obj.grow(i(HUGE))),
    "Arena.block_at": (_arena, lambda obj, i: obj.block_at(i(100))),
    "Arena.trim": (_arena, lambda obj, i: obj.trim(i(100), older_than=i(1))),
    "Arena.trim(bad)": (_arena, lambda obj, i: obj.trim(i(100), older_than=i(-1))),
    "Arena.start_scavenger": (_arena, lambda obj, i: obj.start_scavenger(i(-1))),
    "Blocks[]": (_arena, lambda obj, i: obj.alloc_many([1, 2])[i(1)].nbytes),
    "heap_bitmap[]": (_bits, lambda obj, i: obj[i(0)]),
    "heap_bitmap[] =": (_bits, lambda obj, i: obj.__setitem__(i(0), i(1))),
    "Pool": (
        lambda: None,
        lambda _, i: Pool(i(10), capacity=i(100), align=i(16), step=i(65536)),
    ),
    "Pool(bad)": (lambda: None, lambda _, i: Pool(i(0))),
    "Pool.free": (_pool, lambda obj, i: obj.free(i(0))),
    "Pool.free(bad)": (_pool, lambda obj, i: obj.free(i(9))),
    "Pool.alloc_many": (_pool, lambda obj, i: obj.alloc_many(i(3))),
    "Pool.alloc_many(bad)": (_pool, lambda obj, i: obj.alloc_many(i(3000))),
    "Pool.free_many": (_pool, lambda obj, i: obj.free_many([i(0), i(1)])),
    "Pool.view": (_pool, lambda obj, i: obj.view(i(0))),
    "Pool.address": (_pool, lambda obj, i: obj.address(i(0)) > 0),
    "in Pool": (_pool, lambda obj, i: i(0) in obj),
    "BumpArena": (lambda: None, lambda _, i: BumpArena(i(MiB), step=i(65536))),
    "BumpArena(bad)": (lambda: None, lambda _, i: BumpArena(i(0))),
    "BumpArena.alloc": (lambda: BumpArena(MiB), lambda obj, i: obj.alloc(i(10), align=i(16))),
    "BumpArena.alloc(huge)": (
        lambda: BumpArena(MiB),
        lambda obj, i: obj.alloc(i(HUGE), align=i(16)),
    ),
    "BumpArena.alloc(bad)": (lambda: BumpArena(MiB), lambda obj, i: obj.alloc(i(10), align=i(3))),
    "Bitmap": (lambda: None, lambda _, i: Bitmap(i(1000))),
    "Bitmap(bad)": (lambda: None, lambda _, i: Bitmap(i(-1))),
    "Bitmap.from_bytes": (lambda: None, lambda _, i: Bitmap.from_bytes(b"12345678", i(5))),
    **{
        f"Bitmap.{name}": (lambda: Bitmap(1000), partial(_of_bits, name))
        for name in ("set", "clear", "count", "any", "all", "find_set", "find_clear", "to_bytes")
    },
    "Bitmap.set(outside)": (lambda: Bitmap(1000), lambda obj, i: obj.set(i(3), i(1 << 70))),
    "Bitmap.runs": (lambda: Bitmap(1000), lambda obj, i: list(obj.runs(i(3), i(5)))),
    "Bitmap[]": (lambda: Bitmap(1000), lambda obj, i: obj[i(3)]),
    "Bitmap[] =": (lambda: Bitmap(1000), lambda obj, i: obj.__setitem__(i(3), True)),
    "in Bitmap": (lambda: Bitmap(1000), lambda obj, i: i(3) in obj),
    "GrowableBuffer": (lambda: None, lambda _, i: GrowableBuffer(i(MiB), step=i(65536))),
    "GrowableBuffer(huge)": (lambda: None, lambda _, i: GrowableBuffer(i(HUGE))),
    "GrowableBuffer.resize": (lambda: GrowableBuffer(MiB), lambda obj, i: obj.resize(i(100))),
    "GrowableBuffer.resize(huge)": (
        lambda: GrowableBuffer(MiB),
        lambda obj, i: obj.resize(i(HUGE)),
    ),
    "GrowableBuffer.view": (
        lambda: GrowableBuffer(MiB),
        lambda obj, i: (obj.resize(9), obj.view(i(1), i(2)))[0],
    ),
    "GrowableArray": (lambda: None, lambda _, i: GrowableArray("i8", i(1000), step=i(65536))),
    "GrowableArray.resize": (lambda: GrowableArray("i8", 1000), lambda obj, i: obj.resize(i(100))),
    "PageAllocator": (lambda: None, lambda _, i: PageAllocator(i(10), capacity=i(100))),
    "PageAllocator(bad)": (lambda: None, lambda _, i: PageAllocator(i(10), capacity=i(1))),
    "PageAllocator.alloc": (_pages, lambda obj, i: obj.alloc(i(3), align=i(4))),
    "PageAllocator.alloc(many)": (_pages, lambda obj, i: obj.alloc(i(3000), align=i(4))),
    "PageAllocator.alloc(bad)": (_pages, lambda obj, i: obj.alloc(i(3), align=i(3))),
    "PageAllocator.alloc_at": (_pages, lambda obj, i: obj.alloc_at(i(7), i(2))),
    "PageAllocator.alloc_at(used)": (_pages, lambda obj, i: obj.alloc_at(i(3), i(2))),
    "PageAllocator.free": (_pages, lambda obj, i: obj.free(i(3), i(1))),
    "PageAllocator.free(free)": (_pages, lambda obj, i: obj.free(i(7), i(1))),
    "PageAllocator.grow": (_pages, lambda obj, i: obj.grow(i(3))),
    "PageAllocator.grow(far)": (_pages, lambda obj, i: obj.grow(i(1 << 50))),
    "PageAllocator.alloc_many": (_pages, lambda obj, i: obj.alloc_many([i(3), i(1)])),
    "PageAllocator.alloc_many(one)": (
        _pages,
        lambda obj, i: obj.alloc_many(i(3), array.array("q", [0, 0])),
    ),
    "PageAllocator.free_many": (_pages, lambda obj, i: obj.free_many([i(3)], i(1))),
    "PageAllocator.is_used": (_pages, lambda obj, i: obj.is_used(i(3))),
    "layouts.get": (lambda: None, lambda _, i: layouts.get("native", size=i(MiB), word=i(8))),
    "layouts.get(bad)": (lambda: None, lambda _, i: layouts.get("native", size=i(0), word=i(8))),
    "Layout.place": (
        lambda: layouts.get("native", size=TiB),
        lambda obj, i: obj.place(i(1 << 40), i(MiB)),
    ),
    "format_size": (lambda: None, lambda _, i: pyreserve.format_size(i(1000))),
    "costs.plan": (lambda: None, lambda _, i: costs.plan(longest=i(1 << 20)).memory),
    "costs.plan(bad)": (lambda: None, lambda _, i: costs.plan(longest=i(1))),
    "costs.measure(bad)": (
        lambda: costs.plan(longest=MiB),
        lambda obj, i: costs.measure(obj, budget=i(-1), width=i(1)),
    ),
    "costs.estimate": (
        lambda: costs.CostModel({}),
        lambda obj, i: obj.estimate("touch", pages=i(3), threads=i(2)),
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


def outcome(name: str, make: Make) -> tuple[str, str]:
    """Return the type of a call's result, or the type and message of its exception."""
    new, call = CALLS[name]
    obj = new()
    try:
        answer = call(obj, make)
    except Exception as error:
        return type(error).__name__, str(error)
    return type(answer).__name__, ""


@every_call
def test_whatever_has_an_index_is_an_integer(name: str) -> None:
    """An object that only has ``__index__`` acts as its integer, and is read at most once."""
    numbers: list[Number] = []

    def make(value: int) -> Any:
        numbers.append(Number(value))
        return numbers[-1]

    kind, text = outcome(name, make)

    assert kind == outcome(name, lambda value: value)[0]
    assert "Number object" not in text
    assert {number.reads for number in numbers} <= {0, 1}


@every_call
def test_a_number_that_cannot_be_read(name: str) -> None:
    """An exception raised by ``__index__`` reaches the caller."""
    assert outcome(name, lambda _: Fails())[0] == "ZeroDivisionError"


# Calls whose arguments are all sizes, which may be strings.
TAKES_SIZES = {
    "reserve",
    "reserve(huge)",
    "reserve(bad align)",
    "Arena",
    "Arena(huge)",
    "Arena(bad size)",
    "Arena(bad step)",
    "Arena.alloc",
    "Arena.alloc(huge)",
    "Arena.alloc(bad align)",
    "Arena.grow",
    "Arena.grow(huge)",
    "Pool(bad)",
    "BumpArena",
    "BumpArena(bad)",
    "BumpArena.alloc",
    "BumpArena.alloc(huge)",
    "BumpArena.alloc(bad)",
    "GrowableBuffer",
    "GrowableBuffer(huge)",
    "GrowableBuffer.resize",
    "GrowableBuffer.resize(huge)",
    "costs.plan",
    "costs.plan(bad)",
}
TAKES_FLOATS = {"Arena.trim", "Arena.start_scavenger", "costs.measure", "costs.estimate"}


@pytest.mark.parametrize("kind", [float, decimal.Decimal, str])
@every_call
def test_no_other_number_is_an_integer(name: str, kind: type) -> None:
    """Floats and decimals are refused, and so are strings that are not sizes."""
    if kind is not str and name.partition("(")[0] in TAKES_FLOATS:
        return
    as_an_integer = kind is str and name in TAKES_SIZES
    assert outcome(name, kind)[0] == (outcome(name, int)[0] if as_an_integer else "TypeError")


def test_a_number_that_releases_its_region() -> None:
    """``__index__`` runs before the call, which then sees that it released the region."""
    region = _region()

    class Releases:
        def __index__(self) -> int:
            if not region.released:
                region.release()
            return 0

    for verb in (region.commit, region.populate, region.discard, region.decommit, region.view):
        with pytest.raises(pyreserve.ReleasedError):
            verb(Releases(), PAGE_SIZE)  # type: ignore[arg-type]


def test_a_name_is_its_characters() -> None:
    """A subclass of str counts as its characters, whatever its overridden methods return."""
    with reserve(MiB, name=Name("mine")) as region:
        assert str.__str__(region.name or "") == "mine"
    with pytest.raises(ValueError, match="name"):
        reserve(MiB, name=Name("[bad]"))


def test_flags_are_read_once() -> None:
    """A flag may be any object; its truth value is read once."""

    class Flag:
        reads = 0

        def __bool__(self) -> bool:
            Flag.reads += 1
            return Flag.reads == 1

    with reserve(MiB, guard=Flag()) as region:  # type: ignore[arg-type]
        assert (Flag.reads, region.size) == (1, MiB)
