"""Prometheus metrics, scraped over HTTP and parsed as Prometheus does."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen
from weakref import ref

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Metric, start_http_server
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from helpers.witness import PATIENCE
from pyreserve import (
    PAGE_SIZE,
    Arena,
    Bitmap,
    BumpArena,
    GrowableBuffer,
    KiB,
    MemStats,
    MiB,
    Pool,
    RangeError,
    Region,
    ReleasedError,
    reserve,
)
from pyreserve._system import proc
from pyreserve.prometheus import register, register_process

OPENMETRICS = "application/openmetrics-text; version=1.0.0"
COUNTS = {"heap_objects": "", "mallocs": "_total", "frees": "_total"}

Scraped = dict[tuple[str, ...], float]
Scrape = Callable[[], Scraped]
Get = Callable[[str], str]


class Current:
    """The registry that the server serves: that of the current test."""

    registry = CollectorRegistry()

    def collect(self) -> Iterable[Metric]:
        return self.registry.collect()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, Current]]:
    """Serve over HTTP, each scrape in a thread of its own."""
    current = Current()
    server, thread = start_http_server(0, "127.0.0.1", current)
    yield f"http://127.0.0.1:{server.server_port}/metrics", current
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def registry(served: tuple[str, Current]) -> CollectorRegistry:
    """A registry configured like `prometheus_client.REGISTRY`."""
    served[1].registry = CollectorRegistry(auto_describe=True)
    return served[1].registry


@pytest.fixture
def get(served: tuple[str, Current]) -> Get:
    """Fetch the registry in a format."""

    def get(accept: str) -> str:
        with urlopen(Request(served[0], headers={"Accept": accept}), timeout=PATIENCE) as answer:
            return str(answer.read().decode())

    return get


def values(families: Iterable[Metric]) -> Scraped:
    """The value of each metric, by its name and its labels' values, the class last."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels, reverse=True))): (
            sample.value
        )
        for family in families
        for sample in family.samples
    }


@pytest.fixture
def scrape(get: Get) -> Scrape:
    """Scrape the registry."""
    return lambda: values(text_string_to_metric_families(get("text/plain")))


@pytest.fixture
def arena() -> Iterator[Arena]:
    """An arena with bytes in use, idle, given back and resident."""
    with Arena(64 * MiB) as opened:
        kept, idle = opened.alloc(100 * KiB), opened.alloc(3 * MiB)
        for block in (kept, idle):
            block.view()[:] = b"x" * block.nbytes
        idle.free()
        opened.trim(MiB)
        yield opened


def exposed(name: str, stats: MemStats) -> Scraped:
    """The expected samples of an arena."""
    return {
        (f"pyreserve_arena_{field}{COUNTS.get(field, '_bytes')}", name): value
        for field, value in stats._asdict().items()
    }


def shown(scraped: Scraped, name: str) -> dict[str, float]:
    """The values of one object."""
    return {key[0]: value for key, value in scraped.items() if key[1] == name}


class TestArenas:
    def test_every_field(self, registry: CollectorRegistry, scrape: Scrape, arena: Arena) -> None:
        """A scrape has the fields of memstats and nothing else."""
        register(arena, "heap", registry=registry)

        stats = arena.memstats()
        assert scrape() == exposed("heap", stats)
        assert 0 < stats.heap_released < stats.heap_idle
        assert 0 < stats.resident < stats.committed < stats.reserved
        assert (stats.mallocs, stats.frees) == (2, 1)

    def test_each_scrape_is_fresh(
        self, registry: CollectorRegistry, scrape: Scrape, arena: Arena
    ) -> None:
        """The next scrape shows changes."""
        register(arena, "heap", registry=registry)
        before = scrape()

        arena.alloc(MiB)

        assert scrape() == exposed("heap", arena.memstats()) != before

    def test_several(self, registry: CollectorRegistry, scrape: Scrape, arena: Arena) -> None:
        """Two arenas share the metrics, told apart by their names."""
        with Arena(MiB) as other:
            register(arena, "heap", registry=registry)
            register(other, "other", registry=registry)

            assert scrape() == {
                **exposed("heap", arena.memstats()),
                **exposed("other", other.memstats()),
            }

    def test_under_way(self, registry: CollectorRegistry, scrape: Scrape, arena: Arena) -> None:
        """A scrape while threads allocate and free is consistent: its sums are exact."""
        register(arena, "heap", registry=registry)
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                blocks = [arena.alloc(100_000) for _ in range(20)]
                arena.free_many(blocks)
                arena.trim()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        try:
            seen = [shown(scrape(), "heap") for _ in range(30)]
        finally:
            done.set()
            for thread in threads:
                thread.join()

        for each in seen:
            now = {name.removeprefix("pyreserve_arena_"): n for name, n in each.items()}
            parts = now["heap_sys_bytes"], now["gc_sys_bytes"], now["other_sys_bytes"]
            assert now["sys_bytes"] == sum(parts)
            assert now["heap_sys_bytes"] == now["heap_idle_bytes"] + now["heap_inuse_bytes"]
            assert now["heap_objects"] == now["mallocs_total"] - now["frees_total"]
            assert now["heap_alloc_bytes"] == 100 * KiB + 100_000 * (now["heap_objects"] - 1)
            assert now["heap_released_bytes"] <= now["heap_idle_bytes"]


class TestRegions:
    def test_a_region(self, registry: CollectorRegistry, scrape: Scrape, region: Region) -> None:
        """A scrape shows the reserved, committed and resident bytes."""
        region.commit(0, 8 * PAGE_SIZE)
        region.populate(0, 3 * PAGE_SIZE)
        region.commit(20 * PAGE_SIZE, PAGE_SIZE)

        register(region, "cache", registry=registry)

        assert scrape() == {
            ("pyreserve_region_reserved_bytes", "cache"): 64 * PAGE_SIZE,
            ("pyreserve_region_committed_bytes", "cache"): 9 * PAGE_SIZE,
            ("pyreserve_region_resident_bytes", "cache"): 3 * PAGE_SIZE,
        }

    def test_containers_show_their_regions(
        self, registry: CollectorRegistry, scrape: Scrape
    ) -> None:
        """Allocators, growables and bitmaps show their regions and allocated bytes."""
        pool, bump, bits, buffer = Pool(48), BumpArena(MiB), Bitmap(10**6), GrowableBuffer(MiB)
        pool.alloc_many(10)
        bump.alloc(1000)
        bits.set(5)
        buffer.extend(b"hello")

        subjects: list[Pool | BumpArena | Bitmap | GrowableBuffer] = [pool, bump, bits, buffer]
        names = [register(subject, registry=registry).name for subject in subjects]

        scraped = scrape()
        assert names == ["pool", "bumparena", "bitmap", "growablebuffer"]
        for subject, name in zip(subjects, names, strict=True):
            samples = shown(scraped, name)
            assert samples["pyreserve_region_committed_bytes"] == subject.committed > 0
            assert samples["pyreserve_region_reserved_bytes"] == subject._region.size
            assert 0 <= samples["pyreserve_region_resident_bytes"] <= subject.committed
            in_use = {"pool": 480, "bumparena": 1000}.get(name)
            assert samples.get("pyreserve_region_in_use_bytes") == in_use

    def test_under_way(self, registry: CollectorRegistry, scrape: Scrape, region: Region) -> None:
        """A scrape while a thread commits, populates and decommits is consistent."""
        register(region, "cache", registry=registry)
        done = threading.Event()

        def work() -> None:
            while not done.is_set():
                region.commit(0, region.size)
                region.populate(0, region.size)
                region.decommit(0, region.size)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            seen = [shown(scrape(), "cache") for _ in range(30)]
        finally:
            done.set()
            thread.join()

        for each in seen:
            committed = each["pyreserve_region_committed_bytes"]
            assert committed in {0, region.size}
            assert each["pyreserve_region_resident_bytes"] in {0, committed}


class TestNames:
    def test_their_own(self, registry: CollectorRegistry, arena: Arena) -> None:
        """The default name of an arena is its layout, of a region its own name."""
        named = reserve(PAGE_SIZE, name="mine")

        assert register(arena, registry=registry).name == "native"
        assert register(named, registry=registry).name == "mine"

    def test_any_text(self, registry: CollectorRegistry, scrape: Scrape, region: Region) -> None:
        """Quotes, newlines and umlauts in a name do not break a scrape."""
        name = 'a "quoted"\\\nGr\u00f6\u00dfe'
        register(region, name, registry=registry)

        assert shown(scrape(), name)["pyreserve_region_reserved_bytes"] == region.size

    def test_one_name_twice(
        self, registry: CollectorRegistry, scrape: Scrape, region: Region, arena: Arena
    ) -> None:
        """A name used by a live object of the same kind is refused, and nothing changes."""
        register(region, "one", registry=registry)
        register(arena, "one", registry=registry)
        before = scrape()

        with pytest.raises(ValueError, match="name must be unique among region metrics, got 'one'"):
            register(Pool(8), "one", registry=registry)

        assert scrape() == before

    def test_free_again(self, registry: CollectorRegistry, scrape: Scrape) -> None:
        """The name of a released or garbage object is free again."""
        first, second = reserve(PAGE_SIZE), reserve(2 * PAGE_SIZE)
        register(first, "one", registry=registry)
        first.release()
        register(second, "one", registry=registry)
        del second
        third = reserve(3 * PAGE_SIZE)
        register(third, "one", registry=registry)

        assert shown(scrape(), "one")["pyreserve_region_reserved_bytes"] == 3 * PAGE_SIZE

    def test_refusals(self, registry: CollectorRegistry, scrape: Scrape, region: Region) -> None:
        """An object without metrics, an invalid name or a released object is refused."""
        gone, heap = reserve(PAGE_SIZE), Arena(MiB)
        gone.release()
        heap.release()

        with pytest.raises(TypeError, match=r"subject must be an arena, .* got bytes"):
            register(b"", registry=registry)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="name must be a string, got int"):
            register(region, 5, registry=registry)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="name must be encodable as UTF-8"):
            register(region, "\udcff", registry=registry)
        with pytest.raises(ReleasedError):
            register(gone, registry=registry)
        with pytest.raises(ReleasedError):
            register(heap, registry=registry)
        assert scrape() == {}


class TestEnds:
    def test_released(
        self, registry: CollectorRegistry, get: Get, scrape: Scrape, region: Region
    ) -> None:
        """A released object is no longer exposed; the others still are."""
        gone = Arena(MiB)
        register(gone, "gone", registry=registry)
        register(region, "stays", registry=registry)

        gone.release()

        assert {key[1] for key in scrape()} == {"stays"}
        region.release()
        assert get("text/plain") == ""

    def test_released_in_between(
        self, registry: CollectorRegistry, scrape: Scrape, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An object released in the middle of a scrape does not break the scrape."""
        arena = Arena(MiB)
        memstats = Arena.memstats

        def late(self: Arena) -> MemStats:
            self.release()
            return memstats(self)

        monkeypatch.setattr(Arena, "memstats", late)
        register(arena, registry=registry)

        assert scrape() == {}

    @pytest.mark.parametrize(
        "make",
        [
            lambda: reserve(PAGE_SIZE),
            lambda: Arena(MiB),
            lambda: Pool(8),
            lambda: BumpArena(MiB),
            lambda: Bitmap(100),
            lambda: GrowableBuffer(100),
        ],
    )
    def test_nothing_is_kept(
        self, registry: CollectorRegistry, scrape: Scrape, make: Callable[[], Any]
    ) -> None:
        """A garbage object is gone at once, although the registration is kept."""
        subject = make()
        alive = ref(subject if isinstance(subject, Region) else subject._region)
        kept = register(subject, "it", registry=registry)
        assert shown(scrape(), "it")

        del subject

        assert alive() is None
        assert scrape() == {}
        kept.unregister()

    def test_unregistered(self, registry: CollectorRegistry, scrape: Scrape) -> None:
        """Unregistering removes one object; the last one removes the collector."""
        regions = [reserve(PAGE_SIZE) for _ in range(2)]
        first, second = (register(r, str(i), registry=registry) for i, r in enumerate(regions))

        first.unregister()
        first.unregister()
        assert {key[1] for key in scrape()} == {"1"}
        second.unregister()
        assert scrape() == {}

        register(regions[0], "0", registry=registry)
        first.unregister()
        assert {key[1] for key in scrape()} == {"0"}

    def test_a_registry_that_was_cleared(
        self, registry: CollectorRegistry, scrape: Scrape, region: Region
    ) -> None:
        """If the user unregisters the collector, the next registration is exposed."""
        first = register(region, "one", registry=registry)
        (collector,) = registry._collector_to_names
        registry.unregister(collector)
        assert scrape() == {}

        second = register(region, "two", registry=registry)

        assert {key[1] for key in scrape()} == {"one", "two"}
        registry.unregister(collector)
        first.unregister()
        second.unregister()

    def test_metrics_of_another(self, registry: CollectorRegistry, region: Region) -> None:
        """If another collector has one of the metrics, ValueError, and nothing is registered."""
        other = Gauge("pyreserve_process_up", "Of somebody else.", registry=registry)

        for _ in range(2):
            with pytest.raises(ValueError, match="pyreserve_process_up"):
                register(region, registry=registry)
        registry.unregister(other)
        register(region, registry=registry)

    def test_the_default_registry(self, region: Region) -> None:
        """The default registry is the one that prometheus_client serves."""
        kept = register(region, "default")

        assert kept.registry is REGISTRY
        reserved = REGISTRY.get_sample_value(
            "pyreserve_region_reserved_bytes", {"region": "default"}
        )
        assert reserved == region.size
        kept.unregister()


CLASSES = ("no_access_reserved", "resident_private", "swapped")


@pytest.fixture
def explained(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """The result or exception of `pyreserve.procmem.explain` for each process."""
    results: dict[int, Any] = {}

    def explain(pid: int) -> Any:
        if isinstance(results[pid], Exception):
            raise results[pid]
        return results[pid]

    fake = ModuleType("pyreserve.procmem")
    fake.explain = explain  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyreserve.procmem", fake)
    return results


def space() -> SimpleNamespace:
    """An address space as `explain` returns it."""
    return SimpleNamespace(
        vsz=600 * KiB,
        rss=11 * KiB,
        pss=12 * KiB,
        uss=13 * KiB,
        swap=14 * KiB,
        page_tables=15 * KiB,
        mappings=16,
        classes=tuple(
            SimpleNamespace(name=name, size=100 * i * KiB, mappings=i)
            for i, name in enumerate(CLASSES, start=1)
        ),
    )


class TestProcesses:
    def test_this_one(
        self, registry: CollectorRegistry, scrape: Scrape, explained: dict[int, Any]
    ) -> None:
        """A scrape shows the classes and the sums, in bytes."""
        explained[os.getpid()] = space()

        register_process(registry=registry)

        expected: Scraped = {
            ("pyreserve_process_up", "self"): 1,
            ("pyreserve_process_map_entries", "self"): 16,
            ("pyreserve_process_resident_bytes", "self"): 11 * KiB,
            ("pyreserve_process_proportional_bytes", "self"): 12 * KiB,
            ("pyreserve_process_unique_bytes", "self"): 13 * KiB,
            ("pyreserve_process_swap_bytes", "self"): 14 * KiB,
            ("pyreserve_process_page_tables_bytes", "self"): 15 * KiB,
        }
        for i, name in enumerate(CLASSES, start=1):
            expected["pyreserve_process_address_space_bytes", "self", name] = i * 100 * KiB
            expected["pyreserve_process_mappings", "self", name] = i
        assert scrape() == expected

    @pytest.mark.parametrize(
        ("figure", "metric"),
        [
            ("rss", "resident_bytes"),
            ("pss", "proportional_bytes"),
            ("uss", "unique_bytes"),
            ("swap", "swap_bytes"),
            ("page_tables", "page_tables_bytes"),
        ],
    )
    def test_unknown_figures_are_missing(
        self,
        registry: CollectorRegistry,
        scrape: Scrape,
        explained: dict[int, Any],
        figure: str,
        metric: str,
    ) -> None:
        """An unknown figure is missing; the others are present."""
        explained[os.getpid()] = space()
        register_process(registry=registry)
        before = scrape()
        setattr(explained[os.getpid()], figure, None)

        del before[f"pyreserve_process_{metric}", "self"]
        assert scrape() == before

    @pytest.mark.parametrize("refusal", [PermissionError(), FileNotFoundError(), RangeError()])
    def test_not_to_be_read(
        self,
        registry: CollectorRegistry,
        scrape: Scrape,
        explained: dict[int, Any],
        region: Region,
        refusal: Exception,
    ) -> None:
        """A process that cannot be read has up 0, and other objects are unaffected."""
        explained[os.getpid()] = space()
        explained[os.getppid()] = refusal
        register_process(registry=registry)
        register_process(os.getppid(), "parent", registry=registry)
        register(region, "cache", registry=registry)

        scraped = scrape()

        assert shown(scraped, "parent") == {"pyreserve_process_up": 0}
        assert shown(scraped, "self")["pyreserve_process_up"] == 1
        assert shown(scraped, "cache")["pyreserve_region_reserved_bytes"] == region.size

    def test_gone(
        self, registry: CollectorRegistry, scrape: Scrape, explained: dict[int, Any]
    ) -> None:
        """An ended process has up 0; one that does not exist is refused at once."""
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as child:
            pid, explained[child.pid] = child.pid, space()
            assert register_process(pid, registry=registry).name == str(pid)
            assert shown(scrape(), str(pid))["pyreserve_process_up"] == 1

        assert scrape() == {("pyreserve_process_up", str(pid)): 0}
        with pytest.raises(FileNotFoundError):
            register_process(pid, "again", registry=registry)

    def test_another_of_its_number(
        self,
        registry: CollectorRegistry,
        scrape: Scrape,
        explained: dict[int, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A later process with the same PID is not confused with an ended one."""
        explained[os.getppid()] = space()
        register_process(os.getppid(), "parent", registry=registry)
        started = proc.started(os.getppid())

        monkeypatch.setattr(proc, "started", lambda pid: started + 1)

        assert scrape() == {("pyreserve_process_up", "parent"): 0}

    def test_when_it_was_started(self) -> None:
        """A child has a later start time than its parent, whatever its name."""
        script = (
            "import sys; from pyreserve._system import proc; import os\n"
            "open('/proc/self/comm', 'w').write('a) 1 (b')\n"
            "print(proc.started(os.getpid()))"
        )
        child = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )

        assert int(child.stdout) > proc.started(os.getpid()) > 0


@pytest.fixture
def everything(
    registry: CollectorRegistry, arena: Arena, explained: dict[int, Any]
) -> Iterator[CollectorRegistry]:
    """A registry with all kinds of objects, so with all metrics."""
    explained[os.getpid()] = space()
    pool = Pool(8)
    register(arena, registry=registry)
    register(pool, registry=registry)
    register(arena.region, "arena's", registry=registry)
    register_process(registry=registry)
    yield registry
    pool.release()


@pytest.mark.usefixtures("everything")
class TestFormat:
    def test_conventions(self, get: Get) -> None:
        """Metrics in bytes end in _bytes, counters in _total, and HELP is a sentence."""
        for family in text_string_to_metric_families(get("text/plain")):
            assert re.fullmatch(r"pyreserve_(arena|region|process)_[a-z_]+", family.name)
            in_bytes = re.search(r"^(Idle )?[Bb]ytes|^Addresses|Mapped bytes", family.documentation)
            assert family.name.endswith("_bytes") == bool(in_bytes)
            assert re.fullmatch(r"[A-Z].*\.", family.documentation)
            assert (family.type == "counter") == family.samples[0].name.endswith("_total")
            assert family.type in {"counter", "gauge"}
            assert [name for name in family.samples[0].labels if name != "class"] == [
                family.name.split("_")[1]
            ]

    def test_each_metric_once(self, get: Get) -> None:
        """A metric has one HELP and one TYPE for any number of objects."""
        described = re.findall(r"^# (?:HELP|TYPE) \S+", get("text/plain"), re.MULTILINE)

        assert len(described) == len(set(described)) > 50

    def test_openmetrics(self, get: Get, scrape: Scrape) -> None:
        """OpenMetrics, whose parser is strict, has the same samples and the units."""
        text = get(OPENMETRICS)
        families = list(openmetrics.text_string_to_metric_families(text))  # type: ignore[no-untyped-call]

        assert text.endswith("# EOF\n")
        assert values(families) == scrape()
        for family in families:
            assert family.unit == ("bytes" if family.name.endswith("_bytes") else "")

    def test_one_by_name(self, everything: CollectorRegistry) -> None:
        """A scrape can ask for metrics by name."""
        selected = everything.restricted_registry(["pyreserve_arena_mallocs_total"])

        assert [metric.name for metric in selected.collect()] == ["pyreserve_arena_mallocs"]


class TestElsewhere:
    def test_without_prometheus_client(self) -> None:
        """Without prometheus_client the error names the extra; importing works."""
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; sys.modules['prometheus_client'] = None\n"
                "from pyreserve import prometheus, reserve\n"
                "prometheus.register(reserve(9))",
            ],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.stderr.splitlines()[-1] == (
            "ImportError: register needs prometheus_client: pip install 'pyreserve[prometheus]'"
        )

    def test_cheap_to_import(self) -> None:
        """Importing pyreserve or pyreserve.prometheus does not import prometheus_client."""
        subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys, pyreserve\n"
                "assert 'pyreserve.prometheus' not in sys.modules\n"
                "import pyreserve.prometheus\n"
                "assert 'prometheus_client' not in sys.modules",
            ],
            check=True,
        )
