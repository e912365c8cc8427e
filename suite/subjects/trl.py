"""TRL's extension for a vLLM server, as its releases up to 1.10 have it: a call, a broadcast and a barrier a tensor.

Its client forms the group with vLLM's own classes, as the last rank: the worker of rank 0 serves it.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from suite.processes.blame import examined
from suite.stages import Stage
from suite.subjects.broadcast import NO_HANDLES, unfit_on_gpus
from suite.subjects.counted import Contiguous
from suite.subjects.foreign import Foreign, lacks, no_adapters
from suite.subjects.protocol import Engine, EngineHalf, Tensors, Trainer, TrainerHalf

ANOTHER = "of the trainer"  # where the worker asks for the client's device, to refuse its own
MERGED = "trl vllm-serve starts no engine that takes LoRA adapters: TRL's trainer merges them before it sends"
ONE_SERVER = {"fanout.two_engines": "its ranks are those of one server's workers, and the client's after them"}


class TrlEngine(EngineHalf):
    """Calls update_named_param(name, dtype, shape) on all workers, for one tensor after the other."""

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Have the workers leave the group there was and serve a new one."""
        self.engine.rpc("close_communicator")
        self.engine.rpc("init_communicator", address, port, world_size, ANOTHER)

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers receive the tensors in the order of the manifest."""
        for entry in manifest:
            self.engine.rpc("update_named_param", entry["name"], f"torch.{entry['dtype']}", entry["shape"])


class LastRankTrainer(TrainerHalf):
    """Does what VLLMClient does beside its requests. It has no deadline: without a worker, it waits to be ended."""

    _communicator: Any = None
    _rank = 0

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Join the workers' group as its last rank. Raises RuntimeError where it would broadcast nothing."""
        from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
        from vllm.distributed.utils import StatelessProcessGroup

        self._rank = world_size - 1
        with examined():
            group = StatelessProcessGroup.create(host=address, port=port, rank=self._rank, world_size=world_size)
            self._communicator = PyNcclCommunicator(group, device=self.trainer.device)
        if self._communicator.disabled:
            raise RuntimeError(f"vLLM's PyNcclCommunicator is disabled on {self.trainer.device}: it broadcasts nothing")

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Broadcast every tensor, and meet the workers after each."""
        counted = Contiguous(tensors)
        for _, whole in counted:
            with examined():
                self._communicator.broadcast(whole, src=self._rank)
                self._communicator.group.barrier()
        return counted.bytes_sent

    def close(self) -> None:
        """Forget the group: to leave it would wait for workers that may hang."""
        self._communicator = None


class Trl(Foreign):
    """`WeightSyncWorkerExtension` of `trl vllm-serve`."""

    distribution: ClassVar[str] = "trl"
    version: ClassVar[str] = "1.10.0"
    environment: ClassVar[str] = "trl"
    roofline: ClassVar[str] = "broadcast"
    calls: ClassVar[tuple[str, ...]] = (
        "init_communicator(host, port, world_size, client_device_uuid), once",
        "update_named_param(name, dtype, shape), for every tensor",
        "LLM.reset_prefix_cache(), as TRL's trainer does",
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return TrlEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return LastRankTrainer(self, trainer)

    def unfit(self, stage: Stage) -> str:
        """Its group is vLLM's PyNcclCommunicator."""
        if stage.kind == "cpu":
            return f"{stage.name}: TRL's extension receives by NCCL"
        return unfit_on_gpus(stage)


SUBJECT = Trl(
    "trl",
    "trl.scripts.vllm_serve:WeightSyncWorkerExtension",
    lacks=lacks("WeightSyncWorkerExtension") | no_adapters(MERGED) | NO_HANDLES | ONE_SERVER,
)
