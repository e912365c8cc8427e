"""A checkpoint's names, dtypes and shapes for a config of any architecture that transformers knows.

They are those that `save_pretrained` would write: transformers builds the model on the meta device, which needs no
memory, and its own conversion turns its parameters' names into the checkpoint's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.models.values import Shape


class UnknownModel(ValueError):
    """A directory or config that no model can be made of. The message says why and what to give instead."""


@dataclass(frozen=True)
class Layout:
    """What a checkpoint of a config holds: `tensors` is `{name: (dtype, shape)}`, `architecture` the model's class."""

    architecture: str
    tensors: dict[str, tuple[str, Shape]]


def layout_of(config: dict[str, Any]) -> Layout:
    """The checkpoint of a model with this config.json.

    The dtype of a tensor is the one that the config names, bfloat16 where it names none, but for those that
    transformers keeps in float32. Raises UnknownModel where transformers does not know the architecture or cannot
    build it.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with torch.device("meta"):
            model = _built(config)
    except Exception as error:  # whatever a config makes transformers' classes raise
        raise UnknownModel(
            f"transformers cannot build a model_type {config.get('model_type')!r} from this config.json:"
            f" {type(error).__name__}: {str(error).partition(chr(10))[0]}. Give a directory with the whole checkpoint"
        ) from error
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    held = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    written = revert_weight_conversion(model, held)
    tensors = {
        name: (str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)) for name, tensor in written.items()
    }
    return Layout(type(model).__name__, tensors)


def _built(config: dict[str, Any]) -> Any:
    """The model, on the device that is the default."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    known = AutoConfig.for_model(**config)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "bfloat16"))
    sees = hasattr(known, "vision_config") and type(known) in AutoModelForImageTextToText._model_mapping
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_config(known, dtype=dtype)


def read_config(directory: Path) -> dict[str, Any]:
    """What is in a directory's config.json. Raises UnknownModel where it is missing or malformed."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UnknownModel(f"{path}: expected a model's config.json, found {error.strerror}") from error
    except ValueError as error:
        raise UnknownModel(f"{path}: expected JSON, found {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UnknownModel(f"{path}: expected an object with a model_type, as transformers writes it")
    return config
