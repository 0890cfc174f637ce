"""Block and Blocks: handles to the blocks that an arena allocates."""

from collections.abc import Iterator, Sequence
from operator import index as _index
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, overload

from pyreserve._arena.heap import Heap
from pyreserve._arena.nativeheap import ZEROED, handle_array
from pyreserve._region.arrays import ArrayPlan
from pyreserve._region.region import Region
from pyreserve.errors import RangeError
from pyreserve.units import as_bytes, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable

    import numpy as np
    import numpy.typing as npt
    from typing_extensions import Self

    from pyreserve._region.arrays import Shape


# Whether a block of any arena was ever resized: Block objects may then have an old size.
_any_resized = False


class BlockArena(Protocol):
    """The arena of a block, as this module knows it. `pyreserve.Arena` is the only one."""

    @property
    def heap(self) -> Heap:
        """The heap that the blocks are from."""

    @property
    def region(self) -> Region:
        """The region that contains the blocks."""

    def free(self, block: "Block") -> None:
        """Free a block."""

    def free_many(self, blocks: "Iterable[Block]") -> None:
        """Free blocks, all or none."""


class Block:
    """A block of an `Arena`: a range of committed bytes, in use until it is freed.

    Dropping a Block object does not free its block; `Arena.block_at` and `Arena.blocks` return a
    new object for it. Two Block objects for the same block are equal.

    Leaving a ``with`` block closes the block. ``np.asarray`` of a Block is an array of its bytes.
    From Python 3.12 on a Block is itself a buffer.
    Exporting that buffer pins the bytes as long as the Block object lives, because some consumers
    (``np.ndarray(buffer=...)``, ``torch.frombuffer``) keep only a reference to the object. `view`
    pins them only as long as the view, or an object made from it, is alive.
    """

    __slots__ = ("_arena", "_handle", "_nbytes", "_pin")

    _pin: Any

    def __init__(self, arena: BlockArena, handle: int, nbytes: int) -> None:
        """Called by `Arena` alone."""
        self._arena = arena
        self._handle = handle
        self._nbytes = nbytes

    @property
    def arena(self) -> BlockArena:
        """The arena that the block belongs to."""
        return self._arena

    @property
    def nbytes(self) -> int:
        """Requested size in bytes. The block occupies whole pages of the layout."""
        if not _any_resized:  # not a call for each size that cannot have changed
            return self._nbytes
        return self._arena.heap.nbytes_or(self._handle, self._nbytes)

    @property
    def address(self) -> int:
        """Address of the first byte; unchanged after the block was freed.

        Access through a raw address is at your own risk.

        Raises:
            ReleasedError: the arena was released or closed.
        """
        return self._arena.heap.address(self._handle)

    @property
    def offset(self) -> int:
        """Offset of the first byte from the base of `Arena.region`, in bytes.

        Raises:
            ReleasedError: the arena was released or closed.
        """
        return self._arena.heap.offset(self._handle)

    @property
    def zeroed(self) -> bool:
        """Whether the bytes were known to be zero when the block was allocated.

        Always False for a Block from `Arena.block_at` or `Arena.blocks`, which do not know.
        """
        return bool(self._handle & ZEROED)

    @property
    def freed(self) -> bool:
        """Whether the block was freed or closed, or its arena released or closed."""
        return not self._arena.heap.is_live(self._handle)

    def view(self) -> memoryview:
        """Return a new writable memoryview of the bytes: format ``"B"``, shape ``(nbytes,)``.

        The block cannot be freed while the view, or an object made from it, is alive.

        Raises:
            FreeError: the block was freed or closed.
            ReleasedError: the arena was released or closed.
            StateError: see `pyreserve.Region.view`.
        """
        return self._arena.heap.view(self._handle, self._nbytes)

    def ndarray(
        self,
        shape: "Shape",
        dtype: "npt.DTypeLike" = "uint8",
        *,
        readonly: bool = False,
    ) -> "np.ndarray[Any, Any]":
        """Return a new C-ordered ndarray of `shape` and `dtype` over the first bytes.

        It protects the block as a `view` does. An array without items protects nothing.

        Args:
            shape: length of each side, an int or a tuple or list of them.
            dtype: type of the items.
            readonly: return an array that cannot be written to.

        Raises:
            ImportError: numpy is missing (extra ``numpy``).
            RangeError: the items take more than `nbytes`, or a side is negative.
            TypeError, ValueError: a side or dtype is of another kind, or dtype holds references.
            FreeError, ReleasedError, StateError: as for `view`.
        """
        plan = ArrayPlan(shape, dtype)
        if plan.nbytes > self.nbytes:
            msg = f"shape and dtype must fit into {self.nbytes} bytes, got {plan.nbytes}"
            raise RangeError(msg)
        if not plan.nbytes:
            self._arena.heap.nbytes(self._handle)
            return plan.empty(readonly=readonly)
        view = self.view()[: plan.nbytes]
        return plan.over(view.toreadonly() if readonly else view)

    def __array__(
        self, dtype: "npt.DTypeLike | None" = None, copy: bool | None = None
    ) -> "np.ndarray[Any, Any]":
        """Return the bytes as an ndarray that protects the block as a `view` does.

        For numpy before Python 3.12, where a Block is no buffer. Raises: as `ndarray`; ValueError
        if `dtype` needs a copy and `copy` is False.
        """
        array = self.ndarray(self.nbytes)
        if dtype is None or array.dtype == dtype:
            return array.copy() if copy else array
        if copy is False:
            msg = f"dtype must be uint8 without a copy, got {dtype!r}"
            raise ValueError(msg)
        return array.astype(dtype)

    def __buffer__(self, flags: int, /) -> memoryview:
        """Export the bytes as a buffer (PEP 688), pinned as long as this object lives.

        Raises: as `view`.
        """
        view = self._arena.heap.view(self._handle, self._nbytes)
        self._pin = view.obj  # keeps the buffer alive, which protects its bytes
        return view

    def resize(self, nbytes: int | str) -> None:
        """Change the size in place, to bytes or a size such as ``"64KiB"``.

        A larger block takes the free pages behind it, and the arena grows for its last block. The
        new bytes have undefined contents. A smaller block gives the pages that it no longer needs
        to other blocks. Address, other contents and live views stay.

        Raises:
            RangeError: `nbytes` is not positive.
            OutOfMemoryError: the pages behind the block are not free, the arena ends before, or the
                kernel refused. Nothing has changed, except that the arena may have grown.
            ViewError: live views show bytes that would be cut; nothing has changed.
            FreeError: the block was freed or closed.
            ReleasedError: the arena was released or closed.
            StateError: a finaliser or signal handler called this during a growth, and the arena
                has to grow again.
        """
        nbytes = as_bytes(nbytes)
        if nbytes <= 0:
            msg = f"nbytes must be positive, got {nbytes}"
            raise RangeError(msg)
        global _any_resized  # noqa: PLW0603
        _any_resized = True
        self._arena.heap.resize(self._handle, nbytes)
        self._nbytes = nbytes

    def free(self) -> None:
        """Free the block. Raises as `Arena.free`."""
        self._arena.free(self)

    def close(self) -> None:
        """Refuse new views now, and free the block when its last view is gone.

        Without a live view the block is freed at once. If another thread is in a call on the arena
        when the last view dies, the arena's next call frees the block. Leaving a ``with`` block
        calls this method; see `Region.close`.
        """
        self._arena.heap.close_block(self._handle, self._nbytes)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __len__(self) -> int:
        return self.nbytes

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Block):
            return NotImplemented
        return self._arena is other._arena and not (self._handle ^ other._handle) & ~ZEROED

    def __hash__(self) -> int:
        return hash((id(self._arena), self._handle & ~ZEROED))

    def __repr__(self) -> str:
        state = ", freed" if self.freed else f" at {self.address:#x}"
        return f"<Block of {format_size(self.nbytes)}{state}>"

    def __reduce__(self) -> NoReturn:
        msg = "Block cannot be pickled or copied: its memory belongs to this process"
        raise TypeError(msg)


class Blocks(Sequence[Block]):
    """A sequence of blocks that stores eight bytes a block.

    `Arena.alloc_many` returns it, in the order of the sizes. Indexing and iterating create the
    Block objects.

    Raises:
        FreeError: by ``blocks[i]``, if that block was freed or closed.
        IndexError: by ``blocks[i]``, if the index is out of range.
    """

    __slots__ = ("_arena", "_handles")

    def __init__(self, arena: BlockArena, handles: Any) -> None:
        """Called by `Arena` alone, with a `handle_array`."""
        self._arena = arena
        self._handles = handles

    @property
    def arena(self) -> BlockArena:
        """The arena that the blocks belong to."""
        return self._arena

    def free(self) -> None:
        """Free all of the blocks, or none. Raises as `Arena.free_many`."""
        self._arena.free_many(self)

    def __len__(self) -> int:
        return len(self._handles)

    @overload
    def __getitem__(self, key: int) -> Block: ...
    @overload
    def __getitem__(self, key: slice) -> "Blocks": ...
    def __getitem__(self, key: int | slice) -> "Block | Blocks":
        """Return a Block for an index, and a new Blocks for a slice."""
        if isinstance(key, slice):
            handles = [self._handles[i] for i in range(*key.indices(len(self)))]
            return Blocks(self._arena, handle_array(handles))
        i = _index(key)
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            msg = f"index {key} is out of range for {len(self)} blocks"
            raise IndexError(msg)
        handle = self._handles[i]
        return Block(self._arena, handle, self._arena.heap.nbytes(handle))

    def __iter__(self) -> Iterator[Block]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return f"<{len(self):,} Blocks of {self._arena!r}>"

    def __reduce__(self) -> NoReturn:
        msg = "Blocks cannot be pickled or copied: their memory belongs to this process"
        raise TypeError(msg)
