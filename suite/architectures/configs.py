"""The architectures that are judged: a tiny config of each, written by us after the published ones.

Where transformers knows the architecture, a checkpoint has the names that `save_pretrained` gives it. `LAYOUTS` holds
those of the others, as the published checkpoints have them.
"""

from collections.abc import Callable, Iterator
from typing import Any

from suite.models.values import Shape

Config = dict[str, Any]

SIZES: Config = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 4096,
}  # fmt: skip
EXPERTS: Config = {"num_experts_per_tok": 2, "moe_intermediate_size": 128}
LATENT: Config = SIZES | EXPERTS | {
    "num_key_value_heads": 4, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 64,
    "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
MAMBA: Config = {"hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "n_groups": 1, "expand": 2}
GATED_DELTA: Config = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 64, "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4, "head_dim": 64,
}  # fmt: skip
HYBRID_LAYERS = ["linear_attention", "full_attention"]
VISION: Config = {
    "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "out_hidden_size": 128, "patch_size": 16,
}  # fmt: skip

CONFIGS: dict[str, Config] = {
    "Llama": {"model_type": "llama", **SIZES},
    "Llama with biases": {"model_type": "llama", **SIZES, "attention_bias": True, "mlp_bias": True},
    "Llama, a vocabulary of 501": {"model_type": "llama", **SIZES, "vocab_size": 501},
    "Mistral": {"model_type": "mistral", **SIZES},
    "Mixtral": {"model_type": "mixtral", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2": {"model_type": "qwen2", **SIZES},
    "Qwen2.5, tied": {"model_type": "qwen2", **SIZES, "tie_word_embeddings": True},
    "Qwen2-MoE": {"model_type": "qwen2_moe", **SIZES, **EXPERTS, "num_experts": 8,
                  "shared_expert_intermediate_size": 128},
    "Qwen3": {"model_type": "qwen3", **SIZES, "head_dim": 32},
    "Qwen3-MoE": {"model_type": "qwen3_moe", **SIZES, **EXPERTS, "head_dim": 32, "num_experts": 8},
    "Qwen3-Next": {"model_type": "qwen3_next", **SIZES, **EXPERTS, **GATED_DELTA, "num_experts": 8,
                   "layer_types": HYBRID_LAYERS, "shared_expert_intermediate_size": 128, "decoder_sparse_step": 1},
    "Qwen3.5": {"model_type": "qwen3_5_text", **SIZES, **GATED_DELTA, "layer_types": HYBRID_LAYERS},
    "Qwen3.5-MoE": {"model_type": "qwen3_5_moe_text", **SIZES, **EXPERTS, **GATED_DELTA, "num_experts": 8,
                    "layer_types": HYBRID_LAYERS, "shared_expert_intermediate_size": 128},
    "DeepSeek V2": {"model_type": "deepseek_v2", **LATENT, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
                    "topk_method": "greedy"},
    "DeepSeek V3": {"model_type": "deepseek_v3", **LATENT, "q_lora_rank": 64, "n_group": 2, "topk_group": 1,
                    "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "GLM-4": {"model_type": "glm4", **SIZES, "head_dim": 32, "pad_token_id": 0},
    "GLM-4.5": {"model_type": "glm4_moe", **SIZES, **EXPERTS, "head_dim": 32, "n_routed_experts": 8,
                "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
                "num_nextn_predict_layers": 0},
    "Gemma": {"model_type": "gemma", **SIZES, "head_dim": 32},
    "Gemma 2": {"model_type": "gemma2", **SIZES, "head_dim": 32},
    "Gemma 3": {"model_type": "gemma3_text", **SIZES, "head_dim": 32,
                "layer_types": ["sliding_attention", "full_attention"]},
    "Phi-3": {"model_type": "phi3", **SIZES, "pad_token_id": 0},
    "Phi-3.5-MoE": {"model_type": "phimoe", **SIZES, "num_local_experts": 4, "num_experts_per_tok": 2},
    "GPT-OSS": {"model_type": "gpt_oss", **SIZES, "intermediate_size": 128, "head_dim": 32, "num_local_experts": 8,
                "num_experts_per_tok": 2, "sliding_window": 64},
    "MiniMax-M2": {"model_type": "minimax_m2", **SIZES, "intermediate_size": 128, "head_dim": 32,
                   "num_local_experts": 8, "num_experts_per_tok": 2, "rotary_dim": 32,
                   "scoring_func": "sigmoid", "use_routing_bias": True},
    "MiniCPM3": {"model_type": "minicpm3", **SIZES, "num_key_value_heads": 4, "q_lora_rank": 64, "kv_lora_rank": 64,
                 "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 32, "dim_model_base": 64,
                 "scale_emb": 1, "scale_depth": 1.0},
    "MiMo-V2, dense": {"architectures": ["MiMoV2FlashForCausalLM"], "model_type": "llama", **SIZES, "head_dim": 32,
                       "v_head_dim": 32, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
                       "swa_head_dim": 32, "swa_v_head_dim": 32, "sliding_window_size": 64, "attention_bias": False,
                       "add_swa_attention_sink_bias": True, "hybrid_layer_pattern": [1, 1], "moe_layer_freq": [0, 0],
                       "layernorm_epsilon": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
                       "n_routed_experts": 0},
    "Nemotron": {"model_type": "nemotron", **SIZES, "head_dim": 32},
    "Nemotron-H": {"model_type": "nemotron_h", **SIZES, "head_dim": 32, "hybrid_override_pattern": "M*-",
                   "mamba_num_heads": 8, "mamba_head_dim": 32, "ssm_state_size": 16, "n_groups": 1, "expand": 2},
    "Mamba": {"model_type": "mamba", "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "state_size": 16},
    "Mamba2": {"model_type": "mamba2", **MAMBA, "num_heads": 8, "head_dim": 32, "state_size": 16},
    "Falcon-H1": {"model_type": "falcon_h1", **SIZES, "head_dim": 32, "mamba_d_ssm": 256, "mamba_n_heads": 8,
                  "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2},
    "Jamba": {"model_type": "jamba", **SIZES, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 4,
              "num_experts_per_tok": 2, "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 16,
              "mamba_dt_rank": 8, "use_mamba_kernels": False},
    "LFM2": {"model_type": "lfm2", **SIZES, "layer_types": ["conv", "full_attention"], "conv_dim": 128,
             "block_dim": 128, "block_multiple_of": 64, "block_auto_adjust_ff_dim": False,
             "block_ffn_dim_multiplier": 1.0},
    "LFM2-MoE": {"model_type": "lfm2_moe", **SIZES, **EXPERTS, "num_experts": 8, "num_dense_layers": 1,
                 "layer_types": ["conv", "full_attention"]},
    "OLMo 2": {"model_type": "olmo2", **SIZES, "pad_token_id": 0},
    "OLMo 3": {"model_type": "olmo3", **SIZES, "pad_token_id": 0, "sliding_window": 64},
    "OLMoE": {"model_type": "olmoe", **SIZES, "intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2,
              "pad_token_id": 0},
    "Granite": {"model_type": "granite", **SIZES},
    "Granite-MoE": {"model_type": "granitemoe", **SIZES, "intermediate_size": 128, "num_local_experts": 8,
                    "num_experts_per_tok": 2},
    "Granite 4, hybrid": {"model_type": "granitemoehybrid", **SIZES, "intermediate_size": 128, "num_local_experts": 8,
                          "num_experts_per_tok": 2, "shared_intermediate_size": 128,
                          "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 32,
                          "mamba_n_groups": 1, "mamba_d_state": 16, "mamba_expand": 2},
    "Cohere": {"model_type": "cohere", **SIZES, "pad_token_id": 0, "use_qk_norm": True},
    "Cohere 2": {"model_type": "cohere2", **SIZES, "head_dim": 32, "pad_token_id": 0},
    "GPT-2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512},
    "GPT-J": {"model_type": "gptj", "n_embd": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512, "rotary_dim": 16,
              "tie_word_embeddings": False},
    "GPT-NeoX": {"model_type": "gpt_neox", **SIZES},
    "StableLM": {"model_type": "stablelm", **SIZES, "use_qkv_bias": True},
    "Starcoder2": {"model_type": "starcoder2", **SIZES},
    "OPT": {"model_type": "opt", "hidden_size": 128, "ffn_dim": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
            "vocab_size": 512, "word_embed_proj_dim": 128, "pad_token_id": 1},
    "Bloom": {"model_type": "bloom", "hidden_size": 128, "n_layer": 2, "n_head": 4, "vocab_size": 512},
    "SmolLM3": {"model_type": "smollm3", **SIZES, "pad_token_id": 0},
    "EXAONE 4": {"model_type": "exaone4", **SIZES, "head_dim": 32, "sliding_window": 64,
                 "layer_types": ["sliding_attention", "full_attention"]},
    "ERNIE 4.5": {"model_type": "ernie4_5", **SIZES, "head_dim": 32},
    "Seed-OSS": {"model_type": "seed_oss", **SIZES, "head_dim": 32},
    "Qwen3-VL": {"model_type": "qwen3_vl", "image_token_id": 508, "video_token_id": 509, "vision_start_token_id": 510,
                 "vision_end_token_id": 511, "vision_config": VISION | {"deepstack_visual_indexes": [1]},
                 "text_config": {"model_type": "qwen3_vl_text", **SIZES, "head_dim": 32,
                                 "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6],
                                                     "rope_theta": 10000.0, "mrope_interleaved": True}}},
}  # fmt: skip


def _with_sinks(config: Config) -> Iterator[tuple[str, Shape]]:
    """Llama's names and one attention sink a head."""
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, queries)
        yield f"{prefix}self_attn.attention_sink_bias", (config["num_attention_heads"],)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
        yield f"{prefix}mlp.gate_proj.weight", (width, hidden)
        yield f"{prefix}mlp.up_proj.weight", (width, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, width)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (config["vocab_size"], hidden)


LAYOUTS: dict[str, Callable[[Config], Iterator[tuple[str, Shape]]]] = {"MiMo-V2, dense": _with_sinks}
