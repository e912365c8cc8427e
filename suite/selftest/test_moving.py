"""Where one half of an update fails, the failure is what is raised, whatever becomes of the other half's process."""

import contextlib
from types import SimpleNamespace

import pytest

from suite.driver import moving as module
from suite.driver.moving import Moving
from suite.driver.patience import NEVER_WELL, GivenUp, Patience
from suite.driver.trainers import TrainerFailed
from suite.models import TIED
from suite.processes.call import Call, RemoteError, failure_of

SAID = {"kind": "WorkerError", "message": "the subject's own fault", "traceback": ""}


class Process:
    """A process that is told to end."""

    def __init__(self, name: str) -> None:
        self.name, self.log_path, self.stopped, self.alive = name, "", False, True

    def stalled_s(self) -> float:
        return 0.0

    def preparing(self, call: Call) -> str:
        return ""

    def write_stacks(self) -> None: ...

    def stop(self) -> None:
        self.stopped = True


class Trainer:
    """A trainer of one rank, for which there is no spare one."""

    connected = (1,)

    def __init__(self) -> None:
        self.processes = [Process("trainer")]

    @property
    def alive(self) -> bool:
        return self.processes[0].alive

    def renew(self) -> None:
        raise TrainerFailed("start", RemoteError(Process("spare"), SAID | {"message": "no memory"}))


def moving_with(trainer: Trainer) -> Moving:
    pool, engine = SimpleNamespace(patience=Patience(), timeline=lambda *_: contextlib.nullcontext()), Process("engine")
    handle = SimpleNamespace(key=SimpleNamespace(seed=0), process=engine)
    return Moving(pool, trainer, [handle], SimpleNamespace(name="subject"), SimpleNamespace(name="stage"), TIED)


def test_a_failure_is_raised_also_where_no_spare_trainer_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("suite.driver.moving.TRAINER_END_S", 0.1)
    moving = moving_with(Trainer())
    engine = moving.engines[0].process
    failed, late = Call(engine, "update()"), Call(moving.trainer.processes[0], "update()")
    failed.finish(error=RemoteError(engine, SAID))
    with pytest.raises(RemoteError, match="the subject's own fault") as raised:
        moving._gathered([failed, late], 5.0)
    assert "ended, since they did not come back: trainer" in raised.value.__notes__
    assert moving.trainer.connected == ()


@pytest.mark.parametrize("of_the_subject", [True, False])
def test_a_subject_is_not_given_up_for_what_the_suite_has_lost(monkeypatch: pytest.MonkeyPatch, of_the_subject: bool):
    monkeypatch.setattr("suite.driver.moving.TRAINER_END_S", 0.1)
    moving = moving_with(Trainer())
    for _ in range(NEVER_WELL):
        failed, late = (
            Call(process, "update()") for process in (moving.engines[0].process, moving.trainer.processes[0])
        )
        failed.finish(error=failure_of(failed.process, SAID | {"examined": of_the_subject}))
        with pytest.raises(RemoteError):
            moving._gathered([failed, late], 5.0)
    with pytest.raises(GivenUp) if of_the_subject else contextlib.nullcontext():
        moving.pool.patience.expect_hope("subject")


@pytest.mark.parametrize("of_the_subject", [True, False])
def test_what_the_suite_could_not_do_is_no_refusal(monkeypatch: pytest.MonkeyPatch, of_the_subject: bool):
    def fails(*_: object, **__: object) -> None:
        raise failure_of(Process("engine"), SAID | {"examined": of_the_subject})

    moving = moving_with(Trainer())
    monkeypatch.setattr(moving, "update", fails)
    if of_the_subject:
        assert "the subject's own fault" in moving.refusal(5.0)
    else:
        with pytest.raises(RemoteError):
            moving.refusal(5.0)


@pytest.mark.parametrize(
    ("raised", "told"), [({"examined": True}, True), ({"echo": True}, True), ({"examined": False}, False)]
)
def test_an_update_with_a_fault_has_ended_well_or_not_by_what_is_examined(raised: dict[str, bool], told: bool):
    call = Call(Process("engine"), "update()")
    call.finish(error=failure_of(call.process, SAID | raised))
    if told:
        assert "the subject's own fault" in module._raised(call, 1.0)
    else:
        with pytest.raises(RemoteError):
            module._raised(call, 1.0)


@pytest.mark.parametrize(
    ("of_the_trainer", "kept"),
    [(["NotStarted"], True), (["Refused"], False), (["NotStarted", "Refused"], False), ([None], False)],
)
def test_connections_serve_on_only_where_all_know_that_nothing_was_sent(of_the_trainer: list[str | None], kept: bool):
    trainer = Trainer()
    trainer.processes = [Process(f"rank {rank}") for rank in range(len(of_the_trainer))]
    moving = moving_with(trainer)
    calls = [Call(process, "update()") for process in (moving.engines[0].process, *trainer.processes)]
    for call, kind in zip(calls, ["ManifestError", *of_the_trainer], strict=True):
        call.finish(**({"error": RemoteError(call.process, SAID | {"kind": kind})} if kind else {"result": {}}))
    with pytest.raises(RemoteError):
        moving._gathered(calls, 5.0)
    assert moving.trainer.connected == ((1,) if kept else ())


@pytest.mark.parametrize(
    ("model", "asked"),
    [
        (TIED, ("load", "checkpoint of qwen3-tied-tiny 1 float32", "float32")),
        ("glm4-moe-tiny", ("hold_random", "config of glm4-moe-tiny", 1, "float32")),
    ],
)
def test_a_trainer_holds_the_tensors_alone_of_a_model_that_it_does_not_compute_with(model: str, asked: tuple):
    pool = SimpleNamespace(
        checkpoint=lambda name, seed, dtype: f"checkpoint of {name} {seed} {dtype}",
        config=lambda name: f"config of {name}",
    )
    calls: list[tuple] = []
    trainer = SimpleNamespace(
        load=lambda *args: calls.append(("load", *args)), hold_random=lambda *args: calls.append(("hold_random", *args))
    )
    handle, stage = SimpleNamespace(key=SimpleNamespace(seed=0)), SimpleNamespace(name="stage")
    Moving(pool, trainer, [handle], SimpleNamespace(name="subject"), stage, model).load(1, "float32")
    assert calls == [asked]
