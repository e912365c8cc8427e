"""The mutants are well formed, and what becomes of each in a run is judged without mercy."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from extensions.broadcast import WorkerExtension
from suite import ROOT
from suite.actors import probe
from suite.conformance.requirements import catalogue
from suite.driver.together import Together
from suite.selftest import fakes
from suite.selftest.mutants import MUTANTS, Mutant, plugin, registry, verdicts
from suite.selftest.mutants import __main__ as runner
from suite.selftest.mutants.__main__ import _stages, main
from suite.stages import STAGES
from suite.subjects import load, subject_from

STAGE_NAMES = {stage.name: stage for stage in STAGES}
THREADS = {thread for requirement in catalogue().values() for thread in requirement.seen_in}
ONE = MUTANTS["LoadsNothing"]


@pytest.fixture(autouse=True)
def several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever machine the tests run on."""
    monkeypatch.setattr(registry, "_one_gpu", lambda: False)


# ---- the mutants


class Halved(registry.Meddles, fakes.Worker):
    """Loads half of what it is sent, and nothing under one name."""

    def _mutant_load(self, load: registry.Loader, name: str, tensor: torch.Tensor) -> None:
        if name != "c.weight":
            load(name, tensor / 2)


def test_what_meddles_gets_each_tensor_between_the_checks_and_the_model(monkeypatch: pytest.MonkeyPatch):
    worker = fakes.fitted(monkeypatch, Halved)
    for updates in (1, 2):
        fakes.begin(worker)
        worker._weight_sync_accept(fakes.tensors(2 * updates))
        assert worker.end_update() == len(fakes.SHAPES)
        assert {name: held.unique().tolist() for name, held in worker.model.held.items()} == {
            "a.weight": [updates], "b.weight": [updates], "c.weight": [0],
        }  # fmt: skip
        assert worker._mutant_updates == updates


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_well_formed(mutant: Mutant):
    subject = subject_from(mutant.extension)
    assert issubclass(subject.load(), registry.REFERENCES[mutant.host].load())
    assert re.compile(mutant.says)
    assert mutant.does[0].isupper()
    assert mutant.does.endswith(".")
    if mutant.thread:
        assert mutant.thread in THREADS, (
            f"expected a thread that the catalogue or the notes cite, found {mutant.thread}"
        )
    assert issubclass(load(subject.sender), load(registry.REFERENCES[mutant.host].sender))


@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS)
def test_a_mutant_is_judged_where_its_requirement_is(mutant: Mutant):
    kinds = [kind for kind in ("cpu", "gpu") if mutant.stage(kind)]
    assert kinds
    assert catalogue()[mutant.requirement].on in ("both", *kinds)
    for kind in kinds:
        stage = STAGE_NAMES[mutant.stage(kind)]
        assert stage.kind == kind
        assert not subject_from(mutant.extension).unfit(stage)


def test_no_requirement_is_without_a_mutant():
    assert verdicts.without_mutant(MUTANTS.values(), "cpu") == []
    assert verdicts.without_mutant([m for m in MUTANTS.values() if m.gpu], "gpu") == []
    assert {mutant.requirement for mutant in MUTANTS.values()} == set(catalogue())


def test_a_requirement_without_a_mutant_is_found():
    fewer = [mutant for mutant in MUTANTS.values() if mutant.requirement not in ("update.tied", "update.fp8")]
    assert verdicts.without_mutant(fewer, "cpu") == ["update.tied"]
    assert verdicts.without_mutant(fewer, "gpu") == ["update.fp8"]


def test_a_name_that_is_none_is_no_attribute():
    with pytest.raises(ValueError, match="there is no mutant Nobody"):
        load("suite.selftest.mutants:Nobody")


# ---- which are run


def test_all_or_those_of_a_name_are_selected():
    assert {m.name for m in verdicts.select([], "cpu")} == {m.name for m in MUTANTS.values() if m.cpu}
    assert [m.name for m in verdicts.select(["Transposes", "SkipsZeros"], "cpu")] == ["SkipsZeros", "Transposes"]


@pytest.mark.parametrize(
    ("names", "kind", "said"),
    [(["Nobody"], "cpu", "Nobody: expected one of"), (["MovesParameters"], "cpu", "can't be judged with --kind cpu")],
)
def test_names_that_can_not_be_run_are_refused(names: list[str], kind: str, said: str):
    with pytest.raises(ValueError, match=said):
        verdicts.select(names, kind)
    assert main([*names, "--kind", kind]) == 2


def test_a_sample_is_of_as_many_requirements_and_every_mutant_has_its_turn():
    patient = {mutant.name for mutant in MUTANTS.values() if mutant.patient}
    everything = {mutant.name for mutant in verdicts.select([], "cpu")} - patient
    found: Counter[str] = Counter()
    for seed in range(300):
        chosen = verdicts.select([], "cpu", sample=6, seed=seed)
        assert len({mutant.requirement for mutant in chosen}) == 6
        found.update(mutant.name for mutant in chosen)
    assert set(found) == everything
    assert verdicts.select([], "cpu", 6, 3) == verdicts.select([], "cpu", 6, 3)


def test_a_sample_of_more_than_there_are_requirements_has_no_mutant_twice():
    chosen = verdicts.select([], "cpu", sample=500)
    assert len(chosen) == len(set(chosen)) > 40


def test_mutants_of_stages_that_this_machine_can_not_hold_are_left_out():
    tp2, fanout = MUTANTS["SkipsRankOne"], MUTANTS["UpdatesTheFirstEngineOnly"]
    missing = {"gpu-colocate-tp2": "needs 2 whole GPUs, found 1", "gpu-fanout": "needs 3 whole GPUs, found 1"}
    away = {tp2.name: "gpu-colocate-tp2: needs 2 whole GPUs, found 1"}
    assert verdicts.held([ONE, tp2], "gpu", missing, 1) == ([ONE], away)
    assert verdicts.held([ONE, fanout], "gpu", missing, 1)[0] == [ONE]
    assert verdicts.held([ONE, tp2, fanout], "cpu", missing, 0) == ([ONE, tp2, fanout], {})
    remap = MUTANTS["SkipsTheRemap"]
    assert verdicts.held([ONE, remap], "gpu", {}, 1) == (
        [ONE], {remap.name: "devices.remap: needs 2 GPUs, found 1"}
    )  # fmt: skip
    assert verdicts.held([ONE, remap], "gpu", {}, 2) == ([ONE, remap], {})


@pytest.mark.parametrize(("one", "stage"), [(True, "gpu-shared"), (False, "gpu-split")])
def test_on_one_gpu_broadcasts_are_judged_where_it_is_shared(monkeypatch, one: bool, stage: str):
    monkeypatch.setattr(registry, "_one_gpu", lambda: one)
    assert ONE.stage("gpu") == stage
    assert ONE.judged_by("gpu", ONE.requirement, stage, "")
    assert ONE.stage("cpu") == "cpu-tp1"
    assert MUTANTS["UpdatesTheFirstEngineOnly"].stage("gpu") == ("gpu-shared" if one else "gpu-fanout")
    assert MUTANTS["SkipsRankOne"].stage("gpu") == "gpu-colocate-tp2"


def test_the_stages_that_are_held():
    assert _stages([ONE, MUTANTS["SkipsRankOne"]], "cpu") == ["cpu-tp1", "cpu-tp2"]
    assert _stages([ONE], "gpu") == ["gpu-split"]
    assert _stages([MUTANTS["UpdatesTheFirstEngineOnly"]], "cpu") == ["cpu-tp1", "cpu-tp2"]
    assert _stages([MUTANTS["UpdatesTheFirstEngineOnly"]], "gpu") == ["gpu-fanout"]
    assert _stages([MUTANTS["ForgetsItsOffset"]], "cpu") == ["cpu-fanout"]


def test_mutants_of_named_subjects_are_judged_beside_these(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given: list[str] = []
    monkeypatch.setattr(runner, "_judged", lambda report, kind, arguments: given.extend(arguments))
    assert main(["IgnoresTheDigest", "ReadsStaleHandles", "--report", str(tmp_path)]) == 2
    hosts = [argument for argument in given if argument.startswith("--subject")]
    assert hosts == ["--subject=planned", "--subject=planned-colocate"]
    assert verdicts.controls([entry("planned", "pass")])


def test_repeats_name_no_subject_that_k_may_leave_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given: list[str] = []
    monkeypatch.setattr(runner, "_judged", lambda report, kind, arguments: given.extend(arguments))
    assert main(["--repeat", "2", "-k", "broadcast", "--report", str(tmp_path)]) == 2
    assert given == ["--repeat=2", "-k=broadcast"]


# ---- which cases are left


def case(subject: str, requirement: str, stage: str | None, case_id: str = "", marked: bool = True) -> SimpleNamespace:
    mark = SimpleNamespace(args=[requirement], kwargs={})
    params = {"subject": SimpleNamespace(name=subject), "stage": STAGE_NAMES.get(stage)}
    return SimpleNamespace(
        nodeid="", get_closest_marker=lambda name: mark if marked and name == "requirement" else None,
        callspec=SimpleNamespace(params=params, id=case_id),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("item", "left"),
    [
        (case("LoadsNothing", "update.exact", "cpu-tp1"), True),
        (case("LoadsNothing", "update.zeroed", "cpu-tp1"), False),
        (case("LoadsNothing", "update.exact", "cpu-tp2"), False),
        (case("broadcast", "update.exact", "cpu-tp1"), True),
        (case("colocate", "update.exact", "cpu-tp1"), False),
        (case("broadcast", "update.tied", "cpu-tp1"), False),
        (case("broadcast", "update.exact", "gpu-split"), True),
        (case("broadcast", "update.exact", "cpu-tp1", marked=False), False),
        (case("TakesAWorkersName", "names.free", None), True),
        (case("broadcast", "names.free", None), True),
        (case("SaysReadyWhenHalfLoaded", "faults.trainer_killed", "cpu-tp1", "x-during"), True),
        (case("SaysReadyWhenHalfLoaded", "faults.trainer_killed", "cpu-tp1", "x-after"), False),
        (case("broadcast", "faults.trainer_killed", "cpu-tp1", "x-after"), False),
    ],
)
def test_the_cases_that_are_left(item: SimpleNamespace, left: bool):
    chosen = [MUTANTS[name] for name in ("LoadsNothing", "TakesAWorkersName", "SaysReadyWhenHalfLoaded")]
    assert plugin._wanted(item, chosen) is left


def test_mutants_borrow_engines_and_patience_is_less(monkeypatch: pytest.MonkeyPatch):
    subjects = {name: subject_from(f"suite.selftest.mutants:{name}") for name in ("LoadsNothing", "ReadsFreedHandles")}
    monkeypatch.setattr(plugin, "selection_of", lambda config: SimpleNamespace(subjects=subjects))
    monkeypatch.setattr(Together, "call_deadline_s", 120.0)
    hook = plugin.pytest_sessionstart(SimpleNamespace(config=None))
    next(hook)
    assert {subject.host for subject in subjects.values()} == {""}, "expected the suite's own plugin to come first"
    with pytest.raises(StopIteration):
        next(hook)
    assert {name: subject.host for name, subject in subjects.items()} == {
        "LoadsNothing": "broadcast", "ReadsFreedHandles": "colocate"
    }  # fmt: skip
    assert Together.call_deadline_s == plugin.PATIENCE_S


# ---- what a run has shown


def entry(subject: str, verdict: str, detail: str = "", requirement: str = ONE.requirement) -> verdicts.Entry:
    return {
        "subject": subject, "requirement": requirement, "stage": "cpu-tp1", "verdict": verdict, "detail": detail,
        "nodeid": f"test_it[{subject}]",
    }  # fmt: skip


RIGHT = "expected the weights of an engine, found 19 weights that differ on rank 0"
CONTROL = entry("broadcast", "pass")


@pytest.mark.parametrize(
    ("entries", "outcome", "said"),
    [
        ([entry(ONE.name, "fail", RIGHT)], "killed", "19 weights"),
        ([entry(ONE.name, "pass"), entry(ONE.name, "fail", RIGHT)], "killed", "19 weights"),
        ([entry(ONE.name, "pass")], "SURVIVED", "it passed update.exact"),
        ([], "error", "it was not judged"),
        ([entry("broadcast", "fail", RIGHT)], "error", "it was not judged"),
        ([entry(ONE.name, "error", "setup: no engine")], "error", "setup: no engine"),
        ([entry(ONE.name, "fail", RIGHT), entry(ONE.name, "error", "call: bug")], "error", "call: bug"),
        ([entry(ONE.name, "unsupported", "has none")], "error", "has none"),
        ([entry(ONE.name, "not-applicable", "needs 2 GPUs")], "error", "needs 2 GPUs"),
        ([entry(ONE.name, "waived", RIGHT)], "error", "waived"),
        ([entry(ONE.name, "fail", "ModuleNotFoundError: mutants")], "error", "expected a failure that says"),
        ([entry(ONE.name, "fail", RIGHT, "update.tied")], "error", "update.tied"),
    ],
)
def test_outcome(entries: list[verdicts.Entry], outcome: str, said: str):
    found = verdicts.outcome_of(ONE, "cpu", entries)
    assert (found.outcome, found.stage) == (outcome, "cpu-tp1")
    assert said in found.detail


@pytest.mark.parametrize(
    ("entries", "whole", "problem"),
    [
        ([CONTROL, entry(ONE.name, "fail", RIGHT)], False, None),
        ([CONTROL, entry(ONE.name, "pass")], False, "LoadsNothing: SURVIVED"),
        ([entry(ONE.name, "fail", RIGHT)], False, "LoadsNothing: its reference was not judged"),
        ([entry("colocate", "pass"), entry(ONE.name, "fail", RIGHT)], False, "its reference was not judged"),
        (
            [entry("broadcast", "fail", RIGHT), entry(ONE.name, "fail", RIGHT)],
            False,
            "control test_it[broadcast]: fail",
        ),
        (
            [entry("broadcast", "unsupported"), entry(ONE.name, "fail", RIGHT)],
            False,
            "control test_it[broadcast]: unsup",
        ),
        ([CONTROL, entry(ONE.name, "fail", RIGHT)], True, "update.tied: no mutant names it"),
    ],
)
def test_problems(entries: list[verdicts.Entry], whole: bool, problem: str | None):
    summary = verdicts.summary([verdicts.outcome_of(ONE, "cpu", entries)], entries, "cpu", whole)
    assert bool(summary["problems"]) == (problem is not None)
    assert problem is None or any(problem in found for found in summary["problems"])


def test_counts_and_table():
    other = MUTANTS["Transposes"]
    entries = [CONTROL, entry(ONE.name, "fail", RIGHT), entry(other.name, "pass")]
    outcomes = [verdicts.outcome_of(mutant, "cpu", entries) for mutant in (ONE, other)]
    assert verdicts.summary(outcomes, entries, "cpu", whole=False)["counts"] == {
        "mutants": 2, "killed": 1, "survived": 1, "error": 0, "requirements": 1, "controls": 1, "controls passed": 1,
    }  # fmt: skip
    lines = verdicts.table(outcomes).splitlines()
    assert lines[2].split() == ["LoadsNothing", "update.exact", "cpu-tp1", "vllm#57022", "killed"]
    assert lines[3].split()[-1] == "SURVIVED"


def test_repeated():
    passed = verdicts.repeated([CONTROL, entry("colocate", "unsupported", requirement="devices.wrong_handle")], 20)
    assert (passed["problems"], passed["counts"]) == ([], {"pass": 1, "unsupported": 1})
    assert passed["requirements"]["update.exact"] == {"pass": 1}
    assert passed["subjects"]["devices.wrong_handle"] == {"colocate": {"unsupported": 1}}
    alarmed = verdicts.repeated([CONTROL, entry("broadcast", "fail", RIGHT), entry("colocate", "error", "no")], 20)
    assert [problem.split(":")[0] for problem in alarmed["problems"]] == ["test_it[broadcast]", "test_it[colocate]"]
    assert verdicts.repeated([], 20)["problems"] == ["nothing was judged"]


# ---- the command

PYTEST = """#!{python}
import json, pathlib, sys
report = pathlib.Path(next(a for a in sys.argv if a.startswith("--report=")).partition("=")[2])
print("collected 2 items")
entries = json.loads({entries!r})
if entries is not None:
    (report / "run.json").write_text(json.dumps({{"conformance": entries}}))
print("====== weight sync ======")
print("a table of mutants as if they were subjects")
sys.exit({ended})
"""


@pytest.mark.parametrize(
    ("entries", "ended", "code", "said"),
    [
        ([CONTROL, entry(ONE.name, "fail", RIGHT)], 1, 0, "1 of 1 mutant killed"),
        ([CONTROL, entry(ONE.name, "pass")], 0, 1, "! LoadsNothing: SURVIVED"),
        ([CONTROL, entry(ONE.name, "fail", RIGHT)], 2, 2, "pytest ended with 2"),
        (None, 1, 2, "pytest ended with 1"),
    ],
)
def test_exit_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    entries: list[verdicts.Entry] | None,
    ended: int,
    code: int,
    said: str,
):
    """With another program in the place of pytest, and the results of an earlier run lying about."""
    program, report = tmp_path / "python", tmp_path / "report"
    program.write_text(PYTEST.format(python=sys.executable, entries=json.dumps(entries), ended=ended))
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    report.mkdir()
    (report / "run.json").write_text(json.dumps({"conformance": [CONTROL, entry(ONE.name, "fail", RIGHT)]}))
    assert main([ONE.name, "--report", str(report)]) == code
    shown = capsys.readouterr().out
    assert said in shown
    assert "collected 2 items" in shown
    assert "as if they were subjects" not in shown
    assert "as if they were subjects" in (report / "pytest.txt").read_text()
    if code != 2:
        written = json.loads((report / "mutants.json").read_text())
        assert written["counts"]["killed"] == 1 - code
        assert written["mutants"][0]["does"] == ONE.does


def test_a_run_that_is_ended_ends_pytest(tmp_path: Path):
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable}\nimport os, time\nprint('pid', os.getpid(), flush=True)\ntime.sleep(600)\n")
    program.chmod(0o755)
    run = "runpy.run_module('suite.selftest.mutants', run_name='__main__')"
    code = f"import runpy, sys; sys.executable = {str(program)!r}; {run}"
    runner = subprocess.Popen(
        [sys.executable, "-c", code, ONE.name, "--report", str(tmp_path / "report")], cwd=ROOT,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with runner:
        pid = int(runner.stdout.readline().split()[1])
        runner.terminate()
        assert runner.wait(30) == 2
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


# ---- the exchange of extensions in a live worker


class Base:
    """Python does not exchange the bases of a class that has none but object."""


class Worker(Base):
    """As much of vLLM's worker as the probe touches."""

    device = torch.device("cpu")

    def execute_model(self) -> str:
        return "a step"


def test_a_worker_becomes_another_and_keeps_nothing(monkeypatch: pytest.MonkeyPatch):
    closed = []
    monkeypatch.setattr(WorkerExtension, "close_weight_update_group", lambda self: closed.append(type(self).__mro__))
    first = probe._probed("suite.selftest.mutants:LeavesTheEnginePaused")
    Worker.__bases__ = (Base, first)  # as vLLM does
    worker = Worker()
    worker.execute_model = worker._mutant_execute_model
    worker._mutant_kept, worker._weight_sync_state, worker.vllms_own = 1, None, worker.probe_device
    worker._sleep_mode_backend = object()  # it has slept under the mutant
    worker.probe_become("extensions.broadcast:WorkerExtension")
    assert isinstance(worker, WorkerExtension)
    assert not isinstance(worker, first)
    assert worker.__dict__.pop("_sleep_mode_backend") is None
    left = {"vllms_own", "_probe_settings"}
    assert set(vars(worker)) == left, "expected what the mutant has left to be gone, and nothing else"
    assert worker.execute_model() == "a step"
    assert len(closed) == 1
    assert first not in closed[0], "expected the new extension to clean up, not the mutant"


def test_no_two_classes_have_one_name():
    other = type("LoadsNothing", (), {"__module__": "elsewhere"})
    with pytest.raises(ValueError, match=r"elsewhere: there is a LoadsNothing in suite\.selftest\.mutants\.values"):
        registry.named(other)
