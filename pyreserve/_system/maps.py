"""The mappings of a process as columns: the Python interface of ``csrc/procmaps``.

All texts of /proc/PID/maps and smaps are parsed here, for `pyreserve._system.proc` too.
"""

import errno
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyreserve._native import ffi, lib
from pyreserve._system.cached import lazily
from pyreserve.errors import MapsError

_COLUMNS: int = lib.PROCMAPS_COLUMNS
_CHUNK, _SMALL_CHUNK = 1 << 16, 1 << 13
_KEPT_ROWS = 16  # last rows, which a mapping printed later may replace (csrc/procmaps.h)
_MAX_LINE = 1 << 24  # bytes; no path is that long

ROW_BYTES = 8 * _COLUMNS
"""Bytes that a table needs for each mapping."""

READ: int = lib.PROCMAPS_READ
WRITE: int = lib.PROCMAPS_WRITE
EXECUTE: int = lib.PROCMAPS_EXECUTE
SHARED: int = lib.PROCMAPS_SHARED
_codes = ffi.string(lib.procmaps_flags()).decode()
FLAGS: dict[str, int] = {_codes[2 * i : 2 * i + 2]: 1 << i for i in range(len(_codes) // 2)}
"""The bit of each code of VmFlags (proc(5)) in the column ``flags``."""


_PERMS_TEXTS = [
    ("r" if perms & READ else "-")
    + ("w" if perms & WRITE else "-")
    + ("x" if perms & EXECUTE else "-")
    + ("s" if perms & SHARED else "p")
    for perms in range(READ + WRITE + EXECUTE + SHARED + 1)
]


def perms_text(perms: int) -> str:
    """Return permissions as /proc/PID/maps has them, such as ``"rw-p"``."""
    return _PERMS_TEXTS[perms]


def escape_invalid_utf8(text: str) -> str:
    r"""Write surrogate-escaped bytes (PEP 383) as ``\xNN``: JSON has no lone surrogates."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Readable(Protocol):
    """A binary file, such as ``open(path, "rb", buffering=0)`` or a gzip file."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Read available bytes into the buffer; return their number, 0 at the end."""


class Sums(NamedTuple):
    """Sums over a process's mappings in bytes, and the number of mappings."""

    size: int
    reserved: int
    committed: int
    mappings: int


def _column(index: int) -> lazily[list[int]]:
    """Return the lazy attribute for a column of C."""

    def compute(table: "MapTable") -> list[int]:
        return table.column(index)

    return lazily(compute)


class MapTable:
    """The contents of /proc/PID/maps or /proc/PID/smaps, in address order. Sizes in KiB.

    Each attribute except ``names`` is a list with one integer per mapping: ``start``, ``end`` and
    ``offset`` in bytes, ``perms`` the or-ed `READ`, `WRITE`, `EXECUTE`, `SHARED`, ``device`` (major
    << 32 | minor), ``flags`` (see `FLAGS`), and the figures of smaps. Lists are built at first
    access; ``size``, ``private``, ``shared`` and ``rest`` are valid after `divide`.
    """

    def __init__(self) -> None:
        self._table = ffi.gc(ffi.new("struct procmaps *"), lib.procmaps_free)

    @classmethod
    def read(cls, file: Readable) -> "MapTable":
        """Read a file to its end.

        Raises:
            MapsError: the file is neither maps nor smaps.
            MemoryError: the table does not fit in memory.
            OSError: the file can't be read.
        """
        table = cls()
        table._read(file, _CHUNK)
        return table

    @classmethod
    def sums(cls, file: Readable) -> Sums:
        """Add up a file in a few KiB of memory, however many mappings it has.

        Raises:
            MapsError, MemoryError, OSError: see `read`.
        """
        table, sums = cls(), ffi.new("struct procmaps_sums *")
        table._read(file, _SMALL_CHUNK, lambda: lib.procmaps_sum(table._table, _KEPT_ROWS, sums))
        lib.procmaps_sum(table._table, 0, sums)
        return Sums(sums.size, sums.reserved, sums.committed, sums.count)

    def _read(
        self, file: Readable, chunk: int, after_each: Callable[[], None] | None = None
    ) -> None:
        buffer = bytearray(chunk)
        filled = 0
        while True:
            if filled == len(buffer):  # a line longer than the buffer
                if filled >= _MAX_LINE:
                    msg = f"line {self._table.lines + 1} is longer than {_MAX_LINE:,} bytes"
                    raise MapsError(msg)
                buffer.extend(bytes(len(buffer)))
            with memoryview(buffer) as view:
                nbytes = file.readinto(view[filled:])
            if not nbytes:
                break
            if not 0 < nbytes <= len(buffer) - filled:
                msg = f"readinto returned {nbytes} bytes"
                raise OSError(errno.EIO, msg)
            filled += nbytes
            used = self._feed(buffer, filled)
            buffer[: filled - used] = buffer[used:filled]
            filled -= used
            if after_each is not None:
                after_each()
        if filled:
            self._feed(bytes(buffer[:filled]) + b"\n", filled + 1)

    def _feed(self, text: bytes | bytearray, length: int) -> int:
        used = ffi.new("size_t *")
        err = lib.procmaps_feed(self._table, ffi.from_buffer(text), length, used)
        if err == errno.ENOMEM:
            raise MemoryError
        if err:
            msg = f"line {self._table.lines} is not in the format of /proc/PID/maps or smaps"
            raise MapsError(msg)
        return int(used[0])

    def count_pages(self, pagemap: int, *, forked: bool) -> None:
        """Count resident and swapped pages by PAGEMAP_SCAN, then `divide`; see `csrc/procmaps.h`.

        Args:
            pagemap: descriptor of the open /proc/PID/pagemap.
            forked: anonymous pages may be shared with a forked process: ask for each of them.

        Raises:
            OSError: the kernel refused.
            MapsError: see `divide`.
        """
        err = lib.procmaps_count_pages(self._table, pagemap, forked)
        if err:
            raise OSError(err, "PAGEMAP_SCAN refused")
        self._forget_columns()
        self.divide()

    def _forget_columns(self) -> None:
        for name in [name for name in self.__dict__ if not name.startswith("_")]:
            del self.__dict__[name]

    def divide(self) -> None:
        """Compute ``size``, ``private``, ``shared`` and ``rest``.

        Raises:
            MapsError: a mapping has more bytes in memory and swap than addresses.
        """
        wrong = ffi.new("size_t *")
        if lib.procmaps_divide(self._table, wrong):
            msg = f"the mapping at {self.start[wrong[0]]:x} has more memory than addresses"
            raise MapsError(msg)

    def __len__(self) -> int:
        return int(self._table.count)

    def column(self, index: int) -> list[int]:
        """Return a column by its number in ``enum procmaps_column``."""
        count = int(self._table.count)
        if not count:
            return []
        words = memoryview(ffi.buffer(self._table.rows, count * _COLUMNS * 8)).cast("B").cast("Q")
        column: list[int] = words[index::_COLUMNS].tolist()
        return column

    @lazily
    def named(self) -> list[tuple[int, str]]:
        """Index and name, as the kernel prints it, of each mapping that has a name.

        Bytes that are not UTF-8 are surrogate-escaped (PEP 383).
        """
        start, length = self.column(lib.PROCMAPS_NAME), self.column(lib.PROCMAPS_NAME_LENGTH)
        text = bytes(ffi.buffer(self._table.names, self._table.names_length))
        decoded: dict[tuple[int, int], str] = {}
        named = []
        for i in [i for i, size in enumerate(length) if size]:
            place = (start[i], length[i])
            name = decoded.get(place)
            if name is None:
                name = text[start[i] : start[i] + length[i]].decode(errors="surrogateescape")
                decoded[place] = name
            named.append((i, name))
        return named

    @lazily
    def names(self) -> list[str]:
        """The name of each mapping, "" if it has none; see `named`."""
        names = [""] * len(self)
        for i, name in self.named:
            names[i] = name
        return names

    @lazily
    def user_mappings(self) -> int:
        """Number of mappings in user space: all except ``[vsyscall]``, the last one.

        ``[vsyscall]`` is in the kernel's half of the addresses and not counted in VmSize.
        """
        return bisect_left(self.start, 1 << 63)

    @lazily
    def knows_flags(self) -> bool:
        """Whether VmFlags were read: the kernel prints at least one for every mapping."""
        return any(self.flags)

    def mapping_at(self, address: int) -> int | None:
        """Return the mapping that contains an address, or None."""
        i = bisect_right(self.start, address) - 1
        return i if i >= 0 and address < self.end[i] else None

    def mappings_in(self, low: int, high: int) -> range:
        """Return the mappings that overlap [low, high)."""
        first = last = bisect_right(self.end, low)
        while last < len(self.start) and self.start[last] < high:
            last += 1
        return range(first, last)

    def mapping_after(self, i: int) -> int | None:
        """Return the mapping that begins where this one ends, or None."""
        j = i + 1
        return j if j < len(self.start) and self.start[j] == self.end[i] else None

    start = _column(lib.PROCMAPS_START)
    end = _column(lib.PROCMAPS_END)
    perms = _column(lib.PROCMAPS_PERMS)
    offset = _column(lib.PROCMAPS_OFFSET)
    device = _column(lib.PROCMAPS_DEVICE)
    inode = _column(lib.PROCMAPS_INODE)
    flags = _column(lib.PROCMAPS_FLAGS)
    rss = _column(lib.PROCMAPS_RSS)
    pss = _column(lib.PROCMAPS_PSS)
    swap = _column(lib.PROCMAPS_SWAP)
    private_dirty = _column(lib.PROCMAPS_PRIVATE_DIRTY)
    shared_dirty = _column(lib.PROCMAPS_SHARED_DIRTY)
    private_hugetlb = _column(lib.PROCMAPS_PRIVATE_HUGETLB)
    shared_hugetlb = _column(lib.PROCMAPS_SHARED_HUGETLB)
    anonymous = _column(lib.PROCMAPS_ANONYMOUS)
    lazy_free = _column(lib.PROCMAPS_LAZY_FREE)
    anon_huge = _column(lib.PROCMAPS_ANON_HUGE)
    shmem_huge = _column(lib.PROCMAPS_SHMEM_HUGE)
    file_huge = _column(lib.PROCMAPS_FILE_HUGE)
    locked = _column(lib.PROCMAPS_LOCKED)
    size = _column(lib.PROCMAPS_SIZE)
    private = _column(lib.PROCMAPS_PRIVATE)
    shared = _column(lib.PROCMAPS_SHARED_MEMORY)
    rest = _column(lib.PROCMAPS_REST)
