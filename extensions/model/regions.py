"""Counting the elements of a tensor that lie in parts of it."""

import math
from dataclasses import dataclass

import torch

from extensions.model.twin import Region


@dataclass(frozen=True)
class Memory:
    """How large a tensor's memory is, and one element of it, in bytes."""

    nbytes: int
    itemsize: int

    @property
    def elements(self) -> int:
        return self.nbytes // self.itemsize


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
