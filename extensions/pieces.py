"""How an update is cut for its way: into groups of whole tensors, or of pieces that fit into a buffer.

Both ends cut by the announcement alone, so they cut alike. Whole tensors go straight to where they belong. Tensors are
cut into pieces where a receiver would otherwise hold more than STAGED_BYTES of a group beside its model.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from extensions.manifest import Announced
from extensions.tensors import flat_bytes

GROUP_BYTES = 512 * 2**20  # of whole tensors that are moved together
STAGED_BYTES = 48 * 2**20  # of pieces that are moved together, and of the buffer that receives them
GROUP_PIECES = 1024  # that are moved together at most: NCCL documents that it refuses more than 2048
ALIGNMENT_BYTES = 512  # pieces begin at multiples of this in their tensor and in the buffer


@dataclass(frozen=True)
class Piece:
    """`nbytes` bytes of a tensor from its byte `start` on, of `total`."""

    name: str
    start: int
    nbytes: int
    total: int

    @property
    def is_whole(self) -> bool:
        """Whether it is all of its tensor."""
        return self.nbytes == self.total

    @property
    def is_last(self) -> bool:
        """Whether its tensor ends with it."""
        return self.start + self.nbytes == self.total


Groups = list[list[Piece]]


def whole(announced: Announced, limit: int) -> Groups:
    """All tensors in their order, cut so that each group has at most `limit` bytes, or is one tensor."""
    groups, room = [[]], limit
    for name, nbytes in _sizes(announced):
        if groups[-1] and (nbytes > room or len(groups[-1]) == GROUP_PIECES):
            groups.append([])
            room = limit
        groups[-1].append(Piece(name, 0, nbytes, nbytes))
        room -= nbytes
    return groups


def cut(announced: Announced, limit: int) -> Groups:
    """All tensors in their order, in pieces of which each group takes at most `limit` bytes of a buffer."""
    groups, room = [[]], limit
    for name, total in _sizes(announced):
        for start, nbytes in _parts(total, room, limit):
            if aligned(nbytes) > room or len(groups[-1]) == GROUP_PIECES:
                groups.append([])
                room = limit
            groups[-1].append(Piece(name, start, nbytes, total))
            room -= aligned(nbytes)
    return groups


def room_for(groups: Groups, held: Callable[[Piece], bool]) -> int:
    """The bytes of a buffer that has room for the `held` pieces of any one group."""
    return max(sum(aligned(piece.nbytes) for piece in group if held(piece)) for group in groups)


def part_of(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    """The bytes of a contiguous tensor that a piece is, flat; the tensor itself where the piece is whole."""
    return tensor if piece.is_whole else flat_bytes(tensor)[piece.start : piece.start + piece.nbytes]


def aligned(nbytes: int) -> int:
    """The bytes that a piece takes in a buffer."""
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _parts(total: int, room: int, limit: int) -> Iterator[tuple[int, int]]:
    """(start, bytes) of the pieces of a tensor. The first has to fit into the room that a group has left."""
    first = min(total, room or limit)
    yield 0, first
    yield from ((start, min(limit, total - start)) for start in range(first, total, limit))


def _sizes(announced: Announced) -> Iterator[tuple[str, int]]:
    for name, (dtype, shape) in announced.items():
        yield name, math.prod(shape) * dtype.itemsize
