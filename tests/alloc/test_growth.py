"""Growth without a step: what the plan commits, and the memory that it takes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import witness
from pyreserve import PAGE_SIZE, GiB, GrowableArray, GrowableBuffer, KiB, MiB
from pyreserve._region import growth
from pyreserve._region.growth import SMALL, Growth, Steps
from pyreserve._system.machine import thp_size
from pyreserve.units import round_up

LINES = st.sampled_from([max(size, PAGE_SIZE) for size in (MiB, 2 * MiB, 4 * MiB, 32 * MiB)])
LINE = thp_size() or 2 * MiB

only_with_usual_pages = pytest.mark.skipif(
    PAGE_SIZE // KiB != 4 or LINE // MiB != 2, reason="other sizes of pages"
)


@st.composite
def growths(draw: st.DrawFn) -> tuple[int, int]:
    """Return (committed, need): whole OS pages, rising."""
    pages = st.integers(0, 16 * GiB // PAGE_SIZE) | st.integers(0, 8 * MiB // PAGE_SIZE)
    committed, more = draw(pages), draw(st.integers(1, 64) | pages.filter(bool))
    return committed * PAGE_SIZE, (committed + more) * PAGE_SIZE


class TestThePlan:
    @given(growths(), LINES)
    def test_ends(self, growing: tuple[int, int], line: int) -> None:
        """An end is whole OS pages, at least the need; above the first line it is on a line."""
        committed, need = growing

        end = Growth(line).end(committed, need)

        assert end >= need
        assert end % PAGE_SIZE == 0
        assert need <= SMALL + line or (end - SMALL) % line == 0

    @given(growths(), LINES)
    def test_what_is_ahead(self, growing: tuple[int, int], line: int) -> None:
        """Twice the need up to the first line; then an eighth, 2 to 64 MiB, to the next line."""
        committed, need = growing

        end = Growth(line).end(committed, need)

        if need <= SMALL + line:
            assert end == SMALL or end < 2 * need
            assert end <= SMALL + line
        else:
            ahead = min(max(committed // 8, 2 * MiB), 64 * MiB)
            assert committed + ahead <= end < max(need, committed + ahead) + line

    @given(LINES)
    def test_few_commits(self, line: int) -> None:
        """To grow page by page to 64 GiB takes few commits."""
        plan, ends = Growth(line), [0]
        while ends[-1] < 64 * GiB:
            ends.append(plan.end(ends[-1], ends[-1] + PAGE_SIZE))

        assert len(ends) < 1200
        assert ends == sorted(set(ends))

    @given(
        growths(),
        st.integers(0, 1 << 20).map(lambda pages: pages * PAGE_SIZE),
        st.integers(1, 10_000).map(lambda pages: pages * PAGE_SIZE),
        st.booleans(),
    )
    def test_steps(self, growing: tuple[int, int], base: int, step: int, small: bool) -> None:
        """Steps end at addresses that are multiples of the step, but for a small first one."""
        committed, need = growing

        end = Steps(base, step, small_first=small).end(committed, need)

        assert need <= end < need + max(step, SMALL)
        assert (base + end) % step == 0 or (small and not committed and end == SMALL < step)


TOUCHED = """
import json
from helpers import witness
from pyreserve import GrowableBuffer
def touched(nbytes, chunk):
    buffer = GrowableBuffer({arguments})
    while len(buffer) < nbytes:
        buffer.extend(b"x" * min(chunk, nbytes - len(buffer)))
    rss = witness.total_kib(buffer.base, buffer.committed, "Rss") * 1024
    return rss, buffer.committed
print(json.dumps([touched(nbytes, chunk) for nbytes, chunk in {cases}]))
"""


@only_with_usual_pages
@pytest.mark.parametrize(
    "arguments", ["", "1 << 30", "huge_pages='prefer'", "1 << 30, huge_pages='never'"]
)
def test_memory_near_the_data(arguments: str) -> None:
    """Memory is 1.1 times the data and 64 KiB; above a huge page the data and 2 MiB."""
    most = {
        8: 16 * KiB,
        80 * KiB: 88 * KiB + 64 * KiB,
        500 * KiB: 550 * KiB + 64 * KiB,
        3 * MiB: 5 * MiB,
        50 * MiB: 52 * MiB,
    }
    cases = [(nbytes, chunk) for nbytes in most for chunk in (8 * KiB, 64 * MiB)]

    result = witness.fresh_python(TOUCHED.format(arguments=arguments, cases=cases))

    for (nbytes, _), (rss, committed) in zip(cases, result, strict=True):
        assert nbytes // PAGE_SIZE * PAGE_SIZE <= rss <= most[nbytes]
        assert nbytes <= committed <= 2 * nbytes + 64 * KiB


class TestTheRegion:
    def test_one_advice_for_all(self) -> None:
        """The base lies 64 KiB below a huge page, and the whole region is advised."""
        buffer = GrowableBuffer(64 * MiB, huge_pages="prefer")
        buffer.resize(5 * MiB)

        assert (buffer.base + SMALL) % LINE == 0
        pieces = witness.pieces(buffer.base, 64 * MiB)
        assert [piece.perms for piece in pieces] == [witness.COMMITTED, witness.RESERVED]
        assert all("hg" in piece.flags for piece in pieces)
        assert (buffer.base + buffer.committed) % LINE == 0

    @only_with_usual_pages
    def test_the_policy_chosen(self) -> None:
        """Huge pages are preferred if one fits and no step is given."""
        assert GrowableBuffer(64 * MiB).region.huge_pages == "prefer"
        assert GrowableArray("f8").region.huge_pages == "prefer"
        assert GrowableBuffer(MiB).region.huge_pages == "default"
        assert GrowableBuffer(64 * MiB, step=MiB).region.huge_pages == "default"

    @pytest.mark.parametrize(
        ("huge_page", "policy", "end"),
        [
            (None, "default", SMALL + 4 * MiB),
            (32 * MiB, "prefer", 4 * MiB),
            (512 * MiB, "never", SMALL + 4 * MiB),
        ],
    )
    def test_the_policy_of_other_machines(
        self, huge_page: int | None, policy: str, end: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Huge pages are preferred up to 32 MiB; without them commits end on lines of 2 MiB."""
        cached = growth._huge_page_size, growth._best_huge_pages
        monkeypatch.setattr(growth, "thp_size", lambda: huge_page)
        for function in cached:
            function.cache_clear()
        buffer = GrowableBuffer(64 * MiB)
        buffer.resize(3 * MiB)
        monkeypatch.undo()
        for function in cached:
            function.cache_clear()

        assert buffer.region.huge_pages == policy
        assert buffer.committed == end

    @pytest.mark.parametrize("huge_pages", ["default", "never", "prefer"])
    @pytest.mark.parametrize("step", [None, MiB])
    def test_the_policy_given(self, huge_pages: Any, step: int | None) -> None:
        """A policy that is given is used, with a step and without."""
        for capacity in (PAGE_SIZE, 64 * MiB, None):
            buffer = GrowableBuffer(capacity, step=step, huge_pages=huge_pages)
            assert buffer.region.huge_pages == huge_pages
            buffer.extend(b"x" * PAGE_SIZE)

    @pytest.mark.parametrize("wrong", ["always", "", 3, []])
    def test_no_policy(self, wrong: Any) -> None:
        """A word that is not a policy is a ValueError, with a step and without."""
        for arguments in ((), (MiB,), (64 * MiB,)):
            for step in (None, MiB):
                with pytest.raises(ValueError, match="huge_pages must be one of"):
                    GrowableBuffer(*arguments, huge_pages=wrong, step=step)

    def test_named(self) -> None:
        """A name is checked and kept."""
        assert GrowableBuffer(64 * MiB, name="g").name == "g"
        with pytest.raises(ValueError, match="name must be"):
            GrowableBuffer(64 * MiB, name="[g]")

    def test_to_the_last_byte(self) -> None:
        """The last commit ends at the end of the region."""
        for capacity in (SMALL, SMALL + 1, SMALL + LINE, SMALL + LINE + 1, 3 * LINE + 5):
            buffer = GrowableBuffer(capacity)
            buffer.extend(b"x" * (capacity - 1))
            buffer.extend(b"y")
            assert buffer.committed == round_up(capacity, PAGE_SIZE)


def test_a_refused_commit_ahead() -> None:
    """Near RLIMIT_DATA less is committed ahead, at last exactly the need; nothing is lost."""
    result = witness.fresh_python(
        """
        import json, resource
        from helpers import witness
        from pyreserve import *
        page, buffer = b"x" * PAGE_SIZE, GrowableBuffer(8 * GiB)
        buffer.resize(100 * MiB)
        ahead = buffer.committed - len(buffer)
        limit = witness.status("VmData") + 5 * MiB
        resource.setrlimit(resource.RLIMIT_DATA, (limit, -1))
        start = buffer.committed
        buffer.resize(start)
        try:
            while True:
                buffer.extend(page)
        except OutOfMemoryError as error:
            refused = error.limit
        end, full = len(buffer), buffer.committed
        resource.setrlimit(resource.RLIMIT_DATA, (-1, -1))
        buffer.extend(page)
        data = bytes(buffer.view(start)) == page * (len(buffer.view(start)) // PAGE_SIZE)
        print(json.dumps([refused, end - start, end == full, data, buffer.committed - end]))
        """
    )

    refused, grown, full, data, ahead = result
    assert (refused, full, data) == ("RLIMIT_DATA", True, True)
    assert 3 * MiB < grown <= 5 * MiB
    assert ahead >= 12 * MiB
