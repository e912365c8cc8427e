"""Parts of a tensor's memory, and how many of its elements lie in them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

Box = tuple[int, int]  # of a dimension: the first index, and how many


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


def overlaps(source: Region, target: Region, start: int, end: int) -> Iterator[tuple[Region, Region]]:
    """The part of a copy from `source` to `target`, regions of one shape, that reads a range of the source's bytes.

    Yields parts of both, of one shape each. The offsets of the source's parts count from `start`. No element may lie on
    both sides of `start` or `end`.
    """
    dims = sorted(zip(source.shape, source.stride, target.stride, strict=True), key=lambda dim: -dim[1])
    steps = [(size, step) for size, step, _ in dims]
    for box in _boxes(source.offset, steps, source.itemsize, start, end):
        shape = tuple(count for _, count in box)
        read, write = source.offset - start, target.offset
        for (first, _), (_, step, other) in zip(box, dims, strict=True):
            read, write = read + first * step, write + first * other
        yield (
            Region(read, shape, tuple(step for _, step, _ in dims), source.itemsize),
            Region(write, shape, tuple(other for _, _, other in dims), target.itemsize),
        )


def _boxes(offset: int, dims: list[tuple[int, int]], nbytes: int, start: int, end: int) -> Iterator[list[Box]]:
    """The elements between two bytes as boxes: (first index, number of indices) by dimension.

    Dimensions are (size, stride). An index of the first dimension that lies wholly in the range is not split.
    """
    if not dims:
        if start <= offset < end:
            yield []
        return
    (size, step), *inner = dims
    span = nbytes + sum((count - 1) * stride for count, stride in inner if count)
    if not step:
        yield from ([(0, size), *box] for box in _boxes(offset, inner, nbytes, start, end))
        return
    first = min(max(0, -(-(start - offset) // step)), size)
    behind = max(first, min(size, (end - span - offset) // step + 1))
    if first < behind:
        yield [(first, behind - first), *((0, count) for count, _ in inner)]
    touched = range(max(0, (start - offset - span) // step + 1), min(size, -(-(end - offset) // step)))
    for index in (index for index in touched if not first <= index < behind):
        yield from ([(index, 1), *box] for box in _boxes(offset + index * step, inner, nbytes, start, end))


def elements_filled(regions: list[Region], memory: Memory) -> dict[int, int]:
    """`{number of regions: how many of the tensor's elements lie in that many of them}`."""
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
