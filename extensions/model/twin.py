"""What a model's own `load_weights` does with each tensor, recorded on a copy of the model without memory.

The copy, the twin, is built on the meta device from the same configuration. `load_weights` runs on it with meta tensors
of the announced dtypes and shapes. Every write into one of the twin's tensors is noted and not carried out, so nothing
of the live model is read or written.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from extensions.model.regions import Region, memory_id, region_of
from extensions.tensors import dtype_name

CONSTANTS = ("fill_", "zero_")
HEAD = "lm_head.weight"
ONLINE_LOADER = "online_process_loader"  # how vLLM's layerwise reload calls the loaders that it puts around others
LORA_WRAPPED = ".base_layer."  # where vLLM has put the layer that it wraps
REPLACES = "replaces the tensor"  # the conversion where a loader replaces the parameter by another tensor
SPOILS = " of the tensor itself"  # ends a conversion that writes into the announced tensor
# Operations that take a tensor's shape and not its values.
SHAPE_ONLY = (
    "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
    "new_empty", "new_empty_strided", "new_zeros", "new_ones", "new_full",
)  # fmt: skip


@dataclass(frozen=True)
class Fill:
    """One write into a parameter or buffer.

    into: its name in vLLM.  region: the part written.
    reads: (announced name, the part read) of each tensor that the values come from; empty for a constant.
    conversion: what happens to the values on the way, in order: () for a plain copy.
    misfit: where the shape of the values is not that of the region, both shapes.
    """

    into: str
    region: Region
    reads: tuple[tuple[str, Region], ...]
    conversion: tuple[str, ...] = ()
    misfit: str = ""


@dataclass(frozen=True)
class Origin:
    """Where the values in a piece of memory come from."""

    reads: tuple[tuple[str, Region], ...] = ()
    through: tuple[str, ...] = ()
    parameters: frozenset[str] = frozenset()


class Recorder(TorchDispatchMode):
    """Notes each write into the twin's tensors, and follows values from the announced tensors through operations."""

    def __init__(self, targets: dict[str, torch.Tensor], sources: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.fills: list[Fill] = []
        self._targets: dict[int, str] = {}
        for name, tensor in targets.items():
            self._targets.setdefault(memory_id(tensor), name)  # tied tensors go by the first of their names
        self._sources = {memory_id(tensor): name for name, tensor in sources.items()}
        self._derived: dict[int, Origin] = {}
        self._kept: list[torch.Tensor] = [*targets.values(), *sources.values()]  # a freed id would come back as another

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        into = args[0] if args and isinstance(args[0], torch.Tensor) else None
        writes = function._schema.is_mutable and into is not None
        if writes and memory_id(into) in self._targets:
            self._write(into, name, args[1:], kwargs)
            return into
        given = self._origin_of((args[1:], kwargs) if writes else (args, kwargs))
        if writes and (given is not None or self._is_known(into)):
            self._derive(into, given or Origin(), name + (SPOILS if memory_id(into) in self._sources else ""))
            return into  # a meta tensor has no values to carry over
        result = function(*args, **kwargs)
        if given is not None and name not in SHAPE_ONLY:
            for tensor in _tensors(result):
                if not self._is_known(tensor):
                    self._derive(tensor, given, name)
        return result

    def replaced(self, name: str, before: torch.Tensor, tensor: torch.Tensor) -> None:
        """Note that the loader put `tensor` in the place of the one called `name`."""
        origin = self._origin_of(tensor) or Origin()
        through = (*origin.through, *_cast(before, tensor), REPLACES)
        misfit = "" if tensor.shape == before.shape else _misfit(tensor, before)
        self.fills.append(Fill(name, region_of(before), origin.reads, through, misfit))

    def _write(self, into: torch.Tensor, operation: str, rest: tuple, kwargs: dict) -> None:
        name, region = self._targets[memory_id(into)], region_of(into)
        origin = self._origin_of((rest, kwargs)) or Origin()
        step = _cast(into, rest[0]) if operation == "copy_" else (operation,)
        through = (*origin.through, *step)
        for other in sorted(origin.parameters - {name}):
            reads = [read for fill in self.fills if fill.into == other for read in fill.reads]
            origin, through = replace(origin, reads=(*origin.reads, *reads)), (*through, f"computed from {other}")
        if not origin.reads and (name in origin.parameters or operation not in ("copy_", *CONSTANTS)):
            # The parameter is computed anew from what was written before: one more conversion of the same values.
            self.fills = [
                replace(fill, conversion=(*fill.conversion, *through))
                if (fill.into, fill.region) == (name, region)
                else fill
                for fill in self.fills
            ]
            return
        stretched = operation == "copy_" and bool(origin.reads) and into.numel() != rest[0].numel()
        misfit = _misfit(rest[0], into) if stretched else ""
        self.fills.append(Fill(name, region, origin.reads, through, misfit))

    def _derive(self, tensor: torch.Tensor, origin: Origin, operation: str) -> None:
        before = self._derived.get(memory_id(tensor), Origin())
        self._derived[memory_id(tensor)] = Origin(
            (*before.reads, *origin.reads),
            (*before.through, *(step for step in origin.through if step not in before.through), operation),
            before.parameters | origin.parameters,
        )
        self._kept.append(tensor)

    def _is_known(self, tensor: torch.Tensor) -> bool:
        memory = memory_id(tensor)
        return memory in self._targets or memory in self._sources or memory in self._derived

    def _origin_of(self, values: object) -> Origin | None:
        found = [origin for tensor in _tensors(values) if (origin := self._origin_of_one(tensor)) is not None]
        if not found:
            return None
        return Origin(
            tuple(dict.fromkeys(read for origin in found for read in origin.reads)),
            tuple(dict.fromkeys(step for origin in found for step in origin.through)),
            frozenset().union(*(origin.parameters for origin in found)),
        )

    def _origin_of_one(self, tensor: torch.Tensor) -> Origin | None:
        memory = memory_id(tensor)
        if memory in self._sources:
            changed = self._derived.get(memory, Origin())
            return Origin(((self._sources[memory], region_of(tensor)), *changed.reads), changed.through)
        if memory in self._targets:
            return Origin(parameters=frozenset([self._targets[memory]]))
        return self._derived.get(memory)


@contextmanager
def twin_of(
    model: torch.nn.Module, vllm_config: object, ranks: tuple[int, ...] | None = None
) -> Iterator[torch.nn.Module]:
    """A model of the same class and configuration on the meta device. The live model stays as it is.

    ranks: the tensor-parallel rank, the pipeline rank and, of replicas that share experts, the replica that it is
    built for, if not this process's own.

    vLLM registers the layers of every model that it builds in the configuration, and keeps rotary embeddings for the
    next model. The twin gets a configuration of its own, and what it left behind is removed. Parameters that the live
    model ties are tied in the twin too: vLLM ties an output embedding when it finds it equal to the input embedding.

    Raises TwinFailed where the model's class raises.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
    from vllm.model_executor.model_loader.utils import initialize_model

    own = copy.copy(vllm_config)
    own.compilation_config = copy.copy(vllm_config.compilation_config)
    own.compilation_config.static_forward_context = {}
    own.compilation_config.static_all_moe_layers = []
    ropes = dict(_ROPE_DICT)
    try:
        with (
            set_current_vllm_config(own),
            default_dtype(vllm_config.model_config.dtype),  # by which vLLM chooses attention backends
            torch.no_grad(),
            _as_rank(ranks),
            _maps_of_experts_with_values(),
        ):
            try:
                with torch.device("meta"):
                    twin = initialize_model(vllm_config=own, model_class=type(model))
            except Exception as error:
                raise TwinFailed(error) from error
            _tie_as(model, twin)
            for tensor in named_tensors(twin).values():
                unwrap_loader(tensor)
            yield twin
    finally:
        _ROPE_DICT.clear()
        _ROPE_DICT.update(ropes)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Have torch make tensors of this dtype where nobody says which, as vLLM does when it loads a model."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _maps_of_experts_with_values() -> Iterator[None]:
    """Have vLLM make its maps of where experts are on the CPU: it reads them while it builds layers and loads."""
    from vllm.model_executor.layers import fused_moe

    modules = [getattr(fused_moe, name, None) for name in ("layer", "expert_map_manager")]  # by versions of vLLM
    found = [module for module in modules if hasattr(module, "determine_expert_map")]
    originals = [module.determine_expert_map for module in found]

    def on_the_cpu(original: Callable[..., object]) -> Callable[..., object]:
        def determine(*args: object, **kwargs: object) -> object:
            with torch.device("cpu"):
                return original(*args, **kwargs)

        return determine

    try:
        for module, original in zip(found, originals, strict=True):
            module.determine_expert_map = on_the_cpu(original)
        yield
    finally:
        for module, original in zip(found, originals, strict=True):
            module.determine_expert_map = original


@contextmanager
def _as_rank(ranks: tuple[int, ...] | None) -> Iterator[None]:
    """Have vLLM take this process for another rank of the same engine. Nothing is sent meanwhile."""
    if ranks is None:
        yield
        return
    from vllm.distributed import get_dp_group, get_pp_group, get_tp_group

    groups = (get_tp_group(), get_pp_group(), get_dp_group())[: len(ranks)]
    own = [(group.rank_in_group, group.rank) for group in groups]
    try:
        for group, rank in zip(groups, ranks, strict=True):
            group.rank_in_group, group.rank = rank, group.ranks[rank]
        yield
    finally:
        for group, (rank_in_group, rank) in zip(groups, own, strict=True):
            group.rank_in_group, group.rank = rank_in_group, rank


def _tie_as(model: torch.nn.Module, twin: torch.nn.Module) -> None:
    """Tie the twin's parameters that are one in the live model."""
    there = named_tensors(twin)
    names: dict[int, list[str]] = {}
    for name, parameter in live_tensors(model).items():
        if name in there:
            names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        for name in others:
            path, attribute = split(name)
            holder = twin.get_submodule(path)
            (holder._parameters if attribute in holder._parameters else holder._buffers)[attribute] = there[first]


def tied_heads(twin: torch.nn.Module, vllm_config: object, announced: Iterable[str]) -> dict[str, str | None]:
    """Announced names of tied output embeddings, each with vLLM's name of the input embedding if this rank has it."""
    heads = [name for name in announced if name == HEAD or name.endswith(f".{HEAD}")]
    if not heads:
        return {}
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    own = next((name for name in parameters if name.endswith(HEAD)), None)
    if own is not None:
        head = parameters.pop(own)
        tied = next((name for name, parameter in parameters.items() if parameter is head), None)
        return {} if tied is None else dict.fromkeys(heads, tied)
    if not getattr(vllm_config.model_config.hf_text_config, "tie_word_embeddings", False):
        return {}
    return dict.fromkeys(heads, _embedding(twin))


def _embedding(twin: torch.nn.Module) -> str | None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    found = (path for path, module in twin.named_modules() if isinstance(module, VocabParallelEmbedding))
    return next((f"{path}.weight" for path in found), None)


def kv_scales(twin: torch.nn.Module) -> list[str]:
    """The parameters of attention layers that take scales of the cache of keys and values."""
    return [
        f"{path}.{name}"
        for path, module in twin.named_modules()
        if any(kind.__name__ == "BaseKVCacheMethod" for kind in type(getattr(module, "quant_method", None)).__mro__)
        for name in module._parameters
    ]


def unwrap_loader(tensor: torch.Tensor | None) -> None:
    """Have a tensor take its weights as they come. vLLM's wrapper would process its layer when it counts it whole."""
    loader = getattr(tensor, "weight_loader", None)
    while getattr(loader, "__name__", "") == ONLINE_LOADER:
        loader = loader.__wrapped__
        tensor.weight_loader = loader


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """As `named_tensors`, of a model whose layers vLLM may have wrapped for LoRA: under the names without that."""
    return {without_lora(name): tensor for name, tensor in named_tensors(model).items()}


def without_lora(path: str) -> str:
    """The path of a layer or tensor as it was before vLLM wrapped layers for LoRA."""
    return f"{path}.".replace(LORA_WRAPPED, ".")[:-1]


def split(name: str) -> tuple[str, str]:
    """The path of the module that holds a tensor, and the tensor's name in it."""
    path, _, attribute = name.rpartition(".")
    return path, attribute


class TwinFailed(Exception):
    """The model's class raised while the twin was built: it reads values, for instance."""

    def __init__(self, cause: Exception) -> None:
        self.cause = cause
        super().__init__(str(cause))


class LoadFailed(Exception):
    """`load_weights` raised. `name` is the tensor that it took last; None where it took none."""

    def __init__(self, name: str | None, cause: Exception) -> None:
        self.name, self.cause = name, cause
        super().__init__(f"{name}: {cause}")


def record(twin: torch.nn.Module, tensors: dict[str, torch.Tensor], apart: bool = False) -> list[Fill]:
    """What `twin.load_weights` writes where, given meta tensors. Raises LoadFailed where it raises.

    apart: give it one tensor at a time, each in a call of its own, and not all in one.
    A twin that was loaded into before may hold other tensors than it was built with: give each call a new one.
    """
    targets = {name: tensor.detach() for name, tensor in named_tensors(twin).items()}
    recorder = Recorder(targets, tensors)
    taken = []

    def giving(names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
        for name in names:
            taken.append(name)
            yield name, tensors[name]

    try:
        with torch.no_grad(), recorder:
            for names in ([name] for name in tensors) if apart else [list(tensors)]:
                twin.load_weights(giving(names))
    except Exception as error:
        raise LoadFailed(taken[-1] if taken else None, error) from error
    for name, tensor in named_tensors(twin).items():
        before = targets.get(name, tensor)
        if name not in targets or memory_id(tensor) != memory_id(before):
            recorder.replaced(name, before, tensor)
    return recorder.fills


def named_tensors(twin: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a model by vLLM's names, tied ones under each of theirs."""
    return dict(twin.named_parameters(remove_duplicate=False)) | dict(twin.named_buffers(remove_duplicate=False))


def _tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _cast(into: torch.Tensor, values: torch.Tensor) -> tuple[str, ...]:
    if values.dtype == into.dtype:
        return ()
    return (f"cast {dtype_name(values.dtype)} to {dtype_name(into.dtype)}",)


def _misfit(values: torch.Tensor, into: torch.Tensor) -> str:
    return f"{list(values.shape)} into {list(into.shape)}"
