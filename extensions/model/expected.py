"""The checkpoint names and full shapes that a vLLM model takes, read off its layers.

A checkpoint holds tensors apart and whole; vLLM fuses and shards them. `q_proj`, `k_proj` and `v_proj` become one
`qkv_proj`, and each tensor-parallel rank has a part of it. A backend may have repacked a layer's parameters since. The
layer still knows its unsharded sizes, so the shapes come from those.
"""

import re
from collections.abc import Iterator

import torch

from extensions.tensors import Shape, Shapes

# The names in a checkpoint of the parts of fused layers, where the model's class does not give them.
DEFAULT_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HEAD = "lm_head.weight"
EXPERT_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LAYER_INDEX = re.compile(r"\.layers\.(\d+)\.")


def expected_weights(model: torch.nn.Module, hf_config: object) -> tuple[Shapes, Shapes]:
    """`(required, optional)` weights, each a full shape by checkpoint name; None where the layer does not tell it.

    Optional are `lm_head.weight` of a model with tied embeddings and, in a pipeline-parallel engine, the weights of
    other ranks.
    """
    packed = DEFAULT_PACKED | (getattr(model, "packed_modules_mapping", None) or {})
    required: Shapes = {}
    for prefix, module in model.named_modules():
        required.update(_of_module(prefix, module, packed))
    optional: Shapes = {}
    if getattr(hf_config, "tie_word_embeddings", False):
        embedding = next((shape for name, shape in required.items() if name.endswith("embed_tokens.weight")), None)
        required.pop(HEAD, None)
        optional[HEAD] = embedding
    if _is_pipeline_part(model):
        optional |= _other_ranks(required, hf_config)
    return required, optional


def _of_module(
    prefix: str, module: torch.nn.Module, packed: dict[str, list[str]]
) -> Iterator[tuple[str, Shape | None]]:
    from vllm.model_executor.layers.linear import LinearBase, MergedColumnParallelLinear, QKVParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    names = [name for name, parameter in module._parameters.items() if parameter is not None]
    if "w13_weight" in names:
        yield from _of_experts(prefix, module)
    elif isinstance(module, VocabParallelEmbedding):
        yield f"{prefix}.weight", (module.org_vocab_size, module.embedding_dim)
    elif isinstance(module, QKVParallelLinear):
        v_size = getattr(module, "v_head_size", module.head_size)
        heads, kv_heads = module.total_num_heads, module.total_num_kv_heads
        sizes = [heads * module.head_size, kv_heads * module.head_size, kv_heads * v_size]
        yield from _of_fused(prefix, module, packed, sizes, names)
    elif isinstance(module, MergedColumnParallelLinear):
        yield from _of_fused(prefix, module, packed, module.output_sizes, names)
    elif isinstance(module, LinearBase):
        yield f"{prefix}.weight", (module.output_size, module.input_size)
        if "bias" in names:
            yield f"{prefix}.bias", (module.output_size,)
    else:
        for name in names:
            # Every rank holds norms whole. An unknown layer may be sharded: its parameter does not tell the full shape.
            shape = tuple(module._parameters[name].shape) if "Norm" in type(module).__name__ else None
            yield f"{prefix}.{name}", shape


def _of_fused(
    prefix: str, module: torch.nn.Module, packed: dict[str, list[str]], sizes: list[int], names: list[str]
) -> Iterator[tuple[str, Shape | None]]:
    """The weights that a checkpoint has for a fused layer.

    The model's class names the parts. They have the layer's sizes where there are as many; one part is the whole
    layer; any other number leaves the sizes unknown.
    """
    parent, _, own = prefix.rpartition(".")
    parts = packed.get(own, [own])
    if len(parts) not in (1, len(sizes)):
        rows: list[int | None] = [None] * len(parts)
    else:
        rows = [sum(sizes)] if len(parts) == 1 else [*sizes]
    for part, size in zip(parts, rows, strict=True):
        yield f"{parent}.{part}.weight", None if size is None else (size, module.input_size)
        if "bias" in names:
            yield f"{parent}.{part}.bias", None if size is None else (size,)


def _of_experts(prefix: str, module: torch.nn.Module) -> Iterator[tuple[str, Shape]]:
    prefix = prefix.removesuffix(".routed_experts")  # vLLM has it as a layer of its own since 0.24
    hidden, intermediate = _expert_sizes(module)
    for expert in range(_expert_count(module)):
        for projection in EXPERT_PROJECTIONS:
            shape = (hidden, intermediate) if projection == "down_proj" else (intermediate, hidden)
            yield f"{prefix}.{expert}.{projection}.weight", shape


def _expert_count(module: torch.nn.Module) -> int:
    config = module.moe_config
    return int(getattr(module, "global_num_experts", None) or config.num_experts)


def _expert_sizes(module: torch.nn.Module) -> tuple[int, int]:
    """(hidden, intermediate) of an expert, unsharded and without the padding that some kernels need."""
    config = module.moe_config
    per_rank = (
        getattr(config, "intermediate_size_per_partition_unpadded", None) or config.intermediate_size_per_partition
    )
    hidden = getattr(config, "hidden_dim_unpadded", None) or config.hidden_dim
    return int(hidden), int(per_rank) * int(config.moe_parallel_config.tp_size)


def _is_pipeline_part(model: torch.nn.Module) -> bool:
    from vllm.model_executor.models.utils import PPMissingLayer

    return any(isinstance(module, PPMissingLayer) for module in model.modules())


def _other_ranks(own: Shapes, hf_config: object) -> Shapes:
    """The weights of other pipeline ranks: this rank's layers under all other indices, and the ends of the model."""
    others: Shapes = {}
    for name, shape in own.items():
        if LAYER_INDEX.search(name):
            for index in range(hf_config.num_hidden_layers):
                others[LAYER_INDEX.sub(f".layers.{index}.", name)] = shape
    for name in ("model.embed_tokens.weight", "model.norm.weight", HEAD):
        others[name] = None
    return {name: shape for name, shape in others.items() if name not in own}
