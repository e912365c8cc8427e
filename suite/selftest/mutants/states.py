"""Mutants that are right in what they load and wrong in when, or in what they leave behind.

update.exact and .repeated in time, update.graphs, .fp8, sleep.*, cache.*, memory.*.
"""

import threading

import torch

from extensions.asleep import lost_asleep
from extensions.bracket import State
from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.colocate import ColocateWorkerExtension, HandleSender
from extensions.group import Communicator
from extensions.handles import open_handle
from suite.selftest.mutants.registry import (
    ANSWERS,
    BROADCAST,
    DIFFER,
    HANDLES,
    NOT_THERE,
    PACKAGE,
    Loader,
    Meddles,
    Named,
    mutant,
)

LATER_S = 0.1
DELAY_CYCLES = 4_000_000_000  # of a GPU's clock: about 2 s


# ---- too early, too late


@mutant("update.repeated", DIFFER, "ms-swift#10204", **BROADCAST)
class LoadsOneUpdateLate(Meddles, WorkerExtension):
    """Acknowledges an update whose tensors wait to be loaded, which the next update does."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        before = self._mutant_before(name, tensor)
        load(name, tensor if before is None else before)


@mutant("update.exact", NOT_THERE, "slime#929", gpu="gpu-colocate-tp1")
class AcknowledgesWhatIsQueued(ColocateWorkerExtension):
    """Acknowledges copies that a stream of its own has yet to make."""

    def update_weights_from_ipc_handles(self, ipc_handles: dict[str, dict[str, object]]) -> int:
        handles = ipc_handles[self.report_device_id()]
        self._mutant_opened = {name: open_handle(handle, self.device) for name, handle in handles.items()}
        self._mutant_stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._mutant_stream):
            torch.cuda._sleep(DELAY_CYCLES)
            self._weight_sync_accept(self._mutant_opened)
        return len(handles)

    def end_update(self) -> int:
        self._weight_sync_state.update.load.end()
        self._weight_sync_state = State()
        return len(self._mutant_opened)


@mutant("update.exact", DIFFER, "slime#929", **BROADCAST)
class WritesAMomentLater(WorkerExtension):
    """Acknowledges an update while a thread has yet to write the last norm, which takes it a tenth of a second."""

    def end_update(self) -> int:
        norm = self.model_runner.get_model().model.norm.weight.data
        count, new = super().end_update(), norm.clone()
        norm.copy_(self.__dict__.get("_mutant_norm", torch.zeros_like(norm)))
        self._mutant_norm = new
        threading.Timer(LATER_S, norm.copy_, [new]).start()
        return count


class FreesTooEarly(HandleSender):
    """Lets go of what it hands over, and somebody else writes there."""

    def handles(self, named_tensors: Named) -> dict[str, dict[str, dict]]:
        handles = super().handles([(name, tensor.detach().clone()) for name, tensor in named_tensors])
        for tensor in self._held:
            tensor.zero_()
        if self._segment is not None:
            self._segment._bytes.zero_()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return handles


@mutant("update.exact", NOT_THERE, "verl#7873", **HANDLES)
class ReadsFreedHandles(ColocateWorkerExtension):
    """Reads its handles after the sender has freed what they lead to."""

    weight_sync_sender = f"{PACKAGE}.states:FreesTooEarly"


class Disabled:
    """What vLLM's communicator is where there is no NCCL: it carries nothing, and says nothing."""

    def __init__(self, group: Communicator) -> None:
        self._group, self.device = group, group.device

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        self._group.close()


class SendsByADisabledCommunicator(BroadcastSender):
    """The other end of a communicator that carries nothing."""

    def send(self, named_tensors: Named) -> int:
        if not isinstance(self._group, Disabled):
            self._group = Disabled(self._group)
        return super().send(named_tensors)


@mutant("update.exact", NOT_THERE, "vllm#57022", **BROADCAST)
class UsesADisabledCommunicator(WorkerExtension):
    """Loads what was in the memory that a disabled communicator should have received into."""

    weight_sync_sender = f"{PACKAGE}.states:SendsByADisabledCommunicator"

    def init_weight_update_group(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        super().init_weight_update_group(address, port, rank_offset, world_size)
        self._weight_sync_group = Disabled(self._weight_sync_group)


# ---- what the engine has beside its weights


@mutant("update.behaviour", r"generate\(\) in process .* has not answered", **BROADCAST, patient=True)
class LeavesTheEnginePaused(WorkerExtension):
    """Has the worker take no step any more, as in an engine that is paused for an update and not resumed."""

    def end_update(self) -> int:
        count = super().end_update()
        self.execute_model = self._mutant_execute_model
        return count

    def _mutant_execute_model(self, *_: object, **__: object) -> None:
        threading.Event().wait()


@mutant("cache.prefix", ANSWERS, "vllm#9744", **BROADCAST)
class KeepsThePrefixCache(WorkerExtension):
    """Says that the prefix cache need not be reset after its updates."""

    weight_sync_resets_cache = True


@mutant("update.graphs", rf"{ANSWERS}|at its address", "vllm#41670", gpu="gpu-split")
class MovesParameters(WorkerExtension):
    """Gives every parameter new memory before it loads; graphs go on with the old."""

    def begin_update(self, manifest: list[dict]) -> int:
        kept = self.__dict__.setdefault("_mutant_kept", [])
        for parameter in self.model_runner.get_model().parameters():
            kept.append(parameter.data)
            parameter.data = parameter.data.clone()
        return super().begin_update(manifest)


@mutant("update.fp8", DIFFER, "verl#7136", gpu="gpu-split")
class KeepsOldScales(WorkerExtension):
    """Quantises the new weights and keeps the scales of the old."""

    def begin_update(self, manifest: list[dict]) -> int:
        self._mutant_scales = {name: scale.detach().clone() for name, scale in self._mutant_scales_now()}
        return super().begin_update(manifest)

    def end_update(self) -> int:
        count = super().end_update()
        with torch.no_grad():
            for name, scale in self._mutant_scales_now():
                scale.copy_(self._mutant_scales[name])
        torch.cuda.synchronize(self.device)
        return count

    def _mutant_scales_now(self) -> list[tuple[str, torch.Tensor]]:
        named = self.model_runner.get_model().named_parameters()
        return [(name, parameter) for name, parameter in named if name.endswith("weight_scale")]


@mutant("sleep.level1", DIFFER, "trl#5312", gpu="gpu-split")
class LosesUpdatesAfterSleep(Meddles, WorkerExtension):
    """Loads nothing once the engine has slept."""

    _mutant_slept = False

    def begin_update(self, manifest: list[dict]) -> int:
        self.sleep = self._mutant_sleep
        return super().begin_update(manifest)

    def _mutant_sleep(self, *args: object, **kwargs: object) -> None:
        type(self).sleep(self, *args, **kwargs)
        self._mutant_slept = True

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not self._mutant_slept:
            load(name, tensor)


@mutant("sleep.level2", rf"{DIFFER}|{ANSWERS}", "vllm#16564", gpu="gpu-split")
class LosesBuffersAsleep(WorkerExtension):
    """Brings back the weights of an engine that slept at level 2, and not the buffers, such as rotary tables."""

    def begin_update(self, manifest: list[dict]) -> int:
        self.wake_up = self._mutant_wake_up
        return super().begin_update(manifest)

    def _mutant_wake_up(self, *args: object, **kwargs: object) -> None:
        type(self).wake_up(self, *args, **kwargs)
        for buffer in self.model_runner.get_model().buffers():
            if buffer.is_floating_point():
                buffer.zero_()


@mutant("sleep.level2", DIFFER, "vllm#53343", gpu="gpu-split", case="bloom-tiny")
class LosesSlopesAsleep(WorkerExtension):
    """Keeps nothing of an engine that sleeps at level 2; what is no parameter and no buffer holds any values then."""

    def _weight_sync_watch_sleep(self) -> None:
        self.wake_up = self._mutant_wake_up

    def _mutant_wake_up(self, *args: object, **kwargs: object) -> None:
        type(self).wake_up(self, *args, **kwargs)
        for lost in lost_asleep([self.model_runner.get_model()], self.device).values():
            lost.zero_()


@mutant("sleep.tags", DIFFER, "vllm#15254", gpu="gpu-split")
class LosesUpdatesHalfAwake(Meddles, WorkerExtension):
    """Loads nothing while the cache sleeps."""

    _mutant_half_awake = False

    def begin_update(self, manifest: list[dict]) -> int:
        self.wake_up = self._mutant_wake_up  # from the second time on that the engine sleeps
        return super().begin_update(manifest)

    def _mutant_wake_up(self, tags: list[str] | None = None) -> None:
        type(self).wake_up(self, tags)
        self._mutant_half_awake = tags == ["weights"]

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if not self._mutant_half_awake:
            load(name, tensor)


# ---- what is left behind


@mutant("memory.steady", r"(host|torch|device)_bytes of engine", "vllm#51258", **BROADCAST)
class KeepsEveryBuffer(Meddles, WorkerExtension):
    """Keeps a copy of each tensor that it has received."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        self.__dict__.setdefault("_mutant_kept", []).append(tensor.clone())
        load(name, tensor)


@mutant("memory.steady", DIFFER, **BROADCAST)
class RunsOutOfRoom(Meddles, WorkerExtension):
    """Loads what comes in its first forty updates."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self._mutant_updates <= 40:
            load(name, tensor)


@mutant("memory.steady", r"mappings of engine", "vllm#52950", cpu="cpu-tp1")
class KeepsHandlesOpen(ColocateWorkerExtension):
    """Never lets go of what it has mapped."""

    def update_weights_from_ipc_handles(self, ipc_handles: dict[str, dict[str, object]]) -> int:
        opened = [open_handle(handle, self.device) for handle in ipc_handles[self.report_device_id()].values()]
        self.__dict__.setdefault("_mutant_opened", []).extend(opened)
        return super().update_weights_from_ipc_handles(ipc_handles)
