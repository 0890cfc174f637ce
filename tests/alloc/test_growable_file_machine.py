"""A GrowableBuffer driven at random against a BytesIO and a bytearray."""

import io
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.profiles import examples
from pyreserve import PAGE_SIZE, GrowableBuffer, OutOfMemoryError, ViewError

CAPACITY = 8 * PAGE_SIZE

data = st.binary(max_size=20) | st.sampled_from([b"\n", b"a\nb\n", b"x" * 3 * PAGE_SIZE])
sizes = st.none() | st.integers(-1, 30) | st.integers(0, 4 * PAGE_SIZE)
positions = st.integers(0, 40) | st.integers(0, CAPACITY + 5)


class FileMachine(RuleBasedStateMachine):
    """The model: a BytesIO, as a file; its bytes, as a bytearray; and how many were dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = GrowableBuffer(1)
        self.capacity = 1
        self.file = io.BytesIO()
        self.dropped = 0
        self.views: list[tuple[memoryview, bytes, int]] = []  # view, bytes, end: all ever written

    @initialize(capacity=st.sampled_from([None, CAPACITY]))
    def create(self, capacity: int | None) -> None:
        self.buffer = GrowableBuffer(capacity)
        self.capacity = self.buffer.capacity

    @property
    def model(self) -> bytes:
        return self.file.getvalue()

    def _set(self, content: bytes | bytearray, position: int | None = None) -> None:
        position = self.file.tell() if position is None else position
        self.file = io.BytesIO(content)
        self.file.seek(position)

    def _grown(self, change: Any, length: int) -> bool:
        """Call `change`, which may be refused only near the end of the addresses."""
        try:
            change()
        except (OutOfMemoryError, ViewError):
            assert self.dropped + length > self.capacity
            assert self.views or length > self.capacity
            return False
        assert length <= self.capacity
        return True

    # -- a file ---------------------------------------------------------------------------------

    @rule(written=data)
    def write(self, written: bytes) -> None:
        end = self.file.tell() + len(written) if written else 0
        if self._untouched(self.file.tell(), end) and self._grown(
            lambda: self.buffer.write(written), max(end, len(self.model))
        ):
            self.file.write(written)

    @rule(size=sizes)
    def read(self, size: int | None) -> None:
        assert self.buffer.read(size) == self.file.read(size)

    @rule(size=sizes)
    def readline(self, size: int | None) -> None:
        assert self.buffer.readline(size) == self.file.readline(size)

    @rule()
    def readlines(self) -> None:
        assert self.buffer.readlines() == self.file.readlines()

    @rule(size=st.integers(0, 50))
    def readinto(self, size: int) -> None:
        ours, theirs = bytearray(size), bytearray(size)
        assert self.buffer.readinto(ours) == self.file.readinto(theirs)
        assert ours == theirs

    @rule(to=positions, whence=st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]))
    def seek(self, to: int, whence: int) -> None:
        if whence == io.SEEK_CUR:
            to = min(to, 10)
        elif whence == io.SEEK_END:
            to = -to
        assert self.buffer.seek(to, whence) == self.file.seek(to, whence)

    @rule(size=st.none() | positions)
    def truncate(self, size: int | None) -> None:
        length = self.file.tell() if size is None else size
        if length < len(self.model):
            self._drop_views_above(length)
        assert self.buffer.truncate(size) == self.file.truncate(size)

    # -- bytes ----------------------------------------------------------------------------------

    @rule(added=data, by=st.sampled_from(["extend", "+=", "spare"]))
    def add(self, added: bytes, by: str) -> None:
        def change() -> None:
            if by == "extend":
                self.buffer.extend(added)
            elif by == "+=":
                self.buffer += added
            else:
                space = self.buffer.spare(len(added) + 3)
                space[: len(added)] = added
                del space
                self.buffer.advance(len(added))

        if self._grown(change, len(self.model) + len(added) + (3 if by == "spare" else 0)):
            self._set(self.model + added)

    @precondition(lambda self: self.capacity == CAPACITY)
    @rule(less=st.integers(0, 9))
    def extend_to_the_end(self, less: int) -> None:
        """Add bytes up to the end of the addresses, or nearly."""
        end = (self.dropped + len(self.model)) % CAPACITY
        added = bytes([less]) * max(0, CAPACITY - end - less)
        if self._grown(lambda: self.buffer.extend(added), len(self.model) + len(added)):
            self._set(self.model + added)

    @rule(left=st.integers(0, 50), space=st.integers(0, 9), added=data)
    def pass_the_end(self, left: int, space: int, added: bytes) -> None:
        """Without views it slides to the first addresses, to grow up to the capacity."""
        if self.capacity == CAPACITY:
            self.views.clear()
            self.extend_to_the_end(space)
            self._drop(max(0, len(self.model) - left))
            self.add(added + bytes(space), "+=")

    @rule(byte=st.integers(0, 255))
    def append(self, byte: int) -> None:
        if self._grown(lambda: self.buffer.append(byte), len(self.model) + 1):
            self._set(self.model + bytes([byte]))

    @precondition(lambda self: self.model)
    @rule(at=st.integers(0, 10**6), byte=st.integers(0, 255))
    def set_byte(self, at: int, byte: int) -> None:
        at %= len(self.model)
        if self._untouched(at, at + 1):
            self.buffer[at] = byte
            changed = bytearray(self.model)
            changed[at] = byte
            self._set(changed)

    @rule(
        ends=st.tuples(st.integers(-30, 30), st.integers(-30, 30)), step=st.sampled_from([1, 2, -1])
    )
    def get_slice(self, ends: tuple[int, int], step: int) -> None:
        where = slice(*ends, step)
        assert self.buffer[where] == self.model[where]

    @rule(part=st.binary(max_size=2), ends=st.tuples(st.integers(-30, 30), st.integers(-30, 30)))
    def search(self, part: bytes, ends: tuple[int, int]) -> None:
        assert self.buffer.find(part, *ends) == self.model.find(part, *ends)
        assert self.buffer.count(part) == self.model.count(part)
        assert (part in self.buffer) == (part in self.model)
        assert self.buffer.startswith(part) == self.model.startswith(part)
        assert self.buffer.endswith(part) == self.model.endswith(part)

    @rule(other=data)
    def compare(self, other: bytes) -> None:
        assert (self.buffer == other) == (self.model == other)
        assert (self.buffer < other) == (self.model < other)
        assert (self.buffer >= other) == (self.model >= other)

    @rule(part=st.floats(0, 1))
    def drop_front(self, part: float) -> None:
        self._drop(int(len(self.model) * part))

    def _drop(self, count: int) -> None:
        self.buffer.drop_front(count)
        self.dropped += count
        self._set(self.model[count:], max(0, self.file.tell() - count))

    @rule()
    def trim(self) -> None:
        self.buffer.trim()

    @rule(length=positions)
    def resize(self, length: int) -> None:
        if length < len(self.model):
            self._drop_views_above(length)
        if self._grown(lambda: self.buffer.resize(length), length):
            self._set(self.model[:length].ljust(length, b"\0"))

    # -- views ----------------------------------------------------------------------------------

    def _untouched(self, lo: int, hi: int) -> bool:
        """Return whether no held view shows the bytes [lo, hi), so their copies stay right."""
        return all(
            self.dropped + hi <= end - len(copy) or self.dropped + lo >= end
            for _, copy, end in self.views
        )

    def _drop_views_above(self, length: int) -> None:
        limit = self.dropped + length
        if any(end > limit for _, _, end in self.views):
            with pytest.raises(ViewError):
                self.buffer.resize(length)
            self.views = [held for held in self.views if held[2] <= limit]

    @precondition(lambda self: self.model)
    @rule(ends=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), readonly=st.booleans())
    def view(self, ends: tuple[int, int], readonly: bool) -> None:
        lo, hi = sorted(end % (len(self.model) + 1) for end in ends)
        if lo < hi:
            view = self.buffer.view(lo, hi, readonly=readonly)
            self.views.append((view, self.model[lo:hi], self.dropped + hi))

    @precondition(lambda self: self.views)
    @rule(which=st.integers(0, 1000))
    def drop_a_view(self, which: int) -> None:
        self.views.pop(which % len(self.views))

    # -- what always holds ----------------------------------------------------------------------

    @invariant()
    def the_bytes_are_the_models(self) -> None:
        assert len(self.buffer) == len(self.model)
        assert bytes(self.buffer) == self.buffer.getvalue() == self.model
        assert self.buffer.tell() == self.file.tell()
        assert self.buffer.dropped == self.dropped
        for view, copy, _ in self.views:
            assert view == copy

    def teardown(self) -> None:
        self.views.clear()
        self.buffer.release()


TestFileMachine = FileMachine.TestCase
TestFileMachine.__doc__ = (
    """Any order of calls leaves the bytes, position and views of the model."""
)
TestFileMachine.settings = settings(max_examples=examples(25), stateful_step_count=40)
