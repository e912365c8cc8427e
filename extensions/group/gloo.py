"""The communicator of CPU tensors."""

from datetime import timedelta

import torch

from extensions.group.basics import GroupError, as_bytes, first_line

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class GlooCommunicator:
    """Broadcasts of CPU tensors."""

    def __init__(
        self,
        store: torch.distributed.TCPStore,
        rank: int,
        world_size: int,
        device: torch.device,
        address: str,
        timeout_s: float,
    ) -> None:
        from torch.distributed import PrefixStore, ProcessGroupGloo

        self.rank, self.world_size, self.device = rank, world_size, device
        self._store = store  # rank 0 serves the others through it
        options = ProcessGroupGloo._Options()
        # A host whose own name resolves to nothing would fail where all ranks are on it.
        local = address in LOOPBACK
        options._devices = [
            ProcessGroupGloo.create_device(hostname="127.0.0.1") if local else ProcessGroupGloo.create_default_device()
        ]
        options._timeout = timedelta(seconds=timeout_s)
        self._group: ProcessGroupGloo | None = ProcessGroupGloo(PrefixStore("gloo", store), rank, world_size, options)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: "torch.cuda.Stream | None" = None) -> None:
        if self._group is None:
            raise GroupError("this communicator is closed")
        options = torch.distributed.BroadcastOptions()
        options.rootRank = src
        # As bytes: gloo does not know every dtype, and moves them all alike.
        try:
            self._group.broadcast([as_bytes(tensor, self.device)], options).wait()
        except RuntimeError as error:
            raise GroupError(f"rank {self.rank}: the broadcast was given up ({first_line(error)})") from error

    def wait(self) -> None:
        pass  # every broadcast has ended when it returns

    def close(self) -> None:
        self._group = None
        self._store = None
