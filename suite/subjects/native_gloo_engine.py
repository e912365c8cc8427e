"""A weight-transfer engine over gloo, built and called by vLLM's worker as vLLM's own nccl engine is.

It does what that one does, call by call, but for the group: the references' has a deadline.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from extensions.group import Communicator, stateless_init_process_group
from extensions.tensors import dtype_of


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    """Where the trainer serves the group; this engine's workers are its ranks from `rank_offset` on."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    """The tensors that come, in their order."""

    names: list[str]
    dtype_names: list[str]
    shapes: list[list[int]]


class GlooTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    """Receives tensor by tensor from rank 0, and loads each through the model's own load_weights."""

    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo
    _group: Communicator | None = None

    def __init__(self, config: Any, *rest: Any) -> None:
        """`rest` is what this release of vLLM gives: see `native_versions`."""
        super().__init__(config, *rest)
        self._device = torch.device("cpu")

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        """Join the trainer's group, in place of one joined before."""
        self.shutdown()
        parallel = self.parallel_config
        rank = getattr(parallel, "data_parallel_index", 0) * parallel.world_size + parallel.rank
        self._group = stateless_init_process_group(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + rank,
            init_info.world_size,
            self._device,
        )

    def start_weight_update(self) -> None:
        """Have vLLM's layerwise reload take every layer apart."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: GlooUpdateInfo, load_weights: Any = None) -> None:
        """Receive and load. vLLM before 0.25 gives the loader, and runs the layerwise reload itself."""
        if self._group is None:
            raise RuntimeError("there is no group: call init_weight_transfer_engine() first")
        for named in self._received(update_info):
            (load_weights or self.model.load_weights)([named])

    def finish_weight_update(self) -> None:
        """Have layerwise reload put every layer together."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the group."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    @staticmethod
    def trainer_send_weights(iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: Any) -> None:
        """vLLM before 0.28 wants a sender here. The suite's trainer has its own."""
        raise NotImplementedError("the trainer sends by extensions.broadcast:BroadcastSender")

    def _received(self, update_info: GlooUpdateInfo) -> Iterator[tuple[str, torch.Tensor]]:
        for name, dtype, shape in zip(update_info.names, update_info.dtype_names, update_info.shapes, strict=True):
            tensor = torch.empty(shape, dtype=dtype_of(dtype), device=self._device)
            self._group.broadcast(tensor, src=0)
            yield name, tensor
