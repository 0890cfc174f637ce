"""``pyreserve explain --watch``: on a pseudo-terminal, in a pipe and with a file."""

import fcntl
import io
import math
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from helpers.processes import COMMAND
from helpers.witness import PATIENCE
from pyreserve.cli.screen import printable
from pyreserve.cli.watch import watch, watched
from pyreserve.cli.watch.sparkline import ASCII, BLOCKS, sparkline
from pyreserve.cli.watch.watched import COLUMNS, Watched
from pyreserve.procmem import Sample

LEAVE, ENTER = b"\x1b[?1049l", b"\x1b[?1049h"
SHOW_CURSOR, HIDE_CURSOR = b"\x1b[?25h", b"\x1b[?25l"

# Watches a process as the command does. Arguments: the PID, the interval, optionally a CSV file.
# On a terminal it becomes the session leader, so that Ctrl-C reaches it.
WATCH = """
import fcntl, os, signal, sys, termios
from pathlib import Path
from types import SimpleNamespace
from pyreserve._system import proc
from pyreserve.cli.watch import watch

# This process would inherit ignored signals (nohup, a background shell).
for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

def take(pid):
    try:
        status = proc.status_kib(pid)
        mappings = proc.read_maps(pid)
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    if "VmSize" not in status:
        raise ProcessLookupError(pid)
    if FAILS and Path(FAILS).exists():
        raise PermissionError("no longer yours")
    reserved = sum(m.end - m.start for m in mappings if m.perms.startswith("---"))
    return SimpleNamespace(
        vsz=status["VmSize"] << 10,
        reserved=reserved,
        committed=(status["VmSize"] << 10) - reserved,
        rss=status["VmRSS"] << 10,
        pss=status["VmRSS"] << 9,
        mappings=len(mappings),
    )

FAILS = os.environ.get("FAILS")
if os.isatty(2):
    fcntl.ioctl(2, termios.TIOCSCTTY, 0)
pid, interval, *csv = sys.argv[1:]
try:
    watch(int(pid), float(interval), csv=Path(csv[0]) if csv else None, take=take)
except KeyboardInterrupt:
    sys.exit(130)
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

# Allocates and keeps the number of MiB in each line that it reads, then answers.
CHILD = """
import sys
kept = []
print("ready", flush=True)
for line in sys.stdin:
    kept.append(bytearray(b"x") * (int(line) << 20))
    print("taken", flush=True)
"""


class Child:
    """A process that is watched."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self._hear("ready")

    def _hear(self, answer: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline().strip() == answer

    def grow(self, mib: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{mib}\n")
        self.process.stdin.flush()
        self._hear("taken")

    def end(self) -> None:
        """End and reap the process, so that the watcher sees it gone."""
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def child() -> Iterator[Child]:
    """A watched process that all tests share and none ends."""
    process = Child()
    yield process
    process.end()


@pytest.fixture
def mortal() -> Iterator[Child]:
    """A watched process that the test may end."""
    process = Child()
    yield process
    process.end()


def environment(**more: str) -> dict[str, str]:
    """The environment without variables that change output to terminals and pipes."""
    excluded = ("COLOR", "COLUMNS", "LINES", "TTY", "TERM", "GITHUB_ACTIONS", "PYTHONUNBUFFERED")
    usual = {k: v for k, v in os.environ.items() if not any(word in k for word in excluded)}
    return {**usual, "TERM": "xterm-256color", **more}


def command(child: Child, interval: float, *csv: Path) -> list[str | Path]:
    return [sys.executable, "-c", WATCH, str(child.pid), str(interval), *csv]


class Terminal:
    """A pseudo-terminal on which the watching process runs."""

    def __init__(
        self,
        arguments: list[str | Path],
        *,
        keyboard: bool = True,
        size: tuple[int, int],
        **more: str,
    ) -> None:
        self.leader, self.follower = pty.openpty()
        self.resize(*size)
        self.before = termios.tcgetattr(self.follower)
        self.seen = b""
        self.process = subprocess.Popen(
            arguments,
            stdin=self.follower if keyboard else subprocess.DEVNULL,
            stdout=self.follower,
            stderr=self.follower,
            start_new_session=True,
            env=environment(**more),
        )

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.leader, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read(self, timeout: float) -> bool:
        ready = bool(select.select([self.leader], [], [], timeout)[0])
        if ready:
            self.seen += os.read(self.leader, 1 << 16)
        return ready

    def until(self, condition: Callable[[], bool]) -> None:
        """Read until the condition holds."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, self.seen[-3000:]
            self.read(0.02)

    def ended(self) -> int:
        """Wait for the end, and return the exit status."""
        self.until(lambda: self.process.poll() is not None)
        while self.read(0):
            pass
        return self.process.wait()

    def hit(self, key: bytes) -> None:
        os.write(self.leader, key)

    def frames(self) -> list[str]:
        """The completely drawn screens, without colours."""
        drawn = self.seen.rpartition(LEAVE)[0] or self.seen.rpartition(b"\x1b[H")[0]
        return [plain(frame) for frame in drawn.split(b"\x1b[H")[1:]]

    def latest(self) -> str:
        """The last screen, complete or not."""
        return plain(self.seen.rpartition(b"\x1b[H")[2])

    def figures(self) -> dict[str, list[str]]:
        """The rows of the last complete screen."""
        frames = self.frames()
        return rows(frames[-1]) if frames else {}

    def left(self) -> str:
        """The text that stays on the normal screen."""
        _, _, after = self.seen.rpartition(LEAVE)
        return plain(after)

    def is_as_it_was(self) -> bool:
        """Whether attributes, normal screen and cursor are restored."""
        return (
            termios.tcgetattr(self.follower) == self.before
            and self.seen.count(LEAVE) == self.seen.count(ENTER) > 0
            and self.seen.rindex(LEAVE) > self.seen.rindex(ENTER)
            and self.seen.rindex(SHOW_CURSOR) > self.seen.rindex(HIDE_CURSOR)
        )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for end in (self.leader, self.follower):
            with suppress(OSError):
                os.close(end)


@contextmanager
def terminal(
    arguments: list[str | Path],
    *,
    keyboard: bool = True,
    size: tuple[int, int] = (110, 24),
    **more: str,
) -> Iterator[Terminal]:
    opened = Terminal(arguments, keyboard=keyboard, size=size, **more)
    try:
        yield opened
    finally:
        opened.close()


def plain(text: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode()).replace("\r\n", "\n")


def rows(text: str) -> dict[str, list[str]]:
    """The rows of a table of figures by name; columns are two or more spaces apart."""
    cut = (re.split(r" {2,}", line.strip()) for line in text.splitlines())
    names = ("VSZ", "reserved", "committed", "RSS", "PSS", "mappings")
    return {first: rest for first, *rest in cut if first in names and rest}


def mib(size: str) -> float:
    number, unit = size.split()
    return float(number) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]


class TestSparkline:
    def test_from_the_least_to_the_most(self) -> None:
        """Eight values in equal steps give the eight characters in order."""
        assert sparkline(range(8), 8, 0, 7) == BLOCKS
        assert sparkline(range(8), 8, 0, 7, ASCII) == ASCII

    @pytest.mark.parametrize("value", [0, 5, 1 << 60])
    def test_a_constant_series(self, value: int) -> None:
        """A constant series is a flat line at the bottom, zero or not."""
        assert sparkline([value] * 4, 8, value, value) == "▁▁▁▁"

    @pytest.mark.parametrize(
        ("width", "drawn"), [(10, "▁▅█"), (3, "▁▅█"), (2, "▅█"), (1, "█"), (0, ""), (-1, "")]
    )
    def test_the_newest_that_fit(self, width: int, drawn: str) -> None:
        """A narrow line has the newest values; a wide one has all values and no padding."""
        assert sparkline([0, 50, 100], width, 0, 100) == drawn

    def test_nothing(self) -> None:
        """No values give an empty line."""
        assert sparkline([], 8, 0, 0) == ""

    def test_large_numbers_are_exact(self) -> None:
        """The ends of the scale are exact beyond the precision of floats."""
        low = 1 << 62

        assert sparkline([low, low + 1], 8, low, low + 1) == "▁█"

    def test_beyond_the_scale(self) -> None:
        """Values outside the scale are drawn as its ends."""
        assert sparkline([-9, 99], 8, 0, 7) == "▁█"


def console(encoding: str) -> Console:
    return Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding))


class TestNames:
    def test_a_name_can_do_nothing(self) -> None:
        """Control characters and unencodable characters in a name are replaced."""
        assert printable("a\x1b[2J\nb", console("utf-8")) == "a?[2J?b"
        assert printable("é\udcff", console("utf-8")) == "é?"
        assert printable("é", console("ascii")) == "?"


class TestSampling:
    """Sampling with a simulated clock, on which each sample takes a given time."""

    def watched(
        self, monkeypatch: pytest.MonkeyPatch, interval: float, lasts: Iterator[float]
    ) -> Watched:
        self.now = 0.0
        self.taken: list[float] = []

        def take(pid: int) -> Sample:
            self.taken.append(self.now)
            self.now += next(lasts)
            size = -len(self.taken)
            nbytes = size << 10
            return Sample(nbytes, nbytes, nbytes, nbytes, nbytes, size)

        monkeypatch.setattr(watched, "time", SimpleNamespace(monotonic=lambda: self.now))
        return Watched(os.getpid(), interval, take, None)

    def test_no_drift(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Late or long samples do not delay the following ones."""
        seen = self.watched(monkeypatch, 1.0, iter([0.3, 0.9, 0.5, 0.1, 0.1]))
        seen.sample()
        while len(self.taken) < 5:
            self.now = seen.due + 0.05
            assert seen.sample_when_due()

        assert self.taken == pytest.approx([0, 1.05, 2.05, 3.05, 4.05])

    def test_missed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """After a sample that took longer than the interval, the next is due at once."""
        seen = self.watched(monkeypatch, 1.0, iter([0.0, 5.5, 0.0, 0.0]))
        seen.sample()
        while len(self.taken) < 4:
            self.now = max(self.now, seen.due)
            assert seen.sample_when_due()

        assert self.taken == pytest.approx([0, 1, 6.5, 7.5])

    def test_not_yet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No sample is taken before it is due."""
        seen = self.watched(monkeypatch, 1.0, iter([0.0]))
        seen.sample()

        assert not seen.sample_when_due()
        assert not seen.ended

    def test_the_history_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The history is bounded; first, low and high are those since the start."""
        seen = self.watched(monkeypatch, 1.0, repeat(0.0))
        for _ in range(3000):
            seen.sample()

        series = seen.series["RSS"]
        assert (series.first, series.low, series.high) == (-1, -3000, -1)
        assert list(series.newest) == list(range(-2001, -3001, -1))


class TestScreen:
    def test_it_draws_and_quits_on_q(self, child: Child) -> None:
        """The screen has a row per figure; after q only its last state stays."""
        with terminal(command(child, 0.05)) as seen:
            seen.until(lambda: len(seen.frames()) > 2)
            frame, figures = seen.frames()[-1], seen.figures()
            during = termios.tcgetattr(seen.follower)
            seen.hit(b"q")

            assert seen.ended() == 0
            assert seen.is_as_it_was()
            left = seen.left()
        assert not during[3] & (termios.ECHO | termios.ICANON)
        assert list(figures) == ["VSZ", "reserved", "committed", "RSS", "PSS", "mappings"]
        assert f"pid {child.pid} (" in frame
        assert "one every 0.05 s" in frame
        assert "q or Ctrl-C quits" in frame
        assert f"pid {child.pid} (" in left
        assert list(rows(left)) == list(figures)
        assert "quits" not in left

    def test_it_moves_with_the_process(self, child: Child) -> None:
        """Memory that the process takes shows in now, change, max and the sparkline."""
        with terminal(command(child, 0.05)) as seen:
            seen.until(lambda: "RSS" in seen.figures())
            before = mib(seen.figures()["RSS"][0])
            child.grow(64)
            seen.until(lambda: mib(seen.figures()["RSS"][0]) > before + 60)
            now, change, _, low, high, history = seen.figures()["RSS"]
            seen.hit(b"q")
            seen.ended()
        assert 60 < mib(change) < 80
        assert mib(low) < mib(now) - 60
        assert mib(high) >= mib(now)
        assert history[0] == "▁"
        assert history[-1] == "█"

    def test_ctrl_c(self, child: Child) -> None:
        """Ctrl-C restores the terminal, shows the last state and raises KeyboardInterrupt."""
        with terminal(command(child, 0.05)) as seen:
            seen.until(lambda: bool(seen.figures()))
            seen.hit(b"\x03")

            assert seen.ended() == 130
            assert seen.is_as_it_was()
            assert "RSS" in rows(seen.left())
            assert "Traceback" not in seen.left()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
    def test_other_ends(self, child: Child, number: signal.Signals) -> None:
        """A fatal signal ends the process after the terminal is restored."""
        with terminal(["sh", "-c", 'ulimit -c 0; exec "$@"', "sh", *command(child, 5)]) as seen:
            seen.until(lambda: HIDE_CURSOR in seen.seen)
            seen.process.send_signal(number)

            assert seen.ended() == -number
            assert seen.is_as_it_was()

    def test_an_exception(self, child: Child, tmp_path: Path) -> None:
        """An exception during watching leaves the terminal restored."""
        fails = tmp_path / "fails"
        with terminal(command(child, 0.05), FAILS=str(fails)) as seen:
            seen.until(lambda: bool(seen.figures()))
            fails.touch()

            assert seen.ended() == 1
            assert seen.is_as_it_was()
            assert "PermissionError: no longer yours" in seen.left()
            assert "RSS" in rows(seen.left())

    @pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="a Python built on an old Linux")
    def test_the_process_ends(self, mortal: Child) -> None:
        """The end of the process ends the screen at once and is reported in the last state."""
        with terminal(command(mortal, 1000)) as seen:
            seen.until(lambda: HIDE_CURSOR in seen.seen)
            mortal.end()

            assert seen.ended() == 0
            assert seen.is_as_it_was()
            assert re.search(
                rf"^pid {mortal.pid} \(.+\) ended after 0:\d\d:\d\d", seen.left(), re.M
            )

    def test_the_window_changes(self, child: Child) -> None:
        """After a resize the screen is redrawn without waiting for a sample."""
        with terminal(command(child, 1000), size=(110, 24)) as seen:
            seen.until(lambda: HIDE_CURSOR in seen.seen)
            seen.resize(70, 8)
            seen.until(lambda: [len(line) for line in seen.latest().splitlines()] == [70] * 8)
            seen.hit(b"q")

            assert seen.ended() == 0

    def test_no_keyboard(self, child: Child) -> None:
        """Without a keyboard the screen is the same and names Ctrl-C only."""
        with terminal(command(child, 0.05), keyboard=False) as seen:
            seen.until(lambda: bool(seen.figures()))
            frame = seen.frames()[-1]
            seen.process.send_signal(signal.SIGINT)

            assert seen.ended() == 130
            assert seen.is_as_it_was()
        assert "Ctrl-C quits" in frame
        assert "q or" not in frame

    def test_a_pause(self, child: Child) -> None:
        """Ctrl-Z restores the terminal, and fg brings the screen back."""
        with terminal(command(child, 0.05)) as seen:
            seen.until(lambda: bool(seen.figures()))
            stat = Path(f"/proc/{seen.process.pid}/stat")
            # A terminal does not stop the session leader, so the test sends the signal.
            seen.process.send_signal(signal.SIGTSTP)
            seen.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T")
            while seen.read(0):
                pass
            assert seen.is_as_it_was()

            seen.process.send_signal(signal.SIGCONT)
            seen.until(lambda: seen.seen.count(ENTER) == 2)
            seen.hit(b"q")

            assert seen.ended() == 0
            assert seen.is_as_it_was()

    def test_the_terminal_is_gone(self, child: Child) -> None:
        """A terminal that hangs up ends the watcher."""
        with terminal(command(child, 0.05)) as seen:
            seen.until(lambda: bool(seen.figures()))
            os.close(seen.follower)
            os.close(seen.leader)

            assert seen.process.wait(PATIENCE) is not None

    def test_a_small_window_without_blocks(self, child: Child) -> None:
        """A small window cuts the screen; an ASCII terminal gets an ASCII sparkline."""
        with terminal(command(child, 0.05), size=(45, 5), PYTHONIOENCODING="ascii") as seen:
            seen.until(lambda: len(seen.frames()) > 2)
            seen.resize(75, 20)
            seen.until(lambda: "RSS" in seen.figures())
            seen.hit(b"q")

            assert seen.ended() == 0
            assert seen.is_as_it_was()
            assert set(seen.figures()["RSS"][-1]) <= set(ASCII)

    def test_impatience(self, child: Child) -> None:
        """Repeated SIGINTs do not prevent the terminal from being restored."""
        with terminal(command(child, 0.05)) as seen:
            seen.until(lambda: bool(seen.figures()))
            while seen.process.poll() is None:
                # Not the key: on Ctrl-C the terminal drops pending output.
                seen.process.send_signal(signal.SIGINT)
                seen.read(0.001)

            seen.ended()
            assert seen.is_as_it_was()

    def test_a_dumb_terminal_gets_lines(self, child: Child) -> None:
        """A dumb terminal gets a line per sample."""
        with terminal(command(child, 0.05), TERM="dumb") as seen:
            seen.until(lambda: seen.seen.count(b"\n") > 3)
            seen.hit(b"\x03")
            assert seen.ended() == 130
            assert b"\x1b" not in seen.seen
        assert plain(seen.seen).split()[: len(COLUMNS)] == list(COLUMNS)


class TestLines:
    def start(self, child: Child, interval: float, *csv: Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            command(child, interval, *csv),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )

    def test_a_pipe_gets_a_line_a_sample(self, mortal: Child) -> None:
        """A pipe gets a header and a line per sample, unbuffered, until the process ends."""
        process = self.start(mortal, 0.05)
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(3)]
        mortal.grow(64)
        while int(lines[-1].split()[4]) < int(lines[1].split()[4]) + 60 * 1024:
            lines.append(process.stdout.readline())
        mortal.end()
        out, err = process.communicate(timeout=PATIENCE)

        lines += out.splitlines(keepends=True)
        assert (process.returncode, err) == (0, "")
        assert lines[0].split() == list(COLUMNS)
        assert {len(line) for line in lines} == {len(lines[0])}
        assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z ", line) for line in lines[1:])

    def test_csv_has_the_printed_rows(self, child: Child, tmp_path: Path) -> None:
        """The file has the printed rows, even if the watcher is killed."""
        path = tmp_path / "a.csv"
        process = self.start(child, 0.02, path)
        assert process.stdout is not None
        shown = [process.stdout.readline().split() for _ in range(6)]
        process.kill()
        shown += [line.split() for line in process.communicate()[0].splitlines()]

        recorded = path.read_bytes().decode().split("\r\n")
        assert recorded.pop() == ""
        rows = [line.split(",") for line in recorded]
        assert rows[: len(shown)] == shown
        assert len(rows) - len(shown) in {0, 1}  # the kill may come between the file and the line

    def test_ctrl_c(self, child: Child) -> None:
        """Ctrl-C raises KeyboardInterrupt."""
        process = self.start(child, 1000)
        assert process.stdout is not None
        for _ in range(2):
            process.stdout.readline()
        process.send_signal(signal.SIGINT)

        assert process.communicate(timeout=PATIENCE) == ("", "")
        assert process.returncode == 130

    def test_nobody_reads(self, child: Child) -> None:
        """A closed pipe ends the command silently, by SIGPIPE."""
        process = subprocess.Popen(
            [*COMMAND, "explain", str(child.pid), "--watch", "0.02"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr is not None
        err = process.stderr.read()

        assert (process.wait(PATIENCE), err) == (-signal.SIGPIPE, "")
        process.stderr.close()


class TestRefusals:
    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", WATCH, *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    @pytest.mark.parametrize("interval", [0, -1, math.nan, math.inf])
    def test_no_interval(self, interval: float) -> None:
        """An interval that is not positive and finite raises ValueError."""
        with pytest.raises(ValueError, match="a positive number of seconds"):
            watch(os.getpid(), interval, take=lambda _: pytest.fail("taken"))

    def test_no_process(self, mortal: Child, tmp_path: Path) -> None:
        """A missing process is refused before the file is created."""
        mortal.end()

        ended = self.run(str(mortal.pid), "1", tmp_path / "a.csv")

        assert ended.stderr.startswith("ProcessLookupError")
        assert list(tmp_path.iterdir()) == []

    def test_no_file(self, child: Child) -> None:
        """An unwritable file is refused before the first sample."""
        ended = self.run(str(child.pid), "1", "/nowhere/a.csv")

        assert (ended.stdout, ended.stderr) == (
            "",
            "PermissionError: /nowhere/a.csv can't be written\n",
        )

    def test_a_full_disk(self, child: Child) -> None:
        """A failed write names the file."""
        ended = self.run(str(child.pid), "1", "/dev/full")

        assert ended.stderr == "OSError: [Errno 28] No space left on device: '/dev/full'\n"
