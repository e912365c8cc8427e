"""Copying many tensors to where they belong, prepared once for the updates by the same addresses.

On a GPU one kernel copies all of them. With a copy of each, the device starts and runs dry once a tensor.
"""

import functools
import warnings
from collections.abc import Callable, Sequence

import torch

from extensions.elements import INTEGERS

LARGE_BYTES = 16 * 2**20  # of a tensor that is copied alone, where there is no such kernel
Pair = tuple[torch.Tensor, torch.Tensor]  # a place, and the tensor that is copied there
Copy = Callable[[], None]


def copy_of(pairs: Sequence[Pair]) -> Copy:
    """What copies every tensor to its place when it is called; the device may still be at it when that returns.

    Pairs are of one dtype and shape, on one device, and may have strides. It is right as long as they are where they
    were.
    """
    fused = _fused_on(pairs[0][0].device) if pairs else None
    return PlainCopy(pairs) if fused is None else fused(pairs)


class PlainCopy:
    """By calls of torch: one for each large tensor, and one for all small ones."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._large = [pair for pair in pairs if pair[0].nbytes >= LARGE_BYTES]
        small = [pair for pair in pairs if pair[0].nbytes < LARGE_BYTES]
        self._small = tuple([_integers(tensor) for tensor in side] for side in zip(*small, strict=True))

    def __call__(self) -> None:
        for place, tensor in self._large:
            place.copy_(tensor)
        if self._small:
            torch._foreach_copy_(*self._small)


def _integers(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as integers, where there are integers of that size.

    One kernel that copies many tensors of floats computes with them, and changes the bits of a NaN.
    """
    return tensor.view(INTEGERS.get(tensor.element_size(), tensor.dtype))


@functools.cache
def _fused_on(device: torch.device) -> Callable[[Sequence[Pair]], Copy] | None:
    """What copies by one kernel on this device; None where nothing does."""
    if device.type != "cuda":
        return None
    try:
        from extensions.fused_copy import FusedCopy

        expect_right(FusedCopy, device)
    except Exception as error:  # Triton is not there, compiles nothing here, or is wrong
        said = f"updates by handle go without Triton's kernel, slower: {type(error).__name__}: {error}"
        warnings.warn(said, stacklevel=2)
        return None
    return FusedCopy


def expect_right(fused: Callable[[Sequence[Pair]], Copy], device: torch.device) -> None:
    """Raise ValueError where not every byte is copied, or others are written. What it compiles is used later."""
    sizes, apart = (0, 1, 16, 4096, 65_536, 100_000, 150_016), 2**18
    source = torch.arange(len(sizes) * apart, device=device).to(torch.uint8) | 1
    for shift in (0, 3):  # of the second, no address is aligned
        found, expected = torch.zeros_like(source), torch.zeros_like(source)
        parts = [slice(begin * apart + shift, begin * apart + shift + size) for begin, size in enumerate(sizes)]
        fused([(found[part], source[part]) for part in parts])()
        for part in parts:
            expected[part] = source[part]
        if not torch.equal(found, expected):
            raise ValueError("other bytes were copied than are right")
