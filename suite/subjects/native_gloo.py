"""vLLM's native transfer where there is no GPU: an engine of the suite's own, registered with vLLM's factory.

vLLM's half is judged: its calls, their order, and the layerwise reload. The transport is the references'.
"""

from typing import ClassVar

from suite.models import TIED
from suite.stages import Stage
from suite.subjects.broadcast import NO_HANDLES, BroadcastTrainer
from suite.subjects.native import Native, NativeWorker, lacks
from suite.subjects.native_versions import installed
from suite.subjects.protocol import Trainer, TrainerHalf

UNTIED = "qwen3-untied-tiny"
BACKEND = "weight_sync_gloo"
TRANSFER = ("suite.subjects.native_gloo_engine", "GlooTransferEngine")


class GlooWorker(NativeWorker):
    """Registers the engine in every process that makes a worker's class, before vLLM builds its transfer engine."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        from vllm.distributed.weight_transfer import WeightTransferEngineFactory

        if BACKEND not in WeightTransferEngineFactory._registry:  # it refuses a name that it has
            WeightTransferEngineFactory.register_engine(BACKEND, *TRANSFER)


class NativeGloo(Native):
    """Native transfer by gloo."""

    backend: ClassVar[str] = BACKEND
    roofline: ClassVar[str] = "broadcast"

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return BroadcastTrainer(self, trainer)

    def model_for(self, requirement: str, model: str) -> str:
        """A model with an output layer of its own, except where tied ones are judged. No times are taken.

        vLLM's reload processes one of the two layers that share a tensor, and its CPU backend packs both: after an
        update the tied output layer applies the old weights, which would be all that any requirement finds.
        """
        if not requirement:
            return ""  # the transport is the suite's: its time says nothing of vLLM
        return UNTIED if model == TIED and requirement != "update.tied" else model

    def unfit(self, stage: Stage) -> str:
        """On GPUs vLLM's own backends are examined."""
        if stage.kind != "cpu":
            return f"{stage.name}: native-nccl and native-ipc are examined on GPUs"
        return "" if installed().takes_any_backend else f"{stage.name}: vLLM before 0.22 takes its own backends only"


SUBJECT = NativeGloo(
    "native-gloo",
    "suite.subjects.native_gloo:GlooWorker",
    lacks=lacks(installed()) | NO_HANDLES,
    sender="extensions.broadcast:BroadcastSender",
)
