"""Several versions side by side: which requirements each fails, and how long an update takes in each."""

from __future__ import annotations

from collections.abc import Sequence

from reports import statistics, units
from reports.compare import compare_timing
from reports.load import Run, Timing
from reports.matrix import SYMBOL, Cell, cells
from reports.table import markdown_table, text_table, wrapped

TIMING_HEAD = ("benchmark", "run", "median", "95% interval", "n", "GB/s", "roofline", "of it", "against the one before")


def requirement_rows(runs: Sequence[Run], all_of_them: bool = False) -> list[tuple[str, ...]]:
    """(requirement, verdict in each run) of those that any run fails or cannot judge, or of all."""
    found = [cells(run.outcomes, "requirement") for run in runs]
    rows = []
    for key in dict.fromkeys(key for judged in found for key in judged):
        row = [judged.get(key) for judged in found]
        if all_of_them or any(cell and cell.verdict in ("fail", "error") for cell in row):
            rows.append((*key, *(_counted(cell) for cell in row)))
    return rows


def timing_rows(runs: Sequence[Run], threshold: float = statistics.THRESHOLD) -> list[tuple[str, ...]]:
    """The cells of TIMING_HEAD for every benchmark in every run that has it, a benchmark's runs together."""
    rows = []
    for key in dict.fromkeys(timing.key for run in runs for timing in run.timings):
        before: Timing | None = None
        for run in runs:
            for timing in (timing for timing in run.timings if timing.key == key):
                rows.append((timing.label, run.label, *_timing_cells(timing, before, threshold)))
                before = timing
    return rows


def seconds_rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """One row a benchmark: seconds, GB/s and fraction of roofline in each run."""
    rows = []
    for key in dict.fromkeys(timing.key for run in runs for timing in run.timings):
        found = [next((timing for timing in run.timings if timing.key == key), None) for run in runs]
        label = next(timing.label for timing in found if timing)
        rows.append((label, *(_brief(timing) for timing in found)))
    return rows


def trend_text(runs: Sequence[Run], threshold: float = statistics.THRESHOLD, width: int = 100) -> str:
    """What any run fails, then every benchmark over the runs."""
    labels = [run.label for run in runs]
    failing = requirement_rows(runs)
    parts = [text_table(("requirement", *labels), failing, width)] if failing else ["No run fails a requirement."]
    head = ("median seconds", *labels)
    rows = [(row[0], *(cell.split(",")[0] for cell in row[1:])) for row in seconds_rows(runs)]
    parts += [text_table(head, rows, width, range(1, len(head)))] if rows else []
    moved = [row for row in timing_rows(runs, threshold) if row[-1].split(" ")[0] in ("slower", "faster")]
    parts += [wrapped(f"{row[-1]}: {row[0]} at {row[1]}", width, "") for row in moved]
    return "\n\n".join(parts[:2]) + ("\n\n" + "\n".join(parts[2:]) if parts[2:] else "")


def markdown_tables(runs: Sequence[Run]) -> str:
    """The two tables for a README."""
    labels = [run.label for run in runs]
    parts = []
    if any(run.outcomes for run in runs):
        met = [sum(cell.verdict == "pass" for cell in cells(run.outcomes, "requirement").values()) for run in runs]
        totals = [len(cells(run.outcomes, "requirement")) for run in runs]
        summary = ("requirements met", *(f"{count} of {total}" for count, total in zip(met, totals, strict=True)))
        parts.append(markdown_table(("requirement", *labels), [*requirement_rows(runs), summary]))
    if any(run.timings for run in runs):
        parts.append(markdown_table(("update: seconds, GB/s, of roofline", *labels), seconds_rows(runs), range(1, 99)))
    return "\n\n".join(parts)


def _counted(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    count = dict(cell.counts)[cell.verdict]
    return f"{SYMBOL[cell.verdict]} {cell.verdict}" + (f" {count}/{len(cell.outcomes)}" if cell.verdict != "pass" else "")


def _brief(timing: Timing | None) -> str:
    if timing is None:
        return "-"
    speed = [f"{units.rate(timing.gb_per_s)} GB/s", units.percent(timing.fraction_of_roofline)]
    return ", ".join([units.seconds(timing.median_s), *(part for part in speed if not part.startswith("-"))])


def _timing_cells(timing: Timing, before: Timing | None, threshold: float) -> tuple[str, ...]:
    low_high = [units.seconds(bound) for bound in statistics.median_interval(timing.samples_s)] if timing.samples_s else []
    moved = ""
    if before:
        found = compare_timing(timing.key, before, timing, threshold)
        moved = f"{found.verdict} {units.ratio(found.seconds)}"
    return (
        units.seconds(timing.median_s),
        " - ".join(low_high) or "-",
        str(len(timing.samples_s) or "-"),
        units.rate(timing.gb_per_s),
        units.rate(timing.roofline_gb_per_s),
        units.percent(timing.fraction_of_roofline),
        moved,
    )
