"""The installed package is imported wherever the script is."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = "import pyreserve; pyreserve.reserve(1 << 30).release(); print(pyreserve.__file__)"


def ended(folder: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a folder, from which a script given by ``-c`` can import."""
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("how", ["-c", "file"])
def test_a_script_beside_a_clone(how: str, tmp_path: Path) -> None:
    """A folder with the package's name, such as a clone, is not imported as the package."""
    clone = tmp_path / "pyreserve"
    (clone / "pyreserve").mkdir(parents=True)
    (clone / "pyreserve/__init__.py").touch()
    (tmp_path / "script.py").write_text(SCRIPT)

    done = ended(tmp_path, *(("-c", SCRIPT) if how == "-c" else (tmp_path / "script.py",)))

    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(done.stdout.strip()).is_relative_to(tmp_path)


def test_python_in_the_checkout() -> None:
    """Python started in the checkout imports the package, installed or not."""
    done = ended(Path(__file__).parent.parent, "-c", SCRIPT)

    assert (done.returncode, done.stderr) == (0, "")
