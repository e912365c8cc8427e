"""Walking a JSON document so that every complaint names the file, the place, what was expected and what was found."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

SHOWN_CHARACTERS = 60


class UnusableInput(Exception):
    """A file that cannot be used; its text names the file, the place and what was expected there."""

    def __init__(self, file: str, place: str, message: str) -> None:
        super().__init__(f"{file}: {place}: {message}" if place else f"{file}: {message}")
        self.file, self.place = file, place


def shown(value: object) -> str:
    """A value as it may stand in a one-line message."""
    if isinstance(value, dict | list):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


class Node:
    """A value of the document together with the place it stands at."""

    def __init__(self, value: Any, file: str, place: str = "") -> None:
        self.value, self.file, self.place = value, file, place

    def refuse(self, expected: str, found: str | None = None) -> UnusableInput:
        return UnusableInput(self.file, self.place, f"expected {expected}, found {found or shown(self.value)}")

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and self.value.get(key) is not None

    def __getitem__(self, key: str) -> Node:
        """The member `key`; one that is null or missing holds None."""
        self.of(dict, "an object")
        return Node(self.value.get(key), self.file, f"{self.place}.{key}" if self.place else key)

    def __iter__(self) -> Iterator[Node]:
        for index, value in enumerate(self.of(list, "a list")):
            yield Node(value, self.file, f"{self.place}[{index}]")

    def of(self, kind: type, expected: str) -> Any:
        if not isinstance(self.value, kind):
            raise self.refuse(expected, "nothing" if self.value is None else None)
        return self.value

    def text(self) -> str:
        return self.of(str, "a text")

    def optional_text(self) -> str | None:
        return None if self.value is None else self.text()

    def one_of(self, choices: tuple[str, ...]) -> str:
        if self.value not in choices:
            raise self.refuse("one of " + ", ".join(choices), "nothing" if self.value is None else None)
        return self.value

    def number(self) -> float:
        """A finite number of at least 0 (everything measured here is a time, a size or a rate)."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.refuse("a number", "nothing" if value is None else None)
        if not 0 <= value < 1e300:
            raise self.refuse("a number of 0 or more", shown(value))
        return float(value)

    def optional_number(self) -> float | None:
        return None if self.value is None else self.number()

    def numbers(self) -> tuple[float, ...]:
        return () if self.value is None else tuple(node.number() for node in self)


def refuse_non_finite(value: Any, file: str, place: str = "") -> None:
    """NaN and infinities stand for a measurement that went wrong, and poison every median they enter."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UnusableInput(file, place, f"expected a finite number, found {value}")
    if isinstance(value, dict):
        for key, member in value.items():
            refuse_non_finite(member, file, f"{place}.{key}" if place else key)
    elif isinstance(value, list):
        for index, member in enumerate(value):
            refuse_non_finite(member, file, f"{place}[{index}]")


def members(pairs: list[tuple[str, Any]], file: str) -> dict[str, Any]:
    """The members of an object. Raises UnusableInput where a name is there twice."""
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        near = ", ".join(f"{key} {value!r}" for key, value in pairs if isinstance(value, str) and len(value) < 80)
        place = f"the object with {near[:160]}" if near else f"the object with the members {', '.join(members)[:160]}"
        raise UnusableInput(file, place, f"expected every name once, found {twice!r} twice: edited by hand?")
    return members
