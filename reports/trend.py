"""Several versions side by side: which requirements each fails, and how long an update takes in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from reports import statistics, units
from reports.compare import TimingChange, compare_timing
from reports.load import Run, Timing
from reports.matrix import FOUND_WANTING, SYMBOL, Cell, cells
from reports.pause import MEANING
from reports.rows import VERDICT_SYMBOL
from reports.table import markdown_table, text_table, wrapped

PACE = "the host's pace"
LEGEND = (
    "▲ slower, ▼ faster than the run before it, significantly and beyond the threshold; "
    "? open: the hardware or the host drifted too."
)


def requirement_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """(requirement, verdict in each run) of those that a run fails, waived or not, or cannot judge."""
    found = [cells(run.outcomes, "requirement") for run in runs]
    rows = []
    for key in dict.fromkeys(key for judged in found for key in judged):
        row = [judged.get(key) for judged in found]
        if any(cell and cell.verdict in FOUND_WANTING for cell in row):
            rows.append((*key, *(_counted(cell) for cell in row)))
    return rows


def met_row(runs: Sequence[Run]) -> tuple[str, ...]:
    """How many requirements each run meets, of how many that it knows."""
    found = [[cell.verdict for cell in cells(run.outcomes, "requirement").values()] for run in runs]
    return ("requirements met", *(f"{verdicts.count('pass')} of {len(verdicts)}" for verdicts in found))


def seconds_rows(
    runs: Sequence[Run], threshold: float = statistics.THRESHOLD, intervals: bool = False
) -> list[tuple[str, ...]]:
    """One row a benchmark: seconds, GB/s and fraction of roofline in each run, marked where it became slower.

    A pause has a row of its own, after the row of its update. Benchmarks of one subject and stage stand together, small
    models first; a run may lack some of them.
    """
    rows = []
    for key in _ordered(timing for run in runs for timing in run.figures):
        found = [next((timing for timing in run.figures if timing.key == key), None) for run in runs]
        label = next(timing.label for timing in found if timing)
        befores = [None, *found]  # what is missing in one run is not compared over the gap
        rows.append(
            (label, *(_brief(t, before, threshold, intervals) for t, before in zip(found, befores, strict=False)))
        )
    return rows


def pace_rows(runs: Sequence[Run], threshold: float = statistics.THRESHOLD) -> list[tuple[str, ...]]:
    """One row for each stage and call: what the host itself took in each run, marked where it became slower or faster.

    No rows where no run has measured it.
    """
    known = [{(stage, call): s for stage, pace in run.environment.paces for call, s in pace.calls} for run in runs]
    rows = []
    for place in dict.fromkeys(place for paces in known for place in paces):
        found = [paces.get(place) for paces in known]
        befores = [None, *found]
        rows.append(
            (" ".join(place), *(_pace(s, before, threshold) for s, before in zip(found, befores, strict=False)))
        )
    return rows


def trend_text(runs: Sequence[Run], threshold: float = statistics.THRESHOLD, width: int = 100) -> str:
    """What any run fails, then every benchmark over the runs."""
    labels = [run.label for run in runs]
    failing = requirement_rows(runs)
    parts = [text_table(("requirement", *labels), failing, width)] if failing else ["No run fails a requirement."]
    head = ("median seconds", *labels)
    rows = [(row[0], *(cell.split(", ")[0] for cell in row[1:])) for row in seconds_rows(runs, threshold)]
    parts += [text_table(head, rows, width, range(1, len(head)))] if rows else []
    paces = pace_rows(runs, threshold)
    parts += [text_table((PACE, *labels), paces, width, range(1, len(head)))] if paces else []
    return "\n\n".join([*parts, *([wrapped(legend(runs), width, "")] if rows or paces else [])])


def markdown_tables(runs: Sequence[Run], threshold: float = statistics.THRESHOLD) -> str:
    """What fails, the times and the host's pace, as tables for a page of text."""
    labels = [run.label for run in runs]
    parts = []
    if any(run.outcomes for run in runs):
        parts.append(markdown_table(("requirement", *labels), [*requirement_rows(runs), met_row(runs)]))
    if any(run.timings for run in runs):
        head = ("median time, GB/s, of roofline", *labels)
        parts += [markdown_table(head, seconds_rows(runs, threshold), range(1, len(head)))]
        paces = pace_rows(runs, threshold)
        parts += [markdown_table((PACE, *labels), paces, range(1, len(head)))] if paces else []
        parts.append(legend(runs))
    return "\n\n".join(parts)


def legend(runs: Sequence[Run]) -> str:
    """What the marks at times mean, and what a pause is where one is shown."""
    paused = any(timing.pause for run in runs for timing in run.timings)
    return f"{LEGEND} {MEANING}." if paused else LEGEND


def _ordered(timings: Iterable[Timing]) -> list[tuple[str, ...]]:
    """The keys of these timings, each once."""
    first: dict[tuple[str, ...], Timing] = {}
    for timing in timings:
        first.setdefault(timing.key, timing)
    places = list(dict.fromkeys(key[:3] for key in first))
    return sorted(first, key=lambda key: (places.index(key[:3]), first[key].parameters or 0))


def _counted(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    share = f" {dict(cell.counts)[cell.verdict]}/{len(cell.outcomes)}" if cell.verdict != "pass" else ""
    return f"{SYMBOL[cell.verdict]} {cell.verdict}{share}"


def _pace(samples_s: tuple[float, ...] | None, before: tuple[float, ...] | None, threshold: float) -> str:
    if samples_s is None:
        return "-"
    verdict = statistics.compare(before, samples_s, threshold).verdict if before else ""
    moved = f"{VERDICT_SYMBOL[verdict]} " if verdict in ("slower", "faster") else ""
    return moved + units.seconds(median(samples_s))


def _marked(change: TimingChange) -> bool:
    """Whether a timing became slower or faster, or drift leaves that open. A lack of samples gets no mark."""
    drifted = change.verdict == "inconclusive" and change.judged_by != "seconds"
    return drifted or change.verdict in ("slower", "faster")


def _brief(timing: Timing | None, before: Timing | None, threshold: float, intervals: bool) -> str:
    if timing is None:
        return "-"
    change = compare_timing(timing.key, before, timing, threshold) if before else None
    moved = f"{VERDICT_SYMBOL[change.verdict]} " if change and _marked(change) else ""
    low_high = map(units.seconds, statistics.median_interval(timing.samples_s)) if timing.samples_s else ()
    interval = f" [{', '.join(low_high)}]" if intervals and timing.samples_s else ""
    speed = [f"{units.rate(timing.gb_per_s)} GB/s", units.percent(timing.fraction_of_roofline)]
    shown = moved + units.seconds(timing.median_s) + interval
    return ", ".join([shown, *(part for part in speed if not part.startswith("-"))])
