"""Run benchmarks interleaved with their reference, and print a table of ratios at the end.

The table reads these keys of a benchmark's ``extra_info``:

- ``calls``: number of calls in a round;
- ``reference``: whether the others of its group are compared with it;
- ``c_loop_ns``: ns per call of the same system calls in a C loop before each round;
- ``beside``, ``beside_ns``: name and ns per call of a reference that runs before each round;
- ``aim``, ``note``: text to show. An aim is not checked.
"""

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any, Protocol

import pytest

HERE = Path(__file__).parent
TABLES = pytest.StashKey[dict[str, list[str]]]()
CSRC = HERE.parent / "csrc"


def _compiled(into: Path, name: str, *arguments: "str | Path") -> ctypes.CDLL:
    library = into / f"{name}.so"
    command = ["cc", "-std=c11", "-shared", "-fPIC", "-o", library, HERE / f"{name}.c", *arguments]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="session")
def tables(pytestconfig: pytest.Config) -> dict[str, list[str]]:
    """Further tables to print at the end: lines by title."""
    return pytestconfig.stash.setdefault(TABLES, {})


@pytest.fixture(scope="session")
def c_loops(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """bench/c_loops.c, compiled for this run."""
    loops = _compiled(tmp_path_factory.mktemp("c_loops"), "c_loops", "-O2")
    loops.reserve_release.restype = ctypes.c_double
    loops.reserve_release.argtypes = (ctypes.c_size_t, ctypes.c_int, ctypes.c_long)
    loops.commit.restype = ctypes.c_double
    loops.commit.argtypes = (ctypes.c_size_t, ctypes.c_long)
    return loops


@pytest.fixture(scope="session")
def c_pairs(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """bench/c_pairs.c with the page allocator, compiled for this run as the package is built."""
    modules = [CSRC / f"{module}.c" for module in ("pagealloc", "runs", "bitmap")]
    flags = ("-O3", "-DNDEBUG", "-fvisibility=hidden", f"-I{CSRC}")
    into = tmp_path_factory.mktemp("c_pairs")
    pairs = _compiled(into, "c_pairs", *flags, *modules, "-lm", "-pthread")
    u32, u64, size, i64 = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_int64
    pages, integers = ctypes.c_void_p, ctypes.c_void_p
    for name, restype, argtypes in (
        ("pages_open", pages, (u64,)),
        ("pages_close", None, (pages,)),
        ("pages_pairs", i64, (pages, u32, u64, ctypes.c_int, size)),
        ("pages_clock", ctypes.c_double, ()),
        ("pages_fill_front", i64, (pages, u64, ctypes.c_int)),
        ("pages_last", i64, (pages, u64, size)),
        ("pages_replay", i64, (pages, integers, size, integers, integers)),
        ("pages_resident", i64, (pages,)),
        ("getppid_ns", ctypes.c_double, (ctypes.c_long,)),
    ):
        function = getattr(pairs, name)
        function.restype, function.argtypes = restype, argtypes
    return pairs


class Run(Protocol):
    """Type of the fixture `run`."""

    def __call__(
        self,
        group: str,
        calls: int,
        function: Callable[..., object],
        *,
        before: Callable[[], tuple[Any, ...]] = ...,
        beside: tuple[str, Callable[[], float]] | None = ...,
        rounds: int = ...,
        **shown: object,
    ) -> None:
        """Time `function`, which makes `calls` calls, in a group of the table.

        Before each round `before` creates the arguments, and then the reference `beside` (a name
        and a function that returns ns per call) runs, so drift of the machine affects both.
        """


@pytest.fixture
def run(benchmark: Any) -> Run:
    """Run a benchmark; see `Run`."""

    def run(
        group: str,
        calls: int,
        function: Callable[..., object],
        *,
        before: Callable[[], tuple[Any, ...]] = tuple,
        beside: tuple[str, Callable[[], float]] | None = None,
        rounds: int = 40,
        **shown: object,
    ) -> None:
        beside_ns: list[float] = []

        def prepare() -> tuple[tuple[Any, ...], dict[str, Any]]:
            arguments = before()
            if beside is not None:
                beside_ns.append(beside[1]())
            return arguments, {}

        benchmark.group = group
        benchmark.extra_info.update(calls=calls, **shown)
        if beside is not None:
            benchmark.extra_info.update(beside=beside[0], beside_ns=beside_ns)
        benchmark.pedantic(function, setup=prepare, rounds=rounds)

    return run


@pytest.fixture(scope="session")
def ns_a_call() -> Callable[[int, Callable[[], object]], float]:
    """A function that times a function making `calls` calls, and returns ns per call."""

    def ns_a_call(calls: int, function: Callable[[], object]) -> float:
        start = perf_counter_ns()
        function()
        return (perf_counter_ns() - start) / calls

    return ns_a_call


@pytest.fixture
def getppid(c_pairs: ctypes.CDLL) -> tuple[str, Callable[[], float]]:
    """The cheapest system call, as a reference for `Run`."""
    return "getppid", lambda: float(c_pairs.getppid_ns(40_000))


def _ns(bench: Any) -> list[float]:
    calls: int = bench.extra_info.get("calls", 1)
    return [spent * 1e9 / calls for spent in bench.stats.data]


def _ratio(ratio: float, to: str = "") -> str:
    if ratio < 0.05:
        return f"{1 / ratio:,.0f} times faster" + (f" than {to}" if to else "")
    return f"x{ratio:.3g}" + (f" of {to}" if to else "")


def _line(bench: Any, reference: Any) -> str:
    info, rounds = bench.extra_info, _ns(bench)
    if "c_loop_ns" in info:
        in_c = info["c_loop_ns"]
        rounds = rounds[-len(in_c) :]
        extra = median(ours - theirs for ours, theirs in zip(rounds, in_c, strict=True))
        return (
            f"{median(rounds):14,.0f}   C loop {median(in_c):,.0f}, median difference {extra:+,.0f}"
        )
    fastest = min(rounds)
    parts = [f"{fastest:14,.0f}" if fastest >= 100 else f"{fastest:14,.1f}"]
    if "beside_ns" in info:
        beside = info["beside_ns"]
        ratio = median(ours / theirs for ours, theirs in zip(rounds, beside, strict=True))
        parts.append(_ratio(ratio, f"{info['beside']} ({min(beside):,.0f})"))
    elif reference is not None and bench is not reference:
        parts.append(_ratio(fastest / min(_ns(reference))))
    parts += [f"[aim: {info['aim']}]"] if "aim" in info else []
    parts += [info["note"]] if "note" in info else []
    return "   ".join(parts)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print each group side by side: nanoseconds per call of the fastest round."""
    for title, lines in config.stash.get(TABLES, {}).items():
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    session = getattr(config, "_benchmarksession", None)
    groups: dict[str, list[Any]] = {}
    for bench in session.benchmarks if session else []:
        groups.setdefault(bench.group or bench.name, []).append(bench)
    if not groups:
        return
    terminalreporter.section("side by side, ns per call")
    width = max(len(bench.name) for group in groups.values() for bench in group)
    for group, benches in groups.items():
        reference = next((b for b in benches if b.extra_info.get("reference")), None)
        terminalreporter.write_line(group)
        for bench in benches:
            terminalreporter.write_line(f"  {bench.name:{width}} {_line(bench, reference)}")
