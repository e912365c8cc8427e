"""Rows and lines that the terminal, the pages and the exports share: cells, headlines, grouped failures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

from reports import pause, units
from reports.causes import and_more, by_cause, together
from reports.compare import DEFAULT_CAUSES, Change, Comparison, TimingChange
from reports.load import Outcome, Run, Timing
from reports.matrix import FOUND_WANTING, SYMBOL, in_order
from reports.statistics import Ratio

NAMES_OF_A_GROUP = 6
PACE = "The host's pace (what a call to all workers takes), B/A"
HEADLINE = ("newly failing", "newly in error", "newly waived", "slower", "no longer judged", "only in A",
            "inconclusive", "not compared", "changed", "only in B", "still failing", "still failing (waived)",
            "newly passing", "faster")  # fmt: skip
VERDICT_SYMBOL = {"slower": "▲", "faster": "▼", "same": "=", "inconclusive": "?"}
THROUGHPUT_HEAD = ("subject", "stage", "model", "sent", "median", "n", "GB/s", "roof", "of it", "engine+", "trainer+",
                   "pause", "over", "token")  # fmt: skip
THROUGHPUT_RIGHT = range(3, 14)
PAUSE_COLUMNS = (0, 1, 2, 4, 11, 12, 13)  # of a table of its own, where all of them are too wide


def time_spent(run: Run) -> str:
    """Where the run's own time went, in one line; empty where it was not recorded.

    Spans lie within each other: a test that judges also moves weights. A moment counts once, for the innermost span.
    """
    spent: Counter[str] = Counter()
    spans = sorted(run.timeline, key=lambda span: span[1])
    moments = sorted({moment for _, began, ended in spans for moment in (began, ended)})
    going_on: list[tuple[str, float, float]] = []
    for moment, following in pairwise(moments):  # each moment counts once, for what began last
        while spans and spans[0][1] <= moment:
            going_on.append(spans.pop(0))
        going_on = [span for span in going_on if span[2] > moment]
        if going_on:
            spent[going_on[-1][0]] += following - moment
    return "Time went to: " + ", ".join(f"{w} {units.seconds(s)}" for w, s in spent.most_common()) if spent else ""


def pace_lines(run: Run) -> list[str]:
    """What a call to all workers took on each stage, where the run measured it."""
    return [f"The host's pace on {stage}: {found}." for stage, found in run.environment.paces]


def throughput_table(timings: Sequence[Timing]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """THROUGHPUT_HEAD and its rows; without a pause's columns where none was measured."""
    width = len(THROUGHPUT_HEAD) if any(timing.pause for timing in timings) else PAUSE_COLUMNS[4]
    return THROUGHPUT_HEAD[:width], [throughput_row(timing)[:width] for timing in timings]


def throughput_row(timing: Timing) -> tuple[str, ...]:
    """The cells of THROUGHPUT_HEAD."""
    named = (timing.subject or timing.distinct, timing.stage, timing.model)
    if timing.subject and timing.distinct:
        named = (timing.subject, timing.stage, f"{timing.model} {timing.distinct}")
    return (
        *named,
        units.size(timing.bytes_sent),
        units.seconds(timing.median_s) + (f" ({timing.failed})" if timing.failed else ""),
        str(len(timing.samples_s)) if timing.samples_s else "-",
        units.rate(timing.gb_per_s),
        units.rate(timing.roofline_gb_per_s),
        units.percent(timing.fraction_of_roofline),
        units.size(timing.engine_peak_extra_bytes),
        units.size(timing.trainer_peak_extra_bytes),
        *pause.cells(timing.pause),
    )


def failures(run: Run) -> list[tuple[Outcome, str]]:
    """(the first case, a line that counts the others) of every cause of a failure, the gravest verdict first."""
    found = [outcome for verdict in FOUND_WANTING for outcome in run.outcomes if outcome.verdict == verdict]
    return [(first, and_more(case.requirement for case in rest)) for first, *rest in by_cause(found)]


def compare_headline(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES) -> str:
    """What matters in one line."""
    kinds = Counter(change.kind for change in found.requirements) + Counter(c.verdict for c in found.timings)
    said = [f"{kinds[kind]} {kind}" for kind in HEADLINE if kinds[kind]]
    return f"{'Worse' if found.worse(causes) else 'Nothing worse'}: {', '.join(said) or 'no change found'}."


def grouped(changes: Iterable[Change]) -> list[tuple[str, str, str]]:
    """(what, message, count of others) of changes; those of one cause, or one message on one stage, share an entry."""
    lines = []
    for group, more in causes_of(changes):
        first = group[0]
        name = " ".join(filter(None, first.key)) if more else _named(group, first.key[2])
        lines.append((f"{SYMBOL.get(first.now, '·')} {name} ({first.was} -> {first.now})", first.detail, more))
    return lines


def causes_of(changes: Iterable[Change]) -> list[tuple[list[Change], str]]:
    """(changes, a line that counts those after the first) of every cause of a failure.

    Changes that are no failures come together where they say the same on one stage; they have no such line.
    """

    def key(change: Change) -> tuple[str, ...]:
        return (change.kind, change.was, change.now, *(change.cause or (change.key[2], change.detail)))

    groups = together(changes, key)
    return [(group, and_more(c.key[0] for c in group[1:]) if group[0].cause else "") for group in groups]


def _named(group: list[Change], stage: str) -> str:
    """The cases of a group: one in full, several by requirement, many by family."""
    if len(group) == 1:
        return " ".join(filter(None, group[0].key))
    names, subjects = (in_order(change.key[place] for change in group) for place in (0, 1))
    if len(names) > NAMES_OF_A_GROUP:
        families = Counter(name.partition(".")[0] for name in names)
        names = [f"{family}.* ({count})" for family, count in families.items()]
    return " ".join(filter(None, [", ".join(names) + ":", ", ".join(filter(None, subjects)), stage]))


def drifts(found: Comparison) -> list[tuple[str, list[str]]]:
    """(title, lines) of how the hardware and the host changed; one that both runs have not measured is left out."""
    titled = (("Roofline itself, B/A", roofline_drift(found)), (PACE, pace_drift(found)))
    return [(title, lines) for title, lines in titled if lines]


def roofline_drift(found: Comparison) -> list[str]:
    """How the hardware changed: a line for each roofline that changed or may have, and a count of the others."""
    return _drift_lines(found.drift, "roofline")


def pace_drift(found: Comparison) -> list[str]:
    """The same of the host's pace, by stage and call."""
    return _drift_lines(found.pace_drift, "call")


def _drift_lines(measured: list[tuple[str, Ratio]], noun: str) -> list[str]:
    moved = [f"{drift.verdict}: {label} {units.ratio(drift)}" for label, drift in measured if drift.verdict != "same"]
    still = len(measured) - len(moved)
    return [*moved, f"same: {still} of {units.counted(len(measured), noun)}"] if measured else []


def timing_row(change: TimingChange) -> tuple[str, ...]:
    """A timing's cells.

    They are: verdict, what, A, B, B/A, p, fraction of roofline of A and of B, B/A against the roofline, the roofline's
    B/A, B/A with the drift of the host's pace taken out.
    """
    a, b = change.before, change.after
    return (
        f"{VERDICT_SYMBOL.get(change.verdict, '·')} {change.verdict}",
        change.label,
        units.seconds(a.median_s if a else None),
        units.seconds(b.median_s if b else None),
        units.ratio(change.seconds),
        units.p_value(change.seconds),
        units.percent(a.fraction_of_roofline if a else None),
        units.percent(b.fraction_of_roofline if b else None),
        units.ratio(change.relative),
        units.ratio(change.roofline),
        units.ratio(change.against_pace and change.against_pace.relative),
    )
