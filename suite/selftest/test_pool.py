"""The pool starts engines in order and ahead, lends one to many tests, and says what became of those that fail."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from reports.load import parse
from suite.driver import pool as module
from suite.driver import room, variables
from suite.driver.engines import EngineHandle, EngineKey, actor_of
from suite.driver.pool import Pool
from suite.models import MODELS, TIED
from suite.selftest.runs import ONE_CASE, examine
from suite.session.verdicts import ERROR, judge
from suite.stages import Stage
from suite.subjects import SUBJECTS

SOON_S = 20.0
A_WHILE_S = 0.3  # long enough to see that nothing happens
MODEL = TIED
STAGES = {
    name: Stage(name, "cpu", tensor_parallel_size=ranks, trainer_world_size=1, colocated=True)
    for name, ranks in (("cpu-tp1", 1), ("cpu-tp2", 2), ("cpu-other", 1))
}
STAGES["serve"] = Stage("serve", "cpu", 1, 1, colocated=True, server=True)
STAGES["gpu"] = Stage("gpu", "gpu", 1, 1, True, ("GPU-1",), ("GPU-1",), engine_visible=("1",), trainer_visible=("1",))
A, B, C, D = (EngineKey(MODEL, "cpu-tp1", subject, seed) for subject in ("broadcast", "colocate") for seed in (0, 1))
E = EngineKey(MODEL, "cpu-other", "broadcast", 0)


class Engine:
    """A process that becomes ready when it is let."""

    def __init__(self, label: str, arguments: dict) -> None:
        self.label, self.arguments = label, arguments
        self.may_end = threading.Event()
        self.error: Exception | None = None
        self.devices: list = [label]
        self.log = ""
        self.stopped = threading.Event()
        self.alive = True

    def ready(self, deadline_s: float) -> dict:
        assert self.may_end.wait(SOON_S)
        if self.error:
            raise self.error
        return {"devices": self.devices}

    def let(self, error: Exception | None = None) -> None:
        """Have the start end."""
        self.error = error
        self.may_end.set()

    def write(self, rank: int) -> None:
        """Write down what a rank computes with."""
        path = Path(self.arguments["oracle_path"] + f".rank{rank}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def stop(self, grace_s: float = 5) -> None:
        self.stopped.set()

    def tail(self, lines: int = 40) -> str:
        return self.log


class Started:
    """What has been launched, in order."""

    def __init__(self) -> None:
        self.engines: list[Engine] = []
        self.said: list[str] = []

    def start(self, name: str, target: str, arguments: dict, env: dict, deadline_s: float) -> Engine:
        kind = "server:Server" if "-serve-" in name else "serving:Serving"
        assert target == f"suite.actors.{kind if name.endswith('-serving') else 'engine:'}Engine"
        self.engines.append(Engine(name, arguments))
        return self.engines[-1]

    def of(self, key: EngineKey, again: int = 0) -> Engine:
        """The engine of a key, once it has been started, and started again."""
        label = f"engine-{key.model}-{key.stage}-{key.subject}-{key.seed}{'-again' if key.again else ''}"
        label += "-serving" if key.serves else ""
        eventually(lambda: self._labels().count(label) > again, f"{label} among {self._labels()}")
        return [engine for engine in self.engines if engine.label == label][again]

    def _labels(self) -> list[str]:
        return [engine.label for engine in self.engines]

    def stays_at(self, count: int) -> bool:
        """Whether so many have been started, and no more for a while."""
        eventually(lambda: len(self.engines) >= count, f"{count} engines")
        time.sleep(A_WHILE_S)
        return len(self.engines) == count


def eventually(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline, f"expected {what} within {SOON_S} s"
        time.sleep(0.01)


def get(pool: Pool, key: EngineKey) -> EngineHandle:
    """What a test of one engine is lent."""
    return pool.get_all([key])[0]


class Asked:
    """A call in a thread of its own: its result, or what it raised."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.result: object = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(function, *args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable, *args: object) -> None:
        try:
            self.result = function(*args)
        except BaseException as error:
            self.error = error

    def waits(self) -> bool:
        self._thread.join(A_WHILE_S)
        return self._thread.is_alive()

    def __call__(self) -> object:
        self._thread.join(SOON_S)
        assert not self._thread.is_alive(), f"expected an answer within {SOON_S} s"
        if self.error:
            raise self.error
        return self.result


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Two engines start at a time, and three may be there at once, unless a test says otherwise."""
    found = Started()
    monkeypatch.setattr(module, "MIN_STARTS", 2)
    monkeypatch.setattr(module, "MAX_STARTS", 2)
    monkeypatch.setattr(room.psutil, "virtual_memory", lambda: SimpleNamespace(available=0))
    return found


@pytest.fixture
def pool(started: Started, tmp_path: Path) -> Iterator[Pool]:
    numbers = itertools.count()
    launcher = SimpleNamespace(
        directory=tmp_path, start=started.start, link_path=lambda: str(tmp_path / f"link.{next(numbers)}"),
        scratch=lambda stem: tmp_path / f"{stem}.{next(numbers)}", address="127.0.0.1", free_port=lambda: 4711,
    )  # fmt: skip
    pool = Pool(launcher, STAGES, SUBJECTS, started.said.append)
    yield pool
    pool.close()
    for engine in started.engines:
        engine.let()


def plan(pool: Pool, *needs: list[EngineKey], references: tuple[EngineKey, ...] = ()) -> None:
    """Tests "0", "1", ... with the engines that each needs."""
    pool.plan({str(index): keys for index, keys in enumerate(needs)}, {"0": [*references]})


# ---- starting


def test_engines_start_in_the_order_of_the_tests_two_at_a_time(pool: Pool, started: Started):
    plan(pool, [A], [B], [A, C], [D])
    assert started.stays_at(2)
    started.of(B).let()
    started.of(A)
    started.of(C)
    assert started.stays_at(3)


def test_an_engine_that_starts_ahead_waits_for_room(pool: Pool, started: Started):
    plan(pool, [A], [B], [C], [D])
    for key in (A, B, C):
        started.of(key).let()
    assert started.stays_at(3)
    get(pool, A)
    pool.done("0")
    started.of(D).let()
    assert get(pool, D).key == D


def test_the_engine_that_a_test_waits_for_comes_first_and_needs_no_room(pool: Pool, started: Started):
    plan(pool, [A], [B], [C], [D], [E])
    for key in (A, B, C):
        started.of(key).let()
    assert started.stays_at(3)
    asked = Asked(get, pool, E)
    started.of(E).let()
    assert asked().key == E
    assert started.stays_at(4)


def test_an_engine_that_was_not_planned_is_started_when_asked_for(pool: Pool, started: Started):
    plan(pool)
    asked = Asked(get, pool, A)
    started.of(A).let()
    assert asked().key == A


def test_what_an_engine_is_told(pool: Pool, started: Started, tmp_path: Path):
    key = EngineKey(MODEL, "cpu-tp2", "colocate", 1, (("max_model_len", 64),))
    plan(pool, [key])
    engine = started.of(key)
    told = engine.arguments
    assert told["subject"] == SUBJECTS["colocate"].plain()
    assert told["tensor_parallel_size"] == 2
    assert (told["options"]["max_model_len"], told["options"]["enforce_eager"]) == (64, True)
    assert (Path(told["model"]) / "model.safetensors").exists()
    assert str(tmp_path) in told["link_path"]
    engine.let()
    handle = get(pool, key)
    assert (handle.ranks, handle.facts, handle.link_path) == (2, {"devices": [engine.label]}, told["link_path"])
    assert [line.partition(":")[2][:12] for line in started.said] == [" starting", " ready after"]


@pytest.mark.parametrize("found", ["GPU-1", "GPU-0"])
def test_an_engine_is_on_the_gpus_of_its_stage_or_not_used(pool: Pool, started: Started, found: str):
    key = EngineKey(MODEL, "gpu", "colocate", None)
    plan(pool, [key])
    engine = started.of(key)
    engine.devices = [{"id": found}]
    engine.let()
    if found == "GPU-1":
        assert get(pool, key).process is engine
        return
    with pytest.raises(RuntimeError, match=r"on \('GPU-1',\), found it on \('GPU-0',\)"):
        get(pool, key)
    assert engine.stopped.is_set()


def test_dummy_weights_need_no_checkpoint_and_write_none(pool: Pool, started: Started):
    key = EngineKey(MODEL, "cpu-tp1", "broadcast", None)
    plan(pool, [key])
    told = started.of(key).arguments
    assert (told["oracle_path"], told["options"]["load_format"]) == (None, "dummy")
    assert not (Path(told["model"]) / "model.safetensors").exists()


def test_a_checkpoint_is_written_once(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    written = []

    def write(spec: object, seed: int, directory: Path, dtype: str) -> None:
        written.append((spec, seed, dtype))
        time.sleep(0.05)
        directory.mkdir(parents=True)
        (directory / "model.safetensors").touch()

    monkeypatch.setattr(module.models, "write_checkpoint", write)
    asked = [Asked(pool.checkpoint, MODEL, seed) for seed in (0, 1, 0, 1, 0)]
    assert len({one() for one in asked}) == 2
    assert len(written) == 2
    pool.checkpoint(MODEL, 0, "float32")
    assert written[2] == (MODELS[MODEL], 0, "float32")


# ---- sharing and ending


def test_tests_share_an_engine_until_the_last_has_ended(pool: Pool, started: Started):
    plan(pool, [A], [A], [A])
    started.of(A).let()
    handles = [get(pool, A) for _ in range(3)]
    assert all(handle is handles[0] for handle in handles)
    pool.done("0")
    pool.done("1")
    pool.done("1")  # a test ends once
    assert not started.engines[0].stopped.wait(A_WHILE_S)
    pool.done("2")
    assert started.engines[0].stopped.wait(SOON_S)
    assert started.stays_at(1)


def test_an_engine_whose_tests_have_all_ended_before_it_has_started_ends_too(pool: Pool, started: Started):
    plan(pool, [A], [B])
    engine = started.of(A)
    pool.done("0")
    engine.let()
    assert engine.stopped.wait(SOON_S)


def test_a_test_of_two_engines_needs_both(pool: Pool, started: Started):
    plan(pool, [A, B], [B])
    for key in (A, B):
        started.of(key).let()
    first, second = get(pool, A), get(pool, B)
    pool.done("0")
    assert first.process.stopped.wait(SOON_S)
    assert not second.process.stopped.wait(A_WHILE_S)


def test_an_engine_that_is_discarded_is_replaced_for_the_next_test(pool: Pool, started: Started):
    plan(pool, [A], [A])
    started.of(A).let()
    old = get(pool, A)
    pool.discard(old)
    pool.discard(old)
    pool.done("0")
    assert old.process.stopped.wait(SOON_S)
    asked = Asked(get, pool, A)
    assert asked.waits()
    started.of(A, again=1).let()
    assert asked() is not old
    pool.discard(old)
    assert asked().process is started.of(A, again=1)
    assert not started.of(A, again=1).stopped.wait(A_WHILE_S), "expected the old engine to be discarded, not this one"
    assert started.stays_at(2)


def test_nothing_starts_after_the_end(pool: Pool, started: Started):
    plan(pool, [A], [B], [C])
    assert started.stays_at(2)
    pool.close()
    for engine in started.engines:
        engine.let()
    assert started.stays_at(2)


# ---- failing


def test_a_start_that_fails_reaches_every_test_that_needs_it_and_no_other(pool: Pool, started: Started):
    plan(pool, [A], [A], [B])
    asked = Asked(get, pool, A)
    assert asked.waits()
    started.of(A).let(RuntimeError("no such extension"))
    started.of(B).let()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no such extension"):
            get(pool, A)
    with pytest.raises(RuntimeError, match="no such extension"):
        asked()
    assert started.of(A).stopped.wait(SOON_S)
    assert any(line.endswith("failed to start (RuntimeError)") for line in started.said)
    assert get(pool, B).key == B
    assert started.stays_at(2), "expected a failed engine not to be tried again"


def test_a_process_that_cannot_be_started_reaches_the_test(pool: Pool):
    def start(*_: object) -> None:
        raise OSError("no more processes")

    pool.launcher.start = start
    plan(pool, [A], [B])
    for key in (A, B):
        with pytest.raises(OSError, match="no more processes"):
            get(pool, key)


def test_waiting_for_an_engine_has_a_deadline(pool: Pool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "START_DEADLINE_S", -59.8)
    plan(pool, [A])
    with pytest.raises(TimeoutError, match=r"no engine .* broadcast seed=0 after 0\.2 s: it is still starting"):
        get(pool, A)


# ---- quiet


def test_no_engine_starts_while_it_is_quiet(pool: Pool, started: Started):
    plan(pool, [A], [B], [C])
    started.of(A).let()
    entered, leave = threading.Event(), threading.Event()

    def measure() -> None:
        with pool.quiet():
            entered.set()
            leave.wait(SOON_S)

    get(pool, A)
    started.of(C)
    measuring = Asked(measure)
    assert measuring.waits()
    assert not entered.is_set(), "expected the starts under way to be waited for"
    started.of(B).let()
    started.of(C).let()
    assert entered.wait(SOON_S)
    pool.discard(get(pool, B))
    assert started.stays_at(3)
    leave.set()
    measuring()
    started.of(B, again=1).let()
    assert get(pool, B).process is started.of(B, again=1)


def test_it_is_not_quiet_any_more_after_an_error(pool: Pool, started: Started):
    with pytest.raises(ValueError, match="measured nothing"), pool.quiet():
        raise ValueError("measured nothing")
    plan(pool, [A])
    started.of(A)


# ---- references


def test_a_reference_that_no_test_updates_ends_when_it_has_written(pool: Pool, started: Started):
    plan(pool, [A], references=(B, A))
    for key in (A, B):
        started.of(key).write(0)
        started.of(key).let()
    assert started.of(B).stopped.wait(SOON_S)
    assert get(pool, A).process is started.of(A)
    assert not started.of(A).stopped.is_set()
    assert pool.oracle(A, 1) == started.of(B).arguments["oracle_path"]
    assert pool.oracle(A, 0) == started.of(A).arguments["oracle_path"]
    assert started.stays_at(2)


def test_a_reference_starts_right_after_the_engine_that_is_compared_with_it(pool: Pool, started: Started):
    plan(pool, [A], [C], [D], references=(B,))
    started.of(A)
    started.of(B)
    assert started.stays_at(2)


def test_an_oracle_is_there_when_all_its_ranks_have_written(pool: Pool, started: Started):
    key = EngineKey(MODEL, "cpu-tp2", "broadcast", 0)
    plan(pool, [key])
    asked = Asked(pool.oracle, key, 1)
    reference = started.of(replace(key, seed=1))
    assert asked.waits()
    reference.write(0)
    assert asked.waits()
    reference.write(1)
    assert asked() == reference.arguments["oracle_path"]
    reference.let()
    assert reference.stopped.wait(SOON_S), "expected a reference that no test updates to end once it has written"


def test_nothing_is_compared_with_a_server(pool: Pool, started: Started):
    server, other = (replace(key, stage="serve", serves=True) for key in (A, D))
    plan(pool, [server], [other])
    assert pool.reference(server, 1, [server, other, D]) == D
    assert pool.reference(server, 1, [server, other]) == replace(server, seed=1, serves=False)
    assert started.of(server).arguments["oracle_path"] is None


def test_a_second_oracle_is_an_engine_of_its_own(pool: Pool, started: Started):
    plan(pool, [A], [B])
    for key in (A, B):
        started.of(key).write(0)
        started.of(key).let()
    asked = Asked(pool.oracle, A, 1, True)
    second = started.of(replace(A, seed=1, again=True))
    assert asked.waits()
    assert second.arguments["oracle_path"] != started.of(B).arguments["oracle_path"]
    second.write(0)
    second.let()
    assert asked() == second.arguments["oracle_path"]
    assert second.stopped.wait(SOON_S), "expected it to end once it has written"
    assert pool.oracle(A, 1, again=True) == asked()


def test_how_far_cold_engines_are_apart_is_told_once(pool: Pool):
    told: list[str] = []
    pool.announce, pool._tolerances = told.append, {}
    for how_far in ("0.5 apart", "0.5 apart", "0.75 apart"):
        pool.tolerate(A, how_far)
    assert [line.partition("which is allowed: ")[2] for line in told] == ["0.5 apart", "0.75 apart"]
    assert pool._tolerances == {f"{MODEL} cpu 1 1": "0.75 apart"}


TOLD = """
from suite.session.record import TOLERANCES

@judged()
def test_first(subject, stage, model, pytestconfig):
    pytestconfig.stash.setdefault(TOLERANCES, {})["tiny cpu 1 1"] = "0.5 apart"
"""


def test_how_far_cold_engines_are_apart_stands_in_the_run_and_its_report(tmp_path: Path):
    document = examine(tmp_path, TOLD, *ONE_CASE).document
    assert document["environment"]["cold_answers"] == {"tiny cpu 1 1": "0.5 apart"}
    assert ("cold engines of tiny cpu 1 1", "0.5 apart") in parse(document, "run").environment.facts


def test_an_oracle_that_fails_to_start_reaches_the_test(pool: Pool, started: Started):
    plan(pool)
    asked = Asked(pool.oracle, A, 1)
    started.of(B).let(RuntimeError("no such checkpoint"))
    with pytest.raises(module.NoReference, match="did not start: no such checkpoint") as failed:
        asked()
    assert judge("call", failed.value).verdict == ERROR, "expected nothing to be said of the subject"


def test_an_engine_whose_port_was_taken_is_started_once_more(pool: Pool, started: Started):
    plan(pool, [A])
    asked = Asked(get, pool, A)
    for again in (0, 1):
        engine = started.of(A, again)
        engine.log = "DistNetworkError: The server socket has failed to listen: EADDRINUSE"
        engine.let(RuntimeError("Engine core initialization failed") if not again else None)
    assert asked().process is started.of(A, 1)


def test_an_engine_that_fails_otherwise_is_not_started_again(pool: Pool, started: Started):
    plan(pool, [A])
    asked = Asked(get, pool, A)
    started.of(A).let(RuntimeError("Engine core initialization failed"))
    with pytest.raises(RuntimeError, match="initialization failed"):
        asked()
    assert started.stays_at(1)


@pytest.mark.parametrize(
    ("other", "serves"),
    [
        (EngineKey(MODEL, "cpu-tp1", "colocate", 1), True),
        (EngineKey(MODEL, "cpu-other", "broadcast", 1, copy=1), True),
        (EngineKey(MODEL, "cpu-tp2", "broadcast", 1), False),
        (EngineKey(MODEL, "cpu-tp1", "broadcast", 0), False),
        (EngineKey(MODEL, "cpu-tp1", "broadcast", None), False),
        (EngineKey("llama-tiny", "cpu-tp1", "broadcast", 1), False),
        (EngineKey(MODEL, "cpu-tp1", "broadcast", 1, (("max_model_len", 64),)), False),
    ],
    ids=str,
)
def test_another_subjects_engine_serves_where_it_computes_the_same(pool: Pool, other: EngineKey, serves: bool):
    key = EngineKey(MODEL, "cpu-tp1", "broadcast", 0, visible="GPU-1", copy=2)
    found = pool.reference(key, 1, [key, other])
    assert found == (other if serves else EngineKey(MODEL, "cpu-tp1", "broadcast", 1))
    assert (pool.oracle_path(found) == pool.oracle_path(other)) == serves


@pytest.mark.parametrize(("gpu_bytes", "fits"), [(155e9, True), (86e9, False)])
def test_what_a_gpu_has_no_room_for_is_not_started(pool: Pool, started: Started, gpu_bytes: float, fits: bool):
    """Two copies of 32B in bfloat16 are 131 GB."""
    pool.room.gpu_memory = {"GPU-1": gpu_bytes}
    large, small = (EngineKey(model, "gpu", "colocate", None) for model in ("qwen3-32b", "qwen3-14b"))
    plan(pool, [large])
    assert started.stays_at(int(fits))
    assert pool.room.too_large([small]) == ""
    says = (
        "qwen3-32b on gpu: 65.5 GB of the engine's weights + 2.0 GB beside them + 5.0 GB of trainers without theirs"
        " + 65.5 GB of the trainer's weights = 138.0 GB on one GPU; the GPU has 86.0 GB, of which 92% may be planned"
        " for"
    )
    assert pool.room.too_large([large]) == ("" if fits else says)
    pool.room._keeping = {"colocate"}  # its trainer would keep a copy of what it sent
    assert "+ 65.5 GB of what it sent last = 203.6 GB on one GPU" in pool.room.too_large([large])


@pytest.fixture
def on_gpus(pool: Pool, started: Started, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Engines on GPUs, each where its stage says; two of `gpu-pair` share GPU-2 with that stage's trainer."""
    monkeypatch.setattr(module, "expect_on", lambda *_: None)
    pair = Stage("gpu-pair", "gpu", 1, 1, True, ("GPU-2", "GPU-2"), ("GPU-2",), ("2", "2"), ("2",), engines=2)
    monkeypatch.setattr(pool, "_stages", pool._stages | {"gpu-pair": pair})
    monkeypatch.setattr(pool.room, "_stages", pool._stages)
    pool.room.gpu_memory = {"GPU-1": 86e9, "GPU-2": 86e9}
    return pool


def gpu_engine(model: str, stage: str = "gpu", copy: int = 0) -> EngineKey:
    return EngineKey(model, stage, "colocate", None, copy=copy)


def test_an_engine_that_was_started_ahead_gives_way_to_a_trainer(on_gpus: Pool, started: Started):
    """14B and 8B fit beside each other, but not with a trainer's copy of 14B."""
    first, later = gpu_engine("qwen3-14b"), gpu_engine("qwen3-8b")
    plan(on_gpus, [first], [later])
    for key in (first, later):
        started.of(key).let()
    assert get(on_gpus, first).process is started.of(first)
    assert started.of(later).stopped.wait(SOON_S), "expected the engine that was started ahead to end"


def test_an_engine_that_was_started_ahead_gives_way_to_one_that_has_not_started(on_gpus: Pool, started: Started):
    """8B was started ahead and stands where 14B and its trainer's copy, asked for now, have no room beside it."""
    ahead, asked_for = gpu_engine("qwen3-8b"), gpu_engine("qwen3-14b")
    plan(on_gpus, [ahead])
    started.of(ahead).let()
    eventually(lambda: ahead in on_gpus._started, "the engine that starts ahead")
    asked = Asked(get, on_gpus, asked_for)
    assert started.of(ahead).stopped.wait(SOON_S), "expected the engine that was started ahead to end"
    started.of(asked_for).let()
    assert asked().key == asked_for


def test_an_engine_that_was_started_ahead_gives_way_to_a_reference(on_gpus: Pool, started: Started):
    first, ahead = (EngineKey("qwen3-8b", "gpu", "colocate", seed) for seed in (None, 2))
    on_gpus.checkpoint = lambda *_: ""
    on_gpus.room.gpu_memory = {"GPU-1": 70e9}  # three times 16.4 GB, 2 GB beside each of two, 5 GB of trainers
    plan(on_gpus, [first], [ahead])
    for key in (first, ahead):
        started.of(key).let()
    served = get(on_gpus, first)
    eventually(lambda: ahead in on_gpus._started, "the engine that starts ahead")
    asked = Asked(on_gpus.oracle, first, 1)
    assert started.of(ahead).stopped.wait(SOON_S), "expected the engine that was started ahead to end"
    started.of(replace(first, seed=1)).write(0)
    started.of(replace(first, seed=1)).let()
    asked()
    assert not served.process.stopped.is_set(), "expected the engine that the test has to stay"


def test_neither_engine_of_a_test_gives_way_to_the_other(on_gpus: Pool, started: Started):
    """All three fit beside each other; with the trainer's copy the two that the test has, and no third."""
    pair = [gpu_engine("qwen3-8b", "gpu-pair", copy) for copy in (0, 1)]
    ahead = gpu_engine("qwen3-4b", "gpu-pair")
    on_gpus.room.gpu_memory = {"GPU-2": 68e9}
    plan(on_gpus, [ahead], pair)
    started.of(ahead).let()
    for copy in (0, 1):
        started.of(pair[copy], again=copy).let()
    eventually(lambda: len(on_gpus._started) == 3, "three engines")
    engines = on_gpus.get_all(pair)
    assert [engine.key for engine in engines] == pair
    assert started.of(ahead).stopped.wait(SOON_S)
    assert not any(engine.process.stopped.is_set() for engine in engines), "expected a test's own engines to stay"


def test_what_gives_way_is_on_the_gpu_that_lacks_room_and_needed_last(on_gpus: Pool, started: Started):
    soon, last = gpu_engine("qwen3-4b"), gpu_engine("qwen3-8b")
    elsewhere, asked_for = gpu_engine("qwen3-4b", "gpu-pair"), gpu_engine("qwen3-14b")
    plan(on_gpus, [soon], [last], [soon], [elsewhere])
    for key in (soon, last, elsewhere):
        started.of(key).let()
    eventually(lambda: len(on_gpus._started) == 3, "three engines")
    asked = Asked(get, on_gpus, asked_for)
    assert started.of(last).stopped.wait(SOON_S)
    started.of(asked_for).let()
    asked()
    assert not started.of(elsewhere).stopped.is_set(), "expected an engine on another GPU to stay"
    assert not started.of(soon).stopped.is_set(), "expected the engine that is needed sooner to stay"


def test_engines_of_one_test_that_never_fit_together_are_not_waited_for(on_gpus: Pool, started: Started):
    pair = [gpu_engine("qwen3-14b", "gpu-pair", copy) for copy in (0, 1)]
    assert on_gpus.room.too_large(pair[:1]) == ""
    assert "= 97.6 GB on one GPU" in on_gpus.room.too_large(pair)
    plan(on_gpus, pair)
    assert started.stays_at(0)


def test_an_engine_that_has_ended_by_itself_is_replaced(pool: Pool, started: Started):
    plan(pool, [A], [A])
    started.of(A).let()
    get(pool, A).process.alive = False
    asked = Asked(get, pool, A)
    started.of(A, again=1).let()
    assert asked().process is started.of(A, again=1)


def test_a_mistake_in_the_pool_reaches_who_waits_and_the_next_engine_starts(
    pool: Pool, started: Started, monkeypatch: pytest.MonkeyPatch
):
    def wrong(*_: object) -> None:
        raise KeyError("no such stage")

    with monkeypatch.context() as patched:
        patched.setattr(pool, "_fits", wrong)
        plan(pool, [A])
        with pytest.raises(RuntimeError, match=r"no engine can be started: KeyError\('no such stage'\)"):
            get(pool, A)
    asked = Asked(get, pool, A)
    started.of(A).let()
    assert asked().key == A


def test_engines_that_share_a_gpu_pass_for_hosts_of_their_own():
    shared = replace(STAGES["gpu"], engines=2, hosts_apart=True, engine_visible=("1", "1"))
    first, second = (variables.of_engine(shared, copy, eager=True) for copy in (0, 1))
    assert first["CUDA_VISIBLE_DEVICES"] == second["CUDA_VISIBLE_DEVICES"] == "1"
    assert first["NCCL_HOSTID"] != second["NCCL_HOSTID"]
    assert "NCCL_HOSTID" not in variables.of_engine(STAGES["gpu"], 0, eager=True)


def test_a_config_that_engines_may_be_reading_is_not_written_again(pool: Pool):
    config = Path(pool.config(MODEL), "config.json")
    before = config.stat().st_mtime_ns
    time.sleep(0.02)  # longer than a file system's clock takes to go on
    assert Path(pool.config(MODEL), "config.json") == config
    assert config.stat().st_mtime_ns == before


def test_snapshots_have_paths_of_their_own(pool: Pool):
    assert pool.scratch() != pool.scratch()


def test_an_engine_that_serves_is_another_one_and_is_compared_with_one_that_does_not(pool: Pool, started: Started):
    serving = replace(A, serves=True)
    pool.plan({"one": [A], "other": [serving]}, {})
    started.of(A).let()
    assert get(pool, A).process is started.of(A)
    eventually(lambda: [engine.label for engine in started.engines[1:]] == [f"{started.of(A).label}-serving"], "both")
    started.engines[1].let()
    assert get(pool, serving).process is started.engines[1]
    assert pool.reference(serving, 1, []) == B
    assert pool.oracle_path(serving) == pool.oracle_path(A)


@pytest.mark.parametrize(
    ("server", "serves", "actor"),
    [
        (False, False, "suite.actors.engine:Engine"),
        (False, True, "suite.actors.serving:ServingEngine"),
        (True, True, "suite.actors.server:ServerEngine"),
        (True, False, "suite.actors.engine:Engine"),  # what a server is compared with
    ],
)
def test_only_a_server_gets_a_port_and_vllms_development_mode(server: bool, serves: bool, actor: str):
    stage = replace(STAGES["cpu-tp1"], server=server)
    place = {"address": "127.0.0.1", "port": 4711}
    launcher = SimpleNamespace(address=place["address"], free_port=lambda: place["port"])
    listens = actor.endswith(":ServerEngine")
    assert actor_of(replace(A, serves=serves), stage, launcher) == (actor, place if listens else {})
    assert variables.of_engine(stage, 0, eager=True)["VLLM_SERVER_DEV_MODE"] == ("1" if server else None)


def test_an_engine_goes_over_to_a_subject_that_differs_by_its_sender_alone():
    called, subject = [], SUBJECTS["broadcast"]
    process = SimpleNamespace(call=lambda *args, deadline_s: called.append(args))
    engine = EngineHandle(A, process, "", 1, subject.plain(), connection="old")
    engine.become(subject)
    assert (called, engine.connection) == ([], "old")
    other = replace(subject, sender="somewhere:Else")
    for _ in range(2):
        engine.become(other)
    assert (called, engine.connection) == ([("become", other.plain())], None)
