"""Parts of a tensor's memory, and how many of its elements lie in them."""

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Region:
    """A part of a tensor's memory: offset and strides in bytes from the tensor's begin, shape in elements."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    itemsize: int

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Memory:
    """How large a tensor's memory is, and one element of it, in bytes."""

    nbytes: int
    itemsize: int

    @property
    def elements(self) -> int:
        return self.nbytes // self.itemsize


def memory_id(tensor: torch.Tensor) -> int:
    """The same for two tensors that share memory; another for any two that do not and are there at the same time."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata  # empty and meta storages all have address 0


def region_of(tensor: torch.Tensor) -> Region:
    """The part of its memory that a tensor is a view of."""
    size = tensor.element_size()
    stride = tuple(step * size for step in tensor.stride())
    return Region(tensor.storage_offset() * size, tuple(tensor.shape), stride, size)


def part(tensor: torch.Tensor, region: Region) -> torch.Tensor:
    """The part of a tensor that a region is."""
    size = region.itemsize
    stride = [step // size for step in region.stride]
    return tensor.as_strided(region.shape, stride, tensor.storage_offset() + region.offset // size)


def elements_filled(regions: list[Region], memory: Memory) -> dict[int, int]:
    """How many elements of a tensor lie in how many of the regions: `{number of regions: elements}`."""
    runs = [_runs(region) for region in regions if region.elements]
    # Counted in blocks: the largest unit in which no region begins, ends or jumps anywhere but between two blocks.
    sizes = [size for offset, outer, run in runs for size in (offset, run, *(step for _, step in outer))]
    block = math.gcd(memory.nbytes, *sizes)
    if not block:
        return {}
    counts = torch.zeros(memory.nbytes // block, dtype=torch.int32)
    for offset, outer, run in runs:
        shape = [*(size for size, _ in outer), run // block]
        stride = [*(step // block for _, step in outer), 1]
        counts.as_strided(shape, stride, offset // block).add_(1)
    times, blocks = counts.unique(return_counts=True)
    return {time: n * block // memory.itemsize for time, n in zip(times.tolist(), blocks.tolist(), strict=True)}


def _runs(region: Region) -> tuple[int, list[tuple[int, int]], int]:
    """A region as runs of bytes without a gap: offset, (number, stride) of the runs by dimension, and their length."""
    dims = sorted(
        ((size, step) for size, step in zip(region.shape, region.stride, strict=True) if size > 1 and step),
        key=lambda dim: -dim[1],
    )
    run = region.itemsize
    while dims and dims[-1][1] == run:
        run *= dims.pop()[0]
    return region.offset, dims, run
