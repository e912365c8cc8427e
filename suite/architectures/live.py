"""What runs in the process of one architecture: its model as a worker of vLLM holds it, without an engine."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from extensions.colocate import ColocateWorkerExtension
from extensions.manifest import manifest_of
from extensions.model.walk import tensors_of
from extensions.model.weights import effective_weights
from suite.actors.recording import unset_is_nan
from suite.architectures.checkpoints import write_both

READ_BACK = "read back: "  # before the name of a weight that was read back through its layer
ENGINE = {
    "dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 2**26,
    "skip_tokenizer_init": True,
}  # fmt: skip
Digests = dict[str, str]


class Worker(ColocateWorkerExtension):
    """As much of vLLM's worker as the extensions touch."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any) -> None:
        self.rank, self.device = 0, torch.device("cpu")
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.model_config, self.vllm_config = vllm_config.model_config, vllm_config


class Live:
    """One architecture in a process of its own. `judge` or `judge_reload` is called, once."""

    def __init__(self, name: str, directory: Path, port: int, entered: Callable[[str], None]) -> None:
        """`entered` is told of every step that begins, so that what ends the process can be placed."""
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
        self._name, self._directory, self._port, self._entered = name, directory, port, entered

    def judge(self) -> dict[str, Any]:
        """Update a model to the second checkpoint one tensor a call, and back with all of them in one call.

        Returns {"sent", "compared", "differing": counts, "stale": paths, "state": what the extension says}.
        """
        facts = self._load_both()
        model, config = self._load(self._paths[0])
        self._worker = self._worker_of(model, config)
        self._update(1, together=False)
        stale = _stale(self._cold[1], model)
        if not stale:
            self._update(0, together=True)
            stale = _stale(self._cold[0], model)
        return facts | {"stale": stale, "state": self._worker.update_state()}

    def judge_reload(self) -> dict[str, Any]:
        """As `judge`, by vLLM's layerwise reload alone and only to the second checkpoint."""
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader import reload

        facts = self._load_both()
        model, config = self._load(self._paths[0])
        self._entered("update")
        with set_current_vllm_config(config), torch.device("cpu"):
            reload.initialize_layerwise_reload(model)
            model.load_weights(self._sent(1).items())
            reload.finalize_layerwise_reload(model, config.model_config)
        return facts | {"stale": _stale(self._cold[1], model), "state": "ready"}

    def _worker_of(self, model: torch.nn.Module, config: Any) -> Worker:
        return Worker(model, config)

    def _load_both(self) -> dict[str, int]:
        """Write both checkpoints and load them as an engine that starts does: what an update has to give."""
        self._entered("write")
        self._paths = self._write()
        self._entered("load")
        first, second = (self._load(path)[0] for path in self._paths)
        with unset_is_nan():  # what a load leaves as it found it is no part of the comparison
            again, _ = self._load(self._paths[1])
        before, after, repeated = map(_digests, (first, second, again))  # all three live: no address comes twice
        same = [path for path, digest in after.items() if repeated.get(path) == digest]
        self._cold = [{path: cold.get(path, "") for path in same} for cold in (before, after)]
        differing = sum(before.get(path) != after[path] for path in same)
        return {"sent": len(self._sent(1)), "compared": len(same), "differing": differing}

    def _write(self) -> list[Path]:
        return write_both(self._name, self._directory)

    def _update(self, index: int, together: bool) -> None:
        sent = self._sent(index)
        self._entered("begin")
        self._worker.begin_update(manifest_of(sent.items()))
        self._entered("update")
        for tensors in [sent] if together else ({name: tensor} for name, tensor in sent.items()):
            self._worker._weight_sync_accept(tensors)
        self._worker.end_update()

    def _sent(self, index: int) -> dict[str, torch.Tensor]:
        return load_file(self._paths[index] / "model.safetensors")

    def _load(self, path: Path, **arguments: Any) -> tuple[torch.nn.Module, Any]:
        """The model of a checkpoint, and the configuration that it was loaded with."""
        from vllm.config import set_current_vllm_config

        config = configured(path, **arguments)
        with set_current_vllm_config(config):
            join(self._port)
        return loaded(config), config


def configured(path: Path, **arguments: Any) -> Any:
    """vLLM's configuration of an engine that starts from a checkpoint; `arguments` are more of EngineArgs."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(model=str(path), **ENGINE, **arguments).create_engine_config()


def loaded(config: Any) -> torch.nn.Module:
    """The model of a configuration, by vLLM's own loader."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model

    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def join(port: int) -> None:
    """Form the groups of one rank that vLLM's layers ask for, once a process, as the current configuration has them."""
    from vllm.distributed import init_distributed_environment, initialize_model_parallel

    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
        initialize_model_parallel(1, 1)


def _digests(model: torch.nn.Module) -> Digests:
    """Of every tensor that the model computes with, and of weights that only their layer can tell."""
    found = {path: digest(tensor) for path, tensor in tensors_of(model).items()}
    return found | {READ_BACK + name: digest(weight) for name, weight in effective_weights(model)}


def _stale(cold: Digests, model: torch.nn.Module) -> list[str]:
    """The tensors in which a model differs from one that was loaded cold."""
    found = _digests(model)
    return [path for path, digest in cold.items() if found.get(path) != digest]


def digest(tensor: torch.Tensor) -> str:
    """Of the dtype, the shape and every bit of a tensor on the CPU."""
    if tensor.is_meta:
        return f"without data, {tuple(tensor.shape)}"
    shaped = f"{tensor.dtype} {tuple(tensor.shape)} "
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    return shaped + hashlib.sha256(raw).hexdigest()[:16]
