"""Public attributes other than settings cannot be assigned, so that they stay correct."""

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

import pyreserve
from pyreserve import (
    Arena,
    Bitmap,
    BumpArena,
    GrowableArray,
    GrowableBuffer,
    MiB,
    OutOfMemoryError,
    PageAllocator,
    Pool,
    RingArray,
    VMError,
    costs,
    doctor,
    explain,
    procmem,
    prometheus,
    reserve,
    track,
)
from pyreserve.costs import measuring

MODULES = (
    "pyreserve",
    "pyreserve.costs",
    "pyreserve.doctor",
    "pyreserve.procmem",
    "pyreserve.prometheus",
)
SPACE = Path(__file__).parents[1] / "data/captures/redis"


def _table() -> costs.CostTable:
    cell = costs.Cell("commit", "mprotect", "4KiB", "charge", 4096)
    times = costs.Times(1.0, 2.0, 3.0, 4.0, 5.0, (1.5, 2.5), 6, 6)
    measured = costs.Measured(cell, "warm", times)
    return costs.CostTable({}, (measured,), costs.Noise(0.0, 0.0, 0.0), 1.0)


_INTERVALS = costs.Interval(2.0, 1.0, 3.0), costs.Interval(2.0, 1.0, 3.0)


def _tracked() -> track:
    with track() as tracked:
        pass
    return tracked


def _faulted() -> costs.faults:
    with costs.faults() as faulted:
        pass
    return faulted


def _registered() -> prometheus.Registration:
    registry = prometheus_client.CollectorRegistry()
    return prometheus.register_process(registry=registry)


def _block() -> pyreserve.Block:
    return Arena(MiB).alloc(1)


def _refused() -> OutOfMemoryError:
    with pytest.raises(OutOfMemoryError) as refused:
        reserve(1 << 60)
    return refused.value


CURVE = costs.Curve("commit", "mprotect")

# An instance of each public class, except exceptions without attributes.
MAKE: dict[str, Callable[[], Any]] = {
    "AddressSpace": lambda: explain(path=SPACE),
    "Arena": lambda: Arena(layout="fallback"),
    "Bitmap": lambda: Bitmap(1000),
    "Block": _block,
    "Blocks": lambda: Arena(MiB).alloc_many([1, 2]),
    "BumpArena": lambda: BumpArena(MiB),
    "Capabilities": pyreserve.capabilities,
    "GrowableArray": lambda: GrowableArray("i8", 1000),
    "GrowableBuffer": lambda: GrowableBuffer(MiB),
    "HeapBitmap": lambda: Arena(layout="fallback").heap_bitmap,
    "MemStats": lambda: Arena(MiB).memstats(),
    "OutOfMemoryError": _refused,
    "PageAllocator": lambda: PageAllocator(100),
    "Pool": lambda: Pool(64),
    "Region": lambda: reserve(MiB, shared=True),
    "RingArray": lambda: RingArray("i8", 100),
    "Scavenger": lambda: Arena(MiB).start_scavenger(100),
    "VMError": lambda: VMError(5, "no", verb="commit"),
    "track": _tracked,
    "Operation": lambda: costs.OPERATIONS["touch", "write"],
    "Situation": lambda: costs.SITUATIONS[0],
    "Way": lambda: costs.WAYS[0],
    "WayCosts": lambda: costs.WayCosts(costs.WAYS[0], "4KiB", *_INTERVALS, None),
    "Interval": lambda: _INTERVALS[0],
    "Verdict": lambda: costs.Verdict("Why?", "so", "1", True, 1),
    "Cell": lambda: _table().cells[0].cell,
    "BystanderCost": lambda: costs.BystanderCost("munmap", 4096, "4KiB", "spin", 1),
    "BystanderTable": lambda: costs.BystanderTable(2),
    "BystandersInterrupted": lambda: costs.BystandersInterrupted(costs.BystanderTable(2)),
    "Compared": lambda: costs.compare(_table(), _table()).cells[0],
    "Comparison": lambda: costs.compare(_table(), _table()),
    "CostModel": lambda: _table().model(),
    "CostTable": _table,
    "Curve": lambda: CURVE,
    "Estimate": lambda: costs.Estimate(1.0, 0.5, 2.0),
    "FaultCost": lambda: costs.FaultCost(2, "one"),
    "Figure": lambda: costs.Figure(1.0, 0.5, 2.0),
    "Fit": lambda: costs.Fit.of(CURVE, [(1, 2.0, 1.5, 2.5), (4, 8.0, 6.0, 10.0)]),
    "Interrupted": lambda: measuring.Interrupted(_table()),
    "faults": _faulted,
    "Machines": lambda: costs.side_by_side({"a": _table(), "b": _table()}),
    "Row": lambda: costs.Row("cpu", "CPU", ("a",), ("a",), ("a",), False),
    "Spread": lambda: costs.Spread(_table().cells[0].cell, (None,), 2.0),
    "Measured": lambda: _table().cells[0],
    "Noise": lambda: _table().noise,
    "Plan": lambda: costs.plan(longest=MiB),
    "Progress": lambda: costs.Progress(1.0, 2.0, 3, 4, 5, "it"),
    "ReaderCost": lambda: costs.ReaderCost("maps", 0),
    "Recommendations": lambda: costs.recommend(_table()),
    "Times": lambda: _table().cells[0].times,
    "Diagnosis": doctor.diagnose,
    "Finding": lambda: doctor.Finding("topic", "good", "fact", "allows"),
    "Change": lambda: procmem.Change("vsz", 1, 2),
    "Difference": lambda: procmem.compare(*(explain(path=SPACE).to_dict() for _ in range(2))),
    "Mapping": lambda: explain(path=SPACE).top(1)[0],
    "NamedRange": lambda: explain(path=SPACE.parent / "go_tip2014").ranges[0],
    "Part": lambda: explain(path=SPACE).top(1)[0].parts[0],
    "MemoryClass": lambda: explain(path=SPACE).classes[0],
    "Owner": lambda: explain(path=SPACE).owners[0],
    "Sample": procmem.sample,
    "Registration": _registered,
}


def _public_classes() -> dict[str, type]:
    modules = [importlib.import_module(name) for name in MODULES]
    public = {name: getattr(module, name) for module in modules for name in module.__all__}
    return {name: value for name, value in public.items() if inspect.isclass(value)}


def _builtin(kind: type) -> type:
    return next(base for base in kind.__mro__ if base.__module__ == "builtins")


def _attributes(subject: Any) -> list[str]:
    """Return the names of its public data, except those of Python's own base class."""
    own = sorted(set(dir(subject)) - set(dir(_builtin(type(subject)))))
    return [
        name
        for name in own
        if not name.startswith("_") and not callable(inspect.getattr_static(subject, name))
    ]


def test_every_public_class_is_here() -> None:
    """Every public class has an instance above, except exceptions without attributes."""
    for name, kind in _public_classes().items():
        own = [attr for attr in dir(kind) if attr not in dir(_builtin(kind)) and attr[0] != "_"]
        assert name in MAKE or (issubclass(kind, Exception) and not own), name


@pytest.mark.parametrize("name", MAKE)
def test_nothing_can_be_assigned(name: str) -> None:
    """Public attributes can be neither assigned nor deleted."""
    subject = MAKE[name]()
    for attribute in _attributes(subject):
        value = getattr(subject, attribute, None)
        with pytest.raises((AttributeError, TypeError)):
            setattr(subject, attribute, value)
        with pytest.raises((AttributeError, TypeError)):
            delattr(subject, attribute)


def test_errors_survive_copies() -> None:
    """Copies of an error, also from another process, keep message and attributes."""
    error = _refused()
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (twin.errno, str(twin)) == (error.errno, str(error))
        assert (twin.verb, twin.nbytes, twin.address) == ("reserve", 1 << 60, None)
        assert twin.limit == "address space"
