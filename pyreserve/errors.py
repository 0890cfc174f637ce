"""What can go wrong. Each class is also the builtin that a caller would think of.

=====================  ====================  ====================================================
class                  also a                means
=====================  ====================  ====================================================
`VMError`              `OSError`             the kernel refused a verb; ``errno`` says how
`OutOfMemoryError`     `MemoryError`         ... because memory or addresses ran out
`RangeError`           `ValueError`          offsets, lengths or addresses that make no sense here
`ReleasedError`        `ValueError`          the object was released or closed
`FreeError`            `ValueError`          freed or closed already, or never allocated here
`ViewError`            `BufferError`         live views hold the bytes
`MapsError`            `ValueError`          files of /proc/PID, saved or not, that make no sense
`NoAddressSpaceError`  `ProcessLookupError`  no such process, a zombie, a kernel thread
`AccessError`          `PermissionError`     a process that this one may not look into
=====================  ====================  ====================================================
"""

import errno as _errno
from collections.abc import Callable


class PyreserveError(Exception):
    """The root of the others. Never raised itself."""


class VMError(PyreserveError, OSError):
    """The kernel refused a verb; what the region holds is as it was, unless the verb says more.

    Attributes:
        verb: ``"reserve"``, ``"commit"``, ...; ``"map"`` reserves and commits in one (str).
        nbytes: how many bytes were asked for (int).
        address: where, or None if anywhere would have done (int or None).
        limit: which limit refused, if it can be known: ``"RLIMIT_AS"``, ``"RLIMIT_DATA"``,
            ``"RLIMIT_MEMLOCK"``, ``"overcommit"``, ``"max_map_count"``, ``"mmap_min_addr"``,
            ``"address space"``, ``"layout"`` (an arena's own bounds); else None.
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
        """What was refused."""
        return self._verb

    @property
    def nbytes(self) -> int:
        """How many bytes were asked for."""
        return self._nbytes

    @property
    def address(self) -> int | None:
        """Where; None if anywhere would have done."""
        return self._address

    @property
    def limit(self) -> str | None:
        """Which limit refused; None if that is not known."""
        return self._limit

    @property
    def errno_name(self) -> str:
        """The symbol of ``errno``, such as ``"ENOMEM"``."""
        return _errno.errorcode.get(self.errno or 0, str(self.errno))


class OutOfMemoryError(VMError, MemoryError):
    """Memory or addresses ran out: a `VMError` that is a `MemoryError` too."""


class RangeError(PyreserveError, ValueError):
    """An offset, length, size or address that is outside, misaligned or not committed."""


class ReleasedError(PyreserveError, ValueError):
    """The region, bitmap, arena, pool or array was released or closed before."""


class FreeError(PyreserveError, ValueError):
    """A page, slot or block was freed or closed before, or never allocated. Nothing has changed."""


class ViewError(PyreserveError, BufferError):
    """Live views hold bytes that would become inaccessible; nothing has changed.

    The text names the bytes and the remedy. While the views live it also names, where Python can
    tell, the type of each holder and the addresses that it shows; the search keeps objects alive
    while it lasts.
    """

    def __init__(self, message: str, holders: Callable[[], list[str]] = list) -> None:
        super().__init__(message)
        self._holders = holders

    def __str__(self) -> str:
        try:
            found = ", ".join(self._holders())
        except Exception:  # whatever objects there are, an error has a text
            found = ""
        return f"{self.args[0]} (held by {found})" if found else str(self.args[0])

    def __reduce__(self) -> tuple[type["ViewError"], tuple[str]]:
        return type(self), (str(self),)


class MapsError(PyreserveError, ValueError):
    """What was read is not what /proc/PID/maps, smaps or another of its files would say."""


class NoAddressSpaceError(PyreserveError, ProcessLookupError):
    """There is no such process, or it has no memory of its own: a zombie or a kernel thread."""


class AccessError(PyreserveError, PermissionError):
    """This process may not look into that one (ptrace(2), "Ptrace access mode checking")."""
