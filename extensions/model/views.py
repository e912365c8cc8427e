"""Tensors that were built as views of a parameter, and have memory of their own now.

A model may keep a parameter a second time: mamba's `conv_weights` is a view of `conv1d.weight`, an attention
implementation holds its layer's sinks. Where processing after loading repacks the parameter, or casts the view, the two
part, and a new value of the one does not reach the other (vllm#42481). Such a view is renewed with its parameter.
"""

from dataclasses import dataclass

import torch

from extensions.model.regions import Region, memory_id, part, region_of
from extensions.model.twin import live_tensors, named_tensors, without_lora
from extensions.model.walk import every_tensor


@dataclass(frozen=True)
class View:
    """A tensor at `path` that shows this part of the parameter or buffer `of`; both in vLLM's names."""

    path: str
    of: str
    region: Region
    dtype: torch.dtype


def views_of(twin: torch.nn.Module) -> list[View]:
    """The views of parameters and buffers that a twin holds beside these, before anything is loaded."""
    owners: dict[int, str] = {}
    for name, tensor in named_tensors(twin).items():
        owners.setdefault(memory_id(tensor), name)
    parameters = {name for name, _ in twin.named_parameters(remove_duplicate=False)}
    return [
        View(path, owner, region_of(tensor), tensor.dtype)
        for path, tensor in every_tensor(twin)
        if (owner := owners.get(memory_id(tensor), path)) != path and path not in parameters
    ]


def parted(views: list[View], model: torch.nn.Module) -> tuple[list[View], list[str]]:
    """Which of the views are not part of their parameter's memory in the live model.

    Also returns a sentence for each view that a copy can't renew, since its values are not the parameter's.
    """
    live, found, problems = live_tensors(model), [], []
    there = {without_lora(path): tensor for path, tensor in every_tensor(model)} if views else {}
    for view in views:
        tensor, parameter = there.get(view.path), live.get(view.of)
        if tensor is None or parameter is None or not tensor.numel() or memory_id(tensor) == memory_id(parameter):
            continue
        found.append(view)
        if not _is_attribute(view.path) or not _is_renewable(tensor, parameter, view):
            problems.append(f"{view.of}: {view.path} was derived from it and can't be renewed")
    return found, problems


def resolve(model: torch.nn.Module, view: View) -> torch.Tensor:
    """The tensor at a view's path, which leads through attributes alone. Raises AttributeError where there is none."""
    holder: object = model
    for name in view.path.split("."):
        modules = getattr(holder, "_modules", {})
        if "base_layer" in modules and name not in modules:
            holder = modules["base_layer"]
        holder = getattr(holder, name)
    return holder


def _is_attribute(path: str) -> bool:
    """Whether a path leads through attributes and modules alone, and not into lists, closures or classes."""
    return all(name.isidentifier() or name.isdigit() for name in path.split("."))


def _is_renewable(tensor: torch.Tensor, parameter: torch.Tensor, view: View) -> bool:
    """Whether the tensor is still as it was built, or else holds the values of its part of the parameter, cast."""
    if region_of(tensor) == view.region and tensor.dtype == view.dtype:
        return True
    region = view.region
    if parameter.dtype != view.dtype or not tensor.dtype.is_floating_point or tensor.shape != region.shape:
        return False
    reach = sum((size - 1) * step for size, step in zip(region.shape, region.stride, strict=True))
    if region.offset + reach >= parameter.untyped_storage().nbytes():
        return False  # the parameter is packed
    return torch.equal(part(parameter.detach(), region).to(tensor.dtype), tensor)
