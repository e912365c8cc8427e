"""What drives vLLM's own senders in rank 0 of a trainer, each made with (address, port, world_size, packed).

vLLM's sender drives the engine through a client. Here the suite's dialogue does that, and the client waits for it.
"""

from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import Any, Protocol

import torch

from extensions.tensors import dtype_of
from suite.processes.blame import Examined, examined
from suite.subjects.native_versions import installed

Named = Iterable[tuple[str, torch.Tensor]]


class Sent(Named, Protocol):
    """Contiguous tensors by name."""

    def manifest(self) -> list[dict]:
        """[{"name", "dtype", "shape"}, ...] of all, in their order."""


class StaticSender:
    """Static methods of the engine's class, up to vLLM 0.27."""

    def __init__(self, address: str, port: int, world_size: int, packed: bool) -> None:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        meeting = {"master_address": address, "master_port": port, "world_size": world_size}
        self._engine, self._packed = Examined(NCCLWeightTransferEngine), packed
        self._group = self._engine.trainer_init(meeting)

    def send(self, tensors: Sent, acknowledged: Callable[[], None]) -> None:
        """Broadcast, and wait until the GPU has: vLLM's method does not."""
        self._engine.trainer_send_weights(iter(tensors), {"group": self._group, "packed": self._packed})
        torch.cuda.synchronize()


class Client:
    """What vLLM's sender takes for the engine. Only the answer to update_weights is waited for.

    acknowledged: waits until all engines have ended the update, and raises where one refuses.
    """

    def __init__(self) -> None:
        self.acknowledged: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """The engine's half has said so already."""

    def start_weight_update(self) -> None:
        """The engine's half has started it before the trainer was told to go."""

    def update_weights(self, update_info: Any) -> None:
        """Called by vLLM in a thread beside the broadcast."""
        self.acknowledged()

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """The engine's half has finished it before it acknowledged."""


class TrainerSender:
    """A trainer engine of vLLM, from 0.28."""

    def __init__(self, address: str, port: int, world_size: int, packed: bool) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        self._client = Client()
        meeting = NCCLTrainerInitInfo(
            master_address=address, master_port=port, world_size=world_size, packed=packed, rank=0
        )
        source = source_class()(None)
        with examined():
            self._engine = WeightTransferTrainerFactory.trainer_init(meeting, client=self._client, source=source)

    def send(self, tensors: Sent, acknowledged: Callable[[], None]) -> None:
        """Have it send what this update holds, in place of what the one before held."""
        self._client.acknowledged, self._engine.source = acknowledged, source_class()(tensors)
        with examined():
            self._engine.send_weights()


class SparseSender:
    """A trainer engine of vLLM for sparse patches, of which every element is sent."""

    def __init__(self, address: str, port: int, world_size: int, packed: bool) -> None:
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLTrainerInitInfo, SparseWeightPatch

        self._client, self._patch = Client(), SparseWeightPatch
        meeting = SparseNCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0)
        with examined():
            self._engine = Examined(WeightTransferTrainerFactory.trainer_init(meeting, client=self._client))

    def send(self, tensors: Sent, acknowledged: Callable[[], None]) -> None:
        """Send a patch for every tensor."""
        self._client.acknowledged = acknowledged
        self._engine.send_weights([self._whole(name, tensor) for name, tensor in tensors])

    def _whole(self, name: str, tensor: torch.Tensor) -> Any:
        indices = torch.arange(tensor.numel(), dtype=torch.int32, device=tensor.device)
        return self._patch(name=name, indices=indices, values=tensor.reshape(-1), full_shape=tuple(tensor.shape))


class Held:
    """The tensors of one update: what a source of every release has."""

    def __init__(self, tensors: Sent | None) -> None:
        from vllm.distributed.weight_transfer.base import ParamMeta

        manifest = tensors.manifest() if tensors else []
        self.tensors: Named = tensors or ()
        self.described = [ParamMeta(e["name"], dtype_of(e["dtype"]), tuple(e["shape"])) for e in manifest]


@cache
def source_class() -> type:
    """The WeightSource of the installed vLLM, made with what `Held` is made with."""
    from vllm.distributed.weight_transfer.base import WeightSource

    if installed().source_iterates:
        members = {"metadata": lambda self: self.described, "__iter__": lambda self: iter(self.tensors)}
    else:
        metadata = cached_property(lambda self: self.described)
        members = {"metadata": metadata, "iter_full": lambda self: iter(self.tensors)}
    return type("Source", (Held, WeightSource), members)
