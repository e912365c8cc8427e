"""The trainer's half of a broadcast that shows what the hardware takes for the bytes of an update."""

import time

import torch

from extensions.devices import synchronize
from extensions.group import Communicator, stateless_init_process_group
from suite.actors import memory
from suite.processes.blame import of_the_suite


class Roofline:
    """Rank 0 of a group with the probes in an engine's workers."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._group: Communicator | None = None
        self._buffer: torch.Tensor | None = None

    @of_the_suite("join the roofline's group")
    def join(self, address: str, port: int, world_size: int) -> None:
        """Serve the probes' group; an earlier one is closed."""
        self.close()
        self._group = stateless_init_process_group(address, port, 0, world_size, self._device)

    @of_the_suite("broadcast for a roofline")
    def send(self, nbytes: int) -> dict:
        """Broadcast `nbytes`, piece by piece; returns when it started and ended (monotonic clock)."""
        piece = min(nbytes, memory.PIECE_BYTES)
        if self._buffer is None or self._buffer.numel() != piece:
            self._buffer = torch.ones(piece, dtype=torch.uint8, device=self._device)
        started = time.monotonic()
        for count in memory.pieces(nbytes):
            self._group.broadcast(self._buffer[:count], src=0)
        synchronize(self._device)
        return {"started_s": started, "ended_s": time.monotonic()}

    def forget(self) -> None:
        """Free the buffer; it is made again when it is needed."""
        self._buffer = None

    def close(self) -> None:
        """Leave the group and free the buffer."""
        if self._group is not None:
            self._group.close()
        self._group = self._buffer = None
