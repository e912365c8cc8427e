"""Verdicts brought together: many cases to one cell, cells to requirements x subjects x stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from reports.load import Outcome, Run

# One verdict stands for several cases: the first of these that any of them has.
ORDER = ("fail", "error", "pass", "unsupported", "not-applicable")
SYMBOL = {"pass": "✓", "fail": "✗", "error": "!", "unsupported": "∅", "not-applicable": "-"}
MEANING = {
    "pass": "met",
    "fail": "not met",
    "error": "the suite itself could not tell",
    "unsupported": "the subject declares that it lacks this",
    "not-applicable": "this machine or stage cannot hold it",
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
        """What the cases that decided say, each text once."""
        return "\n".join(dict.fromkeys(o.detail for o in self.outcomes if o.verdict == self.verdict and o.detail))

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


def headline(run: Run) -> tuple[str, str]:
    """(verdict, sentence) of a whole run. A run in which nothing was judged is no pass."""
    found = cells(run.outcomes, "requirement", "level")
    failing = [cell for cell in found.values() if cell.verdict == "fail"]
    must = sum(cell.level == "MUST" for cell in failing)
    unsure = sum(any(outcome.verdict == "error" for outcome in cell.outcomes) for cell in found.values())
    met = sum(cell.verdict == "pass" for cell in found.values())
    if not run.outcomes:
        return "not-applicable", "No requirement was judged: this file holds timings only."
    unsure_too = f"; {unsure} could not be judged" if unsure else ""
    if failing:
        levels = f"{must} MUST, {len(failing) - must} SHOULD"
        return "fail", f"{len(failing)} of {len(found)} requirements not met ({levels}){unsure_too}; {met} met."
    if unsure:
        return "error", f"{unsure} of {len(found)} requirements could not be judged; {met} met, none failed."
    if not met:
        return "not-applicable", f"None of {len(found)} requirements could be judged here."
    lacking = len(found) - met
    rest = f"; {lacking} not judged (unsupported or not applicable)" if lacking else ""
    return "pass", f"All {met} requirements that were judged are met{rest}."
