"""The weight-transfer engine over gloo, and how an engine's process calls vLLM's own methods, with vLLM faked."""

import configparser
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch

from suite import ROOT
from suite.actors.engine import Engine, WorkerError
from suite.actors.watch import WorkerDied
from suite.selftest.fakes import fake_module
from suite.selftest.runs import preloaded
from suite.subjects import native_gloo

Info, Update = TypeVar("Info"), TypeVar("Update")
NAMED = {"a.weight": torch.arange(6.0).reshape(2, 3), "b.weight": torch.ones(4, dtype=torch.bfloat16)}
IN_STEP = [{"result": None}, {"result": None}]


# ---- the engine over gloo


class Base(Generic[Info, Update]):
    """vLLM's WeightTransferEngine from 0.25 on, as far as it keeps what it is given."""

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        self.parallel_config, self.model_config = vllm_config.parallel_config, "model config"
        self.model = model


class Group:
    """A group that brings NAMED, one tensor after the other."""

    def __init__(self, *joined: Any) -> None:
        self.joined, self.closed, self._left = joined, False, iter(NAMED.values())

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert src == 0
        sent = next(self._left)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype)
        tensor.copy_(sent)

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def transfer(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The engine of rank 1 of 2 in the second of two replicas, what was called, and the groups that it joined."""
    calls: list[Any] = []
    reload = {
        f"{step}_layerwise_reload": lambda *args, step=step: calls.append((step, *args))
        for step in ("initialize", "finalize")
    }
    base = "vllm.distributed.weight_transfer.base"
    fake_module(
        monkeypatch, base, WeightTransferEngine=Base, WeightTransferInitInfo=object, WeightTransferUpdateInfo=object
    )
    fake_module(monkeypatch, "vllm.model_executor.model_loader.reload", **reload)
    monkeypatch.delitem(sys.modules, "suite.subjects.native_gloo_engine", raising=False)
    from suite.subjects import native_gloo_engine as module

    groups: list[Group] = []

    def join(*joined: Any) -> Group:
        groups.append(Group(*joined))
        return groups[-1]

    monkeypatch.setattr(module, "stateless_init_process_group", join)
    parallel = SimpleNamespace(data_parallel_index=1, world_size=2, rank=1)
    model = SimpleNamespace(load_weights=lambda named: calls.append(("load", *named)))
    engine = module.GlooTransferEngine(None, SimpleNamespace(parallel_config=parallel), torch.device("cpu"), model)
    yield SimpleNamespace(engine=engine, calls=calls, groups=groups, model=model)
    sys.modules.pop("suite.subjects.native_gloo_engine", None)


def update_of(engine: Any) -> Any:
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in NAMED.values()]
    return engine.update_info_cls([*NAMED], dtypes, [list(tensor.shape) for tensor in NAMED.values()])


def test_every_tensor_is_loaded_as_it_arrives_between_start_and_finish(transfer: SimpleNamespace):
    engine, calls = transfer.engine, transfer.calls
    engine.init_transfer_engine(engine.init_info_cls("127.0.0.1", 1234, 5, 9))
    engine.start_weight_update()
    engine.receive_weights(update_of(engine))
    engine.finish_weight_update()
    assert [call[0] for call in calls] == ["initialize", "load", "load", "finalize"]
    assert (calls[0][1:], calls[-1][1:]) == ((transfer.model,), (transfer.model, "model config"))
    for (name, tensor), (_, (loaded_name, loaded)) in zip(NAMED.items(), calls[1:-1], strict=True):
        assert loaded_name == name
        assert torch.equal(loaded, tensor)


def test_a_worker_has_a_rank_of_its_own_among_all_replicas(transfer: SimpleNamespace):
    engine = transfer.engine
    for _ in range(2):
        engine.init_transfer_engine(engine.init_info_cls("127.0.0.1", 1234, 5, 9))
    assert transfer.groups[1].joined == ("127.0.0.1", 1234, 5 + 1 * 2 + 1, 9, torch.device("cpu"))
    assert [group.closed for group in transfer.groups] == [True, False], "expected the earlier group to be left"
    engine.shutdown()
    engine.shutdown()
    assert transfer.groups[1].closed


def test_nothing_is_received_without_a_group(transfer: SimpleNamespace):
    with pytest.raises(RuntimeError, match=r"call init_weight_transfer_engine\(\) first"):
        transfer.engine.receive_weights(update_of(transfer.engine))


def test_a_worker_that_is_made_registers_the_engine_once(monkeypatch: pytest.MonkeyPatch):
    class Factory:
        _registry: dict = {}  # noqa: RUF012

        @classmethod
        def register_engine(cls, name: str, module: str, member: str) -> None:
            assert name not in cls._registry, "vLLM refuses a name twice"
            cls._registry[name] = (module, member)

    fake_module(monkeypatch, "vllm.distributed.weight_transfer", WeightTransferEngineFactory=Factory)
    for _ in range(2):
        type("Worker", (native_gloo.GlooWorker,), {})
    assert Factory._registry == {native_gloo.BACKEND: native_gloo.TRANSFER}
    assert native_gloo.SUBJECT.engine_arguments() == {"weight_transfer_config": {"backend": native_gloo.BACKEND}}


def test_the_cases_of_the_subject_take_its_models(tmp_path: Path):
    chosen = ["-m", "cpu", "--subject=broadcast", "--subject=native-gloo", "--stage=cpu-tp1"]
    arguments = [*chosen, "--collect-only", "-q", "-p", "no:cacheprovider"]
    _, output = preloaded().run(ROOT, arguments, tmp_path / "output.txt")
    cases = {line.partition("::")[2] for line in output.splitlines()}
    assert {
        "test_exact[broadcast-cpu-tp1-qwen3-tied-tiny]", "test_exact[native-gloo-cpu-tp1-qwen3-untied-tiny]",
        "test_tied[native-gloo-cpu-tp1-qwen3-tied-tiny]", "test_update[broadcast-cpu-tp1-qwen3-1m]",
    } <= cases, output  # fmt: skip
    assert not {case for case in cases if case.startswith("test_update[native-gloo")}


# ---- calls of vllm.LLM itself


class Llm:
    """vllm.LLM with two workers. `left` is what answers the next calls in place of the workers."""

    def __init__(self) -> None:
        self.left: list[Any] = []
        self.asked: list[str] = []

    def update_weights(self, request: dict) -> str:
        if request.get("fails"):
            raise RuntimeError("no module named ghost")
        return "done"

    def collective_rpc(self, method: str, args: tuple) -> Any:
        self.asked.append(args[0])
        answer = self.left.pop(0) if self.left else IN_STEP
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def engine() -> Engine:
    made = Engine.__new__(Engine)
    made._llm, made.devices = Llm(), [{}, {}]
    made._watch = SimpleNamespace(waiting=lambda: pytest.MonkeyPatch().context())
    return made


def fail(engine: Engine) -> None:
    with pytest.raises(RuntimeError, match="ghost"):
        engine.call_llm("update_weights", {"fails": True})


def test_a_call_that_succeeds_leaves_nothing_to_be_looked_at(engine: Engine):
    assert engine.call_llm("update_weights", {}) == "done"
    engine.rpc("probe_resources")
    assert engine._llm.asked == ["probe_resources"]


def test_replies_are_looked_at_once_after_a_call_that_failed(engine: Engine):
    fail(engine)
    engine.rpc("probe_resources")
    engine.rpc("probe_resources")
    assert engine._llm.asked == ["probe_nothing", "probe_resources", "probe_resources"]


@pytest.mark.parametrize("unread", [[{"result": None}, None], [None, None], RuntimeError("ghost, as rank 1 has it")])
def test_a_reply_that_a_failed_call_left_is_told_from_an_answer(engine: Engine, unread: Any):
    fail(engine)
    engine._llm.left = [unread] * 3
    for _ in range(2):
        with pytest.raises(WorkerError, match="answered by what that left unread"):
            engine.rpc("probe_resources")
    with pytest.raises(WorkerError, match="answered by what that left unread"):
        engine.generate([[1]], 1)


def test_a_worker_that_died_is_no_reply_that_was_left(engine: Engine):
    fail(engine)
    engine._llm.left = [WorkerDied("gone")]
    with pytest.raises(WorkerDied):
        engine.rpc("probe_resources")


@pytest.mark.parametrize(("section", "more_than"), [("native", 4), ("engines", 4), ("server", 4), ("handles", 4)])
def test_what_tox_judges_in_short_are_tests(section: str, more_than: int):
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "tox.ini")
    cases = re.findall(r"test_\w+", config[section]["cases"])
    tests = {name for path in (ROOT / "suite" / "conformance").glob("test_*.py")
             for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)}  # fmt: skip
    assert len(cases) > more_than
    assert set(cases) <= tests, f"expected tests of suite/conformance, found {set(cases) - tests}"
    assert (ROOT / config["native"]["waivers"].partition("{tox_root}/")[2]).is_file()
