"""Runs the code blocks of a Markdown document against the kernel, in the order in which they stand.

``python -m helpers.documents FILE`` runs blocks marked ``python`` in one namespace and blocks
marked ``sh`` with bash, all in the working directory. A block marked ``text`` right after one of
them is its output, in which ``...`` stands for anything. Other blocks are illustrations.
"""

import doctest
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sybil import Document, Example, Sybil
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

LANGUAGES = ("python", "sh", "text")
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_run_python = PythonEvaluator()
# Between a block and its output; an HTML comment may stand there.
_BETWEEN = re.compile(r"\s*(<!--.*?-->\s*)*", re.DOTALL)


@contextmanager
def _output_to(file: int) -> Iterator[None]:
    """Let this process and its children write their standard output to a file."""
    sys.stdout.flush()
    before = os.dup(1)
    os.dup2(file, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(before, 1)
        os.close(before)


class Outputs:
    """Evaluates the blocks of one document and remembers what the last one printed."""

    def __init__(self) -> None:
        self._printed: str | None = None
        self._end = 0

    def python(self, example: Example) -> None:
        """Execute a block in the namespace of its document."""
        self._capture(example, lambda: _run_python(example))

    def sh(self, example: Example) -> None:
        """Run a block with bash; a failing command or an unset variable fails it."""
        command = ["bash", "-euo", "pipefail", "-c", example.parsed]
        self._capture(example, lambda: subprocess.run(command, check=True))

    def text(self, example: Example) -> str | None:
        """Compare a block with what the block right before it printed."""
        between = example.document.text[self._end : example.start]
        if self._printed is None or not _BETWEEN.fullmatch(between):
            return "there is no python or sh block right before this output"
        wanted, printed = str(example.parsed), self._printed
        if doctest.OutputChecker().check_output(wanted, printed, _FLAGS):
            return None
        return f"wanted:\n{wanted}\nprinted:\n{printed}"

    def _capture(self, example: Example, run: Callable[[], object]) -> None:
        with tempfile.TemporaryFile("w+") as file:
            with _output_to(file.fileno()):
                run()
            file.seek(0)
            self._printed = file.read()
        self._end = example.end


def parse(path: Path, languages: tuple[str, ...] = LANGUAGES) -> Document:
    """Read a document; its examples are the blocks marked with one of `languages`."""
    outputs = Outputs()
    parsers = [CodeBlockParser(language, getattr(outputs, language)) for language in languages]
    document = Sybil(parsers).parse(path)
    document.namespace["__name__"] = "__main__"
    return document


def main() -> None:
    """Run the document that is named first, and only blocks of the languages named after it."""
    path, *languages = sys.argv[1:]
    for example in parse(Path(path), tuple(languages) or LANGUAGES):
        example.evaluate()


if __name__ == "__main__":
    main()
