"""The worker extensions of vLLM's RLHF example, as plain as they are there: no bracket, no manifest, no checks."""

import torch


class WorkerExtension:
    """Receives tensor after tensor by NCCL."""

    def init_weight_update_group(
        self, master_address: str, master_port: int, rank_offset: int, world_size: int
    ) -> None:
        """Join the trainer's group."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.parallel_state import get_world_group
        from vllm.distributed.utils import StatelessProcessGroup

        rank = get_world_group().rank + rank_offset
        group = StatelessProcessGroup.create(host=master_address, port=master_port, rank=rank, world_size=world_size)
        self.model_update_group = PyNcclCommunicator(group, device=self.device)

    def update_weight(self, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        """Receive one tensor and load it."""
        weight = torch.empty(shape, dtype=dtype, device="cuda")
        self.model_update_group.broadcast(weight, src=0, stream=torch.cuda.current_stream())
        self.model_runner.model.load_weights([(name, weight)])
        del weight

    def check_weights_changed(self) -> bool:
        """Whether every parameter is zero."""
        weights_updated = True
        for _, parameter in self.model_runner.model.named_parameters():
            weights_updated = weights_updated and torch.allclose(parameter, torch.zeros_like(parameter))
        return weights_updated


class ColocateWorkerExtension:
    """Opens the trainer's tensors by CUDA IPC."""

    def report_device_id(self) -> str:
        """The UUID of this worker's GPU."""
        from vllm.platforms import current_platform

        self.device_uuid = current_platform.get_device_uuid(self.device.index)
        return self.device_uuid

    def update_weights_from_ipc_handles(self, ipc_handles: dict[str, dict[str, tuple]]) -> None:
        """Rebuild every tensor on this worker's GPU and load them all."""
        handles = ipc_handles[self.device_uuid]
        weights = []
        for name, handle in handles.items():
            func, args = handle
            list_args = list(args)
            list_args[6] = self.device.index  # the device of the sender may be called otherwise here
            tensor = func(*list_args)
            weights.append((name, tensor))
        self.model_runner.model.load_weights(weights)
        torch.cuda.synchronize()

    def check_weights_changed(self) -> bool:
        """Whether every parameter is zero."""
        weights_updated = True
        for _, parameter in self.model_runner.model.named_parameters():
            weights_updated = weights_updated and torch.allclose(parameter, torch.zeros_like(parameter))
        return weights_updated
