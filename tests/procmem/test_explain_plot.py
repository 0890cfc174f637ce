"""The picture of an address space, and its blocks."""

import itertools
import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from pyreserve import GiB, KiB, MiB, TiB, reserve
from pyreserve.procmem import AddressSpace, explain
from pyreserve.procmem.judge.owners.claims import fill
from pyreserve.procmem.show.blocks import MAX_BLOCKS, Block, blocks, holes, label, shorten
from pyreserve.procmem.show.picture import draw, figure

SVG = "{http://www.w3.org/2000/svg}"
LOW, HIGH, STACK = 0x5555_5555_0000, 0x7F00_0000_0000, 0x7FFE_0000_0000
HOSTILE = (
    "/tmp/$x^2$ \\frac{1}{0}",
    "/tmp/a\\012b",  # as the kernel writes a newline
    "/tmp/\udcff\udc80 odd bytes",
    "/tmp/\x1b[31mred\x07\x01",
    "/tmp/" + "long " * 800,
    "/tmp/\u4e2d\u6587 \U0001f600 \u202e",
    "/tmp/<&>\"'",
)


def mapping(start: int, size: int, perms: str = "rw-p", name: str = "", **kib: int) -> bytes:
    """Return a mapping as smaps has it, with the figures given in KiB."""
    inode = 7 if name.startswith("/") else 0
    head = f"{start:x}-{start + size:x} {perms} 00000000 00:00 {inode} {name}"
    private, shared, swap = (kib.get(key, 0) for key in ("private", "shared", "swap"))
    figures = {
        "Size": size // KiB,
        "Rss": private + shared,
        "Pss": private,
        "Shared_Clean": shared,
        "Private_Dirty": private,
        "Swap": swap,
    }
    lines = [head, *(f"{key}: {value} kB" for key, value in figures.items())]
    return "".join(f"{line}\n" for line in lines).encode(errors="surrogateescape")


def saved(folder: Path, mappings: Iterable[bytes], name: str = "test") -> AddressSpace:
    """Explain a process that has these mappings."""
    folder.mkdir(exist_ok=True)
    (folder / "smaps").write_bytes(b"".join(mappings))
    status = f"Name:\t{name}\nPid:\t12\n"
    (folder / "status").write_bytes(status.encode(errors="surrogateescape"))
    return explain(path=folder)


def ordinary() -> list[bytes]:
    """Return the mappings of a process with a large reservation and bytes in each class."""
    return [
        mapping(LOW, 64 * KiB, "r-xp", "/bin/program", private=16, shared=32),
        mapping(LOW + 64 * KiB, 128 * KiB, "rw-p", "[heap]", private=100, swap=20),
        mapping(HIGH, 64 * GiB, "---p"),
        mapping(HIGH + 64 * GiB, GiB, private=30 * 1024),
        mapping(HIGH + 66 * GiB, MiB, "r--p", "/lib/libc.so.6", shared=300),
        mapping(STACK, 16 * KiB, "r--p", "[vvar]"),
        mapping(STACK + MiB, 132 * KiB, "rw-p", "[stack]", private=12),
        mapping(0xFFFF_FFFF_FF60_0000, 4 * KiB, "--xp", "[vsyscall]"),
    ]


def hostile() -> list[bytes]:
    """Return mappings with hostile names, each too large to be merged."""
    return [
        mapping(HIGH + i * GiB, MiB, "r-xp", name, private=512) for i, name in enumerate(HOSTILE)
    ]


def many(count: int) -> list[bytes]:
    """Return mappings of which adjacent ones differ in kind."""
    kinds = [
        ("rw-p", "", {"private": 4}),
        ("r--p", "/lib/one", {"shared": 4}),
        ("---p", "", {}),
        ("rw-s", "/dev/shm/two", {}),
    ]
    return [
        mapping(HIGH + 3 * i * 4 * KiB, 8 * KiB, perms, f"{name}{i}" if name else "", **kib)
        for i, (perms, name, kib) in zip(range(count), itertools.cycle(kinds), strict=False)
    ]


def texts_apart(picture: Figure) -> None:
    """Assert that no text overlaps another one or leaves the page."""
    picture.draw_without_rendering()
    boxes = [(text.get_text(), text.get_window_extent()) for text in picture.texts]
    boxes = [(text, box) for text, box in boxes if text]
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), (text, other)
    for text, box in boxes:
        assert picture.bbox.x0 <= box.x0, text
        assert box.x1 <= picture.bbox.x1, text
        assert picture.bbox.y0 <= box.y0, text
        assert box.y1 <= picture.bbox.y1, text


def labels(picture: Figure) -> list[str]:
    return [text.get_text() for text in picture.texts if str(text.get_gid()).startswith("label-")]


def agree(space: AddressSpace) -> None:
    """Assert that the blocks contain each byte of the process once, in order."""
    found = blocks(space.maps())
    mapped = [m for m in space.maps() if m.class_name]
    assert sum(block.size for block in found) == space.vsz
    assert tuple(map(sum, zip(*(block.sizes for block in found), strict=True))) == tuple(
        memory_class.size for memory_class in space.classes
    )
    assert all(gap >= 0 for gap in holes(found))
    assert len(found) <= MAX_BLOCKS
    for block in found:
        inside = [m for m in mapped if m.start < block.end and m.end > block.start]
        size = sum(min(m.end, block.end) - max(m.start, block.start) for m in inside)
        assert size == block.size
        assert sum(block.owners.values()) == block.size
    owners: dict[str, int] = {}
    for name, size in itertools.chain.from_iterable(block.owners.items() for block in found):
        owners[name] = owners.get(name, 0) + size
    assert owners == {owner.name: owner.size for owner in space.owners}


class TestBlocks:
    @pytest.mark.parametrize("mappings", [ordinary(), hostile(), many(1000)])
    def test_every_byte_once(self, tmp_path: Path, mappings: list[bytes]) -> None:
        """The blocks have the mappings' bytes, by class and by owner, and sum to VSZ."""
        agree(saved(tmp_path, mappings))

    def test_every_byte_of_this_process(self) -> None:
        """The blocks of this process, with a reservation of 136 GiB, contain each byte once."""
        with reserve(136 * GiB):
            agree(explain())

    def test_a_large_reservation_is_a_block(self, tmp_path: Path) -> None:
        """A large reservation is a block of its own, with its addresses."""
        found = blocks(saved(tmp_path, ordinary()).maps())

        largest = max(found, key=lambda block: block.size)
        assert (largest.start, largest.end) == (HIGH, HIGH + 65 * GiB)
        assert largest.memory == 30 * MiB

    def test_a_mapping_of_two_owners_is_divided(self, tmp_path: Path) -> None:
        """A block ends where Go's spans end, although no mapping ends there."""
        start = 0xC0_0000_0000
        arena = start + 128 * MiB + 8 * GiB
        end = arena + 128 * GiB + 8 * KiB
        used = 16 * MiB
        committed = (arena - 4 * KiB * (used // (64 * KiB)), arena + used)
        spans = start + used // 1024
        space = saved(
            tmp_path,
            [
                mapping(0x40_0000, MiB, "r-xp", "/bin/go", private=1024),
                mapping(start, spans - start, private=4),
                mapping(spans, committed[0] - spans, "---p"),
                mapping(committed[0], committed[1] - committed[0], private=17 * 1024),
                mapping(committed[1], end - committed[1], "---p"),
            ],
        )

        found = {name: block for block in blocks(space.maps()) for name in block.owners}
        assert (found["Go spans"].start, found["Go spans"].end) == (start, start + 128 * MiB)
        assert (found["Go bitmap"].start, found["Go bitmap"].end) == (start + 128 * MiB, arena)
        assert found["Go arena"].memory + found["Go bitmap"].memory == 17 * MiB
        agree(space)

    @given(
        st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60), st.sampled_from("ab"))),
    )
    def test_claims_that_overlap(self, claimed: list[tuple[int, int, str]]) -> None:
        """For any claims, the parts of a mapping are adjacent and cover it."""
        parts = list(fill(10, 50, claimed))

        assert [low for low, _, _ in parts] + [50] == [10] + [high for _, high, _ in parts]
        assert all(low < high for low, high, _ in parts)

    @given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 20))
    def test_no_more_than_asked_for(self, gaps: list[int], most: int) -> None:
        """There are at most `most` blocks, however scattered, and no byte is lost."""
        from pyreserve.procmem.show.blocks import _merge

        at, made = 0, []
        for i, gap in enumerate(gaps):
            at += (1 << gap) * 4096
            made.append(Block(at, at + 8192, [8, 0, 0, 0, 0, 0, 0], {f"owner {i % 3}": 8}))
            at += 8192

        found = _merge(made, 64 * MiB, most)

        assert 1 <= len(found) <= max(most, 1)
        assert sum(block.size for block in found) == 8 * len(gaps)
        assert [block.start for block in found] == sorted(block.start for block in found)

    def test_pieces_of_one_owner_far_apart(self, tmp_path: Path) -> None:
        """Small scattered mappings are merged; the blocks count all places."""
        scattered = [mapping(i * TiB, 64 * KiB, "rwxp", private=4) for i in range(1, 30)]
        found = blocks(
            saved(tmp_path, [*scattered, mapping(STACK, GiB, private=GiB // KiB)]).maps()
        )

        assert len(found) < MAX_BLOCKS
        assert sum(block.places for block in found) == 30

    def test_nothing(self, tmp_path: Path) -> None:
        """A process with only the vsyscall page has no block, and still a picture."""
        space = saved(tmp_path, ordinary()[-1:])

        assert blocks(space.maps()) == []
        assert labels(figure(space)) == []


class TestLabels:
    LIBC = Block(0, 4096, [4], {"mapped files": 4}, {"/lib/libc.so.6": 4})

    def test_files_are_named(self) -> None:
        """The label names files, the largest first, as many as fit."""
        two = Block(0, 4096, [4], {"mapped files": 9}, {"/lib/b": 4, "/lib/a": 5})

        assert label(self.LIBC, lambda text: True) == "mapped files: libc.so.6"
        assert label(two, lambda text: True) == "mapped files: a and b"
        assert label(two, lambda text: len(text) < 26) == "mapped files: a and b"
        assert label(two, lambda text: "and b" not in text) == "mapped files: a and 1 more"
        assert label(two, lambda text: ":" not in text) == "2 files"
        assert label(self.LIBC, lambda text: ":" not in text) == "mapped files"

    def test_several_owners(self) -> None:
        """The label names owners, the largest first, without text in brackets."""
        block = Block(0, 1, [9], {"unknown": 1, "kernel pages (vdso, vvar)": 3, "main stack": 2})

        assert label(block, lambda text: True) == "kernel pages, main stack and unknown"
        assert label(block, lambda text: len(text) < 30) == "kernel pages and 2 more"

    @given(st.text(max_size=80), st.integers(1, 40))
    def test_short(self, text: str, room: int) -> None:
        """A shortened text keeps its beginning and its end."""
        short = shorten(text, lambda candidate: len(candidate) <= room)

        assert len(short) <= room
        assert short == text or short[0] == (text[0] if room >= 3 else "…")

    @pytest.mark.parametrize("name", HOSTILE)
    def test_hostile_names(self, name: str) -> None:
        """Unprintable characters are escaped."""
        text = label(Block(0, 1, [1], {"mapped files": 1}, {name: 1}), lambda text: True)

        assert text.isprintable()
        assert text.encode()


class TestThePicture:
    @pytest.mark.parametrize("mappings", [ordinary(), hostile(), many(1000)])
    def test_no_texts_overlap(self, tmp_path: Path, mappings: list[bytes]) -> None:
        """No text overlaps another one or leaves the page, and each has at least 7 points."""
        picture = figure(saved(tmp_path, mappings))

        texts_apart(picture)
        assert min(float(text.get_fontsize()) for text in picture.texts) >= 7
        assert not any(text.get_parse_math() for text in picture.texts)

    def test_no_texts_overlap_when_all_is_there(self, tmp_path: Path) -> None:
        """No texts overlap with the maximum of blocks and holes, each of other owners."""
        names = ("/dev/shm/a", "/SYSV0", "", "/bin/x", "/memfd:b")
        scattered = [
            mapping(TiB * (i + 1), GiB, "rw-s" if names[i % 5] else "rw-p", names[i % 5], shared=9)
            for i in range(MAX_BLOCKS)
        ]
        space = saved(tmp_path, scattered)

        picture = figure(space)

        assert len(labels(picture)) == MAX_BLOCKS
        texts_apart(picture)

    def test_of_this_process(self) -> None:
        """No texts overlap in the picture of this process."""
        texts_apart(figure(explain()))

    def test_one_label_a_block(self, tmp_path: Path) -> None:
        """Each block has a label; labels are in address order from top to bottom."""
        space = saved(tmp_path, ordinary())
        picture = figure(space)

        named = [text for text in picture.texts if str(text.get_gid()).startswith("label-")]
        assert len(named) == len(blocks(space.maps()))
        heights = [text.get_position()[1] for text in named]
        assert heights == sorted(heights, reverse=True)

    def test_a_larger_block_is_higher(self, tmp_path: Path) -> None:
        """The height of a block grows by a constant for each doubling of its size."""
        sizes = [64 * MiB, 64 * GiB]
        start = [HIGH, HIGH + TiB]
        names = ["/a", ""]
        made = [
            mapping(at, size, "---p", name)
            for at, size, name in zip(start, sizes, names, strict=True)
        ]
        picture = figure(saved(tmp_path, made))

        frames = [
            artist
            for artist in picture.findobj(Rectangle)
            if str(artist.get_gid()).startswith("block-")
        ]
        small, large = (frame.get_height() for frame in frames)
        assert large - small == pytest.approx(10 * 0.032)

    def test_title(self, tmp_path: Path) -> None:
        """The title has the process, the size of its addresses and its resident memory."""
        picture = figure(saved(tmp_path, ordinary(), "a\udcffb$"))

        title = picture.texts[0].get_text()
        assert title == "a\\xffb$, pid 12: 65 GiB of addresses, 30.45 MiB of memory"

    def test_the_verdict_is_there(self, tmp_path: Path) -> None:
        """The picture contains the whole verdict."""
        space = saved(tmp_path, ordinary())
        [text] = [text for text in figure(space).texts if text.get_gid() == "verdict"]

        assert text.get_text().replace("\n", " ").startswith(space.verdict)

    def test_a_hostile_name_in_the_verdict(self, tmp_path: Path) -> None:
        """A name that a program gave its memory is escaped in the verdict too."""
        name = f"[anon:$a$ \udcfe\x01{'x' * 66}]"
        picture = figure(saved(tmp_path, [mapping(HIGH, GiB, "rw-p", name, private=9)]))

        [text] = [text for text in picture.texts if text.get_gid() == "verdict"]
        assert "$a$ \\xfe\\x01xxx" in text.get_text().replace("\n", " ")
        texts_apart(picture)

    def test_memory_is_seen(self, tmp_path: Path) -> None:
        """One resident page in 64 TiB has the minimum width in the picture."""
        space = saved(tmp_path, [mapping(TiB, 64 * TiB, private=4)])
        path = tmp_path / "one.png"

        draw(space, path)

        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).astype(int)
        dark = (abs(pixels - [8, 48, 107]).sum(axis=2) < 12).sum()
        assert dark > 3 * 0.02 * 200 * 0.1 * 200


class TestTheFile:
    def test_png(self, tmp_path: Path) -> None:
        """A PNG is twice as wide as a README shows it."""
        path = tmp_path / "one.png"

        draw(saved(tmp_path / "process", ordinary()), path)

        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert picture.width == 1800
            grey = np.asarray(picture.convert("L"))
        assert len(np.unique(grey)) > 50

    def test_svg(self, tmp_path: Path) -> None:
        """An SVG is valid XML, holds the labels as text, and is the same each time."""
        space = saved(tmp_path / "process", [*ordinary()[:2], *hostile()])
        path, other = tmp_path / "one.svg", tmp_path / "other.svg"

        draw(space, path)
        draw(space, other)

        written = {element.text for element in ET.parse(path).iter(f"{SVG}text")}
        assert set(labels(figure(space))) <= written
        assert path.read_bytes() == other.read_bytes()

    def test_settings_of_others(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The user's matplotlib settings have no effect and are not changed."""
        space = saved(tmp_path / "process", ordinary())
        draw(space, tmp_path / "one.svg")
        monkeypatch.setitem(rcParams, "font.size", 30.0)
        monkeypatch.setitem(rcParams, "hatch.linewidth", 9.0)

        draw(space, tmp_path / "other.svg")

        assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "other.svg").read_bytes()
        assert rcParams["font.size"] == 30.0

    def test_thirty_thousand_mappings(self, tmp_path: Path) -> None:
        """A process with the maximum number of mappings has an ordinary picture."""
        space = saved(tmp_path / "process", many(30_000))

        agree_most = blocks(space.maps())
        draw(space, tmp_path / "one.png")

        assert len(agree_most) <= MAX_BLOCKS
        assert sum(block.size for block in agree_most) == space.vsz
        with Image.open(tmp_path / "one.png") as picture:
            assert picture.height < 2400

    @pytest.mark.parametrize("suffix", [".pdf", ".PNG", ""])
    def test_another_suffix(self, tmp_path: Path, suffix: str) -> None:
        """Any other suffix is refused, and nothing is written."""
        with pytest.raises(ValueError, match=r"\.png or \.svg"):
            draw(explain(os.getpid()), tmp_path / f"one{suffix}")

        assert list(tmp_path.iterdir()) == []

    def test_missing_extra(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without matplotlib the error says what to install, and nothing is written."""
        monkeypatch.setitem(sys.modules, "matplotlib", None)

        with pytest.raises(ImportError, match=r"^drawing needs matplotlib: .*'pyreserve\[plot\]'$"):
            draw(explain(), tmp_path / "one.png")

        assert list(tmp_path.iterdir()) == []

    def test_a_failed_write_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """If the disk is full at the last moment, the old file stays."""

        def refuse(self: Path, target: Path) -> Path:
            raise OSError(28, "No space left on device", str(target))

        path = tmp_path / "one.svg"
        path.write_text("old")
        space = explain()
        monkeypatch.setattr(Path, "replace", refuse)

        with pytest.raises(OSError, match="No space"):
            draw(space, path)

        assert path.read_text() == "old"
        assert list(tmp_path.iterdir()) == [path]
