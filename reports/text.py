"""A run, a comparison or a trend on a terminal of 100 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise, zip_longest

from reports import pace, units
from reports.causes import and_more, by_cause, together
from reports.compare import DEFAULT_CAUSES, LAST, Change, Comparison, TimingChange
from reports.load import Outcome, Run, Timing
from reports.matrix import FOUND_WANTING, MEANING, SYMBOL, Cell, cells, headline, in_order, legend
from reports.table import text_table, wrapped

LINES_OF_A_MESSAGE = 6
NAMES_OF_A_GROUP = 6
PACE = "The host's pace (what a call to all workers takes), B/A"
HEADLINE = ("newly failing", "newly in error", "newly waived", "slower", "no longer judged", "only in A",
            "inconclusive", "not compared", "changed", "only in B", "still failing", "still failing (waived)",
            "newly passing", "faster")  # fmt: skip
VERDICT_SYMBOL = {"slower": "▲", "faster": "▼", "same": "=", "inconclusive": "?"}
THROUGHPUT_HEAD = ("subject", "stage", "model", "sent", "median", "n", "GB/s", "roof", "of it", "engine+", "trainer+")
THROUGHPUT_RIGHT = range(3, 11)


def run_text(run: Run, width: int = 100) -> str:
    """The closing summary: requirements x subjects, what is not a pass and why, throughput, where the time went."""
    verdict, sentence = headline(run)
    parts = [wrapped(f"{SYMBOL[verdict]} {sentence}", width, ""), wrapped(run.environment.line, width, "")]
    if run.outcomes:
        parts += [_requirements(run, width), *_reasons(run, width)]
    if run.timings:
        parts.append(_throughput(run.timings, width))
    parts.append("\n".join(wrapped(line, width, "") for line in pace_lines(run)))
    parts.append(time_spent(run))
    parts += [wrapped(note, width, "") for note in run.notes]
    return "\n\n".join(filter(None, parts))


def time_spent(run: Run) -> str:
    """Where the run's own time went, in one line; empty where it was not recorded.

    A test that judges moves weights and may wait for an engine to start: what is within something else is taken out.
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
    )


def _requirements(run: Run, width: int) -> str:
    subjects = in_order(outcome.subject for outcome in run.outcomes)
    found = cells(run.outcomes, "requirement", "subject")
    levels = cells(run.outcomes, "requirement")
    names = in_order(outcome.requirement for outcome in run.outcomes)
    rows = [
        (name, levels[name,].level, *(_folded(found.get((name, subject))) for subject in subjects)) for name in names
    ]
    held = [outcome for outcome in run.outcomes if outcome.verdict != "not-applicable"]
    stages = in_order(outcome.stage for outcome in held if outcome.stage)
    explained = legend(outcome.verdict for outcome in run.outcomes)
    meanings = "; ".join(f"{SYMBOL[verdict]} {verdict}: {MEANING[verdict]}" for verdict in explained)
    table = text_table(("requirement", "level", *(subject or "-" for subject in subjects)), rows, width)
    return "\n".join([f"Stages: {', '.join(stages) or '-'}", "", table, "", wrapped(meanings, width, "")])


def _folded(cell: Cell | None) -> str:
    """All stages and models of one place: the verdicts with how many cases each, and the stages of a failure.

    That some could not be held is told once, below, with the reasons.
    """
    if cell is None:
        return ""
    parts = []
    for verdict, count in cell.counts:
        if verdict == "not-applicable" and len(cell.counts) > 1:
            continue
        stages = in_order(o.stage for o in cell.outcomes if o.verdict == verdict and o.stage)
        named = verdict in FOUND_WANTING and stages and count < len(cell.outcomes)
        parts.append(f"{SYMBOL[verdict]} {verdict} {count}" + (f" ({', '.join(stages)})" if named else ""))
    return ", ".join(parts)


def _reasons(run: Run, width: int) -> list[str]:
    """Each cause of failures once, with the message of the first case; the reasons for not judging once each."""
    parts = []
    for first, more in failures(run):
        where = " ".join(filter(None, [first.subject, first.stage, first.model]))
        head = f"{SYMBOL[first.verdict]} {first.verdict} {first.level} {first.requirement}: {where}"
        message = wrapped(first.told or "no message", width, lines=LINES_OF_A_MESSAGE)
        parts.append("\n".join(filter(None, [wrapped(head, width, ""), message, wrapped(more, width) if more else ""])))
    for verdict in ("unsupported", "not-applicable"):
        counted = Counter(outcome.detail or "no reason given" for outcome in run.outcomes if outcome.verdict == verdict)
        lines = [wrapped(f"{count} x {reason}", width, "    ", 2) for reason, count in counted.items()]
        parts.append("\n".join([f"{SYMBOL[verdict]} {verdict}:", *lines]) if lines else "")
    return parts


def failures(run: Run) -> list[tuple[Outcome, str]]:
    """(the first case, a line that counts the others) of every cause of a failure, the gravest verdict first."""
    found = [outcome for verdict in FOUND_WANTING for outcome in run.outcomes if outcome.verdict == verdict]
    return [(first, and_more(case.requirement for case in rest)) for first, *rest in by_cause(found)]


def _throughput(timings: tuple[Timing, ...], width: int) -> str:
    rows, head, right = [throughput_row(timing) for timing in timings], THROUGHPUT_HEAD, THROUGHPUT_RIGHT
    used = [column for column in range(len(head)) if any(row[column] not in ("", "-") for row in rows)]
    table = text_table(
        [head[column] for column in used],
        [[row[column] for column in used] for row in rows],
        width,
        [place for place, column in enumerate(used) if column in right],
    )
    kinds = in_order(timing.roofline_kind for timing in timings if timing.roofline_gb_per_s)
    roof = f"roof: the hardware's own GB/s for the same bytes, same run ({', '.join(kinds)}). " if kinds else ""
    peak = "+: peak memory beyond the weights. " if any(timing.engine_peak_extra_bytes for timing in timings) else ""
    return f"Throughput\n\n{table}\n\n{wrapped(roof + peak, width, '')}".rstrip()


def compare_headline(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES) -> str:
    """What matters in one line."""
    kinds = Counter(change.kind for change in found.requirements) + Counter(c.verdict for c in found.timings)
    said = [f"{kinds[kind]} {kind}" for kind in HEADLINE if kinds[kind]]
    return f"{'Worse' if found.worse(causes) else 'Nothing worse'}: {', '.join(said) or 'no change found'}."


def compare_text(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES, width: int = 100) -> str:
    """The verdict, environment, requirements that changed, timings."""
    sides = [f"{side}  {run.source}\n   {run.environment.line}" for side, run in (("A", found.a), ("B", found.b))]
    parts = [compare_headline(found, causes), "\n".join(wrapped(line, width, "") for line in sides)]
    if found.differences:
        rows = [(name, *_where_apart(a, b)) for name, a, b in found.differences]
        parts.append(text_table(("environment", "A", "B"), rows, width))
    parts += _changes([change for change in found.told if change.kind not in LAST], width)
    parts.append(f"{units.counted(found.unchanged, 'requirement case')} unchanged." if found.requirements else "")
    parts += [_timings(found, width), *_changes([change for change in found.told if change.kind in LAST], width)]
    notes = [f"{run.source}: {note}" for run in (found.a, found.b) for note in run.notes]
    return "\n\n".join(part for part in [*parts, *notes] if part)


def _where_apart(a: str, b: str) -> tuple[str, str]:
    """Of two texts of many lines, such as a topology, the first lines that differ."""
    pairs = zip_longest(a.split("\n"), b.split("\n"), fillvalue="")
    return next((" ".join(one.split()), " ".join(other.split())) for one, other in pairs if one != other)


def _changes(told: list[Change], width: int) -> list[str]:
    parts = []
    for kind in in_order(change.kind for change in told):
        lines = [f"{kind[0].upper()}{kind[1:]}:"]
        for name, detail, more in grouped([change for change in told if change.kind == kind]):
            lines += [
                wrapped(name, width, "  "),
                wrapped(detail, width, lines=LINES_OF_A_MESSAGE),
                wrapped(more, width),
            ]
        parts.append("\n".join(filter(None, lines)))
    return parts


def grouped(changes: Iterable[Change]) -> list[tuple[str, str, str]]:
    """(what, message, which others) of changes: one cause is told once, and so is what is the same on a stage."""
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


def drift_lines(found: Comparison) -> list[str]:
    """What the hardware's own speed did between the runs: those that moved or may have, and how many did not."""
    moved = [(label, drift) for label, drift in found.drift if drift.verdict != "same"]
    lines = [f"{drift.verdict}: {label} {units.ratio(drift)}" for label, drift in moved]
    still = len(found.drift) - len(moved)
    return [*lines, f"same: {still} of {units.counted(len(found.drift), 'roofline')}"] if found.drift else []


def _timings(found: Comparison, width: int) -> str:
    if not found.timings:
        return ""
    parts = [f"Timings: B's median over A's with its 95% interval, threshold {found.threshold * 100:.3g}%"]
    head = ("verdict", "model", "A", "B", "B/A", "p", "against roofline")
    for place in in_order(_place(change) for change in found.timings):
        rows = [_timing_line(change) for change in found.timings if _place(change) == place]
        table = text_table(head if place else ("verdict", "benchmark", *head[2:]), rows, width, (2, 3))
        parts.append(f"{wrapped(place, width, '')}\n{table}" if place else table)
    whys = [f"{change.verdict}: {change.label}: {change.why}" for change in found.timings if change.why]
    parts.append("\n".join(wrapped(why, width, "  ") for why in whys))
    for title, drift in (("Roofline itself, B/A", drift_lines(found)), (PACE, pace.drift_lines(found.pace_drift))):
        parts.append("\n".join([title, *(wrapped(line, width, "  ") for line in drift)]) if drift else "")
    parts.append(wrapped(found.pace_unknown, width, ""))
    return "\n\n".join(filter(None, parts))


def _place(change: TimingChange) -> str:
    timing = change.after or change.before
    return " ".join(filter(None, [timing.group, timing.subject, timing.stage]))


def _timing_line(change: TimingChange) -> tuple[str, ...]:
    row, timing = timing_row(change), change.after or change.before
    model = " ".join(filter(None, [timing.model, timing.distinct]))
    return (row[0], model or change.label, row[2], row[3], row[4], row[5], row[8])


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
