"""The data of a diagnosis: findings, and how a check that fails becomes one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from textwrap import indent
from typing import Any, Literal

from pyreserve._system import report
from pyreserve._system.limitbase import Assessment

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

    @classmethod
    def of(cls, assessment: Assessment) -> "Finding":
        """Return the finding of an assessment."""
        return cls(**assessment._asdict())

    def consequences(self) -> Iterator[tuple[str, str]]:
        """Yield (label, text) of ``change``, ``effect`` and ``risk``, as far as there are any."""
        for label, text in (("change", self.change), ("effect", self.effect), ("risk", self.risk)):
            if text is not None:
                yield label, text

    def __str__(self) -> str:
        lines = [f"{self.topic}: {self.fact} {self.allows}"]
        lines += [f"    {label}: {text}" for label, text in self.consequences()]
        return "\n".join(map(report.printable, lines))


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
            KeyError: no finding has this topic; the message lists the topics.
        """
        for finding in self.findings:
            if finding.topic == topic:
                return finding
        topics = ", ".join(finding.topic for finding in self.findings)
        msg = f"no finding {topic!r}; topics: {topics}"
        raise KeyError(msg)

    def counts(self) -> dict[State, int]:
        """Count the findings in each state."""
        states = [finding.state for finding in self.findings]
        return {state: states.count(state) for state in ("good", "limited", "missing")}

    def __str__(self) -> str:
        width = max(map(len, STATES)) + 2
        blocks = [
            indent(str(finding), " " * width).replace(" " * width, finding.state.ljust(width), 1)
            for finding in self.findings
        ]
        return "\n".join([self.title(), *blocks, self.summary()])

    def _repr_html_(self) -> str:
        titles = ("state", "topic", "finding", "change", "effect", "risk")
        rows: list[tuple[str, ...]] = [
            (
                finding.state,
                finding.topic,
                f"{finding.fact} {finding.allows}",
                *(text or "" for text in (finding.change, finding.effect, finding.risk)),
            )
            for finding in self.findings
        ]
        table = report.Table(titles, rows, left=len(titles))
        return report.Report(self.title(), (self.summary(),), (table,)).html()

    def title(self) -> str:
        """Return one line about the machine and the process."""
        return f"Linux {self.kernel} {self.machine}, Python {self.python}, pid {self.pid}"

    def summary(self) -> str:
        """Return the number of findings in each state as one line."""
        return ", ".join(f"{count} {state}" for state, count in self.counts().items())

    def to_dict(self) -> dict[str, Any]:
        """Return all findings as JSON-compatible data; ``"schema"`` is the format version."""
        return {"schema": SCHEMA, **asdict(self), "counts": self.counts()}

    def to_json(self) -> str:
        """Return the JSON text that ``pyreserve doctor --json`` prints."""
        import json  # noqa: PLC0415

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
        path = f"{error.filename}: " if error.filename else ""
        return f"{path}{error.strerror or error}"
    if isinstance(error, KeyError):
        return f"the kernel does not report {error.args[0]}"
    return str(error)
