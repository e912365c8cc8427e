"""Planned updates behind vLLM's own weight transfer: registered by the entry point, planned once, refused in time."""

import json
import os
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import pytest
import torch
from safetensors.torch import save_file

from extensions import vllm_plugin
from extensions.manifest import ManifestError
from suite import ROOT, models
from suite.architectures.running import VARIABLES
from suite.models import TIED
from suite.processes.local import free_port
from suite.selftest.fakes import fake_module
from suite.selftest.vllm_models import NO_ENGINE

GROUP = "vllm.general_plugins"
TRAINER = ROOT / "suite" / "selftest" / "planned_trainer.py"
TRAINING_S = 240
SLOPES = (1.0, 0.5)
WORKERS = "plugin.of_some_platform"  # the module of the worker's class
SHAPES = {"a.weight": [2, 3], "b.weight": [4]}
COLUMNS = {"names": [*SHAPES], "dtype_names": ["float32", "float32"], "shapes": [*SHAPES.values()]}
Info, Update = TypeVar("Info"), TypeVar("Update")


class Base(Generic[Info, Update]):
    """vLLM's WeightTransferEngine from 0.25 on, as far as it keeps what it is given."""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None: ...

    def start_weight_update(self) -> None: ...


class Factory:
    """vLLM's, as far as it registers."""

    def __init__(self) -> None:
        self._registry: dict[str, tuple[str, str]] = {}

    def register_engine(self, name: str, module: str, cls: str) -> None:
        assert name not in self._registry, "vLLM raises ValueError here"
        self._registry[name] = (module, cls)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Factory:
    """vLLM's factory and worker, in the place of vLLM."""
    package, factory = "vllm.distributed.weight_transfer", Factory()
    worker = type("Worker", (Sleeper,), {})
    fake_module(monkeypatch, WORKERS, Worker=worker)
    fake_module(monkeypatch, "vllm.utils.import_utils", resolve_obj_by_qualname={f"{WORKERS}.Worker": worker}.get)
    fake_module(monkeypatch, package, WeightTransferEngineFactory=factory)
    fake_module(
        monkeypatch, f"{package}.base", WeightTransferEngine=Base, WeightTransferInitInfo=object,
        WeightTransferUpdateInfo=object,
    )  # fmt: skip
    yield factory
    sys.modules.pop("extensions.transfer", None)


class Sleeper:
    """vLLM's worker, as far as it sleeps: at level 2 it loses what is neither parameter nor buffer."""

    weight_transfer_engine: Any = None

    def __init__(self) -> None:
        self.model = torch.nn.Linear(2, 2)
        self.model.slopes = torch.tensor(SLOPES)

    def sleep(self, level: int = 1) -> None:
        if level == 2:
            self.model.slopes.fill_(0)

    def wake_up(self, tags: list[str] | None = None) -> None: ...


class Recording:
    """What the engine calls of the extension."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.refusal, self.planned = "", False

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self.calls.append((method, *args))

    def plan_update(self, manifest: list[dict]) -> str:
        if self.refusal:
            raise ManifestError(self.refusal)
        self.calls.append(("plan_update", manifest))
        self.planned = True
        return "digest"

    def _weight_sync_has_planned(self, digest: str) -> bool:
        return self.planned and digest == "digest"


def engine_of(model: Any) -> Any:
    from extensions.transfer import PlannedTransferEngine

    told = {"data_parallel_index": 1, "world_size": 2, "rank": 1, "worker_cls": f"{WORKERS}.Worker"}
    config = SimpleNamespace(parallel_config=SimpleNamespace(**told))
    return PlannedTransferEngine(None, config, torch.device("cpu"), model)


@pytest.fixture
def engine(vllm: Factory) -> Any:
    from extensions.ranks import rank_in_engine

    made = engine_of("the model")
    assert rank_in_engine(made._receiver) == 3, "expected a rank of its own among all replicas"
    assert made._receiver.model_runner.get_model() == "the model"
    made._receiver = Recording()
    return made


def test_the_backend_is_registered_once(vllm: Factory):
    for _ in range(2):
        vllm_plugin.register()
    assert vllm._registry == {"planned": ("extensions.transfer", "PlannedTransferEngine")}


def test_vllm_before_0_25_gets_no_backend(vllm: Factory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(Base, "start_weight_update")
    vllm_plugin.register()
    assert vllm._registry == {}
    monkeypatch.setitem(sys.modules, "vllm.distributed.weight_transfer", None)
    vllm_plugin.register()  # a plugin that raises would keep vLLM from starting


def test_pyprojects_entry_point_leads_to_the_function():
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    ((name, value),) = entries.items()
    assert metadata.EntryPoint(name, value, GROUP).load() is vllm_plugin.register


def test_an_update_is_planned_once_and_received(engine: Any):
    receiver = engine._receiver
    engine.init_transfer_engine(engine.init_info_cls("127.0.0.1", 1234, 1, 2))
    engine.start_weight_update()
    for told in (COLUMNS, {}, COLUMNS):  # without names: the same tensors again
        engine.receive_weights(engine.update_info_cls(**told))
    receiver.planned = False  # the model's tensors have moved
    engine.receive_weights(engine.update_info_cls())
    engine.finish_weight_update()
    engine.shutdown()
    manifest = [{"name": name, "dtype": "float32", "shape": shape} for name, shape in SHAPES.items()]
    planned, received = ("plan_update", manifest), ("receive_update", "digest")
    joined, left = ("init_weight_update_group", "127.0.0.1", 1234, 1, 2), ("close_weight_update_group",)
    assert receiver.calls == [joined, planned, *[received] * 3, planned, received, left]


def test_what_sleep_loses_is_as_it_was_after_waking(vllm: Factory, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("extensions.asleep.processed_layers", lambda model: [])
    worker = sys.modules[WORKERS].Worker()
    worker.weight_transfer_engine = engine_of(worker.model)
    engine_of(worker.model)  # of another worker in this process: the class is changed once
    for woken, expected in ((["kv_cache"], (0, 0)), (["weights"], SLOPES), (None, SLOPES)):
        worker.sleep(level=2)
        worker.wake_up(tags=woken)
        assert tuple(worker.model.slopes.tolist()) == expected


@pytest.mark.parametrize("backend", [None, object()], ids=["none", "nccl"])
def test_a_worker_of_another_backend_sleeps_as_it_did(vllm: Factory, backend: object):
    worker = sys.modules[WORKERS].Worker()
    engine_of(torch.nn.Linear(2, 2))
    worker.weight_transfer_engine = backend
    worker.sleep(2)
    worker.wake_up()
    assert tuple(worker.model.slopes.tolist()) == (0, 0)


def test_a_worker_that_slept_at_level_1_is_left_to_vllm(vllm: Factory):
    worker = sys.modules[WORKERS].Worker()
    worker.weight_transfer_engine = engine_of(worker.model)
    worker.sleep()
    worker.model.slopes.fill_(7)  # as vLLM itself may
    worker.wake_up()
    assert tuple(worker.model.slopes.tolist()) == (7, 7)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({}, "the first update names its tensors"),
        (COLUMNS | {"shapes": [[2, 3]]}, r"have one length, found \[2, 2, 1\]"),
        (COLUMNS, "does not fit the model"),
    ],
)
def test_what_cannot_be_planned_keeps_no_sender_waiting(engine: Any, told: dict, said: str):
    engine._receiver.refusal = "the update does not fit the model"
    with pytest.raises(ManifestError, match=said):
        engine.receive_weights(engine.update_info_cls(**told))
    assert engine._receiver.calls == [("_weight_sync_refuse",)]


# vLLM 0.32 uses AMX where the CPU has it, and does not ask the kernel for it in every process that computes: SIGILL.
# arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) asks; where there is no AMX, it fails and changes nothing.
ASKS_FOR_AMX = """
import ctypes, platform
if platform.machine() == "x86_64":
    ctypes.CDLL(None).syscall(158, 0x1023, 18)
"""


@pytest.mark.skipif(NO_ENGINE is not None, reason="there is no vLLM for CPUs here")
def test_a_trainer_updates_an_engine_through_vllms_own_api(tmp_path: Path):
    """The package is as pip installs it, as far as vLLM looks for plugins."""
    entries = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    installed = tmp_path / "installed" / "planned_under_test-1.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: planned-under-test\nVersion: 1\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in entries.items())]
    (installed / "entry_points.txt").write_text("\n".join(lines) + "\n")
    (installed.parent / "sitecustomize.py").write_text(ASKS_FOR_AMX)
    spec = models.MODELS[TIED]
    start = models.write_checkpoint(spec, 0, tmp_path / "start")
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in models.tensors(spec)}
    save_file(zeros, tmp_path / "zeros.safetensors")
    paths = [tmp_path / "zeros.safetensors", start / "model.safetensors"]
    told = [str(start), str(free_port()), *map(str, paths)]
    environment = os.environ | VARIABLES | {"PYTHONPATH": f"{ROOT}{os.pathsep}{installed.parent}"}
    with tempfile.TemporaryDirectory(prefix="ws-") as short:  # vLLM leaves its sockets, even where it ends by itself
        finished = subprocess.run(
            [sys.executable, str(TRAINER), *told], cwd=tmp_path, timeout=TRAINING_S, capture_output=True, text=True,
            env=environment | {"TMPDIR": short, "VLLM_RPC_BASE_PATH": short},
        )  # fmt: skip
    said = finished.stdout[-2000:] + finished.stderr[-4000:]
    answers = [json.loads(line.partition(" ")[2]) for line in finished.stdout.splitlines() if line.startswith("ANSWER")]
    assert finished.returncode == 0, said
    before, of_zeros, after = answers
    assert of_zeros == [0] * 8, f"expected the answer of a model of zeros, found {of_zeros}"
    assert after == before != of_zeros, f"expected {before}, found {after}"
