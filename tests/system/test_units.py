"""Parsing and formatting of sizes."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyreserve import GiB, KiB, MiB, TiB, format_size, parse_size


class TestConstants:
    def test_each_is_1024_of_the_one_below(self) -> None:
        """The constants are the binary units."""
        assert (KiB, MiB, GiB, TiB) == (1024, 1024**2, 1024**3, 1024**4)


class TestParse:
    @pytest.mark.parametrize(
        ("text", "nbytes"),
        [
            ("0", 0),
            ("4096", 4096),
            ("4096b", 4096),
            ("64K", 64 * KiB),
            ("64k", 64 * KiB),
            ("64KiB", 64 * KiB),
            ("64 kib", 64 * KiB),
            ("64kB", 64_000),
            ("1.5 MiB", 3 * MiB // 2),
            ("2MB", 2_000_000),
            ("136GiB", 136 * GiB),
            ("  136 GiB\n", 136 * GiB),
            ("1T", TiB),
            ("1TB", 10**12),
            ("1P", 1 << 50),
            ("1PB", 10**15),
            ("16EiB", 1 << 64),
            ("1eb", 10**18),
            ("0.5KiB", 512),
            ("0.001kB", 1),
            ("007", 7),
        ],
    )
    def test_sizes(self, text: str, nbytes: int) -> None:
        """Letters alone and with iB mean powers of 1024, with B of 1000; case is ignored."""
        assert parse_size(text) == nbytes

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "GiB",
            "-1",
            "-1KiB",
            "+1",
            "1e3",
            "1.",
            ".5K",
            "1,5K",
            "1_000",
            "0x10",
            "1 X",
            "1KiBB",
            "1i",
            "1 Ki",
            "1 K iB",
            "inf",
            "nan",
            "1KiB 2KiB",
            "٣KiB",
            "1\u212a",  # the Kelvin sign, which lowers to k
            "1Z",
        ],
    )
    def test_malformed_sizes_are_refused(self, text: str) -> None:
        """Text that is not a number with a known unit raises ValueError and is quoted in it."""
        with pytest.raises(ValueError, match="not a size") as caught:
            parse_size(text)

        assert repr(text) in str(caught.value)

    @pytest.mark.parametrize("text", ["0.5", "1.5b", "0.0001KiB", "1.00001kB"])
    def test_parts_of_a_byte_are_refused(self, text: str) -> None:
        """A size that is not a whole number of bytes is an error, never rounded."""
        with pytest.raises(ValueError, match="whole number of bytes"):
            parse_size(text)

    @pytest.mark.parametrize("value", [4096, 1.5, None, b"4K", Decimal(1), ["4K"]])
    def test_other_types_are_refused(self, value: object) -> None:
        """Only strings are parsed; anything else is a TypeError."""
        with pytest.raises(TypeError, match="string"):
            parse_size(value)  # type: ignore[arg-type]

    def test_fractions_are_exact(self) -> None:
        """A decimal fraction is exact, where a float would lose the last bytes."""
        assert parse_size("8388607.9990234375TiB") == (8388608 << 40) - (1 << 30)


class TestFormat:
    @pytest.mark.parametrize(
        ("nbytes", "text"),
        [
            (0, "0 B"),
            (1, "1 B"),
            (1023, "1023 B"),
            (KiB, "1 KiB"),
            (1536, "1.5 KiB"),
            (136 * GiB, "136 GiB"),
            (136 * GiB + 100 * MiB, "136.1 GiB"),
            (64 * TiB, "64 TiB"),
            (1 << 63, "8 EiB"),
            (1 << 74, "1.638e+04 EiB"),
            (-1536, "-1.5 KiB"),
        ],
    )
    def test_four_digits_and_a_binary_unit(self, nbytes: int, text: str) -> None:
        """A size is formatted with four significant digits and the largest unit below it."""
        assert format_size(nbytes) == text

    @given(st.integers(0, 1 << 64))
    def test_formatted_sizes_can_be_parsed(self, nbytes: int) -> None:
        """Parsing a formatted size differs by at most the rounded digits."""
        text = format_size(nbytes)
        number, unit = text.split()

        scale = parse_size(f"1{unit}")

        assert abs(float(number) * scale - nbytes) <= 0.0006 * nbytes
