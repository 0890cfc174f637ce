"""The command ``pyreserve costs``: its screen, its files and its refusals."""

import csv
import io
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
    Figure,
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


def run_measured(path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command with the results of a file in place of a measurement."""

    def replace() -> None:
        vars(pyreserve.costs)["measure"] = lambda *_, **__: CostTable.load(path)

    return command.run("costs", *arguments, env=environment(), prepare=replace)


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


def spent_by_children(pid: int) -> int:
    """The CPU ticks used by a process's children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[13]) + int(fields[14])


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, Path]:
    """Standard output and error of a quick run, and the folder of its files."""
    folder = tmp_path_factory.mktemp("quick")
    ended = run_briefly("--json", "--output", folder / "a.json", "--csv", folder / "a.csv")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == ""
    shown = run_measured(folder / "a.json")
    assert shown.returncode == 0, shown.stderr
    return shown.stdout, ended.stderr, folder


class TestScreen:
    def test_the_groups_as_a_person_thinks(self, quick: tuple[str, str, Path]) -> None:
        """The table has groups for getting memory and for first use, and figures with units."""
        out, _, _ = quick

        assert re.search(r"^ +pages +fixed +per page +GiB/s", out, re.MULTILINE)
        assert re.search(r"^get memory *$", out, re.MULTILINE)
        assert re.search(r"^first use *$", out, re.MULTILINE)
        assert re.search(r"^  commit mprotect +\S+ .*[nµm]s ± ?\d+%", out, re.MULTILINE)
        assert re.search(r"^  touch write +\S+ ", out, re.MULTILINE)
        assert not re.search(r"^give back *$", out, re.MULTILINE)

    def test_the_machine(self, quick: tuple[str, str, Path]) -> None:
        """The screen starts with the facts of the machine."""
        out, _, _ = quick

        first, second, *_ = out.splitlines()
        assert first.startswith("pyreserve costs  ")
        assert f"Linux {os.uname().release}" in out
        assert "virtualised" in first + second
        assert "transparent huge pages: " in out
        assert "vm.overcommit_memory " in out

    def test_the_time_limit_is_printed_first(self, quick: tuple[str, str, Path]) -> None:
        """At the start it prints the time limit on standard error."""
        _, err, _ = quick

        assert re.match(r"pyreserve costs: measuring \d+ cells for at most 1000 s, in up to ", err)

    def test_recommendations_in_words(self, tmp_path: Path) -> None:
        """The recommendations are sentences with their figures."""
        table = costs_tables.table(USUAL)
        path = tmp_path / "a.json"
        path.write_text(imaginary(table).to_json(), encoding="utf-8")

        out = run_measured(path).stdout

        assert "Grow by 256 KiB or more" in out
        assert "Give back memory that stays idle for more than" in out
        assert "faster at first touch if over 10% (10% to 10%) of each 2 MiB is used" in out
        assert "MADV_FREE" in out

    def test_a_bar_on_a_terminal(self) -> None:
        """On a terminal a progress bar is drawn."""
        leader, follower = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-c", BRIEF, "costs", *QUICK],
            stdout=subprocess.DEVNULL,
            stderr=follower,
            env={**environment(), "TERM": "xterm"},
        )
        os.close(follower)
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

        assert process.wait() == 0
        assert b"pages, charge" in seen
        assert "━".encode() in seen


class TestFiles:
    def test_json_and_csv(self, quick: tuple[str, str, Path]) -> None:
        """Both files have the same cells, and the JSON has the model."""
        _, _, folder = quick

        found = json.loads((folder / "a.json").read_text())
        rows = list(csv.DictReader(io.StringIO((folder / "a.csv").read_text())))

        assert found["schema"] == 1
        assert found["complete"] is True
        assert {c["verb"] for c in found["cells"]} == {"reserve", "commit", "touch"}
        assert [r["verb"] for r in rows] == [c["verb"] for c in found["cells"]]
        assert {f["verb"] for f in found["model"]["fits"]} == {"reserve", "commit", "touch"}
        table = CostTable.load(folder / "a.json")
        assert table.model().estimate("touch", pages=4) > 0

    def test_nothing_else_is_left(self, quick: tuple[str, str, Path]) -> None:
        """No temporary file is left, and the permissions follow the umask."""
        _, _, folder = quick

        assert sorted(path.name for path in folder.iterdir()) == ["a.csv", "a.json"]
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
        assert found["schema"] == 1

    def test_a_picture(self, tmp_path: Path) -> None:
        """--plot writes a picture, and the screen is printed."""
        picture = tmp_path / "a.svg"

        ended = run_briefly("--plot", picture)

        assert ended.returncode == 0, ended.stderr
        assert "touch write" in ended.stdout
        assert picture.read_text().startswith("<?xml")


class TestCompare:
    def test_with_itself(self, quick: tuple[str, str, Path]) -> None:
        """A comparison counts the cells in both runs and those of each verdict."""
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

        assert "machine differs: cpu was Imaginary 9000" in out
        assert re.search(r"touch write.* slower", out)

    def test_as_json(self, tmp_path: Path) -> None:
        """With --json the document has the comparison, and CostTable.load still reads it."""
        old, new, path = tmp_path / "old.json", tmp_path / "new.json", tmp_path / "out.json"
        old.write_text(costs_tables.table({TOUCH: line(0, 0.5)}).to_json())
        new.write_text(imaginary(costs_tables.table({TOUCH: line(0, 500)})).to_json())

        ended = run_measured(new, "--compare", old, "--json", "--output", path)

        assert (ended.returncode, ended.stdout) == (0, "")
        comparison = json.loads(path.read_text())["comparison"]
        assert {cell["verdict"] for cell in comparison["cells"]} == {"slower"}
        assert all(cell["old_median_ns"] < cell["new_median_ns"] for cell in comparison["cells"])
        assert {"name": "balloon", "old": None, "new": False} in comparison["machine_differences"]
        assert CostTable.load(path).cells == CostTable.load(new).cells

    def test_a_disturbed_run_invents_nothing(self, tmp_path: Path) -> None:
        """Against a run under load no change is reported."""
        out = self.compared(tmp_path, LOUD)

        assert "slower" not in out
        assert "Noisy, so no change is reported: the old run" in out


class TestBystanders:
    def run(self, folder: Path, *arguments: str, complete: bool = True) -> str:
        """The output of the command with imagined results of both measurements."""
        path = folder / "a.json"
        path.write_text(imaginary(costs_tables.table(USUAL)).to_json(), encoding="utf-8")

        def imagine(budget: float) -> BystanderTable:
            assert budget == 30
            micro = Figure(9000, 8900, 9100, 9)
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
        assert found["calls"][1]["added"] == {"ns": 9000, "interval": [8900, 9100], "blocks": 9}
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
            proc.available_bytes = lambda: 200 << 20

        ended = command.run("costs", env=environment(), prepare=use_up)

        assert ended.returncode == 1
        assert ended.stderr.startswith("pyreserve: measuring needs 1.")
        assert "200 MiB is available; shorter pieces (longest, --longest)" in ended.stderr
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
