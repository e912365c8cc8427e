"""Mutants that are right in each update on its own, and wrong in what one leaves to the next: update.sequence."""

import torch

from extensions.broadcast import WorkerExtension
from extensions.manifest import ManifestError
from extensions.tensors import dtype_of
from suite.selftest.mutants.registry import BROADCAST, DIFFER, Loader, Meddles, Unchecked, mutant


@mutant("update.sequence", DIFFER, "vllm#57854", **BROADCAST)
class DeafAfterRefusal(WorkerExtension):
    """Receives the update after a refused one, and loads nothing of it."""

    _mutant_deaf = False

    def begin_update(self, manifest: list[dict]) -> int:
        if self._mutant_deaf:
            return len(manifest)
        try:
            return super().begin_update(manifest)
        except ManifestError:
            self._mutant_deaf = True
            raise

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        if self._mutant_deaf:
            self._weight_sync_group.broadcast(torch.empty(shape, dtype=dtype_of(dtype), device=self.device), src=0)
        else:
            super().update_weight(name, dtype, shape)

    def end_update(self) -> int:
        if self._mutant_deaf:
            self._mutant_deaf = False
            return 0
        return super().end_update()


@mutant("update.sequence", DIFFER, **BROADCAST)
class LosesEveryOtherEmbedding(Meddles, WorkerExtension):
    """Leaves the embedding as it was in every second update."""

    def _mutant_load(self, load: Loader, name: str, tensor: torch.Tensor) -> None:
        if self._mutant_updates % 2 or name != "model.embed_tokens.weight":
            load(name, tensor)


@mutant("update.sequence", rf"{DIFFER}|an update is under way", "vllm#57854", **BROADCAST)
class StaysUpdating(WorkerExtension):
    """Puts an aborted update back and does not close it."""

    def abort_update(self) -> str:
        if self._weight_sync_state.update is not None:
            self._weight_sync_state.update.load.abort()
        return "the weights are as they were before the update"


@mutant("update.sequence", rf"{DIFFER}|found: success|an error that names", "vllm#57854", **BROADCAST)
class AppliesHalf(Unchecked, WorkerExtension):
    """Checks nothing before it loads, so that what is refused has been loaded in part."""


@mutant("update.sequence", DIFFER, "vllm#42821", cpu="cpu-tp1")
class LosesWhatComesAlone(WorkerExtension):
    """Takes a tensor outside of an update, and loads it to where nothing computes with it."""

    def _weight_sync_accept_alone(self, tensors: dict[str, torch.Tensor]) -> None:
        pass
