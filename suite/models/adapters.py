"""LoRA adapters of the catalogue's models, with seeded weights, and checkpoints in which one is merged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from suite.models.catalogue import ModelSpec, tensors
from suite.models.files import save
from suite.models.values import Shape, values

if TYPE_CHECKING:
    import torch

RANK = 8  # of every pair of matrices; they are added as they are: alpha is the rank
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."  # before the name of a layer, as PEFT writes it
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def write_adapter(spec: ModelSpec, seed: int | None, directory: Path | str) -> Path:
    """Write an adapter as PEFT saves one, in bfloat16, in place of the one that is there; None: of zeros.

    Where A and B are its matrices, [RANK, in] and [out, RANK], B A is as large as the weights that it is added to, but
    for those that write into the residual stream.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    named = {}
    for name, shape in _targets(spec):
        for part, matrix in zip("AB", _pair(name, shape, seed), strict=True):
            named[f"{PREFIX}{_layer(name)}.lora_{part}.weight"] = matrix
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(TARGETS),
    }  # fmt: skip
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    partial = directory / f"{WEIGHTS}.partial"
    save_file(named, partial, metadata={"format": "pt"})
    partial.replace(directory / WEIGHTS)  # an engine may map the file that was there
    return directory


def write_merged(spec: ModelSpec, seed: int, adapter: int, directory: Path | str) -> Path:
    """Write the checkpoint of `seed` with the adapter of another seed added to its weights, in bfloat16."""
    weights = {name: values(name, shape, seed, spec.dtype_of(name)) for name, shape in tensors(spec)}
    for name, shape in _targets(spec):
        a, b = _pair(name, shape, adapter)
        weights[name] = (weights[name].float() + b.float() @ a.float()).to(weights[name].dtype)
    return save(spec, weights, directory)


def _targets(spec: ModelSpec) -> Iterator[tuple[str, Shape]]:
    for name, shape in tensors(spec):
        if _layer(name).rpartition(".")[2] in TARGETS and name.endswith(".weight"):
            yield name, shape


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _pair(name: str, shape: Shape, seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The matrices A and B for a weight [out, in], in bfloat16."""
    import torch

    shapes = {"A": (RANK, shape[1]), "B": (shape[0], RANK)}
    if seed is None:
        a, b = (torch.zeros(of, dtype=torch.bfloat16) for of in shapes.values())
    else:
        a, b = (values(f"{_layer(name)}.lora_{part}", of, seed, "bfloat16") for part, of in shapes.items())
    return a, b
