"""Regions: the effect of each verb on the process, as the kernel shows it."""

import ctypes
import errno
import gc
import mmap
import platform
import resource
from collections.abc import Callable
from typing import Literal

import pytest

import pyreserve
from helpers import witness
from helpers.subjects import wait_until
from pyreserve import (
    PAGE_SIZE,
    GiB,
    MiB,
    OutOfMemoryError,
    PyreserveError,
    RangeError,
    Region,
    ReleasedError,
    ViewError,
    VMError,
)

only_64_bit = witness.only_64_bit
charged_by_heuristic = pytest.mark.skipif(
    witness.vm_setting("overcommit_memory") != 0, reason="vm.overcommit_memory is not 0"
)
Mode = Literal["charge", "noreserve"]
modes = pytest.mark.parametrize("mode", ["charge", "noreserve"])
never_refused = pytest.mark.skipif(
    witness.vm_setting("overcommit_memory") == 2, reason="vm.overcommit_memory is 2"
)


def committed_runs_seen(region: Region) -> list[tuple[int, int]]:
    return witness.runs(region.base, region.size)


def assert_books_are_true(region: Region) -> None:
    """The counters and runs of a region agree with the kernel."""
    seen = committed_runs_seen(region)
    assert region.committed_runs() == seen
    assert region.committed == sum(length for _, length in seen)
    reserved = witness.nbytes(region.base, region.size, witness.RESERVED)
    assert region.reserved == region.size == region.committed + reserved


def a_free_place(size: int) -> int:
    """Return an address with `size` free bytes, in the middle of a larger gap."""
    wide = pyreserve.reserve(size + 64 * MiB)
    place = wide.base + 32 * MiB
    wide.release()
    return place


class TestReservation:
    def test_nothing_is_committed_at_first(self, any_mode: Region) -> None:
        """A fresh region owns its bytes; none is committed or accessible."""
        seen = witness.spans(any_mode.base, any_mode.size)

        assert any_mode.committed == 0
        assert any_mode.committed_runs() == []
        assert any_mode.reserved == any_mode.size == 64 * PAGE_SIZE
        assert not any_mode.released
        assert not any_mode.sealed
        assert {span.perms for span in seen} == {witness.RESERVED}
        assert_books_are_true(any_mode)

    def test_reserved_bytes_fault(self, region: Region) -> None:
        """Reading reserved bytes ends the process by SIGSEGV; reading committed ones does not."""
        region.commit(PAGE_SIZE, PAGE_SIZE)

        assert witness.faults(region.base)
        assert not witness.faults(region.base + PAGE_SIZE)
        assert not witness.faults(region.base + 2 * PAGE_SIZE - 1)
        assert witness.faults(region.base + 2 * PAGE_SIZE)

    @pytest.mark.parametrize("size", [1, PAGE_SIZE - 1, PAGE_SIZE])
    def test_sizes_are_rounded_up_to_whole_pages(self, size: int) -> None:
        """A size up to an OS page reserves one OS page with a page-aligned base."""
        with pyreserve.reserve(size) as region:
            assert region.size == PAGE_SIZE
            assert region.base % PAGE_SIZE == 0

    @only_64_bit
    def test_vmsize_grows_by_exactly_the_reservation(self) -> None:
        """Reserving 136 GiB adds exactly 136 GiB to VmSize and less than 1 MiB to RSS."""
        grown = witness.fresh_python(
            """
            import json, pyreserve
            from helpers import witness

            def measure():
                before = witness.status("VmSize"), witness.status("VmRSS")
                region = pyreserve.reserve(136 << 30)
                after = witness.status("VmSize"), witness.status("VmRSS")
                region.release()
                gone = witness.status("VmSize")
                return after[0] - before[0], after[1] - before[1], gone - before[0]

            for _ in range(5):  # the interpreter's own allocations settle first
                answer = measure()
            print(json.dumps(answer))
            """
        )

        vmsize, rss, left = grown
        assert vmsize == 136 * GiB
        assert rss < MiB
        assert left == 0

    @only_64_bit
    def test_64_tib_can_be_reserved(self) -> None:
        """2**46 bytes are reserved in one piece and released."""
        region = pyreserve.reserve(1 << 46)

        seen = witness.spans(region.base, region.size)
        base = region.base
        region.release()

        assert sum(span.end - span.start for span in seen) == 1 << 46
        assert not witness.is_mapped(base)

    @pytest.mark.parametrize("bits", [47, 56, 62, 63, 64, 70, 200])
    def test_more_than_there_are_addresses_is_refused(self, bits: int) -> None:
        """A size beyond the user address space is OutOfMemoryError with the name of the limit."""
        if bits < 56 and platform.machine() != "x86_64":
            pytest.skip("needs x86-64, whose user addresses end at 2**47")

        with pytest.raises(OutOfMemoryError) as caught:
            pyreserve.reserve(1 << bits)

        error = caught.value
        assert isinstance(error, OSError)
        assert isinstance(error, MemoryError)
        assert isinstance(error, PyreserveError)
        assert error.limit == "address space"
        assert error.errno == errno.ENOMEM
        assert error.errno_name == "ENOMEM"
        assert error.verb == "reserve"
        assert error.nbytes == 1 << bits
        assert error.address is None

    def test_with_releases(self) -> None:
        """Leaving a with block releases the addresses; an earlier release is allowed."""
        with pyreserve.reserve(PAGE_SIZE) as region:
            pass
        with pyreserve.reserve(PAGE_SIZE) as early:
            early.release()

        assert region.released
        assert early.released

    def test_repr_tells_the_state(self, region: Region) -> None:
        """The repr has address, size and committed bytes, or says that the region was released."""
        region.commit(0, PAGE_SIZE)
        region.commit(2 * PAGE_SIZE, PAGE_SIZE)

        alive = repr(region)
        base = region.base
        region.release()

        assert f"{base:#x}" in alive
        assert f"{pyreserve.format_size(2 * PAGE_SIZE)} committed in 2 pieces" in alive
        assert "released" in repr(region)


class TestCharge:
    """Other processes change Committed_AS, so each measurement is retried."""

    PIECE = GiB
    SLACK = 200 * MiB

    def assert_seen(self, measure: Callable[[], list[int]], expected: list[int]) -> None:
        def is_seen() -> bool:
            pairs = zip(measure(), expected, strict=True)
            return all(abs(actual - change) <= self.SLACK for actual, change in pairs)

        wait_until(is_seen, f"Committed_AS to change by {expected}")

    @only_64_bit
    def test_reserving_is_not_charged(self) -> None:
        """Reserving 136 GiB does not change Committed_AS."""

        def measure() -> list[int]:
            before = witness.meminfo("Committed_AS")
            with pyreserve.reserve(136 * GiB):
                return [witness.meminfo("Committed_AS") - before]

        self.assert_seen(measure, [0])

    def test_commit_charges_and_decommit_refunds(self) -> None:
        """A commit adds its bytes to Committed_AS, and a decommit subtracts them.

        Neither an untouched nor a touched piece stays charged after its decommit.
        """

        def measure() -> list[int]:
            with pyreserve.reserve(2 * self.PIECE) as region:
                before = witness.meminfo("Committed_AS")
                region.commit(0, self.PIECE)
                committed = witness.meminfo("Committed_AS")
                region.view(0, 8 * MiB)[:] = bytes(8 * MiB)
                region.decommit(0, self.PIECE)
                decommitted = witness.meminfo("Committed_AS")
            return [committed - before, decommitted - before]

        self.assert_seen(measure, [self.PIECE, 0])

    def test_a_decommit_after_every_page_was_touched_refunds(self) -> None:
        """A piece whose every page was written is refunded in full."""
        piece = 512 * MiB

        def measure() -> list[int]:
            with pyreserve.reserve(piece) as region:
                before = witness.meminfo("Committed_AS")
                region.commit(0, piece)
                region.populate(0, piece)
                committed = witness.meminfo("Committed_AS")
                region.decommit(0, piece)
                return [committed - before, witness.meminfo("Committed_AS") - before]

        self.assert_seen(measure, [piece, 0])

    def test_release_refunds(self) -> None:
        """A release subtracts the committed bytes of the region from Committed_AS."""

        def measure() -> list[int]:
            before = witness.meminfo("Committed_AS")
            region = pyreserve.reserve(self.PIECE)
            region.commit(0, self.PIECE)
            committed = witness.meminfo("Committed_AS")
            region.release()
            return [committed - before, witness.meminfo("Committed_AS") - before]

        self.assert_seen(measure, [self.PIECE, 0])

    @never_refused
    def test_noreserve_is_never_charged(self) -> None:
        """In mode noreserve a commit does not change Committed_AS."""

        def measure() -> list[int]:
            before = witness.meminfo("Committed_AS")
            with pyreserve.reserve(2 * self.PIECE, mode="noreserve") as region:
                region.commit(0, 2 * self.PIECE)
                return [witness.meminfo("Committed_AS") - before]

        self.assert_seen(measure, [0])

    @never_refused
    def test_noreserve_shows_in_the_flags(self) -> None:
        """Every mapping of a noreserve region has the flag nr; none of a charged one has it."""
        for mode, expected in (("noreserve", True), ("charge", False)):
            with pyreserve.reserve(16 * PAGE_SIZE, mode=mode) as region:  # type: ignore[arg-type]
                region.commit(0, 4 * PAGE_SIZE)
                region.commit(8 * PAGE_SIZE, 4 * PAGE_SIZE)
                region.decommit(PAGE_SIZE, PAGE_SIZE)
                seen = witness.pieces(region.base, region.size)

                assert region.mode == mode
                assert {"nr" in piece.flags for piece in seen} == {expected}


class TestCounter:
    def test_repeated_commits_count_once(self, any_mode: Region) -> None:
        """Overlapping and repeated commits count each byte once."""
        region, page = any_mode, PAGE_SIZE

        for offset, length, total in [
            (0, 4, 4),
            (0, 4, 4),
            (1, 2, 4),
            (2, 4, 6),
            (10, 2, 8),
            (8, 6, 12),
            (0, 64, 64),
            (5, 1, 64),
        ]:
            region.commit(offset * page, length * page)

            assert region.committed == total * page
            assert_books_are_true(region)

    def test_repeated_decommits_count_once(self, any_mode: Region) -> None:
        """Overlapping and repeated decommits subtract each byte once; reserved ones count 0."""
        region, page = any_mode, PAGE_SIZE
        region.commit(0, region.size)

        for offset, length, total in [
            (0, 4, 60),
            (0, 4, 60),
            (2, 4, 58),
            (30, 4, 54),
            (28, 8, 50),
            (63, 1, 49),
            (0, 64, 0),
            (0, 64, 0),
        ]:
            region.decommit(offset * page, length * page)

            assert region.committed == total * page
            assert_books_are_true(region)

    def test_runs_are_offset_and_length(self, any_mode: Region) -> None:
        """committed_runs lists (offset, length), lowest first, adjacent runs joined."""
        region, page = any_mode, PAGE_SIZE

        region.commit(20 * page, 4 * page)
        region.commit(2 * page, page)
        region.commit(3 * page, page)
        region.commit(24 * page, page)

        assert region.committed_runs() == [(2 * page, 2 * page), (20 * page, 5 * page)]
        assert_books_are_true(region)

    def test_is_committed_looks_at_every_byte(self, region: Region) -> None:
        """is_committed is true only if the whole range is committed, at any alignment."""
        page = PAGE_SIZE
        region.commit(page, 2 * page)

        yes = [(page, 2 * page), (page + 1, 1), (3 * page - 1, 1), (page + 7, page)]
        no = [
            (0, 1),
            (page - 1, 1),
            (page - 1, 2),
            (3 * page - 1, 2),
            (3 * page, 1),
            (0, 64 * page),
            (64 * page, 1),
            (page, 1 << 70),
            (1 << 70, 1),
        ]

        assert all(region.is_committed(*place) for place in yes)
        assert not any(region.is_committed(*place) for place in no)

    def test_counters_after_many_pieces(self, any_mode: Region) -> None:
        """The counters are exact after commits of every second, decommits of every third page."""
        region, page = any_mode, PAGE_SIZE

        for i in range(0, 64, 2):
            region.commit(i * page, page)
        for i in range(0, 64, 3):
            region.decommit(i * page, page)

        remaining = [i for i in range(0, 64, 2) if i % 3]
        assert region.committed_runs() == [(i * page, page) for i in remaining]
        assert_books_are_true(region)


class TestContents:
    def test_fresh_bytes_are_zero(self, any_mode: Region) -> None:
        """Newly committed bytes read zero."""
        any_mode.commit(0, any_mode.size)

        assert bytes(any_mode.view(0, any_mode.size)) == bytes(any_mode.size)

    def test_decommit_loses_the_contents(self, any_mode: Region) -> None:
        """Bytes decommitted and committed again read zero; their neighbours keep their contents."""
        region, page = any_mode, PAGE_SIZE
        region.commit(0, 4 * page)
        region.view(0, 4 * page)[:] = b"\xaa" * (4 * page)

        region.decommit(page, 2 * page)
        region.commit(page, 2 * page)

        full = b"\xaa" * page
        assert bytes(region.view(0, 4 * page)) == full + bytes(2 * page) + full

    def test_commit_over_committed_keeps_the_contents(self, any_mode: Region) -> None:
        """A commit that overlaps committed bytes keeps their contents."""
        region, page = any_mode, PAGE_SIZE
        region.commit(page, page)
        region.view(page, page)[:] = b"\xaa" * page

        region.commit(0, 3 * page)

        assert bytes(region.view(0, 3 * page)) == bytes(page) + b"\xaa" * page + bytes(page)

    def test_discard_zeroes_and_gives_memory_back(self, any_mode: Region) -> None:
        """Discarded bytes stay committed, read zero and use no memory; their neighbours stay."""
        region, page = any_mode, PAGE_SIZE
        region.commit(0, region.size)
        region.view(0, region.size)[:] = b"\xaa" * region.size

        region.discard(page, 62 * page)

        assert region.committed == region.size
        assert witness.total_kib(region.base, region.size, "Rss") * 1024 == 2 * page
        full = b"\xaa" * page
        assert bytes(region.view(0, region.size)) == full + bytes(62 * page) + full

    def test_lazy_discard_shows_old_or_zero(self, any_mode: Region) -> None:
        """After a lazy discard each page reads old contents or zero, and a written page is kept."""
        region, page = any_mode, PAGE_SIZE
        region.commit(0, region.size)
        view = region.view(0, region.size)
        view[:] = b"\xaa" * region.size

        region.discard(0, region.size, lazy=True)
        view[0:page] = b"\xbb" * page

        assert region.committed == region.size
        assert bytes(view[0:page]) == b"\xbb" * page
        for i in range(1, 64):
            assert bytes(view[i * page : (i + 1) * page]) in {b"\xaa" * page, bytes(page)}

    def test_discard_is_allowed_under_views(self, any_mode: Region) -> None:
        """Discarded bytes under a live view read zero through the view."""
        any_mode.commit(0, PAGE_SIZE)
        view = any_mode.view(0, PAGE_SIZE)
        view[:] = b"\xaa" * PAGE_SIZE

        any_mode.discard(0, PAGE_SIZE)

        assert bytes(view) == bytes(PAGE_SIZE)
        view[0] = 1
        assert view[0] == 1


class TestPopulate:
    def test_populated_bytes_are_resident(self, any_mode: Region) -> None:
        """Committed bytes use no memory until they are populated, then all of them do."""
        region = any_mode
        region.commit(0, region.size)
        before = witness.total_kib(region.base, region.size, "Rss")

        region.populate(0, 48 * PAGE_SIZE)

        assert before == 0
        assert witness.total_kib(region.base, region.size, "Rss") * 1024 == 48 * PAGE_SIZE

    def test_contents_stay(self, any_mode: Region) -> None:
        """Populating keeps contents."""
        any_mode.commit(0, any_mode.size)
        any_mode.view(PAGE_SIZE, 4)[:] = b"abcd"

        any_mode.populate(0, any_mode.size)

        assert bytes(any_mode.view(PAGE_SIZE, 5)) == b"abcd\0"

    @pytest.mark.parametrize("verb", ["populate", "discard"])
    def test_only_committed_bytes_will_do(self, region: Region, verb: str) -> None:
        """Populate and discard refuse a range with an uncommitted page."""
        region.commit(0, 2 * PAGE_SIZE)
        region.commit(3 * PAGE_SIZE, PAGE_SIZE)

        for offset, length in [(2, 1), (0, 3), (0, 4), (2, 2), (63, 1)]:
            with pytest.raises(RangeError, match="not all of it is committed"):
                getattr(region, verb)(offset * PAGE_SIZE, length * PAGE_SIZE)

        assert_books_are_true(region)


def churn(region: Region) -> None:
    """Commit and decommit so that mappings split and join; touch the bytes in between."""
    page, pages = PAGE_SIZE, region.size // PAGE_SIZE
    for _ in range(3):
        for first, end in [(0, pages), (1, 5), (pages // 2, pages // 2 + 2), (pages - 1, pages)]:
            region.commit(first * page, (end - first) * page)
            region.view(first * page, 1)[0] = 1
            region.decommit(first * page, (end - first) * page)
        region.commit(2 * page, 4 * page)
        region.commit(8 * page, 4 * page)
        region.decommit(3 * page, page)


class TestPolicies:
    @modes
    @pytest.mark.parametrize(
        ("policy", "expected", "absent"),
        [
            ({}, {"dd"}, {"wf", "dc", "hg", "nh"}),
            ({"dump": True}, set(), {"dd", "wf", "dc", "hg", "nh"}),
            ({"dump": False, "fork": "copy"}, {"dd"}, {"wf", "dc"}),
            ({"fork": "wipe"}, {"dd", "wf"}, {"dc"}),
            ({"huge_pages": "prefer"}, {"dd", "hg"}, {"nh"}),
            ({"huge_pages": "never"}, {"dd", "nh"}, {"hg"}),
            ({"fork": "wipe", "huge_pages": "never", "dump": True}, {"wf", "nh"}, {"dd", "dc"}),
            ({"guard": True}, {"dd"}, {"wf", "dc"}),
        ],
    )
    def test_every_mapping_has_the_policy_for_life(
        self, mode: str, policy: dict[str, object], expected: set[str], absent: set[str]
    ) -> None:
        """All bytes of a region have the flags, at first and after each commit and decommit."""
        region = pyreserve.reserve(64 * PAGE_SIZE, mode=mode, **policy)  # type: ignore[arg-type]

        fresh = witness.pieces(region.base, region.size)
        churn(region)
        used = witness.pieces(region.base, region.size)

        for piece in fresh + used:
            assert expected <= piece.flags
            assert not absent & piece.flags
        assert {piece.perms for piece in used} == {witness.RESERVED, witness.COMMITTED}
        assert region.fork == policy.get("fork", "copy")
        region.release()

    @pytest.mark.parametrize("policy", [{}, {"dump": True}, {"fork": "wipe"}, {"guard": True}])
    def test_cycles_do_not_add_mappings(self, any_mode: Region, policy: dict[str, object]) -> None:
        """A hundred cycles leave as many mappings as the first cycle."""
        mode = any_mode.mode
        region = pyreserve.reserve(64 * PAGE_SIZE, mode=mode, **policy)  # type: ignore[arg-type]

        def cycle() -> tuple[int, int]:
            region.commit(8 * PAGE_SIZE, 16 * PAGE_SIZE)
            region.view(8 * PAGE_SIZE, 16 * PAGE_SIZE)[:: PAGE_SIZE // 2] = bytes(32)
            committed = len(witness.spans(region.base, region.size))
            region.decommit(8 * PAGE_SIZE, 16 * PAGE_SIZE)
            return committed, len(witness.spans(region.base, region.size))

        counts = {cycle() for _ in range(100)}

        assert counts == {(3, 1)}
        region.release()

    def test_growing_step_by_step_is_two_mappings(self, any_mode: Region) -> None:
        """A region committed and touched page by page is one committed, one reserved mapping."""
        region = any_mode

        for i in range(60):
            region.commit(i * PAGE_SIZE, PAGE_SIZE)
            region.view(i * PAGE_SIZE, 1)[0] = 1

        assert len(witness.spans(region.base, region.size)) == 2

    def test_preferring_huge_pages_aligns_the_base(self) -> None:
        """With huge_pages="prefer" the base is aligned to 2 MiB unless `align` is given."""
        huge = pyreserve.reserve(PAGE_SIZE, huge_pages="prefer")
        small = pyreserve.reserve(PAGE_SIZE, huge_pages="prefer", align=PAGE_SIZE)

        assert huge.base % (2 * MiB) == 0
        assert small.base % PAGE_SIZE == 0
        huge.release()
        small.release()


class TestGuard:
    @modes
    def test_a_page_at_each_end_stays_inaccessible(self, mode: Mode) -> None:
        """With the whole region committed, the pages before and after it are still ---p."""
        region = pyreserve.reserve(16 * PAGE_SIZE, guard=True, mode=mode)

        region.commit(0, region.size)

        perms = witness.perms_by_page(region.base - PAGE_SIZE, 18 * PAGE_SIZE, PAGE_SIZE)
        assert region.size == 16 * PAGE_SIZE
        assert region.reserved == region.committed == region.size
        assert perms == [witness.RESERVED] + [witness.COMMITTED] * 16 + [witness.RESERVED]
        assert witness.faults(region.base - 1)
        assert witness.faults(region.base + region.size)
        region.release()

    def test_guards_are_released_with_the_region(self) -> None:
        """A release frees the region and both guards."""
        place = a_free_place(18 * PAGE_SIZE)
        region = pyreserve.reserve(16 * PAGE_SIZE, guard=True, at=place + PAGE_SIZE)
        mapped = witness.perms_by_page(place, 18 * PAGE_SIZE, PAGE_SIZE)

        region.release()

        assert mapped == [witness.RESERVED] * 18
        assert witness.perms_by_page(place, 18 * PAGE_SIZE, PAGE_SIZE) == [""] * 18

    def test_guards_count_as_occupied(self) -> None:
        """`at` is refused if a guard would replace an existing mapping."""
        place = a_free_place(18 * PAGE_SIZE)
        occupant = pyreserve.reserve(PAGE_SIZE, at=place)

        with pytest.raises(VMError) as caught:
            pyreserve.reserve(16 * PAGE_SIZE, guard=True, at=place + PAGE_SIZE)

        assert caught.value.errno == errno.EEXIST
        occupant.release()

    def test_alignment_is_the_base_not_the_guard(self) -> None:
        """With guard and align the first usable byte is aligned, not the guard."""
        with pyreserve.reserve(PAGE_SIZE, guard=True, align=MiB) as region:
            seen = witness.perms_by_page(region.base - PAGE_SIZE, 3 * PAGE_SIZE, PAGE_SIZE)

            assert region.base % MiB == 0
            assert seen == [witness.RESERVED] * 3


class TestPlace:
    @only_64_bit
    @pytest.mark.parametrize("shift", [0, 5, 12, 16, 21, 26, 30, 36, 42])
    def test_align(self, shift: int) -> None:
        """The base is a multiple of `align`, and no other addresses stay reserved."""
        wide = [pyreserve.reserve(3 * PAGE_SIZE, align=1 << shift) for _ in range(3)]

        for region in wide:
            assert region.base % (1 << shift) == 0
            assert witness.nbytes(region.base, region.size, witness.RESERVED) == region.size
        for region in wide:
            region.release()

    @only_64_bit
    def test_an_aligned_reservation_keeps_only_its_size(self) -> None:
        """An aligned reservation adds only its own size to VmSize."""
        grown = witness.fresh_python(
            """
            import json, pyreserve
            from helpers import witness

            def measure():
                before = witness.status("VmSize")
                region = pyreserve.reserve(pyreserve.PAGE_SIZE, align=1 << 34)
                after = witness.status("VmSize")
                region.release()
                return after - before, witness.status("VmSize") - before

            for _ in range(5):
                answer = measure()
            print(json.dumps(answer))
            """
        )

        assert grown == [PAGE_SIZE, 0]

    def test_at_is_exact(self) -> None:
        """A region reserved `at` a free address has that base."""
        place = a_free_place(PAGE_SIZE)

        with pyreserve.reserve(PAGE_SIZE, at=place) as region:
            assert region.base == place
            region.commit(0, PAGE_SIZE)
            assert_books_are_true(region)

    @pytest.mark.parametrize("shift", [-1, 0, 1])
    def test_at_never_replaces_a_mapping(self, shift: int) -> None:
        """`at` an occupied address fails with EEXIST, and the mapping there keeps its bytes."""
        place = a_free_place(8 * PAGE_SIZE)
        occupant = pyreserve.reserve(2 * PAGE_SIZE, at=place + 2 * PAGE_SIZE)
        occupant.commit(0, 2 * PAGE_SIZE)
        view = occupant.view(0, 2 * PAGE_SIZE)
        view[:] = b"\xaa" * (2 * PAGE_SIZE)
        before = witness.perms_by_page(place, 8 * PAGE_SIZE, PAGE_SIZE)

        with pytest.raises(OSError, match="EEXIST") as caught:
            pyreserve.reserve(2 * PAGE_SIZE, at=occupant.base + shift * PAGE_SIZE)

        assert caught.value.errno == errno.EEXIST
        assert isinstance(caught.value, VMError)
        assert not isinstance(caught.value, MemoryError)
        assert caught.value.address == occupant.base + shift * PAGE_SIZE
        assert witness.perms_by_page(place, 8 * PAGE_SIZE, PAGE_SIZE) == before
        assert bytes(view) == b"\xaa" * (2 * PAGE_SIZE)

    def test_at_over_a_foreign_mapping(self) -> None:
        """Also if the mapping there is not pyreserve's."""
        with mmap.mmap(-1, 4 * PAGE_SIZE) as foreign:
            foreign[:4] = b"mine"
            address = ctypes.addressof(ctypes.c_char.from_buffer(foreign))
            gc.collect()

            with pytest.raises(VMError) as caught:
                pyreserve.reserve(PAGE_SIZE, at=address + PAGE_SIZE)

            assert caught.value.errno == errno.EEXIST
            assert foreign[:4] == b"mine"

    def test_hint_is_taken_if_free(self) -> None:
        """A free address given as hint is the base of the region."""
        place = a_free_place(PAGE_SIZE)

        with pyreserve.reserve(PAGE_SIZE, hint=place) as region:
            assert region.base == place

    def test_hint_that_is_occupied_is_not_insisted_on(self, region: Region) -> None:
        """With an occupied hint the region is reserved elsewhere."""
        with pyreserve.reserve(PAGE_SIZE, hint=region.base) as other:
            assert not region.base <= other.base < region.base + region.size

        assert_books_are_true(region)

    def test_hint_and_align_go_together(self) -> None:
        """The alignment takes precedence over an unaligned hint."""
        place = a_free_place(4 * MiB) & -(2 * MiB)

        with pyreserve.reserve(PAGE_SIZE, hint=place + PAGE_SIZE, align=2 * MiB) as region:
            assert region.base % (2 * MiB) == 0


def names_are_supported() -> bool:
    """Return whether the kernel names an anonymous mapping (prctl PR_SET_VMA_ANON_NAME)."""
    with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        address = ctypes.addressof(ctypes.c_char.from_buffer(page))
        arguments = (ctypes.c_ulong(address), ctypes.c_ulong(PAGE_SIZE), b"x")
        err = ctypes.CDLL(None).prctl(0x53564D41, ctypes.c_ulong(0), *arguments)
        gc.collect()
    return bool(err == 0)


class TestName:
    @modes
    def test_the_name_shows_in_the_maps(self, mode: Mode) -> None:
        """If the kernel supports names, every mapping of the region has it for life; else none."""
        region = pyreserve.reserve(64 * PAGE_SIZE, name="the arena", mode=mode)
        churn(region)

        seen = {span.name for span in witness.spans(region.base, region.size)}

        assert region.name == "the arena"
        assert "'the arena'" in repr(region)
        assert seen == ({"[anon:the arena]"} if names_are_supported() else {""})
        region.release()

    def test_no_name(self, region: Region) -> None:
        """The name of a region reserved without one is None."""
        assert region.name is None

    def test_the_longest_name(self) -> None:
        """A name may have 79 characters."""
        with pyreserve.reserve(PAGE_SIZE, name="n" * 79) as region:
            assert region.name == "n" * 79


class TestSeal:
    """A seal lasts as long as the process, so each test runs in a child."""

    @staticmethod
    def sealed() -> Region | None:
        """Return a sealed region, or None if the kernel has no mseal."""
        try:
            return pyreserve.reserve(8 * PAGE_SIZE, seal=True, guard=True)
        except VMError as refused:
            why = refused
        assert why.errno == errno.ENOSYS
        assert why.verb == "seal"
        return None

    def test_sealed_is_committed(self) -> None:
        """Sealing commits the whole region."""

        def child() -> None:
            region = self.sealed()
            if region is not None:
                assert region.sealed
                assert region.committed == region.size
                assert ", sealed" in repr(region)
                assert_books_are_true(region)

        witness.in_child(child)

    def test_nothing_can_be_taken_from_it(self) -> None:
        """Decommit, release and munmap of a sealed region fail with EPERM."""

        def child() -> None:
            region = self.sealed()
            if region is None:
                return
            region.view(0, 4)[:] = b"kept"

            with pytest.raises(VMError) as decommitting:
                region.decommit(0, PAGE_SIZE)
            with pytest.raises(VMError) as releasing:
                region.release()
            assert decommitting.value.errno == releasing.value.errno == errno.EPERM
            libc = ctypes.CDLL(None, use_errno=True)
            for place in (region.base - PAGE_SIZE, region.base, region.base + region.size):
                address, length = ctypes.c_void_p(place), ctypes.c_size_t(PAGE_SIZE)
                assert libc.munmap(address, length) == -1
                assert ctypes.get_errno() == errno.EPERM

            assert not region.released
            assert bytes(region.view(0, 4)) == b"kept"
            assert_books_are_true(region)

        witness.in_child(child)

    def test_it_can_be_used_and_discarded(self) -> None:
        """A sealed region can be written, populated, discarded and committed again."""

        def child() -> None:
            region = self.sealed()
            if region is None:
                return

            region.commit(0, region.size)
            region.populate(0, region.size)
            region.view(0, 4)[:] = b"gone"
            region.discard(0, region.size)

            assert bytes(region.view(0, 4)) == bytes(4)

        witness.in_child(child)

    def test_dropping_it_keeps_it_mapped(self) -> None:
        """A dropped sealed region stays mapped, and nothing crashes."""

        def child() -> None:
            region = self.sealed()
            if region is None:
                return
            base = region.base
            region = None

            gc.collect()

            assert witness.is_mapped(base)

        witness.in_child(child)


@only_64_bit
class TestLifetime:
    # So large that no mapping made later extends down to its base.
    SIZE = 4 * GiB

    def test_a_region_made_without_reserve(self) -> None:
        """Only `reserve` makes regions; calling Region is a TypeError, without a second error."""
        with pytest.raises(TypeError):
            Region()  # type: ignore[call-arg]
        gc.collect()  # pytest would report an exception in __del__

    def test_a_dropped_region_is_unmapped(self) -> None:
        """A garbage region without views is unmapped."""
        region: Region | None = pyreserve.reserve(self.SIZE)
        assert region is not None
        base = region.base
        before = witness.is_mapped(base)

        region = None
        gc.collect()

        assert before
        assert not witness.is_mapped(base)

    def test_a_view_outlives_its_region(self) -> None:
        """A garbage region stays mapped and usable until its last view is gone."""
        region: Region | None = pyreserve.reserve(self.SIZE)
        assert region is not None
        base = region.base
        region.commit(0, 2 * PAGE_SIZE)
        first, second = region.view(0, 4), region.view(PAGE_SIZE, 4)

        region = None
        gc.collect()
        first[:] = b"abcd"
        with_two = bytes(first)
        del first
        gc.collect()
        second[:] = b"efgh"
        with_one = bytes(second)
        mapped_with_one = witness.is_mapped(base)
        del second
        gc.collect()

        assert (with_two, with_one) == (b"abcd", b"efgh")
        assert mapped_with_one
        assert not witness.is_mapped(base)

    def test_release_unmaps_at_once(self) -> None:
        """A release frees the addresses even if the object is still referenced."""
        region = pyreserve.reserve(self.SIZE)
        base = region.base
        region.commit(0, PAGE_SIZE)

        region.release()

        assert region.released
        assert not witness.is_mapped(base)

    def test_a_dead_view_does_not_hold(self, region: Region) -> None:
        """After a view and its derived objects are gone, the bytes can be decommitted."""
        region.commit(0, region.size)
        view = region.view(0, PAGE_SIZE)
        piece = view[5:7]
        del view
        with pytest.raises(ViewError):
            region.decommit(0, PAGE_SIZE)

        piece.release()
        del piece
        region.decommit(0, PAGE_SIZE)
        region.release()

        assert region.released


class TestRefusals:
    """Each limit is reached in a child, and the error names it."""

    @staticmethod
    def lower(which: int, limit: int) -> None:
        resource.setrlimit(which, (limit, resource.getrlimit(which)[1]))

    def test_rlimit_as_refuses_a_reservation(self) -> None:
        """A reservation beyond RLIMIT_AS is refused with its name; the process works on."""

        def child() -> None:
            self.lower(resource.RLIMIT_AS, witness.status("VmSize") + 512 * MiB)

            with pytest.raises(OutOfMemoryError, match="RLIMIT_AS") as caught:
                pyreserve.reserve(GiB)

            assert caught.value.limit == "RLIMIT_AS"
            assert caught.value.verb == "reserve"
            assert caught.value.nbytes == GiB
            assert caught.value.errno == errno.ENOMEM
            with pyreserve.reserve(256 * MiB) as region:
                region.commit(0, PAGE_SIZE)
                assert_books_are_true(region)

        witness.in_child(child)

    def test_rlimit_data_refuses_a_commit(self) -> None:
        """A commit beyond RLIMIT_DATA is refused with its name and changes nothing."""

        def child() -> None:
            region = pyreserve.reserve(GiB)
            region.commit(0, PAGE_SIZE)
            region.view(0, 4)[:] = b"kept"
            self.lower(resource.RLIMIT_DATA, witness.status("VmData") + 128 * MiB)

            with pytest.raises(OutOfMemoryError, match="RLIMIT_DATA") as caught:
                region.commit(0, 512 * MiB)

            assert caught.value.limit == "RLIMIT_DATA"
            assert caught.value.verb == "commit"
            assert caught.value.nbytes == 512 * MiB
            assert caught.value.address == region.base
            assert region.committed == PAGE_SIZE
            assert bytes(region.view(0, 4)) == b"kept"
            assert_books_are_true(region)
            region.commit(0, 2 * PAGE_SIZE)
            assert_books_are_true(region)

        witness.in_child(child)

    def test_a_commit_refused_between_committed_pieces(self) -> None:
        """A commit over many gaps that is refused half way leaves every gap reserved."""

        def child() -> None:
            step = 32 * MiB
            region = pyreserve.reserve(GiB)
            for offset in range(0, GiB, step):
                region.commit(offset, PAGE_SIZE)
            before = region.committed_runs()
            self.lower(resource.RLIMIT_DATA, witness.status("VmData") + 128 * MiB)
            data = witness.status("VmData")

            with pytest.raises(OutOfMemoryError) as caught:
                region.commit(0, GiB)

            assert caught.value.limit == "RLIMIT_DATA"
            assert region.committed_runs() == before
            assert_books_are_true(region)
            assert abs(witness.status("VmData") - data) < step

        witness.in_child(child)

    @charged_by_heuristic
    @only_64_bit
    def test_obvious_overcommit_is_refused(self) -> None:
        """In mode 0 a commit of more than memory and swap is refused with "overcommit" as limit."""
        size = witness.meminfo("MemTotal") + witness.meminfo("SwapTotal") + GiB
        region = pyreserve.reserve(size)

        with pytest.raises(OutOfMemoryError, match="overcommit") as caught:
            region.commit(0, region.size)

        assert caught.value.limit == "overcommit"
        assert caught.value.errno == errno.ENOMEM
        assert region.committed == 0
        assert_books_are_true(region)
        region.commit(0, PAGE_SIZE)
        assert_books_are_true(region)
        region.release()

    @charged_by_heuristic
    @only_64_bit
    def test_noreserve_is_not_refused(self) -> None:
        """In mode noreserve the same commit succeeds."""
        size = witness.meminfo("MemTotal") + witness.meminfo("SwapTotal") + GiB

        with pyreserve.reserve(size, mode="noreserve") as region:
            region.commit(0, region.size)

            assert region.committed == region.size
            assert_books_are_true(region)


@pytest.mark.skipif(
    witness.vm_setting("max_map_count") > 140_000, reason="vm.max_map_count is too high to reach"
)
@pytest.mark.heavy
class TestMapCount:
    PIECES = 70_000

    @staticmethod
    def spare() -> Region:
        """Mappings released before the check: the witness needs a few entries of the map table."""
        region = pyreserve.reserve(64 * PAGE_SIZE)
        for i in range(0, 64, 2):
            region.commit(i * PAGE_SIZE, PAGE_SIZE)
        return region

    def commit_alternately(self, region: Region) -> VMError:
        """Commit every second page until a commit is refused."""
        with pytest.raises(VMError) as refused:  # noqa: PT012
            for i in range(self.PIECES):
                region.commit(2 * i * PAGE_SIZE, PAGE_SIZE)
        assert refused.value.address == region.base + 2 * i * PAGE_SIZE
        assert region.committed == i * PAGE_SIZE
        return refused.value

    def decommit_alternately(self, region: Region) -> VMError:
        """Decommit every second page of a committed region until a decommit is refused."""
        with pytest.raises(VMError) as refused:  # noqa: PT012
            for i in range(self.PIECES):
                region.decommit((2 * i + 1) * PAGE_SIZE, PAGE_SIZE)
        assert refused.value.address == region.base + (2 * i + 1) * PAGE_SIZE
        assert region.committed == region.size - i * PAGE_SIZE
        return refused.value

    @modes
    def test_commits_that_fill_the_map_table(self, mode: Mode) -> None:
        """Alternate commits are refused at max_map_count; nothing is lost, and release works."""

        def child() -> None:
            spare = self.spare()
            region = pyreserve.reserve(2 * self.PIECES * PAGE_SIZE, mode=mode)
            base, size = region.base, region.size
            region.commit(0, PAGE_SIZE)
            region.view(0, 4)[:] = b"kept"

            refused = self.commit_alternately(region)

            spare.release()
            assert isinstance(refused, OutOfMemoryError)
            assert refused.errno == errno.ENOMEM
            assert refused.limit == "max_map_count"
            assert refused.verb == "commit"
            assert_books_are_true(region)
            assert bytes(region.view(0, 4)) == b"kept"
            region.release()
            assert witness.nbytes(base, size) == 0
            with pyreserve.reserve(4 * PAGE_SIZE) as another:
                another.commit(PAGE_SIZE, PAGE_SIZE)
                assert_books_are_true(another)

        witness.in_child(child)

    @modes
    def test_holes_that_fill_the_map_table(self, mode: Mode) -> None:
        """Alternate decommits of a committed region are refused at max_map_count, too."""

        def child() -> None:
            spare = self.spare()
            region = pyreserve.reserve(2 * self.PIECES * PAGE_SIZE, mode=mode)
            region.commit(0, region.size)
            last = region.size - PAGE_SIZE
            region.view(last, 4)[:] = b"kept"

            refused = self.decommit_alternately(region)

            spare.release()
            assert refused.limit == "max_map_count"
            assert refused.verb == "decommit"
            assert_books_are_true(region)
            assert bytes(region.view(last, 4)) == b"kept"
            region.decommit(0, region.size)
            assert region.committed == 0
            assert_books_are_true(region)

        witness.in_child(child)

    @modes
    def test_a_region_is_released_with_a_full_map_table(self, mode: Mode) -> None:
        """A release at the limit needs no mapping and frees them all."""

        def child() -> None:
            region = pyreserve.reserve(2 * self.PIECES * PAGE_SIZE, mode=mode)
            region.commit(0, region.size)
            base, size = region.base, region.size
            self.decommit_alternately(region)

            region.release()

            assert region.released
            assert witness.nbytes(base, size) == 0

        witness.in_child(child)

    @modes
    def test_a_decommit_that_joins_works_with_a_full_map_table(self, mode: Mode) -> None:
        """A decommit of the whole region at the limit splits no mapping and succeeds."""

        def child() -> None:
            region = pyreserve.reserve(2 * self.PIECES * PAGE_SIZE, mode=mode)
            region.commit(0, region.size)
            self.decommit_alternately(region)

            region.decommit(0, region.size)

            assert region.committed == 0
            assert_books_are_true(region)

        witness.in_child(child)

    @modes
    def test_a_commit_that_joins_works_with_a_full_map_table(self, mode: Mode) -> None:
        """A commit of the whole region at the limit joins its mappings and succeeds."""

        def child() -> None:
            region = pyreserve.reserve(2 * self.PIECES * PAGE_SIZE, mode=mode)
            self.commit_alternately(region)

            region.commit(0, region.size)

            assert region.committed_runs() == [(0, region.size)]
            assert_books_are_true(region)

        witness.in_child(child)


class TestLockedMemory:
    """Memory locked by mlock: MADV_DONTNEED refuses it, MADV_DONTNEED_LOCKED does not."""

    @staticmethod
    def locked(mode: Mode) -> Region:
        """Return a committed region of 4 pages with contents; its second page is locked."""
        region = pyreserve.reserve(4 * PAGE_SIZE, mode=mode)
        region.commit(0, region.size)
        region.view(0, region.size)[:] = b"\xaa" * region.size
        address, length = ctypes.c_void_p(region.base + PAGE_SIZE), ctypes.c_size_t(PAGE_SIZE)
        if ctypes.CDLL(None).mlock(address, length) != 0:
            pytest.skip("mlock is not permitted here")
        return region

    @modes
    @pytest.mark.parametrize("lazy", [False, True])
    @pytest.mark.parametrize(("first", "pages"), [(0, 4), (1, 1), (0, 2), (1, 3)])
    def test_discard_drops_it(self, mode: Mode, lazy: bool, first: int, pages: int) -> None:
        """Discarded locked bytes read zero; before Linux 5.18 the discard fails with EINVAL."""
        region = self.locked(mode)
        whole = region.view(0, region.size)

        try:
            region.discard(first * PAGE_SIZE, pages * PAGE_SIZE, lazy=lazy)
        except VMError as refused:
            expected, error = b"\xaa" * PAGE_SIZE, refused.errno
        else:
            expected, error = bytes(PAGE_SIZE), errno.EINVAL

        assert error == errno.EINVAL
        assert bytes(whole[PAGE_SIZE : 2 * PAGE_SIZE]) == expected
        assert region.committed == region.size
        assert_books_are_true(region)
        whole.release()
        region.release()

    @modes
    @pytest.mark.parametrize(("first", "pages"), [(0, 4), (1, 1), (0, 2), (1, 3)])
    def test_decommit_is_granted(self, mode: Mode, first: int, pages: int) -> None:
        """Locked bytes can be decommitted, and read zero when committed again."""

        def child() -> None:
            region = self.locked(mode)

            region.decommit(first * PAGE_SIZE, pages * PAGE_SIZE)

            assert region.committed == (4 - pages) * PAGE_SIZE
            assert_books_are_true(region)
            region.commit(0, region.size)
            assert bytes(region.view(PAGE_SIZE, PAGE_SIZE)) == bytes(PAGE_SIZE)

        self.locked(mode).release()
        witness.in_child(child)

    @modes
    def test_release_is_granted(self, mode: Mode) -> None:
        """A region with locked bytes can be released."""
        region = self.locked(mode)

        region.release()

        assert region.released


class TestErrors:
    @pytest.mark.parametrize(
        ("error", "builtin"),
        [
            (VMError, OSError),
            (OutOfMemoryError, OSError),
            (OutOfMemoryError, MemoryError),
            (RangeError, ValueError),
            (ReleasedError, ValueError),
            (ViewError, BufferError),
        ],
    )
    def test_each_is_a_builtin_too(
        self, error: type[PyreserveError], builtin: type[Exception]
    ) -> None:
        """Each error is a PyreserveError and also the builtin that a caller would catch."""
        assert issubclass(error, PyreserveError)
        assert issubclass(error, builtin)

    def test_a_view_error_names_the_range_and_the_views(self, region: Region) -> None:
        """A ViewError has the refused range and the number of live views."""
        region.commit(0, region.size)
        views = [region.view(i * PAGE_SIZE, 16) for i in range(5)]

        with pytest.raises(ViewError) as caught:
            region.decommit(0, 3 * PAGE_SIZE)

        message = str(caught.value)
        assert "3 live views" in message
        assert f"[0x0, {3 * PAGE_SIZE:#x})" in message
        assert f"[{PAGE_SIZE:#x}, {PAGE_SIZE + 16:#x})" in message
        assert len(views) == 5
