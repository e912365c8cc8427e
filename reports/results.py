"""The page of measured results, docs/results.md: tables of every folder of runs, and how to read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reports import trend
from reports.beside import faster_rows
from reports.compare import same_hardware
from reports.load import Run, UnusableInput, document_of, read_all
from reports.matrix import NOT_JUDGED, SYMBOL, cells, in_order
from reports.repeated import parse
from reports.table import markdown, markdown_table
from reports.units import counted, seconds

BASELINES = Path(__file__).parent / "baselines"
REFERENCES = {"broadcast", "colocate", ""}  # the subjects of a run that names none; "" has what is judged of none
REPEATED = "repeated"  # the folder of counts of cases that were judged many times in a row
INTRODUCTION = """\
# Measured results

Written by `python -m reports results > docs/results.md` from the runs that are kept in `reports/baselines`, a folder
for runs of one machine that belong together. Do not edit this page: keep another run there and write it again. What
the figures mean is said in [interpretation.md](interpretation.md).

How to read it:

* A column is one run with one vLLM version. All runs of a folder come from the same hardware, not always from
  the same host.
* Where other subjects than the two references were judged, a table has what each one met, requirement by requirement.
* *Requirements met* counts the requirements of which every case that was judged passed. A requirement has a row of its
  own where some run did not meet it or did not judge it.
* A time is the median of the whole update: from the first side's start to the last side's end.
* *GB/s* are the bytes that were sent, divided by that time. GB are 1e9 bytes.
* The percentage is the share of roofline. The roofline is what the same hardware takes, in the same run, to move the
  same bytes once, by one broadcast or one copy.
* A row that ends in *pause* has the time the engine could not generate: from the last token before an update to the
  first after it, with requests in flight.
* *Times faster* compares subjects that were timed in the same run: the median of the one over that of the other, with
  its 95 % interval.
* ▲ and ▼ compare a run with the one before it. They stand where the difference is significant and beyond 5 %.
  A ? stands where the hardware or the host became slower or faster too, so that the cause stays open.
* *The host's pace* is what a call to all workers takes that does nothing, and one that carries the manifest of a model
  of 8B. Updates of small models consist of calls, so they follow the pace more than the roofline.
"""
NO_PACE = "These runs were made before the suite measured the host's pace."


def results_markdown(directory: Path = BASELINES) -> str:
    """The whole page. Raises UnusableInput where a folder has files that cannot be read or that do not fit together."""
    folders = sorted(path for path in directory.iterdir() if path.is_dir()) if directory.is_dir() else []
    machines = [(path, sorted(path.glob("*.json"))) for path in folders if path.name != REPEATED]
    parts = [_machine(path.name, files) for path, files in machines if files]
    if not parts:
        raise UnusableInput(str(directory), "", "expected a folder of run.json files for every machine, found none")
    repeated = sorted((directory / REPEATED).glob("*.json"))
    return "\n".join([INTRODUCTION, *parts, *([_repeated(repeated)] if repeated else [])])


def _machine(name: str, files: Sequence[Path]) -> str:
    runs = read_all(files)
    same_hardware(runs)
    labels = [run.label for run in runs]
    parts = [f"## {markdown(name)}: {markdown(runs[0].environment.hardware)}"]
    parts.append(markdown_table(("run", *labels), _facts(runs)))
    parts += _judged(runs, labels)
    right = range(1, len(labels) + 1)
    times = trend.seconds_rows(runs)
    parts += [markdown_table(("median time, GB/s, of roofline", *labels), times, right)] if times else []
    faster = faster_rows(runs)
    parts += [markdown_table(("times faster, in one run", *labels), faster, right)] if faster else []
    paces = trend.pace_rows(runs)
    parts.append(markdown_table((trend.PACE, *labels), paces, right) if paces else NO_PACE)
    return "\n\n".join(parts) + "\n"


def _facts(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """When and of what each run was made, and how long it took."""
    known = [dict(run.environment.facts) for run in runs]
    names = [name for name in ("torch", "NCCL", "driver", "suite") if any(name in facts for facts in known)]
    took = [max((ended for _, _, ended in run.timeline), default=None) for run in runs]
    return [
        ("made on", *(run.when[:10] or "-" for run in runs)),
        *((name, *(facts.get(name, "-") for facts in known)) for name in names),
        ("took", *(map(seconds, took))),
    ]


def _judged(runs: Sequence[Run], labels: Sequence[str]) -> list[str]:
    """What was met: of the references in one table for all runs, of other subjects in one for each run."""
    if not any(run.outcomes for run in runs):
        return []
    if all({outcome.subject for outcome in run.outcomes} <= REFERENCES for run in runs):
        return [markdown_table(("requirement", *labels), [trend.met_row(runs), *_not_met(runs)])]
    return [_by_subject(run) for run in runs]


def _by_subject(run: Run) -> str:
    """Requirements x subjects; without those that no subject was judged by."""
    found = cells(run.outcomes, "requirement", "subject")
    subjects = in_order(subject for _, subject in found)
    judged = in_order(name for (name, _), cell in found.items() if cell.verdict not in NOT_JUDGED)
    rows = []
    for name in judged:
        verdicts = [found[name, subject].verdict if (name, subject) in found else "" for subject in subjects]
        rows.append((name, *(f"{SYMBOL[verdict]} {verdict}" if verdict else "absent" for verdict in verdicts)))
    return markdown_table((f"requirement, {run.label}", *subjects), rows)


def _not_met(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    found = [cells(run.outcomes, "requirement") for run in runs]
    names = dict.fromkeys(name for judged in found for name in judged)
    rows = []
    for name in names:
        verdicts = [judged[name].verdict if name in judged else "" for judged in found]
        if any(verdict != "pass" for verdict in verdicts):
            rows.append((*name, *(f"{SYMBOL[verdict]} {verdict}" if verdict else "absent" for verdict in verdicts)))
    return rows


def _repeated(files: Sequence[Path]) -> str:
    rows = []
    for file in files:
        found = parse(document_of(file), str(file))
        requirements, problems = counted(len(found.requirements), "requirement"), str(len(found.problems))
        rows.append((file.stem, f"{found.times} times", requirements, found.verdicts, problems))
    head = ("run", "every case", "of", "verdicts", "problems")
    return f"""\
## The references, judged many times in a row

Made by `python -m suite.selftest.mutants --repeat N`. A case that passes once may pass by luck.

{markdown_table(head, rows)}
"""
