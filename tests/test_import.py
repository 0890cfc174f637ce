"""Importing the package: which modules it loads, and which names it has."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

import pyreserve
from helpers.witness import PATIENCE

# Slow modules of the standard library, which only reports, pictures and commands need.
SLOW = (
    "argparse",
    "ast",
    "dataclasses",
    "decimal",
    "dis",
    "email",
    "fractions",
    "importlib.metadata",
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "pathlib",
    "platform",
    "subprocess",
    "tempfile",
    "tokenize",
    "unittest",
    "urllib",
    "uuid",
)
OPTIONAL = ("click", "matplotlib", "numpy", "prometheus_client", "rich")
OF_PROCMEM = ("AddressSpace", "explain", "track")


# Named tuples load modules of their own, in Python 3.14 ast.
TYPING = "from typing import NamedTuple\nclass Record(NamedTuple):\n    field: int\n"


def loaded_by(statement: str, after: str = "") -> set[str]:
    """The modules that a statement adds to those of a fresh interpreter that ran `after`."""
    script = (
        f"{after}import sys; before = set(sys.modules)\n"
        f"{statement}\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(ended.stdout.split())


def type_checkers_imports() -> Iterator[tuple[str, str]]:
    """Module and name of each import that only type checkers execute."""
    tree = ast.parse(Path(pyreserve.__file__).read_text())
    for block in tree.body:
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING":
            for statement in block.body:
                if isinstance(statement, ast.ImportFrom):
                    for alias in statement.names:
                        yield str(statement.module), alias.name


class TestCost:
    def test_the_package_alone(self) -> None:
        """Importing pyreserve loads the exceptions and sizes: not typing, nor the C library."""
        loaded = loaded_by("import pyreserve")

        own = {"pyreserve", "pyreserve.errors", "pyreserve.units"}
        assert {name for name in loaded if name.startswith("pyreserve")} == own
        assert not loaded & {*SLOW, *OPTIONAL, "_cffi_backend", "importlib", "re", "typing"}

    def test_reserve_loads_no_container(self) -> None:
        """Importing `reserve` loads regions, but no allocator, arena or report."""
        loaded = loaded_by("from pyreserve import reserve", TYPING)

        assert "pyreserve._region.region" in loaded
        assert not any(name.startswith(("pyreserve._alloc", "pyreserve._arena")) for name in loaded)
        assert not loaded & {*SLOW, *OPTIONAL}

    @pytest.mark.parametrize("name", sorted(set(pyreserve.__all__) - {*OF_PROCMEM}))
    def test_no_name_loads_a_slow_module(self, name: str) -> None:
        """No name of the core loads a slow module of the standard library or an extra's."""
        assert not loaded_by(f"from pyreserve import {name}", TYPING) & {*SLOW, *OPTIONAL}


class TestNames:
    def test_each_is_the_one_that_type_checkers_see(self) -> None:
        """The name that is loaded at first use is the one of the import for type checkers."""
        imports = list(type_checkers_imports())

        assert len(imports) > 20
        for module, name in imports:
            value = getattr(pyreserve, name)
            home = __import__(module, fromlist=[name])
            assert value is getattr(home, name)
        assert {*pyreserve._HOMES, *pyreserve._MODULES} == {name for _, name in imports}

    def test_dir_has_public_names_only(self) -> None:
        """dir() lists `__all__`, the public modules and the version, whatever was loaded."""
        modules = {"costs", "doctor", "errors", "layouts", "procmem", "prometheus", "units"}

        assert set(dir(pyreserve)) == {*pyreserve.__all__, *modules, "__version__"}
        assert all(hasattr(pyreserve, name) for name in dir(pyreserve))

    def test_each_is_in_the_test_of_types(self) -> None:
        """The file that mypy checks as a user's code uses every name of `__all__`."""
        tree = ast.parse(Path(__file__).with_name("typing").joinpath("api.py").read_text())
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}

        assert set(pyreserve.__all__) <= used

    def test_a_star_imports_all(self) -> None:
        """``from pyreserve import *`` binds the names of `__all__`, and no other."""
        names: dict[str, object] = {}
        exec("from pyreserve import *", names)

        assert set(names) - {"__builtins__"} == set(pyreserve.__all__)

    def test_the_first_use_keeps_the_object(self) -> None:
        """A loaded name becomes an attribute of the module, which later uses find at once."""
        for name in pyreserve.__all__:
            assert getattr(pyreserve, name) is vars(pyreserve)[name]

    def test_an_unknown_name_is_an_attribute_error(self) -> None:
        """An unknown name raises AttributeError or ImportError, and is not remembered."""
        with pytest.raises(AttributeError, match="'pyreserve' has no attribute 'nothing'"):
            pyreserve.nothing  # type: ignore[attr-defined]  # noqa: B018
        with pytest.raises(ImportError, match="nothing"):
            exec("from pyreserve import nothing")
        assert "nothing" not in vars(pyreserve)


def run(script: str) -> str:
    """What a script prints in a fresh interpreter."""
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout


class TestFirstUse:
    def test_threads_get_the_same_objects(self) -> None:
        """Threads that use names for the first time at once all get the same objects."""
        printed = run(
            """
            import sys, threading
            import pyreserve

            sys.setswitchinterval(1e-6)
            names, barrier = pyreserve.__all__, threading.Barrier(8)
            results = []

            def use(start):
                barrier.wait()
                objects = {name: getattr(pyreserve, name) for name in names[start:] + names[:start]}
                results.append([id(objects[name]) for name in names])

            threads = [threading.Thread(target=use, args=(5 * i,)) for i in range(8)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(len(results), all(result == results[0] for result in results))
            """
        )

        assert printed == "8 True\n"

    @pytest.mark.parametrize("when", ["before", "after_in_parent", "after_in_child"])
    def test_an_at_fork_handler(self, when: str) -> None:
        """A handler that is called around a fork may be the first to use a name."""
        printed = run(
            f"""
            import os, warnings
            import pyreserve

            warnings.simplefilter("ignore", DeprecationWarning)

            def use():
                with pyreserve.reserve(1 << 20) as region, pyreserve.Arena(1 << 24) as arena:
                    region.commit()
                    arena.alloc(10).free()

            os.register_at_fork({when}=use)
            for _ in range(2):
                pid = os.fork()
                if pid == 0:
                    use()
                    os._exit(0)
                print(os.waitpid(pid, 0)[1])
            use()
            """
        )

        assert printed == "0\n0\n"

    def test_an_exit_handler(self) -> None:
        """A function that is called at exit may be the first to use a name."""
        printed = run(
            """
            import atexit
            import pyreserve

            @atexit.register
            def use():
                with pyreserve.Arena(1 << 24) as arena:
                    print(arena.alloc(10).nbytes)
            """
        )

        assert printed == "10\n"


class TestVersion:
    def test_it_is_the_installed_one(self) -> None:
        """`__version__` is the version of the installed distribution."""
        assert pyreserve.__version__ == version("pyreserve")

    def test_without_metadata(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without readable metadata `__version__` is "unknown"."""
        vars(pyreserve).pop("__version__", None)
        monkeypatch.setattr("pyreserve._system.extras.own_version", lambda: None)
        try:
            assert pyreserve.__version__ == "unknown"
        finally:
            vars(pyreserve).pop("__version__", None)
