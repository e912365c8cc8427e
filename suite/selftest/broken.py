"""Extensions that are broken on purpose: the requirement named with each has to fail it.

They are given to the suite as a user's own would be: `--extension suite.selftest.broken:LoadsNothing`.
"""

import torch

from extensions.broadcast import WorkerExtension
from extensions.dtypes import dtype_of
from extensions.loading import new_load
from extensions.manifest import ManifestError, parse


class LoadsNothing(WorkerExtension):
    """Receives every tensor and loads none, and says that all went well: update.exact, .zeroed and .behaviour."""

    def begin_update(self, manifest: list[dict]) -> int:
        return len(manifest)

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        self._weight_sync_group.broadcast(torch.empty(shape, dtype=dtype_of(dtype), device=self.device), src=0)

    def end_update(self) -> int:
        return 0

    def check_weights_changed(self) -> bool:
        return True


class ReceivesNothing(LoadsNothing):
    """Does not even receive: the sender waits for it."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        pass


class DeafAfterRefusal(WorkerExtension):
    """The update after a refused one is received and not loaded: update.sequence."""

    _broken_deaf = False

    def begin_update(self, manifest: list[dict]) -> int:
        if self._broken_deaf:
            return len(manifest)
        try:
            return super().begin_update(manifest)
        except ManifestError:
            self._broken_deaf = True
            raise

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        if self._broken_deaf:
            self._weight_sync_group.broadcast(torch.empty(shape, dtype=dtype_of(dtype), device=self.device), src=0)
        else:
            super().update_weight(name, dtype, shape)

    def end_update(self) -> int:
        if self._broken_deaf:
            self._broken_deaf = False
            return 0
        return super().end_update()


class LosesEveryOtherEmbedding(WorkerExtension):
    """Every second update leaves the embedding as it was: update.sequence."""

    _broken_updates = 0

    def begin_update(self, manifest: list[dict]) -> int:
        self._broken_updates += 1
        return super().begin_update(manifest)

    def _weight_sync_accept(self, tensors: dict[str, torch.Tensor]) -> None:
        if self._broken_updates % 2 == 0 and "model.embed_tokens.weight" in tensors:
            self._weight_sync_pending["model.embed_tokens.weight"] = None
        else:
            super()._weight_sync_accept(tensors)


class StaysUpdating(WorkerExtension):
    """An aborted update is put back and never closed: update.sequence."""

    def abort_update(self) -> str:
        if self._weight_sync_load is not None:
            self._weight_sync_load.abort()
        return "the weights are as they were before the update"


class AppliesHalf(WorkerExtension):
    """Nothing is checked before it is loaded, so what is refused has been loaded in part: update.sequence."""

    def begin_update(self, manifest: list[dict]) -> int:
        self._weight_sync_load = new_load(self.model_runner.get_model(), self.vllm_config)
        self._weight_sync_pending = parse(manifest)
        self._weight_sync_load.begin()
        return len(manifest)


class LosesWhatComesAlone(WorkerExtension):
    """A tensor outside of an update is loaded into a parameter that is not computed with: update.sequence."""

    def _weight_sync_refuse_alone(self, model: torch.nn.Module) -> None:
        pass
