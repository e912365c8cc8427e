"""Planned updates: one call to the workers an update, by broadcast or by handles that are opened once."""

import secrets
from collections.abc import Callable
from typing import Any, ClassVar

from suite.processes.blame import SuiteFault
from suite.subjects.broadcast import NO_HANDLES, Broadcast, BroadcastEngine, BroadcastTrainer
from suite.subjects.handles import Handles, HandlesEngine, HandlesTrainer
from suite.subjects.protocol import Engine, EngineHalf, Tensors, Trainer, TrainerHalf, no_drafts

ONE_CALL = "an update is one call: it has no beginning inside of which another could begin"
PLANS = "plan_update(manifest), where the manifest is another than that of the update before"


class PlansOnce(EngineHalf):
    """Is told once which tensors come, and has the workers plan an update where those are others than planned.

    What a rank of the trainer announces has a name. It is announced whole once, and by its name alone from then on.
    """

    named: ClassVar[str] = "update"  # under what an announcement has its name
    _known: tuple[dict[str, Any], ...] = ()  # what every rank has announced last, whole
    _manifest: list[dict] | None = None  # of that
    _planned: list[dict] | None = None  # the manifest that the workers have planned last
    _digest = ""
    _begun = False

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Other ranks of a trainer may announce from now on."""
        self._known, self._manifest = (), None
        super().connect(address, port, rank_offset, world_size)

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """The manifest of this announcement, or of the one that had the same name."""
        known = self._known or ({},) * len(announced)
        told = tuple(self._whole(one, before) for one, before in zip(announced, known, strict=True))
        if self._manifest is None or any(one is not before for one, before in zip(told, known, strict=True)):
            self._known, self._manifest = (), super().receive(list(told))
            self._known = told
        return self._manifest

    def _whole(self, one: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
        """What a rank announces; what it has announced before where it says no more than the name of that."""
        if one.keys() != {"manifest", self.named} or one["manifest"] is not None:
            return one
        if one[self.named] != before.get(self.named):
            raise SuiteFault(f"{one[self.named]!r:.60} was announced by its name, and has not been announced whole")
        return before

    def begin(self, manifest: list[dict]) -> None:
        """Have the workers plan the update, unless they have."""
        if manifest is not self._planned and manifest != self._planned:
            self._planned = None
            self._digest = self.engine.rpc("plan_update", manifest)[0]
            self._planned = manifest
        self._begun = True

    def end(self) -> None:
        """The call that moved the weights has ended the update."""
        self._begun = False

    def abort(self) -> None:
        """What the workers have planned may not be of their model any more."""
        self._planned, self._begun = None, False
        super().abort()


class PlannedEngine(PlansOnce, BroadcastEngine):
    """Receives an update by one call to the workers."""

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers receive the update; outside of one, the tensors alone."""
        if self._begun:
            self.engine.rpc("receive_update", self._digest)
        else:
            self.engine.rpc("receive_alone", manifest)


class SendsByManifest(BroadcastTrainer):
    """Has a sender that is told the manifest too."""

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Broadcast every tensor: what has been received may be changed."""
        return self._sender.send(tensors, tensors.manifest())


class PlannedTrainer(SendsByManifest):
    """Announces an update whole where its tensors are others than those of the update before."""

    _announced: list[dict] | None = None
    _name = ""

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """{"update": the name of what is announced}, and no manifest where that is known by its name."""
        manifest = tensors.manifest()
        if manifest == self._announced:
            return {"manifest": None, "update": self._name}
        self._announced, self._name = manifest, secrets.token_hex(8)
        return {"manifest": manifest, "update": self._name}


class Planned(Broadcast):
    """An extension that plans an update once, and receives it by one call."""

    methods: ClassVar[tuple[str, ...]] = (
        "init_weight_update_group", "plan_update", "receive_update", "receive_alone", "check_weights_changed",
    )  # fmt: skip
    announces: ClassVar[tuple[str, ...]] = ("update",)
    calls: ClassVar[tuple[str, ...]] = (
        "init_weight_update_group(address, port, rank_offset, world_size), once",
        PLANS,
        "receive_update(digest)",
    )

    @classmethod
    def lacking(cls, extension: type) -> dict[str, str]:
        """What no such class has."""
        return NO_HANDLES | {"errors.nested": ONE_CALL} | no_drafts(extension)

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return PlannedEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return PlannedTrainer(self, trainer)


class SparseTrainer(PlannedTrainer):
    """Has a sender that finds what has changed before the engines are asked, and sends that.

    Every rank of the trainer speaks, so that all of them gather the tensors at this moment; rank 0 sends.
    """

    def invite(self, address: str, port: int, world_size: int) -> None:
        """Serve the group, where this is rank 0."""
        if self.trainer.rank == 0:
            super().invite(address, port, world_size)

    def gather(self, tensors: Tensors) -> None:
        """All at once: they are compared before any is sent."""
        tensors.held()

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """As PlannedTrainer; what has changed is found meanwhile."""
        if self._sender is not None:
            self._sender.compare(tensors.held(), tensors.manifest())
        return super().announce(tensors)

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Broadcast what was found."""
        return 0 if self._sender is None else self._sender.send(tensors)

    def forget(self) -> None:
        """Have the sender let go of its copy."""
        if self._sender is not None:
            self._sender.forget()


class PlannedSparse(Planned):
    """Planned updates of what has changed since the one before."""

    compares: ClassVar[bool] = True
    methods: ClassVar[tuple[str, ...]] = (*Planned.methods, "takes_changes")

    def speakers(self, world_size: int) -> int:
        """Every rank takes part in gathering, before anything is announced."""
        return world_size

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return SparseTrainer(self, trainer)


class KeptHandlesEngine(PlansOnce, HandlesEngine):
    """Gives the workers handles where they have not opened them, and has them copy an update by one call."""

    named: ClassVar[str] = "opened"
    ends_by_one_call: ClassVar[bool] = True
    _opened = ""  # the name of the handles that were announced last
    _given = ""  # of those that the workers have opened

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Nor have the workers opened what other ranks announce."""
        self._given = ""
        super().connect(address, port, rank_offset, world_size)

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """As in PlansOnce; the handles come with it."""
        manifest = super().receive(announced)
        self._opened = "+".join(one["opened"] for one in announced)
        return manifest

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers copy the update; outside of one, load the tensors alone."""
        if not self._begun:
            super().transfer(manifest)
            return
        handles = {} if self._opened == self._given else self._handles
        self._given = ""
        self.engine.rpc("copy_update", self._digest, self._opened, handles)
        self._given = self._opened

    def forget(self) -> None:
        """Have the workers close the handles: as long as one is open, the trainer's memory stays taken."""
        self._given = ""
        self.engine.rpc("close_handles")

    def abort(self) -> None:
        """Nor is it known what the workers have opened."""
        self._given = ""
        super().abort()


class KeptHandlesTrainer(HandlesTrainer):
    """Has a sender that keeps its handles, and announces them and their tensors once."""

    only_waits: ClassVar[bool] = True
    _announced = ""

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """{"handles": {device id: {name: handle}}, "opened": their name}; only that, and no manifest, once known."""
        handles = self._sender.handles(tensors.held())
        known, self._announced = self._announced, self._sender.opened
        if known == self._announced:
            return {"manifest": None, "opened": known}
        return {"handles": handles, "opened": self._announced}

    def mislabelled(self, announcement: dict[str, Any], label: str) -> dict[str, Any]:
        """The handles under another device's id, or no handles, under a name that no worker has opened."""
        return super().mislabelled(self._anew(f"mislabelled {label}"), label)

    def withheld(self, announcement: dict[str, Any], name: str) -> dict[str, Any]:
        """All handles but those of one tensor, under a name that no worker has opened."""
        return super().withheld(self._anew(f"without {name}"), name)

    def _anew(self, opened: str) -> dict[str, Any]:
        """All handles once more, under a name of their own."""
        self._announced = ""
        return {"handles": self._sender.made, "opened": opened}

    def release(self) -> None:
        """The tensors stay where they are: the workers have opened them."""

    def forget(self) -> None:
        """The workers are sent other handles after that."""
        self._announced = ""
        super().release()


class PlannedHandles(Handles):
    """An extension that plans an update once, opens handles once, and copies by one call."""

    methods: ClassVar[tuple[str, ...]] = (
        "report_device_id", "plan_update", "copy_update", "update_weights_from_ipc_handles", "check_weights_changed",
    )  # fmt: skip
    announces: ClassVar[tuple[str, ...]] = ("handles", "opened")
    calls: ClassVar[tuple[str, ...]] = ("report_device_id(), once", PLANS, "copy_update(digest, opened, handles)")

    @classmethod
    def lacking(cls, extension: type) -> dict[str, str]:
        """What no such class has."""
        return {"errors.nested": ONE_CALL} | no_drafts(extension)

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return KeptHandlesEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return KeptHandlesTrainer(self, trainer)


SUBJECTS = (
    Planned(
        "planned",
        "extensions.planned:PlannedWorkerExtension",
        lacks=NO_HANDLES | {"errors.nested": ONE_CALL},
        sender="extensions.planned:PlannedSender",
    ),
    PlannedSparse(
        "planned-sparse",
        "extensions.sparse:SparseWorkerExtension",
        lacks=NO_HANDLES | {"errors.nested": ONE_CALL},
        sender="extensions.sparse:SparseSender",
    ),
    PlannedHandles(
        "planned-colocate",
        "extensions.planned_colocate:PlannedColocateWorkerExtension",
        lacks={"errors.nested": ONE_CALL},
        sender="extensions.planned_colocate:KeptHandleSender",
    ),
)
