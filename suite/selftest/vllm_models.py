"""What selftests of the extensions put into a process: vLLM models as its CPU workers hold them, without an engine."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from extensions.manifest import manifest_of
from extensions.model import loading
from extensions.model.walk import tensors_of
from extensions.model.weights import effective_weights
from extensions.pieces import cut, part_of
from extensions.plan import plan_of
from extensions.staging import Staging
from extensions.tensors import flat_bytes
from suite import models
from suite.actors import arrived
from suite.architectures.checkpoints import SEEDS
from suite.architectures.live import Live, Worker, configured, digest, join, loaded
from suite.architectures.running import VARIABLES
from suite.processes.call import Process
from suite.processes.local import LocalLauncher, free_port
from suite.session import environment

TOKENS = 3
DEADLINE_S = 60
STARTING_S = 120
NO_ENGINE = environment.lacks_engine("cpu")


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
        process = launcher.start("models", f"{__name__}:Models", arguments, VARIABLES, STARTING_S)
        process.ready()
        yield Held(process)


class Changed(Live):
    """An architecture, or a model of the catalogue, in the process of Models, with changes that no config says.

    "adapters": the engine takes LoRA adapters. "repeated head": the checkpoint repeats the embedding as the output
    layer that is tied to it. "asleep": the engine sleeps at level 2 before each update. "asleep unheard":
    the same, and it is updated by the backend of vLLM's own transfer, which is not told of it. "attention in a dict":
    no attention layer is registered in the module that holds it. "scales of the cache": a model of the catalogue, whose
    checkpoint has a scale for keys and one for values, and whose engine has an FP8 cache.
    """

    def __init__(self, name: str, directory: Path, changes: tuple[str, ...]) -> None:
        super().__init__(name, directory, port=0, entered=lambda step: None)  # the groups are there
        self._changes = changes

    def _worker_of(self, model: torch.nn.Module, config: Any) -> Worker:
        if not self._sleeps:
            return super()._worker_of(model, config)
        config.model_config.enable_sleep_mode = True
        if "asleep" in self._changes:
            self._sleeper = Sleeper(model, config)
            self._sleeper.update_state()
            return self._sleeper
        from extensions.transfer import PlannedTransferEngine

        config.parallel_config.worker_cls = f"{__name__}.Sleeping"
        self._sleeper = Sleeping(model)
        self._sleeper.weight_transfer_engine = PlannedTransferEngine(None, config, torch.device("cpu"), model)
        return self._sleeper.weight_transfer_engine._receiver

    @property
    def _sleeps(self) -> bool:
        return bool({"asleep", "asleep unheard"} & {*self._changes})

    def _update(self, index: int, together: bool) -> None:
        if self._sleeps:
            self._sleeper.sleep(level=2)
            self._sleeper.wake_up()
        super()._update(index, together)

    def _write(self) -> list[Path]:
        if "scales of the cache" in self._changes:
            return [with_scales(self._name, seed, self._directory / str(seed)) for seed in SEEDS]
        if spec := models.MODELS.get(self._name):
            return [models.write_checkpoint(spec, seed, self._directory / str(seed)) for seed in SEEDS]
        paths = super()._write()
        for path in paths if "repeated head" in self._changes else ():
            tensors = load_file(path / "model.safetensors")
            embedding = next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))
            tensors["lm_head.weight"] = tensors[embedding].clone()
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return paths

    def _load(self, path: Path, **arguments: Any) -> tuple[torch.nn.Module, Any]:
        if "adapters" in self._changes:
            model, config = super()._load(path, enable_lora=True, max_lora_rank=8, **arguments)
            return _wrapped_for_lora(model, config), config
        if "scales of the cache" in self._changes:
            arguments |= {"kv_cache_dtype": "fp8"}
        model, config = super()._load(path, **arguments)
        biases = [tensor for name, tensor in model.named_parameters() if name.endswith(".bias")]
        for bias in biases if "wide biases" in self._changes else ():
            bias.data = bias.data.float()
        if "attention in a dict" in self._changes:
            layers = enumerate(model.model.layers)
            model.attention_instances = {index: layer.self_attn._modules.pop("attn") for index, layer in layers}
        return model, config


class Sleeping:
    """A worker that sleeps as vLLM's do on GPUs: at level 2 all is lost but registered buffers."""

    weight_transfer_engine: Any = None

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def sleep(self, level: int = 1) -> None:
        self._buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        for tensor in tensors_of(self._model).values() if level == 2 else ():
            tensor.zero_()

    def wake_up(self, tags: list[str] | None = None) -> None:
        for name, buffer in self._model.named_buffers():
            buffer.copy_(self._buffers[name])


class Sleeper(Worker, Sleeping):
    """The same, with the extension in it."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any) -> None:
        Worker.__init__(self, model, vllm_config)
        Sleeping.__init__(self, model)


class Models:
    """One model at a time; tensors come from a seed. Failures are brought about by `break_*`."""

    def __init__(self, directory: str, port: int) -> None:
        torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does
        self._directory = directory
        self._config = self._configure("qwen3-moe-tiny", 0)  # one that has experts makes all the groups
        with self._current():
            join(port)

    def build(self, name: str, seed: int) -> None:
        """Load a checkpoint of this seed as an engine that starts."""
        self._spec, self._config = models.MODELS[name], self._configure(name, seed)
        self._model = loaded(self._config)
        self._worker = Worker(self._model, self._config)

    def computes_with(self) -> dict[str, Any]:
        """Digests of the effective weights, and of what the feed-forward blocks answer."""
        from vllm.forward_context import set_forward_context

        digests = {name: digest(weight) for name, weight in effective_weights(self._model)}
        hidden = torch.linspace(-1, 1, TOKENS * self._spec.config["hidden_size"], dtype=torch.bfloat16)
        with self._current(), torch.no_grad(), set_forward_context(None, self._config, num_tokens=TOKENS):
            blocks = {name: module for name, module in self._model.named_modules() if name.endswith(".mlp")}
            assert len(blocks) >= self._spec.config["num_hidden_layers"], f"expected one a layer, found {[*blocks]}"
            for name, block in blocks.items():
                digests[f"answer of {name}"] = digest(block(hidden.view(TOKENS, -1)))
        return digests

    def checksums(self) -> dict[str, int]:
        """Of every tensor of the checkpoint, as the parameters have it."""
        return arrived.checksums_of(self._model, self._config, models.manifest(self._spec))

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

    def judged(self, name: str, *changes: str) -> dict[str, Any]:
        """What `Live.judge` finds of an architecture; see Changed for the changes."""
        return Changed(name, Path(self._directory, "-".join([name, *changes])), changes).judge()

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

    def send_in_pieces(self, buffer_bytes: int) -> int:
        """Send all tensors as a planned update does, through a buffer of this size. Returns how many there were."""
        update = self._worker._weight_sync_state.update
        staging = Staging(update, self._worker.device, buffer_bytes)
        for group in cut(update.announced, buffer_bytes):
            for piece, place in zip(group, staging.places(group), strict=True):
                flat_bytes(place).copy_(flat_bytes(part_of(self._tensors[piece.name], piece)))
            staging.settle(group)
        return len(update.arrived)

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
        directory = Path(self._directory, f"{name}-{seed}")
        return configured(models.write_checkpoint(models.MODELS[name], seed, directory))

    def _current(self) -> Any:
        from vllm.config import set_current_vllm_config

        return set_current_vllm_config(self._config)


def with_scales(name: str, seed: int, directory: Path) -> Path:
    """Write a checkpoint of the catalogue with a scale for keys and one for values in each layer."""
    spec = models.MODELS[name]
    file = models.write_checkpoint(spec, seed, directory) / "model.safetensors"
    tensors = load_file(file)
    for index in range(spec.config["num_hidden_layers"]):
        tensors[f"model.layers.{index}.self_attn.k_scale"] = torch.tensor(0.5 + seed)
        tensors[f"model.layers.{index}.self_attn.v_scale"] = torch.tensor(0.25 + seed)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def _wrapped_for_lora(model: torch.nn.Module, config: Any) -> torch.nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.lora.model_manager import create_lora_manager

    sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 256, "vocab_size": 512}
    with set_current_vllm_config(config):
        manager = create_lora_manager(
            model, **sizes, lora_config=config.lora_config, vllm_config=config, device=torch.device("cpu")
        )
    return manager.model
