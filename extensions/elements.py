"""Finding the elements in which tensors differ, and writing elements to where they belong, in torch alone.

`extensions.kernels` does the same on GPUs by Triton, in one pass and without a launch for each tensor. Elements are
compared and moved as integers of their size: -0 is not 0, and a NaN is equal to itself and to no other NaN.
"""

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
COMPARED = 2**24  # elements compared at a time, since comparing takes memory
MAX_POSITION = 2**31 - 1

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Destination:
    """Where the elements of a tensor go, in a model or in a copy of it, by their position in the flat tensor.

    elements: how many the tensor has. offset: the position of the first that goes here.
    steps: by dimension (step between positions, size, step in the memory), the largest step first.
    memory: what follows from the place of the first element on, as integers in one dimension.
    """

    elements: int
    offset: int
    steps: tuple[tuple[int, int, int], ...]
    memory: torch.Tensor

    @classmethod
    def whole(cls, tensor: torch.Tensor) -> "Destination":
        """All elements of a contiguous tensor."""
        memory = integers(tensor)
        return cls(len(memory), 0, ((1, len(memory), 1),), memory)

    @property
    def is_run(self) -> bool:
        """Whether neighbours in the flat tensor are neighbours in the memory too."""
        return len(self.steps) == 1 and self.steps[0][::2] == (1, 1)


@dataclass(frozen=True)
class Segment:
    """`count` elements of a buffer, from index `begin` on, that belong to one tensor."""

    begin: int
    count: int
    into: Destination


@dataclass(frozen=True)
class Found:
    """Elements that differ. counts: of each pair. positions: int32, in the flat tensor. values: integers."""

    counts: list[int]
    positions: torch.Tensor
    values: torch.Tensor


class Elements(Protocol):
    """How elements are found and written on a device."""

    def changed(self, pairs: Sequence[Pair], at_most: int) -> Found | None:
        """Find the elements in which the first of each pair differs from the second, and write them into the second.

        Pairs are flat tensors of one integer dtype. Returns None where more than `at_most` differ; what the
        second ones hold is unknown then.
        """

    def write(self, segments: Sequence[Segment], positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Write the elements of each segment into its destination, and skip those that lie outside of it.

        positions: int32. values: integers of the size of the destinations' elements. Returns one element: not 0 where
        some position lies outside its tensor. For that position nothing is written. The host does not wait for the
        device.
        """


class PlainElements:
    """With a few calls of torch for each tensor."""

    def changed(self, pairs: Sequence[Pair], at_most: int) -> Found | None:
        """As Elements."""
        counts, positions, values = [], [], []
        for now, before in pairs:
            counts.append(0)
            for start in range(0, len(now), COMPARED):
                new, old = now[start : start + COMPARED], before[start : start + COMPARED]
                found = differing(new, old)
                counts[-1] += len(found)
                if sum(counts) > at_most:
                    return None
                values.append(new[found])
                old.index_copy_(0, found, values[-1])
                positions.append((found + start).to(torch.int32))
        if not positions:
            return Found(counts, *(torch.empty(0, dtype=dtype) for dtype in (torch.int32, torch.int8)))
        return Found(counts, torch.cat(positions), torch.cat(values))

    def write(self, segments: Sequence[Segment], positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """As Elements; on a GPU the host does wait."""
        wrong = torch.zeros(1, dtype=torch.bool, device=positions.device)
        for segment in segments:
            part = slice(segment.begin, segment.begin + segment.count)
            at, into = positions[part].to(torch.int64), segment.into
            inside = (at >= 0) & (at < into.elements)
            wrong |= ~inside.all()
            left = at - into.offset
            here, to = inside & (left >= 0), torch.zeros_like(left)
            for step, size, on in into.steps:
                index = left.div(step, rounding_mode="floor")
                left = left - index * step
                here &= index < size
                to += index * on
            here &= left == 0
            into.memory.index_copy_(0, to[here], values[part][here])
        return wrong


def differing(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """The positions, int64, at which two flat tensors of one integer dtype differ.

    Where both consist of whole words of 8 bytes, these are compared first, then the elements of those that differ.
    """
    per = 8 // new.element_size()
    begins = (tensor.storage_offset() % per or tensor.data_ptr() % 8 for tensor in (new, old))
    if per == 1 or len(new) % per or any(begins):
        return _true(new != old)
    words = _true(new.view(torch.int64) != old.view(torch.int64))
    parts = _true((new.view(-1, per)[words] != old.view(-1, per)[words]).view(-1))
    return words[parts // per] * per + parts % per


def _true(flags: torch.Tensor) -> torch.Tensor:
    """Where a flat tensor of flags is true. On a CPU, numpy finds a few among many five times as fast as torch."""
    if flags.device.type == "cpu":
        return torch.from_numpy(numpy.flatnonzero(flags.numpy()))
    return flags.nonzero().view(-1)


def integers(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor as integers: one dimension, sharing its memory."""
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.view(INTEGERS[tensor.element_size()])


@functools.cache
def elements_on(device: torch.device) -> Elements:
    """What finds and writes elements on a device: Triton's kernels on a GPU where they work, else torch alone."""
    if device.type != "cuda":
        return PlainElements()
    try:
        from extensions.kernels import FusedElements

        expect_right(FusedElements(), device)
    except Exception as error:  # Triton is missing, cannot compile here, or computes wrongly
        warnings.warn(
            f"sparse updates go without Triton's kernels, slower: {type(error).__name__}: {error}", stacklevel=2
        )
        return PlainElements()
    return FusedElements()


def expect_right(elements: Elements, device: torch.device, dtypes: Sequence[torch.dtype] = (torch.int16,)) -> None:
    """Raise ValueError where the results differ from those of PlainElements. The compiled kernels are kept for use."""
    for dtype in dtypes:
        told = []
        for one in (PlainElements(), elements):
            now = torch.arange(9001, device=device).to(dtype)
            before, into = now.clone(), torch.zeros(64, 64, dtype=dtype, device=device)
            before[::7], before[4095:4100], before[-1] = 1, 2, 3
            pairs = [(now[:5001], before[:5001]), (now[5001:], before[5001:])]
            found = one.changed(pairs, len(now))
            shard = Destination(5001, 5, ((128, 32, 64), (1, 64, 1)), into.view(-1))
            segments = [Segment(0, found.counts[0], shard)]
            wrong = one.write(segments, found.positions, found.values).item()
            told += [
                found.counts,
                found.positions.tolist(),
                found.values.tolist(),
                before.tolist(),
                into.tolist(),
                wrong,
            ]
        if told[:6] != told[6:]:
            raise ValueError(f"other elements of {dtype} were found or written than are right")
