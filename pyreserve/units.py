"""Sizes in bytes: constants, the word, parsing and formatting; and formatting of times."""

import math
import struct
from operator import index as _index

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40
WORD = struct.calcsize("P")
"""Bytes of an address of this process: 4 or 8."""


def round_up(n: int, to: int) -> int:
    """Round `n` up to a multiple of `to`."""
    return -(-n // to) * to


_UNITS: dict[str, int] = {
    "": 1,
    "b": 1,
    **{
        spelling: 1 << (10 * power)
        for power, letter in enumerate("kmgtpe", start=1)
        for spelling in (letter, f"{letter}ib")
    },
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgtpe", start=1)},
}
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def parse_size(text: str) -> int:
    """Parse a size such as ``"136GiB"``, ``"64K"``, ``"1.5 MiB"`` or ``"4096"``; return bytes.

    ``K``, ``M``, ``G``, ``T``, ``P``, ``E``, alone or with ``iB``, are powers of 1024; with ``B``
    powers of 1000 (IEC 80000-13). No unit means bytes. Case is ignored.

    Raises:
        TypeError: `text` is not a string.
        ValueError: `text` is not a size, or not a whole number of bytes.
    """
    if not isinstance(text, str):
        msg = f"text must be a string, got {type(text).__name__}"
        raise TypeError(msg)
    stripped = text.strip()
    number = stripped.lower().rstrip(_LETTERS)
    unit = _UNITS.get(stripped[len(number) :].lower())
    whole, dot, decimals = number.rstrip().partition(".")
    digits = whole + decimals
    is_number = whole and bool(dot) == bool(decimals) and digits.isdigit()
    if not is_number or unit is None or not stripped.isascii():
        msg = f"not a size: {text!r}; examples: 64KiB, 1.5MiB, 136GiB, 4096"
        raise ValueError(msg)
    scale = int("1" + "0" * len(decimals))
    size, rest = divmod(int(digits) * unit, scale)
    if rest:
        msg = f"not a whole number of bytes: {text!r}"
        raise ValueError(msg)
    return size


def as_bytes(size: int | str) -> int:
    """Return a size in bytes: an integer as it is, a string as `parse_size` reads it.

    Raises:
        TypeError: `size` is neither an integer nor a string.
        ValueError: the string is not a size, or not a whole number of bytes.
    """
    return parse_size(size) if isinstance(size, str) else _index(size)


def as_count(number: int, name: str) -> int:
    """Return a number of items, the argument `name`.

    Raises:
        TypeError: `number` is not an integer; a size such as ``"1GiB"`` is in bytes.
    """
    if isinstance(number, str):
        msg = f"{name} is a number of items, not of bytes: must be an integer, got {number!r}"
        raise TypeError(msg)
    return _index(number)


def format_size(nbytes: int) -> str:
    """Format a number of bytes with four significant digits and a binary unit: ``136.1 GiB``."""
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
    """Convert a real number to float, also one that only has ``__index__``; read it once.

    Raises:
        TypeError: `number` is not a number; a string is not, although float() parses it.
        ValueError: an integer too large for a float.
    """
    try:
        return math.ldexp(number, 0)
    except OverflowError as error:
        raise ValueError(str(error)) from None


def format_time(ns: float) -> str:
    """Format nanoseconds with three significant digits and a unit: ``1.59 µs``."""
    value, unit = ns, "ns"
    for larger in ("µs", "ms", "s"):
        if abs(float(f"{value:.3g}")) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"
