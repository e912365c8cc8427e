"""A run or a comparison for other programs: CSV, Markdown, JUnit."""

from __future__ import annotations

import csv
import io
from xml.etree import ElementTree

from reports import fanout, rows, statistics, units
from reports.compare import DEFAULT_CAUSES, LAST, Change, Comparison, TimingChange
from reports.load import Run
from reports.matrix import SYMBOL, headline, in_order
from reports.table import markdown, markdown_table

CASE = ("requirement", "level", "subject", "stage", "model", "verdict", "detail", "duration_s", "waiver_issue",
        "waiver_reason", "repeat")  # fmt: skip
TIMING = ("group", "subject", "stage", "model", "name", "bytes_sent", "tensors", "parameters", "median_s", "gb_per_s",
          "roofline_kind", "roofline_gb_per_s", "fraction_of_roofline", "engine_peak_extra_bytes",
          "trainer_peak_extra_bytes")  # fmt: skip
INTERVAL = ("samples", "low_s", "high_s")
PAUSE = ("pause_s", "over_s", "token_s")


def run_csv(run: Run) -> str:
    """One line for each judged case and each benchmark, told apart by the column `kind`."""
    stream = io.StringIO()
    names = ["kind", *in_order([*CASE, *TIMING, *INTERVAL, *PAUSE])]
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    for outcome in run.outcomes:
        writer.writerow({"kind": "conformance", **{name: getattr(outcome, name) for name in CASE}})
    for timing in run.timings:
        low, high = statistics.median_interval(timing.samples_s) if timing.samples_s else ("", "")
        counted = {"samples": len(timing.samples_s), "low_s": low, "high_s": high}
        paused = dict(zip(PAUSE, timing.pause.medians_s, strict=True)) if timing.pause else {}
        row = {name: getattr(timing, name) for name in TIMING} | counted | paused
        writer.writerow({"kind": "benchmark", "verdict": timing.failed, **row})
    return stream.getvalue()


def run_markdown(run: Run) -> str:
    """The run's verdict, its cases, its throughput, and notes about the file."""
    verdict, sentence = headline(run)
    parts = [f"**{SYMBOL[verdict]} {markdown(sentence)}**", markdown(run.environment.line)]
    if run.outcomes:
        listed = [
            (o.requirement, o.level, o.subject, o.stage, o.model, f"{SYMBOL[o.verdict]} {o.verdict}", o.told)
            for o in run.outcomes
        ]
        parts.append(markdown_table(("requirement", "level", "subject", "stage", "model", "verdict", "detail"), listed))
    if run.timings:
        parts.append(markdown_table(*rows.throughput_table(run.timings), rows.THROUGHPUT_RIGHT))
    if (several := fanout.table(run.timings))[1]:
        parts.append(markdown_table(*several, fanout.RIGHT))
    parts += [markdown(note) for note in run.notes]
    return "\n\n".join(parts) + "\n"


def compare_markdown(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES) -> str:
    """A comment for a pull request: the verdict and what changed; the rest folded away."""
    sides = "\n".join(f"- {s}: {markdown(f'{r.source}: {r.environment.line}')}" for s, r in _sides(found))
    parts = [f"### {markdown(rows.compare_headline(found, causes))}", sides]
    if found.differences:
        parts.append(_folded("Environment differences", markdown_table(("", "A", "B"), found.differences)))
    changed = [change for change in found.told if change.kind not in LAST]
    if changed:
        listed = [row for group, more in rows.causes_of(changed) for row in _rows(group, more)]
        head = ("what", "requirement", "subject", "stage", "model", "A → B", "detail")
        parts.append(markdown_table(head, listed))
    if found.requirements:
        parts.append(f"{found.unchanged} requirement cases unchanged.")
    for kind in LAST:
        lines = rows.grouped(change for change in found.told if change.kind == kind)
        listed = "\n".join(_bullet(": ".join(filter(None, line))) for line in lines)
        parts += [_folded(f"{kind[0].upper()}{kind[1:]}", listed)] if lines else []
    moved = [change for change in found.timings if change.verdict != "same"]
    parts += [_timings(moved)] if moved else []
    same = [change for change in found.timings if change.verdict == "same"]
    parts += [_folded(f"{units.counted(len(same), 'benchmark')} the same", _timings(same))] if same else []
    parts += [_folded(title, "\n".join(f"- {markdown(line)}" for line in drift)) for title, drift in rows.drifts(found)]
    parts += [markdown(found.pace_unknown)] if found.pace_unknown else []
    return "\n\n".join(parts) + "\n"


def compare_junit(found: Comparison, causes: tuple[str, ...] = DEFAULT_CAUSES) -> str:
    """A test case for each requirement case and benchmark: failed where `causes` counts it, skipped where unsure."""
    suite = ElementTree.Element("testsuite", name=f"{found.a.label} against {found.b.label}")
    counts = {"tests": 0, "failures": 0, "skipped": 0, "errors": 0}
    for change in [*found.requirements, *found.timings]:
        kind, name, message, detail = _told(change)
        case = ElementTree.SubElement(suite, "testcase", classname=kind, name=units.plain(name), time="0")
        outcome = "failures" if change.causes & set(causes) else "skipped" if _unsure(change) else ""
        counts["tests"] += 1
        if outcome:
            counts[outcome] += 1
            tag = "failure" if outcome == "failures" else "skipped"
            ElementTree.SubElement(case, tag, message=units.plain(message)).text = units.plain(detail)
    suite.attrib |= {name: str(count) for name, count in counts.items()}
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _told(change: Change | TimingChange) -> tuple[str, str, str, str]:
    if isinstance(change, Change):
        name = " ".join(filter(None, change.key[1:])) or change.key[0]
        return f"conformance.{change.key[0]}", name, f"{change.kind}: {change.was} -> {change.now}", change.detail
    row = rows.timing_row(change)
    message = f"{change.verdict}: {row[2]} -> {row[3]} {row[4]}, judged by {change.judged_by}"
    group = (change.after or change.before).group
    return f"benchmark.{group or 'benchmark'}", change.label, message, change.why


def _unsure(change: Change | TimingChange) -> bool:
    if isinstance(change, Change):
        return change.now not in ("pass", "fail", "error")
    return change.verdict in ("inconclusive", "not compared", "only in A", "only in B")


def _rows(group: list[Change], more: str) -> list[tuple[str, ...]]:
    """A row for each change. Changes with one cause share the row of the first, which counts the others."""
    listed = [(change.kind, *change.key, f"{change.was} → {change.now}", change.detail) for change in group]
    return [(*listed[0][:-1], f"{listed[0][-1]}\n{more}")] if more else listed


def _timings(changes: list[TimingChange]) -> str:
    head = ("verdict", "benchmark", "A", "B", "B/A [95%]", "p", "of roof A", "of roof B", "B/A against roof",
            "B/A against pace", "note")  # fmt: skip
    listed = [(*row[:9], row[10], change.why) for change in changes for row in [rows.timing_row(change)]]
    return markdown_table(head, listed, (2, 3, 6, 7))


def _bullet(line: str) -> str:
    return "* " + ("\\" if line.startswith("-") else "") + markdown(line)  # where "- " is a symbol, not a list


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n\n</details>"


def _sides(found: Comparison) -> tuple[tuple[str, Run], tuple[str, Run]]:
    return ("A", found.a), ("B", found.b)
