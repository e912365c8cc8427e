"""AReaL's extension for vLLM: a group of torch.distributed, in which the workers receive tensor by tensor.

Its worker methods answer (whether it went well, what went wrong) and raise nothing; AReaL's server reads the answers.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from suite.processes.blame import examined
from suite.stages import Stage
from suite.subjects.broadcast import NO_HANDLES, unfit_on_gpus
from suite.subjects.counted import Contiguous
from suite.subjects.foreign import PACKED, Foreign, lacks, no_adapters
from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, Trainer, TrainerHalf

BACKEND = "nccl"
ADAPTERS = "where an engine takes adapters, AReaL updates the adapter, and no weights of the model"


class Unsuccessful(RuntimeError):
    """A worker has answered that a call did not go well."""

    examined = True


class ArealEngine(EngineHalf):
    """Says what comes, and calls areal_update_weight_xccl() on all workers, which receive it all."""

    def __init__(self, subject: Subject, engine: Engine) -> None:
        super().__init__(subject, engine)
        self._group = ""

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Have the workers join a group of torch.distributed."""
        self._group = group_name(port)
        where = (address, str(port), rank_offset, world_size, BACKEND, self._group)
        self._call("areal_init_update_weight_group", *where)

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers receive and load the tensors in the order of the manifest."""
        names, dtypes, shapes = ([entry[key] for entry in manifest] for key in ("name", "dtype", "shape"))
        self._call("areal_set_weight_meta", names, dtypes, shapes, self._group)
        self._call("areal_update_weight_xccl")

    def _call(self, method: str, *args: Any) -> None:
        """Raises Unsuccessful with what the workers say that did not succeed."""
        answers = self.engine.rpc(method, *args)
        if wrong := [f"rank {rank}: {said}" for rank, (well, said) in enumerate(answers) if not well]:
            raise Unsuccessful(f"{method}: {'; '.join(wrong)}")


class ArealTrainer(TrainerHalf):
    """Broadcasts as rank 0, as AReaL's FSDP engine does. Its group waits two hours for a worker that is gone."""

    _group: Any = None

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Form the group with AReaL's own function."""
        from areal.engine.core.distributed import init_custom_process_group

        with examined():
            self._group = init_custom_process_group(
                backend=BACKEND,
                init_method=f"tcp://{address}:{port}",
                world_size=world_size,
                rank=0,
                group_name=group_name(port),
            )

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Broadcast every tensor, and wait until the engines have answered."""
        import torch

        counted = Contiguous(tensors)
        for _, whole in counted:
            with examined():
                torch.distributed.broadcast(whole, src=0, group=self._group, async_op=False)
        acknowledged()
        return counted.bytes_sent

    def close(self) -> None:
        """Forget the group: to leave it would wait for workers that may hang."""
        self._group = None


class Areal(Foreign):
    """`VLLMWorkerExtension`, by broadcast."""

    distribution: ClassVar[str] = "areal"
    version: ClassVar[str] = "1.0.4"
    environment: ClassVar[str] = "areal"
    roofline: ClassVar[str] = "broadcast"
    calls: ClassVar[tuple[str, ...]] = (
        "areal_init_update_weight_group(address, port, rank_offset, world_size, backend, group_name), once",
        "areal_set_weight_meta(names, dtypes, shapes, group_name)",
        "areal_update_weight_xccl()",
        "LLM.reset_prefix_cache(), as AReaL's server does",
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return ArealEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return ArealTrainer(self, trainer)

    def unfit(self, stage: Stage) -> str:
        """NCCL takes one rank a GPU."""
        return f"{stage.name}: {PACKED}" if stage.kind == "cpu" else unfit_on_gpus(stage)


def group_name(port: int) -> str:
    """A name for the group, which torch takes once in a process."""
    return f"update_weight_group_{port}"


SUBJECT = Areal(
    "areal",
    "areal.engine.vllm_ext.vllm_worker_extension:VLLMWorkerExtension",
    lacks=lacks("VLLMWorkerExtension") | no_adapters(ADAPTERS) | NO_HANDLES,
)
