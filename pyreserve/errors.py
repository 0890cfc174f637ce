"""Exceptions. Each class is also the builtin exception that a caller would expect.

=====================  ====================  ====================================================
class                  also a                means
=====================  ====================  ====================================================
`VMError`              `OSError`             the kernel refused a verb; ``errno`` says how
`OutOfMemoryError`     `MemoryError`         ... because memory or addresses ran out
`RangeError`           `ValueError`          an invalid offset, length, size or address
`ReleasedError`        `ValueError`          the object is released or closed
`FreeError`            `ValueError`          already freed or closed, or never allocated here
`StateError`           `RuntimeError`        the object's state does not allow the call
`ViewError`            `BufferError`         live views show the bytes
`MapsError`            `ValueError`          malformed text of /proc/PID files, live or saved
`NoAddressSpaceError`  `ProcessLookupError`  no such process, a zombie, a kernel thread
`AccessError`          `PermissionError`     no permission to read the process's memory
=====================  ====================  ====================================================
"""

import errno as _errno
from collections.abc import Callable


class PyreserveError(Exception):
    """Base class of all exceptions here; never raised itself."""


class VMError(PyreserveError, OSError):
    """The kernel refused a verb. The object is unchanged unless the verb documents otherwise.

    Attributes:
        verb: ``"reserve"``, ``"commit"``, ...; ``"map"`` reserves and commits in one call (str).
        nbytes: the number of bytes requested (int).
        address: the address requested; None for any address (int or None).
        limit: the limit that refused, if known: ``"RLIMIT_AS"``, ``"RLIMIT_DATA"``,
            ``"RLIMIT_MEMLOCK"``, ``"overcommit"``, ``"max_map_count"``, ``"mmap_min_addr"``,
            ``"address space"``, ``"capacity"`` (the object is full), ``"layout"`` (the bounds of a
            Go layout); of shared regions also ``"RLIMIT_FSIZE"``, ``"RLIMIT_NOFILE"``,
            ``"cgroup limit"`` and ``"memory"``; else None.
    """

    def __init__(  # OSError takes its errno from the first two arguments
        self,
        errno: int,
        message: str,
        *,
        verb: str = "",
        nbytes: int = 0,
        address: int | None = None,
        limit: str | None = None,
    ) -> None:
        super().__init__(errno, message)
        self._verb, self._nbytes, self._address, self._limit = verb, nbytes, address, limit

    @property
    def verb(self) -> str:
        """The verb that was refused."""
        return self._verb

    @property
    def nbytes(self) -> int:
        """The number of bytes requested."""
        return self._nbytes

    @property
    def address(self) -> int | None:
        """The address requested; None for any address."""
        return self._address

    @property
    def limit(self) -> str | None:
        """The limit that refused; None if not known."""
        return self._limit

    @property
    def errno_name(self) -> str:
        """The symbolic name of ``errno``, such as ``"ENOMEM"``."""
        return _errno.errorcode.get(self.errno or 0, str(self.errno))


class OutOfMemoryError(VMError, MemoryError):
    """Memory or addresses ran out: a `VMError` that is also a `MemoryError`."""


class RangeError(PyreserveError, ValueError):
    """An offset, length, size or address is out of range, misaligned or not committed."""


class ReleasedError(PyreserveError, ValueError):
    """The region, bitmap, arena, pool or array is released or closed."""


class FreeError(PyreserveError, ValueError):
    """A page, slot or block is already freed or closed, or was never allocated.

    Nothing has changed.
    """


class StateError(PyreserveError, RuntimeError):
    """The object is in a state that does not allow the call; nothing has changed.

    It is part of an arena or another object, a page is already in use, or a finaliser or signal
    handler made the call inside another call on the same object.
    """


class ViewError(PyreserveError, BufferError):
    """Live views show bytes that would become inaccessible; nothing has changed.

    The message names the bytes and the remedy. ``str()`` of the exception also names the type of
    each object that holds a view and the addresses it shows, as far as Python can find them while
    the views are alive. The search keeps objects alive until it ends.
    """

    def __init__(self, message: str, holders: Callable[[], list[str]] = list) -> None:
        super().__init__(message)
        self._holders = holders

    def __str__(self) -> str:
        try:
            holders = ", ".join(self._holders())
        except Exception:  # a foreign object that fails must not hide this error
            holders = ""
        return f"{self.args[0]} (held by {holders})" if holders else str(self.args[0])

    def __reduce__(self) -> tuple[type["ViewError"], tuple[str]]:
        return type(self), (str(self),)


class MapsError(PyreserveError, ValueError):
    """The text is not in the format of /proc/PID/maps, smaps or another file of /proc/PID."""


class NoAddressSpaceError(PyreserveError, ProcessLookupError):
    """No such process, or one without user memory: a zombie or a kernel thread."""


class AccessError(PyreserveError, PermissionError):
    """No permission to read the memory map of a process.

    See ptrace(2), "Ptrace access mode checking".
    """
