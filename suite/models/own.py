"""A user's own model: a directory with a config.json, or with a whole checkpoint.

Of a config alone, the checkpoint's names, dtypes and shapes are those that `save_pretrained` would write: transformers
builds the model on the meta device, which needs no memory, and turns its parameters' names into the checkpoint's. The
values are seeded then. Of a whole checkpoint, everything is the checkpoint's own; another seed perturbs every element.

Of a model that takes pictures or sound, the directory's tokenizer and processor are needed too, since vLLM starts no
engine of one without them. It is asked about text alone: what is judged is its weights, those of its towers included.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.models.catalogue import ModelSpec
from suite.models.values import Shape

if TYPE_CHECKING:
    import torch

# Of the dtypes that are perturbed: the integers of the same size, and how far the seed is moved into the mantissa, so
# that two seeds differ once rounded to bfloat16, by a few hundredths at the most.
PERTURBED = {"bfloat16": ("int16", 0), "float16": ("int16", 3), "float32": ("int32", 16)}
SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}  # dtypes as a checkpoint's headers name them
# Of a model that takes more than text: what its config has, and the files that vLLM makes its processor of.
TOWERS = ("vision_config", "audio_config")
PROCESSORS = ("*processor_config.json",)
TOKENIZERS = ("tokenizer*", "tekken.json", "vocab.*", "*.tiktoken")
BESIDE_THESE = ("merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json", "chat_template*")
SAID = 120  # characters of what transformers raises: it may list every model that it knows
# What is not judged with a user's model, and why.
COMPUTES = "needs the trainer's own forward pass, and the trainer does not compute with a model of --model DIR"
NAMES = "names tensors of the catalogue's model, which a model of --model DIR need not have"
LEFT_OUT = {
    "cache.prefix": COMPUTES, "update.trained": COMPUTES, "update.tied": NAMES, "update.sequence": NAMES,
    "update.dtype": NAMES, "update.nonfinite": NAMES, "sent.strides": NAMES, "sent.mixed_dtypes": NAMES,
    "inflight.update": COMPUTES, "inflight.prefix": COMPUTES, "inflight.refused": COMPUTES,
}  # fmt: skip


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
            f" {type(error).__name__}: {str(error).partition(chr(10))[0]:.{SAID}}. Give a directory with the whole"
            " checkpoint"
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


def spec_of(directory: Path) -> ModelSpec:
    """The model in a user's directory, under the directory's name.

    Raises UnknownModel where the directory holds neither a config that transformers knows nor a whole checkpoint, and
    where vLLM can start no engine of it.
    """
    config = read_config(directory)
    processor = _processor(config, directory)
    tensors, architectures, source = _layout(directory), config.get("architectures"), str(directory.resolve())
    if not tensors:
        layout = layout_of(config | {"dtype": "bfloat16", "torch_dtype": "bfloat16"})
        tensors, architectures, source = layout.tensors, [layout.architecture], ""
    if not architectures:
        raise UnknownModel(f"{directory}/config.json: expected architectures, by which vLLM finds the model's class")
    text = config.get("text_config") or {}
    said = {"architectures": architectures, "vocab_size": _vocabulary(config | text, tensors), **config}
    return ModelSpec(directory.resolve().name, config["model_type"], said, "own", tensors, source, processor)


def processor_files(directory: Path) -> list[Path]:
    """The files of the tokenizer and the processor in a directory."""
    return _found(directory, (*PROCESSORS, *TOKENIZERS, *BESIDE_THESE))


def _processor(config: dict[str, Any], directory: Path) -> str:
    """The directory, where vLLM needs its processor, else nothing. Raises UnknownModel where that cannot be had."""
    has_towers = any(name in config for name in TOWERS)
    missing = [f"no {kinds[0]}" for kinds in (PROCESSORS, TOKENIZERS) if not _found(directory, kinds)]
    if not has_towers:
        return "" if missing else str(directory.resolve())
    takes = f"{directory}: a {config['model_type']} takes more than text, and vLLM starts no engine of one without"
    if missing:
        raise UnknownModel(
            f"{takes} its tokenizer and its processor; found {' and '.join(missing)} there. Put the model's"
            " files of both beside its config.json, as its processor's save_pretrained() writes them"
        )
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # one that is built for another torch raises whatever it comes upon
        raise UnknownModel(
            f"{takes} torchvision, which cannot be imported here: {str(error).partition(chr(10))[0]}. Install the"
            " release that was built for the torch that is here"
        ) from error
    return str(directory.resolve())


def _found(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path.absolute() for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def perturbed(source: Path, name: str, seed: int) -> torch.Tensor:
    """A tensor of the checkpoint in `source` as it is for seed 0, else with every element changed a little."""
    import torch
    from safetensors import safe_open

    path, _, _ = _headers(str(source))[name]
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name).contiguous()
    integers, place = PERTURBED[str(tensor.dtype).removeprefix("torch.")]
    return tensor.view(getattr(torch, integers)).bitwise_xor_(seed % 4 << place).view(tensor.dtype)


@cache
def _headers(source: str) -> dict[str, tuple[str, str, Shape]]:
    """The file, dtype (as headers name it) and shape of every tensor of the checkpoint in a directory."""
    from safetensors import safe_open

    from extensions.model.headers import checkpoint_files

    found = {}
    for path in checkpoint_files(Path(source)):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name, header in zip(names, map(file.get_slice, names), strict=True):
                found[name] = (str(path), header.get_dtype(), tuple(header.get_shape()))
    return found


def _layout(directory: Path) -> dict[str, tuple[str, Shape]]:
    """`{name: (dtype, shape)}` of a whole checkpoint, in the order of the names; empty where there is no checkpoint."""
    from safetensors import SafetensorError

    try:
        headers = _headers(str(directory.resolve()))
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UnknownModel(f"{directory}: expected readable safetensors files, found {error}") from error
    for name, (path, dtype, _) in headers.items():
        if dtype not in SAFETENSORS:
            raise UnknownModel(
                f"{path}: {name} is of dtype {dtype}, expected one of {', '.join(SAFETENSORS)}: a"
                " quantised checkpoint cannot be perturbed. Give the checkpoint that it was made of"
            )
    return {name: (SAFETENSORS[dtype], shape) for name, (_, dtype, shape) in sorted(headers.items())}


def _vocabulary(config: dict[str, Any], tensors: dict[str, tuple[str, Shape]]) -> int:
    """How many tokens the model knows: as its config says, else the rows of its first embedding."""
    if isinstance(config.get("vocab_size"), int):
        return config["vocab_size"]
    return next(shape[0] for name, (_, shape) in tensors.items() if "emb" in name or "wte" in name)


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
