"""GrowableBuffer: bytes that grow in place."""

import io
from operator import index as _index
from typing import TYPE_CHECKING, Any, SupportsIndex

from pyreserve._alloc.bufferfile import BufferFile
from pyreserve._region.arrays import converted, import_numpy
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve.units import as_bytes

if TYPE_CHECKING:
    import numpy as np


class GrowableBuffer(BufferFile):
    """A buffer of up to `capacity` bytes that grows in place; initially empty.

    Growing never invalidates a view, or moves a byte except as `drop_front` says; new bytes are
    zero. Bytes below the length are never decommitted, and bytes in a live view never cut off.

    Memory is committed ahead of the length: at first twice as much, in small pages, and above one
    huge page (2 MiB) an eighth more, at least 2 MiB and at most 64 MiB, in whole huge pages. What
    is committed ahead takes no memory until it is used, but in mode ``"charge"`` it is charged
    against the commit limit. If the kernel refuses, less is committed ahead, at last nothing.

    It has the methods of ``bytearray`` that move no bytes, and those of a binary file in memory
    such as ``io.BytesIO``. Slices, ``+`` and ``*`` give ``bytes``; ``+=`` and ``*=`` work in place.
    Iteration gives ints; an empty buffer is true, as a file is. From Python 3.12 on it exports the
    buffer protocol, and exported bytes stay committed as long as it lives; before, use `view`.

    Any thread may call it. A finaliser or signal handler that interrupts a call may get
    StateError, but never sees a half-done change.

    Args:
        capacity: bytes to reserve, or a size such as ``"1GiB"``: the maximum length. None: twice
            the machine's memory, at least 64 GiB; less on 32-bit systems, under RLIMIT_AS, and when
            other default capacities take many addresses: together at most a quarter of all.
        step: bytes to commit at a time, a multiple of the OS page; see
            `pyreserve.costs.measured_step`. Each commit then ends at an address that is a multiple
            of it; the first one is 64 KiB, unless huge pages are preferred. None: the growing steps
            described above.
        huge_pages: as for `pyreserve.reserve`. None: ``"prefer"`` if a huge page is at most 32 MiB
            and the capacity is larger than one, else small pages; with a `step`, ``"default"``.
            Without a `step`, the first 64 KiB are small pages in any case.
        mode, fork, name: as for `pyreserve.reserve`, whose exceptions apply too.

    Raises:
        RangeError: `capacity` is not positive, or `step` not a positive multiple of the OS page.
        ValueError: an unknown policy, or a string that is not a size.

    After `release` or `close`, everything raises `ReleasedError`, a ValueError.
    """

    def __init__(
        self,
        capacity: int | str | None = None,
        *,
        step: int | str | None = None,
        mode: Mode = "charge",
        fork: Fork = "copy",
        huge_pages: HugePages | None = None,
        name: str | None = None,
    ) -> None:
        size = None if capacity is None else as_bytes(capacity)
        self._wanted = size  # None: a copy has the default capacity of its machine
        super().__init__(size, step, mode, fork, huge_pages, name)

    def resize(self, length: int | str, *, zero: bool = True) -> None:
        """Set the length, to bytes or a size such as ``"1MiB"``; see `GrowableArray.resize`."""
        super().resize(as_bytes(length), zero=zero)

    def spare(self, n: int) -> memoryview:
        """Return a writable memoryview over the next `n` bytes, which are not part of it yet.

        `advance` makes the first of them part, without a copy: after ``recv_into``, for example.
        Their contents are undefined. Until `advance`, other calls that add bytes write to the same
        memory.

        Raises:
            RangeError: `n` is negative.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._spare_view, _index(n))

    def __buffer__(self, flags: int, /) -> memoryview:
        """Export the bytes as a buffer (PEP 688, Python 3.12); before, use `view`.

        The memory stays committed as long as this object lives, since a consumer may keep no more
        than a reference to it.
        """
        return self._exclusively(self._export)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> "np.ndarray[Any, Any]":
        """Return an ndarray of uint8 over `view`, or of another dtype: numpy's array protocol."""
        return converted(import_numpy("GrowableBuffer").asarray(self.view()), dtype, copy)

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        """Pickle as plain data: class, capacity, bytes, position. Protocol 5: bytes out of band."""
        data: Any = self[:] if _index(protocol) < 5 else _picklable(self.view(readonly=True))
        return _rebuild, (type(self), self._wanted, data, self.tell())

    def __copy__(self) -> "GrowableBuffer":
        """Return a buffer with the same capacity, bytes and position."""
        return _rebuild(type(self), self._wanted, self, self.tell())

    def __deepcopy__(self, memo: Any) -> "GrowableBuffer":
        """As `__copy__`."""
        return self.__copy__()

    def _spare_view(self, n: int) -> memoryview:
        offset = self._spare(n)
        return self._region.view(offset, n) if n else memoryview(bytearray())


io.BufferedIOBase.register(GrowableBuffer)


def _picklable(view: memoryview) -> Any:
    from pickle import PickleBuffer  # noqa: PLC0415  # only pickling needs it

    return PickleBuffer(view)


def _rebuild(
    kind: type[GrowableBuffer], capacity: int | None, data: Any, position: int
) -> GrowableBuffer:
    """Create a buffer from its pickled parts, without the constructor of a subclass."""
    buffer = kind.__new__(kind)
    GrowableBuffer.__init__(buffer, capacity)
    buffer.extend(data)
    buffer.seek(position)
    return buffer
