"""The command ``pyreserve costs``: its screen, its files and its refusals."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import pyreserve.costs
from helpers import command, costs_tables
from helpers.costs_tables import LOUD, USUAL, line
from helpers.processes import environment
from helpers.subjects import wait_until
from helpers.witness import PATIENCE
from pyreserve._system import proc
from pyreserve.cli import console
from pyreserve.costs import (
    BystanderCost,
    BystandersInterrupted,
    BystanderTable,
    CostTable,
    Curve,
    Interval,
    Noise,
    measuring,
)

COMMAND = [sys.executable, "-m", "pyreserve", "costs"]
TOUCH = Curve("touch", "write")
QUICK = ("--only", "reserve,commit,touch", "--longest", "64KiB", "--budget", "1000")

# The command, ended after a few passes instead of by its budget.
BRIEF = """
import sys
from pyreserve.costs import measuring
measuring._MIN_PASSES = 2
measuring.measure.__kwdefaults__["width"] = 10
sys.argv[0] = "pyreserve"
from pyreserve.cli import main
main()
"""


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked child."""
    return command.run("costs", *arguments, env=environment())


def run_briefly(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command on few cells and for few passes."""

    def shorten() -> None:
        measuring._MIN_PASSES = 2
        assert measuring.measure.__kwdefaults__ is not None
        measuring.measure.__kwdefaults__["width"] = 10

    return command.run("costs", *QUICK, *arguments, env=environment(), prepare=shorten)


def run_measured(
    path: Path, *arguments: str | Path, columns: int = 120
) -> subprocess.CompletedProcess[str]:
    """Run the command with the results of a file in place of a measurement."""

    def replace() -> None:
        vars(pyreserve.costs)["measure"] = lambda *_, **__: CostTable.load(path)

    env = {**environment(), "COLUMNS": str(columns)}
    return command.run("costs", *arguments, env=env, prepare=replace)


def imaginary(table: CostTable, **facts: object) -> CostTable:
    """A table with all machine facts that the screen shows."""
    machine = {
        **table.machine,
        "virtualised": "no",
        "balloon": False,
        "page_size": 4096,
        "overcommit_memory": 0,
        "transparent_huge_pages": {},
        "transparent_huge_pages_defrag": None,
        **facts,
    }
    return CostTable(machine, table.cells, table.noise, table.seconds)


def output_of(leader: int) -> bytes:
    """Read a terminal until its program ends."""
    seen = b""
    while True:
        try:
            chunk = os.read(leader, 1 << 16)
        except OSError:
            break
        if not chunk:
            break
        seen += chunk
    os.close(leader)
    return seen


def spent_by_children(pid: int) -> int:
    """The CPU ticks used by a process's children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[13]) + int(fields[14])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Standard output and error of a quick run, and the folder of its files."""
    folder = tmp_path_factory.mktemp("quick")
    ended = run_briefly("--json", "--output", folder / "a.json")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    shown = run_measured(folder / "a.json", "--details")
    assert shown.returncode == 0, shown.stderr
    return shown.stdout, ended.stderr, folder


class TestScreen:
    def test_the_groups_as_a_person_thinks(self, quick: tuple[str, str, Path]) -> None:
        """The table has groups for getting memory and for first use, and figures with units."""
        out, _, _ = quick

        assert re.search(r"^verb and method +pages +fixed +per page +GiB/s", out, re.MULTILINE)
        assert re.search(r"^get memory *$", out, re.MULTILINE)
        assert re.search(r"^first use *$", out, re.MULTILINE)
        assert re.search(
            r"^  commit mprotect +\S+ +(\S+ [nµm]s ± ?\d+%|unknown) ", out, re.MULTILINE
        )
        assert re.search(r"^  touch write +\S+ ", out, re.MULTILINE)
        assert not re.search(r"^give back *$", out, re.MULTILINE)

    def test_the_machine(self, quick: tuple[str, str, Path]) -> None:
        """The screen starts with the facts of the machine."""
        out, _, _ = quick

        assert out.startswith("pyreserve costs  ")
        assert f"Linux {os.uname().release}" in out
        assert "transparent huge pages: " in out
        assert "vm.overcommit_memory " in out

    def test_the_time_limit_is_printed_first(self, quick: tuple[str, str, Path]) -> None:
        """At the start it prints the time limit on standard error."""
        _, err, _ = quick

        assert re.match(r"pyreserve costs: measuring \d+ cells for at most 1000 s, in up to ", err)

    @pytest.mark.parametrize("columns", [80, 120])
    def test_the_decision_first(self, columns: int, tmp_path: Path) -> None:
        """The screen opens with the verdicts, has the ways, and at most 50 lines."""
        path = tmp_path / "a.json"
        path.write_text(imaginary(costs_tables.usual(noise=LOUD)).to_json(), encoding="utf-8")

        out = run_measured(path, columns=columns).stdout

        lines = out.splitlines()
        assert len(lines) <= 50
        assert max(map(len, lines)) <= columns
        assert out.index("How to commit memory?\n  mprotect. 64 KiB: mprotect 700 ns,") < 400
        assert "  4 KiB pages: MADV_FREE\n" in out
        assert "yes, where over 10 % of each 2 MiB is used" in out.replace("\n  ", " ")
        assert re.search(
            r"^MADV_DONTNEED  +1\.\d+ µs \+ [78]\S* µs  +2\.\d+ µs \+ 25\S* µs$", out, re.M
        )
        assert out.count("other processes kept 1.9 CPUs busy") == 1
        assert "per page" not in out

    def test_a_single_pass_says_so(self, tmp_path: Path) -> None:
        """After a single pass no verdict is sure, and the screen says why."""
        path = tmp_path / "a.json"
        path.write_text(imaginary(costs_tables.usual(passes=1)).to_json(), encoding="utf-8")

        out = run_measured(path).stdout

        assert "1 pass. A verdict needs 6 passes." in out
        assert out.count("can't tell from this run: a single pass of the 6 that an") == 12
        assert not re.search(r"\d [nµm]?s\b", out.partition("passes.")[2])

    def test_verdicts_appear_in_place(self, tmp_path: Path) -> None:
        """On a terminal the verdicts are drawn during the run, and once more at the end."""
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                BRIEF.replace("= 2", "= 7"),
                "costs",
                "--longest",
                "64KiB",
                "--budget",
                "1000",
            ],
            stdout=follower,
            stderr=subprocess.PIPE,
            env={**environment(), "TERM": "xterm"},
        )
        os.close(follower)

        seen = output_of(leader)

        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()
        assert seen.count(b"How to commit memory?") >= 2
        assert b"cells settled; Ctrl-C" in seen


class TestFiles:
    def test_json(self, quick: tuple[str, str, Path]) -> None:
        """The JSON has the cells with their calls, the verdicts, the ways and the model."""
        _, _, folder = quick

        found = json.loads((folder / "a.json").read_text())
        assert found["schema"] == 2
        assert found["complete"] is True
        assert {c["verb"] for c in found["cells"]} == {"reserve", "commit", "touch"}
        assert all(cell["call"] for cell in found["cells"])
        assert set(found["verdicts"]["commit"]) == {
            *("question", "text", "figures", "sure", "value", "as_good"),
        }
        assert found["ways"] == []
        assert {f["verb"] for f in found["model"]["fits"]} == {"reserve", "commit", "touch"}
        table = CostTable.load(folder / "a.json")
        assert table.model().estimate("touch", pages=4) > 0

    def test_nothing_else_is_left(self, quick: tuple[str, str, Path]) -> None:
        """No temporary file is left, and the permissions follow the umask."""
        _, _, folder = quick

        assert sorted(path.name for path in folder.iterdir()) == ["a.json"]
        umask = os.umask(0)
        os.umask(umask)
        assert (folder / "a.json").stat().st_mode & 0o777 == 0o666 & ~umask

    def test_standard_output_is_a_file_too(self, quick: tuple[str, str, Path]) -> None:
        """``--output /dev/stdout`` writes to standard output, as no ``--output`` does."""
        _, _, folder = quick

        ended = run_measured(folder / "a.json", "--json", "--output", "/dev/stdout")
        plain = run_measured(folder / "a.json", "--json")

        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)
        assert plain.stdout == ended.stdout
        assert found["schema"] == 2

    def test_a_picture(self, tmp_path: Path) -> None:
        """--plot writes a picture, and the screen is printed."""
        picture = tmp_path / "a.svg"

        ended = run_briefly("--plot", picture)

        assert ended.returncode == 0, ended.stderr
        assert "touch write" in ended.stdout
        assert picture.read_text().startswith("<?xml")


class TestCompare:
    def test_with_itself(self, quick: tuple[str, str, Path]) -> None:
        """A comparison counts the cells in both runs and those of each change."""
        _, _, folder = quick

        ended = run_measured(folder / "a.json", "--compare", folder / "a.json")

        assert ended.returncode == 0, ended.stderr
        assert re.search(r"^\d+ cells in both runs: \d+ same", ended.stdout, re.MULTILINE)

    def compared(self, folder: Path, noise: Noise) -> str:
        """The screen of a run in which touch costs 1000 times as much as in the old one."""
        old = costs_tables.table({TOUCH: line(0, 0.5)}, noise=noise)
        (folder / "old.json").write_text(old.to_json())
        new = imaginary(costs_tables.table({TOUCH: line(0, 500)}), cpu="Imaginary 9001")
        (folder / "new.json").write_text(new.to_json())
        return run_measured(folder / "new.json", "--compare", folder / "old.json").stdout

    def test_a_change(self, tmp_path: Path) -> None:
        """A cell that costs 1000 times as much as in the file is reported as slower."""
        out = self.compared(tmp_path, costs_tables.QUIET)

        assert "The machine differs: CPU was Imaginary 9000" in out
        assert re.search(r"touch write.* slower", out)

    def test_as_json(self, tmp_path: Path) -> None:
        """With --json the document has the comparison, and CostTable.load still reads it."""
        old, new, path = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "out.json"
        old.write_text(costs_tables.table({TOUCH: line(0, 0.5)}).to_json())
        new.write_text(imaginary(costs_tables.table({TOUCH: line(0, 500)})).to_json())

        ended = run_measured(new, "--compare", old, "--json", "--output", path)

        assert (ended.returncode, ended.stdout) == (0, "")
        comparison = json.loads(path.read_text())["comparison"]
        assert {cell["change"] for cell in comparison["cells"]} == {"slower"}
        assert all(cell["old_median_ns"] < cell["new_median_ns"] for cell in comparison["cells"])
        assert {"name": "balloon", "old": None, "new": False} in comparison["machine_differences"]
        assert CostTable.load(path).cells == CostTable.load(new).cells

    def test_a_disturbed_run_invents_nothing(self, tmp_path: Path) -> None:
        """Against a run under load no change is reported."""
        out = self.compared(tmp_path, LOUD)

        assert "slower" not in out
        assert "Noisy, so no change is reported: the old run" in out


class TestMachines:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        """Files of twelve machines, of which the last is another kind."""
        paths = [tmp_path / f"node{i}.json" for i in range(12)]
        for path in paths:
            path.write_text(costs_tables.usual().to_json())
        other = costs_tables.table(USUAL | {TOUCH: line(0, 50)}, lengths=costs_tables.COMPARED)
        other.machine.update(kernel="7.0", cpu="Imaginary 9001 with a very long name, 128 cores")
        paths[-1].write_text(other.to_json())
        return paths

    def compared(self, *arguments: str | Path) -> str:
        """The screen in 80 columns."""
        env = environment() | {"COLUMNS": "80"}
        ended = command.run("costs", "--compare", *arguments, env=env)
        assert (ended.returncode, ended.stderr) == (0, "")
        return ended.stdout

    def test_three_have_a_column_each(self, files: list[Path]) -> None:
        """Three machines stand side by side in 80 columns; nothing is measured."""
        out = self.compared(*files[9:])

        assert re.search(r"^  +node9 +node10 +node11 *$", out, re.MULTILINE)
        assert re.search(r"^  kernel +6\.1\.0 +6\.1\.0 +7\.0 *$", out, re.MULTILINE)
        assert re.search(r"^  grow +256 KiB +256 KiB +2 MiB *$", out, re.MULTILINE)
        assert re.search(r"^  touch write .* [\d.]+x$", out, re.MULTILINE)
        assert max(map(len, out.splitlines())) <= 80

    def test_twelve_are_grouped(self, files: list[Path]) -> None:
        """Of twelve machines, the eleven that agree share a line."""
        out = self.compared(*files)

        assert re.search(r"^  kernel +6\.1\.0 +11: node0, node1,", out, re.MULTILINE)
        assert re.search(r"^ +7\.0 +1: node11 *$", out, re.MULTILINE)
        assert max(map(len, out.splitlines())) <= 80

    def test_as_json(self, files: list[Path], tmp_path: Path) -> None:
        """With --json, options may stand between and after the files."""
        path = tmp_path / "out.json"

        assert self.compared(files[0], "--json", *files[10:], "--output", path) == ""

        found = json.loads(path.read_text())
        assert found["machines"] == ["node0", "node10", "node11"]
        assert {cell["verb"] for cell in found["cells"]} == {"touch"}

    def test_files_of_the_same_name(self, files: list[Path], tmp_path: Path) -> None:
        """Files that differ in their folders alone are named with them."""
        other = tmp_path / "other"
        other.mkdir()
        files[-1].rename(other / "node0.json")

        found = json.loads(self.compared(files[0], other / "node0.json", "--json"))

        assert found["machines"] == [str(files[0]), str(other / "node0.json")]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("a.json", "b.json"), "files are for --compare"),
            (("--compare", "a.json", "b.json", "--only", "touch"), "--only is for a measurement"),
            (("--compare", "a.json", "a.json"), "a file is given twice"),
        ],
    )
    def test_refusals(self, arguments: tuple[str, ...], message: str) -> None:
        """Files without --compare, options of a measurement and equal files are refused."""
        ended = run(*arguments)

        assert ended.returncode == 2
        assert message in ended.stderr
        assert ended.stdout == ""


class TestBystanders:
    def run(self, folder: Path, *arguments: str, complete: bool = True) -> str:
        """The output of the command with imagined results of both measurements."""
        path = folder / "a.json"
        path.write_text(imaginary(costs_tables.usual()).to_json(), encoding="utf-8")

        def imagine(budget: float) -> BystanderTable:
            assert budget == 30
            micro = Interval(9000, 8900, 9100)
            rows = [
                BystanderCost(call, 4096, "4KiB", "spin", 1, micro, micro, micro, 1.0)
                for call in ("membarrier", "munmap")
            ]
            table = BystanderTable(2, tuple(rows), windows=100, kept=90, complete=complete)
            if not complete:
                raise BystandersInterrupted(table)
            return table

        def prepare() -> None:
            vars(pyreserve.costs)["measure"] = lambda *_, **__: CostTable.load(path)
            vars(pyreserve.costs)["measure_bystanders"] = imagine

        ended = command.run("costs", *arguments, env=environment(), prepare=prepare)
        assert ended.returncode == (0 if complete else 130), ended.stderr
        assert ("measuring bystanders" in ended.stderr) == ("--bystanders" in arguments)
        return ended.stdout

    def test_the_section(self, tmp_path: Path) -> None:
        """With --bystanders the screen has a section with sentences and a table."""
        out = self.run(tmp_path, "--bystanders")

        assert "munmap, 1 page: each bystander costs the caller 9 µs (1.0 IPIs)" in out
        assert re.search(r"^munmap, 1 page +9 µs +9 µs", out, re.MULTILINE)
        assert "Bystanders" not in self.run(tmp_path)

    def test_the_json(self, tmp_path: Path) -> None:
        """The JSON has the key `bystanders`, and CostTable.load reads it."""
        path = tmp_path / "b.json"
        path.write_text(self.run(tmp_path, "--bystanders", "--json"))

        found = json.loads(path.read_text())["bystanders"]
        assert found["calls"][1]["added"] == {"ns": 9000, "interval": [8900, 9100]}
        assert CostTable.load(path).cells
        assert "bystanders" not in json.loads(self.run(tmp_path, "--json"))

    def test_an_interrupted_measurement(self, tmp_path: Path) -> None:
        """Ctrl-C while bystanders are measured keeps both results, and the status is 130."""
        out = self.run(tmp_path, "--bystanders", complete=False)

        assert "The measurement was interrupted." in out


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--only", "comit"), "unknown verb 'comit'"),
            (("--only", ","), "no verb"),
            (("--budget", "0"), "positive number of seconds"),
            (("--budget", "nan"), "'--budget': must be a positive number of seconds, got nan"),
            (("--budget", "ten"), "'--budget': must be a positive number of seconds, got ten"),
            (("--longest", "1"), "at least an OS page"),
            (("--longest", "lots"), "not a size"),
            (("--plot", "a.gif"), ".png or .svg"),
            (("--output", "/nowhere/a.json"), "can't be written"),
            (("--output", "/"), "can't be written"),
        ],
    )
    def test_options_that_make_no_sense(self, arguments: tuple[str, str], message: str) -> None:
        """A wrong option value is refused before the measurement."""
        ended = run(*arguments)

        assert ended.returncode == 2
        assert message in " ".join(re.sub(r"[│╭╮╰╯─]", " ", ended.stderr).split())
        assert ended.stdout == ""

    def test_a_file_that_is_not_there(self) -> None:
        """A missing old file is reported in one line, before the measurement."""
        ended = run("--compare", "/nowhere/old.json")

        assert ended.returncode == 1
        assert ended.stderr == "pyreserve: /nowhere/old.json: No such file or directory\n"

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        """The refusal of an old file with other contents names it."""
        (tmp_path / "old.json").write_text("{}")

        ended = run("--compare", tmp_path / "old.json")

        assert ended.returncode == 2
        assert "for '--compare'" in ended.stderr
        assert ended.stderr.count("old.json") == 1

    @pytest.mark.parametrize(("option", "name"), [("plot", "matplotlib")])
    def test_a_missing_extra(self, option: str, name: str, tmp_path: Path) -> None:
        """A missing package for --plot is reported before the measurement."""

        def remove() -> None:
            vars(console)["find_spec"] = lambda other: None if other == name else find_spec(other)

        path = tmp_path / "a.png"
        ended = command.run("costs", f"--{option}", path, env=environment(), prepare=remove)

        assert ended.returncode == 1
        assert ended.stderr == (
            f"pyreserve: --{option} needs {name}: pip install 'pyreserve[{option}]'\n"
        )

    def test_too_little_memory(self) -> None:
        """Too little available memory is reported in one line."""

        def use_up() -> None:
            proc.available_bytes = lambda: 100 << 20

        ended = command.run("costs", env=environment(), prepare=use_up)

        assert ended.returncode == 1
        assert ended.stderr.startswith("pyreserve: measuring needs 1")
        assert "100 MiB is available; shorter pieces (longest, --longest)" in ended.stderr
        assert ended.stderr.count("\n") == 1


class TestInterrupted:
    def test_ctrl_c(self, tmp_path: Path) -> None:
        """Ctrl-C leaves valid partial JSON, no child process and status 130."""
        path = tmp_path / "a.json"
        arguments = ("--only", "commit,touch", "--longest", "1MiB", "--budget", "1000")
        process = subprocess.Popen(
            [*COMMAND, *arguments, "--json", "--output", path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        kids = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: spent_by_children(process.pid) > 0, "the first pass")
        measuring = kids.read_text().split()

        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=PATIENCE)

        assert process.returncode == 130, err
        assert out == ""
        shown = run_measured(path)
        assert shown.returncode == 130
        assert "Interrupted after " in shown.stdout
        found = json.loads(path.read_text())
        assert found["complete"] is False
        assert any(cell["ns"] for cell in found["cells"])
        assert CostTable.load(path).model().fits
        assert all(not Path(f"/proc/{pid}").exists() for pid in measuring)
        assert "Traceback" not in err
