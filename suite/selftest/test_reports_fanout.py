"""What feeding several engines costs is shown beside the update of one engine alone."""

import copy

import pytest

import reports
from reports import export, fanout, load, page
from suite.selftest import reports_data as data

TWO, THREE = 1.5, 2.0  # times that of one engine


def run_with(**engines: object) -> dict:
    """A run with an update of one engine, and with those of several: {stage: how many engines}."""
    made = copy.deepcopy(data.run(stages=data.GPU_STAGES))
    alone = next(e for e in made["benchmarks"] if e["name"] == "test_update[broadcast-gpu-split-qwen3-8b]")
    for (stage, count), slower in zip(engines.items(), (TWO, THREE), strict=False):
        samples = [slower * sample for sample in alone["stats"]["data"]]
        extra = alone["extra_info"] | {"stage": stage.replace("_", "-"), "engines": count}
        made["benchmarks"].append(data.benchmark("update", f"test_fanout[{stage}]", samples, extra))
    return made


def parsed(made: dict) -> load.Run:
    return load.parse(made, "run.json")


def test_each_number_of_engines_has_a_row_with_its_share_of_one():
    run = parsed(run_with(gpu_fanout=2, gpu_fanout3=3))
    head, rows = fanout.table(run.timings)
    assert [row[2:4] for row in rows] == [("1", "gpu-split"), ("2", "gpu-fanout"), ("3", "gpu-fanout3")]
    assert {row[:2] for row in rows} == {("broadcast", "qwen3-8b")}
    shares = [float(row[head.index("of one engine")].removeprefix("x")) for row in rows]
    assert shares == pytest.approx([1, TWO, THREE], rel=0.05)
    alone, two, three = (float(row[head.index("GB/s in all")]) for row in rows)
    assert (two / alone, three / alone) == pytest.approx((2 / TWO, 3 / THREE), rel=0.1)


def test_all_pages_have_the_table_and_none_without_several_engines():
    one, several = run_with(), run_with(gpu_fanout=2)
    assert fanout.table(parsed(one).timings)[1] == []
    for show in (page.run_page, export.run_markdown):
        assert "of one engine" in show(parsed(several))
        assert "of one engine" not in show(parsed(one))
    assert "of one engine" in reports.render_text(several)
    assert "of one engine" not in reports.render_text(one)


def test_without_the_update_of_one_engine_the_others_stand_alone():
    made = run_with(gpu_fanout=2)
    made["benchmarks"] = [entry for entry in made["benchmarks"] if entry["extra_info"]["stage"] != "gpu-split"]
    (row,) = fanout.table(parsed(made).timings)[1]
    assert (row[2], row[5]) == ("2", "-")


def test_an_update_on_gpus_is_not_compared_with_one_on_a_cpu():
    made = run_with(gpu_fanout=2)
    for entry in made["benchmarks"]:
        if entry["extra_info"]["stage"] == "gpu-split":
            entry["extra_info"]["stage"] = "cpu-tp1"
    assert [row[3] for row in fanout.table(parsed(made).timings)[1]] == ["gpu-fanout"]


@pytest.mark.parametrize("count", [0, 1.5])
def test_a_number_of_engines_that_is_none_is_refused(count: float):
    with pytest.raises(load.UnusableInput, match=r"a number of engines, from 1 on"):
        parsed(run_with(gpu_fanout=count))
