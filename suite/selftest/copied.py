"""Extensions written as those of vLLM's RLHF example are, which need no GPU: their group and handles are ours."""

import torch

from extensions.broadcast import WorkerExtension
from extensions.colocate import ColocateWorkerExtension


class TakesDtypes(WorkerExtension):
    """Its dtype is torch's, as in the first releases of the example."""

    def update_weight(self, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        """Receive one tensor and load it."""
        weight = torch.empty(shape, dtype=dtype, device=self.device)
        self._weight_sync_group.broadcast(weight, src=0)
        self._weight_sync_accept({name: weight})


class TakesNames(WorkerExtension):
    """Its dtype is text, as in later ones."""

    def update_weight(self, name: str, dtype_name: str, shape: list[int]) -> None:
        """Receive one tensor and load it."""
        weight = torch.empty(shape, dtype=getattr(torch, dtype_name), device=self.device)
        self._weight_sync_group.broadcast(weight, src=0)
        self._weight_sync_accept({name: weight})


class TakesPairs(ColocateWorkerExtension):
    """Its handles are torch's pairs, under what it reported; it knows its device from then on."""

    weight_sync_handles = "pairs"

    def report_device_id(self) -> str:
        """This worker's device, by a name of its own."""
        self.device_uuid = f"worker-{self.rank}"
        return self.device_uuid

    def update_weights_from_ipc_handles(self, ipc_handles: dict[str, dict[str, tuple]]) -> None:
        """Rebuild every tensor and load them all."""
        weights = {}
        for name, handle in ipc_handles[self.device_uuid].items():
            func, args = handle
            weights[name] = func(*list(args))
        self._weight_sync_accept(weights)
