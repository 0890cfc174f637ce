"""The group of all commands, and how it ends: exit statuses, errors, a closed pipe, Ctrl-C."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

import click

from pyreserve.cli.console import Group, discard_output
from pyreserve.errors import PyreserveError

_INTERRUPTED = 130  # the status that a shell reports after Ctrl-C
_COMMANDS = ("vsz", "explain", "costs", "doctor")


class _PipeClosedError(Exception):
    """The reader of a pipe has gone; for click, which exits with 1 after a BrokenPipeError."""


@contextmanager
def _closed_pipe_passes_click() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise _PipeClosedError from None


class _Commands(Group):
    """Imports a command's module when the command is called or listed."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = import_module(f"pyreserve.cli.{cmd_name}").command
        return command

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _closed_pipe_passes_click():  # --help and --version print here
            return super().make_context(*args, **options)

    def invoke(self, ctx: click.Context) -> Any:
        with _closed_pipe_passes_click():
            return super().invoke(ctx)

    def main(self, args: Sequence[str] | None = None, **options: Any) -> NoReturn:  # type: ignore[override]
        """Run a command and exit; an error is one line on standard error."""
        options |= {"prog_name": "pyreserve", "standalone_mode": False}
        try:
            status = self._status(args, options)
        except (_PipeClosedError, BrokenPipeError):
            _end_by_sigpipe()
        sys.exit(status)

    def _status(self, args: Sequence[str] | None, options: dict[str, Any]) -> int:
        try:
            status = super().main(args, **options)
            if sys.stdout is not None:
                sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            return error.exit_code
        except (click.Abort, KeyboardInterrupt):
            return _INTERRUPTED
        except BrokenPipeError:
            raise
        except (PyreserveError, MemoryError, OSError) as error:
            return _refuse(error)
        return status or 0  # None unless a command exits by itself


def _refuse(error: BaseException) -> int:
    """Print an error as one line on standard error; return the status."""
    message = getattr(error, "strerror", None) or str(error) or "out of memory"
    path = getattr(error, "filename", None)
    line = f"{f'{path}: ' if path else ''}{message}"
    # A path may contain control characters.
    line = "".join(char if char.isprintable() else "?" for char in line)
    click.echo(f"pyreserve: {line}", err=True)
    discard_output()
    return 1


def _end_by_sigpipe() -> NoReturn:
    """End as a program does that does not catch SIGPIPE: silently, killed by the signal."""
    discard_output()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.raise_signal(signal.SIGPIPE)
    sys.exit(128 + signal.SIGPIPE)  # the signal is blocked


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from pyreserve._system.extras import own_version  # noqa: PLC0415

        click.echo(f"pyreserve {own_version() or '(not installed)'}")
        ctx.exit()


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    examples=(
        ("pyreserve vsz", "a Go program's 136 GiB of VSZ, and why they cost nothing"),
        ("pyreserve explain 1234", "what the address space of process 1234 holds"),
        ("pyreserve explain 1234 --watch", "its sizes over time"),
        ("pyreserve costs --budget 10", "what memory operations cost on this machine"),
        ("pyreserve doctor", "what limits pyreserve here, and how to change it"),
        ("pyreserve explain 1234 --json --output old.json", "results as JSON, in a file"),
        (
            'eval "$(_PYRESERVE_COMPLETE=bash_source pyreserve)"',
            "completion of options, layouts, verbs and PIDs in bash; also zsh_source, fish_source",
        ),
    ),
)
@click.option(
    "--version",
    is_flag=True,
    callback=_version,
    is_eager=True,
    expose_value=False,
    help="Show the version.",
)
@click.pass_context
def app(ctx: click.Context) -> None:
    """Reserve virtual memory, measure its costs and explain address spaces."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
