"""A series of numbers as a line of characters."""

from collections.abc import Collection
from itertools import islice

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.:-=+*#"  # for terminals without block characters


def sparkline(
    values: Collection[int], width: int, low: int, high: int, levels: str = BLOCKS
) -> str:
    """Draw the newest `width` of `values`, one character each, the newest last.

    The scale is linear: `low` is the first character of `levels`, `high` the last. Values outside
    are clamped. If `low` is not below `high`, every value is drawn as the first character.
    """
    top, span = len(levels) - 1, high - low
    drawn = []
    for value in islice(values, max(0, len(values) - max(0, width)), None):
        height = (2 * top * (value - low) + span) // (2 * span) if span > 0 else 0
        drawn.append(levels[min(top, max(0, height))])
    return "".join(drawn)
