"""Planned updates through vLLM's own weight transfer: the backend `planned`, on CPUs by gloo, on GPUs by NCCL."""

from typing import ClassVar

from extensions import vllm_plugin
from suite.stages import Stage
from suite.subjects.broadcast import NO_HANDLES, unfit_on_gpus
from suite.subjects.native import NO_DRAFTS, Native, NativeWorker, lacks
from suite.subjects.native_versions import installed
from suite.subjects.planned import SendsByManifest
from suite.subjects.protocol import Trainer, TrainerHalf


class PlannedWorker(NativeWorker):
    """Registers the backend where a worker's class is made, as the entry point does where this package is installed."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        vllm_plugin.register()


class NativePlanned(Native):
    """Planned updates by vLLM's four calls."""

    backend: ClassVar[str] = vllm_plugin.BACKEND
    roofline: ClassVar[str] = "broadcast"

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return SendsByManifest(self, trainer)

    def unfit(self, stage: Stage) -> str:
        """As every broadcast, and not before the release whose engines load weights themselves."""
        if not installed().engines_load:
            return f"{stage.name}: the backend `planned` is for vLLM 0.25 and later"
        return "" if stage.kind == "cpu" else unfit_on_gpus(stage)


SUBJECT = NativePlanned(
    "native-planned",
    "suite.subjects.native_planned:PlannedWorker",
    lacks=lacks(installed()) | NO_HANDLES | NO_DRAFTS,
    sender="extensions.planned:PlannedSender",
)
