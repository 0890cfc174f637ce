"""BufferBytes: the methods that a GrowableBuffer shares with a bytearray."""

import sys
from collections.abc import Callable, Iterable, Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeVar, overload

from pyreserve._alloc import bytesearch
from pyreserve._alloc.bytesearch import compare
from pyreserve._alloc.growable import Growable, unwrapped
from pyreserve._region.handles import Buffer, from_buffer
from pyreserve.errors import RangeError

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


class BufferBytes(Growable):
    """Bytes that grow in place.

    The window is a memoryview. No variable holds a slice of it: a traceback would keep the slice,
    and so the memory, alive.
    """

    _noun, _unit = "buffer", "bytes"
    _position = 0  # of the file, in bytes; dropped bytes count

    # -- growing ------------------------------------------------------------------------------

    def append(self, byte: SupportsIndex) -> None:
        """Append one byte, an integer in [0, 256).

        Raises:
            TypeError, ValueError: `byte` is not such an integer.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        if type(byte) is int:
            with self._lock:
                if not self._busy:
                    n = self._count
                    self._busy = True
                    try:
                        self._window[n] = byte
                    except (IndexError, ValueError):  # no space, or not a byte: see below
                        pass
                    else:
                        self._count = n + 1
                        return
                    finally:
                        self._busy = False
                        if self._exports.released:  # closed by an interrupting call
                            self._finish_close()
        self._put(memoryview(bytes((byte,))), False)

    def extend(self, data: Any) -> None:
        """Append a copy of the bytes of a C-contiguous buffer, which may be a view of this one.

        An iterable of integers is appended too, after it is consumed.

        Raises:
            TypeError, ValueError: `data` is neither a buffer nor an iterable of integers in
                [0, 256).
            BufferError, ValueError: `data` is not contiguous.
            OutOfMemoryError, ReleasedError, StateError: as for `resize`.
        """
        if self._put_quickly(data, False) is None:
            self._put(_flat_or_ints(data), False)

    def __iadd__(self, data: Any) -> "Self":
        """Append the bytes of a buffer in place."""
        if self._put_quickly(data, False) is None:
            self._put(flat(data), False)
        return self

    def __imul__(self, times: SupportsIndex) -> "Self":
        """Repeat the bytes in place."""
        self._exclusively(self._repeat, _index(times))
        return self

    def pop(self) -> int:
        """Remove the last byte and return it.

        Raises:
            IndexError: the buffer is empty.
            ViewError: a live view shows the byte; nothing has changed.
            ReleasedError, StateError: as for `resize`.
        """
        return self._exclusively(self._pop)

    # -- reading and writing in place ---------------------------------------------------------

    def view(self, lo: int = 0, hi: int | None = None, *, readonly: bool = False) -> memoryview:
        """Return a memoryview of [lo, hi), by default of the whole current length.

        It keeps its length when the buffer grows. While it, or anything made from it, is alive, its
        bytes can't be cut off; see `pyreserve.Region.view`.

        Raises:
            RangeError: not ``0 <= lo <= hi <= len(buffer)``.
            ReleasedError, StateError: as for `resize`.
        """
        lo, hi = _index(lo), None if hi is None else _index(hi)
        return self._exclusively(self._view, lo, hi, bool(readonly))

    @overload
    def __getitem__(self, key: SupportsIndex) -> int: ...
    @overload
    def __getitem__(self, key: slice) -> bytes: ...
    def __getitem__(self, key: Any) -> Any:
        """Return a byte as an int, or a copy of a slice as bytes."""
        if type(key) is int and 0 <= key < self._count:
            try:
                return self._window[key]
            except IndexError:  # the window is closed
                pass
        return self._exclusively(self._get, _as_key(key))

    @overload
    def __setitem__(self, key: SupportsIndex, value: SupportsIndex) -> None: ...
    @overload
    def __setitem__(self, key: slice, value: Any) -> None: ...
    def __setitem__(self, key: Any, value: Any) -> None:
        """Set a byte, or a slice to bytes of the same length."""
        if type(key) is int and 0 <= key < self._count and type(value) is int:
            try:
                self._window[key] = value
            except (IndexError, ValueError):  # the window is closed, or not a byte
                pass
            else:
                return
        key = _as_key(key)
        if isinstance(key, int):
            self._exclusively(self._set, key, bytes((value,))[0])
            return
        with _flat_or_ints(value) as source:
            self._exclusively(self._set_slice, key, source)

    def __delitem__(self, key: Any) -> None:
        """Refuse: the bytes after them would have to move."""
        msg = "bytes can't be deleted from the middle of a buffer, as those after them never move: "
        raise TypeError(msg + "resize or pop removes the last ones, drop_front the first")

    def __iter__(self) -> Iterator[int]:
        """Iterate over the current bytes, as ints. An unfinished iterator pins them like a view."""
        return iter(self.view())

    def __bytes__(self) -> bytes:
        return self[:]

    def hex(self, *separator: Any) -> str:
        """Return the bytes as hexadecimal digits; arguments as for ``bytes.hex``."""
        return self._apply_exclusively(lambda view: view.hex(*separator))

    # -- searching ----------------------------------------------------------------------------

    def find(
        self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> int:
        """Return the lowest index of `sub`, bytes or an int, in [start, end); -1 if none.

        Like all searches, it copies pieces of at most 256 KiB, or twice the length of `sub`.
        """
        return self._search(bytesearch.find, _as_needle(sub), start, end)

    def rfind(
        self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> int:
        """Return the highest index of `sub`, bytes or an int, in [start, end); -1 if none."""
        return self._search(bytesearch.rfind, _as_needle(sub), start, end)

    def index(
        self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> int:
        """As `find`, but raise ValueError if there is none."""
        return _required(self.find(sub, start, end))

    def rindex(
        self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> int:
        """As `rfind`, but raise ValueError if there is none."""
        return _required(self.rfind(sub, start, end))

    def count(
        self, sub: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> int:
        """Return how often `sub`, bytes or an int, occurs in [start, end) without overlaps."""
        return self._search(bytesearch.count, _as_needle(sub), start, end)

    def startswith(
        self, prefix: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> bool:
        """Tell whether [start, end) starts with `prefix`, bytes or a tuple of them."""
        prefixes = prefix if isinstance(prefix, tuple) else (prefix,)
        return any(self._search(bytesearch.starts, flat(item), start, end) for item in prefixes)

    def endswith(
        self, suffix: Any, start: SupportsIndex | None = None, end: SupportsIndex | None = None
    ) -> bool:
        """Tell whether [start, end) ends with `suffix`, bytes or a tuple of them."""
        suffixes = suffix if isinstance(suffix, tuple) else (suffix,)
        return any(self._search(bytesearch.ends, flat(item), start, end) for item in suffixes)

    def __contains__(self, sub: Any) -> bool:
        """Tell whether `sub`, bytes or an int, occurs."""
        return self.find(sub) >= 0

    # -- operators ----------------------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        return self._compare(other, lambda a, b: len(a) == len(b) and not compare(a, b))

    def __lt__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: compare(a, b) < 0)

    def __le__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: compare(a, b) <= 0)

    def __gt__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: compare(a, b) > 0)

    def __ge__(self, other: Any) -> bool:
        return self._compare(other, lambda a, b: compare(a, b) >= 0)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Any) -> bytes:
        """Return the bytes of both, a copy."""
        return self._join(other, lambda own, others: b"".join((own, others)))

    def __radd__(self, other: Any) -> bytes:
        """Return the bytes of both, a copy."""
        return self._join(other, lambda own, others: b"".join((others, own)))

    def __mul__(self, times: SupportsIndex) -> bytes:
        """Return the bytes repeated, a copy."""
        return self[:] * times

    __rmul__ = __mul__

    # -- inside -------------------------------------------------------------------------------

    def _over(self, view: memoryview | None) -> Any:
        return memoryview(bytearray()) if view is None else view

    def _items(self) -> memoryview:
        """Return a window that shows all bytes, and more."""
        if self._window_length < self._count:
            self._make_space(self._count)
        return self._window  # type: ignore[no-any-return]

    def _apply(self, function: Callable[[memoryview], _T]) -> _T:
        """Call a function of a view of all bytes, inside `_exclusively`; return its result."""
        with self._items()[: self._count] as view:
            return function(view)

    def _apply_exclusively(self, function: Callable[[memoryview], _T]) -> _T:
        return self._exclusively(lambda: self._apply(function))

    def _put_quickly(self, data: Any, follow: bool) -> int | None:
        """As `_put`, for common types and committed memory. Return None if nothing was done."""
        kind = type(data)
        if kind is bytes or kind is bytearray or (kind is memoryview and data.c_contiguous):
            with self._lock:
                if not self._busy:
                    self._busy = True
                    try:
                        start = self._position - self._dropped if follow else self._count
                        end = start + len(data)
                        if start < end <= self._window_length and 0 <= start <= self._count:
                            dirty_end = self._front + end
                            if dirty_end > self._dirty_end:  # noqa: PLR1730  # faster than max()
                                self._dirty_end = dirty_end
                            self._window[start:end] = data
                            if end > self._count:  # noqa: PLR1730
                                self._count = end
                            if follow:
                                self._position = self._dropped + end
                            return end - start
                    # Not bytes in one dimension, or another thread has changed the length.
                    except (TypeError, ValueError, NotImplementedError):
                        pass
                    finally:
                        self._busy = False
                        if self._exports.released:  # closed by an interrupting call
                            self._finish_close()
        return None

    def _put(self, source: memoryview, follow: bool) -> int:
        """Write bytes at the end, or with `follow` at the position, which moves past them.

        Return their number. Release `source`.
        """
        with source:
            nbytes = self._put_quickly(source, follow)
            return self._exclusively(self._place, source, follow) if nbytes is None else nbytes

    def _place(self, source: memoryview, follow: bool) -> int:
        nbytes = len(source)
        if nbytes:
            start = self._tell() if follow else self._count
            end = start + nbytes
            self._make_space(end)
            self._zero_up_to(start)
            self._dirty_end = max(self._dirty_end, self._offset(end))
            self._window[start:end] = source
            self._count = max(self._count, end)
            if follow:
                self._position = self._dropped + end
        return nbytes

    def _tell(self) -> int:
        """Return the position of the file, in bytes from the front."""
        return max(self._position - self._dropped, 0)

    def _repeat(self, times: int) -> None:
        length, end = self._count, self._count * max(times, 0)
        if end < length:
            self._truncate(end)
            return
        self._make_space(end)
        self._dirty_end = max(self._dirty_end, self._offset(end))
        filled = length
        while filled < end:
            more = min(filled, end - filled)
            self._window[filled : filled + more] = self._window[:more]
            filled += more
        self._count = end

    def _pop(self) -> int:
        if not self._count:
            msg = "pop from an empty buffer"
            raise IndexError(msg)
        byte: int = self._items()[self._count - 1]
        self._truncate(self._count - 1)
        return byte

    def _view(self, lo: int, hi: int | None, readonly: bool) -> memoryview:
        hi = self._count if hi is None else hi
        if not 0 <= lo <= hi <= self._count:
            msg = f"view must satisfy 0 <= lo <= hi <= {self._count}, got [{lo}, {hi})"
            raise RangeError(msg)
        if lo < hi:
            return self._region.view(self._offset(lo), hi - lo, readonly=readonly)
        return memoryview(b"" if readonly else bytearray())

    def _get(self, key: "int | slice") -> Any:
        if isinstance(key, slice):
            return bytes(self._items()[: self._count][key])
        return self._items()[self._as_index(key)]

    def _set(self, key: int, byte: int) -> None:
        self._items()[self._as_index(key)] = byte

    def _set_slice(self, key: slice, source: memoryview) -> None:
        length = len(range(*key.indices(self._count)))
        if length != len(source):
            msg = (
                f"cannot assign {len(source)} bytes to a slice of {length}: the bytes after it "
                f"never move; use extend, append or resize to change the length"
            )
            raise ValueError(msg)
        self._items()[: self._count][key] = source

    def _as_index(self, key: int) -> int:
        if not -self._count <= key < self._count:
            msg = f"index must be in [{-self._count}, {self._count}), got {key}"
            raise IndexError(msg)
        return key % self._count

    def _search(
        self,
        function: Callable[[memoryview, memoryview, int, int], _T],
        needle: memoryview,
        start: SupportsIndex | None,
        end: SupportsIndex | None,
    ) -> _T:
        with needle:
            low = 0 if start is None else _index(start)
            high = sys.maxsize if end is None else _index(end)
            return self._apply_exclusively(
                lambda view: function(view, needle, *_as_bounds(low, high, len(view)))
            )

    def _compare(self, other: Any, test: Callable[[memoryview, memoryview], bool]) -> bool:
        try:
            source = flat(other)
        except (TypeError, ValueError, BufferError):
            return NotImplemented  # type: ignore[no-any-return]
        with source:
            return self._apply_exclusively(lambda view: test(view, source))

    def _join(self, other: Any, join: Callable[[memoryview, memoryview], bytes]) -> bytes:
        try:
            source = flat(other)
        except TypeError:
            return NotImplemented  # type: ignore[no-any-return]
        with source:
            return self._apply_exclusively(lambda view: join(view, source))


def flat(data: Any, *, writable: bool = False) -> memoryview:
    """Return the bytes of a C-contiguous buffer. Releasing the memoryview releases the buffer.

    Raises:
        TypeError: `data` is not a buffer.
        BufferError, ValueError: it is not contiguous, or not writable.
    """
    if isinstance(data, BufferBytes):  # an export as a buffer would pin the bytes
        return data.view()
    data = unwrapped(data)
    if not writable and (type(data) is bytes or type(data) is bytearray):
        return memoryview(data)
    if sys.version_info < (3, 12) and hasattr(type(data), "__buffer__"):
        data = data.__buffer__(0)  # as Python 3.12 does
    try:
        view = memoryview(data).cast("B")
        if not writable or not view.readonly:
            return view
    except TypeError:  # no buffer, not contiguous, empty, or items of no C type
        pass
    return memoryview(Buffer(from_buffer(memoryview(data), require_writable=writable)))


def _flat_or_ints(data: "Any | Iterable[SupportsIndex]") -> memoryview:
    """As `flat`, or a copy of an iterable of integers in [0, 256)."""
    try:
        return flat(data)
    except TypeError:
        if isinstance(data, str) or not hasattr(data, "__iter__"):
            raise
    return memoryview(bytes(iter(data)))


def _as_needle(sub: Any) -> memoryview:
    if not isinstance(sub, int):
        try:
            return flat(sub)
        except TypeError:
            if not hasattr(sub, "__index__"):
                raise
    return memoryview(bytes((sub,)))


def _as_key(key: Any) -> "int | slice":
    if not isinstance(key, slice):
        return _index(key)
    ends = (None if end is None else _index(end) for end in (key.start, key.stop, key.step))
    return slice(*ends)


def _as_bounds(start: int, end: int, length: int) -> tuple[int, int]:
    """Return `start` and `end` counted from the front. As in ``bytes``, start may exceed end."""
    low = max(start + length, 0) if start < 0 else start
    high = max(end + length, 0) if end < 0 else min(end, length)
    return low, high


def _required(at: int) -> int:
    if at < 0:
        msg = "subsection not found"
        raise ValueError(msg)
    return at
