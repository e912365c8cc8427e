"""What runs in a trainer process: a Hugging Face model and its optimiser, one process a rank.

Several ranks hold the model in shards (FSDP2) and gather each tensor when it is sent. Results are plain data.
"""

import gc
import importlib
import math
from collections.abc import Iterator
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from extensions.devices import device_id
from extensions.group import prepare
from extensions.manifest import manifest_of
from suite import models
from suite.actors import checkpoint, checksum, memory, oracles
from suite.actors.roofline import Roofline
from suite.actors.sending import Sending
from suite.actors.shards import first_row, local, turn_bits, whole, words

GROUP_TIMEOUT = timedelta(seconds=120)
BATCH = (8, 64)  # sequences and tokens of one training step on one rank
KEPT_MODELS = 2  # tests go back and forth between two checkpoints, and loading one takes longer than most updates


class LoadError(RuntimeError):
    """A checkpoint that does not hold exactly the model's tensors."""


class Trainer:
    """One rank of a trainer. With several ranks, every method but the memory ones is called on all of them at once."""

    def __init__(
        self,
        rank: int = 0,
        world_size: int = 1,
        device: str = "cpu",
        master_address: str = "127.0.0.1",
        master_port: int | None = None,
        threads: int = 1,
    ) -> None:
        """On "cuda" the rank takes the first GPU that it sees. Several ranks wait for each other, with a deadline."""
        torch.set_num_threads(threads)
        self.rank, self.world_size = rank, world_size
        self.device = torch.device("cuda", 0) if device == "cuda" else torch.device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._mesh = self._join(master_address, master_port) if world_size > 1 else None
        self._sending, self._roofline = Sending(self), Roofline(self.device)
        self._kept: dict[tuple[str, str, int], tuple[models.ModelSpec, torch.nn.Module, list[int]]] = {}
        self._forget()

    def warm_up(self) -> None:
        """Import what updates need and make the CUDA context, which takes seconds, before anyone waits for it."""
        prepare(self.device)

    def warm_up_computing(self) -> None:
        """The same for what `load` needs, and for computing: on a GPU its libraries are read from disk first."""
        importlib.import_module("transformers.models.qwen3.modeling_qwen3")
        square = torch.ones(16, 16, dtype=torch.bfloat16, device=self.device)
        torch.nn.functional.softmax(square @ square, dim=-1).sum().item()

    def facts(self) -> dict[str, Any]:
        """What this rank runs on."""
        return {
            "rank": self.rank,
            "device_id": device_id(self.device),
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        }

    def forget(self) -> None:
        """Let go of the weights, of what trains them, and of what updates and rooflines still hold."""
        self._roofline.forget()
        self._kept.clear()
        self._forget()

    def close(self) -> None:
        """Let go of engines, model and group."""
        self._sending.close()
        self._roofline.close()
        self._forget()
        if self._mesh is not None:
            torch.distributed.destroy_process_group()

    def connect(self, subject: dict, link_paths: list[str], deadline_s: float) -> None:
        """Connect to the engines that listen at these paths; see `Sending.connect`."""
        self._sending.connect(subject, link_paths, deadline_s)

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Meet the engines before the first update; see `Sending.invite`."""
        self._sending.invite(address, port, world_size)

    def update(self, deadline_s: float, **how: Any) -> dict:
        """This rank's half of one update; see `Sending.update`."""
        return self._sending.update(deadline_s, **how)

    def join_roofline(self, address: str, port: int, world_size: int) -> None:
        """Serve the group of the probes in the workers."""
        self._roofline.join(address, port, world_size)

    def send_roofline(self, nbytes: int) -> dict:
        """Broadcast so many bytes to the probes; see `Roofline.send`."""
        return self._roofline.send(nbytes)

    def load(self, path: str, dtype: str = "bfloat16") -> dict[str, int]:
        """Load a checkpoint directory as transformers does, in place of what was held; its sizes.

        The last checkpoints stay loaded, each in memory of its own, until their weights are changed, here or by whoever
        was handed them. Raises LoadError where the checkpoint lacks tensors of the model or has others.
        """
        key = (path, dtype, (Path(path) / "model.safetensors").stat().st_mtime_ns)
        kept = self._kept.pop(key, None)
        self._forget()
        while len(self._kept) >= KEPT_MODELS:
            del self._kept[next(iter(self._kept))]
        if kept:
            self._spec, self._model, sums = kept
        if not kept or self._sums() != sums:  # an engine that was given handles can write to this memory
            self._model = kept = None
            self._spec, self._model = models.read_spec(path), self._loaded(path, dtype)
            sums = self._sums()
        self._kept[key] = self._spec, self._model, sums
        return self._sizes()

    def _loaded(self, path: str, dtype: str) -> torch.nn.Module:
        from transformers import AutoModelForCausalLM, logging

        logging.disable_progress_bar()
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), attn_implementation="eager", output_loading_info=True
        )
        if any(info.values()):
            raise LoadError(f"{path} does not hold exactly the tensors of the model: {info}")
        return self._placed(model.eval())

    def _changes(self) -> None:
        """The weights that are held are about to be changed: they are no checkpoint's any more."""
        self._kept = {key: kept for key, kept in self._kept.items() if kept[1] is not self._model}

    def load_random(self, path: str, dtype: str, seed: int | None) -> dict[str, int]:
        """Hold tensors, as `fill(seed)` does, of the names and shapes in `path`'s config.json, without a model."""
        self._kept.clear()
        self._forget()
        self._spec = models.read_spec(path)
        self._tensors = {
            name: self._empty(shape, getattr(torch, self._spec.dtype_of(name, dtype)))
            for name, shape in models.tensors(self._spec)
        }
        self.fill(seed)
        return self._sizes()

    @torch.no_grad()
    def fill(self, seed: int | None) -> None:
        """Give every weight the value that models.write_checkpoint would write for this seed; None: zero."""
        self._changes()
        self._optimizer = None
        for parameter, tensor in self._parameters().items():
            own = local(tensor)
            if seed is None:
                own.zero_()
                continue
            first = first_row(tensor, self.rank, self.world_size)
            if self._fuses(parameter):
                for name, view in checkpoint.views(parameter, own, first):
                    models.fill_values(view, name, tuple(view.shape), seed)
            else:
                start = first * math.prod(tensor.shape[1:])
                models.fill(self._spec, own, parameter, tuple(tensor.shape), seed, start)

    @torch.no_grad()
    def negate(self) -> None:
        """Give every weight the opposite sign, at the speed of memory."""
        self._changes()
        self._optimizer = None
        for tensor in self._parameters().values():
            local(tensor).neg_()

    @torch.no_grad()
    def turn_bits(self, one_in: int, seed: int, names: list[str] | None = None) -> int:
        """Turn a bit in one of so many elements of the parameters with these names, or of all; see `turn_bits`."""
        self._changes()
        self._optimizer = None
        held = {name: tensor for name, tensor in self._parameters().items() if names is None or name in names}
        return turn_bits(map(local, held.values()), one_in, seed)

    def step(self, count: int, seed: int, learning_rate: float) -> dict[str, Any]:
        """Take `count` AdamW steps on random tokens, each rank on its own.

        Returns this rank's loss before each step, and how many elements of the whole model differ at the end from
        what they were (a second copy of this rank's weights is held meanwhile).
        """
        self._changes()
        before = [local(tensor).detach().clone() for tensor in self._parameters().values()]
        if self._optimizer is None:
            self._optimizer = torch.optim.AdamW(self._trained().parameters())
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        generator = torch.Generator().manual_seed(seed * self.world_size + self.rank)
        losses = []
        for _ in range(count):
            tokens = torch.randint(self._spec.config["vocab_size"], BATCH, generator=generator).to(self.device)
            loss = self._trained()(input_ids=tokens, labels=tokens, use_cache=False).loss
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
        after = self._parameters().values()
        pairs = zip(before, after, strict=True)
        changed = sum(int((old != local(new)).sum()) for old, new in pairs)
        return {"loss": losses, "changed_elements": self._summed(changed), "elements": self._sizes()["elements"]}

    def save(self, path: str) -> None:
        """Write a checkpoint directory with the weights as they are now; rank 0 writes, and all ranks wait for it."""
        weights = {}
        for name, tensor in self.named_tensors():
            if self.rank == 0:
                weights[name] = tensor.cpu()
        if self.rank == 0:
            models.save(self._spec, weights, path)
        self._summed(0)  # rank 0 has written

    def greedy(self, prompts: list[list[int]], max_tokens: int) -> list[dict]:
        """Greedy continuations by this model's own forward pass; see `oracles.greedy`."""
        return oracles.greedy(self._logits, prompts, max_tokens, self.device)

    def score(self, prompts: list[list[int]], continuations: list[list[int]]) -> list[list[float]]:
        """Log-probabilities of given continuations by this model's own forward pass; see `oracles.score`."""
        return oracles.score(self._logits, prompts, continuations, self.device)

    def checksums(self) -> dict[str, int]:
        """`{checkpoint name: positional checksum}` of every whole tensor; see `suite.actors.checksum`."""
        return {name: checksum.checksum(tensor) for name, tensor in self.named_tensors()}

    def named_tensors(
        self, order: str = "checkpoint", alter: dict[str, Any] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(checkpoint name, whole tensor) of every weight; per-expert names, and no lm_head where it is tied.

        On one rank the tensors are views of the weights. Several ranks gather them one parameter at a time, and all
        have to iterate to the end. `order` is that of `checkpoint.ordered`, `alter` the fields of
        `checkpoint.Alterations`.
        """
        if alter or self._model is not None or self._mesh is not None:
            return self._named(order, alter, whole)
        if order not in self._listed:  # tensors alone are the same ones until others are loaded
            self._listed[order] = [*self._named(order, None, whole)]
        return iter(self._listed[order])

    def named_layout(
        self, order: str = "checkpoint", alter: dict[str, Any] | None = None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """What `named_tensors` gives, as tensors without data (meta): nothing is gathered."""
        return self._named(order, alter, lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))

    def manifest(self, order: str = "checkpoint", alter: dict[str, Any] | None = None) -> list[dict]:
        """What announces `named_tensors`. Without alterations it is made once: a trainer's layout stays as it is."""
        if alter:
            return manifest_of(self.named_layout(order, alter))
        if order not in self._manifests:
            self._manifests[order] = manifest_of(self.named_layout(order))
        return self._manifests[order]

    def memory_mark(self) -> None:
        """Start measuring this rank's peak memory."""
        self._marked = memory.mark(self.device)

    def resources(self) -> dict[str, int]:
        """What this rank's process holds; see `memory.resources`."""
        return memory.resources(self.device)

    def expands(self) -> bool:
        """Whether this rank has GPU memory in expandable segments."""
        return memory.expands(self.device)

    def memory_peak(self) -> int:
        """Bytes above the mark at the highest since then."""
        return memory.peak_above(self._marked, self.device)

    def _named(self, order: str, alter: dict[str, Any] | None, of: Any) -> Iterator[tuple[str, torch.Tensor]]:
        parameters = self._parameters()
        if not self._holder:
            self._holder = {
                name: parameter
                for parameter, tensor in parameters.items()
                for name, _ in self._views(parameter, torch.empty(tensor.shape, device="meta"))
            }
        holder = self._holder
        alterations = checkpoint.Alterations.of(alter, list(holder))
        held, views = None, {}
        for name in checkpoint.ordered(list(holder), order):
            if holder[name] != held:
                views.clear()  # the parameter gathered before is freed first
                held = holder[name]
                views = dict(self._views(held, of(parameters[held])))
            yield from alterations.apply(name, views[name])

    def _views(self, parameter: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        return checkpoint.views(parameter, tensor) if self._fuses(parameter) else [(parameter, tensor)]

    def _fuses(self, parameter: str) -> bool:
        """Whether this is a parameter of a model that holds several tensors of the checkpoint."""
        return self._model is not None and checkpoint.FUSED_EXPERTS.fullmatch(parameter) is not None

    def _join(self, address: str, port: int | None) -> Any:
        """Form the group of the trainer's own ranks."""
        cuda = self.device.type == "cuda"
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            init_method=f"tcp://{address}:{port}",
            rank=self.rank,
            world_size=self.world_size,
            timeout=GROUP_TIMEOUT,
        )
        return torch.distributed.init_device_mesh(self.device.type, (self.world_size,))

    def _placed(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model on this rank's device, in shards where there are several ranks."""
        if any(checkpoint.FUSED_EXPERTS.fullmatch(name) for name, _ in model.named_parameters()):
            model.set_experts_implementation("eager")  # the plainest forward is the oracle
        if self._mesh is None:
            return model.to(self.device)
        from torch.distributed.fsdp import fully_shard

        for layer in model.model.layers:
            fully_shard(layer, mesh=self._mesh)
        return fully_shard(model, mesh=self._mesh)

    def _forget(self) -> None:
        self._sending.forget()  # a sender may keep the tensors of the last update
        self._spec: models.ModelSpec | None = None
        self._model: torch.nn.Module | None = None
        self._tensors: dict[str, torch.Tensor] = {}
        self._holder: dict[str, str] = {}  # which parameter holds each tensor of the checkpoint
        self._manifests: dict[str, list[dict]] = {}  # by order
        self._listed: dict[str, list[tuple[str, torch.Tensor]]] = {}  # by order
        self._optimizer: torch.optim.Optimizer | None = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()

    def _trained(self) -> torch.nn.Module:
        if self._model is None:
            raise RuntimeError(
                "this trainer holds no model to compute with: call load() first (load_random is not enough)"
            )
        return self._model

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._trained()(input_ids=tokens, use_cache=False).logits

    def _parameters(self) -> dict[str, torch.Tensor]:
        """What this rank holds by the names it has here, each once; shards (DTensor) where there are several ranks."""
        if self._model is None:
            if not self._tensors:
                raise RuntimeError("this trainer holds no weights: call load() or load_random() first")
            return self._tensors
        if self._mesh is not None:
            from torch.distributed.fsdp import FSDPModule

            for module in self._model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # a forward pass leaves the outermost parameters gathered
        return {name: parameter.detach() for name, parameter in self._model.named_parameters()}

    def _empty(self, shape: models.Shape, dtype: torch.dtype) -> torch.Tensor:
        if self._mesh is None:
            return torch.empty(shape, dtype=dtype, device=self.device)
        from torch.distributed.tensor import Shard, empty

        return empty(shape, dtype=dtype, device_mesh=self._mesh, placements=[Shard(0)])

    def _sizes(self) -> dict[str, int]:
        shapes = [tensor.shape for _, tensor in self.named_layout()]
        return {"parameters": len(shapes), "elements": sum(shape.numel() for shape in shapes)}

    def _sums(self) -> list[int]:
        """A number for each tensor that this rank holds, which other bits in it change."""
        tensors = self._parameters().values()
        return torch.stack([words(local(tensor).contiguous()).sum() for tensor in tensors]).tolist()

    def _summed(self, number: int) -> int:
        """The sum over all ranks; also a barrier."""
        if self._mesh is None:
            return number
        total = torch.tensor([number])
        torch.distributed.all_reduce(total)
        return int(total.item())
