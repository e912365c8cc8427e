"""How the trainer of vLLM's RLHF example sends; what sends to an extension that names no sender of its own."""

from collections.abc import Iterable

import torch

from extensions.colocate import HandleSender


class GroupSender:
    """Rank 0 of a group that is vLLM's own: StatelessProcessGroup and PyNcclCommunicator.

    It has no deadline and no abort(): where a worker is gone it waits until its process is ended.
    """

    def __init__(self, master_address: str, master_port: int, world_size: int, device: torch.device) -> None:
        """Wait for `world_size - 1` workers. Raises RuntimeError where the communicator would broadcast nothing."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        group = StatelessProcessGroup.create(host=master_address, port=master_port, rank=0, world_size=world_size)
        self._communicator, self._device = PyNcclCommunicator(group, device=device), device
        if self._communicator.disabled:
            raise RuntimeError(f"vLLM's PyNcclCommunicator is disabled on {device}: it would broadcast nothing")

    def send(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Broadcast every tensor, in the order of the workers' `update_weight` calls. Returns the bytes sent."""
        sent = 0
        for _, tensor in named_tensors:
            whole = tensor.detach().contiguous()
            self._communicator.broadcast(whole, src=0, stream=torch.cuda.current_stream(self._device))
            sent += whole.numel() * whole.element_size()
        torch.cuda.synchronize(self._device)
        return sent

    def close(self) -> None:
        """Forget the group. To leave it would wait for workers that may hang; it ends with the process."""
        self._communicator = None


class IpcSender(HandleSender):
    """Handles with the sender's ordinal of the device in them, as torch's `reduce_tensor` has it."""

    def handles(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, dict]]:
        """`{device id: {name: handle}}`, as plain data."""
        ordinal = torch.cuda.current_device() if self._device.index is None else self._device.index
        return {
            device: {name: handle | {"device_index": ordinal} for name, handle in named.items()}
            for device, named in super().handles(named_tensors).items()
        }
