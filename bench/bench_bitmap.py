"""Bitmap beside bitarray, on 16 Mi bits."""

from typing import Any

import pytest
from bitarray import bitarray

from pyreserve import Bitmap

NBITS = 1 << 24
RANGE = 1 << 20
COUNT = "count 16 Mi bits"
SET = "set 1 Mi bits (ours counts the changes)"
CLEAR = "clear 1 Mi bits (ours counts the changes)"
FIND = "find 8 clear bits at the end of 16 Mi"


@pytest.fixture
def ours() -> Bitmap:
    bitmap = Bitmap(NBITS)
    bitmap[::3] = True
    return bitmap


@pytest.fixture
def theirs() -> bitarray:
    bits = bitarray(NBITS, endian="little")
    bits.setall(0)
    bits[::3] = 1
    return bits


def _run(benchmark: Any, group: str, function: Any, *, reference: bool = False) -> None:
    benchmark.group = group
    benchmark.extra_info.update(reference=reference)
    benchmark.pedantic(function, rounds=60, warmup_rounds=3)


def bench_count_bitarray(benchmark: Any, theirs: bitarray) -> None:
    _run(benchmark, COUNT, theirs.count, reference=True)


def bench_count(benchmark: Any, ours: Bitmap) -> None:
    _run(benchmark, COUNT, ours.count)


def bench_set_bitarray(benchmark: Any, theirs: bitarray) -> None:
    def assign() -> None:
        theirs[:RANGE] = 1

    _run(benchmark, SET, assign, reference=True)


def bench_set(benchmark: Any, ours: Bitmap) -> None:
    _run(benchmark, SET, lambda: ours.set(0, RANGE))


def bench_clear_bitarray(benchmark: Any, theirs: bitarray) -> None:
    def assign() -> None:
        theirs[:RANGE] = 0

    _run(benchmark, CLEAR, assign, reference=True)


def bench_clear(benchmark: Any, ours: Bitmap) -> None:
    _run(benchmark, CLEAR, lambda: ours.clear(0, RANGE))


def bench_find_clear_bitarray(benchmark: Any, theirs: bitarray) -> None:
    theirs.setall(1)
    theirs[NBITS - 8 :] = 0
    wanted = bitarray(8)
    wanted.setall(0)
    _run(benchmark, FIND, lambda: theirs.find(wanted), reference=True)


def bench_find_clear(benchmark: Any, ours: Bitmap) -> None:
    ours.set(0, NBITS)
    ours.clear(NBITS - 8, NBITS)
    _run(benchmark, FIND, lambda: ours.find_clear(8))
