"""Arrays that grow, beside what else Python has for that; prints Markdown tables.

``python bench/growing.py [TABLE ...] [--rounds N]`` measures each contestant in a process of its
own, in turns, so that drift of the machine affects all; tables show medians over the rounds. Times
are CPU time. A ratio is the median of the rounds' ratios to the reference of the same round.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

KiB, MiB, GiB = 1 << 10, 1 << 20, 1 << 30
CHILD = Path(__file__).with_name("growing_child.py")
NEEDED = 12 * GiB  # available memory for the growth to 8 GiB

Rounds = list[dict[str, Any]]  # figures of one contestant, by round
FILLERS = (
    "np.empty, preallocated",
    "GrowableArray",
    "GrowableBuffer",
    "numpy doubling",
    "pyarrow BufferOutputStream",
    "bytearray",
    "array.array",
    "BytesIO",
    "list + np.concatenate",
)


def measure(
    name: str, contestants: tuple[str, ...], rounds: int, **parameters: object
) -> dict[str, Rounds]:
    """Run a measurement of growing_child for each contestant in turn; a missing one is left out."""
    results: dict[str, Rounds] = {contestant: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in tuple(results):
            command = [sys.executable, str(CHILD), name, contestant, json.dumps(parameters)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            figures = json.loads(done.stdout) if done.returncode == 0 else {"skipped": "it failed"}
            if "skipped" in figures:
                print(f"{contestant} is left out: {figures['skipped']}\n", flush=True)
                del results[contestant]
            else:
                results[contestant].append(figures)
    return results


def value(rounds: Rounds, key: str) -> float:
    """Return the median of a figure."""
    return median(float(figures[key]) for figures in rounds)


def ratio(rounds: Rounds, reference: Rounds | None, key: str) -> float:
    """Return the median over the rounds of a figure's ratio to the reference's."""
    if not reference:
        return float("nan")
    return median(
        float(ours[key] / theirs[key]) for ours, theirs in zip(rounds, reference, strict=True)
    )


def table(title: str, head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> None:
    """Print a Markdown table."""
    print(f"**{title}**\n")
    print(f"| {' | '.join(head)} |")
    print(f"|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def aim(text: str, reached: float, limit: float) -> None:
    """Print whether a figure is within its limit."""
    verdict = "reached" if reached <= limit else "MISSED"
    print(f"- {text}: {reached:.3g}, at most {limit:g}: {verdict}")


def size(nbytes: float) -> str:
    """Format bytes in the largest binary unit of which there are at least ten."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(nbytes) >= 10 * unit:
            return f"{nbytes / unit:,.0f} {name}"
    return f"{nbytes / KiB:.1f} KiB"


def ns(seconds: float) -> str:
    """Format a time in nanoseconds."""
    value = seconds * 1e9
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


# -- tables ----------------------------------------------------------------------------------------


def fill(options: argparse.Namespace) -> None:
    """Fill an array with float64 in pieces of one size."""
    for total, piece, repeats, runs in (
        (GiB, 64 * KiB, 1, 6),
        (GiB, 8 * KiB, 1, 6),
        (GiB, MiB, 1, 6),
        (4 * MiB, 64 * KiB, 16, 1),
    ):
        shape = {"piece": piece, "total": total, "repeats": repeats, "runs": runs}
        results = measure("fill", FILLERS, options.rounds, **shape)
        first = results.get(FILLERS[0])
        table(
            f"{total // MiB:,} MiB of float64 in pieces of {piece // KiB:,} KiB",
            ("container", "CPU ms", "over np.empty", "peak RSS over data"),
            (
                (
                    name,
                    f"{value(rounds, 'seconds') * 1e3:,.4g}",
                    f"{ratio(rounds, first, 'seconds'):.2f}",
                    f"{value(rounds, 'rss'):.3f}",
                )
                for name, rounds in results.items()
            ),
        )
        for name in ("GrowableArray", "GrowableBuffer"):
            if name in results:
                _fill_aims(name, results, total == GiB and piece == 64 * KiB)
        print()


def _fill_aims(name: str, results: dict[str, Rounds], full: bool) -> None:
    limits = {"numpy doubling": 1.0}
    if full:
        limits = {
            "np.empty, preallocated": 1.10,
            "numpy doubling": 0.55,
            "pyarrow BufferOutputStream": 0.68,
            "bytearray": 0.28,
            "list + np.concatenate": 0.21,
        }
        aim(f"{name}, peak RSS over data", value(results[name], "rss"), 1.01)
    for other, limit in limits.items():
        if other in results:
            aim(f"{name} over {other}", ratio(results[name], results[other], "seconds"), limit)


def small(options: argparse.Namespace) -> None:
    """RSS of small arrays."""
    sizes = {8: "1 item", 80 * KiB: "80 KiB", 500 * KiB: "500 KiB", 3 * MiB: "3 MiB"}
    names = ("GrowableArray", "GrowableBuffer", "numpy doubling", "bytearray")
    results = measure("small", names, options.rounds, sizes=list(sizes))
    table(
        "RSS of one container, by its data",
        ("container", *sizes.values()),
        (
            (name, *(size(value(rounds, str(nbytes))) for nbytes in sizes))
            for name, rounds in results.items()
        ),
    )
    for name in names[:2]:
        for nbytes, words in sizes.items():
            limit = 16 * KiB if nbytes == 8 else int(1.1 * nbytes) + 64 * KiB
            limit = nbytes + 2 * MiB if nbytes > 2 * MiB else limit
            if name in results:
                reached = value(results[name], str(nbytes)) / KiB
                aim(f"{name}, {words}, KiB", reached, limit / KiB)
    print()


def many(options: argparse.Namespace) -> None:
    """10,000 containers of 100 items at the default capacity."""
    names = ("GrowableArray", "GrowableBuffer", "numpy doubling", "bytearray", "array.array")
    results = measure("many", names, options.rounds, count=10_000)
    table(
        "10,000 containers of 100 float64 each, at the default capacity; each",
        ("container", "create, µs", "first extend, µs", "RSS", "page tables"),
        (
            (
                name,
                f"{value(rounds, 'create') * 1e6:.2f}",
                f"{value(rounds, 'extend') * 1e6:.2f}",
                size(value(rounds, "rss")),
                size(value(rounds, "tables")),
            )
            for name, rounds in results.items()
        ),
    )
    for name in names[:2]:
        if name in results:
            aim(f"{name}, RSS, KiB", value(results[name], "rss") / KiB, 16)
            aim(f"{name}, page tables, KiB", value(results[name], "tables") / KiB, 16)
            aim(f"{name}, creation, µs", value(results[name], "create") * 1e6, 15)
    print()


def _calls(
    title: str, unit: str, results: dict[str, Rounds], reference: str, items: int = 1
) -> None:
    table(
        title,
        ("call", unit, f"over {reference}"),
        (
            (
                name,
                ns(value(rounds, "seconds") / items),
                f"{ratio(rounds, results.get(reference), 'seconds'):.2f}",
            )
            for name, rounds in results.items()
        ),
    )


def append(options: argparse.Namespace) -> None:
    """Single appends."""
    names = ("empty cffi call", "empty function", "list.append", "array.array.append")
    ours = ("GrowableArray.appender", "GrowableArray.append")
    results = measure(
        "append", (*names, "numpy doubling", *ours), options.rounds, calls=options.appends
    )
    _calls(
        f"{options.appends:,} appends of new floats, with the loop", "ns", results, "list.append"
    )
    for name, limit in zip(ours, (2, 10), strict=True):
        if name in results:
            reached = ratio(results[name], results.get("list.append"), "seconds")
            aim(f"{name} over list.append", reached, limit)
    print()


def extend(options: argparse.Namespace) -> None:
    """Short extends."""
    names = ("numpy doubling", "GrowableArray.extend", "list.extend", "array.array.extend")
    for items, kind, calls in (
        (10, "ndarray", 200_000),
        (10, "list", 200_000),
        (1000, "list", 4000),
    ):
        contestants = ("bytearray.extend", *names[:2]) if kind == "ndarray" else names
        shape = {"items": items, "kind": kind, "calls": calls}
        results = measure("extend", contestants, options.rounds, **shape)
        each = items if items > 100 else 1
        unit = "ns an item" if each > 1 else "ns a call"
        _calls(f"extend by {items:,} items, a {kind}", unit, results, "numpy doubling", each)
        if "GrowableArray.extend" in results:
            ours = results["GrowableArray.extend"]
            if each > 1:
                aim("GrowableArray.extend, ns an item", value(ours, "seconds") / each * 1e9, 12)
            elif kind == "ndarray":
                reached = ratio(ours, results.get("numpy doubling"), "seconds")
                aim("GrowableArray.extend over numpy doubling", reached, 1)
            print()


def getitem(options: argparse.Namespace) -> None:
    """One item by its index."""
    names = ("list", "ndarray", "GrowableArray", "GrowableArray.array")
    results = measure("getitem", names, options.rounds, calls=2_000_000)
    _calls("g[i]", "ns", results, "ndarray")
    if "GrowableArray" in results:
        reached = ratio(results["GrowableArray"], results.get("ndarray"), "seconds")
        aim("g[i] over ndarray's", reached, 2.5)
        print()


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * KiB for line in lines if line.startswith("MemAvailable"))


def growth(options: argparse.Namespace) -> None:
    """Growth to 8 GiB."""
    if _available() < NEEDED:
        print(f"growth is left out: less than {size(NEEDED)} of memory are available\n")
        return
    names = ("np.empty, preallocated", "GrowableArray")
    results = measure("growth", names, options.rounds, gibs=8, piece=64 * KiB)
    by_gib = {
        name: [median(figures["seconds"][gib] for figures in rounds) for gib in range(8)]
        for name, rounds in results.items()
    }
    table(
        "Growth to 8 GiB in pieces of 64 KiB",
        (
            "container",
            *(f"GiB {gib + 1}, ms" for gib in range(8)),
            "longest call, CPU ms",
            "wall ms",
            "address",
            "views at every 10 %",
        ),
        (
            (
                name,
                *(f"{seconds * 1e3:.0f}" for seconds in by_gib[name]),
                f"{value(rounds, 'longest') * 1e3:.1f}",
                f"{value(rounds, 'longest_wall') * 1e3:.1f}",
                "; ".join(sorted({figures["address"] for figures in rounds})),
                "; ".join(sorted({figures["views"] for figures in rounds})),
            )
            for name, rounds in results.items()
        ),
    )
    if "GrowableArray" in results:
        spent = by_gib["GrowableArray"]
        aim("slowest GiB over fastest", max(spent) / min(spent), 1.2)
        aim("last GiB over first", spent[-1] / spent[0], 1.2)
        aim("longest call, wall ms", value(results["GrowableArray"], "longest_wall") * 1e3, 30)
    print()


def fifo(options: argparse.Namespace) -> None:
    """A long stream through a short window; one round, because its aim is memory."""
    names = ("GrowableBuffer", "GrowableArray")
    shape = {"window": 64 * MiB, "piece": MiB}
    results = measure("fifo", names, 1, gib=options.fifo_gib, **shape)
    # It moves its bytes all the time, so a short stream tells.
    results |= measure("fifo", ("bytearray",), 1, gib=min(2, options.fifo_gib), **shape)
    table(
        f"{options.fifo_gib:g} GiB through a window of 64 MiB in pieces of 1 MiB",
        ("container", "CPU ms a GiB", "peak RSS", "views", "refused under a view", "dropped"),
        (
            (
                name,
                f"{value(rounds, 'seconds') * 1e3:.0f}",
                size(value(rounds, "rss")),
                rounds[0]["views"],
                str(rounds[0]["refused"]),
                size(rounds[0]["dropped"]),
            )
            for name, rounds in results.items()
        ),
    )
    for name in names:
        if name in results:
            aim(f"{name}, peak RSS, MiB", value(results[name], "rss") / MiB, 80)
    print()


def ring(options: argparse.Namespace) -> None:
    """The last items of a ring, by its length."""
    names = ("RingArray", "numpy-ringbuffer", "shifting copy")
    for capacity in (10_000, 100_000, 1_000_000):
        results = measure("ring", names, options.rounds, capacity=capacity, calls=200_000)
        table(
            f"A full ring of {capacity:,} float64",
            ("container", "all as an ndarray, µs", "extend by 100, ns", "the longest, µs"),
            (
                (
                    name,
                    f"{value(rounds, 'last') * 1e6:,.2f}",
                    ns(value(rounds, "extend")),
                    f"{value(rounds, 'longest') * 1e6:,.1f}",
                )
                for name, rounds in results.items()
            ),
        )
        if "RingArray" in results:
            aim("RingArray.last, µs", value(results["RingArray"], "last") * 1e6, 0.5)
            for other in names[1:]:
                if other in results:
                    reached = ratio(results["RingArray"], results[other], "extend")
                    aim(f"RingArray.extend over {other}", reached, 1)
        print()


TABLES: dict[str, Callable[[argparse.Namespace], None]] = {
    function.__name__: function
    for function in (fill, small, many, append, extend, getitem, growth, fifo, ring)
}


def main() -> None:
    """Print the tables that are named, by default all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", nargs="*", help=f"one of {', '.join(TABLES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--appends", type=int, default=10_000_000, help="default: 10,000,000")
    parser.add_argument("--fifo-gib", type=float, default=100, help="length of the stream")
    options = parser.parse_args()
    if unknown := set(options.table) - set(TABLES):
        parser.error(f"no such table: {', '.join(sorted(unknown))}")
    load = os.getloadavg()[0]
    print(f"Linux {platform.release()}, Python {platform.python_version()}, load {load:.1f}\n")
    for name in options.table or TABLES:
        TABLES[name](options)


if __name__ == "__main__":
    main()
