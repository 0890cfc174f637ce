"""Costs as pictures, and the writing of whole files."""

import itertools
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pyreserve import GiB, KiB, MiB
from pyreserve._system.output import check_writable, write_bytes, write_text
from pyreserve.cli.console import Output
from pyreserve.costs import GROUPS, METHODS, Cell, CostTable, Curve, Measured, Noise
from pyreserve.costs import plot as module
from pyreserve.costs.plot import choose, draw, figure
from pyreserve.costs.stats import summarise

MACHINE = {"cpu": "$A$ CPU", "kernel": "6.1", "cpus": 2, "balloon": True, "virtualised": None}
LENGTHS = (4 * KiB, 16 * KiB, 64 * KiB, 256 * KiB, 2 * MiB, 32 * MiB, GiB)
SVG = "{http://www.w3.org/2000/svg}"


def cell(
    curve: Curve, nbytes: int, ns: float, *, host: str = "warm", samples: int = 5, passes: int = 6
) -> Measured:
    """Return a measured cell with samples evenly spaced around a median."""
    factors = [1 + 0.02 * (i - samples // 2) for i in range(samples)]
    times = [[ns * factor for factor in factors] for _ in range(passes)]
    return Measured(curve.at(nbytes), host, summarise(times))


def line(curve: Curve, fixed: float, per_page: float, lengths: Any = LENGTHS) -> list[Measured]:
    """Return the cells of a curve with a fixed cost and a cost per page, in ns."""
    small = 512 if curve.page_kind == "2MiB" else 1
    lengths = [nbytes for nbytes in lengths if nbytes >= small * 4 * KiB]
    return [cell(curve, n, fixed + per_page * n / (4 * KiB) / small) for n in lengths]


def table(*lines: list[Measured], machine: dict[str, Any] = MACHINE) -> CostTable:
    """Return a table of these cells."""
    cells = tuple(entry for line in lines for entry in line)
    return CostTable(machine, cells, Noise(0.0, 0.0, 0.0), 1.0)


def everything() -> CostTable:
    """Return a table of all verbs and methods, two page kinds, and some variants."""
    lines = []
    for number, (verb, methods) in enumerate(METHODS.items()):
        for other, method in enumerate(methods):
            fixed, per_page = 500 * (1 + number), 10 * (1 + 3 * other)
            lines.append(line(Curve(verb, method), fixed, per_page))
            lines.append(line(Curve(verb, method, "2MiB"), 3 * fixed, 20 * per_page))
            lines.append(line(Curve(verb, method, mode="noreserve"), 2 * fixed, per_page))
            lines.append(line(Curve(verb, method, threads=2), 4 * fixed, per_page))
    touch = Curve("touch", "write")
    lines.append([cell(touch, 2 * MiB, 9e6, host="cold"), cell(touch, GiB, 9e8, host="cold")])
    lines.append([Measured(Cell("fork", "inherit", "64KiB", "charge", MiB), "warm", None, "no")])
    return table(*lines)


@pytest.fixture(scope="module")
def drawn() -> Figure:
    return figure(everything())


def panels(picture: Figure) -> list[list[Line2D]]:
    """Return the labelled lines of each panel."""
    return [
        [line for line in axes.lines if not str(line.get_label()).startswith("_")]
        for axes in picture.axes
    ]


def labels(picture: Figure) -> list[str]:
    """Return the labels of all lines, in the order of the legends."""
    legends = [axes.get_legend() for axes in picture.axes]
    return [text.get_text() for legend in legends if legend for text in legend.get_texts()]


def note(picture: Figure) -> str:
    """Return the note below the panels."""
    return str(picture.get_supxlabel())


class TestTheChoiceOfLines:
    def test_small_pages_come_first(self) -> None:
        """A panel has each verb's first method on small pages, and then at most nine lines."""
        curves = everything().curves()
        for verbs in GROUPS.values():
            chosen = [line.curve for line in choose(curves, verbs)]

            first = [Curve(verb, METHODS[verb][0]) for verb in verbs]
            assert chosen[: len(first)] == first
            assert len(set(chosen)) == len(chosen) <= 9
            assert {(curve.mode, curve.threads) for curve in chosen} == {("charge", 1)}

    def test_labels(self) -> None:
        """A label names the method if there are several, and the size of a huge page."""
        small, huge = Curve("reserve", "mmap"), Curve("commit", "mprotect", "2MiB")

        lines = choose(table(line(small, 1, 1), line(huge, 1, 1)).curves(), GROUPS["get memory"])

        assert [line.label for line in lines] == ["reserve", "commit mprotect, 2 MiB"]


class TestThePicture:
    def test_a_panel_for_each_group(self, drawn: Figure) -> None:
        """Each group of verbs has a panel with its title; a group without cells has none."""
        alone = figure(table(line(Curve("fork", "inherit"), 1e5, 10)))

        assert [axes.get_title(loc="left") for axes in drawn.axes] == list(GROUPS)
        assert [axes.get_title(loc="left") for axes in alone.axes] == ["fork"]
        assert labels(alone) == ["fork inherit"]

    def test_panels_and_legends_are_on_the_page(self, drawn: Figure) -> None:
        """No panel with its legend overlaps another one or leaves the page; nor does the note."""
        drawn.draw_without_rendering()
        below = next(text for text in drawn.texts if text.get_text() == note(drawn))
        assert drawn.bbox.x0 <= below.get_window_extent().x0
        boxes: list[Any] = [axes.get_tightbbox() for axes in drawn.axes]

        for box, other in itertools.combinations(boxes, 2):
            assert not box.overlaps(other)
        for box in boxes:
            assert drawn.bbox.x0 <= box.x0 < box.x1 <= drawn.bbox.x1
            assert drawn.bbox.y0 <= box.y0 < box.y1 <= drawn.bbox.y1

    def test_lines_differ_without_colour(self, drawn: Figure) -> None:
        """No two lines of a panel have the same dashes, marker and width."""
        for lines in panels(drawn):
            styles = [
                (str(line._dash_pattern), line.get_marker(), line.get_linewidth())  # type: ignore[attr-defined]
                for line in lines
            ]
            assert len(set(styles)) == len(styles) > 1

    def test_lines_are_the_medians(self) -> None:
        """A line passes through the medians, and its band between the ends of the intervals."""
        cells = line(Curve("touch", "write"), 1000, 250)
        picture = figure(table(cells))

        [[drawn]] = panels(picture)
        times = [entry.times for entry in cells if entry.times]
        expected = [[entry.cell.nbytes, entry.times.median] for entry in cells if entry.times]
        band = picture.axes[0].collections[0].get_paths()[0].vertices
        assert np.allclose(np.asarray(drawn.get_xydata()), expected)
        assert {ns for entry in times for ns in entry.ci95} <= set(np.asarray(band)[:, 1])

    def test_axes_are_named_as_people_write(self) -> None:
        """Ticks are powers of two (lengths) and of ten (times), with a unit."""
        picture = figure(table(line(Curve("touch", "write"), 100, 250)))

        picture.draw_without_rendering()

        [axes] = picture.axes
        sizes = [text.get_text() for text in axes.get_xticklabels()]
        assert 4 <= len(sizes) <= 8
        assert all(re.fullmatch(r"\d+ (B|[KMG]iB)", size) for size in sizes)
        times = {text.get_text() for text in axes.get_yticklabels()}
        assert {"1 µs", "100 µs", "10 ms"} <= times

    def test_bands_only_where_they_say_something(self) -> None:
        """Few passes, or interval ends over a factor of three apart, give no band."""
        curve = Curve("touch", "write")
        wide = [[100.0, 110.0], [1000.0, 1100.0], [9000.0, 10000.0]]
        cells = [
            cell(curve, 4 * KiB, 1000),
            cell(curve, 16 * KiB, 1000),
            cell(curve, 64 * KiB, 1000, samples=2, passes=5),
            Measured(curve.at(256 * KiB), "warm", summarise(wide)),
        ]

        [axes] = figure(table(cells)).axes

        [band] = axes.collections[0].get_paths()
        assert np.asarray(band.vertices)[:, 0].max() == 16 * KiB

    def test_any_time_is_named(self) -> None:
        """Times have labels without an exponent, from a picosecond to an hour."""
        lengths = zip(LENGTHS, (0.001, 1, 1e3, 1e6, 1e9, 1e11, 4e12), strict=True)
        cells = [cell(Curve("fork", "inherit"), nbytes, ns) for nbytes, ns in lengths]

        picture = figure(table(cells))
        picture.draw_without_rendering()

        [axes] = picture.axes
        low, high = axes.get_ylim()
        ticks = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
        texts = [text.get_text() for ns, text in ticks if low <= ns <= high]
        assert len(texts) > 3
        assert not any("e" in text for text in texts)

    def test_the_note(self, drawn: Figure) -> None:
        """The note gives the number of curves not drawn, and explains hollow markers."""
        assert re.search(r"Curves not drawn: \d+: see table or JSON\.", note(drawn))
        assert "Hollow: cold" in note(drawn)

    def test_cold_host_is_hollow(self, drawn: Figure) -> None:
        """Cold cells are hollow markers, and no line passes through them."""
        hollow = [
            line
            for axes in drawn.axes
            for line in axes.lines
            if line.get_markerfacecolor() == "white"
        ]

        assert sorted(line.get_xydata().tolist() for line in hollow) == [  # type: ignore[union-attr]
            [[2 * MiB, 9e6]],
            [[GiB, 9e8]],
        ]

    @pytest.mark.parametrize(
        ("machine", "expected"),
        [
            (MACHINE, "What virtual memory costs on $A$ CPU, Linux 6.1"),
            ({"cpu": None}, "What virtual memory costs on an unknown CPU"),
        ],
    )
    def test_title(self, machine: dict[str, Any], expected: str) -> None:
        """The title names the machine if it is known, and shows dollar signs as they are."""
        picture = figure(table(line(Curve("fork", "inherit"), 9, 1), machine=machine))

        assert picture.get_suptitle() == expected

    def test_zeros_and_infinities_are_not_drawn(self) -> None:
        """Zero times and infinite bands are not drawn; an empty table is a picture too."""
        curve = Curve("retouch", "resident")
        cells = [cell(curve, 4 * KiB, 0), cell(curve, 16 * KiB, 5, samples=1, passes=1)]

        [[drawn]] = panels(figure(table(cells)))

        assert np.asarray(drawn.get_xydata()).tolist() == [[16 * KiB, 5]]
        assert "Nothing was measured" in note(figure(table()))


class TestTheFileOfAPicture:
    def test_png(self, tmp_path: Path) -> None:
        """A PNG has many shades, and twice the width that a README shows."""
        path = tmp_path / "costs.png"

        draw(table(line(Curve("touch", "write"), 9, 1), line(Curve("fork", "inherit"), 9, 1)), path)

        with Image.open(path) as picture:
            picture.load()
            grey = np.asarray(picture.convert("L"))
        assert grey.shape[1] >= 2000
        assert len(np.unique(grey)) > 50
        assert 0.01 < (grey < 200).mean() < 0.2

    def test_svg(self, tmp_path: Path, drawn: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
        """An SVG contains each panel's title and each curve's label once, as text."""
        path = tmp_path / "costs.svg"
        monkeypatch.setattr(module, "figure", lambda table: drawn)

        draw(everything(), path)

        written = [element.text for element in ET.parse(path).iter(f"{SVG}text")]
        assert all(written.count(group) == 1 for group in GROUPS)
        assert set(labels(drawn)) <= set(written)
        assert "$A$ CPU" in path.read_text(encoding="utf-8")

    def test_settings_of_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The file does not depend on the user's matplotlib settings, which stay unchanged."""
        costs = table(line(Curve("touch", "write"), 9, 1))
        draw(costs, tmp_path / "one.svg")
        monkeypatch.setitem(rcParams, "font.size", 30.0)
        monkeypatch.setitem(rcParams, "svg.fonttype", "path")

        draw(costs, tmp_path / "other.svg")

        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
        assert rcParams["font.size"] == 30.0

    def test_plot_of_a_table(self, tmp_path: Path) -> None:
        """``CostTable.plot`` returns the figure, and writes the same picture if given a path."""
        costs = table(line(Curve("touch", "write"), 9, 1))
        draw(costs, tmp_path / "drawn.svg")

        plotted = costs.plot()
        written = costs.plot(str(tmp_path / "plotted.svg"))

        assert isinstance(plotted, Figure)
        assert isinstance(written, Figure)
        names = [path.name for path in tmp_path.iterdir()]
        assert sorted(names) == ["drawn.svg", "plotted.svg"]
        drawn, same = ((tmp_path / name).read_bytes() for name in names)
        assert drawn == same

    @pytest.mark.parametrize("suffix", [".pdf", ".PNG", ""])
    def test_another_suffix(self, tmp_path: Path, suffix: str) -> None:
        """Any other suffix is refused with the two valid ones, and nothing is written."""
        with pytest.raises(ValueError, match=r"\.png or \.svg"):
            draw(table(), tmp_path / f"costs{suffix}")

        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("library", "extra", "call"), [("matplotlib", "plot", figure)])
def test_missing_extra(
    monkeypatch: pytest.MonkeyPatch, library: str, extra: str, call: Callable[[CostTable], object]
) -> None:
    """Without its library each raises one line that says what to install."""
    monkeypatch.setitem(sys.modules, library, None)

    with pytest.raises(ImportError, match=rf"^\w+ needs {library}: .*'pyreserve\[{extra}\]'$"):
        call(table(line(Curve("fork", "inherit"), 9, 1)))


def write_json(costs: CostTable, path: Path) -> None:
    """Write a table as ``pyreserve costs --json --output FILE`` does."""
    Output(True, path).write(costs.to_json, lambda _: None)


class TestWritingWhole:
    @pytest.fixture
    def broken(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Let the last step of each write fail like on a full disk."""

        def refuse(self: Path, target: Path) -> Path:
            raise OSError(28, "No space left on device", str(target))

        monkeypatch.setattr(Path, "replace", refuse)
        yield
        monkeypatch.undo()

    @pytest.mark.parametrize(
        ("write", "suffix"),
        [
            (write_json, ".json"),
            (CostTable.plot, ".svg"),
        ],
    )
    def test_a_failed_write_leaves_the_old_file(
        self, tmp_path: Path, write: Callable[[CostTable, Path], None], suffix: str, broken: None
    ) -> None:
        """A failed write leaves the old file as it was, and no other file."""
        path = tmp_path / f"costs{suffix}"
        path.write_text("old")

        with pytest.raises(OSError, match="No space"):
            write(table(line(Curve("fork", "inherit"), 9, 1)), path)

        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]

    def test_bytes_and_text(self, tmp_path: Path) -> None:
        """The file has the bytes written, and the permissions of any new file."""
        path, other = tmp_path / "one", tmp_path / "other"
        other.touch()

        write_bytes(path, b"old")
        write_text(path, "µs\n")

        assert path.read_bytes() == "µs\n".encode()
        assert path.stat().st_mode == other.stat().st_mode

    def test_no_regular_file(self) -> None:
        """A path that is not a regular file is written to, not replaced."""
        write_text(Path("/dev/null"), "text")

        assert Path("/dev/null").is_char_device()

    def test_a_link_and_who_may_read(self, tmp_path: Path) -> None:
        """The target of a link is written; the link and the target's permissions stay."""
        path, link = tmp_path / "costs.json", tmp_path / "link"
        path.write_bytes(b"old")
        path.chmod(0o600)
        link.symlink_to(path)

        write_text(link, "new")

        assert link.is_symlink()
        assert path.read_text() == "new"
        assert path.stat().st_mode & 0o777 == 0o600
        assert set(tmp_path.iterdir()) == {path, link}

    def test_a_name_as_long_as_can_be(self, tmp_path: Path) -> None:
        """A name of 255 bytes works: the temporary name is not longer."""
        path = tmp_path / ("a" * 255)

        write_text(path, "text")

        assert path.read_text() == "text"

    def test_standard_output_under_another_name(self, tmp_path: Path) -> None:
        """A link to standard output is written through, so printed and written text are in order
        in the file."""
        link, out = tmp_path / "stdout", tmp_path / "out"
        link.symlink_to("/proc/self/fd/1")
        code = (
            "import sys; from pathlib import Path; from pyreserve._system.output import *; "
            "print('before'); check_writable(Path(sys.argv[1])); "
            "write_text(Path(sys.argv[1]), 'between\\n'); print('after')"
        )

        with out.open("w") as file:
            subprocess.run([sys.executable, "-c", code, link], stdout=file, check=True)

        assert link.is_symlink()
        assert out.read_text() == "before\nbetween\nafter\n"

    def test_a_directory_where_nothing_can_be_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file in a directory without write permission is refused beforehand, since it would be
        replaced; a device is not, since it is written to."""
        path = tmp_path / "costs.json"
        path.write_text("old")
        monkeypatch.setattr(os, "access", lambda which, _: which not in {tmp_path, Path("/dev")})

        with pytest.raises(PermissionError, match="can't be written"):
            check_writable(path)

        check_writable(Path("/dev/null"))
