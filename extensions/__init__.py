"""Reference weight-sync extensions for vLLM workers, and the senders that trainers use with them.

Runs inside vLLM's workers and inside trainers. It imports without CUDA and without vLLM.

Weights are moved by broadcast (`WorkerExtension`, `BroadcastSender`) or by handle (`ColocateWorkerExtension`,
`HandleSender`).
"""

from extensions.bracket import UpdateError
from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.colocate import ColocateWorkerExtension, HandleSender
from extensions.group import stateless_init_process_group
from extensions.manifest import ManifestError, manifest_of

__all__ = [
    "BroadcastSender",
    "ColocateWorkerExtension",
    "HandleSender",
    "ManifestError",
    "UpdateError",
    "WorkerExtension",
    "manifest_of",
    "stateless_init_process_group",
]
