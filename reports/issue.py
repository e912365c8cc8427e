"""A failed case as a report for those who maintain what failed: what was expected, what was found, how to repeat it."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path

from reports.load import Outcome, Run, UnusableInput
from reports.matrix import FOUND_WANTING
from reports.message import labelled
from reports.table import markdown, markdown_table
from reports.units import counted, plain

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "suite" / "conformance"
SCRIPT = Path(__file__).parent / "templates" / "native_update.py.txt"
FACTS = (
    "vLLM",
    "distribution",
    "torch",
    "NCCL",
    "driver",
    "GPUs",
    "CPU",
    "platform",
    "Python",
    "transformers",
    "suite",
)
LISTED = 8
NATIVE = "native-"  # what the names of vLLM's own transfers begin with

# By requirement: what the script does to the tensors of an update before they are loaded.
ALTERED = {
    "errors.unknown_name": (
        'tensors = dict(sorted({**tensors, "model.layers.1.mlp.ghost_proj.weight": tensors[WEIGHT].clone()}.items()))'
    ),
    "errors.missing_name": "del tensors[WEIGHT]",
    "errors.shape": "tensors[WEIGHT] = tensors[WEIGHT][:-1].clone()",
    "errors.dtype": "tensors[WEIGHT] = tensors[WEIGHT].to(torch.int32)",
    "faults.trainer_killed": "tensors[WEIGHT] = None  # the trainer is gone: nothing comes any more",
    "faults.trainer_stopped": "tensors[WEIGHT] = None  # the trainer has stopped: the transport's deadline passes",
}


def issue_markdown(run: Run, words: Sequence[str]) -> str:
    """The report of the first failed case that all words name, in Markdown.

    A word is a requirement, subject, stage or model, or a part of a test's id. Raises UnusableInput where no failed
    case has them all.
    """
    case, *others = _named(run, words)
    judged = "could not be judged" if case.verdict == "error" else "is not met"
    parts = [
        f"# {case.subject or 'vLLM'}: {case.requirement} {judged} with vLLM {run.environment.vllm or '(unknown)'}",
        f"**{case.level}** {markdown(case.text or case.requirement)}",
        _said(case),
        _also(others),
        f"## Environment\n\n{_environment(run, case)}",
        _steps(case),
        _repeated(run, case),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _named(run: Run, words: Sequence[str]) -> list[Outcome]:
    failed = [outcome for outcome in run.outcomes if outcome.verdict in FOUND_WANTING]
    found = [outcome for outcome in failed if all(word in outcome.key or word in outcome.nodeid for word in words)]
    if not found:
        wanted = f"expected a failed case of {' '.join(words)}, found none"
        raise UnusableInput(run.source, "conformance", f"{wanted}; failed: {_listed(failed) or 'none'}")
    return found


def _listed(cases: list[Outcome]) -> str:
    shown = ", ".join(" ".join(filter(None, case.key)) for case in cases[:LISTED])
    return shown + (f" and {len(cases) - LISTED} more" if len(cases) > LISTED else "")


def _said(case: Outcome) -> str:
    expected, found = (labelled(case.detail, label) for label in ("expected", "found"))
    lines = [
        f"- **Expected**: {markdown(expected) or 'that the requirement above is met'}",
        f"- **Found**: {markdown(found or case.cause)}",
    ]
    lines += [f"- **Where**: {markdown(where)}" for where in [labelled(case.detail, "where")] if where]
    known = f"- **Known**: {markdown(case.waiver_reason)} {plain(case.waiver_issue)}"  # the address stays one
    lines += [known] if case.verdict == "waived" else []
    message = [] if expected and found else ["", _fenced(case.detail, "text")]
    return "\n".join([*lines, *message])


def _also(others: list[Outcome]) -> str:
    if not others:
        return ""
    return f"The same run has {counted(len(others), 'failed case')} more of these: {_listed(others)}."


def _environment(run: Run, case: Outcome) -> str:
    """The facts that matter to any case, after the release of what the subject is of where it is a package."""
    facts = dict(run.environment.facts)
    its = [name for name in facts if name not in FACTS and f"{case.subject}-".startswith(f"{name}-")]
    return markdown_table(("", ""), [(name, facts[name]) for name in (*its, *FACTS) if name in facts])


def _steps(case: Outcome) -> str:
    """The test that judged the case, with what it calls in its own file."""
    file, _, test = case.nodeid.partition("::")
    source = ROOT / file
    if source not in TESTS.glob("test_*.py"):
        return ""
    code = _with_helpers(source.read_text(encoding="utf-8"), test.partition("[")[0])
    introduced = f"`{file}` takes these steps on {case.stage or 'no engine'}, with the model {case.model or '(none)'}:"
    calls = "\n".join(["An update is these calls in the engine:", "", *(f"- `{call}`" for call in case.calls)])
    parts = ["## Steps", introduced, _fenced(code, "python"), calls if case.calls else ""]
    return "\n\n".join(filter(None, parts)) if code else ""


def _with_helpers(text: str, test: str) -> str:
    """The source of a test and of the module's own functions and constants that it names, in their order."""
    named = {name: node for node in ast.parse(text).body for name in _names_of(node)}
    wanted, queue = set(), [test]
    for name in queue:
        if name in named and name not in wanted:
            wanted.add(name)
            queue += [inner.id for inner in ast.walk(named[name]) if isinstance(inner, ast.Name)]
    kept = dict.fromkeys(node for name, node in named.items() if name in wanted)
    return "\n\n".join(filter(None, (ast.get_source_segment(text, node) for node in kept)))


def _names_of(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef):
        node.decorator_list = []  # the clause, which stands above
        return [node.name]
    return (
        [target.id for target in node.targets if isinstance(target, ast.Name)] if isinstance(node, ast.Assign) else []
    )


def _repeated(run: Run, case: Outcome) -> str:
    lines = ["## Repeat it"]
    if case.repeat:
        lines += ["", "With the suite:", "", _fenced(_alone(case), "sh")]
    if case.subject.startswith(NATIVE) and (altered := ALTERED.get(case.requirement)):
        text = SCRIPT.read_text(encoding="utf-8")
        script = text.replace("REQUIREMENT", case.requirement).replace('"ALTER THE TENSORS"', altered)
        lines += [
            "",
            "Without it, on one CPU or GPU, with vLLM alone and no trainer: the script makes the tensors itself.",
            "",
        ]
        lines.append(_fenced(script.rstrip(), "python"))
    return "\n".join(lines) if len(lines) > 1 else ""


def _alone(case: Outcome) -> str:
    """The command that repeats a case, without the run's other subjects: what they need may not be installed."""
    others = re.compile(rf" --subject=(?!{re.escape(case.subject)}( |$))\S+")
    return others.sub("", case.repeat) if f"--subject={case.subject}" in case.repeat.split() else case.repeat


def _fenced(text: str, language: str) -> str:
    fence = max(["``", *re.findall("`+", text)], key=len) + "`"  # longer than any in the text
    return f"{fence}{language}\n{plain(text)}\n{fence}"
