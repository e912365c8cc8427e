"""Verdicts brought together: many cases to one cell, cells to requirements x subjects x stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from reports.load import Outcome, Run
from reports.units import counted

# The verdict of several cases is the first of these that any case has.
ORDER = ("fail", "error", "waived", "pass", "unsupported", "not-applicable")
FOUND_WANTING = ("fail", "error", "waived")  # told case by case, with their messages
NOT_JUDGED = ("unsupported", "not-applicable")
SYMBOL = {"pass": "✓", "fail": "✗", "waived": "~", "error": "!", "unsupported": "∅", "not-applicable": "-"}
MEANING = {
    "pass": "met",
    "fail": "not met",
    "waived": "not met, and known: a waiver lets it stand",
    "error": "the suite itself could not tell",
    "unsupported": "the subject declares that it lacks this",
    "not-applicable": "this machine or stage cannot run it",
}


@dataclass(frozen=True)
class Cell:
    """All cases behind one place of a table."""

    outcomes: tuple[Outcome, ...]

    @property
    def verdict(self) -> str:
        present = {outcome.verdict for outcome in self.outcomes}
        return next(verdict for verdict in ORDER if verdict in present)

    @property
    def counts(self) -> list[tuple[str, int]]:
        counted = Counter(outcome.verdict for outcome in self.outcomes)
        return [(verdict, counted[verdict]) for verdict in ORDER if verdict in counted]

    @property
    def passes(self) -> int:
        return dict(self.counts).get("pass", 0)

    @property
    def detail(self) -> str:
        """The messages of the cases that have this cell's verdict, each once."""
        return "\n".join(dict.fromkeys(o.told for o in self.outcomes if o.verdict == self.verdict and o.told))

    @property
    def cause(self) -> str:
        """The causes of the cases that have this cell's verdict, each once."""
        return "; ".join(dict.fromkeys(o.known_cause for o in self.outcomes if o.verdict == self.verdict))

    @property
    def level(self) -> str:
        return "MUST" if any(outcome.level == "MUST" for outcome in self.outcomes) else "SHOULD"


def cells(outcomes: Iterable[Outcome], *names: str) -> dict[tuple[str, ...], Cell]:
    """Group by the named attributes, in the order of first appearance."""
    grouped: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        grouped.setdefault(tuple(getattr(outcome, name) for name in names), []).append(outcome)
    return {key: Cell(tuple(group)) for key, group in grouped.items()}


def in_order(values: Iterable[str]) -> list[str]:
    """Each value once, in the order of first appearance."""
    return list(dict.fromkeys(values))


def legend(verdicts: Iterable[str]) -> list[str]:
    """The verdicts to explain beside a table; waived is explained only where the table has it."""
    present = set(verdicts)
    return [verdict for verdict in SYMBOL if verdict != "waived" or verdict in present]


def headline(run: Run) -> tuple[str, str]:
    """(verdict, sentence) of a whole run. A run that judged nothing, or has waived failures, does not pass."""
    found = cells(run.outcomes, "requirement", "level")
    failing = [cell for cell in found.values() if cell.verdict == "fail"]
    unsure = sum(any(outcome.verdict == "error" for outcome in cell.outcomes) for cell in found.values())
    met = sum(cell.verdict == "pass" for cell in found.values())
    waived = [cell for cell in found.values() if any(outcome.verdict == "waived" for outcome in cell.outcomes)]
    if not run.outcomes:
        return "not-applicable", "No requirement was judged: this file holds timings only."
    requirements = counted(len(found), "requirement")
    unsure_too = f"; {unsure} could not be judged" if unsure else ""
    waived_too = f"; {len(waived)} with waived failures" if waived else ""
    if failing:
        said = f"{len(failing)} of {requirements} not met ({_levels(failing)})"
        return "fail", f"{said}{unsure_too}{waived_too}; {met} met."
    if unsure:
        failed = waived_too or ", none failed"
        return "error", f"{unsure} of {requirements} could not be judged; {met} met{failed}."
    if waived:
        rest = f"; {others} not judged" if (others := len(found) - met - len(waived)) else ""
        said = f"{len(waived)} of {requirements} not met, which is waived ({_levels(waived)})"
        return "waived", f"{said}; {met} met{rest}."
    if not met:
        could = "The 1 requirement could not" if len(found) == 1 else f"None of {requirements} could"
        return "not-applicable", f"{could} be judged here."
    lacking = len(found) - met
    rest = f"; {lacking} not judged (unsupported or not applicable)" if lacking else ""
    judged = (
        "The 1 requirement that was judged is met" if met == 1 else f"All {met} requirements that were judged are met"
    )
    return "pass", f"{judged}{rest}."


def _levels(found: list[Cell]) -> str:
    must = sum(cell.level == "MUST" for cell in found)
    return f"{must} MUST, {len(found) - must} SHOULD"
