"""What is examined: an extension class, how its trainer sends, and which requirements it declares that it lacks."""

from dataclasses import dataclass, field

from suite.processes import target


@dataclass(frozen=True)
class Subject:
    """An extension and the transport that drives it.

    name: how reports call it. extension: `pkg.module:Class`. transport: "broadcast" (the trainer's `BroadcastSender`
    and the worker's `update_weight`, tensor by tensor) or "handles" (`HandleSender` and
    `update_weights_from_ipc_handles`).
    lacks: {requirement id: reason} of what it is not made to do; those are judged unsupported, never passed.
    sender: `pkg.module:Class` of its sender where that is not the reference's. host: the subject whose engines it is
    examined on, by taking the place of that subject's extension in the live workers; empty for engines of its own.
    """

    name: str
    extension: str
    transport: str
    lacks: dict[str, str] = field(default_factory=dict, hash=False)
    sender: str = ""
    host: str = ""

    def load(self) -> type:
        """The class itself."""
        return load(self.extension)

    def plain(self) -> dict[str, str]:
        """What an engine's process has to know, as plain data: `Subject(**plain)`."""
        return {"name": self.name, "extension": self.extension, "transport": self.transport}


TRANSPORT_METHODS = {
    "broadcast": ("init_weight_update_group", "update_weight", "check_weights_changed"),
    "handles": ("report_device_id", "update_weights_from_ipc_handles", "check_weights_changed"),
}

# A sender of the user's own has the constructor and the methods of these.
SENDERS = {"broadcast": "extensions.broadcast:BroadcastSender", "handles": "extensions.colocate:HandleSender"}

SUBJECTS: dict[str, Subject] = {
    "broadcast": Subject("broadcast", "extensions.broadcast:WorkerExtension", "broadcast"),
    "colocate": Subject("colocate", "extensions.colocate:ColocateWorkerExtension", "handles"),
}


def subject_from(extension: str) -> Subject:
    """The subject for a user's class, given as `pkg.module:Class`; its methods tell the transport.

    An attribute `weight_sync_sender` names the class of its sender, where it has one of its own. Raises ValueError,
    with what is missing, where it can't be imported or has the methods of no transport.
    """
    cls = load(extension)
    for transport, methods in TRANSPORT_METHODS.items():
        if all(callable(getattr(cls, method, None)) for method in methods):
            return Subject(cls.__name__, extension, transport, sender=getattr(cls, "weight_sync_sender", ""))
    wanted = "; or ".join(f"{transport}: {', '.join(methods)}" for transport, methods in TRANSPORT_METHODS.items())
    raise ValueError(f"{extension} has the methods of no known transport; expected {wanted}")


def load(extension: str) -> type:
    """Import `pkg.module:Class`. Raises ValueError with the reason where that fails."""
    try:
        cls = target.load(extension)
    except Exception as error:  # an import may raise anything
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"expected an extension as pkg.module:Class, found {extension!r}: {why}") from error
    if not isinstance(cls, type):
        raise ValueError(f"{extension} is a {type(cls).__name__}, not a class")
    return cls
