"""What people try with the containers that grow: every row of docs/reference/natural-uses.md."""

from pathlib import Path
from typing import Any

import pytest

from helpers.natural_uses import USES, Refusal, Use, page, run

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "natural-uses.md"


def _named(use: Use) -> str:
    return use.code.replace("\n", "; ")


def _parameter(use: Use) -> Any:
    return pytest.param(use, id=_named(use), marks=[pytest.mark.interop] if use.peers else [])


@pytest.mark.parametrize("use", [_parameter(use) for use in USES])
def test_use(use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A natural use works, or is refused for the reason that the page gives."""
    for library in use.peers:
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)
    result = ("works", "")
    try:
        run(use)
    except Exception as error:
        if use.expected is None:
            raise
        result = (type(error).__name__, str(error))
    expected = use.expected or Refusal("works", "")
    assert result[0] == expected.exception, result
    assert expected.message in result[1]


def test_there_are_many() -> None:
    """The table has at least 64 rows, all different."""
    assert len({use.code for use in USES}) == len(USES) >= 64


def test_the_page_is_up_to_date() -> None:
    """The page is what ``python -m helpers.natural_uses`` prints in tests/."""
    assert PAGE.read_text() == page()
