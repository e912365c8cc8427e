"""Two runs side by side: what newly fails or passes, what became slower or faster, and how certain that is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import median

from reports import pace, statistics
from reports.environment import differences
from reports.load import Run, Timing, UnusableInput
from reports.matrix import FOUND_WANTING, NOT_JUDGED, Cell, cells
from reports.pace import Against
from reports.pause import MEANING
from reports.statistics import Ratio

# What --fail-on may name. "failing" includes "failing-must".
CAUSES = {
    "failing": "a requirement that fails now, and passed or was waived before",
    "failing-must": "the same, MUST only",
    "error": "a requirement that the suite could judge before and cannot now",
    "lost": "a requirement that passed, or a benchmark that was measured, and is not any more",
    "waived": "a requirement that fails now, is waived, and did not fail before",
    "slower": "a benchmark slower beyond the threshold",
}
DEFAULT_CAUSES = ("failing", "error", "slower")
LAST = ("only in A", "only in B", "judged in neither")  # shown last: a run with other stages has many of these
BOUND = 0.5  # from this share of roofline on, drift of the hardware explains the time


@dataclass(frozen=True)
class Change:
    """One requirement, subject, stage and model in both runs; None where a run does not have it."""

    key: tuple[str, ...]
    before: Cell | None
    after: Cell | None

    @property
    def was(self) -> str:
        return self.before.verdict if self.before else "absent"

    @property
    def now(self) -> str:
        return self.after.verdict if self.after else "absent"

    @property
    def kind(self) -> str:
        if self.now == "waived":
            return "still failing (waived)" if self.was in ("fail", "waived") else "newly waived"
        if self.now == self.was:
            return "unchanged" if self.now != "fail" else "still failing"
        if {self.now, self.was} <= {"absent", *NOT_JUDGED}:
            return "judged in neither"
        if self.now == "fail":
            return "newly failing"
        if self.now == "error":
            return "newly in error"
        if self.after is None:
            return "only in A"
        if self.before is None:
            return "only in B"
        return {"pass": "newly passing"}.get(self.now, "no longer judged" if self.was == "pass" else "changed")

    @property
    def causes(self) -> set[str]:
        found = set()
        if self.kind == "newly failing":
            found = {"failing", "failing-must"} if self.after and self.after.level == "MUST" else {"failing"}
        elif self.kind == "newly in error":
            found = {"error"}
        elif self.kind == "newly waived":
            found = {"waived"}
        elif self.before and self.before.passes > (self.after.passes if self.after else 0):
            found = {"lost"}
        return found

    @property
    def detail(self) -> str:
        """The message of the later run, and how the number of cases changed, which no verdict shows."""
        text = (self.after or self.before).detail if self.kind != "unchanged" else ""
        return "\n".join(filter(None, [text, self._recount]))

    @property
    def cause(self) -> tuple[str, ...]:
        """(subject, cause) of a failure; empty for other changes, and where the number of cases changed."""
        failed = self.after and self.now in FOUND_WANTING and self.kind != "unchanged" and self.after.cause
        return (self.key[1], self.after.cause) if failed and not self._recount else ()

    @property
    def _recount(self) -> str:
        sides = (self.before, self.after)
        if not all(sides) or self.before.counts == self.after.counts or all(len(side.outcomes) == 1 for side in sides):
            return ""
        was, now = (", ".join(f"{count} {verdict}" for verdict, count in side.counts) for side in sides)
        return f"cases before: {was}; now: {now}"


@dataclass(frozen=True)
class TimingChange:
    """One benchmark in both runs. `judged_by` says whether seconds, the fraction of roofline, or both decided.

    `against_pace` takes the drift of the host's pace out, where both runs know that pace.
    """

    key: tuple[str, ...]
    before: Timing | None
    after: Timing | None
    verdict: str
    judged_by: str = "seconds"
    why: str = ""
    seconds: Ratio | None = None
    relative: Ratio | None = None
    roofline: Ratio | None = None
    against_pace: Against | None = None

    @property
    def causes(self) -> set[str]:
        return {"slower": {"slower"}, "only in A": {"lost"}}.get(self.verdict, set())

    @property
    def label(self) -> str:
        return (self.after or self.before).label


@dataclass(frozen=True)
class Comparison:
    """`differences` are (fact, in A, in B); `drift` has one entry for every roofline that both runs measured.

    `pace_drift` has one for every stage and call of which both runs know the host's pace.
    """

    a: Run
    b: Run
    threshold: float
    differences: list[tuple[str, str, str]]
    requirements: list[Change]
    timings: list[TimingChange]
    pace_drift: list[tuple[str, Ratio]]

    @property
    def told(self) -> list[Change]:
        """The changes to report; those that only one side has come last."""
        changed = [change for change in self.requirements if change.kind != "unchanged" or change.detail]
        return sorted(changed, key=lambda change: LAST.index(change.kind) if change.kind in LAST else -1)

    @property
    def unchanged(self) -> int:
        return sum(change.kind == "unchanged" for change in self.requirements)

    @property
    def drift(self) -> list[tuple[str, Ratio]]:
        timed = [change for change in self.timings if change.roofline and not change.after.pauses]
        return [(change.label, change.roofline) for change in timed]

    @property
    def pause_meaning(self) -> str:
        """What a pause is, where one is among the timings."""
        return f"{MEANING}." if any((c.after or c.before).pauses for c in self.timings) else ""

    @property
    def pace_unknown(self) -> str:
        """A note for stages on which both runs timed and one lacks the host's pace; empty where both have it."""
        stages = dict.fromkeys(c.after.stage for c in self.timings if c.before and c.after and c.after.stage)
        return pace.unknown(stages, self.a.environment.paces, self.b.environment.paces)

    @property
    def inconclusive(self) -> list[TimingChange]:
        return [change for change in self.timings if change.verdict == "inconclusive"]

    def worse(self, causes: tuple[str, ...] = DEFAULT_CAUSES) -> list[Change | TimingChange]:
        return [change for change in [*self.requirements, *self.timings] if change.causes & set(causes)]

    def exit_status(self, causes: tuple[str, ...] = DEFAULT_CAUSES, strict: bool = False) -> int:
        if self.worse(causes):
            return 1
        return 3 if strict and self.inconclusive else 0


def compare(a: Run, b: Run, threshold: float = statistics.THRESHOLD, across_machines: bool = False) -> Comparison:
    """Compare run B against run A. Raises UnusableInput for different hardware and for runs without common ground."""
    if not across_machines:
        same_hardware([a, b])
    judged_a, judged_b = (cells(run.outcomes, "requirement", "subject", "stage", "model") for run in (a, b))
    timed_a, timed_b = ({timing.key: timing for timing in run.figures} for run in (a, b))
    if not any(timing.pauses for timing in timed_a.values()):  # an older run: there is nothing to compare with
        timed_b = {key: timing for key, timing in timed_b.items() if not timing.pauses}
    if not (judged_a.keys() & judged_b.keys() or timed_a.keys() & timed_b.keys()):
        raise UnusableInput(b.source, "", f"expected results that {a.source} has too, found none in common")
    return Comparison(
        a,
        b,
        threshold,
        differences(a.environment, b.environment),
        [Change(key, judged_a.get(key), judged_b.get(key)) for key in {**judged_a, **judged_b}],
        [compare_timing(key, timed_a.get(key), timed_b.get(key), threshold) for key in {**timed_a, **timed_b}],
        pace.drifts(a.environment.paces, b.environment.paces, threshold),
    )


def same_hardware(runs: list[Run]) -> None:
    """Refuse runs of different machines: their times differ for reasons that are not vLLM's."""
    known = [run for run in runs if run.environment.hardware]
    for run in known[1:]:
        if run.environment.hardware != known[0].environment.hardware:
            expected = f"expected the hardware of {known[0].source}, {known[0].environment.hardware}"
            found = f"found {run.environment.hardware}; --across-machines compares all the same"
            raise UnusableInput(run.source, "environment", f"{expected}, {found}")


def compare_timing(key: tuple[str, ...], a: Timing | None, b: Timing | None, threshold: float) -> TimingChange:
    """Judge one benchmark: in seconds, against the roofline and against the host's pace."""
    if a is None or b is None:
        return TimingChange(key, a, b, "only in B" if a is None else "only in A")
    if a.failed or b.failed:
        side, failed = ("B", b.failed) if b.failed else ("A", a.failed)
        return TimingChange(key, a, b, "not compared", why=f"the test that timed it ended in {failed} in {side}")
    seconds = statistics.compare(a.samples_s, b.samples_s, threshold)
    relative = roofline = None
    bound, judged = False, (seconds.verdict, "seconds", seconds.why)
    if a.roofline_samples_s and b.roofline_samples_s:
        rooflines = a.roofline_samples_s, b.roofline_samples_s
        roofline = statistics.compare(*rooflines, threshold)
        relative = statistics.compare_relative(a.samples_s, rooflines[0], b.samples_s, rooflines[1], threshold)
        bound = min(map(_share, (a, b))) >= BOUND
        judged = _judged(seconds, relative, roofline, bound)
    against_pace = None if bound else pace.against(a, b, threshold)
    if against_pace and (doubt := against_pace.doubt(seconds)):
        judged = "inconclusive", "seconds and the host's pace", doubt
    return TimingChange(key, a, b, *judged, seconds, relative, roofline, against_pace)


def _share(timing: Timing) -> float:
    """The share of the time that the hardware needs for the bytes alone."""
    return median(timing.roofline_samples_s) / (median(timing.samples_s) or math.inf)


def _judged(seconds: Ratio, relative: Ratio, roofline: Ratio, bound: bool) -> tuple[str, str, str]:
    """(verdict, what decided, why). Where the hardware drifted, the fraction of roofline decides a time `bound` by it.

    Where the time is not bound, or the drift is unsure, the verdicts in seconds and against the roofline have to agree.
    """
    if roofline.verdict == "same" or seconds.verdict == relative.verdict:
        return seconds.verdict, "seconds", seconds.why
    if roofline.verdict != "inconclusive" and bound:
        return relative.verdict, "fraction of roofline", relative.why or f"the roofline itself is {roofline.verdict}"
    if seconds.verdict == "inconclusive" or (seconds.verdict, relative.verdict) == ("same", "inconclusive"):
        return seconds.verdict, "seconds", seconds.why
    if roofline.verdict != "inconclusive":
        far = f"{relative.verdict} against a roofline that is {roofline.verdict} and far from what the update takes"
        return "inconclusive", "both", f"{seconds.verdict} in seconds, {far}"
    told = f"{seconds.verdict} in seconds, {relative.verdict} against a roofline that is itself unsure"
    return "inconclusive", "both", f"{told}: of it, {roofline.why}" if roofline.more else told
