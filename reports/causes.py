"""Failures of one subject grouped by their cause, so that the first is told in full and the rest are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

from reports.load import Outcome

Case = TypeVar("Case")


def by_cause(outcomes: Iterable[Outcome]) -> list[list[Outcome]]:
    """Group cases by subject, verdict and cause, in the order of first appearance."""
    return together(outcomes, _key)


def together(cases: Iterable[Case], key: Callable[[Case], Hashable]) -> list[list[Case]]:
    """Group cases by their key, in the order of first appearance."""
    groups: dict[Hashable, list[Case]] = {}
    for case in cases:
        groups.setdefault(key(case), []).append(case)
    return list(groups.values())


def and_more(requirements: Iterable[str]) -> str:
    """A line that counts the further cases of a cause: "and 3 more: update.exact (2), update.order"; empty for none."""
    counted = Counter(requirements)
    named = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in counted.items())
    return f"and {counted.total()} more: {named}" if counted else ""


def _key(outcome: Outcome) -> tuple[str, ...]:
    """Cases without a message have no known cause, so each requirement's stay apart."""
    cause = outcome.known_cause
    apart = outcome.requirement if not cause else ""
    return (outcome.subject, outcome.verdict, cause, apart, outcome.waiver_reason, outcome.waiver_issue)
