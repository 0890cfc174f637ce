"""Invalid and hostile use: a documented exception, and the region is unchanged."""

import contextlib
import copy
import ctypes
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import pyreserve
from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    MiB,
    OutOfMemoryError,
    RangeError,
    Region,
    ReleasedError,
    ViewError,
    VMError,
)

SIZE = 64 * PAGE_SIZE
PAGE_VERBS = ("commit", "populate", "discard", "decommit")
BYTE_VERBS = ("view", "ndarray", "is_committed")


def call(region: Region, verb: str, offset: Any, length: Any) -> Any:
    return getattr(region, verb)(offset, length)


def state(region: Region) -> tuple[object, ...]:
    """Return all observable state of a region: its own and the kernel's."""
    return (
        region.base,
        region.size,
        region.reserved,
        region.committed,
        region.committed_runs(),
        region.released,
        region.sealed,
        witness.spans(region.base, region.size),
        [witness.peek(region.base + lo, n) for lo, n in region.committed_runs()],
    )


@pytest.fixture
def used(region: Region) -> Region:
    """A region with pages 0-3 and 8-11 committed and filled."""
    for first in (0, 8):
        region.commit(first * PAGE_SIZE, 4 * PAGE_SIZE)
        region.view(first * PAGE_SIZE, 4 * PAGE_SIZE)[:] = b"\xaa" * (4 * PAGE_SIZE)
    return region


OUTSIDE = [
    (-PAGE_SIZE, PAGE_SIZE),
    (-PAGE_SIZE, 2 * PAGE_SIZE),
    (0, -PAGE_SIZE),
    (PAGE_SIZE, -PAGE_SIZE),
    (2 * PAGE_SIZE, -PAGE_SIZE),
    (-PAGE_SIZE, -PAGE_SIZE),
    (0, 0),
    (PAGE_SIZE, 0),
    (SIZE, 0),
    (SIZE, PAGE_SIZE),
    (SIZE - PAGE_SIZE, 2 * PAGE_SIZE),
    (0, SIZE + PAGE_SIZE),
    *(
        place
        for bits in (31, 32, 62, 63, 64, 70, 1000)
        for huge in (1 << bits, (1 << bits) - PAGE_SIZE)
        for place in [(huge, PAGE_SIZE), (0, huge), (-huge, PAGE_SIZE), (0, -huge), (huge, huge)]
    ),
    # The end overflows 64 bits and would then be inside the region.
    (PAGE_SIZE, (1 << 64) - PAGE_SIZE),
    ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
    ((1 << 63) + PAGE_SIZE, 1 << 63),
    (2 * PAGE_SIZE, (1 << 64) - PAGE_SIZE),
]
MISALIGNED = [
    (1, PAGE_SIZE),
    (0, 1),
    (0, PAGE_SIZE - 1),
    (0, PAGE_SIZE + 1),
    (PAGE_SIZE // 2, PAGE_SIZE // 2),
    (SIZE - 1, 1),
    (PAGE_SIZE - 1, PAGE_SIZE + 1),
    (True, True),
]
NO_INTEGERS = [
    0.0,
    float(PAGE_SIZE),
    float("nan"),
    float("inf"),
    str(PAGE_SIZE),
    None,
    Decimal(PAGE_SIZE),
    Fraction(PAGE_SIZE),
    1j,
    b"\0",
    [],
    (0, 1),
    np.float64(PAGE_SIZE),
]


class TestArguments:
    @pytest.mark.parametrize("verb", [*PAGE_VERBS, "view"])
    def test_ranges_outside(self, used: Region, verb: str) -> None:
        """A range that is empty, negative or not wholly inside is a RangeError."""

        def child() -> None:
            before = state(used)
            for offset, length in OUTSIDE:
                with pytest.raises(RangeError):
                    call(used, verb, offset, length)

                assert state(used) == before

        witness.in_child(child)

    @pytest.mark.parametrize("verb", PAGE_VERBS)
    def test_ranges_outside_under_a_view(self, used: Region, verb: str) -> None:
        """A live view does not change which ranges are refused."""

        def child() -> None:
            view = used.view(PAGE_SIZE, 10)
            before = state(used)
            for offset, length in OUTSIDE:
                with pytest.raises((RangeError, ViewError)):
                    call(used, verb, offset, length)

                assert state(used) == before
                assert bytes(view) == b"\xaa" * 10

        witness.in_child(child)

    @pytest.mark.parametrize("verb", PAGE_VERBS)
    @pytest.mark.parametrize(("offset", "length"), MISALIGNED)
    def test_parts_of_pages(self, used: Region, verb: str, offset: int, length: int) -> None:
        """Verbs on pages refuse parts of pages; they do not round."""
        before = state(used)

        with pytest.raises(RangeError, match="multiples of the OS page"):
            call(used, verb, offset, length)

        assert state(used) == before

    @pytest.mark.parametrize("verb", [*PAGE_VERBS, "view", "is_committed"])
    @pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
    def test_arguments_that_are_not_integers(self, used: Region, verb: str, value: object) -> None:
        """An offset or length that is not an integer is a TypeError."""
        before = state(used)

        with pytest.raises(TypeError):
            call(used, verb, value, PAGE_SIZE)
        if value is not None or verb == "is_committed":  # None means: to the end of the region
            with pytest.raises(TypeError):
                call(used, verb, 0, value)

        assert state(used) == before

    @pytest.mark.parametrize(
        "value", [v for v in NO_INTEGERS if not isinstance(v, tuple)], ids=repr
    )
    def test_ndarrays_of_no_integer(self, used: Region, value: Any) -> None:
        """Offset and shape of an ndarray must be integers, too."""
        before = state(used)

        with pytest.raises(TypeError):
            used.ndarray(value, 1)
        if not isinstance(value, (bytes, list)):  # sequences of integers are shapes
            with pytest.raises(TypeError):
                used.ndarray(0, value)

        assert state(used) == before

    def test_whatever_has_an_index_is_an_integer(self, used: Region) -> None:
        """Integers of other libraries are accepted."""
        used.commit(np.int64(4 * PAGE_SIZE), np.uint32(PAGE_SIZE))  # type: ignore[arg-type]

        assert used.is_committed(4 * PAGE_SIZE, PAGE_SIZE)

    @pytest.mark.parametrize(
        ("offset", "length"), [p for p in OUTSIDE if p[0] < 0 or p[1] <= 0], ids=repr
    )
    def test_is_committed_of_nothing(self, used: Region, offset: int, length: int) -> None:
        """A negative offset or a length that is not positive is a RangeError."""
        with pytest.raises(RangeError):
            used.is_committed(offset, length)

    @pytest.mark.parametrize(
        ("offset", "length"), [p for p in OUTSIDE if p[0] >= 0 and p[1] > 0], ids=repr
    )
    def test_is_committed_outside(self, used: Region, offset: int, length: int) -> None:
        """Bytes outside the region are not committed."""
        assert used.is_committed(offset, length) is False

    def test_an_index_that_raises(self, used: Region) -> None:
        """An exception of an argument's __index__ reaches the caller, and no lock stays held."""

        class Rude:
            def __index__(self) -> int:
                raise KeyError("rude")

        before = state(used)
        for verb in [*PAGE_VERBS, "view", "is_committed"]:
            with pytest.raises(KeyError, match="rude"):
                call(used, verb, Rude(), PAGE_SIZE)

        other: list[object] = []
        thread = threading.Thread(target=lambda: other.append(state(used)))
        thread.start()
        thread.join(30)
        assert other == [before]

    def test_an_index_that_releases(self) -> None:
        """If an argument's __index__ releases the region, the call raises ReleasedError."""
        for verb in [*PAGE_VERBS, "view", "is_committed"]:
            region = pyreserve.reserve(SIZE)
            region.commit(0, SIZE)

            class Sly:
                def __index__(self, region: Region = region) -> int:
                    region.release()
                    return PAGE_SIZE

            with pytest.raises(ReleasedError):
                call(region, verb, 0, Sly())


class TestReserveArguments:
    @pytest.mark.parametrize("size", [0, -1, -PAGE_SIZE, -(1 << 63), -(1 << 64), -(1 << 70)])
    def test_sizes_that_are_not_positive(self, size: int) -> None:
        """The size must be positive."""
        with pytest.raises(RangeError, match="positive"):
            pyreserve.reserve(size)

    @pytest.mark.parametrize(
        "size",
        [
            (1 << 63) - PAGE_SIZE,
            (1 << 63) - 1,
            (1 << 64) - 2 * PAGE_SIZE,
            (1 << 64) - PAGE_SIZE,
            (1 << 64) - 1,
            (1 << 64) + PAGE_SIZE,
            1 << 1000,
        ],
    )
    @pytest.mark.parametrize("more", [{}, {"guard": True}, {"align": 1 << 21}, {"mode": "charge"}])
    def test_sizes_beyond_all_addresses(self, size: int, more: dict[str, Any]) -> None:
        """A size that overflows, alone or with its guards, is OutOfMemoryError with a reason."""
        with pytest.raises(OutOfMemoryError) as caught:
            pyreserve.reserve(size, **more)

        assert caught.value.limit == "address space"

    @witness.only_64_bit
    @pytest.mark.parametrize("shift", [48, 57, 62, 63])
    def test_alignments_beyond_all_addresses(self, shift: int) -> None:
        """An alignment that no free address has is OutOfMemoryError."""
        with pytest.raises(OutOfMemoryError) as caught:
            pyreserve.reserve(PAGE_SIZE, align=1 << shift)

        assert caught.value.verb == "reserve"

    @pytest.mark.parametrize("value", [v for v in NO_INTEGERS if v is not None], ids=repr)
    @pytest.mark.parametrize("where", ["at", "hint", "align"])
    def test_numbers_that_are_none(self, value: Any, where: str) -> None:
        """Addresses must be integers; an alignment may also be a size such as "2MiB"."""
        if where == "align" and isinstance(value, str):
            value = "a page"
        with pytest.raises(ValueError if value == "a page" else TypeError):
            pyreserve.reserve(PAGE_SIZE, **{where: value})

    @pytest.mark.parametrize("value", NO_INTEGERS, ids=repr)
    def test_sizes_that_are_no_integers(self, value: Any) -> None:
        """The size must be an integer, or a string accepted by parse_size."""
        if isinstance(value, str):
            value = "4096 pages"
        with pytest.raises(ValueError if isinstance(value, str) else TypeError):
            pyreserve.reserve(value)

    def test_sizes_as_strings(self) -> None:
        """A size or an alignment may be a string."""
        with pyreserve.reserve("1.5MiB", align="2MiB") as region:
            assert (len(region), region.base % (2 * MiB)) == (3 * MiB // 2, 0)

    @pytest.mark.parametrize("where", ["at", "hint"])
    @pytest.mark.parametrize(
        "address",
        [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, (1 << 40) + 1, 1 << 64, 1 << 70, (1 << 64) - 1],
    )
    def test_addresses_that_make_no_sense(self, where: str, address: int) -> None:
        """An address must be positive, page-aligned and fit a pointer."""
        with pytest.raises(RangeError):
            pyreserve.reserve(PAGE_SIZE, **{where: address})  # type: ignore[arg-type]

    @witness.only_64_bit
    @pytest.mark.parametrize("guard", [False, True])
    @pytest.mark.parametrize(
        "address", [(1 << 64) - PAGE_SIZE, (1 << 64) - 2 * PAGE_SIZE, 1 << 63, 1 << 60]
    )
    def test_addresses_that_no_process_has(self, address: int, guard: bool) -> None:
        """Addresses of the kernel are refused as `at`, and accepted as hint."""
        with pytest.raises(VMError):
            pyreserve.reserve(2 * PAGE_SIZE, at=address, guard=guard)

        with pyreserve.reserve(PAGE_SIZE, hint=address, guard=guard) as region:
            assert region.base < 1 << 57

    def test_the_first_page_is_not_to_be_had_with_a_guard(self) -> None:
        """At the lowest page there is no space for a guard below."""
        with pytest.raises(RangeError, match="guard"):
            pyreserve.reserve(PAGE_SIZE, at=PAGE_SIZE, guard=True)

    @pytest.mark.parametrize("align", [0, -1, 3, PAGE_SIZE + 1, 3 * PAGE_SIZE, 1 << 64, 1 << 70])
    def test_alignments_that_are_no_powers_of_two(self, align: int) -> None:
        """An alignment must be a power of two that fits an address."""
        with pytest.raises(RangeError):
            pyreserve.reserve(PAGE_SIZE, align=align)

    @witness.only_64_bit
    def test_places_that_contradict(self) -> None:
        """`at` excludes a hint, and must itself be a multiple of `align`."""
        with pytest.raises(ValueError, match="mutually exclusive"):
            pyreserve.reserve(PAGE_SIZE, at=1 << 40, hint=1 << 40)
        with pytest.raises(RangeError, match="multiple"):
            pyreserve.reserve(PAGE_SIZE, at=(1 << 40) + PAGE_SIZE, align=MiB)

    @pytest.mark.parametrize("word", ["mode", "fork", "huge_pages"])
    @pytest.mark.parametrize("value", ["", "COPY", "always", None, 0, b"copy", True])
    def test_words_that_are_not_known(self, word: str, value: object) -> None:
        """An unknown policy is a ValueError that lists the known values."""
        with pytest.raises(ValueError, match=f"{word} must be one of"):
            pyreserve.reserve(PAGE_SIZE, **{word: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize("word", ["mode", "fork", "huge_pages"])
    @pytest.mark.parametrize("value", [[], {}, bytearray()])
    def test_unhashable_policies(self, word: str, value: object) -> None:
        """An unhashable policy is refused like any unknown one."""
        with pytest.raises((TypeError, ValueError)):
            pyreserve.reserve(PAGE_SIZE, **{word: value})  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "name", ["", "n" * 80, "a[b", "a]b", "a\\b", "a$b", "a`b", "ä", "a\n", "a\0b", "\x7f"]
    )
    def test_names_that_the_kernel_does_not_take(self, name: str) -> None:
        r"""A name must be 1 to 79 printable ASCII characters without []\$`."""
        with pytest.raises(ValueError, match="name must be 1 to 79"):
            pyreserve.reserve(PAGE_SIZE, name=name)

    @pytest.mark.parametrize("name", [b"name", 1, ["n"]])
    def test_names_that_are_no_strings(self, name: Any) -> None:
        """A name must be a string."""
        with pytest.raises(TypeError, match="string"):
            pyreserve.reserve(PAGE_SIZE, name=name)

    def test_a_refused_reservation_leaves_nothing(self) -> None:
        """Refused reservations leave no addresses reserved."""
        grown = witness.fresh_python(
            """
            import contextlib, json, pyreserve
            from helpers import witness

            def refused():
                for more in (
                    {"align": 3}, {"mode": "x"}, {"name": ""}, {"at": 1}, {"align": 1 << 62},
                    {"at": 1 << 63}, {"size": 1 << 62}, {"size": 0},
                ):
                    with contextlib.suppress(ValueError, OSError):
                        pyreserve.reserve(**{"size": 64 << 20, **more})
                        raise AssertionError(more)

            for _ in range(5):
                refused()
            before = witness.nbytes(0, 1 << 64, witness.RESERVED)
            refused()
            print(json.dumps(witness.nbytes(0, 1 << 64, witness.RESERVED) - before))
            """
        )

        assert grown == 0


class TestAfterRelease:
    METHODS: tuple[tuple[str, Callable[[Region], object]], ...] = (
        ("base", lambda r: r.base),
        ("committed", lambda r: r.committed),
        ("reserved", lambda r: r.reserved),
        ("is_committed", lambda r: r.is_committed(0, 1)),
        ("is_committed outside", lambda r: r.is_committed(0, 1 << 70)),
        ("committed_runs", lambda r: r.committed_runs()),
        ("commit", lambda r: r.commit(0, PAGE_SIZE)),
        ("populate", lambda r: r.populate(0, PAGE_SIZE)),
        ("discard", lambda r: r.discard(0, PAGE_SIZE)),
        ("lazy discard", lambda r: r.discard(0, PAGE_SIZE, lazy=True)),
        ("decommit", lambda r: r.decommit(0, PAGE_SIZE)),
        ("release", lambda r: r.release()),
        ("view", lambda r: r.view(0, 1)),
        ("view outside", lambda r: r.view(0, 1 << 70)),
        ("ndarray", lambda r: r.ndarray(0, 1)),
        ("with", lambda r: r.__enter__()),
    )

    @pytest.mark.parametrize("method", [m for _, m in METHODS], ids=[n for n, _ in METHODS])
    @pytest.mark.parametrize("was_used", [False, True])
    def test_everything_says_so(self, method: Callable[[Region], object], was_used: bool) -> None:
        """After release every method raises ReleasedError, whether or not the region was used."""
        region = pyreserve.reserve(SIZE)
        if was_used:
            region.commit(0, SIZE)
            region.view(0, 1)[0] = 1
        region.release()

        for _ in range(2):
            with pytest.raises(ReleasedError, match="released"):
                method(region)

        assert region.released
        assert region.size == SIZE

    def test_the_addresses_belong_to_others(self) -> None:
        """A released region cannot touch a later mapping at its addresses."""
        old = pyreserve.reserve(SIZE)
        base = old.base
        old.release()
        new = pyreserve.reserve(SIZE, at=base)
        new.commit(0, SIZE)
        new.view(0, 4)[:] = b"mine"
        before = state(new)

        for method in (old.decommit, old.discard, old.commit):
            with pytest.raises(ReleasedError):
                method(0, PAGE_SIZE)
        with pytest.raises(ReleasedError):
            old.release()
        del old
        gc.collect()

        assert state(new) == before
        new.release()

    def test_dropping_a_released_region_unmaps_nothing(self) -> None:
        """Dropping a released region does not unmap its addresses a second time."""
        old: Region | None = pyreserve.reserve(SIZE)
        assert old is not None
        base = old.base
        old.commit(0, PAGE_SIZE)
        old.view(0, 1)
        old.release()
        new = pyreserve.reserve(SIZE, at=base)

        old = None
        gc.collect()

        assert witness.nbytes(base, SIZE, witness.RESERVED) == SIZE
        new.release()


def _slice_after_release_of_its_parent(view: memoryview) -> object:
    piece = view[2:10]
    view.release()
    return piece


def _array_after_release(view: memoryview) -> object:
    array: object = np.ndarray((8,), np.uint8, buffer=view)
    with contextlib.suppress(BufferError):
        view.release()
    return array


def _frombuffer_after_release(view: memoryview) -> object:
    array = np.frombuffer(view, np.uint8)
    with contextlib.suppress(BufferError):
        view.release()
    return array


def _exporter(view: memoryview) -> Any:
    return view.obj


def _cycle(view: memoryview) -> object:
    ring: list[object] = [view]
    ring.append(ring)
    return ring


CONSUMERS: dict[str, Callable[[memoryview], object]] = {
    "memoryview": lambda view: view,
    "slice": lambda view: view[3:9],
    "empty slice": lambda view: view[3:3],
    "slice after release of its parent": _slice_after_release_of_its_parent,
    "strided slice": lambda view: view[::3],
    "readonly": lambda view: view.toreadonly(),
    "cast": lambda view: view.cast("Q"),
    "cast, then strided": lambda view: view.cast("Q")[::2],
    "memoryview of the exporter": lambda view: memoryview(view.obj),
    "the exporter itself": lambda view: view.obj,
    "np.frombuffer": lambda view: np.frombuffer(view, np.uint8),
    "np.frombuffer of the exporter": lambda view: np.frombuffer(_exporter(view), np.uint8, 16),
    "np.frombuffer after release": _frombuffer_after_release,
    "np.ndarray": lambda view: np.ndarray((8,), np.uint8, buffer=view),
    "np.ndarray of the exporter": lambda view: np.ndarray((8,), np.uint8, buffer=_exporter(view)),
    "np.ndarray after release": _array_after_release,
    "np.asarray": np.asarray,
    "ndarray slice": lambda view: np.frombuffer(view, np.uint8)[3:9],
    "ndarray reshaped": lambda view: np.frombuffer(view, np.uint8)[:16].reshape(4, 4).T[::2],
    "ndarray of another dtype": lambda view: np.frombuffer(view, np.uint8).view(np.uint64)[1:],
    "memoryview of an ndarray": lambda view: np.frombuffer(view, np.uint8)[3:9].data,
    "dlpack": lambda view: np.from_dlpack(np.frombuffer(view, np.uint8)),
    "ctypes from_buffer": (ctypes.c_char * 16).from_buffer,
    "ctypes element": lambda view: ctypes.c_uint64.from_buffer(view, 8),
    "ctypes cast": lambda view: ctypes.cast(
        (ctypes.c_char * 16).from_buffer(view), ctypes.POINTER(ctypes.c_uint8)
    ),
    "pickle.PickleBuffer": pickle.PickleBuffer,
    "reference cycle": _cycle,
}


class TestLiveViews:
    OFFSET, LENGTH = 2 * PAGE_SIZE, PAGE_SIZE

    @pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS.keys())
    def test_consumers_pin_their_bytes(
        self, used: Region, consumer: Callable[[memoryview], object]
    ) -> None:
        """Any object made from a view pins its bytes until that object is gone."""
        held: object = consumer(used.view(self.OFFSET, self.LENGTH))
        before = state(used)

        for offset, length in [(2, 1), (0, 4), (1, 2), (0, 64)]:
            with pytest.raises(ViewError, match="live view"):
                used.decommit(offset * PAGE_SIZE, length * PAGE_SIZE)
        with pytest.raises(BufferError, match="live view"):
            used.release()

        assert state(used) == before
        assert held is not None
        del held
        gc.collect()
        used.decommit(self.OFFSET, self.LENGTH)
        used.release()
        assert used.released

    @pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS.keys())
    def test_bytes_beside_a_view_are_free(
        self, used: Region, consumer: Callable[[memoryview], object]
    ) -> None:
        """A decommit beside a view succeeds, even if the buffer behind the view extends there."""
        held: object = consumer(used.view(self.OFFSET, self.LENGTH))

        used.decommit(0, 2 * PAGE_SIZE)
        used.decommit(3 * PAGE_SIZE, 61 * PAGE_SIZE)

        assert held is not None
        assert used.committed_runs() == [(self.OFFSET, self.LENGTH)]
        assert witness.peek(used.base + self.OFFSET, 4) == b"\xaa" * 4

    @pytest.mark.parametrize("consumer", CONSUMERS.values(), ids=CONSUMERS.keys())
    def test_bytes_outlive_the_region_object(
        self, consumer: Callable[[memoryview], object]
    ) -> None:
        """Bytes of a garbage region stay mapped while any object shows them."""
        region: Region | None = pyreserve.reserve(1 << 30)
        assert region is not None
        base = region.base
        region.commit(0, 4 * PAGE_SIZE)
        region.view(self.OFFSET, self.LENGTH)[:] = b"\xaa" * self.LENGTH
        held: object = consumer(region.view(self.OFFSET, self.LENGTH))

        region = None
        gc.collect()

        assert held is not None
        assert witness.nbytes(base, 4 * PAGE_SIZE) == 4 * PAGE_SIZE
        assert witness.peek(base + self.OFFSET, self.LENGTH) == b"\xaa" * self.LENGTH
        del held
        gc.collect()
        assert not witness.is_mapped(base)

    def test_the_other_verbs_are_allowed(self, used: Region) -> None:
        """Commit, populate and discard keep bytes accessible, so they are allowed under views."""
        view = used.view(self.OFFSET, self.LENGTH)

        used.commit(0, used.size)
        used.populate(0, used.size)
        kept = bytes(view)
        used.discard(0, used.size)

        assert kept == b"\xaa" * self.LENGTH
        assert bytes(view) == bytes(self.LENGTH)

    def test_views_that_only_touch_a_page(self, used: Region) -> None:
        """A view of the last byte of one page and the first of the next pins these two pages."""
        view = used.view(2 * PAGE_SIZE - 1, 2)

        for first, refused in [(0, False), (1, True), (2, True), (3, False)]:
            if refused:
                with pytest.raises(ViewError):
                    used.decommit(first * PAGE_SIZE, PAGE_SIZE)
            else:
                used.decommit(first * PAGE_SIZE, PAGE_SIZE)

        assert bytes(view) == b"\xaa\xaa"

    def test_leaving_a_with_block_under_a_view(self) -> None:
        """Leaving a with block under a view closes the region; the view keeps the addresses."""
        region = pyreserve.reserve(SIZE)
        base = region.base
        with region:
            region.commit(0, SIZE)
            view = region.view(0, 1)

        assert region.released
        assert region.committed == witness.nbytes(base, SIZE) == SIZE
        view[0] = 1
        del view
        assert not witness.is_mapped(base)

    def test_a_view_of_reserved_bytes_pins_nothing(self, used: Region) -> None:
        """A refused view pins nothing."""
        for _ in range(1000):
            with pytest.raises(RangeError):
                used.view(PAGE_SIZE, 4 * PAGE_SIZE)

        used.decommit(0, used.size)
        used.release()


class TestCopies:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_pickling_is_refused(self, used: Region, protocol: int) -> None:
        """Pickling a region is a TypeError."""
        before = state(used)

        with pytest.raises(TypeError, match="pickled or copied"):
            pickle.dumps(used, protocol)

        assert state(used) == before

    @pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy])
    def test_copying_is_refused(self, used: Region, copier: Callable[[object], object]) -> None:
        """Copying a region, shallow or deep, is a TypeError."""
        before = state(used)

        with pytest.raises(TypeError, match="pickled or copied"):
            copier(used)

        assert state(used) == before

    def test_no_attributes_can_be_added(self, used: Region) -> None:
        """A region has no __dict__ for a caller's attributes."""
        with pytest.raises(AttributeError):
            used.comitted = 5  # type: ignore[attr-defined]


@contextlib.contextmanager
def collecting_at_every_step() -> Iterator[None]:
    """Run the garbage collector, and so finalisers, at nearly every allocation."""
    before = gc.get_threshold()
    gc.set_threshold(1)
    try:
        yield
    finally:
        gc.set_threshold(*before)


class TestFinalisers:
    """Finalisers that run inside a call on a region and call its methods."""

    @staticmethod
    def interrupted(region: Region, act: Callable[[], None]) -> list[type[Exception]]:
        """Call the region's methods while finalisers call `act`; return what that raised."""
        # Not the exceptions: their tracebacks refer to the frames of interrupted calls.
        raised: list[type[Exception]] = []

        class Garbage:
            def __init__(self) -> None:
                self.cycle = self

            def __del__(self) -> None:
                try:
                    act()
                except Exception as error:  # noqa: BLE001, RUF100
                    raised.append(type(error))

        with collecting_at_every_step():
            for i in range(300):
                Garbage()
                place = (i % 8 * 2 * PAGE_SIZE, PAGE_SIZE)
                with contextlib.suppress(ViewError, RangeError, ReleasedError, RuntimeError):
                    for verb in ("commit", "view", "discard", "decommit", "is_committed"):
                        call(region, verb, *place)
                    region.committed_runs()
                    repr(region)
        gc.collect()
        return raised

    @pytest.mark.parametrize(
        "act",
        [
            lambda r: r.commit(0, r.size),
            lambda r: r.decommit(0, r.size),
            lambda r: r.committed_runs(),
            lambda r: (r.commit(0, r.size), r.discard(0, r.size)),
            repr,
        ],
        ids=["commit", "decommit", "committed_runs", "discard", "repr"],
    )
    def test_verbs_inside_a_finaliser(self, act: Callable[[Region], object]) -> None:
        """A finaliser that interrupts a call on the region may call every verb except view."""

        def child() -> None:
            region = pyreserve.reserve(SIZE)

            raised = self.interrupted(region, lambda: (act(region), None)[1])

            assert all(issubclass(error, ViewError) for error in raised)
            seen = witness.runs(region.base, region.size)
            assert region.committed_runs() == seen
            assert region.committed == sum(length for _, length in seen)
            region.release()

        witness.in_child(child)

    def test_views_inside_a_finaliser(self) -> None:
        """A view made in a finaliser works or raises RuntimeError, and the counters stay exact."""

        def child() -> None:
            region = pyreserve.reserve(SIZE)
            kept: list[memoryview] = []

            def act() -> None:
                region.commit(63 * PAGE_SIZE, PAGE_SIZE)
                kept.append(region.view(63 * PAGE_SIZE, 1))

            raised = self.interrupted(region, act)

            assert all(issubclass(error, RuntimeError) for error in raised)
            if kept:
                with pytest.raises(ViewError):
                    region.decommit(63 * PAGE_SIZE, PAGE_SIZE)
            kept.clear()
            region.release()

        witness.in_child(child)

    def test_a_release_inside_a_finaliser(self) -> None:
        """A finaliser that releases the region during a call leaves it released; no crash."""

        def child() -> None:
            for _ in range(20):
                region = pyreserve.reserve(SIZE)

                raised = self.interrupted(region, region.release)

                assert region.released
                assert all(issubclass(e, (ViewError, ReleasedError)) for e in raised)

        witness.in_child(child)

    @pytest.mark.parametrize("threshold", [1, 7, 50, 333, 1000])
    @pytest.mark.parametrize("act", ["release", "commit", "decommit"])
    def test_a_list_of_runs_is_one_moment(self, act: str, threshold: int) -> None:
        """A list of runs shows a finaliser's change to the region wholly or not at all."""

        def child() -> None:
            pages = 4000
            region = pyreserve.reserve(4 * pages * PAGE_SIZE)
            for i in range(0, pages, 2):
                region.commit(i * PAGE_SIZE, PAGE_SIZE)
            before = region.committed_runs()
            after: list[object] = []

            class Garbage:
                def __init__(self) -> None:
                    self.cycle = self

                def __del__(self) -> None:
                    gc.disable()
                    if act == "release":
                        region.release()
                        return
                    if act == "decommit":
                        region.decommit(0, pages * PAGE_SIZE // 2)
                    else:
                        for i in range(pages, 3 * pages, 2):
                            region.commit(i * PAGE_SIZE, PAGE_SIZE)
                    after.append(region.committed_runs())

            gc.collect()
            Garbage()
            thresholds = gc.get_threshold()
            gc.set_threshold(threshold)
            try:
                got: object = region.committed_runs()
            except ReleasedError:
                got = "released"
            gc.set_threshold(*thresholds)
            gc.enable()
            gc.collect()

            assert got in (before, "released", *after)

        witness.in_child(child)
