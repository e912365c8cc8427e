"""Positional checksums of what a trainer sent, taken where an engine computes with it."""

from collections import defaultdict

import torch

from extensions.manifest import Manifest
from extensions.model.regions import Region
from extensions.model.weights import effective_weights
from extensions.plan import plan_of
from suite.actors.checksum import added, checksum
from suite.processes.blame import SuiteFault, of_the_suite


def checksums_of(model: torch.nn.Module, vllm_config: object, manifest: Manifest) -> dict[str, int]:
    """`{announced name: checksum}` of what this rank computes with, wherever the model's loader puts each tensor.

    Elements that the rank does not hold are left out. Raises SuiteFault where no plan can be made, and for a tensor
    that the model's loader converts: its elements are no longer those that were sent. Raises RuntimeError for a weight
    that is not as the model was built.
    """
    with of_the_suite("plan where tensors go"):
        fills = plan_of(model, vllm_config, manifest).fills
    weights, parts = dict(effective_weights(model)), defaultdict(list)
    for fill in fills:
        for name, source in fill.reads:
            region = fill.region
            if fill.conversion or (region.shape, region.itemsize) != (source.shape, source.itemsize):
                raise SuiteFault(f"{name} can't be told in {fill.into}: {fill.conversion or list(region.shape)}")
            strides = [step // source.itemsize for step in source.stride]
            part = _part(weights[fill.into], region)
            parts[name].append(checksum(part, source.offset // source.itemsize, strides))
    return {name: added(sums) for name, sums in parts.items()}


def _part(weight: torch.Tensor, region: Region) -> torch.Tensor:
    """The part of a weight that a region of the plan means. The plan knows the weight as it was built: contiguous."""
    size = weight.element_size()
    if not weight.is_contiguous() or region.itemsize != size:
        raise RuntimeError(f"expected a contiguous weight of {region.itemsize} bytes an element, found {weight.dtype}")
    offset = weight.storage_offset() + region.offset // size
    return weight.as_strided(region.shape, [step // size for step in region.stride], offset)
