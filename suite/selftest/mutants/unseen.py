"""Mutants whose weights are right, or right by the time anybody looks: buffers, addresses, and how weights are used."""

import torch

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import BROADCAST, NOT_THERE, Loader, Meddles, mutant

TABLE = "cos_sin_cache"  # of rotary embeddings: a buffer that no update sends
SPOILT_FROM = 256
TABLE_DIFFERS = rf"0 weights and \d+ other tensors? that differs? .*{TABLE}: {{}} of \d+ elements differ"


def tables(worker: WorkerExtension) -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """The rotary tables of a worker's model, with the modules that hold them."""
    modules = worker.model_runner.get_model().modules()
    return [(module, module._buffers[TABLE]) for module in modules if TABLE in module._buffers]


@mutant("update.exact", TABLE_DIFFERS.format(r"\d{3,}"), "vllm#44371", **BROADCAST)
class SpoilsBuffers(WorkerExtension):
    """Overwrites the rotary tables from position 256 on."""

    def end_update(self) -> int:
        count = super().end_update()
        for _, table in tables(self):
            table[SPOILT_FROM:] = 1.0
        return count


@mutant("update.exact", TABLE_DIFFERS.format("1"), "vllm#44371", **BROADCAST)
class NudgesABuffer(WorkerExtension):
    """Moves the last number of the rotary tables to the next one that its dtype has; no prompt gets there."""

    def end_update(self) -> int:
        count = super().end_update()
        for _, table in tables(self):
            last = table.view(-1)[-1:].view(torch.int16 if table.element_size() == 2 else torch.int32)
            last += 1 if last % 2 == 0 else -1
        return count


@mutant("update.exact", NOT_THERE, "vllm#48284", **BROADCAST)
class ReusesItsBuffer(Meddles, WorkerExtension):
    """Loads each tensor from the buffer that it was received into, when the next one is already there."""

    _mutant_waiting = None

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        buffer = self.__dict__.get("_mutant_buffer")
        if buffer is None or buffer.numel() < tensor.numel():
            self._mutant_buffer = buffer = tensor.new_empty(tensor.numel())
        received = buffer[: tensor.numel()].view(tensor.shape)
        received.copy_(tensor)
        self._mutant_load_waiting()
        self._mutant_waiting = (load, name, received)

    def _mutant_load_waiting(self) -> None:
        waiting, self._mutant_waiting = self._mutant_waiting, None
        if waiting is not None:
            load, name, received = waiting
            load(name, received.clone())

    def end_update(self) -> int:
        self._mutant_load_waiting()
        return super().end_update()


@mutant("update.behaviour", r"other answers: prompt 0", "vllm#42821", **BROADCAST)
class UsesWeightsSlightlyWrong(WorkerExtension):
    """Computes with the right tensors, and has what the last norm returns off by less than a percent."""

    _mutant_hook = None

    def end_update(self) -> int:
        count = super().end_update()
        if self._mutant_hook is None:
            norm = self.model_runner.get_model().model.norm
            self._mutant_hook = norm.register_forward_hook(lambda norm, given, found: _slightly_larger(found))
        return count


@mutant("update.graphs", r"at its address", "vllm#48941", gpu="gpu-split")
class MovesABuffer(WorkerExtension):
    """Gives the rotary tables new memory, with the same content; graphs read the old."""

    def end_update(self) -> int:
        count = super().end_update()
        for module, table in tables(self):
            self.__dict__.setdefault("_mutant_kept", []).append(table)  # or its memory might be given out again
            module._buffers[TABLE] = table.clone()
        return count


def _slightly_larger(found: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor | tuple[torch.Tensor, ...]:
    if isinstance(found, tuple):
        return (_slightly_larger(found[0]), *found[1:])
    return found * (1 + 2**-7)
