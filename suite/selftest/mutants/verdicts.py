"""Which mutants there are to run, and what a run of them has shown, from its run.json."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from suite.conformance.requirements import catalogue
from suite.selftest.mutants.registry import MUTANTS, REFERENCES, Mutant

KILLED, SURVIVED, ERROR = "killed", "SURVIVED", "error"
Entry = dict[str, Any]  # of the section "conformance" of run.json


def select(names: Sequence[str], kind: str, sample: int = 0, seed: int = 0) -> list[Mutant]:
    """The mutants of these names, or all that can be judged on machines of this kind; `sample` of them if not 0.

    A sample has a mutant each of requirements that follow each other in the catalogue, from where the sample of
    `seed` - 1 ended, and none that hangs. Raises ValueError for names that are none.
    """
    if unknown := [name for name in names if name not in MUTANTS]:
        raise ValueError(f"{unknown[0]}: expected one of {', '.join(sorted(MUTANTS))}")
    found = [mutant for mutant in MUTANTS.values() if mutant.stage(kind) and (not names or mutant.name in names)]
    if lacking := set(names) - {mutant.name for mutant in found}:
        raise ValueError(f"{min(lacking)} can't be judged with --kind {kind}")
    found.sort(key=lambda mutant: [*catalogue()].index(mutant.requirement))
    return _sampled([mutant for mutant in found if not mutant.patient], sample, seed) if sample else found


def held(
    mutants: Sequence[Mutant], kind: str, missing: Mapping[str, str], gpus: int
) -> tuple[list[Mutant], dict[str, str]]:
    """The mutants whose cases this machine can hold, and {name of another: why not}; `missing` is {stage: why}."""
    away = {m.name: f"{m.stage(kind)}: {missing[m.stage(kind)]}" for m in mutants if m.stage(kind) in missing}
    fewer = [m for m in mutants if kind == "gpu" and m.gpus > gpus and m.name not in away]
    away |= {m.name: f"{m.requirement}: needs {m.gpus} GPUs, found {gpus}" for m in fewer}
    return [mutant for mutant in mutants if mutant.name not in away], away


def _sampled(mutants: list[Mutant], sample: int, seed: int) -> list[Mutant]:
    by_requirement: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        by_requirement.setdefault(mutant.requirement, []).append(mutant)
    groups, chosen = [*by_requirement.values()], []
    for turn in range(seed * sample, (seed + 1) * sample):
        lap, place = divmod(turn, len(groups))
        chosen.append(groups[place][lap % len(groups[place])])
    return [*dict.fromkeys(chosen)]


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant: killed, SURVIVED or error, and what was said."""

    mutant: Mutant
    stage: str
    outcome: str
    detail: str


def outcome_of(mutant: Mutant, kind: str, entries: Iterable[Entry]) -> Outcome:
    """Killed is who fails the requirement that it names, for the reason that it names; nobody else.

    An error of the suite, a case that does not apply or another failure is none.
    """
    own = [entry for entry in entries if entry["subject"] == mutant.name]
    failed = [entry for entry in own if entry["verdict"] == "fail"]
    odd = [entry for entry in own if entry["verdict"] not in ("pass", "fail")]
    elsewhere = [entry for entry in own if entry["requirement"] != mutant.requirement]
    unsaid = [entry for entry in failed if not re.search(mutant.says, entry["detail"], re.DOTALL)]
    if not own:
        outcome, detail = ERROR, "it was not judged"
    elif odd or elsewhere:
        found = (odd or elsewhere)[0]
        outcome, detail = ERROR, f"{found['requirement']}: {found['verdict']}: {found['detail']}"
    elif unsaid:
        outcome, detail = ERROR, f"expected a failure that says {mutant.says!r}, found: {unsaid[0]['detail']}"
    else:
        outcome = KILLED if failed else SURVIVED
        detail = failed[0]["detail"] if failed else f"it passed {mutant.requirement}"
    return Outcome(mutant, mutant.stage(kind), outcome, detail)


def controls(entries: Iterable[Entry]) -> list[Entry]:
    """The references' cases."""
    return [entry for entry in entries if entry["subject"] in REFERENCES]


def lacking_controls(outcomes: Iterable[Outcome], entries: Iterable[Entry]) -> list[str]:
    """Mutants beside which their reference was not judged: that they failed proves nothing."""
    there = {(entry["subject"], entry["requirement"]) for entry in controls(entries)}
    return [o.mutant.name for o in outcomes if (o.mutant.host, o.mutant.requirement) not in there]


def without_mutant(mutants: Iterable[Mutant], kind: str) -> list[str]:
    """Requirements that no mutant fails: of a CPU run all that can be judged there, of a GPU run those only there."""
    covered = {mutant.requirement for mutant in mutants}
    judged = [r.id for r in catalogue().values() if (r.on != "gpu" if kind == "cpu" else r.on == "gpu")]
    return [requirement for requirement in judged if requirement not in covered]


def table(outcomes: Sequence[Outcome]) -> str:
    """Mutant x requirement x stage, in columns of plain text."""
    heads = ("mutant", "requirement", "stage", "stands for", "outcome")
    rows = [
        (o.mutant.name, o.mutant.requirement, o.stage, ", ".join(o.mutant.threads) or "-", o.outcome) for o in outcomes
    ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [heads, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def summary(outcomes: Sequence[Outcome], entries: Sequence[Entry], kind: str, whole: bool) -> dict[str, Any]:
    """What is written down: every outcome, the counts, and `problems`, of which there are none if all is well."""
    counts, reference = Counter(o.outcome for o in outcomes), controls(entries)
    problems = [f"{o.mutant.name}: {o.outcome}: {o.detail}" for o in outcomes if o.outcome != KILLED]
    problems += [f"control {e['nodeid']}: {e['verdict']}: {e['detail']}" for e in reference if e["verdict"] != "pass"]
    problems += [f"{name}: its reference was not judged beside it" for name in lacking_controls(outcomes, entries)]
    if whole:
        uncovered = without_mutant((o.mutant for o in outcomes), kind)
        problems += [f"{requirement}: no mutant names it" for requirement in uncovered]
    return {
        "kind": kind,
        "whole": whole,
        "counts": {
            "mutants": len(outcomes),
            **{outcome.lower(): counts[outcome] for outcome in (KILLED, SURVIVED, ERROR)},
            "requirements": len({o.mutant.requirement for o in outcomes}),
            "controls": len(reference),
            "controls passed": sum(entry["verdict"] == "pass" for entry in reference),
        },
        "mutants": [
            {
                "mutant": o.mutant.name, "does": o.mutant.does, "requirement": o.mutant.requirement,
                "stage": o.stage, "threads": list(o.mutant.threads), "outcome": o.outcome, "detail": o.detail,
            }
            for o in outcomes
        ],
        "problems": problems,
    }  # fmt: skip


def repeated(entries: Sequence[Entry], times: int) -> dict[str, Any]:
    """How often the references passed each requirement, of `times` in a row; `problems` are the other verdicts."""
    verdicts = Counter((entry["requirement"], entry["verdict"]) for entry in entries)
    subjects: dict[str, dict[str, Counter]] = {}
    for entry in entries:
        subjects.setdefault(entry["requirement"], {}).setdefault(entry["subject"], Counter())[entry["verdict"]] += 1
    wrong = [entry for entry in entries if entry["verdict"] in ("fail", "error")]
    problems = [f"{entry['nodeid']}: {entry['verdict']}: {entry['detail']}" for entry in wrong]
    return {
        "times": times,
        "counts": dict(sorted(Counter(entry["verdict"] for entry in entries).items())),
        "requirements": {
            name: {verdict: count for (of, verdict), count in verdicts.items() if of == name}
            for name in dict.fromkeys(entry["requirement"] for entry in entries)
        },
        "subjects": subjects,
        "problems": problems or ([] if verdicts else ["nothing was judged"]),
    }
