"""Tiny models that load in ways of their own: copies past the loaders, derived tensors, views, a head that is repeated.

Two seeds of each, written as a checkpoint under the names that it is published with.
"""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from extensions.model.headers import checkpoint_layouts

COMMON = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 128, "first_k_dense_replace": 1}
# Of a dense model whose attention has sinks, which vLLM copies without a loader; transformers has no class for it.
SINKS = {
    "architectures": ["MiMoV2FlashForCausalLM"], "head_dim": 32, "v_head_dim": 32, "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2, "swa_head_dim": 32, "swa_v_head_dim": 32, "sliding_window_size": 64,
    "attention_bias": False, "add_swa_attention_sink_bias": True, "hybrid_layer_pattern": [1, 1],
    "moe_layer_freq": [0, 0], "layernorm_epsilon": 1e-6, "n_routed_experts": 0,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "sinks": {"model_type": "llama", **COMMON, **SINKS},
    "gpt_oss": {
        "model_type": "gpt_oss", **COMMON, "intermediate_size": 128, "head_dim": 32, "num_local_experts": 8,
        "num_experts_per_tok": 2, "sliding_window": 64,
    },
    "mamba2": {
        "model_type": "mamba2", "hidden_size": 128, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 32,
        "state_size": 16, "n_groups": 1, "vocab_size": 512, "expand": 2,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3", **COMMON, **EXPERTS, "num_key_value_heads": 4, "kv_lora_rank": 512,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64, "n_routed_experts": 8, "q_lora_rank": 64,
        "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "odd vocabulary": {"model_type": "llama", **COMMON, "vocab_size": 501},
    "repeated head": {"model_type": "qwen2", **COMMON, "tie_word_embeddings": True},
}  # fmt: skip


def write(name: str, seed: int, directory: str) -> str:
    """Write a checkpoint of this seed, unless it is there. Returns the directory."""
    from safetensors.torch import save_file

    path = Path(directory)
    if not (path / "model.safetensors").exists():
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(_published(name)[0])
        save_file(tensors(name, seed), path / "model.safetensors", metadata={"format": "pt"})
    return directory


def tensors(name: str, seed: int) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, random numbers of bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    shapes = dict(_published(name)[1])
    if name == "sinks":
        shapes |= {f"model.layers.{layer}.self_attn.attention_sink_bias": (4,) for layer in range(2)}
    found = {n: (torch.randn(shape, generator=generator) * 0.05).to(torch.bfloat16) for n, shape in shapes.items()}
    if name == "repeated head":
        found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    return found


@functools.cache
def _published(name: str) -> tuple[str, dict[str, tuple[int, ...]]]:
    """The config.json of a model, and the names and shapes under which transformers writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**CONFIGS[name])
    with tempfile.TemporaryDirectory() as directory:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        shapes = {tensor: shape for tensor, (_, shape) in checkpoint_layouts(directory).items()}
        written = json.loads((Path(directory) / "config.json").read_text())
    architectures = CONFIGS[name].get("architectures", written["architectures"])
    return json.dumps(written | {"architectures": architectures}), shapes
