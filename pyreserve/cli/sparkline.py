"""A series of numbers, drawn in a line of characters."""

from collections.abc import Collection
from itertools import islice

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.:-=+*#"  # for terminals that can't show the blocks


def sparkline(
    values: Collection[int], width: int, low: int, high: int, levels: str = BLOCKS
) -> str:
    """Draw the newest `width` of `values`, a character each, the newest last.

    The scale is linear, from `low`, the first of `levels`, to `high`, their last. What lies outside
    is drawn as the nearer end, and everything as the first where there is nothing between the two.
    """
    top, span = len(levels) - 1, high - low
    drawn = []
    for value in islice(values, max(0, len(values) - max(0, width)), None):
        height = (2 * top * (value - low) + span) // (2 * span) if span > 0 else 0
        drawn.append(levels[min(top, max(0, height))])
    return "".join(drawn)
