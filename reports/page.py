"""Self-contained HTML pages: no network, no script; light or dark as the reader has it, on a phone and in print."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import fanout, plots, rows, spent, trend, units
from reports.compare import DEFAULT_CAUSES, Change, Comparison, compare
from reports.load import Run
from reports.matrix import MEANING, SYMBOL, Cell, cells, headline, in_order, legend
from reports.message import parts
from reports.pause import LEGEND

if TYPE_CHECKING:
    from jinja2 import Environment
    from matplotlib.figure import Figure


def run_page(run: Run) -> str:
    """The page of one run: verdict, requirements, throughput, time split, environment."""
    verdict, sentence = headline(run)
    head, timings = rows.throughput_table(run.timings)
    return _render(
        "run.html",
        title=f"Weight sync into vLLM {run.environment.vllm}".strip(),
        verdict=verdict,
        sentence=sentence,
        runs=[run],
        notes=_notes([run]),
        matrix=matrix(run),
        failures=rows.failures(run),
        pace=rows.pace_lines(run),
        throughput=_plots(plots.throughput(run), "throughput", "GB/s against model size, with the roofline"),
        steps=_plots(plots.steps(run), "steps", "Time of an update split by step"),
        head=head,
        timings=timings,
        several=fanout.table(run.timings),
        several_legend=fanout.LEGEND,
        paused=LEGEND if any(timing.pause for timing in run.timings) else "",
        spent=spent.table(run.timings),
        spent_title=spent.TITLE,
        spent_legend=spent.LEGEND,
        timeline=rows.time_spent(run),
    )


def compare_page(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES) -> str:
    """The page of a comparison: verdict, environment differences, requirements that changed, timings."""
    return _render(
        "compare.html",
        title=f"From {found.a.label} to {found.b.label}",
        verdict=_compare_verdict(found, causes),
        sentence=rows.compare_headline(found, causes),
        runs=[found.a, found.b],
        notes=_notes([found.a, found.b]),
        found=found,
        changes=_rows([change for change in found.told if change.kind != "judged in neither"]),
        judged_in_neither=rows.grouped(change for change in found.told if change.kind == "judged in neither"),
        timings=[(change, rows.timing_row(change)) for change in found.timings],
        drift=rows.roofline_drift(found),
        pace_drift=rows.pace_drift(found),
        paused=found.pause_meaning,
        trend=_plots(plots.trend([found.a, found.b]), "trend", "Seconds of both runs"),
    )


def _rows(changes: list[Change]) -> list[tuple[Change, str]]:
    """(a change, a line that counts others of its cause): of several that have one cause the first alone."""
    groups = rows.causes_of(changes)
    return [(change, more) for group, more in groups for change in (group[:1] if more else group)]


def _compare_verdict(found: Comparison, causes: tuple[str, ...]) -> str:
    if found.worse(causes):
        return "fail"
    if found.inconclusive:
        return "inconclusive"
    return "waived" if any(change.kind == "newly waived" for change in found.requirements) else "pass"


def trend_page(runs: Sequence[Run], threshold: float) -> str:
    """The page of several runs: what fails where, the times with intervals, each step's comparison with the last."""
    steps = [compare(a, b, threshold, across_machines=True) for a, b in pairwise(runs)]
    return _render(
        "trend.html",
        title=f"From {runs[0].label} to {runs[-1].label}",
        verdict=headline(runs[-1])[0],
        sentence=f"{runs[-1].label}: {headline(runs[-1])[1]}",
        runs=runs,
        notes=_notes(runs),
        steps=steps,
        step_lines=[rows.compare_headline(step) for step in steps],
        step_paces=[rows.pace_drift(step) for step in steps],
        found=[cells(run.outcomes, "requirement") for run in runs],
        requirements=in_order(outcome.requirement for run in runs for outcome in run.outcomes),
        trend=_plots(plots.trend(runs), "trend", "Seconds over versions, with intervals"),
        legend_of_times=trend.legend(runs),
        timings=trend.seconds_rows(runs, threshold, intervals=True),
        paces=trend.pace_rows(runs, threshold),
    )


def matrix(run: Run) -> dict[str, Any]:
    """Requirements by subject and stage: `columns` of (subject, [stages]), `rows` of (name, level, text, cells).

    A stage on which no case of a subject could run has no column; `left_out` says why: {reason: number of cases}.
    """
    held = {(o.subject, o.stage) for o in run.outcomes if o.verdict != "not-applicable"}
    held = held or {(o.subject, o.stage) for o in run.outcomes}
    left_out = Counter(o.detail or "no reason given" for o in run.outcomes if (o.subject, o.stage) not in held)
    columns = [
        (subject, in_order(o.stage for o in run.outcomes if o.subject == subject and (subject, o.stage) in held))
        for subject in in_order(outcome.subject for outcome in run.outcomes)
    ]
    columns = [(subject, stages) for subject, stages in columns if stages]
    found = cells(run.outcomes, "requirement", "subject", "stage")
    listed = []
    for (name,), cell in cells(run.outcomes, "requirement").items():
        row: list[Cell | None] = [found.get((name, subject, stage)) for subject, stages in columns for stage in stages]
        listed.append((name, cell.level, cell.outcomes[0].text, row))
    return {"columns": columns, "rows": listed, "left_out": left_out}


def _notes(runs: Sequence[Run]) -> list[str]:
    return [f"{run.source}: {note}" for run in runs for note in run.notes]


def _breakable(name: str) -> str:
    """A dotted name that a narrow column may break at its dots and underscores."""
    from markupsafe import Markup, escape

    return Markup(str(escape(units.plain(name))).replace(".", ".<wbr>").replace("_", "_<wbr>"))


def _fact_names(runs: Sequence[Run]) -> list[str]:
    return in_order(name for run in runs for name, _ in run.environment.facts)


def _plots(figures: list[Figure], name: str, title: str) -> list[str]:
    from markupsafe import Markup  # what matplotlib writes is escaped already

    return [Markup(plots.inline_svg(sheet, f"{name}{i}", title)) for i, sheet in enumerate(figures)]


def _render(template: str, **values: Any) -> str:
    return _templates().get_template(template).render(values)


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    where = FileSystemLoader(Path(__file__).parent / "templates")
    found = Environment(loader=where, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.globals |= {
        "SYMBOL": SYMBOL | {"inconclusive": rows.VERDICT_SYMBOL["inconclusive"]},
        "MEANING": MEANING,
        "legend_of": lambda runs: legend(outcome.verdict for run in runs for outcome in run.outcomes),
        "dark": plots.DARK,
        "light": plots.LIGHT,
    }
    found.filters |= {
        "plain": units.plain,
        "parts": parts,
        "dict": dict,
        "breakable": _breakable,
        "counted": units.counted,
        "fact_names": _fact_names,
    }
    return found
