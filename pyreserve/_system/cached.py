"""Lazy attributes, computed at first access."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Value = TypeVar("Value")


class lazily(Generic[Value]):  # noqa: N801 - a decorator
    """Like `functools.cached_property`, but without a lock.

    Before Python 3.12 `cached_property` has one lock for all objects of a class: a child forked
    while another thread holds it deadlocks. Two threads that read the attribute at the same time
    compute the value twice.
    """

    def __init__(self, compute: Callable[[Any], Value]) -> None:
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> "lazily[Value]": ...
    @overload
    def __get__(self, instance: object, owner: type) -> Value: ...

    def __get__(self, instance: object, owner: type) -> "lazily[Value] | Value":
        if instance is None:
            return self
        value: Value = self._compute(instance)
        vars(instance)[self._name] = value
        return value
