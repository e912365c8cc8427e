"""Mutants that take the loss of the other side wrongly: faults.*."""

import threading

import torch

from extensions.bracket import UpdateBracket
from extensions.broadcast import BroadcastSender, WorkerExtension
from extensions.group import GroupError, stateless_init_process_group
from extensions.tensors import dtype_of
from suite.selftest.mutants.registry import BROADCAST, DIFFER, PACKAGE, Named, mutant

AN_HOUR_S = 3600.0


@mutant("faults.trainer_killed", DIFFER, "vllm#57854", **BROADCAST, case="during")
class SaysReadyWhenHalfLoaded(WorkerExtension):
    """Says that it is ready after an update that was lost half way."""

    def update_state(self) -> str:
        return "ready"


@mutant("faults.trainer_killed", DIFFER, "trl#6913", **BROADCAST, case="during")
class TakesWhatCameForAll(WorkerExtension):
    """Goes on when the trainer is gone, and ends the update with whatever its buffers hold."""

    def update_weight(self, name: str, dtype: str, shape: list[int]) -> None:
        try:
            super().update_weight(name, dtype, shape)
        except GroupError:
            self._weight_sync_accept({name: torch.zeros(shape, dtype=dtype_of(dtype), device=self.device)})

    def end_update(self) -> int:
        return UpdateBracket.end_update(self)


@mutant("faults.trainer_killed", r"not to say inconsistent", **BROADCAST, case="during")
class StaysInconsistent(WorkerExtension):
    """Says that it is inconsistent from the first update on that it has lost, however many it gets afterwards."""

    _mutant_lost = False

    def abort_update(self) -> str:
        self._mutant_lost |= self._weight_sync_state.update is not None
        return super().abort_update()

    def update_state(self) -> str:
        return "inconsistent" if self._mutant_lost else super().update_state()


@mutant("faults.trainer_stopped", r"update\(\) in process .* has not answered", "trl#6913", **BROADCAST, patient=True)
class WaitsForEver(WorkerExtension):
    """Gives a trainer that has stopped an hour to go on."""

    def init_weight_update_group(self, address: str, port: int, rank_offset: int, world_size: int) -> None:
        self.close_weight_update_group()
        self._weight_sync_group = stateless_init_process_group(
            address, port, rank_offset + self.rank, world_size, self.device, AN_HOUR_S
        )


class NeverGivesUp(BroadcastSender):
    """Waits for a worker that has died to come back."""

    def send(self, named_tensors: Named) -> int:
        try:
            return super().send(named_tensors)
        except GroupError:
            threading.Event().wait()
            raise


@mutant(
    "faults.worker_killed", r"update\(\) in process .*trainer.* has not answered", "trl#6913",
    cpu="cpu-tp2", gpu="gpu-split", patient=True,
)  # fmt: skip
class HasAStubbornSender(WorkerExtension):
    """Its sender waits for the worker that has died, and says nothing."""

    weight_sync_sender = f"{PACKAGE}.faults:NeverGivesUp"
