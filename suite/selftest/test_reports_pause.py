"""The time an engine cannot generate stands in every table, is compared as a figure of its own, and may be missing."""

import copy
import csv
import io
import random
from pathlib import Path
from typing import Any

import pytest

from reports import export, load, page, plots, text, trend
from reports.__main__ import main
from reports.compare import Comparison, TimingChange, compare
from reports.load import Run, UnusableInput
from reports.pause import LEGEND, MEANING
from suite.selftest import reports_data as data

MODELS = ("qwen3-0.6b", "qwen3-8b")
UPDATES, OVER_S, TOKEN_S = 5, 0.012, 0.008
NAMED = "broadcast gpu-split qwen3-8b pause"


def document(seed: int = 1, longer: float = 1.0, slower: float = 1.0, gb_per_s: float = 1.0) -> dict[str, Any]:
    """A run with pauses of two sizes; longer: how many times they are, slower: the updates, gb_per_s: the hardware."""
    made, rng = data.run(seed=seed, slower=slower), random.Random(seed)
    for entry in made["benchmarks"]:
        extra, median_s = entry["extra_info"], entry["stats"]["median"]
        extra["roofline_samples_s"] = [sample / gb_per_s for sample in extra["roofline_samples_s"]]
        if extra["model"] in MODELS:
            updates = data.noisy(median_s, UPDATES, 0.01, rng)
            pauses = [(update + OVER_S) * longer for update in updates]
            extra["in_flight"] = {"requests": 2, "pause_samples_s": pauses, "update_samples_s": updates,
                                  "token_samples_s": data.noisy(TOKEN_S, UPDATES, 0.01, rng)}  # fmt: skip
    return made


def run(**how: Any) -> Run:
    return load.parse(document(**how), "made up")


def small(found: Run) -> Run:
    """Little of it, for a page of which pictures are drawn."""
    return load.only(found, ["broadcast"], ["gpu-split"], ["qwen3-8b"])


def older() -> Run:
    """Of a suite that took the time around an update with no request in flight, by a name of its own."""
    made = data.run(seed=2)
    for entry in made["benchmarks"]:
        entry["extra_info"]["pause_samples_s"] = [1.0, 1.0]
    return load.parse(made, "an older run")


def pauses(found: Comparison) -> list[TimingChange]:
    return [change for change in found.timings if (change.after or change.before).pauses]


def verdicts(found: Comparison) -> tuple[set[str], set[str]]:
    """Those of the pauses and those of the updates."""
    paused = pauses(found)
    return {c.verdict for c in paused}, {c.verdict for c in found.timings if c not in paused}


# ---- read


def test_it_is_read_with_its_update(tmp_path: Path):
    timing = next(timing for timing in load.read(data.write(document(), tmp_path / "r.json")).timings if timing.pause)
    paused, over, token = timing.pause.medians_s
    assert paused > timing.median_s
    assert over == pytest.approx(OVER_S)
    assert token == pytest.approx(TOKEN_S, rel=0.05)


def test_a_file_without_it_is_read():
    assert [timing.pause for timing in older().timings] == [None] * 12
    assert older().figures == older().timings


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("pause_samples_s", [], "expected at least one sample, found 0"),
        ("token_samples_s", None, "expected at least one sample, found 0"),
        ("update_samples_s", [0.1], "expected 5 samples, as of pause_samples_s, found 1"),
        ("pause_samples_s", [-0.1], "expected a number of 0 or more"),
        ("pause_samples_s", "long", "expected a list"),
    ],
)
def test_wrong_samples_are_refused_with_their_place(name: str, value: Any, said: str):
    made = document()
    made["benchmarks"][0]["extra_info"]["in_flight"][name] = value
    with pytest.raises(UnusableInput, match=said) as refused:
        load.parse(made, "made up")
    assert refused.value.place.startswith(f"benchmarks[0].extra_info.in_flight.{name}")


# ---- shown


def test_a_terminal_shows_it_beside_the_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["show", str(data.write(document(), tmp_path / "run.json"))]) == 0
    said = capsys.readouterr().out
    listed = [line.split() for line in said.splitlines() if "+12.0 ms" in line]
    assert [line[:3] for line in listed] == [
        [subject, stage, model]
        for subject, stage in zip(data.SUBJECTS, data.GPU_STAGES, strict=True)
        for model in MODELS
    ]
    assert " ".join(said.split()).count(LEGEND) == 1
    assert max(map(len, said.splitlines())) <= 100


def test_a_pause_that_is_shorter_than_its_update_is_shown_so():
    made = document()
    in_flight = made["benchmarks"][0]["extra_info"]["in_flight"]
    in_flight["pause_samples_s"] = [update - 0.003 for update in in_flight["update_samples_s"]]
    assert "-3.00 ms" in text.run_text(load.parse(made, "made up"))


def test_a_page_and_a_markdown_table_show_it():
    shown = page.run_page(small(run()))
    assert LEGEND in shown
    assert shown.count("+12.0 ms") == 1
    assert shown.count('<th scope="col">pause</th>') == 1
    assert export.run_markdown(run()).count("+12.0 ms") == len(data.SUBJECTS) * len(MODELS)


def test_csv_has_it():
    rows = [row for row in csv.DictReader(io.StringIO(export.run_csv(run()))) if row["kind"] == "benchmark"]
    paused = [row for row in rows if row["pause_s"]]
    assert len(rows) == 12
    assert [row["model"] for row in paused] == [*MODELS, *MODELS]
    assert all(float(row["over_s"]) == pytest.approx(OVER_S) for row in paused)


def test_nothing_speaks_of_it_where_it_was_not_measured():
    shown = (
        export.run_markdown(older())
        + text.run_text(older())
        + text.compare_text(compare(older(), older()))
        + trend.trend_text([older()])
    )
    assert "pause" not in shown
    old = small(older())
    assert ">pause<" not in page.run_page(old)
    for made in (page.run_page(old), page.compare_page(compare(old, old)), page.trend_page([old], 0.1)):
        assert MEANING not in made


# ---- compared


@pytest.mark.parametrize(
    ("how", "of_pauses", "of_updates"),
    [
        ({}, "same", "same"),
        ({"longer": 1.5}, "slower", "same"),
        ({"longer": 0.7}, "faster", "same"),
        ({"slower": 1.5}, "slower", "slower"),
    ],
)
def test_it_is_judged_by_itself(how: dict[str, float], of_pauses: str, of_updates: str):
    found = compare(run(), run(seed=3, **how))
    assert len(pauses(found)) == len(data.SUBJECTS) * len(MODELS)
    assert verdicts(found) == ({of_pauses}, {of_updates})
    assert found.exit_status() == (1 if "slower" in (of_pauses, of_updates) else 0)


def test_its_ratio_has_an_interval():
    change = next(change for change in pauses(compare(run(), run(seed=3, longer=1.5))) if change.label == NAMED)
    assert 1.45 < change.seconds.low < change.seconds.ratio < change.seconds.high < 1.56
    assert change.after.gb_per_s is None, "expected no rate of a time in which the engine does more than the update"


def test_hardware_that_became_slower_is_not_counted_twice():
    """Its drift is listed once for an update, and it leaves a pause as open as the update."""
    found = compare(run(), run(seed=3, slower=1.5, gb_per_s=1 / 1.5))
    assert len(found.drift) == len(found.timings) - len(pauses(found)) == 12
    assert not any("pause" in label for label, _ in found.drift)
    of_pauses, of_updates = verdicts(found)
    assert of_pauses <= of_updates
    assert "slower" not in of_pauses


def test_the_texts_and_pages_of_a_comparison_have_it():
    found = compare(run(), run(seed=3, longer=1.5))
    said = " ".join(text.compare_text(found).split())
    assert "▲ slower qwen3-8b pause" in said
    assert MEANING in said
    shown = page.compare_page(compare(small(found.a), small(found.b)))
    assert NAMED in shown
    assert MEANING in shown
    assert NAMED in export.compare_markdown(found)
    assert f'name="{NAMED}"' in export.compare_junit(found)


def test_an_older_run_is_compared_without_it():
    found = compare(older(), run())
    assert pauses(found) == []
    assert len(found.timings) == 12


def test_a_pause_that_is_not_measured_any_more_is_lost():
    found = compare(run(), older())
    assert {change.verdict for change in pauses(found)} == {"only in A"}
    assert found.exit_status(("lost",)) == 1


def test_a_single_pause_that_is_missing_from_the_earlier_run_is_told():
    before = document()
    del before["benchmarks"][0]["extra_info"]["in_flight"]
    found = compare(load.parse(before, "A"), run(seed=3))
    assert [change.verdict for change in pauses(found)].count("only in B") == 1


# ---- over versions


def test_it_has_a_row_over_versions_after_its_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    made = {"0.24.0": document(), "0.26.0": document(seed=3, longer=1.5)}
    for version, each in made.items():
        each["environment"] = copy.deepcopy(each["environment"]) | {"vllm": {"version": version}}
    files = [str(data.write(each, tmp_path / f"{version}.json")) for version, each in made.items()]
    assert main(["trend", *files]) == 0
    said = capsys.readouterr().out
    labels = [line.split("  ")[0] for line in said.splitlines() if line.startswith("broadcast gpu-split qwen3-8b")]
    assert labels == [NAMED.removesuffix(" pause"), NAMED]
    assert [line for line in said.splitlines() if "pause" in line and "▲" in line]
    assert MEANING in " ".join(said.split())
    runs = [small(each) for each in load.read_all(files)]
    assert NAMED in page.trend_page(runs, 0.05)
    assert MEANING in trend.markdown_tables(runs)
    drawn = [axis.get_legend_handles_labels()[1] for figure in plots.trend(runs) for axis in figure.axes]
    assert all("qwen3-8b pause" in labels for labels in drawn)
