"""The command ``pyreserve vsz``, run in a process of its own."""

import errno
import json
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from typing import Any

import pytest

from helpers import command, golden
from helpers.arenas import needs_64_bits, needs_golden_page
from helpers.processes import COMMAND, environment, refused_in_one_line, run
from pyreserve import PAGE_SIZE, GiB, KiB, MiB, layouts
from pyreserve._system import proc
from pyreserve.units import WORD, round_up

DEFAULT = layouts.default_name(WORD)
LAYOUT_32 = "go-tip-2014-12/386"


def needs_memory(nbytes: int) -> None:
    """Skip the test if the machine has too little memory for it."""
    if proc.available_bytes() < nbytes + 512 * MiB:
        pytest.skip("too little memory here")


@cache
def default_screen() -> subprocess.CompletedProcess[str]:
    """A run without options, shared by the tests that read its screen."""
    return run("vsz")


@cache
def default_json() -> str:
    """The JSON of a run without other options, shared by the tests that read it."""
    return run("vsz", "--json").stdout


def run_forked(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked child, for runs that reserve nothing."""
    return command.run(*arguments, env=environment())


def json_of(*arguments: str, ulimit: str = "") -> dict[str, Any]:
    """Run ``vsz --json`` with more arguments and return what it prints."""
    done = run("vsz", "--json", *arguments, ulimit=ulimit)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report = json.loads(done.stdout)
    assert isinstance(report, dict)
    return report


def ranges(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The mappings of a report without their names."""
    return [(addresses, perms) for addresses, perms, _ in report["maps"]]


def growth(report: dict[str, Any], name: str) -> int:
    """The growth of a size in bytes."""
    return int(report["after"][f"{name}_kib"] - report["before"][f"{name}_kib"]) * KiB


class TestScreen:
    def test_the_two_inaccessible_mappings(self) -> None:
        """Without options the screen marks the two large reserved mappings and denies a leak."""
        done = default_screen()

        assert (done.returncode, done.stderr) == (0, "")
        marked = [line for line in done.stdout.splitlines() if "<- inaccessible" in line]
        assert len(marked) == 2
        assert all("---p" in line and "reserved" in line for line in marked)
        assert "not a leak" in done.stdout
        assert DEFAULT in done.stdout

    @needs_64_bits
    def test_the_articles_numbers(self) -> None:
        """The two marked mappings have the article's sizes: about 8 GB and about 128 GB."""
        lines = default_screen().stdout.splitlines()

        marked = [line for line in lines if "<- inaccessible" in line]
        assert "8.125 GiB" in marked[0]
        assert "128 GiB" in marked[1]

    def test_sizes_before_and_after(self) -> None:
        """The screen has VSZ, RSS and PSS before and after, and their change."""
        done = default_screen()

        rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
        for name in ("VSZ", "RSS", "PSS"):
            before, after, change = (int(text.replace(",", "")) for text in rows[name])
            assert after - before == change
        assert int(rows["VSZ"][2].replace(",", "")) * KiB == round_up(
            layouts.get(DEFAULT).total(), PAGE_SIZE
        )

    @needs_64_bits
    @pytest.mark.parametrize("name", ["go1.4/amd64", "go1.11/amd64"])
    def test_a_layout_that_reserves_nothing(self, name: str) -> None:
        """For layouts without a reservation no mapping is marked as inaccessible."""
        done = run("vsz", "--layout", name)

        assert done.returncode == 0
        assert "<- inaccessible" not in done.stdout
        assert "not a leak" in done.stdout

    def test_no_colours_in_a_pipe(self) -> None:
        """Output to a pipe has no escape codes."""
        done = default_screen()

        assert "\x1b" not in done.stdout + done.stderr

    def test_the_version(self) -> None:
        """--version prints the installed version."""
        try:
            installed = metadata.version("pyreserve")
        except metadata.PackageNotFoundError:
            pytest.skip("the package is not installed")

        done = run("--version")

        assert (done.returncode, done.stdout) == (0, f"pyreserve {installed}\n")

    def test_the_help(self) -> None:
        """--help lists every option."""
        help_ = run_forked("vsz", "--help")

        assert help_.returncode == 0
        for option in ("--layout", "--list", "--size", "--touch", "--hold", "--json"):
            assert option in help_.stdout


class TestJSON:
    def test_the_schema(self) -> None:
        """The report has exactly these keys and types of values."""
        report = json.loads(default_json())

        assert list(report) == [
            "schema",
            "layout",
            "requested_layout",
            "strategy",
            "fell_back",
            "reservation",
            "arena_start",
            "arena_used",
            "before",
            "after",
            "maps",
        ]
        assert report["layout"] == report["requested_layout"] == DEFAULT
        assert report["strategy"] == "reserve"
        assert report["fell_back"] is None
        assert list(report["reservation"]) == ["start", "end"]
        for sizes in (report["before"], report["after"]):
            assert {"VmSize_kib", "VmRSS_kib"} <= set(sizes)
            assert all(
                isinstance(size, int) and key.endswith("_kib") for key, size in sizes.items()
            )
        assert report["arena_used"] - report["arena_start"] == MiB
        assert all(len(row) == 3 for row in report["maps"])

    @needs_64_bits
    @needs_golden_page
    def test_hello_world(self) -> None:
        """Without options the mappings are those of the real hello world."""
        report = json.loads(default_json())

        assert ranges(report) == golden.find(DEFAULT, 0).heap_maps
        assert report["maps"][0] == ["c000000000-c000001000", "rw-p", "spans"]
        assert report["reservation"] == {"start": 0xC000000000, "end": 0xE208002000}

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("go-tip-2014-12/amd64", marks=needs_64_bits),
            LAYOUT_32,
            pytest.param("fallback", marks=needs_64_bits),
            "native",
        ],
    )
    def test_vsz_grows_by_the_reservation(self, name: str) -> None:
        """VmSize grows by exactly the reservation, RSS by less than 1 MiB."""
        report = json_of("--layout", name)

        reservation = report["reservation"]
        assert growth(report, "VmSize") == reservation["end"] - reservation["start"]
        assert reservation["end"] - reservation["start"] == layouts.get(name, word=WORD).total()
        assert abs(growth(report, "VmRSS")) < MiB

    @pytest.mark.parametrize(
        "name", ["go1.4/amd64", "go1.5/amd64", "go1.10/amd64", "go1.9/amd64", "go1.11/amd64"]
    )
    @needs_64_bits
    @needs_golden_page
    def test_every_layout_reports_its_own(self, name: str) -> None:
        """Each layout reports the mappings of its release under the requested name."""
        report = json_of("--layout", name)

        layout = layouts.get(name)
        row = {"go1.9/amd64": "go1.10/amd64"}.get(name, name)
        assert report["layout"] == report["requested_layout"] == name
        assert report["strategy"] == layout.strategy
        assert ranges(report) == golden.find(row, 0).heap_maps


@pytest.mark.heavy
class TestTouch:
    @pytest.mark.parametrize("mib", [1, 10, 100])
    @needs_64_bits
    @needs_golden_page
    def test_the_mappings_are_the_real_programs(self, mib: int) -> None:
        """--touch N makes the mappings of a Go program that touched N MiB, and takes N MiB."""
        report = json_of("--touch", str(mib))

        assert ranges(report) == golden.find(DEFAULT, mib).heap_maps
        assert abs(growth(report, "VmRSS") - mib * MiB) < 2 * MiB
        reservation = report["reservation"]
        assert growth(report, "VmSize") == reservation["end"] - reservation["start"]

    @pytest.mark.parametrize("mib", [100, 600])
    @needs_golden_page
    def test_386(self, mib: int) -> None:
        """The 386 layout has the real program's mappings, relative to its base."""
        needs_memory(mib * MiB)
        trace = golden.find(LAYOUT_32, mib)

        report = json_of("--layout", LAYOUT_32, "--touch", str(mib))

        base = report["reservation"]["start"]
        shown = []
        for addresses, perms in ranges(report):
            start, end = (int(address, 16) for address in addresses.split("-"))
            shown.append((start - base, end - base, perms))
        assert shown == trace.ranges(layouts.get(LAYOUT_32).hints[0])
        assert abs(growth(report, "VmRSS") - mib * MiB) < 2 * MiB

    @pytest.mark.parametrize(
        ("size", "nbytes"),
        [
            ("0", 0),
            ("64MiB", 64 * MiB),
            ("0.25GiB", 256 * MiB),
            ("1.5 M", 3 * MiB // 2),
            ("7", 7 * MiB),
        ],
    )
    def test_sizes_as_people_write_them(self, size: str, nbytes: int) -> None:
        """--touch accepts sizes with units; a plain number counts MiB."""
        report = json_of("--touch", size)

        assert report["arena_used"] - report["arena_start"] == MiB + nbytes

    def test_a_gibibyte(self) -> None:
        """--touch 1GiB takes 1 GiB of memory, plus less than 4 MiB of metadata."""
        needs_memory(GiB)
        name = DEFAULT if WORD == 8 else "fallback"
        if WORD != 8:
            pytest.skip("1 GiB is too much of a 32-bit address space")

        report = json_of("--layout", name, "--touch", "1GiB")

        assert report["arena_used"] - report["arena_start"] == GiB + MiB
        assert abs(growth(report, "VmRSS") - GiB) < 4 * MiB

    @needs_64_bits
    def test_386_runs_out_as_the_real_binary_did(self) -> None:
        """386 --touch 2000 fails after 1792 MiB with the runtime's message, in one line."""
        needs_memory(2000 * MiB)

        line = refused_in_one_line(run("vsz", "--layout", LAYOUT_32, "--touch", "2000"))

        assert "memory allocated by OS" in line
        assert "not in usable range" in line
        assert "1879048192 in use" in line

    @pytest.mark.parametrize("size", ["100TiB", "8EiB", "1000000000000"])
    def test_too_much_is_refused_before_it_hurts(self, size: str) -> None:
        """--touch beyond the available memory is refused before anything is touched."""
        line = refused_in_one_line(run("vsz", "--touch", size))

        assert "available" in line

    @pytest.mark.parametrize(("size", "limit"), [("200", "-d"), ("64MiB", "-d")])
    @needs_64_bits
    def test_a_limit_on_the_way(self, size: str, limit: str) -> None:
        """A refused growth ends in one line that names the limit."""
        done = run("vsz", "--touch", size, ulimit=f"{limit} 60000")

        line = refused_in_one_line(done)
        assert "RLIMIT_DATA" in line

    @pytest.mark.parametrize("size", ["-5", "x", "1.5.2", "", "1YiB", "0.3"])
    def test_a_malformed_size(self, size: str) -> None:
        """A malformed size is a usage error."""
        done = run_forked("vsz", "--touch", size)

        assert done.returncode == 2
        assert "--touch" in done.stderr
        assert "Traceback" not in done.stderr


class TestChoosing:
    def test_the_list(self) -> None:
        """--list prints every layout."""
        done = run_forked("vsz", "--list")

        assert (done.returncode, done.stderr) == (0, "")
        assert [line.split()[0] for line in done.stdout.splitlines()[1:]] == layouts.names()

    def test_the_list_as_json(self) -> None:
        """--list --json prints every layout with its total."""
        done = run_forked("vsz", "--list", "--json")

        document = json.loads(done.stdout)
        entries = document["layouts"]
        assert document["schema"] == 1
        assert [entry["name"] for entry in entries] == layouts.names()
        assert {entry["name"]: entry["total_bytes"] for entry in entries} == {
            name: layouts.get(name, word=WORD).total() for name in layouts.names()
        }

    @pytest.mark.parametrize(("size", "nbytes"), [("64MiB", 64 * MiB), ("10000000", 10_002_432)])
    def test_a_native_arena_of_any_size(self, size: str, nbytes: int) -> None:
        """--size is the reservation of the native layout, rounded up to heap pages."""
        report = json_of("--layout", "native", "--size", size)

        assert report["layout"] == "native"
        reservation = report["reservation"]
        assert reservation["end"] - reservation["start"] == nbytes
        assert growth(report, "VmSize") == round_up(nbytes, PAGE_SIZE)

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--size", "1GiB"),
            ("--layout", LAYOUT_32, "--size", "1GiB"),
            ("--layout", "native", "--size", "0"),
            ("--layout", "native", "--size", "-1"),
            ("--layout", "go2/amd64"),
            ("--layout", ""),
            ("--no-such-option",),
            ("--hold", "-1"),
            ("surplus",),
        ],
    )
    def test_usage_errors(self, arguments: tuple[str, ...]) -> None:
        """Wrong usage ends with status 2 and an error message, without output."""
        done = run_forked("vsz", *arguments)

        assert done.returncode == 2
        assert done.stdout == ""
        assert "Error" in done.stderr
        assert "Traceback" not in done.stderr

    def test_an_unknown_layout_is_told_the_known(self) -> None:
        """The message for an unknown layout lists the known ones."""
        done = run_forked("vsz", "--layout", "go2/amd64")

        words = " ".join(done.stderr.split())
        assert "'--layout': no layout 'go2/amd64'" in words
        assert all(name in words for name in layouts.names())

    def test_more_than_all_addresses(self) -> None:
        """A native arena larger than the address space is refused in one line."""
        line = refused_in_one_line(run_forked("vsz", "--layout", "native", "--size", "100EiB"))

        assert "address" in line


class TestLimits:
    """Runs under limits that ulimit sets in a shell."""

    @needs_64_bits
    def test_fallback(self) -> None:
        """Under ulimit -v 4000000 the layout falls back, and the report names the limit."""
        report = json_of(ulimit="-v 4000000")

        assert (report["requested_layout"], report["layout"]) == (DEFAULT, "fallback")
        assert report["fell_back"]["limit"] == "RLIMIT_AS"
        assert "ulimit -v" in report["fell_back"]["reason"]
        reservation = report["reservation"]
        assert reservation["end"] - reservation["start"] == layouts.get("fallback").total()
        assert growth(report, "VmSize") == reservation["end"] - reservation["start"]

    @needs_64_bits
    @needs_golden_page
    def test_fallback_touched(self) -> None:
        """The fallback makes the mappings of the real binary under the same limit."""
        report = json_of("--touch", "100", ulimit="-v 4000000")

        base = report["reservation"]["start"]
        trace = golden.find(DEFAULT, 100, limited=True)
        expected = trace.ranges(layouts.get("fallback").hints[0])
        shown = [
            (*(int(address, 16) - base for address in addresses.split("-")), perms)
            for addresses, perms in ranges(report)
        ]
        assert shown == expected

    @needs_64_bits
    def test_the_screen_says_so(self) -> None:
        """The screen names the fallback and the limit."""
        done = run("vsz", ulimit="-v 4000000")

        words = " ".join(done.stdout.split())
        assert done.returncode == 0
        assert f"{DEFAULT} fell back" in words
        assert "RLIMIT_AS (ulimit -v)" in words

    def test_too_little_for_either(self) -> None:
        """Under ulimit -v 600000 even the fallback is refused: status 1 and one line."""
        line = refused_in_one_line(run("vsz", ulimit="-v 600000"))

        assert "cannot reserve arena virtual address space" in line
        assert "RLIMIT_AS" in line

    @needs_64_bits
    @pytest.mark.parametrize("name", ["go1.4/amd64", "go1.11/amd64"])
    def test_growth_that_the_limit_refuses(self, name: str) -> None:
        """A layout without a reservation is refused by ulimit -v when it grows, in one line."""
        line = refused_in_one_line(
            run("vsz", "--layout", name, "--touch", "300", ulimit="-v 250000")
        )

        assert "RLIMIT_AS" in line


class Held:
    """A command that was started with --hold and has printed that it stays."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "vsz", "--json", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert self.process.stderr is not None
        self.line = self.process.stderr.readline()

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return the status, standard output and standard error."""
        out, err = self.process.communicate()
        return self.process.returncode, out, err


@pytest.fixture
def held() -> Iterator[Held]:
    """A command that stays until Ctrl-C."""
    running = Held("--hold")
    yield running
    if running.process.poll() is None:
        running.process.kill()
    running.process.communicate()


class TestHold:
    def test_it_can_be_looked_at(self, held: Held) -> None:
        """During --hold other processes can read the large VSZ."""
        pid = held.process.pid

        size = proc.status_kib(pid)["VmSize"] * KiB

        assert f"pid {pid} stays until Ctrl-C" in held.line
        assert f"-p {pid}" in held.line
        assert size > layouts.get(DEFAULT).total()

    @pytest.mark.parametrize(
        "attempt", [0, 1, *(pytest.param(n, marks=pytest.mark.heavy) for n in range(2, 8))]
    )
    def test_ctrl_c_ends_it_cleanly(self, attempt: int, held: Held) -> None:
        """Ctrl-C ends it with status 0 as soon as it has printed that it stays."""
        held.process.send_signal(signal.SIGINT)
        status, out, err = held.end()

        assert (status, err.strip()) == (0, "")
        assert json.loads(out)["layout"] == DEFAULT

    @pytest.mark.parametrize("arguments", [("--hold", "0.05"), ("--hold=0.05",), ("--hold", "0")])
    def test_seconds_end_it(self, arguments: tuple[str, ...]) -> None:
        """With a number of seconds it ends by itself with status 0."""
        done = run("vsz", "--json", *arguments)

        assert done.returncode == 0
        assert re.match(r"pid \d+ stays for [\d.]+ s: ", done.stderr)
        assert json.loads(done.stdout)["layout"] == DEFAULT

    def test_the_number_is_optional_anywhere(self) -> None:
        """--hold without a number can precede another option."""
        held = Held("--hold", "--layout", "native", "--size", "1MiB")

        held.process.send_signal(signal.SIGINT)
        status, out, _ = held.end()

        assert status == 0
        assert json.loads(out)["layout"] == "native"

    @pytest.mark.parametrize("seconds", ["nan", "-1", "-inf"])
    def test_an_invalid_number_of_seconds(self, seconds: str) -> None:
        """A negative or undefined number of seconds is a usage error."""
        done = run_forked("vsz", "--hold", seconds)

        assert done.returncode == 2
        assert "Traceback" not in done.stderr


def on_a_terminal(*arguments: str) -> tuple[int, str, str]:
    """Run the command with standard error on a terminal; return status, output and errors."""
    try:
        leader, follower = pty.openpty()
    except OSError:
        pytest.skip("no pseudo-terminal available")
    with subprocess.Popen(
        [*COMMAND, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=follower,
        env={**environment(), "TERM": "xterm-256color"},
    ) as process:
        os.close(follower)
        chunks = []
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError as end:
                assert end.errno == errno.EIO  # noqa: PT017  # how Linux says end of file here
                break
            if not chunk:
                break
            chunks.append(chunk)
        os.close(leader)
        assert process.stdout is not None
        out = process.stdout.read().decode()
    return process.returncode, out, b"".join(chunks).decode()


class TestProgress:
    def test_on_a_terminal_there_is_nothing_but_the_bar(self) -> None:
        """On a terminal a long touch prints nothing but a progress bar on standard error."""
        nbytes = GiB if WORD == 8 else 256 * MiB
        needs_memory(nbytes)

        status, out, err = on_a_terminal("vsz", "--json", "--touch", str(nbytes // MiB))

        assert status == 0
        report = json.loads(out)
        assert report["arena_used"] - report["arena_start"] == nbytes + MiB
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
        for line in re.split(r"[\r\n]+", text):
            assert re.fullmatch(r"(touching [━╸╺ ]*[\d./ KMGiB]* *[-:\d]*)?", line.strip()), line

    def test_the_bar_has_no_thread(self) -> None:
        """On a terminal VSZ grows by the reservation, without the stack of another thread."""
        status, out, _ = on_a_terminal("vsz", "--json", "--touch", "200")

        report = json.loads(out)
        reservation = report["reservation"]
        assert status == 0
        assert 0 <= growth(report, "VmSize") - (reservation["end"] - reservation["start"]) < 8 * MiB

    @pytest.mark.parametrize(
        "nbytes",
        [128 * MiB, pytest.param(GiB if WORD == 8 else 256 * MiB, marks=pytest.mark.heavy)],
    )
    def test_a_pipe_gets_none(self, nbytes: int) -> None:
        """Standard error stays empty if it is not a terminal."""
        needs_memory(nbytes)

        done = run("vsz", "--touch", str(nbytes // MiB))

        assert (done.returncode, done.stderr) == (0, "")


def python(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a fresh interpreter."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )


class TestWhatIsMissing:
    WITHOUT = """
        import sys

        class Missing:
            "Finds none of the named packages."
            names = set(sys.argv[1].split(","))

            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in self.names:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Missing())
        from pyreserve.cli import main

        sys.argv = ["pyreserve", *sys.argv[2:]]
        main()
        """

    @pytest.mark.parametrize("missing", ["click", "rich", "click,rich"])
    @pytest.mark.parametrize(
        "arguments", [["vsz"], pytest.param(["vsz", "--list"], marks=pytest.mark.heavy)]
    )
    def test_the_extra_is_named(self, missing: str, arguments: list[str]) -> None:
        """Without click or rich the command names the extra in one line."""
        done = python(self.WITHOUT, missing, *arguments)

        line = refused_in_one_line(done)
        assert "pip install 'pyreserve[cli]'" in line

    def test_a_module_that_python_was_told_to_block(self) -> None:
        """A click that is None in sys.modules counts as missing."""
        done = python(
            """
            import sys
            sys.modules["click"] = None
            from pyreserve.cli import main
            sys.argv = ["pyreserve", "vsz"]
            main()
            """
        )

        assert "pyreserve[cli]" in refused_in_one_line(done)

    def test_memory_that_runs_out_while_it_starts(self) -> None:
        """Running out of memory during the imports is reported in one line."""
        done = python(
            """
            import sys

            class Full:
                def find_spec(self, name, path=None, target=None):
                    if name == "click":
                        raise MemoryError

            sys.meta_path.insert(0, Full())
            from pyreserve.cli import main
            sys.argv = ["pyreserve", "vsz"]
            main()
            """
        )

        assert "memory to start" in refused_in_one_line(done)

    def test_other_missing_modules_are_not_explained_away(self) -> None:
        """Any other missing module raises ModuleNotFoundError with a traceback."""
        done = python(self.WITHOUT, "resource", "vsz")

        assert done.returncode == 1
        assert re.search(r"^ModuleNotFoundError: .*'resource'", done.stderr, re.M)


class TestImporting:
    HEAVY = ("numpy", "rich", "click", "matplotlib", "hypothesis", "pytest")

    @pytest.mark.parametrize("module", ["pyreserve", "pyreserve.cli"])
    def test_importing_is_cheap(self, module: str) -> None:
        """Importing the library or the cli package imports no heavy package."""
        done = python(
            f"""
            import sys
            import {module}
            print(*(name for name in {self.HEAVY} if name in sys.modules))
            """
        )

        assert (done.returncode, done.stdout.strip()) == (0, "")

    def test_numpy_comes_with_its_first_use(self) -> None:
        """numpy is imported by the first call of ndarray, not before."""
        done = python(
            """
            import sys
            import pyreserve
            region = pyreserve.reserve(pyreserve.PAGE_SIZE)
            region.commit(0, pyreserve.PAGE_SIZE)
            region.view(0, 8)
            before = "numpy" in sys.modules
            try:
                region.ndarray(0, 8)
            except ImportError:
                print("False True")
            else:
                print(before, "numpy" in sys.modules)
            """
        )

        assert done.stdout == "False True\n"


class TestTheTestsThemselves:
    def test_the_limits_of_this_process_are_wide(self) -> None:
        """The tests start without RLIMIT_AS, which some of them lower themselves."""
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)

        assert soft == resource.RLIM_INFINITY
