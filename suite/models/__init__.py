"""Models by architecture and size, written to disk from a config with seeded weights; nothing is downloaded.

Names and shapes follow from the config alone, independently of transformers and vLLM, so that they can judge both.
Every element of a weight is a function of (tensor name, seed, position): the same bits on every device, whole or in
slices. Two seeds that differ modulo 4 give different values in every element, also once rounded to bfloat16.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# How far weights reach, chosen by measuring (see `_spread`): the two best logits are 1.6 apart in the middle and 0.5 or
# more in 8 of 10 positions, two bfloat16 computations of one logit differ by less than that, and exchanging any one
# tensor of a tiny model is seen in its tokens.
LOGIT_STD = 8.0
RESIDUAL_GAIN = 16.0
EXPERT_GAIN = 2.0
ROUTER_GAIN = 16.0
NORM_SPREAD = 0.25

# Elements computed at once: bounds the scratch memory to about 100 MB whatever the tensor's size.
CHUNK_ELEMENTS = 4 * 1024 * 1024


@dataclass(frozen=True)
class ModelSpec:
    """One model: `config` is the content of its config.json, `purpose` says where it is of use.

    tiny: correctness anywhere; ladder: throughput on CPUs; published: the released dimensions, for GPUs;
    reduced: correctness on GPUs, at dimensions that their kernels are made for; given: read from a directory.
    """

    name: str
    architecture: str  # "qwen3" | "llama" | "qwen3_moe"
    config: dict[str, Any]
    purpose: str

    @property
    def elements(self) -> int:
        """How many weights the checkpoint holds; a tied output layer is not counted again."""
        return sum(math.prod(shape) for _, shape in tensors(self))

    @property
    def tied(self) -> bool:
        return bool(self.config["tie_word_embeddings"])


def tensors(spec: ModelSpec) -> list[tuple[str, Shape]]:
    """Names and shapes of the checkpoint's tensors, in the order of the layers; no lm_head where it is tied."""
    config = spec.config
    vocabulary, hidden = config["vocab_size"], config["hidden_size"]
    found: list[tuple[str, Shape]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found += [(prefix + name, shape) for name, shape in (*_attention(spec), *_feed_forward(spec))]
    found.append(("model.norm.weight", (hidden,)))
    if not spec.tied:
        found.append(("lm_head.weight", (vocabulary, hidden)))
    return found


def _attention(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    config = spec.config
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    yield "input_layernorm.weight", (hidden,)
    yield "self_attn.q_proj.weight", (queries, hidden)
    yield "self_attn.k_proj.weight", (keys, hidden)
    yield "self_attn.v_proj.weight", (keys, hidden)
    yield "self_attn.o_proj.weight", (hidden, queries)
    if spec.architecture != "llama":
        yield "self_attn.q_norm.weight", (head,)
        yield "self_attn.k_norm.weight", (head,)


def _feed_forward(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    config = spec.config
    hidden = config["hidden_size"]
    yield "post_attention_layernorm.weight", (hidden,)
    if spec.architecture != "qwen3_moe":
        yield from _gated("mlp.", hidden, config["intermediate_size"])
        return
    yield "mlp.gate.weight", (config["num_experts"], hidden)
    for expert in range(config["num_experts"]):
        yield from _gated(f"mlp.experts.{expert}.", hidden, config["moe_intermediate_size"])


def _gated(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Shape]]:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)


def values(name: str, shape: Shape, seed: int, dtype: torch.dtype | str) -> torch.Tensor:
    """The tensor `name` of the checkpoint written from `seed`: `shape`, `dtype`, on the CPU."""
    import torch

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    out = torch.empty(shape, dtype=dtype)
    fill_values(out, name, shape, seed)
    return out


def fill_values(out: torch.Tensor, name: str, shape: Shape, seed: int, start: int = 0) -> None:
    """Write elements [start, start + out.numel()) of the flattened tensor `name` of `shape` into contiguous `out`.

    `out` may have any floating dtype, be on any device, and be a shard; the bits are those of `values`.
    """
    flat = out.view(-1)
    middle, width = _spread(name, shape)
    for low in range(0, flat.numel(), CHUNK_ELEMENTS):
        high = min(low + CHUNK_ELEMENTS, flat.numel())
        flat[low:high] = _elements(name, seed, start + low, start + high, middle, width, out.device)


def _spread(name: str, shape: Shape) -> tuple[float, float]:
    """(middle, half width) of the uniform distribution that the tensor's elements come from.

    Norms lie around 1. The output layer gives logits of standard deviation LOGIT_STD. What writes into the residual
    stream has a gain, without which a tied output layer repeats the token it was given. Where two experts are nearly
    equal, rounding decides between them: the router's gain makes that rare, the experts' smaller gain harmless.
    """
    if name.endswith("norm.weight"):
        return 1.0, NORM_SPREAD
    gain = 1.0
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        gain = LOGIT_STD
    elif name.endswith("mlp.gate.weight"):
        gain = ROUTER_GAIN
    elif name.endswith("down_proj.weight") and ".experts." in name:
        gain = EXPERT_GAIN
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = RESIDUAL_GAIN
    return 0.0, gain * math.sqrt(3 / shape[-1])


def _elements(
    name: str, seed: int, start: int, stop: int, middle: float, width: float, device: torch.device
) -> torch.Tensor:
    """Elements [start, stop) as float32.

    seed % 4 sits in the two lowest bits that bfloat16 keeps. The 16 bits below, which rounding drops, depend on the
    name and the position but not on the seed and are never half way: all seeds round in the same direction, and
    stay apart.
    """
    import torch

    position = torch.arange(start, stop, dtype=torch.int64, device=device).to(torch.int32)
    tail = (_scrambled(position, zlib.crc32(name.encode())) & 0xFFFF) | 1
    mixed = _scrambled(position, zlib.crc32(f"{seed} {name}".encode()))
    # An odd 24-bit integer: exact in float32 on every device, and never zero.
    bits = (((mixed >> 9) * 2) | 1).to(torch.float32).mul_(width / 2**23).add_(middle).view(torch.int32)
    return ((bits & ~0x3FFFF) | (seed % 4 << 16) | tail).view(torch.float32)


def _scrambled(position: torch.Tensor, key: int) -> torch.Tensor:
    """Murmur3's mixing of 32-bit integers, in wrapping int32 arithmetic, the same on every device."""
    mixed = position * _signed(0x9E3779B1) + _signed(key)
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= _signed(0x85EBCA6B)
    mixed ^= _signed(key * 0x27D4EB2F)  # without it, another key would only shift the sequence
    mixed ^= (mixed >> 13) & 0x7FFFF
    mixed *= _signed(0xC2B2AE35)
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed


def _signed(number: int) -> int:
    """The int32 with the low 32 bits of `number`."""
    return (number + 2**31) % 2**32 - 2**31


def write_config(spec: ModelSpec, directory: Path | str, dtype: torch.dtype | str = "bfloat16") -> Path:
    """Write config.json alone, which is enough for an engine with load_format="dummy"."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = spec.config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return directory


def write_checkpoint(spec: ModelSpec, seed: int, directory: Path | str, dtype: torch.dtype | str = "bfloat16") -> Path:
    """Write config.json and model.safetensors with the weights of `seed`; the whole model is held in memory once."""
    weights = {name: values(name, shape, seed, dtype) for name, shape in tensors(spec)}
    return save(spec, weights, directory)


def save(spec: ModelSpec, weights: dict[str, torch.Tensor], directory: Path | str) -> Path:
    """Write config.json and model.safetensors with these weights, all of one dtype, on the CPU and contiguous."""
    from safetensors.torch import save_file

    directory = write_config(spec, directory, next(iter(weights.values())).dtype)
    # A model loaded from the file that was there may still map it: replaced, not written over.
    partial = directory / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.replace(directory / "model.safetensors")
    return directory


def read_spec(directory: Path | str) -> ModelSpec:
    """The spec of the model in `directory`, from its config.json; KeyError for an architecture not in the catalogue."""
    config = json.loads((Path(directory) / "config.json").read_text())
    architecture = config["model_type"]
    if architecture not in ARCHITECTURES:
        raise KeyError(f"{directory}: architecture {architecture!r}, expected one of {sorted(ARCHITECTURES)}")
    return ModelSpec(Path(directory).name, architecture, config, "given")


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
        config["num_experts"], config["num_experts_per_tok"], config["moe_intermediate_size"] = size.experts
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}
    return config


ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

TIED = "qwen3-tied-tiny"  # the model of a test that needs no other

# Every dimension halves without remainder, for tensor-parallel engines of two.
# fmt: off
_CATALOGUE = [
    # hidden, intermediate, layers, heads, kv heads, head dim, vocabulary, tied, experts
    (TIED,                "qwen3",     "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, True)),
    ("qwen3-untied-tiny", "qwen3",     "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False)),
    ("llama-tiny",        "llama",     "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False)),
    ("qwen3-moe-tiny",    "qwen3_moe", "tiny",      Size( 128,   256,  2,  4, 2,  64,    512, False, (8, 2, 128))),
    ("qwen3-1m",          "qwen3",     "ladder",    Size( 128,   320,  4,  4, 2,  64,   1024, True)),
    ("qwen3-10m",         "qwen3",     "ladder",    Size( 384,  1152,  5,  6, 2,  64,   4096, True)),
    ("qwen3-100m",        "qwen3",     "ladder",    Size( 768,  2048, 14, 12, 4,  64,  16384, True)),
    ("qwen3-moe-reduced", "qwen3_moe", "reduced",   Size(1024,  2048,  4, 16, 4, 128,  16384, False, (32, 4, 512))),
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
