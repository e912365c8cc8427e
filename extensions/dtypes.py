"""One spelling for dtypes between processes: `bfloat16`, whatever the caller wrote."""

import torch

# What a floating-point parameter may be updated from. Narrower types would need scales, integers a meaning.
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
    """`bfloat16` for torch.bfloat16: plain text, which every serialiser passes."""
    return str(dtype).removeprefix("torch.")
