"""Models by architecture and size: the content of their config.json, and the names and shapes that follow from it.

They follow from the config alone, independently of transformers and vLLM, so that they can judge both.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from suite.models import alibi, layers, pictures, quantised
from suite.models.values import Shape


@dataclass(frozen=True)
class ModelSpec:
    """One model: `config` is the content of its config.json, `purpose` says where it is of use.

    tiny: correctness anywhere; ladder: throughput on CPUs; published: the released dimensions, for GPUs;
    reduced: correctness on GPUs, at dimensions that their kernels are made for; given: read from a directory; own: a
    user's model, of any architecture. layout is then `{name: (dtype, shape)}` of its checkpoint, and source the
    directory with its weights, empty where there are none. processor is the directory with the tokenizer and the
    processor of a model that takes more than text: vLLM starts none without them. It is empty for others.
    """

    name: str
    architecture: str  # a key of ARCHITECTURES
    config: dict[str, Any]
    purpose: str
    layout: dict[str, tuple[str, Shape]] | None = None
    source: str = ""
    processor: str = ""

    @property
    def elements(self) -> int:
        """How many weights the checkpoint holds; a tied output layer is not counted again."""
        return sum(math.prod(shape) for _, shape in tensors(self))

    @property
    def tied(self) -> bool:
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def computed(self) -> bool:
        """Whether the trainer computes with this model, or else holds its tensors alone and is no oracle of answers."""
        return self.layout is None and self.architecture not in PARTICULAR and not self.quantised

    @property
    def quantised(self) -> str:
        """How its checkpoint is quantised, as `suite.models.quantised` names it; empty where it is not."""
        return self.config.get("quantization_config", {}).get("quant_method", "") if self.layout is None else ""

    @property
    def sees(self) -> bool:
        """Whether it is the catalogue's model that takes pictures: its processor is written beside its config."""
        return self.architecture == pictures.ARCHITECTURE and self.layout is None

    @property
    def has_experts(self) -> bool:
        """Whether it is a mixture of experts, which kernels may keep in another layout than a checkpoint's."""
        return self.layout is None and self.architecture in layers.EXPERTS

    @property
    def starts_slowly(self) -> bool:
        """Whether an engine takes minutes to start on a GPU: it compiles kernels that no other model has."""
        return self.architecture == "qwen3_next"

    def dtype_of(self, name: str, dtype: str = "bfloat16") -> str:
        """The dtype of a tensor of this model in `dtype`: some are in float32 whatever the others are."""
        if self.layout is not None:
            own, _ = self.layout[name]
            return dtype if own == "bfloat16" else own
        if self.quantised:
            return quantised.dtype_of(name, self.quantised, dtype)
        return "float32" if name.endswith(IN_FLOAT32.get(self.architecture, ())) else dtype


def tensors(spec: ModelSpec) -> list[tuple[str, Shape]]:
    """Names and shapes of the checkpoint's tensors, in the order of the layers; no lm_head where it is tied."""
    if spec.layout is not None:
        return [(name, shape) for name, (_, shape) in spec.layout.items()]
    config = spec.config
    if spec.architecture in OWN_NAMES:
        return [*OWN_NAMES[spec.architecture].tensors(config)]
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    found: list[tuple[str, Shape]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found += [(prefix + name, shape) for name, shape in layers.tensors(spec.architecture, config, layer)]
    found.append(("model.norm.weight", (hidden,)))
    if not spec.tied:
        found.append(("lm_head.weight", (vocabulary, hidden)))
    if spec.quantised:
        return [part for name, shape in found for part in quantised.tensors(name, shape, spec.quantised)]
    return found


def manifest(spec: ModelSpec) -> list[dict[str, Any]]:
    """What announces a whole update of a model in bfloat16: [{"name", "dtype", "shape"}, ...]."""
    return [{"name": name, "dtype": spec.dtype_of(name), "shape": list(shape)} for name, shape in tensors(spec)]


class Size(NamedTuple):
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    experts: tuple[int, int, int] | None = None  # (how many, how many chosen for a token, width of one)


def _config(architecture: str, purpose: str, size: Size) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[architecture]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "hidden_size": size.hidden,
        "initializer_range": 0.02,
        "intermediate_size": size.intermediate,
        "max_position_embeddings": 40960 if purpose == "published" else 4096,
        "model_type": architecture,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0 if purpose == "published" else 10000.0,
        "tie_word_embeddings": size.tied,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": size.vocabulary,
    }
    if size.experts is not None:
        count = layers.EXPERTS[architecture]
        config[count], config["num_experts_per_tok"], config["moe_intermediate_size"] = size.experts
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    if architecture in OWN_NAMES:
        config |= OWN_NAMES[architecture].config(config)
    return config | PARTICULAR.get(architecture, {})


OWN_NAMES = {module.ARCHITECTURE: module for module in (pictures, alibi)}  # whose checkpoints have names like no other
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    pictures.ARCHITECTURE: "Blip2ForConditionalGeneration",
    alibi.ARCHITECTURE: "BloomForCausalLM",
}
IN_FLOAT32 = {  # ends of names of what engines keep in float32
    "glm4_moe": ("mlp.gate.weight", "mlp.gate.e_score_correction_bias"),
    "deepseek_v3": ("mlp.gate.e_score_correction_bias",),
    "qwen3_next": ("linear_attn.A_log",),
}

# What a config has beside what all have, of the architectures that the trainer does not compute with.
_ROUTED = {
    "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 1.0, "num_nextn_predict_layers": 0,
}  # fmt: skip
PARTICULAR = {
    "glm4_moe": _ROUTED | {
        "attention_bias": True, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5, "use_qk_norm": True,
    },
    "deepseek_v3": _ROUTED | {
        "q_lora_rank": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    },
    "gpt_oss": {"attention_bias": True, "sliding_window": 64},
    **{architecture: {} for architecture in OWN_NAMES},
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention"],  # said outright: releases derive others from an interval
        "shared_expert_intermediate_size": 128, "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
}  # fmt: skip

TIED = "qwen3-tied-tiny"  # the model of a test that needs no other
ALIBI = "bloom-tiny"

# Every dimension halves without remainder, for tensor-parallel engines of two.
# fmt: off
_CATALOGUE = [
    # hidden, intermediate, layers, heads, kv heads, head dim, vocabulary, tied, experts
    (TIED,                "qwen3",     "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, True)),
    ("qwen3-untied-tiny", "qwen3",     "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False)),
    ("qwen2-tiny",        "qwen2",     "tiny",      Size( 256,   512,  2,  4, 2,  64,    512, False)),
    ("llama-tiny",        "llama",     "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False)),
    ("qwen3-moe-tiny",    "qwen3_moe", "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False, (8, 2, 128))),
    ("glm4-moe-tiny",     "glm4_moe",  "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False, (8, 2, 128))),
    ("deepseek-v3-tiny", "deepseek_v3", "tiny",     Size( 128,   256,  2,  4, 4,  64,    512, False, (8, 2, 128))),
    ("gpt-oss-tiny",      "gpt_oss",   "tiny",      Size( 128,   128,  2,  4, 2,  64,    512, False, (8, 2, 128))),
    ("qwen3-next-tiny",   "qwen3_next", "tiny",     Size( 128,   256,  2,  4, 2,  64,    512, False, (8, 2, 128))),
    ("blip2-tiny",        "blip-2",    "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False)),
    (ALIBI,               "bloom",     "tiny",      Size( 256,  1024,  2,  4, 4,  64,    512, True)),
    ("qwen3-1m",          "qwen3",     "ladder",    Size( 128,   320,  4,  4, 2,  64,   1024, True)),
    ("qwen3-10m",         "qwen3",     "ladder",    Size( 384,  1152,  5,  6, 2,  64,   4096, True)),
    ("qwen3-100m",        "qwen3",     "ladder",    Size( 768,  2048, 14, 12, 4,  64,  16384, True)),
    ("qwen3-moe-reduced", "qwen3_moe", "reduced",   Size(1024,  2048,  4, 16, 4, 128,  16384, False, (32, 4, 512))),
    ("glm4-moe-reduced",  "glm4_moe",  "reduced",   Size(1024,  2048,  2, 16, 4, 128,  16384, False, (32, 4, 512))),
    ("deepseek-v3-reduced", "deepseek_v3", "reduced", Size(1024, 2048, 2, 16, 16, 64,  16384, False, (32, 4, 512))),
    ("qwen3-next-reduced", "qwen3_next", "reduced", Size(1024,  2048,  2, 16, 4, 128,  16384, False, (32, 4, 512))),
    ("qwen3-30b-a3b-2l",  "qwen3_moe", "reduced",   Size(2048,  6144,  2, 32, 4, 128,  16384, False, (128, 8, 768))),
    ("qwen3-0.6b",        "qwen3",     "published", Size(1024,  3072, 28, 16, 8, 128, 151936, True)),
    ("qwen3-1.7b",        "qwen3",     "published", Size(2048,  6144, 28, 16, 8, 128, 151936, True)),
    ("qwen3-4b",          "qwen3",     "published", Size(2560,  9728, 36, 32, 8, 128, 151936, True)),
    ("qwen3-8b",          "qwen3",     "published", Size(4096, 12288, 36, 32, 8, 128, 151936, False)),
    ("qwen3-14b",         "qwen3",     "published", Size(5120, 17408, 40, 40, 8, 128, 151936, False)),
    ("qwen3-32b",         "qwen3",     "published", Size(5120, 25600, 64, 64, 8, 128, 151936, False)),
    ("qwen3-30b-a3b",     "qwen3_moe", "published", Size(2048,  6144, 48, 32, 4, 128, 151936, False, (128, 8, 768))),
]
# fmt: on

MODELS: dict[str, ModelSpec] = {
    name: ModelSpec(name, architecture, _config(architecture, purpose, size), purpose)
    for name, architecture, purpose, size in _CATALOGUE
}
for _method, _said in quantised.CONFIGS.items():
    _plain = MODELS["qwen3-untied-tiny"]
    _config_of_it = _plain.config | {"quantization_config": _said}
    MODELS[f"qwen3-{_method}-tiny"] = ModelSpec(f"qwen3-{_method}-tiny", "qwen3", _config_of_it, "tiny")
