"""Sizes in bytes and times: constants, and reading and writing them as people do."""

import math
import re
from fractions import Fraction
from operator import index as _index

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40


def round_up(n: int, to: int) -> int:
    """Round `n` up to a multiple of `to`."""
    return -(-n // to) * to


_UNITS = {
    "": 1,
    "b": 1,
    **{
        spelling: 1 << (10 * power)
        for power, letter in enumerate("kmgtpe", start=1)
        for spelling in (letter, f"{letter}ib")
    },
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtpe", start=1)},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([a-z]*)", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Read a size such as ``"136GiB"``, ``"64K"``, ``"1.5 MiB"`` or ``"4096"`` as bytes.

    ``K``, ``M``, ``G``, ``T``, ``P``, ``E`` alone or with ``iB`` count by 1024, with ``B`` by 1000
    (IEC 80000-13); no unit means bytes. Case does not matter.

    Raises:
        TypeError: `text` is not a string.
        ValueError: it is not a size, or not a whole number of bytes.
    """
    if not isinstance(text, str):
        msg = f"a size to parse is a string, not {type(text).__name__}"
        raise TypeError(msg)
    match = _SIZE.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        msg = f"not a size: {text!r}; write for example 64KiB, 1.5MiB, 136GiB or 4096"
        raise ValueError(msg)
    size = Fraction(match[1]) * unit
    if size.denominator != 1:
        msg = f"not a whole number of bytes: {text!r}"
        raise ValueError(msg)
    return int(size)


def format_size(nbytes: int) -> str:
    """Write a number of bytes with four significant digits and a binary unit: ``136.1 GiB``."""
    nbytes = _index(nbytes)
    if abs(nbytes) >> 100:
        return f"over 2**{abs(nbytes).bit_length() - 1} B"
    value, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        if float(f"{abs(value):.4g}") < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.4g} {unit}"


def as_float(number: float) -> float:
    """Read a real number once, also one that only has ``__index__``.

    Raises:
        TypeError: no number; text is none, though float() reads it.
        ValueError: an integer that no float can hold.
    """
    try:
        return math.ldexp(number, 0)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def format_time(ns: float) -> str:
    """Write nanoseconds with three significant digits and a unit: ``1.59 µs``."""
    value, unit = ns, "ns"
    for larger in ("µs", "ms", "s"):
        if abs(float(f"{value:.3g}")) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
