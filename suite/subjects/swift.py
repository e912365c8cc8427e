"""ms-swift's rollout extension: buckets in GPU memory that the worker has mapped by CUDA IPC.

ms-swift's own BucketedWeightSender sends. What is in a bucket is said over ZMQ, pickled: the worker unpickles what
comes from the socket whose path it is given. That is in a directory which only this user can enter.
"""

import asyncio
import importlib
import os
import secrets
import tempfile
from collections.abc import Callable
from typing import Any, ClassVar

from suite.processes.blame import examined
from suite.stages import Stage
from suite.subjects.counted import Counted
from suite.subjects.foreign import IN_PACKS, PACKED, Foreign, lacks, no_adapters, unfit_on_gpus
from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, Trainer, TrainerHalf

SENDERS = "swift.ray.megatron.rollout.weight_transfer"
ASKED = "where an engine takes adapters, ms-swift's trainer asks it for its weights' names, which this adapter does not"
NO_HANDLES = IN_PACKS | {
    "devices.wrong_handle": "the trainer hands over the path of a socket, which names no device",
}


def deadline_s() -> int:
    """How long either side of ms-swift waits for the other: it can be told, and waits for 5 or 10 minutes else."""
    return round(float(os.environ.get("WEIGHT_UPDATE_TIMEOUT_S", "300")))


class SwiftEngine(EngineHalf):
    """Calls update_weights_from_ipc(use_shm, path, timeout) on all workers; the first one hears the trainer."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        super().__init__(subject, engine)
        self._socket = ""

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Keep the path of the trainer's socket. Raises ValueError for what is none."""
        manifest = super().receive(announced)
        self._socket = announced[0]["socket"]
        if not isinstance(self._socket, str):
            raise ValueError(f"the trainer sent no path of a socket, but {self._socket!r:.120}")
        return manifest

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers take bucket after bucket, up to the last, and load each."""
        self.engine.rpc("update_weights_from_ipc", False, self._socket, deadline_s())


class SwiftTrainer(TrainerHalf):
    """A BucketedWeightSender for every update."""

    _socket = ""

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Import the sender, which takes seconds: there is nobody to meet."""
        with examined():
            importlib.import_module(SENDERS)

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """{"socket": where this update's buckets are spoken of}."""
        self._socket = f"ipc://{tempfile.gettempdir()}/swift-{secrets.token_hex(4)}"
        return {"socket": self._socket}

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Send all tensors, as ms-swift's trainer does, and wait until the engine has answered: buckets are let go of
        before they are loaded."""
        counted = Counted(tensors)
        with examined():
            asyncio.run(self._send(counted))
        acknowledged()
        return counted.bytes_sent

    async def _send(self, tensors: Counted) -> None:
        sender = importlib.import_module(SENDERS).BucketedWeightSender
        async with sender(self._socket, use_shm=False, timeout_s=deadline_s()) as sending:
            await sending.handshake()
            await sending.send_weights(iter(tensors))


class Swift(Foreign):
    """`WeightSyncWorkerExtension`, by its update_weights_from_ipc()."""

    distribution: ClassVar[str] = "ms-swift"
    version: ClassVar[str] = "4.6.0"
    environment: ClassVar[str] = "ms-swift"
    roofline: ClassVar[str] = "copy"
    announces: ClassVar[tuple[str, ...]] = ("socket",)
    calls: ClassVar[tuple[str, ...]] = (
        "BucketedWeightSender.send_weights(), in the trainer",
        "update_weights_from_ipc(use_shm, zmq_handle, timeout_s)",
        "LLM.reset_prefix_cache(), as ms-swift's trainer does",
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return SwiftEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return SwiftTrainer(self, trainer)

    def unfit(self, stage: Stage) -> str:
        """Its one buffer lies on the GPU of the trainer's first rank."""
        if stage.kind == "cpu":
            return f"{stage.name}: {PACKED}"
        if stage.engine_ranks > 1:
            return f"{stage.name}: ms-swift's buffer lies on one GPU, and its workers would map it on several"
        return unfit_on_gpus(stage)


SUBJECT = Swift(
    "ms-swift",
    "swift.pipelines.infer.rollout:WeightSyncWorkerExtension",
    lacks=lacks("WeightSyncWorkerExtension")
    | no_adapters(ASKED)
    | NO_HANDLES
    | {"fanout.two_engines": "a socket serves one engine, and a sender's buckets go to one socket"},
)
