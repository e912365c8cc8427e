"""Where the time of an update goes: parts that follow each other, medians of what a run has timed.

In run.json they stand in a benchmark's extra_info as `parts_s`: {part: seconds of every sample}, in their order. What
each part is says suite/driver/parts.py. Older files have `steps_s` alone, the steps of the engine's half.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reports import units
from reports.node import Node

if TYPE_CHECKING:
    from reports.load import Timing

Medians = tuple[tuple[str, float], ...]
TITLE = "Where the time of an update goes, medians"
LEGEND = (
    "gather: both sides are told, and the trainer has its tensors at hand; announce: the trainer's half prepares what"
    " it announces; agree: the engine begins; transfer: it moves the weights, or by parts: call: a call arrives at the"
    " workers; then the extension's own (check, launch, copy); answer: it is back; end: with what resets the cache;"
    " hear: the trainer knows."
)


def medians(extra: Node, key: str) -> Medians:
    """The median of each list of samples in an object of extra_info, in its order; nothing where it is missing."""
    if key not in extra:
        return ()
    return tuple((name, _median(extra[key][name])) for name in extra[key].of(dict, "an object"))


def lines(timings: Sequence[Timing]) -> list[str]:
    """A line for each timing of which the parts are known."""
    return [
        f"{' '.join(filter(None, (timing.subject, timing.stage, timing.model, timing.distinct)))}: "
        + ", ".join(f"{part} {units.seconds(taken)}" for part, taken in timing.parts_s)
        for timing in timings
        if timing.parts_s
    ]


def table(timings: Sequence[Timing]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """The same as a table: a column for each part, in the order of an update, and a row for each timing."""
    known = [timing for timing in timings if timing.parts_s]
    parts: list[str] = []
    for timing in known:
        place = 0
        for part, _ in timing.parts_s:
            if part not in parts:
                parts.insert(place, part)
            place = parts.index(part) + 1
    named = [(t.subject, t.stage, " ".join(filter(None, (t.model, t.distinct)))) for t in known]
    taken = [dict(t.parts_s) for t in known]
    rows = [
        (*names, *(units.seconds(of[part]) if part in of else "-" for part in parts))
        for names, of in zip(named, taken, strict=True)
    ]
    return ("subject", "stage", "model", *parts), rows


def _median(node: Node) -> float:
    if isinstance(node.value, list):
        return statistics.median(node.numbers()) if node.value else 0.0
    return node.number()
