"""The senders of all subjects are told from the halves that call them: what a sender raises is the subject's."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from extensions.segments import RUN_ID
from suite.processes.blame import is_examined
from suite.selftest.fakes import fake_module
from suite.selftest.foreign import TENSORS, Sent
from suite.subjects import known_subjects
from suite.subjects.protocol import Subject, TrainerHalf

SUBJECTS = known_subjects()
NATIVE = {name for name in SUBJECTS if name in ("native-nccl", "native-nccl-packed", "native-sparse")}
OWN_SENDERS = {name for name in SUBJECTS if name.startswith(("checkpoint", "verl", "trl", "ms-swift", "areal"))}


class Raises:
    """A sender of any kind: made, and then nothing but failures, of torch's."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return _fails


def _fails(*_: object, **__: object) -> Any:
    return torch.ones(2) + torch.ones(3)


async def _fails_later(*_: object, **__: object) -> Any:
    _fails()


class NotMade:
    """A sender that cannot be made."""

    def __init__(self, *_: object, **__: object) -> None:
        raise KeyError("device")


class Whole(Sent):
    """Tensors of an update."""

    def manifest(self) -> list[dict]:
        return [{"name": name, "dtype": "float32", "shape": [*tensor.shape]} for name, tensor in TENSORS]


def half_of(subject: Subject) -> TrainerHalf:
    return subject.trainer_half(SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu")))


def blames(call: Callable[[], Any]) -> bool:
    with pytest.raises(Exception) as caught:  # noqa: PT011 (whatever it is)
        call()
    return is_examined(caught.value)


def updates(half: TrainerHalf) -> None:
    half.gather(Whole())
    half.announce(Whole())
    half.send(Whole(), lambda: None)


@pytest.mark.parametrize("name", sorted({*SUBJECTS} - NATIVE - OWN_SENDERS))
def test_senders_that_subjects_name(name: str, monkeypatch: pytest.MonkeyPatch):
    half = half_of(SUBJECTS[name])
    monkeypatch.setattr("suite.subjects.protocol.load", lambda *_: NotMade)
    assert blames(lambda: half.invite("127.0.0.1", 1, 2))
    monkeypatch.setattr("suite.subjects.protocol.load", lambda *_: Raises)
    half.invite("127.0.0.1", 1, 2)
    assert blames(lambda: updates(half))
    half._sender = None  # the half's own fault
    if name != "planned-sparse":  # where ranks have none that do not send
        assert not blames(lambda: updates(half))


@pytest.mark.parametrize("name", sorted(NATIVE))
def test_senders_of_vllm(name: str, monkeypatch: pytest.MonkeyPatch):
    for module, members in VLLM.items():
        fake_module(monkeypatch, f"vllm.distributed.weight_transfer.{module}", **members)
    monkeypatch.setattr("suite.subjects.native_senders.source_class", lambda: lambda tensors: tensors)
    monkeypatch.setattr(VLLM["factory"]["WeightTransferTrainerFactory"], "trainer_init", _fails)
    monkeypatch.setattr(VLLM["nccl_engine"]["NCCLWeightTransferEngine"], "trainer_init", _fails)
    half = half_of(SUBJECTS[name])
    assert blames(lambda: half.invite("127.0.0.1", 1, 2))
    half._sender = None
    assert not blames(lambda: half.send(Whole(), lambda: None))


VLLM = {
    "factory": {"WeightTransferTrainerFactory": type("Factory", (), {"trainer_init": _fails})},
    "nccl_engine": {
        "NCCLWeightTransferEngine": type("Engine", (), {"trainer_init": _fails}),
        "NCCLTrainerInitInfo": SimpleNamespace,
    },
    "sparse_nccl_engine": {"SparseNCCLTrainerInitInfo": SimpleNamespace, "SparseWeightPatch": SimpleNamespace},
}


@pytest.mark.parametrize(
    ("name", "module", "members"),
    [
        ("checkpoint-engine", "checkpoint_engine.ps", {"ParameterServer": Raises}),
        ("checkpoint-engine", "checkpoint_engine.ps", {"ParameterServer": NotMade}),
        ("verl", "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", {"BucketedWeightSender": Raises}),
        ("verl", "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", {}),
        ("ms-swift", "swift.ray.megatron.rollout.weight_transfer", {"BucketedWeightSender": NotMade}),
        ("areal", "areal.engine.core.distributed", {"init_custom_process_group": _fails}),
        ("trl", "vllm.distributed.utils", {"StatelessProcessGroup": SimpleNamespace(create=_fails)}),
    ],
)
def test_senders_of_other_projects(name: str, module: str, members: dict, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(RUN_ID, "run7")
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "")
    fake_module(monkeypatch, "vllm.distributed.device_communicators.pynccl", PyNcclCommunicator=Raises)
    fake_module(monkeypatch, module, **members)
    half = half_of(SUBJECTS[name])

    def meets_and_updates() -> None:
        half.invite("127.0.0.1", 1, 2)
        updates(half)

    assert blames(meets_and_updates)
