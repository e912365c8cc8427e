"""Unusable files are refused with file, place and what was expected; anyone's pytest-benchmark JSON is read."""

import copy
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reports import load
from reports.load import UnusableInput, parse, read, read_all
from suite.selftest import reports_data as data
from suite.selftest.properties import examples

RUN = data.run(stages=data.CPU_STAGES)


def changed(path: str, value: object, document: dict = RUN) -> dict:
    """A copy with the member at a path such as "benchmarks.0.stats.data.3" replaced, or removed by `...`."""
    document = copy.deepcopy(document)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place = document
    for part in way:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return document


@pytest.mark.parametrize(
    ("path", "value", "place", "message"),
    [
        ("schema", 2, "schema", "expected schema 1, found 2: a newer suite wrote it"),
        ("schema", "1", "schema", 'expected schema 1, found "1"'),
        ("schema", True, "schema", "expected schema 1, found true"),
        ("schema", ..., "schema", "expected schema 1 beside 'conformance', found null"),
        ("environment.schema", 7, "environment.schema", "a newer suite"),
        ("conformance", {"a": 1}, "conformance", "expected a list, found an object of 1"),
        ("conformance.3", "pass", "conformance[3]", 'expected an object, found "pass"'),
        ("conformance.3.verdict", "passed", "conformance[3].verdict", 'expected one of pass, fail, .* found "passed"'),
        ("conformance.3.level", ..., "conformance[3].level", "expected one of MUST, SHOULD, found nothing"),
        ("conformance.3.requirement", 4, "conformance[3].requirement", "expected a text, found 4"),
        ("conformance.3.duration_s", -1, "conformance[3].duration_s", "expected a number of 0 or more, found -1"),
        ("conformance.3.waiver_issue", 7, "conformance[3].waiver_issue", "expected a text, found 7"),
        ("conformance.3.cause", 7, "conformance[3].cause", "expected a text, found 7"),
        ("stale_waivers", "one", "stale_waivers", "expected a list"),
        ("stale_waivers", [7], "stale_waivers[0]", "expected a text, found 7"),
        ("benchmarks", "none", "benchmarks", "expected a list"),
        ("benchmarks.1.stats", ..., "benchmarks[1].stats", "statistics, found nothing"),
        ("benchmarks.1.stats.data", [], "benchmarks[1].stats.data", "expected at least one sample"),
        ("benchmarks.1.stats.data.7", "0.1", "benchmarks[1].stats.data[7]", 'expected a number, found "0.1"'),
        ("benchmarks.1.stats.data.7", None, "benchmarks[1].stats.data[7]", "expected a number, found nothing"),
        ("benchmarks.1.stats.data.7", float("nan"), "benchmarks[1].stats.data[7]", "finite number, found nan"),
        ("benchmarks.1.stats.data.7", float("inf"), "benchmarks[1].stats.data[7]", "finite number, found inf"),
        ("benchmarks.1.stats.data.7", -0.5, "benchmarks[1].stats.data[7]", "0 or more, found -0.5"),
        ("benchmarks.1.stats.data.7", True, "benchmarks[1].stats.data[7]", "expected a number, found true"),
        ("benchmarks.1.extra_info", [], "benchmarks[1].extra_info", "expected an object"),
        ("benchmarks.1.extra_info.bytes_sent", "2 GB", "benchmarks[1].extra_info.bytes_sent", "expected a number"),
        ("benchmarks.1.extra_info.steps_s", 4, "benchmarks[1].extra_info.steps_s", "expected an object"),
        ("benchmarks.1.name", ..., "benchmarks[1].name", "expected a text, found nothing"),
        ("machine_info.node", float("nan"), "machine_info.node", "finite"),
        ("environment.devices", "H100", "environment.devices", "expected a list"),
        ("environment.vllm", "0.32", "environment.vllm", "expected an object"),
        ("environment.torch", 2.13, "environment.torch", "expected a text"),
        ("timeline.0.elapsed_s", "long", "timeline[0].elapsed_s", "expected a number"),
    ],
)
def test_a_wrong_value_is_refused_with_its_place(tmp_path, path, value, place, message):
    file = data.write(changed(path, value), tmp_path / "run.json")
    with pytest.raises(UnusableInput, match=message) as refused:
        read(file)
    assert refused.value.place == place
    assert str(refused.value).startswith(f"{file}: {place}: ")


COMPLETE = json.dumps(RUN)
DEEP = '{"benchmarks": ' + "[" * 100_000


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        ("", "line 1 column 1", "found an empty file"),
        (" \n", "line 1 column 1", "found an empty file"),
        (COMPLETE[: len(COMPLETE) // 2], "line 1 column", "was it cut off"),
        (COMPLETE[:-1], "line 1 column", "was it cut off"),
        ('{"benchmarks": [],}', "line 1 column", "not JSON"),
        ("benchmark,seconds\nupdate,1\n", "line 1 column 1", "not JSON"),
        ('{"benchmarks": [], "benchmarks": []}', "benchmarks", "found 'benchmarks' twice"),
        ('{"benchmarks": [{"name": "x", "stats": {}, "stats": {}}]}', "name 'x'", "found 'stats' twice"),
        ("[]", "", "expected an object"),
        ("{}", "", "no 'benchmarks'"),
        ('{"results": []}', "", "no 'benchmarks'"),
        ('{"benchmarks": [1e999]}', "benchmarks[0]", "found inf"),
        ('{"benchmarks": [' + "9" * 5000 + "]}", "", "not JSON|expected an object"),
        (DEEP, "", "nested without end|cut off"),
        (DEEP + "]" * 100_000 + "}", "", "nested without end"),
        (b"\x80\x81run", "byte 0", "expected JSON in UTF-8"),
        (b'{"benchmarks": [\xff]}', "byte 16", "expected JSON in UTF-8"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path, content, place, message):
    file = tmp_path / "run.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UnusableInput, match=message) as refused:
        read(file)
    assert place in refused.value.place
    assert str(file) in str(refused.value)


def test_a_huge_file_is_refused_without_reading_it_all(tmp_path):
    file = tmp_path / "huge.json"
    with open(file, "wb") as stream:
        stream.write(b'{"benchmarks": [')
        stream.truncate(100_000_000)
    with pytest.raises(UnusableInput, match=r"byte 64000000: expected at most 64 MB"):
        read(file)


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(UnusableInput, match="cannot be read"):
        read(tmp_path / "missing.json")


def test_for_a_directory_the_message_names_its_run(tmp_path):
    run = tmp_path / "run.json"
    with pytest.raises(UnusableInput, match=f"expected a file such as run.json, .* {run} does not exist"):
        read(tmp_path)
    data.write(RUN, run)
    with pytest.raises(UnusableInput, match=f"expected a file such as run.json, .* {run} exists: name that"):
        read(tmp_path)


@examples(0.6)
@given(st.integers(0, len(COMPLETE) - 1))
def test_a_run_cut_anywhere_is_refused_not_half_read(tmp_path_factory, length):
    file = tmp_path_factory.getbasetemp() / "cut.json"
    file.write_text(COMPLETE[:length])
    with pytest.raises(UnusableInput):
        read(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PLACES = ["schema", "stale_waivers", "conformance.0.waiver_issue", "conformance.0.waiver_reason",
          "conformance.0.cause", "environment.pace.cpu-tp1", "environment.pace.cpu-tp1.quiet",
          "environment.pace.cpu-tp1.empty_call_samples_s",
          "environment", "conformance", "benchmarks", "timeline", "datetime", "machine_info", "commit_info",
          *(f"environment.{name}" for name in RUN["environment"]), "environment.cpu.cores", "environment.vllm.version",
          *(f"conformance.0.{name}" for name in RUN["conformance"][0]), "benchmarks.0", "benchmarks.0.stats",
          *(f"benchmarks.0.{name}" for name in RUN["benchmarks"][0]), "benchmarks.0.stats.median",
          *(f"benchmarks.0.extra_info.{name}" for name in RUN["benchmarks"][0]["extra_info"])]  # fmt: skip


@examples(3)
@given(st.sampled_from(PLACES), json_values)
def test_a_hand_edited_run_is_read_or_refused_but_never_crashes(path, value):
    try:
        run = parse(changed(path, value), "edited")
    except UnusableInput:
        return
    assert run.timings or run.outcomes or path in ("benchmarks", "conformance")


def test_samples_that_do_not_fit_their_statistics_are_noted_and_count(tmp_path):
    document = data.scaled(RUN, 0, 1.2)
    document["benchmarks"][0]["stats"]["median"] /= 1.2
    run = parse(document, "edited")
    assert run.timings[0].median_s == pytest.approx(1.2 * parse(RUN, "run").timings[0].median_s)
    assert run.notes == ("benchmarks[0].stats.median is not the median of its data, which counts instead: "
                         "edited by hand?",)  # fmt: skip
    assert not parse(RUN, "run").notes


def test_the_same_benchmark_twice_is_refused():
    document = copy.deepcopy(RUN)
    document["benchmarks"].append(copy.deepcopy(document["benchmarks"][1]))
    with pytest.raises(UnusableInput, match=r"expected every benchmark once, found benchmarks\[1\] again"):
        parse(document, "edited")


def test_benchmarks_that_only_their_names_tell_apart_are_told_apart():
    document = copy.deepcopy(RUN)
    twin = copy.deepcopy(document["benchmarks"][1])
    document["benchmarks"].append(twin | {"name": "test_pause[x]", "fullname": "a.py::test_pause[x]"})
    keys = [timing.key for timing in parse(document, "run").timings]
    assert len(set(keys)) == len(keys) == len(RUN["benchmarks"]) + 1


@pytest.mark.parametrize("with_data", [True, False])
def test_anyones_pytest_benchmark_json_is_read(with_data):
    run = parse(data.plain_benchmarks(with_data=with_data), "bench/0001_plain.json")
    assert run.label == "0001_plain"
    assert [timing.label for timing in run.timings] == ["test_sort[10]", "test_sort[1000]"]
    assert [len(timing.samples_s) for timing in run.timings] == ([50, 50] if with_data else [0, 0])
    assert run.environment.hardware == "AMD Ryzen 7 (16 cores)"
    assert not run.outcomes


def test_what_pytest_benchmark_writes_here_is_read(tmp_path):
    (tmp_path / "test_it.py").write_text("def test_it(benchmark):\n    benchmark(sum, [1, 2])\n")
    command = [sys.executable, "-m", "pytest", "-q", "--benchmark-json=run.json", "--benchmark-max-time=0.01"]
    subprocess.run([*command, "-p", "no:cacheprovider"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    [timing] = read(tmp_path / "run.json").timings
    assert timing.label == "test_it"
    assert timing.samples_s
    assert read(tmp_path / "run.json").environment.hardware


def test_a_timing_whose_test_failed_is_marked():
    document = copy.deepcopy(RUN)
    failed = data.outcome("update.exact", "broadcast", "cpu-tp1", "qwen3-1m", "fail", "wrong")
    document["conformance"].append(failed | {"nodeid": document["benchmarks"][0]["fullname"]})
    assert [timing.failed for timing in parse(document, "run").timings[:2]] == ["fail", ""]


def test_a_run_cut_short_is_read():
    for part in ("benchmarks", "conformance", "timeline", "environment"):
        parse(changed(part, ...), "run")
    parse({"schema": 1, "benchmarks": []}, "run")


def test_runs_stand_in_the_order_of_their_versions(tmp_path):
    files = [data.write(data.run(vllm=v), tmp_path / f"{v}.json") for v in ("0.33.0", "0.9.2", "0.20.2", "0.20.10")]
    assert [run.label for run in read_all(files)] == ["0.9.2", "0.20.2", "0.20.10", "0.33.0"]
    twice = [*files, data.write(data.run(vllm="0.9.2"), tmp_path / "again.json")]
    assert [run.label for run in read_all(twice)][:2] == ["0.9.2", "again"]


def test_only_keeps_what_is_asked_for():
    run = load.only(parse(RUN, "run"), ["broadcast"], [], ["qwen3-1m"])
    assert {timing.subject for timing in run.timings} == {"broadcast"}
    assert {timing.model for timing in run.timings} == {"qwen3-1m"}
    assert run.outcomes == ()
