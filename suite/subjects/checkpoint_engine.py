"""MoonshotAI's checkpoint-engine: its ParameterServer in the trainer, its extension in vLLM's workers.

The trainer's tensors go to pinned host memory, to the GPU, and bucket by bucket into a buffer that the worker has
mapped by CUDA IPC. What is in a bucket is said over ZMQ, pickled: the worker unpickles what comes from the address that
it is given.
"""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any, ClassVar

from suite.processes.blame import Examined, examined
from suite.stages import Stage
from suite.subjects.foreign import IN_PACKS, Foreign, lacks, unfit_on_gpus
from suite.subjects.handles import MalformedHandles
from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, Trainer, TrainerHalf

CALLED_S = 30.0  # how long the ParameterServer may take until it calls for the engine
GIVEN_UP_S = 2.0
BUCKET_GB = "1"  # as in vLLM's packs; it takes three times as much of the GPU. By default it takes 8, thrice


class CheckpointEngine(EngineHalf):
    """Calls update_weights_from_ipc({device id: address of a socket}) on all workers."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        super().__init__(subject, engine)
        self.addresses: dict[str, str] = {}

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Put the addresses of all ranks together. Raises MalformedHandles."""
        manifest, self.addresses = super().receive(announced), {}
        for announcement in announced:
            said = announcement["addresses"]
            texts = isinstance(said, dict) and all(isinstance(part, str) for pair in said.items() for part in pair)
            if not texts:
                raise MalformedHandles(f"the trainer sent no {{device: address}}, but {said!r:.120}")
            self.addresses |= said
        return manifest

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers take bucket after bucket, until the trainer says that it was the last."""
        self.engine.rpc("update_weights_from_ipc", self.addresses)


class NotCalled(TimeoutError):
    """A ParameterServer has begun an update, and has not called for the engine."""

    examined = True


class Update:
    """ParameterServer.update() in a thread: it calls for the engine by `addresses`, and ends with the last bucket."""

    def __init__(self, server: Any, name: str) -> None:
        self.error: Exception | None = None
        self._called: queue.Queue[list[tuple[str, str]] | None] = queue.Queue()
        self._server, self._name, self._addresses = server, name, {}
        self._thread = threading.Thread(target=self._run, name="checkpoint-engine", daemon=True)
        self._thread.start()

    def addresses(self) -> dict[str, str]:
        """{device id: address} of all ranks, once it has called for the engine. Raises its error, or NotCalled."""
        try:
            called = self._called.get(timeout=CALLED_S)
        except queue.Empty as error:
            raise NotCalled(f"expected ParameterServer.update() to call for the engine in {CALLED_S:g} s") from error
        if called is None:
            raise self.error
        self._addresses = dict(called)
        return self._addresses

    def expect_ended(self) -> None:
        """Wait for it. Raises what it raised."""
        self._thread.join()
        if self.error is not None:
            raise self.error

    def give_up(self, own: str) -> None:
        """Where no worker has come for the buffer: answer, in its place, that it can't be had. `own`: a device's id.

        A worker that has come is still asked; the server itself has no deadline and no way to end an update.
        """
        import zmq

        if not self._thread.is_alive() or own not in self._addresses:
            return
        with zmq.Context() as context, context.socket(zmq.REP) as socket:
            socket.linger = 0
            socket.connect(self._addresses[own])
            if socket.poll(GIVEN_UP_S * 1000):
                socket.recv()
                socket.send_string("the engine has not begun the update")
                self._thread.join(GIVEN_UP_S)

    def _run(self) -> None:
        try:
            self._server.update(self._name, self._called.put)
        except Exception as error:
            self.error = error
            self._called.put(None)


class CheckpointEngineTrainer(TrainerHalf):
    """A ParameterServer in every rank, each with its share of the tensors."""

    _server: Any = None
    _update: Update | None = None
    _registered = ""
    _count = 0

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Make the server. The ranks of several share the trainer's own group; one alone makes a group an update."""
        from checkpoint_engine.ps import ParameterServer

        rank, size = self.trainer.rank, self.trainer.world_size
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}  # it reads them whatever it is told
        os.environ.setdefault("PS_MAX_BUCKET_SIZE_GB", BUCKET_GB)
        with examined():
            server = ParameterServer(
                rank=rank, world_size=size, auto_pg=size == 1, master_addr=address, master_port=port
            )
        self._server = Examined(server)

    def gather(self, tensors: Tensors) -> None:
        """All at once: a checkpoint is registered whole."""
        tensors.held()

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """Register the tensors and begin the update. {"addresses": {device id: address of its socket}}."""
        self.release()
        self._count += 1
        name, share = f"update-{self._count}", tensors.held()[self.trainer.rank :: self.trainer.world_size]
        self._server.register_checkpoint(name, named_tensors=dict(share), use_inplace_pin_memory=False)
        self._registered = name
        self._server.gather_metas(name)
        self._update = Update(self._server, name)
        return {"addresses": self._update.addresses()}

    def mislabelled(self, announcement: dict[str, Any], label: str) -> dict[str, Any]:
        """The address under another device's id, or no address."""
        addresses = {label: next(iter(announcement["addresses"].values()))} if label else {}
        return announcement | {"addresses": addresses}

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Wait until the server has sent everything, and the engines have answered."""
        sent = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        self._update.expect_ended()
        acknowledged()
        return sent

    def abort(self, reason: str) -> None:
        """End an update that no worker has come for."""
        if self._update is not None:
            self._update.give_up(self._own())

    def release(self) -> None:
        """Give the host memory of the tensors back."""
        self.abort("released")
        self._update = None
        if self._registered:
            name, self._registered = self._registered, ""
            self._server.unregister_checkpoint(name)

    def close(self) -> None:
        """Give everything back."""
        self.release()
        self._server = None

    def _own(self) -> str:
        import torch

        return f"GPU-{torch.cuda.get_device_properties(self.trainer.device).uuid}"


class CheckpointEngineSubject(Foreign):
    """`VllmColocateWorkerExtension`, driven by a ParameterServer."""

    distribution: ClassVar[str] = "checkpoint-engine"
    version: ClassVar[str] = "0.4.2"
    environment: ClassVar[str] = "checkpoint-engine"
    roofline: ClassVar[str] = "copy"
    announces: ClassVar[tuple[str, ...]] = ("addresses",)
    calls: ClassVar[tuple[str, ...]] = (
        "ParameterServer.register_checkpoint(), gather_metas() and update(), in the trainer",
        "update_weights_from_ipc({device: address})",
        "LLM.reset_prefix_cache(), which checkpoint-engine leaves to its caller",
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return CheckpointEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return CheckpointEngineTrainer(self, trainer)

    def speakers(self, world_size: int) -> int:
        """Every rank feeds the worker on its own device."""
        return world_size

    def unfit(self, stage: Stage) -> str:
        """Its buffer is CUDA IPC's, for a worker on the same GPU."""
        if stage.kind == "cpu":
            return f"{stage.name}: checkpoint-engine knows GPUs and NPUs only"
        return unfit_on_gpus(stage)


SUBJECT = CheckpointEngineSubject(
    "checkpoint-engine",
    "checkpoint_engine.worker:VllmColocateWorkerExtension",
    lacks=lacks("VllmColocateWorkerExtension") | IN_PACKS,
)
