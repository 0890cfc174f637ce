"""The accounts of an arena to which the kernel refuses memory, in an interpreter of its own."""

import functools
from typing import Any

import pytest

from helpers.arenas import in_child, layout_names
from pyreserve import MiB, layouts
from pyreserve._arena.arena import WORD

REFUSE = """
    import dataclasses
    name, which, wish = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def books():
        blocks = [[block.address, block.nbytes] for block in arena.blocks()]
        return [dataclasses.asdict(arena.memstats()), blocks, arena.region.reserved,
                arena.region.committed_runs(), repr(arena.placement), whole(arena)]

    def refusal(call):
        limit(which, 4 * MiB)
        try:
            call()
        except OutOfMemoryError as error:
            return [error.limit, error.strerror]
        finally:
            limit(which, None)

    with Arena(layout=name) as arena:
        arena.alloc(8 * MiB)
        used, kept = arena.alloc(20 * MiB), arena.alloc(MiB)
        for block in (used, kept):
            with block.view() as view:
                view[:] = b"k" * len(view)
        used.free()
        given = arena.trim()
        before = books()
        alone = [refusal(lambda: arena.alloc(wish)) for _ in range(3)]
        after = books()
        listed = [refusal(lambda: arena.alloc_many([8192, wish])) for _ in range(3)]
        last = books()
        with arena.alloc(wish, zero=True) as block:
            with block.view() as view:
                usable = view[0] == view[-1] == 0
                view[0] = view[-1] = 1
            del view
        with kept.view() as view:
            intact = view == b"k" * MiB
        del view
        print(json.dumps({"before": before, "after": after, "last": last, "given": given,
                          "alone": alone, "listed": listed, "usable": usable, "intact": intact}))
"""
IN_USE = 9 * MiB
HOLE = 20 * MiB
RESERVED = [name for name in ("native", layouts.default_name(WORD)) if name in layout_names()]
PROBED = [name for name in ("go1.4/amd64", "go1.11/amd64") if name in layout_names()]
# What was reserved at once does not count against RLIMIT_AS when it is committed.
GROWTHS = [(name, "DATA", 300 * MiB) for name in RESERVED + PROBED]
GROWTHS += [(name, "AS", 300 * MiB) for name in PROBED]
# Into the hole that was scavenged.
COMMITS = [(name, "DATA", HOLE - 2 * MiB) for name in RESERVED + PROBED]


@functools.cache
def refuse(name: str, which: str, wish: int) -> dict[str, Any]:
    """Make a refusal once for all tests that look at it."""
    found = in_child(REFUSE, name, which, str(wish))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("name", "which", "wish"), GROWTHS + COMMITS)
class TestRefusals:
    def test_nothing_changes(self, name: str, which: str, wish: int) -> None:
        """A block that is refused leaves all accounts, blocks and mappings as they were."""
        found = refuse(name, which, wish)

        assert found["given"] == found["before"][0]["heap_released"] == HOLE
        assert found["after"] == found["before"]

    def test_a_list_allocates_nothing(self, name: str, which: str, wish: int) -> None:
        """Where one block of a list is refused no block is allocated, and no counter moves."""
        found = refuse(name, which, wish)

        before, last = found["before"][0], found["last"][0]
        assert found["last"][1] == found["before"][1]
        for account in ("heap_inuse", "heap_alloc", "heap_objects", "mallocs", "frees"):
            assert last[account] == before[account]
        assert last["heap_released"] <= before["heap_released"]

    def test_the_limit_is_named(self, name: str, which: str, wish: int) -> None:
        """The error of a block and that of a list say which limit refused."""
        found = refuse(name, which, wish)

        for limit, text in (*found["alone"], *found["listed"]):
            assert (limit, f"RLIMIT_{which}" in text) == (f"RLIMIT_{which}", True), text

    def test_it_says_how_things_are(self, name: str, which: str, wish: int) -> None:
        """The error says what was asked for, what is in use and what is reserved."""
        found = refuse(name, which, wish)

        reserved = found["before"][2]
        for _, text in found["alone"]:
            assert f"cannot allocate {wish}-byte block" in text
            assert f"{IN_USE} in use" in text
            assert f"{reserved} reserved" in text

    def test_it_can_be_used_afterwards(self, name: str, which: str, wish: int) -> None:
        """The same block is to be had once there is memory, zero, and the others are intact."""
        found = refuse(name, which, wish)

        assert found["usable"]
        assert found["intact"]
