"""Weights by handle: trainer and engine share a device's memory, and only handles travel."""

from collections.abc import Iterable

import torch

from extensions.bracket import UpdateBracket
from extensions.devices import device_id
from extensions.handles import HandleError, export_tensor, open_handle
from extensions.manifest import SHOWN, ManifestError, require_name
from extensions.segments import SharedSegment


class ColocateWorkerExtension(UpdateBracket):
    """Maps the trainer's tensors where they lie; give it to vLLM as `worker_extension_cls`."""

    def report_device_id(self) -> str:
        """The device of this worker, by an id that every process gives it: the key of its handles."""
        return device_id(self.device)

    def update_weights_from_ipc_handles(self, ipc_handles: dict[str, dict[str, object]]) -> int:
        """Load the tensors behind `{device id: {checkpoint name: handle}}` that are on this worker's device.

        A handle is plain data, as `HandleSender` makes it, or the `(function, arguments)` pair that torch's
        `reduce_tensor` returns, provided that the function is one of torch's own rebuild functions. The device index in
        a handle is the sender's; it is replaced by this worker's own, since the two processes may see different
        `CUDA_VISIBLE_DEVICES`. All handles are opened before any is loaded. Returns how many tensors were loaded;
        they are loaded when this returns, and the sender may free them once `end_update()` has returned too.

        Raises ManifestError where no handles are for this device, HandleError where one can't be opened, UpdateError
        where they aren't the announced ones, and, outside an update, ManifestError where they don't fit the model;
        the weights are as they were then.
        """
        own = self.report_device_id()
        handles = _of_device(own, ipc_handles)
        if self._weight_sync_load is None:
            self._weight_sync_refuse_alone(self.model_runner.get_model())
        else:
            for name in handles:
                self._weight_sync_awaited(name)
        tensors = {name: _opened(name, handle, self.device) for name, handle in handles.items()}
        self._weight_sync_accept(tensors)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return len(tensors)


def _of_device(own: str, ipc_handles: object) -> dict[str, object]:
    """The handles for one device, by names that can be shown."""
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


def _opened(name: str, handle: object, device: torch.device) -> torch.Tensor:
    try:
        return open_handle(handle, device)
    except HandleError as error:
        raise HandleError(f"{name}: {error}") from error


class HandleSender:
    """The trainer's half. The tensors stay the trainer's: they have to live, unchanged, until `release`."""

    def __init__(self, device: "torch.device | str") -> None:
        """`device` is where the trainer's tensors are: a CUDA device, or "cpu" for shared memory."""
        self._device = torch.device(device)
        self._segment: SharedSegment | None = None
        self._held: list[torch.Tensor] = []

    def handles(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, dict[str, dict]]:
        """`{device id: {name: handle}}` for these tensors, as plain data that any serialiser passes.

        CUDA tensors are handed over where they lie. CPU tensors are copied into one shared-memory segment.
        """
        named = list(named_tensors)
        if self._device.type == "cuda":
            # A gathered shard may be a temporary of the caller's: it is held here until it is released.
            self._held = [tensor.detach().contiguous() for _, tensor in named]
            torch.cuda.synchronize(self._device)
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
