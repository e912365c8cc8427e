"""vLLM's native transfer by CUDA IPC: the trainer's tensors stay where they are, and the workers map them.

Handles travel as plain data, and become what vLLM takes in the engine's process. They are made as vLLM's own trainer
makes them, by torch's reduction of contiguous tensors; that trainer itself is not examined. They hold torch's classes,
so vLLM takes them pickled, as its client for servers sends them. Nothing of the suite unpickles them.
"""

import base64
import pickle
from importlib.util import find_spec
from typing import Any, ClassVar

from suite.stages import Stage
from suite.subjects.adapting import pair
from suite.subjects.handles import HandlesTrainer, merged, unfit_on_gpus
from suite.subjects.native import DRAFT, Native, NativeEngine, lacks
from suite.subjects.native_versions import Api, installed
from suite.subjects.protocol import Engine, EngineHalf, Trainer, TrainerHalf


class IpcEngine(NativeEngine):
    """Gives all workers the handles of all ranks of the trainer."""

    def __init__(self, subject: "NativeIpc", engine: Engine) -> None:
        super().__init__(subject, engine)
        self._handles: dict[str, dict[str, dict]] = {}

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Put the handles of all ranks together."""
        manifest = super().receive(announced)
        self._handles = {
            device: {name.removeprefix(DRAFT): handle for name, handle in named.items()}
            for device, named in merged(announced).items()
        }
        return manifest

    def update_information(self, manifest: list[dict]) -> dict[str, Any]:
        """Also, for every tensor, its handle by the device it is on."""
        handles = pickle.dumps([self._of(entry["name"]) for entry in manifest])
        return super().update_information(manifest) | {"ipc_handles_pickled": base64.b64encode(handles).decode()}

    def _of(self, name: str) -> dict[str, tuple]:
        """{device as torch spells it: handle} of a tensor; the worker puts its own ordinal into it."""
        import torch

        device, bare = torch.device("cuda", 0), self._api.ipc_bare_arguments
        pairs = {spelled: pair(named[name], device) for spelled, named in self._handles.items() if name in named}
        return {spelled.removeprefix("GPU-"): found[1] if bare else found for spelled, found in pairs.items()}


class NativeIpc(Native):
    """Handles, one a tensor."""

    backend: ClassVar[str] = "ipc"
    roofline: ClassVar[str] = "copy"
    announces: ClassVar[tuple[str, ...]] = ("handles",)

    def engine_environment(self) -> dict[str, str]:
        """Unpickling handles is what vLLM has to be allowed."""
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return IpcEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return HandlesTrainer(self, trainer)

    def speakers(self, world_size: int) -> int:
        """Every rank has handles of its own device."""
        return world_size

    def init_information(self, api: Api, address: str, port: int, rank_offset: int, world_size: int) -> dict[str, Any]:
        """Nothing: there is nobody to meet, and tensors are not packed where nobody says so."""
        return {}

    def unfit(self, stage: Stage) -> str:
        """A handle is of use on its own GPU; some releases need Ray for it."""
        if stage.kind == "cpu":
            return f"{stage.name}: there is no CUDA IPC without a GPU; native-gloo is examined there"
        if installed().ipc_needs_ray and find_spec("ray") is None:
            return f"{stage.name}: vLLM 0.22 to 0.26 imports Ray for this, which is not installed: pip install ray"
        return unfit_on_gpus(stage)


SUBJECT = NativeIpc("native-ipc", "suite.subjects.native:NativeWorker", lacks(installed()))
