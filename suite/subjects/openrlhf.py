"""OpenRLHF's WorkerWrap: tensor by tensor, by NCCL or by CUDA IPC.

Its trainer forms the group with vLLM's own classes and broadcasts as rank 0, as vLLM's example does; so the example's
senders stand for it. Its handles are pickled on their way to vLLM's engine core, which OpenRLHF has vLLM allow.
"""

from typing import Any, ClassVar

from suite.stages import Stage
from suite.subjects import broadcast, handles
from suite.subjects.adapting import pair
from suite.subjects.foreign import Foreign, lacks, no_adapters, unfit_on_gpus
from suite.subjects.protocol import Engine, EngineHalf, Subject, Trainer, TrainerHalf

EXTENSION = "openrlhf.trainer.ray.vllm_worker_wrap:WorkerWrap"
GROUP = "openrlhf"
CACHE = "LLM.reset_prefix_cache(), as OpenRLHF's trainer does"


class OpenRlhfEngine(broadcast.BroadcastEngine):
    """Calls update_weight(name, dtype, shape) on all workers, for one tensor after the other."""

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Have the workers join the group."""
        self.engine.rpc("init_process_group", address, port, rank_offset, world_size, GROUP)


class OpenRlhfIpcEngine(EngineHalf):
    """Calls update_weight_cuda_ipc(name, dtype, shape, {device: handle}) on all workers, tensor by tensor."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        super().__init__(subject, engine)
        self._handles: dict[str, dict[str, dict]] = {}

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Put the handles of all ranks together."""
        manifest = super().receive(announced)
        self._handles = handles.merged(announced)
        return manifest

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers map and load tensor after tensor. They put their own ordinal into a handle."""
        import torch

        from extensions.tensors import dtype_of

        device = torch.device("cuda", 0)
        for entry in manifest:
            name = entry["name"]
            of_tensor = {
                spelled.removeprefix("GPU-"): pair(named[name], device)
                for spelled, named in self._handles.items()
                if name in named
            }
            self.engine.rpc("update_weight_cuda_ipc", name, dtype_of(entry["dtype"]), entry["shape"], of_tensor)


class OpenRlhf(Foreign):
    """By NCCL."""

    distribution: ClassVar[str] = "openrlhf"
    version: ClassVar[str] = "0.11.2"
    environment: ClassVar[str] = "openrlhf"
    roofline: ClassVar[str] = "broadcast"
    calls: ClassVar[tuple[str, ...]] = (
        "init_process_group(address, port, rank_offset, world_size, group_name), once",
        "update_weight(name, dtype, shape), for every tensor",
        CACHE,
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return OpenRlhfEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return broadcast.BroadcastTrainer(self, trainer)

    def unfit(self, stage: Stage) -> str:
        """Its group is vLLM's PyNcclCommunicator, whose tensors it puts on a GPU."""
        if stage.kind == "cpu":
            return f"{stage.name}: OpenRLHF's WorkerWrap receives on GPUs only"
        return broadcast.unfit_on_gpus(stage)


class OpenRlhfIpc(OpenRlhf):
    """By CUDA IPC."""

    roofline: ClassVar[str] = "copy"
    announces: ClassVar[tuple[str, ...]] = ("handles",)
    calls: ClassVar[tuple[str, ...]] = (
        "update_weight_cuda_ipc(name, dtype, shape, {device: handle}), for every tensor",
        CACHE,
    )

    def engine_environment(self) -> dict[str, str]:
        """On their way to vLLM's engine core dtypes and handles are pickled, which it has to be allowed."""
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return OpenRlhfIpcEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return handles.HandlesTrainer(self, trainer)

    def speakers(self, world_size: int) -> int:
        """Every rank has handles of its own device."""
        return world_size

    def unfit(self, stage: Stage) -> str:
        """A handle is of use on its own GPU only."""
        if stage.kind == "cpu":
            return super().unfit(stage)
        return unfit_on_gpus(stage)


_LACKS = lacks("WorkerWrap") | no_adapters("OpenRLHF starts no engine that takes LoRA adapters")
SUBJECTS = (
    OpenRlhf("openrlhf", EXTENSION, _LACKS | broadcast.NO_HANDLES),
    OpenRlhfIpc("openrlhf-ipc", EXTENSION, _LACKS),
)
