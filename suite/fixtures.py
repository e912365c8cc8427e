"""What conformance and throughput tests are given: a trainer connected to the engine of their case."""

import os
from collections.abc import Generator, Iterator
from dataclasses import replace
from itertools import islice

import pytest

from suite.benchmarks import pace
from suite.driver.engines import EngineHandle, seed_of
from suite.driver.pool import Pool
from suite.driver.sync import Sync
from suite.driver.trainers import TrainerGroup, Trainers
from suite.processes.call import NoAnswer, Process
from suite.processes.launcher import Launcher
from suite.session import ending, verdicts
from suite.session.needs import engines_of, index_of, trainer_of
from suite.session.record import TOLERANCES
from suite.session.state import selection_of, state_of
from suite.stages import Stage
from suite.stages.hardware import machine
from suite.subjects import Subject

FSDP_RANKS, SPREAD_RANKS = 2, 4
SPARE_TRAINERS, SPARE_ENGINES, CORES_A_SPARE = 6, 2, 5  # kept ready at the most; one of a kind for so many cores
SEEING_TRAINERS = 5  # started ahead at the most, of those that see GPUs in their own way
POOL = pytest.StashKey[Pool]()
ENDED = pytest.StashKey[set[str]]()  # tests, by their ids


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A test is done with its engines however it ends, also before any fixture has given it one."""
    result = yield
    item.session.stash.setdefault(ENDED, set()).add(item.nodeid)
    if pool := item.session.stash.get(POOL, None):
        pool.done(item.nodeid)
    return result


@pytest.fixture(scope="session")
def pool(launcher: Launcher, request: pytest.FixtureRequest) -> Iterator[Pool]:
    """The engines of this run; those that the collected tests need are started ahead."""
    selection, state = selection_of(request.config), state_of(request.config)
    tolerances = request.config.stash.setdefault(TOLERANCES, {})
    pool = Pool(
        launcher, selection.stages, selection.subjects, state.announce, state.timeline, tolerances, _spare_engines()
    )
    request.session.stash[POOL] = pool
    items = _still_to_come(request.session)
    own = {item.nodeid: engines_of(item) for item in items}
    everything = [key for keys in own.values() for key in keys]
    compared = {item.nodeid: own[item.nodeid] for item in items if "target" in item.fixturenames}
    references = {
        test: [pool.reference(key, 1 - key.seed, everything) for key in keys] for test, keys in compared.items()
    }
    pool.plan(own, references)
    yield pool
    pool.close()


def _spare_engines() -> int:
    """How many processes wait for an engine. Importing vLLM keeps what one GPU can do: GPUs have to be alike."""
    found = machine()
    alike = len({device.name for device in found.devices}) == 1
    return min(SPARE_ENGINES, found.cpu_cores // CORES_A_SPARE) if alike else 0


def _still_to_come(session: pytest.Session) -> list[pytest.Item]:
    ended = session.stash.get(ENDED, set())
    return [item for item in session.items if item.nodeid not in ended]


@pytest.fixture(scope="session")
def trainers(launcher: Launcher, request: pytest.FixtureRequest) -> Iterator[Trainers]:
    """The trainers of this run. Those on GPUs are started ahead."""
    ahead = max(1, min(SPARE_TRAINERS, len(os.sched_getaffinity(0)) // CORES_A_SPARE))
    trainers = Trainers(launcher, ahead)
    for stage in selection_of(request.config).stages.values():
        if stage.kind == "gpu":
            trainers.start(stage, stage.trainer_world_size)
    for seen in islice(filter(None, map(trainer_of, _still_to_come(request.session))), SEEING_TRAINERS):
        trainers.start_seeing(*seen)
    yield trainers
    trainers.close()


@pytest.fixture
def sync(
    pool: Pool, trainers: Trainers, stage: Stage, subject: Subject, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """The stage's trainer and the engine of this case."""
    yield from lend(pool, _kept(pool, trainers, stage, stage.trainer_world_size), request)


@pytest.fixture
def sharded(
    pool: Pool, trainers: Trainers, stage: Stage, subject: Subject, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """As `sync`, with a trainer that holds the model in shards wherever the stage has room for two ranks."""
    world_size = FSDP_RANKS if stage.kind == "cpu" else stage.trainer_world_size
    yield from lend(pool, _kept(pool, trainers, stage, world_size), request)


@pytest.fixture
def spread(
    pool: Pool, trainers: Trainers, stage: Stage, subject: Subject, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """As `sync`, with a trainer of four ranks, each of which holds a part of every tensor. On CPUs."""
    yield from lend(pool, _kept(pool, trainers, stage, SPREAD_RANKS), request)


@pytest.fixture
def fanout(
    pool: Pool, trainers: Trainers, stage: Stage, subject: Subject, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """One trainer connected to several engines of this subject: all of the stage, or two on a CPU."""
    if len(engines_of(request.node)) < 2:
        verdicts.not_applicable(f"{stage.name} has no room for a second engine")
    yield from lend(pool, _kept(pool, trainers, stage, stage.trainer_world_size), request)


@pytest.fixture
def target(subject: Subject, stage: Stage, request: pytest.FixtureRequest) -> int:
    """The seed to update to: of a checkpoint that a reference engine, and not this case's, was started from."""
    own = engines_of(request.node)[0].seed if stage.server else None  # it may be another subject's
    return 1 - (seed_of(index_of(subject, selection_of(request.config))) if own is None else own)


def _kept(pool: Pool, trainers: Trainers, stage: Stage, world_size: int) -> TrainerGroup:
    with pool.timeline("starting", f"trainer of {world_size}"):
        return trainers.of(stage, world_size)


def lend(pool: Pool, trainer: TrainerGroup, request: pytest.FixtureRequest) -> Iterator[Sync]:
    """Give a test a trainer and engines with its subject's extension, and check afterwards that they still answer.

    An engine that hangs or died is replaced, and so is a trainer; one that computes with wrong weights is not. A
    subject may be examined on another's engines: such an engine is kept only if its own subject still works on it.
    """
    subject, stage, model = (request.getfixturevalue(name) for name in ("subject", "stage", "model"))
    pool.patience.expect_hope(subject.name)
    keys = engines_of(request.node)
    if reason := pool.room.too_large(keys):
        verdicts.not_applicable(reason)
    with pool.timeline("starting", str(keys[0])):
        engines = pool.get_all(keys)
    pace.measure(request.config, engines[0])
    _become(pool, engines, subject)
    sync = Sync(pool, trainer, engines, subject, stage, model)
    yield sync
    host = selection_of(request.config).subjects[subject.host] if subject.host else None
    _take_back(sync, request.node.nodeid, host)


def _take_back(sync: Sync, test: str, host: Subject | None) -> None:
    """Replace what a later test can't have: of a run that was told to end nothing, since all is ended."""
    if ending.is_told():
        return
    if not all(_answers(sync.pool, rank, "resources") for rank in sync.trainer.processes):
        sync.trainer.stop()
    lost = [engine for engine in sync.engines if not _serves_on(sync, engine, host)]
    sync.pool.done(test)  # first, or one would be started again for this test
    for engine in lost:
        sync.pool.discard(engine)


def _serves_on(sync: Sync, engine: EngineHandle, host: Subject | None) -> bool:
    """Whether a later test can have an engine, which lets go of what the trainer has handed over first."""
    if not _answers(sync.pool, engine.process, "half", "forget"):
        return False
    if host:
        return _given_back(sync, engine, host)
    return _answers(sync.pool, engine.process, "generate", [[1, 2, 3]], 1)


def _become(pool: Pool, engines: list[EngineHandle], subject: Subject) -> None:
    """Put a subject's extension into engines; one that does not take it is replaced, whatever it has now."""
    for engine in engines:
        try:
            engine.become(subject)
        except Exception:
            pool.discard(engine)
            raise


def _answers(pool: Pool, process: Process, method: str, *args: object) -> bool:
    """Whether a later test can start from here."""
    try:
        process.call(method, *args, deadline_s=15)
    except NoAnswer:
        return False
    except Exception as error:
        pool.announce(f"{process.name} fails in {method}() and is replaced: {type(error).__name__}")
        return False
    return True


def _given_back(sync: Sync, engine: EngineHandle, host: Subject) -> bool:
    """Whether an engine works with its own subject's extension, there and back: also graphs, caches and buffers.

    Updates that fail now are charged to the subject that was examined, by its name.
    """
    charged = replace(host, name=sync.subject.name)
    own = Sync(sync.pool, sync.trainer, [engine], charged, sync.stage, sync.model)
    try:
        engine.become(host)
        for seed in (1 - own.seed, own.seed):
            own.load(seed)
            own.update()
            own.expect_same_behaviour()
        if own.drafts and host.draft_prefix():
            own.update_drafter()
            own.expect_drafter(own.seed)
        own.expect_exact(own.seed)
        own.expect_own_answers()
    except Exception as error:  # whatever it was, no later test is to meet it
        why = f"is not as before {sync.subject.name} and is replaced: {type(error).__name__}"
        sync.pool.announce(f"{engine.process.name} {why}")
        return False
    return True
