"""A tiny model with ALiBi: Bloom. Its config and its tensors.

It has no table of positions. A slope for each head takes its place, computed when the model is built; it is no
parameter, no buffer, and in no checkpoint.
"""

from collections.abc import Iterator
from typing import Any

from suite.models.values import Shape

ARCHITECTURE = "bloom"


def config(text: dict[str, Any]) -> dict[str, Any]:
    """What a config has beside what all have, `text`."""
    return {"n_layer": text["num_hidden_layers"], "n_head": text["num_attention_heads"], "layer_norm_epsilon": 1e-5}


def tensors(of_config: dict[str, Any]) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of the checkpoint's tensors, as the published checkpoints have them."""
    hidden = of_config["hidden_size"]
    yield "word_embeddings.weight", (of_config["vocab_size"], hidden)
    yield from _affine("word_embeddings_layernorm", (hidden,))
    for layer in range(of_config["n_layer"]):
        prefix = f"h.{layer}."
        yield from _affine(f"{prefix}input_layernorm", (hidden,))
        yield from _affine(f"{prefix}self_attention.query_key_value", (3 * hidden, hidden))
        yield from _affine(f"{prefix}self_attention.dense", (hidden, hidden))
        yield from _affine(f"{prefix}post_attention_layernorm", (hidden,))
        yield from _affine(f"{prefix}mlp.dense_h_to_4h", (4 * hidden, hidden))
        yield from _affine(f"{prefix}mlp.dense_4h_to_h", (hidden, 4 * hidden))
    yield from _affine("ln_f", (hidden,))


def _affine(name: str, weight: Shape) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]
