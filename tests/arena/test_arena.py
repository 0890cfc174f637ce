"""Arenas in every layout, compared with traces of real Go binaries and with /proc/self/maps."""

import functools
import gc
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import pyreserve
from helpers import golden, witness
from helpers.arenas import (
    fill,
    heap_bitmap,
    holds,
    in_child,
    layout_names,
    needs_64_bits,
    needs_golden_page,
    relative,
)
from pyreserve import (
    PAGE_SIZE,
    Arena,
    GiB,
    KiB,
    MiB,
    OutOfMemoryError,
    RangeError,
    ReleasedError,
    ViewError,
    VMError,
    capabilities,
    layouts,
)
from pyreserve._system.machine import thp_size
from pyreserve.layouts import LayoutName, Placement, Request
from pyreserve.units import WORD, round_up

GO_PAGE = 8 * KiB
LAYOUT_32: LayoutName = "go-tip-2014-12/386"
RESERVED = ["go-tip-2014-12/amd64", LAYOUT_32, "go1.5/386", "fallback", "native"]

needs_low_addresses = pytest.mark.skipif(
    WORD != 8, reason="needs addresses below 4 GiB that are free"
)


def live(low: int, high: int) -> list[tuple[int, int, str]]:
    """Return the mappings that /proc/self/maps shows in a range."""
    pieces = []
    for line in Path("/proc/self/maps").read_text(errors="replace").splitlines():
        addresses, perms = line.split()[:2]
        start, end = (int(address, 16) for address in addresses.split("-"))
        if start < high and end > low:
            pieces.append((max(start, low), min(end, high), perms))
    return pieces


def plain(arena: Arena) -> list[tuple[int, int, str]]:
    """Return the mappings that the arena reports."""
    return [(piece.start, piece.end, piece.perms) for piece in arena.maps()]


def predicted(arena: Arena) -> list[tuple[int, int, str]]:
    """Return the mappings that its placement predicts."""
    return [(start, end, perms) for start, end, perms, _ in arena.placement.maps(PAGE_SIZE)]


def byte_at(arena: Arena, address: int) -> int:
    """Read a committed byte of the arena or of its metadata."""
    return arena.region.view(address - arena.region.base, 1)[0]


@pytest.fixture(params=layout_names())
def any_arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    """An arena in every layout, released at the end unless the test has done so."""
    arena = Arena(layout=request.param)
    yield arena
    gc.collect()
    if not arena.region.released:
        arena.release()


GROW_AND_LOOK = """
    name, growths = sys.argv[1], int(sys.argv[2])
    with Arena(layout=name) as arena:
        for _ in range(growths):
            arena.grow(MiB)
        print(json.dumps({
            "layout": arena.layout.name,
            "requested": arena.requested_layout.name,
            "fell_back": arena.fell_back,
            "base": arena.placement.start,
            "in_use": arena.in_use,
            "live": live(arena.placement.start, arena.placement.end),
            "reported": plain(arena.maps()),
            "planned": plain(arena.placement.maps(PAGE_SIZE)),
        }))
"""


@needs_golden_page
class TestGoldenTraces:
    @pytest.mark.parametrize(
        "trace",
        [trace for trace in golden.MAPPED if trace.goarch == "amd64" and not trace.rlimit_as_kib],
        ids=lambda trace: trace.name,
    )
    @needs_64_bits
    def test_amd64(self, trace: golden.Trace) -> None:
        """The kernel shows the mappings of the real Go binary, address for address."""
        result = in_child(GROW_AND_LOOK, trace.layout, str(trace.growths))

        assert relative(result["live"], 0) == trace.ranges()
        assert result["live"] == result["reported"] == result["planned"]
        assert result["in_use"] == trace.growths * MiB
        assert result["fell_back"] is None

    @pytest.mark.parametrize(
        "trace",
        [trace for trace in golden.MAPPED if trace.goarch == "386"],
        ids=lambda trace: trace.name,
    )
    def test_386(self, trace: golden.Trace) -> None:
        """The 386 layout has the mappings of the real binary, relative to its base."""
        result = in_child(GROW_AND_LOOK, trace.layout, str(trace.growths))

        base = layouts.get(trace.layout).hints[0]
        assert relative(result["live"], result["base"]) == trace.ranges(base)
        assert result["live"] == result["reported"] == result["planned"]

    @pytest.mark.parametrize(
        "trace",
        [trace for trace in golden.MAPPED if trace.rlimit_as_kib],
        ids=lambda trace: trace.name,
    )
    @needs_64_bits
    def test_fallback(self, trace: golden.Trace) -> None:
        """Under ulimit -v the layout falls back to the same layout as the real binary."""
        nbytes = (trace.rlimit_as_kib or 0) * KiB
        lowered = f"resource.setrlimit(resource.RLIMIT_AS, ({nbytes}, -1))\n"

        result = in_child(
            lowered + textwrap.dedent(GROW_AND_LOOK), trace.layout, str(trace.growths)
        )

        assert (result["requested"], result["layout"]) == (trace.layout, trace.used_layout)
        because, limit = result["fell_back"]
        assert limit == "RLIMIT_AS"
        assert "ulimit -v" in because
        base = layouts.get("fallback").hints[0]
        assert relative(result["live"], result["base"]) == trace.ranges(base)
        assert result["live"] == result["reported"] == result["planned"]

    def test_the_386_binary_dies_at_the_same_byte(self) -> None:
        """386 runs out of memory at the same byte as the real binary, with the same message."""
        result = in_child(
            """
            arena = Arena(layout="go-tip-2014-12/386")
            with contextlib.suppress(OutOfMemoryError):
                while True:
                    arena.grow(MiB)
            before = state(arena)
            try:
                arena.grow(MiB)
            except OutOfMemoryError as error:
                refused = [error.strerror, error.verb, error.nbytes, error.limit]
            after = state(arena)
            start = arena.placement.arena_start
            print(json.dumps({"refused": refused, "arena_start": start, "in_use": arena.in_use,
                              "same": before == after, "owned": arena.placement.owned,
                              "live": live(arena.placement.start, arena.placement.end),
                              "planned": plain(arena.placement.maps(PAGE_SIZE))}))
            """
        )

        start = result["arena_start"]
        message, *facts = result["refused"]
        window = f"not in usable range [{start:#x},{start + 2 * GiB:#x})"
        assert "memory allocated by OS (" in message
        assert window in message
        assert "cannot allocate 1048576-byte block (1879048192 in use)" in message
        assert facts == ["grow", MiB, "layout"]
        assert result["in_use"] == 1_879_048_192
        assert result["same"]
        assert len(result["owned"]) == 1
        assert result["live"] == result["planned"]

    def test_the_386_arena_is_usable_afterwards(self) -> None:
        """An arena whose growth was refused keeps its blocks; its remaining bytes can be taken."""
        result = in_child(
            """
            arena = Arena(layout="go-tip-2014-12/386")
            first = arena.grow(MiB)
            with contextlib.suppress(OutOfMemoryError):
                while True:
                    last = arena.grow(MiB)
            ok = poke(arena, first, MiB) and poke(arena, last, MiB)
            rest = arena.grow(8192)
            ok = ok and poke(arena, rest, 8192)
            in_use = arena.in_use
            try:
                arena.grow(8192)
            except OutOfMemoryError:
                gc.collect()
                arena.release()
                print(json.dumps([ok, in_use]))
            """
        )

        assert result == [True, 1_879_048_192 + GO_PAGE]


class TestReservation:
    @pytest.mark.parametrize(
        "name", [name for name in RESERVED if WORD == 8 or name in (LAYOUT_32, "go1.5/386")]
    )
    def test_vsz_grows_by_the_total(self, name: str) -> None:
        """A reserve layout adds exactly its total to VmSize, and nothing to VmData."""
        result = in_child(
            """
            name = sys.argv[1]
            for _ in range(2):
                with Arena(layout=name) as arena:
                    arena.grow(MiB)
                status("VmSize")
            gc.collect()
            before = status("VmSize"), status("VmData")
            arena = Arena(layout=name)
            after = status("VmSize"), status("VmData")
            arena.grow(MiB)
            grown = status("VmSize"), status("VmData")
            committed = arena.region.committed
            arena.release()
            print(json.dumps([before, after, grown, committed, status("VmSize")]))
            """,
            name,
        )

        before, after, grown, committed, released = result
        total = round_up(layouts.get(name, word=WORD).total(), PAGE_SIZE)
        assert after[0] - before[0] == total
        assert after[1] == before[1]
        assert grown == [after[0], after[1] + committed]
        assert released == before[0]

    @pytest.mark.parametrize("name", ["go1.4/amd64", "go1.5/amd64", "go1.10/amd64"])
    @needs_64_bits
    def test_probing_takes_nothing(self, name: str) -> None:
        """A probe layout owns no addresses until it grows, and then only mapped ones."""
        result = in_child(
            """
            name = sys.argv[1]
            for _ in range(2):
                with Arena(layout=name) as arena:
                    arena.grow(MiB)
                status("VmSize")
            gc.collect()
            before = status("VmSize")
            arena = Arena(layout=name)
            probed, owned = status("VmSize"), arena.region.reserved
            arena.grow(MiB)
            print(json.dumps([probed - before, owned, whole(arena), status("VmSize") - before,
                              arena.region.reserved, arena.region.committed]))
            """,
            name,
        )

        probed, owned, mapped, grown, reserved, committed = result
        assert (probed, owned) == (0, 0)
        assert all(perms == "rw-p" for _, _, perms in mapped)
        assert grown == reserved == committed == sum(end - start for start, end, _ in mapped)

    def test_the_default_is_native(self) -> None:
        """The default arena is native, of 128 GiB or, on 32 bits, 512 MiB."""
        with Arena() as arena:
            assert arena.layout.name == "native"
            assert arena.layout.arena == (128 * GiB if WORD == 8 else 512 * MiB)
            assert arena.requested_layout is arena.layout
            assert arena.fell_back is None

    @pytest.mark.parametrize("size", ["10MiB", "10 mib", 10 * MiB, str(10 * MiB)])
    def test_sizes_as_words(self, size: int | str) -> None:
        """Sizes of arena, step, block, growth and trim are bytes or strings of `parse_size`."""
        with Arena(size, step="256KiB") as arena:
            assert arena.layout.arena == 10 * MiB
            block = arena.alloc("64KiB", align="1MiB")
            assert (block.nbytes, block.address % MiB) == (64 * KiB, 0)
            assert arena.grow("8KiB") > block.address
            block.free()
            assert arena.trim("64KiB") == 64 * KiB

    @pytest.mark.parametrize("name", layouts.names())
    def test_a_layout_given_as_size(self, name: str) -> None:
        """A layout name given as the size is refused; the message has the right argument."""
        with pytest.raises(RangeError, match=f"use layout='{name}'"):
            Arena(name)

    @pytest.mark.parametrize("size", ["", "big", "10 miles", "1.5"])
    def test_sizes_that_are_none(self, size: str) -> None:
        """A string that is not a size is a ValueError."""
        for use in (Arena, lambda step: Arena(MiB, step=step)):
            with pytest.raises(ValueError, match="not a"):
                use(size)

    def test_a_native_arena_has_the_size_asked_for(self) -> None:
        """The native layout reserves exactly the size, in whole pages."""
        with Arena(10 * MiB + 1) as arena:
            low, high = arena.placement.arena

            assert high - low == 10 * MiB + GO_PAGE
            assert arena.region.reserved == round_up(high - low, PAGE_SIZE)
            assert arena.placement.start == low == arena.region.base

    def test_a_native_arena_is_whole_wherever_it_lies(self) -> None:
        """The whole size is usable at any base address."""
        spacers = []
        for _ in range(6):
            with Arena(MiB) as arena:
                block = arena.grow(MiB)

                assert arena.in_use == MiB
                assert byte_at(arena, block + MiB - 1) == 0
                gc.collect()
            # Occupy the freed addresses, so that the next arena begins an odd page later.
            spacers.append(pyreserve.reserve(MiB + PAGE_SIZE))
        for spacer in spacers:
            spacer.release()

    def test_two_arenas_of_one_layout_do_not_meet(self) -> None:
        """Two arenas of one layout do not overlap."""
        name = layouts.default_name(WORD)
        with Arena(layout=name) as first, Arena(layout=name) as second:
            first.grow(MiB)
            second.grow(MiB)

            ranges = sorted(
                (arena.placement.start, arena.placement.end) for arena in (first, second)
            )
            assert ranges[0][1] <= ranges[1][0]
            assert plain(first) == predicted(first)
            assert plain(second) == predicted(second)

    @pytest.mark.parametrize("name", ["go2/amd64", "", "native "])
    def test_unknown_layouts(self, name: Any) -> None:
        """An unknown layout name is a KeyError."""
        with pytest.raises(KeyError):
            Arena(layout=name)

    @pytest.mark.parametrize(("name", "size"), [("native", 0), ("native", -1), (LAYOUT_32, MiB)])
    def test_sizes_that_make_no_sense(self, name: LayoutName, size: int) -> None:
        """A size that is not positive, or for another layout than native, is a RangeError."""
        with pytest.raises(RangeError):
            Arena(size, layout=name)

    @pytest.mark.parametrize("size", [2**62, 2**64, 2**70])
    def test_more_than_all_addresses(self, size: int) -> None:
        """A size beyond any address space is an OutOfMemoryError."""
        with pytest.raises(OutOfMemoryError):
            Arena(size)

    @needs_64_bits
    def test_neither_fits(self) -> None:
        """If a limit refuses the fallback too, the error names the limit."""
        result = in_child(
            """
            limit("AS", 500 * MiB)
            try:
                Arena(layout="go-tip-2014-12/amd64")
            except OutOfMemoryError as error:
                print(json.dumps([error.strerror, error.limit, error.verb]))
            """
        )

        message, limit, verb = result
        assert message.startswith("cannot reserve arena virtual address space: ")
        assert (limit, verb) == ("RLIMIT_AS", "reserve")

    @needs_64_bits
    def test_a_probing_runtime_does_not_fall_back(self) -> None:
        """Under ulimit -v probing succeeds, since it reserves nothing, and a later growth fails."""
        result = in_child(
            """
            limit("AS", 100 * MiB)
            arena = Arena(layout="go1.4/amd64")
            arena.grow(MiB)
            try:
                arena.grow(200 * MiB)
            except OutOfMemoryError:
                print(json.dumps([arena.layout.name, arena.fell_back, arena.in_use]))
            """
        )

        assert result == ["go1.4/amd64", None, MiB]

    def test_later_32_bit_releases_take_less(self) -> None:
        """If 512 MiB of arena are refused, Go 1.5's 32-bit layout tries 256 MiB, then 128."""
        result = in_child(
            """
            sizes = []
            for mib in (900, 600, 450):
                limit("AS", mib * MiB)
                with Arena(layout="go1.5/386") as arena:
                    low, high = arena.placement.arena
                    arena.grow(MiB)
                    sizes.append([high - low - 8192, plain(arena.maps()) == whole(arena)])
                limit("AS", None)
            print(json.dumps(sizes))
            """
        )

        assert result == [[512 * MiB, True], [256 * MiB, True], [128 * MiB, True]]


class TestGrowth:
    def test_blocks_follow_one_another_and_read_zero(self, any_arena: Arena) -> None:
        """Ranges from grow are consecutive, rounded up to whole pages, zero at first, writable."""
        page = max(GO_PAGE, PAGE_SIZE)
        sizes = [1, page, page + 1, MiB, 3 * MiB + 5]

        blocks = [any_arena.grow(size) for size in sizes]

        rounded = [round_up(size, page) for size in sizes]
        assert blocks[0] == any_arena.placement.arena_start
        for block, size, following in zip(blocks, rounded, blocks[1:], strict=False):
            assert block + size == following
        assert any_arena.in_use == sum(rounded)
        assert any_arena.placement.arena_used == blocks[-1] + rounded[-1]
        for block, size in zip(blocks, rounded, strict=True):
            for at in (block, block + size - 1):
                view = any_arena.region.view(at - any_arena.region.base, 1)
                assert view[0] == 0
                view[0] = 1
                assert byte_at(any_arena, at) == 1
                del view

    def test_placement_arena_and_kernel_agree(self, any_arena: Arena) -> None:
        """After each growth placement, arena and kernel agree on every mapping."""
        for nbytes in (1, MiB, 5 * MiB, 100 * MiB, GO_PAGE, 70 * MiB):
            any_arena.grow(nbytes)

            placement = any_arena.placement
            shown = live(placement.start, placement.end)
            assert plain(any_arena) == predicted(any_arena)
            if placement.layout.strategy == "reserve":
                assert shown == predicted(any_arena)

    def test_arena_and_placement_name_the_same_parts(self, any_arena: Arena) -> None:
        """The arena and its placement name the parts of each mapping alike."""
        any_arena.grow(MiB)

        assert any_arena.maps() == any_arena.placement.maps(PAGE_SIZE)

    @pytest.mark.parametrize("nbytes", [0, -1, -MiB])
    def test_only_by_a_positive_number(self, nbytes: int) -> None:
        """grow refuses a size that is not positive."""
        with Arena(MiB) as arena:
            with pytest.raises(RangeError, match="positive"):
                arena.grow(nbytes)

            assert arena.in_use == 0

    @pytest.mark.parametrize("nbytes", [1.5, [1], None])
    def test_only_by_a_number(self, nbytes: Any) -> None:
        """grow refuses a size that is not an integer."""
        with Arena(MiB) as arena, pytest.raises(TypeError):
            arena.grow(nbytes)

    @pytest.mark.parametrize("nbytes", [2**40, 2**62, 2**63, 2**64 - 1, 2**64, 2**70])
    def test_more_than_there_is(self, any_arena: Arena, nbytes: int) -> None:
        """A growth beyond any address space is an OutOfMemoryError; nothing changes."""
        any_arena.grow(MiB)
        before = any_arena.placement, any_arena.in_use, plain(any_arena)

        with pytest.raises(OutOfMemoryError):
            any_arena.grow(nbytes)

        assert (any_arena.placement, any_arena.in_use, plain(any_arena)) == before
        any_arena.grow(MiB)

    def test_a_full_arena_says_so(self) -> None:
        """A full arena refuses to grow; the message has its size."""
        with Arena(MiB) as arena:
            arena.grow(MiB)

            with pytest.raises(
                OutOfMemoryError, match=r"\(1048576 in use\).*arena of 1 MiB has 0 bytes left"
            ) as caught:
                arena.grow(1)

            assert (caught.value.limit, caught.value.verb) == ("capacity", "grow")
            assert arena.in_use == MiB

    @needs_64_bits
    def test_a_64_bit_arena_ends_with_its_slack(self) -> None:
        """128 GiB and the slack can be used, not a page more."""
        with Arena(layout="go-tip-2014-12/amd64") as arena:
            low, high = arena.placement.arena
            before = plain(arena)

            with pytest.raises(OutOfMemoryError, match=f"128 GiB has {high - low} bytes left"):
                arena.grow(high - low + 1)

            assert high - low == 128 * GiB + GO_PAGE
            assert plain(arena) == before

    def test_threads_get_different_blocks(self) -> None:
        """Ranges taken by several threads at once do not overlap, and all are counted."""
        blocks: list[int] = []
        with Arena(layout=layouts.default_name(WORD)) as arena:

            def take() -> None:
                for _ in range(100):
                    blocks.append(arena.grow(64 * KiB))

            threads = [threading.Thread(target=take) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

            start = arena.placement.arena_start
            assert sorted(blocks) == [start + i * 64 * KiB for i in range(400)]
            assert arena.in_use == 400 * 64 * KiB
            assert plain(arena) == predicted(arena)


class TestGrowthOf32Bits:
    def test_something_above_the_arena_refuses_growth(self) -> None:
        """If the addresses above the arena are occupied, growth is refused and nothing changes."""
        result = in_child(
            """
            arena = Arena(layout="go-tip-2014-12/386")
            while arena.placement.fits(MiB):
                arena.grow(MiB)
            foreign = pyreserve.reserve(PAGE_SIZE, at=arena.placement.arena_end)
            before, size = state(arena), None
            sizes = []
            for _ in range(3):
                try:
                    arena.grow(MiB)
                except OutOfMemoryError as error:
                    refused = [error.strerror, error.limit]
                sizes.append(status("VmSize"))
            after = state(arena)
            in_use = arena.in_use
            foreign.release()
            block = arena.grow(MiB)
            print(json.dumps([refused, before == after, in_use, sizes[-1] - sizes[-2],
                              block - arena.placement.arena_start, poke(arena, block, MiB)]))
            """
        )

        (message, limit), same, in_use, leaked, offset, usable = result
        assert "not in usable range" in message
        assert "cannot allocate 1048576-byte block (536870912 in use)" in message
        assert limit == "layout"
        assert same
        assert leaked == 0
        assert in_use == offset == 512 * MiB
        assert usable

    @needs_low_addresses
    def test_a_jump(self) -> None:
        """Addresses further up in the window are used; the metadata covers the hole below them."""
        with Arena(layout=LAYOUT_32) as arena:
            while arena.placement.fits(MiB):
                arena.grow(MiB)
            end = arena.placement.arena_end
            elsewhere = round_up(end, MiB) + 64 * MiB
            _steer(arena, lambda request: request if request.committed else _to(request, elsewhere))

            block = arena.grow(MiB)

            assert block == elsewhere
            assert arena.in_use == 513 * MiB
            assert arena.placement.owned == (
                (arena.placement.start, end),
                (elsewhere, elsewhere + 256 * MiB),
            )
            assert plain(arena) == predicted(arena)
            low, high = arena.placement.mapped_bitmap(PAGE_SIZE)
            assert high - low >= (block + MiB - arena.placement.arena_start) // 8
            assert arena.region.is_committed(low - arena.region.base, high - low)
            assert byte_at(arena, block + MiB - 1) == 0
            assert arena.grow(MiB) == block + MiB
            heap_bitmap(arena).set_at(block + 4, 9)
            assert heap_bitmap(arena).at(block + 4) == 9

    @needs_low_addresses
    def test_the_last_resort(self) -> None:
        """Memory mapped inside the window is used wherever it is."""
        with Arena(layout=LAYOUT_32) as arena:
            while arena.placement.fits(MiB):
                arena.grow(MiB)
            end = arena.placement.arena_end
            above = round_up(end, MiB) + 512 * MiB
            hole = round_up(end, MiB) + 16 * MiB
            _steer(arena, lambda request: _to(request, above) if request.committed else None)
            first = arena.grow(MiB)
            arena._engine.placement = _steered(
                arena.placement, lambda request: _to(request, hole) if request.committed else None
            )

            second = arena.grow(MiB)

            assert (first, second) == (above, hole)
            assert arena.in_use == 514 * MiB
            assert arena.placement.arena_used == above + MiB
            assert plain(arena) == predicted(arena)
            for block in (first, second):
                assert byte_at(arena, block) == byte_at(arena, block + MiB - 1) == 0

    @needs_low_addresses
    def test_addresses_outside_go_back(self) -> None:
        """Addresses and memory outside the window are unmapped at once."""
        with Arena(layout=LAYOUT_32) as arena:
            while arena.placement.fits(MiB):
                arena.grow(MiB)
            outside = 0x200000000000
            before = plain(arena), arena.region.reserved
            plan = arena.placement
            _steer(arena, lambda request: _to(request, outside))

            with pytest.raises(OutOfMemoryError, match=rf"\({outside}\) not in usable range"):
                arena.grow(MiB)

            assert live(outside, outside + GiB) == []
            assert (plain(arena), arena.region.reserved) == before
            arena._engine.placement = plan
            assert arena.grow(MiB) == plan.arena_start + 512 * MiB

    @needs_low_addresses
    def test_an_occupied_base_moves_the_arena(self) -> None:
        """With 0x08200000 occupied, 386 is placed elsewhere and still grows to 1792 MiB."""
        result = in_child(
            """
            hint = layouts.get("go-tip-2014-12/386").hints[0]
            try:
                foreign = pyreserve.reserve(PAGE_SIZE, at=hint)
            except VMError:
                foreign = None  # the interpreter itself lies there
            arena = Arena(layout="go-tip-2014-12/386")
            with contextlib.suppress(OutOfMemoryError):
                while True:
                    arena.grow(MiB)
            print(json.dumps([arena.placement.start != hint, arena.in_use,
                              len(arena.placement.owned), plain(arena.maps()) == whole(arena),
                              foreign is None or live(hint, hint + PAGE_SIZE)[0][2]]))
            """
        )

        assert result == [True, 1792 * MiB, 1, True, "---p"]


def _to(request: Request, hint: int) -> Request:
    return request._replace(hint=hint)


def _steered(plan: Placement, steer: Callable[[Request], Request | None]) -> Placement:
    """Return a placement whose requests are changed or dropped by `steer`."""

    class Steered(Placement):
        __slots__ = ()

        def growth(self, nbytes: int) -> list[Request]:
            requests = (steer(request) for request in Placement.growth(self, nbytes))
            return [request for request in requests if request is not None]

    return Steered(
        plan.layout,
        plan.start,
        plan.arena_start,
        plan.arena_used,
        plan.arena_end,
        plan.owned,
        plan.arenas,
    )


def _steer(arena: Arena, steer: Callable[[Request], Request | None]) -> None:
    arena._engine.placement = _steered(arena.placement, steer)


REFUSE_IN_THE_MIDDLE = """
    name, resource_name = sys.argv[1:3]
    headroom, size = int(sys.argv[3]), int(sys.argv[4])
    arena = Arena(layout=name)
    block = arena.grow(20 * MiB)
    poke(arena, block, 20 * MiB)
    before, sizes, refused = state(arena), [], []
    for _ in range(4):
        limit(resource_name, headroom)
        try:
            arena.grow(size)
        except OutOfMemoryError as error:
            refused.append([error.limit, error.strerror])
        limit(resource_name, None)
        gc.collect()
        sizes.append(status("VmSize"))
    after = state(arena)
    kept = arena.region.view(block - arena.region.base, 1)[0]
    block = arena.grow(size)
    print(json.dumps({"refused": refused, "before": before, "after": after, "sizes": sizes,
                      "kept": kept, "usable": poke(arena, block, size),
                      "reported": plain(arena.maps()),
                      "planned": plain(arena.placement.maps(PAGE_SIZE))}))
"""

REFUSALS = [
    # enough for spans and bitmap, but not for the arena itself
    pytest.param("go-tip-2014-12/amd64", "DATA", 30 * MiB, 300 * MiB, marks=needs_64_bits),
    # enough for spans alone
    pytest.param("go-tip-2014-12/amd64", "DATA", 4 * MiB, 300 * MiB, marks=needs_64_bits),
    pytest.param(LAYOUT_32, "DATA", 50 * MiB, 300 * MiB),
    # enough for the new addresses, not for the memory to commit there
    pytest.param(LAYOUT_32, "DATA", 50 * MiB, 600 * MiB),
    pytest.param(LAYOUT_32, "AS", 50 * MiB, 600 * MiB),
    pytest.param("go1.4/amd64", "AS", 30 * MiB, 300 * MiB, marks=needs_64_bits),
    pytest.param("go1.4/amd64", "DATA", 30 * MiB, 300 * MiB, marks=needs_64_bits),
    pytest.param("go1.10/amd64", "AS", 4 * MiB, 300 * MiB, marks=needs_64_bits),
    # enough for the arena, but not for its separate metadata
    pytest.param("go1.11/amd64", "AS", 65 * MiB, 60 * MiB, marks=needs_64_bits),
    pytest.param("go1.11/amd64", "DATA", 65 * MiB, 60 * MiB, marks=needs_64_bits),
    # enough for the metadata of some of several arenas
    pytest.param("go1.11/amd64", "AS", 262 * MiB, 250 * MiB, marks=needs_64_bits),
    pytest.param("go1.11/amd64", "AS", 30 * MiB, 60 * MiB, marks=needs_64_bits),
    pytest.param("native", "DATA", 30 * MiB, 300 * MiB),
]


@functools.cache
def refuse_in_the_middle(name: str, resource: str, headroom: int, size: int) -> dict[str, Any]:
    """Run a refused growth once for all tests that need its result."""
    result = in_child(REFUSE_IN_THE_MIDDLE, name, resource, str(headroom), str(size))
    assert isinstance(result, dict)
    return result


class TestRefusedGrowth:
    """Each refusal happens in a fresh interpreter, whose limits are lowered for a moment."""

    @pytest.mark.parametrize(("name", "resource", "headroom", "size"), REFUSALS)
    def test_nothing_changes(self, name: str, resource: str, headroom: int, size: int) -> None:
        """A growth refused half way leaves placement, counters and mappings as they were."""
        result = refuse_in_the_middle(name, resource, headroom, size)

        assert len(result["refused"]) == 4
        assert result["after"] == result["before"]
        assert result["sizes"][-1] == result["sizes"][-2]
        assert result["kept"] == 0xA5
        assert result["usable"]
        assert result["reported"] == result["planned"]

    @pytest.mark.parametrize(("name", "resource", "headroom", "size"), REFUSALS)
    def test_the_limit_is_named(self, name: str, resource: str, headroom: int, size: int) -> None:
        """The error names the limit that refused."""
        result = refuse_in_the_middle(name, resource, headroom, size)

        assert {limit for limit, _ in result["refused"]} == {f"RLIMIT_{resource}"}
        assert all(f"RLIMIT_{resource}" in message for _, message in result["refused"])


@needs_64_bits
class TestConflicts:
    @pytest.mark.parametrize("where", ["arena", "bitmap", "spans"])
    def test_a_stranger_in_the_way_of_a_probe_layout(self, where: str) -> None:
        """A foreign mapping in the way of a growth is reported, not replaced."""
        with Arena(layout="go1.4/amd64") as arena:
            arena.grow(MiB)
            placement = arena.placement
            place = {
                "arena": placement.arena_used + 5 * MiB,
                "bitmap": placement.mapped_bitmap(PAGE_SIZE)[0] - 2 * PAGE_SIZE,
                "spans": placement.mapped_spans(PAGE_SIZE)[1],
            }[where]
            with pyreserve.reserve(PAGE_SIZE, at=place) as foreign:
                foreign.commit(0, PAGE_SIZE)
                foreign.view(0, 8)[:] = b"stranger"
                before = arena.placement, arena.in_use, plain(arena), arena.region.reserved

                with pytest.raises(VMError, match="address space conflict") as caught:
                    arena.grow(100 * MiB)

                after = arena.placement, arena.in_use, plain(arena), arena.region.reserved
                assert caught.value.errno_name == "EEXIST"
                assert not isinstance(caught.value, MemoryError)
                assert after == before
                assert bytes(foreign.view(0, 8)) == b"stranger"
                gc.collect()

            assert arena.grow(100 * MiB) == placement.arena_used
            assert plain(arena) == predicted(arena)

    def test_a_stranger_at_the_hint_of_a_probe_layout(self) -> None:
        """If the first hint is occupied, a probe layout uses the next free one."""
        result = in_child(
            """
            first = pyreserve.reserve(PAGE_SIZE, at=0xc000000000)
            with Arena(layout="go1.4/amd64") as arena:
                arena.grow(MiB)
                print(json.dumps([arena.placement.start, arena.placement.arena_start,
                                  plain(arena.maps()) == plain(arena.placement.maps(PAGE_SIZE))]))
            """
        )

        assert result == [0x1C000000000, 0x1C208000000, True]

    def test_a_stranger_at_the_hint_of_a_reserve_layout(self) -> None:
        """If its hint is occupied, a reserve layout uses any address."""
        result = in_child(
            """
            first = pyreserve.reserve(PAGE_SIZE, at=0xc000000000)
            with Arena(layout="go-tip-2014-12/amd64") as arena:
                arena.grow(MiB)
                print(json.dumps([arena.placement.start != 0xc000000000, arena.fell_back,
                                  plain(arena.maps()) == plain(arena.placement.maps(PAGE_SIZE)),
                                  plain(arena.maps()) == whole(arena)]))
            """
        )

        assert result == [True, None, True, True]

    def test_a_stranger_above_the_last_arena(self) -> None:
        """In Go 1.11 an occupied address moves the heap and its metadata to the next hint."""
        result = in_child(
            """
            arena = Arena(layout="go1.11/amd64")
            first = arena.grow(MiB)
            foreign = pyreserve.reserve(PAGE_SIZE, at=first + 64 * MiB)
            block = arena.grow(64 * MiB)
            following = arena.grow(MiB)
            print(json.dumps([first, block, following, poke(arena, block, 64 * MiB),
                              plain(arena.maps()), live(foreign.base, foreign.base + PAGE_SIZE)]))
            """
        )

        first, block, following, usable, maps, foreign = result
        assert (first, block, following) == (
            0xC000000000,
            0x1C000000000,
            0x1C000000000 + 64 * MiB,
        )
        assert usable
        assert maps == [
            [first, first + 64 * MiB, "rw-p"],
            [block, block + 128 * MiB, "rw-p"],
        ]
        assert foreign[0][2] == "---p"

    def test_a_moved_heap_has_its_bitmap(self) -> None:
        """Words of an arena at the next hint have bitmap entries, too."""
        result = in_child(
            """
            arena = Arena(layout="go1.11/amd64")
            first = arena.grow(MiB)
            foreign = pyreserve.reserve(PAGE_SIZE, at=first + 64 * MiB)
            block = arena.grow(64 * MiB)
            bitmap = arena.heap_bitmap
            bitmap.set_at(first, 1)
            bitmap.set_at(block, 2)
            bitmap.set_at(block + 64 * MiB - 8, 3)
            print(json.dumps([bitmap.at(first), bitmap.at(block), bitmap.at(block + 64 * MiB - 8)]))
            """
        )

        assert result == [1, 2, 3]

    def test_words_between_two_hints_have_no_entries(self) -> None:
        """Words in the gap between two arenas have no entries."""
        result = in_child(
            """
            arena = Arena(layout="go1.11/amd64")
            first = arena.grow(MiB)
            foreign = pyreserve.reserve(PAGE_SIZE, at=first + 64 * MiB)
            arena.grow(64 * MiB)
            try:
                arena.heap_bitmap.at(first + 128 * MiB)
            except pyreserve.RangeError:
                print(json.dumps("RangeError"))
            """
        )

        assert result == "RangeError"


FOUR_BITS = [name for name in layout_names() if layouts.get(name, word=WORD).bitmap_bits == 4]
TWO_BITS = [name for name in layout_names() if layouts.get(name, word=WORD).bitmap_bits == 2]
BEHIND = [name for name in TWO_BITS if layouts.get(name, word=WORD).strategy != "arenas"]


class TestHeapBitmap:
    @pytest.mark.parametrize("name", FOUR_BITS)
    def test_four_bits_a_word_run_backward(self, name: LayoutName) -> None:
        """Entry o is in byte arena_start - o // 2 - 1, at bit o % 2 * 4."""
        with Arena(layout=name) as arena:
            arena.grow(2 * MiB)
            bitmap, start = heap_bitmap(arena), arena.placement.arena_start
            words = 2 * MiB // arena.layout.word

            for word in (0, 1, 2, 3, 1000, 1001, words - 2, words - 1):
                for value in range(16):
                    bitmap[word] = value
                    byte = byte_at(arena, start - word // 2 - 1)
                    assert byte >> (word % 2 * 4) & 15 == value
                    assert bitmap[word] == value

            assert len(bitmap) == words

    @pytest.mark.parametrize("name", FOUR_BITS)
    def test_two_entries_share_a_byte(self, name: LayoutName) -> None:
        """A byte of the bitmap holds two entries, the lower word in the lower half."""
        with Arena(layout=name) as arena:
            arena.grow(MiB)
            bitmap, start = heap_bitmap(arena), arena.placement.arena_start

            arena.region.view(start - 1 - arena.region.base, 1)[0] = 0x94

            assert (bitmap[0], bitmap[1], bitmap[2]) == (4, 9, 0)

    @pytest.mark.parametrize("name", BEHIND)
    def test_two_bits_a_word_run_backward_too(self, name: LayoutName) -> None:
        """A byte holds four entries: pointer bits in the lower half, marks in the upper half."""
        with Arena(layout=name) as arena:
            arena.grow(2 * MiB)
            bitmap, start = heap_bitmap(arena), arena.placement.arena_start
            words = 2 * MiB // arena.layout.word

            for word in (0, 1, 2, 3, 4, 4001, words - 1):
                for value in range(4):
                    bitmap[word] = value
                    byte = byte_at(arena, start - word // 4 - 1)
                    assert byte >> (word % 4) & 1 == value & 1
                    assert byte >> (word % 4 + 4) & 1 == value >> 1
                    assert bitmap[word] == value

            assert len(bitmap) == words

    @pytest.mark.parametrize("name", [*FOUR_BITS, *TWO_BITS])
    def test_entries_do_not_touch_their_neighbours(self, name: LayoutName) -> None:
        """Writing an entry leaves all other entries unchanged."""
        with Arena(layout=name) as arena:
            arena.grow(MiB)
            bitmap = heap_bitmap(arena)
            values = [(word * 7 + 3) % (1 << arena.layout.bitmap_bits) for word in range(64)]

            for word in (*range(0, 64, 2), *range(1, 64, 2)):
                bitmap[word] = values[word]

            assert [bitmap[word] for word in range(64)] == values
            assert bitmap[64] == 0
            bitmap[20] = 0
            assert [bitmap[word] for word in (19, 20, 21)] == [values[19], 0, values[21]]

    @pytest.mark.parametrize("name", [*FOUR_BITS, *TWO_BITS])
    def test_by_address(self, name: LayoutName) -> None:
        """All bytes of a word have the word's entry."""
        with Arena(layout=name) as arena:
            block = arena.grow(MiB)
            bitmap, word = heap_bitmap(arena), arena.layout.word

            bitmap.set_at(block + 100 * word + word - 1, 3)

            assert bitmap.index(block + 100 * word) == 100
            assert bitmap[100] == bitmap.at(block + 100 * word) == 3
            assert bitmap.at(block + 101 * word) == bitmap.at(block + 99 * word) == 0

    @pytest.mark.parametrize("name", [*FOUR_BITS, *TWO_BITS])
    def test_bad_words_and_entries(self, name: LayoutName) -> None:
        """Words above arena_used and values that are too large raise RangeError."""
        with Arena(layout=name) as arena:
            block = arena.grow(MiB)
            bitmap, word = heap_bitmap(arena), arena.layout.word
            n = MiB // word

            for index in (-1, n, 2**64, -(2**70)):
                with pytest.raises(RangeError):
                    bitmap[index]
                with pytest.raises(RangeError):
                    bitmap[index] = 1
            for address in (block - 1, block + MiB, 0, -1, 2**64):
                with pytest.raises(RangeError):
                    bitmap.at(address)
                with pytest.raises(RangeError):
                    bitmap.set_at(address, 1)
                with pytest.raises(RangeError):
                    bitmap.index(address)
            for value in (-1, 1 << arena.layout.bitmap_bits, 2**70):
                with pytest.raises(RangeError):
                    bitmap[0] = value
            assert bitmap[0] == bitmap[n - 1] == 0

    @pytest.mark.parametrize("wrong", [1.0, "1", None, slice(0, 2)])
    def test_arguments_that_are_not_integers(self, wrong: Any) -> None:
        """Words, addresses and entries must be integers."""
        with Arena(layout=layouts.default_name(WORD)) as arena:
            arena.grow(MiB)
            bitmap = heap_bitmap(arena)

            with pytest.raises(TypeError):
                bitmap[wrong]
            with pytest.raises(TypeError):
                bitmap[wrong] = 1
            with pytest.raises(TypeError):
                bitmap[0] = wrong
            with pytest.raises(TypeError):
                bitmap.at(wrong)

    def test_it_grows_with_the_arena(self) -> None:
        """Words get entries when the arena grows over them, not before."""
        with Arena(layout=layouts.default_name(WORD)) as arena:
            bitmap = heap_bitmap(arena)
            before = len(bitmap)
            arena.grow(MiB)

            heap_bitmap(arena)[MiB // WORD - 1] = 5
            arena.grow(MiB)

            assert (before, len(bitmap)) == (0, 2 * MiB // WORD)
            assert bitmap[MiB // WORD - 1] == 5
            assert bitmap[MiB // WORD] == 0

    @needs_64_bits
    def test_each_arena_of_go_1_11_has_its_own(self) -> None:
        """Entries on both sides of a 64 MiB boundary are separate and writable."""
        with Arena(layout="go1.11/amd64") as arena:
            block = arena.grow(200 * MiB)
            bitmap, border = heap_bitmap(arena), 64 * MiB // 8

            for n in (1, 2, 3):
                bitmap[n * border - 1] = 1
                bitmap[n * border] = 2

            result = [bitmap[n * border + at] for n in (1, 2, 3) for at in (-2, -1, 0, 1)]
            assert result == [0, 1, 2, 0] * 3
            assert bitmap[0] == 0
            assert bitmap.at(block + 64 * MiB - 1) == 1
            assert bitmap.at(block + 64 * MiB) == 2
            bitmap[200 * MiB // 8 - 1] = 3
            with pytest.raises(RangeError):
                bitmap[200 * MiB // 8]

    def test_native_has_none(self) -> None:
        """The heap bitmap of a layout without one is None."""
        with Arena(MiB) as arena:
            assert arena.heap_bitmap is None


class TestPolicies:
    @pytest.mark.parametrize("name", layout_names())
    def test_of_every_mapping(self, name: LayoutName) -> None:
        """Name, fork and huge page policies apply to all memory of the arena's region."""
        with Arena(layout=name, name="heap", fork="wipe", huge_pages="never") as arena:
            arena.alloc(MiB)
            region = arena.region
            mapped = [
                mapping
                for piece in arena.maps()
                for mapping in witness.pieces(piece.start, piece.end - piece.start)
            ]

            assert arena.name == region.name == "heap"
            assert (region.fork, region.huge_pages) == ("wipe", "never")
            assert all({"wf", "dd", "nh"} <= mapping.flags for mapping in mapped)
            if capabilities().anon_vma_names:
                assert {mapping.name for mapping in mapped} == {"[anon:heap]"}

    def test_huge_pages_align_a_native_arena(self) -> None:
        """With huge_pages="prefer" the base is a multiple of the huge page."""
        size = thp_size()
        if size is None:
            pytest.skip("this kernel has no huge pages")
        with Arena(64 * MiB, huge_pages="prefer") as arena:
            assert arena.base % size == 0

    @pytest.mark.parametrize("name", layout_names())
    def test_wiped_in_a_child(self, name: LayoutName) -> None:
        """A child can allocate in a wiped arena; old blocks read zero or are not found."""
        with Arena(layout=name, fork="wipe") as arena:
            block = arena.alloc(MiB)
            fill(block, 7)

            def child() -> list[bool]:
                fresh = arena.alloc(MiB)
                fill(fresh, 9)
                old = block.freed or holds(block, 0)
                return [old, holds(fresh, 9), arena.block_at(fresh.address) == fresh]

            assert witness.in_child(child) == [True, True, True]
            assert holds(block, 7)

    @pytest.mark.parametrize(
        "wrong", [{"mode": "x"}, {"fork": "x"}, {"huge_pages": "x"}, {"name": ""}, {"name": "a[b"}]
    )
    @pytest.mark.parametrize("name", layout_names())
    def test_unknown_ones(self, name: LayoutName, wrong: dict[str, Any]) -> None:
        """An unknown policy or invalid name is refused, and nothing stays reserved."""
        before = witness.status("VmSize")
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Arena(layout=name, **wrong)
        assert witness.status("VmSize") < before + GiB


AFTERWARDS: dict[str, Callable[[Arena], object]] = {
    "grow": lambda arena: arena.grow(MiB),
    "maps": lambda arena: arena.maps(),
    "release": lambda arena: arena.release(),
    "with": lambda arena: arena.__enter__(),
    "view": lambda arena: arena.region.view(0, 1),
    "read an entry": lambda arena: heap_bitmap(arena)[0],
    "write an entry": lambda arena: heap_bitmap(arena).set_at(arena.placement.arena_start, 1),
    "count entries": lambda arena: len(heap_bitmap(arena)),
    "index an entry": lambda arena: heap_bitmap(arena).index(arena.placement.arena_start),
}


class TestRelease:
    def test_everything_is_given_back(self, any_arena: Arena) -> None:
        """After a release nothing of the arena is mapped."""
        any_arena.grow(100 * MiB)
        pieces = any_arena.maps()

        any_arena.release()

        for piece in pieces:
            left = live(piece.start, piece.end)
            assert all(perms == "rw-p" and end - start < MiB for start, end, perms in left)
        assert "released" in repr(any_arena)

    def test_metadata_elsewhere_is_given_back(self) -> None:
        """A release also unmaps separate metadata: VmSize returns to its former value."""
        if WORD != 8:
            pytest.skip("the layout lies above 4 GiB")
        result = in_child(
            """
            def use():
                with Arena(layout="go1.11/amd64") as arena:
                    arena.grow(200 * MiB)
                gc.collect()
                return status("VmSize")

            use(), use()
            print(json.dumps([use(), use()]))
            """
        )

        assert result[0] == result[1]

    @pytest.mark.parametrize("call", AFTERWARDS)
    def test_afterwards_everything_is_refused(self, call: str) -> None:
        """Every call on a released arena raises ReleasedError."""
        arena = Arena(layout=layouts.default_name(WORD))
        arena.grow(MiB)
        arena.release()

        with Arena(layout=layouts.default_name(WORD)) as other:
            other.grow(MiB)
            with pytest.raises(ReleasedError):
                AFTERWARDS[call](arena)

            assert other.in_use == MiB
            assert heap_bitmap(other)[0] == 0

    def test_a_context_ends_with_the_release(self) -> None:
        """Leaving the with block releases the arena; an earlier release inside is allowed."""
        with Arena() as arena:
            arena.grow(MiB)
        with Arena() as other:
            other.release()

        assert arena.region.released
        assert other.region.released

    def test_an_exception_passes_through(self) -> None:
        """An exception in the with block releases the arena and propagates."""

        def fail(inside: Arena) -> None:
            with inside:
                raise LookupError

        arena = Arena()
        with pytest.raises(LookupError):
            fail(arena)

        assert arena.region.released

    def test_no_release_under_a_live_view(self, any_arena: Arena) -> None:
        """A live view prevents the release of the arena until it is gone."""
        block = any_arena.grow(MiB)
        view = any_arena.region.view(block - any_arena.region.base, MiB)
        before = plain(any_arena)

        with pytest.raises(ViewError, match="1 live view"):
            any_arena.release()

        assert plain(any_arena) == before
        view[0] = 1
        assert any_arena.grow(MiB) == block + MiB
        del view
        gc.collect()
        any_arena.release()

    def test_repr(self) -> None:
        """The repr has the layout and the bytes in use."""
        with Arena(8 * MiB) as arena:
            arena.grow(MiB)

            assert "native" in repr(arena)
            assert "of 8 MiB: 1 MiB in use of 1 MiB taken so far" in repr(arena)
