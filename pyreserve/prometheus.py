"""Stats for Prometheus: what arenas, regions and processes hold, read when they are scraped.

A collector stands in a registry of ``prometheus_client`` (extra ``prometheus``) for all that is
registered there, so each metric has its HELP once, as the format wants it. Names and units follow
https://prometheus.io/docs/practices/naming/: bytes, and ``_total`` for what only grows.
"""

import os
from _thread import RLock
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary, ref

from pyreserve._alloc.bitmap import Bitmap
from pyreserve._alloc.bump import BumpArena
from pyreserve._alloc.growable import GrowableArray, GrowableBuffer
from pyreserve._alloc.pool import Pool
from pyreserve._arena.arena import Arena
from pyreserve._region.region import Region, resident
from pyreserve._system import forks, proc
from pyreserve._system.extras import import_extra
from pyreserve.errors import PyreserveError, ReleasedError
from pyreserve.units import KiB

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Registration", "register", "register_process"]

_OnRegion = Region | BumpArena | Pool | Bitmap | GrowableBuffer | GrowableArray
_Sample = tuple[str, tuple[str, ...], int]  # metric, labels besides the name, value

# What stands after pyreserve_ and the kind, and HELP. An arena's are the fields of `MemStats`.
_ARENA = {
    "sys_bytes": "Bytes obtained from the system: heap_sys + gc_sys + other_sys.",
    "heap_sys_bytes": "Bytes of arena that is or was readable and writable.",
    "heap_idle_bytes": "Bytes of heap_sys that are in no block.",
    "heap_inuse_bytes": "Bytes of heap_sys in whole pages of blocks, or handed out by grow.",
    "heap_released_bytes": "Idle bytes given back to the system and not taken again.",
    "heap_alloc_bytes": "Bytes that were asked for, of blocks that live, and of grow.",
    "heap_objects": "How many blocks live.",
    "mallocs_total": "How many blocks were ever allocated.",
    "frees_total": "How many blocks were freed.",
    "gc_sys_bytes": "Mapped bytes of the heap bitmap.",
    "other_sys_bytes": "Mapped bytes of spans, and of the index of arenas where there is one.",
    "reserved_bytes": "Addresses that the arena owns, mapped or not.",
    "committed_bytes": "Bytes of reserved that are readable and writable.",
    "resident_bytes": "Bytes of committed that are in memory, as the kernel says (mincore).",
    "tables_bytes": "Addresses of the allocator's own tables, beside the arena.",
}
_REGION = {
    "reserved_bytes": "Addresses that the region owns.",
    "committed_bytes": "Bytes of reserved that are readable and writable.",
    "resident_bytes": "Bytes of committed that are in memory, as the kernel says (mincore).",
    "in_use_bytes": "Bytes that a BumpArena or Pool has handed out.",
}
_PROCESS = {
    "up": "Whether the process was there and could be read: if 0, it has no other metric.",
    "address_space_bytes": "Bytes of addresses (VSZ) by what is behind them.",
    "mappings": "Mappings that have addresses of the class; one may be in several classes.",
    "map_entries": "Mappings, as vm.max_map_count limits them.",
    "resident_bytes": "Bytes in memory (RSS).",
    "proportional_bytes": "Bytes in memory, shared ones divided by how many share them (PSS).",
    "unique_bytes": "Bytes in memory that no other process shares (USS).",
    "swap_bytes": "Bytes in swap.",
    "page_tables_bytes": "Bytes of the kernel's page tables for the process.",
}
_METRICS = {"arena": _ARENA, "region": _REGION, "process": _PROCESS}
_BY_CLASS = (("process", "address_space_bytes"), ("process", "mappings"))


@dataclass(frozen=True, eq=False)
class Registration:
    """One thing in one registry, as made by `register` and `register_process`.

    Attributes:
        name: the label.
        registry: where.
    """

    name: str
    registry: "CollectorRegistry"
    _source: "_Source" = field(repr=False)

    def unregister(self) -> None:
        """Expose it no longer. Does nothing where that was done before."""
        _exposed.remove(self._source, self.registry)


def register(
    thing: Arena | _OnRegion,
    name: str | None = None,
    *,
    registry: "CollectorRegistry | None" = None,
) -> Registration:
    """Expose an arena's `MemStats`, or what a region has reserved, committed and in memory.

    An arena has the metrics ``pyreserve_arena_*{arena="NAME"}``, each scrape from one `memstats`;
    everything else stands on a region and has ``pyreserve_region_*{region="NAME"}``. A scrape looks
    at a thing at one moment, waits for calls that change it, and asks the kernel about every
    committed page. Nothing is kept alive: what was released or dropped is exposed no longer, and
    its name is free.

    Args:
        thing: also what stands on a region: a BumpArena, Pool, Bitmap, GrowableBuffer or
            GrowableArray.
        name: the label; None: an arena's layout, a region's own name, or the kind of thing.
        registry: where; None: ``prometheus_client.REGISTRY``.

    Raises:
        ImportError: prometheus_client is missing (extra ``prometheus``).
        TypeError: it is nothing of the above, or the name is no string.
        ValueError: a thing of this kind that lives has the name, it has lone surrogates, or another
            collector has the metrics; nothing has changed.
        ReleasedError: it was released or closed.
    """
    if isinstance(thing, Arena):
        region, default = thing.region, thing.layout.name
        source = _Source("arena", default if name is None else name, ref(thing), _read_arena)
    elif isinstance(thing, _OnRegion):
        region = thing if isinstance(thing, Region) else thing._region
        default = region.name or type(thing).__name__.lower()
        # There are no weak references to a Bitmap, and its region lives as long.
        find = ref(region if isinstance(thing, Bitmap) else thing)
        source = _Source("region", default if name is None else name, find, _read_region)
    else:
        msg = f"neither an arena nor on a region: {type(thing).__name__}"
        raise TypeError(msg)
    if region.released:
        msg = f"the {source.kind} was released or closed"
        raise ReleasedError(msg)
    return _exposed.add(source, registry)


def register_process(
    pid: int | None = None, name: str | None = None, *, registry: "CollectorRegistry | None" = None
) -> Registration:
    """Expose what a process's address space holds, as ``pyreserve_process_*{process="NAME"}``.

    Each scrape asks `pyreserve.procmem.explain`. If the process has ended or may not be read then,
    ``pyreserve_process_up`` is 0 and the rest of it is missing. Figures that are not
    known, such as USS where smaps can't be read, are missing alone.

    Args:
        pid: which process; None: this one, in a forked child the child.
        name: the label; None: the number, or ``self``.
        registry: where; None: ``prometheus_client.REGISTRY``.

    Raises:
        ImportError, TypeError, ValueError: as for `register`.
        OSError: there is no such process.
    """
    process = _Process(pid, None if pid is None else proc.started(pid))
    default = "self" if pid is None else str(pid)
    source = _Source("process", default if name is None else name, lambda: process, _read_process)
    return _exposed.add(source, registry)


@dataclass(frozen=True, eq=False)
class _Source:
    """A thing to expose: how to get hold of it, None if it is gone, and how to read it."""

    kind: str
    name: str
    find: Callable[[], Any]
    read: Callable[[Any], list[_Sample]]

    def samples(self) -> list[_Sample]:
        thing = self.find()
        try:
            return [] if thing is None else self.read(thing)
        except ReleasedError:
            return []

    def gone(self) -> bool:
        thing = self.find()
        return thing is None or getattr(thing, "released", False)


def _read_arena(arena: Arena) -> list[_Sample]:
    stats = arena.memstats()
    return [
        (metric, (), getattr(stats, metric.removesuffix("_bytes").removesuffix("_total")))
        for metric in _ARENA
    ]


def _read_region(thing: _OnRegion) -> list[_Sample]:
    region = thing if isinstance(thing, Region) else thing._region
    with region._lock or region._make_lock():
        samples: list[_Sample] = [
            ("reserved_bytes", (), region.reserved),
            ("committed_bytes", (), region.committed),
            ("resident_bytes", (), resident(region)),
        ]
        if isinstance(thing, BumpArena | Pool):
            samples.append(("in_use_bytes", (), thing.in_use))
    return samples


class _Process(NamedTuple):
    pid: int | None
    started: int | None


def _read_process(process: _Process) -> list[_Sample]:
    from pyreserve.procmem import explain  # noqa: PLC0415  # only where it is wanted

    try:
        space = explain(os.getpid() if process.pid is None else process.pid)
        # Another process may have got the number by now.
        if process.pid is not None and proc.started(process.pid) != process.started:
            return [("up", (), 0)]
    except (OSError, PyreserveError):
        return [("up", (), 0)]
    totals = (
        ("resident_bytes", space.rss_kib),
        ("proportional_bytes", space.pss_kib),
        ("unique_bytes", space.uss_kib),
        ("swap_bytes", space.swap_kib),
        ("page_tables_bytes", space.page_tables_kib),
    )
    return [
        ("up", (), 1),
        *(("address_space_bytes", (each.name,), KiB * each.kib) for each in space.classes),
        *(("mappings", (each.name,), each.mappings) for each in space.classes),
        ("map_entries", (), space.mappings),
        *((metric, (), KiB * kib) for metric, kib in totals if kib is not None),
    ]


class _Collector:
    """What a registry asks for the metrics of all that is registered there."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.sources: list[_Source] = []  # replaced, never changed: a scrape takes no lock

    def alive(self) -> list[_Source]:
        return [source for source in self.sources if not source.gone()]

    def describe(self) -> "Iterable[Metric]":
        """Say which metrics there may be: the registry then knows of clashes, and reads nothing."""
        return self._families().values()

    def collect(self) -> "Iterable[Metric]":
        families = self._families()
        for source in self.sources:
            for metric, classes, value in source.samples():
                families[source.kind, metric].add_metric([source.name, *classes], value)
        return [family for family in families.values() if family.samples]

    def _families(self) -> dict[tuple[str, str], Any]:
        gauge, counter = self._core.GaugeMetricFamily, self._core.CounterMetricFamily
        return {
            (kind, metric): (counter if metric.endswith("_total") else gauge)(
                f"pyreserve_{kind}_{metric}",
                text,
                labels=(kind, "class") if (kind, metric) in _BY_CLASS else (kind,),
                unit="bytes" if metric.endswith("_bytes") else "",
            )
            for kind, metrics in _METRICS.items()
            for metric, text in metrics.items()
        }


class _Exposed:
    """The collector of each registry: one, so that each metric has one HELP there."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._of: WeakKeyDictionary[CollectorRegistry, _Collector] = WeakKeyDictionary()
        forks.register(self._lock)

    def add(self, source: _Source, registry: "CollectorRegistry | None") -> Registration:
        if not isinstance(source.name, str):
            msg = f"a name is a string, not {type(source.name).__name__}"
            raise TypeError(msg)
        try:
            source.name.encode()  # every scrape would fail, of all that the registry has
        except UnicodeEncodeError as error:
            msg = f"a name is text that UTF-8 can write, not {source.name!r}"
            raise ValueError(msg) from error
        core = import_extra("prometheus_client.core", "prometheus", "register")
        where: CollectorRegistry = core.REGISTRY if registry is None else registry
        with self._lock:
            known = self._of.get(where)
            collector = known or _Collector(core)
            others = collector.alive()
            if any((other.kind, other.name) == (source.kind, source.name) for other in others):
                msg = f"the name {source.name!r} is taken for a {source.kind}: give another one"
                raise ValueError(msg)
            try:
                where.register(collector)
            except ValueError:
                # It stands there, as it should; unless somebody took it out, and it does again now.
                if known is None:
                    raise
            collector.sources = [*others, source]
            self._of[where] = collector
        return Registration(source.name, where, source)

    def remove(self, source: _Source, registry: "CollectorRegistry") -> None:
        with self._lock:
            collector = self._of.get(registry)
            if collector is None:
                return
            collector.sources = [other for other in collector.alive() if other is not source]
            if not collector.sources:
                del self._of[registry]
                with suppress(KeyError):  # somebody took it out
                    registry.unregister(collector)


_exposed = _Exposed()
