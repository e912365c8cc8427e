"""The host's pace is measured inside an engine's process, once a run and stage, and stands in run.json."""

import contextlib
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from suite import fixtures, models
from suite.actors.engine import Engine
from suite.actors.probe import Probe
from suite.benchmarks import pace, test_throughput
from suite.driver.patience import Patience
from suite.processes.call import DeadlineExceeded
from suite.selftest.runs import ONE_CASE, examine
from suite.session.record import PACES

MANIFEST = [{"name": "a.weight", "dtype": "bfloat16", "shape": [2, 3]}]
LOG = SimpleNamespace(name="engine", log_path="engine.log", tail=lambda: "the last line")


class Called(Engine):
    """An engine whose calls to all workers take as many seconds as they are told, by a clock of their own."""

    def __init__(self, takes_s: list[float]) -> None:
        self.takes_s, self.calls, self.now_s = iter(takes_s), [], 0.0

    def rpc(self, method: str, *args: object) -> None:
        self.calls.append((method, *args))
        self.now_s += next(self.takes_s)


def test_an_engine_times_every_call_and_leaves_the_first_out(monkeypatch: pytest.MonkeyPatch):
    engine = Called([9.0, 1.0, 2.0, 8.0, 3.0, 4.0])
    monkeypatch.setattr("suite.actors.engine.time", SimpleNamespace(monotonic=lambda: engine.now_s))
    found = engine.pace(MANIFEST, 1, 2)
    assert found == {"empty_call_samples_s": [1.0, 2.0], "manifest_call_samples_s": [3.0, 4.0]}
    assert engine.calls == [("probe_nothing",)] * 3 + [("probe_nothing", MANIFEST)] * 3


def test_a_worker_takes_both_calls():
    assert Probe().probe_call("probe_nothing", []) == {"result": None}
    assert Probe().probe_call("probe_nothing", [MANIFEST]) == {"result": None}


def test_the_manifest_is_that_of_a_large_model():
    entries = models.manifest(models.MODELS[pace.MODEL])
    assert len(entries) == 399
    assert entries[0] == {"name": "model.embed_tokens.weight", "dtype": "bfloat16", "shape": [151936, 4096]}
    assert {entry["name"] for entry in entries} == {name for name, _ in models.tensors(models.MODELS["qwen3-8b"])}


class Process:
    """Answers with the number of the call, or raises."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls = error, []

    def call(self, method: str, *args: object, deadline_s: float) -> dict:
        self.calls.append((method, *args, deadline_s))
        if self.error:
            raise self.error
        return {"empty_call_samples_s": [float(len(self.calls))]}


def engine_on(stage: str, process: Process) -> SimpleNamespace:
    return SimpleNamespace(key=SimpleNamespace(stage=stage), process=process)


@pytest.fixture
def config() -> SimpleNamespace:
    return SimpleNamespace(stash=pytest.Stash())


def test_it_is_measured_once_a_stage(config: SimpleNamespace):
    process = Process()
    for stage in ("cpu-tp1", "cpu-tp1", "cpu-tp2", "cpu-tp1"):
        pace.measure(config, engine_on(stage, process))
    assert config.stash[PACES] == {
        "cpu-tp1": {"quiet": False, "empty_call_samples_s": [1.0]},
        "cpu-tp2": {"quiet": False, "empty_call_samples_s": [2.0]},
    }
    assert (
        process.calls
        == [("pace", models.manifest(models.MODELS[pace.MODEL]), pace.WARM_UPS, pace.SAMPLES, pace.DEADLINE_S)] * 2
    )
    assert pace.SAMPLES >= 20
    assert pace.WARM_UPS >= 3


def test_what_is_measured_when_it_is_quiet_replaces_the_rest_and_stays(config: SimpleNamespace):
    process = Process()
    for quiet in (False, True, True, False):
        pace.measure(config, engine_on("cpu-tp1", process), quiet)
    assert config.stash[PACES] == {"cpu-tp1": {"quiet": True, "empty_call_samples_s": [2.0]}}


def test_an_engine_that_does_not_answer_leaves_the_pace_unknown_until_another_does(
    config: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
):
    said = []
    monkeypatch.setattr(pace, "state_of", lambda config: SimpleNamespace(announce=said.append))
    pace.measure(config, engine_on("cpu-tp1", Process(DeadlineExceeded("no answer in 10 s", LOG, "pace()"))))
    assert config.stash[PACES] == {}
    assert said == ["cpu-tp1: the host's pace is not known: no answer in 10 s"]
    pace.measure(config, engine_on("cpu-tp1", Process()))
    assert [*config.stash[PACES]] == ["cpu-tp1"]


def test_a_mistake_of_the_suite_is_not_taken_for_an_engine_that_does_not_answer(config: SimpleNamespace):
    with pytest.raises(TypeError, match="a mistake"):
        pace.measure(config, engine_on("cpu-tp1", Process(TypeError("a mistake"))))


# ---- where it is measured, and where it stands


def test_the_first_engine_that_a_test_is_lent_measures_it(monkeypatch: pytest.MonkeyPatch, config: SimpleNamespace):
    """Before the test has it, so that every run knows its pace."""
    measured = []
    monkeypatch.setattr(fixtures.pace, "measure", lambda *args: measured.append(args))
    monkeypatch.setattr(fixtures, "engines_of", lambda item: ["first", "second"])
    engines = {name: SimpleNamespace(key=SimpleNamespace(seed=0), become=lambda subject: None) for name in
               ("first", "second")}  # fmt: skip
    pool = SimpleNamespace(
        room=SimpleNamespace(too_large=lambda keys: ""), get_all=lambda keys: [engines[key] for key in keys],
        timeline=lambda what, name: contextlib.nullcontext(),
        patience=Patience(),
    )  # fmt: skip
    values = {"subject": SimpleNamespace(name="s"), "stage": SimpleNamespace(name="t"), "model": models.TIED}
    request = SimpleNamespace(getfixturevalue=values.get, node=None, config=config)
    next(fixtures.lend(pool, SimpleNamespace(), request))
    assert measured == [(config, engines["first"])]


def test_a_measurement_has_it_measured_while_it_is_quiet(monkeypatch: pytest.MonkeyPatch, config: SimpleNamespace):
    quiet, seen = [], []

    @contextmanager
    def of(whom: str):
        quiet.append(whom)
        yield
        quiet.remove(whom)

    monkeypatch.setattr(pace, "measure", lambda *args, quiet: seen.append((*args, quiet, *now())))
    now = lambda: sorted(quiet)  # noqa: E731
    moved = SimpleNamespace(elapsed_s=1.0, bytes_sent=8, tensors=1, steps_s={}, calls=3)
    sync = SimpleNamespace(
        update=lambda: moved, roofline=lambda nbytes, rounds: ("copy", [0.5]), peak_memory=lambda: (0, 0),
        engines=["engine"], subject=SimpleNamespace(name="s"), stage=SimpleNamespace(name="t"), model="qwen3-10m",
        spec=SimpleNamespace(elements=4), with_requests=lambda updates: [], renew=lambda: None,
        parts=lambda moved: {"transfer": 0.5},
    )  # fmt: skip
    benchmark = SimpleNamespace(extra_info={}, pedantic=lambda function, **how: function())
    pool, trainers = (SimpleNamespace(quiet=lambda whom=whom: of(whom)) for whom in ("engines", "trainers"))
    test_throughput._measure(benchmark, sync, pool, trainers, config)
    assert seen == [(config, "engine", True, "engines", "trainers")]
    assert benchmark.extra_info["worker_calls"] == 3
    assert benchmark.extra_info["parts_s"] == {"transfer": [0.5]}


MEASURED = """
from suite.session.record import PACES

@judged()
def test_first(subject, stage, model, pytestconfig):
    pytestconfig.stash.setdefault(PACES, {})[stage.name] = {"quiet": False, "empty_call_samples_s": [0.5]}
"""


def test_it_stands_in_the_environment_of_the_run(tmp_path: Path):
    gathered = examine(tmp_path, MEASURED, *ONE_CASE).document["environment"]
    assert gathered["pace"] == {"cpu-tp1": {"quiet": False, "empty_call_samples_s": [0.5]}}
    assert gathered["schema"] == 1


def test_a_run_that_has_not_measured_it_has_no_such_section(tmp_path: Path):
    document = examine(tmp_path, "@judged()\ndef test_first(subject, stage, model): pass\n", *ONE_CASE).document
    assert "pace" not in document["environment"]


@pytest.mark.parametrize("moves", [True, False])
def test_updates_that_are_timed_have_weights_to_bring(monkeypatch: pytest.MonkeyPatch, moves: bool):
    held = {"trainer": 0, "engine": 0}

    def update() -> None:
        held["engine"] = held["trainer"]

    def expect_exact(seed: int) -> None:
        assert held["engine"] == seed

    sync = SimpleNamespace(
        seed=0, load=lambda seed: held.update(trainer=seed), update=update, expect_exact=expect_exact,
        subject=SimpleNamespace(compares=False),
    )  # fmt: skip
    monkeypatch.setattr(test_throughput, "_measure", lambda *_: update() if moves else None)
    with contextlib.nullcontext() if moves else pytest.raises(AssertionError):
        test_throughput.test_update(None, sync, 1, None, None, None)
