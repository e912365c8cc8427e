"""Trainers get the environment of their stage, and ports are free and stay so."""

import socket
from dataclasses import replace
from types import SimpleNamespace

import pytest

from suite.driver import trainers
from suite.driver.trainers import PORTS, TrainerFailed, TrainerGroup, Trainers, free_port
from suite.processes.process import Call, RemoteError
from suite.session.verdicts import ERROR, judge
from suite.stages import Stage

SHARED = Stage(
    "gpu-shared", "gpu", 1, 1, True, ("GPU-1",) * 2, ("GPU-1",), ("3", "3"), ("3",), engines=2, hosts_apart=True
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict, dict]]:
    """(name, arguments, environment) of every process."""
    found: list[tuple[str, dict, dict]] = []

    def launch(run: object, name: str, target: str, arguments: dict, env: dict, deadline_s: float) -> SimpleNamespace:
        assert target == "suite.actors.trainer:Trainer"
        found.append((name, arguments, env))
        return SimpleNamespace(prepare=lambda method: None)

    monkeypatch.setattr(trainers, "launch", launch)
    return found


def test_a_trainer_that_shares_its_gpu_passes_for_a_host_of_its_own(launched: list):
    TrainerGroup.of_stage(None, "doomed", SHARED)
    [(name, arguments, env)] = launched
    assert (name, arguments["device"]) == ("doomed-gpu-shared-rank0", "cuda")
    assert (env["CUDA_VISIBLE_DEVICES"], env["NCCL_HOSTID"], env["NCCL_NET"]) == ("3", "trainer-0", "Socket")


def test_ranks_see_a_gpu_each_and_nothing_of_other_hosts(launched: list):
    TrainerGroup.of_stage(None, "trainer", replace(SHARED, hosts_apart=False, trainer_visible=("0", "1")), 2)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, _, env in launched] == ["0", "1"]
    assert len({arguments["master_port"] for _, arguments, _ in launched}) == 1
    assert not any("NCCL_HOSTID" in env for _, _, env in launched)


def test_a_port_is_free_and_outside_of_what_the_system_hands_out():
    for port in {free_port() for _ in range(50)}:
        assert PORTS[0] <= port < PORTS[1]
        with socket.create_server((trainers.ADDRESS, port)):
            pass


def test_a_port_that_is_taken_is_not_given(monkeypatch: pytest.MonkeyPatch):
    with socket.create_server((trainers.ADDRESS, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(trainers, "PORTS", (port, port + 1))
        with pytest.raises(OSError, match=f"no port of {port}"):
            free_port()


class Rank:
    """A rank's process, which notes what it is called."""

    def __init__(self, name: str) -> None:
        self.name, self.alive, self.calls, self.fails = name, True, [], None

    def prepare(self, method: str) -> Call:
        return self.submit(method)

    def submit(self, method: str, *args: object) -> Call:
        self.calls.append((method, args))
        call = Call(self, f"{method}()")
        call.finish(error=self.fails)
        return call

    def preparing(self, call: Call) -> str:
        return ""

    def ready(self, deadline_s: float) -> None: ...

    def stop(self) -> None:
        self.alive = False


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> list[Rank]:
    """Every rank that was started."""
    found: list[Rank] = []

    def launch(run: object, name: str, *_: object) -> Rank:
        found.append(Rank(name))
        return found[-1]

    monkeypatch.setattr(trainers, "launch", launch)
    return found


CPU = Stage("cpu-tp1", "cpu", 1, 1, True)


def test_spare_trainers_start_before_one_is_asked_for(ranks: list[Rank]):
    given = Trainers(None, ahead=2)
    given.start(CPU, 1)
    assert len(ranks) == 1, "expected the spare ones to start once a test has its trainer"
    given.of(CPU, 1)
    assert [rank.name for rank in ranks] == ["trainer-of-1-cpu-tp1-rank0", *["spare-cpu-tp1-rank0"] * 2]
    assert given.spare(CPU).processes == [ranks[1]]
    assert len(ranks) == 4, "expected another spare one to have been started"


def test_none_is_kept_ready_for_trainers_of_several_ranks(ranks: list[Rank]):
    Trainers(None, ahead=2).of(CPU, 2)
    assert len(ranks) == 2


def test_a_spare_trainer_takes_the_place_of_one_that_has_ended_and_holds_the_same(ranks: list[Rank]):
    given = Trainers(None, ahead=1)
    trainer = given.of(CPU, 1)
    trainer.load("there")
    trainer.step(2, 7, 0.1)
    trainer.fill(0)
    trainer.fill(1)
    ranks[0].alive = False
    assert given.of(CPU, 1) is trainer
    assert trainer.processes == [ranks[1]]
    trainer.restore()
    assert ranks[1].calls == [("warm_up", ()), ("load", ("there", "bfloat16")), ("fill", (1,))]
    trainer.restore()
    assert len(ranks[1].calls) == 3, "expected it to be restored once"


def test_what_a_new_trainer_is_to_load_is_all_that_it_loads(ranks: list[Rank]):
    trainer = Trainers(None, ahead=1).of(CPU, 1)
    trainer.load("there")
    trainer.renew()
    trainer.load("elsewhere", "float32")
    trainer.load("elsewhere", "float32")
    assert ranks[1].calls == [("warm_up", ()), ("load", ("elsewhere", "float32"))]


def test_a_trainer_that_can_not_do_what_the_suite_asks_says_nothing_of_the_subject(ranks: list[Rank]):
    trainer = Trainers(None, ahead=1).of(CPU, 1)
    ranks[0].fails = RemoteError(
        SimpleNamespace(name="trainer", log_path=""), {"kind": "LoadError", "message": "no such file", "traceback": ""}
    )
    with pytest.raises(TrainerFailed, match=r"load\(\): LoadError in process trainer: no such file") as failed:
        trainer.load("there")
    assert judge("call", failed.value).verdict == ERROR


def test_a_trainer_without_a_replacement_just_ends(ranks: list[Rank]):
    trainer = Trainers(None, ahead=1).spare(CPU)
    trainer.renew()
    assert not trainer.alive
