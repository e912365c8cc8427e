"""Seeded weights: every element is a function of (tensor name, seed, position).

The same bits on every device, whole or in slices. Two seeds that differ modulo 4 give different values in every
element, also once rounded to bfloat16.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Shape = tuple[int, ...]

# How far weights reach, chosen by measuring (see `_spread`): the two best logits are 1.6 apart in the middle and 0.5 or
# more in 8 of 10 positions, two bfloat16 computations of one logit differ by less than that, and exchanging any one
# tensor of a tiny model is seen in its tokens.
LOGIT_STD = 8.0
RESIDUAL_GAIN = 16.0
EXPERT_GAIN = 2.0
ROUTER_GAIN = 16.0
NORM_SPREAD = 0.25
BIAS_SPREAD = 0.5

SCALES = {"weight_scale_inv": 1.0, ".scales": 0.01}  # of quantised weights: positive

# Elements computed at once: whatever the tensor's size, scratch memory is about 100 MB, and on GPUs, where launching
# kernels is what takes time, 800 MB.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}


def values(name: str, shape: Shape, seed: int, dtype: torch.dtype | str) -> torch.Tensor:
    """The tensor `name` of the checkpoint written from `seed`: `shape`, `dtype`, on the CPU."""
    import torch

    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    out = torch.empty(shape, dtype=dtype)
    fill_values(out, name, shape, seed)
    return out


def fill_values(out: torch.Tensor, name: str, shape: Shape, seed: int, start: int = 0) -> None:
    """Write elements [start, start + out.numel()) of the flattened tensor `name` of `shape` into contiguous `out`.

    `out` may have any floating dtype, be on any device, and be a shard; the bits are those of `values`. Integers of 32
    bits get any bits.
    """
    flat = out.view(-1)
    if not out.dtype.is_floating_point:
        _fill_integers(flat, name, seed, start)
        return
    middle, width = _spread(name, shape)
    chunk = CHUNK_ELEMENTS[out.device.type]
    for low in range(0, flat.numel(), chunk):
        high = min(low + chunk, flat.numel())
        flat[low:high] = _elements(name, seed, start + low, start + high, middle, width, out.device)


def _fill_integers(flat: torch.Tensor, name: str, seed: int, start: int) -> None:
    import torch

    position = torch.arange(start, start + flat.numel(), dtype=torch.int64, device=flat.device).to(torch.int32)
    flat.copy_(_scrambled(position, zlib.crc32(f"{seed} {name}".encode())))


def _spread(name: str, shape: Shape) -> tuple[float, float]:
    """(middle, half width) of the uniform distribution that the tensor's elements come from.

    Norms, which are the weights of one dimension, lie around 1; biases and whatever else has one dimension are half as
    wide as what they are added to. The output layer gives logits of standard deviation LOGIT_STD. What writes into the
    residual stream has a gain, without which a tied output layer repeats the token it was given. Where two experts are
    nearly equal, rounding decides between them: the router's gain makes that rare, the experts' smaller gain harmless.
    """
    if name.endswith("norm.weight") or (len(shape) < 2 and name.endswith("weight")):
        return 1.0, NORM_SPREAD
    if name.endswith(".bias") or len(shape) < 2:
        return 0.0, BIAS_SPREAD
    scale = next((size for ending, size in SCALES.items() if name.endswith(ending)), 0.0)
    if scale:
        return scale, scale / 2
    gain = 1.0
    if name in ("model.embed_tokens.weight", "lm_head.weight"):
        gain = LOGIT_STD
    elif name.endswith("mlp.gate.weight"):
        gain = ROUTER_GAIN
    elif name.endswith("down_proj.weight") and ".experts." in name:
        gain = EXPERT_GAIN
    elif name.endswith(("o_proj.weight", "down_proj.weight")):
        gain = RESIDUAL_GAIN
    return 0.0, gain * math.sqrt(3 / shape[-1])


def _elements(
    name: str, seed: int, start: int, stop: int, middle: float, width: float, device: torch.device
) -> torch.Tensor:
    """Elements [start, stop) as float32.

    seed % 4 sits in the two lowest bits that bfloat16 keeps. The 16 bits below, which rounding drops, depend on the
    name and the position but not on the seed and are never half way: all seeds round in the same direction, and
    stay apart.
    """
    import torch

    position = torch.arange(start, stop, dtype=torch.int64, device=device).to(torch.int32)
    tail = (_scrambled(position, zlib.crc32(name.encode())) & 0xFFFF) | 1
    mixed = _scrambled(position, zlib.crc32(f"{seed} {name}".encode()))
    # An odd 24-bit integer: exact in float32 on every device, and never zero.
    bits = (((mixed >> 9) * 2) | 1).to(torch.float32).mul_(width / 2**23).add_(middle).view(torch.int32)
    return ((bits & ~0x3FFFF) | (seed % 4 << 16) | tail).view(torch.float32)


def _scrambled(position: torch.Tensor, key: int) -> torch.Tensor:
    """Murmur3's mixing of 32-bit integers, in wrapping int32 arithmetic, the same on every device."""
    mixed = position * _signed(0x9E3779B1) + _signed(key)
    mixed ^= (mixed >> 16) & 0xFFFF
    mixed *= _signed(0x85EBCA6B)
    mixed ^= _signed(key * 0x27D4EB2F)  # without it, another key would only shift the sequence
    mixed ^= (mixed >> 13) & 0x7FFFF
    mixed *= _signed(0xC2B2AE35)
    mixed ^= (mixed >> 16) & 0xFFFF
    return mixed


def _signed(number: int) -> int:
    """The int32 with the low 32 bits of `number`."""
    return (number + 2**31) % 2**32 - 2**31
