"""BufferFile: the methods that a GrowableBuffer shares with a binary file in memory."""

import io
from collections.abc import Iterable
from operator import index as _index
from typing import Any, NoReturn

from pyreserve._alloc import bytesearch
from pyreserve._alloc.bufferbytes import BufferBytes, flat
from pyreserve.errors import RangeError

_SHORT_LINE = 256  # bytes


class BufferFile(BufferBytes):
    """A binary file in memory that grows in place, with a position, like ``io.BytesIO``.

    All methods raise `ReleasedError`, a ValueError, after `close`; and StateError as for `resize`.
    """

    # -- writing ------------------------------------------------------------------------------

    def write(self, data: Any) -> int:
        """Write all bytes of a C-contiguous buffer at the position; return their number.

        The position moves past them. Bytes between the length and a position above it become zero.

        Raises:
            TypeError: `data` is not a buffer.
            BufferError, ValueError: `data` is not contiguous.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        nbytes = self._put_quickly(data, True)
        return self._put(flat(data), True) if nbytes is None else nbytes

    def writelines(self, lines: Iterable[Any]) -> None:
        """Write each buffer of an iterable."""
        self._check_open()
        for line in lines:
            self.write(line)

    def truncate(self, size: int | None = None) -> int:
        """Cut off the bytes from `size` on, by default from the position; never extend.

        The position stays. Return `size`.

        Raises:
            RangeError: `size` is negative.
            ViewError: live views show bytes to be cut off; nothing has changed.
        """
        return self._exclusively(self._truncate_file, None if size is None else _index(size))

    # -- reading ------------------------------------------------------------------------------

    def read(self, size: int | None = -1) -> bytes:
        """Return up to `size` bytes from the position; all if `size` is negative or None."""
        return self._exclusively(self._read, _as_size(size))

    def read1(self, size: int | None = -1) -> bytes:
        """As `read`."""
        return self.read(size)

    def readinto(self, target: Any) -> int:
        """Read into a writable buffer from the position; return the number of bytes read."""
        with flat(target, writable=True) as writable:
            return self._exclusively(self._read_into, writable)

    def readinto1(self, target: Any) -> int:
        """As `readinto`."""
        return self.readinto(target)

    def readline(self, size: int | None = -1) -> bytes:
        r"""Return the bytes from the position through the next ``b"\n"``, at most `size`."""
        return self._exclusively(self._read_line, _as_size(size))

    def readlines(self, hint: int | None = -1) -> list[bytes]:
        """Return the lines from the position on; stop once they have `hint` bytes in all."""
        left = _as_size(hint)
        lines = []
        while line := self.readline():
            lines.append(line)
            if 0 < left <= len(line):
                break
            left -= len(line) if left > 0 else 0
        return lines

    def getvalue(self) -> bytes:
        """Return a copy of all bytes."""
        return self[:]

    def getbuffer(self) -> memoryview:
        """Return `view` of all bytes. Unlike a ``BytesIO``, the file may still grow."""
        return self.view()

    # -- the position -------------------------------------------------------------------------

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position from the start (0), itself (1) or the end (2), and return it.

        Raises:
            RangeError: `offset` from the start is negative, or `whence` is another number.
        """
        return self._exclusively(self._seek, _index(offset), _index(whence))

    def tell(self) -> int:
        """Return the position."""
        self._check_open()
        return self._tell()

    def __bool__(self) -> bool:
        """Return True, also when empty: zipfile takes a false file for a missing one."""
        return True

    # -- what it can do -----------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it is released or closed."""
        return self.released

    def readable(self) -> bool:
        """Return True."""
        return self._true_if_open()

    def writable(self) -> bool:
        """Return True."""
        return self._true_if_open()

    def seekable(self) -> bool:
        """Return True."""
        return self._true_if_open()

    def isatty(self) -> bool:
        """Return False."""
        self._check_open()
        return False

    def flush(self) -> None:
        """Do nothing: all written bytes are in memory."""
        self._check_open()

    def fileno(self) -> NoReturn:
        """Raise ``io.UnsupportedOperation``: the bytes have no file descriptor."""
        self._check_open()
        msg = "fileno: a buffer in memory has no file descriptor"
        raise io.UnsupportedOperation(msg)

    def detach(self) -> NoReturn:
        """Raise ``io.UnsupportedOperation``: there is no underlying file."""
        self._check_open()
        msg = "detach: a buffer in memory has no underlying file"
        raise io.UnsupportedOperation(msg)

    # -- inside -------------------------------------------------------------------------------

    def _true_if_open(self) -> bool:
        self._check_open()
        return True

    def _truncate_file(self, size: int | None) -> int:
        size = self._tell() if size is None else size
        if size < 0:
            msg = f"size must not be negative, got {size}"
            raise RangeError(msg)
        if size < self._count:
            self._truncate(size)
        return size

    def _next(self, size: int) -> tuple[int, int]:
        """Return the range of the next `size` bytes; all if `size` is negative."""
        start = self._tell()
        end = self._count if size < 0 else min(start + size, self._count)
        return start, max(start, end)

    def _read(self, size: int) -> bytes:
        start, end = self._next(size)
        data = bytes(self._items()[start:end])
        self._position = self._dropped + end
        return data

    def _read_into(self, target: memoryview) -> int:
        start, end = self._next(len(target))
        target[: end - start] = self._items()[start:end]
        self._position = self._dropped + end
        return end - start

    def _read_line(self, size: int) -> bytes:
        start, end = self._next(size)
        # Most lines are short.
        newline = bytes(self._items()[start : min(start + _SHORT_LINE, end)]).find(b"\n")
        if newline >= 0:
            return self._read(newline + 1)
        newline = self._apply(lambda view: bytesearch.find(view, b"\n", start, end))
        return self._read((newline + 1 if newline >= 0 else end) - start)

    def _seek(self, offset: int, whence: int) -> int:
        if whence not in (io.SEEK_SET, io.SEEK_CUR, io.SEEK_END):
            msg = f"whence must be 0, 1 or 2, got {whence}"
            raise RangeError(msg)
        if whence == io.SEEK_SET and offset < 0:
            msg = f"offset from the start must not be negative, got {offset}"
            raise RangeError(msg)
        start = (0, self._tell(), self._count)[whence]
        position = max(start + offset, 0)
        self._position = self._dropped + position
        return position


def _as_size(size: int | None) -> int:
    return -1 if size is None else _index(size)
