"""A run, a comparison or a trend on a terminal of 100 columns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest

from reports import fanout, rows, spent, units
from reports.compare import DEFAULT_CAUSES, LAST, Change, Comparison, TimingChange
from reports.load import Run, Timing
from reports.matrix import FOUND_WANTING, MEANING, NOT_JUDGED, SYMBOL, Cell, cells, headline, in_order, legend
from reports.message import message_text
from reports.pause import LEGEND
from reports.table import text_table, wrapped


def run_text(run: Run, width: int = 100) -> str:
    """The closing summary: requirements x subjects, what is not a pass and why, throughput, where the time went."""
    verdict, sentence = headline(run)
    parts = [wrapped(f"{SYMBOL[verdict]} {sentence}", width, ""), wrapped(run.environment.line, width, "")]
    if run.outcomes:
        parts += [_requirements(run, width), *_reasons(run, width)]
    if run.timings:
        parts.append(_throughput(run.timings, width))
    parts.append("\n".join(wrapped(line, width, "") for line in rows.pace_lines(run)))
    parts.append(rows.time_spent(run))
    parts += [wrapped(note, width, "") for note in run.notes]
    return "\n\n".join(filter(None, parts))


def _requirements(run: Run, width: int) -> str:
    subjects = in_order(outcome.subject for outcome in run.outcomes)
    found = cells(run.outcomes, "requirement", "subject")
    levels = cells(run.outcomes, "requirement")
    names = in_order(outcome.requirement for outcome in run.outcomes)
    listed = [
        (name, levels[name,].level, *(_folded(found.get((name, subject))) for subject in subjects)) for name in names
    ]
    held = [outcome for outcome in run.outcomes if outcome.verdict != "not-applicable"]
    stages = in_order(outcome.stage for outcome in held if outcome.stage)
    explained = legend(outcome.verdict for outcome in run.outcomes)
    meanings = "; ".join(f"{SYMBOL[verdict]} {verdict}: {MEANING[verdict]}" for verdict in explained)
    table = text_table(("requirement", "level", *(subject or "-" for subject in subjects)), listed, width)
    return "\n".join([f"Stages: {', '.join(stages) or '-'}", "", table, "", wrapped(meanings, width, "")])


def _folded(cell: Cell | None) -> str:
    """All stages and models of one cell: every verdict with its number of cases, and the stages of a failure.

    Cases that could not run are left out beside others, since the reasons for them are listed below the table.
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
    for first, more in rows.failures(run):
        where = " ".join(filter(None, [first.subject, first.stage, first.model]))
        head = f"{SYMBOL[first.verdict]} {first.verdict} {first.level} {first.requirement}: {where}"
        lines = [wrapped(head, width, ""), message_text(first.told_with_clause or "no message", width)]
        parts.append("\n".join([*lines, *([wrapped(more, width)] if more else [])]))
    for verdict in NOT_JUDGED:
        counted = Counter(outcome.detail or "no reason given" for outcome in run.outcomes if outcome.verdict == verdict)
        lines = [wrapped(f"{count} x {reason}", width, "    ", 2) for reason, count in counted.items()]
        parts.append("\n".join([f"{SYMBOL[verdict]} {verdict}:", *lines]) if lines else "")
    return parts


def _throughput(timings: tuple[Timing, ...], width: int) -> str:
    kinds = in_order(timing.roofline_kind for timing in timings if timing.roofline_gb_per_s)
    roof = f"roof: the hardware's own GB/s for the same bytes, same run ({', '.join(kinds)}). " if kinds else ""
    peak = "+: peak memory beyond the weights. " if any(timing.engine_peak_extra_bytes for timing in timings) else ""
    others = [column for column in range(len(rows.THROUGHPUT_HEAD)) if column not in rows.PAUSE_COLUMNS[4:]]
    parts = ["Throughput", _throughput_table(timings, others, width), wrapped(roof + peak, width, "")]
    paused = [timing for timing in timings if timing.pause]
    if paused:
        parts += [_throughput_table(paused, rows.PAUSE_COLUMNS, width), wrapped(LEGEND, width, "")]
    if taken := spent.lines(timings):
        parts += [spent.TITLE, "\n".join(wrapped(line, width, "") for line in taken), wrapped(spent.LEGEND, width, "")]
    if (several := fanout.table(timings))[1]:
        shown = text_table(*several, width, fanout.RIGHT)
        parts += ["One trainer, several engines", shown, wrapped(fanout.LEGEND, width, "")]
    return "\n\n".join(filter(None, parts)).rstrip()


def _throughput_table(timings: Sequence[Timing], columns: Sequence[int], width: int) -> str:
    """These columns of the table, but for those in which nothing stands."""
    listed, head = [rows.throughput_row(timing) for timing in timings], rows.THROUGHPUT_HEAD
    used = [column for column in columns if any(row[column] not in ("", "-") for row in listed)]
    return text_table(
        [head[column] for column in used],
        [[row[column] for column in used] for row in listed],
        width,
        [place for place, column in enumerate(used) if column in rows.THROUGHPUT_RIGHT],
    )


def compare_text(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES, width: int = 100) -> str:
    """The verdict, environment, requirements that changed, timings."""
    sides = [f"{side}  {run.source}\n   {run.environment.line}" for side, run in (("A", found.a), ("B", found.b))]
    parts = [rows.compare_headline(found, causes), "\n".join(wrapped(line, width, "") for line in sides)]
    if found.differences:
        listed = [(name, *_where_apart(a, b)) for name, a, b in found.differences]
        parts.append(text_table(("environment", "A", "B"), listed, width))
    parts += _changes([change for change in found.told if change.kind not in LAST], width)
    parts.append(f"{units.counted(found.unchanged, 'requirement case')} unchanged." if found.requirements else "")
    parts += [_timings(found, width), *_changes([change for change in found.told if change.kind in LAST], width)]
    notes = [f"{run.source}: {note}" for run in (found.a, found.b) for note in run.notes]
    return "\n\n".join(part for part in [*parts, *notes] if part)


def _where_apart(a: str, b: str) -> tuple[str, str]:
    """The first lines that differ, of two texts that may have many, such as a topology."""
    pairs = zip_longest(a.split("\n"), b.split("\n"), fillvalue="")
    return next((" ".join(one.split()), " ".join(other.split())) for one, other in pairs if one != other)


def _changes(told: list[Change], width: int) -> list[str]:
    parts = []
    for kind in in_order(change.kind for change in told):
        lines = [f"{kind[0].upper()}{kind[1:]}:"]
        for name, detail, more in rows.grouped([change for change in told if change.kind == kind]):
            lines += [
                wrapped(name, width, "  "),
                message_text(detail, width),
                wrapped(more, width),
            ]
        parts.append("\n".join(filter(None, lines)))
    return parts


def _timings(found: Comparison, width: int) -> str:
    if not found.timings:
        return ""
    parts = [f"Timings: B's median over A's with its 95% interval, threshold {found.threshold * 100:.3g}%"]
    head = ("verdict", "model", "A", "B", "B/A", "p", "against roofline")
    for place in in_order(_place(change) for change in found.timings):
        listed = [_timing_line(change) for change in found.timings if _place(change) == place]
        table = text_table(head if place else ("verdict", "benchmark", *head[2:]), listed, width, (2, 3))
        parts.append(f"{wrapped(place, width, '')}\n{table}" if place else table)
    parts.append(wrapped(found.pause_meaning, width, ""))
    whys = [f"{change.verdict}: {change.label}: {change.why}" for change in found.timings if change.why]
    parts.append("\n".join(wrapped(why, width, "  ") for why in whys))
    for title, drift in rows.drifts(found):
        parts.append("\n".join([title, *(wrapped(line, width, "  ") for line in drift)]))
    parts.append(wrapped(found.pace_unknown, width, ""))
    return "\n\n".join(filter(None, parts))


def _place(change: TimingChange) -> str:
    timing = change.after or change.before
    return " ".join(filter(None, [timing.group, timing.subject, timing.stage]))


def _timing_line(change: TimingChange) -> tuple[str, ...]:
    row, timing = rows.timing_row(change), change.after or change.before
    model = " ".join(filter(None, [timing.model, timing.distinct]))
    return (row[0], model or change.label, row[2], row[3], row[4], row[5], row[8])
