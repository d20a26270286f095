"""Plain tables: readable on a terminal, and one record a line for grep and awk."""

from __future__ import annotations

from collections.abc import Sequence


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns two spaces apart; a heading that begins with `>` sets its column flush right."""
    right = [name.startswith(">") for name in head]
    lines = [[name.removeprefix(">") for name in head], *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]

    def cell(column: int, text: str) -> str:
        return text.rjust(widths[column]) if right[column] else text.ljust(widths[column])

    return "\n".join("  ".join(cell(i, text) for i, text in enumerate(line)).rstrip() for line in lines)


def short(hexadecimal: str, digits: int = 8) -> str:
    """`0x1234567890...` -> `0x12345678…`; whatever else, such as `exchange:HOST`, as it is."""
    whole = len(hexadecimal) <= digits + 3 or not hexadecimal.startswith("0x")
    return hexadecimal if whole else hexadecimal[: digits + 2] + "…"
