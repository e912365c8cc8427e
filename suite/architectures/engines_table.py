"""The page of architectures on real engines. A run of some of them writes their rows and keeps the others."""

from collections.abc import Mapping

from suite.architectures.engines import KINDS, OUTCOMES, STAGES, Row
from suite.architectures.table import escaped

HEADING = """\
# Models on real engines

Written by `tox run -e models -- --engines --write docs/models-engines.md`, with {distribution} {version} and
transformers {transformers}. Do not edit this page.
"""
INTRODUCTION = """\
Architectures of [models](models.md) that differ in kind, each on engines of its own with one and with two ranks on a
CPU. The suite judges `update.exact` and `update.behaviour` with both reference subjects, broadcast and colocate: after
an update and after the update back, all that an engine computes with, and what it answers, equal those of an engine
that loaded the same checkpoint, bit by bit. The second checkpoint differs in every element.

Nemotron-H is left out: with prefix caching, vLLM raises an IndexError on CPUs at prompts longer than one chunk of its
state spaces (vllm#54504).

| outcome | meaning |
| --- | --- |
| exact | all four cases pass |
| refused | `begin_update` says why it does not take the update, and touches nothing |
| wrong | the update failed, or the engine does not compute as one that loaded the checkpoint |
| not run | no engine of the model started, or the run ended before it was judged |
"""
HEAD = "| model | kind |"


def page(found: Mapping[str, Row], versions: Mapping[str, str], kept: str = "") -> str:
    """The page, in Markdown, with the rows of the page `kept` for what is not in `found`.

    Rows that were found with other versions are dropped, since the page names one, and those of no kind.
    """
    heading = HEADING.format(**versions)
    rows = {name: row for name, row in _rows(kept).items() if name in KINDS and kept.startswith(heading)}
    for name, row in found.items():
        cells = [told(*row[stage]) for stage in STAGES]
        rows[name] = f"| {' | '.join([name, KINDS.get(name, ''), *cells])} |"
    ordered = [rows[name] for name in [*KINDS, *(name for name in rows if name not in KINDS)] if name in rows]
    head = [f"{HEAD} {' | '.join(STAGES.values())} |", "| --- | --- |" + " --- |" * len(STAGES)]
    return "\n".join([heading, INTRODUCTION, _counted(ordered), "", *head, *ordered]) + "\n"


def told(outcome: str, why: str) -> str:
    """A cell of the table."""
    return f"{outcome}: {escaped(why)}" if why else outcome


def _rows(text: str) -> dict[str, str]:
    """The rows of a page by the names of their models."""
    lines = text.partition(HEAD)[2].splitlines()
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:] if line.startswith("| ")}


def _counted(rows: list[str]) -> str:
    """How many of the rows' cases have which outcome."""
    cells = [cell for row in rows for cell in row.removesuffix(" |").split(" | ")[2:]]
    counts = {outcome: sum(cell.partition(":")[0] == outcome for cell in cells) for outcome in OUTCOMES}
    said = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    return f"{len(rows)} architectures, {len(cells)} judged with one and two ranks: {said}."
