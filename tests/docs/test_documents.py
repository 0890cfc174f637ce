"""Every code block of the README and of the documentation runs, and prints what it says."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from helpers.documents import LANGUAGES, parse
from helpers.witness import PATIENCE

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# The README's shell commands install the package and run the tests: CI runs them apart.
LANGUAGES_OF = {README: ("python",)}
NEEDS_DASK = ROOT / "docs" / "how-to" / "compare-machines.md"


def _languages(path: Path) -> tuple[str, ...]:
    return LANGUAGES_OF.get(path, LANGUAGES)


DOCUMENTS = [path for path in (README, *PAGES) if list(parse(path, _languages(path)))]


def _named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _run(path: Path, *languages: str, cwd: Path) -> "subprocess.CompletedProcess[str]":
    binaries = str(Path(sys.executable).parent)
    return subprocess.run(
        [sys.executable, "-m", "helpers.documents", str(path), *languages],
        cwd=cwd,
        env={
            **os.environ,
            "PYTHONPATH": str(TESTS),
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "COLUMNS": "80",
            "MPLBACKEND": "agg",
        },
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )


def test_there_are_pages() -> None:
    """The checkout that is tested has the documentation beside the tests."""
    assert README.is_file()
    assert ROOT / "docs" / "index.md" in PAGES
    assert README in DOCUMENTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=_named)
def test_blocks_run(path: Path, tmp_path: Path) -> None:
    """The blocks of a document run one after the other and print what stands below them."""
    if path == NEEDS_DASK and find_spec("distributed") is None:
        pytest.skip("Dask (extra dask) is not installed")
    result = _run(path, *_languages(path), cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("*.md")), *PAGES], ids=_named)
def test_relative_links_lead_to_files(page: Path) -> None:
    """A relative link of a page leads to a file of the repository, as on a code host."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("```python\nraise KeyError('planted')\n```\n", "planted"),
        ("```sh\nfalse; true\n```\n", "CalledProcessError"),
        ("```python\nprint(1)\n```\n\n```text\n2\n```\n", "wanted:\n2"),
        ("```python\nprint(1)\n```\n\nprose\n\n```text\n1\n```\n", "right before"),
    ],
    ids=["python", "sh", "text", "text alone"],
)
def test_a_wrong_block_fails(block: str, message: str, tmp_path: Path) -> None:
    """A block that raises, exits non-zero or prints something else is reported."""
    page = tmp_path / "page.md"
    page.write_text(block)
    result = _run(page, cwd=tmp_path)
    assert result.returncode != 0
    assert message in result.stderr


def test_output_may_have_gaps(tmp_path: Path) -> None:
    """Three dots stand for any text, and an HTML comment may precede an output."""
    page = tmp_path / "page.md"
    page.write_text("```sh\necho a b c\n```\n\n<!-- comment -->\n\n```text\na ... c\n```\n")
    assert _run(page, cwd=tmp_path).returncode == 0
