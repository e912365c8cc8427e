"""`python -m reports show` of counts of cases that were judged many times in a row."""

import copy
import json
from pathlib import Path

import pytest

from reports.__main__ import main
from reports.results import BASELINES, REPEATED
from suite.selftest import reports_data as data
from suite.selftest.mutants import verdicts

KEPT = sorted((BASELINES / REPEATED).glob("*.json"))


@pytest.fixture
def counted(tmp_path: Path) -> Path:
    """Counts of three cases, as the command that judges many times in a row writes them."""
    exact = {"requirement": "update.exact", "subject": "broadcast", "nodeid": "test_exact[broadcast]", "detail": ""}
    entries = [exact | {"verdict": "pass"}, exact | {"verdict": "fail", "detail": "expected 1, found 2"}]
    entries += [exact | {"requirement": "devices.wrong_handle", "subject": "colocate", "verdict": "unsupported"}]
    path = tmp_path / "repeat.json"
    path.write_text(json.dumps(verdicts.repeated(entries, 20)))
    return path


def rows(said: str) -> list[list[str]]:
    return [line.split() for line in said.splitlines() if line.startswith(("update.", "devices.", "requirement"))]


def test_cases_are_counted_by_requirement_and_subject(counted: Path, capsys: pytest.CaptureFixture):
    assert main(["show", str(counted)]) == 0
    said = capsys.readouterr().out
    assert rows(said) == [
        ["requirement", "subject", "cases", "passed", "failed", "error", "unsupported"],
        ["update.exact", "broadcast", "2", "1", "1", "-", "-"],
        ["devices.wrong_handle", "colocate", "1", "-", "-", "-", "1"],
    ]
    assert "✗ Every case was judged 20 times in a row: 1 problem with 2 requirements." in said
    assert "! test_exact[broadcast]: fail: expected 1, found 2" in said
    assert "does not say which subject" not in said


def test_counts_that_say_no_subject_are_those_of_all(capsys: pytest.CaptureFixture):
    assert main(["show", *map(str, KEPT)]) == 0
    said = capsys.readouterr().out
    assert [said.count(f"{path}\n\n✓ Every case was judged 20 times") for path in KEPT] == [1] * len(KEPT)
    handled = [row for row in rows(said) if row[0] == "devices.wrong_handle"]
    assert handled == [["devices.wrong_handle", "-", "40", "20", "-", "-", "20"]] * 2
    without = [path for path in KEPT if "subjects" not in json.loads(path.read_text())]
    assert said.count("The file does not say which subject") == len(without) > 0


def test_runs_and_counts_are_shown_one_after_the_other(counted: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run = data.write(data.run(stages=data.CPU_STAGES), tmp_path / "run.json")
    assert main(["show", str(run), str(counted)]) == 0
    said = capsys.readouterr().out
    assert said.index("Throughput") < said.index("Every case was judged")
    assert main(["show", str(run), str(counted), "--html", str(tmp_path / "page.html")]) == 2
    assert f"{counted}: expected one file beside --html" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--html=page.html", "--subject=broadcast", "--stage=cpu-tp1", "--model=tiny"])
def test_what_only_a_run_has_is_refused_of_counts(counted: Path, option: str, capsys: pytest.CaptureFixture):
    assert main(["show", str(counted), option]) == 2
    assert "expected a run for this option, found counts of repeated cases" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("times", None, "times: expected a number, found nothing"),
        ("counts", {"pass": -1}, "counts.pass: expected a number of 0 or more, found -1"),
        ("counts", {"passed": 1}, "counts: expected counts by verdict (pass, fail, "),
        ("requirements", [], "requirements: expected counts by requirement, found a list"),
        ("subjects", {}, "subjects.update.exact: expected counts by subject, found nothing"),
        ("problems", "no", "problems: expected a list, found"),
    ],
)
def test_counts_that_are_malformed_are_refused(counted: Path, place: str, value: object, message: str, capsys):
    document = copy.deepcopy(json.loads(counted.read_text()))
    counted.write_text(json.dumps(document | {place: value}))
    assert main(["show", str(counted)]) == 2
    assert f"{counted}: {message}" in capsys.readouterr().err
