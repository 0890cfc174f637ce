"""Numpy's operators and protocols for an object with an ndarray in its attribute `array`."""

import operator
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyreserve._alloc.growable import unwrapped

_BINARY = (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "lshift", "rshift",
    "and_", "or_", "xor",
)  # fmt: skip
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_UNARY = ("neg", "pos", "abs", "invert")


def _method(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"Apply {name} to `array`, as numpy does."
    return function


def _binary(op: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: op(self.array, other)


def _reflected(op: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    return lambda self, other: op(other, self.array)


def _in_place(op: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        array = self.array
        result = op(array, other)
        # Another result: `other` opted out of numpy's operators and handled the operation itself.
        return self if result is array else result

    return method


def _unary(op: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda self: op(self.array)


def _divmod(self: Any, other: Any) -> Any:
    return divmod(self.array, other)


def _rdivmod(self: Any, other: Any) -> Any:
    return divmod(other, self.array)


def _methods() -> dict[str, Any]:
    methods: dict[str, Any] = {"__divmod__": _divmod, "__rdivmod__": _rdivmod, "__hash__": None}
    for word in _BINARY:
        name = word.strip("_")
        methods[f"__{name}__"] = _binary(getattr(operator, word))
        methods[f"__r{name}__"] = _reflected(getattr(operator, word))
        methods[f"__i{name}__"] = _in_place(getattr(operator, f"i{name}"))
    for name in _COMPARISONS:
        methods[f"__{name}__"] = _binary(getattr(operator, name))
    for name in _UNARY:
        methods[f"__{name}__"] = _unary(getattr(operator, name))
    return {
        name: method if method is None else _method(name, method)
        for name, method in methods.items()
    }


if TYPE_CHECKING:
    from numpy.lib.mixins import NDArrayOperatorsMixin

    class ArrayOperators(NDArrayOperatorsMixin):
        """The operators."""

else:
    # numpy's own mixin would import numpy together with this package.
    ArrayOperators = type("ArrayOperators", (), {"__slots__": (), **_methods()})


class ArrayProtocols(ArrayOperators):
    """The operators, ufuncs, DLPack and pyarrow's protocol on `array`."""

    __slots__ = ()

    @property
    def array(self) -> Any:
        """An ndarray."""
        raise NotImplementedError

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Apply a ufunc to `array`: numpy's protocol for operands and for ``out=``."""
        out = options.get("out")
        options = {name: _as_operand(option) for name, option in options.items()}  # out, where
        result = getattr(ufunc, method)(*map(_as_operand, inputs), **options)
        if not isinstance(out, tuple):
            return result
        made = result if len(out) > 1 else (result,)
        results = tuple(m if o is None else o for m, o in zip(made, out, strict=True))
        return results if len(results) > 1 else results[0]

    def __dlpack__(self, **options: Any) -> Any:
        """Export `array` by DLPack. The capsule keeps the items alive."""
        array: Any = self.array
        return array.__dlpack__(**options)

    def __arrow_array__(self, type: Any = None) -> Any:  # noqa: A002  the protocol's name
        """Return a pyarrow array of the same memory, or a copy for another `type`."""
        pyarrow: Any = sys.modules["pyarrow"]  # the caller
        return pyarrow.array(self.array, type=type)

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return DLPack's name of the device: (1, 0), the CPU."""
        return (1, 0)


def _as_operand(value: Any) -> Any:
    return tuple(map(_as_operand, value)) if isinstance(value, tuple) else unwrapped(value)
