"""verl's colocated rollout: its BucketedWeightSender in the trainer, its extension in vLLM's workers.

Every rank of the trainer packs its tensors into a bucket, which the worker of the same rank has mapped by CUDA IPC.
What is in a bucket is said over ZMQ, pickled: the worker unpickles what the socket sends whose path its environment
names.
"""

import asyncio
import importlib
import os
from collections.abc import Callable
from typing import ClassVar

from extensions.segments import RUN_ID
from suite.processes.blame import examined
from suite.stages import Stage
from suite.subjects.counted import Counted
from suite.subjects.foreign import IN_PACKS, Foreign, lacks, unfit_on_gpus
from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, Trainer, TrainerHalf

JOB = "VERL_RAY_JOB_ID"  # in the environment of its workers, to tell jobs of one machine apart
SENDERS = "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer"
BUCKET_MB = 2048  # of verl's own rollout configuration; its sender's default is 512
LORA = {"peft_type": "LORA"}  # with base weights, the worker looks at no more of it than that there is one
NO_HANDLES = IN_PACKS | {
    "devices.wrong_handle": "the trainer hands over nothing that names a device: sockets go by rank",
}


class VerlEngine(EngineHalf):
    """Calls update_weights_from_ipc on all workers; each takes what the trainer's rank of its own number sends."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        super().__init__(subject, engine)
        os.environ[JOB] = job()  # before the workers are made: they inherit it

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers take bucket after bucket, up to the last.

        As verl's trainer does, say where the engine takes adapters: the worker then finds vLLM's names of base weights.
        """
        self.engine.rpc("update_weights_from_ipc", LORA if self.engine.takes_adapters else None, False, False)


class VerlTrainer(TrainerHalf):
    """A BucketedWeightSender for every update. It has no deadline: where a worker fails, it waits to be ended."""

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Import the sender, which takes seconds: there is nobody to meet."""
        with examined():
            importlib.import_module(SENDERS)

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Send all tensors, as verl's rollout does, and wait until the engines have answered."""
        counted = Counted(tensors)
        with examined():
            sender = importlib.import_module(SENDERS).BucketedWeightSender(
                zmq_handle=address(self.trainer.rank),
                bucket_size_mb=BUCKET_MB,
                use_shm=False,
            )
            asyncio.run(sender.async_send_weights(iter(counted)))
        acknowledged()
        return counted.bytes_sent


class VerlSubject(Foreign):
    """`vLLMColocateWorkerExtension`, driven by verl's own sender."""

    distribution: ClassVar[str] = "verl"
    version: ClassVar[str] = "0.9.1"
    environment: ClassVar[str] = "verl"
    roofline: ClassVar[str] = "copy"
    calls: ClassVar[tuple[str, ...]] = (
        "BucketedWeightSender.async_send_weights(), in the trainer",
        "update_weights_from_ipc(peft_config=..., base_sync_done=False, use_shm=False); without LoRA peft_config=None",
        "LLM.reset_prefix_cache(), as verl's rollout does by clear_kv_cache",
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return VerlEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return VerlTrainer(self, trainer)

    def speakers(self, world_size: int) -> int:
        """Every rank feeds the worker of its own number."""
        return world_size

    def unfit(self, stage: Stage) -> str:
        """A worker takes from a rank of its own, on its own GPU."""
        if stage.kind == "cpu":
            return f"{stage.name}: verl 0.9.1 knows no CPU: its receiver calls torch.cuda"
        return unfit_on_gpus(stage)


def job() -> str:
    """What stands for Ray's job in the path of a socket: the id of this run, which every process of it has."""
    return os.environ[RUN_ID]


def address(rank: int) -> str:
    """The path at which verl's worker of this rank expects its sender."""
    return f"ipc:///tmp/rl-colocate-zmq-{job()}-replica-0-rank-{rank}.sock"


SUBJECT = VerlSubject(
    "verl",
    "verl.workers.rollout.vllm_rollout.utils:vLLMColocateWorkerExtension",
    lacks=lacks("vLLMColocateWorkerExtension") | NO_HANDLES,
)
