"""The C heap of an arena (``csrc/heap.h``): its creation, its hot calls and its handles."""

from typing import Any

from pyreserve._alloc.pages import close_with, reserve_tables
from pyreserve._arena.engine import Engine
from pyreserve._native import ffi, lib
from pyreserve._region.region import Region
from pyreserve._system import forks
from pyreserve.errors import FreeError
from pyreserve.units import TiB

ZEROED = 1 << lib.HEAP_PAGE_BITS
"""The bit of a handle that says that the block was known to be zero when it was allocated."""

# Bound once: an attribute lookup on the library costs a third of an empty call.
heap_alloc = lib.heap_alloc
heap_find = lib.heap_find
heap_free = lib.heap_free
heap_free_unviewed = lib.heap_free_unviewed
heap_nbytes = lib.heap_nbytes
heap_address = lib.heap_address
_SPREAD_BYTES = TiB  # the tables' capacity where each arena is mapped separately (Go 1.11)


def open_heap(engine: Engine) -> tuple[Region, Any]:
    """Create a C heap; return the region of its tables and the ``struct heap *``.

    The tables are a reservation whose pages get memory at first touch.
    """
    layout, placement, region = engine.layout, engine.placement, engine.region
    own_spans = not layout.spans and not layout.arena_metadata
    if layout.arena_metadata:
        arena_bytes = _SPREAD_BYTES
    else:
        arena_bytes = placement.window_end - placement.arena_start
    capacity = min(arena_bytes // engine.page, 1 << lib.HEAP_PAGE_BITS)
    tables = reserve_tables(lib.heap_bytes(capacity, own_spans))
    metadata = ffi.new("struct heap_metadata *")
    metadata.page = engine.page
    metadata.word = layout.word
    metadata.bitmap_bits = layout.bitmap_bits
    metadata.start = placement.arena_start
    metadata.spans = ffi.cast("void *", placement.spans[0] if layout.spans else 0)
    if layout.arena_metadata:
        metadata.index = ffi.cast("uintptr_t *", engine.metadata[0].base)
        metadata.unit = layout.unit
        metadata.unit_bitmap = engine.unit_bitmap
    heap = ffi.new("struct heap *")
    lib.heap_open(
        heap,
        ffi.cast("void *", tables.base),
        capacity,
        own_spans,
        region.exports.handle,
        metadata,
    )
    # This cdata keeps all memory of the heap alive. The collector does not track it and calls hold
    # a reference, so it outlives every finaliser that may still use the arena.
    close_with(heap, tables, region, engine.metadata)
    forks.register_tables(heap, heap.pages)
    return tables, heap


def handle_array(handles: list[int]) -> Any:
    """Return a cdata array of handles, eight bytes each."""
    return ffi.new("int64_t[]", handles)


def already_freed(name: str = "the block") -> FreeError:
    """Create the exception for a block that was freed or closed before."""
    return FreeError(f"{name} was already freed or closed")
