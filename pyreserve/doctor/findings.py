"""The data of a diagnosis: findings, and how a check that fails becomes one."""

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
"""The states of a finding, in the order in which findings are sorted."""

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check: a limit, a kernel feature or a setting. Texts are whole sentences.

    Attributes:
        topic: the subject. A limit has the name that `VMError.limit` gives it.
        state: ``"good"``, ``"limited"`` (works within bounds) or ``"missing"``.
        fact: the observation.
        allows: its consequence for pyreserve.
        change: the command that changes it, or advice where no command can; None if there is
            nothing to change.
        effect: the benefit of the change.
        risk: the cost of the change; None if it has none.
        values: the figures behind `fact`, in bytes unless the name says otherwise; a limit of None
            means unlimited.
        command: whether `change` is a shell command line.
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
    """All findings about one process and its machine.

    Attributes:
        pyreserve: its version; None if it is not installed.
        kernel: the kernel release.
        machine: the architecture.
        python: the version of the interpreter.
        pid: the process that was checked.
        findings: first limited, then missing, then good ones; each group in the order of the
            checks.
    """

    pyreserve: str | None
    kernel: str
    machine: str
    python: str
    pid: int
    findings: tuple[Finding, ...]

    def about(self, topic: str) -> Finding:
        """Return the finding with this topic, for instance the ``limit`` of a `VMError`.

        Raises:
            KeyError: no finding has this topic.
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
        """Return all findings as JSON-compatible data; ``"schema"`` is the format version."""
        return {"schema": SCHEMA, **asdict(self), "counts": self.counts()}

    def to_json(self) -> str:
        """Return the JSON text that ``pyreserve doctor --json`` prints."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)


Check = Callable[[], Iterable[Finding]]


def examine(topic: str, check: Check) -> Iterator[Finding]:
    """Yield the findings of a check; an unreadable file becomes a finding of state "limited"."""
    try:
        yield from check()
    except (OSError, KeyError, ValueError) as error:
        yield Finding(
            topic,
            "limited",
            f"The setting can't be read here: {_reason(error)}.",
            "Its effect is unknown.",
            "make /proc and /sys readable: run as root, or mount /sys in the container",
            "The setting is checked.",
            command=False,
        )


def _reason(error: OSError | KeyError | ValueError) -> str:
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, KeyError):
        return f"the kernel does not report {error.args[0]}"
    return str(error)


def soft_limit(which: int, ulimit: str) -> tuple[int | None, dict[str, Any]]:
    """Return a soft resource limit in bytes (None: unlimited) and the advice on raising it.

    The advice is a dict of keyword arguments for `Finding`. Raising a hard limit takes
    CAP_SYS_RESOURCE (setrlimit(2)).
    """
    soft, hard = rlimit(which), resource.getrlimit(which)[1]
    if soft is None:
        return None, {}
    advice: dict[str, Any] = {"change": f"ulimit {ulimit} unlimited"}
    if hard != resource.RLIM_INFINITY and not proc.capable(proc.CAP_SYS_RESOURCE):
        advice["risk"] = (
            f"The hard limit is {format_size(hard)}. Only root can raise it: in the shell that "
            "starts the process, in /etc/security/limits.conf or in the service's unit file."
        )
    return soft, advice
