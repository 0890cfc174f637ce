"""A GrowableBuffer as a binary file, beside a BytesIO."""

import csv
import gzip
import io
import json
import pickle
import shutil
import tarfile
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.buffers import Call, ends, few, filled, result_of
from pyreserve import PAGE_SIZE, KiB, MiB, OutOfMemoryError, ReleasedError, ViewError

file_steps = st.lists(
    st.tuples(st.just("write"), few)
    | st.tuples(st.just("writelines"), st.lists(few, max_size=3))
    | st.tuples(st.sampled_from(["read", "read1", "readline", "readlines"]), ends)
    | st.tuples(st.just("seek"), st.integers(-5, 80), st.integers(-1, 3))
    | st.tuples(st.just("truncate"), ends)
    | st.tuples(st.sampled_from(["tell", "getvalue", "readline", "truncate"]))
)


class TestFile:
    @given(file_steps)
    def test_as_bytesio(self, steps: list[tuple[Any, ...]]) -> None:
        """Every method of a binary file does what BytesIO's does."""
        ours, theirs = filled(b""), io.BytesIO()
        for name, *arguments in steps:
            results = [
                result_of(lambda f: getattr(f, name)(*arguments), f)  # noqa: B023
                for f in (ours, theirs)
            ]
            assert results[0] == results[1]
            into = bytearray(3), bytearray(3)
            assert ours.readinto(into[0]) == theirs.readinto(into[1])
            assert into[0] == into[1]
            assert (ours.getvalue(), ours.tell()) == (theirs.getvalue(), theirs.tell())

    def test_a_gap(self) -> None:
        """Writing above the length fills the gap with zeros, also where bytes were before."""
        buffer = filled(b"x" * 2 * PAGE_SIZE, 2 * PAGE_SIZE)
        buffer.truncate(3)
        buffer.seek(PAGE_SIZE)

        assert buffer.write(b"") == 0
        assert len(buffer) == 3
        buffer.write(b"ab")
        buffer.seek(2 * PAGE_SIZE - 1)
        with pytest.raises(OutOfMemoryError):
            buffer.write(b"yz")

        assert buffer == b"xxx" + bytes(PAGE_SIZE - 3) + b"ab"
        assert buffer.tell() == 2 * PAGE_SIZE - 1

    def test_long_lines(self) -> None:
        """readline returns lines that are longer than its first search."""
        lines = [b"a" * length + b"\n" for length in (0, 255, 256, 257, 5000, 300 * KiB)]
        buffer = filled(b"".join([*lines, b"end"]))

        assert buffer.readlines() == [*lines, b"end"]

    def test_itself(self) -> None:
        """A file can be written with its own view, and read into it."""
        buffer = filled(b"abcdef")
        buffer.seek(2)
        buffer.write(buffer.view())
        buffer.seek(1)
        buffer.readinto(buffer.view())

        assert buffer == b"babcdeff"

    def test_live_views(self) -> None:
        """A view of the last bytes blocks truncate, and no other method."""
        buffer = filled()
        view = buffer.getbuffer()

        shorten: list[Call] = [
            lambda b: b.truncate(11),
            lambda b: b.truncate(),
            lambda b: b.pop(),
            lambda b: b.__imul__(0),
            lambda b: b.clear(),
        ]
        for call in shorten:
            with pytest.raises(ViewError):
                call(buffer)
        assert (buffer.getvalue(), buffer.tell()) == (b"hello, world", 0)

        buffer.seek(0, io.SEEK_END)
        buffer.write(b"!" * MiB)
        assert buffer.truncate(12) == 12
        assert bytes(view) == b"hello, world"

    def test_what_it_is(self) -> None:
        """It is a binary file for the io module, without a descriptor, and true when empty."""
        buffer = filled(b"")

        assert isinstance(buffer, io.BufferedIOBase)
        assert buffer
        assert (buffer.readable(), buffer.writable(), buffer.seekable()) == (True, True, True)
        assert (buffer.isatty(), buffer.closed) == (False, False)
        buffer.flush()
        for name in ("fileno", "detach"):
            with pytest.raises(io.UnsupportedOperation, match=name):
                getattr(buffer, name)()

    def test_after_close(self) -> None:
        """After close every method raises a ValueError."""
        with filled() as buffer:
            pass

        assert buffer.closed
        calls: list[Call] = [
            lambda b: b.write(b""),
            lambda b: b.write(b"x"),
            lambda b: b.writelines([]),
            lambda b: b.read(),
            lambda b: b.readinto(bytearray(3)),
            lambda b: b.readline(),
            lambda b: b.readlines(),
            lambda b: b.seek(0),
            lambda b: b.tell(),
            lambda b: b.truncate(),
            lambda b: b.getvalue(),
            lambda b: b.getbuffer(),
            lambda b: b.flush(),
            lambda b: b.readable(),
            lambda b: b.isatty(),
            lambda b: b.fileno(),
            lambda b: b.append(1),
            lambda b: b.extend(b""),
            lambda b: b.pop(),
            lambda b: b[0],
            lambda b: b[:],
            lambda b: b.__setitem__(0, 1),
            lambda b: b.find(b"x"),
            lambda b: b == b"x",
            lambda b: b.spare(0),
            list,
            np.asarray,
            pickle.dumps,
        ]
        for call in calls:
            with pytest.raises(ReleasedError):
                call(buffer)

    def test_standard_library(self) -> None:
        """pickle, json, csv, gzip, zipfile, tarfile, shutil and io use it as a file."""
        buffer = filled(b"")
        pickle.dump([1, b"x" * 100_000], buffer)
        buffer.seek(0)
        assert pickle.load(buffer) == [1, b"x" * 100_000]

        buffer = filled(b"")
        text = io.TextIOWrapper(buffer, "utf-8", newline="")
        csv.writer(text).writerow([1, "ü"])
        text.detach()
        assert buffer == "1,ü\r\n".encode()
        assert json.load(filled(b"[1, 2]")) == [1, 2]

        buffer = filled(b"")
        with gzip.GzipFile(fileobj=buffer, mode="wb") as compressed:
            compressed.write(b"text")
        buffer.seek(0)
        assert gzip.GzipFile(fileobj=buffer).read() == b"text"

        buffer = filled(b"")
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("name", "text")
        assert zipfile.ZipFile(buffer).read("name") == b"text"

        buffer = filled(b"")
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("name")
            info.size = 4
            tar.addfile(info, io.BytesIO(b"text"))
        buffer.seek(0)
        with tarfile.open(fileobj=buffer) as tar:
            member = tar.extractfile("name")
            assert member is not None
            assert member.read() == b"text"

        shutil.copyfileobj(io.BytesIO(b"copied"), copied := filled(b""))
        assert copied == b"copied"
        random = io.BufferedRandom(copied)  # type: ignore[arg-type]
        random.seek(2)
        random.write(b"PIE")
        random.detach()
        assert copied == b"coPIEd"

    def test_numpy(self) -> None:
        """np.save, np.savez and np.load use it as a file; asarray shares its memory."""
        buffer = filled(b"")
        np.save(buffer, np.arange(5))
        buffer.seek(0)
        assert np.load(buffer).tolist() == [0, 1, 2, 3, 4]
        buffer = filled(b"")
        np.savez(buffer, g=np.arange(5))
        buffer.seek(0)
        assert np.load(buffer)["g"][4] == 4

        buffer = filled(b"\1\2")
        array = np.asarray(buffer)
        assert (array.dtype.str, array.shape) == ("|u1", (2,))
        array[0] = 7
        assert buffer == b"\7\2"
        with pytest.raises(ViewError):
            buffer.clear()
        del array
        assert np.asarray(buffer, "f4").tolist() == [7, 2]
        buffer.clear()
        assert np.asarray(buffer).shape == (0,)
