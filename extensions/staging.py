"""Where the tensors of an update are received: in the model, in one buffer of bounded size, or whole beside it."""

import torch

from extensions.bracket import Update
from extensions.pieces import Piece, aligned, part_of


class Staging:
    """The memory of one update. For every group, `places` says where its pieces go, and `settle` loads them from there.

    A tensor that the plan copies as it is, into one contiguous part of one parameter, is received in that part. Any
    other tensor that the plan copies is received in the buffer, piece by piece, and copied from there before the next
    group comes. A tensor that `load_weights` itself has to load is received whole, and let go once it is loaded.
    """

    def __init__(self, update: Update, device: torch.device, buffer_bytes: int) -> None:
        """`buffer_bytes` are the most that the pieces of any group take in the buffer."""
        self._update, self._device, self._buffer_bytes = update, device, buffer_bytes
        self._buffer: torch.Tensor | None = None
        self._buffered: list[tuple[str, int, torch.Tensor]] = []
        self._whole: dict[str, torch.Tensor] = {}

    def places(self, group: list[Piece]) -> list[torch.Tensor]:
        """Contiguous memory for each piece of a group. What is in the model counts as written from now on."""
        load, found, taken = self._update.load, [], 0
        for piece in group:
            place = load.place(piece.name)
            if place is not None:
                load.written_past([piece.name] if piece.is_last else [])
                found.append(part_of(place, piece))
            elif piece.name not in self._whole and load.takes_pieces(piece.name):
                there = self._in_buffer(taken, piece.nbytes)
                self._buffered.append((piece.name, piece.start, there))
                found.append(there)
                taken += aligned(piece.nbytes)
            else:
                found.append(part_of(self._whole_of(piece.name), piece))
        return found

    def settle(self, group: list[Piece]) -> None:
        """Load what has been received of a group, as far as it is not in the model."""
        buffered, self._buffered = self._buffered, []
        if buffered:
            self._update.load.load_pieces(buffered)
        ended = [piece.name for piece in group if piece.is_last]
        if whole := {name: self._whole.pop(name) for name in ended if name in self._whole}:
            self._update.take(whole)
        self._update.arrived.update(ended)

    def _in_buffer(self, begin: int, nbytes: int) -> torch.Tensor:
        if self._buffer is None:
            self._buffer = torch.empty(self._buffer_bytes, dtype=torch.uint8, device=self._device)
        return self._buffer[begin : begin + nbytes]

    def _whole_of(self, name: str) -> torch.Tensor:
        if name not in self._whole:
            dtype, shape = self._update.announced[name]
            self._whole[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._whole[name]
