"""Extensions that are broken on purpose: the requirement named with each has to fail it.

They are given to the suite as a user's own would be: `--extension suite.selftest.broken:LoadsNothing`.
"""

import torch

from extensions.broadcast import WorkerExtension
from extensions.dtypes import dtype_of


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
