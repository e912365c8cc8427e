"""Triton's kernel for copying many tensors by one launch: each is cut into tiles, of which each is one program's."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl

from extensions.copying import Pair, PlainCopy
from extensions.kernels import tables

WORD_BYTES = 8
ALIGNED_BYTES = 16  # that a thread moves at once
TILE, WARPS = 16384, 32  # words of a program, and its warps: of 8 to 256 KiB, 128 are fastest on an H200 (2100 GB/s)


@triton.jit
def _copy(parts, of_tile, tile: tl.constexpr, aligned: tl.constexpr):
    """Copy a tile. A row of `parts`: source, place, first tile, words."""
    program = tl.program_id(0)
    row = parts + tl.load(of_tile + program).to(tl.int64) * 4
    source = tl.multiple_of(tl.load(row).to(tl.pointer_type(tl.int64)), aligned)
    place = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(tl.int64)), aligned)
    words = tl.multiple_of(tl.load(row + 3), aligned // 8)
    first = (program - tl.load(row + 2)) * tile
    at = first + tl.arange(0, tile)
    if first + tile <= words:
        tl.store(place + at, tl.load(source + at))
    else:
        there = at < words
        tl.store(place + at, tl.load(source + at, mask=there), mask=there)


class FusedCopy:
    """As `PlainCopy`, by one launch. Those that are not contiguous, or not aligned, are left to that."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        fused = sorted(filter(_is_flat, pairs), key=lambda pair: -pair[0].nbytes)  # the device ends on small ones
        self._rest = PlainCopy([pair for pair in pairs if not _is_flat(pair)])
        self._kept = fused  # their memory stays theirs as long as there is a table of its addresses
        counts = [place.nbytes // WORD_BYTES for place, _ in fused]
        tiles = [-(-count // TILE) for count in counts]
        firsts = [*accumulate(tiles, initial=0)]
        rows = [
            [tensor.data_ptr(), place.data_ptr(), first, count]
            for (place, tensor), first, count in zip(fused, firsts, counts, strict=False)
        ]
        self._grid = (firsts[-1],)
        self._tables = tables(rows, tiles, fused[0][0].device) if rows else ()

    def __call__(self) -> None:
        if self._tables:
            with torch.cuda.device_of(self._tables[0]):
                _copy[self._grid](*self._tables, tile=TILE, aligned=ALIGNED_BYTES, num_warps=WARPS)
        self._rest()


def _is_flat(pair: Pair) -> bool:
    """Whether both are whole words at aligned addresses, one behind the other: the kernel knows no strides."""
    if not all(tensor.is_contiguous() for tensor in pair):
        return False
    numbers = (number for tensor in pair for number in (tensor.data_ptr(), tensor.nbytes))
    return pair[0].nbytes > 0 and not any(number % ALIGNED_BYTES for number in numbers)
