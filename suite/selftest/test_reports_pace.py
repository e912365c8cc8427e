"""A host that became slower is not taken for a slower vLLM, nor does a faster one hide it; old files do without."""

import copy
import re

import pytest

import reports
from reports import load, page
from reports.__main__ import main
from reports.compare import Comparison, compare
from reports.load import Run, UnusableInput
from reports.pace import Against
from reports.statistics import Ratio
from suite.selftest import reports_data as data

STAGE = data.GPU_STAGES[0]


def run(host: float = 1.0, updates: float = 1.0, seed: int = 1, **how: float) -> Run:
    return load.parse(document(host, updates, seed, **how), "made up")


def document(host: float, updates: float, seed: int, bytes_share: float = 0.1, call_s: float = 2e-4) -> dict:
    """A run whose pace is so many times slower, and whose updates are; `bytes_share` of them is the roofline's.

    An update of 310 tensors takes about 80 ms. call_s: an empty call's where the host is as it was.
    """
    made = data.run(seed=seed, slower=updates, host=host * call_s / 2e-4)
    for entry in made["benchmarks"]:
        extra, median_s = entry["extra_info"], entry["stats"]["median"] / updates
        unit = bytes_share * median_s / data.statistics.median(extra["roofline_samples_s"])
        extra["roofline_samples_s"] = [sample * unit for sample in extra["roofline_samples_s"]]
    return made


def without_pace(made: dict) -> dict:
    made = copy.deepcopy(made)
    del made["environment"]["pace"]
    return made


def verdicts(found: Comparison) -> set[tuple[str, str]]:
    return {(change.verdict, change.judged_by) for change in found.timings}


BOTH = "seconds and the host's pace"


@pytest.mark.parametrize(
    ("host", "updates", "verdict", "judged_by"),
    [
        (1.0, 1.0, "same", "seconds"),
        (1.0, 1.5, "slower", "seconds"),
        (2.0, 2.0, "inconclusive", BOTH),  # a slower host
        (1.5, 2.5, "slower", "seconds"),  # which does not explain all of it
        (2.0, 1.0, "inconclusive", BOTH),
        (0.5, 0.5, "inconclusive", BOTH),
        (0.5, 1.0, "inconclusive", BOTH),  # a faster host that may hide a slower vLLM
        (0.5, 0.4, "faster", "seconds"),
    ],
)
def test_a_drifting_host_is_told_from_a_changed_vllm(host, updates, verdict, judged_by):
    found = compare(run(seed=8), run(host, updates, seed=9))
    assert verdicts(found) == {(verdict, judged_by)}
    moved = "same" if host == 1.0 else "slower" if host > 1 else "faster"
    assert {drift.verdict for _, drift in found.pace_drift} == {moved}


def test_the_message_says_how_far_the_host_moved():
    found = compare(run(seed=8), run(2.0, 2.0, seed=9))
    for change in found.timings:
        expected = (
            r"slower in seconds, same x[\d.]+ \[.*\] once the host's pace is taken out, which is slower x(2\.0|1\.9)"
        )
        assert re.match(expected, change.why), change.why
    assert found.exit_status() == 0
    assert found.exit_status(strict=True) == 3


def test_a_time_that_is_mostly_the_hardwares_is_not_judged_by_the_hosts_pace():
    found = compare(run(seed=8, bytes_share=0.8), run(2.0, 1.5, seed=9, bytes_share=0.8))
    assert {change.against_pace for change in found.timings} == {None}
    assert verdicts(found) == {("slower", "seconds")}


def test_calls_that_take_next_to_nothing_explain_nothing():
    """310 calls of 2 µs are less than a hundredth of an update."""
    found = compare(run(seed=8, call_s=2e-6), run(2.0, 1.5, seed=9, call_s=2e-6))
    assert {drift.verdict for _, drift in found.pace_drift} == {"slower"}
    assert verdicts(found) == {("slower", "seconds")}


def test_an_update_of_few_calls_is_not_explained_by_their_pace():
    """310 tensors that travel by 4 calls: what a call a tensor would take says nothing."""
    made = [document(host, updates, seed) for host, updates, seed in ((1.0, 1.0, 8), (2.0, 1.5, 9))]
    assert verdicts(compare(*(load.parse(one, "made up") for one in made))) == {("inconclusive", BOTH)}
    for entry in (entry for one in made for entry in one["benchmarks"]):
        entry["extra_info"]["worker_calls"] = 4
    assert verdicts(compare(*(load.parse(one, "made up") for one in made))) == {("slower", "seconds")}


def test_a_call_that_one_run_has_not_measured_is_no_drift():
    before, after = document(1.0, 1.0, 8), document(1.0, 1.5, 9)
    for stage in before["environment"]["pace"].values():
        stage["empty_call_samples_s"] = []
    assert verdicts(compare(*(load.parse(one, "made up") for one in (before, after)))) == {("slower", "seconds")}


def ratio(verdict: str) -> Ratio:
    return Ratio(verdict, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("seconds", "drift", "relative", "told"),
    [
        ("slower", "same", "inconclusive", ""),  # a pace that did not move explains nothing
        ("slower", "slower", "slower", ""),
        ("slower", "slower", "inconclusive", "slower in seconds, inconclusive .* which is slower"),
        ("slower", "inconclusive", "inconclusive", "slower in seconds, inconclusive .* which is unsure"),
        ("same", "slower", "inconclusive", ""),
        ("same", "faster", "slower", "same in seconds, slower .* which is faster"),
        ("faster", "faster", "slower", "faster in seconds, slower .* which is faster"),
        ("inconclusive", "slower", "faster", ""),  # open in any case
    ],
)
def test_a_verdict_has_to_hold_with_the_drift_and_without(seconds, drift, relative, told):
    doubt = Against(ratio(drift), ratio(relative)).doubt(ratio(seconds))
    assert re.match(told, doubt) if told else doubt == ""


def test_swapping_two_runs_mirrors_the_verdicts():
    for host, updates in ((2.0, 2.0), (0.5, 1.0), (1.5, 2.5), (2.0, 1.0)):
        a, b = run(seed=8), run(host, updates, seed=9)
        there, back = compare(a, b), compare(b, a)
        expected = [data.mirrored(change.verdict) for change in back.timings]
        assert [change.verdict for change in there.timings] == expected


def test_runs_without_pace_are_compared_as_before_and_say_so(tmp_path, capsys):
    slower = document(2.0, 2.0, 9)
    for before, after, sides in (
        (without_pace(document(1.0, 1.0, 8)), slower, "A (gpu-split, gpu-colocate-tp2)"),
        (document(1.0, 1.0, 8), without_pace(slower), "B (gpu-split, gpu-colocate-tp2)"),
    ):
        files = [str(data.write(made, tmp_path / f"{number}.json")) for number, made in enumerate((before, after))]
        written = [tmp_path / "c.html", tmp_path / "c.md"]
        assert main(["compare", *files, "--html", str(written[0]), "--markdown", str(written[1])]) == 1
        out = " ".join(capsys.readouterr().out.split())
        assert f"The host's pace is not known in {sides}: a slower host may look like a slower vLLM." in out
        for file in written:
            assert "pace is not known in" in file.read_text()
        assert "12 slower" in out
        assert main(["trend", *files, "--html", str(written[0])]) == 0
        assert "pace is not known in" in written[0].read_text()
        capsys.readouterr()


def test_anyones_benchmarks_are_not_asked_for_a_pace(tmp_path, capsys):
    files = [str(data.write(data.plain_benchmarks(seed), tmp_path / f"{seed}.json")) for seed in (1, 2)]
    main(["compare", *files])
    assert "pace" not in capsys.readouterr().out


def test_the_drift_stands_beside_the_rooflines(tmp_path, capsys):
    files = [str(data.write(document(host, 1.0, 8), tmp_path / f"{host}.json")) for host in (1.0, 2.0)]
    written = [tmp_path / "c.html", tmp_path / "c.md"]
    main(["compare", *files, "--html", str(written[0]), "--markdown", str(written[1])])
    out = capsys.readouterr().out
    told = out.partition("The host's pace (what a call to all workers takes), B/A\n")[2].splitlines()[:5]
    assert [line.partition(" x2.00 [")[0] for line in told] == [
        "  slower: gpu-split empty call", "  slower: gpu-split call with a manifest",
        "  slower: gpu-colocate-tp2 empty call", "  slower: gpu-colocate-tp2 call with a manifest",
        "  same: 0 of 4 calls",
    ]  # fmt: skip
    for file in written:
        assert "slower: gpu-split empty call x2.00" in file.read_text().replace("\\", "")


def test_the_drift_stands_in_a_trend_and_its_table(tmp_path, capsys):
    files = [str(data.write(document(host, 1.0, 8), tmp_path / f"{host}.json")) for host in (1.0, 2.0)]
    assert main(["trend", *files, "--html", str(tmp_path / "t.html")]) == 0
    before, after = re.search(r"gpu-split empty call +(\d+) µs +▲ (\d+) µs", capsys.readouterr().out).groups()
    assert int(after) == pytest.approx(2 * int(before), abs=1)
    shown = (tmp_path / "t.html").read_text()
    assert f"▲ {after} µs" in shown
    assert "slower: gpu-split empty call x2.00" in shown
    assert shown.count('<td class="">? ') == 12, "expected updates that took the same on a slower host to be left open"
    assert main(["table", *files]) == 0
    assert f"| gpu-split empty call | {before} µs | ▲ {after} µs |" in capsys.readouterr().out


def test_a_run_shows_its_pace():
    made = data.run()
    expected = r"The host's pace on gpu-split: empty call \d+ µs, call with a manifest [\d.]+ [µm]s\."
    assert re.search(expected, reports.render_text(made))
    assert re.search(expected, page.run_page(load.parse(made, "run.json")).replace("&#39;", "'"))
    made["environment"]["pace"] = data.pace((STAGE,), 1, quiet=False)
    told = " ".join(reports.render_text(made).split())
    assert "(measured while engines may have been starting)." in told
    assert "pace" not in reports.render_text(without_pace(made))


@pytest.mark.parametrize("missing", ["empty_call_samples_s", "manifest_call_samples_s"])
def test_one_kind_of_call_will_do(missing):
    before, after = document(1.0, 1.0, 8, call_s=2e-2), document(2.0, 2.0, 9, call_s=2e-2)
    for made in (before, after):
        for pace in made["environment"]["pace"].values():
            del pace[missing]
    found = compare(load.parse(before, "a"), load.parse(after, "b"))
    assert verdicts(found) == {("inconclusive", BOTH)}


@pytest.mark.parametrize(
    ("value", "place", "message"),
    [
        ("fast", "environment.pace", "expected an object with a stage's pace each"),
        ({STAGE: 1.0}, f"environment.pace.{STAGE}", "expected an object with the samples of calls"),
        ({STAGE: {"empty_call_samples_s": 1.0}}, f"environment.pace.{STAGE}.empty_call_samples_s", "expected a list"),
        ({STAGE: {"empty_call_samples_s": [-1.0]}}, f"environment.pace.{STAGE}.empty_call_samples_s[0]", "0 or more"),
    ],
)
def test_a_malformed_pace_is_refused_with_its_place(value, place, message):
    made = data.run()
    made["environment"]["pace"] = value
    with pytest.raises(UnusableInput, match=message) as refused:
        load.parse(made, "run.json")
    assert refused.value.place == place


@pytest.mark.parametrize("value", [{}, None, {STAGE: {}}, {STAGE: {"quiet": True, "empty_call_samples_s": []}}])
def test_a_pace_without_samples_is_a_missing_one(value):
    made = data.run()
    made["environment"]["pace"] = value
    assert load.parse(made, "run.json").environment.paces == ()
