"""The command ``pyreserve explain``: its screen, its JSON, its files and its refusals."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers import command
from helpers.captures import FOLDER, NAMES, truth
from helpers.witness import PATIENCE
from pyreserve.cli import explain as explain_command
from pyreserve.cli.screen import Screen
from pyreserve.errors import PyreserveError
from pyreserve.procmem import explain, load

JSON_KEYS = {
    "schema",
    "pid",
    "name",
    "settled",
    "missing",
    "vsz_kib",
    "rss_kib",
    "pss_kib",
    "uss_kib",
    "swap_kib",
    "page_tables_kib",
    "mappings",
    "classes",
    "owners",
    "ranges",
    "details_kib",
    "warnings",
    "verdict",
}
GO = str(FOLDER / "go_tip2014")


def run(*arguments: str | int | Path, status: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a forked child."""
    done = command.run("explain", *map(str, arguments), env={**os.environ, "COLUMNS": "100"})
    assert done.returncode == status, done.stderr
    return done


def run_fresh(*arguments: str | Path, **environment: str) -> str:
    """Run the command in a fresh interpreter; return its screen."""
    return subprocess.run(
        [sys.executable, "-m", "pyreserve", "explain", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "100", **environment},
        timeout=PATIENCE,
        check=True,
    ).stdout


def words(text: str) -> str:
    """The words of an error message, without the box around it."""
    return re.sub(r"[\s│]+", " ", text)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """An idle child process."""
    child = subprocess.Popen(["sleep", "1000"])
    try:
        yield child
    finally:
        child.kill()
        child.wait()


class TestScreen:
    def test_the_article(self) -> None:
        """For the Go program of 2014 the screen has the reserved size, its owner and its cost."""
        screen = run_fresh("--from", GO)

        assert re.search(
            r"VSZ is 136\.1 GiB, of which 136 GiB is reserved .* costs nothing", screen
        )
        assert "No reason to worry" in screen
        assert re.search(r"reserved, no access +136 GiB +99\.9 %", screen)
        assert re.search(r"Go arena +128 GiB +94\.0 % +100\.6 MiB", screen)
        assert re.search(r"c00001a000-c2079b0000 +8\.119 GiB +spans \+ bitmap +reserved", screen)
        assert re.search(r"RSS 102\.3 MiB, PSS 102\.3 MiB, USS 102\.3 MiB", screen)

    @pytest.mark.parametrize("name", NAMES)
    def test_every_capture_fits(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        """Except for the lists of mappings, no line is longer than 100 columns."""
        explain_command.show(Screen(100), explain(path=FOLDER / name), 0)

        screen = capsys.readouterr().out
        assert max(map(len, screen.splitlines())) <= 100
        assert "mappings: addresses" not in screen

    @pytest.mark.parametrize("name", NAMES)
    def test_no_figure_is_cut(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        """In 80 and 50 columns bars and names are shortened, sizes and shares are not."""
        space = explain(path=FOLDER / name)
        figures = re.compile(r"(\d|\.\d+) ([KMGT]i)?B +[<>]? ?\d+\.\d % +\d[^…]*$")
        for width in (80, 50):
            explain_command.show(Screen(width), space, 0)

            screen = capsys.readouterr().out
            tables = re.findall(r"^by (?:class|owner) .*\n((?:.* % .*\n)+)", screen, re.M)
            rows = [row for table in tables for row in table.splitlines()]
            assert len(rows) >= 1 + len(space.owners[:12]) + 3
            assert [row for row in rows if not figures.search(row)] == []

    def test_top_and_maps(self) -> None:
        """--top lists the largest mappings, --maps lists all in address order."""
        top = run("--from", GO, "--top", "2").stdout
        maps = run("--from", GO, "--maps").stdout

        assert len(re.findall(r"^[0-9a-f]+-[0-9a-f]+ +[r-][w-][x-][sp] ", top, re.M)) == 2
        found = re.findall(r"^([0-9a-f]+)-[0-9a-f]+ +[r-][w-][x-][sp] ", maps, re.M)
        assert len(found) == 14
        assert found == sorted(found, key=lambda address: int(address, 16))

    def test_this_command(self) -> None:
        """Without a PID the command explains itself."""
        assert "pyreserve explain  pid " in run_fresh()

    def test_odd_names_do_nothing_to_a_terminal(self) -> None:
        """File names reach the terminal without control characters, in ASCII and UTF-8."""
        for environment in ({"LC_ALL": "C", "PYTHONUTF8": "0"}, {"LC_ALL": "C.UTF-8"}):
            screen = run_fresh("--from", FOLDER / "c_odd", "--maps", **environment)
            assert "new\\012line and  two spaces" in screen
            assert "\x1b" not in screen

    def test_a_warning(self, tmp_path: Path) -> None:
        """A process near a limit gets a warning with the figures."""
        for path in (FOLDER / "redis").iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        limits = (tmp_path / "limits").read_text()
        limits = re.sub(r"(Max address space +)\S+ +", r"\g<1>150000000            ", limits)
        (tmp_path / "limits").write_text(limits)
        (tmp_path / "max_map_count").write_text("122\n")
        (tmp_path / "overcommit_memory").write_text("2\n")
        (tmp_path / "meminfo").write_text(
            "MemTotal: 1000 kB\nMemAvailable: 90 kB\nCommitLimit: 1000 kB\nCommitted_AS: 990 kB\n"
        )
        (tmp_path / "cgroup_memory").write_text("1000000 950000\n")
        status = (tmp_path / "status").read_text().replace("236 kB", "12036 kB")
        (tmp_path / "status").write_text(status)

        warnings = json.loads(run("--from", tmp_path, "--json").stdout)["warnings"]

        for pattern in (
            r"VSZ is 96 % of RLIMIT_AS \(ulimit -v\), 143\.1 MiB",
            r"cgroup uses 927\.7 KiB of 976\.6 KiB",
            r"the machine has 90 KiB of its 1000 KiB of memory left",
            r"120 mappings and vm\.max_map_count is 122",
            r"page tables take 11\.75 MiB, 15 %",
            r"promised 990 KiB of 1000 KiB",
        ):
            assert any(re.search(pattern, warning) for warning in warnings), (pattern, warnings)
        screen = run("--from", tmp_path).stdout
        assert screen.count("warning: ") == len(warnings) == 6
        assert "6 things are worth a look" in " ".join(screen.split())

    def test_a_tiny_process(self, tmp_path: Path) -> None:
        """Page tables larger than the memory of a tiny process cause no warning."""
        (tmp_path / "smaps").write_text(
            "7f0000000000-7f0000003000 rw-p 00000000 00:00 0 \nRss: 12 kB\nPrivate_Dirty: 12 kB\n"
        )
        (tmp_path / "status").write_text("Name:\ttiny\nVmPTE:\t24 kB\n")

        assert explain(path=tmp_path).warnings == ()

    def test_maps_alone(self, tmp_path: Path) -> None:
        """Unknown totals are question marks, and comparisons report them as unknown."""
        folder = tmp_path / "saved"
        folder.mkdir()
        (folder / "maps.gz").write_bytes((FOLDER / "redis" / "maps.gz").read_bytes())
        plain = tmp_path / "plain.json"

        screen = run("--from", folder).stdout
        plain.write_text(run("--from", folder, "--json").stdout)

        assert "RSS ?, PSS ?, USS ?, swap ?, page tables ?" in screen
        assert "memory is not known" in words(screen)
        assert "0 B" not in screen
        assert load(plain)["rss_kib"] is None
        assert "(RSS) can't be compared" in words(run("--diff", plain, plain).stdout)

    def test_limits_that_were_not_saved(self, tmp_path: Path) -> None:
        """Without a saved limits file the verdict says that limits are missing."""
        for name in ("smaps.gz", "status"):
            (tmp_path / name).write_bytes((FOLDER / "redis" / name).read_bytes())

        verdict = explain(path=tmp_path).verdict

        assert "No reason to worry" not in verdict
        assert verdict.endswith("no limits were saved with it.")

    def test_a_core_dump_would_walk(self, tmp_path: Path) -> None:
        """A large, hardly used mapping gets a warning where core dumps are enabled."""
        (tmp_path / "smaps").write_text(
            "7f0000000000-7f0080000000 rw-p 00000000 00:00 0 \nRss: 4 kB\nPrivate_Dirty: 4 kB\n"
            "Anonymous: 4 kB\nVmFlags: rd wr mr mw me ac \n"
        )
        (tmp_path / "core_pattern").write_text("|/usr/lib/systemd/systemd-coredump\n")

        warnings = json.loads(run("--from", tmp_path, "--json").stdout)["warnings"]

        assert any("core dump would walk 2 GiB" in warning for warning in warnings)


class TestJson:
    @pytest.mark.parametrize("name", NAMES)
    def test_the_documented_keys(self, name: str) -> None:
        """The JSON has exactly the documented keys; classes and owners each sum to VSZ."""
        found = json.loads(explain(path=FOLDER / name).to_json())

        assert set(found) == JSON_KEYS
        assert found["schema"] == 1
        assert found["vsz_kib"] == truth(name)["vsz_kib"]
        assert sum(item["kib"] for item in found["classes"]) == found["vsz_kib"]
        assert sum(item["kib"] for item in found["owners"]) == found["vsz_kib"]
        assert all(set(item) == {"name", "kib", "mappings"} for item in found["classes"])
        assert all({"name", "kib", "rss_kib", "evidence"} <= set(item) for item in found["owners"])

    def test_a_live_process(self, sleeper: subprocess.Popen[bytes]) -> None:
        """The JSON of a live process has its PID, its name and consistent figures."""
        found = json.loads(run(sleeper.pid, "--json").stdout)

        assert (found["pid"], found["name"], found["settled"]) == (sleeper.pid, "sleep", True)
        assert found["owners"][0]["name"] == "mapped files"


class TestFiles:
    def test_save_and_explain(self, tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
        """Saved files give the same explanation as the live process."""
        shown = run(sleeper.pid, "--save", tmp_path / "kept", "--json").stdout
        again = run("--from", tmp_path / "kept", "--json").stdout

        assert again == shown
        assert {"maps", "smaps", "smaps_rollup", "status", "limits"} <= {
            path.name for path in (tmp_path / "kept").iterdir()
        }

    def test_save_overwrites_nothing(
        self, tmp_path: Path, sleeper: subprocess.Popen[bytes]
    ) -> None:
        """--save refuses a folder with saved files and leaves them unchanged."""
        run(sleeper.pid, "--save", tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        assert "exists already" in run(sleeper.pid, "--save", tmp_path, status=1).stderr
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_diff(self, tmp_path: Path) -> None:
        """--diff reports the changes between two explanations, as text and as JSON."""
        old, new = tmp_path / "old.json", tmp_path / "new.json"
        old.write_text(run("--from", FOLDER / "go14", "--json").stdout)
        new.write_text(run("--from", GO, "--json").stdout)

        screen = run("--diff", old, new).stdout
        found = json.loads(run("--diff", old, new, "--json").stdout)

        assert "VSZ grew by 136 GiB, memory (RSS) grew by 168 KiB" in screen
        assert "Most addresses went to Go arena: 127.9 GiB" in screen
        assert "different processes" in screen
        by = {item["name"]: item["change"] for item in found["totals"]}
        assert by["vsz_kib"] == 142_740_892 - 113_332
        assert by["mappings"] == 2

    @pytest.mark.parametrize(
        "text",
        ["", "[]", "{}", '{"schema": 2}', "[" * 100_000, '{"schema": 1, "vsz_kib": "1"}', "\0"],
    )
    def test_files_that_are_not_explanations(self, tmp_path: Path, text: str) -> None:
        """A file that is not an explanation raises ValueError."""
        path = tmp_path / "new.json"
        path.write_text(text)

        with pytest.raises(ValueError, match=r"new\.json (is not JSON|was not written by)"):
            load(path)

    def test_diff_of_something_else(self, tmp_path: Path) -> None:
        """--diff reports such a file as a usage error."""
        path = tmp_path / "new.json"
        path.write_text("{}")

        assert "new.json was not written by" in words(run("--diff", path, path, status=2).stderr)

    @pytest.mark.parametrize("kind", ["png", "svg"])
    def test_plot(self, tmp_path: Path, kind: str) -> None:
        """--plot writes the picture and still prints the screen."""
        path = tmp_path / f"picture.{kind}"

        assert "VSZ is 136.1 GiB" in run("--from", GO, "--plot", path).stdout
        assert path.read_bytes()[:5] in {b"\x89PNG\r", b"<?xml"}


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["1", "--from", "x"], "PID and --from"),
            (["--from", "x", "--diff", "a", "b"], "--from and --diff"),
            (["--from", "x", "--save", "y"], "--save needs a running process"),
            (["0"], "PID must be positive, got"),
            (["--", "-5"], "PID must be positive, got"),
            (["--watch"], "--watch needs a process"),
            (["1", "--watch", "0"], "a positive number of seconds"),
            (["1", "--watch", "nan"], "a positive number of seconds"),
            (["1", "--csv", "x"], "--csv needs --watch"),
            (["1", "--watch", "--save", "x"], "--watch can't be combined with --save"),
            (["1", "--watch", "--json", "--maps"], "combined with --json and --maps"),
            (["--diff", "a", "b", "--plot", "x.png"], "--diff can't be combined with --plot"),
            (["--plot", "x.gif"], ".png or .svg"),
            (["--top", "-1"], "--top"),
            (["abc"], "PID"),
        ],
    )
    def test_invalid_combinations_of_options(self, arguments: list[str], told: str) -> None:
        """Options that exclude or need each other, and wrong values, end with status 2."""
        refused = run(*arguments, status=2).stderr

        assert told in words(refused)

    @pytest.mark.parametrize(
        ("pid", "told"),
        [("4194304", "there is no process 4194304"), ("9" * 20, "there is no such process: pid")],
    )
    def test_no_such_process(self, pid: str, told: str) -> None:
        """A PID without a process is reported in one line with status 1."""
        refused = run(pid, status=1).stderr

        assert refused.startswith(f"pyreserve: {told}")
        assert refused.count("\n") == 1

    def test_no_such_folder(self, tmp_path: Path) -> None:
        """A missing folder is named in one line."""
        refused = run("--from", tmp_path / "x", status=1).stderr

        assert refused == f"pyreserve: {tmp_path}/x: no such folder\n"

    def test_a_path_does_nothing_to_a_terminal(self, tmp_path: Path) -> None:
        """Control characters of a path are not printed."""
        assert run("--from", f"{tmp_path}/\x1b]0;x\x07", status=1).stderr.count("\x1b") == 0

    def test_a_file_that_is_none(self, tmp_path: Path) -> None:
        """A malformed file is reported in one line with its path and line number."""
        (tmp_path / "smaps").write_text("hello\n")

        refused = run("--from", tmp_path, status=1).stderr

        assert refused.startswith(f"pyreserve: {tmp_path}/smaps: line 1 is not in the format of")
        assert refused.count("\n") == 1

    @pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
    def test_without_permission(self, sleeper: subprocess.Popen[bytes]) -> None:
        """Another user's process is reported in one line with status 1."""
        # Import first: the user nobody may have no access to the interpreter's files.
        code = (
            "import os, sys; from pyreserve.cli import app, explain, screen\n"
            "try: app.app(['explain', '4194304'])\n"
            "except SystemExit: os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
            "app.app(['explain', sys.argv[1]])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, str(sleeper.pid)],
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 1
        first, second = done.stderr.splitlines()
        assert first == "pyreserve: there is no process 4194304"
        assert second.startswith(f"pyreserve: process {sleeper.pid} belongs to user 0")


class TestWatch:
    def test_lines(self, sleeper: subprocess.Popen[bytes], tmp_path: Path) -> None:
        """In a pipe --watch prints lines, and writes the same to the file."""
        csv = tmp_path / "record.csv"
        with subprocess.Popen(
            [sys.executable, "-m", "pyreserve", "explain", str(sleeper.pid), "--watch", "0.05",
             "--csv", str(csv)],
            stdout=subprocess.PIPE, text=True,
        ) as watching:  # fmt: skip
            assert watching.stdout is not None
            lines = [watching.stdout.readline() for _ in range(4)]
            sleeper.kill()
            watching.communicate(timeout=PATIENCE)

        assert lines[0].split()[1:] == [
            "vsz_kib", "reserved_kib", "committed_kib", "rss_kib", "pss_kib", "mappings",
        ]  # fmt: skip
        assert watching.returncode == 0
        assert csv.read_text().splitlines()[1].split(",") == lines[1].split()

    def test_a_terminal(self, sleeper: subprocess.Popen[bytes]) -> None:
        """On a terminal q ends --watch."""
        master, slave = pty.openpty()
        try:
            with subprocess.Popen(
                [sys.executable, "-m", "pyreserve", "explain", str(sleeper.pid), "--watch"],
                stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
            ) as watching:  # fmt: skip
                os.close(slave)
                seen = b""
                while b"quits" not in seen:
                    seen += os.read(master, 4096)
                os.write(master, b"q")
                try:
                    while data := os.read(master, 4096):
                        seen += data
                except OSError:  # the other end is closed
                    pass
            assert watching.returncode == 0
            assert b"committed" in seen
        finally:
            os.close(master)


def test_the_errors_are_ours() -> None:
    """The exceptions of explain are PyreserveErrors."""
    from pyreserve import AccessError, MapsError, NoAddressSpaceError

    assert all(issubclass(error, PyreserveError) for error in (AccessError, MapsError))
    assert issubclass(NoAddressSpaceError, ProcessLookupError)
