"""What a diagnosis is made of: findings, pure data."""

import json
import resource
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pyreserve._system import proc
from pyreserve._system.limits import rlimit
from pyreserve.units import format_size

State = Literal["good", "limited", "missing"]
STATES: tuple[State, ...] = ("limited", "missing", "good")
"""What a finding can be, what limits first."""

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that decides what pyreserve can do here. Words are whole sentences.

    Attributes:
        topic: what it is about. A limit has the name that `VMError.limit` gives it.
        state: ``"good"``; ``"limited"``: it bounds what can be done; ``"missing"``.
        fact: what was found.
        allows: what that means for pyreserve.
        change: the command that changes it, or what to do where that is no command; None if there
            is nothing to change.
        effect: what the change brings.
        risk: what the change costs, or whom it may hurt.
        values: the figures behind `fact`, in bytes where the name does not say otherwise; None for
            a limit means unlimited.
        command: whether `change` is a command line, for a shell.
    """

    topic: str
    state: State
    fact: str
    allows: str
    change: str | None = None
    effect: str | None = None
    risk: str | None = None
    values: dict[str, Any] = field(default_factory=dict, hash=False)
    command: bool = True


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings about one process on one machine, what limits first.

    Attributes:
        pyreserve: its version; None if it is not installed.
        kernel: its release; `machine` is the architecture, `python` the interpreter's version.
        pid: the process that was looked at.
        findings: limited, missing, good; in each the order in which they were looked for.
    """

    pyreserve: str | None
    kernel: str
    machine: str
    python: str
    pid: int
    findings: tuple[Finding, ...]

    def about(self, topic: str) -> Finding:
        """Return the finding with this topic, such as the ``limit`` of a `VMError`.

        Raises:
            KeyError: there is none.
        """
        for finding in self.findings:
            if finding.topic == topic:
                return finding
        raise KeyError(topic)

    def counts(self) -> dict[State, int]:
        """Count the findings in each state."""
        states = [finding.state for finding in self.findings]
        return {state: states.count(state) for state in ("good", "limited", "missing")}

    def to_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON; ``"schema"`` is the version of its form."""
        return {"schema": SCHEMA, **asdict(self), "counts": self.counts()}

    def to_json(self) -> str:
        """As ``pyreserve doctor --json`` prints it."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


Check = Callable[[], Iterable[Finding]]


def examine(topic: str, check: Check) -> Iterator[Finding]:
    """Yield what a check finds; what can't be read is a finding, too."""
    try:
        yield from check()
    except (OSError, KeyError, ValueError) as error:
        yield Finding(
            topic,
            "limited",
            f"It can't be read here: {_what(error)}.",
            "What it allows is not known.",
            "make /proc and /sys readable: as root, or with the container's /sys mounted",
            "This finding says what there is.",
            command=False,
        )


def _what(error: OSError | KeyError | ValueError) -> str:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, KeyError):
        return f"the kernel does not report {error.args[0]}"
    return str(error)


def soft_limit(which: int, ulimit: str) -> tuple[int | None, dict[str, Any]]:
    """Read a resource limit in bytes, and how to raise it, as arguments of a `Finding`.

    A hard limit stops all but CAP_SYS_RESOURCE (setrlimit(2)).
    """
    soft, hard = rlimit(which), resource.getrlimit(which)[1]
    if soft is None:
        return None, {}
    how: dict[str, Any] = {"change": f"ulimit {ulimit} unlimited"}
    if hard != resource.RLIM_INFINITY and not proc.capable(proc.CAP_SYS_RESOURCE):
        how["risk"] = (
            f"The hard limit is {format_size(hard)}: only root raises it, in a shell of root's "
            "that starts the process, in /etc/security/limits.conf or in the service's unit."
        )
    return soft, how
