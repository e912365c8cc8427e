"""Subjects that were timed side by side in one run: how many times faster each is than a reference.

Where no reference was timed with the same stage and model, than the slowest of those that were.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from reports import statistics
from reports.load import Run, Timing
from reports.units import ratio

REFERENCES = ("broadcast", "colocate")  # the extensions of the suite itself that move one tensor after the other


def faster_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """One row for each subject, stage and model that another subject was timed beside, with a cell for each run.

    A cell has the median of the other's times divided by this one's, with its 95 % interval.
    """
    found = [dict(_ratios(run)) for run in runs]
    labels = dict.fromkeys(label for ratios in found for label in ratios)
    return [(label, *(ratios.get(label, "-") for ratios in found)) for label in labels]


def _ratios(run: Run) -> Iterable[tuple[str, str]]:
    places: dict[tuple[str, ...], list[Timing]] = {}
    for timing in run.timings:
        if timing.samples_s and timing.subject:
            places.setdefault((timing.group, timing.stage, timing.model, timing.distinct), []).append(timing)
    for timings in places.values():
        known = [timing for timing in timings if timing.subject in REFERENCES]
        base = max(known or timings, key=lambda timing: timing.median_s)
        for timing in timings:
            if timing is not base and timing.subject not in REFERENCES:
                yield f"{timing.label} than {base.subject}", ratio(statistics.compare(timing.samples_s, base.samples_s))
