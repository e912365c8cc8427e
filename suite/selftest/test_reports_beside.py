"""Subjects that were timed in one run are compared with each other, and those of different runs are not."""

import copy

import pytest

from reports import beside, load
from suite.selftest import reports_data as data


def run_with(**subjects: float) -> load.Run:
    """A run in which subjects were timed beside each other: {subject: its times are these times broadcast's}."""
    made = copy.deepcopy(data.run(stages=data.GPU_STAGES))
    alone = next(e for e in made["benchmarks"] if e["name"] == "test_update[broadcast-gpu-split-qwen3-8b]")
    made["benchmarks"] = []
    for subject, times in subjects.items():
        samples = [times * sample for sample in alone["stats"]["data"]]
        extra = alone["extra_info"] | {"subject": subject}
        made["benchmarks"].append(data.benchmark("update", f"test_update[{subject}]", samples, extra))
    return load.parse(made, "run.json")


def figures(run: load.Run) -> dict[str, float]:
    return {label: float(cell.partition(" ")[0].removeprefix("x")) for label, cell in beside.faster_rows([run])}


def test_every_subject_is_compared_with_the_reference():
    found = figures(run_with(planned=0.1, verl=2.0, broadcast=1.0))
    assert [label.partition(" ")[0] for label in found] == ["planned", "verl"]
    assert all(label.endswith(" than broadcast") for label in found)
    assert [*found.values()] == pytest.approx([10, 0.5], rel=0.1)


def test_without_a_reference_the_slowest_is_what_others_are_compared_with():
    found = figures(run_with(verl=1.0, trl=3.0))
    assert [*found.values()] == pytest.approx([3], rel=0.1)
    [label] = found
    assert (label.partition(" ")[0], label.rpartition(" than ")[2]) == ("verl", "trl")


def test_who_was_timed_alone_has_no_row():
    assert beside.faster_rows([run_with(planned=1.0)]) == []
    apart = [run_with(planned=1.0), run_with(broadcast=1.0)]
    assert beside.faster_rows(apart) == []


def test_a_run_that_lacks_a_subject_has_no_figure_for_it():
    [row] = beside.faster_rows([run_with(planned=0.1, broadcast=1.0), run_with(broadcast=1.0)])
    assert row[2] == "-"
