"""The names and shapes of one layer's tensors, as the checkpoints of each architecture have them."""

from collections.abc import Iterator
from typing import Any

from suite.models.values import Shape

Config = dict[str, Any]
Named = Iterator[tuple[str, Shape]]

HEAD_NORMS = ("qwen3", "qwen3_moe", "qwen3_next", "glm4_moe")  # architectures with norms of queries and keys
EXPERTS = {  # what their number is called in a config
    "qwen3_moe": "num_experts",
    "qwen3_next": "num_experts",
    "glm4_moe": "n_routed_experts",
    "deepseek_v3": "n_routed_experts",
    "gpt_oss": "num_local_experts",
}
BIASES = ("qwen2", "glm4_moe", "gpt_oss")  # with biases of queries, keys and values


def tensors(architecture: str, config: Config, layer: int) -> Named:
    """(name within the layer, shape) of each tensor, in the checkpoint's order."""
    hidden = config["hidden_size"]
    yield "input_layernorm.weight", (hidden,)
    if architecture == "deepseek_v3":
        yield from _latent_attention(config)
    elif architecture == "qwen3_next" and config["layer_types"][layer] == "linear_attention":
        yield from _recurrence(config)
    else:
        yield from _attention(architecture, config)
    yield "post_attention_layernorm.weight", (hidden,)
    if architecture == "gpt_oss":
        yield from _experts_in_one(config)
    elif layer < config.get("first_k_dense_replace", 0) or architecture not in EXPERTS:
        yield from _gated("mlp.", hidden, config["intermediate_size"])
    else:
        yield from _experts(architecture, config)


def _attention(architecture: str, config: Config) -> Named:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    gated = 2 if architecture == "qwen3_next" else 1  # with a gate of the output beside every query
    for name, rows in (("q_proj", gated * queries), ("k_proj", keys), ("v_proj", keys)):
        yield f"self_attn.{name}.weight", (rows, hidden)
        if architecture in BIASES:
            yield f"self_attn.{name}.bias", (rows,)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if architecture == "gpt_oss":
        yield "self_attn.o_proj.bias", (hidden,)
        yield "self_attn.sinks", (config["num_attention_heads"],)
    if architecture in HEAD_NORMS:
        yield "self_attn.q_norm.weight", (head,)
        yield "self_attn.k_norm.weight", (head,)


def _latent_attention(config: Config) -> Named:
    """Keys and values are stored as one latent vector (MLA). vLLM derives the matrices that lead there and back."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    queries, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    keys, values = config["qk_nope_head_dim"], config["v_head_dim"]
    yield "self_attn.q_a_proj.weight", (queries, hidden)
    yield "self_attn.q_a_layernorm.weight", (queries,)
    yield "self_attn.q_b_proj.weight", (heads * (keys + rope), queries)
    yield "self_attn.kv_a_proj_with_mqa.weight", (latent + rope, hidden)
    yield "self_attn.kv_a_layernorm.weight", (latent,)
    yield "self_attn.kv_b_proj.weight", (heads * (keys + values), latent)
    yield "self_attn.o_proj.weight", (hidden, heads * values)


def _recurrence(config: Config) -> Named:
    """A layer of a state that decays, with a short convolution before it (gated DeltaNet)."""
    hidden, heads, width = config["hidden_size"], config["linear_num_value_heads"], config["linear_value_head_dim"]
    keys, values = config["linear_num_key_heads"] * config["linear_key_head_dim"], heads * width
    yield "linear_attn.dt_bias", (heads,)
    yield "linear_attn.A_log", (heads,)
    yield "linear_attn.conv1d.weight", (2 * keys + values, 1, config["linear_conv_kernel_dim"])
    yield "linear_attn.in_proj_qkvz.weight", (2 * keys + 2 * values, hidden)
    yield "linear_attn.in_proj_ba.weight", (2 * heads, hidden)
    yield "linear_attn.norm.weight", (width,)
    yield "linear_attn.out_proj.weight", (hidden, values)


def _experts(architecture: str, config: Config) -> Named:
    hidden, count, width = config["hidden_size"], config[EXPERTS[architecture]], config["moe_intermediate_size"]
    yield "mlp.gate.weight", (count, hidden)
    if "n_routed_experts" in config:
        yield "mlp.gate.e_score_correction_bias", (count,)
    for expert in range(count):
        yield from _gated(f"mlp.experts.{expert}.", hidden, width)
    if "n_shared_experts" in config:
        yield from _gated("mlp.shared_experts.", hidden, config["n_shared_experts"] * width)
    if "shared_expert_intermediate_size" in config:
        yield from _gated("mlp.shared_expert.", hidden, config["shared_expert_intermediate_size"])
        yield "mlp.shared_expert_gate.weight", (1, hidden)


def _experts_in_one(config: Config) -> Named:
    """All experts of a layer in one tensor for each projection, whose rows are the inputs; with biases."""
    hidden, count, width = config["hidden_size"], config[EXPERTS["gpt_oss"]], config["intermediate_size"]
    yield "mlp.router.weight", (count, hidden)
    yield "mlp.router.bias", (count,)
    yield "mlp.experts.gate_up_proj", (count, hidden, 2 * width)
    yield "mlp.experts.gate_up_proj_bias", (count, 2 * width)
    yield "mlp.experts.down_proj", (count, width, hidden)
    yield "mlp.experts.down_proj_bias", (count, hidden)


def _gated(prefix: str, hidden: int, intermediate: int) -> Named:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)
