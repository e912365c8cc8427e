"""Weights by broadcast as planned: one call to the workers an update, received straight to where they belong."""

from collections.abc import Callable
from typing import ClassVar

from suite.subjects.broadcast import NO_HANDLES, Broadcast, BroadcastEngine, BroadcastTrainer
from suite.subjects.protocol import Engine, EngineHalf, Tensors, Trainer, TrainerHalf

ONE_CALL = "an update is one call, receive_update(): it has no beginning inside of which another could begin"


class PlannedEngine(BroadcastEngine):
    """Has the workers plan an update where another one is announced, and receive it."""

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

    def transfer(self, manifest: list[dict]) -> None:
        """Have the workers receive the update; outside of one, the tensors alone."""
        if self._begun:
            self.engine.rpc("receive_update", self._digest)
        else:
            self.engine.rpc("receive_alone", manifest)

    def end(self) -> None:
        """receive_update() has ended it."""
        self._begun = False

    def abort(self) -> None:
        """What the workers have planned may not be of their model any more."""
        self._planned, self._begun = None, False
        super().abort()


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
        "plan_update(manifest), where the manifest is another than that of the update before",
        "receive_update(digest)",
    )

    @classmethod
    def lacking(cls, extension: type) -> dict[str, str]:
        """What no such class has."""
        return NO_HANDLES | {"errors.nested": ONE_CALL}

    def engine_half(self, engine: Engine) -> EngineHalf:
        """The half for an engine's process."""
        return PlannedEngine(self, engine)

    def trainer_half(self, trainer: Trainer) -> TrainerHalf:
        """The half for a rank of the trainer."""
        return PlannedTrainer(self, trainer)


SUBJECT = Planned(
    "planned",
    "extensions.planned:PlannedWorkerExtension",
    lacks=NO_HANDLES | {"errors.nested": ONE_CALL},
    sender="extensions.planned:PlannedSender",
)
