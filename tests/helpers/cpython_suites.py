"""Runs CPython's own tests of BytesIO, bytearray and list with the containers that grow.

``python -m helpers.cpython_suites SUITE`` prints JSON: how many tests passed, and the message of
each failure. Only tests that make a container count: others say nothing about it. The tests come
from the interpreter's ``test`` package, which some distributions leave out.
"""

import importlib
import json
import sys
import unittest
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np

from pyreserve import GrowableArray, GrowableBuffer


class _Counted:
    """Counts how often a class was made into an object."""

    made: ClassVar[list[str]] = []


class BytesIOLike(GrowableBuffer):
    """A GrowableBuffer that takes the argument of BytesIO."""

    def __init__(self, initial_bytes: Any = b"") -> None:
        _Counted.made.append("BytesIO")
        super().__init__()
        if initial_bytes is not None:
            self.extend(initial_bytes)


class BytearrayLike(GrowableBuffer):
    """A GrowableBuffer that takes the arguments of bytearray."""

    def __init__(self, *source: Any, **options: Any) -> None:
        _Counted.made.append("bytearray")
        super().__init__()
        self.extend(bytearray(*source, **options))


class ListLike(GrowableArray[Any]):
    """A GrowableArray of float64 that takes the argument of list, and is compared as a whole."""

    def __init__(self, items: Iterable[Any] = ()) -> None:
        _Counted.made.append("list")
        super().__init__("f8")
        self.extend(items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (ListLike, np.ndarray, list)) and np.array_equal(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None  # type: ignore[assignment]


# Module, test case, and what it calls the type under test.
SUITES: dict[str, tuple[str, str, dict[str, type]]] = {
    "BytesIO": ("test.test_memoryio", "CBytesIOTest", {"ioclass": BytesIOLike}),
    "bytearray": ("test.test_bytes", "ByteArrayTest", {"type2test": BytearrayLike}),
    "list": ("test.list_tests", "CommonTest", {"type2test": ListLike}),
}


class _Result(unittest.TestResult):
    def __init__(self) -> None:
        super().__init__()
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}
        self._before = 0

    @staticmethod
    def _name(test: Any) -> str:
        return str(test.id().rsplit(".", 1)[-1])

    def startTest(self, test: unittest.TestCase) -> None:  # noqa: N802
        super().startTest(test)
        self._before = len(_Counted.made)

    def addSuccess(self, test: unittest.TestCase) -> None:  # noqa: N802
        if len(_Counted.made) > self._before:
            self.passed.append(self._name(test))

    def _fail(self, test: Any, error: Any) -> None:
        if len(_Counted.made) > self._before:
            case = getattr(test, "test_case", test)
            self.failed.setdefault(self._name(case), f"{error[0].__name__}: {error[1]}"[:300])

    def addFailure(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        self._fail(test, err)

    def addError(self, test: unittest.TestCase, err: Any) -> None:  # noqa: N802
        self._fail(test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:  # noqa: N802
        if err is not None:
            self._fail(test, err)


def run(suite: str) -> dict[str, Any]:
    """Run a suite; return the names of the tests that passed, and messages of failures by name.

    Raises:
        ImportError: the interpreter has no ``test`` package.
    """
    module, case, attributes = SUITES[suite]
    base: type = getattr(importlib.import_module(module), case)
    adapted: Any = type(f"Adapted{case}", (base, unittest.TestCase), attributes)
    result = _Result()
    unittest.TestLoader().loadTestsFromTestCase(adapted).run(result)
    return {"passed": sorted(result.passed), "failed": result.failed}


if __name__ == "__main__":
    try:
        json.dump(run(sys.argv[1]), sys.stdout, indent=1)
    except ImportError as missing:
        json.dump({"missing": str(missing)}, sys.stdout)
