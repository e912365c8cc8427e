"""What conformance and throughput tests are given: a trainer connected to the engine of their case."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from suite import verdicts
from suite.driver import Sync, TrainerGroup
from suite.plugin import announce, current_selection, timeline
from suite.pool import EngineKey, Pool, seed_of
from suite.processes import DeadlineExceeded, ProcessDied, Run
from suite.stages import Stage
from suite.subjects import Subject

FSDP_RANKS = 2


@pytest.fixture(scope="session")
def pool(run: Run, request: pytest.FixtureRequest) -> Iterator[Pool]:
    """The engines of this run; those that the collected tests need are started ahead."""
    selection = current_selection()
    pool = Pool(run, selection.stages, selection.subjects, announce)
    pool.plan([key for item in request.session.items for key in _needs(item, pool)])
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def trainers(run: Run) -> Iterator[Callable[[Stage, int], TrainerGroup]]:
    """Trainers by stage and number of ranks, started when first asked for and kept."""
    groups: dict[tuple, TrainerGroup] = {}

    def trainer(stage: Stage, world_size: int) -> TrainerGroup:
        visible = list(stage.trainer_devices)
        key = (stage.kind, *visible, world_size)
        if key in groups and not groups[key].alive:
            groups.pop(key).stop()
        if key not in groups:
            device = "cpu" if stage.kind == "cpu" else "cuda"
            with timeline("starting", f"trainer of {world_size}"):
                groups[key] = TrainerGroup(run, f"trainer-{stage.name}-{world_size}", world_size, device, visible)
                groups[key].ready()
        return groups[key]

    yield trainer
    for group in groups.values():
        group.stop()


@pytest.fixture
def sync(
    pool: Pool, trainers: Callable, subject: Subject, stage: Stage, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """The stage's trainer and the engine of this case."""
    yield from _lent(pool, trainers(stage, stage.trainer_world_size), [_key(subject, stage, model)], request)


@pytest.fixture
def sharded(
    pool: Pool, trainers: Callable, subject: Subject, stage: Stage, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """As `sync`, with a trainer that holds the model in shards wherever the stage has room for two ranks."""
    world_size = FSDP_RANKS if stage.kind == "cpu" else stage.trainer_world_size
    yield from _lent(pool, trainers(stage, world_size), [_key(subject, stage, model)], request)


@pytest.fixture
def fanout(
    pool: Pool, trainers: Callable, subject: Subject, stage: Stage, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """One trainer connected to two engines of this subject, of different tensor-parallel sizes where there are such."""
    keys = _two_engines(subject, stage, model)
    if keys is None:
        verdicts.not_applicable(f"{stage.name} has no room for a second engine")
    yield from _lent(pool, trainers(stage, stage.trainer_world_size), keys, request)


@pytest.fixture
def target(subject: Subject) -> int:
    """The seed of a checkpoint that this case's engine has not been started from, and another engine has."""
    return 1 - seed_of(_index(subject))


def _lent(pool: Pool, trainer: TrainerGroup, keys: list[EngineKey], request: pytest.FixtureRequest) -> Iterator[Sync]:
    subject, stage, model = (request.getfixturevalue(name) for name in ("subject", "stage", "model"))
    with timeline("starting", str(keys[0])):
        engines = [pool.get(key) for key in keys]
    yield Sync(pool, trainer, engines, subject, stage, model)
    for key, engine in zip(keys, engines, strict=True):
        if not _still_answers(engine.process):
            pool.discard(key)
        pool.put(key)


def _still_answers(process: object) -> bool:
    """Whether a later test can start from here: an engine that hangs or died is replaced, a wrong one is not."""
    try:
        process.call("generate", [[1, 2, 3]], 1, deadline_s=15)
    except (DeadlineExceeded, ProcessDied):
        return False
    except Exception as error:
        announce(f"{process.name} can't generate any more and is replaced: {type(error).__name__}")
        return False
    return True


def _needs(item: pytest.Item, pool: Pool) -> list[EngineKey]:
    """The engines that a collected test will ask for."""
    params = item.callspec.params if hasattr(item, "callspec") else {}
    subject, stage, model = (params.get(name) for name in ("subject", "stage", "model"))
    if not isinstance(stage, Stage) or not isinstance(subject, Subject) or model is None:
        return []
    if stage.refuses(subject.transport):
        return []
    names, keys = set(item.fixturenames), []
    if "fanout" in names:
        keys += _two_engines(subject, stage, model) or []
    elif names & {"sync", "sharded"}:
        keys.append(_key(subject, stage, model))
    if keys and "target" in names:
        subjects = list(current_selection().subjects.values())
        other = pool.oracle_key(model, stage.name, 1 - seed_of(_index(subject)), subjects, subject.name)
        keys.append(other)
    return keys


def _key(subject: Subject, stage: Stage, model: str) -> EngineKey:
    return EngineKey(model, stage.name, subject.name, seed_of(_index(subject)))


def _index(subject: Subject) -> int:
    return list(current_selection().subjects).index(subject.name)


def _two_engines(subject: Subject, stage: Stage, model: str) -> list[EngineKey] | None:
    """On CPUs this stage's engine and one of another tensor-parallel size; elsewhere two where the stage says so."""
    first = _key(subject, stage, model)
    if stage.kind == "cpu":
        others = [s for s in current_selection().stages.values() if s.kind == "cpu" and s.name != stage.name]
        return [first, _key(subject, others[0], model) if others else EngineKey(*_fields(first), copy=1)]
    return [first, EngineKey(*_fields(first), copy=1)] if stage.engines > 1 else None


def _fields(key: EngineKey) -> tuple:
    return key.model, key.stage, key.subject, key.seed, key.options


def oracle_directory(run: Run) -> Path:
    """Where engines write what they compute with."""
    return run.directory / "oracles"
