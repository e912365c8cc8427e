"""A tiny model that takes pictures: BLIP-2, whose language model is Llama. Its config, its tensors, its processor.

vLLM starts no engine of such a model without its tokenizer and its processor, so both are written beside the config.
BLIP-2 is one of the few that vLLM runs where torchvision is not installed.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from suite.models import layers
from suite.models.values import Shape

ARCHITECTURE = "blip-2"
EDGE, PATCH = 28, 14  # pixels
PATCHES, QUERIES = (EDGE // PATCH) ** 2, 4  # of a picture; as many tokens stand for it
TOWER_LAYERS, WIDE, INTERMEDIATE = 2, 64, 128
PICTURE = "<image>"


def config(text: dict[str, Any]) -> dict[str, Any]:
    """What a config has beside that of its language model, `text`. The last token stands for a picture."""
    size = {"hidden_size": WIDE, "intermediate_size": INTERMEDIATE, "num_attention_heads": 2}
    queries = {"cross_attention_frequency": 1, "encoder_hidden_size": WIDE, "num_hidden_layers": 1}
    return {
        "text_config": text | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
        "vision_config": size | {"num_hidden_layers": TOWER_LAYERS, "image_size": EDGE, "patch_size": PATCH},
        "qformer_config": size | queries,
        "num_query_tokens": QUERIES,
        "image_token_index": text["vocab_size"] - 1,
    }


def tensors(of_config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the checkpoint's tensors, as the published checkpoints have them."""
    hidden, vocabulary = of_config["hidden_size"], of_config["vocab_size"]
    yield "query_tokens", (1, QUERIES, WIDE)
    yield from _tower()
    yield from _queries()
    yield from _affine("language_projection", (hidden, WIDE))
    yield "language_model.model.embed_tokens.weight", (vocabulary, hidden)
    for layer in range(of_config["num_hidden_layers"]):
        for name, shape in layers.tensors("llama", of_config, layer):
            yield f"language_model.model.layers.{layer}.{name}", shape
    yield "language_model.model.norm.weight", (hidden,)
    yield "language_model.lm_head.weight", (vocabulary, hidden)


def _tower() -> Iterator[tuple[str, Shape]]:
    yield "vision_model.embeddings.class_embedding", (1, 1, WIDE)
    yield "vision_model.embeddings.position_embedding", (1, PATCHES + 1, WIDE)
    yield from _affine("vision_model.embeddings.patch_embedding", (WIDE, 3, PATCH, PATCH))
    for layer in range(TOWER_LAYERS):
        prefix = f"vision_model.encoder.layers.{layer}."
        yield from _affine(f"{prefix}self_attn.qkv", (3 * WIDE, WIDE))
        yield from _affine(f"{prefix}self_attn.projection", (WIDE, WIDE))
        yield from _affine(f"{prefix}layer_norm1", (WIDE,))
        yield from _affine(f"{prefix}mlp.fc1", (INTERMEDIATE, WIDE))
        yield from _affine(f"{prefix}mlp.fc2", (WIDE, INTERMEDIATE))
        yield from _affine(f"{prefix}layer_norm2", (WIDE,))
    yield from _affine("vision_model.post_layernorm", (WIDE,))


def _queries() -> Iterator[tuple[str, Shape]]:
    """What asks the tower: a transformer whose inputs are the queries."""
    yield from _affine("qformer.layernorm", (WIDE,))
    prefix = "qformer.encoder.layer.0."
    for attention in ("attention", "crossattention"):
        for name in ("query", "key", "value"):
            yield from _affine(f"{prefix}{attention}.attention.{name}", (WIDE, WIDE))
        yield from _affine(f"{prefix}{attention}.output.dense", (WIDE, WIDE))
        yield from _affine(f"{prefix}{attention}.output.LayerNorm", (WIDE,))
    yield from _affine(f"{prefix}intermediate_query.dense", (INTERMEDIATE, WIDE))
    yield from _affine(f"{prefix}output_query.dense", (WIDE, INTERMEDIATE))
    yield from _affine(f"{prefix}output_query.LayerNorm", (WIDE,))


def write_processor(of_config: dict[str, Any], directory: Path) -> None:
    """Write the tokenizer, of words w3, w4 and so on by their ids, and the processor, as save_pretrained() has them."""
    special = {"<pad>": 0, "<bos>": 1, "<eos>": 2, PICTURE: of_config["image_token_index"]}
    words = {f"w{index}": index for index in range(3, of_config["image_token_index"])}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "decoder": None, "pre_tokenizer": {"type": "WhitespaceSplit"},
        "added_tokens": [{"id": index, "content": word} | flags for word, index in special.items()],
        "model": {"type": "WordLevel", "vocab": special | words, "unk_token": "<pad>"},
    }  # fmt: skip
    reads = {
        "image_processor_type": "BlipImageProcessor", "do_resize": True, "do_rescale": True,
        "do_normalize": True, "do_convert_rgb": True, "size": {"height": EDGE, "width": EDGE},
        "resample": 3, "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "processor_class": "Blip2Processor",
    }  # fmt: skip
    both = {"processor_class": "Blip2Processor", "num_query_tokens": QUERIES, "image_processor": reads}
    tokens = {
        "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "Blip2Processor", "unk_token": "<pad>",
        "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "additional_special_tokens": [PICTURE],
    }  # fmt: skip
    for name, content in {
        "tokenizer.json": tokenizer, "tokenizer_config.json": tokens, "preprocessor_config.json": reads,
        "processor_config.json": both,
    }.items():  # fmt: skip
        path, text = directory / name, json.dumps(content) + "\n"
        if not path.exists() or path.read_text() != text:  # an engine may be reading it
            path.write_text(text)


def _affine(name: str, weight: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]
