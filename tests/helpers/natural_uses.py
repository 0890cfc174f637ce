"""What people try with a container that grows: code, what holds afterwards, and what refuses it.

``python -m helpers.natural_uses`` prints docs/reference/natural-uses.md from these tables, and
tests/alloc/test_natural_uses.py runs them.
"""

import ast
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from helpers.cpython_failures import FAILURES
from helpers.natural_use_tables import LIBRARIES, PEERS, TABLES

PREPARED = """\
import io, os
import numpy as np
from pyreserve import GrowableArray, GrowableBuffer, MiB

g = GrowableArray("f8")
g.extend(range(10))
r = GrowableArray("f4", item_shape=(3,))
r.extend(np.arange(12).reshape(4, 3))
b = GrowableBuffer()
b.extend(b"hello, world")
"""

INTRODUCTION = """\
# Natural uses

What people try with a `GrowableArray` and a `GrowableBuffer`, and what happens. Of {count} uses,
{now} work on Python 3.12 and later and {before} on 3.10 and 3.11. The others raise the exception
shown. "Without a copy" is said where the test compares addresses. Each row runs with fresh copies
of these containers:

```python
{prepared}```

The tests run the rows on Python 3.10 to 3.14, those with pyarrow, pandas, polars and numba on 3.10
and 3.13. PyTorch is too large for continuous integration: its two rows run where it is installed,
last with 2.13 on 3.11.

The last column is empty where 3.10 and 3.11 give the same result. It differs where Python reads the
container through the buffer protocol, which a class written in Python can offer from 3.12 on
([PEP 688](https://peps.python.org/pep-0688/)).
"""


CPYTHON = """
## CPython's own tests

The tests that CPython has for BytesIO (test_memoryio), bytearray (test_bytes) and list (list_tests)
run with a GrowableBuffer and a GrowableArray in their place. Tests that make none are not counted.

| tests of | pass on 3.10.13 | pass on 3.13.0 |
|---|---|---|
| BytesIO | 28 of 37 | 29 of 39 |
| bytearray | 35 of 64 | 35 of 64 |
| list | 12 of 40 | 12 of 41 |

All failures have one of these reasons; not every Python has every test.

| tests of | reason of the failures | tests |
|---|---|---|
"""


@dataclass(frozen=True)
class Refusal:
    """An exception: the name of its class, a part of its message, and what to do instead."""

    exception: str
    message: str
    instead: str = ""  # what to do, for readers

    def __str__(self) -> str:
        return f"`{self.exception}`: {self.message}. {self.instead}".rstrip(" .") + "."


@dataclass(frozen=True)
class Use:
    """A row: code to run, an expression that is then true, and the refusals."""

    group: str
    code: str
    check: str
    refused: Refusal | None = None
    before_312: Refusal | None = None
    libraries: tuple[str, ...] = field(default=())

    @property
    def shares(self) -> bool:
        """Whether the check tests that the result is the container's memory."""
        signs = ("np.shares_memory(_", "== g.base", "== b.base")
        return any(sign in self.check for sign in signs) and f"not {signs[0]}" not in self.check

    @property
    def peers(self) -> tuple[str, ...]:
        """The libraries that may be missing."""
        return tuple(name for name in self.libraries if name in PEERS.values())

    @property
    def expected(self) -> Refusal | None:
        """The refusal on this Python."""
        if sys.version_info < (3, 12) and self.before_312:
            return self.before_312
        return self.refused


def _uses() -> Iterator[Use]:
    for group, rows in TABLES.items():
        for code, check, *refusals in rows:
            refused, before = (
                Refusal(*pair) if pair else None for pair in (*refusals, None, None)[:2]
            )
            names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
            libraries = tuple(LIBRARIES[name] for name in sorted(names & set(LIBRARIES)))
            yield Use(group, code, check, refused, before, libraries)


USES = tuple(_uses())


def run(use: Use) -> None:
    """Run the code of a row, and check what holds afterwards.

    Raises:
        ImportError: a library is missing.
        AssertionError: the check is false.
        Exception: whatever the code raises.
    """
    space: dict[str, Any] = {}
    exec(PREPARED, space)
    for name, library in LIBRARIES.items():
        if library in use.libraries:
            space[name] = importlib.import_module(library)
    body = ast.parse(use.code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "<use>", "exec"), space)
    if isinstance(last, ast.Expr):
        space["_"] = eval(compile(ast.Expression(last.value), "<use>", "eval"), space)
    assert eval(use.check or "True", space), f"not true: {use.check}; _ is {space.get('_')!r}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    """Return the text of docs/reference/natural-uses.md."""
    now = sum(use.refused is None for use in USES)
    earlier = sum(use.refused is None and use.before_312 is None for use in USES)
    parts = [
        INTRODUCTION.format(prepared=PREPARED, count=len(USES), now=now, before=earlier),
    ]
    for group in TABLES:
        parts.append(f"\n## {group}\n\n| use | result | on 3.10 and 3.11 |\n|---|---|---|\n")
        for use in USES:
            if use.group == group:
                result = str(use.refused or ("works, without a copy" if use.shares else "works"))
                before = f"`{old.exception}`. {old.instead}" if (old := use.before_312) else ""
                code = "<br>".join(f"`{_cell(line)}`" for line in use.code.splitlines())
                parts.append(f"| {code} | {_cell(result)} | {_cell(before)} |\n")
    parts.append(CPYTHON)
    for suite, reasons in FAILURES.items():
        for reason, tests in reasons.items():
            names = ", ".join(test.removeprefix("test_") for test in tests)
            parts.append(f"| {suite} | {_cell(reason)} | {names} |\n")
    return "".join(parts)


if __name__ == "__main__":
    sys.stdout.write(page())
