"""Weights by broadcast: rank 0 of the trainer is rank 0 of a group, in which the workers receive tensor by tensor."""

from collections.abc import Callable
from typing import Any, ClassVar

from suite.stages import Stage
from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, Trainer, TrainerHalf

EXAMPLES_SENDER = "suite.subjects.example_senders:GroupSender"  # of an extension that names none
NO_GROUP_ON_CPU = (
    "the extension names no sender, so its group is vLLM's own PyNcclCommunicator, which broadcasts nothing without a"
    " GPU; name one of another group by weight_sync_sender"
)

NO_HANDLES = dict.fromkeys(
    ("devices.wrong_handle", "devices.missing_handle"), "weights come by broadcast: there are no handles"
)


class BroadcastEngine(EngineHalf):
    """Calls update_weight(name, dtype, shape) on all workers, for one tensor after the other."""

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Have the workers join the group."""
        self.engine.rpc("init_weight_update_group", address, port, rank_offset, world_size)

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers receive the tensors in the order of the manifest."""
        for entry in manifest:
            self.engine.rpc("update_weight", entry["name"], entry["dtype"], entry["shape"])


class BroadcastTrainer(TrainerHalf):
    """Has a sender, which rank 0 makes with (address, port, world_size, device) and calls with all tensors."""

    _sender: Any = None

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Serve the group."""
        self._sender = self.sender(EXAMPLES_SENDER, address, port, world_size, self.trainer.device)

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Broadcast every tensor: what has been received may be changed."""
        return self._sender.send(tensors)

    def abort(self, reason: str) -> None:
        """Have the sender give its group up, where it can."""
        if callable(getattr(self._sender, "abort", None)):
            self._sender.abort(reason)

    def close(self) -> None:
        """Leave the group."""
        if self._sender is not None:
            self._sender.close()


class Broadcast(Subject):
    """An extension that is driven by broadcast."""

    methods: ClassVar[tuple[str, ...]] = ("init_weight_update_group", "update_weight", "check_weights_changed")
    roofline: ClassVar[str] = "broadcast"
    calls: ClassVar[tuple[str, ...]] = (
        "init_weight_update_group(address, port, rank_offset, world_size), once",
        "begin_update(manifest), where the class has it",
        "update_weight(name, dtype, shape), for every tensor",
        "end_update(), where the class has it",
    )

    @classmethod
    def lacking(cls, extension: type) -> dict[str, str]:
        """Also what is said of handles."""
        return NO_HANDLES | super().lacking(extension)

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return BroadcastEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return BroadcastTrainer(self, trainer)

    def unfit(self, stage: Stage) -> str:
        """NCCL takes one rank a GPU; without GPUs there are only senders that are made for that."""
        if stage.kind == "cpu":
            return "" if self.sender else f"{stage.name}: {NO_GROUP_ON_CPU}"
        return unfit_on_gpus(stage)


def unfit_on_gpus(stage: Stage) -> str:
    """Why broadcast makes no sense on a stage of GPUs; empty where it does."""
    if stage.colocated and not stage.hosts_apart:
        return f"{stage.name}: trainer and engine share their GPUs, and NCCL takes one rank a GPU"
    return ""


SUBJECT = Broadcast(
    "broadcast",
    "extensions.broadcast:WorkerExtension",
    lacks=NO_HANDLES,
    sender="extensions.broadcast:BroadcastSender",
)
