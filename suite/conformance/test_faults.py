"""faults.*: one side dies or stops during an update; the other says so in time, and nothing is wrong in silence."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.expected import expect
from suite.driver.moving import Outcome
from suite.driver.sync import Sync
from suite.driver.trainers import Trainers
from suite.models import TIED
from suite.stages import GPU_OF_ONE_RANK, Stage

ONE_RANK = dict.fromkeys(("cpu-tp1", *GPU_OF_ONE_RANK), (TIED,))
WORKERS = dict.fromkeys(("cpu-tp2", *GPU_OF_ONE_RANK), (TIED,))  # cpu-tp1's worker is its engine
MOMENTS = ("before", "during", "after")
DEADLINE_S = 60.0


@pytest.fixture
def doomed(trainers: Trainers, stage: Stage, sync: Sync) -> Callable:
    """Brings trainers that may be killed, each connected to the case's engine while a block lasts."""

    @contextmanager
    def trainer() -> Iterator[Sync]:
        with sync.pool.timeline("starting", "a trainer to be lost"):
            group = trainers.spare(stage)
        try:
            group.hold_random(sync.pool.config(sync.model), sync.seed)
            doomed = Sync(sync.pool, group, sync.engines, sync.subject, stage, sync.model)
            doomed.update()
            doomed.expect_exact(sync.seed)
            yield doomed
        finally:
            group.stop_soon()

    return trainer


@pytest.mark.parametrize("moment", MOMENTS)
@requirement(
    "faults.trainer_killed",
    MUST,
    text="Where the trainer dies before, during or after the transfer, the engine answers within its deadline: it has "
    "the new weights, or raises and has the old ones, or says that it is inconsistent. The next trainer's update "
    "is exact, and the engine says no longer that it is inconsistent.",
    because="NCCL waits for a peer that has died for ever, and what was half loaded generates on. An engine that calls "
    "itself inconsistent when it is not is thrown away, or its word is worth nothing.",
    seen_in=("trl#6913", "vllm#57854"),
    models=ONE_RANK,
)
def test_trainer_killed(sync: Sync, target: int, doomed: Callable, moment: str) -> None:
    with doomed() as losing:
        losing.trainer.fill(target)
        found = losing.update_until(DEADLINE_S, {"moment": moment, "signal": "KILL"})
    expect(found.trainer_error, f"a trainer killed {moment} the transfer", "it well", sync.where)
    _never_wrong_in_silence(sync, target, found)


@requirement(
    "faults.trainer_stopped",
    MUST,
    text="Where the trainer stops answering in the middle of the transfer, the engine answers within its deadline, as "
    "if the trainer had died.",
    because="A process that hangs closes no connection: only a deadline finds it.",
    seen_in=("trl#6913", "trl#3690"),
    models=ONE_RANK,
)
def test_trainer_stopped(sync: Sync, target: int, doomed: Callable) -> None:
    with doomed() as losing:
        losing.trainer.fill(target)
        found = losing.update_until(DEADLINE_S, {"moment": "during", "signal": "STOP"})
        _never_wrong_in_silence(sync, target, found)


@requirement(
    "faults.worker_killed",
    MUST,
    text="Where a worker of the engine dies in the middle of an update, engine and trainer both raise within the "
    "deadline.",
    because="A trainer that waits for a worker that has died holds its GPUs until someone looks.",
    seen_in=("trl#6913", "vllm#57853"),
    models=WORKERS,
)
@pytest.mark.ends_engine
def test_worker_killed(sync: Sync, target: int) -> None:
    sync.load(sync.seed)
    sync.update()
    sync.expect_exact(sync.seed)
    sync.load(target)
    worker = sync.engines[0].facts["devices"][-1]["pid"]
    found = sync.update_until(DEADLINE_S, {"moment": "before", "signal": "KILL", "pid": worker})
    expect(found.engine_error, f"an error from an engine without its worker {worker}", "success", sync.where)
    heard = f"an error from the trainer within {DEADLINE_S:g} s of the loss"
    expect(found.trainer_error, heard, "success", sync.where)


def _never_wrong_in_silence(sync: Sync, target: int, found: Outcome) -> None:
    """An update that succeeded is there; one that failed has left the weights, or the engine says what they are."""
    if not found.engine_error:
        sync.expect_exact(target)
    elif not sync.says_inconsistent():
        sync.expect_exact(sync.seed)
    sync.load(target)
    sync.update()
    sync.expect_exact(target)
    sync.expect_consistent()
    sync.expect_same_behaviour()
