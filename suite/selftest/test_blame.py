"""Who is blamed: what the suite's own part of a process raises is an error, and what is examined raises is a fail.

A fault is planted in every such part, and the verdict is asked for as a test of the suite would get it.
"""

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions.manifest import manifest_of
from suite.actors import engine as engines
from suite.actors import probe
from suite.actors.dialogue import EngineSide
from suite.actors.link import Link
from suite.actors.sending import Sending
from suite.actors.watch import WorkerDied
from suite.processes.blame import Examined, SuiteFault, examined, of_the_suite, told
from suite.processes.call import Process
from suite.processes.local import LocalLauncher
from suite.selftest.blamed import in_torch, planted, raised_by, verdict
from suite.selftest.engined import Engined, ProbedWorker
from suite.selftest.fakes import fake_module, fitted, tensors
from suite.session.verdicts import ERROR, FAIL, judge
from suite.subjects import SUBJECTS

DEADLINE_S = 20.0


# ---- blocks


def test_of_blocks_within_each_other_the_innermost_counts():
    @examined()
    def subject(calls: Callable[[], None]) -> None:
        calls()

    assert verdict(raised_by(lambda: subject(planted))) == FAIL
    assert verdict(raised_by(lambda: subject(of_the_suite("do this")(planted)))) == ERROR
    assert verdict(raised_by(of_the_suite("do this")(lambda: subject(planted)))) == ERROR
    assert verdict(raised_by(planted)) == ERROR


def test_what_is_examined_may_say_in_its_own_words_what_the_suite_has_raised():
    def wraps(how: str) -> None:
        with examined():
            try:
                with of_the_suite("gather"):
                    planted()
            except SuiteFault as error:
                if how == "from":
                    raise RuntimeError("no tensors came") from error
                raise RuntimeError("no tensors came")  # noqa: B904 (as many do)

    assert [verdict(raised_by(lambda how=how: wraps(how))) for how in ("from", "in passing")] == [ERROR, ERROR]


def test_an_object_that_is_examined_is_called_as_it_is():
    held = SimpleNamespace(number=7, double=lambda value: 2 * value, fails=planted)
    proxy = Examined(held)
    assert (proxy.number, proxy.double(value=4), getattr(proxy, "abort", None)) == (7, 8, None)
    assert verdict(raised_by(proxy.fails)) == verdict(raised_by(lambda: proxy.unknown)) == FAIL


def test_who_is_blamed_crosses_processes(tmp_path: Path):
    with LocalLauncher(tmp_path / "logs") as launcher:
        process = launcher.start("worker", "suite.selftest.targets:Blamed")
        found = {how: called(process, how) for how in ("own", "subject", "exits", "calls_back")}
        failing = launcher.start("failing", "suite.selftest.targets:Blamed", {"fails": True})
        found["start"] = judge("call", raised_by(lambda: failing.ready(DEADLINE_S))).verdict
    expected = {"own": ERROR, "subject": FAIL, "exits": FAIL, "calls_back": ERROR, "start": ERROR}
    assert found == expected


def called(process: Process, method: str) -> str:
    return judge("call", raised_by(lambda: process.call(method, deadline_s=DEADLINE_S))).verdict


# ---- an engine's process, and its workers


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> ProbedWorker:
    return fitted(monkeypatch, ProbedWorker)


@pytest.fixture
def engine(worker: ProbedWorker, socket_path: str) -> Iterator[Engined]:
    engine = Engined(worker, socket_path, "broadcast")
    yield engine
    engine.close()


@pytest.mark.parametrize("what", ["_probe_weights", "_probe_rank", "probe_nothing"])
def test_a_probe_that_fails_in_a_worker(engine: Engined, worker: ProbedWorker, monkeypatch, what: str):
    method = what if what.startswith("probe") else "probe_zero"
    monkeypatch.setattr(probe, "effective_weights", planted)  # the walk that reads tensors
    monkeypatch.setattr(ProbedWorker, what, property(planted) if what == "_probe_rank" else planted)
    assert verdict(raised_by(lambda: engine.rpc(method))) == ERROR


def test_arguments_that_the_suite_can_not_adapt(engine: Engined, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "adapted", planted)
    assert verdict(raised_by(lambda: engine.rpc("update_weight", "a.weight", "float32", [2, 3]))) == ERROR


@pytest.mark.parametrize("raises", [planted, in_torch])
def test_an_extension_that_raises(engine: Engined, worker: ProbedWorker, raises: Callable):
    worker.update_weight = raises
    assert verdict(raised_by(lambda: engine.rpc("update_weight", "a.weight", "float32", [2, 3]))) == FAIL
    assert verdict(raised_by(lambda: engine.rpc("no_such_method"))) == FAIL


@pytest.mark.parametrize("of_all", [True, False])
def test_a_probe_that_fails_on_one_rank_is_no_fail_of_what_others_raise(engine: Engined, of_all: bool):
    replies = [{"error": "KeyError", "traceback": "", "examined": blamed} for blamed in (True, of_all)]
    engine.llm.collective_rpc = lambda *_, **__: replies
    assert verdict(raised_by(lambda: engine.rpc("update_weight"))) == (FAIL if of_all else ERROR)


@pytest.mark.parametrize("gone", [RuntimeError("the engine core is dead"), WorkerDied("7 has ended")])
def test_vllm_that_raises_whoever_asks(engine: Engined, gone: Exception):
    def raises(*_: object, **__: object) -> None:
        raise gone

    engine.llm.collective_rpc = engine.llm.reset_prefix_cache = engine.llm.generate = engine.llm.sleep = raises
    engine.sampling = lambda max_tokens: None
    asked = [
        lambda: engine.rpc("probe_nothing"), lambda: engine.generate([[1]], 1), lambda: engine.sleep(1),
        lambda: engine.call_llm("sleep", 1), engine.reset_caches,
    ]  # fmt: skip
    assert {verdict(raised_by(ask)) for ask in asked} == {FAIL}


def test_an_engine_of_vllm_is_examined_from_when_it_is_there(engine: Engined, monkeypatch: pytest.MonkeyPatch):
    def made(model: str) -> SimpleNamespace:
        return SimpleNamespace(generate=in_torch) if model else planted()

    fake_module(monkeypatch, "vllm", LLM=made)
    assert verdict(raised_by(engine._make(model="a").generate)) == FAIL
    assert verdict(raised_by(lambda: engine._make(model=""))) == ERROR


@pytest.mark.parametrize("where", ["sampling", "continuation"])
def test_an_engine_that_fails_at_what_it_asks_vllm(engine: Engined, monkeypatch: pytest.MonkeyPatch, where: str):
    engine.llm.generate = lambda *_, **__: [SimpleNamespace(outputs=[None])]
    engine._doubtful = False
    engine.sampling = planted if where == "sampling" else lambda max_tokens: None
    monkeypatch.setattr(engines, "continuation", planted)
    assert verdict(raised_by(lambda: engine.generate([[1]], 1))) == ERROR


# ---- both sides of an update


class Trainer:
    """A rank with tensors of its own; `gathers` may raise."""

    rank, world_size, device = 0, 1, torch.device("cpu")

    def __init__(self) -> None:
        self.gathers: Callable[[], None] = lambda: None

    def named_tensors(self, order: str, alter: dict | None) -> Iterator[tuple[str, torch.Tensor]]:
        for named in tensors().items():
            self.gathers()
            yield named

    def manifest(self, order: str, alter: dict | None) -> list[dict]:
        return manifest_of(tensors().items())


class Sender:
    """Sends nothing, or does what `does` does with the tensors."""

    does: Callable[[Any], Any] = staticmethod(list)
    begins: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, *_: object) -> None:
        self.begins()

    def send(self, named_tensors: Any) -> int:
        self.does(named_tensors)
        return 0

    def close(self) -> None: ...


class Sides:
    """Both halves of an update by broadcast, without a group: each side's error, and the verdict on it."""

    def __init__(self, engine: Engined, worker: ProbedWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.engine, self.worker, self.trainer = engine, worker, Trainer()
        self._ends = socket.socketpair()
        engine._links = [Link(self._ends[1], "the trainer")]
        self.sending = Sending(self.trainer)
        monkeypatch.setattr("extensions.broadcast.BroadcastSender", Sender)
        self.sending.connect(SUBJECTS["broadcast"].plain(), [], DEADLINE_S)
        self.sending._links = (Link(self._ends[0], "the engine"),)
        worker.init_weight_update_group = worker.update_weight = lambda *_: None
        worker.begin_update = worker.end_update = worker.abort_update = lambda *_: None

    def update(self) -> dict[str, str]:
        """{side: the verdict, where it has raised}."""
        found: dict[str, BaseException] = {}

        def take(side: str, call: Callable[[], Any]) -> None:
            try:
                call()
            except Exception as error:
                found[side] = error

        serving = threading.Thread(target=take, args=("engine", lambda: self.engine.update(DEADLINE_S)), daemon=True)
        serving.start()
        take("trainer", lambda: self.sending.update(DEADLINE_S))
        serving.join(DEADLINE_S)
        assert not serving.is_alive()
        return {side: verdict(error) for side, error in found.items()}

    def close(self) -> None:
        for end in self._ends:
            end.close()


@pytest.fixture
def sides(engine: Engined, worker: ProbedWorker, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sides]:
    sides = Sides(engine, worker, monkeypatch)
    sides.sending.invite("127.0.0.1", 1, 2)
    yield sides
    sides.close()


def test_an_update_without_a_fault(sides: Sides):
    assert sides.update() == {}


@pytest.mark.parametrize("step", ["receive", "begin", "transfer", "end"])
def test_an_adapter_that_fails_in_the_engine(sides: Sides, step: str):
    """Nor is the trainer's half blamed, which only hears of it."""
    setattr(sides.engine._half, step, planted)
    assert sides.update() == {"engine": ERROR, "trainer": ERROR}


@pytest.mark.parametrize("step", ["begin_update", "update_weight", "end_update"])
@pytest.mark.parametrize("raises", [planted, in_torch])
def test_an_extension_that_raises_in_an_update(sides: Sides, step: str, raises: Callable):
    setattr(sides.worker, step, raises)
    assert sides.update() == {"engine": FAIL, "trainer": FAIL}


def test_an_engine_that_fails_beside_its_half(sides: Sides, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(EngineSide, "expect_go", planted)
    assert sides.update() == {"engine": ERROR, "trainer": ERROR}


@pytest.mark.parametrize("step", ["gather", "announce", "send"])
def test_an_adapter_that_fails_in_the_trainer(sides: Sides, step: str):
    setattr(sides.sending._half, step, planted)
    found = sides.update()
    assert found.pop("trainer") == ERROR
    assert found in ({}, {"engine": ERROR}), "expected an engine that hears of it not to blame the subject"


@pytest.mark.parametrize("raises", [planted, in_torch])
def test_a_sender_that_raises(sides: Sides, monkeypatch: pytest.MonkeyPatch, raises: Callable):
    monkeypatch.setattr(Sender, "does", staticmethod(raises))
    assert sides.update()["trainer"] == FAIL


@pytest.mark.parametrize("wraps", [False, True])
def test_a_trainer_that_can_not_gather_what_a_sender_sends(sides: Sides, monkeypatch, wraps: bool):
    def careful(named_tensors: Any) -> None:
        try:
            list(named_tensors)
        except Exception as error:
            raise RuntimeError("the tensors have not come") from error

    sides.trainer.gathers = planted
    monkeypatch.setattr(Sender, "does", staticmethod(careful if wraps else list))
    assert sides.update()["trainer"] == ERROR


@pytest.mark.parametrize("begins", [planted, in_torch])
def test_a_sender_that_can_not_be_made(sides: Sides, monkeypatch: pytest.MonkeyPatch, begins: Callable):
    monkeypatch.setattr(Sender, "begins", staticmethod(begins))
    assert verdict(raised_by(lambda: sides.sending.invite("127.0.0.1", 1, 2))) == FAIL
    monkeypatch.setattr("extensions.broadcast.BroadcastSender", lambda: None)  # takes no arguments
    assert verdict(raised_by(lambda: sides.sending.invite("127.0.0.1", 1, 2))) == FAIL


def test_an_engine_whose_trainer_is_gone_says_only_that(sides: Sides):
    sides._ends[0].close()
    error = raised_by(lambda: sides.engine.update(DEADLINE_S))
    assert (told(error)["examined"], told(error)["echo"]) == (False, True)
