"""Positional checksums: one number for a tensor, which another order, another place or another bit changes.

The checksum of a tensor is the sum, modulo 2**64, of each element's bits times a weight that its position has. The
position is that in the tensor as it was announced, whatever part of it a rank holds and wherever. So the checksums of
parts add up to that of the whole, and those of an engine's fused and sharded weights to the trainer's.

It is computed on the tensor's device, in wrapping int64 arithmetic, piece by piece: beside the tensor it takes less
than PIECE_BYTES of memory. On GPUs the pieces are larger: launching their kernels is what takes time.
"""

import math
from collections.abc import Iterator, Sequence

import torch

PIECE_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
TEMPORARIES = 4  # of int64, that a piece is computed with
PIECE_ELEMENTS = {device: size // (8 * TEMPORARIES) for device, size in PIECE_BYTES.items()}
MIXER = 0x9E3779B97F4A7C15 - 2**64  # odd, as a signed 64-bit integer: neighbours get weights far from each other


def checksum(tensor: torch.Tensor, offset: int = 0, strides: Sequence[int] | None = None) -> int:
    """The checksum of a tensor, or of a part of one: an integer of 64 bits, with its sign.

    tensor: any dtype of 1 to 8 bytes, any device, contiguous or not. offset, strides: where the part's elements are in
    the whole, in elements; by default the tensor is the whole. Raises TypeError for a dtype of more than 8 bytes.
    """
    if tensor.element_size() > 8:
        raise TypeError(f"expected elements of 1 to 8 bytes, found {tensor.dtype}")
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for piece, positions in _pieces(tensor.detach(), offset, strides or _contiguous(tensor.shape)):
        # Every bit of the position in every weight: the product alone would make sums of far rows equal.
        weights = positions.mul_(MIXER)
        weights.bitwise_xor_(weights >> 29).mul_(MIXER).bitwise_or_(1)
        total += weights.mul_(_bits(piece)).sum()
    return int(total)


def added(checksums: Sequence[int]) -> int:
    """The checksum of a whole from those of its parts."""
    return (sum(checksums) + 2**63) % 2**64 - 2**63


def _pieces(tensor: torch.Tensor, offset: int, strides: Sequence[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Parts as small as the device asks, with the position of each of their elements (int64, of the same shape)."""
    if tensor.numel() == 0:
        return
    most = PIECE_ELEMENTS[tensor.device.type]
    if tensor.numel() > most:
        dim = max(range(tensor.ndim), key=lambda dim: (tensor.shape[dim] > 1, -dim))  # the outermost that can be cut
        rows = max(1, most // (tensor.numel() // tensor.shape[dim]))
        for start in range(0, tensor.shape[dim], rows):
            part = tensor.narrow(dim, start, min(rows, tensor.shape[dim] - start))
            yield from _pieces(part, offset + start * strides[dim], strides)
        return
    positions = torch.full((), offset, dtype=torch.int64, device=tensor.device)
    for size, stride in zip(tensor.shape, strides, strict=True):
        steps = torch.arange(size, dtype=torch.int64, device=tensor.device) * stride
        positions = positions.unsqueeze(-1) + steps
    yield tensor, positions


def _bits(piece: torch.Tensor) -> torch.Tensor:
    """Each element's bits as an integer of its size."""
    return piece.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[piece.element_size()])


def _contiguous(shape: torch.Size) -> list[int]:
    return [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
