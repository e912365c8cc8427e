"""What becomes of a test that has ended: its verdict, its entry in run.json, and what a failure shows."""

from dataclasses import replace
from typing import Any

import pytest

from suite.driver.patience import GivenUp
from suite.session import options, verdicts
from suite.session.items import case_of, examines, names_of, params_of
from suite.session.record import TRIED
from suite.session.selection import requirement_of
from suite.session.state import Progress, State, state_of
from suite.session.verdicts import Judgement

LOG_LINES = 40
TO_REPEAT = (verdicts.FAIL, verdicts.ERROR, verdicts.WAIVED)
MEASURING = "benchmark"  # what stands for the requirement where a measurement failed
MEASURED = "What is measured is verified before it is timed."


def take(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Judge one phase of a test, and have pytest's report of it show what helps."""
    state = state_of(item.config)
    progress = state.progress[item.nodeid]
    judgement = _judgement(item, call, state)
    progress.judgement = progress.judgement.then(judgement)
    progress.duration_s += call.duration if call.when == "call" else 0
    if call.excinfo and isinstance(call.excinfo.value, GivenUp):
        report.when = "call"  # a fail to pytest too, though no fixture was set up for it
    if report.failed:
        report.sections += [*_logs(state, progress), *([_clause(item, judgement)] if examines(item) else [])]
    if judgement.verdict == verdicts.WAIVED:  # to pytest, what it knows as an expected failure
        report.outcome, report.waived = "skipped", True
        reason = progress.waiver.reason.removesuffix(".")
        report.wasxfail = f"waived: {reason} ({progress.waiver.issue})\n{judgement.detail}"
    if call.when == "teardown" and state.record and examines(item):
        _put_down(item, state, progress)


def _judgement(item: pytest.Item, call: pytest.CallInfo[None], state: State) -> Judgement:
    """The verdict of a phase; a fail that a waiver covers is waived."""
    judgement = verdicts.judge(call.when, call.excinfo.value if call.excinfo else None)
    case = case_of(item) if state.waivers and judgement.verdict == verdicts.FAIL else None
    if case and (waiver := state.waivers.waiver_of(case)):
        state.progress[item.nodeid].waiver = waiver
        return replace(judgement, verdict=verdicts.WAIVED)
    return judgement


def _logs(state: State, progress: Progress) -> list[tuple[str, str]]:
    """The ends of the logs of the processes that a test has used."""
    processes = state.launcher.processes if state.launcher else []
    return [(f"end of {p.log_path}", p.tail(LOG_LINES)) for p in processes if p.used_s >= progress.began_s]


def _clause(item: pytest.Item, judgement: Judgement) -> tuple[str, str]:
    """The clause, what was expected and found, and a command that repeats the case, a line each."""
    name, level, text = _clause_of(item)
    lines = [f"clause: {name} ({level}): {text}", judgement.detail, f"repeat: {options.repeating(item)}"]
    return f"{judgement.verdict}: {name}", "\n".join(lines)


def _clause_of(item: pytest.Item) -> tuple[str, str, str]:
    """The id, level and text of what a test judges; of measuring where it judges no requirement."""
    requirement = requirement_of(item)
    return (requirement.id, requirement.level, requirement.text) if requirement else (MEASURING, "MUST", MEASURED)


def _put_down(item: pytest.Item, state: State, progress: Progress) -> None:
    """Add the verdict to the record and write that: what comes next may end the run.

    What is not applicable waits for the next write: a machine of one GPU has a thousand such cases, and a write takes
    as long as judging a quick one.
    """
    judgement = progress.judgement
    state.verdicts["stage" in params_of(item), judgement.verdict] += 1
    if state.waivers and (case := case_of(item)):
        state.waivers.ended(case, judgement.verdict)
    if requirement_of(item) or judgement.verdict in (verdicts.FAIL, verdicts.ERROR):
        state.record.conformance.append(_entry(item, progress))
    if judgement.verdict != verdicts.NOT_APPLICABLE:
        state.record.write()


def _entry(item: pytest.Item, progress: Progress) -> dict[str, Any]:
    """What run.json says of a case.

    Where a requirement is not met, or cannot be told, also `repeat`, a command that judges the case again, and `calls`,
    what an update consists of.
    """
    judgement, waiver = progress.judgement, progress.waiver
    entry = {
        **dict(zip(("requirement", "level", "text"), _clause_of(item), strict=True)),
        **names_of(item),
        "verdict": judgement.verdict,
        "detail": judgement.detail,
        **({"cause": judgement.cause} if judgement.cause else {}),
        "duration_s": round(progress.duration_s, 3),
        "nodeid": item.nodeid,
        **(_to_repeat(item) if judgement.verdict in TO_REPEAT else {}),
        **({"tried": item.stash[TRIED]} if TRIED in item.stash else {}),
    }
    if judgement.verdict == verdicts.WAIVED:
        entry |= {"waiver_issue": waiver.issue, "waiver_reason": waiver.reason}
    return entry


def _to_repeat(item: pytest.Item) -> dict[str, Any]:
    calls = getattr(params_of(item).get("subject"), "calls", ())
    return {"repeat": options.repeating(item), **({"calls": [*calls]} if calls else {})}
