"""The message of a failure, line by line: what was expected, what was found, where, and how to repeat the case.

The suite writes a line for each, as "expected: ...". Older runs have sentences without labels, which are shown as they
are.
"""

from __future__ import annotations

from reports.table import wrapped
from reports.units import plain

LABELS = ("clause", "expected", "found", "where", "try next", "repeat")
WHOLE = ("repeat",)  # a command that a reader copies: it is neither shortened nor broken
COLUMN = max(map(len, LABELS)) + 2
LINES_OF_A_LABEL, LINES_OF_THE_REST = 3, 6


def parts(text: str) -> list[tuple[str, str]]:
    """(label, words) of every line; the label is empty where a line has none of LABELS."""
    return [_part(line) for line in text.split("\n")]


def labelled(text: str, label: str) -> str:
    """The words of the first line with this label; empty where no line has it."""
    return next((words for name, words in parts(text) if name == label), "")


def message_text(text: str, width: int, indent: str = "    ") -> str:
    """The message for a terminal, every label in a column of its own, long lines shortened."""
    shown, rest = [], []
    for label, words in [*parts(plain(text)), ("", "")]:
        if label or not words:
            shown += [wrapped("\n".join(rest), width, indent, LINES_OF_THE_REST)] if rest else []
            rest = []
        if label:
            shown.append(_line(label, words, width, indent))
        elif words:
            rest.append(words)
    return "\n".join(shown)


def _part(line: str) -> tuple[str, str]:
    label, colon, words = line.partition(": ")
    return (label, words) if colon and label in LABELS else ("", line)


def _line(label: str, words: str, width: int, indent: str) -> str:
    column = f"{indent}{label}:".ljust(len(indent) + COLUMN)
    if label in WHOLE:
        return column + words
    return column + wrapped(words, width, " " * len(column), LINES_OF_A_LABEL).lstrip()
