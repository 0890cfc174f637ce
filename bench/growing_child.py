"""The measurements of growing.py, each for one contestant in a process of its own.

A measurement is a function of the contestant's name and of JSON parameters; it returns figures by
name. Times are CPU time (user and system) of this process unless their names say otherwise.
"""

import ctypes
import gc
import json
import sys
from array import array
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, thread_time
from typing import Any

import numpy as np
from growing_fills import FILLS, Array, Doubling, as_bytes

from pyreserve import GiB, GrowableArray, GrowableBuffer, KiB, MiB

Figures = dict[str, Any]


def kib(file: str, field: str) -> int:
    """Read a field of /proc/self/`file`, in KiB."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise KeyError(field)


def resident() -> int:
    """Return the exact resident bytes: the RSS of status lags behind by some pages."""
    return kib("smaps_rollup", "Rss") * KiB


def warm(nbytes: int) -> None:
    """Touch memory and free it, so that the hypervisor has supplied what the measurement takes."""
    np.empty(nbytes, np.uint8)[:: 4 * KiB] = 1


def reset_peak() -> None:
    """Lower VmHWM to the current RSS."""
    Path("/proc/self/clear_refs").write_text("5")


def give_back() -> None:
    """Make malloc give its free memory back to the kernel, so that all take new pages."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc
        trim(0)


# -- filling ---------------------------------------------------------------------------------------


def fill(contestant: str, piece: int, total: int, repeats: int, runs: int) -> Figures:
    """Add pieces of `piece` bytes up to `total`; keep all of `repeats` results, so all is fresh.

    The time is the median of all runs but the first, if there are several. Each run then takes the
    memory that the one before freed: a hypervisor that takes free memory back within seconds, and
    needs long to supply it again, has not done so yet.
    """
    function, count = FILLS[contestant], total // piece
    data = np.arange(piece // 8, dtype="f8")
    function(data, 2)  # imports
    warm(256 * MiB)
    gc.collect()
    reset_peak()
    seconds, before, peak = [], resident(), 0
    for _ in range(runs):
        give_back()
        start = process_time()
        results = [function(data, count) for _ in range(repeats)]
        seconds.append(process_time() - start)
        peak = peak or kib("status", "VmHWM") * KiB - before
        for result in results:
            assert result.nbytes == total
            assert (
                result[:: len(data) // 2] == np.resize(data[:: len(data) // 2], 2 * count)
            ).all()
        del result, results
    return {
        "seconds": median(seconds[1:] or seconds) / repeats,
        "rss": peak / (total * repeats),
    }


# -- small arrays ----------------------------------------------------------------------------------

NEW: dict[str, Callable[[], Any]] = {
    "GrowableArray": lambda: GrowableArray("f8"),
    "GrowableBuffer": GrowableBuffer,
    "numpy doubling": lambda: Doubling("f8", 1),
    "bytearray": bytearray,
    "array.array": lambda: array("d"),
}


def _data(contestant: str, nbytes: int) -> Any:
    items = np.ones(nbytes // 8)
    return items if contestant in {"GrowableArray", "numpy doubling"} else items.tobytes()


def _extend(container: Any, data: Any) -> None:
    if isinstance(container, array):
        container.frombytes(data)
    else:
        container.extend(data)


def small(contestant: str, sizes: list[int]) -> Figures:
    """RSS of an array of each size, filled in pieces of at most 8 KiB; the mean of 32 arrays."""
    warm(256 * MiB)
    figures: Figures = {}
    kept = []
    for size in sizes:
        piece = min(size, 8 * KiB)
        data, count = _data(contestant, piece), 32
        _extend(NEW[contestant](), data)
        before = resident()
        for _ in range(count):
            kept.append(NEW[contestant]())
            for _ in range(-(-size // piece)):
                _extend(kept[-1], data)
        figures[str(size)] = (resident() - before) / count
    return figures


def many(contestant: str, count: int) -> Figures:
    """Create arrays at the default capacity, then put 100 items into each."""
    warm(512 * MiB)
    new, data = NEW[contestant], _data(contestant, 800)
    _extend(new(), data)
    before, tables = resident(), kib("status", "VmPTE")
    start = process_time()
    kept = [new() for _ in range(count)]
    created = process_time()
    for container in kept:
        _extend(container, data)
    filled = process_time()
    return {
        "create": (created - start) / count,
        "extend": (filled - created) / count,
        "rss": (resident() - before) / count,
        "tables": (kib("status", "VmPTE") - tables) * KiB / count,
    }


# -- calls -----------------------------------------------------------------------------------------


def _run(function: Callable[..., object], argument: Any, calls: int) -> float:
    turns = repeat(argument, calls)
    start = process_time()
    for value in turns:
        function(value)
    return process_time() - start


def _empty_cffi_calls(calls: int) -> float:
    from pyreserve._native import ffi, lib

    closed, load = ffi.new("struct region *"), lib.region_load
    start = process_time()
    for _ in repeat(None, calls):
        load(closed, 0)
    return process_time() - start


def append(contestant: str, calls: int) -> Figures:
    """Single appends of new floats; the time includes the loop and the floats."""
    warm(512 * MiB)
    if contestant == "empty cffi call":
        return {"seconds": _empty_cffi_calls(calls) / calls}
    growable: GrowableArray[Any] = GrowableArray("f8")
    functions: dict[str, Callable[[], Callable[[Any], object]]] = {
        "empty function": lambda: lambda _: None,
        "list.append": lambda: [].append,
        "array.array.append": lambda: array("d").append,
        "numpy doubling": lambda: Doubling("f8", 1024).append,
        "GrowableArray.appender": growable.appender,
        "GrowableArray.append": lambda: growable.append,
    }
    function = functions[contestant]()
    start = process_time()
    for i in range(calls):
        function(i * 0.5)
    return {"seconds": (process_time() - start) / calls}


def extend(contestant: str, items: int, kind: str, calls: int) -> Figures:
    """Extends by `items` floats in an ndarray or a list; seconds a call."""
    warm(256 * MiB)
    values: Any = np.arange(items, dtype="f8")
    data: Any = as_bytes(values)
    if kind == "list":
        values = values.tolist()
    functions: dict[str, Callable[[], tuple[Callable[[Any], object], Any]]] = {
        "list.extend": lambda: ([].extend, values),
        "bytearray.extend": lambda: (bytearray().extend, data),
        "array.array.extend": lambda: (array("d").extend, values),
        "numpy doubling": lambda: (Doubling("f8", 1024).extend, values),
        "GrowableArray.extend": lambda: (GrowableArray("f8").extend, values),
    }
    return {"seconds": _run(*functions[contestant](), calls) / calls}


def getitem(contestant: str, calls: int) -> Figures:
    """Reads of one item by its index."""
    growable: GrowableArray[Any] = GrowableArray("f8")
    growable.extend(np.arange(1000.0))
    containers: dict[str, Any] = {
        "list": list(range(1000)),
        "ndarray": np.arange(1000.0),
        "GrowableArray": growable,
        "GrowableArray.array": growable.array,
    }
    container = containers[contestant]
    start = process_time()
    for _ in repeat(None, calls):
        container[500]
    return {"seconds": (process_time() - start) / calls}


# -- long growth -----------------------------------------------------------------------------------


def growth(contestant: str, gibs: int, piece: int) -> Figures:
    """Grow to many GiB; CPU seconds of each GiB, the longest call, the address and held views.

    Times are the best of three passes: while one grows, a hypervisor takes back memory that the one
    before freed.
    """
    _growth(contestant, gibs, piece)  # see `fill`
    passes = [_growth(contestant, gibs, piece) for _ in range(3)]
    figures = passes[-1]
    figures["seconds"] = [min(gib) for gib in zip(*(one["seconds"] for one in passes), strict=True)]
    for longest in ("longest", "longest_wall"):
        figures[longest] = min(one[longest] for one in passes)
    return figures


def _growth(contestant: str, gibs: int, piece: int) -> Figures:
    data = np.arange(piece // 8, dtype="f8")
    items = len(data)
    total = gibs * GiB // piece * items
    growable: GrowableArray[Any] = GrowableArray("f8")
    plain: Array = np.empty(total if contestant.startswith("np.empty") else 0)
    seconds, held, longest, longest_wall = [], [], 0.0, 0.0
    growable.append(0.0)
    growable.clear()
    address = growable.base
    for gib in range(gibs):
        spent = 0.0
        for i in range(GiB // piece):
            at = (gib * GiB // piece + i) * items
            data[0] = at
            wall, start = perf_counter(), thread_time()
            if len(plain):
                plain[at : at + items] = data
            else:
                growable.extend(data)
            call = thread_time() - start
            wall = perf_counter() - wall
            spent += call
            longest, longest_wall = max(longest, call), max(longest_wall, wall)
            if not len(plain) and (at + items) * 10 // total > at * 10 // total:
                held.append(growable.array)
        seconds.append(spent)
    right = all((view[::items] == np.arange(0, len(view), items)).all() for view in held)
    same = growable.base == address and all(view.ctypes.data == address for view in held)
    return {
        "seconds": seconds,
        "longest": longest,
        "longest_wall": longest_wall,
        "views": f"{len(held)} views, {'right' if right else 'WRONG'}" if held else "",
        "address": "" if len(plain) else "the same" if same else "MOVED",
    }


def fifo(contestant: str, gib: float, window: int, piece: int) -> Figures:
    """Stream bytes through a window; now and then hold a view for 8 pieces and check it."""
    warm(512 * MiB)
    container: Any = NEW[contestant]()
    data: Any = np.arange(piece // 8, dtype="f8")
    payload = data if contestant == "GrowableArray" else as_bytes(data)
    unit = len(data) if contestant == "GrowableArray" else piece
    full, pieces = window // piece, int(gib * GiB) // piece
    held: Any = None
    until = checked = wrong = refused = 0
    expected = 0.0
    gc.collect()
    before, peak = resident(), 0
    start = process_time()
    for number in range(pieces):
        data[0] = number
        if number >= full:
            if contestant == "bytearray":
                del container[:unit]
            else:
                container.drop_front(unit)
        try:
            container.extend(payload)
        except (MemoryError, BufferError):
            refused += 1  # near the end of the addresses under a view
            held = None
            container.extend(payload)
        if held is not None and number >= until:
            wrong += not (held[0] == expected and held[-1] == data[-1])
            checked += 1
            held = None
        elif held is None and number % 32 == 0 and contestant != "bytearray":
            low = number * 7 % min(number + 1, full) * unit
            items = container.array if unit < piece else container.view()
            held = np.asarray(items[low : low + unit]).view("f8")
            del items
            expected, until = float(held[0]), number + 8
            oldest = max(0, number + 1 - full)
            wrong += expected != oldest + low // unit
        if number % 16 == 0:
            peak = max(peak, resident() - before)
    spent = process_time() - start
    return {
        "seconds": spent / gib,
        "rss": peak,
        "views": f"{checked:,} views, {wrong} wrong" if checked or wrong else "",
        "refused": refused,
        "dropped": getattr(container, "dropped", 0) * (piece // unit),
    }


def _ring(contestant: str, capacity: int) -> tuple[Callable[[Any], object], Callable[[], object]]:
    """Return functions that extend by an array, and that return the last items as an ndarray."""
    if contestant == "RingArray":
        from pyreserve import RingArray

        ring: Any = RingArray("f8", capacity)
        return ring.extend, lambda: ring.last(capacity)
    if contestant == "numpy-ringbuffer":
        from numpy_ringbuffer import RingBuffer

        peer: Any = RingBuffer(capacity, np.dtype("f8"))
        return peer.extend, lambda: np.asarray(peer)[-capacity:]
    shifted = np.empty(2 * capacity)
    end = 0

    def extend(values: Any) -> None:
        nonlocal end
        if end + len(values) > len(shifted):
            keep = capacity - len(values)
            shifted[:keep] = shifted[end - keep : end]
            end = keep
        shifted[end : end + len(values)] = values
        end += len(values)

    return extend, lambda: shifted[end - capacity : end]


def ring(contestant: str, capacity: int, calls: int) -> Figures:
    """Extends by 100 in a full ring, the longest of them, and all its items as one ndarray.

    A shifting copy has twice the memory, and moves its items when it has reached the end.
    """
    warm(256 * MiB)
    extend_by, last = _ring(contestant, capacity)
    values = np.arange(100.0)
    for _ in range(capacity // 50):
        extend_by(values)
    longest = [0.0] * 5  # each pass goes around the memory once; the least, as others interrupt
    for passed in range(len(longest)):
        for _ in range(capacity // 100):
            start = thread_time()
            extend_by(values)
            longest[passed] = max(longest[passed], thread_time() - start)
    extends = _run(extend_by, values, calls) / calls
    reads = 200_000 if contestant != "numpy-ringbuffer" else 20_000_000 // capacity
    start = process_time()
    for _ in repeat(None, reads):
        last()
    spent = (process_time() - start) / reads
    result: Any = last()
    assert len(result) == capacity
    assert (result == np.tile(values, capacity // 100)).all()
    return {"extend": extends, "longest": min(longest), "last": spent}


MEASUREMENTS: dict[str, Callable[..., Figures]] = {
    function.__name__: function
    for function in (fill, small, many, append, extend, getitem, growth, fifo, ring)
}


def main(arguments: Iterable[str]) -> None:
    """Run the measurement that is named first; print its figures, or why there are none."""
    name, contestant, parameters = arguments
    try:
        figures = MEASUREMENTS[name](contestant, **json.loads(parameters))
    except ImportError as error:
        figures = {"skipped": str(error)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
