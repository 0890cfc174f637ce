"""Attributes that are made when they are first asked for."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

Made = TypeVar("Made")


class lazily(Generic[Made]):  # noqa: N801 - it decorates
    """Like `functools.cached_property`, without a lock.

    Before Python 3.12 that one has a lock for all objects of a class: a child forked while another
    thread held it would wait for ever. Two threads that ask at once make the same value twice.
    """

    def __init__(self, make: Callable[[Any], Made]) -> None:
        self._make = make
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, thing: None, owner: type) -> "lazily[Made]": ...
    @overload
    def __get__(self, thing: object, owner: type) -> Made: ...

    def __get__(self, thing: object, owner: type) -> "lazily[Made] | Made":
        if thing is None:
            return self
        value: Made = self._make(thing)
        vars(thing)[self._name] = value
        return value
