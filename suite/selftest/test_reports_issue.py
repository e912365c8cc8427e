"""A failed case as an issue to file: what stands in it, and that the script in it is Python."""

import ast
import copy
import re
from pathlib import Path

import pytest

from reports import issue
from reports.__main__ import main
from suite.selftest import reports_data as data

RUN = data.run(stages=data.CPU_STAGES)
SUBJECT, STAGE, MODEL = "native-gloo", "cpu-tp1", "qwen3-untied-tiny"
DETAIL = (
    "expected: the answers from before the refused update\nfound: 16 others\n"
    f"where: after update 2 [subject={SUBJECT} stage={STAGE} model={MODEL}]"
)
WAIVER = {"waiver_issue": "https://example.org/7", "waiver_reason": "Nothing is rolled back."}


def case(requirement: str, test: str, verdict: str = "fail", **more: str) -> dict:
    entry = data.outcome(requirement, SUBJECT, STAGE, MODEL, verdict, DETAIL)
    nodeid = f"suite/conformance/{test}[{SUBJECT}-{STAGE}-{MODEL}]"
    entry["calls"] = ["LLM.start_weight_update()", "LLM.finish_weight_update()"]
    return entry | {"nodeid": nodeid, "text": f"The clause of {requirement}.", "repeat": f"pytest {nodeid}"} | more


@pytest.fixture
def written(tmp_path: Path, capsys: pytest.CaptureFixture):
    """What the command prints for these cases, its exit status, and what it complains of."""

    def print_issue(cases: list[dict], *words: str) -> tuple[str, int, str]:
        document = copy.deepcopy(RUN) | {"conformance": cases}
        status = main(["issue", str(data.write(document, tmp_path / "run.json")), *words])
        said = capsys.readouterr()
        return said.out, status, said.err

    return print_issue


def test_an_issue_says_what_was_expected_and_found_and_on_what(written):
    text, status, _ = written([case("errors.shape", "test_errors.py::test_shape")], "errors.shape")
    assert status == 0
    assert text.startswith("# native-gloo: errors.shape is not met with vLLM 0.33.0\n")
    for part in (
        "**MUST** The clause of errors.shape.",
        "- **Expected**: the answers from before the refused update",
        "- **Found**: 16 others",
        "- **Where**: after update 2",
        "| vLLM | 0.33.0 |",
        "| torch | 2.13.0+cpu |",
        "```sh\npytest suite/conformance/test_errors.py::test_shape[",
    ):
        assert part in text, f"expected {part!r} in\n{text}"


def test_an_issue_repeats_its_own_subject_alone_and_names_its_release(written, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(RUN["environment"]["packages"], "openrlhf", "0.11.2")
    monkeypatch.setitem(RUN["environment"]["packages"], "open", "1.0")
    named = case("errors.shape", "test_errors.py::test_shape", subject="openrlhf-ipc")
    for options, left in (
        ("--subject=verl --subject=openrlhf-ipc --subject=openrlhf --stage=a", "--subject=openrlhf-ipc --stage=a"),
        ("--subject=openrlhf-ipc", "--subject=openrlhf-ipc"),
        ("--subject=openrlhf --extension=b:C", "--subject=openrlhf --extension=b:C"),
    ):
        text, _, _ = written([named | {"repeat": f"pytest it {options}"}], "errors.shape")
        assert f"```sh\npytest it {left}\n```" in text
        assert "| openrlhf | 0.11.2 |\n| vLLM |" in text
        assert "| open |" not in text


def test_an_issue_has_the_steps_of_its_test_and_no_other(written):
    text, _, _ = written([case("errors.shape", "test_errors.py::test_shape")], "errors.shape")
    steps = re.search(r"## Steps.*?```python\n(.*?)```", text, re.DOTALL)[1]
    assert [n.name for n in ast.parse(steps).body if isinstance(n, ast.FunctionDef)] == [
        "test_shape",
        "_ending",
        "_expect_refused",
    ]
    assert "DEADLINE_S = 30.0" in steps, "expected the constants that the test names"
    assert "@requirement" not in steps, "expected the clause once, above"
    assert "- `LLM.start_weight_update()`\n- `LLM.finish_weight_update()`\n\n## Repeat" in text


@pytest.mark.parametrize("requirement", issue.ALTERED)
def test_a_case_of_native_transfer_is_repeated_without_the_suite(written, requirement: str):
    text, _, _ = written([case(requirement, "test_errors.py::test_shape")], requirement)
    script = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[-1]
    body = ast.parse(script)
    imported = {n.module.partition(".")[0] for n in ast.walk(body) if isinstance(n, ast.ImportFrom)}
    assert imported <= {"dataclasses", "safetensors", "vllm"}, "expected nothing of the suite"
    (altered,) = [node for node in body.body if isinstance(node, ast.FunctionDef) and node.name == "altered"]
    assert issue.ALTERED[requirement].partition("  #")[0] == ast.unparse(altered.body[1]).replace("'", '"')
    assert script.startswith(f'"""{requirement}, ')
    assert "REQUIREMENT" not in script
    assert "ALTER THE" not in script


def test_another_subjects_case_has_no_script(written):
    broadcast = case("errors.shape", "test_errors.py::test_shape") | {"subject": "broadcast"}
    text, _, _ = written([broadcast], "errors.shape")
    assert "Without it" not in text
    assert "With the suite:" in text


def test_the_first_case_of_several_is_told_and_the_others_are_named(written):
    cases = [
        case("errors.shape", "test_errors.py::test_shape", "pass"),
        case("errors.shape", "test_errors.py::test_shape") | {"stage": "cpu-tp2"},
        case("errors.dtype", "test_errors.py::test_dtype") | {"stage": "cpu-tp2"},
    ]
    text, _, _ = written(cases, "cpu-tp2", SUBJECT)
    assert "errors.shape is not met" in text
    assert f"1 failed case more of these: errors.dtype {SUBJECT} cpu-tp2 {MODEL}." in text
    text, _, _ = written(cases, "test_dtype")
    assert "errors.dtype is not met" in text


def test_a_waived_case_says_what_is_known(written):
    text, _, _ = written([case("errors.shape", "test_errors.py::test_shape", "waived", **WAIVER)], "errors.shape")
    assert "- **Known**: Nothing is rolled back. https://example.org/7" in text


def test_a_message_without_labels_stands_whole(written):
    broken = case("errors.shape", "test_errors.py::test_shape") | {"detail": "the engine\nis gone", "cause": "gone"}
    text, _, _ = written([broken], "errors.shape")
    assert "- **Found**: gone\n\n```text\nthe engine\nis gone\n```" in text


@pytest.mark.parametrize("words", [["errors.dtype"], ["errors.shape", "cpu-tp2"], ["errors.nested"]])
def test_a_case_that_did_not_fail_is_refused_with_those_that_did(written, words: list[str]):
    cases = [
        case("errors.shape", "test_errors.py::test_shape"),
        case("errors.nested", "test_errors.py::test_nested", "pass"),
    ]
    text, status, complaint = written(cases, *words)
    assert (text, status) == ("", 2)
    assert f"expected a failed case of {' '.join(words)}, found none; failed: errors.shape {SUBJECT}" in complaint


@pytest.mark.parametrize(
    "nodeid", ["suite/conformance/test_of_old.py::test_shape", "README.md::test_shape", "../secret.py::test_shape", ""]
)
def test_a_test_that_is_not_of_the_suite_has_no_steps(written, nodeid: str):
    text, status, _ = written([case("errors.shape", "test_errors.py::test_shape", nodeid=nodeid)], "errors.shape")
    assert status == 0
    assert "## Steps" not in text
    assert "## Repeat it" in text


def test_a_case_that_could_not_be_judged_is_not_said_to_fail(written):
    text, _, _ = written([case("errors.shape", "test_errors.py::test_shape", "error")], "errors.shape")
    assert text.startswith("# native-gloo: errors.shape could not be judged with vLLM 0.33.0\n")


def test_what_was_found_is_shown_and_does_nothing(written):
    found = "found: <b>@all</b> __init__ | \x1b[31mred"
    text, _, _ = written([case("errors.shape", "test_errors.py::test_shape", detail=found)], "errors.shape")
    assert "- **Found**: &lt;b&gt;@\u200ball&lt;/b&gt; \\_\\_init\\_\\_ \\| �\\[31mred" in text
    assert "\x1b" not in text
    fenced = "found: nothing\n```\n@all"
    text, _, _ = written([case("errors.shape", "test_errors.py::test_shape", detail=fenced)], "errors.shape")
    assert f"````text\n{fenced}\n````" in text


def test_many_cases_of_the_same_words_are_counted(written):
    cases = [case("errors.shape", "test_errors.py::test_shape", model=f"model-{number}") for number in range(12)]
    text, _, _ = written(cases, "errors.shape")
    assert "11 failed cases more of these: " in text
    assert f"errors.shape {SUBJECT} {STAGE} model-8 and 3 more." in text
