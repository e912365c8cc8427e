"""Planned updates: one call to the workers an update, by broadcast or by handles that are opened once."""

from collections.abc import Callable
from typing import Any, ClassVar

from suite.subjects.broadcast import NO_HANDLES, Broadcast, BroadcastEngine, BroadcastTrainer
from suite.subjects.handles import Handles, HandlesEngine, HandlesTrainer
from suite.subjects.protocol import Engine, EngineHalf, Tensors, Trainer, TrainerHalf, no_drafts

ONE_CALL = "an update is one call: it has no beginning inside of which another could begin"
PLANS = "plan_update(manifest), where the manifest is another than that of the update before"


class PlansOnce(EngineHalf):
    """Has the workers plan an update where another one is announced than they have planned."""

    _planned: list[dict] | None = None  # the manifest that the workers have planned last
    _digest = ""
    _begun = False

    def begin(self, manifest: list[dict]) -> None:
        """Have the workers plan the update, unless they have."""
        if manifest != self._planned:
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


class PlannedTrainer(BroadcastTrainer):
    """Has a sender that is told the manifest too."""

    def send(self, tensors: Tensors, acknowledged: Callable[[], None]) -> int:
        """Broadcast every tensor: what has been received may be changed."""
        return self._sender.send(tensors, tensors.manifest())


class Planned(Broadcast):
    """An extension that plans an update once, and receives it by one call."""

    methods: ClassVar[tuple[str, ...]] = (
        "init_weight_update_group", "plan_update", "receive_update", "receive_alone", "check_weights_changed",
    )  # fmt: skip
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
        """Nothing: what has changed is found meanwhile."""
        if self._sender is not None:
            self._sender.compare(tensors.held(), tensors.manifest())
        return {}

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

    _opened = ""  # the name of the handles that were announced last
    _given = ""  # of those that the workers have opened
    _known: tuple[dict[str, Any], ...] = ()  # what every rank has announced last

    def connect(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        """Other ranks of a trainer may announce from now on."""
        self._known, self._given = (), ""
        super().connect(address, port, rank_offset, world_size)

    def receive(self, announced: list[dict[str, Any]]) -> list[dict]:
        """Remember the handles of each rank, which announces them once."""
        known = self._known or ({"opened": ""},) * len(announced)
        told = [
            one | {"handles": before["handles"]} if one.get("opened") == before["opened"] else one
            for one, before in zip(announced, known, strict=True)
        ]
        manifest = super().receive(told)
        self._known, self._opened = tuple(told), "+".join(one["opened"] for one in told)
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
    """Has a sender that keeps its handles, and announces them once."""

    _announced = ""

    def announce(self, tensors: Tensors) -> dict[str, Any]:
        """{"handles": {device id: {name: handle}}, "opened": their name}; no handles where they are known."""
        handles = self._sender.handles(tensors.held())
        known, self._announced = self._announced, self._sender.opened
        return {"handles": {} if known == self._announced else handles, "opened": self._announced}

    def mislabelled(self, announcement: dict[str, Any], label: str) -> dict[str, Any]:
        """The handles under another device's id, or no handles, under a name that no worker has opened."""
        handles = announcement["handles"] or self._sender.made
        self._announced = ""
        return super().mislabelled(announcement | {"handles": handles, "opened": f"mislabelled {label}"}, label)

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
