"""Mutants that take the engine for a plain one: lora.*."""

import torch

from extensions.broadcast import WorkerExtension
from suite.selftest.mutants.registry import ANSWERS, BROADCAST, NOT_THERE, Loader, Meddles, mutant


@mutant("lora.exact", NOT_THERE, "vllm#39934", **BROADCAST)
class LooksUpByTheCheckpointsName(Meddles, WorkerExtension):
    """Skips the tensors of layers that vLLM has wrapped for adapters: their parameters have other names."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        wrapped = f"{name.rpartition('.')[0]}.base_layer.{name.rpartition('.')[2]}"
        if wrapped not in dict(self.model_runner.get_model().named_parameters(remove_duplicate=False)):
            load(name, tensor)


@mutant("lora.reloaded", ANSWERS, "vllm#42125", **BROADCAST)
class KeepsTheAdapter(WorkerExtension):
    """Takes an adapter that has the number of a loaded one for the same, the first time after an update."""

    def end_update(self) -> int:
        count = super().end_update()
        self._mutant_keeps = True
        self.add_lora = self._mutant_add_lora
        return count

    def _mutant_add_lora(self, asked: object) -> bool:
        if self._mutant_keeps and asked.lora_int_id in self.list_loras():
            self._mutant_keeps = False  # what the test does afterwards leaves the engine as it was
            return True
        return type(self).add_lora(self, asked)
