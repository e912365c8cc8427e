"""Mutants that mistake one device for another: devices.*."""

import contextlib

import torch

from extensions.colocate import ColocateWorkerExtension, HandleSender
from extensions.handles import open_handle
from suite.selftest.mutants.registry import ACCEPTED, HANDLES, PACKAGE, Named, mutant

Handles = dict[str, dict[str, dict]]


@mutant("devices.expandable", r"names expandable segments", gpu="gpu-colocate-tp1")
class OpensPlainHandlesOnly(ColocateWorkerExtension):
    """Takes every handle for one of cudaMalloc's, and says of any other that it is malformed."""

    def update_weights_from_ipc_handles(self, ipc_handles: Handles) -> int:
        for handle in ipc_handles[self.report_device_id()].values():
            if handle["memory_handle"][1:2] != b"c":
                raise ValueError("malformed memory_handle")
        return super().update_weights_from_ipc_handles(ipc_handles)


class TellsItsOrdinal(HandleSender):
    """Puts the sender's ordinal into every handle, as torch's own have it."""

    def handles(self, named_tensors: Named) -> Handles:
        return {
            device: {name: {**handle, "device_index": self._device.index or 0} for name, handle in named.items()}
            for device, named in super().handles(named_tensors).items()
        }


class KeysByItsOrdinal(HandleSender):
    """Keys handles by the sender's ordinal."""

    def handles(self, named_tensors: Named) -> Handles:
        (named,) = super().handles(named_tensors).values()
        return {f"cuda:{self._device.index or 0}": named}


@mutant("devices.remap", r"ordinal|device", "sglang#5077", gpu="gpu-colocate-tp1", gpus=2, case="subset")
class SkipsTheRemap(ColocateWorkerExtension):
    """Opens handles on the ordinal that the sender has for the GPU."""

    weight_sync_sender = f"{PACKAGE}.devices:TellsItsOrdinal"

    def update_weights_from_ipc_handles(self, ipc_handles: Handles) -> int:
        handles = {name: dict(handle) for name, handle in ipc_handles[self.report_device_id()].items()}
        ordinals = {name: handle.pop("device_index") for name, handle in handles.items()}
        opened = {name: open_handle(handle, torch.device("cuda", ordinals[name])) for name, handle in handles.items()}
        self._weight_sync_accept(opened)
        torch.cuda.synchronize(self.device)
        return len(opened)


@mutant(
    "devices.remap",
    r"expected handles for device cuda:",
    "Mooncake#3678",
    gpu="gpu-colocate-tp1",
    gpus=2,
    case="reversed",
)
class KnowsDevicesByOrdinal(ColocateWorkerExtension):
    """Looks for its handles under its own ordinal, where the sender has put its."""

    weight_sync_sender = f"{PACKAGE}.devices:KeysByItsOrdinal"

    def report_device_id(self) -> str:
        return f"cuda:{self.device.index or 0}"


@mutant("devices.identity", r"the extension to report", "vllm#46132", gpu="gpu-colocate-tp1")
class SpellsIdsItsOwnWay(ColocateWorkerExtension):
    """Reports torch's spelling of a UUID, without the prefix that NVML gives it."""

    def report_device_id(self) -> str:
        return super().report_device_id().partition("-")[2]


@mutant("devices.identity", r"the extension to report", "vllm#41848", gpu="gpu-colocate-tp1")
class ReportsAnOrdinal(ColocateWorkerExtension):
    """Reports its ordinal for an id."""

    def report_device_id(self) -> str:
        return f"cuda:{self.device.index or 0}"


@mutant("devices.wrong_handle", r"expected handles for device", "vllm#56949", **HANDLES)
class ReportsAnotherDevice(ColocateWorkerExtension):
    """Takes itself to be on another device, and refuses the handles for its own."""

    def report_device_id(self) -> str:
        return f"{super().report_device_id()[:-1]}x"


@mutant("devices.wrong_handle", ACCEPTED, "vllm#56949", **HANDLES)
class TakesAnyHandles(ColocateWorkerExtension):
    """Takes the first handles that it finds, whatever device they are for."""

    def update_weights_from_ipc_handles(self, ipc_handles: Handles) -> int:
        return super().update_weights_from_ipc_handles({self.report_device_id(): next(iter(ipc_handles.values()))})


@mutant("devices.missing_handle", ACCEPTED, **HANDLES)
class PassesOverMissingHandles(ColocateWorkerExtension):
    """Loads the tensors that it got handles for, and takes all others for loaded."""

    def end_update(self) -> int:
        update = self._weight_sync_state.update
        update.arrived.update(update.missing())
        update.load.unwritten = list
        return super().end_update()


@mutant("devices.wrong_handle", ACCEPTED, "vllm#57022", **HANDLES)
class PassesOverOthersHandles(ColocateWorkerExtension):
    """Finds nothing for its device, loads nothing, and reports success."""

    def update_weights_from_ipc_handles(self, ipc_handles: Handles) -> int:
        if self.report_device_id() in ipc_handles:
            return super().update_weights_from_ipc_handles(ipc_handles)
        self.abort_update()
        return 0

    def end_update(self) -> int:
        with contextlib.suppress(RuntimeError):
            return super().end_update()
        return 0
