"""`str()`, HTML and `plot` of explanations and of their differences."""

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from helpers.captures import FOLDER
from pyreserve import GiB, KiB, explain, reserve
from pyreserve._system.report import Report, Table
from pyreserve.errors import MapsError
from pyreserve.procmem import NamedRange, Sample, compare, load, save

HOSTILE = "<script>alert('1')</script>&\n\x1b[31m\udcff"


def hostile(folder: Path) -> Path:
    """Save a process whose name and file are HTML and control characters."""
    line = "7f0000000000-7f0000004000 rw-p 00000000 00:00 0 [anon:<b>&]\n"
    figures = "Rss: 8 kB\nPss: 8 kB\nPrivate_Dirty: 8 kB\n"
    (folder / "smaps").write_text(line + figures)
    (folder / "status").write_text("Name:\t<i>\x1b[31m\nPid:\t12\n")
    return folder


class TestText:
    def test_an_explanation(self) -> None:
        """`str()` has the verdict, and the sizes by class and by owner."""
        space = explain(path=FOLDER / "redis")
        text = str(space)

        assert text.startswith("redis-server, pid 16869\n\n")
        assert space.verdict in text
        assert "VSZ 137.4 MiB, RSS 77.2 MiB, PSS 73.25 MiB, USS 71.07 MiB, swap 0 B, " in text
        lines = [" ".join(line.split()) for line in text.splitlines()]
        assert "in memory, its own 71.07 MiB 51.7 % 78" in lines
        assert "jemalloc 86 MiB 62.6 % 66.14 MiB" in lines
        assert len({len(line) for line in text.splitlines() if " %  " in line}) <= 2  # aligned

    def test_unknown_figures(self, tmp_path: Path) -> None:
        """Sizes that no file has are question marks."""
        (tmp_path / "maps").write_text("7f0000000000-7f0000004000 rw-p 00000000 00:00 0 \n")
        text = str(explain(path=tmp_path))

        assert "VSZ 16 KiB, RSS ?, PSS ?, USS ?, swap ?, 1 mappings." in text
        assert text.splitlines()[-1].split() == ["unknown", "16", "KiB", "100.0", "%", "?"]

    def test_a_difference(self) -> None:
        """`str()` of a difference has the verdict and the changes with their sign."""
        before = explain()
        with reserve(GiB):
            difference = compare(before, explain())
        lines = [" ".join(line.split()) for line in str(difference).splitlines()]

        assert lines[0] == difference.verdict
        assert "pyreserve regions 0 B 1 GiB +1 GiB" in lines
        assert "different processes" not in str(difference)
        assert "different processes" in str(compare(before, explain(path=FOLDER / "redis")))

    def test_unprintable_characters(self, tmp_path: Path) -> None:
        """Names can't move the cursor or begin a line."""
        assert "<i>\\x1b[31m, pid 12" in str(explain(path=hostile(tmp_path)))
        text = Report(HOSTILE, (HOSTILE,), (Table((HOSTILE, "a"), [(HOSTILE, "b")]),)).text()
        assert all(char.isprintable() or char == "\n" for char in text)
        assert len(text.splitlines()) == 6
        assert "\\n\\x1b[31m\\xff" in text


class TestHtml:
    def test_every_text_is_escaped(self, tmp_path: Path) -> None:
        """The HTML is well-formed and shows hostile names as text."""
        html = explain(path=hostile(tmp_path))._repr_html_()
        assert "".join(ET.fromstring(html).itertext()).count("<i>\\x1b[31m") == 1
        assert "named <b>&" in "".join(ET.fromstring(html).itertext())

        report = Report(HOSTILE, (HOSTILE,), (Table((HOSTILE, "a"), [(HOSTILE, "b")]),))
        tree = ET.fromstring(report.html())
        assert "".join(tree.itertext()).count("<script>alert('1')</script>&\\n") == 4
        assert {element.tag for element in tree.iter()}.isdisjoint({"script", "b", "i"})

    def test_the_same_as_the_text(self) -> None:
        """Each cell of the text is in the HTML, of explanations and differences."""
        space = explain(path=FOLDER / "redis")
        for shown in (space, compare(space, explain(path=FOLDER / "pg_backend"))):
            tree = ET.fromstring(shown._repr_html_())
            shown_text = " ".join(" ".join(tree.itertext()).split())
            assert shown.verdict in shown_text
            rows = [[cell.text or "" for cell in row] for row in tree.iter("tr")]
            lines = [" ".join(line.split()) for line in str(shown).splitlines()]
            assert rows
            assert all(" ".join(row) in lines for row in rows)


class TestPlot:
    def test_a_figure_without_a_file(self) -> None:
        """Without a path the figure is returned."""
        assert isinstance(explain(path=FOLDER / "redis").plot(), Figure)

    @pytest.mark.parametrize("kind", [str, Path])
    def test_a_file(self, tmp_path: Path, kind: type) -> None:
        """With a path the figure is written too."""
        figure = explain(path=FOLDER / "redis").plot(kind(tmp_path / "a.svg"))

        assert isinstance(figure, Figure)
        assert ET.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")

    def test_refusals_leave_no_file(self, tmp_path: Path) -> None:
        """Another suffix and unknown residency are refused."""
        with pytest.raises(ValueError, match=r"must end in \.png or \.svg"):
            explain(path=FOLDER / "redis").plot(tmp_path / "a.jpeg")
        (tmp_path / "maps").write_text("7f0000000000-7f0000004000 rw-p 00000000 00:00 0 \n")
        with pytest.raises(MapsError, match="smaps can't be read"):
            explain(path=tmp_path).plot(tmp_path / "a.png")
        assert [path.name for path in tmp_path.iterdir()] == ["maps"]


@pytest.mark.parametrize("kind", [str, Path])
def test_paths_as_text(tmp_path: Path, kind: type) -> None:
    """`save`, `explain` and `load` take a path or its text."""
    save(None, kind(tmp_path / "saved"))
    space = explain(path=kind(tmp_path / "saved"))
    (tmp_path / "a.json").write_text(space.to_json())

    assert load(kind(tmp_path / "a.json")) == space.to_dict()


def test_a_named_range() -> None:
    """A range knows its size, and whether it is committed."""
    ranges = explain(path=FOLDER / "go_tip2014").ranges

    assert [(named.name, named.state) for named in ranges][:2] == [
        ("spans", "committed"),
        ("spans + bitmap", "reserved"),
    ]
    assert NamedRange(4096, 12288, "---p", "x").size == 8 * KiB


@pytest.mark.parametrize("unknown", [0, 1])
def test_a_change_between_samples(unknown: int) -> None:
    """Changes have a sign; that of PSS is None if one sample does not know it."""
    samples = [Sample(10, 9, 8, 7, 6, 5), Sample(20, 8, 8, 9, 9, 3)]
    assert samples[1].since(samples[0]) == Sample(10, -1, 0, 2, 3, -2)

    samples[unknown] = Sample(1, 1, 1, 1, None, 1)
    assert samples[1].since(samples[0]).pss is None


def test_the_parts_of_a_mapping() -> None:
    """The parts cover each mapping in order, and have the owners' bytes."""
    space = explain(path=FOLDER / "go_tip2014")
    owners: dict[str, int] = {}
    for mapping in space.maps():
        assert [part.start for part in mapping.parts][1:] == [p.end for p in mapping.parts][:-1]
        assert (mapping.parts[0].start, mapping.parts[-1].end) == (mapping.start, mapping.end)
        for part in mapping.parts if mapping.class_name else ():
            owners[part.owner] = owners.get(part.owner, 0) + part.end - part.start

    assert owners == {owner.name: owner.size for owner in space.owners}
    assert max(len(mapping.parts) for mapping in space.maps()) > 1
