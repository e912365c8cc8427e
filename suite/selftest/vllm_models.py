"""What selftests of the extensions put into a process: vLLM models as its CPU workers hold them, without an engine."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from extensions.colocate import ColocateWorkerExtension
from extensions.manifest import manifest_of
from extensions.model import loading
from extensions.model.walk import tensors_of
from extensions.model.weights import effective_weights
from extensions.plan import plan_of
from suite import models
from suite.processes.call import Process
from suite.processes.local import LocalLauncher, free_port
from suite.selftest import other_models
from suite.session import environment

TOKENS = 3
DEADLINE_S = 60
STARTING_S = 120
NO_ENGINE = environment.lacks_engine("cpu")
ENGINE = {
    "dtype": "bfloat16", "max_model_len": 256, "enforce_eager": True, "kv_cache_memory_bytes": 2**26,
    "skip_tokenizer_init": True,
}  # fmt: skip


class Held:
    """A process with one model at a time; its methods are those of `Models`."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args: self._process.call(method, *args, deadline_s=DEADLINE_S)


@contextlib.contextmanager
def holding(directory: Path) -> Iterator[Held]:
    """Start such a process, and end it. Logs and checkpoints go to `directory`."""
    with LocalLauncher(directory / "logs") as launcher:
        arguments = {"directory": str(directory), "port": free_port()}
        variables = {
            "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1",
        }  # fmt: skip
        process = launcher.start("models", "suite.selftest.vllm_models:Models", arguments, variables, STARTING_S)
        process.ready()
        yield Held(process)


class Worker(ColocateWorkerExtension):
    """As much of vLLM's worker as the extensions touch."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any) -> None:
        self.rank, self.device = 0, torch.device("cpu")
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.model_config, self.vllm_config = vllm_config.model_config, vllm_config


class Models:
    """One model at a time; tensors come from a seed. Failures are brought about by `break_*`."""

    def __init__(self, directory: str, port: int) -> None:
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
        from vllm.distributed import init_distributed_environment, initialize_model_parallel

        self._directory = directory
        self._config = self._configure("qwen3-moe-tiny", 0)  # one that has experts makes all the groups
        with self._current():
            init_distributed_environment(1, 0, f"tcp://127.0.0.1:{port}", 0, "gloo")
            initialize_model_parallel(1, 1)

    def build(self, name: str, seed: int) -> None:
        """Load a checkpoint of this seed as an engine that starts."""
        from vllm.model_executor.model_loader import get_model

        self._spec, self._config = models.MODELS[name], self._configure(name, seed)
        with self._current():
            self._model = get_model(vllm_config=self._config)
        self._worker = Worker(self._model, self._config)

    def computes_with(self) -> dict[str, Any]:
        """Digests of the effective weights, and of what the feed-forward blocks answer."""
        from vllm.forward_context import set_forward_context

        digests = {name: _digest(weight) for name, weight in effective_weights(self._model)}
        hidden = torch.linspace(-1, 1, TOKENS * self._spec.config["hidden_size"], dtype=torch.bfloat16)
        with self._current(), torch.no_grad(), set_forward_context(None, self._config, num_tokens=TOKENS):
            for index, layer in enumerate(self._model.model.layers):
                digests[f"answer of layer {index}"] = _digest(layer.mlp(hidden.view(TOKENS, -1)))
        return digests

    def plan(self, changes: dict[str, list | None]) -> dict[str, Any]:
        """The plan of an update to this model's checkpoint, with other shapes under some names; None leaves one out.

        Its problems, and its fills by name: (into, offset in bytes, shape, conversion).
        """
        shapes = dict(models.tensors(self._spec)) | changes
        manifest = [
            {"name": name, "dtype": "bfloat16", "shape": list(shape)}
            for name, shape in shapes.items()
            if shape is not None
        ]
        plan = plan_of(self._model, self._config, manifest)
        fills = {
            name: [[f.into, f.region.offset, list(f.region.shape), list(f.conversion)] for f in plan.of(name)]
            for name in plan.announced
        }
        return {"problems": plan.problems(), "fills": fills}

    def updated_and_cold(self, name: str, apart: bool, lora: bool = False) -> list[str]:
        """Update a model of `other_models` to another seed, its tensors together or apart from each other.

        Which tensors it then computes with differ from those of one that was loaded from that seed; not those in which
        two of these differ by themselves.
        """
        expected, again = (tensor_digests(self._other(name, 1, lora)) for _ in range(2))
        model, tensors = self._other(name, 0, lora), other_models.tensors(name, 1)
        unlike = {path for path, digest in tensor_digests(model).items() if digest != expected[path]}
        worker = Worker(model, self._config)
        worker.begin_update(manifest_of(tensors.items()))
        for part in ({name: tensor} for name, tensor in tensors.items()) if apart else [tensors]:
            worker._weight_sync_accept(part)
        worker.end_update()
        found = tensor_digests(model)
        if len(unlike) < len(tensors) // 2:
            raise RuntimeError(f"expected two seeds to differ in most tensors, found {unlike}")
        return [path for path in expected if expected[path] == again[path] != found.get(path)]

    def _other(self, name: str, seed: int, lora: bool) -> torch.nn.Module:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.model_executor.model_loader import get_model

        directory = other_models.write(name, seed, f"{self._directory}/{name}-{seed}")
        arguments = ENGINE | ({"enable_lora": True, "max_lora_rank": 8} if lora else {})
        self._config = EngineArgs(model=directory, **arguments).create_engine_config()
        with self._current():
            model = get_model(vllm_config=self._config)
        return _wrapped_for_lora(model, self._config) if lora else model

    def forget_ropes(self) -> None:
        """Drop the rotary embeddings that vLLM keeps for the next model."""
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

        _ROPE_DICT.clear()

    def registers(self) -> dict[str, Any]:
        """What vLLM notes of the models that it builds, and the dtype that tensors have by default."""
        from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT

        compilation = self._config.compilation_config
        return {
            "layers": {name: id(layer) for name, layer in compilation.static_forward_context.items()},
            "experts": list(compilation.static_all_moe_layers),
            "ropes": [id(rope) for rope in _ROPE_DICT.values()],
            "dtype": str(torch.get_default_dtype()),
        }

    def without_data(self) -> list[str]:
        """Parameters and buffers that are on the meta device."""
        tensors = [*self._model.named_parameters(), *self._model.named_buffers()]
        return [name for name, tensor in tensors if tensor.is_meta]

    def addresses(self) -> dict[str, int]:
        return {name: p.data_ptr() for name, p in self._model.named_parameters() if p.numel()}

    def begin(self, seed: int = 1, tied_head: bool = False) -> int:
        """Announce an update to the values of another seed; with the output embedding of a model that ties it."""
        self._tensors = {
            name: models.values(name, shape, seed, self._spec.dtype_of(name))
            for name, shape in models.tensors(self._spec)
        }
        if tied_head:
            self._tensors["lm_head.weight"] = self._tensors["model.embed_tokens.weight"].clone()
        return self._worker.begin_update(manifest_of(self._tensors.items()))

    def send(self, count: int | None = None) -> int:
        """Send this many of the tensors announced, or all that are left. Returns how many."""
        names = list(self._tensors)[:count]
        if names:
            self._worker._weight_sync_accept({name: self._tensors.pop(name) for name in names})
        return len(names)

    def load_directly(self, *names: str) -> dict[str, bool]:
        """Load tensors one by one as on GPUs, where nothing is packed. Returns whether parameters are these then."""
        shapes = dict(models.tensors(self._spec))
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        values = {
            name: models.values("model.embed_tokens.weight", shape, 1, torch.bfloat16) for name, shape in shapes.items()
        }
        sent = {name: values[name] for name in names}
        plan = plan_of(self._model, self._config, manifest_of(sent.items()))
        load = loading.DirectLoad(self._model, self._config, plan)
        for name, tensor in sent.items():
            load.load({name: tensor})
        parameters = dict(self._model.named_parameters())
        return {name: torch.equal(parameters[name], sent[name]) for name in names if name in parameters}

    def send_alone(self, name: str) -> None:
        """Send a tensor outside an update."""
        shape = dict(models.tensors(self._spec))[name]
        self._worker._weight_sync_accept({name: models.values(name, shape, 1, torch.bfloat16)})

    def end(self) -> int:
        return self._worker.end_update()

    def abort(self) -> str:
        return self._worker.abort_update()

    def state(self) -> str:
        return self._worker.update_state()

    def reports_zero(self) -> bool:
        return self._worker.check_weights_changed()

    def zero_parameters(self) -> int:
        """Zero every parameter there is, which leaves packed weights as they are; how many elements those were."""
        for parameter in self._model.parameters():
            parameter.data.zero_()
        return sum(parameter.numel() for parameter in self._model.parameters())

    def update_to_zero(self) -> None:
        zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in models.tensors(self._spec)}
        self._worker.begin_update(manifest_of(zeros.items()))
        self._worker._weight_sync_accept(zeros)
        self._worker.end_update()

    def hide_names_of_loaders(self) -> int:
        """Have norms load through partials, which have no name, as those of MiniMax-M2 do; how many norms there are."""
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        norms = [layer for layer in self._model.modules() if "Norm" in type(layer).__name__]
        for norm in norms:
            for weight in (norm.weight, get_layerwise_info(norm).restore_metadata[0]["weight"]):
                weight.weight_loader = partial(default_weight_loader)
        return len(norms)

    def break_begin(self) -> None:
        """Have the next begin_update fail when half of the layers are ready for it."""
        from vllm.model_executor.model_loader.reload import layerwise

        original, layers = layerwise.initialize_online_processing, list(self._model.model.layers)
        fatal = layers[len(layers) // 2].post_attention_layernorm

        def failing(layer: torch.nn.Module) -> None:
            if layer is fatal:
                layerwise.initialize_online_processing = original
                raise MemoryError("no room to begin")
            original(layer)

        layerwise.initialize_online_processing = failing

    def break_end(self) -> None:
        """Have the next end_update fail when it has begun."""
        original = loading.finalize

        def failing(*_: object) -> None:
            loading.finalize = original
            raise MemoryError("no room to end")

        loading.finalize = failing

    def _configure(self, name: str, seed: int) -> Any:
        from vllm.engine.arg_utils import EngineArgs

        directory = f"{self._directory}/{name}-{seed}"
        models.write_checkpoint(models.MODELS[name], seed, directory)
        return EngineArgs(model=directory, **ENGINE).create_engine_config()

    def _current(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self._config)


def tensor_digests(model: torch.nn.Module) -> dict[str, str]:
    """A digest of each tensor that the model computes with; without handles, which are addresses."""
    found = {path: tensor for path, tensor in tensors_of(model).items() if not path.endswith("handler_tensor")}
    found |= {f"effective {name}": weight for name, weight in effective_weights(model)}
    return {path: _bits(tensor) for path, tensor in found.items()}


def _bits(tensor: torch.Tensor) -> str:
    data = b"" if tensor.is_meta else tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def _wrapped_for_lora(model: torch.nn.Module, config: Any) -> torch.nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.lora.model_manager import create_lora_manager

    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "vocab_size": 512}
    with set_current_vllm_config(config):
        manager = create_lora_manager(
            model, **sizes, lora_config=config.lora_config, vllm_config=config, device=torch.device("cpu")
        )
    return manager.model


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().numpy().tobytes()).hexdigest()[:16]
