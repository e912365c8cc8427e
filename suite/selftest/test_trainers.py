"""Trainers get the environment of their stage, and ports are free and stay so."""

import itertools
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from suite.driver.trainers import TrainerFailed, TrainerGroup, Trainers
from suite.processes.call import Call, RemoteError
from suite.session.verdicts import ERROR, judge
from suite.stages import Stage

SHARED = Stage(
    "gpu-shared", "gpu", 1, 1, True, ("GPU-1",) * 2, ("GPU-1",), ("3", "3"), ("3",), engines=2, hosts_apart=True
)

A_MOMENT_S = 0.2


class Noting:
    """A launcher that notes (name, arguments, environment) of every process."""

    address = "10.0.0.7"

    def __init__(self) -> None:
        self.started: list[tuple[str, dict, dict]] = []
        self._ports = itertools.count(15000)

    def free_port(self) -> int:
        return next(self._ports)

    def start(self, name: str, target: str, arguments: dict, env: dict, deadline_s: float) -> object:
        assert target == "suite.actors.trainer:Trainer"
        self.started.append((name, arguments, env))
        return self.process(name)

    def process(self, name: str) -> object:
        return SimpleNamespace(prepare=lambda method: None)


@pytest.fixture
def launcher() -> Noting:
    return Noting()


def test_a_trainer_that_shares_its_gpu_passes_for_a_host_of_its_own(launcher: Noting):
    TrainerGroup.of_stage(launcher, "doomed", SHARED)
    [(name, arguments, env)] = launcher.started
    assert (name, arguments["device"]) == ("doomed-gpu-shared-rank0", "cuda")
    assert (env["CUDA_VISIBLE_DEVICES"], env["NCCL_HOSTID"], env["NCCL_NET"]) == ("3", "trainer-0", "Socket")


def test_ranks_see_a_gpu_each_and_nothing_of_other_hosts(launcher: Noting):
    TrainerGroup.of_stage(launcher, "trainer", replace(SHARED, hosts_apart=False, trainer_visible=("0", "1")), 2)
    assert [env["CUDA_VISIBLE_DEVICES"] for _, _, env in launcher.started] == ["0", "1"]
    assert not any("NCCL_HOSTID" in env for _, _, env in launcher.started)


def test_ranks_meet_where_their_launcher_says(launcher: Noting):
    TrainerGroup.of_stage(launcher, "trainer", replace(SHARED, trainer_visible=("0", "1")), 2)
    meeting = [(arguments["master_address"], arguments["master_port"]) for _, arguments, _ in launcher.started]
    assert meeting == [("10.0.0.7", 15000)] * 2


class Rank:
    """A rank's process, which notes what it is called."""

    def __init__(self, name: str) -> None:
        self.name, self.alive, self.calls, self.fails = name, True, [], None

    def stalled_s(self) -> float:
        return 0.0

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


class Ranks(Noting):
    """A launcher that keeps every rank that it starts."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks: list[Rank] = []

    def process(self, name: str) -> "Rank":
        self.ranks.append(Rank(name))
        return self.ranks[-1]


@pytest.fixture
def starting() -> Ranks:
    return Ranks()


@pytest.fixture
def ranks(starting: Ranks) -> list[Rank]:
    """Every rank that was started."""
    return starting.ranks


def test_a_trainer_that_sees_gpus_in_its_own_way_is_started_ahead_and_given_once(starting: Ranks, ranks: list[Rank]):
    given = Trainers(starting, ahead=1)
    given.start_seeing("1,0", "cuda:1")
    assert given.seeing("1,0", "cuda:1").processes == [ranks[0]]
    assert given.seeing("1,0", "cuda:1").processes == [ranks[1]], "expected another one for who comes next"
    given.seeing(None, "cuda:1").ready()
    assert [env["CUDA_VISIBLE_DEVICES"] for _, _, env in starting.started] == ["1,0", "1,0", None]
    assert {arguments["device"] for _, arguments, _ in starting.started} == {"cuda:1"}
    assert ranks[0].calls == [("warm_up_computing", ())], "expected nothing to be imported for groups it never joins"


CPU = Stage("cpu-tp1", "cpu", 1, 1, True)


def test_spare_trainers_start_before_one_is_asked_for(starting: Ranks, ranks: list[Rank]):
    given = Trainers(starting, ahead=2)
    given.start(CPU, 1)
    assert len(ranks) == 1, "expected the spare ones to start once a test has its trainer"
    given.of(CPU, 1)
    assert [rank.name for rank in ranks] == ["trainer-of-1-cpu-tp1-rank0", *["spare-cpu-tp1-rank0"] * 2]
    assert given.spare(CPU).processes == [ranks[1]]
    assert len(ranks) == 4, "expected another spare one to have been started"


def test_none_is_kept_ready_for_trainers_of_several_ranks(starting: Ranks, ranks: list[Rank]):
    Trainers(starting, ahead=2).of(CPU, 2)
    assert len(ranks) == 2


def test_a_spare_trainer_takes_the_place_of_one_that_has_ended_and_holds_the_same(starting: Ranks, ranks: list[Rank]):
    given = Trainers(starting, ahead=1)
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


def test_it_is_quiet_once_spare_trainers_have_computed(starting: Ranks, monkeypatch: pytest.MonkeyPatch):
    computing: list[Call] = []

    def prepare(rank: Rank, method: str) -> Call:
        if method != "warm_up_computing":
            return rank.submit(method)
        computing.append(Call(rank, method))
        return computing[-1]

    monkeypatch.setattr(Rank, "prepare", prepare)
    trainers = Trainers(starting, ahead=1)
    trainers.of(SHARED, 1)
    threading.Timer(A_MOMENT_S, lambda: [call.finish(None) for call in computing]).start()
    with trainers.quiet():
        assert [call.done() for call in computing] == [True, True]


def test_what_a_new_trainer_is_to_load_is_all_that_it_loads(starting: Ranks, ranks: list[Rank]):
    trainer = Trainers(starting, ahead=1).of(CPU, 1)
    trainer.load("there")
    trainer.renew()
    trainer.load("elsewhere", "float32")
    trainer.load("elsewhere", "float32")
    assert ranks[1].calls == [("warm_up", ()), ("load", ("elsewhere", "float32"))]


@pytest.mark.parametrize(("stage", "computes"), [(CPU, False), (SHARED, True)])
def test_a_spare_trainer_on_a_gpu_has_computed_before_it_is_needed(
    starting: Ranks, ranks: list[Rank], stage: Stage, computes: bool
):
    Trainers(starting, ahead=1).spare(stage)
    assert [("warm_up_computing", ()) in rank.calls for rank in ranks] == [computes] * 2


def test_a_trainer_that_can_not_do_what_the_suite_asks_says_nothing_of_the_subject(starting: Ranks, ranks: list[Rank]):
    trainer = Trainers(starting, ahead=1).of(CPU, 1)
    ranks[0].fails = RemoteError(
        SimpleNamespace(name="trainer", log_path=""), {"kind": "LoadError", "message": "no such file", "traceback": ""}
    )
    with pytest.raises(TrainerFailed, match=r"load\(\): LoadError in process trainer: no such file") as failed:
        trainer.load("there")
    assert judge("call", failed.value).verdict == ERROR


def test_weights_that_a_failed_step_has_left_are_not_taken_for_the_checkpoint(starting: Ranks, ranks: list[Rank]):
    trainer = Trainers(starting, ahead=1).of(CPU, 1)
    trainer.load("there")
    ranks[0].fails = RemoteError(
        SimpleNamespace(name="trainer", log_path=""), {"kind": "MemoryError", "message": "full", "traceback": ""}
    )
    with pytest.raises(TrainerFailed, match=r"step\(\)"):
        trainer.step(1, 7, 0.1)
    ranks[0].fails = None
    trainer.load("there")
    assert [method for method, _ in ranks[0].calls if method in ("load", "step")] == ["load", "step", "load"]


def test_a_trainer_without_a_replacement_just_ends(starting: Ranks, ranks: list[Rank]):
    trainer = Trainers(starting, ahead=1).spare(CPU)
    trainer.renew()
    assert not trainer.alive


def test_on_gpus_a_trainer_lets_go_of_its_weights_for_another(starting: Ranks, ranks: list[Rank]):
    apart = replace(SHARED, hosts_apart=False)
    given = Trainers(starting, ahead=0)
    first = given.of(apart, 1)
    first.load("there")
    given.of(SHARED, 1).load("there")
    assert ranks[0].calls[-1] == ("forget", ())
    assert given.of(apart, 1) is first
    first.load("there")
    first.load("there")
    assert [method for method, _ in ranks[0].calls].count("load") == 2, "expected it to be restored once"
