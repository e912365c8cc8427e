"""Tables in monospaced text that keep to a width, and the same tables in Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from reports.units import plain

NARROWEST_COLUMN = 8


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], width: int, right: Sequence[int] = ()) -> str:
    """Columns two apart; where they do not fit the widest are shortened, the cut marked by an ellipsis."""
    lines = [[plain(cell).replace("\n", " ") for cell in row] for row in [head, *rows]]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > NARROWEST_COLUMN:
        widths[widths.index(max(widths))] -= 1
    lines.insert(1, ["-" * room for room in widths])
    return "\n".join(_line(line, widths, right)[:width].rstrip() for line in lines)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """A GitHub-flavoured table."""
    rule = ["---:" if column in right else "---" for column in range(len(head))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *([markdown(c) for c in r] for r in rows)])


def markdown(text: str) -> str:
    """A name or message as inert Markdown: no markup, no table or line break, nobody mentioned."""
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for character in "\\`*_|[]~#$":
        escaped = escaped.replace(character, "\\" + character)
    return escaped.replace("@", "@\u200b").replace("://", ":\u200b//").replace("\n", "<br>")


def wrapped(text: str, width: int, indent: str = "    ", lines: int = 0) -> str:
    """A paragraph a line of `text`, indented; `lines` limits how much is shown, 0 for all."""
    inside = max(width - len(indent), 20)
    found = [line for part in plain(text).split("\n") for line in textwrap.wrap(part, inside) or [""]]
    if lines and len(found) > lines:
        found = [*found[: lines - 1], f"{found[lines - 1][: inside - 4]} ..."]
    return "\n".join((indent + line).rstrip() for line in found)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    fitted = (cell if len(cell) <= room else cell[: room - 1] + "…" for cell, room in zip(cells, widths, strict=True))
    aligned = (
        cell.rjust(room) if column in right else cell.ljust(room)
        for column, (cell, room) in enumerate(zip(fitted, widths, strict=True))
    )
    return "  ".join(aligned)
