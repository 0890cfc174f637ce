"""Steps: valid values, and what they commit."""

from typing import Any

import pytest

from helpers import witness
from pyreserve import (
    PAGE_SIZE,
    Arena,
    BumpArena,
    GiB,
    GrowableArray,
    GrowableBuffer,
    KiB,
    MiB,
    Pool,
    RangeError,
    layouts,
)
from pyreserve._region.growth import as_step
from pyreserve.units import WORD, round_up


class TestNumbers:
    def test_whole_pages(self) -> None:
        """A multiple of the OS page is used as it is."""
        assert as_step(3 * PAGE_SIZE) == 3 * PAGE_SIZE

    @pytest.mark.parametrize("step", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, PAGE_SIZE // 2])
    def test_invalid_steps(self, step: int) -> None:
        """A step must be a positive multiple of the OS page."""
        with pytest.raises(
            RangeError, match=rf"multiple of the OS page \({PAGE_SIZE}\), got {step}"
        ):
            as_step(step)

    @pytest.mark.parametrize("wrong", [4096.0, None, b"measured", [4096]])
    def test_steps_of_another_type(self, wrong: Any) -> None:
        """A step that is neither an integer nor a string is a TypeError."""
        with pytest.raises(TypeError):
            as_step(wrong)

    @pytest.mark.parametrize("word", ["", "measured", "auto", "2 pages"])
    def test_other_words(self, word: Any) -> None:
        """A string that is not a size is a ValueError."""
        with pytest.raises(ValueError, match="not a size"):
            as_step(word)


class TestSizes:
    def test_strings(self) -> None:
        """A step may be a size."""
        assert as_step("2MiB") == 2 * MiB
        with pytest.raises(RangeError, match="got 100"):
            as_step("100")

    def test_everywhere(self) -> None:
        """Each class that commits ahead accepts a size as its step and uses it."""
        step, size = 32 * PAGE_SIZE, f"{32 * PAGE_SIZE // KiB}KiB"
        bump, pool = BumpArena("64MiB", step=size), Pool(PAGE_SIZE, step=size)
        buffer = GrowableBuffer("64MiB", step=size)
        array = GrowableArray("u1", 64 * MiB, step=size)

        for use in (bump.alloc, buffer.resize, array.resize):
            use(9 * step - 5)
        for _ in range(9 * step // PAGE_SIZE - 1):
            pool.alloc()

        assert buffer.committed == array.committed == pool.committed == 9 * step
        assert (bump.base + bump.committed) % step == 0

    def test_costs_are_not_imported(self) -> None:
        """The allocators do not import pyreserve.costs."""
        result = witness.fresh_python(
            """
            import json, sys
            from pyreserve import *
            GrowableBuffer(1 * MiB).resize(1), BumpArena(1 * MiB).alloc(1), Pool(8).alloc()
            print(json.dumps("pyreserve.costs" in sys.modules))
            """
        )

        assert result is False


class TestArenas:
    def test_the_layouts_own(self) -> None:
        """Without a step, an arena grows as its layout says."""
        with Arena(64 * MiB) as arena:
            arena.alloc(1)

            assert arena.memstats().heap_sys == arena.layout.growth == 2 * MiB

    @pytest.mark.parametrize("step", [64 * KiB, 192 * KiB, 8 * MiB])
    def test_another(self, step: int) -> None:
        """An arena grows by at least a step, and by more if a block needs more."""
        with Arena(64 * MiB, step=step) as arena:
            arena.alloc(1)
            assert arena.memstats().heap_sys == step

            arena.alloc(9 * MiB)
            assert arena.memstats().heap_sys == step + 9 * MiB

    def test_in_a_layout_of_gos(self) -> None:
        """The Go layouts accept a step too."""
        with Arena(layout=layouts.default_name(WORD), step=256 * KiB) as arena:
            arena.alloc(1)

            assert arena.memstats().heap_sys == 256 * KiB

    def test_one_that_is_too_large(self) -> None:
        """If no whole step is left, the arena grows by what the block needs."""
        with Arena(64 * MiB, step=GiB) as arena:
            block = arena.alloc(MiB)

            assert block.nbytes == arena.memstats().heap_sys == MiB

    def test_pages_of_the_layout(self) -> None:
        """A step is rounded up to whole pages of the layout."""
        with Arena(64 * MiB, step=12 * KiB) as arena:
            arena.alloc(1)

            assert arena.memstats().heap_sys == round_up(12 * KiB, arena.layout.page)

    def test_no_step(self) -> None:
        """A step that is not whole OS pages is refused, and nothing stays reserved."""
        before = witness.status("VmSize")

        for step in (8 * KiB + 1, 0, -8 * KiB):
            with pytest.raises(RangeError, match="step"):
                Arena(step=step)

        assert witness.status("VmSize") < before + GiB
