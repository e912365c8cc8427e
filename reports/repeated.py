"""Counts of the references' cases, each judged many times in a row: `python -m suite.selftest.mutants --repeat N`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from reports.load import VERDICTS
from reports.matrix import MEANING, SYMBOL
from reports.node import Node
from reports.table import text_table, wrapped
from reports.units import counted

Counts = dict[str, int]  # cases by verdict
COLUMNS = {"pass": "passed", "fail": "failed", "error": "error"}  # heads of the columns that every table has
UNKNOWN = "-"  # of counts that an earlier suite wrote: they say the requirement alone


@dataclass(frozen=True)
class Repeated:
    """What one file says. `cases` are the counts by (requirement, subject)."""

    source: str
    times: int
    counts: Counts
    requirements: tuple[str, ...]
    cases: Mapping[tuple[str, str], Counts]
    problems: tuple[str, ...]

    @property
    def verdicts(self) -> str:
        """The counts of all cases, in words."""
        return ", ".join(f"{count} {verdict}" for verdict, count in self.counts.items())


def is_repeated(document: object) -> bool:
    """Whether a document holds such counts, and not a run."""
    return isinstance(document, dict) and {"times", "requirements"} <= document.keys() and "conformance" not in document


def parse(document: object, file: str) -> Repeated:
    """Read a document. Raises UnusableInput, which names the file, the place and what was expected there."""
    root = Node(document, file)
    requirements = tuple(root["requirements"].of(dict, "counts by requirement"))
    cases: dict[tuple[str, str], Counts] = {}
    for name in requirements:
        subjects = root["subjects"][name] if "subjects" in root else None
        if subjects is None:
            cases[name, UNKNOWN] = _counts(root["requirements"][name])
            continue
        for subject in subjects.of(dict, "counts by subject"):
            cases[name, subject] = _counts(subjects[subject])
    problems = tuple(problem.text() for problem in root["problems"])
    return Repeated(file, round(root["times"].number()), _counts(root["counts"]), requirements, cases, problems)


def _counts(node: Node) -> Counts:
    counts = {verdict: round(node[verdict].number()) for verdict in node.of(dict, "counts by verdict")}
    if unknown := [verdict for verdict in counts if verdict not in VERDICTS]:
        raise node.refuse(f"counts by verdict ({', '.join(VERDICTS)})", unknown[0])
    return counts


def repeated_text(found: Repeated, width: int = 100) -> str:
    """The counts on a terminal: how it went, a row for every requirement and subject, what was wrong."""
    wrong = counted(len(found.problems), "problem")
    verdict = "fail" if found.problems else "pass"
    requirements = counted(len(found.requirements), "requirement")
    sentence = f"Every case was judged {found.times} times in a row: {wrong} with {requirements}."
    others = [verdict for verdict in found.counts if verdict not in COLUMNS]
    rows = [
        (name, subject, *(str(count) if count else "-" for count in _columns(counts, others)))
        for (name, subject), counts in found.cases.items()
    ]
    head = ("requirement", "subject", "cases", *COLUMNS.values(), *others)
    parts = [wrapped(f"{SYMBOL[verdict]} {sentence}", width, ""), f"In all: {found.verdicts}"]
    parts.append(text_table(head, rows, width, range(2, len(head))))
    if any(subject == UNKNOWN for _, subject in found.cases):
        parts.append("The file does not say which subject: a requirement's cases are those of all.")
    parts.append(wrapped("; ".join(f"{verdict}: {MEANING[verdict]}" for verdict in others), width, ""))
    parts += [wrapped(f"! {problem}", width, "") for problem in found.problems]
    return "\n\n".join(filter(None, parts))


def _columns(counts: Counts, others: list[str]) -> list[int]:
    """How many cases there are, then those that passed, failed, could not be told, and of each other verdict."""
    return [sum(counts.values()), *(counts.get(verdict, 0) for verdict in (*COLUMNS, *others))]
