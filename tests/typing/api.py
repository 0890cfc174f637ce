"""The public API as a user's type checker sees it: mypy checks this file, nothing runs it.

A line with ``type: ignore`` must be an error: mypy reports the comment if it is not.
"""

import types
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from typing_extensions import assert_type

import pyreserve
from pyreserve import (
    PAGE_SIZE,
    TRACEMALLOC_DOMAIN,
    AccessError,
    AddressSpace,
    Arena,
    Bitmap,
    Block,
    Blocks,
    BumpArena,
    Capabilities,
    FreeError,
    GiB,
    GrowableArray,
    GrowableBuffer,
    HeapBitmap,
    KiB,
    MapsError,
    MemStats,
    MiB,
    NoAddressSpaceError,
    OutOfMemoryError,
    PageAllocator,
    Pool,
    PyreserveError,
    RangeError,
    Region,
    ReleasedError,
    RingArray,
    Scavenger,
    StateError,
    TiB,
    ViewError,
    VMError,
    capabilities,
    costs,
    doctor,
    explain,
    format_size,
    layouts,
    parse_size,
    procmem,
    prometheus,
    reserve,
    track,
)


def package() -> None:
    assert_type(pyreserve.__version__, str)
    assert_type((KiB, MiB, GiB, TiB), tuple[int, int, int, int])
    assert_type((PAGE_SIZE, TRACEMALLOC_DOMAIN), tuple[int, int])
    assert_type(format_size(GiB), str)
    assert_type(parse_size("1GiB"), int)
    assert_type(pyreserve.layouts, types.ModuleType)
    print(pyreserve.nothing)  # type: ignore[attr-defined]
    parse_size(1)  # type: ignore[arg-type]


def regions() -> None:
    with reserve("1GiB", name="r") as region:
        assert_type(region, Region)
    reserve(GiB, at=1 << 40, align="2MiB", dump=True, guard=True, seal=True)
    reserve(GiB, hint=1 << 40, mode="noreserve", fork="wipe", huge_pages="prefer")
    reserve(GiB, shared=True)
    reserve(GiB, fork="share")  # type: ignore[arg-type]
    reserve(1.5)  # type: ignore[arg-type]
    reserve(GiB, GiB)  # type: ignore[call-arg]
    reserve(GiB, mode="none")  # type: ignore[arg-type]
    reserve(GiB, fork="keep")  # type: ignore[arg-type]
    reserve(GiB, huge_pages="always")  # type: ignore[arg-type]
    assert_type(region.size, int)
    assert_type(len(region), int)
    assert_type((region.base, region.reserved, region.committed), tuple[int, int, int])
    assert_type(region.mode, Literal["charge", "noreserve"])
    assert_type(region.fork, Literal["copy", "wipe", "share"])
    assert_type(region.huge_pages, Literal["default", "prefer", "never"])
    assert_type(region.name, str | None)
    assert_type((region.sealed, region.released, region.shared), tuple[bool, bool, bool])
    assert_type(region.fd, int)
    assert_type(region.is_committed(0, 1), bool)
    assert_type(region.committed_runs(), list[tuple[int, int]])
    region.commit()
    region.populate(0, PAGE_SIZE)
    region.discard(0, PAGE_SIZE, lazy=True)
    region.decommit(PAGE_SIZE)
    region.base = 0  # type: ignore[misc]
    assert_type(region.view(0, 8, readonly=True), memoryview)
    assert_type(region.ndarray(0, (2, 2), "int64", readonly=True), np.ndarray[Any, Any])
    region.ndarray(0, 8, np.float32)
    region.ndarray(0, [2, 2], np.dtype("u1"))
    region.ndarray(0, "8")  # type: ignore[arg-type]
    region.close()
    region.release()


def common(
    container: Arena
    | BumpArena
    | Pool
    | Bitmap
    | GrowableBuffer
    | GrowableArray[Any]
    | RingArray[Any],
) -> None:
    assert_type((container.base, container.reserved, container.committed), tuple[int, int, int])
    assert_type(container.name, str | None)
    assert_type(container.region, Region)
    assert_type(container.released, bool)
    container.release()
    container.close()


def arenas(name: layouts.LayoutName) -> None:
    with Arena("4GiB", mode="noreserve", huge_pages="never", fork="wipe", name="a") as arena:
        assert_type(arena, Arena)
    Arena(GiB, step="2MiB", scavenge_after=1.5)
    Arena(layout="go1.4/amd64")
    Arena(layout=name)
    Arena(layout="go1.99/amd64")  # type: ignore[arg-type]
    Arena(GiB, mode="none")  # type: ignore[arg-type]
    common(arena)
    assert_type(arena.layout, layouts.Layout)
    assert_type(arena.requested_layout, layouts.Layout)
    assert_type(arena.placement, layouts.Placement)
    assert_type(arena.in_use, int)
    if arena.fell_back is not None:
        assert_type(arena.fell_back.reason, str)
        assert_type(arena.fell_back.limit, str | None)
    assert_type(arena.grow("1MiB"), int)
    assert_type(arena.trim(MiB, older_than=1.5, lazy=True), int)
    assert_type(arena.maps(), list[layouts.Piece])
    assert_type(arena.blocks(), Iterator[Block])
    assert_type(arena.block_at(arena.base), Block | None)


def blocks(arena: Arena) -> None:
    with arena.alloc("1MiB", align="4KiB", zero=True) as block:
        assert_type(block, Block)
    arena.alloc(100, 8)  # type: ignore[call-arg]
    assert_type((block.address, block.nbytes, block.offset, len(block)), tuple[int, int, int, int])
    assert_type((block.zeroed, block.freed), tuple[bool, bool])
    assert_type(block.view(), memoryview)
    assert_type(block.ndarray((2, 2), "f4", readonly=True), np.ndarray[Any, Any])
    block.ndarray([2, 2])
    block.free()
    block.close()
    many = arena.alloc_many([1, 2, 3])
    assert_type(many, Blocks)
    assert_type(many[0], Block)
    assert_type(many[1:], Blocks)
    assert_type(list(many), list[Block])
    arena.free(block)
    arena.free_many(many)
    arena.free_many([block])
    many.free()


def of_arenas(arena: Arena) -> None:
    stats = arena.memstats()
    assert_type(stats, MemStats)
    assert_type((stats.sys, stats.heap_inuse, stats.committed), tuple[int, int, int])
    assert_type(stats._asdict(), dict[str, Any])
    stats.sys = 0  # type: ignore[misc]
    scavenger = arena.start_scavenger(300, lazy=True)
    assert_type(scavenger, Scavenger)
    assert_type((scavenger.older_than, scavenger.given_back), tuple[float, int])
    assert_type((scavenger.running, scavenger.lazy), tuple[bool, bool])
    scavenger.stop()
    arena.stop_scavenger()
    bits = arena.heap_bitmap
    assert_type(bits, HeapBitmap | None)
    if bits is not None:
        assert_type(
            (bits[0], bits.at(arena.base), bits.index(arena.base), len(bits)),
            tuple[int, int, int, int],
        )
        bits[0] = 1
        bits.set_at(arena.base, 1)


def plans(name: layouts.LayoutName) -> None:
    assert_type(layouts.names(), list[layouts.LayoutName])
    layout = layouts.get(name)
    assert_type(layouts.get("native", size="1GiB", word=8), layouts.Layout)
    assert_type(layouts.fallback_of(layout), layouts.Layout | None)
    assert_type(layouts.default_name(8), layouts.LayoutName)
    assert_type(layouts.describe(layout), str)
    assert_type(layout.name, layouts.LayoutName)
    assert_type(layout.strategy, Literal["reserve", "probe", "arenas"])
    assert_type((layout.arena, layout.total(), layout.index), tuple[int, int, int])
    layout.word = 4  # type: ignore[misc]
    placement = layout.place(1 << 40, GiB)
    assert_type(placement, layouts.Placement)
    assert_type(placement.layout, layouts.Layout)
    assert_type(placement.mapped(), tuple[tuple[int, int], ...])
    assert_type(placement.advanced(MiB), layouts.Placement)
    for request in placement.growth(MiB):
        assert_type(request, layouts.Request)
        answer = placement.granted(request, request.hint, MiB)
        assert_type(answer, layouts.Answer | None)
        if answer is not None:
            assert_type(answer.placement, layouts.Placement)
            assert_type(answer.block, int | None)
    for piece in placement.maps():
        assert_type(piece, layouts.Piece)
        assert_type((piece.start, piece.end, piece.perms, piece.parts), tuple[int, int, str, str])


def bump_arenas() -> None:
    with BumpArena("1GiB", step="2MiB", mode="noreserve", fork="wipe", name="b") as arena:
        assert_type(arena, BumpArena)
    BumpArena(GiB, huge_pages="sometimes")  # type: ignore[arg-type]
    BumpArena(GiB, MiB)  # type: ignore[call-arg]
    common(arena)
    assert_type(arena.alloc("64KiB", align=64, zero=True), memoryview)
    assert_type(arena.ndarray((2, 2), "i8", align="4KiB", zero=True), np.ndarray[Any, Any])
    assert_type((arena.in_use, arena.trim()), tuple[int, int])
    mark = arena.mark()
    assert_type((mark.offset, mark.depth), tuple[int, int])
    mark.offset = 0  # type: ignore[misc]
    arena.reset(mark, keep=False)
    arena.reset(0)  # type: ignore[arg-type]
    with arena.scope(keep=False) as nothing:
        assert_type(nothing, None)


def pools() -> None:
    pool = Pool("64", capacity=1000, align="64", step="2MiB", huge_pages="prefer", name="p")
    Pool(64, mode="none")  # type: ignore[arg-type]
    common(pool)
    assert_type((pool.item_size, pool.capacity, pool.in_use, len(pool)), tuple[int, int, int, int])
    slot = pool.alloc(zero=True)
    assert_type((slot, pool.address(slot), pool.trim()), tuple[int, int, int])
    assert_type(slot in pool, bool)
    assert_type(list(pool), list[int])
    assert_type(pool.view(slot, readonly=True), memoryview)
    assert_type(pool.ndarray(slot, 8, "f8", readonly=True), np.ndarray[Any, Any])
    slots = pool.alloc_many(10, zero=True)
    assert_type(slots, array[int])
    pool.free(slot)
    pool.free_many(slots)
    pool.free_many([1, 2])
    pool.free_many(np.arange(2))


def bitmaps() -> None:
    bits = Bitmap(10**12, mode="noreserve", huge_pages="never", fork="copy", name="b")
    Bitmap(1000, fork="keep")  # type: ignore[arg-type]
    common(bits)
    assert_type((bits.nbits, len(bits), bits.count(0, 10)), tuple[int, int, int])
    assert_type((bits.set(0, 10), bits.clear(0), bits.test(0)), tuple[int, int, bool])
    assert_type((bits.any(), bits.all(0, 10), 3 in bits), tuple[bool, bool, bool])
    assert_type((bits.find_set(), bits.find_clear(8, 0)), tuple[int | None, int | None])
    assert_type(list(bits.runs(0, 10, value=False)), list[tuple[int, int]])
    assert_type(bits[0], bool)
    assert_type(bits[0:10], Bitmap)
    bits[0] = True
    bits[0:10] = bits[10:20]
    bits |= bits.copy()
    assert_type(bits, Bitmap)
    bits.andnot(bits)
    assert_type(bits.to_bytes(), bytes)
    assert_type(Bitmap.from_bytes(b"\xff", 4), Bitmap)
    assert_type(bits.words(0, 64, readonly=True), memoryview)
    assert_type(bits.committed_runs(), list[tuple[int, int]])


def page_allocators(lengths: npt.NDArray[np.int64]) -> None:
    pages = PageAllocator(1000, capacity=2000)
    assert_type((pages.npages, pages.capacity, len(pages)), tuple[int, int, int])
    assert_type((pages.free_pages, pages.longest_free), tuple[int, int])
    assert_type((pages.alloc(3, align=2), pages.grow(10)), tuple[int, int])
    pages.alloc_at(7, 2)
    pages.free(7, 2)
    assert_type(pages.is_used(7), bool)
    assert_type(list(pages.free_runs()), list[tuple[int, int]])
    assert_type(list(pages.used_runs()), list[tuple[int, int]])
    assert_type(pages.alloc_many([1, 2]), array[int])
    assert_type(pages.alloc_many(lengths, lengths), npt.NDArray[np.int64])
    pages.free_many([1, 2], 1)
    pages.free_many(lengths, lengths)


def growing(values: GrowableArray[np.float64], anything: GrowableArray[Any]) -> None:
    buffer = GrowableBuffer("1GiB", step="2MiB", mode="noreserve", name="g")
    GrowableBuffer(huge_pages="never", step=None)
    GrowableBuffer(GiB, huge_pages="always")  # type: ignore[arg-type]
    common(buffer)
    buffer.extend(b"1234")
    buffer.resize(8)
    buffer.clear()
    assert_type((len(buffer), buffer.capacity, buffer.trim()), tuple[int, int, int])
    assert_type(buffer.view(0, 4, readonly=True), memoryview)
    assert_type((buffer[0], buffer[:2], buffer.pop()), tuple[int, bytes, int])
    buffer[:2] = b"12"
    buffer["a"]  # type: ignore[call-overload]
    buffer += bytearray(2)
    assert_type((buffer.find(b"1"), b"1" in buffer, buffer == b"1"), tuple[int, bool, bool])
    assert_type((buffer + b"1", list(buffer), buffer.spare(3)), tuple[bytes, list[int], memoryview])
    assert_type((buffer.write(b"1"), buffer.read(1), buffer.tell()), tuple[int, bytes, int])
    assert_type((buffer.readlines(), buffer.closed), tuple[list[bytes], bool])

    assert_type(GrowableArray(np.float64, 1000), GrowableArray[np.float64])
    assert_type(GrowableArray(np.dtype(np.int16), 1000, fork="wipe"), GrowableArray[np.int16])
    assert_type(GrowableArray(np.float32, huge_pages=None), GrowableArray[np.float32])
    assert_type(GrowableArray("f4", 1000, step="2MiB"), GrowableArray[Any])
    GrowableArray(np.float64, 1000, mode="none")  # type: ignore[call-overload]
    assert_type(values.array, npt.NDArray[np.float64])
    assert_type(values.dtype, np.dtype[np.float64])
    assert_type(anything.array, npt.NDArray[Any])
    assert_type((len(values), values.capacity, values.trim()), tuple[int, int, int])
    assert_type(values.dropped, int)
    values.drop_front(0)
    common(values)


def growing_in_place(values: GrowableArray[np.float64]) -> None:
    values.append(1.5)
    assert_type(values.appender(), Callable[[Any], None])
    values.extend([1, 2.5])
    values.extend(values.array)
    values.extend(values)
    values.extend(i / 2 for i in range(10))
    values.extend({1.5: "a"}.keys())
    values.extend(5.5, 6.5)  # type: ignore[call-arg]
    values.resize(10, zero=False)
    values.resize(10, False)  # type: ignore[call-arg]
    np.asarray(values)

    rows = GrowableArray(np.float32, item_shape=(3, 4))
    assert_type(rows, GrowableArray[np.float32])
    assert_type((rows.item_shape, rows.shape), tuple[tuple[int, ...], tuple[int, ...]])
    assert_type((rows.ndim, rows.size, rows.itemsize, rows.nbytes), tuple[int, int, int, int])
    rows.append([[1, 2, 3, 4]] * 3)
    GrowableArray("f4", item_shape=[3])  # type: ignore[call-overload]

    assert_type(values.spare(3), npt.NDArray[np.float64])
    values.advance(3)
    assert_type(values[2:5], npt.NDArray[np.float64])
    assert_type((values[0], values[[1, 2]], values.pop()), tuple[Any, Any, Any])
    values[0] = 1.5
    values[2:5] = values[0:3]
    assert_type(iter(values), Iterator[Any])
    assert_type(1.5 in values, bool)
    assert_type((values + 1, 1 - values, -values, values > 1), tuple[Any, Any, Any, Any])
    values += 1
    assert_type(values, GrowableArray[np.float64])


def rings(values: RingArray[np.float64], anything: RingArray[Any]) -> None:
    assert_type(RingArray(np.float64, 1000), RingArray[np.float64])
    assert_type(RingArray(np.dtype(np.int16), 1000, name="r"), RingArray[np.int16])
    assert_type(RingArray("f4", 1000), RingArray[Any])
    RingArray("f4")  # type: ignore[call-overload]
    RingArray("f4", 1000, fork="wipe")  # type: ignore[call-overload]
    common(anything)
    with values as same:
        assert_type(same, RingArray[np.float64])
    values.append(1.5)
    values.extend([1, 2])
    values.extend(np.zeros(3))
    values.extend(range(3))
    values.extend(float(i) for i in range(3))
    assert_type(values.last(2), npt.NDArray[np.float64])
    assert_type(values.last(2, copy=True), npt.NDArray[np.float64])
    values.last("2")  # type: ignore[arg-type]
    assert_type(values.array, npt.NDArray[np.float64])
    assert_type((len(values), values.capacity, values.total), tuple[int, int, int])
    assert_type(values.dtype, np.dtype[np.float64])
    for item in values:
        print(item, values[0], values[-1:])
    values.clear()


def errors(refused: OutOfMemoryError, viewed: ViewError) -> None:
    assert_type((refused.verb, refused.nbytes, refused.errno_name), tuple[str, int, str])
    assert_type((refused.address, refused.limit), tuple[int | None, str | None])
    own: list[PyreserveError] = [
        refused,
        viewed,
        VMError(12, "refused", verb="commit", nbytes=1, address=None, limit="overcommit"),
        RangeError(),
        ReleasedError(),
        FreeError(),
        StateError(),
        MapsError(),
        NoAddressSpaceError(),
        AccessError(),
    ]
    builtins: tuple[MemoryError, OSError, BufferError] = refused, refused, viewed
    values: list[ValueError] = [RangeError(), ReleasedError(), FreeError(), MapsError()]
    others: tuple[RuntimeError, ProcessLookupError, PermissionError] = (
        StateError(),
        NoAddressSpaceError(),
        AccessError(),
    )
    print(own, builtins, values, others)


def kernel() -> None:
    features = capabilities()
    assert_type(features, Capabilities)
    assert_type(features.page_size, int)
    assert_type(features.huge_page_sizes, tuple[int, ...])
    assert_type(features.transparent_huge_pages, str | None)
    assert_type((features.rlimit_as, features.mseal), tuple[int | None, bool])
    features.mseal = True  # type: ignore[misc]


def address_spaces() -> None:
    space = explain(1)
    assert_type(space, AddressSpace)
    explain(path="saved")
    explain(path=Path("saved"))
    explain("init")  # type: ignore[arg-type]
    assert_type((space.vsz, space.rss, space.pss), tuple[int, int | None, int | None])
    assert_type(space.classes, tuple[procmem.MemoryClass, ...])
    assert_type(space.owners, tuple[procmem.Owner, ...])
    assert_type(space.ranges, tuple[procmem.NamedRange, ...])
    assert_type(space.top(3), list[procmem.Mapping])
    assert_type((space.verdict, space.to_json()), tuple[str, str])
    assert_type(procmem.sample(), procmem.Sample)
    assert_type(procmem.compare(space.to_dict(), space.to_dict()), procmem.Difference)
    with track() as tracked:
        assert_type(tracked, track)


def reports(table: costs.CostTable, arena: Arena, region: Region) -> None:
    diagnosis = doctor.diagnose()
    assert_type(diagnosis, doctor.Diagnosis)
    assert_type(diagnosis.findings, tuple[doctor.Finding, ...])
    assert_type(diagnosis.counts(), dict[doctor.State, int])
    assert_type(diagnosis.about("memory"), doctor.Finding)

    plan = costs.plan(only=["commit"], longest=MiB)
    assert_type(plan, costs.Plan)
    assert_type(costs.plan(longest="64MiB"), costs.Plan)
    assert_type(costs.measure(plan, budget=1.5, progress=print), costs.CostTable)
    assert_type(costs.CostTable.load("costs.json"), costs.CostTable)
    assert_type(table.model(), costs.CostModel)
    assert_type(costs.recommend(table), costs.Recommendations)
    assert_type(costs.recommend(table)["grow"], costs.Verdict)
    assert_type(costs.recommend(table).verdicts(), dict[str, costs.Verdict])
    assert_type(costs.compare(table, table), costs.Comparison)
    assert_type(costs.compare(table, table).to_dict(), dict[str, Any])
    assert_type(table.to_dict(), dict[str, Any])
    assert_type(costs.measured_step(huge_pages=True), int)
    with costs.faults(table) as f, costs.faults("costs.json"), costs.faults():
        pass
    assert_type(f, costs.faults)
    assert_type(f.minor, int)
    assert_type(f.huge, int | None)
    assert_type(f.saving(), costs.Figure)
    assert_type(f.cost().seconds, float | None)
    assert_type(costs.side_by_side({"a": table, "b": table}), costs.Machines)
    assert_type(costs.side_by_side({}).to_dict(), dict[str, Any])

    registration = prometheus.register(arena, "a")
    assert_type(registration, prometheus.Registration)
    prometheus.register(region)
    prometheus.register_process(1, "init")
    registration.unregister()
