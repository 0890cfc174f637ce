"""All screens on narrow terminals, the output options, and what a start imports."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from helpers import command, costs_tables
from helpers.captures import FOLDER, NAMES
from helpers.processes import COMMAND, environment
from helpers.witness import only_64_bit
from pyreserve import GiB, KiB, MiB, layouts
from pyreserve.cli import costs as costs_command
from pyreserve.cli import doctor as doctor_command
from pyreserve.cli import explain as explain_command
from pyreserve.cli import vsz as vsz_command
from pyreserve.cli.screen import Screen
from pyreserve.cli.watch.frame import frame
from pyreserve.cli.watch.watched import Watched
from pyreserve.costs import GROUPS, METHODS, Cell, CostTable, Curve, Measured, compare, recommend
from pyreserve.costs.stats import summarise
from pyreserve.doctor import diagnose
from pyreserve.layouts import Piece
from pyreserve.procmem import compare as compare_spaces
from pyreserve.procmem import explain, sample

WIDTHS = (60, 80)
COMMANDS = ("vsz", "explain", "costs", "doctor")


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked child."""
    return command.run(*arguments, env={**environment(), **more})


def drawn(draw: Callable[[Screen], object], width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """A screen as text, in as many columns as COLUMNS says."""
    monkeypatch.setenv("COLUMNS", str(width))
    text = io.StringIO()
    draw(Screen(file=text))
    return text.getvalue()


def words(text: str) -> set[str]:
    """The words of a screen without bars, and those before a mark of a cut."""
    return {word.rstrip("…,") for word in re.sub("[▁-▏]", " ", text).split()}


def check(draw: Callable[[Screen], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Assert that narrow screens have no parts of words, and lines that fit."""
    whole = words(drawn(draw, 1000, monkeypatch))
    for width in WIDTHS:
        narrow = drawn(draw, width, monkeypatch)
        assert words(narrow) - whole - {"\\"} == set()  # which continues a command
        for line in narrow.splitlines():
            assert len(line) <= width or "/" in line, line  # a path is never broken


def all_costs() -> CostTable:
    """A table of all verbs, methods, page kinds and modes, with cold and unmeasured cells."""
    curves = {
        curve: costs_tables.line(12345, 0.5 * number)
        for number, (verb, methods) in enumerate(METHODS.items())
        for method in methods
        for curve in (
            Curve(verb, method),
            Curve(verb, method, "2MiB"),
            Curve(verb, method, "2MiB", "noreserve", 16),
        )
    }
    times = summarise([[9e8, 9.1e8]])
    more = [
        Measured(Cell("touch", "write", "4KiB", "noreserve", GiB), "cold", times, None),
        Measured(Cell("fork", "inherit", "64KiB", "charge", MiB), "warm", None, "no such pages"),
    ]
    table = costs_tables.table(curves, lengths=(64 * KiB, 2 * MiB, GiB), more=more)
    machine = {
        **table.machine,
        "virtualised": "kvm",
        "balloon": True,
        "page_size": 4096,
        "overcommit_memory": 0,
        "transparent_huge_pages": {"65536": "madvise", "2097152": "always"},
        "transparent_huge_pages_defrag": "madvise",
    }
    return CostTable(machine, table.cells, costs_tables.LOUD, table.seconds)


class TestWidths:
    @pytest.mark.parametrize("name", NAMES)
    def test_explain(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The explanation of each capture, with all mappings, breaks no word."""
        space = explain(path=FOLDER / name)

        check(lambda screen: explain_command.show(screen, space, -1), monkeypatch)

    def test_diff(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The comparison of two processes breaks no word."""
        old, new = (explain(path=FOLDER / name).to_dict() for name in ("redis", "java21_g1"))
        difference = compare_spaces(old, new)

        check(lambda screen: explain_command.show_difference(screen, difference), monkeypatch)

    @pytest.mark.parametrize("name", layouts.names())
    def test_vsz(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The report of each layout breaks no word."""
        sizes = vsz_command.Sizes(23_572, 19_976, 13_455, 1_158_956)
        pieces = [
            Piece(0x7FFF_0000_0000, 0x7FFF_0000_0000 + GiB, perms, "spans + bitmap")
            for perms in ("rw-p", "---p", "---p")
        ]
        report = vsz_command.VszReport(
            pid=4_194_304,
            layout=name,
            requested_layout="go-tip-2014-12/amd64",
            strategy=layouts.get(name).strategy,
            fell_back=None,
            start=0x7FFF_0000_0000,
            end=0x7FFF_0000_0000 + 3 * GiB,
            arena_start=0x7FFF_0000_0000,
            arena_used=0x7FFF_0000_0000,
            touched=MiB,
            before=sizes,
            after=sizes._replace(vsz=142_760_988),
            ps_before=(23_572, 19_976),
            ps_after=(142_760_988, 19_976),
            maps=pieces,
        )

        check(lambda screen: vsz_command.show(screen, report), monkeypatch)

    def test_layouts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The list of layouts breaks no word."""
        check(vsz_command.show_layouts, monkeypatch)

    def test_doctor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The diagnosis breaks no word."""
        diagnosis = diagnose()

        check(lambda screen: doctor_command.show(screen, diagnosis), monkeypatch)

    def test_costs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The table of costs, and a comparison, break no word."""
        table = all_costs()
        comparison = compare(costs_tables.table({Curve("touch", "write"): lambda _: 9.0}), table)

        def draw(screen: Screen) -> None:
            costs_command.show(screen, table, recommend(table), details=True)

        check(draw, monkeypatch)
        check(
            lambda screen: costs_command.show_comparison(screen, comparison, "old.json"),
            monkeypatch,
        )

    def test_watch(self) -> None:
        """The live screen breaks no word."""
        with Watched(os.getpid(), 1.0, sample, None) as watched:
            watched.sample()
            texts = {}
            for width in (1000, *WIDTHS):
                text = io.StringIO()
                screen = Console(file=text, width=width, highlight=False)
                screen.print(frame(watched, screen, "q or Ctrl-C"))
                texts[width] = words(text.getvalue())
        for width in WIDTHS:
            assert texts[width] - texts[1000] == set()

    @pytest.mark.parametrize("figure", ["4.094 GiB", "(1.5 µs", "99.9 %"])
    def test_a_number_and_its_unit(self, figure: str) -> None:
        """No line ends between a number and its unit."""
        for width in range(len(figure), 40):
            text = io.StringIO()
            Screen(width, text).text(f"{figure} of memory, {figure} of it shared")

            assert text.getvalue().count(figure) == 2

    @pytest.mark.parametrize("name", ["", *COMMANDS])
    def test_help(self, name: str) -> None:
        """Help breaks no word, and has examples."""
        arguments = (name, "--help") if name else ("--help",)
        whole = words(run(*arguments, COLUMNS="1000").stdout)
        for width in WIDTHS:
            text = run(*arguments, COLUMNS=str(width)).stdout

            assert words(text) == whole
            assert max(map(len, text.splitlines())) <= width
            assert "\nExamples:\n  pyreserve " in text


class TestOutput:
    @only_64_bit
    def test_the_inaccessible_mappings_are_marked(self) -> None:
        """In 80 columns vsz marks both reserved mappings, and says that they are reserved."""
        text = run("vsz", COLUMNS="80").stdout

        assert len(re.findall(r"reserved +<- inaccessible", text)) == 2
        assert max(map(len, text.splitlines())) <= 80

    def test_columns_in_a_pipe(self) -> None:
        """COLUMNS sets the width of a screen in a pipe."""
        lines = run("explain", "--from", str(FOLDER / "redis"), COLUMNS="60").stdout.splitlines()

        assert 55 < max(len(line) for line in lines if "/" not in line) <= 60

    def test_a_mapping_is_one_line_in_a_pipe(self) -> None:
        """Without COLUMNS each mapping is one line of a pipe; with it, it has lines that fit."""
        arguments = ("explain", "--from", str(FOLDER / "java21_g1"), "--maps")

        searched = [line for line in run(*arguments).stdout.splitlines() if "JVM heap" in line]
        narrow = run(*arguments, COLUMNS="60").stdout.splitlines()

        assert any(re.match(r"[0-9a-f]+-[0-9a-f]+ +rw-p .*  JVM heap$", line) for line in searched)
        assert "  accessible, untouched    JVM heap" in narrow

    @pytest.mark.parametrize("arguments", [["vsz"], ["vsz", "--list"], ["explain"], ["doctor"]])
    def test_a_screen_in_a_file(self, arguments: list[str], tmp_path: Path) -> None:
        """--output writes the screen without colours, and nothing to standard output."""
        path = tmp_path / "screen"

        done = run(*arguments, "--output", str(path), FORCE_COLOR="1", TERM="xterm-256color")

        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert len(path.read_text()) > 200
        assert "\x1b" not in path.read_text()

    @pytest.mark.parametrize(
        "arguments",
        [
            ["vsz"],
            ["vsz", "--list"],
            ["explain"],
            ["explain", "--from", str(FOLDER / "redis")],
            ["doctor"],
        ],
    )
    def test_every_json_has_a_schema(self, arguments: list[str], tmp_path: Path) -> None:
        """--json prints an object with a schema; with --output the file has it."""
        path = tmp_path / "out.json"
        path.write_text("old")

        printed = run(*arguments, "--json").stdout
        done = run(*arguments, "--json", "--output", str(path))

        assert json.loads(printed)["schema"] == json.loads(path.read_text())["schema"] == 1
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    @pytest.mark.parametrize("name", COMMANDS)
    def test_a_file_that_cannot_be_written(self, name: str) -> None:
        """A file that can't be written is refused before the work."""
        done = run(name, "--output", "/nowhere/out")

        assert done.returncode == 2
        assert "'--output': /nowhere/out can't be written" in done.stderr

    def test_a_failed_run_leaves_the_file(self, tmp_path: Path) -> None:
        """After an error the file is as it was."""
        path = tmp_path / "out.json"
        path.write_text("old")

        assert run("explain", "4194304", "--json", "--output", str(path)).returncode == 1
        assert path.read_text() == "old"

    def test_a_full_device(self) -> None:
        """A full device is reported in one line."""
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*COMMAND, "explain"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
            )

        assert (done.returncode, done.stderr) == (1, "pyreserve: No space left on device\n")

    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["--version"], ["explain"], ["explain", "--json"], ["vsz", "--list"]],
    )
    def test_a_closed_pipe(self, arguments: list[str]) -> None:
        """A closed pipe ends the command silently by SIGPIPE, as other programs."""
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = subprocess.run(
                [*COMMAND, *arguments],
                stdout=writer,
                stderr=subprocess.PIPE,
                text=True,
                check=False,
            )
        finally:
            os.close(writer)

        assert (done.returncode, done.stderr) == (-13, "")


class TestFrontDoor:
    def test_alone(self) -> None:
        """Without arguments the command prints its help, with uncut summaries."""
        done = run(COLUMNS="80")

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == run("--help", COLUMNS="80").stdout
        text = " ".join(done.stdout.split())
        for name in COMMANDS:
            summary = run(name, "--help", COLUMNS="200").stdout.splitlines()[2].strip()
            assert summary.endswith(".")
            assert f" {name} {summary}" in text

    def test_an_unknown_command(self) -> None:
        """An unknown command is a usage error."""
        done = run("vs")

        assert done.returncode == 2
        assert "No such command 'vs'" in done.stderr

    def complete(self, *typed: str) -> list[str]:
        """The completions that bash gets after these words."""
        line = " ".join(["pyreserve", *typed])
        done = run(_PYRESERVE_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(typed)))
        assert (done.returncode, done.stderr) == (0, "")
        return [reply.partition(",")[2] for reply in done.stdout.splitlines()]

    def test_completion(self) -> None:
        """Shells complete commands, options, layouts, the verbs of a list, and PIDs."""
        assert self.complete("") == list(COMMANDS)
        assert "--layout" in self.complete("vsz", "--l")
        assert self.complete("vsz", "--layout", "go1.1") == [
            name for name in layouts.names() if name.startswith("go1.1")
        ]
        assert self.complete("costs", "--only", "touch,re") == [
            "touch,reserve",
            "touch,release",
            "touch,retouch",
            "touch,recommit",
        ]
        # Earlier options are not checked: their messages would appear at each TAB.
        assert "--json" in self.complete("explain", "--plot", "x.gif", "--csv", "/no/x", "--j")
        with subprocess.Popen(["sleep", "1000"]) as sleeper:
            try:
                assert str(sleeper.pid) in self.complete("explain", str(sleeper.pid)[:-1])
            finally:
                sleeper.kill()

    def test_the_verbs(self) -> None:
        """The verbs that help and completion name are those of the laboratory."""
        assert sorted(costs_command.VERBS) == sorted(v for verbs in GROUPS.values() for v in verbs)

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--version"],
            ["--help"],
            [],
            ["explain", "--help"],
            ["costs", "--help"],
            ["vsz", "--bad"],
            ["explain", "--top", "x"],
            ["costs", "--budget", "-1"],
        ],
    )
    def test_a_light_start(self, arguments: list[str]) -> None:
        """Help, the version and usage errors import no package that only the work needs."""
        code = (
            "import atexit, sys, click\n"
            "heavy = {'rich', 'numpy', 'pyreserve.procmem', 'pyreserve.costs', 'subprocess'}\n"
            "heavy |= {'pyreserve._arena.arena', 'dataclasses'}\n"
            "heavy -= {*sys.modules}  # click itself imports subprocess on Python 3.10\n"
            "atexit.register(lambda: print('imported', *heavy & {*sys.modules}, file=sys.stderr))\n"
            "from pyreserve.cli import main\n"
            f"sys.argv[1:] = {arguments}\n"
            "main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )

        assert done.returncode in {0, 2}
        assert done.stderr.splitlines()[-1] == "imported"

    def test_json_needs_no_rich(self) -> None:
        """``explain --json`` does not import rich."""
        code = (
            "import sys; from pyreserve.cli import main; sys.argv[1:] = ['explain', '--json']\n"
            "try: main()\n"
            "finally: print('rich' in sys.modules, file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )

        assert done.stderr == "False\n"
