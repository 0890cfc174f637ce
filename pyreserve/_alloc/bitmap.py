"""A bitmap in its own reservation: 2**40 bits take no memory until some are set."""

from collections.abc import Callable, Iterator
from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn, overload

from pyreserve._native import ffi, lib
from pyreserve._region.owner import OnRegion
from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.reserve import reserve
from pyreserve._system.limits import refusal
from pyreserve.errors import RangeError, ReleasedError

if TYPE_CHECKING:
    from typing_extensions import Buffer, Self

_WORD_BITS = 64
_RUNS_PER_CALL = 256

_set = lib.lazybitmap_set
_clear = lib.lazybitmap_clear
_test = lib.lazybitmap_test
_count = lib.lazybitmap_count
_find = lib.lazybitmap_find


class Bitmap(OnRegion):
    """`nbits` bits, initially clear. A word is committed when its first bit is set.

    Ranges are half-open, ``[start, stop)``, with ``0 <= start <= stop <= nbits``. If `stop` is None
    the range ends at `nbits`, but in `set` and `clear` it is one bit. Reading, clearing and
    searching commit nothing. Bit i is bit ``i % 8`` of byte ``i // 8`` (little-endian bit order).

    Any number of threads may share a bitmap; each method is atomic.

    Raises (all methods):
        RangeError: the range is outside the bitmap (IndexError from ``[]``), or `run`, a number of
            bits, is not positive.
        ReleasedError: the bitmap was released or closed.
        OutOfMemoryError: words could not be committed; no bit has changed.
        TypeError: an argument is not an integer.
    """

    __slots__ = ("_handle", "_nbits")

    _noun = "bitmap"

    def __init__(
        self,
        nbits: int,
        *,
        mode: Mode = "charge",
        huge_pages: HugePages = "default",
        fork: Fork = "copy",
        name: str | None = None,
    ) -> None:
        """Reserve a bitmap of `nbits` (positive) clear bits.

        The other arguments are as for `pyreserve.reserve`, whose exceptions apply too.
        """
        nbits = _index(nbits)
        if nbits <= 0:
            msg = f"nbits must be positive, got {nbits}"
            raise RangeError(msg)
        self._nbits = nbits
        super().__init__(
            reserve((nbits + 7) // 8, mode=mode, huge_pages=huge_pages, fork=fork, name=name)
        )
        self._handle = self._exports.handle

    @property
    def nbits(self) -> int:
        """Number of bits."""
        return self._nbits

    # -- bits and ranges ----------------------------------------------------------------------

    def set(self, start: int, stop: int | None = None) -> int:
        """Set the bits of the range; return the number of bits that changed."""
        return self._change(_set, start, stop)

    def clear(self, start: int, stop: int | None = None) -> int:
        """Clear the bits of the range; return the number of bits that changed."""
        return self._change(_clear, start, stop)

    def test(self, index: int) -> bool:
        """Tell whether bit `index` is set."""
        start, _ = self._range(index, _index(index) + 1)
        with self._lock:
            self._check_open()
            return bool(_test(self._handle, start))

    def count(self, start: int = 0, stop: int | None = None) -> int:
        """Count the set bits of the range."""
        start, stop = self._range(start, stop)
        with self._lock:
            self._check_open()
            return int(_count(self._handle, start, stop))

    def any(self, start: int = 0, stop: int | None = None) -> bool:
        """Tell whether any bit of the range is set."""
        return self._search(start, stop, 1, value=True) is not None

    def all(self, start: int = 0, stop: int | None = None) -> bool:
        """Tell whether every bit of the range is set."""
        return self._search(start, stop, 1, value=False) is None

    def find_set(self, run: int = 1, start: int = 0) -> int | None:
        """Return the first bit, from `start` up, of `run` adjacent set bits; else None."""
        return self._search(start, None, run, value=True)

    def find_clear(self, run: int = 1, start: int = 0) -> int | None:
        """Return the first bit, from `start` up, of `run` adjacent clear bits; else None."""
        return self._search(start, None, run, value=False)

    def runs(
        self, start: int = 0, stop: int | None = None, *, value: bool = True
    ) -> Iterator[tuple[int, int]]:
        """Iterate over the runs of bits equal to `value` as (start, stop), lowest first.

        Runs are read in batches of a few hundred; later batches show changes made since.
        """
        start, stop = self._range(start, stop)
        return self._iterate_runs(start, stop, bool(value))

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
        """Clear every bit that is set in `other`, a Bitmap of equal length: ``self -= other``."""
        if self._combine(other, lib.BITMAP_ANDNOT) is NotImplemented:
            msg = f"other must be a Bitmap, got {type(other).__name__}"
            raise TypeError(msg)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self._nbits != other.nbits:
            self._check_open()
            _check_open(other)
            return False
        equal = self._with(
            other, lambda handle: lib.lazybitmap_equal(self._handle, handle, self._nbits)
        )
        return bool(equal)

    __hash__ = None  # type: ignore[assignment]  # a bitmap is mutable

    def copy(self) -> "Bitmap":
        """Return a new Bitmap with the same bits."""
        return self[:]

    def to_bytes(self, start: int = 0, stop: int | None = None) -> bytes:
        """Return the range as bytes from bit `start` up; unused bits of the last byte are clear."""
        start, stop = self._range(start, stop)
        out = bytearray((stop - start + 7) // 8)
        with self._lock:
            self._check_open()
            if out:
                lib.lazybitmap_read(self._handle, start, stop, ffi.from_buffer(out))
        return bytes(out)

    @classmethod
    def from_bytes(cls, data: "Buffer", nbits: int | None = None) -> "Self":
        """Make a bitmap of the first `nbits` bits of bytes-like `data`, by default of all.

        Raises:
            RangeError: `nbits` is not positive, or larger than the number of bits in `data`.
        """
        bytes_ = memoryview(data).cast("B")
        nbits = 8 * len(bytes_) if nbits is None else _index(nbits)
        if nbits > 8 * len(bytes_):
            msg = f"nbits is {nbits}, but data holds only {8 * len(bytes_)} bits"
            raise RangeError(msg)
        bitmap = cls(nbits)
        err = lib.lazybitmap_write(_handle(bitmap), 0, nbits, ffi.from_buffer(bytes_))
        if err < 0:
            _refuse_commit(bitmap, err, 0, nbits)
        return bitmap

    def words(
        self, start: int = 0, stop: int | None = None, *, readonly: bool = False
    ) -> memoryview:
        """Return a zero-copy view of committed words, 64 bits an item (format ``"Q"``).

        `start` is a multiple of 64 bits, and so is `stop` unless it is `nbits`. Bits above `nbits`
        in the last word are undefined. The bitmap can't be released while the view is alive.
        ``bitarray(buffer=bitmap.words(), endian="little")`` reads the view.

        Raises:
            RangeError: also if the range is empty or a word of it is not committed; see
                `committed_runs`.
        """
        start, stop = self._range(start, stop)
        aligned = start % _WORD_BITS == 0 and (stop % _WORD_BITS == 0 or stop == self._nbits)
        if not aligned or start == stop:
            msg = f"words needs a range of whole {_WORD_BITS}-bit words, got [{start}, {stop})"
            raise RangeError(msg)
        nbytes = -(-(stop - start) // _WORD_BITS) * 8
        return self._region.view(start // 8, nbytes, readonly=readonly).cast("Q")

    def committed_runs(self) -> list[tuple[int, int]]:
        """List the ranges of bits in committed words as (start, stop), lowest first."""
        return [
            (8 * offset, min(8 * (offset + length), self._nbits))
            for offset, length in self._region.committed_runs()
        ]

    # -- Python's protocols -------------------------------------------------------------------

    def __len__(self) -> int:
        return self._nbits

    @overload
    def __getitem__(self, key: int) -> bool: ...
    @overload
    def __getitem__(self, key: slice) -> "Bitmap": ...
    def __getitem__(self, key: int | slice) -> "bool | Bitmap":
        """Return a bool for ``bitmap[i]``, a new Bitmap (not empty) for ``bitmap[a:b]``."""
        if not isinstance(key, slice):
            return self.test(self._item(key))
        start, step, n = self._slice(key)
        self._check_step(step)
        if n == 0:
            msg = "a Bitmap must have at least one bit, got an empty slice"
            raise RangeError(msg)
        bitmap = Bitmap(n)
        with self._lock:
            self._check_open()
            err = lib.lazybitmap_copy(_handle(bitmap), 0, self._handle, start, n)
        if err < 0:
            _refuse_commit(bitmap, err, 0, n)
        return bitmap

    def __setitem__(self, key: int | slice, value: "bool | Bitmap") -> None:
        """Assign a bool to a bit or a slice, or a Bitmap to a slice of its length and step 1."""
        self._check_open()
        if not isinstance(key, slice):
            start, step, n = self._item(key), 1, 1
        else:
            start, step, n = self._slice(key)
        if isinstance(value, Bitmap):
            self._assign(start, step, n, value)
        elif value not in (0, 1):
            msg = f"value must be True, False or a Bitmap, got {value!r}"
            raise TypeError(msg)
        elif n > 0:
            low, high = sorted((start, start + (n - 1) * step))
            stride = abs(step) if n > 1 else 1
            self._change_bits(_set if value else _clear, low, high + 1, stride)

    def __contains__(self, index: int) -> bool:
        """Tell whether bit `index` is set; False for an index outside the bitmap."""
        index = _index(index)
        return 0 <= index < self._nbits and self.test(index)

    def __repr__(self) -> str:
        if self._region.released:
            return f"<Bitmap of {self._nbits:,} bits, released>"
        return f"<Bitmap of {self._nbits:,} bits: {self.committed:,} bytes of words committed>"

    def __reduce__(self) -> NoReturn:
        msg = "Bitmap cannot be pickled: it owns addresses of this process; use to_bytes()"
        raise TypeError(msg)

    # -- inside -------------------------------------------------------------------------------

    def _range(self, start: int, stop: int | None) -> tuple[int, int]:
        start = _index(start)
        stop = self._nbits if stop is None else _index(stop)
        if not 0 <= start <= stop <= self._nbits:
            msg = f"range must satisfy 0 <= start <= stop <= {self._nbits}, got [{start}, {stop})"
            raise RangeError(msg)
        return start, stop

    def _item(self, index: int) -> int:
        bit = _index(index)
        if bit < 0:
            bit += self._nbits
        if not 0 <= bit < self._nbits:
            msg = f"index must be in [-{self._nbits}, {self._nbits}), got {index}"
            raise IndexError(msg)
        return bit

    def _slice(self, key: slice) -> tuple[int, int, int]:
        start, stop, step = key.indices(self._nbits)
        # len(range(...)) would raise OverflowError above sys.maxsize.
        n = (stop - start + step - (1 if step > 0 else -1)) // step
        return start, step, max(0, n)

    @staticmethod
    def _check_step(step: int) -> None:
        if step != 1:
            msg = f"a slice that copies bits must have step 1, got {step}"
            raise RangeError(msg)

    def _change(self, change: Any, start: int, stop: int | None) -> int:
        start, stop = self._range(start, _index(start) + 1 if stop is None else stop)
        return self._change_bits(change, start, stop, 1)

    def _change_bits(self, change: Any, start: int, stop: int, step: int) -> int:
        with self._lock:
            self._check_open()
            changed = change(self._handle, start, stop, step)
        if changed < 0:
            _refuse_commit(self, changed, start, stop)
        return int(changed)

    def _search(self, start: int, stop: int | None, run: int, *, value: bool) -> int | None:
        start, stop = self._range(start, stop)
        run = _index(run)
        if run <= 0:
            msg = f"run must be positive, got {run}"
            raise RangeError(msg)
        with self._lock:
            self._check_open()
            first = -1 if run > stop - start else _find(self._handle, start, stop, value, run)
        return None if first < 0 else int(first)

    def _iterate_runs(self, start: int, stop: int, value: bool) -> Iterator[tuple[int, int]]:
        buffer = ffi.new("uint64_t[]", 2 * _RUNS_PER_CALL)
        more = True
        while more:
            with self._lock:
                self._check_open()
                n = lib.lazybitmap_runs(self._handle, start, stop, value, buffer, _RUNS_PER_CALL)
            edges = ffi.unpack(buffer, 2 * n) if n else []
            yield from zip(edges[::2], edges[1::2], strict=True)
            more = n == _RUNS_PER_CALL
            if more:
                start = edges[-1]

    def _with(self, other: "Bitmap", call: Callable[[Any], int]) -> int:
        """Return the result of `call` on the handle of `other`, with both bitmaps locked.

        The order of the locks is the same in all threads, so that they can't deadlock.
        """
        mine, others = self._exports, other.region.exports
        first, second = (mine, others) if id(mine) < id(others) else (others, mine)
        with first.lock, second.lock:
            self._check_open()
            _check_open(other)
            return call(others.handle)

    def _combine(self, other: "Bitmap", operation: int) -> "Self":
        if not isinstance(other, Bitmap):
            return NotImplemented
        if self._nbits != other.nbits:
            msg = f"bitmaps must be of equal length, got {self._nbits} and {other.nbits} bits"
            raise RangeError(msg)
        err = self._with(
            other,
            lambda handle: lib.lazybitmap_combine(self._handle, handle, self._nbits, operation),
        )
        if err < 0:
            _refuse_commit(self, err, 0, self._nbits)
        return self

    def _assign(self, start: int, step: int, n: int, bits: "Bitmap") -> None:
        self._check_step(step)
        if bits.nbits != n:
            msg = f"a Bitmap assigned to a slice must have its length ({n}), got {bits.nbits} bits"
            raise RangeError(msg)
        if bits is self:
            return
        err = self._with(
            bits, lambda handle: lib.lazybitmap_copy(self._handle, start, handle, 0, n)
        )
        if err < 0:
            _refuse_commit(self, err, start, start + n)


def _handle(bitmap: Bitmap) -> Any:
    return bitmap.region.exports.handle


def _check_open(bitmap: Bitmap) -> None:
    if bitmap.released:
        msg = "the bitmap was released or closed"
        raise ReleasedError(msg)


def _refuse_commit(bitmap: Bitmap, err: int, start: int, stop: int) -> NoReturn:
    _check_open(bitmap)
    raise refusal("commit", -err, (stop - start + 7) // 8, bitmap.base + start // 8)
