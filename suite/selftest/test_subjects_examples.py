"""What extensions of vLLM's RLHF example are given: dtypes and handles in the form that they take."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.multiprocessing import reductions

from extensions.colocate import HandleSender
from suite.actors.probe import Probe
from suite.selftest import copied, fakes
from suite.stages import STAGES
from suite.subjects import SUBJECTS, known_subjects, subject_from
from suite.subjects.adapting import adapted, expect_known_forms, pair
from suite.subjects.example_senders import GroupSender, IpcSender
from suite.subjects.handles import HandlesEngine

CPU = torch.device("cpu")
SHAPE = (3, 2)
CUDA_HANDLE = {
    "kind": "cuda_ipc", "shape": [3, 2], "stride": [2, 1], "storage_offset": 4, "dtype": "bfloat16",
    "memory_handle": b"memory", "storage_bytes": 64, "storage_offset_bytes": 512, "ref_counter_handle": b"/torch_1",
    "ref_counter_offset": 7, "event_handle": b"e" * 64, "event_sync_required": True,
}  # fmt: skip


def worker_with(**methods: object) -> object:
    return type("Worker", (), {"device": CPU, **methods})()


# ---- dtypes


@pytest.mark.parametrize(
    ("update_weight", "said", "found"),
    [
        (lambda self, name, dtype, shape: None, {}, torch.bfloat16),
        (lambda self, name, dtype_name, shape: None, {}, "bfloat16"),
        (lambda self, *args: None, {}, "bfloat16"),
        (lambda self, name, dtype, shape: None, {"weight_sync_dtype": "text"}, "bfloat16"),
        (lambda self, name, dtype_name, shape: None, {"weight_sync_dtype": "torch"}, torch.bfloat16),
    ],
)
def test_a_dtype_is_what_the_parameters_name_says_or_the_class(update_weight, said: dict, found: object):
    worker = worker_with(update_weight=update_weight, **said)
    assert adapted(worker, "update_weight", ["a", "bfloat16", SHAPE]) == ["a", found, SHAPE]


def test_a_dtype_by_name_is_an_attribute_of_torch():
    worker = worker_with(update_weight=copied.TakesNames.update_weight)
    name = adapted(worker, "update_weight", ["a", "float32", SHAPE])[1]
    assert getattr(torch, name) is torch.float32


@pytest.mark.parametrize("attribute", ["weight_sync_dtype", "weight_sync_handles"])
def test_a_form_that_there_is_not_is_refused(attribute: str):
    with pytest.raises(ValueError, match=f"{attribute}: expected one of .*, found 'pickled'"):
        expect_known_forms(type("Theirs", (), {attribute: "pickled"}))


# ---- handles


def test_a_pair_is_what_reduce_tensor_makes_of_a_cuda_tensor():
    function, arguments = pair(CUDA_HANDLE | {"device_index": 3}, torch.device("cuda", 1))
    assert function is reductions.rebuild_cuda_tensor
    assert arguments == (
        torch.Tensor, torch.Size([3, 2]), (2, 1), 4, torch.storage.TypedStorage, torch.bfloat16, 3, b"memory", 64, 512,
        False, b"/torch_1", 7, b"e" * 64, True,
    )  # fmt: skip
    assert pair(CUDA_HANDLE, torch.device("cuda", 1))[1][6] == 1, "expected the worker's own device where none is told"


@pytest.fixture
def sender():
    sender = HandleSender(CPU)
    yield sender
    sender.release()


def test_a_pair_of_a_cpu_tensor_rebuilds_it(sender: HandleSender):
    sent = torch.arange(6, dtype=torch.bfloat16).reshape(SHAPE)
    (handles,) = sender.handles([("a", sent)]).values()
    function, arguments = pair(handles["a"], CPU)
    assert function is reductions.rebuild_tensor
    assert torch.equal(function(*arguments), sent)


@pytest.mark.parametrize("said", [{"weight_sync_handles": "plain"}, {"weight_sync_sender": "theirs:Sender"}])
def test_what_a_classs_own_sender_makes_stays_as_it_is(said: dict):
    worker, handles = worker_with(**said), {"GPU-1": {"a": {"path": "anything"}}}
    assert adapted(worker, "update_weights_from_ipc_handles", [handles]) == [handles]


class Pairs(Probe, copied.TakesPairs):
    """A worker that takes pairs, and keeps what it would load."""

    device, rank, vllm_config = CPU, 0, fakes.VLLM_CONFIG

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        self.loaded = tensors


def test_an_engine_asks_for_devices_first_and_puts_handles_under_what_it_was_told(sender: HandleSender):
    worker = Pairs()
    called: list[str] = []

    def rpc(method: str, *args: object) -> list:
        called.append(method)
        answer = worker.probe_call(method, [*args])
        assert "error" not in answer, answer
        return [answer["result"]]

    subject = subject_from("suite.selftest.copied:TakesPairs")
    half = HandlesEngine(subject, SimpleNamespace(rpc=rpc, devices=[worker.probe_device()]))
    half.connect("", 0, 1, 2)
    sent = torch.ones(SHAPE)
    assert half.receive([{"manifest": [], "handles": sender.handles([("a", sent)])}]) == []
    half.transfer([])
    assert called == ["report_device_id", "update_weights_from_ipc_handles"]
    assert torch.equal(worker.loaded["a"], sent)


@pytest.mark.parametrize("sent_as", ["GPU-1-2", "1-2"])
@pytest.mark.parametrize("reported", ["1-2", "GPU-1-2", "mine"])
def test_a_gpu_is_the_same_with_and_without_its_prefix(sent_as: str, reported: str):
    subject = known_subjects()["example-colocate"]
    given = []
    rpc = lambda method, *args: [reported] if method == "report_device_id" else given.extend(args)  # noqa: E731
    half = HandlesEngine(subject, SimpleNamespace(rpc=rpc, devices=[{"id": "GPU-1-2"}]))
    half.connect("", 0, 1, 2)
    half.receive([{"manifest": [], "handles": {sent_as: {"a": {}}, "GPU-other": {"b": {}}}}])
    half.transfer([])
    assert given == [{reported: {"a": {}}, "GPU-other": {"b": {}}}]


def test_workers_that_share_a_device_find_its_handles_each_by_its_own_name():
    given, called = [], ["worker-0", "worker-1"]
    rpc = lambda method, *args: called if method == "report_device_id" else given.extend(args)  # noqa: E731
    subject = subject_from("suite.selftest.copied:TakesPairs")
    half = HandlesEngine(subject, SimpleNamespace(rpc=rpc, devices=[{"id": "CPU-1"}, {"id": "CPU-1"}]))
    half.connect("", 0, 1, 3)
    half.receive([{"manifest": [], "handles": {"CPU-1": {"a": {}}}}])
    half.transfer([])
    assert given == [{"worker-0": {"a": {}}, "worker-1": {"a": {}}}]


def test_a_reference_gets_handles_under_the_senders_key_whatever_it_reports():
    given = []
    rpc = lambda method, *args: ["mine"] if method == "report_device_id" else given.extend(args)  # noqa: E731
    half = HandlesEngine(SUBJECTS["colocate"], SimpleNamespace(rpc=rpc, devices=[{"id": "GPU-1-2"}]))
    half.connect("", 0, 1, 2)
    half.receive([{"manifest": [], "handles": {"GPU-1-2": {}}}])
    half.transfer([])
    assert given == [{"GPU-1-2": {}}]


# ---- the example's own classes


@pytest.mark.parametrize("name", ["example-broadcast", "example-colocate"])
def test_the_examples_are_not_for_cpus_and_say_why(name: str):
    for stage in (stage for stage in STAGES if stage.kind == "cpu"):
        assert "without a GPU" in known_subjects()[name].unfit(stage)


@pytest.mark.parametrize("zero", [True, False])
@pytest.mark.parametrize("name", ["example-broadcast", "example-colocate"])
def test_the_examples_look_at_every_parameter(name: str, zero: bool):
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    if not zero:
        torch.nn.init.ones_(model.bias)
    worker = type("Worker", (known_subjects()[name].load(),), {})()
    worker.model_runner = SimpleNamespace(model=model)
    assert worker.check_weights_changed() is zero


def test_the_colocated_example_loads_what_the_pairs_rebuild_on_its_own_device():
    rebuilt, loaded = [], []
    worker = type("Worker", (known_subjects()["example-colocate"].load(),), {})()
    worker.device, worker.device_uuid = torch.device("cuda", 2), "mine"
    worker.model_runner = SimpleNamespace(model=SimpleNamespace(load_weights=lambda weights: loaded.extend(weights)))

    def rebuild(*arguments: object) -> str:
        rebuilt.append(arguments)
        return "a tensor"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", lambda: loaded.append("synchronized"))
        worker.update_weights_from_ipc_handles({"mine": {"a": (rebuild, tuple(range(15)))}, "other": {}})
    assert rebuilt == [(0, 1, 2, 3, 4, 5, 2, 7, 8, 9, 10, 11, 12, 13, 14)]
    assert loaded == [("a", "a tensor"), "synchronized"]


# ---- the example's senders


class Communicator:
    """What of vLLM's PyNcclCommunicator is used."""

    disabled = False
    broadcasts: ClassVar[list[tuple[list, int]]] = []

    def __init__(self, group: tuple, device: torch.device) -> None:
        self.group = group

    def broadcast(self, tensor: torch.Tensor, src: int, stream: str) -> None:
        assert (self.group, stream) == (("127.0.0.1", 15000, 0, 2), "the current stream")
        self.broadcasts.append((tensor.tolist(), src))


@pytest.fixture
def communicator(monkeypatch: pytest.MonkeyPatch) -> type[Communicator]:
    created = lambda host, port, rank, world_size: (host, port, rank, world_size)  # noqa: E731
    group = SimpleNamespace(StatelessProcessGroup=SimpleNamespace(create=created))
    monkeypatch.setitem(sys.modules, "vllm.distributed.utils", group)
    pynccl = SimpleNamespace(PyNcclCommunicator=Communicator)
    monkeypatch.setitem(sys.modules, "vllm.distributed.device_communicators.pynccl", pynccl)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the current stream")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(Communicator, "broadcasts", [])
    return Communicator


def test_the_examples_sender_is_rank_0_and_broadcasts_every_tensor(communicator: type[Communicator]):
    sender = GroupSender("127.0.0.1", 15000, 2, CPU)
    column = torch.arange(4.0).reshape(2, 2)[:, 0]
    assert sender.send([("a", torch.ones(2)), ("b", column)]) == 16
    assert communicator.broadcasts == [([1.0, 1.0], 0), ([0.0, 2.0], 0)]


def test_a_communicator_that_would_broadcast_nothing_is_refused(
    communicator: type[Communicator], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(communicator, "disabled", True)
    with pytest.raises(RuntimeError, match="it would broadcast nothing"):
        GroupSender("127.0.0.1", 15000, 2, CPU)


def test_the_examples_handles_tell_the_senders_ordinal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(HandleSender, "handles", lambda self, named: {"GPU-1": {name: {} for name, _ in named}})
    assert IpcSender("cuda:2").handles([("a", None)]) == {"GPU-1": {"a": {"device_index": 2}}}
