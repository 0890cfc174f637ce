"""Layouts as arithmetic: the placement of their parts, and the requests of a growing arena."""

import contextlib

import pytest

from helpers import golden
from pyreserve import GiB, KiB, MiB, RangeError, layouts
from pyreserve.layouts import Layout, Placement, Request

PAGE_64K = 64 * KiB
GO_PAGE = 8 * KiB
STEP_32 = 256 * MiB


def obliging(placement: Placement, nbytes: int) -> Placement:
    """Grow a placement on an imaginary kernel that grants each requested address."""
    if placement.fits(nbytes):
        return placement.advanced(nbytes)
    for request in placement.growth(nbytes):
        answer = placement.granted(request, request.hint, nbytes) if request.hint else None
        if answer is not None:
            grown = answer.placement
            return grown.advanced(nbytes) if answer.block is None else grown
    raise MemoryError


def grown(layout: Layout, mib: int) -> Placement:
    """Place a layout at its first hint and grow it MiB by MiB."""
    placement = layout.place(layout.hints[0])
    for _ in range(mib):
        placement = obliging(placement, MiB)
    return placement


def full_386() -> Placement:
    """The 386 layout with its first 512 MiB in use; 8 KiB are left."""
    return grown(layouts.get("go-tip-2014-12/386"), 512)


def placed_request(placement: Placement, nbytes: int = MiB) -> Request:
    """The first request of a full 32-bit arena: addresses above its end."""
    return placement.growth(nbytes)[0]


def last_resort(placement: Placement, nbytes: int = MiB) -> Request:
    """The last request of a full 32-bit arena: memory at any address."""
    return placement.growth(nbytes)[-1]


class TestGoldenTraces:
    @pytest.mark.parametrize("trace", golden.MAPPED, ids=lambda trace: trace.name)
    def test_maps_are_the_captured_ones(self, trace: golden.Trace) -> None:
        """A placement grown MiB by MiB has exactly the mappings of the real binary."""
        layout = layouts.get(trace.used_layout)

        placement = grown(layout, trace.growths)

        shown = [(low, high, perms) for low, high, perms, _ in placement.maps(golden.GOLDEN_PAGE)]
        assert shown == trace.ranges()

    def test_the_386_binary_dies_at_the_same_byte(self) -> None:
        """The 386 placement is full at the same byte as the real binary."""
        layout = layouts.get(golden.FATAL.layout)
        placement, in_use = layout.place(layout.hints[0]), 0

        with contextlib.suppress(MemoryError):
            while True:
                placement, in_use = obliging(placement, MiB), in_use + MiB

        assert in_use == 1_879_048_192
        assert f"({in_use} in use)" in golden.FATAL.fatal[1]

    def test_the_message_names_the_same_window(self) -> None:
        """Memory outside the window is reported in the words of the Go runtime."""
        placement = grown(layouts.get(golden.FATAL.layout), 1792)

        message = placement.out_of_range(4158083072)

        assert f"runtime: {message}" == golden.FATAL.fatal[0]


class TestTable:
    @pytest.mark.parametrize(
        ("name", "strategy", "total", "arena_start", "arena", "bitmap", "spans", "bits"),
        [
            (
                "go-tip-2014-12/amd64",
                "reserve",
                146_163_113_984,
                0xC208000000,
                128 * GiB,
                8 * GiB,
                128 * MiB,
                4,
            ),
            (
                "go1.4/amd64",
                "probe",
                146_163_113_984,
                0xC208000000,
                128 * GiB,
                8 * GiB,
                128 * MiB,
                4,
            ),
            (
                "go1.5/amd64",
                "probe",
                584_652_431_360,
                0xC820000000,
                512 * GiB,
                32 * GiB,
                512 * MiB,
                2,
            ),
            (
                "go1.10/amd64",
                "probe",
                567_472_562_176,
                0xC420000000,
                512 * GiB,
                16 * GiB,
                512 * MiB,
                2,
            ),
            (
                "go-tip-2014-12/386",
                "reserve",
                769 * MiB + GO_PAGE,
                0x18300000,
                512 * MiB,
                256 * MiB,
                MiB,
                4,
            ),
            (
                "go1.4/386",
                "reserve",
                769 * MiB + GO_PAGE,
                0x18300000,
                512 * MiB,
                256 * MiB,
                MiB,
                4,
            ),
            (
                "go1.5/386",
                "reserve",
                769 * MiB + GO_PAGE,
                0x18300000,
                512 * MiB,
                256 * MiB,
                MiB,
                2,
            ),
            (
                "fallback",
                "reserve",
                642 * MiB + GO_PAGE,
                0x00600000 + 130 * MiB,
                512 * MiB,
                128 * MiB,
                2 * MiB,
                4,
            ),
        ],
    )
    def test_sizes_are_those_of_the_release(
        self,
        name: str,
        strategy: str,
        total: int,
        arena_start: int,
        arena: int,
        bitmap: int,
        spans: int,
        bits: int,
    ) -> None:
        """Each layout has the sizes, strategy and order of its Go release."""
        layout = layouts.get(name)

        placement = layout.place(layout.hints[0])

        assert (layout.strategy, layout.total(), layout.arena) == (strategy, total, arena)
        assert (layout.bitmap, layout.spans, layout.bitmap_bits) == (bitmap, spans, bits)
        assert placement.arena_start == placement.arena_used == arena_start
        assert placement.spans == (placement.start, placement.start + spans)
        assert placement.bitmap == (arena_start - bitmap, arena_start)
        assert placement.arena == (arena_start, layout.hints[0] + total)
        assert placement.used == 0

    def test_the_hints_of_64_bits_are_never_valid_text(self) -> None:
        """The 128 hints from 0xc000000000 on, 2**40 apart, are not valid UTF-8 as addresses."""
        hints = layouts.get("go-tip-2014-12/amd64").hints

        assert len(hints) == 128
        assert hints[:2] == (0xC000000000, 0x1C000000000)
        assert hints[-1] == 0x7FC000000000

    def test_go_1_11_maps_arenas_of_64_mib(self) -> None:
        """Go 1.11 reserves nothing: it maps arenas of 64 MiB, and their metadata elsewhere."""
        layout = layouts.get("go1.11/amd64")

        placement = layout.place(layout.hints[0])

        assert (layout.strategy, layout.unit, layout.total()) == ("arenas", 64 * MiB, 0)
        assert (layout.index, layout.arena_metadata) == (32 * MiB, 2 * MiB + 64 * KiB)
        assert placement.arena_start == 0xC000000000
        assert placement.maps() == []

    @pytest.mark.parametrize(
        ("name", "sizes"),
        [
            ("go-tip-2014-12/386", (512 * MiB,)),
            ("go1.5/386", (512 * MiB, 256 * MiB, 128 * MiB)),
        ],
    )
    def test_later_releases_try_smaller_arenas(self, name: str, sizes: tuple[int, ...]) -> None:
        """Go 1.5 tries 512, 256 and 128 MiB of arena in turn; earlier releases only 512 MiB."""
        layout = layouts.get(name)

        assert layout.arena_sizes == sizes
        assert layout.window == 2 * GiB
        for arena in sizes:
            placed = layout.place(layout.hints[0], arena)
            assert placed.arena_end - placed.start == layout.total(arena)
            assert placed.arena_end - placed.arena_start == arena + GO_PAGE

    def test_a_heap_commits_a_sixteenth_and_a_1024th_more(self) -> None:
        """At 4 bits for each 8-byte word, H bytes of heap commit H + H/16 + H/1024."""
        heap = 256 * MiB

        placement = grown(layouts.get("go1.4/amd64"), heap // MiB)

        committed = sum(high - low for low, high in placement.mapped())
        assert committed == heap + heap // 16 + heap // 1024

    def test_an_unaligned_answer_is_rounded_up_into_the_slack(self) -> None:
        """If the kernel's address is no multiple of 8 KiB, the slack covers the rounding."""
        layout = layouts.get("go-tip-2014-12/amd64")
        address = 0x7F0000001000

        placement = layout.place(address)

        assert placement.arena_start == address + 4 * KiB + layout.spans + layout.bitmap
        assert placement.arena_end == address + layout.total()
        assert placement.arena_end - placement.arena_start == layout.arena + 4 * KiB
        assert placement.owned == ((address, address + layout.total()),)

    def test_pieces_have_the_names_of_their_parts(self) -> None:
        """Each piece of the article's maps has the names of all parts in it."""
        placement = grown(layouts.get("go-tip-2014-12/amd64"), 1)

        names = [piece.parts for piece in placement.maps()]

        assert names == ["spans", "spans + bitmap", "bitmap + arena", "arena"]

    def test_a_64_bit_arena_that_is_used_up_does_not_grow(self) -> None:
        """A full 64-bit arena makes no requests."""
        layout = layouts.get("go-tip-2014-12/amd64")
        placement = layout.place(layout.hints[0]).advanced(128 * GiB)

        assert placement.fits(GO_PAGE)
        assert not placement.fits(GO_PAGE + 1)
        assert placement.growth(MiB) == []


class TestOSPageRounding:
    @pytest.mark.parametrize(
        ("mib", "spans", "bitmap"),
        [(1, 64 * KiB, 64 * KiB), (3, 64 * KiB, 192 * KiB), (65, 128 * KiB, 4160 * KiB)],
    )
    def test_metadata_is_mapped_in_pages_of_64_kib(self, mib: int, spans: int, bitmap: int) -> None:
        """On OS pages of 64 KiB spans and bitmap are rounded up to them; their addresses stay."""
        placement = grown(layouts.get("go1.4/amd64"), mib)

        low, high = placement.mapped_spans(PAGE_64K)
        assert (low, high - low) == (placement.start, spans)
        low, high = placement.mapped_bitmap(PAGE_64K)
        assert (high, high - low) == (placement.arena_start, bitmap)

    def test_two_bits_a_word_round_up_too(self) -> None:
        """At two bits a word the bitmap is half as large, but at least one OS page."""
        placement = grown(layouts.get("go1.5/amd64"), 1)

        sizes = [
            high - low
            for low, high in (
                placement.mapped_bitmap(4 * KiB),
                placement.mapped_bitmap(16 * KiB),
                placement.mapped_bitmap(PAGE_64K),
            )
        ]

        assert sizes == [32 * KiB, 32 * KiB, 64 * KiB]

    def test_the_maps_follow_the_os_page(self) -> None:
        """The first MiB maps 64 KiB of spans on pages of 64 KiB, and 4 KiB on pages of 4 KiB."""
        placement = grown(layouts.get("go-tip-2014-12/amd64"), 1)

        small, large = placement.maps(4 * KiB)[0], placement.maps(PAGE_64K)[0]

        assert (small.end - small.start, large.end - large.start) == (4 * KiB, 64 * KiB)

    def test_nothing_is_mapped_before_the_first_growth(self) -> None:
        """A layout that is only reserved has no writable piece, for any OS page."""
        layout = layouts.get("go-tip-2014-12/amd64")
        placement = layout.place(layout.hints[0])

        assert placement.mapped(PAGE_64K) == ()
        assert [piece.perms for piece in placement.maps(PAGE_64K)] == ["---p"]


class TestGrowthOf32Bits:
    def test_it_asks_for_256_mib_where_the_arena_ends_and_then_for_memory_anywhere(self) -> None:
        """The first request is for multiples of 256 MiB at the arena's end, the next for memory."""
        placement = full_386()

        assert placement.growth(MiB) == [
            Request(STEP_32, placement.arena_end, committed=False, exact=False),
            Request(MiB + GO_PAGE, 0, committed=True, exact=False),
        ]
        assert placed_request(placement, 256 * MiB - GO_PAGE).size == STEP_32
        assert placed_request(placement, 256 * MiB).size == 2 * STEP_32
        assert last_resort(placement, MiB + 1).size == MiB + 2 * GO_PAGE

    def test_in_place(self) -> None:
        """Addresses granted at the arena's end extend it, and its slack is used."""
        placement = full_386()
        request = placed_request(placement)

        answer = placement.granted(request, placement.arena_end, MiB)

        assert answer is not None
        assert answer.block is None
        after = answer.placement
        assert after.arena_end == placement.arena_end + STEP_32
        assert (after.arena_used, after.used) == (placement.arena_used, 512 * MiB)
        assert after.owned == ((placement.start, placement.arena_end + STEP_32),)
        assert after.fits(STEP_32 + GO_PAGE)

    def test_a_jump_strands_the_tail(self) -> None:
        """Addresses granted further up leave the old tail unused, but owned."""
        placement = grown(layouts.get("go-tip-2014-12/386"), 500)
        place = placement.arena_end + 64 * MiB

        answer = placement.granted(placed_request(placement, 20 * MiB), place, 20 * MiB)

        assert answer is not None
        assert answer.block is None
        after = answer.placement
        assert (after.arena_used, after.arena_end) == (place, place + STEP_32)
        assert after.owned == (
            (placement.start, placement.arena_end),
            (place, place + STEP_32),
        )
        used = after.advanced(20 * MiB)
        assert used.arenas == (
            (placement.arena_start, placement.arena_start + 500 * MiB),
            (place, place + 20 * MiB),
        )

    def test_after_a_jump_the_metadata_covers_the_hole(self) -> None:
        """Bitmap and spans are mapped for all addresses below arena_used, including the hole."""
        placement = full_386()
        place = placement.arena_end + 64 * MiB
        answer = placement.granted(placed_request(placement), place, MiB)
        assert answer is not None

        after = answer.placement.advanced(MiB)

        used = place + MiB - placement.arena_start
        assert after.used == used
        assert used % (64 * KiB) == GO_PAGE
        low, high = after.mapped_bitmap()
        assert high - low == -(-(used // 8) // GO_PAGE) * GO_PAGE
        low, high = after.mapped_spans()
        assert high - low == -(-(used // GO_PAGE * 4) // (4 * KiB)) * 4 * KiB

    def test_a_jump_to_an_unaligned_address_is_rounded_up(self) -> None:
        """After a jump to an unaligned address the arena continues at the next heap page."""
        placement = full_386()
        place = placement.arena_end + 64 * MiB + 4 * KiB

        answer = placement.granted(placed_request(placement), place, MiB)

        assert answer is not None
        assert answer.placement.arena_used == place + 4 * KiB
        assert answer.placement.arena_end == place + STEP_32

    @pytest.mark.parametrize("which", [placed_request, last_resort])
    def test_above_the_window_is_of_no_use(self, which: object) -> None:
        """A range that ends above the window is refused; one that ends with it is not."""
        placement = full_386()
        request = placed_request(placement) if which is placed_request else last_resort(placement)
        top = placement.arena_start + 2 * GiB

        assert placement.window_end == top
        assert placement.granted(request, top - request.size, MiB) is not None
        assert placement.granted(request, top - request.size + 4 * KiB, MiB) is None
        assert placement.granted(request, 0xF7D7A000, MiB) is None
        assert placement.granted(request, 0x7F0000000000, MiB) is None

    @pytest.mark.parametrize("below", [4 * KiB, MiB, 300 * MiB])
    def test_below_arena_start_is_of_no_use(self, below: int) -> None:
        """Addresses below arena_start are refused for both kinds of request."""
        placement = full_386()

        for request in placement.growth(MiB):
            assert placement.granted(request, placement.arena_start - below, MiB) is None

    def test_addresses_in_a_hole_below_arena_used_are_of_no_use(self) -> None:
        """Addresses in a hole below arena_used are refused: the arena does not grow backward."""
        placement = full_386()
        jump = placement.granted(placed_request(placement), placement.arena_end + 512 * MiB, MiB)
        assert jump is not None
        above = jump.placement.advanced(STEP_32)

        request = placed_request(above, MiB)

        assert above.granted(request, placement.arena_end, MiB) is None

    def test_memory_in_a_hole_below_arena_used_serves(self) -> None:
        """Memory in a hole below arena_used is used, and the metadata describes it."""
        placement = full_386()
        jump = placement.granted(placed_request(placement), placement.arena_end + 512 * MiB, MiB)
        assert jump is not None
        above = jump.placement.advanced(STEP_32)
        hole = placement.arena_end + 16 * MiB

        answer = above.granted(last_resort(above), hole, MiB)

        assert answer is not None
        assert answer.block == hole
        after = answer.placement
        assert (after.arena_used, after.arena_end) == (above.arena_used, above.arena_end)
        assert (hole, hole + MiB + GO_PAGE) in after.arenas
        assert (hole, hole + MiB + GO_PAGE) in after.owned
        assert after.mapped_bitmap() == above.mapped_bitmap()

    def test_memory_above_the_arena_takes_the_arena_with_it(self) -> None:
        """Memory further up in the window moves the end of the arena there."""
        placement = full_386()
        place = placement.arena_end + 512 * MiB + 4 * KiB

        answer = placement.granted(last_resort(placement), place, MiB)

        assert answer is not None
        assert answer.block == place + 4 * KiB
        assert answer.placement.arena_used == place + 4 * KiB + MiB
        assert answer.placement.arena_end == place + MiB + GO_PAGE

    def test_the_sixth_step_misses_the_window_because_of_the_slack(self) -> None:
        """Five steps in place reach 1792 MiB + 8 KiB; a sixth would exceed the window by 8 KiB."""
        placement = full_386()
        steps = 0

        while len(requests := placement.growth(MiB)) == 2:
            answer = placement.granted(requests[0], placement.arena_end, MiB)
            assert answer is not None
            placement, steps = answer.placement.advanced(STEP_32), steps + 1

        assert steps == 5
        assert placement.used == 1792 * MiB
        assert placement.arena_end == placement.arena_start + 1792 * MiB + GO_PAGE
        assert placement.arena_end + STEP_32 - placement.window_end == GO_PAGE
        assert requests == [Request(MiB + GO_PAGE, 0, committed=True, exact=False)]

    def test_sizes_above_the_window(self) -> None:
        """A size above the window's makes no request for addresses, only one for memory."""
        placement = full_386()

        requests = placement.growth(3 * GiB)

        assert [request.committed for request in requests] == [True]
        assert placement.granted(requests[0], placement.arena_end, 3 * GiB) is None


class TestGrowthOfArenas:
    def test_the_first_arena_is_asked_for_at_the_hints(self) -> None:
        """Without an arena each hint is tried in turn, for whole units and no other address."""
        layout = layouts.get("go1.11/amd64")
        placement = layout.place(layout.hints[0])

        requests = placement.growth(MiB)

        assert tuple(request.hint for request in requests) == layout.hints
        assert {request.size for request in requests} == {64 * MiB}
        assert all(request.committed and request.exact for request in requests)
        assert placement.growth(65 * MiB)[0].size == 128 * MiB

    def test_the_next_arena_is_contiguous(self) -> None:
        """The next arena is requested at the end of the last, and blocks may span both."""
        placement = grown(layouts.get("go1.11/amd64"), 60)
        request = placement.growth(8 * MiB)[0]

        answer = placement.granted(request, request.hint, 8 * MiB)

        assert request.hint == placement.arena_end == 0xC000000000 + 64 * MiB
        assert answer is not None
        assert answer.block == placement.arena_used
        assert answer.placement.arena_used == placement.arena_used + 8 * MiB
        assert answer.placement.arenas == ((0xC000000000, 0xC000000000 + 128 * MiB),)

    def test_a_taken_place_moves_the_heap_to_the_next_hint(self) -> None:
        """If the addresses above the last arena are occupied, the next hint is tried."""
        placement = grown(layouts.get("go1.11/amd64"), 60)
        request = placement.growth(8 * MiB)[1]

        answer = placement.granted(request, request.hint, 8 * MiB)

        assert request.hint == 0x1C000000000
        assert answer is not None
        assert answer.block == 0x1C000000000
        assert answer.placement.arena_end == 0x1C000000000 + 64 * MiB
        assert answer.placement.arena_used == 0x1C000000000 + 8 * MiB
        assert answer.placement.arenas == (
            (0xC000000000, 0xC000000000 + 64 * MiB),
            (0x1C000000000, 0x1C000000000 + 64 * MiB),
        )
        assert answer.placement.growth(64 * MiB)[0].hint == 0x1C000000000 + 64 * MiB


class TestPlacementsAreImmutable:
    def test_growth_makes_new_ones(self) -> None:
        """Growth returns a new placement and leaves the old one unchanged."""
        before = full_386()
        arena_used, arena_end, owned = before.arena_used, before.arena_end, before.owned

        before.granted(placed_request(before), before.arena_end, MiB)
        before.advanced(GO_PAGE)

        assert (before.arena_used, before.arena_end, before.owned) == (arena_used, arena_end, owned)
        with pytest.raises(AttributeError):
            before.arena_used = 0  # type: ignore[misc]


class TestNames:
    def test_every_name_gives_the_layout_of_that_name(self) -> None:
        """Each name is listed once and gives a layout of that name."""
        names = layouts.names()

        assert len(set(names)) == len(names)
        assert [layouts.get(name).name for name in names] == names
        assert {"go-tip-2014-12/amd64", "go1.11/amd64", "fallback", "native"} <= set(names)

    @pytest.mark.parametrize(
        ("alias", "row"),
        [
            ("go1.3/amd64", "go1.4/amd64"),
            ("go1.6/amd64", "go1.5/amd64"),
            ("go1.7/amd64", "go1.10/amd64"),
            ("go1.8/amd64", "go1.10/amd64"),
            ("go1.9/amd64", "go1.10/amd64"),
        ],
    )
    def test_releases_that_share_a_row(self, alias: str, row: str) -> None:
        """Releases with the same layout differ only in the name."""
        layout, base = layouts.get(alias), layouts.get(row)

        assert layout.name == alias
        assert layout.place(layout.hints[0]).maps() == base.place(base.hints[0]).maps()
        assert (layout.strategy, layout.total(), layout.bitmap_bits) == (
            base.strategy,
            base.total(),
            base.bitmap_bits,
        )

    def test_an_unknown_name_is_a_key_error_that_lists_the_known(self) -> None:
        """An unknown name raises KeyError; the message lists the known ones."""
        with pytest.raises(KeyError, match=r"go2\.0/amd64.*native.*go-tip-2014-12/amd64"):
            layouts.get("go2.0/amd64")

    @pytest.mark.parametrize(
        ("word", "size", "arena"),
        [
            (8, None, 128 * GiB),
            (4, None, 512 * MiB),
            (8, 1, GO_PAGE),
            (8, 10 * MiB, 10 * MiB),
            (4, 10 * MiB + 1, 10 * MiB + GO_PAGE),
        ],
    )
    def test_native_is_nothing_but_arena(self, word: int, size: int | None, arena: int) -> None:
        """The native layout is one arena of the given size, in whole pages."""
        layout = layouts.get("native", size=size, word=word)

        placement = layout.place(0x10000000)

        assert layout.total() == layout.arena == arena
        assert placement.arena == (0x10000000, 0x10000000 + arena)
        assert (layout.bitmap_bits, layout.spans, layout.window, layout.hints) == (0, 0, 0, ())

    @pytest.mark.parametrize("size", [0, -1, -MiB])
    def test_native_has_a_positive_size(self, size: int) -> None:
        """The size must be positive."""
        with pytest.raises(RangeError, match="positive"):
            layouts.get("native", size=size)

    @pytest.mark.parametrize("name", ["go-tip-2014-12/amd64", "go1.11/amd64", "fallback"])
    def test_others_have_their_own_size(self, name: str) -> None:
        """A size for another layout than native is refused."""
        with pytest.raises(RangeError, match="native"):
            layouts.get(name, size=MiB)

    @pytest.mark.parametrize(
        ("name", "other"),
        [
            ("go-tip-2014-12/amd64", "fallback"),
            ("go1.4/amd64", "fallback"),
            ("go1.9/amd64", "fallback"),
            ("go1.11/amd64", None),
            ("go-tip-2014-12/386", None),
            ("fallback", None),
            ("native", None),
        ],
    )
    def test_layouts_that_fall_back(self, name: str, other: str | None) -> None:
        """Only the 64-bit layouts up to Go 1.10 fall back to the 32-bit mechanism."""
        fallback = layouts.fallback_of(layouts.get(name))

        assert (fallback and fallback.name) == other

    def test_the_default_is_the_articles(self) -> None:
        """The default name is that of the development tree of December 2014."""
        assert layouts.default_name(8) == "go-tip-2014-12/amd64"
        assert layouts.default_name(4) == "go-tip-2014-12/386"

    def test_every_layout_is_described(self) -> None:
        """The description of a layout is one line that has the size of its arenas."""
        for name in layouts.names():
            layout = layouts.get(name)

            line = layouts.describe(layout)

            assert "\n" not in line
            assert ("64 MiB arenas" if layout.strategy == "arenas" else "iB arena") in line


class TestWithout:
    @pytest.mark.parametrize(
        ("taken", "left"),
        [
            ([], [(10, 20)]),
            ([(10, 20)], []),
            ([(0, 30)], []),
            ([(12, 14)], [(10, 12), (14, 20)]),
            ([(0, 12), (18, 25)], [(12, 18)]),
            ([(0, 10), (20, 30)], [(10, 20)]),
            ([(11, 12), (12, 13), (15, 16)], [(10, 11), (13, 15), (16, 20)]),
        ],
    )
    def test_the_remaining_parts_of_a_range(
        self, taken: list[tuple[int, int]], left: list[tuple[int, int]]
    ) -> None:
        """`without` yields the parts of a range that no other range covers, lowest first."""
        assert list(layouts.without((10, 20), taken)) == left
