"""How tensors are described between processes: dtypes as plain text (`bfloat16`), shapes, and bytes."""

import math

import torch

Shape = tuple[int, ...]

MAX_ELEMENTS = 2**48  # the bytes and strides of a tensor with fewer elements fit in 64 bits
MAX_DIMENSIONS = 64  # torch's own limit

# The dtypes that a floating-point parameter may be updated from. Narrower ones would need scales.
FLOATING_SOURCES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def dtype_of(value: "str | torch.dtype") -> torch.dtype:
    """The torch.dtype for `torch.bfloat16`, `"torch.bfloat16"` or `"bfloat16"`.

    Raises TypeError where the value is neither a string nor a dtype, ValueError where no dtype has that name.
    """
    if isinstance(value, torch.dtype):
        return value
    if not isinstance(value, str):
        raise TypeError(f"a dtype is a string such as 'bfloat16' or a torch.dtype, found {type(value).__name__}")
    dtype = getattr(torch, value.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{value!r} names no torch dtype; expected one like 'bfloat16' or 'torch.bfloat16'")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as plain text, `bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def is_shape(value: object) -> bool:
    """Whether `value` is a list or tuple of sizes, and torch can count the elements and strides of such a tensor.

    Strides count an empty dimension as 1, so `[0, 2**40, 2**40]` is too large.
    """
    if not isinstance(value, list | tuple) or len(value) > MAX_DIMENSIONS:
        return False
    if not all(type(size) is int and 0 <= size < MAX_ELEMENTS for size in value):
        return False
    return math.prod(max(1, size) for size in value) < MAX_ELEMENTS


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a contiguous tensor: uint8, one dimension, sharing its memory."""
    # In a contiguous tensor a dimension of size 1 may have any stride, and view(-1) would keep that stride.
    return tensor.detach().as_strided((tensor.numel(),), (1,)).view(torch.uint8)
