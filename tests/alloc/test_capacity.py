"""The default capacity: large at first, and never so much that other addresses run out."""

import resource
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import witness
from helpers.witness import only_64_bit
from pyreserve import GiB, GrowableArray, GrowableBuffer, MiB, OutOfMemoryError, Region, reserve
from pyreserve._alloc import capacity
from pyreserve._region.handles import region_counted_bytes
from pyreserve._system.machine import memory
from pyreserve.units import TiB


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions of a default size that other tests hold do not count."""
    others = region_counted_bytes()
    monkeypatch.setattr(capacity, "region_counted_bytes", lambda: region_counted_bytes() - others)


@only_64_bit
@pytest.mark.usefixtures("alone")
class TestSizes:
    def test_alone(self) -> None:
        """One default is twice the machine's memory, at least 64 GiB."""
        full = max(2 * memory(), 64 * GiB) // (2 * MiB) * (2 * MiB)

        assert GrowableBuffer().capacity == full
        assert GrowableArray("f8").capacity == full // 8
        assert GrowableArray("V3").capacity == full // 3

    def test_given(self) -> None:
        """A capacity that is given takes nothing from the defaults."""
        held = [GrowableBuffer(TiB) for _ in range(10)]

        assert GrowableBuffer().capacity >= 64 * GiB
        assert {buffer.capacity for buffer in held} == {TiB}

    def test_again_and_again(self) -> None:
        """Containers that are gone leave the next default as it was."""
        first = GrowableBuffer().capacity

        assert {GrowableBuffer().capacity for _ in range(5000)} == {first}

    def test_after_many(self) -> None:
        """After many containers are gone, the next default is as large as at first."""
        first = GrowableBuffer().capacity
        held = [GrowableBuffer() for _ in range(2000)]
        assert held[-1].capacity < first

        held.clear()

        assert GrowableBuffer().capacity == first

    def test_released(self) -> None:
        """A container that is released, and one that is closed without views, counts no more."""
        first = GrowableBuffer().capacity
        held = [GrowableBuffer() for _ in range(2000)]
        assert held[-1].capacity < first

        for buffer in held[::2]:
            buffer.release()
        for buffer in held[1::2]:
            buffer.close()

        assert GrowableBuffer().capacity == first

    def test_viewed(self) -> None:
        """A container that is closed under a view counts until the view is gone."""
        held = [GrowableBuffer() for _ in range(2000)]
        views = []
        for buffer in held:
            buffer.append(1)
            views.append(buffer.view())
            buffer.close()
        under_views = GrowableBuffer().capacity

        views.clear()

        assert under_views < GrowableBuffer().capacity


@only_64_bit
def test_a_thousand_at_once() -> None:
    """A thousand defaults take at most a quarter of the addresses; each is large and usable."""
    result = witness.fresh_python(
        """
        import json
        from helpers import witness
        from pyreserve import *
        import numpy as np
        before = witness.status("VmSize"), witness.status("VmRSS"), witness.status("VmPTE")
        held = [GrowableArray("f8") for _ in range(1000)]
        for array in held:
            array.extend(np.arange(100.0))
        taken = [witness.status(k) - n for k, n in zip(("VmSize", "VmRSS", "VmPTE"), before)]
        big = reserve(16 << 40)
        right = all(array.array.tolist() == list(range(100)) for array in held)
        print(json.dumps([right, min(array.capacity for array in held), *taken]))
        """
    )

    right, least, addresses, rss, tables = result
    assert right
    assert least * 8 >= 512 * MiB
    assert addresses <= (1 << 47) // 4
    assert rss <= 1000 * max(16 << 10, 2 * resource.getpagesize())
    assert tables <= 1000 * max(16 << 10, 3 * resource.getpagesize())


@pytest.mark.parametrize("gib", [1, 4, 64])
def test_under_a_limit(gib: int) -> None:
    """Under RLIMIT_AS many defaults leave more than half of it to others."""
    result = witness.fresh_python(
        f"""
        import json, resource, threading
        from helpers import witness
        from pyreserve import *
        start = witness.status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (start + {gib} * GiB, -1))
        first, held = GrowableBuffer(), []
        for _ in range(200):
            held.append(GrowableBuffer())
            held[-1].extend(b"x" * 1000)
        half = reserve({gib} * GiB // 2)
        thread = threading.Thread(target=held.clear)
        thread.start(), thread.join()
        print(json.dumps([start, first.capacity, witness.status("VmSize")]))
        """
    )

    start, first, end = result
    assert MiB <= first <= (start + gib * GiB) // 8
    assert end <= start + gib * GiB


def test_under_a_limit_that_is_reached() -> None:
    """Without addresses the error names the limit; afterwards a default is reserved again."""
    result = witness.fresh_python(
        """
        import json, resource
        from helpers import witness
        from pyreserve import *
        held = [GrowableBuffer()]
        resource.setrlimit(resource.RLIMIT_AS, (witness.status("VmSize") + 100 * KiB, -1))
        try:
            GrowableBuffer()
        except OutOfMemoryError as error:
            limit = error.limit
        resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        print(json.dumps([limit, GrowableBuffer().capacity]))
        """
    )

    assert result[0] == "RLIMIT_AS"
    assert result[1] >= MiB


class TestRefusals:
    @staticmethod
    def limited(most: int, sizes: list[int]) -> Callable[[int], Region]:
        def make(size: int) -> Region:
            sizes.append(size)
            if size > most:
                raise OutOfMemoryError(12, "refused", verb="reserve", nbytes=size)
            return reserve(size)

        return make

    @pytest.mark.parametrize("most", [MiB, 5 * MiB, 100 * MiB])
    def test_smaller_ones(self, most: int) -> None:
        """A size that is refused is halved, down to 1 MiB."""
        sizes: list[int] = []

        region = capacity.reserve_default(self.limited(most, sizes), 1)

        assert most // 2 - 2 * MiB <= region.size <= most
        assert all(a >= 2 * b for a, b in pairwise(sizes))
        assert min(sizes) >= MiB

    def test_the_least(self) -> None:
        """If the least size is refused too, the error is raised."""
        for least in (1, MiB, 50 * MiB):
            sizes: list[int] = []
            with pytest.raises(OutOfMemoryError):
                capacity.reserve_default(self.limited(MiB - 1, sizes), least)
            assert min(sizes) == max(least, MiB)

    def test_large_items(self) -> None:
        """At least one item fits, however small the default."""
        result: Any = witness.fresh_python(
            """
            import json, resource
            from helpers import witness
            import numpy as np
            from pyreserve import *
            item = np.dtype(("V", 64 * MiB))
            resource.setrlimit(resource.RLIMIT_AS, (witness.status("VmSize") + 200 * MiB, -1))
            print(json.dumps(GrowableArray(item).capacity))
            """
        )

        assert result == 1


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(22, 57))
@settings(deadline=None)
def test_all_together(rounds: list[int], bits: int) -> None:
    """In any address space, live defaults take at most a quarter, apart from the least size."""
    held: list[int] = []
    pool = (1 << bits) // 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capacity, "region_counted_bytes", lambda: sum(held))
        patch.setattr(capacity, "_pool", lambda _: (pool, max(min(64 * GiB, pool // 4), 1)))
        patch.setattr(capacity, "rlimit", lambda _: None)
        for n in rounds:
            for _ in range(n):
                size = capacity._default_size()
                assert size >= 0
                held.append(size)
            assert sum(held) <= pool
            del held[::3]
