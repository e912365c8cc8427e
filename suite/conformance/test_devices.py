"""devices.*: handles mean the same GPU on both sides, whatever each of them calls it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache

import pytest

from suite.conformance.requirements import MUST, requirement
from suite.driver.engines import EngineKey
from suite.driver.expected import expect
from suite.driver.pool import Pool
from suite.driver.sync import Sync
from suite.driver.trainers import Trainers
from suite.fixtures import lend
from suite.models import TIED
from suite.processes.call import SubjectFailed
from suite.sequences.player import UNKNOWN_DEVICE
from suite.session import verdicts
from suite.stages import Stage
from suite.stages.hardware import Device, machine
from suite.subjects import Subject

DEADLINE_S = 30.0


@dataclass(frozen=True)
class Visibility:
    """CUDA_VISIBLE_DEVICES of both sides, by position among the machine's GPUs; None for unset."""

    name: str
    trainer_sees: tuple[int, ...] | None
    engine_sees: tuple[int, ...] | None
    as_uuids: bool = False

    def fits(self, devices: tuple[Device, ...]) -> bool:
        """Whether the machine has the GPUs that are told apart."""
        return max([*(self.trainer_sees or ()), *(self.engine_sees or ())], default=0) < len(devices)

    def engine(self, devices: tuple[Device, ...]) -> str | None:
        """The engine's CUDA_VISIBLE_DEVICES; it takes the first GPU it sees."""
        return self._variable(self.engine_sees, devices)

    def trainer(self, devices: tuple[Device, ...]) -> tuple[str | None, str]:
        """The trainer's CUDA_VISIBLE_DEVICES, and what it calls the engine's GPU."""
        wanted = self.engine_sees[0] if self.engine_sees else 0
        ordinal = self.trainer_sees.index(wanted) if self.trainer_sees else wanted
        return self._variable(self.trainer_sees, devices), f"cuda:{ordinal}"

    def device(self, devices: tuple[Device, ...]) -> str:
        """The UUID of the GPU that both use."""
        return devices[self.engine_sees[0] if self.engine_sees else 0].uuid

    def _variable(self, seen: tuple[int, ...] | None, devices: tuple[Device, ...]) -> str | None:
        if seen is None:
            return None
        return ",".join(devices[i].uuid if self.as_uuids else str(devices[i].gpu) for i in seen)


VISIBILITIES = (
    Visibility("same", (0, 1), (0, 1)),
    Visibility("reversed", (0, 1), (1, 0)),
    Visibility("subset", (0, 1), (1,)),
    Visibility("uuids", (0, 1), (1, 0), as_uuids=True),
    Visibility("unset", (1, 0), None),
)


@pytest.fixture
def remapped(
    pool: Pool,
    trainers: Trainers,
    stage: Stage,
    subject: Subject,
    model: str,
    visibility: Visibility,
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[], Sync]]:
    """Brings together a trainer and an engine that see the machine's GPUs each in its own way."""
    if not visibility.fits(machine().devices):
        verdicts.not_applicable(f"needs 2 GPUs to tell one from the other, found {len(machine().devices)}")
    trainer = trainers.seeing(*visibility.trainer(machine().devices))
    with ExitStack() as lent:

        def started() -> Sync:
            trainer.ready()
            return lent.enter_context(contextmanager(lend)(pool, trainer, request))

        yield started
    trainer.stop_soon()


@cache
def _devices() -> tuple[Device, ...]:
    return machine().devices


def _remapped_engines(key: EngineKey, params: dict) -> list[EngineKey]:
    visibility, devices = params["visibility"], _devices()
    return [replace(key, visible=visibility.engine(devices))] if visibility.fits(devices) else []


def _remapped_trainer(params: dict) -> tuple[str | None, str]:
    return params["visibility"].trainer(_devices())


@requirement(
    "devices.remap",
    MUST,
    text="Handles land on the GPU that they came from, and the update is exact, for every combination of the trainer's"
    " and the engine's CUDA_VISIBLE_DEVICES: same, reversed, one a subset of the other, as UUIDs, unset.",
    because="A CUDA IPC handle carries the sender's ordinal, which means another GPU, or none, to the receiver.",
    seen_in=("sglang#5077", "Mooncake#3678", "vime#418", "vllm#41848", "vllm#56949"),
    on="gpu",
    models={"gpu-colocate-tp1": [TIED]},
)
@pytest.mark.needs(engines=_remapped_engines, trainer=_remapped_trainer)
@pytest.mark.parametrize("visibility", VISIBILITIES, ids=lambda v: v.name)
def test_remap(remapped: Callable[[], Sync], target: int, visibility: Visibility) -> None:
    sync = remapped()  # here, since an engine that does not start like this has not met the requirement
    expected = visibility.device(machine().devices)
    engine = sync.engines[0].facts["devices"][0]
    trainer = sync.trainer.processes[0].ready()
    expect(engine["id"] == expected, f"the engine on {expected}", engine, sync.where)
    expect(trainer["device_id"] == expected, f"the trainer on {expected}", trainer, sync.where)
    for seed in (target, sync.seed):
        sync.load(seed)
        sync.update()
        sync.expect_exact(seed)


@pytest.fixture
def expanding(
    pool: Pool, trainers: Trainers, stage: Stage, subject: Subject, model: str, request: pytest.FixtureRequest
) -> Iterator[Sync]:
    """As `sync`, with a trainer of its own that has PyTorch's expandable segments on."""
    trainer = trainers.expanding(stage)
    yield from lend(pool, trainer, request)
    trainer.stop_soon()


@requirement(
    "devices.expandable",
    MUST,
    text="From a trainer with PyTorch's expandable segments on, an update by handle is exact, or is refused with an"
    " error that names them, and the weights stay as they were.",
    because="Such memory is handed over by a file descriptor, which the engine's process may not be allowed to take.",
    seen_in=("OpenRLHF#957", "vllm#42609"),
    on="gpu",
    models={"gpu-colocate-tp1": [TIED]},
)
@pytest.mark.needs(engines=lambda key, params: [key])
def test_expandable(expanding: Sync, target: int) -> None:
    sync = expanding
    weights = sync.snapshot()
    for seed in (target, sync.seed):
        sync.load(seed)
        if not all(sync.trainer.call("expands")):
            raise RuntimeError(f"the trainer has no memory in expandable segments: nothing is told {sync.where}")
        try:
            sync.update()
        except SubjectFailed as error:
            named = "expandable" in error.said.lower()
            expect(named, "an exact update, or an error that names expandable segments", error.said, sync.where)
            sync.expect_equal_to(weights, "the weights from before the refused update")
            return
        sync.expect_exact(seed)


@requirement(
    "devices.identity",
    MUST,
    text="The id that the engine reports for a GPU is NVML's, torch's and the trainer's for the same GPU, in one "
    "spelling.",
    because="Ids are the keys of handles: spelled in two ways, or taken by an ordinal that means another GPU, they "
    "never meet.",
    seen_in=("vllm#41848", "vllm#46132", "vllm#56949"),
    on="gpu",
    models=[TIED],
)
def test_identity(sync: Sync) -> None:
    found = [device["id"] for device in sync.engines[0].facts["devices"]]
    devices = list(sync.stage.devices_of_engine())
    expect(found == devices, f"the engine on {devices} as NVML lists them", found, sync.where)
    trainer = [process.ready()["device_id"] for process in sync.trainer.processes]
    devices = list(sync.stage.trainer_devices)
    expect(trainer == devices, f"the trainer's ranks on {devices}", trainer, sync.where)
    if sync.subject.can("report_device_id"):
        reported = sync.call_engines("report_device_id")[0]
        expect(reported == found, f"the extension to report {found}", reported, sync.where)


@requirement(
    "devices.wrong_handle",
    MUST,
    text="Handles for another device, under an unknown id, or an empty set of them are refused with an error that "
    "names the id, and the weights stay as they were.",
    because="An update that finds nothing for its device and reports success leaves the old weights in silence.",
    seen_in=("vllm#56949", "sglang#5077", "vllm#57022"),
    models=[TIED],
)
def test_wrong_handle(sync: Sync, target: int) -> None:
    own = sync.engines[0].facts["devices"][0]["id"]
    others = [device.uuid for device in machine().devices if device.uuid not in sync.stage.engine_devices][:1]
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.load(target)
    for label in (UNKNOWN_DEVICE, "", *others):
        error = sync.refusal(DEADLINE_S, relabel=label)
        expect(own.removeprefix("GPU-") in error, f"an error that names {own}", error, sync.where)  # or as torch does
        sync.expect_same_answers(answers, "the refused update")
        sync.expect_equal_to(weights, "the weights from before the refused update")
    sync.update()
    sync.expect_exact(target)


@requirement(
    "devices.missing_handle",
    MUST,
    text="Handles of all announced tensors but one are refused with an error that names this one; the weights stay as "
    "they were, or the extension says that they are inconsistent.",
    because="What loads the handles that it finds, and no others, leaves an old weight among new ones in silence.",
    seen_in=("vllm#44814", "vllm#57022"),
    models=[TIED],
)
def test_missing_handle(sync: Sync, target: int) -> None:
    sync.load(sync.seed)
    sync.update()
    answers, weights = sync.generate(sync.prompts()), sync.snapshot()
    sync.load(target)
    error = sync.refusal(DEADLINE_S, withhold=sync.weight)
    expect(sync.weight in error, f"an error that names {sync.weight}", error, sync.where)
    if not sync.says_inconsistent():
        sync.expect_same_answers(answers, "the refused update")
        sync.expect_equal_to(weights, "the weights from before the refused update")
    sync.update()
    sync.expect_exact(target)
