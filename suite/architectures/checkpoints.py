"""Two checkpoints of one architecture, which differ in every element."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from suite.architectures import processors
from suite.architectures.configs import CONFIGS, LAYOUTS
from suite.models.own import Layout, layout_of
from suite.models.values import values

SEEDS = (0, 1)


def write_both(name: str, directory: Path) -> list[Path]:
    """Write a checkpoint of each of SEEDS below `directory`.

    Raises UnknownModel where transformers cannot build the model.
    """
    return [write(name, seed, directory / str(seed)) for seed in SEEDS]


def write(name: str, seed: int, path: Path) -> Path:
    """Write the checkpoint of a seed into the directory `path`, with its config.json; raises as `write_both`."""
    config, layout = CONFIGS[name], layout_for(name)
    path.mkdir(parents=True, exist_ok=True)
    said = {"architectures": [layout.architecture], "torch_dtype": "bfloat16", **config}
    (path / "config.json").write_text(json.dumps(said, indent=2) + "\n")
    if "vision_config" in config:
        processors.write(config, path)
    save_file(tensors_of(layout, seed), path / "model.safetensors", metadata={"format": "pt"})
    return path


def layout_for(name: str) -> Layout:
    """Names, dtypes and shapes of the checkpoint of one of CONFIGS."""
    config = CONFIGS[name]
    if name not in LAYOUTS:
        return layout_of(config)
    return Layout(config["architectures"][0], {name: ("bfloat16", shape) for name, shape in LAYOUTS[name](config)})


def tensors_of(layout: Layout, seed: int) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors for a seed, by their names."""
    return {name: values(name, shape, seed, dtype) for name, (dtype, shape) in layout.tensors.items()}
