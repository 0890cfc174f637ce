"""The command in a process of its own."""

import os
import subprocess
import sys

COMMAND = [sys.executable, "-m", "pyreserve"]


def environment() -> dict[str, str]:
    """The environment without variables that change terminal output."""
    terminal_words = ("COLOR", "COLUMNS", "LINES", "TTY", "TERM", "GITHUB_ACTIONS")
    return {
        key: value
        for key, value in os.environ.items()
        if not any(word in key for word in terminal_words)
    }


def run(*arguments: str, ulimit: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command, under ``ulimit`` with these options if given."""
    limited = ["sh", "-c", f'ulimit {ulimit} && exec "$@"', "sh"] if ulimit else []
    return subprocess.run(
        [*limited, *COMMAND, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )


def refused_in_one_line(done: subprocess.CompletedProcess[str], status: int = 1) -> str:
    """Assert that a run failed in a single line, without a traceback, and return the line."""
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("pyreserve: ")
    return done.stderr.strip()
