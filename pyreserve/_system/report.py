"""Short reports as plain text and as HTML, for ``str()`` and for notebooks."""

from typing import NamedTuple


class Table(NamedTuple):
    """Titles and rows of text: the first `left` columns are left-aligned, the others right."""

    titles: tuple[str, ...]
    rows: list[tuple[str, ...]]
    left: int = 1


class Report(NamedTuple):
    """A heading, paragraphs and tables; unprintable characters in their texts are escaped."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()

    def text(self) -> str:
        """Return the report as plain text."""
        blocks = [self.heading, *self.paragraphs]
        blocks = [printable(block) for block in blocks] + [_text_table(t) for t in self.tables]
        return "\n\n".join(blocks)

    def html(self) -> str:
        """Return the report as an HTML fragment, all text escaped."""
        from html import escape  # noqa: PLC0415 - rarely needed

        def row(tag: str, cells: tuple[str, ...], left: int) -> str:
            sides = ["left" if column < left else "right" for column in range(len(cells))]
            parts = [
                f'<{tag} style="text-align:{side}">{escape(printable(text))}</{tag}>'
                for side, text in zip(sides, cells, strict=True)
            ]
            return f"<tr>{''.join(parts)}</tr>"

        parts = [f"<p><strong>{escape(printable(self.heading))}</strong></p>"]
        parts += [f"<p>{escape(printable(text))}</p>" for text in self.paragraphs]
        for table in self.tables:
            body = "".join(row("td", cells, table.left) for cells in table.rows)
            head = row("th", table.titles, table.left)
            parts.append(f"<table><thead>{head}</thead><tbody>{body}</tbody></table>")
        return f"<div>{''.join(parts)}</div>"


def _text_table(table: Table) -> str:
    lines = [tuple(map(printable, line)) for line in (table.titles, *table.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i >= table.left else text.ljust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def printable(text: str) -> str:
    r"""Escape unprintable characters as in source code, surrogate-escaped bytes as ``\xNN``."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8 (PEP 383)
        return f"\\x{code - 0xDC00:02x}"
    return char if char.isprintable() else char.encode("unicode_escape").decode("ascii")
