"""What an arena has taken and given back, in the words of Go's runtime.MemStats."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MemStats:
    """A snapshot of an arena. Bytes, but for the three counts.

    The names and meanings are those of Go's ``runtime.MemStats`` (Go 1.4 ``src/runtime/mem.go``)::

        sys == heap_sys + gc_sys + other_sys
        heap_sys == heap_idle + heap_inuse
        heap_released <= heap_idle
        heap_alloc <= heap_inuse
        heap_objects == mallocs - frees

    What the kernel is asked for, `resident`, may change while the snapshot is taken; the others are
    exact.

    Attributes:
        sys: obtained from the system, the sum of the ``_sys`` fields.
        heap_sys: arena that is or was readable and writable.
        heap_idle: of it, in no block.
        heap_inuse: of it, whole pages of blocks, and what `Arena.grow` has handed out.
        heap_released: idle bytes given back to the system and not taken again.
        heap_alloc: bytes that were asked for, of blocks that live, and of `Arena.grow`.
        heap_objects: how many blocks live.
        mallocs: how many blocks were ever allocated.
        frees: how many of them were freed.
        gc_sys: mapped bytes of the heap bitmap.
        other_sys: mapped bytes of spans, and of the index of arenas where there is one.
        reserved: addresses that the arena owns, mapped or not: Go shows them in no field.
        committed: of them, readable and writable.
        resident: of them, in memory, as the kernel says (mincore).
        tables: addresses of the allocator's own tables, beside the arena; memory is in them only
            where pages were used.
    """

    sys: int
    heap_sys: int
    heap_idle: int
    heap_inuse: int
    heap_released: int
    heap_alloc: int
    heap_objects: int
    mallocs: int
    frees: int
    gc_sys: int
    other_sys: int
    reserved: int
    committed: int
    resident: int
    tables: int
