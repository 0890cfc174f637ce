"""What an arena hands out: one block, or many that are objects only when looked at."""

from collections.abc import Iterator, Sequence
from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn, overload

from pyreserve._native import ffi, lib
from pyreserve.errors import FreeError
from pyreserve.units import format_size

if TYPE_CHECKING:
    from typing_extensions import Self

    from pyreserve._arena.arena import Arena

_ZEROED = 1 << lib.HEAP_PAGE_BITS
_nbytes = lib.heap_nbytes


class Block:
    """Bytes of an `Arena` that are one's own until they are freed.

    Two Block objects for the same block are equal. A block lives until it is freed, whether or not
    there is an object for it: `Arena.block_at` and `Arena.blocks` find it.

    As a context manager a block closes itself at the end. From Python 3.12 on it can be used as a
    buffer directly; then its bytes are pinned as long as this object lives, since some consumers
    (``np.ndarray(buffer=...)``, ``torch.frombuffer``) keep nothing but a reference to it. Bytes got
    by `view` are pinned only as long as the view, or what was made of it, lives.
    """

    __slots__ = ("_arena", "_handle", "_nbytes", "_pin")

    _pin: Any

    def __init__(self, arena: "Arena", handle: int, nbytes: int) -> None:
        """For `Arena`."""
        self._arena = arena
        self._handle = handle
        self._nbytes = nbytes

    @property
    def arena(self) -> "Arena":
        """Whose bytes they are."""
        return self._arena

    @property
    def nbytes(self) -> int:
        """How many bytes were asked for."""
        return self._nbytes

    @property
    def address(self) -> int:
        """Address of the first byte, also after it was freed.

        Touching memory through it is at your own risk.

        Raises:
            ReleasedError: the arena was released or closed.
        """
        return self._arena._address(self._handle)

    @property
    def offset(self) -> int:
        """Offset of the first byte in `Arena.region`, in bytes; also after it was freed."""
        return self.address - self._arena.region.base

    @property
    def zeroed(self) -> bool:
        """Whether the bytes were known to be zero when the block was allocated.

        False for a Block that `Arena.block_at` or `Arena.blocks` made: they can't know.
        """
        return bool(self._handle & _ZEROED)

    @property
    def freed(self) -> bool:
        """Whether the block was freed or closed, or its arena released."""
        return bool(_nbytes(self._arena._heap, self._handle) < 0)

    @property
    def view(self) -> memoryview:
        """A new memoryview of the bytes, writable, one unsigned byte an item.

        While it, or anything made from it, is alive, the block can't be freed.

        Raises:
            FreeError: the block was freed or closed.
            ReleasedError: the arena was released or closed.
            RuntimeError: see `pyreserve.Region.view`.
        """
        return self._arena._view(self)

    def __buffer__(self, flags: int, /) -> memoryview:
        """Export the bytes (PEP 688); pins them as long as this object lives."""
        return self._arena._view(self, pin=True)

    def free(self) -> None:
        """Give the bytes back to the arena; see `Arena.free`."""
        self._arena.free(self)

    def close(self) -> None:
        """Refuse new views now; free the block when its last view is gone.

        With no view it is freed now; if another thread is in a call on the arena when the last view
        dies, at the arena's next call. Leaving a ``with`` block calls this; see `Region.close`.
        """
        self._arena._close_block(self)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self._nbytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Block):
            return NotImplemented
        return self._arena is other._arena and not (self._handle ^ other._handle) & ~_ZEROED

    def __hash__(self) -> int:
        return hash((id(self._arena), self._handle & ~_ZEROED))

    def __repr__(self) -> str:
        state = ", freed" if self.freed else f" at {self.address:#x}"
        return f"<Block of {format_size(self._nbytes)}{state}>"

    def __reduce__(self) -> NoReturn:
        msg = "a Block is addresses of this process: it can't be pickled or copied"
        raise TypeError(msg)


class Blocks(Sequence[Block]):
    """Many blocks in eight bytes each; Block objects are made when it is indexed or iterated over.

    From `Arena.alloc_many`, in the order of the sizes.

    Raises:
        FreeError: by ``blocks[i]``, if that block was freed or closed.
    """

    __slots__ = ("_arena", "_handles")

    def __init__(self, arena: "Arena", handles: Any) -> None:
        """For `Arena`: `handles` is a cdata array of ``int64_t``."""
        self._arena = arena
        self._handles = handles

    @property
    def arena(self) -> "Arena":
        """Whose blocks they are."""
        return self._arena

    def free(self) -> None:
        """Give all of them back; see `Arena.free_many`."""
        self._arena.free_many(self)

    def __len__(self) -> int:
        return len(self._handles)

    @overload
    def __getitem__(self, key: int) -> Block: ...
    @overload
    def __getitem__(self, key: slice) -> "Blocks": ...
    def __getitem__(self, key: int | slice) -> "Block | Blocks":
        """``blocks[i]`` is a Block, ``blocks[a:b]`` Blocks of their own."""
        if isinstance(key, slice):
            chosen = range(*key.indices(len(self)))
            return Blocks(self._arena, ffi.new("int64_t[]", [self._handles[i] for i in chosen]))
        at = _index(key)
        if at < 0:
            at += len(self)
        if not 0 <= at < len(self):
            msg = f"no block {key} in {len(self)} blocks"
            raise IndexError(msg)
        return self._arena._block(self._handles[at])

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self):,} Blocks of {self._arena!r}>"

    def __reduce__(self) -> NoReturn:
        msg = "Blocks are addresses of this process: they can't be pickled or copied"
        raise TypeError(msg)


def no_block(which: str = "the block") -> FreeError:
    """Make the exception for a block that is not there any more."""
    return FreeError(f"{which} was freed or closed already")
