"""The classes of vLLM's RLHF example, as people copy them. Examined where --subject names them."""

from suite.subjects.broadcast import NO_HANDLES, Broadcast
from suite.subjects.example_classes import ColocateWorkerExtension, WorkerExtension
from suite.subjects.handles import Handles
from suite.subjects.protocol import no_beginning, no_drafts

SUBJECTS = (
    Broadcast(
        "example-broadcast",
        "suite.subjects.example_classes:WorkerExtension",
        lacks=NO_HANDLES | no_beginning("WorkerExtension") | no_drafts(WorkerExtension),
    ),
    Handles(
        "example-colocate",
        "suite.subjects.example_classes:ColocateWorkerExtension",
        lacks=no_beginning("ColocateWorkerExtension") | no_drafts(ColocateWorkerExtension),
    ),
)
