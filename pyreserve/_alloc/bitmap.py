"""A bitmap in a reservation of its own: 2**40 bits cost nothing until some are set."""

from collections.abc import Iterator
from contextlib import ExitStack
from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn, overload

from pyreserve._native import ffi, lib
from pyreserve._region.region import reserve
from pyreserve._system.limits import refusal
from pyreserve.errors import RangeError, ReleasedError

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

_WORD = 64
_RUNS_AT_ONCE = 256

_set = lib.lazybitmap_set
_clear = lib.lazybitmap_clear
_test = lib.lazybitmap_test
_count = lib.lazybitmap_count
_find = lib.lazybitmap_find


class Bitmap:
    """`nbits` bits, all clear at first, in words that are committed where a bit was ever set.

    Ranges are half-open, ``[start, stop)``, with ``0 <= start <= stop <= nbits``; a `stop` of None
    means `nbits` (for `set` and `clear`: one bit). Reading, clearing and searching commit nothing.
    Bit i is bit ``i % 8`` of byte ``i // 8`` (little-endian bit order).

    Each method is atomic against the others when threads share a bitmap.

    Raises (all methods):
        RangeError: a range that is not inside the bitmap (IndexError from ``[]``).
        ReleasedError: the bitmap was released or closed.
        OutOfMemoryError: words could not be committed; no bit has changed.
        TypeError: something that is not an integer.
    """

    __slots__ = ("_handle", "_lock", "_nbits", "_region")

    def __init__(self, nbits: int, *, name: str | None = None) -> None:
        """Make a bitmap of `nbits` (positive) clear bits; `name` as for `pyreserve.reserve`."""
        nbits = _index(nbits)
        if nbits <= 0:
            msg = f"a bitmap has a positive number of bits, not {nbits}"
            raise RangeError(msg)
        self._nbits = nbits
        self._region = reserve((nbits + 7) // 8, name=name)
        self._handle = self._region._handle
        self._lock = self._region._make_lock()

    @property
    def nbits(self) -> int:
        """How many bits there are."""
        return self._nbits

    # -- bits and ranges ----------------------------------------------------------------------

    def set(self, start: int, stop: int | None = None) -> int:
        """Set the range; return how many bits changed."""
        return self._change(_set, start, stop)

    def clear(self, start: int, stop: int | None = None) -> int:
        """Clear the range; return how many bits changed."""
        return self._change(_clear, start, stop)

    def test(self, index: int) -> bool:
        """Tell whether a bit is set."""
        start, _ = self._range(index, _index(index) + 1)
        with self._lock:
            self._alive()
            return bool(_test(self._handle, start))

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """Count the set bits of the range."""
        start, stop = self._range(start, stop)
        with self._lock:
            self._alive()
            return int(_count(self._handle, start, stop))

    def any(self, start: int = 0, stop: int | None = None) -> bool:
        """Tell whether some bit of the range is set."""
        return self._search(start, stop, 1, value=True) is not None

    def all(self, start: int = 0, stop: int | None = None) -> bool:
        """Tell whether every bit of the range is set."""
        return self._search(start, stop, 1, value=False) is None

    def find_set(self, run: int = 1, start: int = 0) -> int | None:
        """Find the first `run` (positive) set neighbours from `start` on; None if none."""
        return self._search(start, None, run, value=True)

    def find_clear(self, run: int = 1, start: int = 0) -> int | None:
        """Find the first `run` (positive) clear neighbours from `start` on; None if none."""
        return self._search(start, None, run, value=False)

    def runs(
        self, start: int = 0, stop: int | None = None, *, value: bool = True
    ) -> Iterator[tuple[int, int]]:
        """Iterate over the runs of set bits (clear ones if not `value`) as (start, stop).

        Sees changes made meanwhile, except in the few hundred runs that it is ahead.
        """
        at, end = self._range(start, stop)
        return self._iterate_runs(at, end, bool(value))

    # -- whole bitmaps ------------------------------------------------------------------------

    def __iand__(self, other: "Bitmap") -> "Self":
        return self._combine(other, lib.BITMAP_AND)

    def __ior__(self, other: "Bitmap") -> "Self":
        return self._combine(other, lib.BITMAP_OR)

    def __ixor__(self, other: "Bitmap") -> "Self":
        return self._combine(other, lib.BITMAP_XOR)

    def __isub__(self, other: "Bitmap") -> "Self":
        return self._combine(other, lib.BITMAP_ANDNOT)

    def andnot(self, other: "Bitmap") -> None:
        """Clear every bit that is set in `other`, a Bitmap of as many bits: ``self -= other``."""
        if self._combine(other, lib.BITMAP_ANDNOT) is NotImplemented:
            msg = f"andnot takes a Bitmap, not {type(other).__name__}"
            raise TypeError(msg)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self._nbits != other._nbits:
            self._alive()
            other._alive()
            return False
        with self._both_locked(other):
            return bool(lib.lazybitmap_equal(self._handle, other._handle, self._nbits))

    __hash__ = None  # type: ignore[assignment]  # its contents change

    def copy(self) -> "Bitmap":
        """Return a bitmap of its own with the same bits."""
        return self[:]

    def to_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return the range as bytes, bit `start` lowest; unused bits of the last byte are clear."""
        start, stop = self._range(start, stop)
        out = bytearray((stop - start + 7) // 8)
        with self._lock:
            self._alive()
            if out:
                lib.lazybitmap_read(self._handle, start, stop, ffi.from_buffer(out))
        return bytes(out)

    @classmethod
    def from_bytes(cls, data: "Buffer", nbits: int | None = None) -> "Self":
        """Make a bitmap of the bits of bytes-like `data`, the first `nbits` of them if given."""
        bytes_ = memoryview(data).cast("B")
        nbits = 8 * len(bytes_) if nbits is None else _index(nbits)
        if nbits > 8 * len(bytes_):
            msg = f"{len(bytes_)} bytes have no {nbits} bits"
            raise RangeError(msg)
        made = cls(nbits)
        err = lib.lazybitmap_write(made._handle, 0, nbits, ffi.from_buffer(bytes_))
        if err < 0:
            made._refused(err, 0, nbits)
        return made

    def words(
        self, start: int = 0, stop: int | None = None, *, readonly: bool = False
    ) -> memoryview:
        """Return a zero-copy view of committed words, 64 bits an item (format ``"Q"``).

        `start` is a multiple of 64 bits, and so is `stop` unless it is the end; the bits above
        `nbits` in the last word mean nothing. The bitmap can't be released while the view lives.
        ``bitarray(buffer=bitmap.words(), endian="little")`` reads it.

        Raises:
            RangeError: also if a word of the range is not committed (`committed_runs` tells).
        """
        start, stop = self._range(start, stop)
        if start % _WORD or (stop % _WORD and stop != self._nbits) or start == stop:
            msg = f"[{start}, {stop}) is not a range of whole {_WORD}-bit words"
            raise RangeError(msg)
        nbytes = -(-(stop - start) // _WORD) * 8
        return self._region.view(start // 8, nbytes, readonly=readonly).cast("Q")

    def committed_runs(self) -> list[tuple[int, int]]:
        """List the ranges of bits whose words are committed as (start, stop)."""
        return [
            (8 * offset, min(8 * (offset + length), self._nbits))
            for offset, length in self._region.committed_runs()
        ]

    @property
    def committed(self) -> int:
        """How many bytes of words are committed."""
        return self._region.committed

    @property
    def released(self) -> bool:
        """Whether the bitmap was released or closed."""
        return self._region.released

    def release(self) -> None:
        """Give the words and their addresses back.

        Raises:
            ViewError: live views from `words` hold some of them.
            ReleasedError: it was released or closed.
        """
        self._region.release()

    def close(self) -> None:
        """Refuse new use; release the words with the last view of them. See `Region.close`."""
        self._region.close()

    # -- Python's protocols -------------------------------------------------------------------

    def __len__(self) -> int:
        return self._nbits

    @overload
    def __getitem__(self, key: int) -> bool: ...
    @overload
    def __getitem__(self, key: slice) -> "Bitmap": ...
    def __getitem__(self, key: int | slice) -> "bool | Bitmap":
        """``bitmap[i]`` is a bool, ``bitmap[a:b:step]`` a new Bitmap (of at least one bit)."""
        if not isinstance(key, slice):
            return self.test(self._item(key))
        start, step, n = self._slice(key)
        if n == 0:
            msg = "a bitmap has at least one bit, and this slice has none"
            raise RangeError(msg)
        made = Bitmap(n)
        with self._lock:
            self._alive()
            low, stride, reverse = _ascending(start, step, n)
            err = lib.lazybitmap_copy(made._handle, 0, self._handle, low, stride, n, reverse)
        if err < 0:
            made._refused(err, 0, n)
        return made

    def __setitem__(self, key: int | slice, value: "bool | Bitmap") -> None:
        """``bitmap[i] = bool``, ``bitmap[a:b:step] = bool``, ``bitmap[a:b] = Bitmap`` as long."""
        self._alive()
        if not isinstance(key, slice):
            start, step, n = self._item(key), 1, 1
        else:
            start, step, n = self._slice(key)
        if isinstance(value, Bitmap):
            self._replace(start, step, n, value)
        elif value not in (0, 1):
            msg = f"bits are set to True, False or the bits of a Bitmap, not to {value!r}"
            raise TypeError(msg)
        elif n > 0:
            low, stride, _ = _ascending(start, step, n)
            self._change_bits(_set if value else _clear, low, low + (n - 1) * stride + 1, stride)

    def __contains__(self, index: int) -> bool:
        """``i in bitmap``: whether bit i is set; False for what is no bit of it."""
        index = _index(index)
        return 0 <= index < self._nbits and self.test(index)

    def __enter__(self) -> "Self":
        self._alive()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._region.released:
            return f"<Bitmap of {self._nbits:,} bits, released>"
        return f"<Bitmap of {self._nbits:,} bits: {self.committed:,} bytes of words committed>"

    def __reduce__(self) -> NoReturn:
        msg = "a Bitmap is memory of this process: send its to_bytes()"
        raise TypeError(msg)

    # -- inside -------------------------------------------------------------------------------

    def _alive(self) -> None:
        if self._region.released:
            msg = "the bitmap was released or closed"
            raise ReleasedError(msg)

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        start = _index(start)
        stop = self._nbits if stop is None else _index(stop)
        if not 0 <= start <= stop <= self._nbits:
            msg = f"[{start}, {stop}) is not a range of a bitmap of {self._nbits} bits"
            raise RangeError(msg)
        return start, stop

    def _item(self, index: int) -> int:
        at = _index(index)
        if at < 0:
            at += self._nbits
        if not 0 <= at < self._nbits:
            msg = f"no bit {index} in a bitmap of {self._nbits} bits"
            raise IndexError(msg)
        return at

    def _slice(self, key: slice) -> tuple[int, int, int]:
        start, stop, step = key.indices(self._nbits)
        # Not len(range(...)): that is limited to sys.maxsize.
        n = (stop - start + step - (1 if step > 0 else -1)) // step
        return start, step, max(0, n)

    def _change(self, change: Any, start: int, stop: int | None) -> int:
        start, stop = self._range(start, _index(start) + 1 if stop is None else stop)
        return self._change_bits(change, start, stop, 1)

    def _change_bits(self, change: Any, start: int, stop: int, step: int) -> int:
        with self._lock:
            self._alive()
            changed = change(self._handle, start, stop, step)
        if changed < 0:
            self._refused(changed, start, stop)
        return int(changed)

    def _search(self, start: int, stop: int | None, run: int, *, value: bool) -> int | None:
        start, stop = self._range(start, stop)
        run = _index(run)
        if run <= 0:
            msg = f"a run has a positive length, not {run}"
            raise RangeError(msg)
        with self._lock:
            self._alive()
            found = -1 if run > stop - start else _find(self._handle, start, stop, value, run)
        return None if found < 0 else int(found)

    def _iterate_runs(self, at: int, stop: int, value: bool) -> Iterator[tuple[int, int]]:
        found = ffi.new("uint64_t[]", 2 * _RUNS_AT_ONCE)
        more = True
        while more:
            with self._lock:
                self._alive()
                n = lib.lazybitmap_runs(self._handle, at, stop, value, found, _RUNS_AT_ONCE)
            edges = ffi.unpack(found, 2 * n) if n else []
            yield from zip(edges[::2], edges[1::2], strict=True)
            more = n == _RUNS_AT_ONCE
            if more:
                at = edges[-1]

    def _both_locked(self, other: "Bitmap") -> ExitStack:
        """Lock two bitmaps, always in the same order."""
        with ExitStack() as stack:
            for bitmap in sorted((self, other), key=id):
                stack.enter_context(bitmap._lock)
                bitmap._alive()
            return stack.pop_all()

    def _combine(self, other: "Bitmap", operation: int) -> "Self":
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self._nbits != other._nbits:
            msg = f"bitmaps of {self._nbits} and of {other._nbits} bits do not combine"
            raise RangeError(msg)
        with self._both_locked(other):
            err = lib.lazybitmap_combine(self._handle, other._handle, self._nbits, operation)
        if err < 0:
            self._refused(err, 0, self._nbits)
        return self

    def _replace(self, start: int, step: int, n: int, bits: "Bitmap") -> None:
        if step != 1 or bits._nbits != n:
            msg = f"{bits._nbits} bits do not replace a slice of {n} with step {step}"
            raise RangeError(msg)
        if bits is self:
            return
        with self._both_locked(bits):
            err = lib.lazybitmap_copy(self._handle, start, bits._handle, 0, 1, n, False)
        if err < 0:
            self._refused(err, start, start + n)

    def _refused(self, err: int, start: int, stop: int) -> NoReturn:
        self._alive()
        raise refusal("commit", -err, (stop - start + 7) // 8, self._region.base + start // 8)


def _ascending(start: int, step: int, n: int) -> tuple[int, int, bool]:
    """A slice as its lowest index, a positive stride, and whether it runs downwards."""
    if n == 1:
        return start, 1, False
    return (start, step, False) if step > 0 else (start + step * (n - 1), -step, True)
