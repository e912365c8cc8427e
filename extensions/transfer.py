"""Planned updates behind vLLM's own weight transfer, as the backend `planned`, from vLLM 0.25 on.

vLLM's worker builds the engine, and calls it for `init_weight_transfer_engine`, `start_weight_update`,
`update_weights` and `finish_weight_update`. The trainer sends by `extensions.planned.PlannedSender`.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.utils.import_utils import resolve_obj_by_qualname

from extensions.asleep import keep_asleep
from extensions.manifest import Manifest, ManifestError
from extensions.planned import PlannedWorkerExtension


@dataclass
class PlannedInitInfo(WeightTransferInitInfo):
    """Where the trainer serves the group; this engine's workers are its ranks from `rank_offset` on."""

    master_address: str
    master_port: int
    rank_offset: int
    world_size: int


@dataclass
class PlannedUpdateInfo(WeightTransferUpdateInfo):
    """All tensors of the update, in the order of sending. Empty where they are those of the update before."""

    names: list[str] = field(default_factory=list)
    dtype_names: list[str] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)


class Receiver(PlannedWorkerExtension):
    """What the extension has of vLLM's worker, for a model that vLLM gives to a transfer engine."""

    def __init__(self, model: torch.nn.Module, vllm_config: Any, device: torch.device) -> None:
        self.rank = vllm_config.parallel_config.rank
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.vllm_config, self.device = vllm_config, device


class PlannedTransferEngine(WeightTransferEngine[PlannedInitInfo, PlannedUpdateInfo]):
    """Receives a whole update by one call of `update_weights`, and loads it where the plan says."""

    init_info_cls = PlannedInitInfo
    update_info_cls = PlannedUpdateInfo
    supports_draft_weight_update = False
    _update: PlannedUpdateInfo | None = None  # the last one that was planned
    _digest = ""

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        """As vLLM's worker calls it."""
        super().__init__(config, vllm_config, device, model)
        self._receiver = Receiver(model, vllm_config, device)
        workers = resolve_obj_by_qualname(vllm_config.parallel_config.worker_cls)  # `--worker-cls`, or the platform's
        keep_asleep(workers, receiver_of)  # vLLM gives an engine the model, and not the worker that sleeps

    def init_transfer_engine(self, init_info: PlannedInitInfo) -> None:
        """Join the trainer's group, in place of one joined before."""
        self._receiver.init_weight_update_group(
            init_info.master_address, init_info.master_port, init_info.rank_offset, init_info.world_size
        )

    def start_weight_update(self) -> None:
        """Nothing: until tensors arrive, the model computes with what it has."""

    def receive_weights(self, update_info: PlannedUpdateInfo) -> None:
        """Receive and load the update. The model computes with the new weights when this returns.

        Raises ManifestError where the model can't take it, of which the sender hears, and otherwise as
        `receive_update`.
        """
        try:
            self._plan(update_info)
        except Exception:
            self._receiver._weight_sync_refuse()
            raise
        self._receiver.receive_update(self._digest)

    def _plan(self, update_info: PlannedUpdateInfo) -> None:
        """Plan an update, unless it is the one that was planned last, and the model is as it was then."""
        update = update_info if update_info.names else self._update
        if update != self._update or not self._receiver._weight_sync_has_planned(self._digest):
            self._digest = self._receiver.plan_update(manifest_from(update))
            self._update = update

    def finish_weight_update(self) -> None:
        """Nothing: `receive_weights` has finished every layer."""

    def shutdown(self) -> None:
        """Leave the group."""
        self._receiver.close_weight_update_group()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """vLLM before 0.28 wants a sender here, without a group."""
        raise NotImplementedError("send by extensions.planned.PlannedSender")


def receiver_of(worker: Any) -> Receiver | None:
    """What receives in a worker of vLLM's, where it is updated by this backend."""
    engine = getattr(worker, "weight_transfer_engine", None)
    return engine._receiver if isinstance(engine, PlannedTransferEngine) else None


def manifest_from(update: PlannedUpdateInfo | None) -> Manifest:
    """The manifest of what vLLM was told. Raises ManifestError where it was told nothing, or lists of other lengths."""
    if update is None:
        raise ManifestError("the first update names its tensors: names, dtype_names and shapes are empty")
    lengths = [len(column) for column in (update.names, update.dtype_names, update.shapes)]
    if len({*lengths}) != 1:
        raise ManifestError(f"names, dtype_names and shapes have one length, found {lengths}")
    columns = zip(update.names, update.dtype_names, update.shapes, strict=True)
    return [{"name": name, "dtype": dtype, "shape": [*shape]} for name, dtype, shape in columns]
