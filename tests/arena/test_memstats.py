"""The memory statistics of an arena that is refused memory, in a fresh interpreter."""

import functools
from typing import Any

import pytest

from helpers.arenas import in_child, layout_names
from pyreserve import MiB, layouts
from pyreserve.units import WORD

REFUSE = """
    name, resource_name, size = sys.argv[1], sys.argv[2], int(sys.argv[3])

    def books():
        blocks = [[block.address, block.nbytes] for block in arena.blocks()]
        return [arena.memstats()._asdict(), blocks, arena.region.reserved,
                arena.region.committed_runs(), repr(arena.placement), whole(arena)]

    def refusal(call):
        limit(resource_name, 4 * MiB)
        try:
            call()
        except OutOfMemoryError as error:
            return [error.limit, error.strerror]
        finally:
            limit(resource_name, None)

    with Arena(layout=name) as arena:
        arena.alloc(8 * MiB)
        used, kept = arena.alloc(20 * MiB), arena.alloc(MiB)
        for block in (used, kept):
            with block.view() as view:
                view[:] = b"k" * len(view)
        used.free()
        given = arena.trim()
        before = books()
        alone = [refusal(lambda: arena.alloc(size)) for _ in range(3)]
        after = books()
        listed = [refusal(lambda: arena.alloc_many([8192, size])) for _ in range(3)]
        last = books()
        with arena.alloc(size, zero=True) as block:
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
# A commit of addresses reserved at once does not count against RLIMIT_AS.
GROWTHS = [(name, "DATA", 300 * MiB) for name in RESERVED + PROBED]
GROWTHS += [(name, "AS", 300 * MiB) for name in PROBED]
# These blocks fit into the run of pages that was given back.
COMMITS = [(name, "DATA", HOLE - 2 * MiB) for name in RESERVED + PROBED]


@functools.cache
def refuse(name: str, resource: str, size: int) -> dict[str, Any]:
    """Run a refusal once for all tests that need its result."""
    result = in_child(REFUSE, name, resource, str(size))
    assert isinstance(result, dict)
    return result


@pytest.mark.parametrize(("name", "resource", "size"), GROWTHS + COMMITS)
class TestRefusals:
    def test_nothing_changes(self, name: str, resource: str, size: int) -> None:
        """A refused block leaves statistics, blocks and mappings as they were."""
        result = refuse(name, resource, size)

        assert result["given"] == result["before"][0]["heap_released"] == HOLE
        assert result["after"] == result["before"]

    def test_a_list_allocates_nothing(self, name: str, resource: str, size: int) -> None:
        """If a block of a list is refused, no block is allocated and the counters stay."""
        result = refuse(name, resource, size)

        before, last = result["before"][0], result["last"][0]
        assert result["last"][1] == result["before"][1]
        for account in ("heap_inuse", "heap_alloc", "heap_objects", "mallocs", "frees"):
            assert last[account] == before[account]
        assert last["heap_released"] <= before["heap_released"]

    def test_the_limit_is_named(self, name: str, resource: str, size: int) -> None:
        """The errors of alloc and alloc_many name the limit that refused."""
        result = refuse(name, resource, size)

        for limit, text in (*result["alone"], *result["listed"]):
            assert (limit, f"RLIMIT_{resource}" in text) == (f"RLIMIT_{resource}", True), text

    def test_it_says_how_things_are(self, name: str, resource: str, size: int) -> None:
        """The error has the bytes requested, in use and reserved."""
        result = refuse(name, resource, size)

        reserved = result["before"][2]
        for _, text in result["alone"]:
            assert f"cannot allocate {size}-byte block" in text
            assert f"{IN_USE} in use" in text
            assert f"{reserved} reserved" in text

    def test_it_can_be_used_afterwards(self, name: str, resource: str, size: int) -> None:
        """Once there is memory, the same block is allocated and zero; the others are intact."""
        result = refuse(name, resource, size)

        assert result["usable"]
        assert result["intact"]
