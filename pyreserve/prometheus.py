"""Prometheus metrics of arenas, regions and processes, read at each scrape.

Each registry of ``prometheus_client`` (extra ``prometheus``) has one collector for all objects
registered there, so each metric has one HELP line, as the format requires. Names and units follow
https://prometheus.io/docs/practices/naming/: bytes, and ``_total`` for counters.
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
from pyreserve._alloc.pool import Pool
from pyreserve._arena.arena import Arena
from pyreserve._region.owner import OnRegion
from pyreserve._region.region import Region
from pyreserve._region.residency import resident
from pyreserve._system import forks, proc
from pyreserve._system.extras import import_extra
from pyreserve.errors import PyreserveError, ReleasedError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["Registration", "register", "register_process"]

_OnRegion = Region | OnRegion
_Sample = tuple[str, tuple[str, ...], int]  # metric, labels besides the name, value

# Metric suffixes and their HELP texts. Those of an arena are the fields of `MemStats`.
_ARENA = {
    "sys_bytes": "Bytes obtained from the system: heap_sys + gc_sys + other_sys.",
    "heap_sys_bytes": "Bytes of arena that are or were committed.",
    "heap_idle_bytes": "Bytes of heap_sys outside all blocks.",
    "heap_inuse_bytes": "Bytes of heap_sys in pages of blocks, or allocated by grow.",
    "heap_released_bytes": "Idle bytes given back to the system and not committed again.",
    "heap_alloc_bytes": "Bytes requested for live blocks and by grow.",
    "heap_objects": "Number of live blocks.",
    "mallocs_total": "Number of blocks allocated so far.",
    "frees_total": "Number of blocks freed so far.",
    "gc_sys_bytes": "Mapped bytes of the heap bitmap.",
    "other_sys_bytes": "Mapped bytes of spans and of the index of arenas.",
    "reserved_bytes": "Bytes of addresses that the arena owns, mapped or not.",
    "committed_bytes": "Bytes of committed memory.",
    "resident_bytes": "Bytes of committed memory that are resident (mincore).",
    "tables_bytes": "Bytes of addresses of the allocator's own tables, outside the arena.",
}
_REGION = {
    "reserved_bytes": "Bytes of addresses that the region owns.",
    "committed_bytes": "Bytes of committed memory.",
    "resident_bytes": "Bytes of committed memory that are resident (mincore).",
    "in_use_bytes": "Bytes that a BumpArena or Pool has allocated.",
}
_PROCESS = {
    "up": "Whether the process could be read: if 0, it has no other metric.",
    "address_space_bytes": "Bytes of addresses (VSZ) by class.",
    "mappings": "Number of mappings with addresses of the class; one may be in several classes.",
    "map_entries": "Number of mappings, which vm.max_map_count limits.",
    "resident_bytes": "Bytes of resident memory (RSS).",
    "proportional_bytes": "Bytes of resident memory, shared pages counted in proportion (PSS).",
    "unique_bytes": "Bytes of resident memory that no other process shares (USS).",
    "swap_bytes": "Bytes in swap.",
    "page_tables_bytes": "Bytes of the process's page tables.",
}
_METRICS = {"arena": _ARENA, "region": _REGION, "process": _PROCESS}
_BY_CLASS = (("process", "address_space_bytes"), ("process", "mappings"))


@dataclass(frozen=True, eq=False)
class Registration:
    """An object in a registry, returned by `register` and `register_process`.

    Attributes:
        name: value of the label.
        registry: the registry.
    """

    name: str
    registry: "CollectorRegistry"
    _source: "_Source" = field(repr=False)

    def unregister(self) -> None:
        """Stop exposing the object. A second call does nothing."""
        _exposed.remove(self._source, self.registry)


def register(
    subject: Arena | _OnRegion,
    name: str | None = None,
    *,
    registry: "CollectorRegistry | None" = None,
) -> Registration:
    """Expose an arena's `MemStats`, or the reserved, committed and resident bytes of a region.

    An arena has the metrics ``pyreserve_arena_*{arena="NAME"}``, read by one `memstats` call at
    each scrape; every other object has ``pyreserve_region_*{region="NAME"}`` of its region. A
    scrape reads an object consistently, waits for calls that change it, and checks every committed
    page with mincore(2). Objects are not kept alive: a released or garbage one is no longer
    exposed, and its name is free again.

    Args:
        subject: an Arena, a Region, or a BumpArena, Pool, Bitmap, GrowableBuffer or GrowableArray.
        name: value of the label; None: the object's own name, else the layout of an arena, or the
            type in lower case.
        registry: the registry; None: ``prometheus_client.REGISTRY``.

    Raises:
        ImportError: prometheus_client is missing (extra ``prometheus``).
        TypeError: `subject` is of another type, or `name` not a string.
        ValueError: a live object of this kind has the name, `name` has lone surrogates, or another
            collector has the metrics; nothing has changed.
        ReleasedError: the object is released or closed.
    """
    if isinstance(subject, Arena):
        region, default = subject.region, subject.name or str(subject.layout.name)
        source = _Source("arena", default if name is None else name, ref(subject), _read_arena)
    elif isinstance(subject, _OnRegion):
        region = subject if isinstance(subject, Region) else subject.region
        default = region.name or type(subject).__name__.lower()
        # A Bitmap has no weak references; its region lives as long.
        find = ref(region if isinstance(subject, Bitmap) else subject)
        source = _Source("region", default if name is None else name, find, _read_region)
    else:
        kind = type(subject).__name__
        msg = f"subject must be an arena, a region or an object on a region, got {kind}"
        raise TypeError(msg)
    if region.released:
        msg = f"the {source.kind} was released or closed"
        raise ReleasedError(msg)
    return _exposed.add(source, registry)


def register_process(
    pid: int | None = None, name: str | None = None, *, registry: "CollectorRegistry | None" = None
) -> Registration:
    """Expose the address space of a process as ``pyreserve_process_*{process="NAME"}``.

    Each scrape calls `pyreserve.procmem.explain`. If the process has ended or cannot be read,
    ``pyreserve_process_up`` is 0 and its other metrics are missing. A single figure that is not
    known, such as USS if smaps is unreadable, is missing alone.

    Args:
        pid: process ID; None: this process, and in a forked child the child.
        name: value of the label; None: the process ID, or ``self``.
        registry: the registry; None: ``prometheus_client.REGISTRY``.

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
    """An object to expose: `find` returns it, None if it is gone; `read` returns its samples."""

    kind: str
    name: str
    find: Callable[[], Any]
    read: Callable[[Any], list[_Sample]]

    def samples(self) -> list[_Sample]:
        subject = self.find()
        try:
            return [] if subject is None else self.read(subject)
        except ReleasedError:
            return []

    def gone(self) -> bool:
        subject = self.find()
        return subject is None or getattr(subject, "released", False)


def _read_arena(arena: Arena) -> list[_Sample]:
    stats = arena.memstats()
    return [
        (metric, (), getattr(stats, metric.removesuffix("_bytes").removesuffix("_total")))
        for metric in _ARENA
    ]


def _read_region(subject: _OnRegion) -> list[_Sample]:
    region = subject if isinstance(subject, Region) else subject.region
    with region.exports.lock:
        samples: list[_Sample] = [
            ("reserved_bytes", (), region.reserved),
            ("committed_bytes", (), region.committed),
            ("resident_bytes", (), resident(region)),
        ]
        if isinstance(subject, BumpArena | Pool):
            samples.append(("in_use_bytes", (), subject.in_use))
    return samples


class _Process(NamedTuple):
    pid: int | None
    started: int | None


def _read_process(process: _Process) -> list[_Sample]:
    from pyreserve.procmem import explain  # noqa: PLC0415  # slow to import

    try:
        space = explain(os.getpid() if process.pid is None else process.pid)
        # The PID may have been reused by another process.
        if process.pid is not None and proc.started(process.pid) != process.started:
            return [("up", (), 0)]
    except (OSError, PyreserveError):
        return [("up", (), 0)]
    totals = (
        ("resident_bytes", space.rss),
        ("proportional_bytes", space.pss),
        ("unique_bytes", space.uss),
        ("swap_bytes", space.swap),
        ("page_tables_bytes", space.page_tables),
    )
    return [
        ("up", (), 1),
        *(("address_space_bytes", (cls.name,), cls.size) for cls in space.classes),
        *(("mappings", (cls.name,), cls.mappings) for cls in space.classes),
        ("map_entries", (), space.mappings),
        *((metric, (), size) for metric, size in totals if size is not None),
    ]


class _Collector:
    """The collector of a registry, for all objects registered there."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self.sources: list[_Source] = []  # replaced, never modified: a scrape takes no lock

    def alive(self) -> list[_Source]:
        return [source for source in self.sources if not source.gone()]

    def describe(self) -> "Iterable[Metric]":
        """Return all metrics without samples, so that the registry detects name clashes."""
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
    """The collectors: one for each registry, so that each metric has one HELP line there."""

    def __init__(self) -> None:
        self._lock = RLock()
        self._collectors: WeakKeyDictionary[CollectorRegistry, _Collector] = WeakKeyDictionary()
        forks.register(self._lock)

    def add(self, source: _Source, registry: "CollectorRegistry | None") -> Registration:
        if not isinstance(source.name, str):
            msg = f"name must be a string, got {type(source.name).__name__}"
            raise TypeError(msg)
        try:
            source.name.encode()  # else every scrape of the whole registry would fail
        except UnicodeEncodeError as error:
            msg = f"name must be encodable as UTF-8, got {source.name!r}"
            raise ValueError(msg) from error
        core = import_extra("prometheus_client.core", "prometheus", "register")
        target: CollectorRegistry = core.REGISTRY if registry is None else registry
        with self._lock:
            existing = self._collectors.get(target)
            collector = existing or _Collector(core)
            others = collector.alive()
            if any((other.kind, other.name) == (source.kind, source.name) for other in others):
                msg = f"name must be unique among {source.kind} metrics, got {source.name!r} again"
                raise ValueError(msg)
            try:
                target.register(collector)
            except ValueError:
                # Already registered, which is expected unless the user had unregistered it.
                if existing is None:
                    raise
            collector.sources = [*others, source]
            self._collectors[target] = collector
        return Registration(source.name, target, source)

    def remove(self, source: _Source, registry: "CollectorRegistry") -> None:
        with self._lock:
            collector = self._collectors.get(registry)
            if collector is None:
                return
            collector.sources = [other for other in collector.alive() if other is not source]
            if not collector.sources:
                del self._collectors[registry]
                with suppress(KeyError):  # the user had unregistered it
                    registry.unregister(collector)


_exposed = _Exposed()
