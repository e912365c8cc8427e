"""What feeding several engines costs: the time of one update of all, against that of one engine alone.

A run measures it where one trainer feeds several engines by one broadcast. In run.json the number of engines stands in
a benchmark's extra_info as `engines`; a file without it has updates of one engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from reports import units
from reports.node import Node

if TYPE_CHECKING:
    from reports.load import Timing

ALONE = ("gpu-split", "cpu-tp1")  # where a trainer feeds one engine of one rank over the same hardware
HEAD = ("subject", "model", "engines", "stage", "median", "of one engine", "GB/s in all", "of it")
RIGHT = (2, 4, 5, 6, 7)
LEGEND = (
    "of one engine: how many times an update of one engine alone takes; GB/s in all: what all engines get together."
)


def engines_of(extra: Node) -> int:
    """How many engines an update has brought weights to. Raises UnusableInput unless that is a number from 1 on."""
    found = extra["engines"].optional_number()
    if found is not None and (found < 1 or found != int(found)):
        raise extra["engines"].refuse("a number of engines, from 1 on")
    return 1 if found is None else int(found)


def table(timings: Sequence[Timing]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """HEAD and its rows: by subject and model the update of one engine, where it was timed, and those of several."""
    several = [timing for timing in timings if timing.engines > 1]
    found = []
    for subject, model in dict.fromkeys((timing.subject, timing.model) for timing in several):
        of_these = [timing for timing in timings if (timing.subject, timing.model) == (subject, model)]
        fed = sorted((timing for timing in of_these if timing.engines > 1), key=lambda timing: timing.engines)
        kinds = {_kind(timing) for timing in fed}
        alone = [timing for timing in of_these if timing.stage in ALONE and _kind(timing) in kinds]
        found += [_row(timing, alone[0] if alone else None) for timing in [*alone[:1], *fed]]
    return HEAD, found


def _row(timing: Timing, alone: Timing | None) -> tuple[str, ...]:
    rate = timing.gb_per_s
    return (
        timing.subject,
        timing.model,
        str(timing.engines),
        timing.stage,
        units.seconds(timing.median_s) + (f" ({timing.failed})" if timing.failed else ""),
        f"x{timing.median_s / alone.median_s:.2f}" if alone and alone.median_s else "-",
        units.rate(None if rate is None else rate * timing.engines),
        units.percent(timing.fraction_of_roofline),
    )


def _kind(timing: Timing) -> str:
    return timing.stage.partition("-")[0]
