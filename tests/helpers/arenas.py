"""Arenas of all layouts: their names, scripts in child processes, and common checks."""

import json
import subprocess
import sys
import textwrap
from typing import Any

import numpy as np
import pytest

from helpers import golden
from pyreserve import PAGE_SIZE, Arena, Block, HeapBitmap, KiB, MemStats, layouts
from pyreserve.layouts import LayoutName
from pyreserve.units import WORD

PAGE = max(8 * KiB, PAGE_SIZE)

needs_64_bits = pytest.mark.skipif(WORD != 8, reason="the layout lies above 4 GiB")
needs_golden_page = pytest.mark.skipif(
    PAGE_SIZE != golden.GOLDEN_PAGE, reason="the traces are of pages of 4 KiB"
)

PRELUDE = """
import contextlib, gc, json, resource, sys
from pathlib import Path
import pyreserve
from pyreserve import Arena, GiB, KiB, MiB, OutOfMemoryError, PAGE_SIZE, VMError, layouts

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * KiB

def live(low, high):
    "What /proc/self/maps shows in a range: start, end and permissions."
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, perms = line.split()[:2]
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start < high and end > low:
            found.append([max(start, low), min(end, high), perms])
    return found

def whole(arena):
    "What /proc/self/maps shows where the arena and its window are."
    low = arena.placement.start
    return live(low, max(arena.placement.end, arena.placement.window_end))

def plain(pieces):
    return [list(piece[:3]) for piece in pieces]

def limit(which, nbytes):
    "Limit further growth of VmSize (AS) or VmData (DATA) to nbytes; None: unlimited."
    used = status({"AS": "VmSize", "DATA": "VmData"}[which])
    most = -1 if nbytes is None else used + nbytes
    resource.setrlimit(getattr(resource, "RLIMIT_" + which), (most, -1))

def state(arena):
    placement = arena.placement
    return [repr(placement), arena.in_use, arena.region.committed, arena.region.reserved,
            plain(arena.maps()), whole(arena)]

def poke(arena, block, nbytes):
    "Whether the first and the last byte of a block read zero and can be written."
    for at in (block, block + nbytes - 1):
        view = arena.region.view(at - arena.region.base, 1)
        if view[0] != 0:
            return False
        view[0] = 0xA5
        if view[0] != 0xA5:
            return False
        del view
    return True

# Python maps its small objects 1 MiB at a time, which VmSize counts. A few objects kept
# out of many leave it 4 MiB to use, so that it maps none while a test compares sizes.
kept = [bytes(400) for _ in range(10_000)][::500]
"""


def in_child(script: str, *arguments: str) -> Any:
    """Run a script in a fresh interpreter and return the JSON that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def layout_names() -> list[LayoutName]:
    """Names of the layouts that this interpreter can reserve."""
    return [
        name
        for name in layouts.names()
        if WORD == 8 or name == "native" or layouts.get(name).word == 4
    ]


def relative(ranges: list[list[Any]], base: int) -> list[tuple[int, int, str]]:
    """Ranges relative to `base`, the address of the layout."""
    return [(start - base, end - base, perms) for start, end, perms in ranges]


def heap_bitmap(arena: Arena) -> HeapBitmap:
    """The heap bitmap of an arena whose layout has one."""
    bitmap = arena.heap_bitmap
    assert bitmap is not None
    return bitmap


def fill(block: Block, byte: int) -> None:
    """Fill a block with a byte."""
    np.frombuffer(block.view(), dtype=np.uint8)[:] = byte


def holds(block: Block, byte: int) -> bool:
    """Whether all bytes of a block have this value."""
    return bool((np.frombuffer(block.view(), dtype=np.uint8) == byte).all())


def check(stats: MemStats) -> None:
    """Assert the invariants of MemStats."""
    assert stats.sys == stats.heap_sys + stats.gc_sys + stats.other_sys
    assert stats.heap_sys == stats.heap_idle + stats.heap_inuse
    assert 0 <= stats.heap_released <= stats.heap_idle
    assert 0 <= stats.heap_alloc <= stats.heap_inuse
    assert stats.heap_objects == stats.mallocs - stats.frees >= 0
    assert stats.committed <= stats.reserved
