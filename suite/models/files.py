"""Models on disk: config.json and model.safetensors, as engines and trainers load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from suite.models import own, pictures
from suite.models.catalogue import ARCHITECTURES, ModelSpec, tensors
from suite.models.values import Shape, fill_values

if TYPE_CHECKING:
    import torch

LAYOUT = "layout.json"  # beside the config.json of a user's model: what its checkpoint holds


def write_config(spec: ModelSpec, directory: Path | str, dtype: torch.dtype | str = "bfloat16") -> Path:
    """Write config.json, which is enough for an engine with load_format="dummy"; a processor is linked beside it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = spec.config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    path, text = directory / "config.json", json.dumps(config, indent=2) + "\n"
    if not path.exists() or path.read_text() != text:  # an engine may be reading it
        path.write_text(text)
    if spec.sees:
        pictures.write_processor(spec.config, directory)
    for file in own.processor_files(Path(spec.processor)) if spec.processor else ():
        link = directory / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file)
    if spec.layout is not None:
        (directory / LAYOUT).write_text(json.dumps({"layout": spec.layout, "source": spec.source}))
    return directory


def write_checkpoint(spec: ModelSpec, seed: int, directory: Path | str, dtype: torch.dtype | str = "bfloat16") -> Path:
    """Write config.json and model.safetensors with the weights of `seed`; the whole model is held in memory once."""
    dtype = str(dtype).removeprefix("torch.")
    weights = {name: _values(spec, name, shape, seed, dtype) for name, shape in tensors(spec)}
    return save(spec, weights, directory)


def fill(spec: ModelSpec, out: torch.Tensor, name: str, shape: Shape, seed: int, start: int = 0) -> None:
    """Write elements [start, start + out.numel()) of a tensor as the checkpoint of `seed` has them; see fill_values."""
    if not spec.source:
        fill_values(out, name, shape, seed, start)
        return
    flat = own.perturbed(Path(spec.source), name, seed).view(-1)
    out.view(-1).copy_(flat[start : start + out.numel()])


def _values(spec: ModelSpec, name: str, shape: Shape, seed: int, dtype: str) -> torch.Tensor:
    import torch

    out = torch.empty(shape, dtype=getattr(torch, spec.dtype_of(name, dtype)))
    fill(spec, out, name, shape, seed)
    return out


def save(spec: ModelSpec, weights: dict[str, torch.Tensor], directory: Path | str) -> Path:
    """Write model.safetensors with these weights, contiguous on the CPU, and config.json with the first one's dtype."""
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
    if (path := Path(directory) / LAYOUT).exists():
        said = json.loads(path.read_text())
        layout = {name: (dtype, tuple(shape)) for name, (dtype, shape) in said["layout"].items()}
        return ModelSpec(Path(directory).name, architecture, config, "own", layout, said["source"])
    if architecture not in ARCHITECTURES:
        raise KeyError(f"{directory}: architecture {architecture!r}, expected one of {sorted(ARCHITECTURES)}")
    return ModelSpec(Path(directory).name, architecture, config, "given")
