"""Weights by handle: trainer and engine share a device's memory, and only handles travel."""

from collections.abc import Callable
from typing import Any, ClassVar

from suite.stages import Stage
from suite.subjects.adapting import takes_pairs
from suite.subjects.protocol import Engine, EngineHalf, Subject, Tensors, Trainer, TrainerHalf

EXAMPLES_SENDER = "suite.subjects.example_senders:IpcSender"  # of an extension that names none
NO_IPC_ON_CPU = (
    "the extension names no sender, so its handles are CUDA IPC's, of which there are none without a GPU; name one of"
    " other handles by weight_sync_sender"
)


class HandlesEngine(EngineHalf):
    """Asks the workers for their devices, and gives them the handles of all ranks of the trainer.

    An extension that takes pairs finds them under what its workers reported.
    """

    def __init__(self, subject: "Handles", engine: Engine) -> None:
        super().__init__(subject, engine)
        self._by_report = takes_pairs(subject.load())
        self._reported: dict[str, set[str]] = {}  # what workers call a device, by its id
        self._handles: dict[str, dict] = {}

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Ask every worker for its device, as a training loop does before its first update."""
        reported = self.engine.rpc("report_device_id")
        self._reported = {}
        if self._by_report:
            for device, called in zip(self.engine.devices, reported, strict=True):
                self._reported.setdefault(_bare(device["id"]), set()).add(called)

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Put the handles of all ranks together; ranks that share a device, as on CPUs, send the same."""
        manifest, self._handles = super().receive(announced), {}
        for device, named in merged(announced).items():
            for called in self._reported.get(_bare(device), {device}):
                self._handles.setdefault(called, {}).update(named)
        return manifest

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers load what the handles name."""
        self.engine.rpc("update_weights_from_ipc_handles", self._handles)


class HandlesTrainer(TrainerHalf):
    """Has a sender, which every rank makes with (device) and asks for the handles of its tensors."""

    _sender: Any = None

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Make the sender: there is nobody to meet."""
        self._sender = self.sender(EXAMPLES_SENDER, self.trainer.device)

    def gather(self, tensors: Tensors) -> None:
        """All at once: a sender's handles() takes them together."""
        tensors.held()

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """{"handles": {device id: {name: handle}}}."""
        return {"handles": self._sender.handles(tensors.held())}

    def mislabelled(self, announcement: dict[str, Any], label: str) -> dict[str, Any]:
        """The handles under another device's id, or no handles."""
        handles = {label: next(iter(announcement["handles"].values()))} if label else {}
        return announcement | {"handles": handles}

    def withheld(self, announcement: dict[str, Any], name: str) -> dict[str, Any]:
        """All handles but those of one tensor."""
        handles = {
            device: {other: handle for other, handle in named.items() if other != name}
            for device, named in announcement["handles"].items()
        }
        return announcement | {"handles": handles}

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Wait until every engine has acknowledged: only then may the tensors be changed or freed."""
        handed_over = sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)
        acknowledged()
        return handed_over

    def release(self) -> None:
        """Let go of the tensors on a GPU; shared memory is used again."""
        if self.trainer.device.type == "cuda" and self._sender is not None:
            self._sender.release()

    def close(self) -> None:
        """Let go of tensors and shared memory."""
        if self._sender is not None:
            self._sender.release()


class Handles(Subject):
    """An extension that is driven by handles."""

    methods: ClassVar[tuple[str, ...]] = (
        "report_device_id",
        "update_weights_from_ipc_handles",
        "check_weights_changed",
    )
    roofline: ClassVar[str] = "copy"
    announces: ClassVar[tuple[str, ...]] = ("handles",)
    calls: ClassVar[tuple[str, ...]] = (
        "report_device_id(), once",
        "begin_update(manifest), where the class has it",
        "update_weights_from_ipc_handles({device: {name: handle}})",
        "end_update(), where the class has it",
    )

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return HandlesEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return HandlesTrainer(self, trainer)

    def speakers(self, world_size: int) -> int:
        """Every rank has handles of its own device."""
        return world_size

    def unfit(self, stage: Stage) -> str:
        """A handle is of use on its own GPU; on a CPU all memory is the host's."""
        if stage.kind == "cpu":
            return "" if self.sender else f"{stage.name}: {NO_IPC_ON_CPU}"
        return unfit_on_gpus(stage)


def unfit_on_gpus(stage: Stage) -> str:
    """Why handles make no sense on a stage of GPUs; empty where they do."""
    if not stage.colocated:
        return f"{stage.name}: trainer and engine share no GPU, and a handle is of use on its own GPU only"
    if stage.hosts_apart:
        return f"{stage.name}: gpu-colocate-tp1 is where handles are examined on one GPU"
    return ""


class MalformedHandles(ValueError):
    """A sender has made no handles, but something else."""

    examined = True


def merged(announced: list[dict[str, Any]]) -> dict[str, dict[str, dict]]:
    """{device: {name: handle}} of all ranks. Raises MalformedHandles."""
    found: dict[str, dict[str, dict]] = {}
    for announcement in announced:
        handles = announcement["handles"]
        if not isinstance(handles, dict) or not all(isinstance(named, dict) for named in handles.values()):
            raise MalformedHandles(f"the trainer sent no {{device: {{name: handle}}}}, but {handles!r:.120}")
        for device, named in handles.items():
            found.setdefault(device, {}).update(named)
    return found


def _bare(device: str) -> str:
    """A device's id without the prefix that NVML gives a GPU's UUID, and torch does not."""
    return device.removeprefix("GPU-")


SUBJECT = Handles("colocate", "extensions.colocate:ColocateWorkerExtension", sender="extensions.colocate:HandleSender")
