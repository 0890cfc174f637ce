"""How far to commit ahead: plans for objects that commit a region from its base upward.

Memory that is committed ahead takes no pages until it is touched. A huge page is used only if the
whole of it was committed at its first touch, so plans end on multiples of the huge page.
"""

from functools import cache
from typing import Protocol

from pyreserve._region.policies import Fork, HugePages, Mode
from pyreserve._region.region import Region
from pyreserve._region.reserve import reserve, reserve_below
from pyreserve._system.limits import PAGE_SIZE
from pyreserve._system.machine import thp_size
from pyreserve.errors import RangeError
from pyreserve.units import KiB, MiB, as_bytes, round_up

SMALL = max(64 * KiB, PAGE_SIZE)
"""Bytes of the first commit, in small pages; many objects never need more."""

# Beyond this size, such as 512 MiB with OS pages of 64 KiB, a huge page wastes more than it saves.
_MAX_HUGE_PAGE = 32 * MiB
_LEAST_AHEAD, _MOST_AHEAD = 2 * MiB, 64 * MiB


def as_step(step: int | str) -> int:
    """Check a commit step and return it in bytes.

    Args:
        step: bytes, or a size such as ``"2MiB"``; a positive multiple of the OS page.

    Raises:
        TypeError: `step` is neither an integer nor a string.
        RangeError: `step` is not a positive multiple of the OS page.
        ValueError: the string is not a size.
    """
    nbytes = as_bytes(step)
    if nbytes <= 0 or nbytes % PAGE_SIZE:
        msg = f"step must be a positive multiple of the OS page ({PAGE_SIZE}), got {nbytes}"
        raise RangeError(msg)
    return nbytes


class Plan(Protocol):
    """Decides how far to commit. Offsets are bytes from the base of the region."""

    def end(self, committed: int, need: int) -> int:
        """Return the offset to commit up to, at least `need`: whole OS pages.

        `need`, whole OS pages, is above `committed`, the end of what is committed. The result may
        exceed the region.
        """
        ...


class Steps:
    """Steps of equal size: each commit ends at an address that is a multiple of the step.

    With `small_first` the first commit is `SMALL` bytes, too short for a huge page.
    """

    __slots__ = ("_base", "_first", "_step")

    def __init__(self, base: int, step: int, *, small_first: bool) -> None:
        self._base, self._step = base, step
        self._first = SMALL if small_first and step > SMALL else 0

    def end(self, committed: int, need: int) -> int:
        """See `Plan`."""
        if not committed and need <= self._first:
            return self._first
        return round_up(self._base + need, self._step) - self._base


class Growth:
    """Small commits at first, then large steps that end at boundaries of huge pages.

    The base lies `SMALL` bytes below a multiple of `huge_page` bytes. Up to the end of the first
    huge page, commits double, so that its memory is small pages. Later commits reach 12.5 % of the
    committed bytes further, at least 2 MiB and at most 64 MiB.
    """

    __slots__ = ("_huge_page",)

    def __init__(self, huge_page: int) -> None:
        self._huge_page = huge_page

    def end(self, committed: int, need: int) -> int:
        """See `Plan`."""
        first = SMALL + self._huge_page
        if need <= first:
            return min(SMALL << ((need - 1) // SMALL).bit_length(), first)
        ahead = min(max(committed // 8, _LEAST_AHEAD), _MOST_AHEAD)
        return SMALL + round_up(max(need, committed + ahead) - SMALL, self._huge_page)


def reserve_to_grow(
    size: int,
    *,
    step: int | None,
    mode: Mode,
    fork: Fork,
    huge_pages: HugePages | None,
    name: str | None,
) -> Region:
    """Reserve a region of `size` bytes for `growth_plan` with the same `step`.

    `step` is as returned by `as_step`; None: the plan is `Growth`. `huge_pages` None is the
    system's setting with a step, else the best for this machine.

    Raises:
        TypeError, ValueError, OutOfMemoryError, VMError: as for `reserve`.
    """
    if step is None:
        if huge_pages is None:
            # Too small for a huge page above the first SMALL bytes.
            small = size < SMALL + _huge_page_size("default")
            huge_pages = "default" if small else _best_huge_pages()
        if huge_pages == "prefer":
            huge_page = _huge_page_size(huge_pages)
            return reserve_below(
                huge_page, SMALL, size, mode=mode, fork=fork, huge_pages=huge_pages, name=name
            )
        align = None
    else:
        huge_pages = "default" if huge_pages is None else huge_pages
        # Align the base to the step, or to a power of two that holds a smaller capacity. With
        # huge_pages="prefer", `reserve` aligns.
        fits = 1 << max(size - 1, 0).bit_length()
        align = None if huge_pages == "prefer" else min(step & -step, fits)
    return reserve(size, align=align, mode=mode, fork=fork, huge_pages=huge_pages, name=name)


def growth_plan(region: Region, step: int | None) -> Plan:
    """Return the plan for a region of `reserve_to_grow`."""
    if step is None:
        return _growth(_huge_page_size(region.huge_pages))
    return Steps(region.base, step, small_first=region.huge_pages != "prefer")


@cache
def _growth(huge_page: int) -> Growth:
    return Growth(huge_page)  # it has no state, so all regions can share it


@cache
def _huge_page_size(huge_pages: HugePages) -> int:
    """Return the bytes of a huge page; 2 MiB if there is none, or it is too large to be used."""
    size = thp_size() or 2 * MiB
    return size if huge_pages == "prefer" or size <= _MAX_HUGE_PAGE else 2 * MiB


@cache
def _best_huge_pages() -> HugePages:
    """Return the policy of huge pages that suits growing containers on this machine."""
    size = thp_size()
    if size is None:
        return "default"
    return "prefer" if size <= _MAX_HUGE_PAGE else "never"
