"""The mappings of a process as columns: the safe face of ``csrc/procmaps``."""

import errno
from bisect import bisect_left
from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyreserve._native import ffi, lib
from pyreserve._system.cached import lazily
from pyreserve.errors import MapsError

_COLUMNS: int = lib.PROCMAPS_COLUMNS
_CHUNK, _SMALL_CHUNK = 1 << 16, 1 << 13
_KEPT = 16  # rows that a mapping which was printed later may take the place of
_LINE_MOST = 1 << 24  # bytes of a line: no path is that long

ROW_BYTES = 8 * _COLUMNS
"""How much memory a mapping takes in a table."""

READ: int = lib.PROCMAPS_READ
WRITE: int = lib.PROCMAPS_WRITE
EXECUTE: int = lib.PROCMAPS_EXECUTE
SHARED: int = lib.PROCMAPS_SHARED
_codes = ffi.string(lib.procmaps_flags()).decode()
FLAGS: dict[str, int] = {_codes[2 * i : 2 * i + 2]: 1 << i for i in range(len(_codes) // 2)}
"""The bit of each code of VmFlags (proc(5)) in the column ``flags``."""


def written(text: str) -> str:
    r"""Write bytes that are no UTF-8 (PEP 383) as ``\xNN``, which every reader of JSON takes."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


class Readable(Protocol):
    """A file to read from, such as what ``open(path, "rb", buffering=0)`` or gzip makes."""

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill the buffer as far as is at hand; 0 at the end."""


class Sums(NamedTuple):
    """What a process's mappings are in sum, in bytes, and how many there are."""

    size: int
    reserved: int
    committed: int
    mappings: int


class _Column:
    """A column as a list, made when it is first asked for and then an attribute of its own."""

    def __init__(self, which: int) -> None:
        self._which = which

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, table: "MapTable", owner: type) -> list[int]:
        values = table.__dict__[self._name] = table._column(self._which)
        return values


class MapTable:
    """What /proc/PID/maps or /proc/PID/smaps says, in address order. Sizes in KiB.

    Each attribute but ``names`` is a list with an integer for every mapping: ``start``, ``end`` and
    ``offset`` in bytes, ``perms`` the or-ed `READ`, `WRITE`, `EXECUTE`, `SHARED`, ``device`` (major
    << 32 | minor), ``flags`` (see `FLAGS`), and the figures of smaps. They are made when first
    asked for; ``size``, ``private``, ``shared`` and ``rest`` after `divide`.
    """

    def __init__(self) -> None:
        self._table = ffi.gc(ffi.new("struct procmaps *"), lib.procmaps_free)

    @classmethod
    def read(cls, file: Readable) -> "MapTable":
        """Read a file to its end.

        Raises:
            MapsError: it is neither maps nor smaps; or memory ran out, a MemoryError then.
            OSError: it can't be read.
        """
        table = cls()
        table._read(file, _CHUNK)
        return table

    @classmethod
    def sums(cls, file: Readable) -> Sums:
        """Add up a file without keeping it: a few KiB are enough, however many mappings there are.

        Raises:
            MapsError, OSError: see `read`.
        """
        table, sums = cls(), ffi.new("struct procmaps_sums *")
        table._read(file, _SMALL_CHUNK, lambda: lib.procmaps_sum(table._table, _KEPT, sums))
        lib.procmaps_sum(table._table, 0, sums)
        return Sums(sums.size, sums.reserved, sums.committed, sums.count)

    def _read(
        self, file: Readable, chunk: int, after_each: Callable[[], None] | None = None
    ) -> None:
        buffer = bytearray(chunk)
        filled = 0
        while True:
            if filled == len(buffer):  # one line has no end yet
                if filled >= _LINE_MOST:
                    msg = f"line {self._table.lines + 1} never ends"
                    raise MapsError(msg)
                buffer.extend(bytes(len(buffer)))
            with memoryview(buffer) as room:
                got = file.readinto(room[filled:])
            if not got:
                break
            if not 0 < got <= len(buffer) - filled:
                msg = f"readinto says {got} bytes"
                raise OSError(errno.EIO, msg)
            filled += got
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
            msg = f"line {self._table.lines} is not of /proc/PID/maps or /proc/PID/smaps"
            raise MapsError(msg)
        return int(used[0])

    def count_pages(self, pagemap: int, *, forked: bool) -> None:
        """Count what is in memory by the /proc/PID/pagemap open at a descriptor; `csrc/procmaps.h`.

        Raises:
            OSError: the kernel refused.
            MapsError: see `divide`, which is done too.
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
        """Fill ``size``, ``private``, ``shared`` and ``rest``.

        Raises:
            MapsError: a mapping has more in memory and swap than it has addresses.
        """
        wrong = ffi.new("size_t *")
        if lib.procmaps_divide(self._table, wrong):
            msg = f"the mapping at {self.start[wrong[0]]:x} has more memory than addresses"
            raise MapsError(msg)

    def __len__(self) -> int:
        return int(self._table.count)

    def _column(self, which: int) -> list[int]:
        count = int(self._table.count)
        if not count:
            return []
        words = memoryview(ffi.buffer(self._table.rows, count * _COLUMNS * 8)).cast("B").cast("Q")
        column: list[int] = words[which::_COLUMNS].tolist()
        return column

    @lazily
    def named(self) -> list[tuple[int, str]]:
        """The mappings that have a name, and what it is as the kernel prints it.

        Bytes that are not UTF-8 are there as PEP 383 has them.
        """
        at, length = self._column(lib.PROCMAPS_NAME), self._column(lib.PROCMAPS_NAME_LENGTH)
        text = bytes(ffi.buffer(self._table.names, self._table.names_length))
        kept: dict[tuple[int, int], str] = {}
        found = []
        for i in [i for i, size in enumerate(length) if size]:
            place = (at[i], length[i])
            name = kept.get(place)
            if name is None:
                name = text[at[i] : at[i] + length[i]].decode(errors="surrogateescape")
                kept[place] = name
            found.append((i, name))
        return found

    @lazily
    def names(self) -> list[str]:
        """The name of each mapping, "" for none; see `named`."""
        found = [""] * len(self)
        for i, name in self.named:
            found[i] = name
        return found

    @lazily
    def of_process(self) -> int:
        """How many mappings are the process's: all but ``[vsyscall]`` at the end.

        That is the kernel's own, in the upper half of the addresses, and not in VmSize.
        """
        return bisect_left(self.start, 1 << 63)

    @lazily
    def knows_flags(self) -> bool:
        """Whether VmFlags are known: a kernel prints some for every mapping."""
        return any(self.flags)

    start = _Column(lib.PROCMAPS_START)
    end = _Column(lib.PROCMAPS_END)
    perms = _Column(lib.PROCMAPS_PERMS)
    offset = _Column(lib.PROCMAPS_OFFSET)
    device = _Column(lib.PROCMAPS_DEVICE)
    inode = _Column(lib.PROCMAPS_INODE)
    flags = _Column(lib.PROCMAPS_FLAGS)
    rss = _Column(lib.PROCMAPS_RSS)
    pss = _Column(lib.PROCMAPS_PSS)
    swap = _Column(lib.PROCMAPS_SWAP)
    private_dirty = _Column(lib.PROCMAPS_PRIVATE_DIRTY)
    shared_dirty = _Column(lib.PROCMAPS_SHARED_DIRTY)
    private_hugetlb = _Column(lib.PROCMAPS_PRIVATE_HUGETLB)
    shared_hugetlb = _Column(lib.PROCMAPS_SHARED_HUGETLB)
    anonymous = _Column(lib.PROCMAPS_ANONYMOUS)
    lazy_free = _Column(lib.PROCMAPS_LAZY_FREE)
    anon_huge = _Column(lib.PROCMAPS_ANON_HUGE)
    shmem_huge = _Column(lib.PROCMAPS_SHMEM_HUGE)
    file_huge = _Column(lib.PROCMAPS_FILE_HUGE)
    locked = _Column(lib.PROCMAPS_LOCKED)
    size = _Column(lib.PROCMAPS_SIZE)
    private = _Column(lib.PROCMAPS_PRIVATE)
    shared = _Column(lib.PROCMAPS_SHARED_MEMORY)
    rest = _Column(lib.PROCMAPS_REST)
