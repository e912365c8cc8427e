"""A vLLM worker with an extension in it, without vLLM: a model of three weights, and a loader."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from extensions import bracket, kept
from extensions.broadcast import WorkerExtension
from extensions.colocate import ColocateWorkerExtension
from extensions.manifest import Announced, check, manifest_of

CPU = torch.device("cpu")
VLLM_CONFIG = SimpleNamespace(parallel_config=SimpleNamespace(world_size=1, data_parallel_index=0))  # without replicas
SHAPES = {"a.weight": (2, 3), "b.weight": (4,), "c.weight": (1,)}


class Model(torch.nn.Module):
    """Weights by name; what `load` is to raise, or `begin`, or `end`, or `abort`."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
        self.fails: dict[str, Exception] = {}
        self.packed: list[str] = []
        self.calls: list[str] = []


class Load:
    """As LayerwiseReload: what is loaded is in the model only at the end."""

    def __init__(self, model: Model, *_: object) -> None:
        self._model, self.taken = model, {}

    def begin(self) -> None:
        self._do("begin")

    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        self._do("load")
        self.taken |= {name: tensor.clone() for name, tensor in tensors.items()}

    def end(self) -> None:
        self._do("end")
        self._model.held.update(self.taken)

    def abort(self) -> bool:
        self._do("abort")
        return not self.taken

    def _do(self, what: str) -> None:
        self._model.calls.append(what)
        if what in self._model.fails:
            raise self._model.fails.pop(what)


class Worker(ColocateWorkerExtension, WorkerExtension):
    """What the extensions touch of vLLM's worker. Its class attributes are the extensions' own."""

    rank = 1
    device = CPU
    vllm_config = VLLM_CONFIG
    model_config = SimpleNamespace(hf_config=None)

    def __init__(self) -> None:
        self.model = Model()
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)


def fitted(monkeypatch: pytest.MonkeyPatch, worker: type[Worker] = Worker) -> Worker:
    """A worker for whose model and loader the extensions are fitted."""
    monkeypatch.setattr(kept, "accepted", _accepted)
    monkeypatch.setattr(bracket, "processed_layers", lambda model: model.packed)
    monkeypatch.setattr(bracket, "new_load", Load)
    return worker()


def _accepted(model: Model, _: object, announced: Announced, whole: bool = True) -> None:
    check(announced, {name: (torch.float32, shape) for name, shape in SHAPES.items()}, set() if whole else {*SHAPES})


def tensors(value: float = 1, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the model can be updated to."""
    return {name: torch.full(shape, float(value)) for name, shape in SHAPES.items()} | changes


def begin(worker: Worker) -> None:
    """Announce all weights."""
    worker.begin_update(manifest_of(tensors().items()))


def untouched(worker: Worker) -> bool:
    """Whether no weight is what it was not at first, and no update is under way."""
    return not any(held.any() for held in worker.model.held.values()) and worker.update_state() == "ready"


def fake_module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    """Have `import name` find a module with these members; packages above it are empty where they are not imported."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if package not in sys.modules:
            monkeypatch.setitem(sys.modules, package, ModuleType(package))
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
