"""Adapters of other projects' extensions, without those projects: what they ask of them, and what is said where one
is not installed. `tox run -e verl` and its like judge the extensions themselves."""

import json
import os
import threading
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import zmq

from extensions.segments import RUN_ID
from suite import ROOT
from suite.selftest.fakes import fake_module
from suite.selftest.foreign import DEVICE, MANIFEST, TENSORS, Engine, Sent
from suite.session import selection, waivers
from suite.stages import STAGES
from suite.subjects import checkpoint_engine, foreign, known_subjects, swift, verl

FOREIGN = {name: subject for name, subject in known_subjects().items() if isinstance(subject, foreign.Foreign)}


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Extensions that are not asked for their methods."""
    monkeypatch.setattr(foreign.Foreign, "load", lambda self: object)


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_not_installed_is_a_usage_error_before_anything_starts(name: str, monkeypatch: pytest.MonkeyPatch):
    def nowhere(distribution: str) -> str:
        raise metadata.PackageNotFoundError(distribution)

    subject = FOREIGN[name]
    asked = {"subject": [name], "extension": []}
    monkeypatch.setattr(foreign.metadata, "version", nowhere)
    with pytest.raises(pytest.UsageError) as raised:
        selection.subjects(SimpleNamespace(getoption=asked.get))
    said = f"--subject {name}: expected {subject.distribution} {subject.version}, found no such package: run `tox run"
    assert str(raised.value).startswith(said)
    monkeypatch.setattr(foreign.metadata, "version", lambda distribution: subject.version)
    assert selection.subjects(SimpleNamespace(getoption=asked.get)) == {name: subject}


@pytest.mark.parametrize("name", FOREIGN)
def test_each_has_a_tox_environment_of_its_release(name: str):
    subject = FOREIGN[name]
    text = (ROOT / "tox.ini").read_text()
    assert f"[testenv:{subject.environment}" in text
    assert f"{subject.distribution}=={subject.version}" in text


@pytest.mark.parametrize("name", FOREIGN)
def test_each_says_on_which_stages_it_makes_sense(name: str):
    fit = {stage.name for stage in STAGES if not FOREIGN[name].unfit(stage)}
    assert fit == STAGES_OF[name]


BY_NCCL = {
    "gpu-shared", "gpu-split", "gpu-split-tp2", "gpu-fanout", "gpu-fanout3", "gpu-split-pp2", "gpu-split-pp2-tp2",
}  # fmt: skip
COLOCATED = {f"gpu-colocate-{ranks}" for ranks in ("tp1", "tp2", "tp4", "pp2", "pp2-tp2")}
STAGES_OF = {
    "checkpoint-engine": COLOCATED,
    "verl": COLOCATED,
    "openrlhf": BY_NCCL,
    "openrlhf-ipc": COLOCATED,
    "trl": BY_NCCL,
    "ms-swift": {"gpu-colocate-tp1"},
    "areal": BY_NCCL,
}


def test_what_is_waived_is_judged_where_it_was_seen():
    found = waivers.read(ROOT / "suite" / "subjects" / "waivers" / "frameworks.toml")
    folders = ("1xh200-frameworks", "1xh200-ms-swift-areal-verl")
    files = [ROOT / "reports" / "baselines" / folder / "vllm-0.24.0.json" for folder in folders]
    runs = [json.loads(file.read_text()) for file in files]
    cases = [case for run in runs for case in run["conformance"] if case["verdict"] == "fail"]
    failed = {(case["requirement"], case["subject"]) for case in cases}
    declared = {(name, subject.name) for subject in FOREIGN.values() for name in subject.lacks}
    corrected = {("lora.exact", "verl")}  # the adapter did not say that the engine took adapters
    assert {(waiver.requirement, waiver.subject) for waiver in found} == failed - declared - corrected
    assert all(waiver.vllm.contains(run["environment"]["vllm"]["version"]) for waiver in found for run in runs)


# ---- checkpoint-engine


class ParameterServer:
    """What the adapter asks of checkpoint-engine's; its update() talks as theirs does, and moves no tensors."""

    made: "list[ParameterServer]" = []  # noqa: RUF012

    def __init__(self, **how: Any) -> None:
        self.how, self.registered, self.gathered, self.count = how, {}, [], 0
        self.made.append(self)

    def register_checkpoint(self, name: str, *, named_tensors: dict, use_inplace_pin_memory: bool) -> None:
        assert name not in self.registered
        self.registered[name] = named_tensors

    def unregister_checkpoint(self, name: str) -> None:
        del self.registered[name]

    def gather_metas(self, name: str) -> None:
        self.gathered.append(name)

    def update(self, name: str, called: Any) -> None:
        address = f"ipc://@weight-sync-selftest-{os.getpid()}-{self.count}"
        self.count += 1
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.linger = 0
            socket.bind(address)
            threading.Thread(target=called, args=([(DEVICE, address)],)).start()
            socket.send(b"the buffer")
            if answer := socket.recv():
                raise RuntimeError(f"Failed to update weights due to remote errors: {answer.decode()}")


def worker(address: str) -> None:
    """Takes the buffer, as the extension does first."""
    with zmq.Context() as context, context.socket(zmq.REP) as socket:
        socket.connect(address)
        assert socket.recv() == b"the buffer"
        socket.send(b"")


@pytest.fixture
def trainer(monkeypatch: pytest.MonkeyPatch):
    fake_module(monkeypatch, "checkpoint_engine.ps", ParameterServer=ParameterServer)
    for name in ("RANK", "WORLD_SIZE", "PS_MAX_BUCKET_SIZE_GB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(checkpoint_engine.CheckpointEngineTrainer, "_own", lambda self: DEVICE)
    monkeypatch.setattr(os, "environ", {**os.environ})
    rank = SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda", 0))
    half = checkpoint_engine.SUBJECT.trainer_half(rank)
    half.invite("127.0.0.1", 1234, 2)
    yield half
    half.close()


def test_an_update_by_a_parameter_server(trainer):
    server = ParameterServer.made[-1]
    assert server.how == {
        "rank": 0, "world_size": 1, "auto_pg": True, "master_addr": "127.0.0.1", "master_port": 1234,
    }  # fmt: skip
    said: list[str] = []
    for update in ("update-1", "update-2"):
        addresses = trainer.announce(Sent())["addresses"]
        assert server.registered.keys() == {update}
        assert server.gathered[-1] == update
        threading.Thread(target=worker, args=(addresses[DEVICE],)).start()
        assert trainer.send(Sent(), lambda: said.append("acknowledged")) == 12 + 16
        assert said.pop() == "acknowledged"
        trainer.release()
        assert not server.registered


def test_an_update_that_no_engine_begins_ends(trainer):
    trainer.announce(Sent())
    trainer.release()
    assert not ParameterServer.made[-1].registered
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint-engine"]


def test_an_update_whose_addresses_fit_no_worker_is_ended_by_an_abort(trainer):
    announced = trainer.announce(Sent())
    assert trainer.mislabelled(announced, "GPU-1")["addresses"] == {"GPU-1": announced["addresses"][DEVICE]}
    assert trainer.mislabelled(announced, "")["addresses"] == {}
    threading.Timer(0.1, trainer.abort, ("the engine refused",)).start()
    with pytest.raises(RuntimeError, match="remote errors: the engine has not begun the update"):
        trainer.send(Sent(), lambda: None)


def test_what_the_server_raises_before_it_calls_is_raised(trainer, monkeypatch: pytest.MonkeyPatch):
    def refuses(*_: object) -> None:
        raise RuntimeError("parameter metas is empty")

    monkeypatch.setattr(ParameterServer, "update", refuses)
    with pytest.raises(RuntimeError, match="parameter metas is empty"):
        trainer.announce(Sent())


def test_a_server_that_never_calls_is_given_up(trainer, monkeypatch: pytest.MonkeyPatch):
    ended = threading.Event()
    monkeypatch.setattr(ParameterServer, "update", lambda *_: ended.wait(10))
    monkeypatch.setattr(checkpoint_engine, "CALLED_S", 0.05)
    with pytest.raises(TimeoutError, match=r"to call for the engine in 0\.05 s"):
        trainer.announce(Sent())
    ended.set()


def test_ranks_of_a_trainer_have_a_share_each(monkeypatch: pytest.MonkeyPatch, trainer):
    trainer.trainer.rank, trainer.trainer.world_size = 1, 2
    trainer.announce(Sent())
    (share,) = ParameterServer.made[-1].registered.values()
    assert list(share) == ["b.weight"]


def test_the_engine_gives_workers_the_addresses_of_all_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(foreign.Foreign, "load", lambda self: object)
    engine = Engine()
    made = checkpoint_engine.SUBJECT.engine_half(engine)
    announced = [{"manifest": MANIFEST, "addresses": {f"GPU-{rank}": f"ipc://@{rank}"}} for rank in range(2)]
    assert made.receive(announced) == MANIFEST
    made.transfer(MANIFEST)
    assert engine.called == [("update_weights_from_ipc", {"GPU-0": "ipc://@0", "GPU-1": "ipc://@1"})]
    for wrong in ([DEVICE], {DEVICE: 7}, None):
        with pytest.raises(ValueError, match=r"the trainer sent no \{device: address\}"):
            made.receive([{"manifest": MANIFEST, "addresses": wrong}])


# ---- verl


def test_verls_worker_and_sender_mean_the_same_socket(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(RUN_ID, "run7")
    monkeypatch.setattr(foreign.Foreign, "load", lambda self: object)
    engine = Engine()
    half = verl.SUBJECT.engine_half(engine)
    assert os.environ.pop(verl.JOB) == "run7"
    assert verl.address(1) == "ipc:///tmp/rl-colocate-zmq-run7-replica-0-rank-1.sock"
    half.transfer(MANIFEST)
    assert engine.called == [("update_weights_from_ipc", None, False, False)]
    engine.takes_adapters = True
    half.transfer(MANIFEST)
    assert engine.called[1:] == [("update_weights_from_ipc", {"peft_type": "LORA"}, False, False)]


def test_verls_sender_is_given_the_tensors_as_they_are(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(RUN_ID, "run7")
    made = {}

    class BucketedWeightSender:
        def __init__(self, **how: Any) -> None:
            made.update(how)

        async def async_send_weights(self, weights: Any) -> None:
            made["sent"] = list(weights)

    module = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer"
    fake_module(monkeypatch, module, BucketedWeightSender=BucketedWeightSender)
    rank = SimpleNamespace(rank=1, world_size=2, device=torch.device("cuda", 0))
    said = []
    assert verl.SUBJECT.trainer_half(rank).send(Sent(), lambda: said.append("acknowledged")) == 12 + 16
    assert said == ["acknowledged"]
    assert [tensor is sent for (_, tensor), (_, sent) in zip(TENSORS, made["sent"], strict=True)] == [True, True]
    assert (made["zmq_handle"], made["use_shm"]) == (verl.address(1), False)


# ---- ms-swift


def test_swifts_worker_is_told_the_socket_that_its_sender_binds(unloaded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WEIGHT_UPDATE_TIMEOUT_S", "15.0")
    made: dict[str, Any] = {}

    class BucketedWeightSender:
        def __init__(self, zmq_handle: str, use_shm: bool, timeout_s: int) -> None:
            made.update(socket=zmq_handle, use_shm=use_shm, timeout_s=timeout_s, did=[])

        async def __aenter__(self) -> "BucketedWeightSender":
            return self

        async def __aexit__(self, *_: object) -> None:
            made["did"].append("cleaned up")

        async def handshake(self) -> None:
            made["did"].append("shook hands")

        async def send_weights(self, weights: Any) -> None:
            made["did"].append([name for name, _ in weights])

    fake_module(monkeypatch, swift.SENDERS, BucketedWeightSender=BucketedWeightSender)
    trainer = swift.SUBJECT.trainer_half(SimpleNamespace(rank=0, world_size=1, device=torch.device("cuda", 0)))
    trainer.invite("127.0.0.1", 1234, 2)
    announced = {"manifest": MANIFEST, **trainer.announce(Sent())}
    assert announced["socket"] != trainer.announce(Sent())["socket"], "expected a socket for every update"
    announced["socket"] = trainer._socket
    engine = Engine()
    half = swift.SUBJECT.engine_half(engine)
    half.receive([announced])
    half.transfer(MANIFEST)
    assert trainer.send(Sent(), lambda: made["did"].append("acknowledged")) == 12 + 16
    assert engine.called == [("update_weights_from_ipc", False, made["socket"], 15)]
    assert made["did"] == ["shook hands", ["a.weight", "b.weight"], "cleaned up", "acknowledged"]
    assert (made["use_shm"], made["timeout_s"]) == (False, 15)
    with pytest.raises(ValueError, match="the trainer sent no path of a socket, but 7"):
        half.receive([{"manifest": MANIFEST, "socket": 7}])
