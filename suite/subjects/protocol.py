"""What a subject is: what is examined, and what each of its halves does in an update.

A file of this folder has both halves of one way to move weights. One runs in the engine's process and calls the
extension in the workers; the other runs in every rank of the trainer and sends. The dialogue between the two is the
suite's: suite/actors/dialogue.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from suite.processes import target
from suite.processes.blame import Examined, examined
from suite.stages import Stage

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """What the engine's half has of its engine.

    devices: {"rank", "id", ...} of every worker. takes_adapters: whether it was started for LoRA adapters.
    """

    devices: list[dict[str, Any]]
    takes_adapters: bool

    def rpc(self, method: str, *args: Any) -> list[Any]:
        """Call a worker method on all ranks; their results."""

    def call_llm(self, method: str, *args: Any) -> Any:
        """Call a method of vllm.LLM itself, and return what it returns."""


class Trainer(Protocol):
    """What the trainer's half has of its rank of the trainer."""

    rank: int
    world_size: int
    device: "torch.device"


class Tensors(Protocol):
    """What an update sends. Iterating gathers (checkpoint name, whole tensor) one by one."""

    def __iter__(self) -> Iterable[tuple[str, "torch.Tensor"]]: ...

    def held(self) -> list[tuple[str, "torch.Tensor"]]:
        """All of them at once; from then on iterating gives these."""

    def manifest(self) -> list[dict]:
        """[{"name", "dtype", "shape"}, ...] of all, in their order; nothing is gathered."""


class EngineHalf:
    """The half that runs in the engine's process. What it raises is the suite's own, and what `Engine` raises is not.

    Those that the extension has of begin_update(manifest), end_update() and abort_update() are called around an update.
    ends_by_one_call: whether transfer() makes one call to the workers, and end() none, so that the engine may be told
    at once what it has to do after that.
    """

    ends_by_one_call: ClassVar[bool] = False

    def __init__(self, subject: "Subject", engine: Engine) -> None:
        self.subject, self.engine = subject, engine
        extension = subject.load()
        self.resets_cache = bool(getattr(extension, "weight_sync_resets_cache", False))

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Meet the trainer, before the first update.

        A group would be at this address, with the trainer as rank 0 and this engine's workers from `rank_offset` on.
        """

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Keep what the trainer's ranks announce, and return the manifest. Raises ValueError for what is malformed."""
        expected = {"manifest", *self.subject.announces}
        for announcement in announced:
            if announcement.keys() != expected:
                raise ValueError(f"the trainer announced {sorted(announcement)!r:.120}, expected {sorted(expected)}")
        return announced[0]["manifest"]

    def begin(self, manifest: list[dict]) -> None:
        """Begin an update of these tensors, [{"name", "dtype", "shape"}, ...], where updates have a beginning."""
        if self.subject.can("begin_update"):
            self.engine.rpc("begin_update", manifest)

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers take the tensors, while the trainer's half sends."""
        raise NotImplementedError

    def end(self) -> None:
        """End the update: the workers compute with the new weights once this returns."""
        if self.subject.can("end_update"):
            self.engine.rpc("end_update")

    def abort(self) -> None:
        """Give up the update under way."""
        if self.subject.can("abort_update"):
            self.engine.rpc("abort_update")

    def forget(self) -> None:
        """Let go of whatever of the trainer's memory an update has left open: the trainer may give that memory up."""

    def state(self) -> list[str]:
        """What every worker says of its weights: "ready", "updating", "inconsistent"; nothing where they can't tell."""
        return self.engine.rpc("update_state") if self.subject.can("update_state") else []


class TrainerHalf:
    """The half that runs in each rank of the trainer.

    What it raises is the suite's own, but for what it calls in `suite.processes.blame.examined()`.
    only_waits: whether send() does nothing but wait until it is acknowledged: there is nothing to abort then.
    """

    only_waits: ClassVar[bool] = False

    def __init__(self, subject: "Subject", trainer: Trainer) -> None:
        self.subject, self.trainer = subject, trainer

    def sender(self, default: str, *args: Any) -> Any:
        """The subject's sender, or the `default` of one that names none, made with these arguments.

        What its class and its methods raise is the subject's, and what else a half raises is the suite's own.
        """
        with examined():
            return Examined(load(self.subject.sender or default, "a sender")(*args))

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Meet the engines, before the first update; see EngineHalf.connect. Only ranks that speak are asked."""

    def gather(self, tensors: Tensors) -> None:
        """Have at hand what announce() hands over; what is examined is not called yet."""

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """What the engines are told beside the manifest, as plain data, by the names in `Subject.announces`."""
        return {}

    def mislabelled(self, announcement: dict[str, Any], label: str) -> dict[str, Any]:
        """The same announcement for a device that it is not for; for none where `label` is empty. A test's fault."""
        raise NotImplementedError(
            f"{self.subject.name} announces nothing that is labelled with a device; override mislabelled(), or say in"
            " the subject's lacks={'devices.wrong_handle': reason} that it has no labels"
        )

    def withheld(self, announcement: dict[str, Any], name: str) -> dict[str, Any]:
        """The same announcement without the handle of one tensor, which is announced as before. A test's fault."""
        raise NotImplementedError(
            f"{self.subject.name} announces no handle for each tensor; override withheld(), or say in the subject's"
            " lacks={'devices.missing_handle': reason} that it has none"
        )

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Send all tensors and return the bytes sent; `acknowledged()` waits until all engines have ended the update.

        The tensors may be changed once this has returned.
        """
        raise NotImplementedError

    def release(self) -> None:
        """Let go of what an update held. Called when all engines have ended or refused it."""

    def forget(self) -> None:
        """Let go of whatever keeps tensors, between updates: the trainer gives up its weights."""
        self.release()

    def abort(self, reason: str) -> None:
        """End a send() that runs in another thread, where that can be done: it raises within 2 s then."""

    def close(self) -> None:
        """Let go of everything."""


@dataclass(frozen=True)
class Subject(ABC):
    """A worker extension and what sends to it.

    name: how reports call it. extension: `pkg.module:Class` of the extension.
    lacks: {requirement id: reason} of what it is not made to do; those are judged unsupported, never passed.
    sender: `pkg.module:Class` of its sender; empty for that of vLLM's example.
    host: the subject whose engines it is examined on, by taking the place of that subject's extension in the live
    workers; empty for engines of its own.
    methods: what a class has to have to be such a subject. announces: what the trainer announces beside the manifest.
    roofline: what its updates are measured against, "broadcast" or "copy".
    compares: whether it sends what differs from the update before, and so nothing where nothing does.
    calls: what its engine's half calls in an update, in words for those who get a report; what is only called before
    the first one says so.
    """

    name: str
    extension: str
    lacks: dict[str, str] = field(default_factory=dict, hash=False)
    sender: str = ""
    host: str = ""

    methods: ClassVar[tuple[str, ...]]
    roofline: ClassVar[str]
    announces: ClassVar[tuple[str, ...]] = ()
    compares: ClassVar[bool] = False
    calls: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def lacking(cls, extension: type) -> dict[str, str]:
        """What a class of this kind lacks, by what methods it has."""
        brackets = all(callable(getattr(extension, method, None)) for method in ("begin_update", "abort_update"))
        return ({} if brackets else no_beginning(extension.__name__)) | no_drafts(extension)

    @abstractmethod
    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""

    @abstractmethod
    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""

    @abstractmethod
    def unfit(self, stage: Stage) -> str:
        """Why it makes no sense on a stage; empty where it does."""

    def missing(self) -> str:
        """What has to be installed before it can be examined anywhere; empty where it is."""
        return ""

    def model_for(self, requirement: str, model: str) -> str:
        """The model that is taken for a case whose test names `model`; empty where there is to be no case.

        `requirement` is the id of what the test judges; empty where it measures.
        """
        return model

    def engine_arguments(self) -> dict[str, Any]:
        """Arguments of vllm.LLM that its engines start with, beside the extension."""
        return {}

    def engine_environment(self) -> dict[str, str]:
        """What its engines have in their environment."""
        return {}

    def speakers(self, world_size: int) -> int:
        """How many ranks of a trainer of `world_size` announce and send, from rank 0 on; the others only gather."""
        return 1

    def load(self) -> type:
        """The extension class itself."""
        return load(self.extension)

    def can(self, method: str) -> bool:
        """Whether its workers have this method."""
        return callable(getattr(self.load(), method, None))

    def draft_prefix(self) -> str:
        """What the names of a draft model's tensors begin with in its updates; empty where it updates none.

        An extension says it by an attribute `weight_sync_drafts`.
        """
        return str(getattr(self.load(), "weight_sync_drafts", ""))

    def plain(self) -> dict[str, str]:
        """What other processes have to know, as plain data; see `from_plain`."""
        kind = f"{type(self).__module__}:{type(self).__qualname__}"
        return {"kind": kind, "name": self.name, "extension": self.extension, "sender": self.sender}


def no_beginning(name: str) -> dict[str, str]:
    """What an extension lacks of which updates have no beginning."""
    return {"errors.nested": f"{name} has no begin_update() and abort_update(): its updates have no beginning"}


def no_drafts(extension: type) -> dict[str, str]:
    """What an extension lacks on engines with a draft model, by what it has."""
    lacking = {
        "draft.stale": callable(getattr(extension, "update_state", None)),
        "draft.updated": bool(getattr(extension, "weight_sync_drafts", "")),
    }
    found = knows_no_drafts(extension.__name__)
    return {requirement: found[requirement] for requirement, has in lacking.items() if not has}


def knows_no_drafts(name: str) -> dict[str, str]:
    """What an extension lacks that knows nothing of draft models."""
    return {
        "draft.stale": f"{name} has no update_state(): it cannot say that a draft model is stale",
        "draft.updated": f"{name} has no weight_sync_drafts: it brings no tensors to a draft model",
    }


def from_plain(plain: dict[str, str]) -> Subject:
    """The subject in another process."""
    return load(plain["kind"])(plain["name"], plain["extension"], sender=plain["sender"])


def load(named: str, what: str = "an extension") -> type:
    """Import `pkg.module:Class`, of `what`. Raises ValueError with the reason where that fails."""
    try:
        cls = target.load(named)
    except Exception as error:  # an import may raise anything
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected {what} as pkg.module:Class, found {named!r}: {why}") from error
    if not isinstance(cls, type):
        raise ValueError(f"{named} is a {type(cls).__name__}, not a class")
    return cls
