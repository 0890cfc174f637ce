"""The JSON of a table: one object for each cell, and the types and bounds of all fields.

Everything read is checked here, so comparing and recommending need no checks.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from pyreserve.costs.cells import Cell
from pyreserve.costs.results import Measured, Noise
from pyreserve.costs.stats import Interval, Times
from pyreserve.units import parse_size

SCHEMA = 2

FIGURES = ("min", "median", "p90", "p99", "max")
"""The attributes of `Times` that are in ns, except the interval."""

_MAX = 1e19  # limit of numbers; in ns three centuries


class _Field(NamedTuple):
    """The types of a field, and the least value of a number."""

    types: tuple[type, ...]
    least: float = 0.0


_NULL = type(None)
_TEXT, _OBJECT, _LIST, _COUNT = (_Field((kind,)) for kind in (str, dict, list, int))
_POSITIVE, _NUMBER = _Field((int,), 1), _Field((int, float))
# The clock's own time is subtracted from samples, so they can be negative.
_TIME = _Field((int, float), -_MAX)
_DOCUMENT = {"schema": _POSITIVE, "machine": _OBJECT, "noise": _OBJECT, "cells": _LIST}
_DOCUMENT |= {"complete": _Field((bool,)), "seconds": _NUMBER}
# The keys of facts that carry their unit in the JSON, by name of the fact.
_KEYS = {"memory": "memory_bytes", "page_size": "page_size_bytes"}
# The facts that figures are computed from; each may be missing.
_MACHINE = dict.fromkeys(("cpus", *_KEYS.values(), "max_map_count"), _POSITIVE)
_MACHINE |= {
    "map_entries": _OBJECT,
    "huge_pages": _OBJECT,
    "system_call_ns": _Field((int, float, _NULL), 0.01),
}
_NOISE = {field.name: _NUMBER for field in fields(Noise)}
_CELL = dict.fromkeys(("verb", "method", "page_kind", "mode", "host"), _TEXT)
_CELL |= {"bytes": _POSITIVE, "threads": _POSITIVE}
_CELL |= {"ns": _Field((dict, _NULL)), "why": _Field((str, _NULL))}
_NS = {**dict.fromkeys(FIGURES, _TIME), "ci95": _LIST}
# The two ends of ci95; the high one is null after a single sample.
_CI95 = {"low": _TIME, "high": _Field((int, float, _NULL), -_MAX)}
_COUNTS = {"samples": _POSITIVE, "passes": _POSITIVE, "pass_medians_ns": _LIST}
_PASS = {"pass_medians_ns": _Field((int, float, _NULL), -_MAX)}


def rounded(ns: float) -> float:
    """Round to a tenth of a nanosecond; below 100 ns to four digits."""
    return round(ns, 1) if abs(ns) >= 100 else float(f"{ns:.4g}")


def interval_to_dict(ns: Interval) -> dict[str, Any]:
    """Return the object of a time; ``ns`` is null if its interval is too wide."""
    return {"ns": rounded(ns.median) if ns.known else None, "interval": _ends((ns.low, ns.high))}


def _ends(interval: tuple[float, float]) -> list[float | None]:
    """Return the ends of an interval; JSON has no infinity: null."""
    return [rounded(ns) if math.isfinite(ns) else None for ns in interval]


def machine_to_dict(machine: Mapping[str, Any]) -> dict[str, Any]:
    """Return the object of the machine's facts."""
    return {_KEYS.get(name, name): value for name, value in machine.items()}


def to_dict(entry: Measured) -> dict[str, Any]:
    """Return the object of a cell."""
    cell, times = entry.cell, entry.times
    item: dict[str, Any] = {
        **cell.to_dict(),
        "pages": cell.pages,
        "host": entry.host,
        "call": cell.call,
        "ns": None,
        "samples": 0,
        "passes": 0,
        "pass_medians_ns": [],
        "why": entry.why,
    }
    if times is not None:
        item["ns"] = {name: rounded(getattr(times, name)) for name in FIGURES}
        item["ns"]["ci95"] = _ends(times.ci95)
        item |= {"samples": times.samples, "passes": times.passes}
        item["pass_medians_ns"] = [ns if ns is None else rounded(ns) for ns in entry.medians]
    return item


def attributes(text: str) -> dict[str, Any]:
    """Return the attributes of the `CostTable` whose JSON is given.

    Raises:
        ValueError: the text is not such JSON, or has another schema.
    """
    try:
        document = json.loads(text, parse_constant=_reject_constant)
        if not isinstance(document, dict) or document.get("schema", SCHEMA) == SCHEMA:
            return _attributes(document)
    except (ValueError, RecursionError) as error:
        msg = f"not the output of pyreserve costs --json: {error}"
        raise ValueError(msg) from None
    msg = f"schema must be {SCHEMA}, got {_quote(document['schema'])}"
    raise ValueError(msg)


def _reject_constant(constant: str) -> None:
    msg = f"{constant} is not JSON"
    raise ValueError(msg)


def _check(item: Any, table: Mapping[str, _Field]) -> list[Any]:
    """Return the values of an object's fields, in the order of the table that describes them.

    Raises:
        ValueError: a field is missing, of another type or out of bounds; the message names it.
    """
    if type(item) is not dict:
        msg = f"expected an object, got {_quote(item)}"
        raise ValueError(msg)
    for name, (types, least) in table.items():
        if name not in item:
            msg = f"{name} is missing"
            raise ValueError(msg)
        value = item[name]
        numeric = type(value) in {int, float}
        if type(value) not in types or (numeric and not least <= value <= _MAX):
            kinds = " or ".join("null" if kind is _NULL else kind.__name__ for kind in types)
            bounds = f" from {least:g} to {_MAX:g}" if numeric and type(value) in types else ""
            msg = f"{name} must be {kinds}{bounds}, got {_quote(value)}"
            raise ValueError(msg)
    return [item[name] for name in table]


def _quote(value: object) -> str:
    return repr(str(value)[:40])


def _attributes(document: Any) -> dict[str, Any]:
    _, machine, noise, items, complete, seconds = _check(document, _DOCUMENT)
    _check(machine, {name: field for name, field in _MACHINE.items() if name in machine})
    for name, field in (("map_entries", _NUMBER), ("huge_pages", _COUNT)):
        counts = machine.get(name, {})
        _check(counts, dict.fromkeys(counts, field))
    cells = tuple(_measured(item) for item in items)
    if len({(entry.cell, entry.host) for entry in cells}) < len(cells):
        msg = "a cell occurs twice"
        raise ValueError(msg)
    names = {key: name for name, key in _KEYS.items()}
    return {
        "machine": {names.get(key, key): value for key, value in machine.items()},
        "cells": cells,
        "noise": Noise(*_check(noise, _NOISE)),
        "seconds": seconds,
        "complete": complete,
    }


def _measured(item: Any) -> Measured:
    verb, method, page_kind, mode, host, nbytes, threads, ns, why = _check(item, _CELL)
    parse_size(page_kind)
    cell = Cell(verb, method, page_kind, mode, nbytes, threads)
    times, medians = None, []
    if ns is not None:
        *figures, interval = _check(ns, _NS)
        low, high = _check(dict(zip(_CI95, interval, strict=False)), _CI95)
        samples, passes, medians = _check(item, _COUNTS)
        for ns in medians:
            _check({"pass_medians_ns": ns}, _PASS)
        least, median, p90, p99, most = map(float, figures)
        times = Times(
            min=least,
            median=median,
            p90=p90,
            p99=p99,
            max=most,
            ci95=(float(low), math.inf if high is None else float(high)),
            samples=samples,
            passes=passes,
        )
    return Measured(cell, host, times, why, tuple(medians))
