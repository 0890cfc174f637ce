"""Memory statistics of an arena, named after the fields of Go's runtime.MemStats."""

from typing import NamedTuple

from pyreserve._system.report import Report, Table
from pyreserve.units import format_size

_COUNTS = ("heap_objects", "mallocs", "frees")


class MemStats(NamedTuple):
    """Memory statistics of an arena at one moment: three counts, all other fields in bytes.

    The names and meanings are those of Go's ``runtime.MemStats`` (Go 1.4 ``src/runtime/mem.go``)::

        sys == heap_sys + gc_sys + other_sys
        heap_sys == heap_idle + heap_inuse
        heap_released <= heap_idle
        heap_alloc <= heap_inuse
        heap_objects == mallocs - frees

    All fields are exact except `resident`: the kernel may change it while it is read. ``str()``
    and notebooks show the fields as a table with readable sizes.

    Attributes:
        sys: bytes obtained from the system; the sum of the ``_sys`` fields.
        heap_sys: bytes of arena that are committed, or were before they were decommitted.
        heap_idle: bytes of `heap_sys` outside blocks and outside ranges from `Arena.grow`.
        heap_inuse: bytes of `heap_sys` in the whole pages of blocks and in ranges from
            `Arena.grow`.
        heap_released: bytes of `heap_idle` given back to the system and not used since.
        heap_alloc: requested bytes of all live blocks, plus the ranges from `Arena.grow`.
        heap_objects: number of live blocks.
        mallocs: number of blocks allocated since the arena was created.
        frees: number of blocks freed since the arena was created.
        gc_sys: mapped bytes of the heap bitmap.
        other_sys: mapped bytes of spans, and of the index of arenas in layouts that have one.
        reserved: bytes of address space that the arena owns, committed or not. Go has no field
            for it.
        committed: bytes of `reserved` that are readable and writable.
        resident: bytes of `reserved` that are in RAM (mincore(2)).
        tables: bytes of address space of the allocator's own tables, which are not part of
            `reserved`. Only entries of pages that were used have memory.
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

    def __str__(self) -> str:
        return self._report().text()

    def _repr_html_(self) -> str:
        return self._report().html()

    def _report(self) -> Report:
        heading = f"Arena: {format_size(self.heap_inuse)} in use of {format_size(self.heap_sys)}"
        rows: list[tuple[str, ...]] = [
            (name, f"{value:,}" if name in _COUNTS else format_size(value))
            for name, value in zip(self._fields, self, strict=True)
        ]
        return Report(heading, (), (Table(("field", "value"), rows),))
