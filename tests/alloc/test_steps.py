"""Steps: valid values, and steps that are measured."""

from pathlib import Path
from typing import Any, Literal

import pytest

import pyreserve._region.owner
import pyreserve.costs
from helpers import costs_tables, witness
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
from pyreserve._arena.arena import WORD
from pyreserve._region.owner import as_step


def refuse_to_measure(**_: object) -> int:
    raise AssertionError


class TestNumbers:
    def test_whole_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A number is used as it is, and nothing is measured."""
        monkeypatch.setattr(pyreserve.costs, "measured_step", refuse_to_measure)

        assert as_step(3 * PAGE_SIZE) == 3 * PAGE_SIZE
        assert as_step(2 * MiB, "prefer") == 2 * MiB

    @pytest.mark.parametrize("step", [0, -PAGE_SIZE, 1, PAGE_SIZE + 1, PAGE_SIZE // 2])
    def test_what_makes_no_sense(self, step: int) -> None:
        """A step must be a positive multiple of the OS page."""
        with pytest.raises(
            RangeError, match=rf"multiple of the OS page \({PAGE_SIZE}\), got {step}"
        ):
            as_step(step)

    @pytest.mark.parametrize("wrong", [4096.0, None, b"measured", [4096]])
    def test_what_is_no_number(self, wrong: Any) -> None:
        """A step that is neither an integer nor a string is a TypeError."""
        with pytest.raises(TypeError):
            as_step(wrong)

    @pytest.mark.parametrize("word", ["", "4096", "Measured", "auto"])
    def test_other_words(self, word: Any) -> None:
        """Strings other than "measured" are a ValueError."""
        with pytest.raises(ValueError, match="number of bytes or 'measured', got"):
            as_step(word)


class TestMeasured:
    @pytest.mark.parametrize(
        ("policy", "setting", "huge"),
        [
            ("prefer", "madvise", True),
            ("default", "madvise", False),
            ("default", "always", True),
            ("never", "always", False),
            ("default", None, False),
        ],
    )
    def test_for_the_pages_wanted(
        self,
        policy: Literal["default", "prefer", "never"],
        setting: str | None,
        huge: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """measured_step is called for the kind of page that the memory will get."""
        steps = {False: 5 * PAGE_SIZE, True: 7 * PAGE_SIZE}
        monkeypatch.setattr(
            pyreserve.costs, "measured_step", lambda *, huge_pages: steps[huge_pages]
        )
        monkeypatch.setattr(pyreserve._region.owner, "transparent_huge_pages", lambda: setting)

        assert as_step("measured", policy) == steps[huge]

    def test_in_every_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each class that commits ahead accepts "measured" and uses the result."""
        step = 32 * PAGE_SIZE
        monkeypatch.setattr(pyreserve.costs, "measured_step", lambda *, huge_pages: step)
        bump, pool = BumpArena(64 * MiB, step="measured"), Pool(PAGE_SIZE, step="measured")
        buffer = GrowableBuffer(64 * MiB, step="measured")
        array = GrowableArray("u1", 64 * MiB, step="measured")

        for use in (bump.alloc, buffer.resize, array.resize):
            use(9 * step - 5)
        for _ in range(9 * step // PAGE_SIZE - 1):
            pool.alloc()

        assert buffer.committed == array.committed == pool.committed == 9 * step
        assert (bump.base + bump.committed) % step == 0

    def test_huge_pages(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """With huge pages preferred, the step is measured for huge pages."""
        asked = []

        def measured_step(*, huge_pages: bool) -> int:
            asked.append(huge_pages)
            return 4 * MiB

        monkeypatch.setattr(pyreserve.costs, "measured_step", measured_step)
        monkeypatch.setattr(pyreserve._region.owner, "transparent_huge_pages", lambda: "madvise")
        BumpArena(64 * MiB, step="measured", huge_pages="prefer")
        GrowableBuffer(64 * MiB, step="measured", huge_pages="prefer")
        GrowableBuffer(64 * MiB, step="measured", huge_pages="never")
        GrowableBuffer(64 * MiB, step="measured")

        assert asked == [True, True, False, False]

    def test_a_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """PYRESERVE_COSTS names a table from which the step follows."""
        path = tmp_path / "costs.json"
        path.write_text(costs_tables.table(costs_tables.USUAL, jitter=1e-4).to_json())
        monkeypatch.setenv("PYRESERVE_COSTS", str(path))
        buffer = GrowableBuffer(64 * MiB, step="measured")

        buffer.resize(64 * KiB + 1)

        assert buffer.committed == 64 * PAGE_SIZE
        assert as_step("measured", "prefer") == 4 * MiB

    def test_a_file_that_is_not_there(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A missing table is an error, and then nothing is reserved."""
        monkeypatch.setenv("PYRESERVE_COSTS", str(tmp_path / "none"))

        with pytest.raises(FileNotFoundError):
            GrowableBuffer(64 * MiB, step="measured")

    def test_imported_only_when_wanted(self) -> None:
        """pyreserve.costs is imported only for "measured"."""
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
        """A step that is not whole pages of the layout is refused, and nothing stays reserved."""
        before = witness.status("VmSize")

        for step in (12 * KiB, 8 * KiB + 1, 0, -8 * KiB):
            with pytest.raises(RangeError, match="step"):
                Arena(step=step)

        assert witness.status("VmSize") < before + GiB
