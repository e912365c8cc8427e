"""Subjects side by side: what each one met in several runs of one machine, and how fast it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from reports.load import Outcome, Run, Timing
from reports.matrix import NOT_JUDGED, cells, in_order
from reports.table import markdown_table
from reports.units import percent, seconds

HEAD = ("subject", "vLLM", "requirements met", "not met")


def subjects_markdown(runs: Sequence[Run]) -> str:
    """A row for each subject: with which vLLM it was examined, what it met and not, and its updates' medians.

    Of a requirement and of a model the last run counts that has judged or timed it. A model has a column where at
    least a third of the subjects that were timed have updated it. The percentage is the share of roofline.
    """
    names = in_order(subject for run in runs for subject in _examined(run))
    models = _models([timing for run in runs for timing in _timed(run)])
    rows = [_row(name, [run for run in runs if name in _examined(run)], models) for name in names]
    return markdown_table((*HEAD, *(f"update of {model}" for model in models)), rows, range(4, 4 + len(models)))


def _examined(run: Run) -> list[str]:
    return [found.subject for found in (*_judged(run), *_timed(run))]


def _judged(run: Run) -> list[Outcome]:
    return [outcome for outcome in run.outcomes if outcome.subject and outcome.verdict not in NOT_JUDGED]


def _timed(run: Run) -> list[Timing]:
    return [timing for timing in run.timings if timing.subject and timing.median_s and not timing.distinct]


def _models(timings: Sequence[Timing]) -> list[str]:
    """The models to be shown, the smallest first."""
    pairs = {(timing.model, timing.subject) for timing in timings}
    subjects = Counter(model for model, _ in pairs)
    least = len({subject for _, subject in pairs}) / 3
    sizes = {timing.model: timing.bytes_sent or 0 for timing in timings}
    return sorted((model for model, count in subjects.items() if count >= least), key=sizes.__getitem__)


def _row(name: str, runs: Sequence[Run], models: Sequence[str]) -> tuple[str, ...]:
    verdicts: dict[str, str] = {}
    medians: dict[str, Timing] = {}
    for run in runs:
        judged = [outcome for outcome in _judged(run) if outcome.subject == name]
        verdicts |= {requirement: cell.verdict for (requirement,), cell in cells(judged, "requirement").items()}
        medians |= {timing.model: timing for timing in _timed(run) if timing.subject == name}
    missed = [requirement for requirement, verdict in verdicts.items() if verdict != "pass"]
    met = f"{len(verdicts) - len(missed)} of {len(verdicts)}" if verdicts else "-"
    versions = in_order(dict(run.environment.facts).get("vLLM", run.label) for run in runs)
    return (name, ", ".join(versions), met, ", ".join(missed) or "-", *(_time(medians.get(m)) for m in models))


def _time(timing: Timing | None) -> str:
    return f"{seconds(timing.median_s)}, {percent(timing.fraction_of_roofline)}" if timing else "-"
