"""Adapters of extensions that receive tensor by tensor, in a group or by handles: OpenRLHF's, TRL's and AReaL's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from suite.selftest.fakes import fake_module
from suite.selftest.foreign import DEVICE, MANIFEST, Engine, Sent
from suite.subjects import areal, foreign, openrlhf, trl


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extensions that are not asked for their methods."""
    monkeypatch.setattr(foreign.Foreign, "load", lambda self: object)


# ---- OpenRLHF


def test_openrlhfs_workers_join_a_group_and_receive_tensor_by_tensor(unloaded):
    engine = Engine()
    half = openrlhf.SUBJECTS[0].engine_half(engine)
    half.connect("127.0.0.1", 1234, 1, 2)
    half.transfer(MANIFEST)
    assert engine.called == [
        ("init_process_group", "127.0.0.1", 1234, 1, 2, "openrlhf"),
        ("update_weight", "a.weight", "bfloat16", [2, 3]),
    ]


def test_openrlhfs_handles_are_named_as_its_workers_name_their_gpu(unloaded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(openrlhf, "pair", lambda handle, device: ("rebuild", handle))
    engine = Engine()
    half = openrlhf.SUBJECTS[1].engine_half(engine)
    half.receive([{"manifest": MANIFEST, "handles": {DEVICE: {"a.weight": {"made": 1}}, "GPU-1": {"b.weight": {}}}}])
    half.transfer(MANIFEST)
    wanted = {"0000": ("rebuild", {"made": 1})}
    assert engine.called == [("update_weight_cuda_ipc", "a.weight", torch.bfloat16, [2, 3], wanted)]


# ---- TRL


def test_trls_workers_leave_a_group_before_they_join_another(unloaded):
    engine = Engine()
    half = trl.SUBJECT.engine_half(engine)
    half.connect("127.0.0.1", 1234, 1, 2)
    half.transfer(MANIFEST)
    assert engine.called == [
        ("close_communicator",),
        ("init_communicator", "127.0.0.1", 1234, 2, trl.ANOTHER),
        ("update_named_param", "a.weight", "torch.bfloat16", [2, 3]),
    ]


class Group:
    """vLLM's group and communicator at once: keeps what it is asked."""

    disabled = False

    def __init__(self) -> None:
        self.group, self.asked = self, []

    def create(self, **how: Any) -> "Group":
        self.asked.append(how)
        return self

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert tensor.is_contiguous()
        self.asked.append((tuple(tensor.shape), src))

    def barrier(self) -> None:
        self.asked.append("barrier")


def test_trls_client_is_the_last_rank(monkeypatch: pytest.MonkeyPatch):
    group = Group()
    fake_module(monkeypatch, "vllm.distributed.utils", StatelessProcessGroup=group)
    pynccl = "vllm.distributed.device_communicators.pynccl"
    fake_module(monkeypatch, pynccl, PyNcclCommunicator=lambda group, device: group)
    half = trl.SUBJECT.trainer_half(SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda", 0)))
    half.invite("127.0.0.1", 1234, 3)
    assert half.send(Sent(), lambda: None) == 12 + 16
    joined = {"host": "127.0.0.1", "port": 1234, "rank": 2, "world_size": 3}
    assert group.asked == [joined, ((2, 3), 2), "barrier", ((4,), 2), "barrier"]
    group.disabled = True
    with pytest.raises(RuntimeError, match="it broadcasts nothing"):
        half.invite("127.0.0.1", 1234, 3)


# ---- AReaL


def test_areals_workers_are_told_what_comes_and_their_answers_are_read(unloaded):
    engine = Engine()
    engine.answers = [(True, "Success")]
    half = areal.SUBJECT.engine_half(engine)
    half.connect("127.0.0.1", 1234, 1, 2)
    half.transfer(MANIFEST)
    group = "update_weight_group_1234"
    assert engine.called == [
        ("areal_init_update_weight_group", "127.0.0.1", "1234", 1, 2, "nccl", group),
        ("areal_set_weight_meta", ["a.weight"], ["bfloat16"], [[2, 3]], group),
        ("areal_update_weight_xccl",),
    ]
    engine.answers = [(True, "Success"), (False, "Failed to update parameter! a.weight.")]
    with pytest.raises(areal.Unsuccessful, match=r"rank 1: Failed to update parameter! a\.weight\."):
        half.transfer(MANIFEST)


def test_areals_trainer_broadcasts_as_rank_0_of_its_own_group(monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []

    def init_custom_process_group(**how: Any) -> str:
        asked.append(how)
        return "the group"

    def broadcast(tensor: torch.Tensor, src: int, group: str, async_op: bool) -> None:
        assert tensor.is_contiguous()
        asked.append((tuple(tensor.shape), src, group, async_op))

    core = "areal.engine.core.distributed"
    fake_module(monkeypatch, core, init_custom_process_group=init_custom_process_group)
    monkeypatch.setattr(torch.distributed, "broadcast", broadcast)
    half = areal.SUBJECT.trainer_half(SimpleNamespace(rank=0, world_size=1, device=torch.device("cpu")))
    half.invite("127.0.0.1", 1234, 2)
    assert half.send(Sent(), lambda: asked.append("acknowledged")) == 12 + 16
    joined = {
        "backend": "nccl", "init_method": "tcp://127.0.0.1:1234", "world_size": 2, "rank": 0,
        "group_name": "update_weight_group_1234",
    }  # fmt: skip
    assert asked == [joined, ((2, 3), 0, "the group", False), ((4,), 0, "the group", False), "acknowledged"]
