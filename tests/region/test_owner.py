"""The members that all objects on one region share."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    Bitmap,
    BumpArena,
    GrowableArray,
    GrowableBuffer,
    MiB,
    Pool,
    ReleasedError,
    StateError,
)
from pyreserve._region.owner import OnRegion

Make = Callable[..., Any]
KINDS: dict[str, tuple[Make, Callable[[Any], object]]] = {
    "arena": (lambda **policies: BumpArena("1MiB", **policies), lambda a: a.alloc("1KiB")),
    "pool": (lambda **policies: Pool(64, capacity=1000, **policies), lambda p: p.alloc()),
    "bitmap": (lambda **policies: Bitmap(1 << 23, **policies), lambda b: b.set(5)),
    "buffer": (lambda **policies: GrowableBuffer("1MiB", **policies), lambda b: b.extend(b"abc")),
    "array": (lambda **policies: GrowableArray("f8", 1000, **policies), lambda a: a.append(1)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_members(kind: str) -> None:
    """Every container has a region, a base, a name, and exact numbers of bytes."""
    make, use = KINDS[kind]
    thing = make(name="mine")
    use(thing)
    region = thing.region

    assert isinstance(thing, OnRegion)
    assert (thing.name, region.name, thing.base) == ("mine", "mine", region.base)
    assert thing.reserved == region.reserved == region.size
    assert thing.committed == witness.nbytes(thing.base, thing.reserved) > 0
    assert not thing.released
    thing.close()
    assert thing.released
    for member in ("base", "reserved", "committed"):
        with pytest.raises(ReleasedError):
            getattr(thing, member)
    for member in ("base", "reserved", "committed", "name", "released", "region"):
        with pytest.raises(AttributeError):
            setattr(thing, member, 1)


@kinds
def test_policies(kind: str) -> None:
    """Every constructor takes the policies of a reservation."""
    make, use = KINDS[kind]

    with make(mode="noreserve", huge_pages="never", fork="wipe") as thing:
        use(thing)
        region = thing.region
        assert (region.mode, region.huge_pages, region.fork) == ("noreserve", "never", "wipe")
    with make(huge_pages="prefer") as thing:
        use(thing)
        assert thing.region.huge_pages == "prefer"
    for policy in ("mode", "huge_pages", "fork"):
        with pytest.raises(ValueError, match=f"{policy} must be one of"):
            make(**{policy: "x"})


@kinds
def test_its_region_is_its_own(kind: str) -> None:
    """The region refuses to give memory or addresses back behind the container's back."""
    make, use = KINDS[kind]
    thing = make()
    use(thing)
    region = thing.region
    before = region.committed_runs()

    for verb in (
        lambda: region.decommit(0, PAGE_SIZE),
        lambda: region.discard(0, PAGE_SIZE),
        region.release,
        region.close,
        region.__enter__,
    ):
        with pytest.raises(StateError, match=f"part of an? {kind}: use the owner's methods") as e:
            verb()
        assert isinstance(e.value, RuntimeError)

    assert region.committed_runs() == before
    use(thing)
    thing.release()
    with pytest.raises(ReleasedError):
        region.decommit(0, PAGE_SIZE)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"array", "buffer"}))
def test_no_copies(kind: str) -> None:
    """A container cannot be pickled or copied, unless it is plain data."""
    with KINDS[kind][0]() as thing:
        for copier in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="it owns addresses of this process"):
                copier(thing)


def test_an_array_is_generic() -> None:
    """GrowableArray is generic in the type of its items."""
    array = GrowableArray[np.float64]("f8", 10)
    array.append(1.5)

    assert array[0] == 1.5
    assert type(array.array) is np.ndarray
    array.release()


def test_sizes_may_be_strings() -> None:
    """A size in bytes may be a string, as parse_size reads it."""
    with BumpArena("1.5MiB", step="64KiB") as arena:
        assert arena.reserved == 3 * MiB // 2
        assert len(arena.alloc("1KiB", align="4KiB")) == 1024
    with Pool("48", align="64 B") as pool:
        assert pool.address(pool.alloc()) % 64 == 0
    with pytest.raises(ValueError, match="not a size: 'large'"):
        GrowableBuffer("large")
