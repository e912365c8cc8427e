"""What a rank of the trainer holds of a tensor: its part, the whole of it, and its bits."""

from collections.abc import Iterable

import torch

from extensions.elements import integers
from extensions.tensors import flat_bytes

TURNED_BITS = 7  # the lowest of an element: of a bfloat16 number those are its mantissa


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, sharing memory."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def first_row(tensor: torch.Tensor, rank: int, world_size: int) -> int:
    """Where a rank's rows of the whole tensor begin: shards are cut as torch.chunk does."""
    rows = len(tensor)
    return min(rows, -(-rows // world_size) * rank)


def words(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's memory as int64 where its size allows, else as bytes: a sum of bytes takes eight times as long."""
    held = flat_bytes(tensor)
    return held.view(torch.int64) if (len(held) | held.storage_offset()) % 8 == 0 else held


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor; all ranks gather it together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def turn_bits(tensors: Iterable[torch.Tensor], one_in: int, seed: int) -> int:
    """Turn a bit in about one of so many elements of each tensor, at least in one. Done again, it is undone.

    Tensors are contiguous. Elements and bits follow from the seed. Returns how many elements those are.
    """
    turned = 0
    for number, tensor in enumerate(tensor for tensor in tensors if tensor.numel()):
        draw = torch.Generator(tensor.device).manual_seed(seed * 2**20 + number)
        flat = integers(tensor)
        step = min(one_in, len(flat))
        firsts = torch.arange(0, len(flat) - step + 1, step, device=tensor.device)
        at = firsts + torch.randint(step, firsts.shape, generator=draw, device=tensor.device)
        bits = 1 << torch.randint(TURNED_BITS, at.shape, generator=draw, device=tensor.device)
        flat[at] ^= bits.to(flat.dtype)
        turned += len(at)
    return turned
