"""Subjects side by side: the last verdict and the last timing count, and what nobody judged is no row."""

from pathlib import Path

import pytest

from reports.__main__ import main
from suite.selftest import reports_data

CELL = ("gpu-split", "qwen3-8b")


def written(path: Path, when: str, *outcomes: tuple[str, str, str]) -> str:
    """A run of made-up timings of the two references, with these (requirement, subject, verdict)."""
    document = reports_data.run()
    document["datetime"] = when
    document["conformance"] = [
        reports_data.outcome(requirement, subject, *CELL, verdict, "") for requirement, subject, verdict in outcomes
    ]
    reports_data.write(document, path)
    return str(path)


def rows(capsys: pytest.CaptureFixture) -> dict[str, list[str]]:
    head, _, *lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    return {"head": head} | {line[0]: line[1:] for line in lines}


def test_of_a_requirement_the_last_run_counts_that_judged_it(tmp_path: Path, capsys: pytest.CaptureFixture):
    of_mine = [("update.exact", "mine", "fail"), ("update.order", "mine", "pass"), ("errors.shape", "mine", "fail")]
    first = written(tmp_path / "a.json", "2026-11-01T00:00:00+00:00", *of_mine)
    again = [("update.exact", "mine", "pass"), ("errors.shape", "mine", "not-applicable")]
    second = written(tmp_path / "b.json", "2026-11-02T00:00:00+00:00", *again)
    assert main(["subjects", second, first]) == 0
    assert rows(capsys)["mine"][1:3] == ["2 of 3", "errors.shape"]


def test_a_subject_has_the_versions_it_was_examined_with_and_its_updates_medians(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    run = written(tmp_path / "a.json", "2026-11-01T00:00:00+00:00", ("update.exact", "other", "unsupported"))
    assert main(["subjects", run]) == 0
    found = rows(capsys)
    assert "other" not in found, "expected no row of a subject that was neither judged nor timed"
    assert found["colocate"][:3] == ["0.33.0", "-", "-"]
    timed = dict(zip(found["head"][1:], found["colocate"], strict=True))
    assert all(" ms, " in timed[f"update of {model}"] for model in ("qwen3-0.6b", "qwen3-8b"))


def test_a_model_that_few_subjects_updated_has_no_column(tmp_path: Path, capsys: pytest.CaptureFixture):
    document = reports_data.run()
    kept = [
        entry
        for entry in document["benchmarks"]
        if entry["extra_info"].get("model") == "qwen3-0.6b" or entry["extra_info"].get("subject") == "colocate"
    ]
    for index in range(3):
        kept += [
            {**entry, "name": f"{entry['name']}{index}", "fullname": f"{entry['fullname']}{index}",
             "extra_info": entry["extra_info"] | {"subject": f"other{index}"}}
            for entry in kept[:2] if entry["extra_info"]["model"] == "qwen3-0.6b"
        ]  # fmt: skip
    document["benchmarks"] = kept
    reports_data.write(document, tmp_path / "run.json")
    assert main(["subjects", str(tmp_path / "run.json")]) == 0
    assert [name for name in rows(capsys)["head"] if name.startswith("update of")] == ["update of qwen3-0.6b"]


def test_runs_of_other_hardware_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = written(tmp_path / "a.json", "2026-11-01T00:00:00+00:00")
    elsewhere = reports_data.run()
    for device in elsewhere["environment"]["devices"]:
        device["name"] = "NVIDIA B200"
    reports_data.write(elsewhere, tmp_path / "b.json")
    command = ["subjects", run, str(tmp_path / "b.json")]
    assert main(command) == 2
    assert "environment: expected the hardware of" in capsys.readouterr().err
    assert main([*command, "--across-machines"]) == 0
