"""Print the catalogue of requirements as a page: `python -m suite.conformance > docs/requirements.md`."""

import sys
from collections.abc import Iterator

from suite.conformance.requirements import Requirement, catalogue

INTRODUCTION = """\
# Requirements

Written by `python -m suite.conformance > docs/requirements.md` from the declarations above the tests in
[suite/conformance](../suite/conformance). Do not edit this page: edit the declaration and write the page again.

A MUST is what a training run's correctness rests on; a SHOULD is what users count on besides. *Seen in* names issues
and pull requests where the opposite happened, as project#number."""
STAGES = {"cpu": "CPU stages only", "gpu": "GPU stages only", "both": "CPU and GPU stages"}


def families() -> dict[str, list[Requirement]]:
    """The requirements by the first part of their ids, families and requirements in the order of declaration."""
    found: dict[str, list[Requirement]] = {}
    for clause in catalogue().values():
        found.setdefault(clause.id.partition(".")[0], []).append(clause)
    return found


def page() -> str:
    """The whole page, in Markdown."""
    lines = [INTRODUCTION, "", *_contents()]
    for family, clauses in families().items():
        lines += ["", f"## {family}"]
        for clause in clauses:
            lines += ["", *_clause(clause)]
    return "\n".join(lines) + "\n"


def _contents() -> Iterator[str]:
    yield "| family | MUST | SHOULD |"
    yield "| --- | --- | --- |"
    for family, clauses in families().items():
        by_level = (", ".join(f"`{c.id}`" for c in clauses if c.level == level) for level in ("MUST", "SHOULD"))
        yield f"| [{family}](#{family}) | {' | '.join(by_level)} |"


def _clause(clause: Requirement) -> Iterator[str]:
    yield f"### {clause.id} ({clause.level})"
    yield ""
    yield clause.text
    yield ""
    yield f"* *Why:* {clause.because}"
    if clause.seen_in:
        yield f"* *Seen in:* {', '.join(clause.seen_in)}"
    yield f"* *Judged on:* {STAGES[clause.on]}"


if __name__ == "__main__":
    sys.stdout.write(page())
