"""GrowableArray: values and sequences of any kind, appenders, spare items, numpy's protocols."""

import array as stdlib_array
import copy
import gc
import pickle
import signal
import sys
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from types import FrameType
from typing import Any

import numpy as np
import pytest

from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    GrowableArray,
    MiB,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    StateError,
    ViewError,
)

Add = Callable[[GrowableArray[Any], Any], None]


def filled(items: Any, dtype: Any = "f8", **options: Any) -> GrowableArray[Any]:
    array: GrowableArray[Any] = GrowableArray(dtype, MiB, **options)
    array.extend(items)
    return array


def by_append(array: GrowableArray[Any], value: Any) -> None:
    array.append(value)


def by_appender(array: GrowableArray[Any], value: Any) -> None:
    """Append by an appender that already has cells."""
    add = array.appender()
    add(np.zeros(1, array.dtype)[0])
    array.pop()
    add(np.zeros(1, array.dtype)[0])
    add(value)
    kept = array.pop()
    array.pop()
    array.append(kept)


def by_extend(array: GrowableArray[Any], value: Any) -> None:
    array.extend([value])


def by_long_extend(array: GrowableArray[Any], value: Any) -> None:
    array.extend([np.zeros(1, array.dtype)[0]] * 30 + [value])
    kept = array.pop()
    array.resize(len(array) - 30)
    array.append(kept)


def by_setitem(array: GrowableArray[Any], value: Any) -> None:
    length = len(array)
    array.append(np.zeros(1, array.dtype)[0])
    try:
        array[length] = value
    except BaseException:
        array.pop()
        raise


WAYS: list[Add] = [by_append, by_appender, by_extend, by_long_extend, by_setitem]
ways = pytest.mark.parametrize("add", WAYS, ids=lambda add: add.__name__)

DTYPES = ["?", "i1", "u1", "i4", "u8", "f2", "f4", "f8", "c8", "c16", ">i4", ">f4", ">f8", "m8[s]"]
DTYPES += ["M8[s]", "S3", "U3"]
VALUES: list[Any] = [
    *(True, -1, 300, 2**31, 2**63, 2**64, 10**39, 10**400),
    *(0.5, 1e300, -1e300, 1e-300, 3.4028235e38, 3.4028236e38, float("nan"), float("-inf"), 1 + 2j),
    *(np.True_, np.int8(-3), np.uint64(2**64 - 1), np.float16(2.5), np.float32(2.5)),
    *(np.float64(1e300), np.longdouble("1e4000"), np.complex64(1 + 2j)),
    np.int64(2**60 + 2**36 + 1),  # becomes another float32 if it is rounded to float64 first
    *(np.timedelta64(5, "s"), np.timedelta64("NaT", "s"), np.datetime64("2020-01-01")),
    *("12", "x", b"12", np.str_("7"), np.bytes_(b"7"), None, Fraction(1, 2), np.array(5)),
]


def outcome(action: Callable[[], bytes]) -> tuple[bytes | type[BaseException], set[str]]:
    """Return the bytes of the item or the type of the exception, and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result: bytes | type[BaseException] = action()
        except (TypeError, ValueError, OverflowError) as error:
            result = type(error)
    return result, {warning.category.__name__ for warning in caught}


class TestValues:
    @ways
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_as_numpy_converts_them(self, add: Add, dtype: str) -> None:
        """Every way to store a value gives numpy's item, numpy's error, and numpy's warning."""

        def by_numpy() -> bytes:
            return np.array(value, dtype).tobytes()

        def by_assignment() -> bytes:
            one = np.zeros(1, dtype)
            one[0] = value
            return one.tobytes()

        def ours() -> bytes:
            array = filled(np.zeros(2, dtype), dtype)
            try:
                add(array, value)
            except BaseException:
                assert len(array) == 2 or add in {by_appender, by_long_extend}
                raise
            assert len(array) == 3
            assert not array.array[:2].view(np.uint8).any()
            return array.array[2:].tobytes()

        for value in VALUES:
            if add is by_long_extend and type(value) in {np.int64, np.longdouble, np.bool_}:
                continue  # among other numbers: as Python converts them, with its warnings
            expected = [outcome(by_numpy), outcome(by_assignment)]
            result, warned = outcome(ours)
            assert (result, warned) in expected, (value, result, expected)

    @ways
    @pytest.mark.parametrize(
        ("dtype", "value"), [("f4", 1e300), ("f4", np.float64(1e39)), ("f8", np.complex128(1j))]
    )
    def test_warnings_as_errors(self, add: Add, dtype: str, value: Any) -> None:
        """If numpy's warning is an error, the value is not stored."""
        array = filled([1, 2], dtype)

        with pytest.raises(RuntimeWarning):  # or ComplexWarning, which is one
            add(array, value)

        assert array.array[:2].tolist() == [1, 2]
        assert 1j not in array
        assert not np.isinf(array).any()

    @ways
    def test_a_handler_of_numpys_errors(self, add: Add) -> None:
        """numpy's handler of an overflow may use the array, and sees whole items only."""
        array = filled([1, 2], "f4")
        seen: list[list[float]] = []

        def handle(*_: object) -> None:
            seen.append(array.array.tolist())

        with np.errstate(over="call", call=handle):
            add(array, 1e300)

        assert seen
        assert all(np.isfinite(items).all() for items in seen)
        assert array.array.tolist() == [1, 2, float("inf")]

    @ways
    def test_values_that_raise(self, add: Add) -> None:
        """An exception from a value's own method reaches the caller; nothing is stored."""

        class Value:
            def __float__(self) -> float:
                raise KeyboardInterrupt

        array = filled([1, 2])

        with pytest.raises(KeyboardInterrupt):
            add(array, Value())

        assert array.array[:2].tolist() == [1, 2]
        array.resize(2)
        array.append(3)
        assert array.array.tolist() == [1, 2, 3]

    def test_values_that_wait_for_another_thread(self) -> None:
        """A value's method may wait for a thread that uses the array: no lock is held."""
        array = filled([])

        class Value:
            def __float__(self) -> float:
                worker = threading.Thread(target=array.append, args=(1,))
                worker.start()
                worker.join(20)
                assert not worker.is_alive()
                return 2.0

        array.append(Value())
        array.appender()(Value())
        array.extend([Value()])

        assert array.array.tolist() == [1, 2] * 3

    @pytest.mark.parametrize("name", ["trim", "clear", "close", "pop"])
    def test_values_that_use_the_array(self, name: str) -> None:
        """A value's method may shorten, trim or close the array it is stored in."""
        array = filled(range(100))

        class Value:
            def __float__(self) -> float:
                getattr(array, name)()
                return 7.0

        before = len(array)
        if name == "close":
            with pytest.raises(ReleasedError):
                array.append(Value())
            return
        for _ in range(2):
            array.append(Value())
            array.extend([Value(), 1])

        assert array[-2:].tolist() == [7, 1]
        assert len(array) in {2, before + 6, before + 2}

    def test_assignment_that_shortens(self) -> None:
        """While numpy assigns to items, they can't be cut off."""
        array = filled(range(10))

        class Value:
            def __float__(self) -> float:
                array.clear()
                return 7.0

        with pytest.raises(ViewError):
            array[3] = Value()

        assert array.array.tolist() == list(range(10))


def raising(count: int) -> Iterator[int]:
    yield from range(count)
    raise LookupError


class TestExtend:
    @pytest.mark.parametrize(
        ("values", "expected"),
        [
            ([], []),
            ((), []),
            ([5], [5]),
            ((1, 2), [1, 2]),
            (range(100), list(range(100))),
            (list(range(100)), list(range(100))),
            (deque([1, 2]), [1, 2]),
            ({3: "a", 4: "b"}.keys(), [3, 4]),
            ({3: 1, 4: 2}.values(), [1, 2]),
            ({7}, [7]),
            (frozenset({7}), [7]),
            (map(abs, [-1, -2]), [1, 2]),
            (iter([1, 2]), [1, 2]),
            (np.arange(3, dtype=">i2"), [0, 1, 2]),
            (np.arange(6)[::2], [0, 2, 4]),
            (np.arange(3.0)[::-1], [2, 1, 0]),
            (np.array([1, 2], object), [1, 2]),
            (np.ma.array([1, 2], mask=[False, True]), [1, 2]),
            (stdlib_array.array("h", [1, 2]), [1, 2]),
            (memoryview(b"\1\2"), [1, 2]),
            (bytearray(b"\1\2"), [1, 2]),
            (["1", "2.5"], [1, 2.5]),
            ([Fraction(1, 2)] * 20, [0.5] * 20),
            ([1.5, Fraction(1, 2)] * 20, [1.5, 0.5] * 20),
            ([None] * 20, [float("nan")] * 20),
            ([1.5, None] * 20, [1.5, float("nan")] * 20),
            ((i / 2 for i in range(10_000)), [i / 2 for i in range(10_000)]),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_any_sequence(self, values: Any, expected: list[float]) -> None:
        """extend takes whatever numpy takes as an array, and any iterable."""
        array = filled([9])

        array.extend(values)

        assert np.array_equal(array.array, [9, *expected], equal_nan=True)

    @pytest.mark.parametrize(
        "values",
        [
            5,
            None,
            np.array(5),
            "text",
            b"12",
            {1: 2},
            [[1]],
            [[1], [2]],
            [[1, 2]],
            [[1] * 30] * 30,
            [1, [2]],
            [1.5] * 20 + [[2]],
            [1.5] * 5 + [np.array([2, 3])],
            np.zeros((1, 1)),
            np.zeros((0, 2)),
            np.zeros((3, 1)),
            np.ones((1, 2)).view(np.matrix),
            [Ellipsis],
            {Ellipsis},
        ],
        ids=lambda values: type(values).__name__,
    )
    def test_never_broadcast(self, values: Any) -> None:
        """Values of another shape or kind are refused, never repeated, and change nothing."""
        array = filled([9, 8])

        with pytest.raises((TypeError, ValueError)):
            array.extend(values)

        assert array.array.tolist() == [9, 8]

    @pytest.mark.parametrize("dtype", ["u1", "i8", "f4", "f8"])
    @pytest.mark.parametrize("length", [1, 2, 300, (1 << 16) + 1])
    def test_lists_of_every_length(self, dtype: str, length: int) -> None:
        """A list is appended wholly or, if one of its values is refused, not at all."""
        array = filled([7], dtype)
        values = [n % 251 for n in range(length)]

        for bad in ("x", 1j, [1]):
            with pytest.raises((TypeError, ValueError)):
                array.extend([*values, bad])
        array.extend(values)

        assert array.array.tolist() == [7, *values]

    @pytest.mark.parametrize("length", [1, 30])
    def test_a_number_of_a_list_that_appends(self, length: int) -> None:
        """What a number appends while a list is converted stays, before the list."""
        array = filled([])

        class Number:
            def __float__(self) -> float:
                array.append(9)
                return 7.0

        array.extend([1.5] * length + [Number()])

        assert array.array.tolist() == [9] + [1.5] * length + [7]

    @pytest.mark.parametrize("count", [0, 1, 4095, 4096, 4097, 10_000])
    def test_an_iterable_that_raises(self, count: int) -> None:
        """Items that an iterable gave before it raised stay, as with list.extend."""
        array = filled([])

        with pytest.raises(LookupError):
            array.extend(raising(count))

        assert array.array.tolist() == list(range(count))

    def test_an_iterable_that_appends(self) -> None:
        """Items that an iterable appends itself are neither lost nor doubled."""
        array = filled([])
        add = array.appender()

        def values() -> Iterator[float]:
            for i in range(5000):
                array.append(-i)
                add(-i)
                yield i

        array.extend(values())

        assert len(array) == 15_000
        assert sorted(array.array[array.array > 0]) == list(range(1, 5000))
        assert sorted(-array.array[array.array < 0]) == sorted([*range(1, 5000)] * 2)

    def test_an_iterable_that_fills_the_capacity(self) -> None:
        """Pieces that fit stay; the one that does not is refused whole."""
        array: GrowableArray[Any] = GrowableArray("f8", 5000)

        with pytest.raises(OutOfMemoryError):
            array.extend(iter(range(10_000)))

        assert array.array.tolist() == list(range(4096))

    @pytest.mark.parametrize("method", ["__len__", "__getitem__", "__iter__", "__array__"])
    def test_sequences_that_raise(self, method: str) -> None:
        """An exception from a method of the values reaches the caller; nothing is stored."""

        def fail(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        parts = {"__len__": lambda _: 3, "__getitem__": lambda _, i: i, method: fail}
        kind = type("Values", (), parts)
        array = filled([1])

        # numpy ignores an exception of __len__, and finds no sequence.
        with pytest.raises(KeyboardInterrupt if method != "__len__" else (TypeError, ValueError)):
            array.extend(kind())

        assert array.array.tolist() == [1]

    def test_from_its_own_memory(self) -> None:
        """Views of the array, and spare items, are sources like others."""
        array = filled(range(10))
        spare = array.spare(4)
        spare[:] = [40, 41, 42, 43]

        array.extend(spare[::-1])
        array.extend(array[2:4])
        array.extend(array)

        first = [*range(10), 43, 42, 41, 40, 2, 3]
        assert array.array.tolist() == first * 2

    @pytest.mark.interop
    def test_pandas(self) -> None:
        """A Series is appended by its values."""
        pandas = pytest.importorskip("pandas")
        array = filled([])

        array.extend(pandas.Series([1.5, 2.5], index=[7, 8]))

        assert array.array.tolist() == [1.5, 2.5]


class TestRows:
    def test_rows(self) -> None:
        """With an item_shape each item is a row: appended, extended, indexed, assigned, popped."""
        array = filled([[1, 2], [3, 4]], "i4", item_shape=2)

        array.append([5, 6])
        array.appender()((7, 8))
        array.extend([row, row] for row in (9, 10))
        array.extend([])
        array.extend(np.empty((0, 2)))
        array[0] = [0, 0]
        array[1:3] = 1
        popped = array.pop()
        array.extend(array)

        assert popped.tolist() == [10, 10]
        assert array.array.tolist() == [[0, 0], [1, 1], [1, 1], [7, 8], [9, 9]] * 2
        assert (array.shape, array.ndim, array.size, array.nbytes) == ((10, 2), 2, 20, 80)
        assert (array.itemsize, array.item_shape, len(array)) == (4, (2,), 10)
        assert [row.sum() for row in array][:4] == [0, 2, 2, 15]
        assert array[-1].tolist() == [9, 9]
        with pytest.raises(IndexError):
            array[10]

    @pytest.mark.parametrize("row", [1, [1], [1, 2, 3], [[1, 2]], np.zeros((2, 1)), "12"], ids=str)
    def test_rows_of_another_shape(self, row: Any) -> None:
        """A row of another shape is refused, never broadcast."""
        array = filled([[1, 2]], "i4", item_shape=(2,))

        for add in (by_append, by_extend):
            with pytest.raises(ValueError, match="shape"):
                add(array, row)
        with pytest.raises(ValueError, match="shape"):
            array.extend(np.zeros((3, 1)))

        assert array.array.tolist() == [[1, 2]]

    @pytest.mark.parametrize("shape", [0, (2, 0), -1, (3, -2)])
    def test_shapes_that_make_no_sense(self, shape: Any) -> None:
        """Each side of an item_shape is positive."""
        with pytest.raises(RangeError, match="positive sides"):
            GrowableArray("f4", item_shape=shape)

    def test_records_pin_themselves_alone(self) -> None:
        """A record of a structured array is a view of itself, and pins no other item."""
        array = filled([(i, 2) for i in range(9)], [("a", "i1"), ("b", "f8")])
        held = [array[4], array[-5]]
        popped = array.pop()

        array.resize(5)
        array.trim()
        held[0]["a"] = 7

        with pytest.raises(ViewError):
            array.resize(4)
        assert held[0] == held[1] == array[4]
        assert popped.item() == (8, 2)
        held.clear()
        array.clear()


class TestViews:
    @pytest.mark.parametrize(
        ("key", "shortest"),
        [
            (slice(2, 5), 5),
            (slice(-98, -95), 5),
            (slice(0, 9, 4), 9),
            (slice(5, 2), 0),
            (slice(90, 1000), 100),
            (slice(None), 100),
            (slice(None, None, -1), 100),
            (7, 0),
        ],
        ids=str,
    )
    def test_a_slice_pins_its_items(self, key: Any, shortest: int) -> None:
        """A slice pins the items up to its last one, a number none."""
        array = filled(range(100))
        held = [array[key]]
        assert np.array_equal(held[0], np.arange(100.0)[key])

        array.resize(shortest)

        if shortest:
            with pytest.raises(ViewError):
                array.resize(shortest - 1)
        held.clear()
        array.clear()

    def test_numbers_pin_nothing(self) -> None:
        """Reading, popping, iterating to the end and failing leave no live view."""
        array = filled(range(100))

        for value in array:
            assert value == array[int(value)] == array[int(value) - 100]
        for wrong in (100, -101, "a", 1.5, (0, 0)):
            with pytest.raises(IndexError):
                array[wrong]
        assert array.pop() == 99
        assert 5 in array

        array.clear()
        with pytest.raises(IndexError, match="empty"):
            array.pop()

    def test_no_deletion(self) -> None:
        """Items can't be deleted from the middle: earlier arrays show them."""
        array = filled(range(3))

        with pytest.raises(TypeError, match="pop"):
            del array[0]

    def test_popping_what_is_shown(self) -> None:
        """pop refuses to remove an item that a view shows."""
        array = filled(range(3))
        held = array[1:]

        with pytest.raises(ViewError):
            array.pop()

        assert held.tolist() == [1, 2]
        assert len(array) == 3


class Struck(BaseException):
    pass


def each_line(files: tuple[str, ...], action: Callable[[], object]) -> Iterator[int]:
    """Call `action`; on each round an exception is raised at one more line of these files."""
    for stop in range(10_000):
        lines = 0

        def trace(frame: FrameType, event: str, _: object, stop: int = stop) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.endswith(files):
                return None
            if event == "line":
                lines += 1
                if lines > stop:
                    raise Struck
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            action()
        except Struck:
            pass
        finally:
            sys.settrace(before)
        yield stop
        if lines <= stop:
            return


class TestDebugger:
    @pytest.mark.parametrize("dtype", ["f8", ">f8"])
    @pytest.mark.parametrize(
        ("store", "removed", "results"),
        [
            (lambda array: array.append(np.float64(9)), False, [[1, 2, 3, 9, 7], [1, 2, 3, 7, 9]]),
            (lambda array: array.append(np.float64(9)), True, [[3, 9]]),
            (lambda array: array.__setitem__(2, np.float64(9)), True, [[3, 0, 0], [9, 0, 0]]),
        ],
    )
    def test_calls_back_between_lines(
        self, dtype: str, store: Any, removed: bool, results: list[list[int]]
    ) -> None:
        """What a debugger appends or removes between two lines of a store is not undone."""
        for stop in range(1000):
            array = filled([1.0, 2.0, 3.0], dtype)
            lines = 0

            def trace(
                frame: FrameType,
                event: str,
                _: object,
                stop: int = stop,
                array: GrowableArray[Any] = array,
            ) -> Any:
                nonlocal lines
                if event == "line" and frame.f_code.co_filename.endswith("growablearray.py"):
                    lines += 1
                    if lines == stop + 1:
                        array.drop_front(2) if removed else array.append(7)
                return trace

            before = sys.gettrace()
            sys.settrace(trace)
            try:
                store(array)
            except IndexError:  # the item was removed first
                pass
            finally:
                sys.settrace(before)
            if lines <= stop:
                break
            if len(results[0]) == 3:
                array.resize(3)  # new items are zero
            assert array.array.tolist() in results, stop


class TestAppender:
    @pytest.mark.parametrize("dtype", ["f8", "f4", "i2", "?", "c16", ">f8", "f2", "M8[s]", "U3"])
    def test_items_in_order(self, dtype: str) -> None:
        """Items keep their order where an appender goes on to the next window."""
        expected = np.arange(20_000).astype("i8" if dtype == "M8[s]" else "f8").astype(dtype)
        array: GrowableArray[Any] = GrowableArray(dtype, MiB)
        add = array.appender()

        for value in expected:
            add(value)

        assert np.array_equal(array.array, expected)

    def test_between_other_calls(self) -> None:
        """Every other call takes effect after the items appended so far."""
        array = filled([])
        add = array.appender()
        for _ in range(3):
            add(1)
            assert len(array) == 1
            add(2)
            array.append(3)
            array.extend([4, 5])
            add(6)
            assert array[-1] == array[5] == 6
            array[5] = 7
            assert array.pop() == 7
            add(8)
            assert array.array.tolist() == [1, 2, 3, 4, 5, 8]
            add(9)
            assert (array.nbytes, array.shape, repr(array)[:25]) == (
                56,
                (7,),
                "<GrowableArray of 7 items",
            )
            array.trim()
            add(10)
            array.resize(9)
            assert array.array.tolist() == [1, 2, 3, 4, 5, 8, 9, 10, 0]
            add(11)
            array.clear()

    def test_two_at_once(self) -> None:
        """Appenders take turns without loss."""
        array = filled([])
        first, second = array.appender(), array.appender()

        for i in range(0, 3000, 3):
            first(i)
            second(i + 1)
            second(i + 2)

        assert array.array.tolist() == list(range(3000))

    @pytest.mark.parametrize("wrong", ["x", None, [1], 10**400, Ellipsis, np.zeros(1), {}])
    def test_values_that_do_not_fit(self, wrong: Any) -> None:
        """A value that is refused leaves the items before and after it."""
        array = filled([])
        add = array.appender()

        for i in range(10):
            add(i)
            if wrong is None:
                continue
            with pytest.raises((TypeError, ValueError, OverflowError)):
                add(wrong)

        assert array.array.tolist() == list(range(10))

    def test_to_the_last_item(self) -> None:
        """At the capacity an appender is refused like the others; later it goes on."""
        array: GrowableArray[Any] = GrowableArray("u1", 10)
        add = array.appender()
        for i in range(10):
            add(i)

        for _ in range(3):
            with pytest.raises(OutOfMemoryError):
                add(10)
        array.pop()
        add(11)

        assert array.array.tolist() == [*range(9), 11]

    def test_the_end(self) -> None:
        """After close or release an appender raises ReleasedError."""
        for name in ("close", "release"):
            array = filled([])
            add = array.appender()
            add(1)
            base = array.base
            getattr(array, name)()
            for _ in range(2):
                with pytest.raises(ReleasedError):
                    add(2)
            assert not witness.is_mapped(base)

    def test_of_a_dropped_array(self) -> None:
        """An appender keeps neither the array nor its memory, and needs no garbage collector."""
        array: GrowableArray[Any] | None = filled([])
        assert array is not None
        add, base, gone = array.appender(), array.base, weakref.ref(array)
        add(1)
        gc.disable()
        try:
            array = None
            assert gone() is None
            assert not witness.is_mapped(base)
        finally:
            gc.enable()

        with pytest.raises(ReleasedError, match="gone"):
            add(2)

    def test_a_dropped_appender(self) -> None:
        """Items outlive their appender; the array goes without the garbage collector."""
        array = filled([])
        gc.disable()
        try:
            array.appender()(1)
            array.appender()(2)
            assert array.array.tolist() == [1, 2]
            array.appender()(3)
            base = array.base
            del array
            assert not witness.is_mapped(base)
        finally:
            gc.enable()

    def test_in_a_child(self) -> None:
        """After a fork both processes append on, each to its own copy."""
        array = filled([])
        add = array.appender()
        add(1)

        def child() -> list[float]:
            add(2)
            return array.array.tolist()  # type: ignore[no-any-return]

        assert witness.in_child(child) == [1, 2]
        add(3)
        assert array.array.tolist() == [1, 3]

    def test_an_exception_at_any_line(self) -> None:
        """Wherever a signal handler raises, each item is there once, or not at all."""
        array: GrowableArray[Any] = GrowableArray("f8", MiB)
        add = array.appender()
        expected: list[float] = []
        value = 0

        def use() -> None:
            nonlocal value
            for call in (
                add,
                array.append,
                lambda value: array.extend(np.array([value])),
                lambda value: array.extend([value] * 1),
                add,
                lambda value: (array.trim(), add(value)),
                lambda _: len(array),
                lambda _: array[-1],
                add,
            ):
                value += 1
                call(value)

        # Without owner.py: no signal handler runs between its lines that count here.
        files = ("appender.py", "growablearray.py", "growable.py")
        for _ in each_line(files, use):
            array.trim()
            result = array.array.tolist()
            assert result[: len(expected)] == expected
            assert result == sorted(set(result))
            assert all(item <= value for item in result)
            expected = result
            add(value := value + 1)
            expected = [*expected, value]
            assert array.array.tolist() == expected

    def test_a_signal_handler_that_appends(self) -> None:
        """Items that a signal handler appends are among the others, each once."""
        array: GrowableArray[Any] = GrowableArray("i8", 1 << 26)
        add, handled = array.appender(), 0

        def handle(*_: object) -> None:
            nonlocal handled
            try:
                for call in (array.append, add, lambda value: array.extend(np.array([value]))):
                    call(-1)
                    handled += 1
            except StateError:
                pass

        before = signal.signal(signal.SIGALRM, handle)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.0007)
        try:
            part = np.arange(3)
            for i in range(20_000):
                add(i)
                array.append(i)
                array.extend(part)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

        items = array.array
        assert np.count_nonzero(items == -1) == handled > 0
        assert len(items) == 100_000 + handled
        assert np.array_equal(
            items[items >= 0].reshape(-1, 5),
            [[i, i, 0, 1, 2] for i in range(20_000)],
        )

    @pytest.mark.parametrize("traced", [False, True])
    def test_beside_threads(self, traced: bool) -> None:
        """One thread appends by an appender, others by other calls: no item is lost or doubled.

        Neither under a debugger, whose code runs between the lines; without the appender, since
        before Python 3.13 a debugger writes old values back to the variables of closures.
        """
        array: GrowableArray[Any] = GrowableArray("i8", 1 << 22)
        rounds, errors = 1000 if traced else 3000, []

        def trace(*_: object) -> Any:
            return trace

        def run(number: int) -> None:
            if traced:
                sys.settrace(trace)
            calls: list[Callable[[int], object]] = [
                array.append if traced else array.appender(),
                array.append,
                lambda value: array.extend(np.array([value])),
                lambda value: array.extend([value]),
            ]
            try:
                for i in range(rounds):
                    calls[number](number * rounds + i)
                    if i % 100 == 0:
                        len(array)
            except BaseException as error:  # noqa: BLE001, RUF100
                errors.append(error)

        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            workers = [threading.Thread(target=run, args=(n,)) for n in range(4)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        finally:
            sys.setswitchinterval(before)

        assert errors == []
        assert sorted(array.array.tolist()) == list(range(4 * rounds))


class TestSpare:
    def test_filled_in_place(self) -> None:
        """Items written by `spare` become part of the array, a piece at a time."""
        array = filled([1, 2], "u1")
        spare = array.spare(6)
        spare[:] = range(10, 16)

        assert len(array) == 2
        array.advance(2)
        array.advance(0)
        array.advance(1)

        assert array.array.tolist() == [1, 2, 10, 11, 12]
        assert np.shares_memory(spare, array.array)
        with pytest.raises(RangeError, match=r"n must be in \[0, 3\]"):
            array.advance(4)

    @pytest.mark.parametrize("shape", [(), (3,)])
    def test_their_shape(self, shape: tuple[int, ...]) -> None:
        """Spare items have the item shape, and are writable."""
        array: GrowableArray[Any] = GrowableArray("f4", MiB, item_shape=shape)

        assert array.spare(5).shape == (5, *shape)
        assert array.spare(0).shape == (0, *shape)
        assert array.spare(5).flags.writeable
        for wrong in (-1, MiB + 1):
            with pytest.raises((RangeError, OutOfMemoryError)):
                array.spare(wrong)

    @pytest.mark.parametrize(
        "change",
        [
            lambda array: array.append(1),
            lambda array: array.appender()(1),
            lambda array: array.extend([1]),
            lambda array: array.pop(),
            lambda array: array.resize(3),
            lambda array: array.resize(20),
            lambda array: array.clear(),
        ],
    )
    def test_after_other_calls(self, change: Callable[[GrowableArray[Any]], object]) -> None:
        """After another call changed the length, the next items are not the spare ones."""
        array = filled(range(10))
        array.spare(5)
        change(array)
        length = len(array)
        array.advance(0)

        with pytest.raises(RangeError, match="last spare"):
            array.advance(1)

        assert len(array) == length

    def test_without_spare(self) -> None:
        """Nothing can be advanced without spare, or after trim took it."""
        array = filled([1])
        with pytest.raises(RangeError):
            array.advance(1)

        array.spare(10_000)
        array.trim()
        with pytest.raises(RangeError):
            array.advance(10_000)
        assert array.array.tolist() == [1]

    def test_held_over_the_end(self) -> None:
        """Spare items stay valid while an array of them is held."""
        array = filled([1])
        spare = array.spare(10_000)
        spare[:] = 7

        with pytest.raises(ViewError):
            array.trim()
        with pytest.raises(ViewError):
            array.release()
        array.close()

        assert spare.tolist() == [7] * 10_000

    def test_zero_afterwards(self) -> None:
        """Items that resize adds are zero, whatever was written to spare ones."""
        array = filled([1])
        array.spare(100)[:] = 7
        array.advance(10)

        array.resize(5)
        array.resize(50)

        assert array.array.tolist() == [1, *[7] * 4, *[0] * 45]

    def test_old_bytes(self) -> None:
        """With zero=False new items may have old values, and are cleared by the next resize."""
        array = filled([1, 2, 3])
        array.clear()

        array.resize(3, zero=False)
        assert array.array.tolist() == [1, 2, 3]
        array.clear()
        array.resize(3)

        assert array.array.tolist() == [0, 0, 0]


@pytest.mark.parametrize("values", [[1, 2, 3], np.arange(3), 3])
def test_values_in_the_place_of_the_dtype(values: Any) -> None:
    """Values given to the constructor are refused by a message that says what belongs there."""
    with pytest.raises(TypeError, match="dtype, the first argument, must be a dtype such as"):
        GrowableArray(values)


def test_a_size_in_bytes_is_no_length() -> None:
    """An array's length is in items."""
    with pytest.raises(TypeError, match="length is a number of items, not of bytes"):
        filled([1]).resize("1MiB")  # type: ignore[arg-type]


def test_items_that_were_copied_are_not_pinned() -> None:
    """Extending by an array, or assigning it, pins none of its memory."""
    array = filled([1, 2])
    other = filled([0, 0, 0, 0])
    array.extend(array)
    other[:] = array
    other.extend(array)

    assert other.array.tolist() == [1, 2, 1, 2] * 2
    array.clear()
    array.trim()
    assert array.committed == 0


@pytest.mark.skipif(sys.version_info < (3, 12), reason="PEP 688 is of Python 3.12")
class TestBuffer:
    def test_exported(self) -> None:
        """A memoryview has the items' format and shape, and pins them."""
        array = filled([[1, 2], [3, 4]], "i4", item_shape=2)

        view = memoryview(array)

        assert (view.format, view.shape, view.readonly) == ("i", (2, 2), False)
        with pytest.raises(ViewError):
            array.clear()
        del view
        array.clear()
        assert memoryview(array).nbytes == 0

    def test_a_consumer_that_keeps_the_object_alone(self) -> None:
        """The bytes that were exported stay mapped as long as a consumer keeps the array."""
        array: GrowableArray[Any] | None = filled(np.arange(2 * PAGE_SIZE))
        assert array is not None
        base = array.base
        held: Any = np.ndarray(2 * PAGE_SIZE, buffer=array)  # type: ignore[arg-type]

        array.clear()
        array.trim()
        array.release()
        assert array.released
        array = None

        assert held.tolist() == list(range(2 * PAGE_SIZE))
        del held
        assert not witness.is_mapped(base)

    def test_without_a_consumer(self) -> None:
        """Items without a buffer format raise numpy's error, and numpy still takes the array."""
        array = filled(np.arange(3).astype("M8[s]"), "M8[s]")

        with pytest.raises(ValueError, match="buffer"):
            memoryview(array)
        assert np.asarray(array).tolist() == array.array.tolist()


class NoUfuncs:
    __array_ufunc__ = None

    def __add__(self, other: object) -> str:
        return "added"

    __radd__ = __add__


# numpy's types do not know that ufuncs take it as operand of another class, or as out.
ufuncs: Any = np


class TestNumpy:
    def test_operators(self) -> None:
        """Operators return the same as on `array`."""
        array, plain = filled([3, 4, 5]), np.array([3.0, 4, 5])

        results: list[tuple[Any, Any]] = [
            (array + 1, plain + 1),
            (1 - array, 1 - plain),
            (array * array, plain * plain),
            (plain / array, plain / plain),
            (array @ array, plain @ plain),
            (array**2, plain**2),
            (-array, -plain),
            (abs(array), abs(plain)),
            (array > 3, plain > 3),
            (array == plain, plain == plain),  # noqa: PLR0124
            (divmod(array, 2), divmod(plain, 2)),
            (divmod(7, array), divmod(7, plain)),
            (np.sin(array), np.sin(plain)),
            (np.add.reduce(array), 12),
            (np.add.accumulate(array), [3, 7, 12]),
            (np.multiply.outer(array, array), np.multiply.outer(plain, plain)),
            (np.add.reduceat(array, [0, 2]), [7, 5]),
            (np.add.reduce(array, initial=10, where=array > 3), 19),
            (np.concatenate([array, array]), [3, 4, 5, 3, 4, 5]),
            (np.mean(array), 4),
            (np.add([1, 2, 3], array, where=filled([1, 0, 1], "?"), out=np.zeros(3)), [4, 0, 8]),
        ]

        for result, expected in results:
            assert not isinstance(result, GrowableArray)
            assert np.array_equal(result, expected)
        assert bool(array)
        with pytest.raises(TypeError, match="unhashable"):
            hash(array)

    def test_in_place(self) -> None:
        """In-place operators and out= write the items, and give the array itself."""
        array = before = filled([3, 4, 5])
        shown = array.array

        array += 1
        array *= array
        array //= np.array([2, 2, 2])
        assert array is before
        assert shown.tolist() == array.array.tolist() == [8, 12, 18]
        assert ufuncs.sqrt([4, 9, 16], out=array) is array
        assert shown.tolist() == [2, 3, 4]
        np.add.at(array, [0, 0], 1)
        np.add.at(array, filled([1], "i8"), filled([5]))
        assert shown.tolist() == [4, 8, 4]
        whole, rest = filled([0, 0]), filled([0, 0])
        result = ufuncs.divmod([7, 9], 4, out=(whole, rest))
        assert result[0] is whole
        assert result[1] is rest
        assert (whole.array.tolist(), rest.array.tolist()) == ([1, 2], [3, 1])
        one = filled([0])
        assert np.add.reduce(array, out=one.array.reshape(())) == 16
        assert np.add.accumulate(array, out=array) is array
        assert shown.tolist() == [4, 12, 16]

    def test_in_place_errors(self) -> None:
        """A refused in-place operator changes nothing."""
        array = filled([1, 2, 3], "i8")
        operand: Any
        for operand, error in ((0.5, TypeError), ([1, 2], ValueError), ("x", TypeError)):
            with pytest.raises(error):
                array += operand
        assert array.array.tolist() == [1, 2, 3]

    def test_an_operand_that_refuses(self) -> None:
        """An operand without ufuncs answers itself; in place it is refused, as by an ndarray."""
        array: Any = filled([1])
        kept = array

        assert array + NoUfuncs() == NoUfuncs() + array == "added"
        with pytest.raises(TypeError):
            array += NoUfuncs()

        assert kept.array.tolist() == [1]
        with pytest.raises(TypeError):
            ufuncs.add(kept, NoUfuncs())

    def test_an_operand_with_ufuncs_of_its_own(self) -> None:
        """Another class with __array_ufunc__ is asked, with an ndarray in the array's place."""

        class Other:
            def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **_: Any) -> Any:
                return [type(value).__name__ for value in inputs]

        array = filled([1])
        assert ufuncs.add(array, Other()) == ["ndarray", "Other"]
        assert array + Other() == ["ndarray", "Other"]
        answer: Any = array
        answer += Other()
        assert answer == ["ndarray", "Other"]
        assert Other().__array_ufunc__(np.add, "__call__", array) == ["GrowableArray"]

    def test_copies(self) -> None:
        """numpy copies exactly if it must, or if asked."""
        array = filled([1, 2])

        assert np.shares_memory(np.asarray(array), array.array)
        assert np.shares_memory(np.asarray(array, "f8"), array.array)
        assert not np.shares_memory(np.array(array), array.array)
        assert np.asarray(array, ">f8").dtype == ">f8"
        assert np.asarray(array, "S").dtype.kind == "S"
        if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
            assert np.shares_memory(np.array(array, copy=False), array.array)
            with pytest.raises(ValueError, match="copy"):
                np.array(array, "f4", copy=False)

    def test_dlpack(self) -> None:
        """DLPack shares the items, and keeps them alive."""
        array = filled([1, 2])

        shared = np.from_dlpack(array)

        assert np.shares_memory(shared, array.array)
        assert array.__dlpack_device__() == np.zeros(1).__dlpack_device__()
        with pytest.raises(ViewError):
            array.clear()
        del shared
        array.clear()


class Labelled(GrowableArray[Any]):
    more: list[str]

    def __init__(self, label: str) -> None:
        super().__init__("i4", 1000)
        self.label, self._private = label, 5


class TestPickle:
    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("shape", [(), (2,)])
    def test_as_plain_data(self, protocol: int, shape: tuple[int, ...]) -> None:
        """dtype, capacity, item shape and items survive; the copy has memory of its own."""
        array = filled(np.ones((3, *shape)), ">f4", item_shape=shape)

        for other in (
            pickle.loads(pickle.dumps(array, protocol)),
            copy.copy(array),
            copy.deepcopy(array),
        ):
            assert type(other) is GrowableArray
            assert (other.dtype.str, other.capacity, other.item_shape) == (">f4", MiB, shape)
            assert np.array_equal(other, array)
            assert not np.shares_memory(other.array, array.array)
            other.append(np.zeros(shape))
        array.clear()

    def test_items_of_an_appender(self) -> None:
        """Items appended by an appender are pickled too."""
        array = filled([])
        array.appender()(5)

        assert pickle.loads(pickle.dumps(array)).array.tolist() == [5]

    def test_out_of_band(self) -> None:
        """With protocol 5 the items go out of band, without a copy."""
        buffers: list[pickle.PickleBuffer] = []
        array = filled(range(1000))
        data = pickle.dumps(array, 5, buffer_callback=buffers.append)

        assert len(data) < 1000
        assert np.shares_memory(np.frombuffer(buffers[0].raw()), array.array)
        assert pickle.loads(data, buffers=buffers).array.tolist() == list(range(1000))

    def test_subclasses(self) -> None:
        """A subclass keeps its attributes; its constructor is not called."""
        array = Labelled("a")
        array.extend([1, 2])
        array.more = [array.label]

        for other in (pickle.loads(pickle.dumps(array)), copy.copy(array), copy.deepcopy(array)):
            assert type(other) is Labelled
            assert (other.label, other._private, other.more) == ("a", 5, ["a"])
            assert other.array.tolist() == [1, 2]

    def test_the_default_capacity(self) -> None:
        """A default capacity is the default one of the machine that unpickles."""
        array = pickle.loads(pickle.dumps(GrowableArray("f8")))

        assert array.capacity == GrowableArray("f8").capacity
        assert array.__reduce__()[1][2] is None
