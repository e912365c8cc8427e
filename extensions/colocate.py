"""Weights by handle: trainer and engine share a device's memory, and only handles travel.

"Colocated" and "by handle" are one way of moving weights: a handle can be opened only on the device where the tensor
is. `ColocateWorkerExtension` is the engine's half and `HandleSender` the trainer's.
"""

from collections.abc import Iterable

import torch

from extensions.bracket import UpdateBracket
from extensions.devices import device_id, synchronize
from extensions.handles import HandleError, export_tensor, open_handle
from extensions.manifest import SHOWN, ManifestError, require_name
from extensions.segments import SharedSegment


class ColocateWorkerExtension(UpdateBracket):
    """Maps the trainer's tensors into the worker's process; give it to vLLM as `worker_extension_cls`."""

    weight_sync_sender, weight_sync_handles = "extensions.colocate:HandleSender", "plain"

    def report_device_id(self) -> str:
        """The id of this worker's device, the same in every process: the key under which its handles are sent."""
        self._weight_sync_watch_sleep()
        return device_id(self.device)

    def update_weights_from_ipc_handles(self, ipc_handles: dict[str, dict[str, object]]) -> int:
        """Load the tensors of this worker's device from `{device id: {checkpoint name: handle}}`.

        A handle is plain data as `HandleSender` makes it, or the `(function, arguments)` pair of torch's
        `reduce_tensor`. In a pair, only torch's own rebuild functions are accepted. The sender's device index is
        replaced by this worker's, since the two processes may see different `CUDA_VISIBLE_DEVICES`. All handles are
        opened before any tensor is loaded. Returns the number of tensors loaded. The sender has to keep them unchanged
        until `end_update()` has returned.

        Raises ManifestError where there are no handles for this device, HandleError where one can't be opened, and
        UpdateError where they are not the announced ones. Outside an update it raises ManifestError where they do not
        fit the model, and UpdateError where layers are packed. Where it raises, the weights are as they were.
        """
        own = self.report_device_id()
        handles = of_device(own, ipc_handles)
        update = self._weight_sync_state.update
        if update is None:
            self._weight_sync_refuse_alone(self.model_runner.get_model())
        else:
            for name in handles:
                update.awaited(name)
        tensors = {name: opened_handle(name, handle, self.device) for name, handle in handles.items()}
        self._weight_sync_accept(tensors)
        synchronize(self.device)
        return len(tensors)


def of_device(own: str, ipc_handles: object) -> dict[str, object]:
    """The handles for one device, under names that messages can show."""
    if not isinstance(ipc_handles, dict) or own not in ipc_handles:
        devices = list(ipc_handles)[:SHOWN] if isinstance(ipc_handles, dict) else []
        found = ", ".join(f"{device!r:.80}" for device in devices) or "none"
        raise ManifestError(f"expected handles for device {own}, found handles for: {found}; nothing was touched")
    handles = ipc_handles[own]
    if not isinstance(handles, dict) or not handles:
        raise ManifestError(f"the handles for device {own} are empty; nothing was touched")
    for name in handles:
        require_name(name)
    return handles


def opened_handle(name: str, handle: object, device: torch.device) -> torch.Tensor:
    """The tensor behind a handle. Raises HandleError with its name."""
    try:
        return open_handle(handle, device)
    except HandleError as error:
        raise HandleError(f"{name}: {error}") from error


class HandleSender:
    """The trainer's half. On CUDA the engine reads the tensors themselves: they must not change until `release`."""

    def __init__(self, device: "torch.device | str") -> None:
        """`device` is where the trainer's tensors are: a CUDA device, or "cpu" for shared memory."""
        self._device = torch.device(device)
        self._segment: SharedSegment | None = None
        self._held: list[torch.Tensor] = []

    def handles(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, dict]]:
        """Return `{device id: {name: handle}}` for these tensors: plain data.

        The handle of a CUDA tensor leads to the tensor's own memory. CPU tensors are copied into shared memory.
        """
        named = list(named_tensors)
        if self._device.type == "cuda":
            # Where the caller passes temporaries, such as gathered shards, nobody else keeps them alive.
            self._held = [tensor.detach().contiguous() for _, tensor in named]
            synchronize(self._device)
            handles = {name: export_tensor(tensor) for (name, _), tensor in zip(named, self._held, strict=True)}
        else:
            handles = self._to_segment(named)
        return {device_id(self._device): handles}

    def _to_segment(self, named: list[tuple[str, torch.Tensor]]) -> dict[str, dict]:
        needed = SharedSegment.size_for([tensor for _, tensor in named])
        if self._segment is None or self._segment.nbytes < needed:
            self.release()
            self._segment = SharedSegment(needed)
        return self._segment.fill(named)

    def release(self) -> None:
        """Let go of tensors and shared memory. Call it once every engine has ended the update."""
        self._held = []
        segment, self._segment = self._segment, None
        if segment is not None:
            segment.unlink()
